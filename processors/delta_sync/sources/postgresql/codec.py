"""One Python value per column of PostgreSQL, the same from the log and from a dump. `docs/types.md` lists them.

The log's side takes what Debezium writes with `CONNECTOR_OPTIONS`; the dump's side takes the server's own text. What
Python cannot hold (infinity, years before 1 and after 9999, 24:00) is a str on both sides, as PostgreSQL writes it.
"""

from __future__ import annotations

import binascii
import datetime as dt
import re
import struct
import typing
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, Final
from uuid import UUID, SafeUUID

import orjson
import psycopg
from psycopg import postgres, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.json import set_json_loads
from psycopg.types.string import TextLoader

from delta_sync.decoding import Image, TableCodec
from delta_sync.sources.codec import Convert, bytes_of, key_decoder, parse_json, parse_jsonb, row_decoder
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Interval

Test = Callable[[Any], bool]

SESSION: Final[Mapping[str, str]] = {
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "3",  # the shortest text that gives the same number back
    "lc_monetary": "C",
}
"""How the server writes values. A role or a database may set others, which end Debezium or spoil what it reads."""

CONNECTOR_OPTIONS: Final[Mapping[str, str]] = {
    "decimal.handling.mode": "string",
    "time.precision.mode": "microseconds",
    "binary.handling.mode": "bytes",
    "hstore.handling.mode": "json",
    "include.unknown.datatypes": "false",
    "unavailable.value.placeholder": "__debezium_unavailable_value",
    "driver.options": " ".join(
        f"-c {name}={value.replace(' ', '')}"
        for name, value in SESSION.items()
        if name not in ("DateStyle", "TimeZone")
    ),  # the driver sets these two itself: ISO, and the time zone of the JVM, which has to be UTC
    # By default a NULL in a column with a default becomes that default.
    "converter.replace.null.with.default": "false",
    # By default a value that cannot be converted becomes NULL, with a warning in the log.
    "event.converting.failure.handling.mode": "fail",
}
"""What the decoders rest on. With it belong `column.exclude.list` for the columns that are not in the log (an unchanged
TOAST value of some types ends the connector), and `-Duser.timezone=UTC` for the JVM."""


# ── values that are not there ────────────────────────────────────────────────────────────────────────────────────

PLACEHOLDER: Final = "__debezium_unavailable_value"
PLACEHOLDER_BASE64: Final = binascii.b2a_base64(PLACEHOLDER.encode(), newline=False).decode()
PLACEHOLDER_INTEGERS: Final = list(PLACEHOLDER.encode())
PLACEHOLDER_UUID: Final = "b68a35a7-17ad-35b3-af2a-ae46edb4545a"  # Java's UUID.nameUUIDFromBytes of it

PLACEHOLDER_BYTES: Final[tuple[bytes, ...]] = (
    PLACEHOLDER.encode(),  # text and all that arrives as text, JSON, hstore, and arrays of them: inside a string
    PLACEHOLDER_BASE64.encode(),  # bytea, and arrays of it
    b"[95,95,100,101,98,101,122,",  # arrays of integers: the placeholder's bytes
    PLACEHOLDER_UUID.encode(),  # arrays of uuid
)
"""Where none of these is in a batch's JSON, no unchanged TOAST value is. What else can be missing is in `lacks`."""

GARBAGE: Final = ("[L", "[[")  # Java's name for an array, in place of each inner list of a nested one


class Signs(typing.NamedTuple):
    """What tells that a column's value is not there: it equals one of `values`, or `looks` so."""

    values: tuple[object, ...] = ()
    looks: Test | None = None


def is_unavailable(column: Column, value: object) -> bool:
    """Tell whether the log's value of a column stands for one that has to be read from the table."""
    signs = _signs(column)
    return not column.in_log or value in signs.values or (signs.looks is not None and signs.looks(value))


def unavailable_columns(table: Table, image: Image) -> list[str]:
    """Return the columns whose values an image (not yet decoded) does not have."""
    return [column.name for column in table.columns if is_unavailable(column, image.get(column.name))]


def _signs(column: Column) -> Signs:
    if column.dimensions:
        return _array_signs(column)
    if not column.may_be_absent:
        return Signs()
    match column.kind:
        case Kind.BYTES:
            return Signs((PLACEHOLDER_BASE64, PLACEHOLDER.encode()))  # JSON, Avro
        case Kind.MAP:
            return Signs(({PLACEHOLDER: PLACEHOLDER}, f'{{"{PLACEHOLDER}":"{PLACEHOLDER}"}}'))
        case _:
            return Signs((PLACEHOLDER,))


