"""Dumps: rows that are in the source already are brought to the sinks, chunk by chunk. What is decided, without I/O.

`state_dumps` keeps them, `load` carries them out; `docs/design/dumps.md` says how it all belongs together.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, Literal, NamedTuple
from uuid import UUID

from delta_sync.changes import Key
from delta_sync.errors import UsageError
from delta_sync.tables import Column, Table, moment_of_text
from delta_sync.tables import Kind as ColumnKind

Kind = Literal["load", "table", "keys", "where", "refresh"]
State = Literal["pending", "running", "paused", "done", "cancelled", "failed"]
Order = Literal["pause", "resume", "cancel", "throttle"]

KEYS_PER_CHUNK = 4000  # each may be of 2,700 bytes, and MariaDB as a state store takes 16 MB in a statement
PLANNED_AHEAD = 24  # chunks: more than all readers of some processes take while the next are planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """One dump as it is stored. `load`: a table's load, and `refresh`: all rows, to ask look-ups again, which Delta
    begins; the others are asked for.

    `reason` says why it was begun, `waits` for what it waits, or why it has ended so. `sinks` is None for all of the
    table's. `covered_from`, `epoch` and `fingerprint` are those of its beginning, as in `TableLoad`; None: it has not
    begun. `floor` is a version: what it meets gets that one or a higher one. Chunks are there, or were, for all keys up
    to `planned_to`, and with `planned` for the others, too.
    """

    id: int = 0
    table: str
    kind: Kind
    state: State = "pending"
    reason: str = ""
    waits: str | None = None
    where: str | None = None
    sinks: tuple[str, ...] | None = None
    rows_per_s: int | None = None
    parallel: int | None = None
    timeout_s: float | None = None
    epoch: int | None = None
    fingerprint: str | None = None
    covered_from: int | None = None
    floor: int | None = None
    planned_to: Key | None = None
    planned: bool = False
    rows: int = 0
    estimate: int | None = None
    created_at: dt.datetime | None = None
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None

    @property
    def unfinished(self) -> bool:
        """Whether there is something to do, now or once it is resumed."""
        return self.state in ("pending", "running", "paused")


class ChunkCounts(NamedTuple):
    """Of one dump: chunks that nobody reads, and chunks that somebody has leased."""

    free: int = 0
    leased: int = 0


class ChunkLease(NamedTuple):
    """A chunk that this owner reads: the rows behind `after` up to `to` (None: no bound), or those with these `keys`.

    What is recorded with it is refused once another has it, or the dump has ended.
    """

    dump: Dump
    number: int
    after: Key | None
    to: Key | None
    keys: tuple[Key, ...] | None
    owner: str
    token: int


def ordered(order: Order, dump: Dump) -> State:
    """Return the state in which an order leaves a dump. Raises UsageError when it cannot be followed."""
    what = f"Dump {dump.id} of {dump.table}"
    if not dump.unfinished:
        raise UsageError(f"{what} is {dump.state}; there is nothing to {order}.")
    match order:
        case "pause":
            return "paused"
        case "resume":
            if dump.state != "paused":
                raise UsageError(f"{what} is {dump.state}, not paused.")
            return "pending" if dump.covered_from is None else "running"
        case "cancel":
            if dump.kind == "load":
                raise UsageError(
                    f"{what} is the table's load: without it the sinks would lack rows for good. Pause it, or take the"
                    " table out of the pipeline."
                )
            return "cancelled"
        case "throttle":
            return dump.state


def in_turn(dumps: Iterable[Dump], counts: Mapping[int, ChunkCounts], last: int = 0) -> list[Dump]:
    """Return the dumps of which a chunk may be read now, in the order in which they are served.

    That with the fewest chunks under way comes first; of these the next one after `last`, whose chunk was read last. So
    all go on.
    """
    served: list[tuple[int, bool, int, Dump]] = []
    for dump in dumps:
        free, leased = counts.get(dump.id, ChunkCounts())
        if dump.state == "running" and free and (dump.parallel is None or leased < dump.parallel):
            served.append((leased, dump.id <= last, dump.id, dump))
    return [dump for _, _, _, dump in sorted(served, key=lambda one: one[:3])]


def rows_most(dump: Dump, chunk_rows: int) -> int:
    """Return how many rows may be read at once: no more than in a second, where the rate is limited."""
    return chunk_rows if dump.rows_per_s is None else max(1, min(chunk_rows, dump.rows_per_s))


def pause_s(dump: Dump, rows: int) -> float:
    """Return for how long nothing more is read after so many rows."""
    return 0.0 if dump.rows_per_s is None else rows / dump.rows_per_s


def key_chunks(keys: Sequence[Key]) -> list[tuple[Key, ...]]:
    """Return keys in chunks, each once, in their order."""
    distinct = list(dict.fromkeys(keys))
    return [tuple(distinct[start : start + KEYS_PER_CHUNK]) for start in range(0, len(distinct), KEYS_PER_CHUNK)]


def to_plan(dump: Dump, counts: ChunkCounts) -> int:
    """Return how many chunks are to be planned now, none as long as there are enough."""
    if dump.state != "running" or dump.planned or counts.free > PLANNED_AHEAD // 2:
        return 0
    return PLANNED_AHEAD - counts.free


def is_over(dump: Dump, counts: ChunkCounts) -> bool:
    """Tell whether every row has been brought to the sinks."""
    return dump.state == "running" and dump.planned and counts == ChunkCounts()


def removes_unmet(dump: Dump) -> bool:
    """Tell whether documents that the dump did not meet are removed at its end: their rows went without an event.

    Only one that met every row of the table knows which these are.
    """
    return dump.kind in ("load", "table")


def rate_and_left(
    before: tuple[float, int] | None, now: tuple[float, int], estimate: int | None
) -> tuple[float | None, float | None]:
    """Return rows per second between two looks (time, rows), and the seconds left by an estimate; None: not known."""
    if before is None or now[0] <= before[0]:
        return None, None
    rate = (now[1] - before[1]) / (now[0] - before[0])
    if estimate is None or rate <= 0:
        return rate, None
    return rate, max(0.0, estimate - now[1]) / rate


def key_from_text(table: Table, text: str) -> Key:
    """Return a key from the text that `tables.key_text` writes. Raises UsageError.

    Of an unusual type (a range, an enumeration, …) the text itself is the key's value, as it is in a row.
    """
    parts = [text] if len(table.key) == 1 else [_unescaped(part) for part in text.split(":")]
    if len(parts) != len(table.key):
        raise UsageError(
            f"{text!r} is no key of {table.id}: it has the columns {', '.join(table.key)}; write their values with a"
            " colon between them (and %3A for a colon, %25 for a percent sign within one)."
        )
    try:
        return tuple(value_from_text(table.column(name), part) for name, part in zip(table.key, parts, strict=True))
    except (ValueError, ArithmeticError) as error:
        kinds = ", ".join(f"{name} {table.column(name).type}" for name in table.key)
        raise UsageError(f"{text!r} is no key of {table.id} ({kinds}).") from error


def value_from_text(column: Column, text: str) -> Any:
    """Return a column's value from its text. Raises ValueError or ArithmeticError for one that is not of its type."""
    if column.kind is ColumnKind.TEXT:  # and what is no type of Python's
        return text
    value = _VALUES.get(column.kind, str)(text.strip())
    bits = _INTEGER_BITS.get(column.type)
    if bits is not None and not -(1 << bits) <= value < 1 << bits:
        raise ValueError(f"{text} is beyond {column.type}")
    return value


