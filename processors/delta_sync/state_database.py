"""What the state store must know of each database: URLs and drivers, opening, locks, and the reading of errors.

Nothing here knows what is stored; `state.py` has the store, `state_tables.py` its tables.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import math
import os
import sqlite3
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL, make_url

from delta_sync.errors import StateBusy, StateRefused, UsageError
from delta_sync.secrets import redact, resolve_url
from delta_sync.state_tables import VERSION_TABLE, Instant

BUSY_TIMEOUT_S = 10.0  # how long a call waits for another process's write; those take milliseconds
CONNECT_TIMEOUT_S = 10  # a server that takes longer is as good as unreachable, and the caller tries again
# A server that is gone without a word, such as one that another took over for, is noticed within a minute; by the
# kernel's defaults a call would wait for up to two hours.
_SILENCE_S = 60
_NOTICES_SILENCE: Mapping[str, Mapping[str, int]] = {
    "postgresql": {
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 1000 * _SILENCE_S,
    },
    # PyMySQL has no keep-alive; no statement takes so long, and one waits for locks a sixth of it.
    "mysql": {"read_timeout": _SILENCE_S, "write_timeout": _SILENCE_S},
    "mariadb": {"read_timeout": _SILENCE_S, "write_timeout": _SILENCE_S},
}


# ── URLs and drivers ─────────────────────────────────────────────────────────────────────────────────────────────

_DRIVERS = {
    "sqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}


def parse_url(url: str, folder: Path) -> URL:
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


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────


def create_file(path: Path) -> None:
    """Create the file if there is none, for its owner only: dead letters hold rows. Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UsageError(f"state: {path} cannot be written: {error.strerror}.") from error


def create_engine(url: URL, busy_timeout_s: float) -> sa.Engine:
    """Return an engine for a URL that `parse_url` made; it connects when it is first used."""
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, busy_timeout_s)
    engine = sa.create_engine(
        url,
        pool_pre_ping=True,  # a server may have restarted since the last call
        hide_parameters=True,
        # Each statement sees what is committed, as SQLite and PostgreSQL do here; MariaDB's default locks gaps
        # between rows, and those who insert at once end each other.
        isolation_level="READ COMMITTED",
        connect_args={"connect_timeout": CONNECT_TIMEOUT_S, **_NOTICES_SILENCE[url.get_backend_name()]},
    )
    event.listen(engine, "connect", _limits(url, busy_timeout_s))
    return engine


def _limits(url: URL, busy_timeout_s: float) -> Callable[[Any, object], None]:
    """Return what limits how long a connection waits for another's lock, and keeps its own while it does nothing.

    Without the second, a process that is frozen in the midst of a transaction, or whose machine is cut off, would keep
    its locks until its connection ends, which may be hours, and nobody could take over what it led.
    """
    milliseconds = max(1, round(busy_timeout_s * 1000))  # 0 would mean for ever
    seconds = max(1, math.ceil(busy_timeout_s))
    statement = (
        f"SET lock_timeout = {milliseconds}; SET idle_in_transaction_session_timeout = {milliseconds}"
        if url.get_backend_name() == "postgresql"
        # MySQL has no such limit, and takes the second half as a comment
        else f"SET SESSION innodb_lock_wait_timeout = {seconds} /*M!100300 , idle_transaction_timeout = {seconds} */"
    )

    def connected(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)
        connection.commit()  # PostgreSQL would take it back with the first transaction that fails

    return connected


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


# ── locks and writes ─────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def migration_lock(connection: sa.Connection) -> Generator[None]:
    """Let one process at a time migrate. SQLite's write transaction is such a lock already."""
    match connection.dialect.name:
        case "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_ID)))  # to the end of the transaction
            yield
        case "mysql" | "mariadb":
            # The connection's limit, of itself, is not one of such locks.
            limit = sa.literal_column("@@innodb_lock_wait_timeout", sa.Integer)
            if connection.execute(sa.select(sa.func.get_lock(VERSION_TABLE, limit))).scalar() != 1:
                raise StateBusy("Another process has been bringing the state store's tables up to date for long.")
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.release_lock(VERSION_TABLE)))
        case _:
            yield


_LOCK_ID = int.from_bytes(hashlib.sha256(VERSION_TABLE.encode()).digest()[:8], "big", signed=True)


