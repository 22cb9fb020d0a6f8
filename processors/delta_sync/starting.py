"""What is made sure of at the source before a pipeline streams: publication, slot, and the epoch of its positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from delta_sync import documents
from delta_sync.dumping import FIRST_LOAD
from delta_sync.errors import EpochRose, SlotMissing, SourceBusy, UsageError
from delta_sync.logs import logger
from delta_sync.pipeline import Pipeline, check_columns
from delta_sync.sinks import AnySink, base_name, store_of, target_for
from delta_sync.sinks.base import Target
from delta_sync.sources.postgresql.checks import new_slot_command
from delta_sync.sources.reader import CapturePosition, Confirmed, SourceIdentity, SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.state import Lease, PipelineState, StateStore, TableLoad
from delta_sync.state_connector import ConnectorState
from delta_sync.tables import Table
from delta_sync.versions import epoch_of, epoch_of_term

log = logger(__name__)

Delivered = Callable[[int], int | None]  # `kafka.delivered.Delivered`: by epoch, the position that may be confirmed


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
    delivered: Delivered | None = None,
) -> Source:
    """Make sure that publication and slot exist, decide the epoch, and note which tables are to be loaded.

    A slot that is gone, or a source with another history, means that changes may have been lost. Then the epoch rises,
    and everything is loaded again, if that is for Delta to decide (`why_not_by_itself`) or `new_slot` accepts it; if
    not, it is SlotMissing. `reload` has everything loaded again, too. With a lease, everything is saved under it:
    LeaseLost when another process decides by now. `delivered` is for Kafka, where the connector confirms by itself;
    without, what is confirmed is bounded in the state store (see `confirming`).

    It may be killed between any two steps: the epoch is saved before anything is done in its name, loads of an older
    one are loaded again whatever is saved of them, and the slot is the last; so the next start finds the loss once
    more, or goes on where this one was.
    """
    found = reader.fingerprints(list(spec.tables))  # before the tables: what changes between the two is noticed later
    tables = read_tables(spec, reader)
    columns = {name: found.get(name, "") for name in tables}
    check_columns(pipeline, tables)
    place = reader.capture_position(spec, state)
    seen = look(spec, reader, state, delivered)
    known, there = seen.known, seen.there
    found_state = known or PipelineState(spec.name, 0, *seen.identity)
    loss = find_loss(seen)
    if loss is not None and not new_slot:
        why_not = why_not_by_itself(spec, loss, state.loads(spec.name))
        if why_not is not None:
            raise SlotMissing(slot_missing(spec, loss, why_not))
    if known is None or loss is not None:
        known = PipelineState(spec.name, found_state.epoch + 1, *seen.identity)
    if loss is not None:
        log.warning("epoch_rises", reason=loss.why, epoch=known.epoch)
        place.drop()
        there = None
    if delivered is not None:  # what an embedded run had saved as a bound counts no longer; the slot's position does
        known = known._replace(confirmed_most=None, slot_lsn=there.position if there is not None else None)
        ConnectorState(state, spec.name).clear()  # nor does a position: Kafka's goes on without it
    loaded = {name: table for name, table in tables.items() if name in pipeline.tables}
    targets = {name: targets_of_table(pipeline, sinks, table, spec) for name, table in loaded.items()}
    loads = state.loads(spec.name)
    newest = _newest_epoch_of_others(loads, targets, sinks)
    if newest >= known.epoch:
        log.warning("epoch_rises", reason="a place holds what was written before", epoch=newest + 1)
        known = known._replace(epoch=newest + 1)
    state.save_pipeline(known, lease)
    for name in loads.keys() - loaded.keys():
        # Added again later, it must be loaded again: its changes are not captured now.
        state.forget_load(spec.name, name, lease)
    for name, table in loaded.items():
        fingerprint = load_fingerprint(documents.fingerprint(table, columns), targets[name], sinks)
        reason = _why_to_load(loads.get(name), known.epoch, fingerprint, reload=reload)
        if reason is not None:
            state.begin_load(
                spec.name, TableLoad(name, reason=reason, epoch=known.epoch, fingerprint=fingerprint), lease
            )
    place.publish(list(tables.values()))
    if there is None:
        position = place.create()
        if delivered is None:
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
    """Return where a table's documents go, by sink, in every generation; nowhere, for a part of others' alone."""
    if table.id not in pipeline.tables:
        return {}
    to = pipeline.tables[table.id].to
    return {name: target_for(sink, table, spec) for name, sink in sinks.items() if not to or base_name(name) in to}


def targets_of_sink(pipeline: Pipeline, sink: AnySink, tables: Iterable[Table], spec: PipelineSpec) -> list[Target]:
    """Return where the documents of all tables go that go to this sink."""
    of_tables = (targets_of_table(pipeline, {sink.name: sink}, table, spec) for table in tables)
    return [target for some in of_tables for target in some.values()]


def load_fingerprint(columns: str, targets: Mapping[str, Target], sinks: Mapping[str, AnySink]) -> str:
    """Return what a load was made for, as text: the table's columns, and a line for each place that it filled."""
    return "\n".join([columns, *_places(targets, sinks)])


