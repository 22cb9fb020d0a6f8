"""A store of objects that speaks S3: Versity's gateway, which keeps them in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import requests

from delta_sync.testing.processes import free_port
from delta_sync.testing.servers import ANSWER_TIMEOUT_S, NativeServer

ACCESS_KEY, SECRET_KEY = "AKIADELTATESTS", "wJalrXUtnFEMI/K7MDENG"
BUILT = Path(__file__).parents[2] / ".cache" / "elsewhere" / "bin"  # by tests/servers/objects.sh


class ObjectStore(NativeServer):
    """Buckets are made by whoever needs them."""

    name = "versitygw"

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory, port=free_port())
        (self._binary,) = BUILT.glob("versitygw-*")

    @property
    def url(self) -> str:
        """Return its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        (self.directory / "data").mkdir(exist_ok=True)

    def _command(self) -> list[str]:
        address = f"127.0.0.1:{self.port}"
        return [str(self._binary), "--port", address, "--health", "/healthy", "posix", str(self.directory / "data")]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "ROOT_ACCESS_KEY_ID": ACCESS_KEY, "ROOT_SECRET_ACCESS_KEY": SECRET_KEY}

    def _answers(self) -> bool:
        return requests.get(f"{self.url}/healthy", timeout=ANSWER_TIMEOUT_S).ok


class GoogleStore(NativeServer):
    """A store of objects that speaks as Google's: fake-gcs-server, which keeps them in memory, so it starts empty."""

    name = "fake-gcs-server"

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory, port=free_port())
        (self._binary,) = BUILT.glob("fake-gcs-server-*")

    @property
    def url(self) -> str:
        """Return its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> dict[str, str]:
        """Return what gcsfs needs to find it."""
        return {"endpoint_url": self.url, "token": "anon", "project": "delta"}

    def _prepare(self) -> None:
        pass

    def _command(self) -> list[str]:
        where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        return [str(self._binary), *where, "-external-url", self.url, "-backend", "memory"]

    def _answers(self) -> bool:
        return requests.get(f"{self.url}/_internal/healthcheck", timeout=ANSWER_TIMEOUT_S).ok


class AzureStore(NativeServer):
    """A store of objects that speaks as Azure's: Azurite, Microsoft's own for tests, whose account everybody knows."""

    name = "azurite"
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory, port=free_port())

    @property
    def url(self) -> str:
        """Return its endpoint, of the one account."""
        return f"http://127.0.0.1:{self.port}/{self.account}"

    @property
    def storage(self) -> dict[str, str]:
        """Return what adlfs needs to find it."""
        place = f"BlobEndpoint={self.url};"
        login = f"AccountName={self.account};AccountKey={self.key};"
        return {"connection_string": f"DefaultEndpointsProtocol=http;{login}{place}"}

    def _prepare(self) -> None:
        (self.directory / "data").mkdir(exist_ok=True)

    def _command(self) -> list[str]:
        program = BUILT.parent / "azurite" / "node_modules" / ".bin" / "azurite-blob"
        place = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.directory / "data")]
        return [str(program), *place, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]

    def _answers(self) -> bool:
        return requests.get(self.url, timeout=ANSWER_TIMEOUT_S).status_code < 500
