"""Replaying dead letters: the same change once more through the processor and into the sinks, with its own version.

A store cannot become older by it: what is newer there stays, and the replay counts as done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from delta_sync.delta_event import decode_event
from delta_sync.errors import UsageError
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import Pipeline, load_processor
from delta_sync.processing import process
from delta_sync.sinks import AnySink, open_sinks, target_for
from delta_sync.spec import PipelineSpec
from delta_sync.state import DeadLetter, StateStore
from delta_sync.tables import Table

LOOKUP_BUDGET_S = 30.0  # a person waits: then the letter stays, and says that the service did not answer


class Replayed(NamedTuple):
    """What became of one dead letter: `error` is None when every sink has the change or something newer."""

    letter: DeadLetter
    error: str | None


def replay(
    folder: Path, spec: PipelineSpec, state: StateStore, tables: Mapping[str, Table], letters: Iterable[DeadLetter]
) -> list[Replayed]:
    """Replay the letters; those that succeed are discarded, the others stay, with one attempt more."""
    pipeline = load_processor(folder, spec)
    sinks = open_sinks(spec)
    too_long = threading.Event()
    timer = threading.Timer(LOOKUP_BUDGET_S, too_long.set)
    timer.daemon = True
    timer.start()
    lookups = {name: LookupCaller(lookup, too_long, time.monotonic) for name, lookup in pipeline.lookups.items()}
    done: list[Replayed] = []
    try:
        for letter in letters:
            error = _replay(letter, pipeline, spec, sinks, tables, lookups)
            if error is None:
                state.discard(spec.name, [letter.id])
            else:
                state.add_dead_letters(spec.name, [letter])
            done.append(Replayed(letter, error))
    finally:
        timer.cancel()
        for lookup in lookups.values():
            lookup.close()
        for sink in sinks.values():
            sink.close()
    return done


def _replay(
    letter: DeadLetter,
    pipeline: Pipeline,
    spec: PipelineSpec,
    sinks: Mapping[str, AnySink],
    tables: Mapping[str, Table],
    lookups: Mapping[str, LookupCaller],
) -> str | None:
    change = decode_event(letter.event).change
    table, declared = tables.get(letter.table), pipeline.tables.get(letter.table)
    if table is None or declared is None:
        return f"The pipeline no longer has table {letter.table}."
    if change is None or not change.key:
        return "The event could not be decoded, so there is nothing to replay; load the table again, then discard it."
    processed = process(table, declared, [change], lookups)
    if processed.failures:
        return processed.failures[0].error
    for name in [letter.sink] if letter.sink else (declared.to or tuple(sinks)):
        if name not in sinks:
            raise UsageError(f"There is no sink {name} any more; discard dead letter {letter.id}.")
        sink = sinks[name]
        for outcome in sink.apply(target_for(sink, table, spec), processed.writes):
            if outcome.kind == "rejected":
                return outcome.reason
    return None
