"""Documents in columns: what stores of tables have in common. Kinds of values, names, and one plain form to compare."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import enum
import functools
import math
import re
import uuid
from typing import Any, Literal, cast

from delta_sync.errors import Unstorable
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.values import Document, Interval, from_json, scalar_text, to_json

Kind = Literal[
    "boolean",
    "integer",
    "float",
    "decimal",
    "text",
    "bytes",
    "date",
    "time",
    "timestamp",
    "timestamptz",
    "uuid",
    "json",
]

OWN_PREFIX = "_delta_"  # of columns that are Delta's
ID_COLUMN = "_delta_id"

MAX_NAME_BYTES = 63  # PostgreSQL cuts longer ones, so two could become one
EXACT_IN_DOUBLE = 1 << 53
NAMES_KEPT = 4096  # what was found about them: more than some tables' columns, and no bound to what documents may have


@functools.lru_cache(maxsize=NAMES_KEPT)
def name_conflict(name: object) -> str | None:
    """Return why a field's name cannot be a column's, if so."""
    if not isinstance(name, str):
        return f"a field's name must be a str, not a {type(name).__name__}"
    if folded(name) == VERSION_FIELD or folded(name).startswith(OWN_PREFIX):
        return f"the field {name} is Delta's own; give the document's field another name"
    if not name or "\0" in name:
        return "a field's name cannot be empty or hold a zero byte"
    try:
        if len(name.encode()) > MAX_NAME_BYTES:
            return f"the field's name {name} has more than {MAX_NAME_BYTES} bytes; give it a shorter one"
    except UnicodeEncodeError:
        return f"the field's name {name!r} is no valid text"
    return None


def fields_of(document: Document, zero_bytes: bool) -> dict[str, tuple[Kind, Any]]:
    """Return the kind and value of each field that has one. Raises Unstorable.

    `zero_bytes` tells whether the store takes such in texts.
    """
    fields: dict[str, tuple[Kind, Any]] = {}
    for name, value in document.items():
        reason = name_conflict(name)
        if reason is not None:
            raise Unstorable(f"{reason}.")
        found = kind_of_value(name, value, zero_bytes)
        if found is not None:
            fields[name] = found
    return fields


def kind_of_value(name: str, value: object, zero_bytes: bool) -> tuple[Kind, Any] | None:
    """Return a value's kind, and the value as plain Python; None when it is NULL. Raises Unstorable."""
    match value:
        case None:
            return None
        case enum.Enum():
            return kind_of_value(name, value.value, zero_bytes)
        case bool():
            return "boolean", value
        case int():
            return ("integer" if -(1 << 63) <= value < 1 << 63 else "decimal"), (
                int(value) if -(1 << 63) <= value < 1 << 63 else decimal.Decimal(value)
            )
        case float():
            return None if math.isnan(value) else ("float", float(value))
        case decimal.Decimal():
            if value.is_nan():
                return None
            if not value.is_finite():
                raise Unstorable(f"the field {name} is infinite, and a decimal column is not.")
            return "decimal", value
        case str():
            return "text", checked_text(str(value), zero_bytes)
        case Interval():
            return "text", str(value)
        case bytes() | bytearray():
            return "bytes", bytes(value)
        case dt.datetime():
            if value.tzinfo is None:
                return "timestamp", value
            try:
                return "timestamptz", value.astimezone(dt.UTC)
            except OverflowError as error:
                raise Unstorable(f"the field {name} is {value.isoformat()}, which no column holds in UTC.") from error
        case dt.date():
            return "date", value
        case dt.time():
            return ("time", value) if value.tzinfo is None else ("text", value.isoformat())
        case uuid.UUID():
            return "uuid", value
        case dict() | list() | tuple() | set() | frozenset():
            try:
                encoded = to_json(value)  # pyright: ignore[reportUnknownArgumentType] -- any elements
            except (TypeError, RecursionError) as error:
                raise Unstorable(f"the field {name} cannot be written as JSON: {error}.") from error
            if not zero_bytes and _ZERO_BYTE.search(encoded):
                raise Unstorable(f"the field {name} holds a zero byte, which the store does not take.")
            return "json", value  # pyright: ignore[reportUnknownVariableType] -- any elements
        case _:
            raise Unstorable(f"the field {name} is a {type(value).__name__}, which no column can hold.")


_ZERO_BYTE = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # in JSON, where it is always written so


def checked_text(text: str, zero_bytes: bool) -> str:
    """Return a text that the store can hold. Raises Unstorable."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unstorable(f"a text holds what is no character: {error.reason}.") from error
    if not zero_bytes and "\0" in text:
        raise Unstorable("a text holds a zero byte, which the store does not take.")
    return text


def is_storable(text: str, zero_bytes: bool) -> bool:
    """Tell whether the store can hold a text: it takes no other in a question, either."""
    try:
        checked_text(text, zero_bytes)
    except Unstorable:
        return False
    return True


def wider(first: Kind, second: Kind) -> Kind:
    """Return the kind for a new column that is to hold both, as far as there is one; else the first."""
    if first == second:
        return first
    kinds = {first, second}
    if kinds <= {"integer", "float"}:
        return "float"
    if kinds <= {"integer", "float", "decimal"}:
        return "decimal"
    return first


def plain(kind: Kind, value: Any) -> Any:
    """Return a value as JSON has it, with numbers in one form."""
    match kind:
        case "integer" | "float" | "decimal":
            return number(value)
        case "json":
            return numbers(from_json(to_json(value)))
        case "bytes":
            return base64.b64encode(value).decode()
        case "date" | "time" | "timestamp" | "timestamptz" | "uuid":
            return scalar_text(value)
        case _:
            return value


def number(value: float | decimal.Decimal) -> int | float | decimal.Decimal:
    """Return a number in one form, whatever its column's type: int, else float if that is exact, else Decimal."""
    if isinstance(value, float) and math.isinf(value):
        return value
    if value == (whole := int(value)):
        return whole
    if isinstance(value, float):
        return value
    as_float = float(value)
    return as_float if decimal.Decimal(repr(as_float)) == value else decimal.Decimal(scalar_text(value))


def numbers(value: object) -> object:
    """Return a JSON value with its numbers in one form: stores write 1e16 as they like."""
    match value:
        case float() | decimal.Decimal():
            return number(value)
        case dict():
            return {name: numbers(part) for name, part in cast("dict[str, object]", value).items()}
        case list():
            return [numbers(part) for part in cast("list[object]", value)]
        case _:
            return value


def fitted(place: str, name: str, column: Kind | None, kind: Kind, value: Any) -> tuple[Kind, Any]:
    """Return a value as one of its column's kind (None: no kind of Delta's). Raises Unstorable, which says where."""
    if column == kind:
        return kind, value
    match column, kind:
        case "json", _:
            return "json", value
        case "float", "integer" if abs(value) <= EXACT_IN_DOUBLE:
            return "float", float(value)
        case "decimal", "integer":
            return "decimal", decimal.Decimal(value)
        case "decimal", "float" if math.isfinite(value):
            return "decimal", decimal.Decimal(repr(value))
        case None, _:
            reason = "which is of a type that Delta does not write"
        case _:
            reason = f"which is of type {column}"
    raise Unstorable(
        f"the field {name} is of type {kind} here, and does not fit its column in {place}, {reason}; let the processor"
        f" return one type, or name it under `columns` and load the table again into a new one"
    )


def folded(name: str) -> str:
    """Return a name as SQLite compares it: without case, of ASCII letters alone."""
    return "".join(chr(ord(letter) | 32) if "A" <= letter <= "Z" else letter for letter in name)
