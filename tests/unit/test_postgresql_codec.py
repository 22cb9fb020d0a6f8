"""What the decoders make of Debezium's values, and of what is none. With a server: `test_postgresql_values.py`."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import random
import struct
import uuid
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_sync.errors import UndecodableChange
from delta_sync.sources.codec import parse_json
from delta_sync.sources.postgresql import codec
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import to_json


def table(*columns: Column, key: tuple[str, ...] = ("id",)) -> Table:
    return Table("public", "t", (Column("id", "integer", Kind.INTEGER, nullable=False), *columns), key)


def decode(column: Column, value: Any) -> Any:
    return codec.table_codec(table(column)).row({"id": 1, column.name: value})[column.name]


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1.0", 1.0),
        ("-0", 0),
        ("0.1", 0.1),
        ("0.30000000000000004", 0.30000000000000004),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", Decimal(2**63)),
        ("-9223372036854775808", -(2**63)),
        ("-9223372036854775809", Decimal(-(2**63) - 1)),
        ("0.1000000000000000055", Decimal("0.1000000000000000055")),
        ("1e400", Decimal("1e400")),
        ("1E-400", Decimal("1e-400")),
        ("1e+400", Decimal("1e400")),
        ("1e1000000", float("inf")),
        ("9" * 5000, Decimal("9" * 5000)),
        ('"12345678901234567890"', "12345678901234567890"),
        ('"\\u0000"', "\0"),
        ('"\\ud83d"', "\ud83d"),
        ('{"a": 1, "b": 2, "a": 3}', {"a": 3, "b": 2}),
        ("null", None),
        ("[" * 100_000 + "]" * 100_000, "[" * 100_000 + "]" * 100_000),
    ],
)
def test_json_keeps_every_digit(text: str, value: Any) -> None:
    parsed = parse_json(text)
    assert (type(parsed), parsed) == (type(value), value)


@pytest.mark.parametrize("text", ["", "NaN", "Infinity", "{", codec.PLACEHOLDER, "[1,]"])
def test_what_is_no_json_raises(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- json's own and ours have different messages
        parse_json(text)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_json_is_what_pythons_own_parser_says(value: Any) -> None:
    text = json.dumps(value)
    assert repr(parse_json(text)) == repr(json.loads(text))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=20) | st.integers().map(Decimal))
def test_numbers_in_json_come_out_as_they_went_in(number: Decimal) -> None:
    written = to_json({"n": parse_json(format(number, "f"))})
    assert Decimal(json.loads(written, parse_float=str, parse_int=str)["n"]) == number


# ── dates and times ──────────────────────────────────────────────────────────────────────────────────────────────

DATE = Column("v", "date", Kind.DATE)
TIMESTAMP = Column("v", "timestamp without time zone", Kind.TIMESTAMP)
TIMESTAMP_TZ = Column("v", "timestamp with time zone", Kind.TIMESTAMP_TZ)


@given(st.dates())
def test_days(day: dt.date) -> None:
    assert decode(DATE, (day - dt.date(1970, 1, 1)).days) == day


@given(st.datetimes())
def test_microseconds(moment: dt.datetime) -> None:
    epoch = dt.datetime(1970, 1, 1)  # noqa: DTZ001 -- has no zone, as the type
    assert decode(TIMESTAMP, (moment - epoch) // dt.timedelta(microseconds=1)) == moment


@given(st.datetimes(timezones=st.just(dt.UTC)))
def test_instants(moment: dt.datetime) -> None:
    decoded = decode(TIMESTAMP_TZ, moment.isoformat(timespec="microseconds").replace("+00:00", "Z"))
    assert decoded == moment
    assert decoded.tzinfo is dt.UTC


@given(st.integers(10_000, 290_000), st.dates(dt.date(2000, 1, 1), dt.date(2399, 12, 31)), st.times())
def test_far_moments_are_text_in_both_forms(year: int, day: dt.date, time: dt.time) -> None:
    """The calendar repeats after 400 years, so a day of a far year is one of the years 2000 to 2399."""
    cycles = (year - day.year) // 400 + 1
    year = day.year + 400 * cycles
    days = (day - dt.date(1970, 1, 1)).days + 146_097 * cycles
    text = f"{year}-{day:%m-%d}"
    assert decode(DATE, days) == text
    fraction = f".{time.microsecond:06d}".rstrip("0") if time.microsecond else ""
    text = f"{text} {time:%H:%M:%S}{fraction}"
    microseconds = ((time.hour * 60 + time.minute) * 60 + time.second) * 1_000_000 + time.microsecond
    assert decode(TIMESTAMP, days * 86_400_000_000 + microseconds) == text
    assert decode(TIMESTAMP_TZ, f"+{year}-{day:%m-%d}T{time.isoformat('microseconds')}Z") == text + "+00"


def test_years_before_the_first_are_bc() -> None:
    assert decode(DATE, -719_163) == "0001-12-31 BC"
    assert decode(TIMESTAMP, -719_163 * 86_400_000_000) == "0001-12-31 00:00:00 BC"
    assert decode(TIMESTAMP_TZ, "0000-12-31T00:00:00Z") == "0001-12-31 00:00:00+00 BC"
    assert decode(TIMESTAMP_TZ, "-0043-03-15T00:00:10.500000Z") == "0044-03-15 00:00:10.5+00 BC"


@pytest.mark.parametrize("microseconds", [2**63 - 1, -(2**63), -(2**63) + 999_998])
def test_what_overflowed_in_debezium_is_not_taken_for_a_time(microseconds: int) -> None:
    with pytest.raises(UndecodableChange):
        decode(TIMESTAMP, microseconds)


# ── other values ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_reals_are_the_shortest_that_postgresql_would_write() -> None:
    real = Column("v", "real", Kind.FLOAT)
    assert decode(real, 1.4e-45) == 1e-45  # Java writes two digits at least
    assert decode(real, 2.8e-45) == 3e-45
    assert decode(real, -124766260.0) == -124766256.0  # in the middle of two reals
    assert decode(real, 0.1) == 0.1
    assert decode(real, "-Infinity") == float("-inf")
    assert str(decode(real, -0.0)) == "-0.0"
    rng = random.Random(7)
    for _ in range(10_000):
        number = struct.unpack("f", rng.randbytes(4))[0]
        if number == number and abs(number) != float("inf"):
            assert struct.pack("f", decode(real, number)) == struct.pack("f", number)


@given(st.uuids())
def test_uuids(value: uuid.UUID) -> None:
    decoded = decode(Column("v", "uuid", Kind.UUID), str(value))
    assert (decoded, hash(decoded), str(decoded), decoded.is_safe) == (value, hash(value), str(value), value.is_safe)


@given(st.text("01", min_size=2, max_size=64))
def test_bits(bits: str) -> None:
    number = int(bits, 2)
    little = number.to_bytes((number.bit_length() + 7) // 8, "little")  # as Debezium does: without zeros at the end
    decoded = decode(Column("v", f"bit({len(bits)})", Kind.TEXT), to_json(little).strip(b'"').decode())
    assert decoded == bits


def test_hstore_has_the_servers_order() -> None:
    assert list(decode(HSTORE, '{"bb":"1","é":null,"a":"2","c":"3"}')) == [
        "a",
        "c",
        "bb",
        "é",
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (Column("v", "numeric", Kind.DECIMAL), "abc"),
        (Column("v", "numeric", Kind.DECIMAL), {}),
        (Column("v", "uuid", Kind.UUID), "x"),
        (DATE, "2024-01-01"),
        (TIMESTAMP, None.__class__),
        (TIMESTAMP_TZ, "yesterday"),
        (TIMESTAMP_TZ, 5),
        (Column("v", "jsonb", Kind.JSON), "{"),
        (Column("v", "bytea", Kind.BYTES), "§"),
        (Column("v", "integer[]", Kind.DATE, dimensions=1), 7),
    ],
)
def test_a_value_of_another_type_names_the_column(column: Column, value: object) -> None:
    with pytest.raises(UndecodableChange, match=r"^public\.t\.v: "):
        decode(column, value)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(UndecodableChange, match=r"^public\.t\.v: "):
        codec.table_codec(table(DATE)).row({"id": 1})


# ── what is not there ────────────────────────────────────────────────────────────────────────────────────────────

TEXT = Column("v", "text", Kind.TEXT, may_be_absent=True)
HSTORE = Column("v", "public.hstore", Kind.MAP, may_be_absent=True)


@pytest.mark.parametrize(
    ("column", "missing", "there"),
    [
        (TEXT, codec.PLACEHOLDER, "x"),
        (Column("v", "bytea", Kind.BYTES, may_be_absent=True), codec.PLACEHOLDER_BASE64, "AP8="),
        (Column("v", "text[]", Kind.TEXT, 1), [codec.PLACEHOLDER], ["x", None]),
        (Column("v", "text[]", Kind.TEXT, 1), ["[Ljava.lang.String;@1"], [None, "x"]),
        (Column("v", "integer[]", Kind.INTEGER, 1), codec.PLACEHOLDER_INTEGERS, []),
        (Column("v", "integer[]", Kind.INTEGER, 1), [None, None], [1, None]),
        (Column("v", "uuid[]", Kind.UUID, 1), [codec.PLACEHOLDER_UUID], [None]),
        (Column("v", "bytea[]", Kind.BYTES, 1), [codec.PLACEHOLDER_BASE64], ["AA=="]),
        (HSTORE, f'{{"{codec.PLACEHOLDER}":"{codec.PLACEHOLDER}"}}', "{}"),
        (HSTORE, {codec.PLACEHOLDER: codec.PLACEHOLDER}, {}),
    ],
)  # fmt: skip
def test_placeholders(column: Column, missing: Any, there: Any) -> None:
    lacks = codec.lacks(table(column))
    assert lacks({"id": 1, "v": missing})
    assert not lacks({"id": 1, "v": there})
    assert not lacks({"id": 1, "v": None})
    assert codec.unavailable_columns(table(column), {"id": 1, "v": missing}) == ["v"]
    assert codec.unavailable_columns(table(column), {"id": 1, "v": None}) == []


def test_a_column_that_is_not_in_the_log_is_always_missing() -> None:
    made = table(TEXT._replace(in_log=False, name="made"))
    assert codec.lacks(made)({"id": 1})
    assert codec.unavailable_columns(made, {"id": 1}) == ["made"]
    assert codec.table_codec(made).row({"id": 1}) == {"id": 1}


def test_javas_uuid_of_the_placeholder() -> None:
    digest = bytearray(hashlib.md5(codec.PLACEHOLDER.encode()).digest())
    digest[6] = digest[6] & 0x0F | 0x30
    digest[8] = digest[8] & 0x3F | 0x80
    assert str(uuid.UUID(bytes=bytes(digest))) == codec.PLACEHOLDER_UUID


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys() -> None:
    image: dict[str, Any] = {"id": 7, "v": "x", "other": "not looked at"}
    assert codec.table_codec(table(TEXT)).key(image) == (7,)
    assert codec.table_codec(table(TEXT, key=("v", "id"))).key(image) == ("x", 7)
    assert codec.table_codec(table(DATE, key=("v", "id"))).key({"id": 7, "v": 0}) == (dt.date(1970, 1, 1), 7)
    assert image == {"id": 7, "v": "x", "other": "not looked at"}


@pytest.mark.parametrize("key", [("v",), ("v", "id")])
@pytest.mark.parametrize("column", [TEXT, DATE])
@pytest.mark.parametrize("image", [{"id": 1}, {"id": 1, "v": None}, {"id": 1, "v": codec.PLACEHOLDER}])
def test_a_key_that_cannot_be_read(key: tuple[str, ...], column: Column, image: dict[str, Any]) -> None:
    with pytest.raises(UndecodableChange, match=r"^public\.t\.v: "):
        codec.table_codec(table(column, key=key)).key(image)
