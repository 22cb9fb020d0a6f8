"""A pipeline run dry: what it would write for some rows, and what is there now. Nothing is written anywhere."""

from __future__ import annotations

import binascii
import datetime as dt
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import orjson

from delta_sync.changes import Change, Key
from delta_sync.delta_event import decode_event
from delta_sync.errors import PipelineStopped, Transient, UndecodableChange, Unstorable, UsageError
from delta_sync.generations import Generations, open_generations
from delta_sync.lookups import asked_by_a_person
from delta_sync.pipeline import Pipeline, check_columns
from delta_sync.processing import process
from delta_sync.shaping import masked_again
from delta_sync.sinks import AnySink
from delta_sync.sinks.base import Stored, Target
from delta_sync.sources.codec import parse_json
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.starting import targets_of_table
from delta_sync.tables import Column, Kind, Table, key_of_parts, key_text
from delta_sync.values import Document, Interval, Row, to_json
from delta_sync.verifying import differing

AVRO_MARKER = b"\xc3\x01"  # with which a Delta event in its own encoding begins

Effect = Literal["created", "changed", "same", "removed", "absent", "stale", "failed", "rejected", "unknown"]


class Tried(NamedTuple):
    """What would become of one row in one sink (None: it fails before any). `fields` are those that differ."""

    table: str
    key: str
    sink: str | None
    effect: Effect
    document: dict[str, Any] | None = None
    stored: dict[str, Any] | None = None
    fields: tuple[str, ...] = ()
    note: str = ""


def effect_of(document: dict[str, Any] | None, stored: Stored | None, version: int | None) -> Effect:
    """Return what a write would do to what is there; `version` is that of a recorded change. Pure."""
    there = None if stored is None else stored.document
    if stored is not None and version is not None and stored.version > version:
        return "stale"
    if document is None:
        return "absent" if there is None else "removed"
    if there is None:
        return "created"
    return "changed" if differing(document, there) else "same"


def rows_of_keys(reader: SourceReader, table: Table, keys: Sequence[Key]) -> list[Change]:
    """Return the rows of some keys as they are in the source now, as changes; a row that is not there is a delete."""
    rows: dict[Key, Row | None] = {}
    left = list(dict.fromkeys(keys))
    while left:
        chunk = reader.read_keys(table, left, lambda _: True)
        assert chunk is not None, "every snapshot will do"
        rows.update(dict(chunk.rows))
        if chunk.last_key is None:
            break
        left = [key for key in left if key not in rows]
    return [Change(table.id, key, 0, rows.get(key)) for key in dict.fromkeys(keys)]


def recorded_changes(data: bytes, tables: Mapping[str, Table], where: str) -> dict[str, list[Change]]:
    """Return the changes of a file: a Delta event in its own encoding, or, one a line, as `dead show --json` has them.

    Raises UsageError saying which line is wrong.
    """
    found: dict[str, list[Change]] = {}
    for place, change in _changes(data, tables, where):
        if change.table not in tables:
            raise UsageError(f"{place}: the pipeline has no table {change.table}; it has {', '.join(tables)}.")
        found.setdefault(change.table, []).append(masked_again(tables[change.table], change))
    return found


def _changes(data: bytes, tables: Mapping[str, Table], where: str) -> Iterator[tuple[str, Change]]:
    if data.startswith(AVRO_MARKER):
        try:
            change = decode_event(data).change
        except UndecodableChange as error:
            raise UsageError(f"{where}: {error}") from error
        if change is None:
            raise UsageError(f"{where} holds a change that could not be decoded, so there is no row in it.")
        yield where, change
        return
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            place = f"{where} line {number}"
            try:
                yield place, _change_of_json(line, tables)
            except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
                reason = "the pipeline has no such table" if isinstance(error, KeyError) else str(error)
                raise UsageError(
                    f"{place} is no Delta event as `deltactl dead show --json` has it: {reason}."
                ) from error


def _change_of_json(line: bytes, tables: Mapping[str, Table]) -> Change:
    data = cast("dict[str, Any]", parse_json(line))
    data = data.get("event", data)
    table = tables[data["table"]]
    key = tuple(value_of_json(table.column(name), part) for name, part in zip(table.key, data["key"], strict=True))
    row = data.get("row")
    if row is None and data.get("op") != "delete":
        raise ValueError("it is an upsert without a row")
    names = {column.name for column in table.columns}
    unknown = next((name for name in row or () if name not in names), None)
    if unknown is not None:
        raise ValueError(f"the table has no column {unknown}")
    read = None if row is None else {c.name: value_of_json(c, row.get(c.name)) for c in table.columns}
    return Change(table.id, key, int(data.get("version", 0)), read)


