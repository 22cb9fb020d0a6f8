"""MariaDB as a server for tests: the programs of Debian's packages `mariadb-server-core` and
`mariadb-client-core`, which start no service."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path
from urllib.parse import quote

import pymysql

from delta_sync.testing.processes import ServerError, ServerProcess, free_port
from delta_sync.testing.servers import ANSWER_TIMEOUT_S, START_TIMEOUT_S, UNPRIVILEGED, NativeServer, others_reach

USER = "delta"
PASSWORD = "of-a-test-server"  # noqa: S105 -- one that only tests can reach


class MariaDB(NativeServer):
    """MariaDB with a row-based binary log; user and password `delta`, with every privilege, and database `delta`."""

    name = "mariadb"

    def __init__(self, directory: Path | None = None, *, port: int | None = None, **settings: object) -> None:
        """`settings` are system variables; they can be changed through the attribute, for the next start."""
        super().__init__(directory, port=port or free_port())
        self.settings: dict[str, object] = {
            "server_id": 1,
            "log_bin": "binlog",
            "binlog_format": "ROW",
            "binlog_row_image": "FULL",
            "character_set_server": "utf8mb4",
            "innodb_flush_log_at_trx_commit": 2,  # a kill of the process loses nothing, only one of the machine would
            "innodb_buffer_pool_size": "64M",
            "connect_timeout": 60,  # a busy machine is no reason to end a connection that has just begun
            **settings,
        }
        self._data = self.directory / "data"

    @property
    def url(self) -> str:
        return self.url_of(USER)

    def url_of(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return f"{self.name}://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def _user(self) -> str | None:
        return UNPRIVILEGED if os.geteuid() == 0 else None

    def _prepare(self) -> None:
        if (self._data / "mysql").exists():
            return
        user = self._user()
        self._data.mkdir(mode=0o700, exist_ok=True)
        if user is not None:
            if self._temporary:
                self.directory.chmod(0o711)
            if not others_reach(self.directory):
                raise ServerError(f"the user {user} cannot reach {self.directory}; choose a folder that all may enter")
            account = pwd.getpwnam(user)
            os.chown(self._data, account.pw_uid, account.pw_gid)
        install = self._install_command()
        process = ServerProcess.start(install, log=self.log, cwd=self.directory, env=dict(os.environ), user=user)
        if not process.terminate(0, START_TIMEOUT_S) or process.exit_status != 0:
            process.kill()
            raise ServerError(f"{self.name} cannot make its folder; its output ends:\n{self.tail()}")
        first = self.directory / "first.sql"
        first.write_text(
            f"CREATE USER IF NOT EXISTS {USER}@'%' IDENTIFIED BY '{PASSWORD}';"
            f" GRANT ALL ON *.* TO {USER}@'%' WITH GRANT OPTION; CREATE DATABASE IF NOT EXISTS {USER};\n".replace(
                "; ", ";\n"
            )
        )
        first.chmod(0o644)

    def _install_command(self) -> list[str]:
        """Return the command that makes the data's folder ready."""
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-log-bin"]
        return [_program("mariadb-install-db"), "--no-defaults", f"--datadir={self._data}", *options]

    def _server(self) -> list[str]:
        """Return the program, with the options that are its own."""
        return [_program("mariadbd"), "--no-defaults"]

    def _command(self) -> list[str]:
        options = [
            f"--{name.replace('_', '-')}={int(value) if isinstance(value, bool) else value}"
            for name, value in self.settings.items()
        ]
        return [
            *self._server(),
            f"--datadir={self._data}",
            f"--init-file={self.directory / 'first.sql'}",
            f"--socket={self._data / 'socket'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            *options,
        ]

    def _answers(self) -> bool:
        timeout_s = int(ANSWER_TIMEOUT_S)
        pymysql.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD,
            database=USER,
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
        ).close()
        return True


def _program(name: str) -> str:
    """Return where a program of MariaDB is. Raises ServerError when it is not installed."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    if found is None:
        raise ServerError(
            f"{name} is not installed; on Debian and Ubuntu type: apt install mariadb-server-core mariadb-client-core"
        )
    return found
