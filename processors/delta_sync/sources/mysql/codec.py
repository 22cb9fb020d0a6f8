"""One Python value per column of MariaDB and MySQL, the same from the log and from a dump.

The log's side takes what Debezium writes with the options of `delta_debezium.mysql`, as JSON or Avro; the dump's side
takes the server's own text. Three values are others than the server's:

- a date with a zero in it (`0000-00-00`, `2024-00-15`) is None: Debezium writes NULL, or 1970 where there may be none;
- a time below zero or of a day or more (they reach from -838:59:59 to 838:59:59) is a str, as the server writes it;
- a `tinyint(1)` is a bool: whether it is zero.
"""

from __future__ import annotations

import datetime as dt
import re
import struct
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from delta_sync.changes import Key
from delta_sync.decoding import Image, TableCodec
from delta_sync.sources.codec import Convert, bytes_of, key_decoder, parse_json, row_decoder
from delta_sync.sources.mysql.catalogue import GEOMETRIES
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Row

# ── both sides ───────────────────────────────────────────────────────────────────────────────────────────────────

_REAL = struct.Struct("f")
_EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 -- a DATETIME has no zone
_EPOCH_ORDINAL = _EPOCH.toordinal()
_DAY: Final = 86_400_000_000  # microseconds


def _real(value: float | str) -> float:
    """Return the shortest number of all that are the same `float`."""
    nearest: float = _REAL.unpack(_REAL.pack(float(value)))[0]
    for digits in range(6, 9):  # below 7 digits every number is told from its neighbours, at 9 every float
        shortest = float(f"{nearest:.{digits}g}")
        if _REAL.unpack(_REAL.pack(shortest))[0] == nearest:
            return shortest
    return float(f"{nearest:.9g}")


def _type_number(column: Column, default: int) -> int:
    """Return the number in a type's brackets."""
    match = re.search(r"\((\d+)\)", column.type)
    return int(match[1]) if match else default


