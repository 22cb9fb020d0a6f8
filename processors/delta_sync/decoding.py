"""From Debezium events to the newest change of each key. Pure: no I/O, nothing kept between batches."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import orjson

from delta_sync.changes import Change, Key
from delta_sync.documents import Watch
from delta_sync.errors import UndecodableChange
from delta_sync.events import Op, RowEvent
from delta_sync.tables import Table
from delta_sync.values import Row
from delta_sync.versions import POSITION_BITS

Event = dict[str, Any]
"""Debezium's envelope: before, after, source, op. It has `unsure` when a value of `after` may stand for NULL."""

Image = dict[str, Any]  # its before or after: column name → value as the event carries it


class TableCodec(NamedTuple):
    """How one table's events are read.

    `row` turns an image into a row, in place; `key` reads the key's columns out of any image. Both raise
    UndecodableChange. `lacks` tells whether an image lacks a value that the row has: then the row is read by its key.
    `missing` names the columns of which that may be so.
    """

    table: Table
    row: Callable[[Image], Row]
    key: Callable[[Image], Key]
    lacks: Callable[[Image], bool]
    missing: Callable[[Image], Sequence[str]] = lambda _: ()


class Lacking(NamedTuple):
    """A change whose event lacks a value, or does not fit the table as it is now: its row is to be read by key."""

    table: str
    key: Key
    version: int
    xid: int


class Undecodable(NamedTuple):
    """An event from which not even the key can be read, or a record that is none: then `key` says where it is."""

    table: str
    version: int
    event: Mapping[str, object]
    error: UndecodableChange
    key: Key = ()


class Stretch(NamedTuple):
    """Some events in the order of the log, all of one epoch, and what could not even be read as an event."""

    epoch: int
    events: Sequence[Event]
    undecodable: Sequence[Undecodable] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Watching:
    """A watch on a table's changes, for documents of a root, and how its columns' values are read out of an image."""

    root: str
    watch: Watch
    values: Callable[[Image], Key]


class Touched:
    """Which values the changes of some batches had in columns that lead to documents, before and after each.

    `by_watch` has the values, by the document's root and the watch; `seen` the transactions of which a snapshot has to
    show all, each with its last version. `emptied` are tables that were truncated, and `blind` those of which an event
    does not tell what the row was before, though it should.
    """

    def __init__(self) -> None:
        self.by_watch: dict[Watching, set[Key]] = {}
        self.seen: dict[int, int] = {}
        self.emptied: set[str] = set()
        self.blind: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.by_watch or self.emptied or self.blind)


class Decoded(NamedTuple):
    """What some batches hold: by table, the newest change per key; truncates; the newest heartbeat; row events."""

    changes: dict[str, list[Change]]
    lacking: dict[str, list[Lacking]]
    truncates: dict[str, int]  # table → version
    undecodable: list[Undecodable]
    heartbeat_lsn: int | None
    oldest_ts_ms: int | None  # of the oldest change: when its transaction committed (heartbeats: were sent)
    events: int
    misfits: frozenset[str]  # tables of which an event has other columns than the catalogue had
    each: Sequence[RowEvent] = ()  # every change of the tables of which that is wanted, in the log's order
    touched: Touched | None = None  # of the tables that are watched; None: no change of theirs

    def reads_rows_of(self, other: Decoded) -> bool:
        """Tell whether a row that is to be read by its key is read for the other batches, too."""
        return any(
            not {item.key for item in lacking}.isdisjoint(item.key for item in other.lacking.get(table, ()))
            for table, lacking in self.lacking.items()
        )


ReadAhead = Callable[[Key, int], bool]
"""Whether a row was read by its key after the change of it with this version: then the sink may show a newer one."""


