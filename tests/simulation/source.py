"""A model of PostgreSQL for the simulation: a log, transactions, and when what becomes visible to whom.

A change gets its position when it is written, the log delivers its transaction from the commit record on, and other
sessions see it at some later moment. The second writer of a row waits for all of that.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from delta_sync.sources.postgresql.claims import Sample, Snapshot, sample_of
from delta_sync.sources.postgresql.codec import PLACEHOLDER

Row = dict[str, Any]
Event = dict[str, Any]

TABLE = "item"
HEARTBEAT_PREFIX = "beat"
NAMES = ("alpha", "beta", "poison", "hidden", "")  # what the processor of the simulation makes of each differs


class Entry(NamedTuple):
    """What the log delivers at once: a transaction's events, or a heartbeat."""

    lsn: int  # of the commit record, or of the heartbeat
    events: list[Event]


@dataclass
class Transaction:
    """`changes` are (key, row or None); `truncates` says that it emptied the table first."""

    xid: int
    changes: list[tuple[int, Row | None]] = field(default_factory=list[tuple[int, "Row | None"]])
    events: list[Event] = field(default_factory=list[Event])
    truncates: bool = False


class Source:
    """One table `item` (id, rev, name). `rev` counts a key's states, deleted ones too: what readers compare."""

    def __init__(self, rng: random.Random, keys: int, *, toast: bool) -> None:
        """With `toast`, an update that leaves the name alone does not carry it."""
        self.rng = rng
        self.toast = toast
        self.visible_soon = rng.choice([0.17, 0.17, 0.01])  # at times a synchronous standby is slow
        self.keys = keys
        self.lsn = 1000
        self.next_xid = 700
        self.latest_completed = 699
        self.open: dict[int, Transaction] = {}  # not committed in the log yet
        self.committing: dict[int, Transaction] = {}  # in the log, not visible yet
        self.locked: dict[int, int] = {}  # key → xid
        self.rows: dict[int, Row] = {}  # what new snapshots see
        self.revs: dict[int, int] = {}
        self.log: list[Entry] = []
        self.settled = False

    # ── writers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """Do one thing that a writer, or the server on its behalf, could do next."""
        if self.settled:
            return
        choice = self.rng.random()
        if choice < 0.25 and len(self.open) < 4:
            self._write(self._begin())
        elif choice < 0.60 and self.open:
            self._write(self.open[self.rng.choice(sorted(self.open))])
        elif choice < 0.78 and self.open:
            self.commit(self.rng.choice(sorted(self.open)))
        elif choice < 0.78 + self.visible_soon and self.committing:
            self.show(self.rng.choice(sorted(self.committing)))
        elif 0.95 <= choice < 0.97 and self.open:
            self._roll_back(self.rng.choice(sorted(self.open)))
        elif choice > 0.99:
            self._truncate()

    def settle(self) -> None:
        """End all transactions, for good."""
        self.settled = True
        for xid in sorted(self.open):
            self.commit(xid)
        for xid in sorted(self.committing):
            self.show(xid)

    def _begin(self) -> Transaction:
        transaction = self.open[self.next_xid] = Transaction(self.next_xid)
        self.next_xid += 1
        return transaction

    def _advance(self) -> int:
        lsn = self.lsn
        self.lsn += self.rng.randint(1, 40)
        return lsn

    def _lock(self, transaction: Transaction) -> int | None:
        """Return a key that no other transaction has changed; a real one would wait."""
        free = [key for key in range(self.keys) if self.locked.get(key, transaction.xid) == transaction.xid]
        if not free or -1 in self.locked:
            return None
        key = self.rng.choice(free)
        self.locked[key] = transaction.xid
        return key

    def _write(self, transaction: Transaction) -> None:
        key = self._lock(transaction)
        if key is None:
            return
        lsn = self._advance()
        old = self._row_in(transaction, key)
        choice = self.rng.random()
        if old is not None and choice < 0.25:
            self._change(transaction, lsn, "d", key, None)
        elif old is not None and choice < 0.4:
            other = self._lock(transaction)
            if other is not None and other != key and self._row_in(transaction, other) is None:
                self._change(transaction, lsn, "d", key, None)  # a change of the key: two events, one position
                self._change(transaction, lsn, "c", other, self._new_row(other))
        elif old is not None:
            row = self._new_row(key)
            if self.toast and self.rng.random() < 0.5:
                row["name"] = old["name"]
                self._change(transaction, lsn, "u", key, row, row | {"name": PLACEHOLDER})
            else:
                self._change(transaction, lsn, "u", key, row)
        else:
            self._change(transaction, lsn, "c", key, self._new_row(key))

    def _row_in(self, transaction: Transaction, key: int) -> Row | None:
        for changed, row in reversed(transaction.changes):
            if changed == key:
                return row
        return None if transaction.truncates else self.rows.get(key)

    def _new_row(self, key: int) -> Row:
        return {"id": key, "rev": self.revs.get(key, 0) + 1, "name": self.rng.choice(NAMES)}

    def _change(
        self, transaction: Transaction, lsn: int, op: str, key: int, row: Row | None, image: Row | None = None
    ) -> None:
        """Note a change; `image` is what the log has of the row, where that is not all."""
        self.revs[key] = self.revs.get(key, 0) + 1
        transaction.changes.append((key, row))
        before = {"id": key, "rev": 0, "name": ""} if op == "d" else None  # as with the default replica identity
        transaction.events.append(event(op, lsn, transaction.xid, before, image or row))

    def _truncate(self) -> None:
        """Empty the table, in a transaction that ends at once in the log. It waits for everybody who changed rows."""
        if self.locked:
            return
        transaction = self._begin()
        transaction.truncates = True
        self.locked[-1] = transaction.xid
        for key in range(self.keys):
            self.revs[key] = self.revs.get(key, 0) + 1
        transaction.events.append(event("t", self._advance(), transaction.xid, None, None))
        self.commit(transaction.xid)

    def commit(self, xid: int) -> None:
        """Write the commit record: from now on the log delivers the transaction."""
        transaction = self.committing[xid] = self.open.pop(xid)
        self.log.append(Entry(self._advance(), transaction.events))

    def show(self, xid: int) -> None:
        """Make a committed transaction visible, and let go of its locks."""
        transaction = self.committing.pop(xid)
        if transaction.truncates:
            self.rows = {}
        for key, row in transaction.changes:
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = row
        self._end(xid)

    def _roll_back(self, xid: int) -> None:
        del self.open[xid]
        self._end(xid)

    def _end(self, xid: int) -> None:
        self.latest_completed = max(self.latest_completed, xid)
        self.locked = {key: holder for key, holder in self.locked.items() if holder != xid}

    # ── readers ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def running(self) -> set[int]:
        """The transactions that hold their lock: also those that are in the log and not visible yet."""
        return self.open.keys() | self.committing.keys()

    @property
    def xmax(self) -> int:
        return self.latest_completed + 1

    def snapshot(self) -> tuple[Snapshot, Mapping[int, Row]]:
        """Return a snapshot and the rows that it shows."""
        xip = frozenset(xid for xid in self.running if xid < self.xmax)
        return Snapshot(min([*xip, self.xmax]), self.xmax, xip), dict(self.rows)

    def heartbeat(self) -> int:
        """Write a logical message, which the log delivers at its own position."""
        lsn = self._advance()
        beat = {"op": "m", "source": {"lsn": lsn, "ts_ms": 0}, "message": {"prefix": HEARTBEAT_PREFIX, "content": ""}}
        self.log.append(Entry(lsn, [beat]))
        return lsn


class Sampling:
    """A sample's three readings, one at a time."""

    def __init__(self, source: Source, *, with_locks: bool) -> None:
        self._source = source
        self._with_locks = with_locks
        self._lsn: int | None = None
        self._running: set[int] | None = None

    def step(self) -> Sample | None:
        """Take the next reading; return the sample when it was the last."""
        if self._lsn is None:
            self._lsn = self._source.lsn
        elif self._running is None:
            self._running = set(self._source.running) if self._with_locks else set()
        else:
            sample = sample_of(self._lsn, self._running, self._source.xmax)
            self._lsn = self._running = None
            return sample
        return None


def event(op: str, lsn: int, xid: int, before: Row | None, after: Row | None) -> Event:
    """Return a change as Debezium writes it."""
    source = {"schema": "public", "table": TABLE, "lsn": lsn, "txId": xid, "ts_ms": 0}
    return {"op": op, "before": before, "after": after, "source": source}


def payload(entries: list[Entry]) -> bytes:
    """Return a batch as the capture hands it over."""
    return orjson.dumps([event for entry in entries for event in entry.events])
