"""Documents that are built from several tables, in MariaDB's SQL: parts of roots, and the roots that a change is about.

Parts are read in the snapshot in which their roots were, one query for each part. There are no arrays, and a table made
of values has a collation of its own; so each query begins at rows of the table above, by their keys, and the server
decides which rows belong to them, by its own idea of equality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pymysql
from pymysql.constants import FIELD_TYPE

from delta_sync.changes import Key
from delta_sync.documents import Watch
from delta_sync.errors import UsageError
from delta_sync.sources import parts
from delta_sync.sources.mysql import codec
from delta_sync.sources.mysql.codec import quoted
from delta_sync.sources.mysql.connection import Session, code_of
from delta_sync.sources.mysql.statements import fetch, having, qualified, said_of, stream
from delta_sync.sources.parts import Owners, ReadPart, Rows, TooMuch
from delta_sync.tables import Column, Kind, Part, Table
from delta_sync.values import Row

VALUES_AT_ONCE = 500  # in a statement: from 1,000 on the server makes a temporary table of them

_TABLE_GONE: Final = frozenset(
    {1146, 1049, 1412}
)  # the table, the database, the table as it was: not the query's fault


def attach(session: Session, table: Table, rows: Rows) -> list[tuple[Key, Row | None]]:
    """Return rows of a root with their parts: of all of them, or of the first ones, as far as memory has room.

    In place of a part with too many rows for a document stands a ProcessorError. None: the user's query has no row for
    this key. The session is in a transaction with one snapshot. Raises UsageError when the user's query fails.
    """
    query = table.query
    if query is not None:
        return parts.by_query(table, [key for key, _ in rows], lambda keys: _run(session, table, keys, query))
    return parts.attach(table, rows, _ReadPart(session))


class _ReadPart(ReadPart):
    def __init__(self, session: Session) -> None:
        self._session = session

    def owner_columns(self, part: Part, above: Table) -> tuple[str, ...]:
        del part
        return above.key

    def __call__(self, part: Part, above: Table, owners: Owners) -> list[tuple[int, Row]]:
        places = {owner: place for place, owner in enumerate(owners)}
        to_owner = codec.row_maker(above._replace(columns=tuple(above.column(name) for name in above.key)))
        to_row = codec.row_maker(part.table)
        width = len(above.key)
        found: list[tuple[int, Row]] = []
        size = 0
        for start in range(0, len(owners), VALUES_AT_ONCE):
            query, parameters = _query(part, above, owners[start : start + VALUES_AT_ONCE], len(found))
            for values in stream(self._session, query, parameters):
                size += sum(len(value) for value in values if value is not None)
                if len(found) < parts.ROWS_AT_ONCE and size <= parts.BYTES_AT_ONCE:
                    owner, _ = to_owner(values[:width])
                    found.append((places[owner], to_row(values[width:-1])[1]))
                else:
                    size = parts.BYTES_AT_ONCE + 1  # the rest of what the server sends is taken, and forgotten
            if size > parts.BYTES_AT_ONCE:
                raise TooMuch
        return found


def _query(part: Part, above: Table, owners: Owners, have: int) -> tuple[str, tuple[Any, ...]]:
    """Return the query for the rows of a part that belong to some rows of the table above, and its parameters.

    A row is the owner's key, the part's columns, and its number. `have` are the rows that are there already.
    """
    keys = above._replace(columns=tuple(above.column(name) for name in above.key))
    columns = [*codec.selected(keys, "a"), *codec.selected(part.table, "t")]
    names = [f"`delta:{number}`" for number in range(len(columns))]
    selected = ", ".join(f"{column} AS {name}" for column, name in zip(columns, names, strict=True))
    owner = ", ".join(f"a.{quoted(name)}" for name in above.key)
    order = ", ".join(f"t.{quoted(name)}" for name in part.order_by or part.table.key)
    joined = f"{qualified(above)} AS a JOIN "
    if part.through is None:
        joined += f"{qualified(part.table)} AS t ON {_equal('t', part.columns, 'a', part.of)}"
    else:
        link = part.through
        joined += (
            f"{qualified(link.table)} AS l ON {_equal('l', link.columns, 'a', part.of)}"
            f" JOIN {qualified(part.table)} AS t ON {_equal('t', part.columns, 'l', link.to)}"
        )
    condition, parameters = having(above, above.key, owners, "a")
    most = part.most + 1 if part.many else 1
    query = (
        f"SELECT * FROM (SELECT {selected}, ROW_NUMBER() OVER (PARTITION BY {owner} ORDER BY {order}) AS `delta:n`"  # noqa: S608 -- quoted
        f" FROM {joined} WHERE {condition}) AS q WHERE `delta:n` <= {most}"
        f" ORDER BY {', '.join(names[: len(above.key)])}, `delta:n` LIMIT {parts.ROWS_AT_ONCE + 1 - have}"
    )
    return query, parameters


def _equal(one: str, columns: Sequence[str], other: str, of: Sequence[str]) -> str:
    pairs = zip(columns, of, strict=True)
    return " AND ".join(f"{one}.{quoted(column)} = {other}.{quoted(same)}" for column, same in pairs)


# ── a user's own query ───────────────────────────────────────────────────────────────────────────────────────────


def check_query(session: Session, table: Table) -> None:
    """Have the server plan the user's query. Raises UsageError: it fails, or does not return the whole key."""
    _run(session, table, [], parts.planned(table))