def _array_signs(column: Column) -> Signs:
    # A nested array arrives as a list of NULLs, or of Java's names for arrays, so the first element tells.
    match column.kind:
        case Kind.INTEGER:
            return Signs((PLACEHOLDER_INTEGERS,), _begins_with_null)
        case Kind.BYTES:
            return Signs(([PLACEHOLDER_BASE64], [PLACEHOLDER.encode()]), _begins_with_null)
        case Kind.UUID:
            return Signs(([PLACEHOLDER_UUID],), _begins_with_garbage)
        case _:
            return Signs(([PLACEHOLDER],), _begins_with_garbage)


def _begins_with_null(value: Any) -> bool:
    return bool(value) and value[0] is None


def _begins_with_garbage(value: Any) -> bool:
    return bool(value) and value[0] is not None and value[0].startswith(GARBAGE)


# ── the log's side ───────────────────────────────────────────────────────────────────────────────────────────────


def table_codec(table: Table) -> TableCodec:
    """Return how the events of a table are read."""
    key = key_decoder(table, _converter, PLACEHOLDER)
    return TableCodec(table, row_decoder(table, _converter), key, lacks(table), partial(unavailable_columns, table))


def lacks(table: Table) -> Callable[[Image], bool]:
    """Return a function that tells whether an image lacks a value that the row has, so that the row is read by key."""
    if not all(column.in_log for column in table.columns):
        return lambda _image: True
    signs = [(column.name, _signs(column)) for column in table.columns]
    values = [(name, value) for name, of in signs for value in of.values]
    looks = [(name, of.looks) for name, of in signs if of.looks is not None]

    def image_lacks(image: Image) -> bool:
        for name, value in values:
            if image[name] == value:
                return True
        return any(look(image[name]) for name, look in looks) if looks else False

    return image_lacks if values else lambda _image: False


def _converter(column: Column) -> Convert | None:
    """Return what makes the Python value of one that is not NULL; None where Debezium's is it already."""
    if not column.in_log:
        return None
    if column.dimensions:
        element = _converter(column._replace(dimensions=0))
        return None if element is None else lambda values: [None if v is None else element(v) for v in values]
    match column.kind:
        case Kind.FLOAT:
            return _real if column.type == "real" else float
        case Kind.TEXT if column.type.startswith("bit("):
            return _bits(int(column.type[4:-1]))
        case Kind.JSON if column.type.startswith("jsonb"):
            return parse_jsonb
        case kind:
            return _CONVERTERS.get(kind)


def _decimal(value: str) -> Decimal:
    try:
        return Decimal(value)
    except InvalidOperation:
        return _INFINITE[value]


_INFINITE = {"POSITIVE_INFINITY": Decimal("Infinity"), "NEGATIVE_INFINITY": Decimal("-Infinity")}

_REAL = struct.Struct("f")
_TINY_REAL = 1e-43  # below it a real has less than two digits


def _real(value: float | str) -> float:
    """The number of the server's text for a real, its shortest one. Java's is another in two cases.

    It has two digits at least (1.4E-45 for 1e-45), and it may lie in the middle between two reals, where PostgreSQL
    writes a digit more.
    """
    number = float(value)
    nearest: float = _REAL.unpack(_REAL.pack(number))[0]
    if number == nearest or number != number:
        return number
    if not (_in_the_middle(number, nearest) or -_TINY_REAL < number < _TINY_REAL):
        return number
    for digits in range(9):
        shortest = float(f"{nearest:.{digits}e}")
        if _REAL.unpack(_REAL.pack(shortest))[0] == nearest and not _in_the_middle(shortest, nearest):
            return shortest
    return number


def _in_the_middle(number: float, nearest: float) -> bool:
    other = 2 * number - nearest  # exactly, where it is the neighbour
    return other != nearest and abs(other) < _LARGEST_REAL and bool(_REAL.unpack(_REAL.pack(other))[0] == other)


_LARGEST_REAL = 3.4028235e38


