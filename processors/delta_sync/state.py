"""The state store: what Delta keeps in an SQL database, because it must survive the process.

It holds how far each table's load is, the source's identity and epoch, dead letters and the last status. Losing it
loses no data of any sink: a load can always be started again. The same code serves SQLite (one machine), PostgreSQL
and MariaDB; only opening, the migrations' lock and the reading of errors know which.

Every call is one short transaction, so a process may be killed at any instruction: a call has happened or it has not.
Every call may be made again after StateBusy. Free text (errors, traces, reasons, key texts, the status) is stored as
`secrets.redact` leaves it; names and events are stored as they are.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, overload

import orjson
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, exc
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL, make_url

from delta_sync.changes import Key
from delta_sync.delta_event import decode_key, encode_key
from delta_sync.errors import DeltaError, StaleStateStore, StateBusy, StateRefused, UsageError
from delta_sync.secrets import redact, resolve_url
from delta_sync.values import to_json

BUSY_TIMEOUT_S = 10.0  # how long a call waits for another process's write; those take milliseconds
CONNECT_TIMEOUT_S = 10  # a server that takes longer is as good as unreachable, and the caller tries again
MAX_TEXT_CHARS = 1 << 16  # of one error or trace: a recursion's trace, yes; a message that quotes a document, no
IDS_PER_STATEMENT = 500  # below every database's limit of parameters (SQLite before 3.32: 999)


# ── what goes in and comes out ───────────────────────────────────────────────────────────────────────────────────


class PipelineState(NamedTuple):
    """The source as the pipeline last saw it.

    `system_identifier` and `timeline` tell another database from a failover; `slot_lsn` is the position that the slot
    was last confirmed to (None: never).
    """

    name: str
    epoch: int
    system_identifier: str
    timeline: int
    slot_lsn: int | None = None


class TableLoad(NamedTuple):
    """How far the load of a table is. `after_key` is the last key whose chunk every sink has (None: none yet).

    `rows` have been written so far. `covered_from` is the position from which the log surely delivers the table's
    changes. `fingerprint` is that of the table's columns when the load began, `reason` why it is loaded.
    """

    table: str
    state: Literal["pending", "running", "done"] = "pending"
    after_key: Key | None = None
    rows: int = 0
    covered_from: int | None = None
    fingerprint: str = ""
    reason: str = ""
    epoch: int = 1
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A change that could not be processed. `sink` is the one that rejected it; None: it never came to a sink.

    `event` is what `delta_event.encode_event` wrote. `id` and `attempts` are the store's: leave them when adding one.
    `created_at` (aware) is when it first failed.
    """

    id: int = 0
    table: str
    key_text: str
    version: int
    sink: str | None = None
    stage: Literal["decode", "process", "lookup", "apply"]
    error: str
    trace: str = ""
    event: bytes
    created_at: dt.datetime
    attempts: int = 1


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────

VERSION_TABLE = "delta_schema_version"  # not Alembic's default: the database may be another application's, too
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)


class Instant(sa.types.TypeDecorator[dt.datetime]):
    """A moment as microseconds since 1970: databases differ in precision and time zones, not in integers."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> int | None:  # noqa: ARG002 -- SQLAlchemy's
        """Return what is stored."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002 -- SQLAlchemy's
        """Return what was given, in UTC."""
        return None if value is None else _EPOCH + value * _MICROSECOND


def _name(length: int) -> sa.types.TypeEngine[str]:
    """Return a type for names, which differ by case everywhere (MariaDB's default would ignore it)."""
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def _text() -> sa.types.TypeEngine[str]:
    """Return a type for text of any length (MariaDB's TEXT ends at 64 KiB)."""
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def _blob() -> sa.types.TypeEngine[bytes]:
    """Return a type for bytes of any number."""
    return sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


METADATA = sa.MetaData()
_OPTIONS: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"))
}

_PIPELINES = sa.Table(
    "delta_pipeline",
    METADATA,
    sa.Column("name", _name(64)),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("system_identifier", _name(64), nullable=False),
    sa.Column("timeline", sa.BigInteger, nullable=False),
    sa.Column("slot_lsn", sa.BigInteger),
    sa.PrimaryKeyConstraint("name", name="pk_delta_pipeline"),
    **_OPTIONS,
)

