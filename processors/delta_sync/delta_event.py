"""The Delta event: the common form of a change, for all that Delta itself keeps or sends (dead letters, topics).

It is Avro in its single-object encoding: the fingerprint of the writer's schema stands before the datum, so an event
stays readable when the schema evolves (`delta_schemas`). Rows survive without loss: what is decoded equals what was
encoded and has the same type. Only an aware datetime changes: it comes back in UTC, as every row has it anyway.
"""

from __future__ import annotations

import datetime as dt
import decimal
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import fastavro

import delta_schemas
from delta_schemas import FINGERPRINT_BYTES, SINGLE_OBJECT, Schema
from delta_sync.changes import Change, Key
from delta_sync.errors import UndecodableChange
from delta_sync.values import Interval, Row

Origin = Literal["log", "load", "replay"]


class DeltaEvent(NamedTuple):
    """One change as Delta keeps it. `at` (aware) is when Delta saw it.

    An upsert has its whole `row`; only one that could not be decoded has None. A delete has none.
    """

    pipeline: str
    table: str
    key: Key
    op: Literal["upsert", "delete"]
    version: int
    row: Row | None
    at: dt.datetime
    origin: Origin
    before: Row | None = None

    @classmethod
    def of(cls, pipeline: str, change: Change, at: dt.datetime, origin: Origin) -> DeltaEvent:
        """Return the event of a change."""
        op: Literal["upsert", "delete"] = "delete" if change.row is None else "upsert"
        return cls(pipeline, change.table, change.key, op, change.version, change.row, at, origin)

    @property
    def change(self) -> Change | None:
        """The change, to be processed again; None when it never could be decoded (read the row by its key instead)."""
        if self.op == "upsert" and self.row is None:
            return None
        return Change(self.table, self.key, self.version, self.row)


def encode_event(event: DeltaEvent) -> bytes:
    """Return the event in Avro's single-object encoding.

    Raises TypeError for what no table's row holds, such as an object that a processor put into its row, or JSON some
    300 levels deep. The event can be kept without its row then, as one that could not be decoded.
    """
    assert event.row is None or event.op == "upsert", "a delete has no row"
    try:
        return _EVENT.encode(
            {
                **event._asdict(),
                "key": [_boxed(part) for part in event.key],
                "row": _boxed_row(event.row),
                "before": _boxed_row(event.before),
            }
        )
    except RecursionError:
        raise TypeError("a row cannot hold a value that is nested so deep") from None


def decode_event(data: bytes) -> DeltaEvent:
    """Return the event that `encode_event` wrote, in this version of Delta or an older one.

    Raises UndecodableChange when it is damaged or a newer Delta wrote it.
    """
    return _EVENT.decode(data, _event)


def encode_key(key: Key) -> bytes:
    """Return a key alone, as losslessly as in an event. Raises TypeError as `encode_event` does."""
    return _KEY.encode([_boxed(part) for part in key])


def decode_key(data: bytes) -> Key:
    """Return the key that `encode_key` wrote. Raises UndecodableChange as `decode_event` does."""
    return _KEY.decode(data, _key)


# ── values: a box is Avro's record Value ─────────────────────────────────────────────────────────────────────────

_Box = dict[str, Any]  # {"value": a branch of the union}: (its name, the datum), or the bare datum when decoded
_INT64 = range(-(1 << 63), 1 << 63)
_MICROSECOND = dt.timedelta(microseconds=1)


def _integer(value: int) -> tuple[str, Any]:
    if value in _INT64:
        return "long", value
    return "delta.Integer", {"twos_complement": value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)}


def _time(value: dt.time) -> tuple[str, Any]:
    offset = value.utcoffset()
    offset_micros = None if offset is None else offset // _MICROSECOND
    return "delta.Time", {"micros": value.replace(tzinfo=None), "offset_micros": offset_micros}


def _datetime(value: dt.datetime) -> tuple[str, Any]:
    return ("delta.Timestamp" if value.utcoffset() is None else "delta.TimestampTz"), {"micros": value}


def _well_formed(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: str) -> tuple[str, Any]:
    if value.isascii() or _well_formed(value):
        return "string", value
    return "delta.IllFormedText", {"generalized_utf8": value.encode("utf-8", "surrogatepass")}


def _map(value: Mapping[str, Any]) -> tuple[str, Any]:
    for name in value:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance] -- the promise is the caller's
            raise TypeError(f"a row cannot hold a map with a {type(name).__name__} as a name")
    if all(name.isascii() or _well_formed(name) for name in value):
        return "delta.Map", {"entries": {name: _boxed(part) for name, part in value.items()}}
    return "delta.IllFormedMap", {"items": [_boxed(part) for entry in value.items() for part in entry]}


# In this order, a type stands before those that it is a subclass of: bool before int, datetime before date.
_BRANCHES: dict[type, Callable[[Any], tuple[str, Any]]] = {
    type(None): lambda value: ("null", value),
    bool: lambda value: ("boolean", value),
    int: _integer,
    str: _text,
    float: lambda value: ("double", value),
    decimal.Decimal: lambda value: ("delta.Decimal", {"text": str(value)}),
    dt.datetime: _datetime,
    dt.date: lambda value: ("delta.Date", {"days": value}),
    dt.time: _time,
    bytes: lambda value: ("bytes", value),
    uuid.UUID: lambda value: ("delta.Uuid", {"uuid": value}),
    Interval: lambda value: ("delta.Interval", dict(zip(("months", "days", "micros"), value, strict=True))),
    list: lambda value: ("delta.List", {"items": [_boxed(part) for part in value]}),
    dict: _map,
}


