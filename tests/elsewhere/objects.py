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