def decode(
    stretches: Iterable[Stretch],
    codecs: Mapping[str, TableCodec],
    heartbeat_prefix: str,
    read_ahead: Mapping[str, ReadAhead] | None = None,
    each_of: Collection[str] = (),
    watched: Mapping[str, Sequence[Watching]] = MappingProxyType({}),
    parts_only: Collection[str] = (),
) -> Decoded:
    """Return the newest change per key of some stretches of the log, given in its order; and each of some tables.

    Of an event that is not the newest of its key nothing but the key is looked at. Events of tables without a codec
    are left out: the table was removed from the pipeline. A row that was read ahead, by table, counts as lacking.
    Of tables that are `watched`, by table, it is noted what leads to documents; nothing else of those that are
    `parts_only`.
    """
    newest: dict[str, dict[Hashable, Versioned]] = {table: {} for table in codecs if table not in parts_only}
    raw_keys = {table: _raw_key(codec.table.key) for table, codec in codecs.items()}
    truncates: dict[str, int] = {}
    heartbeat_lsn: int | None = None
    oldest_ts_ms: int | None = None
    count = 0
    undecodable: list[Undecodable] = []
    each: list[RowEvent] = []
    touched = Touched()
    for epoch, events, broken in stretches:
        undecodable += broken
        base = epoch << POSITION_BITS
        count += len(events)
        for event in events:
            source = event["source"]
            op = event["op"]
            if op == "m":
                count -= 1
                if event["message"]["prefix"] == heartbeat_prefix:
                    heartbeat_lsn = max(source["lsn"], heartbeat_lsn or 0)
                continue
            table = source["schema"] + "." + source["table"]
            if table not in codecs:
                continue
            version = base | source["lsn"]
            watching = watched.get(table)
            if watching is not None:
                _touch(touched, table, watching, event, version, undecodable)
            keys = newest.get(table)
            if op == "t":
                if keys is not None:
                    _truncate(keys, version)
                    truncates[table] = max(version, truncates.get(table, 0))
                continue
            if table in each_of:
                try:
                    each.append(_row_event(codecs[table], version, event))
                except UndecodableChange as error:
                    undecodable.append(Undecodable(table, version, event, error))
            if keys is None:
                continue
            key = raw_keys[table](event["after"] or event["before"])
            known = keys.get(key)
            if known is None or known[0] <= version:
                keys[key] = version, event
        if events:
            first_ts_ms = events[0]["source"]["ts_ms"]
            oldest_ts_ms = first_ts_ms if oldest_ts_ms is None else min(first_ts_ms, oldest_ts_ms)
    changes: dict[str, list[Change]] = {}
    lacking: dict[str, list[Lacking]] = {}
    misfits: set[str] = set()
    for table, keys in newest.items():
        if keys:
            codec = codecs[table]
            ahead = read_ahead.get(table) if read_ahead else None
            fits = _decode_table(codec, keys.values(), ahead, changes, lacking, undecodable)
            if not fits:
                misfits.add(table)
    return Decoded(
        changes,
        lacking,
        truncates,
        undecodable,
        heartbeat_lsn,
        oldest_ts_ms,
        count,
        frozenset(misfits),
        tuple(each),
        touched or None,
    )


def _touch(
    touched: Touched,
    table: str,
    watching: Sequence[Watching],
    event: Event,
    version: int,
    undecodable: list[Undecodable],
) -> None:
    """Note what a change says about documents."""
    source = event["source"]
    xid = source["txId"] or 0
    touched.seen[xid] = max(version, touched.seen.get(xid, 0))
    if event["op"] == "t":
        touched.emptied.add(table)
        return
    before, after = event["before"], event["after"]
    for one in watching:
        watch = one.watch
        known = touched.by_watch.setdefault(one, set())
        for image in (before, after):
            if image is None:
                if image is before and event["op"] == "u" and watch.needs_before:
                    touched.blind.add(table)
                continue
            if any(image.get(name) is None for name in watch.columns):
                if image is before and any(
                    image.get(name) is None and not watch.table.column(name).nullable for name in watch.columns
                ):
                    touched.blind.add(table)
                continue  # it belongs to none
            try:
                known.add(one.values(image))
            except UndecodableChange as error:
                undecodable.append(Undecodable(table, version, event, error))


_OPS: Mapping[str, Op] = {"c": "insert", "u": "update", "d": "delete"}


