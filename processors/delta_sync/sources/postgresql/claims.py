"""Claims: what a snapshot may say about the log, decided without I/O.

The algorithm and its proof are in `docs/guarantees.md`. In short: a *sample* is a position L of the log with a bound N
such that every transaction with an id of N or above writes all its records at or after L. A snapshot whose xmin is at
least N therefore sees every change before L, so a row read in it may claim L: changes at or after L come from the log.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple

XID_BITS = 32  # width of the transaction ids in pg_locks; those of pg_snapshot have 64 bits


class Snapshot(NamedTuple):
    """A `pg_snapshot`: transactions below `xmin` have ended; those at or above `xmax`, and those in `xip`, have not."""

    xmin: int
    xmax: int
    xip: frozenset[int]

    def sees(self, xid: int) -> bool:
        """Tell whether the effects of a top-level transaction (64-bit id) are visible, given that it committed."""
        return xid < self.xmin or (xid < self.xmax and xid not in self.xip)

    @property
    def horizon(self) -> int:
        """What stays the same as long as the same transaction keeps a claim from being made."""
        return self.xmin

    @property
    def clock(self) -> int:
        """A number that rises with what snapshots of one server see: equal ones see the same (`guarantees.md`)."""
        return self.xmax - len(self.xip)

    def shows(self, position: int, xid: int) -> bool:
        """Tell whether it sees a committed change of a transaction, given that one's id as the log has it (32 bits)."""
        del position
        return self.sees(widen(xid, self.xmax))


def parse_snapshot(text: str) -> Snapshot:
    """Return the snapshot that PostgreSQL writes as `xmin:xmax:xip,xip,…`."""
    xmin, xmax, xip = text.split(":")
    return Snapshot(int(xmin), int(xmax), frozenset(int(xid) for xid in xip.split(",") if xid))


class Sample(NamedTuple):
    """A position of the log, and the lowest transaction id for which all changes are at or after it."""

    position: int
    next_xid: int


def widen(xid: int, near: int) -> int:
    """Return the 64-bit id of a 32-bit one, given a 64-bit id that is less than 2^31 transactions away."""
    half = 1 << (XID_BITS - 1)
    return near + (xid - near + half) % (1 << XID_BITS) - half


def sample_of(lsn: int, running: Iterable[int], xmax: int) -> Sample:
    """Return the sample of three readings in this order: flushed position, running (32-bit) xids, snapshot xmax."""
    return Sample(lsn, max([widen(xid, xmax) for xid in running] + [xmax - 1]) + 1)


class Samples:
    """The samples taken so far, oldest first, of which a snapshot can claim the newest that it satisfies.

    Bounded: beyond `limit` every other sample of the older half goes, which only makes a claim a little older.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._samples: list[Sample] = []
        self._bounds: list[
            int
        ] = []  # next_xid of each sample, made monotonic: a later sample is never easier to satisfy

    def add(self, sample: Sample) -> None:
        """Keep a sample that was taken after all those before it."""
        self._samples.append(sample)
        self._bounds.append(max(sample.next_xid, self._bounds[-1] if self._bounds else 0))
        if len(self._samples) > self._limit:
            half = self._limit // 2
            self._samples[:half] = self._samples[:half:2]
            self._bounds[:half] = self._bounds[:half:2]

    def claim(self, snapshot: Snapshot, covered_from: int) -> int | None:
        """Return the claim of rows read in `snapshot`: a position at or above `covered_from`, or None for not yet.

        `covered_from` is the position from which the log is known to deliver the table's changes.
        """
        usable = bisect.bisect_right(self._bounds, snapshot.xmin)
        if usable == 0:
            return None
        position = self._samples[usable - 1].position
        return position if position >= covered_from else None
