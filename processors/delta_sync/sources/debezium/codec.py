"""Columns and values by the schemas that Debezium writes: of any connector, with whatever options it has.

A value is turned into Python's by the schema of its own record, so a column may change its type while old records are
still to be read. What a schema does not say more about stays as Avro has it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, cast
from uuid import UUID

from delta_sync.decoding import Image, TableCodec
from delta_sync.kafka.avro import column_name, shortened
from delta_sync.sources.codec import key_decoder, parse_json, row_decoder
from delta_sync.tables import Column, Kind, Table

Json = Any  # an Avro schema or a part of it
Convert = Callable[[Any], Any]

_EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 -- such a value has no zone
_EPOCH_ORDINAL = _EPOCH.toordinal()


class ReadColumn(NamedTuple):
    """A column as a schema has it, and how its values are read; None: they are what they are."""

    column: Column
    convert: Convert | None
    default: bool = False  # a NULL may arrive as the column's default


def table_codec(table: Table) -> TableCodec:
    """Return how the events of a table are read whose values have been read by their own schemas. They lack nothing."""
    return TableCodec(table, row_decoder(table, _as_it_is), key_decoder(table, _as_it_is), _lacks_nothing)


def _as_it_is(_column: Column) -> None:
    return None


def _lacks_nothing(_image: Image) -> bool:
    return False


def columns_of(row: Mapping[str, Json]) -> list[ReadColumn]:
    """Return the columns of a row's schema, a record of Avro with what Kafka Connect says beside its types."""
    return [_column(field) for field in row["fields"]]


def _column(field: Mapping[str, Json]) -> ReadColumn:
    kind, nullable = _without_null(field["type"])
    value_kind, text, dimensions, convert = _kind_of(kind)
    column = Column(column_name(field["name"]), text, value_kind, dimensions, nullable)
    default = field.get("default", None) is not None or (isinstance(kind, dict) and "connect.default" in kind)
    return ReadColumn(column, convert, nullable and default)


def _without_null(kind: Json) -> tuple[Json, bool]:
    if not isinstance(kind, list):
        return kind, False
    others: list[Json] = [branch for branch in kind if branch != "null"]  # pyright: ignore[reportUnknownVariableType] -- JSON
    return (others[0] if len(others) == 1 else others), True


def _kind_of(kind: Json) -> tuple[Kind, str, int, Convert | None]:
    """Return a type's kind, its name, its dimensions and how its values are read."""
    if isinstance(kind, str):
        found, text = _PLAIN.get(kind, (Kind.JSON, kind))
        return found, text, 0, shortened if kind == "float" else None
    if not isinstance(kind, dict):
        return Kind.JSON, "union", 0, None
    said = cast("dict[str, Any]", kind)
    name: str = said.get("connect.name", "")
    if name == _DECIMAL:
        scale = int(said.get("connect.parameters", {}).get("scale", said.get("scale", 0)))
        return Kind.DECIMAL, f"decimal({scale})", 0, lambda value: _decimal(value, scale)
    if name in _NAMED:
        found, convert = _NAMED[name]
        return found, name.rpartition(".")[2], 0, convert
    inner: Json = said["type"]
    if inner == "array":
        items, _ = _without_null(said["items"])
        found, text, dimensions, convert = _kind_of(items)
        return found, f"{text}[]", dimensions + 1, None if convert is None else _each(convert)
    if inner in ("record", "enum", "map"):
        return (Kind.TEXT if inner == "enum" else Kind.JSON), name.rpartition(".")[2] or str(inner), 0, None
    found, text, dimensions, convert = _kind_of(inner)
    return found, name.rpartition(".")[2] or text, dimensions, convert


_PLAIN: Mapping[str, tuple[Kind, str]] = {
    "boolean": (Kind.BOOLEAN, "boolean"),
    "int": (Kind.INTEGER, "int"),
    "long": (Kind.INTEGER, "long"),
    "float": (Kind.FLOAT, "float"),
    "double": (Kind.FLOAT, "double"),
    "string": (Kind.TEXT, "string"),
    "bytes": (Kind.BYTES, "bytes"),
}


def _each(convert: Convert) -> Convert:
    def read(values: Any) -> Any:
        return [None if value is None else convert(value) for value in values]

    return read


# ── what Kafka Connect and Debezium mean by their names ──────────────────────────────────────────────────────────


def _decimal(value: bytes, scale: int) -> Decimal:
    return Decimal(int.from_bytes(value, "big", signed=True)).scaleb(-scale)


def _any_scale(value: Mapping[str, Any]) -> Decimal:
    return _decimal(value["value"], value["scale"])


def _date(days: int) -> dt.date:
    return dt.date.fromordinal(_EPOCH_ORDINAL + days)


def _timestamp(per_second: int) -> Convert:
    def read(value: int) -> dt.datetime:
        return _EPOCH + dt.timedelta(microseconds=value * 1_000_000 // per_second)

    return read


def _time(per_second: int) -> Convert:
    read = _timestamp(per_second)
    return lambda value: read(value).time()


def _zoned(value: str) -> dt.datetime:
    return dt.datetime.fromisoformat(value).astimezone(dt.UTC)


_DECIMAL = "org.apache.kafka.connect.data.Decimal"
_MS, _US, _NS = 1000, 1_000_000, 1_000_000_000
_NAMED: Mapping[str, tuple[Kind, Convert | None]] = {
    "io.debezium.data.VariableScaleDecimal": (Kind.DECIMAL, _any_scale),
    "io.debezium.data.Json": (Kind.JSON, parse_json),
    "io.debezium.data.Uuid": (Kind.UUID, UUID),
    "io.debezium.time.Date": (Kind.DATE, _date),
    "io.debezium.time.Time": (Kind.TIME, _time(_MS)),
    "io.debezium.time.MicroTime": (Kind.TIME, _time(_US)),
    "io.debezium.time.NanoTime": (Kind.TIME, _time(_NS)),
    "io.debezium.time.Timestamp": (Kind.TIMESTAMP, _timestamp(_MS)),
    "io.debezium.time.MicroTimestamp": (Kind.TIMESTAMP, _timestamp(_US)),
    "io.debezium.time.NanoTimestamp": (Kind.TIMESTAMP, _timestamp(_NS)),
    "io.debezium.time.ZonedTimestamp": (Kind.TIMESTAMP_TZ, _zoned),
    "org.apache.kafka.connect.data.Date": (Kind.DATE, _date),
    "org.apache.kafka.connect.data.Time": (Kind.TIME, _time(_MS)),
    "org.apache.kafka.connect.data.Timestamp": (Kind.TIMESTAMP, _timestamp(_MS)),
}
