"""Reading a MariaDB source beside its log: samples, chunks, rows by key. No locks, no writes, and `SELECT` only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pymysql

from delta_sync.changes import Key
from delta_sync.decoding import TableCodec
from delta_sync.documents import Watch
from delta_sync.errors import CheckFailed, Problem, SchemaChanged, SourceBusy, UsageError
from delta_sync.secrets import redact
from delta_sync.sources.mysql import codec, parts
from delta_sync.sources.mysql.catalogue import read_fingerprints, read_first_columns, read_foreign_keys, read_tables
from delta_sync.sources.mysql.claims import (
    LISTED_S,
    MAX_OFFSET,
    OFFSET_BITS,
    STOOD_S,
    Head,
    Sample,
    Samples,
    Snapshot,
    position_of,
    shown_to,
)
from delta_sync.sources.mysql.codec import quoted
from delta_sync.sources.mysql.connection import Session, code_of, connect, patience
from delta_sync.sources.mysql.position import PURGED, BinlogPosition, Store
from delta_sync.sources.mysql.statements import UNKNOWN_COLUMN, fetch, having, key_values, qualified, said_of, stream
from delta_sync.sources.reader import Chunk, SourceIdentity, SourceReader
from delta_sync.spec import PipelineSpec, SourceSpec
from delta_sync.tables import Table, keys_alone
from delta_sync.values import Row

if TYPE_CHECKING:
    from delta_sync.state import StateStore

KEYS_BYTES = 16 << 20  # of rows read by key at once: a batch may lack thousands, each of them megabytes long
KEYS_AT_ONCE = 500  # keys in a statement: from 1,000 on the server makes a temporary table of them
READS = 3  # of a snapshot's position, which must agree
SNAPSHOTS_MOST = 20  # until they do; each fails for one in twenty only beside monitors that ask all the time

SURE_S = 2.0  # a new file of the log is settled within a second, when the engine has flushed its own log
SURE_POLL_S = 0.005
HEAD_EVENTS = 1000  # of a file's events read at once: some milliseconds, for which the server holds its log

_STATUS = (
    "SHOW GLOBAL STATUS WHERE Variable_name IN"
    " ('Binlog_snapshot_file', 'Com_xa_prepare', 'Rpl_semi_sync_master_wait_sessions')"
)

_SCHEMA_CHANGED = frozenset({1412, 1146, 1054, 1109, 1356, 1049})  # the table's definition, table, column, database
_REFUSED = frozenset({1142, 1143, 1044, 1227, 1370})

_asking = threading.Lock()
"""Held while a snapshot's position is asked for. SHOW STATUS keeps it in memory that all sessions share, so one that
asks at the same time may be told another's. So one at a time in this process; for others' sake, reads must agree."""


class Resting(NamedTuple):
    """For what a claim waits while nobody has prepared a transaction: said in place of a transaction."""

    def __str__(self) -> str:
        return f"{STOOD_S:.0f} s without a commit, or the next commit (nothing has to be done)"


class Prepared(NamedTuple):
    """An XA transaction for whose end a claim has to wait."""

    xid: str

    def __str__(self) -> str:
        return f"the XA transaction {self.xid!r}, which is prepared (XA COMMIT or XA ROLLBACK ends it)"


class _Look(NamedTuple):
    """What the server said just after a snapshot: see `Sample` for the first two; whether XA transactions matter."""

    shown: int
    waits: bool
    xa: bool


class MariaReader(SourceReader):
    """One connection to the source, opened when needed and again after it broke. Used by one thread at a time.

    Every method raises SourceBusy when the source cannot be reached; CheckFailed when it refuses. With `answer_s` it
    also does so when the source has said nothing for so long; without it long queries take as long as they need.
    """

    log_status: ClassVar[str] = "SHOW MASTER STATUS"
    claim_wait_s: ClassVar[float] = 0.0  # it would take LISTED_S at least, and the snapshot shows the change at once

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
        self._place: BinlogPosition | None = None
        self._head: Head | None = None  # of the newest file that a snapshot was in
        self._stands = (0, 0.0)  # the position that the last snapshot had, and since when (s)
        self._xa = ("", 0.0)  # how many XA transactions the server has prepared, and since when (s) so many

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with self._lock:
            self._drop()
        place, self._place = self._place, None
        if place is not None:
            place.close()

    def abort(self) -> None:
        """End, from another thread, whatever is waiting for an answer: it raises SourceBusy.

        A source that keeps its connections open and says nothing would be waited for until TCP gives up, for hours.
        """
        session = self._session  # not under the lock, which whoever waits is holding
        if session is not None:
            session.abort()

    def _drop(self) -> None:
        session, self._session, self._head = self._session, None, None
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
            return self.assembled(
                names,
                lambda some: read_tables(session, some),
                lambda some: read_foreign_keys(session, some),
            )

    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """Return, for each table that exists, a text that changes whenever its columns, its key or its history do."""
        with self._connected() as session:
            return self.fingerprinted(read_fingerprints(session, names))

    def first_columns(self, names: Sequence[str]) -> dict[str, set[str]]:
        """Return, for tables, the columns with which an index begins."""
        with self._connected() as session:
            return read_first_columns(session, names)

    def estimated_rows(self, table: Table) -> int | None:
        """Return the engine's estimate of a table's rows, which may be far off; None when it has none."""
        query = "SELECT table_rows FROM information_schema.tables WHERE table_schema = %s AND table_name = %s"
        with self._connected() as session:
            rows = fetch(session, query, (table.schema, table.name))
        return int(rows[0][0]) if rows and rows[0][0] is not None else None

    def table_codec(self, table: Table) -> TableCodec:
        """Return how the events of a table are read."""
        return codec.table_codec(table)

    # ── positions ────────────────────────────────────────────────────────────────────────────────────────────────

    def log_end(self) -> int:
        """Return the position at which the next event of the log will be written."""
        with self._connected() as session:
            return end_of_log(session, self.log_status)

    def bytes_between(self, start: int, end: int) -> int | None:
        """Return how much log lies between two positions; None when they are in different files."""
        return max(0, end - start) if start >> OFFSET_BITS == end >> OFFSET_BITS else None

    def heartbeat(self, prefix: str) -> int:
        """Return the log's end, which the connector confirms though nothing more is written. Nothing is written."""
        del prefix
        return self.log_end()

    def capture_position(self, spec: PipelineSpec, state: StateStore) -> BinlogPosition:
        """Return where the pipeline's connector keeps its position: in Kafka, or in the state store."""
        if self._place is None:
            self._place = BinlogPosition(self, _store_of(spec, state))
        return self._place

    def why_lost(self, position: int, gtids: str | None = None) -> str | None:
        """Return why the log does not go on from a position that it once had, as a clause; None when it does.

        A log that was reset and has come beyond the position since is told by `gtids`, what was in the log up to the
        position: numbers that are not there yet. One that has come beyond these, too, is told when no event begins at
        the position.
        """
        with self._connected() as session:
            files = [(str(row[0]), int(row[1])) for row in fetch(session, "SHOW BINARY LOGS")]
            if not files:
                return "the source has no binary log"
            if position > position_of(*files[-1]):
                return "the source's log ends before it: it was reset (RESET MASTER), or the source was restored"
            if position < position_of(files[0][0], 0):
                return PURGED
            sizes = {position_of(name, 0): size for name, size in files}
            file, offset = position & ~MAX_OFFSET, position & MAX_OFFSET
            if offset > sizes.get(file, 0):
                return "the source's log lacks it: the end of a file went with a crash, or the source was restored"
            if gtids and self._lacks(session, gtids):
                return "the source's log begins anew: it was reset (RESET MASTER), or the source was restored"
        return None

    def _lacks(self, session: Session, gtids: str) -> bool:
        """Tell whether the log lacks some of these transactions, all of which were in it once."""
        return behind(str(fetch(session, "SELECT @@global.gtid_binlog_state")[0][0] or ""), gtids)

    def blockers(self) -> Sequence[object]:
        """Return for what claims wait: transactions that are prepared (XA); else it is time or the next commit."""
        with self._connected() as session:
            prepared = sorted(prepared_in(session))
        return [Prepared(xid) for xid in prepared] or [Resting()]

    def new_samples(self) -> Samples:
        """Return an empty collection of samples."""
        return Samples()

    def sample(self) -> Sample:
        """Take a sample for claims: the position of a snapshot of its own."""
        with self._connected() as session, self._snapshot(session) as snapshot:
            found = self._look(session, snapshot)
            prepared = prepared_in(session)
            return Sample(snapshot.position, self._clock(), prepared, found.waits, found.shown)

    def identity(self) -> SourceIdentity:
        """Return which history of positions the source is in: the server's own identifier, and where its log is.

        RESET MASTER changes neither: that is what `why_lost` is for.
        """
        query = (
            "SHOW GLOBAL VARIABLES WHERE Variable_name IN"
            " ('server_uid', 'server_uuid', 'server_id', 'hostname', 'log_bin_basename')"
        )
        with self._connected() as session:
            found = {str(name): str(value) for name, value in fetch(session, query)}
        # Before 10.6.17 MariaDB has no identifier of its own.
        server = found.get("server_uid") or found.get("server_uuid") or f"{found['hostname']}/{found['server_id']}"
        return SourceIdentity(f"{server} {found.get('log_bin_basename', '')}".strip(), 0)

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def clock(self) -> int:
        """Return the clock of a snapshot that is taken now: the place up to which it shows everything, less one."""
        with self._connected() as session, self._sure_snapshot(session) as snapshot:
            return snapshot.clock

    def check_query(self, table: Table) -> None:
        """Have the source plan a document's query, and see what it returns. Raises UsageError."""
        if table.query is not None:
            with self._connected() as session:
                parts.check_query(session, table)

    def root_keys(
        self, watch: Watch, values: Sequence[Key], most: int, usable: Callable[[Snapshot], bool]
    ) -> list[Key] | None:
        """Return the keys of a document's root to which values of a watch lead, at most so many, in one snapshot."""
        with self._connected() as session, self._sure_snapshot(session) as snapshot:
            if not usable(snapshot):
                return None
            return parts.root_keys(session, watch, values, most)

    def root_condition(self, root: Table, watch: Watch, values: Sequence[Key]) -> str:
        """Return the condition that is true of the root's rows to which values of a watch lead."""
        with self._connected() as session:
            return parts.root_condition(session, root, watch, values)

    def check_condition(self, table: Table, where: str) -> None:
        """Have the source plan a query with the condition. Raises UsageError."""
        condition, parameters = _within(table, None, None, where)
        with self._connected() as session, _condition(table, where):
            fetch(session, f"EXPLAIN SELECT 1 FROM {qualified(table)} AS t{condition}", parameters)  # noqa: S608 -- quoted
            # `a) OR (b` would take the bounds of a chunk for a part of it; it is no condition between other words.
            fetch(session, f"EXPLAIN SELECT CASE WHEN\n{where}\nTHEN 1 END FROM {qualified(table)} AS t")  # noqa: S608 -- a user's SQL

    def read_chunk(
        self,
        table: Table,
        after: Key | None,
        rows_most: int,
        bytes_most: int,
        usable: Callable[[Snapshot], bool],
        *,
        to: Key | None = None,
        where: str | None = None,
    ) -> Chunk | None:
        """Read the rows behind `after` up to `to` in the order of the key, at most `rows_most`, in one snapshot.

        None if the snapshot is not `usable`. It ends early when the values have `bytes_most` bytes, so no more than
        that and one row are in memory.
        """
        own = keys_alone(table) if table.query is not None else table
        condition, parameters = _within(table, after, to, where)
        order = ", ".join(f"t.{quoted(name)}" for name in table.key)
        query = f"SELECT {codec.select_list(own)} FROM {qualified(table)} AS t{condition} ORDER BY {order} LIMIT %s"  # noqa: S608 -- quoted
        with self._connected() as session, self._snapshot_for(session, table) as snapshot:
            if not usable(snapshot):
                return None
            rows: list[tuple[Key, Row]] = []
            with _condition(table, where):
                full = self._collect(
                    session, own, query, (*parameters, rows_most), rows, bytes_most, keep=table.is_document
                )
            last_key = rows[-1][0] if full or len(rows) == rows_most else None
            return _with_parts(session, table, Chunk(snapshot.position, rows, last_key), snapshot)

    def key_behind(self, table: Table, after: Key | None, rows: int) -> Key | None:
        """Return the key of the row that is so many rows behind `after`; None beyond the last."""
        keys_alone = table._replace(columns=tuple(table.column(name) for name in table.key))
        condition, parameters = _within(table, after, None, None)
        order = ", ".join(f"t.{quoted(name)}" for name in table.key)
        query = (
            f"SELECT {codec.select_list(keys_alone)} FROM {qualified(table)} AS t{condition}"  # noqa: S608 -- quoted
            f" ORDER BY {order} LIMIT 1 OFFSET %s"
        )
        with self._connected() as session:
            found = fetch(session, query, (*parameters, rows - 1))
        return codec.row_maker(keys_alone)(found[0])[0] if found else None

    def keys_having(self, table: Table, column: str, values: Sequence[Any], most: int | None = None) -> list[Key]:
        """Return the keys of the rows whose column has one of these values; if more than `most` do, some more."""
        of = table.column(column)
        narrow = table._replace(columns=tuple(table.column(name) for name in dict.fromkeys((*table.key, column))))
        to_row, wanted = codec.row_maker(narrow), frozenset(values)
        found: list[Key] = []
        with self._connected() as session:
            for start in range(0, len(values), KEYS_AT_ONCE):
                try:
                    parameters = tuple(codec.parameter(of, value) for value in values[start : start + KEYS_AT_ONCE])
                except ValueError as error:  # no member of an enumeration
                    raise UsageError(f"Rows cannot be found by {table.id}.{column}: {error}.") from error
                among = ", ".join(["%s"] * len(parameters))
                query = (
                    f"SELECT {codec.select_list(narrow)} FROM {qualified(table)} AS t"  # noqa: S608 -- quoted
                    f" WHERE t.{quoted(column)} IN ({among}){'' if most is None else f' LIMIT {most + 1}'}"
                )
                rows = map(to_row, fetch(session, query, parameters))
                # A collation takes for equal what a look-up was not asked with.
                found += [key for key, row in rows if row[column] in wanted]
                if most is not None and len(found) > most:
                    break
        return found

    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Snapshot], bool]) -> Chunk | None:
        """Read the rows of these keys in one snapshot, or return None if that is not `usable`.

        A row that is gone is absent. When the values have KEYS_BYTES bytes the rest is left out, and `last_key` set.
        """
        own = keys_alone(table) if table.query is not None else table
        with self._connected() as session, self._snapshot_for(session, table) as snapshot:
            if not usable(snapshot):
                return None
            rows: list[tuple[Key, Row]] = []
            full = False
            for start in range(0, len(keys), KEYS_AT_ONCE):
                condition, parameters = having(own, own.key, keys[start : start + KEYS_AT_ONCE])
                query = f"SELECT {codec.select_list(own)} FROM {qualified(table)} AS t WHERE {condition}"  # noqa: S608 -- quoted
                full = self._collect(session, own, query, parameters, rows, KEYS_BYTES, keep=table.is_document)
                if full:
                    break
            chunk = Chunk(snapshot.position, rows, rows[-1][0] if full else None)
            return _with_parts(session, table, chunk, snapshot)

    @contextmanager
    def _snapshot(self, session: Session) -> Generator[Snapshot]:
        """A read-only transaction with a snapshot that knows its position."""
        try:
            yield self._begin(session)
        finally:
            if session.open:
                with contextlib.suppress(pymysql.Error):
                    session.rollback()

    @contextmanager
    def _snapshot_for(self, session: Session, table: Table) -> Generator[Snapshot]:
        """The snapshot in which rows of a table are read: of documents one of which it is sure what it shows."""
        with self._sure_snapshot(session) if table.is_document else self._snapshot(session) as snapshot:
            yield snapshot if table.is_document else self._looked_at(session, snapshot)

    @contextmanager
    def _sure_snapshot(self, session: Session) -> Generator[Snapshot]:
        """A snapshot of which it is sure what it shows. Raises SourceBusy when that takes long."""
        deadline_s = self._clock() + SURE_S
        while True:
            with self._snapshot(session) as taken:
                snapshot = self._looked_at(session, taken)
                if snapshot.shown:
                    yield snapshot
                    return
            if self._clock() >= deadline_s:
                raise SourceBusy(_why_not_sure(snapshot))
            time.sleep(SURE_POLL_S)

    def _looked_at(self, session: Session, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot that was just taken, with what it surely shows."""
        found = self._look(session, snapshot)
        return snapshot._replace(shown=0 if found.xa else found.shown)

    def _look(self, session: Session, snapshot: Snapshot) -> _Look:
        """Look at the server just after a snapshot was taken.

        If it is not known what it shows because its file is new, the file's head is read, for the next one.
        """
        with _asking:
            status = dict(fetch(session, _STATUS))
        file, position = str(status["Binlog_snapshot_file"]), snapshot.position
        prepared = str(status.get("Com_xa_prepare", "0"))
        if prepared != self._xa[0]:
            self._xa = prepared, self._clock()
        # XA RECOVER was asked before; what was begun after that is not in the count of long ago.
        xa = bool(snapshot.prepared) or (prepared != "0" and snapshot.taken_s - self._xa[1] < LISTED_S)
        waits = str(status.get("Rpl_semi_sync_master_wait_sessions", "0")) != "0"
        if position < self._stands[0]:
            self._head = None  # the log may have begun anew
        if waits or position != self._stands[0]:
            self._stands = position, self._clock()
        stands = snapshot.taken_s - self._stands[1] >= STOOD_S
        shown = shown_to(position, self._head, stands=stands)
        if position_of(file, 0) == position & ~MAX_OFFSET:  # or it is another session's answer
            self._read_head(session, file)
        return _Look(shown, waits, xa)

    def _read_head(self, session: Session, file: str) -> None:
        """Read on in a file of the log until it says that older ones are no longer needed; a bounded part of it.

        The server holds the log while it reads these events, so this is not seen before it has its effect.
        """
        number = position_of(file, 0) >> OFFSET_BITS
        head = self._head if self._head is not None and self._head.file == number else Head(number)
        if head.settled is None:
            begin = f" FROM {head.read_to}" if head.read_to else ""
            rows = fetch(session, f"SHOW BINLOG EVENTS IN %s{begin} LIMIT {HEAD_EVENTS}", (file,))
            head = head.joined(file, ((str(kind), int(at), int(end), str(info)) for _, at, kind, _, end, info in rows))
        self._head = head

    def _begin(self, session: Session) -> Snapshot:
        for _ in range(SNAPSHOTS_MOST):
            with _asking:
                taken_s = self._clock()
                prepared = prepared_in(session)
                fetch(session, "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
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
        *,
        keep: bool,
    ) -> bool:
        """Append a query's rows until their values have so many bytes; return whether that was so.

        Then the connection is given up: it would have to take all that the server still has to send. But where it is to
        be kept, because parts are yet to be read in its snapshot, the rest is taken, and forgotten.
        """
        to_row = codec.row_maker(table)
        size = 0
        for values in stream(session, query, parameters):
            if size >= bytes_most:
                continue
            rows.append(to_row(values))
            size += sum(len(value) for value in values if value is not None)
            if size >= bytes_most and not keep:
                self._drop()
                return True
        return size >= bytes_most


def _store_of(spec: PipelineSpec, state: StateStore) -> Store:
    if spec.kafka is None:
        from delta_sync.state_connector import ConnectorState

        return ConnectorState(state, spec.name)
    from delta_sync.kafka.connector import ConnectorStore  # which needs Kafka's client

    return ConnectorStore(spec)


def end_of_log(session: Session, statement: str) -> int:
    """Return the position at which the next event of the log will be written. Raises CheckFailed without a log."""
    rows = fetch(session, statement)
    if not rows:
        raise CheckFailed([Problem("source", "it has no binary log", "see `deltactl pipeline check`")])
    return position_of(str(rows[0][0]), int(rows[0][1]))


def behind(here: str, gtids: str) -> bool:
    """Tell whether a log with the GTIDs `here` lacks some of `gtids`: both as `0-1-27,1-2-3`, the last of each kind."""
    newest = dict(map(_gtid, filter(None, here.split(","))))
    return any(number > newest.get(kind, 0) for kind, number in map(_gtid, filter(None, gtids.split(","))))


def _gtid(text: str) -> tuple[str, int]:
    kind, _, number = text.strip().rpartition("-")  # domain and server
    return kind, int(number)


def _snapshot_position(session: Session) -> int:
    found = {str(name).lower(): str(value) for name, value in fetch(session, "SHOW STATUS LIKE 'binlog_snapshot_%'")}
    return position_of(found["binlog_snapshot_file"], int(found["binlog_snapshot_position"]))


def _why_not_sure(snapshot: Snapshot) -> str:
    if snapshot.prepared:
        blocker = Prepared(min(snapshot.prepared))
        return f"The source cannot tell what a snapshot shows before the end of {blocker}."
    return (
        "The source cannot tell yet what a snapshot shows: the file of its log is new, or XA transactions follow each"
        f" other within {LISTED_S:g} s."
    )


def _with_parts(session: Session, table: Table, chunk: Chunk, snapshot: Snapshot) -> Chunk:
    """Return what was read of a root with its parts and the snapshot's clock; only the first rows, if need be.

    What a sink has of a document is compared with the clock, so `seen_to` is one, too.
    """
    if not table.is_document:
        return chunk
    rows = parts.attach(session, table, chunk.rows)
    last_key = chunk.last_key if len(rows) == len(chunk.rows) else chunk.rows[len(rows) - 1][0]
    found = [(key, row) for key, row in rows if row is not None]
    return Chunk(snapshot.clock + 1, found, last_key, snapshot.clock)


def prepared_in(session: Session) -> frozenset[str]:
    """Return the XA transactions that are prepared and not yet committed: format, lengths, name."""
    return frozenset(" ".join(map(str, row)) for row in fetch(session, "XA RECOVER"))


def _within(table: Table, after: Key | None, to: Key | None, where: str | None) -> tuple[str, tuple[Any, ...]]:
    """Return a condition for the rows behind a key, up to another, that meet a condition; and its parameters."""
    conditions: list[str] = []
    parameters: list[Any] = []
    for key, sign, last in ((after, ">", ">"), (to, "<", "<=")):
        if key is not None:
            condition, values = _beside(table, key, sign, last)
            conditions.append(condition)
            parameters += values
    if where is not None:  # on lines of its own, because it may end with a comment
        escaped = where.replace("%", "%%")
        conditions.append(f"(\n{escaped}\n)")
    return (f" WHERE {' AND '.join(conditions)}" if conditions else ""), tuple(parameters)


def _beside(table: Table, key: Key, sign: str, last: str) -> tuple[str, list[Any]]:
    """Return a condition for the rows on one side of a key, and its parameters.

    Spelt out, `a >= 1 AND (a > 1 OR (a = 1 AND b > 2))`: of `(a, b) > (1, 2)` the server reads the whole index.
    """
    names = [f"t.{quoted(name)}" for name in table.key]
    values = key_values(table, key)
    condition, parameters = f"{names[-1]} {last} %s", [values[-1]]
    for name, value in reversed(list(zip(names[:-1], values[:-1], strict=True))):
        condition = f"({name} {sign} %s OR ({name} = %s AND {condition}))"
        parameters = [value, value, *parameters]
    if len(names) > 1:
        condition, parameters = f"{names[0]} {sign}= %s AND {condition}", [values[0], *parameters]
    return condition, parameters


@contextmanager
def _condition(table: Table, where: str | None) -> Generator[None]:
    """Say of an error that it is the condition's, where there is one."""
    try:
        yield
    except (pymysql.err.ProgrammingError, pymysql.err.DataError) as error:
        if where is None:
            raise
        raise UsageError(f"The condition {where!r} fails: {said_of(table, error)}.") from error
    except pymysql.err.OperationalError as error:
        if where is None or code_of(error) != UNKNOWN_COLUMN:
            raise
        raise UsageError(f"The condition {where!r} fails: {said_of(table, error)}.") from error
