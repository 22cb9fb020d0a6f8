"""Running a pipeline on one machine: everything is put together here, started, watched and stopped."""

from __future__ import annotations

import datetime as dt
import gc
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import structlog

from delta_sync.applying import SinkWriter
from delta_sync.capture import Capture
from delta_sync.errors import DeltaError, SlotMissing, StateBusy, Transient, UsageError
from delta_sync.load import FIRST_LOAD, Loader, SharedSamples
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import Pipeline, check_complete
from delta_sync.progress import LogPosition, Progress
from delta_sync.rereads import Rereader
from delta_sync.secrets import redact
from delta_sync.sinks import AnySink, open_sinks, target_for, targets_of
from delta_sync.sources.postgresql import codec
from delta_sync.sources.postgresql.reader import PostgresReader, SlotState, SourceIdentity
from delta_sync.spec import PROCESSOR_FILE, PipelineSpec
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.tables import Table
from delta_sync.versions import dump_version, epoch_of
from delta_sync.watch import Watch
from delta_sync.worker import TableRuntime, Worker

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

COLLECT_EVERY = 200_000  # allocations: events are trees that reference counts free; at the default, 700, the search for
# cycles among them took a third of the worker's CPU time
T = TypeVar("T")

REPORT_S = 1.0  # how often the status is saved
HOUSEKEEPING_S = 600.0  # what expires after days may stay for minutes more
STOP_BUDGET_S = 15.0  # for the threads that only read


def load_processor(folder: Path, spec: PipelineSpec) -> Pipeline:
    """Import `processor.py` of a pipeline's folder and return its pipeline.

    Raises UsageError: it is missing, does not import, or does not fit the specification.
    """
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        raise UsageError(f"There is no {path}; `deltactl pipeline create` writes one.")
    module_name = f"delta_processor_{spec.name}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except DeltaError:
        raise
    except Exception as error:  # whatever the user's file raises is about that file
        line = _line_in(error, path)
        raise UsageError(f"{path}{line} does not import: {type(error).__name__}: {error}.") from error
    found = [value for value in vars(module).values() if isinstance(value, Pipeline)]
    if len(found) != 1:
        raise UsageError(f"{path} must define one Pipeline, and defines {len(found)}.")
    check_complete(found[0], spec)
    return found[0]


def _line_in(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" line {error.lineno}"
    trace, line = error.__traceback__, None
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" line {line}" if line else ""


class Source(NamedTuple):
    """What was found and made sure of at the source, before the capture starts."""

    epoch: int
    tables: Mapping[str, Table]


def prepare_source(
    spec: PipelineSpec, reader: PostgresReader, state: StateStore, sinks: Mapping[str, AnySink], *, new_slot: bool
) -> Source:
    """Make sure that publication and slot exist, and decide the epoch.

    A slot that is gone, or a source with another history, means that changes may have been lost: that is SlotMissing,
    unless `new_slot` accepts it. Then the epoch rises, and everything is loaded again.
    """
    tables = reader.tables(list(spec.tables))
    missing = [name for name in spec.tables if name not in tables]
    if missing:
        raise UsageError(f"The source has no table {', '.join(missing)}; correct pipeline.yaml or create it.")
    keyless = [name for name, table in tables.items() if not table.key]
    if keyless:
        raise UsageError(
            f"Table {keyless[0]} has no key in the log; add a primary key, or set REPLICA IDENTITY USING INDEX."
        )
    identity = reader.identity()
    known = state.pipeline(spec.name)
    slot = reader.slot(spec.slot)
    if known is None:
        epoch = _epoch_above(spec, sinks, tables)
        known = PipelineState(spec.name, epoch, identity.system_identifier, identity.timeline, None)
        state.save_pipeline(known)
    else:
        wrong = _lost(spec, known, identity, slot)
        if wrong is not None and not new_slot:
            raise _slot_missing(spec, wrong)
        if wrong is not None:
            log.warning("epoch_rises", reason=wrong, epoch=known.epoch + 1)
            if slot is not None:
                reader.drop_slot(spec.slot)
                slot = None
            known = PipelineState(spec.name, known.epoch + 1, identity.system_identifier, identity.timeline, None)
            state.save_pipeline(known)
    reader.publish(spec.publication, list(tables.values()))
    if slot is None:
        position = reader.create_slot(spec.slot)
        log.info("slot_created", slot=spec.slot)
    else:
        position = slot.confirmed_lsn or 0
    state.save_pipeline(known._replace(slot_lsn=position))
    for name in state.loads(spec.name).keys() - spec.tables.keys():
        state.forget_load(
            spec.name, name
        )  # added again later, it must be loaded again: its changes are not captured now
    return Source(known.epoch, tables)


def _lost(spec: PipelineSpec, known: PipelineState, identity: SourceIdentity, slot: SlotState | None) -> str | None:
    """Return why changes may have been lost since the pipeline's state was saved; None: they were not."""
    if (known.system_identifier, known.timeline) != identity:
        return "the source is another server, or was promoted or restored"
    if known.slot_lsn is not None and slot is None:
        return f"replication slot {spec.slot} is gone"
    if slot is not None and slot.wal_status == "lost":
        return f"the source removed log that replication slot {spec.slot} still needed"
    return None


def _slot_missing(spec: PipelineSpec, why: str) -> SlotMissing:
    return SlotMissing(
        f"Changes may have been lost: {why}. Type `deltactl run {spec.name} --new-slot` to begin a new epoch:"
        " every table is loaded again, and documents of rows that are gone are removed."
    )


def check_slot(spec: PipelineSpec, reader: PostgresReader, state: StateStore) -> None:
    """Raise SlotMissing unless the slot is there and goes on where the pipeline's state was."""
    known = state.pipeline(spec.name)
    assert known is not None, "prepare_source saved it"
    wrong = _lost(spec, known, reader.identity(), reader.slot(spec.slot))
    if wrong is not None:
        raise _slot_missing(spec, wrong)


def _epoch_above(spec: PipelineSpec, sinks: Mapping[str, AnySink], tables: Mapping[str, Table]) -> int:
    """Return an epoch above that of every document that is there already: the state store may have been lost."""
    newest = 0
    for sink, targets in targets_of(sinks.values(), tables.values(), spec):
        for target in targets:
            sink.prepare(target)
            for batch in sink.scan(target):
                newest = max([newest, *(epoch_of(version) for _, version in batch)])
    return newest + 1


def settle_memory() -> None:
    """Make the collector of cycles look seldom, and never at what was imported. For the process that runs a worker."""
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])


