"""Dumps are carried out: rows that are already in the source are read in chunks with claims, while changes stream.

Chunks are read by several threads, of several processes where there are several. A chunk's rows are written with a
version just below everything that its claim leaves to the log, so they may arrive in any order with the log's changes
and with each other. They are handed over only after the log has come past the moment at which the chunk was read: then
no reader sees a row go back to an older state, either. What every sink has acknowledged is recorded chunk by chunk, so
a dump goes on where it was. The load of a table is a dump that is begun here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import Future, wait
from typing import NamedTuple, TypeVar, cast

from delta_sync.changes import Change, Key
from delta_sync.dumping import END_BUDGET_S, LEASE_S, LOOK_S, RETRY_S, Dumper, DumperContext, running
from delta_sync.dumps import ChunkCounts, ChunkLease, Dump, is_over, removes_unmet, rows_most, to_plan
from delta_sync.errors import LeaseLost, StateBusy, Transient, UsageError
from delta_sync.logs import logger
from delta_sync.samples import SharedSamples
from delta_sync.sources.reader import Chunk, Snapshot, SourceReader
from delta_sync.spec import LoadSpec
from delta_sync.state import TableLoad
from delta_sync.tables import Table
from delta_sync.values import Row
from delta_sync.versions import dump_version, version_of

log = logger(__name__)

SLICE_ROWS = 2000  # handed to the worker at once while the log rests: larger ones cost no less for a row
SLICE_ROWS_BESIDE_LOG = 150  # while changes come: a change waits for one of them in each stage that it goes through
SLICES_MOST = 3  # handed over and not yet acknowledged: one that is written, one that is processed, one that waits
CLAIM_POLL_S = 0.05  # a transaction usually ends within milliseconds
WAIT_NOTICE_S = 2.0  # then one wants to know for whom a dump waits
# Read and not yet written, in units of a chunk's limits. They wait for the log to pass, so a dump brings no more than
# these in each round trip through it: the slower the log, the slower the dump.
HELD_ROWS, HELD_BYTES = 8, 4
LOOK_CHUNKS = 4  # between looks whether more are to be planned: each costs as much as reading a thousand rows
RENEW_S = LEASE_S / 3
MEASURED = 32  # rows of a chunk whose size is looked at
VALUE_BYTES = 32  # of a value beside its text: a Python object
READ_LOOK_S = 0.1  # between looks for a chunk while a dump is under way: its rate may be limited, or others read it

T = TypeVar("T")


class Slice(NamedTuple):
    """Some rows of a chunk as changes, and where the worker reports that every sink has acknowledged them.

    `sinks` are those that get them; None: all of the table's.
    """

    table: str
    changes: Sequence[Change]
    done: Future[None]
    sinks: frozenset[str] | None = None


class Rows(NamedTuple):
    """A chunk that has been read: its rows (None: there is none with this key), and how many bytes these are, about."""

    lease: ChunkLease
    rows: Sequence[tuple[Key, Row | None]]
    version: int
    size: int


class Loader(Dumper):
    """Carries out a pipeline's dumps by reading the source. `hand_over` feeds the worker; the rest is Dumper's.

    Each of `readers` is for one thread that reads chunks; `reader` is for planning and for heartbeats. `fills` tells
    whether this process writes to the sinks that a dump is for: one into a new generation begins in the run that has
    it. `changes_come` tells whether the log brings changes, to which a dump gives way.
    """

    def __init__(
        self,
        context: DumperContext,
        *,
        reader: SourceReader,
        readers: Sequence[SourceReader],
        samples: SharedSamples,
        options: LoadSpec,
        heartbeat_prefix: str,
        hand_over: Callable[[Slice], None],
        fills: Callable[[Dump], bool] = lambda _: True,
        changes_come: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(context)
        self._reader = reader
        self._readers = readers
        self._samples = samples
        self._options = options
        self._heartbeat_prefix = heartbeat_prefix
        self._hand_over = hand_over
        self._fills = fills
        self._changes_come = changes_come
        self._asking = threading.Lock()  # of `reader`, which is used by two threads
        self._plans = 0  # rises whenever there may be something to read
        self._read: deque[Rows] = deque()
        self._behind: deque[tuple[int, list[Rows]]] = deque()  # a heartbeat's position, and what was read before it
        self._passed: deque[Rows] = deque()
        self._written: deque[tuple[Rows, bool]] = deque()  # whether the table was there then
        self._held_bytes = self._held_rows = 0

    # ── the threads ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Carry out dumps until Delta stops. What it cannot mend goes to `failed`."""
        if self._keeper is None:
            self._guarded("load", lambda: self._dumps.release(None), once=True)  # those of a process that was killed
        threads = [
            threading.Thread(target=self._guarded, args=("load", lambda r=reader: self._read_next(r)), daemon=True)
            for reader in self._readers
        ]
        threads += [
            threading.Thread(target=self._guarded, args=(name, step), name=name, daemon=True)
            for name, step in (
                ("load ask", lambda: self._work_off(self._read, self.ask_for_read)),
                ("load log", lambda: self._work_off(self._behind, self.pass_log_for_read)),
                ("load write", lambda: self._work_off(self._passed, self.write_chunks)),
                ("load record", lambda: self._work_off(self._written, self.record_written)),
                ("load", self._renew),
            )
        ]
        for thread in threads:
            thread.start()
        self._guarded("load", self._plan_next)
        self.wake()
        for thread in threads:
            thread.join(END_BUDGET_S)
        try:
            self._dumps.release(self._owner)
        except StateBusy as error:
            log.info("chunks_not_released", reason=str(error))  # their leases expire by themselves

    def _guarded(self, who: str, step: Callable[[], object], *, once: bool = False) -> None:
        """Repeat a step until Delta stops, also after source and state store did not answer."""
        try:
            while not self._stopping.is_set():
                try:
                    step()
                    if once:
                        return
                except LeaseLost as error:
                    log.info("load_left", reason=str(error))  # another goes on where the last chunk was recorded
                except Transient as error:
                    log.warning("load_waits", reason=str(error))
                    self._progress.waits(who, str(error))
                    self._pause(RETRY_S)
                    self._progress.waits(who, None)
        except Stopping:
            pass
        except BaseException as error:  # noqa: BLE001 -- handed to the worker, which stops with it
            self._failed(error)

    def _work_off(self, queue: Sized, step: Callable[[], None]) -> None:
        """Do a step with what is in a queue, as soon as there is something in it; nothing when Delta stops."""
        with self._news:
            self._news.wait_for(lambda: len(queue) > 0 or self._stopping.is_set())
        if not self._stopping.is_set():
            step()

    # ── planning ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _plan_next(self) -> None:
        looks = self._looks
        self.look()
        self._rest(looks, LOOK_S)

    def look(self) -> None:
        """Begin, plan and finish dumps, as far as there is something to be done now."""
        if not self._plans_here():
            return
        lease = self._lease()
        tables = self._tables()
        loads = self._loads_to_begin(list(tables))
        dumps = self._dumps.all(unfinished=True)
        pending = [dump for dump in dumps if dump.state == "pending" and dump.table in tables and self._fills(dump)]
        if loads or pending:
            begun = {load.table for load in loads if load.covered_from is None}
            for load in loads:
                if load.table in begun:
                    self._dumps.supersede(load.table, f"the table is loaded: {load.reason}", lease)
            # From here on the connector surely delivers these tables' changes, and whatever was read for a dump that is
            # superseded lies below the new coverage.
            self._pass_log()
            with self._asking:
                covered_from = self._reader.log_end()
            for load in loads:
                self._begin_load(load, covered_from if load.table in begun else None)
            for dump in pending:
                if dump.table not in begun:
                    self._begin(dump, covered_from)
            dumps = self._dumps.all(unfinished=True)
        self._show_dumps(dumps)
        counts = self._dumps.counts() if dumps else {}
        for dump in dumps:
            self._go_on(dump, counts.get(dump.id, ChunkCounts()))

    def _loads_to_begin(self, names: Sequence[str]) -> list[TableLoad]:
        """Return the loads without a dump: those that are pending, and those that an older Delta began."""
        loads, with_dump = self._loads(names)
        return [
            load
            for load in loads
            if load.epoch == self._epoch
            and (load.covered_from is None or (load.state == "running" and load.table not in with_dump))
        ]

    def _begin_load(self, load: TableLoad, covered_from: int | None) -> None:
        table = self._tables().get(load.table)
        if table is None:
            return  # it is gone, and will be loaded from the start when it is back
        under_way = covered_from is None
        if not under_way:
            load = running(load, covered_from)
        dump = Dump(table=load.table, kind="load", reason=load.reason)
        begun = self._dumps.begin_load(
            load, self._as_begun(dump, table, load.covered_from, load.fingerprint), self._lease(), under_way=under_way
        )
        if begun:
            self._show(load, None)
            log.info("load_started", table=load.table, reason=load.reason)

    def _begin(self, dump: Dump, covered_from: int) -> None:
        table = self._tables().get(dump.table)
        if table is not None and self._dumps.begin(
            self._as_begun(dump, table, covered_from, self._fingerprint(dump.table)), self._lease()
        ):
            log.info("dump_started", dump=dump.id, table=dump.table, kind=dump.kind)

    def _as_begun(self, dump: Dump, table: Table, covered_from: int | None, fingerprint: str) -> Dump:
        with self._asking:
            whole = dump.kind in ("load", "table", "refresh")
            estimate = self._reader.estimated_rows(table) if whole else dump.estimate
            clock = self._reader.clock() if table.is_document else None
        assert covered_from is not None, "it begins"
        floor = dump_version(self._epoch, covered_from) if clock is None else version_of(self._epoch, clock)
        return dataclasses.replace(
            dump, epoch=self._epoch, fingerprint=fingerprint, covered_from=covered_from, floor=floor, estimate=estimate
        )

    def _go_on(self, dump: Dump, counts: ChunkCounts) -> None:
        """Plan a dump's next chunks, or finish it."""
        table = self._tables().get(dump.table)
        if dump.state != "running" or table is None or not self._fits(dump):
            return
        more = to_plan(dump, counts)
        if more:
            after, chunks = dump.planned_to, list[tuple[Key | None, Key | None]]()
            while len(chunks) < more and (not chunks or chunks[-1][1] is not None):
                with self._asking:
                    end = self._reader.key_behind(table, after, rows_most(dump, self._options.chunk_rows))
                chunks.append((after, end))
                after = end
            self._dumps.plan(dump.id, chunks, self._lease())
            with self._news:
                self._plans += 1
                self._looks += 1
                self._news.notify_all()
        elif is_over(dump, counts):
            if removes_unmet(dump):
                self._finished(dump)
            self._end(dump)
            self.wake()

    def _fits(self, dump: Dump) -> bool:
        """Whether the dump was begun for the table as this process sees it: in its epoch, with its columns."""
        return (
            dump.epoch == self._epoch
            and dump.table in self._tables()
            and dump.fingerprint == self._fingerprint(dump.table)
            and self._fills(dump)
        )

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_next(self, reader: SourceReader) -> None:
        plans = self._plans
        with self._news:
            self._news.wait_for(lambda: self.has_room or self._stopping.is_set())
        if self._stopping.is_set() or self.read_chunk(reader):
            return
        with self._news:
            self._news.wait_for(lambda: self._plans != plans or self._stopping.is_set(), self._until_next_s())

    @property
    def has_room(self) -> bool:
        """Whether there is room for more rows: those that were read have to wait for log and sinks."""
        options = self._options
        return self._held_bytes < HELD_BYTES * options.chunk_bytes and self._held_rows < HELD_ROWS * options.chunk_rows

    def _until_next_s(self) -> float:
        return LOOK_S if not self._under_way else READ_LOOK_S

    def read_chunk(self, reader: SourceReader) -> bool:
        """Lease a chunk, read it, and queue its rows; return whether there was one."""
        if not self._under_way:
            return False
        lease = self._dumps.lease(self._owner, LEASE_S, self._options.chunk_rows, self._fits, self._last)
        if lease is None:
            return False
        self._last = lease.dump.id
        try:
            rows = self._rows_of(reader, lease)
        except UsageError as error:
            if lease.dump.kind == "load":  # without it the sinks lack rows: it would only be begun again, for ever
                with contextlib.suppress(StateBusy):
                    self._dumps.release_chunk(lease)
                raise
            log.warning("dump_failed", dump=lease.dump.id, reason=str(error))
            self._dumps.end(lease.dump.id, "failed", str(error))
            return True
        except BaseException:
            with contextlib.suppress(StateBusy):
                self._dumps.release_chunk(lease)
            raise
        if rows is not None:
            with self._news:
                self._held_bytes += rows.size
                self._held_rows += len(rows.rows)
                self._read.append(rows)
                self._news.notify_all()
        return True

    def _rows_of(self, reader: SourceReader, lease: ChunkLease) -> Rows | None:
        """Read one chunk in a snapshot that can claim something; None when it is no longer to be read."""
        dump = lease.dump
        table = self._tables().get(dump.table)
        if table is None:
            self._dumps.release_chunk(lease)
            return None
        assert dump.covered_from is not None, "it has begun"
        covered_from = dump.covered_from
        most = rows_most(dump, self._options.chunk_rows)
        claim: int | None = None

        def usable(snapshot: Snapshot) -> bool:
            """Make the claim, once: the samples that allow it may be forgotten or thinned out while rows are read."""
            nonlocal claim
            claim = self._samples.claim(snapshot, covered_from)
            return claim is not None

        waited_s = 0.0
        told = False
        while True:
            if lease.keys is not None:
                chunk = reader.read_keys(table, lease.keys, usable)
            else:
                chunk = reader.read_chunk(
                    table, lease.after, most, self._options.chunk_bytes, usable, to=lease.to, where=dump.where
                )
            if chunk is not None:
                break
            if dump.timeout_s is not None and waited_s >= dump.timeout_s:
                raise UsageError(
                    f"It could not begin to read within {dump.timeout_s:g} s: {self._whom(reader, table)}."
                )
            if waited_s <= WAIT_NOTICE_S < waited_s + CLAIM_POLL_S:
                told = True
                self._tell_whom_it_waits_for(reader, lease, table)
            if told and self._dumps.standing(lease) == "paused":
                self._dumps.release_chunk(lease)
                return None
            waited_s += CLAIM_POLL_S
            self._pause(CLAIM_POLL_S)
        if told:
            self._progress.waits("load", None)
            self._dumps.note(dump.id, None)
        assert claim is not None, "a chunk comes only of a snapshot that was usable"
        rows: list[tuple[Key, Row | None]] = list(chunk.rows)
        if lease.keys is not None:
            lease = self._complete(lease, chunk, rows)
        elif chunk.last_key is not None and chunk.last_key != lease.to:
            lease = self._dumps.split(lease, chunk.last_key)
            with self._news:
                self._plans += 1
                self._news.notify_all()
        return Rows(lease, rows, chunk.version(self._epoch, claim), estimated_bytes(rows))

    def _complete(self, lease: ChunkLease, chunk: Chunk, rows: list[tuple[Key, Row | None]]) -> ChunkLease:
        """Add what keys without a row mean: their documents are to go. Keys that were left out are read later."""
        assert lease.keys is not None
        found = {key for key, _ in rows}
        others = [key for key in lease.keys if key not in found]
        if chunk.last_key is None or not others:  # it may tell of more, and there is none
            rows += [(key, None) for key in others]
            return lease
        return self._dumps.split(lease, keys=([key for key in lease.keys if key in found], others))

    def _whom(self, reader: SourceReader, table: Table) -> str:
        blockers = reader.blockers()
        log.warning("load_waits_for_transaction", table=table.id, blockers=[str(blocker) for blocker in blockers[:5]])
        whom = str(blockers[0]) if blockers else "a transaction that is not visible to this role"
        return f"{table.id} cannot be read before the end of {whom}"

    def _tell_whom_it_waits_for(self, reader: SourceReader, lease: ChunkLease, table: Table) -> None:
        whom = self._whom(reader, table)
        self._progress.waits("load", whom)
        self._dumps.note(lease.dump.id, whom)

    # ── behind the log, to the worker ────────────────────────────────────────────────────────────────────────────

    def ask_for_read(self) -> None:
        """Write a heartbeat behind all that was read; what is read meanwhile need not wait until it is back."""
        with self._news:
            read = list(self._read)
        lsn = self._ask()
        with self._news:
            self._behind.append((lsn, [self._read.popleft() for _ in read]))
            self._news.notify_all()

    def pass_log_for_read(self) -> None:
        """Wait until the log has come past the oldest heartbeat, and so past all that was read before it."""
        lsn, read = self._behind[0]
        self._wait_for(lsn)
        with self._news:
            self._behind.popleft()
            self._passed += read
            self._news.notify_all()

    def _pass_log(self) -> None:
        """Wait until every change that is visible now has come through the log and is in the sinks."""
        self._wait_for(self._ask())

    def _ask(self) -> int:
        """Write a heartbeat, and return its position."""
        with self._asking:
            lsn = self._reader.heartbeat(self._heartbeat_prefix)
        self._position.sent(lsn)
        return lsn

    def _wait_for(self, lsn: int) -> None:
        while not self._position.wait(lsn, timeout_s=0.5):
            if self._stopping.is_set():
                raise Stopping

    def write_chunks(self) -> None:
        """Hand over what the log has come past, and see that every sink acknowledges it, until nothing is left."""
        under_way: deque[tuple[Slice, Rows, bool]] = deque()
        cut = self._cut()
        while True:
            while len(under_way) < SLICES_MOST:
                one = next(cut, None)
                if one is None:
                    cut = self._cut()  # more may have come meanwhile
                    break
                self._hand_over(one[0])
                under_way.append(one)
            if not under_way:
                return
            slice_, rows, is_last = under_way.popleft()
            while not _ended(slice_.done, timeout_s=0.5):
                self._pause(0)
            slice_.done.result()
            if is_last:
                self._has_written(rows)

    def _has_written(self, rows: Rows) -> None:
        there = rows.lease.dump.table in self._tables()
        with self._news:
            self._written.append((rows, there))
            self._news.notify_all()

    def _cut(self) -> Iterator[tuple[Slice, Rows, bool]]:
        """Yield slices of the chunks that the log has come past, and whether each is its chunk's last."""
        # What a NamedTuple's own does, without its call of a Python function.
        new = cast("Callable[..., Change]", tuple.__new__)  # pyright: ignore[reportUnknownMemberType] -- it is generic
        while self._passed:
            with self._news:
                rows = self._passed.popleft()
            dump = rows.lease.dump
            if not self._keep_trying(lambda rows=rows: self._may_write(rows.lease)):  # type: ignore[misc]  # a default binds it now
                self._let_go(rows)
                continue
            if not rows.rows:
                self._has_written(rows)
                continue
            sinks = None if dump.sinks is None else frozenset(dump.sinks)
            start = 0
            while start < len(rows.rows):
                end = start + (SLICE_ROWS_BESIDE_LOG if self._changes_come() else SLICE_ROWS)
                changes = [new(Change, (dump.table, key, rows.version, row)) for key, row in rows.rows[start:end]]
                yield Slice(dump.table, changes, Future(), sinks), rows, end >= len(rows.rows)
                start = end

    def _may_write(self, lease: ChunkLease) -> bool:
        """Whether a chunk's rows are still wanted, as they were read.

        Of a dump that was superseded nothing may come: its rows have older columns, and perhaps the same version.
        """
        if not self._fits(lease.dump):
            self._dumps.release_chunk(lease)
            return False
        try:
            self._dumps.standing(lease)
        except LeaseLost as error:
            log.info("chunk_left", reason=str(error))
            return False
        return True

    def record_written(self) -> None:
        """Record the chunks that every sink has acknowledged, until nothing is left. Rows need not wait for that."""
        while self._written:
            self._record(*self._written.popleft())

    def _record(self, rows: Rows, there: bool) -> None:
        """Record that every sink has a chunk, unless its table was gone: then nobody knows what was written where."""
        lease = rows.lease
        try:
            if there:
                self._keep_trying(self._unchanged)
                self._keep_trying(lambda: self._dumps.finish_chunk(lease, len(rows.rows)))
                self.recorded += 1
            else:
                self._keep_trying(lambda: self._dumps.release_chunk(lease))
        except LeaseLost as error:
            log.info("chunk_left", reason=str(error))  # it is read once more, or need not be
        self._let_go(rows)

    def _let_go(self, rows: Rows) -> None:
        with self._news:
            self._held_bytes -= rows.size
            self._held_rows -= len(rows.rows)
            # More chunks are planned than these few, and the last of all leaves nothing behind.
            if not self._held_rows or self.recorded % LOOK_CHUNKS == 0:
                self._looks += 1
            self._news.notify_all()

    def _keep_trying(self, call: Callable[[], T]) -> T:
        """Repeat a call to the state store until it answers: what is under way must not be forgotten for that."""
        while True:
            try:
                return call()
            except StateBusy as error:
                self._progress.waits("load", str(error))
                self._pause(RETRY_S)
                self._progress.waits("load", None)

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _renew(self) -> None:
        with self._news:
            self._news.wait_for(self._stopping.is_set, RENEW_S)
        if self._under_way and not self._stopping.is_set():
            self._dumps.renew(self._owner, LEASE_S)

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise Stopping


class Stopping(Exception):
    """Delta stops: how the threads leave whatever they are in."""


def estimated_bytes(rows: Sequence[tuple[Key, Row | None]]) -> int:
    """Return about how many bytes rows take, by some of them: a look at every value would take as long as reading."""
    some = rows[:: max(1, len(rows) // MEASURED)]
    size = sum(
        VALUE_BYTES + (len(value) if isinstance(value, str | bytes) else 0)
        for _, row in some
        for value in (row or {}).values()
    )
    return size * len(rows) // max(1, len(some))


def _ended(future: Future[None], timeout_s: float) -> bool:
    """Wait for a future's end; return whether it came in time."""
    return bool(wait([future], timeout_s).done)