def _boxed(value: object) -> _Box:
    branch = _BRANCHES.get(type(value))
    if branch is None:
        for base, base_branch in _BRANCHES.items():
            if isinstance(value, base):
                return {"value": base_branch(value)}
        raise TypeError(f"a row cannot hold a {type(value).__name__}")
    return {"value": branch(value)}


def _boxed_row(row: Row | None) -> dict[str, _Box] | None:
    return None if row is None else {column: _boxed(value) for column, value in row.items()}


def _read_time(datum: dict[str, Any]) -> dt.time:
    offset = datum["offset_micros"]
    zone = None if offset is None else dt.timezone(dt.timedelta(microseconds=offset))
    return cast(dt.time, datum["micros"]).replace(tzinfo=zone)


def _read_ill_formed_map(datum: dict[str, Any]) -> dict[object, object]:
    parts = [_unboxed(part) for part in datum["items"]]
    return dict(zip(parts[::2], parts[1::2], strict=True))


_READERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "delta.Integer": lambda datum: int.from_bytes(datum["twos_complement"], "big", signed=True),
    "delta.Decimal": lambda datum: decimal.Decimal(datum["text"]),
    "delta.Date": lambda datum: datum["days"],
    "delta.Time": _read_time,
    "delta.Timestamp": lambda datum: datum["micros"],
    "delta.TimestampTz": lambda datum: datum["micros"],
    "delta.Uuid": lambda datum: datum["uuid"],
    "delta.Interval": lambda datum: Interval(datum["months"], datum["days"], datum["micros"]),
    "delta.List": lambda datum: [_unboxed(part) for part in datum["items"]],
    "delta.Map": lambda datum: {name: _unboxed(part) for name, part in datum["entries"].items()},
    "delta.IllFormedText": lambda datum: datum["generalized_utf8"].decode("utf-8", "surrogatepass"),
    "delta.IllFormedMap": _read_ill_formed_map,
}


def _unboxed(box: _Box) -> object:
    value = box["value"]
    if isinstance(value, tuple):
        name, datum = cast(tuple[str, dict[str, Any]], value)
        return _READERS[name](datum)
    return value


def _key(boxes: list[_Box]) -> Key:
    return tuple(_unboxed(box) for box in boxes)


def _event(datum: dict[str, Any]) -> DeltaEvent:
    key, row, before = _key(datum.pop("key")), _unboxed_row(datum.pop("row")), _unboxed_row(datum.pop("before"))
    return DeltaEvent(**datum, key=key, row=row, before=before)


def _unboxed_row(boxes: dict[str, _Box] | None) -> Row | None:
    return None if boxes is None else {column: _unboxed(box) for column, box in boxes.items()}


# ── the envelope ─────────────────────────────────────────────────────────────────────────────────────────────────


_T = TypeVar("_T")


class Codec:
    """Avro's single-object encoding with the first of `schemas`; reads what any of them wrote."""

    def __init__(self, schemas: Sequence[Schema]) -> None:
        self._current = schemas[0]
        self._header = SINGLE_OBJECT + delta_schemas.fingerprint(self._current)
        self._writers = {delta_schemas.fingerprint(schema): schema for schema in schemas}

    def encode(self, datum: object) -> bytes:
        """Return the envelope and the datum."""
        out = io.BytesIO()
        out.write(self._header)
        fastavro.schemaless_writer(out, self._current, datum)  # pyright: ignore[reportUnknownMemberType] -- its IO
        return out.getvalue()

    def decode(self, data: bytes, read: Callable[[Any], _T]) -> _T:
        """Return what `read` makes of the datum, which has the current schema's form. Raises UndecodableChange."""
        start = len(SINGLE_OBJECT) + FINGERPRINT_BYTES
        if not data.startswith(SINGLE_OBJECT):
            raise UndecodableChange("These bytes are not a Delta event: Avro's single-object marker is missing.")
        writer = self._writers.get(data[len(SINGLE_OBJECT) : start])
        if writer is None:
            raise UndecodableChange("This event was written by a newer Delta; read it with that version.")
        source = io.BytesIO(data[start:])
        reader = None if writer is self._current else self._current
        try:
            datum: Any = fastavro.schemaless_reader(source, writer, reader, return_record_name=True)  # pyright: ignore[reportUnknownMemberType] -- its IO
            if source.read(1):
                raise ValueError("something follows its end")
            return read(datum)
        except _DAMAGE as error:
            raise UndecodableChange(f"This Delta event is damaged ({error or type(error).__name__}).") from error


# All that cut or flipped bytes were seen to cause in fastavro, and what they cause in our readers.
_DAMAGE = (EOFError, LookupError, ValueError, ArithmeticError, MemoryError, RecursionError)


def key_schema(event_schema: Schema) -> Schema:
    """Return the schema of the field `key` alone."""
    return next(field["type"] for field in event_schema["fields"] if field["name"] == "key")


_EVENT_SCHEMAS = [delta_schemas.load(name) for name in delta_schemas.names("delta_event")]
SCHEMA: Schema = delta_schemas.source("delta_event")  # as it was written: what a registry is to have
HEADER_BYTES = len(SINGLE_OBJECT) + FINGERPRINT_BYTES  # of the single-object encoding, before the datum
_EVENT = Codec(_EVENT_SCHEMAS)
_KEY = Codec([delta_schemas.parse(key_schema(schema)) for schema in _EVENT_SCHEMAS])
