"""Documents as MongoDB holds them: their ids, their values as BSON, their versions, and those of tombstones.

What BSON makes of a document's values:

| Python | BSON |
| --- | --- |
| `str`, `bool`, `float` (NaN too), `None`, `dict`, `list`, `bytes` | as they are |
| `int` | 32 or 64 bits; beyond, the write is rejected |
| `Decimal` | Decimal128 (NaN and infinity too); with more than 34 digits: its text |
| `datetime` | date, in UTC (a naive one is taken as UTC), **cut to milliseconds**, which is all that BSON has |
| `date` | date at 00:00 UTC, so that ranges, `$dateTrunc` and TTL indexes work on it |
| `time`, `Interval` | ISO 8601 text (an interval that a processor made up and put inside a list or dict: an array) |
| `UUID` | Binary of subtype 4 |

All of it is pure.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, TypeRegistry
from bson.decimal128 import Decimal128
from bson.errors import BSONError
from pymongo.errors import DocumentTooLarge

from delta_sync.changes import Key, Write
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.tables import Table, key_text
from delta_sync.values import Document, Interval, decimal_text, scalar_text

FLOOR_ID = bson.ObjectId("0" * 24)  # no key's id is of that type (see `bson_id`)

MAX_DOCUMENT_BYTES = 16 << 20  # MongoDB's limit
OPERATION_BYTES = 1024  # room for what surrounds a document in an operation
FLOOR_SETTLES = dt.timedelta(days=1)  # no writer stands still for so long between reading the floor and writing

UNENCODABLE = (BSONError, DocumentTooLarge, OverflowError, TypeError, ValueError, RecursionError)


# ── ids and versions ─────────────────────────────────────────────────────────────────────────────────────────────────


def bson_id(table: Table, key: Key) -> object:
    """Return the `_id` of a key: its value if it is one column, else a document of the columns in the key's order.

    Values are those of documents, except where these would make different keys equal (BSON cuts datetimes to
    milliseconds) or cannot be an `_id` (arrays): those, and dates with them, are text.
    """
    if len(key) == 1:
        return _id_part(key[0])
    return {name: _id_part(part) for name, part in zip(table.key, key, strict=True)}


def _id_part(value: object) -> object:
    match value:
        case bool() | str() | float() | bytes() | uuid.UUID():
            return value
        case int():
            return value if -(1 << 63) <= value < 1 << 63 else bson_decimal(decimal.Decimal(value))
        case decimal.Decimal():
            # Equal keys, such as 1.0 and 1.00, get equal bytes: there are stores that compare those.
            return bson_decimal(decimal.Decimal(scalar_text(value)))
        case _:
            return scalar_text(value)


def key_of(table: Table, id_: object) -> Key:
    """Return a key that has the same text as the one of which `bson_id` made this `_id`.

    Of an `_id` that somebody else made, such as an ObjectId, it is one that the table cannot have, or not by that text.
    """
    parts: Collection[object] = (id_,)
    if len(table.key) > 1 and isinstance(id_, dict):
        parts = cast("dict[str, object]", id_).values()
    return tuple(part.to_decimal() if isinstance(part, Decimal128) else part for part in parts)


def text_of(table: Table, id_: object) -> str:
    """Return the text of the key of which `bson_id` made this `_id`."""
    return key_text(key_of(table, id_))


def versions_of(table: Table, found: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, int]]:
    """Return the floor, 0 if it is not among what was found, and the others' versions by their key's text."""
    floor, versions = 0, dict[str, int]()
    for one in found:
        version = int(one.get("version", one.get(VERSION_FIELD, 0)))
        if one["_id"] == FLOOR_ID:
            floor = version
        else:
            versions[text_of(table, one["_id"])] = version
    return floor, versions


def is_unsettled(floor: Mapping[str, Any], since: dt.datetime | None) -> bool:
    """Tell whether documents below a floor may be there: written while it was raised, by a process that then died.

    Such a process wrote soon after, if ever: a look at all documents long after the floor was raised is the last one.
    """
    raised_at: dt.datetime = floor["raised_at"]
    if since is not None:
        return raised_at >= since
    swept_at: dt.datetime | None = floor.get("swept_at")
    return swept_at is None or swept_at < raised_at + FLOOR_SETTLES


def exactly(version: int) -> object:
    """Return the condition that a version is this one; 0 is none at all."""
    return version or {"$in": [0, None]}


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def whole(id_: object, write: Write, *, intervals: bool) -> Document:
    """Return what is stored: the document between its `_id`, which MongoDB wants first, and its version.

    `intervals`: whether the table has columns of them, so that they may be anywhere in it.
    """
    document = write.document or {}
    if intervals or Interval in map(type, document.values()):
        document = cast("Document", _with_texts(document))
    stored = {"_id": id_, **document, VERSION_FIELD: write.version}
    stored["_id"] = id_
    return stored


def conflict(table: Table, key: Key, document: Document) -> str | None:
    """Return why a document's own fields cannot be stored, if so. At the top level `$` would be an update operator."""
    if VERSION_FIELD in document:
        return f"the field {VERSION_FIELD} is Delta's own; give the document's field another name"
    if "_id" in document:
        expected = key[0] if len(key) == 1 else dict(zip(table.key, key, strict=True))
        if document["_id"] != expected:
            return "the field _id is not the row's key; give the document's field another name, or leave it out"
    for name in document:
        if str(name)[:1] == "$":
            return f"a field's name cannot start with $, as {name} does"
    return None