def _places(targets: Mapping[str, Target], sinks: Mapping[str, AnySink]) -> dict[str, tuple[AnySink, Target]]:
    def named(sink: AnySink, target: Target) -> str:
        # Versions of documents from several tables are of another kind: a place that had others is not the same.
        return f"{store_of(sink.url)} {target.place}{' by clock' if target.table.is_document else ''}"

    return {named(sinks[name], target): (sinks[name], target) for name, target in sorted(targets.items())}


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


class Seen(NamedTuple):
    """What source, state store and Kafka said, asked in the order that comparing them needs; see `look`.

    `there` is where the connector goes on, in `place`. `most` is a position beyond which this pipeline confirmed
    nothing, None: not known. `end` is where the log ends, as far as no crash takes it back.
    """

    identity: SourceIdentity
    place: CapturePosition
    there: Confirmed | None
    known: PipelineState | None
    most: int | None
    end: int


class Loss(NamedTuple):
    """Why changes may have been lost since the pipeline's state was saved.

    `foreign`: the source may not be the database that it was, or be behind it. `overtaken`: it removed log that was
    still needed, which it may do again.
    """

    why: str
    foreign: bool = False
    overtaken: bool = False


def look(spec: PipelineSpec, reader: SourceReader, state: StateStore, delivered: Delivered | None = None) -> Seen:
    """Ask source, state store and Kafka (`delivered`, where it is asked for).

    While a connector runs, each is ahead of the one before: the slot, what may be confirmed, the end of the log.
    """
    identity = reader.identity()
    place = reader.capture_position(spec, state)
    there = place.look()
    known = state.pipeline(spec.name)
    most = None
    if known is not None and delivered is not None:
        newest = delivered(known.epoch)
        if newest is not None and known.slot_lsn is not None:  # where it was when the last connector was started
            most = max(newest, known.slot_lsn, known.confirmed_most or 0)
    elif known is not None:
        most = known.confirmed_most
    return Seen(identity, place, there, known, most, reader.durable_end())


def find_loss(seen: Seen) -> Loss | None:
    """Return why changes may have been lost; None: they were not. Asks nobody."""
    known, identity, place, there = seen.known, seen.identity, seen.place, seen.there
    if known is not None and known.system_identifier != identity.system_identifier:
        return Loss(
            f"the source is another server than before: it is {identity.system_identifier}, and was"
            f" {known.system_identifier}",
            foreign=True,
        )
    if known is not None and identity.timeline < known.timeline:
        return Loss(
            f"the source is on timeline {identity.timeline}, and was on {known.timeline}: a server that a failover had"
            " left behind is back, or a backup that is older",
            foreign=True,
        )
    if known is not None and identity.timeline > known.timeline:
        return Loss(
            f"the source was promoted or restored: it is on timeline {identity.timeline}, and was on {known.timeline}"
        )
    if known is not None and known.lost is not None:
        return Loss(known.lost)
    if there is None:
        missing = known is not None and known.slot_lsn is not None
        return Loss(f"{place.name} is gone") if missing else None
    if there.lost is not None:
        return Loss(there.lost, overtaken=there.overtaken)
    reached = max((known.slot_lsn or 0) if known is not None else 0, seen.most or 0)
    if seen.end < reached:
        return Loss(
            f"the source's log ends at {place.text(seen.end)}, and had reached {place.text(reached)}: {place.ways_back}"
            ", or crashed without having written what it said it had"
        )
    if there.position is not None and seen.most is not None and there.position > seen.most:
        return Loss(
            f"{place.name} is at {place.text(there.position)}, and this pipeline confirmed nothing beyond"
            f" {place.text(seen.most)}: it was dropped and made anew, or advanced by hand"
        )
    return None


def why_not_by_itself(spec: PipelineSpec, loss: Loss, loads: Mapping[str, TableLoad]) -> str | None:
    """Return why a new epoch is not for Delta to begin after a loss; None: it is. Pure.

    A new epoch makes the stores what the source is now, and removes what the source lacks. Delta does so by itself
    only where the source is surely the database that it was, or comes from it.
    """
    if spec.source.on_lost_log == "stop":
        return "source.on_lost_log is stop"
    if loss.foreign:
        return "it may be the wrong server, and what it lacks would be removed from every sink"
    if loss.overtaken and any(load.state != "done" for load in loads.values()):
        return (
            "the load after the last loss has not ended yet, and would be overtaken again: raise max_slot_wal_keep_size"
            " (MariaDB: binlog_expire_logs_seconds)"
        )
    return None


def slot_missing(spec: PipelineSpec, loss: Loss, why_not: str) -> str:
    """Return what is to be said when changes may have been lost, and Delta stops: why, and what to type."""
    return (
        f"Changes may have been lost: {loss.why}. Delta does not go on by itself, because {why_not}."
        f" Type `{new_slot_command(spec)}` to begin a new epoch:"
        " every table is loaded again, and documents of rows that are gone are removed."
    )


