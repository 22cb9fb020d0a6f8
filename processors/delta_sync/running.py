"""Running a pipeline in this process: everything is put together here, started, watched and stopped."""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import structlog

from delta_sync import documents
from delta_sync.applying import SinkWriter
from delta_sync.building import DocumentBuilder
from delta_sync.dumping import FIRST_LOAD
from delta_sync.dumps import Dump
from delta_sync.errors import (
    DeltaError,
    EpochRose,
    GenerationsChanged,
    Outgrown,
    PipelineStopped,
    SinkRefused,
    StateBusy,
    Transient,
)
from delta_sync.events import HandlerRunner
from delta_sync.generations import Generations, GenerationStore, follow, meant, open_generations, written
from delta_sync.leases import LeaseKeeper
from delta_sync.load import Loader
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
from delta_sync.sinks import AnySink, base_name, open_sink, open_sinks
from delta_sync.sources import open_reader
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.starting import load_fingerprint, targets_of_sink, targets_of_table
from delta_sync.state import StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.submitting import TableRuntime
from delta_sync.tables import Table
from delta_sync.transport import Transport
from delta_sync.used_keys import UsedKeyStore, kept_of
from delta_sync.verified import VerifiedStore
from delta_sync.versions import dump_version
from delta_sync.watch import ANSWER_S, Watch
from delta_sync.watchdog import AtHand, Watchdog
from delta_sync.worker import DRAIN_BUDGET_S, Worker

if TYPE_CHECKING:
    from delta_sync.signalled import SignalledLoader

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

COLLECT_EVERY = 200_000  # allocations: events are trees that reference counts free; at the default, 700, the search for
# cycles among them took a third of the worker's CPU time
T = TypeVar("T")

REPORT_S = 1.0  # how often the status is saved
GONE = ""  # in place of a table's columns: it is not there
VERIFIED_LOOK_S = 10.0  # between looks at what was verified: metrics are read no more often
DROP_LOOK_S = 2.0  # between looks whether a generation of a sink is to be removed: nobody waits for that
HOUSEKEEPING_S = 600.0  # what expires after days may stay for minutes more
STOP_BUDGET_S = 15.0  # for the threads that only read


