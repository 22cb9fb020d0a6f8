"""A sink in this process's memory: what users' tests and the simulation write to. It forgets everything at exit.

It is not registered as an entry point: a pipeline whose position is kept while its store is not would lose data at
every restart, in silence. Whoever wants it constructs it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write, rejected
from delta_sync.errors import Problem, UsageError
from delta_sync.sinks.base import VERSION_FIELD, Options, Sink, Stored, Target, TargetOptions
from delta_sync.tables import Table, key_text
from delta_sync.values import to_json

SCAN_BATCH = 1000  # ids in one step of a scan: small enough that a test's scan has several


class MemoryOptions(Options):
    """It has none."""


class MemoryTargetOptions(TargetOptions):
    """It has none."""


class Entry(NamedTuple):
    """What is stored under one id."""

    version: int
    body: bytes | None  # the document's JSON; None: a tombstone
    expires_at_s: float | None  # of a tombstone, on the store's clock


class _Place:
    """What one target holds."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.floor = 0


class MemoryStore:
    """The store behind one or more sinks: outlives them, as a real one does, so that a test can restart a worker."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` is the clock, in seconds, by which tombstones expire."""
        self.lock = threading.Lock()
        self.places: dict[str, _Place] = {}
        self.now = now

    def place(self, name: str) -> _Place:
        """Return what is at a place, which comes into being with the first question. Hold the lock."""
        return self.places.setdefault(name, _Place())


class MemorySink(Sink[MemoryOptions, MemoryTargetOptions]):
    """Documents as JSON values in a dictionary. Thread-safe; each method is atomic, a scan one step at a time."""

    schemes = ("memory",)
    options_model = MemoryOptions
    target_model = MemoryTargetOptions

    def __init__(
        self,
        name: str = "memory",
        url: str = "memory://",
        options: MemoryOptions | None = None,
        tombstone_ttl_s: int = 7 * 86400,
        *,
        store: MemoryStore | None = None,
    ) -> None:
        """Sinks given the same `store` share it; without one, each has its own."""
        super().__init__(name, url, options or MemoryOptions(), tombstone_ttl_s)
        if not url.startswith("memory://"):
            raise UsageError(f"sink {name}: the URL must begin with memory://")
        self.store = store or MemoryStore()

    def target(self, table: Table, options: MemoryTargetOptions) -> Target:
        """Return the table's own place."""
        return Target(table, table.id, options)

    def check(self, targets: Sequence[Target]) -> list[Problem]:
        """Find nothing: memory is always there."""
        del targets
        return []

    def prepare(self, target: Target) -> None:
        """Do nothing: a place needs no preparation."""

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Apply the writes at one instant."""
        bodies = [_body(write) for write in writes]
        with self.store.lock:
            place, now_s = self.store.place(target.place), self.store.now()
            return [self._apply(place, now_s, write, body) for write, body in zip(writes, bodies, strict=True)]

    def _apply(self, place: _Place, now_s: float, write: Write, body: bytes | Outcome | None) -> Outcome:
        if isinstance(body, Outcome):
            return body
        id_ = key_text(write.key)
        if not self._beats(write.version, _alive(place.entries.get(id_), now_s), place.floor):
            return STALE
        expires_at_s = now_s + self.tombstone_ttl_s if body is None else None
        place.entries[id_] = Entry(write.version, body, expires_at_s)
        return APPLIED

    def _beats(self, version: int, stored: Entry | None, floor: int) -> bool:
        return version >= floor and (stored is None or version >= stored.version)

    def truncate(self, target: Target, version: int) -> int:
        """Raise the floor and delete what is below it, at one instant."""
        with self.store.lock:
            place = self.store.place(target.place)
            place.floor = max(place.floor, version)
            old = [id_ for id_, entry in place.entries.items() if entry.body is not None and entry.version < version]
            for id_ in old:
                del place.entries[id_]
            return len(old)

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        """Return what is there at one instant."""
        with self.store.lock:
            place, now_s = self.store.place(target.place), self.store.now()
            entries = [_alive(place.entries.get(key_text(key)), now_s) for key in keys]
        return [None if entry is None else Stored(entry.version, _document(entry.body)) for entry in entries]

    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        """Yield what was there when the scan began and still is, in steps of `SCAN_BATCH`."""
        with self.store.lock:
            ids = list(self.store.place(target.place).entries)
        for start in range(0, len(ids), SCAN_BATCH):
            with self.store.lock:
                entries = self.store.place(target.place).entries
                found = [(id_, entries.get(id_)) for id_ in ids[start : start + SCAN_BATCH]]
            yield [(id_, entry.version) for id_, entry in found if entry is not None and entry.body is not None]

    def newest_version(self, target: Target) -> int:
        """Return what is the highest at one instant."""
        with self.store.lock:
            place, now_s = self.store.place(target.place), self.store.now()
            alive = [entry.version for entry in place.entries.values() if _alive(entry, now_s) is not None]
            return max([place.floor, *alive])

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        """Forget the keys that have these versions."""
        with self.store.lock:
            entries = self.store.place(target.place).entries
            for key, version in items:
                id_ = key_text(key)
                if id_ in entries and entries[id_].version == version:
                    del entries[id_]

    def drop(self, target: Target) -> int:
        """Forget the place."""
        with self.store.lock:
            place = self.store.places.pop(target.place, None)
        return 0 if place is None else sum(entry.body is not None for entry in place.entries.values())

    def documents(self, target: Target) -> dict[str, dict[str, Any]]:
        """Return every document by its id: what a test compares with what it expects."""
        with self.store.lock:
            entries = dict(self.store.place(target.place).entries)
        return {id_: orjson.loads(entry.body) for id_, entry in entries.items() if entry.body is not None}


def _alive(entry: Entry | None, now_s: float) -> Entry | None:
    """Return the entry unless it is a tombstone whose time is over."""
    if entry is None or (entry.expires_at_s is not None and entry.expires_at_s <= now_s):
        return None
    return entry


def _body(write: Write) -> bytes | Outcome | None:
    """Return the document as JSON, None for a delete, or the outcome if no sink would take it."""
    if write.document is None:
        return None
    if VERSION_FIELD in write.document:
        return rejected(f"the field {VERSION_FIELD} is Delta's own; give the document's field another name")
    try:
        return to_json(write.document)
    except TypeError as error:
        return rejected(f"the document cannot be written as JSON: {error}")


def _document(body: bytes | None) -> dict[str, Any] | None:
    return None if body is None else orjson.loads(body)
