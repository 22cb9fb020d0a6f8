"""Apicurio Registry as a server for tests: schemas by id, with the API that Confluent's registry has, too."""

from __future__ import annotations

from pathlib import Path

import requests

from delta_sync.testing import jars
from delta_sync.testing.processes import free_port
from delta_sync.testing.servers import ANSWER_TIMEOUT_S, JVM_OPTIONS, NativeServer


class Apicurio(NativeServer):
    """Apicurio Registry, its schemas in a file of H2; without authentication."""

    name = "apicurio"

    def __init__(self, directory: Path | None = None, *, port: int | None = None, heap_mb: int = 256) -> None:
        super().__init__(directory, port=port or free_port(1))
        self._heap_mb = heap_mb

    @property
    def url(self) -> str:
        """Return the API that Confluent's registry has as well: `kafka.registry.url`."""
        return f"http://127.0.0.1:{self.port}/apis/ccompat/v7"

    def _prepare(self) -> None:
        pass  # H2 creates its file

    def _command(self) -> list[str]:
        settings = {
            "quarkus.http.host": "127.0.0.1",
            "quarkus.http.port": self.port,
            "quarkus.management.host": "127.0.0.1",
            "quarkus.management.port": self.port + 1,
            "apicurio.storage.kind": "sql",
            "apicurio.storage.sql.kind": "h2",
            # H2 writes behind by half a second unless told otherwise; what was acknowledged must survive a kill.
            "apicurio.datasource.url": f"jdbc:h2:file:{self.directory / 'registry'};WRITE_DELAY=0",
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        return jars.archive_command(self.name, "quarkus-run.jar", f"-Xmx{self._heap_mb}m", *JVM_OPTIONS, *options)

    def _answers(self) -> bool:
        return requests.get(f"{self.url}/subjects", timeout=ANSWER_TIMEOUT_S).ok