def _run(session: Session, table: Table, keys: Sequence[Key], query: str) -> list[Row]:
    """Run a user's query. Its parameters are lists of the keys' values, each named like its key column.

    Raises UsageError: it fails, or does not return the whole key.
    """
    parameters = {
        name: [codec.parameter(table.column(name), key[place]) for key in keys] or [None]  # `IN ()` is no SQL
        for place, name in enumerate(table.key)
    }
    try:
        with session.cursor() as cursor:
            cursor.execute(query, parameters)
            rows: Sequence[tuple[Any, ...]] = cursor.fetchall()
            described = cursor.description or ()
    except (pymysql.ProgrammingError, pymysql.DataError, pymysql.NotSupportedError, pymysql.OperationalError) as error:
        if not session.open or code_of(error) in _TABLE_GONE:
            raise
        raise UsageError(f"The query of document {table.id} fails: {said_of(table, error)}.") from error
    except (KeyError, TypeError, ValueError) as error:  # of Python's own placeholders
        raise UsageError(
            f"The query of document {table.id} fails: its placeholders are"
            f" {', '.join(f'%({name})s' for name in table.key)}, and a percent sign is written as %%."
        ) from error
    names = [str(column[0]) for column in described]
    parts.check_has_key(table, names)
    converters = [_converter(table, str(column[0]), int(column[1])) for column in described]
    return [
        {
            name: value if value is None or convert is None else convert(value)
            for name, convert, value in zip(names, converters, row, strict=True)
        }
        for row in rows
    ]


_KINDS: Final[Mapping[int, tuple[Kind, str]]] = {
    FIELD_TYPE.TINY: (Kind.INTEGER, "int"),
    FIELD_TYPE.SHORT: (Kind.INTEGER, "int"),
    FIELD_TYPE.INT24: (Kind.INTEGER, "int"),
    FIELD_TYPE.LONG: (Kind.INTEGER, "int"),
    FIELD_TYPE.LONGLONG: (Kind.INTEGER, "int"),
    FIELD_TYPE.YEAR: (Kind.INTEGER, "int"),
    FIELD_TYPE.BIT: (Kind.INTEGER, "bit"),
    FIELD_TYPE.DECIMAL: (Kind.DECIMAL, "decimal"),
    FIELD_TYPE.NEWDECIMAL: (Kind.DECIMAL, "decimal"),
    FIELD_TYPE.FLOAT: (Kind.FLOAT, "double"),  # the server's text has six digits
    FIELD_TYPE.DOUBLE: (Kind.FLOAT, "double"),
    FIELD_TYPE.DATE: (Kind.DATE, "date"),
    FIELD_TYPE.NEWDATE: (Kind.DATE, "date"),
    FIELD_TYPE.TIME: (Kind.TIME, "time"),
    FIELD_TYPE.DATETIME: (Kind.TIMESTAMP, "datetime"),
    FIELD_TYPE.TIMESTAMP: (Kind.TIMESTAMP_TZ, "timestamp"),
}
"""What columns of a query's answer hold, by the type that the server says; all others are text, or bytes."""


def _converter(table: Table, name: str, type_: int) -> Callable[[Any], Any] | None:
    """Return what makes values of a query's column: the key's as rows have them, others by the type of the answer."""
    if name in table.key:
        return codec.dump_converter(table.column(name))
    if type_ not in _KINDS:
        return None
    kind, as_type = _KINDS[type_]
    return codec.dump_converter(Column(name, as_type, kind))


# ── from a change to the roots ───────────────────────────────────────────────────────────────────────────────────


def root_keys(session: Session, watch: Watch, values: Sequence[Key], most: int) -> list[Key]:
    """Return the root's keys to which values of a watch with hops lead, at most so many. Raises pymysql.Error."""
    last = watch.hops[-1]
    narrow = last.table._replace(columns=tuple(last.table.column(name) for name in last.take), key=last.take)
    to_row = codec.row_maker(narrow)
    found: dict[Key, None] = {}
    for start in range(0, len(values), VALUES_AT_ONCE):
        selected = ", ".join(codec.selected(narrow, _alias(len(watch.hops) - 1)))
        hops, parameters = _hops(watch, values[start : start + VALUES_AT_ONCE])
        rows = fetch(session, f"SELECT DISTINCT {selected} FROM {hops} LIMIT {most}", parameters)  # noqa: S608 -- quoted
        found.update((key, None) for key, _ in map(to_row, rows) if None not in key)
        if len(found) >= most:
            break
    return list(found)[:most]


def root_condition(session: Session, root: Table, watch: Watch, values: Sequence[Key]) -> str:
    """Return the condition on the root's rows `t`, without parameters, that values of a watch lead to them."""
    alias = _alias(len(watch.hops) - 1)
    taken = ", ".join(f"{alias}.{quoted(name)}" for name in watch.hops[-1].take)
    key = ", ".join(f"t.{quoted(name)}" for name in root.key)
    hops, parameters = _hops(watch, values)
    with session.cursor() as cursor:
        return str(cursor.mogrify(f"({key}) IN (SELECT {taken} FROM {hops})", parameters))  # noqa: S608 -- quoted


def _hops(watch: Watch, values: Sequence[Key]) -> tuple[str, tuple[Any, ...]]:
    """Return what stands behind FROM, with its parameters: the hops' tables, from these values on."""
    first, joined = watch.hops[0], f"{qualified(watch.hops[0].table)} AS {_alias(0)}"
    for number, (before, hop) in enumerate(zip(watch.hops, watch.hops[1:], strict=False)):
        on = _equal(_alias(number + 1), hop.where, _alias(number), before.take)
        joined += f" JOIN {qualified(hop.table)} AS {_alias(number + 1)} ON {on}"
    condition, parameters = having(first.table, first.where, values, _alias(0))
    return f"{joined} WHERE {condition}", parameters


def _alias(number: int) -> str:
    return f"h{number}"
