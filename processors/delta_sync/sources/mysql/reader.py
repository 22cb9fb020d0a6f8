"""Reading a MariaDB source beside its log: samples, chunks, rows by key. No locks, no writes, and `SELECT` only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pymysql
from pymysql.cursors import SSCursor

from delta_sync.changes import Key
from delta_sync.errors import CheckFailed, Problem, SchemaChanged, SourceBusy
from delta_sync.secrets import redact
from delta_sync.sources.mysql import codec
from delta_sync.sources.mysql.catalogue import read_fingerprints, read_tables
from delta_sync.sources.mysql.claims import Sample, Snapshot, position_of
from delta_sync.sources.mysql.codec import quoted
from delta_sync.sources.mysql.connection import Session, code_of, connect, patience
from delta_sync.spec import SourceSpec
from delta_sync.tables import Table
from delta_sync.values import Row

KEYS_BYTES = 16 << 20  # of rows read by key at once: a batch may lack thousands, each of them megabytes long
KEYS_AT_ONCE = 500  # keys in a statement: from 1,000 on the server makes a temporary table of them
READS = 3  # of a snapshot's position, which must agree
SNAPSHOTS_MOST = 20  # until they do; each fails for one in twenty only beside monitors that ask all the time

_SCHEMA_CHANGED = frozenset({1412, 1146, 1054, 1109, 1356, 1049})  # the table's definition, table, column, database
_REFUSED = frozenset({1142, 1143, 1044, 1227, 1370})

_asking = threading.Lock()
"""Held while a snapshot's position is asked for. SHOW STATUS keeps it in memory that all sessions share, so one that
asks at the same time may be told another's. So one at a time in this process; for others' sake, reads must agree."""


class Chunk(NamedTuple):
    """Rows read in one snapshot, in the order of the key. The next chunk begins behind `last_key`; None: the end.

    Of rows read by their keys, `last_key` tells only whether some were left out: then it is not None. `seen_to` is a
    position above every change that the snapshot sees.
    """

    seen_to: int
    rows: list[tuple[Key, Row]]
    last_key: Key | None


class SourceIdentity(NamedTuple):
    """What tells one history of positions from another: they start again when one of the two changes.

    RESET MASTER changes neither: that is what `why_lost` is for.
    """

    system_identifier: str  # the server's own, and where its log is
    timeline: int  # always 0


class MariaReader:
    """One connection to the source, opened when needed and again after it broke. Used by one thread at a time.

    Every method raises SourceBusy when the source cannot be reached; CheckFailed when it refuses. With `answer_s` it
    also does so when the source has said nothing for so long; without it long queries take as long as they need.
    """

    def __init__(
        self,
        source: SourceSpec,
        application_name: str,
        answer_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._application_name = application_name
        self._answer_s = answer_s
        self._clock = clock
        self._session: Session | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with self._lock:
            self._drop()

    def abort(self) -> None:
        """End, from another thread, whatever is waiting for an answer: it raises SourceBusy.

        A source that keeps its connections open and says nothing would be waited for until TCP gives up, for hours.
        """
        session = self._session  # not under the lock, which whoever waits is holding
        if session is not None:
            session.abort()

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.shut()

    @contextmanager
    def _connected(self) -> Generator[Session]:
        with self._lock, patience(self._answer_s, self.abort) as has_ended:
            try:
                if self._session is None or not self._session.open:
                    self._drop()
                    self._session = connect(self._source, self._application_name)
                yield self._session
            except (pymysql.Error, OSError) as error:
                code, said = code_of(error), redact(str(error.args[-1] if error.args else error))
                if code in _SCHEMA_CHANGED:
                    raise SchemaChanged(f"The source says: {said}.") from error
                if code in _REFUSED:
                    raise CheckFailed(
                        [Problem("source", f"it says: {said}", "see `deltactl pipeline check`")]
                    ) from error
                if isinstance(error, pymysql.ProgrammingError):
                    raise  # our mistake
                self._drop()
                if has_ended():
                    raise SourceBusy(f"The source has said nothing for {self._answer_s:g} s.") from error
                raise SourceBusy(f"The source does not answer: {said}") from error

    # ── catalogue ────────────────────────────────────────────────────────────────────────────────────────────────

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables that exist, by `database.table`."""
        with self._connected() as session:
            return read_tables(session, names)

    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """Return, for each table that exists, a text that changes whenever its columns, its key or its history do."""
        with self._connected() as session:
            return read_fingerprints(session, names)

    def estimated_rows(self, table: Table) -> int | None:
        """Return the engine's estimate of a table's rows, which may be far off; None when it has none."""
        query = "SELECT table_rows FROM information_schema.tables WHERE table_schema = %s AND table_name = %s"
        with self._connected() as session:
            rows = _fetch(session, query, (table.schema, table.name))
        return int(rows[0][0]) if rows and rows[0][0] is not None else None

    # ── positions ────────────────────────────────────────────────────────────────────────────────────────────────

    def log_end(self) -> int:
        """Return the position at which the next event of the log will be written."""
        with self._connected() as session:
            for statement in ("SHOW MASTER STATUS", "SHOW BINARY LOG STATUS"):
                with contextlib.suppress(pymysql.ProgrammingError):  # newer MySQL has the second one only
                    rows = _fetch(session, statement)
                    if rows:
                        return position_of(str(rows[0][0]), int(rows[0][1]))
        raise CheckFailed([Problem("source", "it has no binary log", "see `deltactl pipeline check`")])

    def why_lost(self, position: int) -> str | None:
        """Return why the log does not go on from a position that it once had, as a clause; None when it does.

        That a log was reset and has come beyond the position since is not noticed here: the connector ends when it
        finds no event there.
        """
        with self._connected() as session:
            files = [(str(row[0]), int(row[1])) for row in _fetch(session, "SHOW BINARY LOGS")]
        if not files:
            return "the source has no binary log"
        if position > position_of(*files[-1]):
            return "the source's log ends before it: it was reset (RESET MASTER), or the source was restored"
        if position < position_of(files[0][0], 0):
            return "the source has removed the file of its log that holds it"
        return None

    def sample(self) -> Sample:
        """Take a sample for claims: the position of a snapshot of its own."""
        with self._connected() as session, self._snapshot(session) as snapshot:
            prepared = _prepared(session)
            return Sample(snapshot.position, self._clock(), prepared)

    def identity(self) -> SourceIdentity:
        """Return which history of positions the source is in."""
        query = (
            "SHOW GLOBAL VARIABLES WHERE Variable_name IN"
            " ('server_uid', 'server_uuid', 'server_id', 'hostname', 'log_bin_basename')"
        )
        with self._connected() as session:
            found = {str(name): str(value) for name, value in _fetch(session, query)}
        # Before 10.6.17 MariaDB has no identifier of its own.
        server = found.get("server_uid") or found.get("server_uuid") or f"{found['hostname']}/{found['server_id']}"
        return SourceIdentity(f"{server} {found.get('log_bin_basename', '')}".strip(), 0)

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def read_chunk(
        self, table: Table, after: Key | None, rows_most: int, bytes_most: int, usable: Callable[[Snapshot], bool]
    ) -> Chunk | None:
        """Read the rows behind `after` in the order of the key, at most `rows_most`, in one snapshot.

        None if the snapshot is not `usable`. It ends early when the values have `bytes_most` bytes, so no more than
        that and one row are in memory.
        """
        condition, parameters = _behind(table, after)
        order = ", ".join(f"t.{quoted(name)}" for name in table.key)
        query = f"SELECT {codec.select_list(table)} FROM {_qualified(table)} AS t{condition} ORDER BY {order} LIMIT %s"  # noqa: S608 -- quoted
        with self._connected() as session, self._snapshot(session) as snapshot:
            if not usable(snapshot):
                return None
            rows: list[tuple[Key, Row]] = []
            full = self._collect(session, table, query, (*parameters, rows_most), rows, bytes_most)
            last_key = rows[-1][0] if full or len(rows) == rows_most else None
            return Chunk(snapshot.position, rows, last_key)

    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Snapshot], bool]) -> Chunk | None:
        """Read the rows of these keys in one snapshot, or return None if that is not `usable`.

        A row that is gone is absent. When the values have KEYS_BYTES bytes the rest is left out, and `last_key` set.
        """
        with self._connected() as session, self._snapshot(session) as snapshot:
            if not usable(snapshot):
                return None
            rows: list[tuple[Key, Row]] = []
            for start in range(0, len(keys), KEYS_AT_ONCE):
                condition, parameters = _among(table, keys[start : start + KEYS_AT_ONCE])
                query = f"SELECT {codec.select_list(table)} FROM {_qualified(table)} AS t WHERE {condition}"  # noqa: S608 -- quoted
                if self._collect(session, table, query, parameters, rows, KEYS_BYTES):
                    return Chunk(snapshot.position, rows, rows[-1][0])
            return Chunk(snapshot.position, rows, None)

    @contextmanager
    def _snapshot(self, session: Session) -> Generator[Snapshot]:
        """A read-only transaction with a snapshot that knows its position."""
        try:
            yield self._begin(session)
        finally:
            if session.open:
                with contextlib.suppress(pymysql.Error):
                    session.rollback()

    def _begin(self, session: Session) -> Snapshot:
        for _ in range(SNAPSHOTS_MOST):
            with _asking:
                taken_s = self._clock()
                prepared = _prepared(session)
                _fetch(session, "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
                read = {_snapshot_position(session) for _ in range(READS)}
            if len(read) == 1:
                return Snapshot(read.pop(), taken_s, prepared)
            session.rollback()
        raise SourceBusy(
            "The source tells another place in its log each time it is asked for one snapshot's: other programs ask it"
            " for SHOW STATUS without a pause."
        )

    def _collect(
        self,
        session: Session,
        table: Table,
        query: str,
        parameters: tuple[Any, ...],
        rows: list[tuple[Key, Row]],
        bytes_most: int,
    ) -> bool:
        """Append a query's rows until their values have so many bytes; return whether that was so.

        Then the connection is given up: it would have to take all that the server still has to send.
        """
        to_row = codec.row_maker(table)
        size = 0
        for values in _stream(session, query, parameters):
            rows.append(to_row(values))
            size += sum(len(value) for value in values if value is not None)
            if size >= bytes_most:
                self._drop()
                return True
        return False


def _stream(session: Session, query: str, parameters: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    cursor = session.cursor(SSCursor)
    cursor.execute(query, parameters)
    while (row := cursor.fetchone()) is not None:
        yield row
    cursor.close()


def _fetch(session: Session, query: str, parameters: tuple[Any, ...] | None = None) -> tuple[tuple[Any, ...], ...]:
    with session.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall()


def _snapshot_position(session: Session) -> int:
    found = {str(name).lower(): str(value) for name, value in _fetch(session, "SHOW STATUS LIKE 'binlog_snapshot_%'")}
    return position_of(found["binlog_snapshot_file"], int(found["binlog_snapshot_position"]))


def _prepared(session: Session) -> frozenset[str]:
    """Return the XA transactions that are prepared and not yet committed: format, lengths, name."""
    return frozenset(" ".join(map(str, row)) for row in _fetch(session, "XA RECOVER"))


def _qualified(table: Table) -> str:
    return f"{quoted(table.schema)}.{quoted(table.name)}"


def _behind(table: Table, after: Key | None) -> tuple[str, tuple[Any, ...]]:
    """Return a condition for the rows behind a key, and its parameters.

    Spelt out, `a >= 1 AND (a > 1 OR (a = 1 AND b > 2))`: of `(a, b) > (1, 2)` the server reads the whole index.
    """
    if after is None:
        return "", ()
    names = [f"t.{quoted(name)}" for name in table.key]
    values = _parameters(table, after)
    condition, parameters = f"{names[-1]} > %s", [values[-1]]
    for name, value in reversed(list(zip(names[:-1], values[:-1], strict=True))):
        condition = f"({name} > %s OR ({name} = %s AND {condition}))"
        parameters = [value, value, *parameters]
    if len(names) > 1:
        condition, parameters = f"{names[0]} >= %s AND {condition}", [values[0], *parameters]
    return f" WHERE {condition}", tuple(parameters)


def _among(table: Table, keys: Sequence[Key]) -> tuple[str, tuple[Any, ...]]:
    """Return a condition for the rows with these keys, and its parameters."""
    names = [f"t.{quoted(name)}" for name in table.key]
    parameters = tuple(value for key in keys for value in _parameters(table, key))
    if len(names) == 1:
        return f"{names[0]} IN ({', '.join(['%s'] * len(keys))})", parameters
    one = " AND ".join(f"{name} = %s" for name in names)
    return " OR ".join([f"({one})"] * len(keys)), parameters


def _parameters(table: Table, key: Key) -> list[Any]:
    return [codec.parameter(table.column(name), value) for name, value in zip(table.key, key, strict=True)]
