"""Reading a PostgreSQL source beside its log: samples, chunks, rows by key, heartbeats. No locks, and `SELECT` only.

Nothing is written to a table. A heartbeat is a logical message (`pg_logical_emit_message`): some bytes in the WAL that
come back through the log, so that the slot can advance while the tables rest, and so that one knows how far the log is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from delta_sync.changes import Key
from delta_sync.decoding import TableCodec
from delta_sync.documents import Watch
from delta_sync.errors import SchemaChanged, SourceBusy, UsageError
from delta_sync.logs import logger
from delta_sync.secrets import redact
from delta_sync.sources.postgresql import codec, parts
from delta_sync.sources.postgresql.catalogue import (
    read_fingerprints,
    read_first_columns,
    read_foreign_keys,
    read_tables,
)
from delta_sync.sources.postgresql.claims import Sample, Samples, Snapshot, parse_snapshot, sample_of
from delta_sync.sources.postgresql.connection import connect
from delta_sync.sources.postgresql.statements import (
    array,
    fixed,
    key_columns,
    key_rows,
    parameter,
    qualified,
    row_maker,
    said_of,
    type_of,
)
from delta_sync.sources.reader import CapturePosition, Chunk, Confirmed, SourceIdentity, SourceReader
from delta_sync.spec import PipelineSpec, SourceSpec
from delta_sync.tables import Table, keys_alone
from delta_sync.values import Row
from delta_sync.versions import format_lsn, parse_lsn

if TYPE_CHECKING:
    from delta_sync.state import StateStore

log = logger(__name__)

ROWS_AT_ONCE = 4  # of a table with long values: what may be in memory beyond the chunk's byte limit
FETCHED_AT_ONCE = 500  # of other tables: no other thread runs while psycopg makes objects of them
KEYS_BYTES = 16 << 20  # of rows read by key at once: a batch may lack thousands, each of them megabytes long
KEYS_AT_ONCE = 1000  # keys in a statement: far more would make the server leave its index
LOCK_NOTICE_AGE_S = 1.0
FLUSHING_MESSAGES = 170000
TIMELINE_DIGITS = 8  # hexadecimal, at the beginning of the name of a file of the log
TERMINATION_MS = 10_000  # a backend ends within milliseconds, unless it is stuck; until then its slot is in use


class Blocker(NamedTuple):
    """A transaction for whose end a claim has to wait."""

    pid: int | None
    xid: int
    age_s: float
    query: str

    def __str__(self) -> str:
        who = f"pid {self.pid}" if self.pid is not None else "a prepared transaction"
        return f"{who} (xid {self.xid}, open for {self.age_s:.0f} s): {self.query[:200]}"


class SlotState(NamedTuple):
    """The replication slot as the server has it; positions are integers."""

    active_pid: int | None
    wal_status: str | None
    confirmed_lsn: int | None


class PostgresReader(SourceReader):
    """One connection to the source, opened when needed and again after it broke. Used by one thread at a time.

    Every method raises SourceBusy when the source cannot be reached; CheckFailed when it refuses. With `answer_s` it
    also does so when the source has said nothing for so long; without it long queries take as long as they need.
    """

    claim_wait_s: ClassVar[float] = 0.25  # for running transactions: far above a short one's length, near real time

    def __init__(self, source: SourceSpec, application_name: str, answer_s: float | None = None) -> None:
        self._source = source
        self._application_name = application_name
        self._answer_s = answer_s
        self._connection: psycopg.Connection | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def abort(self) -> None:
        """End, from another thread, whatever is waiting for an answer: it raises SourceBusy.

        A source that keeps its connections open and says nothing would be waited for until TCP gives up, for hours.
        """
        connection = self._connection  # not under the lock, which whoever waits is holding
        if connection is not None and not connection.closed:
            with (
                contextlib.suppress(OSError, psycopg.OperationalError),  # it has just ended by itself
                socket.socket(fileno=os.dup(connection.fileno())) as end,
            ):
                end.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _connected(self) -> Generator[psycopg.Connection]:
        with self._lock, self._patience() as has_ended:
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = connect(self._source, self._application_name)
                    self._connection.prepare_threshold = (
                        None  # a prepared plan would outlive the columns it was made for
                    )
                    codec.configure(self._connection)
                yield self._connection
            except (psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedTable) as error:
                raise SchemaChanged(f"The source says: {error.diag.message_primary}.") from error
            except psycopg.OperationalError as error:
                broken, self._connection = self._connection, None
                if broken is not None:
                    broken.close()
                if has_ended():
                    raise SourceBusy(f"The source has said nothing for {self._answer_s:g} s.") from error
                raise SourceBusy(f"The source does not answer: {redact(str(error)).strip()}") from error

    @contextmanager
    def _patience(self) -> Generator[Callable[[], bool]]:
        """End what waits for an answer after `answer_s`; the function tells whether that has happened."""
        ended = threading.Event()
        if self._answer_s is None:
            yield ended.is_set
            return

        def end() -> None:
            ended.set()
            self.abort()

        timer = threading.Timer(self._answer_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield ended.is_set
        finally:
            timer.cancel()

    def _value(self, query: LiteralString, parameters: Sequence[object] = ()) -> Any:
        with self._connected() as connection:
            row = connection.execute(query, parameters).fetchone()
            return row[0] if row is not None else None

    # ── catalogue ────────────────────────────────────────────────────────────────────────────────────────────────

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables that exist, by `schema.table`."""
        with self._connected() as connection:
            return self.assembled(
                names, lambda some: read_tables(connection, some), lambda some: read_foreign_keys(connection, some)
            )

    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """Return, for each table that exists, a text that changes whenever its columns or its key do."""
        with self._connected() as connection:
            return self.fingerprinted(read_fingerprints(connection, names, self.documented))

    def first_columns(self, names: Sequence[str]) -> dict[str, set[str]]:
        """Return, for tables, the columns with which an index of all rows begins."""
        with self._connected() as connection:
            return read_first_columns(connection, names)

    def estimated_rows(self, table: Table) -> int | None:
        """Return the planner's estimate of a table's rows; None when it was never analysed."""
        estimate = self._value(
            "SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass(%s)", [qualified(table).as_string(None)]
        )
        return estimate if estimate is not None and estimate >= 0 else None

    def table_codec(self, table: Table) -> TableCodec:
        """Return how the events of a table are read."""
        return codec.table_codec(table)

    # ── positions ────────────────────────────────────────────────────────────────────────────────────────────────

    def log_end(self) -> int:
        """Return the position at which the next record of the log will be written."""
        return parse_lsn(self._value("SELECT pg_current_wal_insert_lsn()::text"))

    def durable_end(self) -> int:
        """Return the position up to which the log is on disk: a crash takes nothing below, and no slot is beyond."""
        return parse_lsn(self._value("SELECT pg_current_wal_flush_lsn()::text"))

    def heartbeat(self, prefix: str) -> int:
        """Write a logical message and return its position: the log carries it with exactly this `lsn`.

        All changes that were visible when this was called come before it.
        """
        with self._connected() as connection:
            # From 17 on the message can ask for its own flush; before, the WAL writer does it within 200 ms.
            flush = ", true" if connection.info.server_version >= FLUSHING_MESSAGES else ""
            query = sql.SQL("SELECT pg_logical_emit_message(false, %s, ''" + flush + ")::text")
            (lsn,) = _row(connection.execute(query, [prefix]))
        return parse_lsn(lsn)

    def new_samples(self) -> Samples:
        """Return an empty collection of samples."""
        return Samples()

    def sample(self) -> Sample:
        """Take a sample for claims: three statements of one connection, in the order that the proof needs.

        Its position is that up to which the log is on disk, not the insert position, for which the proof would do as
        well: what is not on disk goes with a crash, its positions are given to other changes, and a row that claims
        them would outrank those for ever.
        """
        with self._connected() as connection:
            (lsn,) = _row(connection.execute("SELECT pg_current_wal_flush_lsn()::text"))
            running = connection.execute(
                "SELECT transactionid::text::bigint FROM pg_locks"
                " WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted"
            ).fetchall()
            (xmax,) = _row(connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"))
        return sample_of(parse_lsn(lsn), (xid for (xid,) in running), xmax)

    def identity(self) -> SourceIdentity:
        """Return which history of positions the source is in. Raises SourceBusy on a replica that is not promoted yet.

        The timeline is that of the log which is written now. pg_control_checkpoint() has that of the last checkpoint,
        which after a promotion is the old one for minutes.
        """
        with self._connected() as connection:
            identifier, file = _row(
                connection.execute(
                    "SELECT system_identifier::text, pg_walfile_name(pg_current_wal_insert_lsn())"
                    " FROM pg_control_system()"
                )
            )
        return SourceIdentity(identifier, int(file[:TIMELINE_DIGITS], 16))

    def blockers(self) -> list[Blocker]:
        """Return the transactions with an id that are open for a while, oldest first: claims wait for their end."""
        with self._connected() as connection:
            rows = connection.execute(
                "SELECT pid, backend_xid::text::bigint, extract(epoch FROM now() - xact_start)::float8, query"
                " FROM pg_stat_activity WHERE backend_xid IS NOT NULL"
                " UNION ALL SELECT NULL, transaction::text::bigint, extract(epoch FROM now() - prepared)::float8, gid"
                " FROM pg_prepared_xacts ORDER BY 3 DESC NULLS LAST"
            ).fetchall()
        return [
            Blocker(pid, xid, age_s or 0.0, redact(query or ""))
            for pid, xid, age_s, query in rows
            if (age_s or 0.0) >= LOCK_NOTICE_AGE_S
        ]

    # ── slot and publication ─────────────────────────────────────────────────────────────────────────────────────

    def capture_position(self, spec: PipelineSpec, state: StateStore) -> CapturePosition:
        """Return the pipeline's slot, and its publication."""
        del state
        return Slot(self, spec)

    def slot(self, name: str) -> SlotState | None:
        """Return the state of a replication slot, or None when there is none of that name."""
        with self._connected() as connection:
            row = connection.execute(
                "SELECT active_pid, wal_status, confirmed_flush_lsn::text FROM pg_replication_slots"
                " WHERE slot_name = %s",
                [name],
            ).fetchone()
        if row is None:
            return None
        return SlotState(row[0], row[1], parse_lsn(row[2]) if row[2] is not None else None)

    def create_slot(self, name: str) -> int:
        """Create the replication slot and return the position from which it delivers.

        Waits for every transaction that is running now to end, as PostgreSQL demands.
        """
        return parse_lsn(
            self._value("SELECT lsn::text FROM pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
        )

    def end_reader_of_slot(self, name: str) -> None:
        """End the connection that reads the slot, if there is one, and wait for its end."""
        with self._connected() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(active_pid, %s) FROM pg_replication_slots"
                " WHERE slot_name = %s AND active_pid IS NOT NULL",
                [TERMINATION_MS, name],
            )

    def drop_slot(self, name: str) -> None:
        """Drop the replication slot, ending the connection that uses it. Nothing happens when there is none."""
        self.end_reader_of_slot(name)
        with self._connected() as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [name]
            )

    def publish(self, publication: str, tables: Sequence[Table]) -> bool:
        """Make the publication cover exactly these tables; return whether anything had to change."""
        with self._connected() as connection:
            row = connection.execute(
                "SELECT puballtables FROM pg_publication WHERE pubname = %s", [publication]
            ).fetchone()
            listed = sql.SQL(", ").join(qualified(table) for table in tables)
            if row is None:
                connection.execute(
                    sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)").format(
                        sql.Identifier(publication), listed
                    )
                )
                return True
            published = {
                f"{schema}.{name}"
                for schema, name in connection.execute(
                    "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = %s", [publication]
                )
            }
            wanted = {table.id for table in tables}
            if published == wanted or (row[0] and wanted <= published):
                return False
            connection.execute(sql.SQL("ALTER PUBLICATION {} SET TABLE {}").format(sql.Identifier(publication), listed))
            return True

    def drop_publication(self, publication: str) -> None:
        """Drop the publication. Nothing happens when there is none."""
        with self._connected() as connection:
            connection.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(publication)))

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_condition(self, table: Table, where: str) -> None:
        """Have the source plan a query with the condition. Raises UsageError."""
        query = sql.SQL("EXPLAIN SELECT FROM {} AS t{} LIMIT %s").format(
            fixed(qualified(table)), _within(table, None, None, where)
        )
        # `a) OR (b` would take the bounds of a chunk for a part of it; it is no condition between other words.
        alone = sql.SQL("EXPLAIN SELECT CASE WHEN\n{}\nTHEN 1 END FROM {} AS t LIMIT %s").format(
            fixed(sql.SQL(where)),  # pyright: ignore[reportArgumentType] -- it is meant to be SQL
            fixed(qualified(table)),
        )
        with self._connected() as connection, _condition(table, where):
            connection.execute(query, [1])
            connection.execute(alone, [1])

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

        None if the snapshot is not `usable`. It ends early when the values have `bytes_most` bytes; so no more than
        that and ROWS_AT_ONCE rows are in memory.
        """
        own = keys_alone(table) if table.query is not None else table
        query = sql.SQL("SELECT {} FROM {} AS t{} ORDER BY {} LIMIT %s").format(
            fixed(codec.select_list(own)),
            fixed(qualified(table)),
            _within(table, after, to, where),
            key_columns(table),
        )
        parameters = [*(after or ()), *(to or ()), rows_most]
        rows: list[tuple[Key, Row]] = []
        with self._snapshot() as (connection, snapshot, seen_to):
            if not usable(snapshot):
                return None
            to_row = row_maker(own)
            left = bytes_most
            with _condition(table, where):
                if self._has_long_values(connection, table):
                    left = _limited(connection, query, parameters, to_row, rows, bytes_most)
                else:
                    rows = _all(connection.execute(query, parameters), to_row)
            chunk = Chunk(seen_to, rows, rows[-1][0] if not left or len(rows) == rows_most else None)
            return _with_parts(connection, table, chunk, snapshot)

    def key_behind(self, table: Table, after: Key | None, rows: int) -> Key | None:
        """Return the key of the row that is so many rows behind `after`; None beyond the last."""
        keys_alone = table._replace(columns=tuple(table.column(name) for name in table.key))
        query = sql.SQL("SELECT {} FROM {} AS t{} ORDER BY {} OFFSET {} LIMIT 1").format(
            fixed(codec.select_list(keys_alone)),
            fixed(qualified(table)),
            _within(table, after, None, None),
            key_columns(table),
            sql.Literal(rows - 1),
        )
        with self._connected() as connection:
            row = connection.execute(query, after or ()).fetchone()
        return None if row is None else row_maker(keys_alone)(row)[0]

    def keys_having(self, table: Table, column: str, values: Sequence[Any], most: int | None = None) -> list[Key]:
        """Return the keys of the rows whose column has one of these values; if more than `most` do, one more."""
        narrow = table._replace(columns=tuple(table.column(name) for name in dict.fromkeys((*table.key, column))))
        query = sql.SQL("SELECT {} FROM {} AS t WHERE {} = ANY(%s::{}[]) LIMIT %s").format(
            fixed(codec.select_list(narrow)),
            fixed(qualified(table)),
            fixed(sql.Identifier("t", column)),
            type_of(table.column(column)),
        )
        to_row, wanted = row_maker(narrow), frozenset(values)
        try:
            with self._connected() as connection:
                found = map(to_row, connection.execute(query, [array(values), None if most is None else most + 1]))
                # A collation, or a padded type, takes for equal what a look-up was not asked with.
                return [key for key, row in found if row[column] in wanted]
        except (psycopg.DataError, psycopg.ProgrammingError) as error:
            told = error.diag.message_primary or str(error)
            raise UsageError(f"Rows cannot be found by {table.id}.{column}: {redact(told)}.") from error

    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Snapshot], bool]) -> Chunk | None:
        """Read the rows of these keys in one snapshot, or return None if that is not `usable`.

        A row that is gone is absent, and so is one whose key no row can have: beyond its type, or of no enumeration.
        When the values have KEYS_BYTES bytes the rest is left out, and `last_key` set.
        """
        try:
            return self._read_keys(table, keys, usable)
        except (psycopg.DataError, UnicodeEncodeError):  # of one key, but psycopg and the server refuse all of them
            possible = self._possible(table, keys)
            if len(possible) == len(keys):
                raise
            return self._read_keys(table, possible, usable)

    def _possible(self, table: Table, keys: Sequence[Key]) -> list[Key]:
        """Return those of the keys that the types of the key's columns can hold, asked one by one."""
        of = sql.SQL(", ").join(parameter(table.column(name)) for name in table.key)
        query = sql.SQL("SELECT {}").format(of)
        found: list[Key] = []
        with self._connected() as connection:
            for key in keys:
                with contextlib.suppress(psycopg.DataError, UnicodeEncodeError):
                    connection.execute(query, key)
                    found.append(key)
        return found

    def _read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Snapshot], bool]) -> Chunk | None:
        own = keys_alone(table) if table.query is not None else table
        query = sql.SQL("SELECT {} FROM {} AS t JOIN {} USING ({})").format(
            fixed(codec.select_list(own)),
            fixed(qualified(table)),
            key_rows(table),
            key_columns(table),
        )
        with self._snapshot() as (connection, snapshot, seen_to):
            if not usable(snapshot):
                return None
            to_row = row_maker(own)
            has_long_values = self._has_long_values(connection, table)
            rows: list[tuple[Key, Row]] = []
            left = KEYS_BYTES
            for start in range(0, len(keys), KEYS_AT_ONCE):
                columns = [array(column) for column in zip(*keys[start : start + KEYS_AT_ONCE], strict=True)]
                if has_long_values:
                    left = _limited(connection, query, columns, to_row, rows, left)
                else:
                    rows += _all(connection.execute(query, columns), to_row)
                if not left:
                    break
            chunk = Chunk(seen_to, rows, None if left else rows[-1][0])
            return _with_parts(connection, table, chunk, snapshot)

    def clock(self) -> int:
        """Return the clock of a snapshot that is taken now."""
        return parse_snapshot(self._value("SELECT pg_current_snapshot()::text")).clock

    def check_query(self, table: Table) -> None:
        """Have the server plan how a document is read, by its query or by its parts. Raises UsageError."""
        if table.is_document:
            with self._snapshot() as (connection, _, _):
                if table.query is not None:
                    parts.check_query(connection, table)
                else:
                    parts.check_parts(connection, table, table.id)

    def root_keys(
        self, watch: Watch, values: Sequence[Key], most: int, usable: Callable[[Snapshot], bool]
    ) -> list[Key] | None:
        """Return the keys of a document's root to which values of a watch lead, at most so many, in one snapshot."""
        with self._snapshot() as (connection, snapshot, _):
            if not usable(snapshot):
                return None
            return parts.root_keys(connection, watch, values, most)

    def root_condition(self, root: Table, watch: Watch, values: Sequence[Key]) -> str:
        """Return the condition that is true of the root's rows to which values of a watch lead."""
        with self._connected() as connection:
            return parts.root_condition(connection, root, watch, values)

    @contextmanager
    def _snapshot(self) -> Generator[tuple[psycopg.Connection, Snapshot, int]]:
        """A read-only REPEATABLE READ transaction, its snapshot, and a position above all changes that this sees.

        The snapshot is taken before the first statement runs, and that statement asks for the position.
        """
        with self._connected() as connection:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                query = "SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text"
                text, lsn = _row(connection.execute(query))
                yield connection, parse_snapshot(text), parse_lsn(lsn)
            finally:
                if not connection.closed:
                    connection.execute("ROLLBACK")

    @staticmethod
    def _has_long_values(connection: psycopg.Connection, table: Table) -> bool:
        """Tell whether the table has values out of line; without them a row has at most a page, 8 KiB."""
        (size,) = _row(
            connection.execute(
                "SELECT coalesce(sum(pg_relation_size(reltoastrelid)), 0) FROM pg_class"
                " WHERE reltoastrelid <> 0 AND (oid = to_regclass(%(table)s)"
                " OR oid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(table)s))))",
                {"table": qualified(table).as_string(connection)},
            )
        )
        return bool(size)


