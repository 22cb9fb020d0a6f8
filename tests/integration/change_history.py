"""The changes of a table `item (id, rev)` in a log, and whether a row with a claim is older than it may be."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple


class Logged(NamedTuple):
    """A change in the log; `rev` is None for a delete."""

    position: int
    id: int
    rev: int | None


class History:
    """The log, by key. `rev` is different in every change, so it tells which change made a row."""

    def __init__(self, changes: Iterable[Logged]) -> None:
        self._changes: dict[int, list[Logged]] = {}
        self._made_at: dict[int, int] = {}
        for change in changes:
            of_key = self._changes.setdefault(change.id, [])
            assert not of_key or of_key[-1].position < change.position, "positions of a key rise"
            of_key.append(change)
            if change.rev is not None:
                self._made_at[change.rev] = change.position

    def newest_below(self, id_: int, position: int) -> Logged | None:
        changes = self._changes.get(id_, [])
        place = bisect.bisect_left(changes, position, key=lambda change: change.position)
        return changes[place - 1] if place else None

    def is_outdated(self, id_: int, rev: int | None, claim: int) -> bool:
        """Whether a row read as `rev` (None: as absent) lacks a change that it outranks."""
        newest = self.newest_below(id_, claim)
        if newest is None:
            return False
        if rev is None:
            deleted_later = any(
                change.rev is None and change.position > newest.position for change in self._changes[id_]
            )
            return newest.rev is not None and not deleted_later
        return self._made_at.get(rev, 0) < newest.position
