"""MySQL as a server for tests: the programs of Debian's package `mysql-server-core`, which `tests/servers/mysql.sh`
unpacks. They run with the C library that was fetched with them, because this machine's may be older."""

from __future__ import annotations

from pathlib import Path

from delta_sync.maven import cache_dir
from delta_sync.testing.mariadb import MariaDB
from delta_sync.testing.processes import ServerError
from delta_sync.testing.servers import others_reach


class MySQL(MariaDB):
    """MySQL with a binary log; user and password `delta`, with every privilege, and database `delta`."""

    name = "mysql"

    def __init__(self, directory: Path | None = None, *, port: int | None = None, **settings: object) -> None:
        """`settings` are system variables; they can be changed through the attribute, for the next start."""
        super().__init__(directory, port=port, **{"mysqlx": "OFF", **settings})

    def _install_command(self) -> list[str]:
        return [*self._server(), f"--datadir={self._data}", "--initialize-insecure"]

    def _server(self) -> list[str]:
        place = _place()
        if self._user() is not None and not others_reach(place):
            raise ServerError(f"the user {self._user()} cannot reach {place}; choose another folder by DELTA_JARS")
        libraries = place / "usr/lib/x86_64-linux-gnu"
        return [
            str(libraries / "ld-linux-x86-64.so.2"),
            "--library-path",
            str(libraries),
            str(place / "usr/sbin/mysqld"),
            "--no-defaults",
            f"--basedir={place / 'usr'}",
            "--secure-file-priv=NULL",  # or it looks for a folder of the system's
            f"--plugin-dir={place / 'usr/lib/mysql/plugin'}",
            f"--lc-messages-dir={place / 'usr/share/mysql'}",
        ]


def _place() -> Path:
    """Return the folder with the unpacked packages; of several versions the last. Raises ServerError without any."""
    found = sorted(cache_dir().glob("mysql-[0-9]*"))
    if not found:
        raise ServerError(f"there is no MySQL in {cache_dir()}; type: make test-elsewhere, or tests/servers/mysql.sh")
    return found[-1]
