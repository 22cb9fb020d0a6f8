"""Replaying dead letters: the same change once more through the processor and into the sinks, with its own version.

A store cannot become older by it: what is newer there stays, and the replay counts as done.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from delta_sync.changes import Change, Key
from delta_sync.delta_event import DeltaEvent, decode_event
from delta_sync.errors import SinkRefused, Transient, UsageError
from delta_sync.events import RowEvent
from delta_sync.generations import GenerationStore, meant, open_generations
from delta_sync.lookups import LookupCaller, asked_by_a_person
from delta_sync.pipeline import Pipeline, load_processor
from delta_sync.processing import Stage, asked_of, process
from delta_sync.shaping import masked_again
from delta_sync.sinks import AnySink, target_for
from delta_sync.sources import open_reader
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.state import DeadLetter, StateStore
from delta_sync.tables import Table
from delta_sync.used_keys import UsedKeyStore, uses_of

UNDECODED = "The event could not be decoded, so there is nothing to replay; load the table again, then discard it."


class Replayed(NamedTuple):
    """What became of one dead letter: `error` is None when every sink has the change or something newer."""

    letter: DeadLetter
    error: str | None


class Replay(NamedTuple):
    """What became of all of them. `ended_by` says why the last ones were not tried: a sink is down; None: all were."""

    done: list[Replayed]
    ended_by: str | None


class Failed(NamedTuple):
    """Why a letter failed again: what is kept of it in place of what was known."""

    stage: Stage
    error: str
    trace: str


class _Now(NamedTuple):
    """The source as it is now: of a document from several tables, a dead letter keeps nothing that it was made of."""

    reader: SourceReader
    epoch: int

    def read(self, table: Table, key: Key) -> Change:
        chunk = self.reader.read_keys(table, [key], lambda _: True)
        assert chunk is not None, "every snapshot will do"
        return Change(table.id, key, chunk.version(self.epoch, 0), chunk.rows[0][1] if chunk.rows else None)


def replay(folder: Path, spec: PipelineSpec, state: StateStore, letters: Iterable[DeadLetter]) -> Replay:
    """Replay the letters; those that succeed are discarded, the others stay: one attempt more, and the newest error.

    A sink that does not answer, or refuses everything, is not a letter's fault: it ends the replay, and the letters
    that are left stay as they are.
    """
    pipeline = load_processor(folder, spec)
    sinks = open_generations(spec, GenerationStore(state, spec.name).all())
    reader = open_reader(spec, f"delta {spec.name} replay", documents=pipeline.documents)
    known = state.pipeline(spec.name)
    used_keys = UsedKeyStore(state, spec.name)
    done: list[Replayed] = []
    try:
        tables = reader.tables(list(spec.tables))
        with asked_by_a_person(pipeline.lookups) as lookups:
            for letter in letters:
                try:
                    now = _Now(reader, known.epoch if known is not None else 1)
                    failed = _replay(letter, pipeline, spec, sinks, tables, lookups, now, used_keys)
                except (Transient, SinkRefused) as error:
                    return Replay(done, str(error))
                if failed is None:
                    state.discard(spec.name, [letter.id])
                else:
                    newest = replace(letter, stage=failed.stage, error=failed.error, trace=failed.trace)
                    state.add_dead_letters(spec.name, [newest])
                done.append(Replayed(letter, None if failed is None else failed.error))
    finally:
        reader.close()
        for sink in sinks.values():
            sink.close()
    return Replay(done, None)


def _replay(
    letter: DeadLetter,
    pipeline: Pipeline,
    spec: PipelineSpec,
    sinks: Mapping[str, AnySink],
    tables: Mapping[str, Table],
    lookups: Mapping[str, LookupCaller],
    now: _Now,
    used_keys: UsedKeyStore,
) -> Failed | None:
    event = decode_event(letter.event)
    change = event.change
    table, declared = tables.get(letter.table), pipeline.tables.get(letter.table)
    if letter.stage == "handle":
        return _handle_again(letter, event if table is None else _masked(table, event), pipeline)
    if table is None or declared is None:
        return Failed(letter.stage, f"The pipeline no longer has table {letter.table}.", "")
    if table.is_document and event.key:
        change = now.read(table, event.key)
    elif change is None or not change.key:
        return Failed(letter.stage, UNDECODED, letter.trace)
    else:
        change = masked_again(table, change)
    wanted = [letter.sink] if letter.sink else declared.to or None
    for name in wanted or ():
        if not any(meant([name], sink) for sink in sinks):
            raise UsageError(f"There is no sink {name} any more; discard dead letter {letter.id}.")
    for processor, names in pipeline.made_by(letter.table, [name for name in sinks if meant(wanted, name)]):
        asked = asked_of(processor, [change])
        used_keys.note(uses_of(asked))
        processed = process(table, processor, [change], lookups, asked=asked)
        if processed.failures:
            first = processed.failures[0]
            return Failed(first.stage, first.error, first.trace)
        for sink in map(sinks.__getitem__, names):
            for outcome in sink.apply(target_for(sink, table, spec), processed.writes):
                if outcome.kind == "rejected":
                    return Failed("apply", outcome.reason, "")
    return None


def _handle_again(letter: DeadLetter, event: DeltaEvent, pipeline: Pipeline) -> Failed | None:
    """Call the handler with the change once more, whatever it has had since. Raises Transient when it says that."""
    handler = next((one for one in pipeline.handlers.values() if one.place == letter.sink), None)
    if handler is None:
        raise UsageError(f"There is no handler {letter.sink} any more; discard dead letter {letter.id}.")
    try:
        handler.call([RowEvent.of(event)])
    except Transient:
        raise
    except Exception as error:  # noqa: BLE001 -- it is the user's function: whatever it raises is this change's
        return Failed("handle", f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
    return None


def _masked(table: Table, event: DeltaEvent) -> DeltaEvent:
    """Return an event with both its rows masked, as `masked_again` does it."""
    row, before = (
        masked_again(table, Change(event.table, event.key, event.version, one)).row for one in (event.row, event.before)
    )
    return event._replace(row=row, before=before)
