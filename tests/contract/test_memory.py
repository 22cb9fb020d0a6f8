"""The in-memory sink keeps the contract, and the contract notices a sink that does not compare versions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from delta_sync.changes import APPLIED, STALE, Write
from delta_sync.errors import UsageError
from delta_sync.sinks.memory import Entry, MemorySink, MemoryStore, MemoryTargetOptions
from delta_sync.testing.contract import MOVIE, AnySink, SinkContract, apply, storm


class TestMemory(SinkContract):
    second_step = None
    storm_seeds = range(60)  # it is the fastest, so it gets the most

    @pytest.fixture
    def sink(self) -> AnySink:
        return MemorySink()


class VersionsOff(MemorySink):
    """What a naive sink does: the last write to arrive wins."""

    def _beats(self, version: int, stored: Entry | None, floor: int) -> bool:
        return True


class EqualIsStale(MemorySink):
    """A sink that takes `version >= stored` for `version > stored`."""

    def _beats(self, version: int, stored: Entry | None, floor: int) -> bool:
        return version >= floor and (stored is None or version > stored.version)


class FloorOff(MemorySink):
    """A sink that compares versions but forgets that a truncate keeps older writes out."""

    def _beats(self, version: int, stored: Entry | None, floor: int) -> bool:
        return super()._beats(version, stored, 0)


class NoTombstones(MemorySink):
    """A sink that forgets a delete at once."""

    def __init__(self) -> None:
        super().__init__(tombstone_ttl_s=0)


@pytest.mark.parametrize(("broken", "truncate"), [(VersionsOff, False), (NoTombstones, False), (FloorOff, True)])
def test_storms_find_a_sink_that_breaks_the_rule(broken: Callable[[], MemorySink], truncate: bool) -> None:
    sink = broken()
    target = sink.target(MOVIE, MemoryTargetOptions())

    def storms() -> None:
        for seed in range(20):
            storm(SinkContract(), sink, target, seed, truncate=truncate)

    with pytest.raises(AssertionError, match=r"seed \d+"):
        storms()


def test_the_contract_finds_a_sink_to_which_equal_versions_are_stale() -> None:
    sink = EqualIsStale()
    with pytest.raises(AssertionError):
        SinkContract().test_an_equal_version_is_applied(sink, sink.target(MOVIE, MemoryTargetOptions()))


def test_tombstones_expire() -> None:
    now_s = 1000.0
    sink = MemorySink(tombstone_ttl_s=60, store=MemoryStore(now=lambda: now_s))
    target = sink.target(MOVIE, MemoryTargetOptions())
    apply(sink, target, (1,), 5, None)
    now_s += 59.9
    assert apply(sink, target, (1,), 4, {"n": 4}) == STALE
    now_s += 0.1
    assert sink.read(target, [(1,)]) == [None]
    assert apply(sink, target, (1,), 4, {"n": 4}) == APPLIED


def test_two_sinks_may_share_a_store() -> None:
    store = MemoryStore()
    first, second = MemorySink(store=store), MemorySink(store=store)
    target = first.target(MOVIE, MemoryTargetOptions())
    first.apply(target, [Write((1,), 5, {"n": 1})])
    assert second.documents(target) == {"1": {"n": 1}}
    assert MemorySink().documents(target) == {}


def test_another_url_is_refused() -> None:
    with pytest.raises(UsageError, match="memory://"):
        MemorySink("memory", "redis://localhost")
