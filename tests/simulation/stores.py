"""The simulation's stores: every step of theirs is a moment at which something else may happen, or a crash."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from delta_sync.changes import Outcome, Write
from delta_sync.sinks.base import Target
from delta_sync.sinks.memory import MemorySink, MemoryTargetOptions
from delta_sync.tables import Table

Steps = Generator[None, None, None]


class Seen(NamedTuple):
    """What a reader sees of a key, the version by which the next write is judged, and whether it is about to go."""

    document: dict[str, Any] | None
    version: int
    going: bool


class Store(ABC):
    """A sink whose calls can be interrupted at each `yield`."""

    @abstractmethod
    def apply(self, writes: Sequence[Write]) -> Steps: ...

    @abstractmethod
    def truncate(self, version: int) -> Steps: ...

    @abstractmethod
    def sweep(self) -> Steps: ...

    @abstractmethod
    def see(self, key: int) -> Seen: ...


class AtomicStore(Store):
    """The real `MemorySink`: each call is one step."""

    def __init__(self, table: Table, sink: MemorySink | None = None) -> None:
        self.sink = sink or MemorySink()
        self.target: Target = self.sink.target(table, MemoryTargetOptions())

    def apply(self, writes: Sequence[Write]) -> Steps:
        outcomes: list[Outcome] = self.sink.apply(self.target, writes)
        assert all(outcome.kind in ("applied", "stale") for outcome in outcomes), outcomes
        yield

    def truncate(self, version: int) -> Steps:
        self.sink.truncate(self.target, version)
        yield

    def sweep(self) -> Steps:
        self.sink.sweep(self.target)
        yield

    def see(self, key: int) -> Seen:
        (stored,) = self.sink.read(self.target, [(key,)])
        floor = self.sink.store.place(self.target.place).floor
        if stored is None:
            return Seen(None, floor, going=False)
        return Seen(stored.document, max(stored.version, floor), going=False)


class TwoStepStore(Store):
    """The protocol of a store that is atomic for single keys alone, as `MongoSink` follows it with MongoDB.

    Documents and tombstones are in two places. An upsert obeys the tombstone, writes the document and obeys the
    tombstone again; a delete writes the tombstone and then removes the document. The operations of a batch run in any
    order; here in the given one, with anything in between.
    """

    def __init__(self) -> None:
        self.documents: dict[int, Write] = {}
        self.tombstones: dict[int, int] = {}
        self.floor = 0

    def apply(self, writes: Sequence[Write]) -> Steps:
        writes = yield from self._not_outranked(writes)
        for write in writes:
            if write.document is None:
                yield from self._record_delete(write)
        written: list[Write] = []
        for write in writes:
            stored = self.documents.get(write.key[0])
            if write.document is None:
                if stored is not None and stored.version <= write.version:
                    del self.documents[write.key[0]]
            elif self._beats(write, stored):
                self.documents[write.key[0]] = write
                written.append(write)
            yield
        yield from self._obey_tombstones(written)

    def _not_outranked(self, writes: Sequence[Write]) -> Generator[None, None, Sequence[Write]]:
        """Leave out upserts that are outranked already, and what is that old of their documents."""
        upserts = [write for write in writes if write.document is not None]
        stale = [write for write in upserts if write.version < self._least(write.key[0])]
        yield from self._obey_tombstones(upserts)
        return [write for write in writes if write not in stale]

    def _record_delete(self, write: Write) -> Steps:
        self.tombstones[write.key[0]] = max(write.version, self.tombstones.get(write.key[0], 0))
        yield

    def _beats(self, write: Write, stored: Write | None) -> bool:
        return stored is None or stored.version <= write.version

    def _obey_tombstones(self, written: Sequence[Write]) -> Steps:
        """One question for all, then a deletion for each that is outranked."""
        outranked = [(write, least) for write in written if write.version < (least := self._least(write.key[0]))]
        yield
        for write, least in outranked:
            stored = self.documents.get(write.key[0])
            if stored is not None and stored.version < least:
                del self.documents[write.key[0]]
            yield

    def _least(self, key: int) -> int:
        return max(self.floor, self.tombstones.get(key, 0))

    def truncate(self, version: int) -> Steps:
        yield from self._raise_floor(version)
        older = [key for key, stored in self.documents.items() if stored.version < version]
        yield
        for key in older:
            if key in self.documents and self.documents[key].version < version:
                del self.documents[key]
            yield

    def _raise_floor(self, version: int) -> Steps:
        self.floor = max(self.floor, version)
        yield

    def sweep(self) -> Steps:
        outranked = [key for key, stored in self.documents.items() if stored.version < self._least(key)]
        yield
        for key in outranked:
            if key in self.documents and self.documents[key].version < self._least(key):
                del self.documents[key]
            yield

    def see(self, key: int) -> Seen:
        stored, least = self.documents.get(key), self._least(key)
        if stored is None:
            return Seen(None, least, going=False)
        return Seen(stored.document, max(stored.version, least), going=stored.version < least)