def _bits(length: int) -> Convert:
    """Debezium writes the bits as a number, least significant byte first, and one bit as a boolean."""

    def convert(value: bool | str | bytes) -> str:
        number = int(value) if isinstance(value, bool) else int.from_bytes(bytes_of(value), "little")
        return f"{number:0{length}b}"

    return convert


def _uuid(value: str) -> UUID:
    # As the constructor does, without its checks: a third of the time.
    made = object.__new__(UUID)
    object.__setattr__(made, "int", int(value.replace("-", ""), 16))
    object.__setattr__(made, "is_safe", SafeUUID.unknown)
    return made


_EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 -- PostgreSQL's timestamp has no zone
_EPOCH_ORDINAL = _EPOCH.toordinal()
_DAY = 86_400_000_000  # microseconds
_CYCLE_DAYS = 146_097  # of 400 years, after which the Gregorian calendar repeats
_INFINITE_DAYS = {-2_147_472_692: "infinity", -2_147_472_691: "-infinity"}  # days outside of PostgreSQL's range
# Two microseconds of the year 294247 are read as infinity; Debezium has no other sign of it.
_INFINITE_MICROSECONDS = {9_223_372_036_825_200_000: "infinity", -9_223_372_036_832_400_000: "-infinity"}
_EARLIEST_MICROSECONDS = -211_000_000_000_000_000  # 4717 BC; PostgreSQL's timestamps begin in 4713 BC
_LATEST_MICROSECONDS = (1 << 63) - 2  # January of 294247; what is later overflows in Debezium


def _date(days: int) -> dt.date | str:
    try:
        return dt.date.fromordinal(days + _EPOCH_ORDINAL)
    except (ValueError, OverflowError):
        return _INFINITE_DAYS.get(days) or " ".join(_far_day(days))


def _far_day(days: int) -> tuple[str, ...]:
    """Return a day as PostgreSQL writes it: `10000-01-01`, or `0044-03-15` and `BC`."""
    cycles, rest = divmod(days + _EPOCH_ORDINAL - 1, _CYCLE_DAYS)
    day = dt.date.fromordinal(rest + 1)
    year = day.year + 400 * cycles
    return (f"{year:04}-{day:%m-%d}",) if year > 0 else (f"{1 - year:04}-{day:%m-%d}", "BC")


def _timestamp(microseconds: int) -> dt.datetime | str:
    try:
        return _EPOCH + dt.timedelta(0, 0, microseconds)
    except OverflowError:
        if microseconds in _INFINITE_MICROSECONDS:
            return _INFINITE_MICROSECONDS[microseconds]
        if not _EARLIEST_MICROSECONDS < microseconds <= _LATEST_MICROSECONDS:
            raise ValueError(microseconds) from None
        days, rest = divmod(microseconds, _DAY)
        day, *era = _far_day(days)
        return " ".join([day, (_EPOCH + dt.timedelta(0, 0, rest)).time().isoformat().rstrip("0").ljust(8, "0"), *era])


def _time(microseconds: int) -> dt.time | str:
    if microseconds == _DAY:
        return "24:00:00"
    return (_EPOCH + dt.timedelta(0, 0, microseconds)).time()


_FAR_TIMESTAMP_TZ = re.compile(r"([+-]?\d+)(-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?Z")


def _timestamp_tz(value: str) -> dt.datetime | str:
    try:
        return dt.datetime.fromisoformat(value)
    except ValueError:
        if value in ("infinity", "-infinity"):
            return value
        match = _FAR_TIMESTAMP_TZ.fullmatch(value)
        if match is None:
            raise
        year, day, time, fraction = int(match[1]), match[2], match[3], (match[4] or "").rstrip("0.")
        return f"{year:04}{day} {time}{fraction}+00" if year > 0 else f"{1 - year:04}{day} {time}{fraction}+00 BC"


def _hstore(value: str | dict[str, str | None]) -> dict[str, str | None]:
    """In the order in which the server writes it: by the length of the keys, then by their bytes."""
    members: dict[str, str | None] = orjson.loads(value) if isinstance(value, str) else value
    if len(members) < 2:
        return members
    return dict(sorted(members.items(), key=lambda member: (len(key := member[0].encode()), key)))


_CONVERTERS: Mapping[Kind, Convert] = {
    Kind.DECIMAL: _decimal,
    Kind.BYTES: bytes_of,
    Kind.DATE: _date,
    Kind.TIME: _time,
    Kind.TIMESTAMP: _timestamp,
    Kind.TIMESTAMP_TZ: _timestamp_tz,
    Kind.UUID: _uuid,
    Kind.JSON: parse_json,
    Kind.MAP: _hstore,
}