def value_of_json(column: Column, value: Any) -> Any:
    """Return a column's value of what JSON has for it. Raises ValueError and the like."""
    if value is None:
        return None
    if column.dimensions:
        inner = column._replace(dimensions=column.dimensions - 1)
        return [value_of_json(inner, part) for part in value]
    if column.mask is not None and isinstance(value, str):
        return value  # what a mask has made of it
    match column.kind:
        case Kind.BYTES:
            return binascii.a2b_base64(value)
        case Kind.INTERVAL:
            return _interval(value)
        case Kind.FLOAT:
            return float(value)
        case Kind.BOOLEAN | Kind.INTEGER | Kind.TEXT | Kind.JSON | Kind.MAP:
            return value
        case _:
            alone = Table("", "", (column,), (column.name,))
            (read,) = key_of_parts(alone, [str(value)])
            return read


_INTERVAL = re.compile(r"P(?:(-?\d+)Y)?(?:(-?\d+)M)?(?:(-?\d+)D)?(?:T(?:(-?\d+)H)?(?:(-?\d+)M)?(?:(-?[\d.]+)S)?)?")


def _interval(text: str) -> Interval:
    match = _INTERVAL.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no interval")
    years, months, days, hours, minutes = (int(part or 0) for part in match.groups()[:5])
    time_ = dt.timedelta(hours=hours, minutes=minutes, seconds=float(match[6] or 0))
    return Interval(years * 12 + months, days, time_ // dt.timedelta(microseconds=1))


def try_changes(
    pipeline: Pipeline,
    spec: PipelineSpec,
    tables: Mapping[str, Table],
    changes: Mapping[str, Sequence[Change]],
    generations: Mapping[str, Generations],
    *,
    recorded: bool,
) -> list[Tried]:
    """Return what would become of changes, for each in each of its sinks. `recorded`: they have versions that count.

    Look-ups are asked. Raises LookupBusy when one has not answered for some time, UsageError as a run does.
    """
    check_columns(pipeline, tables)
    sinks = open_generations(spec, generations)
    tried: list[Tried] = []
    try:
        with asked_by_a_person(pipeline.lookups) as lookups:
            for name, some in changes.items():
                targets = targets_of_table(pipeline, sinks, tables[name], spec)
                for processor, names in pipeline.made_by(name, targets):
                    processed = process(tables[name], processor, some, lookups)
                    of = [None] if len(names) == len(targets) else names
                    tried += [
                        Tried(
                            name, key_text(item.change.key), sink, "failed", note=f"at stage {item.stage}: {item.error}"
                        )
                        for item in processed.failures
                        for sink in of
                    ]
                    made = [
                        (write.key, write.document, write.version if recorded else None) for write in processed.writes
                    ]
                    for sink in names:
                        tried += _compared(sinks[sink], targets[sink], made)
    finally:
        for one in sinks.values():
            one.close()
    return tried


def _compared(
    sink: AnySink, target: Target, made: Sequence[tuple[Key, Document | None, int | None]]
) -> Iterator[Tried]:
    unread = ""
    found: Sequence[Stored | None] = [None] * len(made)
    try:
        found = sink.read(target, [key for key, _, _ in made])
    except (Transient, PipelineStopped) as error:
        unread = f"what is there cannot be read: {error}"
    for (key, document, version), stored in zip(made, found, strict=True):
        where = (target.table.id, key_text(key), sink.name)
        try:
            form = None if document is None else sink.stored_form(target, document)
        except Unstorable as error:
            yield Tried(*where, "rejected", note=str(error))
            continue
        there = None if stored is None else stored.document
        fields = tuple(differing(form or {}, there or {}))
        effect = "unknown" if unread else effect_of(form, stored, version)
        yield Tried(*where, effect, form, there, fields, unread)


def as_json(tried: Tried) -> dict[str, Any]:
    """Return what a program is told of it. Pure."""
    return {**tried._asdict(), "fields": list(tried.fields)}


def lines_of(tried: Tried) -> list[str]:
    """Return what a person is shown: a document's fields, with what is there where it differs. Pure."""
    where = f" in {tried.sink}" if tried.sink is not None else ""
    lines = [f"{tried.table} {tried.key}{where}: {tried.effect}{f' ({tried.note})' if tried.note else ''}"]
    document, stored = tried.document or {}, tried.stored or {}
    for name in dict.fromkeys([*document, *stored]):
        if name not in tried.fields:
            lines.append(f"    {name}: {_shown(document[name])}")
            continue
        lines += [f"  - {name}: {_shown(stored[name])}"] if name in stored else []
        lines += [f"  + {name}: {_shown(document[name])}"] if name in document else []
    return lines


def _shown(value: Any) -> str:
    try:
        return to_json(value).decode()
    except (TypeError, orjson.JSONEncodeError):  # what only a store's own format has
        return str(value)