def _row_event(codec: TableCodec, version: int, event: Event) -> RowEvent:
    """Return an event as handlers see it. Raises UndecodableChange: not even its key can be read.

    Its images stay as they are: they are decoded once more, in place, for the document.
    """
    table, after, before = codec.table, event["after"], event["before"]
    key = codec.key(before if after is None else after)
    decoded_before, _ = (None, ()) if before is None else _partial(codec, before)
    if decoded_before is not None and all(
        value is None for name, value in decoded_before.items() if name not in table.key
    ):
        decoded_before = None  # the log has the key alone, and Debezium writes NULL for the rest
    decoded_after, missing = (None, list[str]()) if after is None else _partial(codec, after)
    if decoded_after is not None and decoded_before is not None:
        decoded_after |= {name: decoded_before[name] for name in missing if name in decoded_before}
        missing = [name for name in missing if name not in decoded_before]
    at = dt.datetime.fromtimestamp(event["source"]["ts_ms"] / 1000, dt.UTC)
    op = _OPS.get(event["op"], "update")
    return RowEvent(table.id, key, version, op, decoded_before, decoded_after, at, tuple(missing))


def _partial(codec: TableCodec, image: Image) -> tuple[Row, list[str]]:
    """Return what a copy of an image has of a row, and the columns that it does not have."""
    columns = [column.name for column in codec.table.columns]
    missing = [name for name in columns if name not in image]
    missing += [name for name in codec.missing({**dict.fromkeys(columns), **image}) if name not in missing]
    try:
        row = codec.row({**dict.fromkeys(columns), **{n: v for n, v in image.items() if n not in missing}})
    except UndecodableChange:  # retyped since: of which column is not known
        return {}, columns
    return {name: value for name, value in row.items() if name not in missing}, missing


Versioned = tuple[int, Event]


def _truncate(keys: dict[Hashable, Versioned], version: int) -> None:
    """Drop what is older. What is newer stays: the connector may deliver a stretch of the log twice."""
    newer = {key: versioned for key, versioned in keys.items() if versioned[0] > version}
    keys.clear()
    keys.update(newer)


def _decode_table(
    codec: TableCodec,
    events: Iterable[Versioned],
    ahead: ReadAhead | None,
    changes: dict[str, list[Change]],
    lacking: dict[str, list[Lacking]],
    undecodable: list[Undecodable],
) -> bool:
    """Sort one table's events into changes, lacking and undecodable; return whether all had the table's columns."""
    table = codec.table.id
    columns = {column.name for column in codec.table.columns if column.in_log}
    all_columns = {column.name for column in codec.table.columns}
    to_row, to_key, lacks = codec.row, codec.key, codec.lacks
    # What a NamedTuple's own does, without its call of a Python function.
    new = cast("Callable[..., Change]", tuple.__new__)  # pyright: ignore[reportUnknownMemberType] -- typeshed's is generic
    good: list[Change] = []
    bad: list[Lacking] = []
    all_fit = True
    for version, event in events:
        image = event["after"]
        try:
            key = to_key(event["before"] if image is None else image)
        except UndecodableChange as error:
            undecodable.append(Undecodable(table, version, event, error))
            continue
        if ahead is not None and ahead(key, version):
            bad.append(Lacking(table, key, version, event["source"]["txId"]))
            continue
        if image is None:
            good.append(Change(table, key, version, None))
            continue
        fits = image.keys() == columns or columns <= image.keys() <= all_columns
        all_fit = all_fit and fits
        if fits and not lacks(image) and "unsure" not in event:
            try:
                good.append(new(Change, (table, key, version, to_row(image))))
                continue
            except UndecodableChange:
                all_fit = False  # retyped since: the row itself, read by key, has the new type
        bad.append(Lacking(table, key, version, event["source"]["txId"]))
    if good:
        changes[table] = good
    if bad:
        lacking[table] = bad
    return all_fit


_UNHASHABLE = (list, dict)  # of the types that JSON has


def _raw_key(key: tuple[str, ...]) -> Callable[[Image], Hashable]:
    """Return a function from an image to something by which the same key is recognised, cheaply."""
    if len(key) == 1:
        name = key[0]

        def single(image: Image) -> Hashable:
            value = image[name]
            return orjson.dumps(value) if type(value) in _UNHASHABLE else value

        return single
    several = cast("Callable[[Image], tuple[Any, ...]]", itemgetter(*key))

    def composite(image: Image) -> Hashable:
        values = several(image)
        try:
            hash(values)
        except TypeError:
            return orjson.dumps(values)
        return values

    return composite