class Slot(CapturePosition):
    """A pipeline's replication slot and publication, through a reader."""

    def __init__(self, reader: PostgresReader, spec: PipelineSpec) -> None:
        self._reader = reader
        self._slot = spec.slot
        self._publication = spec.publication
        self.name = f"replication slot {spec.slot}"

    def look(self) -> Confirmed | None:
        """Return where the slot is. The connector moves it with each heartbeat."""
        slot = self._reader.slot(self._slot)
        if slot is None:
            return None
        lost = f"the source removed log that {self.name} still needed" if slot.wal_status == "lost" else None
        return Confirmed(slot.confirmed_lsn, lost, slot.confirmed_lsn or 0, overtaken=lost is not None)

    def create(self) -> int:
        """Create the slot; waits for every transaction that is running now."""
        position = self._reader.create_slot(self._slot)
        log.info("slot_created", slot=self._slot)
        return position

    def drop(self) -> None:
        """Drop the slot."""
        self._reader.drop_slot(self._slot)

    def free(self) -> None:
        """End the connection that reads the slot."""
        self._reader.end_reader_of_slot(self._slot)

    def publish(self, tables: Sequence[Table]) -> None:
        """Bring the publication up to date."""
        self._reader.publish(self._publication, tables)

    def text(self, position: int) -> str:
        """Return an LSN as PostgreSQL writes it."""
        return format_lsn(position)


