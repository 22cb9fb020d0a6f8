"""Tables as the source's catalogue has them: what a row's columns are, and which of them identify it."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import re
import uuid
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from delta_sync.masking import Mask
from delta_sync.values import scalar_text


class Kind(enum.Enum):
    """What Python value a column holds. The value is what documentation and error messages call it."""

    BOOLEAN = "bool"
    INTEGER = "int"
    FLOAT = "float"
    DECIMAL = "Decimal"
    TEXT = "str"
    BYTES = "bytes"
    DATE = "date"
    TIME = "time"
    TIMESTAMP = "datetime"
    TIMESTAMP_TZ = "datetime (UTC)"
    INTERVAL = "Interval"
    UUID = "UUID"
    JSON = "JSON value"
    MAP = "dict[str, str | None]"


class Column(NamedTuple):
    """One column: `type` is the source's own name for it (`numeric(10,2)`), `kind` is what Python sees."""

    name: str
    type: str
    kind: Kind
    dimensions: int = 0  # above 0: a (nested) list of `kind`
    nullable: bool = True
    precision: int | None = None  # of Kind.DECIMAL, where the type declares one
    scale: int | None = None
    in_log: bool = (
        True  # False: the log does not carry it faithfully, so the row is read by key (generated, exotic types)
    )
    may_be_absent: bool = False  # True: an update that leaves it alone may omit it (TOAST)
    mask: Mask | None = None  # what stands in place of its values, in every row that is read by this table


class Table(NamedTuple):
    """One table: `key` names the columns that identify a row, in the order of the index that does.

    With `parts`, it is the root of documents (or a part that has parts), and a row read of it has them, too. `query`
    is a user's own, which is read in place of all that.
    """

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    key_is_primary: bool = True
    full_images: bool = False  # whether the log has all columns of a row as it was before
    parts: tuple[Part, ...] = ()
    query: str | None = None

    @property
    def id(self) -> str:
        """`public.movie`: how `pipeline.yaml`, processors and messages name it."""
        return f"{self.schema}.{self.name}"

    @property
    def is_document(self) -> bool:
        """Whether rows are read with their parts, so that their versions are those of snapshots, not of changes."""
        return bool(self.parts) or self.query is not None

    @property
    def has_masks(self) -> bool:
        """Whether a column is masked, or one of its parts' tables."""
        below = [part.table for part in self.parts] + [part.through.table for part in self.parts if part.through]
        return any(column.mask for column in self.columns) or any(table.has_masks for table in below)

    def column(self, name: str) -> Column:
        """Return the column of that name. Raises KeyError."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)


def keys_alone(table: Table) -> Table:
    """Return the table as if it had its key columns only: to ask for rows without reading them."""
    return table._replace(columns=tuple(table.column(name) for name in table.key), parts=(), query=None)


class Link(NamedTuple):
    """A table between two: its `columns` equal those of the row above, its columns `to` those of the part."""

    table: Table
    columns: tuple[str, ...]
    to: tuple[str, ...]


class Part(NamedTuple):
    """A part of a document: the rows of `table` (which may have parts) whose `columns` equal `of` of the row above.

    With `through`, those to which a row of that table leads. `most` bounds a list; without `many` it is one row.
    """

    name: str
    table: Table
    many: bool
    columns: tuple[str, ...]
    of: tuple[str, ...]
    through: Link | None = None
    order_by: tuple[str, ...] = ()
    most: int = 10_000


def key_text(key: Sequence[object]) -> str:
    """Return a key as text, for stores whose ids are text: one column as it is, several joined by `:`.

    Injective: in a key of several columns, `%` and `:` are written as `%25` and `%3A`.
    """
    if len(key) == 1:
        return scalar_text(key[0])
    return ":".join(scalar_text(part).replace("%", "%25").replace(":", "%3A") for part in key)


def key_of_text(table: Table, text: str) -> tuple[object, ...]:
    """Return a key whose `key_text` may be this one: compare them, for several texts can be read as one value.

    Raises ValueError when no key of the table is written so.
    """
    parts = [text] if len(table.key) == 1 else [unquote(part) for part in text.split(":")]
    return key_of_parts(table, parts)


def key_of_parts(table: Table, parts: Sequence[str]) -> tuple[object, ...]:
    """Return the key of which these are the `scalar_text`s, in the key's order. Raises ValueError as `key_of_text`."""
    if len(parts) != len(table.key):
        raise ValueError(f"{table.id} has a key of {len(table.key)} columns, not {len(parts)}")
    return tuple(_scalar_of_text(table.column(name).kind, part) for name, part in zip(table.key, parts, strict=True))


def _scalar_of_text(kind: Kind, text: str) -> object:
    """Return the value that `scalar_text` wrote so. Raises ValueError."""
    match kind:
        case Kind.BOOLEAN:
            if text not in ("true", "false"):
                raise ValueError(f"{text!r} is neither true nor false")
            return text == "true"
        case Kind.INTEGER:
            return int(text)
        case Kind.FLOAT:
            return float(text)
        case Kind.DECIMAL:
            try:
                return decimal.Decimal(text)
            except decimal.InvalidOperation:
                raise ValueError(f"{text!r} is no number") from None
        case Kind.BYTES:
            return bytes.fromhex(text)
        case Kind.UUID:
            return uuid.UUID(text)
        case Kind.DATE | Kind.TIME | Kind.TIMESTAMP | Kind.TIMESTAMP_TZ:
            return moment_of_text(kind, text)
        case _:
            return text


def moment_of_text(kind: Kind, text: str) -> object:
    """Return a date or time, or the text itself where it is one that Python cannot hold (infinity, the year 12345)."""
    try:
        match kind:
            case Kind.DATE:
                return dt.date.fromisoformat(text)
            case Kind.TIME:
                return dt.time.fromisoformat(text)
            case _:
                return dt.datetime.fromisoformat(text)
    except ValueError:
        if _BEYOND_PYTHON.fullmatch(text):
            return text
        raise


_BEYOND_PYTHON = re.compile(r"-?infinity|\d{5,}-\d\d-\d\d[T \d:.Z+-]*|\d{4,}-\d\d-\d\d[T \d:.Z+-]* BC|24:00:00")