_LOADS = sa.Table(
    "delta_load",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("table_name", _name(255)),
    sa.Column("state", _name(16), nullable=False),
    sa.Column("after_key", _blob()),
    sa.Column("row_count", sa.BigInteger, nullable=False),
    sa.Column("covered_from", sa.BigInteger),
    sa.Column("fingerprint", _text(), nullable=False),
    sa.Column("reason", _text(), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("started_at", Instant),
    sa.Column("finished_at", Instant),
    sa.PrimaryKeyConstraint("pipeline", "table_name", name="pk_delta_load"),
    **_OPTIONS,
)

_DEAD_LETTERS = sa.Table(
    "delta_dead_letter",
    METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True),
    sa.Column("pipeline", _name(64), nullable=False),
    sa.Column("identity", _name(64), nullable=False),  # a digest, because no index takes a key of any length
    sa.Column("table_name", _name(255), nullable=False),
    sa.Column("key_text", _text(), nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("sink", _name(255)),
    sa.Column("stage", _name(16), nullable=False),
    sa.Column("error", _text(), nullable=False),
    sa.Column("trace", _text(), nullable=False),
    sa.Column("event", _blob(), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.PrimaryKeyConstraint("id", name="pk_delta_dead_letter"),
    sa.UniqueConstraint("pipeline", "identity", name="uq_delta_dead_letter"),
    sa.Index("ix_delta_dead_letter_created_at", "pipeline", "created_at"),
    sqlite_autoincrement=True,  # an id is never given twice, so that discarding an old list hits nothing new
    **_OPTIONS,
)

_STATUSES = sa.Table(
    "delta_status",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("status", _text(), nullable=False),
    sa.Column("saved_at", Instant, nullable=False),
    sa.PrimaryKeyConstraint("pipeline", name="pk_delta_status"),
    **_OPTIONS,
)


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────


Clock = Callable[[], dt.datetime]  # aware


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class StateStore:
    """An open state store. Safe to use from any number of threads and processes at once.

    Every method may raise StateBusy (transient) or StateRefused (systematic).
    """

    def __init__(self, engine: sa.Engine, where: str, now: Clock) -> None:
        """Use `StateStore.open`."""
        self._engine = engine
        self._where = where
        self._now = now
        self._closed = False

    @classmethod
    @overload
    def open(cls, url: str, folder: Path, *, now: Clock = ..., busy_timeout_s: float = ...) -> StateStore: ...

    @classmethod
    @overload
    def open(
        cls, url: str, folder: Path, *, create: bool, now: Clock = ..., busy_timeout_s: float = ...
    ) -> StateStore | None: ...

    @classmethod
    def open(
        cls,
        url: str,
        folder: Path,
        *,
        create: bool = True,
        now: Clock = _utc_now,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> StateStore | None:
        """Open the store at an SQLAlchemy URL, create it where there is none, and bring its tables up to date.

        A relative SQLite path is relative to `folder`. With `create=False` (for commands that only look), nothing is
        created, and None returned where there is no store. Raises UsageError when the URL cannot be used,
        StaleStateStore when a newer Delta wrote the store.
        """
        parsed = _parse_url(url, folder)
        where = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite":
            path = Path(parsed.database or "")
            if not create and not path.exists():
                return None
            if create:
                _create_file(path)
            engine = _sqlite_engine(parsed, busy_timeout_s)
        else:
            engine = sa.create_engine(
                parsed,
                pool_pre_ping=True,  # a server may have restarted since the last call
                hide_parameters=True,
                # Each statement sees what is committed, as SQLite and PostgreSQL do here; MariaDB's default locks gaps
                # between rows, and those who insert at once end each other.
                isolation_level="READ COMMITTED",
                connect_args={"connect_timeout": CONNECT_TIMEOUT_S},
            )
        store = cls(engine, where, now)
        try:
            if not store._migrate(create=create):
                store.close()
                return None
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Release the connections. Idempotent; the store cannot be used afterwards."""
        self._closed = True
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # ── pipelines ──

    def pipeline(self, name: str) -> PipelineState | None:
        """Return what was last saved of the pipeline's source; None: nothing."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(_PIPELINES).where(_PIPELINES.c.name == name)).one_or_none()
        return None if row is None else PipelineState(*row)

    def save_pipeline(self, state: PipelineState) -> None:
        """Save it, in place of what was saved before."""
        values = state._asdict()
        with self._transaction(write=True) as connection:
            _upsert(connection, _PIPELINES, {"name": values.pop("name")}, values)

    def forget(self, name: str) -> None:
        """Delete all that is stored of a pipeline."""
        with self._transaction(write=True) as connection:
            for table in (_LOADS, _DEAD_LETTERS, _STATUSES):
                connection.execute(sa.delete(table).where(table.c.pipeline == name))
            connection.execute(sa.delete(_PIPELINES).where(_PIPELINES.c.name == name))

    # ── loads ──

    def loads(self, name: str) -> dict[str, TableLoad]:
        """Return how far each table's load is, by table."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(_LOADS).where(_LOADS.c.pipeline == name).order_by(_LOADS.c.table_name))
            return {
                row.table_name: TableLoad(
                    table=row.table_name,
                    state=row.state,
                    after_key=None if row.after_key is None else decode_key(row.after_key),
                    rows=row.row_count,
                    covered_from=row.covered_from,
                    fingerprint=row.fingerprint,
                    reason=row.reason,
                    epoch=row.epoch,
                    started_at=row.started_at,
                    finished_at=row.finished_at,
                )
                for row in rows
            }

    def save_load(self, name: str, load: TableLoad) -> None:
        """Save how far a table's load is, in place of what was saved before."""
        values = load._asdict()
        key = {"pipeline": name, "table_name": values.pop("table")}
        values["row_count"] = values.pop("rows")
        values["after_key"] = None if load.after_key is None else encode_key(load.after_key)
        values["reason"] = _clean(load.reason)
        with self._transaction(write=True) as connection:
            _upsert(connection, _LOADS, key, values)

    def forget_load(self, name: str, table: str) -> None:
        """Delete what is stored of a table's load; nothing stored is fine."""
        with self._transaction(write=True) as connection:
            connection.execute(sa.delete(_LOADS).where(_LOADS.c.pipeline == name, _LOADS.c.table_name == table))

    # ── dead letters ──

    def add_dead_letters(self, name: str, letters: Sequence[DeadLetter]) -> None:
        """Add all of them or none.

        One that is there (same table, key, sink and version) is brought up to date and counts one attempt more. It
        keeps its `created_at`: from then on, not from the last attempt, a delete's tombstone protects the key.
        """
        with self._transaction(write=True) as connection:
            for letter in letters:
                changing = {
                    "key_text": _clean(letter.key_text),
                    "stage": letter.stage,
                    "error": _clean(letter.error),
                    "trace": _clean(letter.trace),
                    "event": letter.event,
                }
                fixed = {
                    "table_name": letter.table,
                    "version": letter.version,
                    "sink": letter.sink,
                    "created_at": letter.created_at,
                    "attempts": 1,
                }
                again = {"attempts": _DEAD_LETTERS.c.attempts + 1}
                key = {"pipeline": name, "identity": _identity(letter)}
                _upsert(connection, _DEAD_LETTERS, key, changing | again, changing | fixed)

    def dead_letters(
        self, name: str, *, table: str | None = None, limit: int = 100, before_id: int | None = None
    ) -> list[DeadLetter]:
        """Return at most `limit` dead letters, the latest added first. The next page is `before_id` the last one's."""
        query = sa.select(_DEAD_LETTERS).where(_DEAD_LETTERS.c.pipeline == name)
        if table is not None:
            query = query.where(_DEAD_LETTERS.c.table_name == table)
        if before_id is not None:
            query = query.where(_DEAD_LETTERS.c.id < before_id)
        with self._transaction() as connection:
            return [
                _dead_letter(row) for row in connection.execute(query.order_by(_DEAD_LETTERS.c.id.desc()).limit(limit))
            ]

    def dead_letter(self, name: str, id_: int) -> DeadLetter | None:
        """Return one dead letter; None when there is none of that id."""
        query = sa.select(_DEAD_LETTERS).where(_DEAD_LETTERS.c.pipeline == name, _DEAD_LETTERS.c.id == id_)
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _dead_letter(row)

    def discard(self, name: str, ids: Sequence[int]) -> int:
        """Delete dead letters; return how many there were."""
        gone = 0
        with self._transaction(write=True) as connection:
            for start in range(0, len(ids), IDS_PER_STATEMENT):
                some = ids[start : start + IDS_PER_STATEMENT]
                statement = sa.delete(_DEAD_LETTERS).where(
                    _DEAD_LETTERS.c.pipeline == name, _DEAD_LETTERS.c.id.in_(some)
                )
                gone += connection.execute(statement).rowcount
        return gone

    def count_dead_letters(self, name: str) -> int:
        """Return how many dead letters the pipeline has."""
        query = sa.select(sa.func.count()).select_from(_DEAD_LETTERS).where(_DEAD_LETTERS.c.pipeline == name)
        with self._transaction() as connection:
            return connection.execute(query).scalar_one()

    def count_failed_since(self, name: str, table: str, version: int) -> int:
        """Return how many dead letters there are of changes to a table at or above a version."""
        since = sa.and_(
            _DEAD_LETTERS.c.pipeline == name, _DEAD_LETTERS.c.table_name == table, _DEAD_LETTERS.c.version >= version
        )
        with self._transaction() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(_DEAD_LETTERS).where(since)).scalar_one()

    def prune(self, name: str, older_than: dt.datetime) -> int:
        """Delete the dead letters that first failed before `older_than` (aware); return how many there were."""
        old = sa.and_(_DEAD_LETTERS.c.pipeline == name, _DEAD_LETTERS.c.created_at < older_than)
        with self._transaction(write=True) as connection:
            return connection.execute(sa.delete(_DEAD_LETTERS).where(old)).rowcount

    # ── status ──

    def save_status(self, name: str, status: Mapping[str, Any]) -> None:
        """Save what the pipeline says of itself; it comes back as JSON has it (a datetime as text)."""
        text = to_json(_redacted(dict(status))).decode()
        with self._transaction(write=True) as connection:
            _upsert(connection, _STATUSES, {"pipeline": name}, {"status": text, "saved_at": self._now()})

    def status(self, name: str) -> tuple[dict[str, Any], dt.datetime] | None:
        """Return the last saved status, and when that was; None: never."""
        query = sa.select(_STATUSES.c.status, _STATUSES.c.saved_at).where(_STATUSES.c.pipeline == name)
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (orjson.loads(row.status), row.saved_at)

    # ── inside ──

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Generator[sa.Connection]:
        assert not self._closed, "the state store is closed"
        try:
            with self._engine.execution_options(delta_write=write).begin() as connection:
                yield connection
        except (exc.DBAPIError, exc.TimeoutError) as error:
            raise _translated(error, self._where) from error

    def _migrate(self, *, create: bool) -> bool:
        """Bring the tables up to date; return False when there are none and `create` is False."""
        config = Config()
        config.set_main_option("script_location", "delta_sync:migrations")
        scripts = ScriptDirectory.from_config(config)
        known = {script.revision for script in scripts.walk_revisions()}
        with self._transaction() as connection:
            found = _revision(connection)
        if found is None and not create:
            return False
        if found is not None and found not in known:
            raise StaleStateStore(
                f"The state store {self._where} was written by a newer Delta (its tables are at {found}); use that "
                "version, or give `state` another URL, which loads every table anew."
            )
        if found != scripts.get_current_head():
            with _ALEMBIC, self._transaction(write=True) as connection, _migration_lock(connection):
                config.attributes["connection"] = connection
                command.upgrade(config, "head")  # which looks again: another process may have been faster
        return True


_ALEMBIC = threading.Lock()  # its environment is global to the process


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


@contextlib.contextmanager
def _migration_lock(connection: sa.Connection) -> Generator[None]:
    """Let one process at a time migrate. SQLite's write transaction is such a lock already."""
    match connection.dialect.name:
        case "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_ID)))  # to the end of the transaction
            yield
        case "mysql" | "mariadb":
            connection.execute(sa.select(sa.func.get_lock(VERSION_TABLE, BUSY_TIMEOUT_S)))
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.release_lock(VERSION_TABLE)))
        case _:
            yield


