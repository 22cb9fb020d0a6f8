"""Changes come from the source, writes go to the sinks; between the two, only the newest of each key matters."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Literal, NamedTuple

from delta_sync.values import Document, Row

Key = tuple[Any, ...]  # values of the table's key columns, in their order


class Change(NamedTuple):
    """One row change: `row` is the whole row after it, or None when the row is gone."""

    table: str
    key: Key
    version: int
    row: Row | None


class Write(NamedTuple):
    """An upsert of `document`, or a delete (None), which a sink applies when `version` is not below the stored one."""

    key: Key
    version: int
    document: Document | None


class Outcome(NamedTuple):
    """What became of one write. `stale`: the store has a newer version, which is success. `rejected`: for `reason`."""

    kind: Literal["applied", "stale", "rejected"]
    reason: str = ""


APPLIED = Outcome("applied")
STALE = Outcome("stale")


def rejected(reason: str) -> Outcome:
    """Return the outcome of a write that this sink will never accept, such as a mapping conflict or a huge document."""
    return Outcome("rejected", reason)


def newest_per_key(writes: Iterable[Write]) -> list[Write]:
    """Return the newest write of each key, in order of first appearance; of equal versions the last one given."""
    newest: dict[Hashable, Write] = {}
    for write in writes:
        known = newest.get(write.key)
        if known is None or write.version >= known.version:
            newest[write.key] = write
    return list(newest.values())
