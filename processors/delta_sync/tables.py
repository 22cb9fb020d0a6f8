"""Tables as the source's catalogue has them: what a row's columns are, and which of them identify it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

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


class Table(NamedTuple):
    """One table: `key` names the columns that identify a row, in the order of the index that does."""

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    key_is_primary: bool = True

    @property
    def id(self) -> str:
        """`public.movie`: how `pipeline.yaml`, processors and messages name it."""
        return f"{self.schema}.{self.name}"

    def column(self, name: str) -> Column:
        """Return the column of that name. Raises KeyError."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)


def key_text(key: Sequence[object]) -> str:
    """Return a key as text, for stores whose ids are text: one column as it is, several joined by `:`.

    Injective: in a key of several columns, `%` and `:` are written as `%25` and `%3A`.
    """
    if len(key) == 1:
        return scalar_text(key[0])
    return ":".join(scalar_text(part).replace("%", "%25").replace(":", "%3A") for part in key)
