"""What columns of PostgreSQL and SQLite hold: their types, values on their way in and on their way out.

A field's column comes with the first document that has a value for it, and has that value's type:

| Python | PostgreSQL | SQLite (declared type) |
| --- | --- | --- |
| `bool` | boolean | BOOLEAN |
| `int` of 64 bits | bigint | BIGINT |
| `float` (NaN: NULL) | double precision | DOUBLE |
| `Decimal`, larger `int` (NaN: NULL) | numeric | DECIMAL_TEXT: SQLite has no exact decimals |
| `str`, `Interval`, `time` with an offset | text | TEXT |
| `bytes` | bytea | BLOB |
| `date`, `time` | date, time | DATE_TEXT, TIME_TEXT, in ISO 8601 |
| `datetime`, naive | timestamp | TIMESTAMP_TEXT |
| `datetime`, aware | timestamp with time zone | TIMESTAMPTZ_TEXT, in UTC |
| `UUID` | uuid | UUID_TEXT |
| `dict`, `list`, `tuple`, `set` | jsonb | JSON_TEXT |

None is NULL, and so is a field that a document lacks: the two cannot be told apart. A value that does not fit its
column's type is rejected, and nothing is rounded or cut.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from delta_sync.sinks.columns import Kind, number, numbers, plain
from delta_sync.values import decimal_text, from_json, scalar_text, to_json

POSTGRESQL_TYPES: Mapping[Kind, str] = {  # as format_type() writes them
    "boolean": "boolean",
    "integer": "bigint",
    "float": "double precision",
    "decimal": "numeric",
    "text": "text",
    "bytes": "bytea",
    "date": "date",
    "time": "time without time zone",
    "timestamp": "timestamp without time zone",
    "timestamptz": "timestamp with time zone",
    "uuid": "uuid",
    "json": "jsonb",
}
SQLITE_TYPES: Mapping[Kind, str] = {  # whatever has TEXT in its name is kept as it is: SQLite would round decimals
    "boolean": "BOOLEAN",
    "integer": "BIGINT",
    "float": "DOUBLE",
    "decimal": "DECIMAL_TEXT",
    "text": "TEXT",
    "bytes": "BLOB",
    "date": "DATE_TEXT",
    "time": "TIME_TEXT",
    "timestamp": "TIMESTAMP_TEXT",
    "timestamptz": "TIMESTAMPTZ_TEXT",
    "uuid": "UUID_TEXT",
    "json": "JSON_TEXT",
}


# What the driver takes as it is; of the others `as_text` makes one.
AS_IT_IS_IN_SQLITE: frozenset[Kind] = frozenset({"boolean", "integer", "float", "text", "bytes"})
AS_IT_IS_IN_POSTGRESQL: frozenset[Kind] = frozenset(POSTGRESQL_TYPES) - {"json"}


class Raw(sa.types.UserDefinedType[Any]):
    """A column whose values the driver takes and gives as they are."""

    cache_ok = True

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def get_col_spec(self, **_: object) -> str:
        return self.spec


class _Jsonb(Raw):
    """PostgreSQL's JSON, read as its text: the driver's own parser would make other numbers of it than `from_json`."""

    cache_ok = True

    def column_expression(self, colexpr: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(colexpr, sa.Text)


def column_type(kind: Kind | None, types: Mapping[Kind, str]) -> Raw:
    """Return the column's type for SQLAlchemy; `types` are the database's names of types."""
    spec = "TEXT" if kind is None else types[kind]
    return _Jsonb(spec) if spec == "jsonb" else Raw(spec)


def as_text(kind: Kind, value: Any) -> str:
    """Return a value that the driver does not take as it is."""
    match kind:
        case "json":
            return to_json(value).decode()
        case "decimal":
            return decimal_text(value)
        case _:
            return scalar_text(value)


def document_of(kinds: Mapping[str, Kind | None], values: Iterable[Any]) -> dict[str, Any]:
    """Return a row's document, as `stored_form` has it."""
    return {
        name: _read(kind, value) for (name, kind), value in zip(kinds.items(), values, strict=True) if value is not None
    }


def _read(kind: Kind | None, value: Any) -> Any:
    match kind:
        case "boolean":
            return bool(value)
        case "json":
            return numbers(from_json(value.encode()))
        case "decimal":
            return number(decimal.Decimal(value))
        case None:
            return str(value)
        case _ if isinstance(value, str):
            return value  # SQLite's texts are written so
        case _:
            return plain(kind, value)