def _all(
    cursor: psycopg.Cursor[tuple[Any, ...]], to_row: Callable[[Sequence[Any]], tuple[Key, Row]]
) -> list[tuple[Key, Row]]:
    """Return what a query has. Many rows at once take psycopg a third of the time that it needs for one by one."""
    rows: list[tuple[Key, Row]] = []
    while some := cursor.fetchmany(FETCHED_AT_ONCE):
        rows.extend(map(to_row, some))
    return rows


def _limited(
    connection: psycopg.Connection,
    query: sql.Composed,
    parameters: Sequence[object] | None,
    to_row: Callable[[Sequence[Any]], tuple[Key, Row]],
    rows: list[tuple[Key, Row]],
    bytes_most: int,
) -> int:
    """Add to `rows` what a query has until its values have so many bytes; return how many there still may be."""
    left = bytes_most
    with connection.cursor() as cursor:
        for values in cursor.stream(query, parameters, size=ROWS_AT_ONCE):
            rows.append(to_row(values))
            left -= sum(len(value) for value in values if isinstance(value, str | bytes))
            if left <= 0:
                return 0
    return left


def _with_parts(connection: psycopg.Connection, table: Table, chunk: Chunk, snapshot: Snapshot) -> Chunk:
    """Return what was read of a root with its parts and the snapshot's clock; only the first rows, if need be.

    What a sink has of a document is compared with the clock, so `seen_to` is one, too.
    """
    if not table.is_document:
        return chunk
    rows = parts.attach(connection, table, chunk.rows)
    last_key = chunk.last_key if len(rows) == len(chunk.rows) else chunk.rows[len(rows) - 1][0]
    found = [(key, row) for key, row in rows if row is not None]
    return Chunk(snapshot.clock + 1, found, last_key, snapshot.clock)