def unfit(document: Document) -> str | None:
    """Return why a document cannot be encoded or is too large, if so."""
    try:
        size_bytes = len(bson.encode(document, codec_options=CODEC)) + len(
            bson.encode({"_id": document["_id"]}, codec_options=CODEC)
        )
    except UNENCODABLE as error:
        return f"the document cannot be written as BSON: {brief(error)}"
    if size_bytes + OPERATION_BYTES > MAX_DOCUMENT_BYTES:
        return f"the document has {size_bytes} bytes; MongoDB's limit is {MAX_DOCUMENT_BYTES}"
    return None


def bson_decimal(value: decimal.Decimal) -> Decimal128 | str:
    """Return a decimal as Decimal128, or as text if it has more than 34 digits or its exponent does not fit."""
    try:
        return Decimal128(value)
    except decimal.DecimalException:
        return decimal_text(value)


def _bson_value(value: object) -> object:
    """Return as BSON knows it what the driver does not know by itself. Raises TypeError: no document may hold it."""
    match value:
        case decimal.Decimal():
            return bson_decimal(value)
        case dt.date():
            return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)
        case dt.time():
            return value.isoformat()
        case set() | frozenset():
            return list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] -- any elements
        case bytearray():
            return bytes(value)
        case enum.Enum():
            return value.value
        case int():
            raise OverflowError(f"the number {value} needs more than 64 bits")
        case _:
            raise TypeError(f"a document cannot hold a {type(value).__name__}")


# The driver encodes in C and asks `_bson_value` only about what it does not know: no document is walked in Python.
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True,
    uuid_representation=UuidRepresentation.STANDARD,
    type_registry=TypeRegistry(fallback_encoder=_bson_value),
)


def _with_texts(value: object) -> object:
    """Return a value with its intervals as text, at any depth. The driver would take them for the tuples they are."""
    match value:
        case Interval():
            return str(value)
        case dict():
            return {name: _with_texts(part) for name, part in cast("dict[str, object]", value).items()}
        case list() | tuple():
            return [_with_texts(part) for part in cast("Sequence[object]", value)]
        case _:
            return value


def brief(error: BaseException) -> str:
    """Return a driver's message without the description of the topology and the copy of the reply at its end."""
    return re.split(r", full error: |, Timeout: |, Topology Description: ", str(error))[0].rstrip(". ")