def _unescaped(part: str) -> str:
    return part.replace("%3A", ":").replace("%3a", ":").replace("%25", "%")


def _bool(text: str) -> bool:
    return {"true": True, "false": False}[text] if text in ("true", "false") else bool(int(text))


def _timestamp_tz(text: str) -> Any:
    found = moment_of_text(ColumnKind.TIMESTAMP_TZ, text)
    if not isinstance(found, dt.datetime):
        return found
    return found.replace(tzinfo=dt.UTC) if found.tzinfo is None else found.astimezone(dt.UTC)


def _int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # Python would take 1_000, too
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


_INTEGER_BITS = {"smallint": 15, "integer": 31, "bigint": 63}  # beyond them a source finds no row, or refuses to look
_VALUES: dict[ColumnKind, Callable[[str], Any]] = {
    ColumnKind.BOOLEAN: _bool,
    ColumnKind.INTEGER: _int,
    ColumnKind.FLOAT: float,
    ColumnKind.DECIMAL: Decimal,
    ColumnKind.UUID: UUID,
    ColumnKind.DATE: partial(moment_of_text, ColumnKind.DATE),
    ColumnKind.TIME: partial(moment_of_text, ColumnKind.TIME),
    ColumnKind.TIMESTAMP: partial(moment_of_text, ColumnKind.TIMESTAMP),
    ColumnKind.TIMESTAMP_TZ: _timestamp_tz,
    ColumnKind.BYTES: bytes.fromhex,
}