_LOCK_ID = int.from_bytes(hashlib.sha256(VERSION_TABLE.encode()).digest()[:8], "big", signed=True)


def _upsert(
    connection: sa.Connection,
    table: sa.Table,
    key: Mapping[str, Any],
    update: Mapping[str, Any],
    insert: Mapping[str, Any] | None = None,
) -> None:
    """Update the row of that key, or insert it (with `insert` in place of `update`)."""
    values = {**key, **(update if insert is None else insert)}
    if connection.dialect.name in ("mysql", "mariadb"):
        # In two statements as below, those who insert at once would wait for each other and be ended as deadlocked.
        connection.execute(mysql.insert(table).values(**values).on_duplicate_key_update(**update))
        return
    statement = sa.update(table).where(*(table.c[column] == value for column, value in key.items())).values(**update)
    if connection.execute(statement).rowcount:
        return
    # No `with`: after any other error the savepoint may be gone with its transaction (a full disk, a deadlock), and
    # an attempt to go back to it would hide that error.
    savepoint = connection.begin_nested()
    try:
        connection.execute(sa.insert(table).values(**values))
    except exc.IntegrityError:  # another process inserted it between the two
        savepoint.rollback()
        if not connection.execute(statement).rowcount:
            raise
    else:
        savepoint.commit()