def settle_memory() -> None:
    """Make the collector of cycles look seldom, and never at what was imported. For the process that runs a worker."""
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])


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
        spec, transport = self._spec, self._transport
        generations = GenerationStore(state, spec.name)
        rows = self._until_reached(generations.all)
        if rows is None:
            return
        sinks = open_generations(spec, rows)
        # By these a load knows what it was made for, which is not to change when a sink gets another generation.
        plain = {**open_sinks(spec), **{name: sink for name, sink in sinks.items() if sink.number is None}}

        def opened(use: str, answer_s: float | None = None) -> SourceReader:
            return open_reader(spec, f"delta {spec.name} {use}", answer_s, pipeline.documents)

        watch_reader, check_reader = opened("watch", ANSWER_S), opened("check", ANSWER_S)
        load_reader, key_reader = opened("load"), opened("read")
        chunk_readers = [opened("dump") for _ in range(spec.load.parallel)]
        refresh_reader = opened("refresh")  # a large table may be read for its keys
        readers = self._readers = [watch_reader, check_reader, load_reader, key_reader, refresh_reader, *chunk_readers]
        writers = {name: SinkWriter(sink, self._giving_up) for name, sink in sinks.items()}
        self.progress.sinks = {name: writer.numbers for name, writer in writers.items()}
        lookups = {
            name: LookupCaller(lookup, self._stopping, time.monotonic, self._lookup_waits(name))
            for name, lookup in pipeline.lookups.items()
        }
        self.progress.lookups = {name: caller.numbers for name, caller in lookups.items()}
        notices = NoticeReader(NoticeStore(state, spec.name), lookups, self._stopping)
        used_keys = UsedKeyStore(state, spec.name)
        mender = Mender(DumpStore(state, spec.name), lookups, self._stopping)
        handlers = [
            HandlerRunner(handler, self._giving_up, spec.processor.timeout) for handler in pipeline.handlers.values()
        ]
        self.progress.handlers = {runner.handler.name: runner.numbers for runner in handlers}
        samples = SharedSamples(watch_reader.new_samples)
        self.progress.bytes_between = watch_reader.bytes_between
        try:
            source = self._until_reached(lambda: transport.prepare(pipeline, key_reader, state, plain))
            if source is None:
                return
            columns = dict(source.columns)
            keeper = transport.load_lease(state)

            def runtime(table: Table) -> TableRuntime:
                return TableRuntime(key_reader.table_codec(table), targets_of_table(pipeline, sinks, table, spec))

            def fingerprint_of(name: str) -> str:
                table = worker.tables[name]
                made_of = documents.fingerprint(table, columns)
                return load_fingerprint(made_of, targets_of_table(pipeline, plain, table, spec), plain)

            def unchanged() -> None:
                if written(generations.all()) != written(rows):
                    raise GenerationsChanged("A sink gets another generation, or loses one.")

            def check(reader: SourceReader) -> None:
                transport.check(reader, state)
                unchanged()

            def refresh(wanted: list[str]) -> Mapping[str, TableRuntime]:
                """Read tables again; those that changed are loaded again, because old documents have old columns.

                What happens to a table while it is not there by this name is not seen, so it counts as changed when it
                is back, in this run or a later one.
                """
                current = key_reader.fingerprints(list(columns))
                gone = columns.keys() - current.keys()
                columns.update(dict.fromkeys(gone, GONE))
                for name in pipeline.affected(gone):
                    load = TableLoad(name, fingerprint=fingerprint_of(name), reason="it was gone", epoch=source.epoch)
                    state.begin_load(spec.name, load)
                changed = [name for name in wanted if current.get(name, GONE) not in (GONE, columns[name])]
                changed += [name for name in pipeline.affected(changed) if name not in changed]
                tables = key_reader.tables(changed) if changed else {}
                if not tables:
                    return {}
                # A table that was dropped and made again is another one to the publication.
                there = [tables.get(n, t) for n, t in worker.tables.items() if n in tables or columns[n] != GONE]
                transport.publish(key_reader, there)
                for name in tables:
                    columns[name] = current[name]
                    log.warning("schema_changed", table=name)
                return {name: runtime(table) for name, table in tables.items()}

            def reload(names: Iterable[str]) -> None:
                for name in pipeline.affected(names):
                    loader.reload(name, "its columns changed")

            at_hand = AtHand()
            reread = Rereader(key_reader, samples, source.epoch, lambda name: worker.tables[name], self._stopping)
            builder = DocumentBuilder(
                specs=pipeline.documents,
                reader=key_reader,
                epoch=source.epoch,
                tables=lambda: worker.tables,
                dumps=DumpStore(state, spec.name),
                load_again=lambda names, reason: state.load_again(spec.name, names, reason),
                progress=self.progress,
                stopping=self._stopping,
            )
            worker = Worker(
                spec=spec,
                pipeline=pipeline,
                epoch=source.epoch,
                capture=transport.capture(source, lambda: worker.tables, self.progress, unchanged),
                stretches=transport.stretches,
                writers=writers,
                lookups=lookups,
                state=state,
                position=self.position,
                progress=self.progress,
                reread=reread,
                ahead=reread.ahead,
                refresh=lambda names: self._until_reached(lambda: refresh(list(names))) or {},
                columns_changed=reload,
                gone=lambda name: columns[name] == GONE,
                remember=mender.remember,
                note=used_keys.note,
                builder=builder,
                codec_of=key_reader.table_codec,
                check_slot=lambda: transport.check(key_reader, state),
                stopping=self._stopping,
                giving_up=self._giving_up,
                handlers=handlers,
                at_hand=at_hand,
            )
            watchdog = Watchdog(
                at_hand,
                timeout_s=spec.processor.timeout,
                memory_most=spec.processor.memory,
                note=lambda said: self.progress.waits("processor", said),
                give_up=lambda said: self._give_up(said, state),
                outgrown=lambda bytes_: self._outgrow(bytes_, loader),
                stopping=self._stopping,
            )
            self.progress.processor_timeouts = lambda: watchdog.timeouts
            loader: Loader | SignalledLoader
            if spec.source.kind == "debezium":
                assert keeper is not None, "such a pipeline runs on Kafka"
                from delta_sync.kafka.signals import SignalBoard
                from delta_sync.signalled import SignalledLoader  # which needs Kafka's client

                loader = SignalledLoader(
                    board=SignalBoard(spec),
                    pipeline=spec.name,
                    owner=uuid.uuid4().hex,
                    epoch=source.epoch,
                    names=frozenset(pipeline.tables),
                    position=self.position,
                    progress=self.progress,
                    state=state,
                    tables=lambda: worker.tables,
                    fingerprint=fingerprint_of,
                    finished=lambda dump: self._remove_unmet(dump, sinks, worker, state, used_keys),
                    failed=worker.fail,
                    stopping=self._stopping,
                    keeper=keeper,
                    unchanged=unchanged,
                )
            else:
                loader = Loader(
                    pipeline=spec.name,
                    owner=uuid.uuid4().hex,
                    epoch=source.epoch,
                    reader=load_reader,
                    readers=chunk_readers,
                    samples=samples,
                    position=self.position,
                    progress=self.progress,
                    state=state,
                    options=spec.load,
                    heartbeat_prefix=spec.heartbeat_prefix,
                    tables=lambda: {
                        name: table
                        for name, table in worker.tables.items()
                        if name in pipeline.tables and all(columns[one] != GONE for one in documents.names_of(table))
                    },
                    fingerprint=fingerprint_of,
                    fills=lambda dump: dump.sinks is None or all(any(meant([n], s) for s in sinks) for n in dump.sinks),
                    hand_over=worker.hand_over,
                    finished=lambda dump: self._remove_unmet(dump, sinks, worker, state, used_keys),
                    failed=worker.fail,
                    stopping=self._stopping,
                    keeper=keeper,
                    unchanged=unchanged,
                    changes_come=lambda: worker.changes_come,
                )
            watch = Watch(
                reader=watch_reader,
                samples=samples,
                position=self.position,
                progress=self.progress,
                heartbeat_prefix=spec.heartbeat_prefix,
                heartbeat_s=spec.source.heartbeat if transport.sends_heartbeats else None,
                loading=lambda: loader.busy,
                fingerprints=lambda: columns,
                schema_changed=worker.schema_changed,
                stopping=self._stopping,
                check=lambda: check(check_reader),
                failed=worker.fail,
            )
            worker.use({name: runtime(table) for name, table in source.tables.items()})
            for name in source.tables:
                for sink, target in worker.targets(name).items():
                    writers[sink].sweep([target])
            begun = self._until_reached(lambda: used_keys.begin(kept_of(pipeline)))
            if begun is None:
                return
            led = self._until_reached(lambda: self._lead_readers(generations, rows, pipeline, sinks, source.tables))
            if led is None:
                return
            self._worker = worker
            if pipeline.lookups:
                self.notices.open(pipeline, lambda: worker.tables, NoticeStore(state, spec.name))
            refresher = Refresher(
                pipeline=pipeline,
                state=state,
                reader=refresh_reader,
                tables=lambda: {n: table for n, table in worker.tables.items() if columns[n] != GONE},
                ages=self.progress.ages,
                stopping=self._stopping,
                keeper=keeper,
            )
            housekeeping = threading.Thread(
                target=self._keep_house, args=(state, sinks, worker, keeper), name="housekeeping", daemon=True
            )
            dropping = threading.Thread(
                target=self._drop_given_up,
                args=(generations, state, pipeline, sinks, source.tables, keeper),
                name="generations",
                daemon=True,
            )
            threads = [
                watchdog,
                watch,
                loader,
                housekeeping,
                dropping,
                mender,
                notices,
                refresher,
                *transport.background(self.progress, self._stopping),
                *transport.notices(self.notices, self._stopping),
            ]
            for thread in threads:
                thread.start()
            try:
                with keeper or contextlib.nullcontext():
                    worker.run()
            except SinkRefused:
                unchanged()  # it was frozen, and wrote to a generation that was dropped meanwhile
                raise
            finally:
                self._stopping.set()
                loader.wake()
                self._abort_reads()  # what they read is of no use any more
                for thread in reversed(threads):
                    thread.join(STOP_BUDGET_S)
        finally:
            self._stopping.set()
            self._giving_up.set()
            for writer in writers.values():
                writer.close()
            for name in plain.keys() - writers.keys():
                plain[name].close()
            for runner in handlers:
                runner.close()
            for lookup in lookups.values():
                lookup.close()
            for reader in readers:
                reader.close()

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

    def _remove_unmet(
        self,
        dump: Dump,
        sinks: Mapping[str, AnySink],
        worker: Worker,
        state: StateStore,
        used_keys: UsedKeyStore,
    ) -> None:
        """Remove documents that a dump did not meet: their rows went without a change event.

        That happens in an epoch that is over, to a table that was replaced by another, and to a store that somebody
        else wrote to. Every row that is there has been written with a version at or above the dump's beginning, or has
        a newer one; but for those that became dead letters. Nobody can tell their documents from those of rows that are
        gone, so then nothing is removed.
        """
        if dump.kind == "load" and dump.reason == FIRST_LOAD and dump.epoch == 1:
            return  # nothing was there before
        assert dump.epoch is not None, "it has begun"
        assert dump.covered_from is not None, "it has begun"
        beginning = dump_version(dump.epoch, dump.covered_from) if dump.floor is None else dump.floor
        # What is below the beginning in a generation that is built anew came before, while it was empty; it must not
        # have what a tombstone outranks in another one, such as a dead letter's change that is replayed.
        new = dump.sinks is not None and all(base_name(name) != name for name in dump.sinks)
        failed = 0 if new else state.count_failed_since(self._spec.name, dump.table, beginning)
        if failed:
            fix = "correct the cause, replay them, then run it with --reload"
            log.warning("unmet_kept", table=dump.table, dead_letters=failed, fix=fix)
            return
        for sink, target in worker.targets(dump.table).items():
            if meant(dump.sinks, sink):
                removed = sinks[sink].truncate(target, beginning)
                log.info("unmet_removed", table=dump.table, sink=sink, documents=removed)
        if dump.sinks is None:
            used_keys.remove(dump.table, beginning)

    def _lead_readers(
        self,
        generations: GenerationStore,
        rows: Mapping[str, Generations],
        pipeline: Pipeline,
        sinks: Mapping[str, AnySink],
        tables: Mapping[str, Table],
    ) -> bool:
        """Lead readers to what is meant to serve, in case somebody died over it. Returns True."""
        now = generations.all()
        if written(now) != written(rows):
            raise GenerationsChanged("A sink gets another generation, or loses one.")
        for name, row in now.items():
            if name not in self._spec.sinks:
                continue

            def lead(number: int, of: Generations = row) -> None:
                sink = sinks.get(of.name(number))
                if sink is None:
                    raise GenerationsChanged("A sink has got another generation meanwhile.")
                sink.lead_readers(targets_of_sink(pipeline, sink, tables.values(), self._spec))

            follow(lambda name=name: generations.all()[name].serving, lead)  # type: ignore[misc]  # a default binds it now
        return True

    def _drop_given_up(
        self,
        generations: GenerationStore,
        state: StateStore,
        pipeline: Pipeline,
        sinks: Mapping[str, AnySink],
        tables: Mapping[str, Table],
        keeper: LeaseKeeper | None,
    ) -> None:
        """Remove the generations that are given up, once nobody writes to them; of several processes one does."""
        while not self._stopping.wait(DROP_LOOK_S):
            if keeper is not None and not keeper.held:
                continue
            try:
                for name, row in generations.all().items():
                    if row.state != "dropping" or name not in self._spec.sinks:
                        continue
                    assert row.other is not None, "it is dropped"
                    doomed = row.name(row.other)
                    if doomed not in sinks and self._transport.nobody_writes(state, doomed):
                        self._drop(generations, DumpStore(state, self._spec.name), row, pipeline, tables)
            except Transient as error:
                log.warning("drop_waits", reason=redact(str(error)))
            except DeltaError as error:  # it can wait, and the stream goes on
                log.warning("drop_failed", reason=redact(str(error)))

    def _drop(
        self,
        generations: GenerationStore,
        dumps: DumpStore,
        row: Generations,
        pipeline: Pipeline,
        tables: Mapping[str, Table],
    ) -> None:
        assert row.other is not None, "it is dropped"
        self._cancel_dumps(dumps, row.name(row.other))
        doomed = open_sink(row.sink, self._spec.sinks[row.sink], self._spec.tombstone_ttl, row.other)
        try:
            targets = targets_of_sink(pipeline, doomed, tables.values(), self._spec)
            documents = sum(doomed.drop(target) for target in targets)
        finally:
            doomed.close()
        generations.change(row, row.gone())
        log.info("generation_dropped", sink=doomed.name, documents=documents)

    def _cancel_dumps(self, dumps: DumpStore, sink: str) -> None:
        """Cancel the dumps into a generation that nobody writes to any more: they would never end."""
        for dump in dumps.all(unfinished=True):
            if dump.sinks == (sink,):
                dumps.order(dump.id, "cancel")

    def _keep_house(
        self, state: StateStore, sinks: Mapping[str, AnySink], worker: Worker, keeper: LeaseKeeper | None
    ) -> None:
        """Remove dead letters and tombstones that have expired, now and then; of several processes one does."""
        while not self._stopping.wait(HOUSEKEEPING_S):
            if keeper is not None and not keeper.held:
                continue
            try:
                oldest = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=self._spec.dead_letter_ttl)
                UsedKeyStore(state, self._spec.name).sweep()
                pruned = state.prune(self._spec.name, oldest)
                if pruned:
                    log.warning("dead_letters_expired", letters=pruned)
                for table in worker.tables:
                    for sink, target in worker.targets(table).items():
                        sinks[sink].sweep(target, recent_s=2 * HOUSEKEEPING_S)
            except Transient as error:
                log.warning("housekeeping_waits", reason=str(error))
            except Exception as error:  # a defect in what only tidies up must not stop the stream
                log.error("housekeeping_failed", reason=str(error), exc_info=True)

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
