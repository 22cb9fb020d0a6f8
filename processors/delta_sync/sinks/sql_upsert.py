"""Writes as rows of a table, and the statement that upserts them. All of it is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import ReturningInsert

from delta_sync.changes import Outcome, Write, rejected
from delta_sync.errors import Unstorable
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.sinks.columns import ID_COLUMN, Kind, checked_text, fields_of, fitted, folded, wider
from delta_sync.sinks.sql_tables import DELETED_COLUMN, MAX_COLUMNS, OWN_COLUMNS, Place, Shape
from delta_sync.sinks.sql_values import AS_IT_IS_IN_POSTGRESQL, AS_IT_IS_IN_SQLITE, Raw, as_text
from delta_sync.tables import key_text


class Row(NamedTuple):
    """A write on its way: its place in the batch, and its fields' kinds and values."""

    number: int
    id: str
    version: int
    fields: Mapping[str, tuple[Kind, Any]] | None  # None: a delete


def rows_of(place: Place, writes: Sequence[Write]) -> tuple[list[Row], dict[str, Kind], dict[int, Outcome]]:
    """Return the writes that a row can hold, the kinds that their fields' columns should have, and other outcomes."""
    outcomes: dict[int, Outcome] = {}
    rows: list[Row] = []
    wanted: dict[str, Kind] = {}
    for index, write in enumerate(writes):
        try:
            fields = None if write.document is None else fields_of(write.document, place.is_sqlite)
            id_ = checked_text(key_text(write.key), place.is_sqlite)
        except Unstorable as error:
            outcomes[index] = rejected(str(error).rstrip("."))
            continue
        rows.append(Row(index, id_, write.version, fields))
        for name, (kind, _) in (fields or {}).items():
            before = wanted.get(name)
            if before != kind:
                wanted[name] = kind if before is None else wider(before, kind)
    wanted |= {name: kind for name, kind in place.columns.items() if name in wanted}
    return rows, wanted, outcomes


def values_of(
    shown: str, place: Place, shape: Shape, rows: Sequence[Row], now_ms: int
) -> tuple[list[tuple[Row, dict[str, Any]]], dict[int, Outcome]]:
    """Return the rows that fit the table, with the values of its columns by their keys, and the others' outcomes.

    `shown` is what messages call the table; `now_ms`, in milliseconds since 1970, dates tombstones.
    """
    outcomes: dict[int, Outcome] = {}
    fit: list[tuple[Row, dict[str, Any]]] = []
    keys = {name: f"f{number}" for number, name in enumerate(shape.kinds)}
    empty = dict.fromkeys(keys.values())
    as_it_is = AS_IT_IS_IN_SQLITE if place.is_sqlite else AS_IT_IS_IN_POSTGRESQL
    for row in rows:
        values = {**empty, ID_COLUMN: row.id, VERSION_FIELD: row.version, DELETED_COLUMN: None}
        if row.fields is None:
            values[DELETED_COLUMN] = now_ms
        try:
            for name, (kind, value) in (row.fields or {}).items():
                if name not in keys:
                    raise Unstorable(_no_column(place, shape, name))
                if kind != shape.kinds[name]:
                    kind, value = fitted(shown, name, shape.kinds[name], kind, value)
                values[keys[name]] = value if kind in as_it_is else as_text(kind, value)
        except Unstorable as error:
            outcomes[row.number] = rejected(str(error).rstrip("."))
        else:
            fit.append((row, values))
    fit.sort(key=lambda pair: pair[0].id)  # in one order everywhere: two batches that lock rows never deadlock
    return fit, outcomes


def _no_column(place: Place, shape: Shape, name: str) -> str:
    same = next((one for one in (*shape.kinds, *OWN_COLUMNS) if folded(one) == folded(name)), None)
    if place.is_sqlite and same is not None:
        return f"the field {name} differs from the column {same} in case alone, which SQLite takes for the same"
    return (
        f"the field {name} would be one column too many: a table has {MAX_COLUMNS} at most; put fields that vary"
        " into one that holds them as an object"
    )


def insertion(
    table: sa.Table, rows: Sequence[Mapping[str, Any]], *, is_sqlite: bool
) -> postgresql.Insert | sqlite.Insert:
    """Return the statement that inserts rows: PostgreSQL's holds them, SQLite's is executed with them."""
    if is_sqlite:
        return sqlite.insert(table)
    return postgresql.insert(table).from_select(*_unnested(table, rows))


def upserting(
    table: sa.Table, insert: postgresql.Insert | sqlite.Insert, where: sa.ColumnElement[bool]
) -> ReturningInsert[str]:
    """Return the statement that replaces the rows for which `where` holds, and names those that it has written."""
    return insert.on_conflict_do_update(
        index_elements=[table.c[ID_COLUMN]],
        set_={column: insert.excluded[column.key] for column in table.c if column.key != ID_COLUMN},
        where=where,
    ).returning(table.c[ID_COLUMN])


_OWN_SPECS = {ID_COLUMN: "text", VERSION_FIELD: "bigint", DELETED_COLUMN: "bigint"}


def _unnested(table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> tuple[list[sa.Column[Any]], sa.Select[Any]]:
    """Return rows as a query of PostgreSQL's, and its columns: one array for each, NULL for those without a value.

    A statement of a few parameters, whatever the number of rows: to parse one with a parameter for each value takes the
    server and SQLAlchemy several times as long as to write the rows.
    """
    arrays: dict[str, sa.ColumnElement[Any]] = {}
    specs = {column.key: _OWN_SPECS.get(column.key) or cast("Raw", column.type).spec for column in table.c}
    for name, spec in specs.items():
        values = [row[name] for row in rows]
        if any(value is not None for value in values):
            # JSON goes as text: the driver has no arrays of what it need not look into.
            of = "text" if spec == "jsonb" else spec
            arrays[name] = sa.cast(sa.bindparam(None, values, type_=Raw("")), Raw(f"{of}[]"))
    source = sa.func.unnest(*arrays.values()).table_valued(*arrays).render_derived()
    columns = [sa.cast(source.c[name] if name in arrays else sa.null(), Raw(spec)) for name, spec in specs.items()]
    return list(table.c), sa.select(*columns)