def _within(table: Table, after: Key | None, to: Key | None, where: str | None) -> sql.Composed:
    """The condition for the rows behind a key, up to another, that meet a condition. Its parameters are the keys'.

    Queries with it always have parameters, so that the server takes them for one statement, whatever `where` says.
    """
    key = key_columns(table)
    values = sql.SQL(", ").join(parameter(table.column(name)) for name in table.key)
    conditions: list[sql.Composable] = []
    if after is not None:
        conditions.append(sql.SQL("({}) > ({})").format(key, values))
    if to is not None:
        conditions.append(sql.SQL("({}) <= ({})").format(key, values))
    if where is not None:  # on lines of its own, because it may end with a comment
        escaped = where.replace("%", "%%")
        conditions.append(sql.SQL(f"(\n{escaped}\n)"))  # pyright: ignore[reportArgumentType] -- it is meant to be SQL
    if not conditions:
        return sql.Composed([])
    return sql.SQL(" WHERE ") + sql.SQL(" AND ").join(conditions)


@contextmanager
def _condition(table: Table, where: str | None) -> Generator[None]:
    """Say of an error that it is the condition's, where there is one."""
    try:
        yield
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.NotSupportedError) as error:
        if where is None:
            raise
        raise UsageError(f"The condition {where!r} fails: {said_of(table, error)}.") from error


def _row(cursor: psycopg.Cursor[Any]) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = cursor.fetchone()
    assert row is not None, "the query always has a row"
    return row