def _time_of(microseconds: int, digits: int) -> dt.time | str:
    if 0 <= microseconds < _DAY:
        return (_EPOCH + dt.timedelta(microseconds=microseconds)).time()
    seconds, micros = divmod(abs(microseconds), 1_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{micros:06}"[: digits + 1] if digits else ""
    return f"{'-' if microseconds < 0 else ''}{hours:02}:{minutes:02}:{seconds:02}{fraction}"


# ── the dump's side ──────────────────────────────────────────────────────────────────────────────────────────────


def quoted(name: str) -> str:
    """Return a name as SQL has it, in a statement whose parameters are yet to be filled in."""
    return "`" + name.replace("`", "``").replace("%", "%%") + "`"


def select_list(table: Table) -> str:
    """Return the columns for a SELECT from the table as `t`, in the table's order."""
    return ", ".join(selected(table, "t"))


def selected(table: Table, alias: str) -> list[str]:
    """Return what is selected of a table that is called so, for each of its columns."""
    return [_selected(column, alias) for column in table.columns]


def _selected(column: Column, alias: str) -> str:
    name = f"{alias}.{quoted(column.name)}"
    bare = column.type.partition("(")[0]
    if bare == "float":
        return f"{name} + 0e0"  # as text, a float has six digits only
    if bare in GEOMETRIES:
        return f"ST_AsText({name})"
    if bare == "vector":
        return f"CAST({name} AS BINARY)"  # the client takes MySQL's own type for text
    return name


def row_maker(table: Table) -> Callable[[Sequence[Any]], tuple[Key, Row]]:
    """Return a function from a row's values, as `select_list` brings them, to its key and the row."""
    names = [column.name for column in table.columns]
    places = [names.index(name) for name in table.key]
    steps = [
        (place, convert)
        for place, column in enumerate(table.columns)
        if (convert := dump_converter(column)) is not None
    ]
    steps += [(place, column.mask.function()) for place, column in enumerate(table.columns) if column.mask]

    def to_row(values: Sequence[Any]) -> tuple[Key, Row]:
        made = list(values)
        for place, convert in steps:
            if made[place] is not None:
                made[place] = convert(made[place])
        return tuple(made[place] for place in places), dict(zip(names, made, strict=True))

    return to_row


def dump_converter(column: Column) -> Convert | None:
    """Return what makes the Python value of the server's text; None where it is the value already."""
    match column.kind:
        case Kind.BOOLEAN:
            return _dump_bit if column.type == "bit(1)" else lambda text: int(text) != 0
        case Kind.INTEGER:
            return _dump_bits if column.type.startswith("bit") else int
        case Kind.FLOAT:
            return _real if column.type.startswith("float") else float
        case Kind.DECIMAL:
            return Decimal
        case Kind.DATE:
            return _dump_date
        case Kind.TIME:
            return _dump_time
        case Kind.TIMESTAMP:
            return _dump_timestamp
        case Kind.TIMESTAMP_TZ:
            return _dump_timestamp_tz
        case Kind.UUID:
            return UUID
        case Kind.JSON:
            return parse_json
        case _:
            return None


def _dump_bit(value: bytes) -> bool:
    return any(value)


def _dump_bits(value: bytes) -> int:
    return int.from_bytes(value, "big")


_ZERO_IN_DATE = re.compile(r"0000-|\d{4}-00|\d{4}-\d\d-00")


def _dump_date(text: str) -> dt.date | None:
    return None if _ZERO_IN_DATE.match(text) else dt.date.fromisoformat(text)


def _dump_timestamp(text: str) -> dt.datetime | None:
    return None if _ZERO_IN_DATE.match(text) else dt.datetime.fromisoformat(text)


def _dump_timestamp_tz(text: str) -> dt.datetime | None:
    return None if _ZERO_IN_DATE.match(text) else dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


_TIME = re.compile(r"(-?)(\d+):(\d\d):(\d\d)(?:\.(\d+))?")


def _dump_time(text: str) -> dt.time | str:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(text)
    sign, hours, minutes, seconds, fraction = match.groups()
    micros = (int(hours) * 3600 + int(minutes) * 60 + int(seconds)) * 1_000_000 + int(f"{fraction or ''}000000"[:6])
    return _time_of(-micros if sign else micros, len(fraction or ""))


def parameter(column: Column, value: Any) -> Any:
    """Return a key column's value as a parameter that the server compares as the column's index is sorted."""
    match value:
        case bool():
            return int(value)
        case str() if column.type.startswith("enum("):
            return members(column.type).index(value) + 1 if value else 0  # sorted by number; as text it is not
        case str() if column.type.startswith("set("):
            of_type = members(column.type)
            return sum(1 << of_type.index(member) for member in value.split(",") if member)
        case dt.datetime():
            return value.replace(tzinfo=None).isoformat(" ")
        case dt.date() | dt.time():
            return value.isoformat()
        case UUID():
            return str(value)
        case _:
            return value


_MEMBER = re.compile(r"'((?:[^']|'')*)'")


def members(type_: str) -> list[str]:
    """Return the values of an enum or set, given its type: `enum('a','it''s')`."""
    return [match.replace("''", "'") for match in _MEMBER.findall(type_)]


# ── the log's side ───────────────────────────────────────────────────────────────────────────────────────────────


def table_codec(table: Table) -> TableCodec:
    """Return how the events of a table are read."""
    row, key = row_decoder(table, log_converter), key_decoder(table, log_converter)
    not_logged = [column.name for column in table.columns if not column.in_log]
    dates = [column.name for column in table.columns if column.kind in _DATES and not column.nullable]

    def missing(image: Image) -> list[str]:
        return [*not_logged, *(name for name in dates if image[name] in _ZERO_DATES)]

    return TableCodec(table, row, key, lacks(table), missing)


def lacks(table: Table) -> Callable[[Image], bool]:
    """Return a function that tells whether an image lacks a value that the row has, so that the row is read by key.

    Beside columns that are not in the log, those are dates that may not be NULL and are the first of 1970: Debezium
    writes a zero date so.
    """
    if not all(column.in_log for column in table.columns):
        return lambda _image: True
    dates = [column.name for column in table.columns if column.kind in _DATES and not column.nullable]
    if not dates:
        return lambda _image: False
    return lambda image: any(image[name] in _ZERO_DATES for name in dates)


_DATES: Final = frozenset({Kind.DATE, Kind.TIMESTAMP, Kind.TIMESTAMP_TZ})
_ZERO_DATES: Final = (0, "1970-01-01T00:00:00Z")


def log_converter(column: Column) -> Convert | None:
    """Return what makes the Python value of one that is not NULL; None where Debezium's is it already."""
    if not column.in_log:
        return None
    match column.kind:
        case Kind.BOOLEAN:
            return bool
        case Kind.INTEGER if column.type.startswith("bit"):
            return _log_bits
        case Kind.INTEGER if column.type.startswith("bigint") and "unsigned" in column.type:
            return _log_unsigned
        case Kind.FLOAT:
            return _real if column.type.startswith("float") else float
        case Kind.DECIMAL:
            return Decimal
        case Kind.BYTES if column.type.startswith("binary"):
            length = _type_number(column, 1)
            return lambda value: bytes_of(value).ljust(length, b"\0")
        case Kind.BYTES:
            return bytes_of
        case Kind.DATE:
            return lambda days: dt.date.fromordinal(days + _EPOCH_ORDINAL)
        case Kind.TIME:
            digits = _type_number(column, 0)
            return lambda micros: _time_of(micros, digits)
        case Kind.TIMESTAMP:
            return lambda micros: _EPOCH + dt.timedelta(0, 0, micros)
        case Kind.TIMESTAMP_TZ:
            return _log_timestamp_tz
        case Kind.JSON:
            return parse_json
        case _:
            return None


def _log_bits(value: str | bytes) -> int:
    """Debezium writes the least significant byte first."""
    return int.from_bytes(bytes_of(value), "little")


def _log_unsigned(value: str | bytes | Decimal | int) -> int:
    """With `bigint.unsigned.handling.mode=precise` it is a decimal: in JSON the base64 of its bytes."""
    if isinstance(value, int | Decimal):
        return int(value)
    return int.from_bytes(bytes_of(value), "big", signed=True)


def _log_timestamp_tz(value: str) -> dt.datetime | None:
    moment = dt.datetime.fromisoformat(value)
    return None if value == "1970-01-01T00:00:00Z" else moment  # no real one: a TIMESTAMP begins a second later
