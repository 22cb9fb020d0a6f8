"""Whoever follows a log of several tables with their documents, honestly or with less care, into a store in memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from delta_sync.building import DocumentBuilder
from delta_sync.changes import Change, Key
from delta_sync.decoding import Stretch, decode
from delta_sync.progress import LogPosition, Progress
from delta_sync.sources.reader import Snapshot, SourceReader
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore

R = TypeVar("R", bound=SourceReader)


class Store:
    """A derived store: what is written beats what is there by its version, or because it comes later."""

    def __init__(self, *, versions: bool) -> None:
        self._versions = versions
        self.documents: dict[Key, tuple[int, dict[str, Any] | None]] = {}

    def write(self, changes: list[Change]) -> None:
        for change in changes:
            known = self.documents.get(change.key)
            if known is None or not self._versions or change.version >= known[0]:
                self.documents[change.key] = change.version, change.row

    def rows(self) -> dict[Key, dict[str, Any]]:
        return {key: row for key, (_, row) in self.documents.items() if row is not None}


class Careless(DocumentBuilder):
    """Takes any snapshot."""

    def _shows_all(self, snapshot: Snapshot) -> bool:
        self._unseen.clear()
        self._snapshot = snapshot
        return True


class Follower(Generic[R]):
    """Follows the log with a builder into a store. Half of its writes arrive at the very end, the newest first."""

    def __init__(
        self, reader: R, state: StateStore, kind: type[DocumentBuilder], seed: object, *, versions: bool
    ) -> None:
        self.reader = reader
        specs = dict(reader.documents)
        (self.root,) = specs
        tables = reader.tables([self.root])
        self._progress = Progress(LogPosition(lambda: 0.0), lambda: 0.0)
        self.stopping = threading.Event()
        self.builder = kind(
            specs=specs,
            reader=self.reader,
            epoch=1,
            tables=lambda: tables,
            dumps=DumpStore(state, "movies"),
            load_again=lambda names, reason: None,
            progress=self._progress,
            stopping=self.stopping,
        )
        self.watched = self.builder.watched(self.reader.table_codec)
        self.codecs = {name: self.reader.table_codec(of[0].watch.table) for name, of in self.watched.items()}
        self.store = Store(versions=versions)
        self._rng = random.Random(f"{seed} {kind} {versions}")
        self._late: list[list[Change]] = []
        first = self.reader.read_chunk(tables[self.root], None, 1000, 1 << 30, lambda _: True)
        assert first is not None
        self.store.write([Change(self.root, key, first.version(1, 0), row) for key, row in first.rows])

    def follow(self, events: list[dict[str, Any]]) -> None:
        """Build what events are about."""
        for start in range(0, len(events), 20):
            some = Stretch(1, events[start : start + 20])
            decoded = decode([some], self.codecs, "beat", None, (), self.watched, self.watched.keys())
            if decoded.touched is None:
                continue
            for root, keys in self.builder.keys(decoded.touched).items():
                changes, left, _ = self.builder.read(root, keys)
                assert left == []
                if self._rng.random() < 0.5:
                    self._late.append(changes)
                else:
                    self.store.write(changes)

    def waits_for(self) -> str:
        """Return for what it waits; nothing: it does not."""
        return self._progress.state()[1] or ""

    def count_looks(self) -> Callable[[], int]:
        """Count the snapshots that are refused from now on."""
        refused: list[None] = []
        shows = self.builder._shows_all

        def counted(snapshot: Any) -> bool:
            shown = shows(snapshot)
            if not shown:
                refused.append(None)
            return shown

        self.builder._shows_all = counted  # type: ignore[method-assign]  # it still does what it did
        return lambda: len(refused)

    def catch_up(self) -> None:
        while self._late:
            self.store.write(self._late.pop())
