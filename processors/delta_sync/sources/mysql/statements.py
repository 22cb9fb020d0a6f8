"""Pieces of the statements by which a MariaDB source is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pymysql
from pymysql.cursors import SSCursor

from delta_sync.changes import Key
from delta_sync.secrets import redact
from delta_sync.sources.mysql import codec
from delta_sync.sources.mysql.codec import quoted
from delta_sync.sources.mysql.connection import Session, code_of
from delta_sync.tables import Column, Table

UNKNOWN_COLUMN = 1054


def stream(session: Session, query: str, parameters: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield a query's rows, one in memory at a time. Nothing else may be asked before the last of them."""
    cursor = session.cursor(SSCursor)
    cursor.execute(query, parameters)
    while (row := cursor.fetchone()) is not None:
        yield row
    cursor.close()


def fetch(session: Session, query: str, parameters: tuple[Any, ...] | None = None) -> tuple[tuple[Any, ...], ...]:
    """Return a query's rows."""
    with session.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall()


def qualified(table: Table) -> str:
    """Return the table's name with its database."""
    return f"{quoted(table.schema)}.{quoted(table.name)}"


def having(
    table: Table, columns: Sequence[str], values: Sequence[Key], alias: str = "t"
) -> tuple[str, tuple[Any, ...]]:
    """Return a condition for the rows whose columns have one of these values, and its parameters.

    Literals are compared as the column is, by its collation and index; those of a table of values would not be.
    """
    names = [f"{alias}.{quoted(name)}" for name in columns]
    of = [table.column(name) for name in columns]
    given = tuple(_compared(*one) for some in values for one in zip(of, some, strict=True))
    if len(names) == 1:
        return f"{names[0]} IN ({', '.join(['%s'] * len(values))})", given
    one = " AND ".join(f"{name} = %s" for name in names)
    return "(" + " OR ".join([f"({one})"] * len(values)) + ")", given


def _compared(column: Column, value: Any) -> Any:
    """Return a value as a parameter; NULL, which no row equals, for one that the column cannot have."""
    try:
        found = codec.parameter(column, value)
        return found if not isinstance(found, str) else found.encode().decode()
    except ValueError:  # no member of an enumeration, or a text with half a character
        return None


def key_values(table: Table, key: Key) -> list[Any]:
    """Return a key's values as parameters."""
    return [codec.parameter(table.column(name), value) for name, value in zip(table.key, key, strict=True)]


def said_of(table: Table, error: pymysql.Error) -> str:
    """Return what the server says of a user's SQL; not where it may quote a value of a column that is masked."""
    if table.has_masks and not isinstance(error, pymysql.err.ProgrammingError) and code_of(error) != UNKNOWN_COLUMN:
        return f"error {code_of(error)}; more is not said, because it may quote a value that is masked"
    return redact(str(error.args[-1]))
