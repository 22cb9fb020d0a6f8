"""Running a pipeline in this process: everything is put together here, started, watched and stopped."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from delta_sync.applying import SinkWriter
from delta_sync.building import DocumentBuilder
from delta_sync.dumping import DumperContext
from delta_sync.errors import (
    EpochRose,
    Outgrown,
    PipelineStopped,
    SinkRefused,
    StateBusy,
    Transient,
)
from delta_sync.events import HandlerRunner
from delta_sync.generation_keeper import GenerationKeeper
from delta_sync.generations import Generations, GenerationStore, meant, open_generations
from delta_sync.housekeeping import Housekeeper
from delta_sync.known_columns import KnownColumns
from delta_sync.leases import LeaseKeeper
from delta_sync.load import Loader
from delta_sync.logs import logger
from delta_sync.lookups import LookupCaller
from delta_sync.mending import Mender
from delta_sync.notices import NoticeIntake
from delta_sync.observe import NoticeDoor
from delta_sync.pipeline import Pipeline, load_processor
from delta_sync.progress import LogPosition, News, Progress
from delta_sync.refresher import Refresher
from delta_sync.refreshing import NoticeReader, NoticeStore
from delta_sync.rereads import Rereader
from delta_sync.samples import SharedSamples
from delta_sync.secrets import redact, resolve
from delta_sync.sinks import AnySink, open_sinks
from delta_sync.sources import open_reader
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.starting import Source, load_fingerprint, targets_of_table
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.submitting import TableRuntime
from delta_sync.tables import Table
from delta_sync.transport import Transport
from delta_sync.used_keys import UsedKeyStore, kept_of
from delta_sync.verified import VerifiedStore
from delta_sync.watch import ANSWER_S, Watch
from delta_sync.watchdog import AtHand, Watchdog
from delta_sync.worker import DRAIN_BUDGET_S, Worker

if TYPE_CHECKING:
    from delta_sync.signalled import SignalledLoader

log = logger(__name__)

COLLECT_EVERY = 200_000  # allocations: events are trees that reference counts free; at the default, 700, the search for
# cycles among them took a third of the worker's CPU time
T = TypeVar("T")

REPORT_S = 1.0  # how often the status is saved
VERIFIED_LOOK_S = 10.0  # between looks at what was verified: metrics are read no more often
STOP_BUDGET_S = 15.0  # for the threads that only read


def settle_memory() -> None:
    """Make the collector of cycles look seldom, and never at what was imported. For the process that runs a worker."""
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])


class _Readers(NamedTuple):
    """Connections to the source, each for one use."""

    watch: SourceReader
    check: SourceReader
    load: SourceReader
    keys: SourceReader
    refresh: SourceReader  # a large table may be read for its keys
    chunks: Sequence[SourceReader]


class _Opened(NamedTuple):
    """What a run has opened. `plain` are the sinks as the specification names them, `sinks` their generations."""

    pipeline: Pipeline
    state: StateStore
    readers: _Readers
    lookups: Mapping[str, LookupCaller]
    handlers: Sequence[HandlerRunner]
    sinks: Mapping[str, AnySink]
    plain: Mapping[str, AnySink]
    writers: Mapping[str, SinkWriter]


class Running:
    """One run of a pipeline: `run` blocks until `stop` is called, or raises why the pipeline had to stop."""

    def __init__(self, *, folder: Path, spec: PipelineSpec, transport: Transport) -> None:
        self._folder = folder
        self._spec = spec
        self._transport = transport
        self._stopping = threading.Event()
        self._giving_up = threading.Event()
        self._worker: Worker | None = None
        self._readers: list[SourceReader] = []
        self.position = LogPosition(time.monotonic)
        self.progress = Progress(self.position, time.monotonic)
        self._outgrown: str | None = None
        self.notices = NoticeIntake()
        self.progress.notices = self.notices.counts
        self._news = News(self.progress)

    def notice_door(self) -> NoticeDoor | None:
        """Return what `POST /notices` leads to; None where the specification has no token. Raises UsageError."""
        token = self._spec.notices.token
        return None if token is None else NoticeDoor(resolve(token), self.notices)

    def stop(self) -> None:
        """End the run: drain what is in flight, confirm it, and return from `run`."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.wake()
        timer = threading.Timer(DRAIN_BUDGET_S, self._abort_reads)
        timer.daemon = True
        timer.start()

    def _abort_reads(self) -> None:
        """Wait for the source no longer: it may never answer."""
        for reader in self._readers:
            reader.abort()

    def run(self) -> None:
        """Run the pipeline. Raises PipelineStopped, UsageError or CheckFailed with what to do.

        Raises EpochRose when a new epoch has begun, or has to, and Outgrown when it has more memory than it may: then
        another run is to follow at once, after Outgrown in a new process.
        """
        spec = self._spec
        pipeline = load_processor(self._folder, spec)
        settle_memory()
        opened = self._until_reached(lambda: StateStore.open(spec.state, self._folder))
        if opened is None:
            return
        with opened as state:
            reporter = threading.Thread(target=self._report, args=(state,), name="report", daemon=True)
            ended = threading.Event()
            self._ended = ended
            self._save_status(state)  # or the last run's is shown until the first second is over
            reporter.start()
            try:
                self._run(pipeline, state)
                if self._outgrown is not None:
                    raise Outgrown(self._outgrown)
                self.progress.end("stopped", "it was asked to stop")
            except (EpochRose, Outgrown) as error:
                log.warning("run_begins_anew", reason=str(error))
                self.progress.end("stopped", str(error))
                raise
            except BaseException as error:
                self.progress.end("failed", redact(str(error)) or type(error).__name__)
                raise
            finally:
                ended.set()
                reporter.join(STOP_BUDGET_S)
                self._save_status(state)

    def _run(self, pipeline: Pipeline, state: StateStore) -> None:
        generations = GenerationStore(state, self._spec.name)
        rows = self._until_reached(generations.all)
        if rows is None:
            return
        with contextlib.ExitStack() as exits:
            readers = self._open_readers(pipeline, exits)
            lookups = self._open_lookups(pipeline, exits)
            handlers = self._open_handlers(pipeline, exits)
            sinks = open_generations(self._spec, rows)
            # By these a load knows what it was made for, which is not to change when a sink gets another generation.
            plain = {**open_sinks(self._spec), **{name: sink for name, sink in sinks.items() if sink.number is None}}
            writers = {name: SinkWriter(sink, self._giving_up) for name, sink in sinks.items()}
            self.progress.sinks = {name: writer.numbers for name, writer in writers.items()}
            for name, sink in plain.items():
                if name not in writers:
                    exits.callback(sink.close)
            for writer in writers.values():
                exits.callback(writer.close)
            exits.callback(self._giving_up.set)  # first, for the others wait for what is under way
            exits.callback(self._stopping.set)
            source = self._until_reached(lambda: self._transport.prepare(pipeline, readers.keys, state, plain))
            if source is not None:
                opened = _Opened(pipeline, state, readers, lookups, handlers, sinks, plain, writers)
                self._stream(opened, source, generations, rows)

    def _stream(
        self, opened: _Opened, source: Source, generations: GenerationStore, rows: Mapping[str, Generations]
    ) -> None:
        """Make the parts of a run known to each other, start them, and work until it is told to stop."""
        spec, transport, stopping, progress = self._spec, self._transport, self._stopping, self.progress
        pipeline, state, readers, lookups, handlers, sinks, plain, writers = opened
        dumps, used_keys = DumpStore(state, spec.name), UsedKeyStore(state, spec.name)
        keeper = transport.load_lease(state)
        samples = SharedSamples(readers.watch.new_samples)
        keeping = GenerationKeeper(
            spec=spec,
            pipeline=pipeline,
            store=generations,
            rows=rows,
            sinks=sinks,
            dumps=dumps,
            tables=source.tables.values(),
            nobody_writes=lambda sink: transport.nobody_writes(state, sink),
            keeper=keeper,
            stopping=stopping,
        )
        known = KnownColumns(
            pipeline=pipeline,
            state=state,
            reader=readers.keys,
            epoch=source.epoch,
            columns=source.columns,
            in_use=lambda: worker.tables,
            made_for=lambda table, columns: load_fingerprint(
                columns, targets_of_table(pipeline, plain, table, spec), plain
            ),
            publish=lambda tables: transport.publish(readers.keys, tables),
        )

        def runtimes(tables: Mapping[str, Table]) -> dict[str, TableRuntime]:
            return {
                name: TableRuntime(readers.keys.table_codec(table), targets_of_table(pipeline, sinks, table, spec))
                for name, table in tables.items()
            }

        def reload(names: Iterable[str]) -> None:
            for name in pipeline.affected(names):
                loader.reload(name, "its columns changed")

        def check() -> None:
            transport.check(readers.check, state)
            keeping.unchanged()

        at_hand = AtHand()
        mender = Mender(dumps, lookups, stopping)
        reread = Rereader(readers.keys, samples, source.epoch, lambda name: worker.tables[name], stopping)
        builder = DocumentBuilder(
            specs=pipeline.documents,
            reader=readers.keys,
            epoch=source.epoch,
            tables=lambda: worker.tables,
            dumps=dumps,
            load_again=lambda names, reason: state.load_again(spec.name, names, reason),
            progress=progress,
            stopping=stopping,
        )
        worker = Worker(
            spec=spec,
            pipeline=pipeline,
            epoch=source.epoch,
            capture=transport.capture(source, lambda: worker.tables, progress, keeping.unchanged),
            stretches=transport.stretches,
            writers=writers,
            lookups=lookups,
            state=state,
            position=self.position,
            progress=progress,
            reread=reread,
            ahead=reread.ahead,
            refresh=lambda names: runtimes(self._until_reached(lambda: known.refresh(list(names))) or {}),
            columns_changed=reload,
            gone=known.is_gone,
            remember=mender.remember,
            note=used_keys.note,
            builder=builder,
            codec_of=readers.keys.table_codec,
            check_slot=lambda: transport.check(readers.keys, state),
            stopping=stopping,
            giving_up=self._giving_up,
            handlers=handlers,
            at_hand=at_hand,
        )
        watchdog = Watchdog(
            at_hand,
            timeout_s=spec.processor.timeout,
            memory_most=spec.processor.memory,
            note=lambda said: progress.waits("processor", said),
            give_up=lambda said: self._give_up(said, state),
            outgrown=lambda bytes_: self._outgrow(bytes_, loader),
            stopping=stopping,
        )
        progress.processor_timeouts = lambda: watchdog.timeouts
        housekeeper = Housekeeper(
            spec=spec, state=state, sinks=sinks, places=worker, used_keys=used_keys, keeper=keeper, stopping=stopping
        )
        loader = self._loader(opened, source, worker, known, housekeeper, keeping, samples, keeper)
        watch = Watch(
            reader=readers.watch,
            samples=samples,
            position=self.position,
            progress=progress,
            heartbeat_prefix=spec.heartbeat_prefix,
            heartbeat_s=spec.source.heartbeat if transport.sends_heartbeats else None,
            loading=lambda: loader.busy,
            fingerprints=lambda: known.fingerprints,
            schema_changed=worker.schema_changed,
            stopping=stopping,
            check=check,
            failed=worker.fail,
        )
        refresher = Refresher(
            pipeline=pipeline,
            state=state,
            reader=readers.refresh,
            tables=known.there,
            ages=progress.ages,
            stopping=stopping,
            keeper=keeper,
        )
        worker.use(runtimes(source.tables))
        for name in source.tables:
            for sink, target in worker.targets(name).items():
                writers[sink].sweep([target])
        if not (self._reached(lambda: used_keys.begin(kept_of(pipeline))) and self._reached(keeping.lead_readers)):
            return
        self._worker = worker
        if pipeline.lookups:
            self.notices.open(pipeline, lambda: worker.tables, NoticeStore(state, spec.name))
        threads = [
            watchdog,
            watch,
            loader,
            housekeeper,
            keeping,
            mender,
            NoticeReader(NoticeStore(state, spec.name), lookups, stopping),
            refresher,
            *transport.background(progress, stopping),
            *transport.notices(self.notices, stopping),
        ]
        for thread in threads:
            thread.start()
        try:
            with keeper or contextlib.nullcontext():
                worker.run()
        except SinkRefused:
            keeping.unchanged()  # it was frozen, and wrote to a generation that was dropped meanwhile
            raise
        finally:
            stopping.set()
            loader.wake()
            self._abort_reads()  # what they read is of no use any more
            for thread in reversed(threads):
                thread.join(STOP_BUDGET_S)

    def _loader(
        self,
        opened: _Opened,
        source: Source,
        worker: Worker,
        known: KnownColumns,
        housekeeper: Housekeeper,
        keeping: GenerationKeeper,
        samples: SharedSamples,
        keeper: LeaseKeeper | None,
    ) -> Loader | SignalledLoader:
        """Return who carries out the dumps of this run."""
        signalled, sinks = self._spec.source.kind == "debezium", opened.sinks
        context = DumperContext(
            pipeline=self._spec.name,
            owner=uuid.uuid4().hex,
            epoch=source.epoch,
            position=self.position,
            progress=self.progress,
            state=opened.state,
            tables=(lambda: worker.tables) if signalled else known.loadable,
            fingerprint=known.fingerprint_of_load,
            finished=housekeeper.remove_unmet,
            failed=worker.fail,
            stopping=self._stopping,
            keeper=keeper,
            unchanged=keeping.unchanged,
        )
        if signalled:
            from delta_sync.kafka.signals import SignalBoard
            from delta_sync.signalled import SignalledLoader  # which needs Kafka's client

            return SignalledLoader(context, names=frozenset(opened.pipeline.tables), board=SignalBoard(self._spec))
        return Loader(
            context,
            reader=opened.readers.load,
            readers=opened.readers.chunks,
            samples=samples,
            options=self._spec.load,
            heartbeat_prefix=self._spec.heartbeat_prefix,
            hand_over=worker.hand_over,
            fills=lambda dump: dump.sinks is None or all(any(meant([n], s) for s in sinks) for n in dump.sinks),
            changes_come=lambda: worker.changes_come,
        )

    # ── what a run opens; it is closed in the reverse order ──

    def _open_readers(self, pipeline: Pipeline, exits: contextlib.ExitStack) -> _Readers:
        def opened(use: str, answer_s: float | None = None) -> SourceReader:
            name = f"delta {self._spec.name} {use}"
            reader = open_reader(self._spec, name, answer_s, pipeline.documents)
            exits.callback(reader.close)
            self._readers.append(reader)
            return reader

        readers = _Readers(
            watch=opened("watch", ANSWER_S),
            check=opened("check", ANSWER_S),
            load=opened("load"),
            keys=opened("read"),
            refresh=opened("refresh"),
            chunks=[opened("dump") for _ in range(self._spec.load.parallel)],
        )
        self.progress.bytes_between = readers.watch.bytes_between
        return readers

    def _open_lookups(self, pipeline: Pipeline, exits: contextlib.ExitStack) -> dict[str, LookupCaller]:
        lookups = {
            name: LookupCaller(lookup, self._stopping, time.monotonic, self._lookup_waits(name))
            for name, lookup in pipeline.lookups.items()
        }
        for lookup in lookups.values():
            exits.callback(lookup.close)
        self.progress.lookups = {name: caller.numbers for name, caller in lookups.items()}
        return lookups

    def _open_handlers(self, pipeline: Pipeline, exits: contextlib.ExitStack) -> list[HandlerRunner]:
        timeout_s = self._spec.processor.timeout
        handlers = [HandlerRunner(handler, self._giving_up, timeout_s) for handler in pipeline.handlers.values()]
        for runner in handlers:
            exits.callback(runner.close)
        self.progress.handlers = {runner.handler.name: runner.numbers for runner in handlers}
        return handlers

    # ── what its threads call ──

    def _give_up(self, said: str, state: StateStore) -> None:
        """End this process: its main thread does not come back. Nothing of it was confirmed."""
        log.error("processor_hangs", reason=said)
        self.progress.end("failed", said)
        self._save_status(state)
        os._exit(PipelineStopped.exit_status)

    def _outgrow(self, bytes_: int, loader: Loader | SignalledLoader) -> bool:
        """Drain, confirm and end: a new process has the memory that this one has lost. Return whether it was time.

        Not before a dump that is under way has got on by a chunk, or it never would: what is left of one is read again.
        """
        if loader.busy and not loader.recorded:
            return False
        most = self._spec.processor.memory or 0
        said = f"this process has {bytes_ >> 20:,} MiB of memory, and processor.memory is {most >> 20:,} MiB"
        log.warning("worker_outgrown", mib=bytes_ >> 20, most_mib=most >> 20, changes=self.progress.events)
        self._outgrown = said
        self.stop()
        return True

    def _reached(self, call: Callable[[], object]) -> bool:
        """Do what needs source, sinks or state store, for as long as it takes; whether Delta was not stopped before."""
        return self._until_reached(lambda: call() or True) is not None

    def _until_reached(self, call: Callable[[], T]) -> T | None:
        """Repeat a call until source, sinks and state store answer; None when Delta is stopped before."""
        while True:
            try:
                found = call()
            except Transient as error:
                self.progress.waits("start", str(error))
                log.warning("start_waits", reason=redact(str(error)))
                if self._stopping.wait(REPORT_S):
                    return None
            else:
                self.progress.waits("start", None)
                return found

    def _lookup_waits(self, name: str) -> Callable[[str | None], None]:
        def note(reason: str | None) -> None:
            self.progress.waits(f"look-up {name}", reason)
            if reason is not None:
                log.warning("lookup_busy", lookup=name, reason=reason)
            else:
                log.info("lookup_recovered", lookup=name)

        return note

    def _report(self, state: StateStore) -> None:
        """Save the status about once a second, until the run has ended; look now and then at what was verified."""
        looked_at = -VERIFIED_LOOK_S
        while not self._ended.wait(REPORT_S):
            self._save_status(state)
            if time.monotonic() - looked_at >= VERIFIED_LOOK_S:
                looked_at = time.monotonic()
                with contextlib.suppress(StateBusy):  # that was said when the status could not be saved
                    self.progress.note_verified(VerifiedStore(state, self._spec.name).all())

    def _save_status(self, state: StateStore) -> None:
        for event, fields in self._news.look():
            log.info(event, **fields)
        try:
            self._transport.save_status(state, self.progress.document())
        except StateBusy as error:
            log.warning("status_not_saved", reason=str(error))