def _identity(letter: DeadLetter) -> str:
    # ascii(), because it is injective and takes any text, and repr() changes with Unicode's version
    return hashlib.sha256(ascii((letter.table, letter.key_text, letter.sink, letter.version)).encode()).hexdigest()


def _dead_letter(row: sa.Row[Any]) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        table=row.table_name,
        key_text=row.key_text,
        version=row.version,
        sink=row.sink,
        stage=row.stage,
        error=row.error,
        trace=row.trace,
        event=row.event,
        created_at=row.created_at,
        attempts=row.attempts,
    )


def _clean(text: str) -> str:
    """Return the text without secrets, in characters that every database takes, its middle left out if too long."""
    text = redact(text).encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    if len(text) <= MAX_TEXT_CHARS:
        return text
    half = MAX_TEXT_CHARS // 2
    return f"{text[:half]}\n… ({len(text) - 2 * half} characters left out) …\n{text[-half:]}"


def _redacted(value: Any) -> Any:
    """Return a JSON value with every text in it redacted."""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, dict):
        return {_redacted(name): _redacted(part) for name, part in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_redacted(part) for part in cast(Sequence[Any], value)]
    return value


# ── URLs and drivers ─────────────────────────────────────────────────────────────────────────────────────────────

_DRIVERS = {
    "sqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}


def _parse_url(url: str, folder: Path) -> URL:
    """Return the URL with its secrets, its driver and an absolute SQLite path. Raises UsageError."""
    what = f"state: {redact(url)!r}"
    try:
        parsed = make_url(resolve_url(url))
    except (exc.ArgumentError, ValueError):
        raise UsageError(f"{what} is not an SQLAlchemy URL; write it like sqlite:///state.db.") from None
    parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
    if parsed.get_backend_name() not in _DRIVERS:
        raise UsageError(f"{what} is of a database that Delta does not know; use SQLite, PostgreSQL or MariaDB.")
    try:
        dialect = parsed.get_dialect()
        dialect.import_dbapi()
    except (ImportError, exc.NoSuchModuleError) as error:
        extra = " Type: pip install 'delta-sync[mariadb]'." if "pymysql" in str(error) else ""
        raise UsageError(f"{what} needs a driver that is not installed ({error}).{extra}") from error
    if dialect.is_async:
        raise UsageError(f"{what} names an asynchronous driver; leave out what is behind the +.")
    if parsed.get_backend_name() != "sqlite":
        return parsed
    if parsed.query:
        raise UsageError(
            f"{what} has options (?…), and an SQLite URL takes none here; write it like sqlite:///state.db."
        )
    path = parsed.database or ":memory:"
    if path == ":memory:" or path.startswith("file:"):
        raise UsageError(f"{what} must name a file, which survives the process; write it like sqlite:///state.db.")
    return parsed.set(database=str(folder.absolute() / path))


def _create_file(path: Path) -> None:
    """Create the file if there is none, for its owner only: dead letters hold rows. Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UsageError(f"state: {path} cannot be written: {error.strerror}.") from error


def _sqlite_engine(url: URL, busy_timeout_s: float) -> sa.Engine:
    # isolation_level=None: the driver begins no transactions of its own, `begin` below does.
    engine = sa.create_engine(
        url, hide_parameters=True, connect_args={"isolation_level": None, "timeout": busy_timeout_s}
    )

    def connected(connection: sqlite3.Connection, _record: object) -> None:
        # WAL is a property of the file: whoever comes first sets it, and a loser of that race finds it set.
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")
        # NORMAL would do against a killed process, but a power cut could take back the last commits. The source is
        # told to forget a change once its dead letter is committed, so that commit has to be on the disk.
        connection.execute("PRAGMA synchronous=FULL")

    def begin(connection: sa.Connection) -> None:
        # A transaction that reads first and then writes fails at once, timeout or not, if another one wrote in between.
        write = connection.get_execution_options().get("delta_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
    return engine


_SQLITE_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_SQLITE_UNUSABLE = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN})
_SQLITE_REFUSED = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_PERM}
)
# PostgreSQL: classes 08 (connection), 40 (rolled back: deadlock, serialization), 53 (resources), 55 (not available),
# 57 (shut down, cancelled) pass; 25006 is a read-only server, 28 a refused login, 3D a missing database, 42501 a grant.
_SQLSTATE_BUSY = ("08", "40", "53", "55", "57")
_SQLSTATE_REFUSED = ("25006", "28", "3D", "42501", "53100")
# libpq gives no SQLSTATE for a refused connection, only the server's words.
_LIBPQ_REFUSED = ("password authentication failed", "no pg_hba.conf entry", "does not exist", "permission denied for")
# MariaDB: access denied to the database, to the user, unknown database, command denied, read-only server, disk full.
_MARIADB_REFUSED = frozenset({1044, 1045, 1049, 1142, 1290, 1021})
# Too many connections, host blocked, shutting down, lock timeout, deadlock, killed; and what the client calls the loss
# of a connection: cannot connect, gone away, lost.
_MARIADB_BUSY = frozenset({1040, 1129, 1053, 1205, 1213, 1317, 1927, 2002, 2003, 2006, 2013, 2014, 2055})


def _translated(error: exc.DBAPIError | exc.TimeoutError, where: str) -> Exception:
    """Return what the database's error is to Delta; a defect of ours (bad SQL, a broken constraint) stays as it is."""
    if isinstance(error, exc.TimeoutError):
        return StateBusy(f"The state store {where} has no free connection.")
    cause = error.orig
    said = redact(" ".join(str(cause).split())).rstrip(".")
    busy: DeltaError = StateBusy(f"The state store {where} is busy or unreachable: {said}.")
    refused: DeltaError = StateRefused(f"The state store {where} refuses: {said}.")
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the extended codes are in the higher bits
        if code in _SQLITE_BUSY:
            return busy
        if code in _SQLITE_UNUSABLE:
            return UsageError(f"The state store {where} cannot be used: {said}.")
        return refused if code in _SQLITE_REFUSED else error
    code = cause.args[0] if cause is not None and cause.args else None
    if isinstance(code, int):  # MariaDB's; its SQLSTATEs say less
        if code in _MARIADB_REFUSED:
            return refused
        return busy if code in _MARIADB_BUSY or error.connection_invalidated else error
    sqlstate = getattr(cause, "sqlstate", None)
    if isinstance(sqlstate, str):
        if sqlstate.startswith(_SQLSTATE_REFUSED):
            return refused
        return busy if sqlstate.startswith(_SQLSTATE_BUSY) else error
    if any(reason in said for reason in _LIBPQ_REFUSED):
        return refused
    transient = error.connection_invalidated or isinstance(error, exc.OperationalError | exc.InterfaceError)
    return busy if transient else error
