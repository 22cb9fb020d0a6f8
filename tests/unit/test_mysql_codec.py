"""MariaDB's values as Debezium writes them in JSON and in Avro: one Python value."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pytest

from delta_sync.errors import UndecodableChange
from delta_sync.sources.mysql.catalogue import column_of, file_name, validated_column
from delta_sync.sources.mysql.codec import lacks, log_converter, members, parameter, row_maker, table_codec
from delta_sync.tables import Column, Table

UTC = dt.UTC


def column(type_: str, *, nullable: bool = True, name: str = "c", extra: str = "") -> Column:
    data_type = type_.partition("(")[0].partition(" ")[0]
    digits = {"precision": "10", "scale": "2"} if data_type == "decimal" else {"precision": None, "scale": None}
    row = {"name": name, "type": type_, "data_type": data_type, "nullable": "YES" if nullable else "NO", "extra": extra}
    return column_of({**row, **digits})


@pytest.mark.parametrize(
    ("type_", "json", "avro", "value"),
    [
        ("bigint(20) unsigned", "AP//////////", Decimal(2**64 - 1), 2**64 - 1),
        ("bigint(20) unsigned", "Kg==", b"\x2a", 42),
        ("bit(9)", "AQE=", b"\x01\x01", 257),
        ("bit(16)", "AQI=", b"\x01\x02", 513),  # the least significant byte first
        ("bit(1)", True, True, True),
        ("tinyint(1)", 2, True, True),
        ("binary(4)", "YQ==", b"a", b"a\0\0\0"),
        ("varbinary(4)", "AP8=", b"\x00\xff", b"\x00\xff"),
        ("float", 0.1, 0.10000000149011612, 0.1),
        ("float", 1.6777216e7, 16777216.0, 16777216.0),
        ("decimal(10,2)", "-1.50", "-1.50", Decimal("-1.50")),
        ("date", 19782, 19782, dt.date(2024, 2, 29)),
        ("time(3)", 500_000, 500_000, dt.time(0, 0, 0, 500_000)),
        ("time(1)", -3_020_399_900_000, -3_020_399_900_000, "-838:59:59.9"),
        ("datetime(6)", -1, -1, dt.datetime(1969, 12, 31, 23, 59, 59, 999_999)),  # noqa: DTZ001 -- without a zone
        (
            "timestamp",
            "2024-02-29T01:02:03.5Z",
            "2024-02-29T01:02:03.5Z",
            dt.datetime(2024, 2, 29, 1, 2, 3, 500_000, UTC),
        ),
        ("timestamp", "1970-01-01T00:00:00Z", "1970-01-01T00:00:00Z", None),
    ],
)
def test_json_and_avro(type_: str, json: Any, avro: Any, value: Any) -> None:
    convert = log_converter(column(type_))
    assert convert is not None
    assert convert(json) == convert(avro) == value
    assert type(convert(json)) is type(convert(avro)) is type(value)


def test_an_image_lacks_what_the_log_does_not_carry() -> None:
    plain = Table("s", "t", (column("int(11)", name="id"), column("date", name="d")), ("id",))
    assert not lacks(plain)({"id": 1, "d": None})
    assert not lacks(plain)({"id": 1, "d": 0})  # it may be NULL, so a zero date is
    strict = plain._replace(columns=(plain.columns[0], column("date", name="d", nullable=False)))
    assert lacks(strict)({"id": 1, "d": 0})
    assert not lacks(strict)({"id": 1, "d": 1})
    generated = plain._replace(columns=(*plain.columns, column("int(11)", name="g", extra="VIRTUAL GENERATED")))
    assert lacks(generated)({"id": 1, "d": None})


def test_undecodable() -> None:
    table = Table("s", "t", (column("int(11)", name="id"), column("date", name="d")), ("id", "d"))
    codec = table_codec(table)
    with pytest.raises(UndecodableChange, match=r"s\.t\.d"):
        codec.row({"id": 1, "d": "no date"})
    with pytest.raises(UndecodableChange, match=r"s\.t\.d"):
        table_codec(table).key({"id": 1, "d": None})
    with pytest.raises(UndecodableChange, match=r"s\.t\.id"):
        codec.key({})


def test_rows_of_a_dump() -> None:
    table = Table("s", "t", (column("date", name="d"), column("int(11)", name="id")), ("id",))
    assert row_maker(table)(("2024-02-29", "7")) == ((7,), {"d": dt.date(2024, 2, 29), "id": 7})
    assert row_maker(table)((None, "7")) == ((7,), {"d": None, "id": 7})


def test_keys_are_compared_as_their_index_is_sorted() -> None:
    enum, set_ = column("enum('z','it''s','a')"), column("set('z','a','m')")
    assert members(enum.type) == ["z", "it's", "a"]
    assert [parameter(enum, value) for value in ("z", "it's", "a", "")] == [1, 2, 3, 0]
    assert [parameter(set_, value) for value in ("", "z", "z,m")] == [0, 1, 5]
    assert parameter(column("tinyint(1)"), True) == 1
    assert parameter(column("timestamp"), dt.datetime(2024, 1, 2, tzinfo=UTC)) == "2024-01-02 00:00:00"


def test_names() -> None:
    assert file_name("odd.na-me_1") == "odd@002ena@002dme_1"
    assert validated_column("json_valid(`a``b`)") == "a`b"
    assert validated_column("json_valid(`a`) and `a` > 1") is None
