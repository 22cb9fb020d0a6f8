"""The Delta event: rows survive it without loss, and so do events the evolution of its schema."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import decimal
import enum
import json
import math
import struct
import uuid
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import delta_schemas
from delta_sync.changes import Change
from delta_sync.delta_event import (
    Codec,
    DeltaEvent,
    decode_event,
    decode_key,
    encode_event,
    encode_key,
    key_schema,
)
from delta_sync.errors import UndecodableChange
from delta_sync.tables import Kind
from delta_sync.values import Interval

AT = dt.datetime(2024, 2, 29, 23, 59, 59, 999999, tzinfo=dt.UTC)

# Of each kind of column, all values that Python can hold; text with lone surrogates, too, because JSON can escape them.
TEXT = st.text(st.characters(exclude_categories=[])) | st.sampled_from(["\ud800", "\ud83c\udfac", "\udfff\0"])
INTEGERS = (
    st.integers()
    | st.integers(-(1 << 200), 1 << 200)
    | st.sampled_from([(1 << 63) - 1, 1 << 63, -(1 << 63), ~(1 << 63)])
)
DECIMALS = st.decimals() | st.builds(
    decimal.Decimal, st.sampled_from(["1.10", "1E+3", "-0.00", "sNaN", "-NaN12", "-Infinity", "1E-99999", "9" * 5000])
)
TIMES = st.times() | st.times(
    timezones=st.builds(dt.timezone, st.timedeltas(dt.timedelta(hours=-15), dt.timedelta(hours=15)))
)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OF_KIND: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.BOOLEAN: st.booleans(),
    Kind.INTEGER: INTEGERS,
    Kind.FLOAT: st.floats(),
    Kind.DECIMAL: DECIMALS,
    Kind.TEXT: TEXT,
    Kind.BYTES: st.binary(),
    Kind.DATE: st.dates(),
    Kind.TIME: TIMES,
    Kind.TIMESTAMP: st.datetimes(),
    Kind.TIMESTAMP_TZ: st.datetimes(timezones=st.just(dt.UTC)),
    Kind.INTERVAL: st.builds(Interval, *[st.integers(-(1 << 63), (1 << 63) - 1)] * 3),
    Kind.UUID: st.uuids(),
    Kind.JSON: JSON,
    Kind.MAP: st.dictionaries(TEXT, st.none() | TEXT, max_size=4),
}
VALUES = st.none() | st.one_of(*OF_KIND.values())
CELLS = VALUES | st.lists(VALUES, max_size=3) | st.lists(st.lists(VALUES, max_size=2), max_size=2)
ROWS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), CELLS, max_size=6)


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal and of the same type, to the last bit (NaN is NaN, 1.0 is not 1.00)."""
    if type(one) is not type(other):
        return False
    match one:
        case dict():
            return list(one) == list(other) and same(list(one.values()), list(other.values()))
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case float():
            return struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))
        case decimal.Decimal():
            return bool(one.as_tuple() == other.as_tuple())
        case dt.datetime() | dt.time():
            return bool(one == other and one.utcoffset() == other.utcoffset())
        case _:
            return bool(one == other)


class Colour(enum.Enum):
    RED = "red"


def event(**changed: Any) -> DeltaEvent:
    fields: dict[str, Any] = {
        "pipeline": "movies",
        "table": "public.movie",
        "key": (1,),
        "op": "upsert",
        "version": (1 << 63) - 1,
        "row": {"id": 1},
        "at": AT,
        "origin": "log",
    }
    return DeltaEvent(**(fields | changed))


def test_every_kind_of_column_is_tried() -> None:
    assert set(OF_KIND) == set(Kind)


@given(row=ROWS, key=st.lists(VALUES).map(tuple), before=st.none() | ROWS)
def test_a_row_survives(row: dict[str, Any], key: tuple[Any, ...], before: dict[str, Any] | None) -> None:
    given_event = event(row=row, key=key, before=before)
    assert same(tuple(decode_event(encode_event(given_event))), tuple(given_event))
    assert same(decode_key(encode_key(key)), key)


@pytest.mark.parametrize("origin", ["log", "load", "replay"])
def test_every_origin_and_operation_survives(origin: str) -> None:
    for given_event in (
        event(origin=origin),
        event(origin=origin, op="delete", row=None),
        event(row={}),
        event(row=None),
    ):
        assert decode_event(encode_event(given_event)) == given_event


def test_a_moment_comes_back_in_utc() -> None:
    moment = dt.datetime(2024, 1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30)))
    row = decode_event(encode_event(event(row={"at": moment}))).row
    assert row is not None
    assert row["at"] == moment
    assert row["at"].tzinfo is dt.UTC


def test_an_event_is_made_of_a_change_and_gives_it_back() -> None:
    upsert, delete = Change("a.b", (1, "x"), 7, {"id": 1}), Change("a.b", (1, "x"), 8, None)
    for change, op in ((upsert, "upsert"), (delete, "delete")):
        made = DeltaEvent.of("movies", change, AT, "load")
        assert (made.op, made.origin, made.at) == (op, "load", AT)
        assert decode_event(encode_event(made)).change == change


