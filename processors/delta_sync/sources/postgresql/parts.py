"""Documents that are built from several tables, in SQL: parts of roots, and the roots that a change is about.

Parts are read in the snapshot in which their roots were, one query for each part. Values keep the types that rows have
everywhere; JSON made by the server would lose them. Values to be found go as arrays, each with its place, so that the
server decides which rows belong together, by its own idea of equality.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from delta_sync.changes import Key
from delta_sync.documents import Hop, Watch
from delta_sync.errors import UsageError
from delta_sync.sources import parts
from delta_sync.sources.parts import Owners, ReadPart, Rows, TooMuch
from delta_sync.sources.postgresql import codec
from delta_sync.sources.postgresql.statements import array, fixed, qualified, row_maker, said_of, type_of
from delta_sync.tables import Part, Table
from delta_sync.values import Row

PLACE = sql.Identifier("delta:place")  # names that no column has


def attach(connection: psycopg.Connection, table: Table, rows: Rows) -> list[tuple[Key, Row | None]]:
    """Return rows of a root with their parts: of all of them, or of the first ones, as far as memory has room.

    In place of a part with too many rows for a document stands a ProcessorError. None: the user's query has no row for
    this key. The connection is in a transaction with one snapshot. Raises UsageError when the user's query fails.
    """
    query = table.query
    if query is not None:
        return parts.by_query(table, [key for key, _ in rows], lambda keys: _run(connection, table, keys, query))
    return parts.attach(table, rows, _ReadPart(connection))


class _ReadPart(ReadPart):
    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def owner_columns(self, part: Part, above: Table) -> tuple[str, ...]:
        del above
        return part.of

    def __call__(self, part: Part, above: Table, owners: Owners) -> list[tuple[int, Row]]:
        return _rows_of(self._connection, part, above, owners)


def _rows_of(connection: psycopg.Connection, part: Part, above: Table, values: Owners) -> list[tuple[int, Row]]:
    """Return rows of a part, each with the place of the values to which it belongs. Raises TooMuch.

    Of each document no more rows are read than it may have, and one that tells that there are more.
    """
    ordered = fixed(_columns("t", part.order_by or part.table.key))
    query = sql.SQL(
        "SELECT {columns}, k.{place} FROM {values} CROSS JOIN LATERAL"
        " (SELECT t.* FROM {rows} ORDER BY {ordered} LIMIT {most}) AS t ORDER BY k.{place}, {ordered} LIMIT {limit}"
    ).format(
        place=PLACE,
        columns=fixed(codec.select_list(part.table)),
        values=_values(above, part.of),
        rows=_belonging(part),
        ordered=ordered,
        most=sql.Literal(part.most + 1 if part.many else 1),
        limit=sql.Literal(parts.ROWS_AT_ONCE + 1),
    )
    given = [array(column) for column in zip(*values, strict=True)] or [[] for _ in part.of]
    found = connection.execute(query, given).fetchall()
    if len(found) > parts.ROWS_AT_ONCE or _bytes_in(found) > parts.BYTES_AT_ONCE:
        raise TooMuch
    to_row = row_maker(part.table)
    return [(fields[-1] - 1, to_row(fields)[1]) for fields in found]


def _bytes_in(rows: Sequence[tuple[Any, ...]]) -> int:
    """Return how long the texts are together, by columns: that is many times faster than row by row."""
    size = 0
    for column in zip(*rows, strict=True):
        kinds = {*map(type, column)}
        if not kinds.isdisjoint((str, bytes)):
            texts: Iterable[str | bytes] = filter(None, column)
            if kinds - {str, bytes, type(None)}:  # dates, some of which Python cannot hold
                texts = (value for value in column if isinstance(value, str | bytes))
            size += sum(map(len, texts))
    return size


def _belonging(part: Part) -> sql.Composable:
    """The rows `t` of a part that belong to the values `k`, as what stands behind FROM."""
    if part.through is None:
        return sql.SQL("{} AS t WHERE {}").format(fixed(qualified(part.table)), _equal_to_values("t", part.columns))
    link = part.through
    return sql.SQL("{} AS l JOIN {} AS t ON ({}) = ({}) WHERE {}").format(
        fixed(qualified(link.table)),
        fixed(qualified(part.table)),
        fixed(_columns("t", part.columns)),
        fixed(_columns("l", link.to)),
        _equal_to_values("l", link.columns),
    )


def check_query(connection: psycopg.Connection, table: Table) -> None:
    """Have the server plan the user's query. Raises UsageError: it fails, or does not return the whole key."""
    _run(connection, table, [], parts.planned(table))


