"""What is made sure of at the source before a pipeline streams: publication, slot, and the epoch of its positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import structlog

from delta_sync.errors import SlotMissing, UsageError
from delta_sync.load import FIRST_LOAD
from delta_sync.pipeline import Pipeline, check_columns
from delta_sync.sinks import AnySink, store_of, target_for
from delta_sync.sinks.base import Target
from delta_sync.sources.postgresql.checks import new_slot_command
from delta_sync.sources.reader import CapturePosition, Confirmed, SourceIdentity, SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.state import Lease, PipelineState, StateStore, TableLoad
from delta_sync.tables import Table
from delta_sync.versions import epoch_of

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Source(NamedTuple):
    """What was found and made sure of at the source, before the capture starts. `columns` are fingerprints."""

    epoch: int
    tables: Mapping[str, Table]
    columns: Mapping[str, str]


def prepare_source(
    spec: PipelineSpec,
    pipeline: Pipeline,
    reader: SourceReader,
    state: StateStore,
    sinks: Mapping[str, AnySink],
    *,
    new_slot: bool,
    reload: bool,
    lease: Lease | None = None,
    bounded: bool = False,
) -> Source:
    """Make sure that publication and slot exist, decide the epoch, and note which tables are to be loaded.

    A slot that is gone, or a source with another history, means that changes may have been lost: that is SlotMissing,
    unless `new_slot` accepts it. Then the epoch rises, and everything is loaded again; `reload` asks for that, too.
    With a lease, everything is saved under it: LeaseLost when another process decides by now. `bounded` says that what
    is confirmed from now on will be bounded in the state store (see `confirming`); without, an old bound is forgotten.
    """
    found = reader.fingerprints(list(spec.tables))  # before the tables: what changes between the two is noticed later
    tables = read_tables(spec, reader)
    columns = {name: found.get(name, "") for name in tables}
    check_columns(pipeline, tables)
    identity = reader.identity()
    known = state.pipeline(spec.name)
    place = reader.capture_position(spec)
    there = place.look()
    found_state = known or PipelineState(spec.name, 0, *identity)
    wrong = why_lost(place, found_state, identity, there)
    if wrong is not None and not new_slot:
        raise SlotMissing(slot_missing(spec, wrong))
    if known is None or wrong is not None:
        known = PipelineState(spec.name, found_state.epoch + 1, *identity)
    if wrong is not None:
        log.warning("epoch_rises", reason=wrong, epoch=known.epoch)
        place.drop()
        there = None
    if not bounded:
        known = known._replace(confirmed_most=None)
    targets = {name: targets_of_table(pipeline, sinks, table, spec) for name, table in tables.items()}
    loads = state.loads(spec.name)
    newest = _newest_epoch_of_others(loads, targets, sinks)
    if newest >= known.epoch:
        log.warning("epoch_rises", reason="a place holds what was written before", epoch=newest + 1)
        known = known._replace(epoch=newest + 1)
    state.save_pipeline(known, lease)
    for name in loads.keys() - tables.keys():
        # Added again later, it must be loaded again: its changes are not captured now.
        state.forget_load(spec.name, name, lease)
    for name in tables:
        fingerprint = load_fingerprint(columns[name], targets[name], sinks)
        reason = _why_to_load(loads.get(name), known.epoch, fingerprint, reload=reload)
        if reason is not None:
            state.begin_load(
                spec.name, TableLoad(name, reason=reason, epoch=known.epoch, fingerprint=fingerprint), lease
            )
    place.publish(list(tables.values()))
    if there is None:
        position = place.create()
        if bounded:
            known = known._replace(confirmed_most=position)
    else:
        position = there.position or 0
    state.save_pipeline(known._replace(slot_lsn=position), lease)
    return Source(known.epoch, tables, columns)


def read_tables(spec: PipelineSpec, reader: SourceReader) -> dict[str, Table]:
    """Return the specification's tables as they are now. Raises UsageError: one is missing or has no key in the log."""
    tables = reader.tables(list(spec.tables))
    missing = [name for name in spec.tables if name not in tables]
    if missing:
        raise UsageError(f"The source has no table {', '.join(missing)}; correct pipeline.yaml or create it.")
    keyless = [name for name, table in tables.items() if not table.key]
    if keyless:
        raise UsageError(
            f"Table {keyless[0]} has no key in the log; add a primary key, or set REPLICA IDENTITY USING INDEX."
        )
    return tables