def test_an_upsert_that_could_not_be_decoded_is_no_delete() -> None:
    assert decode_event(encode_event(event(row=None))).change is None


@pytest.mark.parametrize(
    "value",
    [object(), {1}, (1, 2), 1j, {1: 2}, bytearray(b"x"), Colour.RED, [object()]],
    ids=lambda value: type(value).__name__,
)
def test_what_no_row_holds_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="a row cannot hold"):
        encode_event(event(row={"x": value}))


def test_depth_has_a_limit_beyond_what_documents_have() -> None:
    def nested(levels: int) -> object:
        value: object = 1
        for _ in range(levels):
            value = [value]
        return value

    fine = event(row={"x": nested(250)})
    assert decode_event(encode_event(fine)) == fine
    with pytest.raises(TypeError, match="nested"):
        encode_event(event(row={"x": nested(5000)}))


# ── the envelope ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_envelope_is_avros_single_object_encoding() -> None:
    data = encode_event(event())
    assert data[:2] == b"\xc3\x01"
    assert data[2:10] == delta_schemas.fingerprint(delta_schemas.load("delta_event"))


@pytest.mark.parametrize(("schema", "crc"), [("null", 0x63DD24E7CC258F8A), ("int", 0x7275D51A3F395C8F)])
def test_the_fingerprint_is_crc_64_avro(schema: str, crc: int) -> None:
    """The values are those that Avro's own implementations have."""
    assert delta_schemas.fingerprint(delta_schemas.parse({"type": schema})) == crc.to_bytes(8, "little")


def test_the_schema_is_what_was_written_before() -> None:
    """If this fails: keep the text from before your change as `delta_event.<n>.avsc`, then put the new value here."""
    known = {
        name: delta_schemas.fingerprint(delta_schemas.load(name)).hex() for name in delta_schemas.names("delta_event")
    }
    assert known == {"delta_event": "9bc6d95c67146788"}


def test_yesterdays_bytes_are_read_today() -> None:
    """As a database holds them: never to be written anew by the code under test."""
    data = bytes.fromhex(
        "c3019bc6d95c671467880c6d6f76696573187075626c69632e6d6f76696504040208026100008a808080808080100206"
        "04696404020a70726963650e08312e313008746167731c0408027800000000feffdce9c1a3890600"
    )
    assert decode_event(data) == event(
        key=(1, "a"), row={"id": 1, "price": decimal.Decimal("1.10"), "tags": ["x", None]}, version=1 << 52 | 5
    )


def older_schema() -> dict[str, Any]:
    """Return a schema as an older Delta might have had it: fewer fields, fewer kinds of values."""
    schema = json.loads(files(delta_schemas).joinpath("delta_event.avsc").read_text())
    schema["fields"] = [field for field in schema["fields"] if field["name"] != "before"]
    union = key_schema(schema)["items"]["fields"][0]["type"]
    union[:] = [branch for branch in union if not str(branch).count("IllFormed")]
    return delta_schemas.parse(schema)


def test_an_older_schemas_events_are_read_with_the_current_one() -> None:
    current, older = delta_schemas.load("delta_event"), older_schema()
    datum = {
        "pipeline": "movies",
        "table": "a.b",
        "key": [{"value": ("long", 1)}],
        "op": "upsert",
        "version": 5,
        "row": {
            "price": {"value": ("delta.Decimal", {"text": "1.10"})},
            "tags": {"value": ("delta.List", {"items": []})},
        },
        "at": AT,
        "origin": "log",
    }
    data = Codec([older]).encode(copy.deepcopy(datum))
    expected = {
        "price": {"value": ("delta.Decimal", {"text": "1.10"})},
        "tags": {"value": ("delta.List", {"items": []})},
    }
    read = Codec([current, older]).decode(data, dict)
    assert (read["row"], read["before"], read["at"]) == (expected, None, AT)
    with pytest.raises(UndecodableChange, match="newer Delta"):
        Codec([current]).decode(data, dict)


@given(at=st.integers(0), byte=st.integers(0, 255), cut=st.integers(0))
def test_damage_is_told_or_harmless(at: int, byte: int, cut: int) -> None:
    """No other error than UndecodableChange, whatever a disk or a hand did to the bytes."""
    data = bytearray(
        encode_event(
            event(row={"a": decimal.Decimal(1), "b": ["é", uuid.UUID(int=1)], "c": dt.time.max, "d": {"e": AT}})
        )
    )
    data[at % len(data)] = byte
    with contextlib.suppress(UndecodableChange):
        decode_event(bytes(data))
    with pytest.raises(UndecodableChange):
        decode_event(bytes(data[: cut % len(data)]))


def test_damage_within_a_value_is_told() -> None:
    data = encode_event(event(row={"price": decimal.Decimal("1.10")}))
    with pytest.raises(UndecodableChange, match="damaged"):
        decode_event(data.replace(b"1.10", b"1,10"))


def test_nothing_may_follow() -> None:
    with pytest.raises(UndecodableChange, match="follows"):
        decode_event(encode_event(event()) + b"\0")


def test_a_schema_is_parsed_once() -> None:
    assert delta_schemas.load("delta_event") is delta_schemas.load("delta_event")
    with pytest.raises(FileNotFoundError):
        delta_schemas.load("nonsense")
