"""Pieces of the statements by which a PostgreSQL source is read, and rows of what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psycopg
from psycopg import sql

from delta_sync.changes import Key
from delta_sync.secrets import redact
from delta_sync.tables import Column, Table
from delta_sync.values import Row, scalar_text


def parameter(column: Column) -> sql.Composable:
    """A value of the key column's own type: values that Python cannot hold are text, which PostgreSQL reads back."""
    return sql.SQL("%s::{}").format(type_of(column))


def type_of(column: Column) -> sql.Composable:
    """The column's type, which the catalogue wrote, so it is quoted already."""
    return fixed(sql.SQL(column.type))  # pyright: ignore[reportArgumentType] -- the catalogue's text, not a user's


def key_rows(table: Table) -> sql.Composable:
    """The keys, passed as one array per key column, as a relation with the key's column names."""
    types = [sql.SQL("%s::{}[]").format(type_of(table.column(name))) for name in table.key]
    return sql.SQL("unnest({}) AS k({})").format(sql.SQL(", ").join(types), key_columns(table))


def array(values: Iterable[Any]) -> list[Any]:
    """Return values of one column as the parameter for an array of its type.

    Psycopg takes values of one type only. Where Python cannot hold some of them (infinity, years before Christ) these
    are text, so all are.
    """
    found = list(values)
    if len({*map(type, found)} - {type(None)}) > 1 and any(isinstance(value, str) for value in found):
        return [None if value is None else scalar_text(value) for value in found]
    return found


def row_maker(table: Table) -> Callable[[Sequence[Any]], tuple[Key, Row]]:
    """Return a function from a row as it is read to its key and the row, masked.

    Its columns come in the table's order; what stands behind them is left out.
    """
    names = [column.name for column in table.columns]
    places = [names.index(name) for name in table.key]
    masks = [(column.name, column.mask.function()) for column in table.columns if column.mask]

    def with_one_key_column(values: Sequence[Any]) -> tuple[Key, Row]:
        """Of most tables: half the time of the other one."""
        return (values[place],), dict(zip(names, values))  # noqa: B905 -- as the query was made of them

    def to_row(values: Sequence[Any]) -> tuple[Key, Row]:
        row = dict(zip(names, values))  # noqa: B905 -- as the query was made of them
        for name, mask in masks:
            if row[name] is not None:
                row[name] = mask(row[name])
        return tuple(values[place] for place in places), row

    place = places[0]
    return to_row if masks or len(places) > 1 else with_one_key_column


def key_columns(table: Table) -> sql.Composable:
    """The key's columns, separated by commas."""
    return fixed(sql.SQL(", ").join(map(sql.Identifier, table.key)))


def fixed(part: sql.Composable, connection: psycopg.Connection | None = None) -> sql.Composable:
    """A part of a query with parameters that has none itself: a percent sign in it is of a name, and no placeholder.

    Values in it need the connection, for its encoding.
    """
    return sql.SQL(part.as_string(connection).replace("%", "%%"))  # pyright: ignore[reportArgumentType] -- quoted


def qualified(table: Table) -> sql.Identifier:
    """The table's name with its schema."""
    return sql.Identifier(table.schema, table.name)


def said_of(table: Table, error: psycopg.Error) -> str:
    """Return what the server says of a user's SQL; not where it may quote a value of a column that is masked."""
    if isinstance(error, psycopg.DataError) and table.has_masks:
        return f"{type(error).__name__}; more is not said, because it may quote a value that is masked"
    return redact(error.diag.message_primary or str(error))