def check_slot(spec: PipelineSpec, reader: SourceReader, state: StateStore, delivered: Delivered | None = None) -> Seen:
    """Return what was seen if the slot is there and goes on where the pipeline's state was.

    Raises EpochRose when a new epoch has to begin, which `prepare_source` does, or SlotMissing when that is not for
    Delta to decide. Called before each start of the capture, and every so often beside it. It connects anew, because
    what counts is where the source's name leads to now: an old connection may last for as long as an old server does.

    Where the connector confirms what this process allows, that lies below a bound which was saved before, however it
    ended; with Kafka, the connector confirms what Kafka has acknowledged, and `delivered` tells how far that is. A slot
    beyond the bound is not as this pipeline left it. On Kafka without `delivered` that is not looked at.
    """
    reader.close()
    seen = look(spec, reader, state, delivered)
    assert seen.known is not None, "prepare_source saved it"
    loss = find_loss(seen)
    if loss is not None:
        why_not = why_not_by_itself(spec, loss, state.loads(spec.name))
        if why_not is not None:
            raise SlotMissing(slot_missing(spec, loss, why_not))
        if not seen.place.evidence_lasts:
            state.note_loss(spec.name, seen.known.epoch, loss.why)
        raise EpochRose(f"A new epoch has to begin: {loss.why}.")
    return seen


# ── sources that Delta knows by their connector alone ────────────────────────────────────────────────────────────


def prepare_signalled(
    spec: PipelineSpec,
    pipeline: Pipeline,
    reader: SourceReader,
    state: StateStore,
    sinks: Mapping[str, AnySink],
    *,
    new_slot: bool,
    reload: bool,
    lease: Lease,
) -> Source:
    """Decide the epoch, and note which tables are to be loaded, as `prepare_source` does, where changes have no
    position but their place in a topic.

    Its tables are those of which a record has come. A load of another has no fingerprint yet, and is compared by none.
    """
    columns = reader.fingerprints(list(spec.tables))
    tables = reader.tables(list(spec.tables))
    check_columns(pipeline, tables)
    seen = look(spec, reader, state)
    known = seen.known
    loss = find_loss(seen)
    if loss is not None and not new_slot:
        why_not = why_not_by_itself(spec, loss, state.loads(spec.name))
        if why_not is not None:
            raise SlotMissing(slot_missing(spec, loss, why_not))
    if known is None or loss is not None or new_slot:
        known = PipelineState(spec.name, (known.epoch if known else 0) + 1, *seen.identity)
    if loss is not None or new_slot:
        log.warning("epoch_rises", reason=loss.why if loss else "it was asked for", epoch=known.epoch)
        seen.place.drop()
    targets = {name: targets_of_table(pipeline, sinks, table, spec) for name, table in tables.items()}
    loads = state.loads(spec.name)
    newest = _newest_epoch_of_others(loads, targets, sinks)
    if newest >= known.epoch:
        log.warning("epoch_rises", reason="a place holds what was written before", epoch=newest + 1)
        known = known._replace(epoch=newest + 1)
    if epoch_of_term(lease.token) > known.epoch:
        known = known._replace(epoch=epoch_of_term(lease.token))
        log.warning("epoch_rises", reason="sidecars have taken over 4,096 times", epoch=known.epoch)
    state.save_pipeline(known, lease)
    for name in loads.keys() - pipeline.tables.keys():
        state.forget_load(spec.name, name, lease)
    for name in pipeline.tables:
        fingerprint = load_fingerprint(columns[name], targets[name], sinks) if name in tables else ""
        load = loads.get(name)
        compared = load.fingerprint if load is not None and not (load.fingerprint and fingerprint) else fingerprint
        reason = _why_to_load(load, known.epoch, compared, reload=reload)
        if reason is not None:
            state.begin_load(
                spec.name, TableLoad(name, reason=reason, epoch=known.epoch, fingerprint=fingerprint), lease
            )
    return Source(known.epoch, tables, columns)


def fill_fingerprints(
    spec: PipelineSpec,
    pipeline: Pipeline,
    state: StateStore,
    sinks: Mapping[str, AnySink],
    tables: Mapping[str, Table],
    columns: Mapping[str, str],
) -> None:
    """Record what the loads are for that were begun before their tables were known, before anything is written of them.

    Where something is there already, with versions that these changes would not outrank, a new epoch has to begin.
    """
    known, loads = state.pipeline(spec.name), state.loads(spec.name)
    assert known is not None, "the sidecar saved it"
    new = {name: table for name, table in tables.items() if name in loads and not loads[name].fingerprint}
    targets = {name: targets_of_table(pipeline, sinks, table, spec) for name, table in new.items()}
    newest = _newest_epoch_of_others(loads, targets, sinks)
    if newest >= known.epoch:
        state.raise_epoch(spec.name, newest + 1)
        raise SourceBusy("A place holds what was written before, so the sidecar is to begin a new epoch.")
    for name in new:
        state.fill_fingerprint(spec.name, name, load_fingerprint(columns[name], targets[name], sinks))