def upsert(
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


_CLOCKS = {  # each in microseconds since 1970, and none is that of the transaction's start
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)",  # this machine's, in milliseconds
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)",
    "mysql": "timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6))",  # of the statement's start
    "mariadb": "timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6))",
}


def database_clock(connection: sa.Connection) -> sa.ColumnElement[dt.datetime]:
    """Return an expression for the time by the database's own clock: those of the machines that use it differ.

    Ask in a statement of its own after one that may wait for a lock: MariaDB's is that of the statement's start.
    """
    return sa.literal_column(_CLOCKS[connection.dialect.name], Instant)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────

_SQLITE_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_SQLITE_UNUSABLE = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN})
_SQLITE_REFUSED = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_PERM}
)
# PostgreSQL: classes 08 (connection), 40 (rolled back: deadlock, serialization), 53 (resources), 55 (not available),
# 57 (shut down, cancelled) and 25P03 (idle in a transaction for too long: we were frozen) pass; 25006 is a read-only
# server, 28 a refused login, 3D a missing database, 42501 a grant.
_SQLSTATE_BUSY = ("08", "40", "53", "55", "57", "25P03")
_SQLSTATE_REFUSED = ("25006", "28", "3D", "42501", "53100")
# libpq gives no SQLSTATE for a refused connection, only the server's words.
_LIBPQ_REFUSED = ("password authentication failed", "no pg_hba.conf entry", "does not exist", "permission denied for")
# MariaDB: access denied to the database, to the user, unknown database, command denied, read-only server, disk full.
_MARIADB_REFUSED = frozenset({1044, 1045, 1049, 1142, 1290, 1021})
# Too many connections, host blocked, shutting down, lock timeout, deadlock, killed; and what the client calls the loss
# of a connection: cannot connect, gone away, lost.
_MARIADB_BUSY = frozenset({1040, 1129, 1053, 1205, 1213, 1317, 1927, 2002, 2003, 2006, 2013, 2014, 2055})
_LIBPQ_ASKS = " Is the server running on that host"  # behind what it found; of no use to who reads one sentence


class Reading(NamedTuple):
    """What a database's error means: it passes, it is for every statement, the file cannot be used; None: a defect."""

    what: Literal["busy", "refused", "unusable"] | None
    said: str  # the database's own words, without secrets


def reading_of(error: exc.DBAPIError | exc.TimeoutError) -> Reading:
    """Return what an error means, by the codes of each database."""
    if isinstance(error, exc.TimeoutError):
        return Reading("busy", "there is no free connection")
    cause = error.orig
    said = redact(" ".join(str(cause).split())).partition(_LIBPQ_ASKS)[0].rstrip(".")
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the extended codes are in the higher bits
        if code in _SQLITE_BUSY:
            return Reading("busy", said)
        if code in _SQLITE_UNUSABLE:
            return Reading("unusable", said)
        return Reading("refused" if code in _SQLITE_REFUSED else None, said)
    code = cause.args[0] if cause is not None and cause.args else None
    if isinstance(code, int):  # MariaDB's; its SQLSTATEs say less
        if code in _MARIADB_REFUSED:
            return Reading("refused", said)
        return Reading("busy" if code in _MARIADB_BUSY or error.connection_invalidated else None, said)
    sqlstate = getattr(cause, "sqlstate", None)
    if isinstance(sqlstate, str):
        if sqlstate.startswith(_SQLSTATE_REFUSED):
            return Reading("refused", said)
        return Reading("busy" if sqlstate.startswith(_SQLSTATE_BUSY) else None, said)
    if any(reason in said for reason in _LIBPQ_REFUSED):
        return Reading("refused", said)
    transient = error.connection_invalidated or isinstance(error, exc.OperationalError | exc.InterfaceError)
    return Reading("busy" if transient else None, said)


def translated(error: exc.DBAPIError | exc.TimeoutError, where: str) -> Exception:
    """Return what the database's error is to Delta; a defect of ours (bad SQL, a broken constraint) stays as it is."""
    if isinstance(error, exc.TimeoutError):
        return StateBusy(f"The state store {where} has no free connection.")
    what, said = reading_of(error)
    match what:
        case "busy":
            return StateBusy(f"The state store {where} is busy or unreachable: {said}.")
        case "refused":
            return StateRefused(f"The state store {where} refuses: {said}.")
        case "unusable":
            return UsageError(f"The state store {where} cannot be used: {said}.")
        case None:
            return error
