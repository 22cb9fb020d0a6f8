"""What every part of the contract builds on: where stores differ, places that are cleaned up, single writes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import orjson
import pytest

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write
from delta_sync.sinks.base import Sink, Target
from delta_sync.tables import Table
from delta_sync.testing.contract.samples import ACTOR, MOVIE
from delta_sync.values import Document, to_json

AnySink = Sink[Any, Any]


class SecondStep(NamedTuple):
    """How a sink's `apply` looks, once its documents are written, whether a tombstone or the floor outranks them."""

    method: str  # of the sink: what does look, and is called by `apply` for nothing else
    outranked_by: frozenset[Literal["tombstone", "floor"]]  # by the other of the two, if any, nothing old is written
    looks_first: bool  # whether `apply` calls the method before it writes, too


class Scene:
    """The base of the parts. Subclasses say where their store differs, and give the fixture `sink`."""

    second_step: ClassVar[SecondStep | None]
    rejects: ClassVar[frozenset[str]] = frozenset()  # names in DOCUMENTS that this store cannot hold
    reads_never_go_back: ClassVar[bool] = True  # False: a write that is too old may be seen until its second step
    tells_stale: ClassVar[bool] = True  # False: a write that is too old counts as applied, and is never what is read
    large_batch: ClassVar[int] = 5000  # writes
    storm_seeds: ClassVar[Sequence[int]] = range(8)  # a failure names its seed, which plans the same storm again
    storm_writes: ClassVar[int] = 400  # per storm; each is delivered about twice

    # ── what a subclass gives, and may override ──────────────────────────────────────────────────────────────────

    @pytest.fixture
    def sink(self) -> Iterator[AnySink]:
        """Yield an open sink on a store that is there."""
        raise NotImplementedError

    @pytest.fixture
    def unreachable(self) -> Iterator[AnySink]:
        """Yield a sink of the same class whose store is not there."""
        pytest.skip("no unreachable sink is given")

    @property
    def stale(self) -> Outcome:
        """The outcome of a write that is too old."""
        return STALE if self.tells_stale else APPLIED

    def target_of(self, sink: AnySink, table: Table) -> Target:
        """Return the target of a table with options that suit this store."""
        return sink.target(table, sink.target_model())

    def stored_form(self, document: Document) -> dict[str, Any]:
        """Return what `read` gives for a document that was written: its JSON values, unless the store has others."""
        form: dict[str, Any] = orjson.loads(to_json(document))
        return form

    # ── places, ready and cleaned up ─────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def place(self, sink: AnySink, table: Table) -> Generator[Target, None, None]:
        """Give an empty target of the table, and drop it in the end."""
        target = self.target_of(sink, table)
        sink.drop(target)  # what a killed run left
        sink.prepare(target)
        yield target
        sink.drop(target)

    @pytest.fixture
    def target(self, sink: AnySink) -> Iterator[Target]:
        """Yield the empty target of `MOVIE`, whose key is one integer."""
        with self.place(sink, MOVIE) as target:
            yield target

    @pytest.fixture
    def other(self, sink: AnySink) -> Iterator[Target]:
        """Yield the empty target of `ACTOR`, whose keys are those of `MOVIE`, too."""
        with self.place(sink, ACTOR) as target:
            yield target


def apply(sink: AnySink, target: Target, key: Key, version: int, document: Document | None) -> Outcome:
    """Apply one write and return its outcome."""
    (outcome,) = sink.apply(target, [Write(key, version, document)])
    return outcome


def scanned(sink: AnySink, target: Target) -> dict[str, int]:
    """Return all that a scan of a resting store gives. An id that it meets twice must have one version."""
    found: dict[str, int] = {}
    for batch in sink.scan(target):
        for id_, version in batch:
            assert found.setdefault(id_, version) == version
    assert found.keys() <= {id_ for batch in sink.scan_ids(target) for id_ in batch}
    return found
