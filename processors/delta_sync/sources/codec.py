"""What the codecs of all sources have in common: rows and keys out of images, bytes, and JSON without loss."""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

import orjson

from delta_sync.changes import Key
from delta_sync.decoding import Image
from delta_sync.errors import UndecodableChange
from delta_sync.tables import Column, Table
from delta_sync.values import Row

Convert = Callable[[Any], Any]
Converter = Callable[[Column], Convert | None]  # None where Debezium's value is the value already

_UNFIT = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)  # what converters raise


def row_decoder(table: Table, converter: Converter) -> Callable[[Image], Row]:
    """Return a function that turns an image into a row, in place. The image has all of the table's columns in the log.

    Ask the codec's `lacks` first: a placeholder is decoded like a value. Columns that are not in the log are left as
    they are. Columns with a mask hold what it makes of the value. Raises UndecodableChange.
    """
    steps = [(column.name, convert) for column in table.columns if (convert := converter(column)) is not None]
    masks = [(column.name, column.mask.function()) for column in table.columns if column.mask and column.in_log]

    def decode(image: Image) -> Row:
        name = ""
        try:
            for name, convert in steps:
                value = image[name]
                if value is not None:
                    image[name] = convert(value)
        except _UNFIT as error:
            raise _undecodable(table, name, error) from error
        for name, mask in masks:
            if image[name] is not None:
                image[name] = mask(image[name])
        return image

    return decode


def key_decoder(table: Table, converter: Converter, placeholder: str | None = None) -> Callable[[Image], Key]:
    """Return a function that reads the key out of an image (not yet decoded), which may have nothing but the key.

    Raises UndecodableChange, also for a key that is the placeholder: long ones may be left out of events.
    """
    steps = [(name, converter(table.column(name)) or _itself) for name in table.key]
    ((only, convert_only), *others) = steps or [("", _itself)]

    def read_one(image: Image) -> Key:
        try:
            value = image[only]
            if value is None or value == placeholder:
                raise ValueError(value)
            return (convert_only(value),)
        except _UNFIT as error:
            raise _undecodable(table, only, error) from error

    def read(image: Image) -> Key:
        name = ""
        key: list[Any] = []
        try:
            for name, convert in steps:
                value = image[name]
                if value is None or value == placeholder:
                    raise ValueError(value)
                key.append(convert(value))
        except _UNFIT as error:
            raise _undecodable(table, name, error) from error
        return tuple(key)

    return read if others else read_one


def _itself(value: Any) -> Any:
    return value


def _undecodable(table: Table, name: str, error: Exception) -> UndecodableChange:
    return UndecodableChange(f"{table.id}.{name}: the event's value is not one of the column's type ({error!r}).")


def bytes_of(value: str | bytes) -> bytes:
    """Return bytes as they are in Avro; in JSON they are base64."""
    return value if isinstance(value, bytes) else binascii.a2b_base64(value, strict_mode=True)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# With these, a number of 17 characters looks like zeros in a row, and one with an exponent of three like 0e000; other
# texts that do only take the slower way. Doubles hold any 15 digits exactly.
_ALIKE = bytes.maketrans(b"123456789.+-E", b"000000000000e")
_MANY_DIGITS = b"0" * 17
_HUGE_EXPONENT = b"0e000"


def parse_jsonb(text: str | bytes) -> Any:
    """Return what `parse_json` does, for text that the server wrote: jsonb has no exponents, and so few suspects."""
    data = text.encode() if isinstance(text, str) else text
    if _MANY_DIGITS not in data.translate(_ALIKE):
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass  # it does not go as deep as the server
    return parse_json(data)


def parse_json(text: str | bytes) -> Any:
    """Return a JSON text's value: int, and float where it is exact, else Decimal; of equal members the last one.

    A text that is nested too deeply for Python is returned as it is. Raises ValueError for what is not JSON.
    """
    data = text.encode() if isinstance(text, str) else text
    alike = data.translate(_ALIKE)
    if _MANY_DIGITS not in alike and _HUGE_EXPONENT not in alike:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass  # it takes no lone surrogates, which the type json does
    try:
        return json.loads(data, parse_int=_json_int, parse_float=_json_float, parse_constant=_no_constant)
    except RecursionError:
        return data.decode()


SMALLEST_INTEGER, LARGEST_INTEGER = -(1 << 63), (1 << 63) - 1  # of every store
LARGEST_EXPONENT = 200_000  # more than numeric, and so jsonb, has; plain digits of what json allows would fill memory


def _json_int(text: str) -> int | Decimal:
    exact = Decimal(text)  # int() refuses more than 4300 digits
    return int(exact) if SMALLEST_INTEGER <= exact <= LARGEST_INTEGER else exact


def _json_float(text: str) -> float | Decimal:
    number = float(text)
    try:
        exact = Decimal(text)
    except InvalidOperation:
        return number
    if exact == Decimal(repr(number)) or abs(exact.adjusted()) > LARGEST_EXPONENT:
        return number
    return exact


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
