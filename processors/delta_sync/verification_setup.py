"""What a verification needs, opened and looked at before it begins: state store, source, processor, sinks, log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from delta_sync.applied_log import AppliedLog, pipeline_runs
from delta_sync.building import may_be_left_to
from delta_sync.dumps import Dump
from delta_sync.errors import CheckFailed, EpochRose, Problem, UsageError
from delta_sync.generations import GenerationStore, meant, open_generations, written
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import check_columns, load_processor
from delta_sync.progress import LogPosition
from delta_sync.refreshing import NoticeReader, NoticeStore
from delta_sync.repairing import DirectRepair
from delta_sync.sinks import base_name
from delta_sync.sources import open_reader
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import PROCESSOR_FILE, PipelineSpec
from delta_sync.starting import read_tables, targets_of_table
from delta_sync.state import StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Table
from delta_sync.verification import KeyReader, Listener, Makers, Subject, Verifier
from delta_sync.verified import Rounds, VerifiedStore, digest
from delta_sync.watch import ANSWER_S


class Wanted(NamedTuple):
    """What is to be verified, and how; empty collections mean all. See `Verifier`."""

    tables: Collection[str] = ()
    sinks: Collection[str] = ()
    skipped: frozenset[str] = frozenset()
    share: float = 1.0
    repair: bool = False
    patience_s: float = 60.0


class Opened(NamedTuple):
    """A verification that can begin: its tables, in the order of the specification."""

    verifier: Verifier
    subjects: Sequence[Subject]
    rounds: Rounds | None = None  # None: some of it is left out, so it does not count as a verification of the tables


@contextmanager
def open_verification(
    folder: Path,
    spec: PipelineSpec,
    wanted: Wanted,
    listener: Listener,
    stopping: threading.Event,
    pace: Callable[[float], None] = lambda _busy_s: None,
) -> Generator[Opened]:
    """Open what a verification needs; everything is closed in the end.

    Raises UsageError (unknown tables, sinks or fields; it never ran), CheckFailed (a table is not loaded, the source is
    another one), and what state store and source raise.
    """
    _refuse_unknown("--sink", [base_name(sink) for sink in wanted.sinks], spec, spec.sinks)
    pipeline = load_processor(folder, spec)
    for named in wanted.tables:
        pipeline.check_has_documents(named, "--table")
    chosen_tables = pipeline.going_to(wanted.sinks, wanted.tables)
    with ExitStack() as closing:
        state = StateStore.open(spec.state, folder, create=False)
        if state is None:
            raise UsageError(f"Pipeline {spec.name} never ran here, so there is nothing to verify.")
        closing.enter_context(state)
        generations = GenerationStore(state, spec.name)
        rows = generations.all()
        sinks = open_generations(spec, rows)
        # What is being built lacks rows, of course; whoever wants to know how many names it.
        built = {row.name(row.other) for row in rows.values() if row.other and row.state == "building"}
        _refuse_unknown("--sink", wanted.sinks, spec, dict.fromkeys([*spec.sinks, *sinks]))
        for sink in sinks.values():
            closing.callback(sink.close)
        known_state = state.pipeline(spec.name)
        if known_state is None:
            raise UsageError(f"Pipeline {spec.name} never ran, so there is nothing to verify.")

        def opened(use: str, answer_s: float | None = None) -> SourceReader:
            reader = open_reader(spec, f"delta {spec.name} verify {use}", answer_s, pipeline.documents)
            closing.callback(reader.close)
            return reader

        chunks, by_key, position = opened("chunks"), opened("keys"), opened("log", ANSWER_S)
        if by_key.identity() != (known_state.system_identifier, known_state.timeline):
            problem = "it is another server than the pipeline's, or was promoted or restored"
            raise CheckFailed([Problem("source", problem, "run the pipeline first; it says what to do")])
        tables = {name: table for name, table in read_tables(spec, by_key).items() if name in chosen_tables}
        check_columns(pipeline, tables)
        loads = state.loads(spec.name)
        unloaded = [problem for name in tables for problem in _unloaded(name, loads.get(name), known_state.epoch)]
        if unloaded:
            raise CheckFailed(unloaded)
        epoch = known_state.epoch

        def check_epoch() -> None:
            now = state.pipeline(spec.name)
            if now is None or now.epoch != epoch:
                raise EpochRose("The pipeline has begun a new epoch meanwhile; verify it again when it has loaded.")
            if not written(rows).items() <= written(generations.all()).items():
                raise EpochRose("A sink has got or lost a generation meanwhile; verify it again.")

        def check_load(name: str) -> None:
            now = state.loads(spec.name).get(name)
            if now is None or _begun_for(now) != _begun_for(loads[name]):
                why = "it is no longer in the pipeline" if now is None else f"it is loaded anew: {now.reason}"
                raise CheckFailed([Problem(f"table {name}", why, "verify it again when it has loaded")])

        dumps = DumpStore(state, spec.name)

        def left_to(table: Table) -> list[Dump]:
            found = [dump for dump in dumps.all(unfinished=True) if may_be_left_to(dump, table.id)]
            check_load(table.id)  # after that: a load ends the dumps, and brings what they were to bring
            return found if table.is_document else []

        def waits(name: str) -> Callable[[str | None], None]:
            return lambda reason: listener.waits(None if reason is None else f"look-up {name}: {reason}")

        lookups = {
            name: LookupCaller(lookup, stopping, time.monotonic, waits(name), insist=True)
            for name, lookup in pipeline.lookups.items()
        }
        for lookup in lookups.values():
            closing.callback(lookup.close)
        ended = threading.Event()
        notices = NoticeReader(NoticeStore(state, spec.name), lookups, ended)
        notices.start()
        closing.callback(notices.join)
        closing.callback(ended.set)
        applied = AppliedLog(
            mark=lambda: position.heartbeat(spec.heartbeat_prefix),
            applied_to=_applied_to(spec, position, state, closing),
            alive=lambda: pipeline_runs(state, spec.name, members=spec.kafka is not None),
            stopping=stopping,
            clock=time.monotonic,
        )
        keys = KeyReader(by_key, stopping)
        subjects: list[Subject] = []
        for name, table in tables.items():
            targets = targets_of_table(pipeline, sinks, table, spec)
            chosen = {
                sink: target
                for sink, target in targets.items()
                if sink in wanted.sinks or (sink not in built and meant(wanted.sinks or None, sink))
            }
            covered_from = loads[name].covered_from
            assert covered_from is not None, "it is loaded"
            if chosen:
                subjects.append(Subject(table, chosen, covered_from))
        repair = DirectRepair(
            epoch=epoch,
            keys=keys,
            makers=Makers(pipeline, lookups, frozenset()),
            sinks=sinks,
            applied=applied,
            check_load=check_load,
        )
        verifier = Verifier(
            epoch=epoch,
            reader=chunks,
            keys=keys,
            makers=Makers(pipeline, lookups, wanted.skipped),
            sinks=sinks,
            applied=applied,
            failed_keys=lambda table, texts: state.failed_keys(spec.name, table, texts),
            check_epoch=check_epoch,
            left_to=left_to,
            listener=listener,
            options=spec.load,
            skipped=wanted.skipped,
            share=wanted.share,
            repair=repair if wanted.repair else None,
            patience_s=wanted.patience_s,
            pace=pace,
            stopping=stopping,
        )
        processor = (folder / PROCESSOR_FILE).read_bytes()
        made_for = {name: digest(_begun_for(loads[name]), sorted(written(rows).items()), processor) for name in tables}
        whole = not wanted.sinks and not wanted.skipped and wanted.share >= 1
        rounds = Rounds(VerifiedStore(state, spec.name), verifier, made_for) if whole else None
        yield Opened(verifier, subjects, rounds)


def _refuse_unknown(option: str, given: Collection[str], spec: PipelineSpec, known: Collection[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UsageError(f"{option}: pipeline {spec.name} has no {unknown[0]!r}; it has {', '.join(known)}.")


def _applied_to(
    spec: PipelineSpec, reader: SourceReader, state: StateStore, closing: ExitStack
) -> Callable[[], int | None]:
    """Return how to ask how far the log is in every sink."""
    place = reader.capture_position(spec, state)
    if spec.kafka is None:

        def confirmed() -> int | None:
            found = place.look()
            return None if found is None else found.position

        return confirmed
    from delta_sync.kafka import settings
    from delta_sync.kafka.names import group_id, topic_name
    from delta_sync.kafka.offsets import GroupOffsets
    from delta_sync.kafka.progress import GroupProgress

    kafka = spec.kafka
    offsets = GroupOffsets(
        lambda: settings.resolved(settings.kafka_python(kafka)),
        group_id(spec.name),
        [topic_name(spec.name, table) for table in spec.tables],
    )
    closing.callback(offsets.close)
    position = LogPosition(time.monotonic)
    group = GroupProgress(  # not started: it is asked from here
        reader=reader,
        place=place,
        offsets=offsets,
        position=position,
        waits=lambda _: None,
        stopping=threading.Event(),
    )

    def passed() -> int | None:
        group.look()  # sets a barrier
        group.look()  # looks whether it has been passed
        return position.passed_lsn or None

    return passed


def _begun_for(load: TableLoad) -> tuple[object, ...]:
    return load.epoch, load.fingerprint, load.covered_from


def _unloaded(name: str, load: TableLoad | None, epoch: int) -> list[Problem]:
    if load is not None and load.state == "done" and load.epoch == epoch and load.covered_from is not None:
        return []
    how_far = "it was never loaded" if load is None else f"its load is {load.state}, {load.rows} rows so far"
    return [
        Problem(f"table {name}", f"{how_far}, so it cannot be equal yet", "verify it when `deltactl status` says so")
    ]