class Running:
    """One run of a pipeline. `run` blocks until `stop` is called, or raises why the pipeline had to stop."""

    def __init__(
        self,
        *,
        folder: Path,
        spec: PipelineSpec,
        capture: Callable[[Callable[[], Mapping[str, Table]]], Capture],
        new_slot: bool = False,
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._make_capture = capture
        self._new_slot = new_slot
        self._stopping = threading.Event()
        self._giving_up = threading.Event()
        self._worker: Worker | None = None
        self.position = LogPosition(time.monotonic)
        self.progress = Progress(self.position, time.monotonic)

    def stop(self) -> None:
        """End the run: drain what is in flight, confirm it, and return from `run`."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.wake()

    def run(self) -> None:
        """Run the pipeline. Raises PipelineStopped, UsageError or CheckFailed with what to do."""
        spec = self._spec
        pipeline = load_processor(self._folder, spec)
        sinks = open_sinks(spec)
        settle_memory()
        with StateStore.open(spec.state, self._folder) as state:
            reporter = threading.Thread(target=self._report, args=(state,), name="report", daemon=True)
            ended = threading.Event()
            self._ended = ended
            reporter.start()
            try:
                self._run(pipeline, sinks, state)
                self.progress.end("stopped", "it was asked to stop")
            except BaseException as error:
                self.progress.end("failed", redact(str(error)) or type(error).__name__)
                raise
            finally:
                ended.set()
                reporter.join(STOP_BUDGET_S)
                self._save_status(state)

    def _run(self, pipeline: Pipeline, sinks: Mapping[str, AnySink], state: StateStore) -> None:
        spec = self._spec
        readers = [PostgresReader(spec.source, f"delta {spec.name} {use}") for use in ("watch", "load", "read")]
        watch_reader, load_reader, key_reader = readers
        writers = {name: SinkWriter(sink, self._giving_up) for name, sink in sinks.items()}
        self.progress.sinks = {name: writer.numbers for name, writer in writers.items()}
        lookups = {
            name: LookupCaller(lookup, self._stopping, time.monotonic, self._lookup_waits(name))
            for name, lookup in pipeline.lookups.items()
        }
        samples = SharedSamples()
        try:
            source = self._until_reached(
                lambda: prepare_source(spec, key_reader, state, sinks, new_slot=self._new_slot)
            )
            if source is None:
                return
            found = self._until_reached(lambda: key_reader.fingerprints(list(spec.tables)))
            if found is None:
                return
            fingerprints = found

            def runtime(table: Table) -> TableRuntime:
                to = pipeline.tables[table.id].to or tuple(sinks)
                return TableRuntime(codec.table_codec(table), {n: target_for(sinks[n], table, spec) for n in to})

            def refresh(wanted: list[str]) -> Mapping[str, TableRuntime]:
                """Read tables again; those that changed are loaded again, because old documents have old columns."""
                current = key_reader.fingerprints(wanted)
                changed = [name for name in wanted if current.get(name, fingerprints[name]) != fingerprints[name]]
                if not changed:
                    return {}
                tables = key_reader.tables(changed)
                # A table that was dropped and made again is another one to the publication.
                key_reader.publish(spec.publication, [tables.get(n, t) for n, t in worker.tables.items()])
                for name in changed:
                    fingerprints[name] = current[name]
                    log.warning("schema_changed", table=name)
                return {name: runtime(table) for name, table in tables.items()}

            def reload(names: Iterable[str]) -> None:
                for name in names:
                    loader.reload(name, "its columns changed")

            worker = Worker(
                spec=spec,
                pipeline=pipeline,
                epoch=source.epoch,
                capture=self._make_capture(lambda: worker.tables),
                writers=writers,
                lookups=lookups,
                state=state,
                position=self.position,
                progress=self.progress,
                reread=Rereader(key_reader, samples, source.epoch, lambda name: worker.tables[name], self._stopping),
                refresh=lambda names: self._until_reached(lambda: refresh(list(names))) or {},
                columns_changed=reload,
                check_slot=lambda: check_slot(spec, key_reader, state),
                stopping=self._stopping,
                giving_up=self._giving_up,
            )
            loader = Loader(
                pipeline=spec.name,
                epoch=source.epoch,
                reader=load_reader,
                samples=samples,
                position=self.position,
                progress=self.progress,
                state=state,
                options=spec.load,
                heartbeat_prefix=spec.heartbeat_prefix,
                tables=lambda: worker.tables,
                hand_over=worker.hand_over,
                finished=lambda load: self._remove_unmet(load, sinks, worker),
                failed=worker.fail,
                stopping=self._stopping,
            )
            for name, load in state.loads(spec.name).items():
                if load.fingerprint != fingerprints[name]:
                    reload([name])
            watch = Watch(
                reader=watch_reader,
                samples=samples,
                position=self.position,
                progress=self.progress,
                heartbeat_prefix=spec.heartbeat_prefix,
                heartbeat_s=spec.source.heartbeat,
                loading=lambda: loader.busy,
                fingerprints=lambda: fingerprints,
                schema_changed=worker.schema_changed,
                stopping=self._stopping,
            )
            worker.use({name: runtime(table) for name, table in source.tables.items()})
            for name in spec.tables:
                for sink, target in worker.targets(name).items():
                    writers[sink].sweep([target])
            self._worker = worker
            housekeeping = threading.Thread(
                target=self._keep_house, args=(state, sinks, worker), name="housekeeping", daemon=True
            )
            watch.start()
            loader.start()
            housekeeping.start()
            try:
                worker.run()
            finally:
                self._stopping.set()
                loader.wake()
                housekeeping.join(STOP_BUDGET_S)
                loader.join(STOP_BUDGET_S)
                watch.join(STOP_BUDGET_S)
        finally:
            self._stopping.set()
            self._giving_up.set()
            for writer in writers.values():
                writer.close()
            for lookup in lookups.values():
                lookup.close()
            for reader in readers:
                reader.close()

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

    def _remove_unmet(self, load: TableLoad, sinks: Mapping[str, AnySink], worker: Worker) -> None:
        """Remove documents that a load did not meet: their rows went without a change event.

        That happens in an epoch that is over, and to a table that was replaced by another. Every row that is there has
        been written with a version at or above the load's beginning, or has a newer one.
        """
        if load.reason == FIRST_LOAD and load.epoch == 1:
            return  # nothing was there before
        assert load.covered_from is not None
        for sink, target in worker.targets(load.table).items():
            removed = sinks[sink].truncate(target, dump_version(load.epoch, load.covered_from))
            log.info("unmet_removed", table=load.table, sink=sink, documents=removed)

    def _keep_house(self, state: StateStore, sinks: Mapping[str, AnySink], worker: Worker) -> None:
        """Remove dead letters and tombstones that have expired, now and then."""
        while not self._stopping.wait(HOUSEKEEPING_S):
            try:
                oldest = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=self._spec.dead_letter_ttl)
                pruned = state.prune(self._spec.name, oldest)
                if pruned:
                    log.warning("dead_letters_expired", letters=pruned)
                for table in self._spec.tables:
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
        """Save the status about once a second, until the run has ended."""
        while not self._ended.wait(REPORT_S):
            self._save_status(state)

    def _save_status(self, state: StateStore) -> None:
        try:
            state.save_status(self._spec.name, self.progress.document())
        except StateBusy as error:
            log.warning("status_not_saved", reason=str(error))