def check_parts(connection: psycopg.Connection, table: Table, root: str) -> None:
    """Have the server plan how parts are found. Raises UsageError: columns that cannot be compared."""
    for part in table.parts:
        try:
            _rows_of(connection, part, table, [])
        except psycopg.errors.UndefinedFunction as error:
            raise UsageError(
                f"document {root}, part {part.name}: its rows cannot be found: {error.diag.message_primary}."
            ) from error
        check_parts(connection, part.table, root)


def _run(connection: psycopg.Connection, table: Table, keys: Sequence[Key], query: str) -> list[Row]:
    """Run a user's query. Its parameters are arrays of the keys' values, each named like its key column.

    Raises UsageError: it fails, or does not return the whole key.
    """
    parameters = {name: array(key[place] for key in keys) for place, name in enumerate(table.key)}
    try:
        with connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(query.encode(), parameters).fetchall()
            returned = [column.name for column in cursor.description or ()]
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.NotSupportedError) as error:
        raise UsageError(f"The query of document {table.id} fails: {said_of(table, error)}.") from error
    parts.check_has_key(table, returned)
    return rows


# ── from a change to the roots ───────────────────────────────────────────────────────────────────────────────────


def root_keys(connection: psycopg.Connection, watch: Watch, values: Sequence[Key], most: int) -> list[Key]:
    """Return the root's keys to which values of a watch with hops lead, at most so many. Raises psycopg.Error."""
    last = watch.hops[-1]
    narrow = last.table._replace(columns=tuple(last.table.column(name) for name in last.take), key=last.take)
    query = sql.SQL("SELECT DISTINCT {} FROM ({}) AS t LIMIT {}").format(
        fixed(codec.select_list(narrow)), _hopped(watch, _values(watch.table, watch.columns)), sql.Literal(most)
    )
    to_row = row_maker(narrow)
    with connection.cursor() as cursor:
        rows = cursor.execute(query, [array(column) for column in zip(*values, strict=True)]).fetchall()
    return [key for key, _ in map(to_row, rows) if None not in key]


def root_condition(connection: psycopg.Connection, root: Table, watch: Watch, values: Sequence[Key]) -> str:
    """Return the condition on the root's rows `t`, without parameters, that values of a watch lead to them."""
    arrays = [fixed(sql.Literal(array(column)), connection) for column in zip(*values, strict=True)]
    given = _values(watch.table, watch.columns, arrays)
    condition = sql.SQL("({}) IN (SELECT {} FROM ({}) AS u)").format(
        fixed(_columns("t", root.key)), fixed(_columns("u", watch.hops[-1].take)), _hopped(watch, given)
    )
    return condition.as_string(connection).replace("%%", "%")


def _hopped(watch: Watch, values: sql.Composable) -> sql.Composable:
    """The query for the last hop's columns; `values` are where it begins."""
    reached: sql.Composable = sql.SQL("SELECT {} FROM {}").format(_value_columns(watch.columns), values)
    names = [_value_name(number) for number in range(len(watch.columns))]
    for hop in watch.hops:
        reached = _hop(hop, reached, names)
        names = [sql.Identifier(name) for name in hop.take]
    return reached


def _hop(hop: Hop, reached: sql.Composable, names: Sequence[sql.Identifier]) -> sql.Composable:
    equal = [
        sql.SQL("h.{} = v.{}").format(fixed(sql.Identifier(column)), name)
        for column, name in zip(hop.where, names, strict=True)
    ]
    return sql.SQL("SELECT {} FROM {} AS h JOIN ({}) AS v ON {}").format(
        fixed(_columns("h", hop.take)), fixed(qualified(hop.table)), reached, sql.SQL(" AND ").join(equal)
    )


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(relation: str, names: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(sql.Identifier(relation, name) for name in names)


def _value_name(number: int) -> sql.Identifier:
    return sql.Identifier(f"delta:{number}")


def _value_columns(names: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(_value_name, range(len(names))))


def _values(table: Table, names: Sequence[str], given: Sequence[sql.Composable] | None = None) -> sql.Composable:
    """Values of columns as a relation `k` with their places; from parameters, an array for each, or as given."""
    arrays = [
        sql.SQL("{}::{}[]").format(sql.SQL("%s") if given is None else given[number], type_of(table.column(name)))
        for number, name in enumerate(names)
    ]
    return sql.SQL("unnest({}) WITH ORDINALITY AS k({}, {})").format(
        sql.SQL(", ").join(arrays), _value_columns(names), PLACE
    )


def _equal_to_values(relation: str, names: Sequence[str]) -> sql.Composable:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = k.{}").format(fixed(sql.Identifier(relation, name)), _value_name(number))
        for number, name in enumerate(names)
    )