def targets_of_table(
    pipeline: Pipeline, sinks: Mapping[str, AnySink], table: Table, spec: PipelineSpec
) -> dict[str, Target]:
    """Return where a table's documents go, by sink."""
    return {name: target_for(sinks[name], table, spec) for name in pipeline.tables[table.id].to or sinks}


def load_fingerprint(columns: str, targets: Mapping[str, Target], sinks: Mapping[str, AnySink]) -> str:
    """Return what a load was made for, as text: the table's columns, and a line for each place that it filled."""
    return "\n".join([columns, *_places(targets, sinks)])


def _places(targets: Mapping[str, Target], sinks: Mapping[str, AnySink]) -> dict[str, tuple[AnySink, Target]]:
    return {
        f"{store_of(sinks[name].url)} {target.place}": (sinks[name], target) for name, target in sorted(targets.items())
    }


def _newest_epoch_of_others(
    loads: Mapping[str, TableLoad], targets: Mapping[str, Mapping[str, Target]], sinks: Mapping[str, AnySink]
) -> int:
    """Return the newest epoch in the places that this pipeline's loads have not filled; 0 when they are empty.

    They hold what another pipeline wrote, or this one before its state was lost, perhaps with higher positions than
    the source has now. A table whose rows are all gone has no document there, and yet tombstones and a floor.
    """
    newest = 0
    for name, of_table in targets.items():
        filled = loads[name].fingerprint.split("\n")[1:] if name in loads else []
        for place, (sink, target) in _places(of_table, sinks).items():
            if place not in filled:
                sink.prepare(target)
                newest = max(newest, sink.newest_version(target))
    return epoch_of(newest)


def _why_to_load(load: TableLoad | None, epoch: int, fingerprint: str, *, reload: bool) -> str | None:
    if load is None:
        return FIRST_LOAD
    if load.epoch != epoch:
        return "the epoch rose"
    if reload:
        return "it was asked for"
    if load.fingerprint != fingerprint:
        return "its columns changed, or where its documents go"
    return None


def why_lost(
    place: CapturePosition, known: PipelineState, identity: SourceIdentity, found: Confirmed | None
) -> str | None:
    """Return why changes may have been lost since the pipeline's state was saved; None: they were not."""
    if (known.system_identifier, known.timeline) != identity:
        return "the source is another server, or was promoted or restored"
    if found is None:
        return f"{place.name} is gone" if known.slot_lsn is not None else None
    if found.lost is not None:
        return found.lost
    confirmed, most = found.position, known.confirmed_most
    if confirmed is not None and most is not None and confirmed > most:
        return (
            f"{place.name} is at {place.text(confirmed)}, and this pipeline confirmed nothing beyond"
            f" {place.text(most)}: it was dropped and made anew, or advanced by hand"
        )
    return None


def slot_missing(spec: PipelineSpec, why: str) -> str:
    """Return what is to be said when changes may have been lost: why, and what to type."""
    return (
        f"Changes may have been lost: {why}. Type `{new_slot_command(spec)}` to begin a new epoch:"
        " every table is loaded again, and documents of rows that are gone are removed."
    )


def check_slot(spec: PipelineSpec, reader: SourceReader, state: StateStore) -> None:
    """Raise SlotMissing unless the slot is there and goes on where the pipeline's state was.

    Called before each start of the capture. What the last one confirmed lies below a bound that was saved before it did
    so, however it ended: a slot beyond that bound is not as this pipeline left it. Where no bound is kept (Kafka, where
    a connector in another process confirms), only a slot that is gone or invalidated is noticed.
    """
    known = state.pipeline(spec.name)
    assert known is not None, "prepare_source saved it"
    place = reader.capture_position(spec)
    wrong = why_lost(place, known, reader.identity(), place.look())
    if wrong is not None:
        raise SlotMissing(slot_missing(spec, wrong))
