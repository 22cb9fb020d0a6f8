"""The source of the test harness: tables that learn their columns from the rows that a test gives."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, cast

from delta_sync.changes import Change, Key
from delta_sync.decoding import Event, Image, TableCodec
from delta_sync.errors import UsageError
from delta_sync.shaping import masked, masked_again
from delta_sync.spec import ShapeSpec
from delta_sync.tables import Column, Kind, Table, key_text
from delta_sync.values import Interval, Row

TableKey = Table | str | Sequence[str]  # what a test says of a table: all of it, or the columns of its key

STEP = 16  # positions from one change of the log to the next: room for the versions of loads between the two


def claim_behind(changes: int) -> int:
    """Return the claim of rows that include the log's first so many changes."""
    return changes * STEP + STEP // 2


class SourceTable:
    """One table: its columns, as far as they are known, and its rows by id. `table` is None before the first row."""

    def __init__(self, name: str, told: TableKey, shape: ShapeSpec | None = None) -> None:
        self.name = name
        self._shape = shape
        self.rows: dict[str, Row] = {}
        self.table: Table | None = None
        self._unseen = set[str]()  # columns of which no value has shown the kind
        if isinstance(told, Table):
            if told.id != name:
                raise UsageError(f"tables has {told.id} under the name {name}.")
            self.key, self.table = told.key, told
        else:
            self.key = (told,) if isinstance(told, str) else tuple(told)

    @property
    def known(self) -> Table:
        """The table, of which there has been a row."""
        assert self.table is not None, "a row was completed before"
        return self.table

    @property
    def codec(self) -> TableCodec:
        """How its events are read: they hold rows as they are."""
        return TableCodec(masked(self.known, self._shape), self.read, self.key_of, _lacks_nothing)

    def read(self, row: Row) -> Row:
        """Return a row as one that is read from a source: a copy, its columns masked as the specification says."""
        change = Change(self.name, (), 0, copied_row(row))
        return masked_again(masked(self.known, self._shape), change).row or {}

    def event(self, op: str, before: Row | None, after: Row | None, number: int) -> Event:
        """Return the log's change of that number as Debezium tells it, but with the values that a row has."""
        place = {"schema": self.known.schema, "table": self.known.name, "lsn": number * STEP}
        return {"op": op, "before": before, "after": after, "source": {**place, "txId": number, "ts_ms": number}}

    def key_of(self, row: Mapping[str, Any]) -> Key:
        """Return the values of the key's columns. Raises UsageError when one is missing."""
        for name in self.key:
            if row.get(name) is None:
                raise UsageError(
                    f"{self.name}: a row needs a value of {name}, a column of its key. If the key is another one, say"
                    f' so: Harness(…, tables={{"{self.name}": ["column", …]}}).'
                )
        return tuple(row[name] for name in self.key)

    def id_of(self, row: Mapping[str, Any]) -> str:
        """Return the key as text."""
        return key_text(self.key_of(row))

    def find(self, given: Mapping[str, Any]) -> str:
        """Return the id of the row that these columns name. Raises UsageError when it is not there."""
        id_ = self.id_of(given)
        if id_ not in self.rows:
            raise UsageError(f"{self.name} has no row {id_}; insert it before.")
        return id_

    def complete(self, given: Mapping[str, Any]) -> Row:
        """Return a copy with every column. Learns from it what the columns are, and what they hold."""
        row = {name: _copied(value, f"{self.name}.{name}") for name, value in given.items()}
        self.key_of(row)
        if self.table is None:
            schema, _, name = self.name.partition(".")
            self.table = Table(schema, name, tuple(Column(column, "?", Kind.TEXT) for column in row), self.key)
            self._unseen = set(row)
        names = [column.name for column in self.table.columns]
        unknown = row.keys() - set(names)
        if unknown:
            raise UsageError(
                f"{self.name} has no column {min(unknown)}; it has {', '.join(names)}. If it should: the first row says"
                " what the columns are."
            )
        if self._unseen:
            seen = {name: row[name] for name in self._unseen if row.get(name) is not None}
            if seen:
                columns = [_column(c.name, seen[c.name]) if c.name in seen else c for c in self.table.columns]
                self.table = self.table._replace(columns=tuple(columns))
                self._unseen -= seen.keys()
        return {name: row.get(name) for name in names}


_KINDS: dict[type, Kind] = {
    bool: Kind.BOOLEAN,
    int: Kind.INTEGER,
    float: Kind.FLOAT,
    decimal.Decimal: Kind.DECIMAL,
    str: Kind.TEXT,
    bytes: Kind.BYTES,
    dt.date: Kind.DATE,
    dt.time: Kind.TIME,
    dt.datetime: Kind.TIMESTAMP,
    Interval: Kind.INTERVAL,
    uuid.UUID: Kind.UUID,
    dict: Kind.JSON,
}


def _column(name: str, value: object) -> Column:
    """Return the column that holds such a value."""
    dimensions = 0
    while isinstance(value, list):
        dimensions += 1
        value = value[0] if value else None  # pyright: ignore[reportUnknownVariableType] -- any elements
    kind = _KINDS.get(type(value), Kind.TEXT)  # pyright: ignore[reportUnknownArgumentType] -- as above
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        kind = Kind.TIMESTAMP_TZ
    return Column(name, kind.value, kind, dimensions)


def _copied(value: Any, where: str = "") -> Any:
    """Return a value with copies of the lists and dicts in it. Raises UsageError for what no row holds."""
    if value is None:
        return None
    kind = cast("type[object]", type(value))
    if kind is list:
        return [_copied(element, where) for element in value]
    if kind is dict:
        return {_text(name, where): _copied(element, where) for name, element in value.items()}
    if kind not in _KINDS:
        raise UsageError(f"{where}: no column holds a {kind.__name__}; docs/types.md says what rows hold.")
    if kind is dt.datetime and value.utcoffset():
        raise UsageError(f"{where}: {value} is not in UTC, as it is in rows; write value.astimezone(datetime.UTC).")
    return value


def _text(name: object, where: str) -> str:
    if type(name) is not str:
        raise UsageError(f"{where}: {name!r} is not a text; the names in a JSON object are.")
    return name


def copied_row(row: Image) -> Row:
    """Return a row that shares no list or dict with the given one."""
    return {name: _copied(value) for name, value in row.items()}


def _lacks_nothing(image: Image) -> bool:
    del image
    return False
