"""The worker: poll, decode, compact, process, look up, apply to all sinks in parallel, confirm when all acknowledged.

Writes commute (`docs/guarantees.md`), so the next batch is decoded and applied while the last is in flight, and chunks
of a load go between the log's batches in any order; only the confirmation of log batches is in order. One thread
decodes and runs the user's functions; each sink has its own threads; a failure of one change is a dead letter, and
whatever spoils all of them stops the pipeline with the positions where they are.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple, TypeVar

from delta_sync.applying import Applied, SinkWriter
from delta_sync.building import Debounce, DocumentBuilder
from delta_sync.capture import Batch, Capture
from delta_sync.changes import Change, Key
from delta_sync.dead_letters import DeadLetterReporter, not_handled, rejections, undecodable
from delta_sync.decoding import Decoded, Lacking, Stretch, TableCodec, Touched, Watching, decode
from delta_sync.errors import (
    LookupBusy,
    PipelineStopped,
    SchemaChanged,
    SinkBusy,
    SourceBusy,
    StateBusy,
    Transient,
)
from delta_sync.events import HandlerRunner, RowEvent, Unhandled
from delta_sync.feeding import CaptureFeed
from delta_sync.load import Slice
from delta_sync.logs import logger
from delta_sync.lookups import LookupCaller
from delta_sync.mending import Left
from delta_sync.pipeline import Pipeline
from delta_sync.processing import Failure
from delta_sync.progress import LogPosition, Progress
from delta_sync.rereads import AheadOfLog
from delta_sync.secrets import redact
from delta_sync.sinks.base import Target
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.submitting import Submitter, TableRuntime
from delta_sync.tables import Table
from delta_sync.turns import Turns
from delta_sync.used_keys import Uses
from delta_sync.values import Row
from delta_sync.versions import version_of
from delta_sync.watchdog import AtHand

log = logger(__name__)

JOBS_MOST = 4  # log batches in flight: one per stage (decode, two in a sink's threads, confirm)
EVENTS_AT_ONCE = 8192  # waiting batches are joined up to this: larger batches cost sinks less per change
DRAIN_BUDGET_S = 10.0  # after SIGTERM, for what is in flight; container runtimes kill after 10 to 30 s
EVENTS_RETRY_S = 1.0  # for a schema that the registry does not have
WITHHOLDING_JOBS = 256  # batches in flight that wait for nothing but the time of some document
DOCUMENTS_AT_ONCE = 500  # read in one snapshot; their parts are some thousands of rows
READINGS_MOST = 2  # in the sinks while the next documents are read
SCHEMA_RETRY_S = 0.5  # a table that is replaced by another is away for a moment

T = TypeVar("T")
Read = Callable[[str, Sequence[Lacking]], Sequence[tuple[Lacking, Row | None, int]]]


_NOTHING: set[tuple[str, Key]] = set()


class Job(NamedTuple):
    """A batch of the log, or a slice of a load, that is being applied."""

    results: list[Future[list[Applied]]]
    failures: list[Failure]
    batch: Batch | None = None
    decoded: Decoded | None = None
    slice: Slice | None = None
    handled: Sequence[Future[list[Unhandled]]] = ()
    withheld: set[tuple[str, Key]] = _NOTHING  # documents that are built later, each with its root

    def done(self) -> bool:
        """Whether every document is built, and every sink and every handler has answered."""
        answered = all(result.done() for result in self.results) and all(result.done() for result in self.handled)
        return not self.withheld and answered


class Worker:
    """Applies a pipeline's changes until `stopping` is set. `run` returns when it has drained, or raises why it stops.

    `stretches` makes Debezium's events of what the capture delivers. `reread` reads rows by key (`rereads.Rereader`),
    and notes in `ahead` which these were. `refresh` is asked about tables whose columns may have changed and returns
    those of which that is so, with their new codecs and targets; `columns_changed` is called with them once they are
    in use. `remember` keeps, durably, which documents were written without an optional look-up's answer, and `note`
    which keys of look-ups rows are about to use, and which tables were emptied by which version. `gone`
    tells whether a table was not there when `refresh` was asked last. `check_slot` is called before each start of
    the capture, because a connector that finds no slot creates one, and the changes between the two are lost.
    """

    def __init__(
        self,
        *,
        spec: PipelineSpec,
        pipeline: Pipeline,
        epoch: int,
        capture: Capture,
        stretches: Callable[[Batch], Iterable[Stretch]],
        writers: Mapping[str, SinkWriter],
        lookups: Mapping[str, LookupCaller],
        state: StateStore,
        position: LogPosition,
        progress: Progress,
        reread: Read,
        ahead: AheadOfLog,
        refresh: Callable[[Iterable[str]], Mapping[str, TableRuntime]],
        columns_changed: Callable[[Collection[str]], None],
        check_slot: Callable[[], None],
        stopping: threading.Event,
        giving_up: threading.Event,
        gone: Callable[[str], bool] = lambda _: False,
        remember: Callable[[Sequence[Left]], None] = lambda _: None,
        note: Callable[[Sequence[Uses], Mapping[str, int]], None] = lambda _uses, _emptied: None,
        handlers: Sequence[HandlerRunner] = (),
        at_hand: AtHand | None = None,
        builder: DocumentBuilder | None = None,
        codec_of: Callable[[Table], TableCodec] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._spec = spec
        self._pipeline = pipeline
        self._epoch = epoch
        self._capture = capture
        self._stretches = stretches
        self._writers = writers
        self._state = state
        self._position = position
        self._progress = progress
        self._reread = reread
        self._ahead = ahead
        self._refresh = refresh
        self._columns_changed = columns_changed
        self._stopping = stopping
        self._giving_up = giving_up
        self._gone = gone
        self._handlers = handlers
        self._builder = builder
        self._codec_of = codec_of
        self._debounces = {root: Debounce(spec.debounce_s) for root, spec in pipeline.documents.items()}
        self._parts_only = {n for spec in pipeline.documents.values() for n in spec.tables if n not in pipeline.tables}
        self._parts_only |= pipeline.documents.keys()
        self._watched: Mapping[str, Sequence[Watching]] = {}
        self._handled_tables = frozenset(runner.handler.table for runner in handlers)
        self._clock = clock
        self._wall_clock = wall_clock
        self._tables: dict[str, TableRuntime] = {}
        self._submit = Submitter(
            pipeline=pipeline,
            tables=self._tables,
            writers=writers,
            lookups=lookups,
            progress=progress,
            remember=remember,
            note=note,
            answered=self.wake,
            stopping=stopping,
            at_hand=at_hand,
            clock=clock,
        ).submit
        self._news = threading.Condition()
        self._batches: deque[Batch] = deque()
        self._slices: deque[Slice] = deque()
        self._changed_tables: set[str] = set()
        self._jobs: deque[Job] = deque()
        self._load_jobs: list[Job] = []
        self._turns = Turns(clock)
        self._passed_lsn = 0
        self._letters = DeadLetterReporter(spec, pipeline.documents, state, progress, giving_up, clock)
        self._fatal: BaseException | None = None
        self._feed = CaptureFeed(
            capture=capture,
            check_slot=check_slot,
            deliver=self._deliver,
            forget=self._forget,
            failed=self.fail,
            progress=progress,
            stopping=stopping,
            clock=clock,
        )

    # ── what other threads call ──────────────────────────────────────────────────────────────────────────────────

    @property
    def tables(self) -> dict[str, Table]:
        """The tables as the worker sees them now."""
        return {name: runtime.codec.table for name, runtime in self._tables.items()}

    def targets(self, table: str) -> Mapping[str, Target]:
        """Where a table's documents go, by sink."""
        return self._tables[table].targets

    @property
    def changes_come(self) -> bool:
        """Whether the log brings changes, at the moment."""
        return self._turns.changes_come

    def hand_over(self, slice_: Slice) -> None:
        """Take a slice of a load; its `done` tells when every sink has acknowledged it."""
        with self._news:
            self._slices.append(slice_)
            self._news.notify_all()

    def schema_changed(self, tables: Iterable[str]) -> None:
        """Read these tables' columns again before anything else of them is decoded."""
        with self._news:
            self._changed_tables.update(tables)
            self._news.notify_all()

    def fail(self, error: BaseException) -> None:
        """Stop the pipeline with this error."""
        with self._news:
            self._fatal = self._fatal or error
            self._news.notify_all()

    def wake(self) -> None:
        """Look at `stopping` again."""
        with self._news:
            self._news.notify_all()

    def _deliver(self, batch: Batch) -> None:
        with self._news:
            self._batches.append(batch)
            self._news.notify_all()

    def _forget(self) -> None:
        with self._news:
            self._batches.clear()

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────

    def use(self, tables: Mapping[str, TableRuntime]) -> None:
        """Take over the tables' codecs and targets, and create what the targets need."""
        for runtime in tables.values():
            for sink, target in runtime.targets.items():
                self._writers[sink].prepare([target])
        self._tables.update(tables)
        if self._builder is not None:
            assert self._codec_of is not None
            self._watched = self._builder.watched(self._codec_of)

    def _refresh_tables(self, names: Iterable[str]) -> None:
        """Take over what has changed of these tables; only then may they be read anew."""
        changed = self._refresh(names)
        if changed:
            self.use(changed)
            self._columns_changed(list(changed))
            self._capture.reconfigure()

    def run(self) -> None:
        """Work until `stopping` is set, then drain. Raises what the pipeline must stop with."""
        self._feed.start()
        try:
            try:
                while not self._stopping.is_set():
                    self._turn()
            except (LookupBusy, SourceBusy) as error:
                if not self._stopping.is_set():
                    raise
                log.info("batch_left", reason=str(error))  # it was not begun; it is delivered again
            self._drain()
        finally:
            self._stopping.set()
            self._giving_up.set()
            self._feed.finish()
            for slice_ in self._slices:
                slice_.done.cancel()

    def _turn(self) -> None:
        """Finish what is done, begin what is next, or wait for either."""
        with self._news:
            while not self._has_something() and self._news.wait(self._until_next_s()):
                pass
            if self._fatal is not None:
                raise self._fatal
            changed, self._changed_tables = self._changed_tables, set()
        if changed:
            self._refresh_tables(changed)
        self._finish_jobs()
        self._build_ripe(self._clock())
        batches, slice_ = self._take()
        if batches:
            self._begin_batches(batches)
        elif slice_ is not None:
            self._begin_slice(slice_)

    def _has_something(self) -> bool:
        return bool(
            self._fatal
            or self._stopping.is_set()
            or self._changed_tables
            or (self._jobs and self._jobs[0].done())
            or any(job.done() for job in self._load_jobs)
            or (self._batches and self._has_room())
            or (self._slices and self._slice_waits_s() == 0)
        )

    def _has_room(self) -> bool:
        """Whether one more batch may be begun. One that only waits for a document's time keeps nothing busy."""
        return (
            sum(not job.withheld for job in self._jobs) < JOBS_MOST and len(self._jobs) < JOBS_MOST + WITHHOLDING_JOBS
        )

    def _until_next_s(self) -> float | None:
        """Return after which time there is something to do if nothing happens: a document's time, or a slice's turn."""
        now = self._clock()
        times = [time - now for debounce in self._debounces.values() if (time := debounce.next_time) is not None]
        if self._slices and (waits_s := self._slice_waits_s()) is not None:
            times.append(waits_s)
        return max(0.0, min(times)) if times else None

    def _slice_waits_s(self) -> float | None:
        in_sinks = any(not result.done() for job in self._jobs for result in job.results)
        return self._turns.slice_waits_s(
            in_flight=len(self._load_jobs), log_in_hand=in_sinks or (bool(self._batches) and self._has_room())
        )

    def _take(self) -> tuple[list[Batch], Slice | None]:
        """Take the batches that wait, joined up to EVENTS_AT_ONCE, or a slice when it is its turn."""
        with self._news:
            if self._slices and self._slice_waits_s() == 0:
                self._turns.slice_began()
                return [], self._slices.popleft()
            if not self._batches or not self._has_room():
                return [], None
            taken = [self._batches.popleft()]
            events = taken[0].events
            while self._batches and self._batches[0].generation == taken[0].generation:
                events += self._batches[0].events
                if events > EVENTS_AT_ONCE:
                    break
                taken.append(self._batches.popleft())
            return taken, None

    def _begin_batches(self, batches: Sequence[Batch]) -> None:
        codecs = {name: runtime.codec for name, runtime in self._tables.items()}
        began = self._clock()
        stretches = [stretch for batch in batches for stretch in self._events_of(batch)]
        decoded = decode(
            stretches,
            codecs,
            self._spec.heartbeat_prefix,
            self._ahead.by_table(),
            self._handled_tables,
            self._watched,
            self._parts_only,
        )
        self._progress.stages["decode"].add(self._clock() - began)
        if decoded.events:
            self._turns.changed()
            self._progress.batch_changes.add(decoded.events)
        if decoded.misfits:
            self._refresh_tables(decoded.misfits)
        failures = [undecodable(item, codecs) for item in decoded.undecodable]
        if decoded.lacking and any(_read_before(job, batches[-1].generation, decoded) for job in self._jobs):
            # A key that is read twice may get the same version both times, by a claim that has not moved; so the first
            # row is to be in the sinks before the second is read, or it could overwrite a newer one.
            self._wait_for([result for job in self._jobs for result in job.results])
        changes = dict(decoded.changes)
        began = self._clock()
        for table, lacking in decoded.lacking.items():
            changes[table] = [*changes.get(table, []), *self._read_all(table, lacking, failures)]
        if decoded.lacking:
            self._progress.stages["reread"].add(self._clock() - began)
        results = self._submit(changes, decoded.truncates, failures)
        handled = self._hand_to_handlers(decoded.each)
        job = Job(results, failures, batch=batches[-1], decoded=decoded, handled=handled, withheld=set())
        self._jobs.append(job)
        if decoded.touched is not None:
            self._build_touched(job, decoded.touched)
        if not job.results and not handled:
            self.wake()

    # ── documents from several tables ──

    def _build_touched(self, job: Job, touched: Touched) -> None:
        """Build the documents that a batch's changes are about, now or when it is their time."""
        builder = self._builder
        assert builder is not None, "tables are watched"
        shows = builder.shown(touched)
        for root, keys in self._with_columns(list(self._debounces), lambda: builder.keys(touched)).items():
            due, later = self._debounces[root].split(keys, self._clock(), shows)
            job.withheld.update((root, key) for key in later)
            self._build(root, due, [job])

    def _build_ripe(self, now: float | None) -> None:
        """Build the documents whose time has come, for all batches that wait for them; None: all that are withheld."""
        for root, debounce in self._debounces.items():
            keys = debounce.ripe(now)
            if not keys:
                continue
            names = {(root, key) for key in keys}
            waiting = [job for job in self._jobs if not names.isdisjoint(job.withheld)]
            self._build(root, keys, waiting)
            for job in waiting:
                job.withheld.difference_update(names)
            self.wake()

    def _build(self, root: str, keys: Sequence[Key], jobs: Sequence[Job]) -> None:
        """Read documents and hand them to the sinks; what becomes of them is the jobs' matter."""
        builder = self._builder
        assert builder is not None, "there are documents"
        failures: list[Failure] = []
        under_way: deque[list[Future[list[Applied]]]] = deque()
        left = list(keys)
        while left:
            some, left = left[:DOCUMENTS_AT_ONCE], left[DOCUMENTS_AT_ONCE:]
            began = self._clock()
            changes, unread, snapshot = self._with_columns([root], lambda some=some: builder.read(root, some))  # type: ignore[misc]  # a default binds it now
            self._debounces[root].built([change.key for change in changes], snapshot)
            left = unread + left
            self._progress.stages["reread"].add(self._clock() - began)
            self._progress.reread_rows += len(changes)
            results = self._submit({root: changes}, {}, failures)
            for job in jobs:
                job.results.extend(results)
            under_way.append(results)
            if len(under_way) > READINGS_MOST:
                self._wait_for(under_way.popleft())
        if jobs:
            jobs[0].failures.extend(failures)

    def _with_columns(self, roots: Sequence[str], call: Callable[[], T]) -> T:
        """Repeat a call until the tables of these documents are as it sees them, and the state store answers."""
        while True:
            try:
                return call()
            except SchemaChanged as error:
                names = [name for root in roots for name in self._pipeline.documents[root].tables]
                self._refresh_tables(names)
                gone = next((name for name in names if self._gone(name)), None)
                if gone is not None:
                    raise PipelineStopped(
                        f"Table {gone} is gone, and documents are made of its rows; create it again, or change them."
                    ) from error
                reason: Exception = error
            except StateBusy as error:
                reason = error
            log.warning("documents_wait", reason=redact(str(reason)))
            if self._stopping.wait(SCHEMA_RETRY_S):
                raise SourceBusy("Delta stops before documents could be built.") from reason

    def _hand_to_handlers(self, events: Sequence[RowEvent]) -> list[Future[list[Unhandled]]]:
        """Let each handler have its table's events, in the order of the log."""
        handled: list[Future[list[Unhandled]]] = []
        for runner in self._handlers if events else ():
            own = [event for event in events if event.table == runner.handler.table]
            handled += runner.submit(own)
        for result in handled:
            result.add_done_callback(lambda _: self.wake())
        return handled

    def _events_of(self, batch: Batch) -> Iterable[Stretch]:
        """Return a batch's events, for as long as it takes. Raises SourceBusy when Delta stops before."""
        attempts = 0
        while True:
            try:
                found = self._stretches(batch)
            except Transient as error:
                self._progress.waits("events", str(error))
                attempts += 1
                if attempts == 1:  # said once; the status says it all the time
                    log.warning("events_wait", reason=redact(str(error)))
                if self._stopping.wait(EVENTS_RETRY_S):
                    raise SourceBusy("Delta stops before a batch could be read.") from error
            else:
                self._progress.waits("events", None)
                if attempts:
                    log.info("events_go_on", attempts=attempts)
                return found

    def _begin_slice(self, slice_: Slice) -> None:
        failures: list[Failure] = []
        changes = {slice_.table: slice_.changes}
        results = self._submit(changes, {}, failures, of_dump=True, only=slice_.sinks)
        self._load_jobs.append(Job(results, failures, slice=slice_))
        if not results:
            self.wake()

    def _read_all(self, table: str, lacking: Sequence[Lacking], failures: list[Failure]) -> list[Change]:
        """Return the changes whose events lack a value, with the rows read by key.

        Large rows are not all held at once: what could be read is brought into the sinks before the next is read, and
        only the last are returned.
        """
        while True:
            found = self._read_again(table, lacking)
            if len(found) == len(lacking) or not found:
                return found
            read = {change.key for change in found}
            lacking = [item for item in lacking if item.key not in read]
            results = self._submit({table: found}, {}, failures)
            self._wait_for(results)
            failures += rejections(results)

    def _wait_for(self, results: Sequence[Future[list[Applied]]]) -> None:
        """Wait until the sinks have answered. Raises SourceBusy when Delta stops before."""
        while wait(results, timeout=0.5).not_done:
            if self._stopping.is_set():
                raise SourceBusy("Delta stops before all rows of a batch could be read.")

    def _read_again(self, table: str, lacking: Sequence[Lacking]) -> list[Change]:
        """Return changes with the rows read by key; of large rows some, at least one; none if the table is gone.

        Its documents then stay as they are, as those of a dropped table do whose events lack nothing.
        """
        while True:
            try:
                found = self._reread(table, lacking)
            except SchemaChanged as error:
                self._refresh_tables([table])
                if self._gone(table):
                    log.warning("changes_left", table=table, changes=len(lacking), reason=str(error))
                    return []
                log.warning("reread_waits", table=table, reason=str(error))
                if self._stopping.wait(SCHEMA_RETRY_S):
                    raise
            else:
                self._progress.reread_rows += len(found)
                return [Change(table, item.key, version, row) for item, row, version in found]

    # ── finishing ────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish_jobs(self) -> None:
        while self._jobs and self._jobs[0].done():
            job = self._jobs[0]
            self._settle(job)
            self._jobs.popleft()
            assert job.batch is not None
            assert job.decoded is not None
            self._capture.confirm(job.batch)
            self._progress.events += job.decoded.events
            if job.decoded.events and job.decoded.oldest_ts_ms is not None:
                # Not below 0: the source's clock may be ahead of ours.
                took_s = max(0.0, self._wall_clock() - job.decoded.oldest_ts_ms / 1000)
                self._progress.latency.add(took_s, job.decoded.events)
            if job.decoded.heartbeat_lsn is not None:
                self._position.advance(job.decoded.heartbeat_lsn)
        passed = self._position.passed_lsn
        if passed > self._passed_lsn:
            self._passed_lsn = passed
            self._ahead.passed(version_of(self._epoch, passed))
        for job in [job for job in self._load_jobs if job.done()]:
            self._load_jobs.remove(job)
            assert job.slice is not None
            try:
                self._settle(job)
            except BaseException as error:
                job.slice.done.set_exception(error)
                raise
            job.slice.done.set_result(None)

    def _settle(self, job: Job) -> None:
        """Collect what became of a job, and keep its failures as dead letters. Raises what a sink raised."""
        failures = [*job.failures, *rejections(job.results), *not_handled(job.handled)]
        if failures:
            self._letters.report(failures, "load" if job.slice is not None else "log")

    def _drain(self) -> None:
        """Wait for what is in flight, at most DRAIN_BUDGET_S; what is not done by then is delivered again."""
        deadline = self._clock() + DRAIN_BUDGET_S
        timer = threading.Timer(DRAIN_BUDGET_S, self._giving_up.set)
        timer.daemon = True
        timer.start()
        try:
            self._build_ripe(None)
            while (self._jobs or self._load_jobs) and self._clock() < deadline:
                with self._news:
                    self._news.wait_for(
                        lambda: all(job.done() for job in [*self._jobs, *self._load_jobs]) or self._fatal is not None,
                        timeout=max(0.0, deadline - self._clock()),
                    )
                self._finish_jobs()
        except (SinkBusy, LookupBusy, SourceBusy, StateBusy) as error:
            log.warning("not_drained", reason=str(error))
        finally:
            timer.cancel()


def _read_before(job: Job, generation: int, decoded: Decoded) -> bool:
    """Tell whether a batch in flight may write a row with the version that this one's gets, which is read by its key.

    One of an earlier generation has the same changes; one of this has, at most, read some of the same keys.
    """
    if job.batch is None or job.decoded is None:
        return False
    return job.batch.generation != generation or decoded.reads_rows_of(job.decoded)
