"""What is made sure of at the source before a pipeline streams: publication, slot, and the epoch of its positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import structlog

from delta_sync.errors import SlotMissing, UsageError
from delta_sync.sinks import AnySink, targets_of
from delta_sync.sources.postgresql.reader import PostgresReader, SlotState, SourceIdentity
from delta_sync.spec import PipelineSpec
from delta_sync.state import PipelineState, StateStore
from delta_sync.tables import Table
from delta_sync.versions import epoch_of

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


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
    """Return an epoch above that of all that is in the sinks already: the state store may have been lost.

    A table whose rows are all gone has no document there, and yet tombstones and a floor that would keep new rows out.
    """
    newest = 0
    for sink, targets in targets_of(sinks.values(), tables.values(), spec):
        for target in targets:
            sink.prepare(target)
            newest = max(newest, sink.newest_version(target))
    return epoch_of(newest) + 1