# ── the dump's side ──────────────────────────────────────────────────────────────────────────────────────────────


def select_list(table: Table) -> sql.Composed:
    """Return the columns for a SELECT on a connection that was given to `configure`, in the table's order."""
    return sql.SQL(", ").join(map(_selected, table.columns))


def _selected(column: Column) -> sql.Composable:
    name = sql.Identifier(column.name)
    cast = _cast(column)
    if cast is None:
        return name
    template = f"{{0}}::{cast.replace('{', '{{').replace('}', '}}')} AS {{0}}"
    return sql.SQL(template).format(name)  # pyright: ignore[reportArgumentType] -- quoted by the catalogue


def _cast(column: Column) -> str | None:
    """Return the type that psycopg knows for one that it does not."""
    own_type = column.type.removesuffix("[]")
    array = "[]" if own_type != column.type else ""
    if column.kind is Kind.MAP:
        return "json" + array
    if column.kind is Kind.FLOAT and column.dimensions and not array:
        return "real[]"  # vectors
    if own_type == "money":
        return "numeric" + array
    if not array:
        return None
    if column.kind is not Kind.TEXT:
        return column.type  # its elements may be of a domain
    known = postgres.types.get(own_type.partition("(")[0].strip('"'))
    return column.type if known is not None and known.array_oid and "." not in own_type else "text[]"


def configure(connection: psycopg.Connection) -> None:
    """Make the connection return the values of `docs/types.md`. Commits when it is not in autocommit mode.

    For rows as text, psycopg's default.
    """
    for name, value in SESSION.items():
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    if not connection.autocommit:
        connection.commit()
    adapters = connection.adapters
    adapters.register_loader("date", _DateLoader)
    adapters.register_loader("time", _TimeLoader)
    adapters.register_loader("timestamp", _TimestampLoader)
    adapters.register_loader("timestamptz", _TimestampLoader)
    adapters.register_loader("interval", _IntervalLoader)
    for name in _AS_TEXT:
        adapters.register_loader(name, TextLoader)
    set_json_loads(parse_json, connection)
    adapters.register_loader("jsonb", _JsonbLoader)


# psycopg has types of its own for these.
_RANGES = ("int4", "int8", "num", "ts", "tstz", "date")
_AS_TEXT = ("timetz", "inet", "cidr", *(f"{name}{suffix}" for name in _RANGES for suffix in ("range", "multirange")))


class _JsonbLoader(Loader):
    """As for the log: the server has written it, so no exponents have to be looked for."""

    def load(self, data: Buffer) -> Any:
        return parse_jsonb(data if isinstance(data, bytes) else bytes(data))


class _DateLoader(Loader):
    def load(self, data: Buffer) -> dt.date | str:
        text = str(data, "ascii")
        try:
            return dt.date.fromisoformat(text)
        except ValueError:
            return text


class _TimeLoader(Loader):
    def load(self, data: Buffer) -> dt.time | str:
        text = str(data, "ascii")
        return text if text.startswith("24") else dt.time.fromisoformat(text)


class _TimestampLoader(Loader):
    """The server's `2024-02-29 12:34:56.1+00`; every other form is one that Python cannot hold."""

    def load(self, data: Buffer) -> dt.datetime | str:
        text = str(data, "ascii")
        try:
            return dt.datetime.fromisoformat(text)
        except ValueError:
            return text


_INTERVAL_DUMP = re.compile(
    r"(?:([+-]?\d+) years? ?)?(?:([+-]?\d+) mons? ?)?(?:([+-]?\d+) days? ?)?"
    r"(?:([+-]?)(\d+):(\d\d):(\d\d)(?:\.(\d+))?)?"
)


class _IntervalLoader(Loader):
    def load(self, data: Buffer) -> Interval | str:
        text = str(data, "ascii")
        match = _INTERVAL_DUMP.fullmatch(text)
        if match is None:
            return text  # infinity
        years, months, days, sign, hours, minutes, seconds, fraction = match.groups()
        micros = (int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)) * 1_000_000
        micros += int(f"{fraction or ''}000000"[:6])
        return Interval(int(years or 0) * 12 + int(months or 0), int(days or 0), -micros if sign == "-" else micros)
