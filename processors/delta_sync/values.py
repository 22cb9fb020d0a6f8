"""Values: what rows and documents hold, and how stores that know only JSON or text write them."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import enum
import json
import math
import uuid
from typing import Any, NamedTuple

import orjson

Row = dict[str, Any]  # column name → value of the column's kind
Document = dict[str, Any]  # what a processor returns


class Interval(NamedTuple):
    """PostgreSQL's interval, without the loss that a timedelta would mean: a month has no fixed length in days."""

    months: int
    days: int
    microseconds: int

    def __str__(self) -> str:
        """ISO 8601 (`P1Y2M3DT4H5M6.7S`); zero is `PT0S`."""
        years, months = int(self.months / 12), int(math.fmod(self.months, 12))
        seconds, micros = divmod(abs(self.microseconds), 1_000_000)
        hours, seconds = divmod(seconds, 3600)
        minutes, seconds = divmod(seconds, 60)
        sign = "-" if self.microseconds < 0 else ""
        date = "".join(f"{n}{unit}" for n, unit in ((years, "Y"), (months, "M"), (self.days, "D")) if n)
        fraction = f".{micros:06d}".rstrip("0") if micros else ""
        parts = [f"{sign}{n}{unit}" for n, unit in ((hours, "H"), (minutes, "M")) if n]
        if seconds or micros:
            parts.append(f"{sign}{seconds}{fraction}S")
        time = "".join(parts)
        if not date and not time:
            return "PT0S"
        return f"P{date}" + (f"T{time}" if time else "")


def decimal_text(value: decimal.Decimal) -> str:
    """Return a finite decimal in plain notation with its scale, as SQL writes it: `1000`, `0.10`."""
    return format(value, "f")


def _plain_text(value: decimal.Decimal) -> str:
    """Return a finite decimal without trailing zeros. `normalize()` would round what has more than 28 digits."""
    text = decimal_text(value)
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def scalar_text(value: object) -> str:
    """Return one value as text for an id. Equal keys of a source give equal text (1.0 and 1.00 are one numeric key)."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case decimal.Decimal():
            return _plain_text(value) if value.is_finite() else str(value)
        case bytes():
            return value.hex()
        case dt.datetime() | dt.date() | dt.time():
            return value.isoformat().replace("+00:00", "Z")
        case _:
            return str(value)


def json_default(value: object) -> object:
    """Write what orjson does not know by itself; numbers keep every digit.

    Raises TypeError for a type that no document may hold: it becomes the dead letter's reason.
    """
    match value:
        case decimal.Decimal():
            return orjson.Fragment(decimal_text(value)) if value.is_finite() else None
        case bytes() | bytearray():
            return base64.b64encode(value).decode()
        case Interval():
            return str(value)
        case tuple() | set() | frozenset():
            return list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] -- any elements
        case uuid.UUID():
            return str(value)
        case enum.Enum():
            return value.value
        case _:
            raise TypeError(f"a document cannot hold a {type(value).__name__}")


JSON_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_PASSTHROUGH_SUBCLASS


def to_json(value: object) -> bytes:
    """Return a value as JSON: exact decimals, ISO 8601 dates (`Z` for UTC), base64 bytes; NaN and infinity: null."""
    return orjson.dumps(value, json_default, JSON_OPTIONS)


def from_json(data: bytes) -> Any:
    """Return a JSON text's value as orjson has it, with a Decimal for a number that no double can hold (`1e400`).

    Of other numbers with many digits only a double is left: for looking at what a store has, not for copying it.
    Raises ValueError for what is not JSON, or nested too deeply for Python.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(data, parse_int=_number, parse_float=_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _number(text: str) -> int | float | decimal.Decimal:
    try:
        number = orjson.loads(text)
    except orjson.JSONDecodeError:
        return decimal.Decimal(text)
    return number  # type: ignore[no-any-return]  # of a number it is one
