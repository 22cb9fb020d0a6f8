"""Documents that are built from several tables: rows of a root get those of their parts, whatever the source.

How rows of a part are found is each source's own matter, `ReadPart`: one query for each part, in the roots' snapshot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from delta_sync.changes import Key
from delta_sync.errors import ProcessorError, UsageError
from delta_sync.tables import Part, Table
from delta_sync.values import Row

ROWS_AT_ONCE = 50_000  # of one part, of all documents that are read together
BYTES_AT_ONCE = 32 << 20  # likewise; a document with more alone is more than any store takes

Rows = list[tuple[Key, Row]]
Owners = Sequence[tuple[Any, ...]]
"""Values by which rows of the table above are told apart, none of them None: of the columns that `ReadPart` chose."""


class TooMuch(Exception):
    """What was asked for at once does not fit."""


class ReadPart(ABC):
    """Reads rows of parts in one snapshot."""

    @abstractmethod
    def owner_columns(self, part: Part, above: Table) -> tuple[str, ...]:
        """Return the columns of the table above by whose values rows of a part are asked for."""

    @abstractmethod
    def __call__(self, part: Part, above: Table, owners: Owners) -> list[tuple[int, Row]]:
        """Return rows of a part, each with the place of the owner to which it belongs. Raises TooMuch.

        Of each owner no more rows than it may have, and one that tells that there are more.
        """


def attach(table: Table, rows: Rows, read: ReadPart) -> list[tuple[Key, Row | None]]:
    """Return rows of a root with their parts: of all of them, or of the first ones, as far as memory has room.

    In place of a part with too many rows for a document stands a ProcessorError.
    """
    some = rows
    while some:
        made = [(key, row.copy()) for key, row in some]  # what a larger attempt has attached is not to stay
        try:
            exceeded = _attach_all(table, [row for _, row in made], read)
        except TooMuch:
            if len(some) == 1:
                error = ProcessorError(f"The document's parts have more than {BYTES_AT_ONCE >> 20} MiB.")
                return [(key, {**row, table.parts[0].name: error}) for key, row in some]
            some = some[: len(some) // 2]
        else:
            if exceeded:
                _raise_to_root(table, [row for _, row in made])
            return list(made)
    return []


def _raise_to_root(table: Table, rows: Sequence[Row]) -> ProcessorError | None:
    """Put an error that stands in place of a part's part in place of the part; return the last one."""
    last: ProcessorError | None = None
    for row in rows:
        for part in table.parts:
            value = row[part.name]
            if isinstance(value, ProcessorError):
                last = value
            elif value:
                error = _raise_to_root(part.table, value if part.many else [value])
                if error is not None:
                    row[part.name] = last = error
    return last


def _attach_all(table: Table, rows: Sequence[Row], read: ReadPart) -> bool:
    """Attach all parts; return whether one has too many rows."""
    return any([_attach(part, table, rows, read) for part in table.parts])  # noqa: C419 -- all of them


def _attach(part: Part, above: Table, rows: Sequence[Row], read: ReadPart) -> bool:
    """Give each row of the table above its rows of a part, and these theirs. Raises TooMuch."""
    names = read.owner_columns(part, above)
    owners: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        row[part.name] = [] if part.many else None
        if all(row[name] is not None for name in part.of):
            owners.setdefault(tuple(row[name] for name in names), []).append(row)
    groups = list(owners.values())
    below: list[Row] = []
    for place, row in read(part, above, list(owners)) if owners else ():
        for number, owner in enumerate(groups[place]):
            own = row.copy() if number else row  # each has its own: a processor may change what it is given
            below.append(own)
            if part.many:
                owner[part.name].append(own)
            else:
                owner[part.name] = own
    exceeded = _attach_all(part.table, below, read)
    for owner in (owner for group in groups for owner in group if part.many):
        if len(owner[part.name]) > part.most:
            owner[part.name] = ProcessorError(f"It has more than {part.most} rows in {part.name} (its bound, `most`).")
            exceeded = True
    return exceeded


# ── a user's own query ───────────────────────────────────────────────────────────────────────────────────────────


def planned(table: Table) -> str:
    """Return a statement that has the server plan a document's query, and tells its columns."""
    assert table.query is not None, "it is a user's"
    # On lines of its own, because it may end with a comment.
    return f"SELECT * FROM (\n{table.query.strip().rstrip(';')}\n) AS q LIMIT 0"  # noqa: S608 -- it is meant to be SQL


def check_has_key(table: Table, returned: Sequence[str]) -> None:
    """Raise UsageError unless a document's query returns the whole key."""
    lacks = next((name for name in table.key if name not in returned), None)
    if lacks is not None:
        raise UsageError(
            f"The query of document {table.id} returns no column {lacks}; it needs the whole key:"
            f" {', '.join(table.key)}."
        )


def by_query(
    table: Table, keys: Sequence[Key], read: Callable[[Sequence[Key]], Sequence[Mapping[str, Any]]]
) -> list[tuple[Key, Row | None]]:
    """Return what a document's query has for each key; None: no row. Raises UsageError for a key that is twice."""
    found: dict[Key, Row] = {}
    for row in read(keys) if keys else ():
        key = tuple(row[name] for name in table.key)
        if key in found:
            raise UsageError(
                f"The query of document {table.id} returns several rows for the key {', '.join(map(str, key))}."
            )
        found[key] = dict(row)
    return [(key, found.get(key)) for key in keys]
