"""The keeper of a lease, on a real state store, with a clock that the tests move."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from delta_sync import leases
from delta_sync.errors import LeaseLost
from delta_sync.leases import MARGIN, LeaseKeeper
from delta_sync.state import Lease, StateStore
from delta_sync.testing.processes import wait_until

TTL_S = 3600.0  # by the state store's clock, which nobody moves: there it does not expire while a test runs
BELIEVED_S = TTL_S * (1 - MARGIN)
WAIT_S = 60.0  # for what happens at once, unless the machine is very busy


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    with StateStore.open("sqlite:///state.db", tmp_path, busy_timeout_s=0.01) as opened:
        yield opened


@pytest.fixture
def lost() -> list[Lease]:
    return []


@pytest.fixture
def keeper(store: StateStore, clock: Clock, lost: list[Lease]) -> LeaseKeeper:
    return LeaseKeeper(store, "movies", "load", "me", TTL_S, on_lost=lost.append, clock=clock)


@contextlib.contextmanager
def cut_off(tmp_path: Path) -> Iterator[None]:
    """Hold SQLite's write lock: whoever wants to write is told StateBusy."""
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def taken(keeper: LeaseKeeper) -> Lease:
    assert keeper.renew()
    assert keeper.lease is not None
    return keeper.lease


def test_a_lease_is_believed_in_for_its_time_without_the_margin(
    keeper: LeaseKeeper, clock: Clock, lost: list[Lease]
) -> None:
    """With no step taken meanwhile: so it is for a process that was frozen."""
    assert not keeper.held
    lease = taken(keeper)
    clock.now_s += BELIEVED_S - 1
    keeper.check()
    assert keeper.held
    assert keeper.holds(lease)
    clock.now_s += 1
    assert not keeper.held
    assert not keeper.holds(lease)
    assert keeper.lease is None
    assert lost == []
    keeper.check()
    keeper.check()
    assert lost == [lease]


def test_the_margin_is_a_part_that_clocks_do_not_differ_by() -> None:
    """And two renewals fit into the rest."""
    assert 0.1 <= MARGIN < 1 / 3


def test_time_counts_from_before_it_was_asked_for(
    keeper: LeaseKeeper, store: StateStore, clock: Clock, lost: list[Lease]
) -> None:
    def slowly(*_arguments: Any) -> None:
        clock.now_s += 100

    start_s = clock.now_s
    sa.event.listen(store._engine, "commit", slowly)
    taken(keeper)
    assert clock.now_s == start_s + 100
    clock.now_s = start_s + BELIEVED_S - 1
    assert keeper.held
    clock.now_s = start_s + BELIEVED_S
    assert not keeper.held
    keeper.check()
    assert len(lost) == 1


def test_an_answer_that_comes_too_late_is_none(
    keeper: LeaseKeeper, store: StateStore, clock: Clock, lost: list[Lease]
) -> None:
    def slowly(*_arguments: Any) -> None:
        clock.now_s += BELIEVED_S

    sa.event.listen(store._engine, "commit", slowly)
    assert not keeper.renew()
    keeper.check()
    assert lost == [], "what was never believed in is not lost"
    sa.event.remove(store._engine, "commit", slowly)
    lease = taken(keeper)
    sa.event.listen(store._engine, "commit", slowly)
    assert not keeper.renew()
    assert lost == [lease], "its time was over before the renewal's answer came"


def test_a_renewal_prolongs_it(keeper: LeaseKeeper, clock: Clock, lost: list[Lease]) -> None:
    lease = taken(keeper)
    for _ in range(5):
        clock.now_s += BELIEVED_S - 1
        assert keeper.renew()
        assert keeper.holds(lease)
    assert lost == []


def test_a_renewal_that_comes_too_late_is_a_loss(keeper: LeaseKeeper, clock: Clock, lost: list[Lease]) -> None:
    """Though nobody else had it: those who asked in between were told that it is not held."""
    lease = taken(keeper)
    clock.now_s += BELIEVED_S
    assert keeper.renew()
    assert lost == [lease]


def test_cut_off_from_the_state_store(keeper: LeaseKeeper, tmp_path: Path, clock: Clock, lost: list[Lease]) -> None:
    with cut_off(tmp_path):
        assert not keeper.renew()
    lease = taken(keeper)
    with cut_off(tmp_path):
        clock.now_s += BELIEVED_S - 1
        assert keeper.renew(), "not yet"
        clock.now_s += 1
        assert not keeper.renew()
        keeper.check()
    assert lost == [lease]
    assert keeper.renew()


def test_another_has_it(keeper: LeaseKeeper, store: StateStore, lost: list[Lease]) -> None:
    mine = taken(keeper)
    store.release_lease(mine)
    theirs = store.take_lease("movies", "load", "other", TTL_S)
    assert theirs is not None
    assert keeper.held, "it cannot know yet"
    assert not keeper.renew()
    assert not keeper.renew()
    assert lost == [mine]
    store.release_lease(theirs)
    again = taken(keeper)
    assert not keeper.holds(mine)
    assert again.token == theirs.token + 1


def test_another_had_it_between_two_renewals(store: StateStore, clock: Clock) -> None:
    """It is ours again, but what was begun before must end first."""
    seen: list[tuple[Lease, bool]] = []

    def note(lease: Lease) -> None:
        seen.append((lease, ours.held))

    ours = LeaseKeeper(store, "movies", "load", "me", TTL_S, on_lost=note, clock=clock)
    mine = taken(ours)
    store.release_lease(mine)
    theirs = store.take_lease("movies", "load", "other", TTL_S)
    assert theirs is not None
    store.release_lease(theirs)
    assert ours.renew()
    assert seen == [(mine, False)]
    assert not ours.holds(mine)


def test_stopping_gives_it_back(keeper: LeaseKeeper, store: StateStore, tmp_path: Path, lost: list[Lease]) -> None:
    taken(keeper)
    keeper.stop()
    keeper.stop()
    assert not keeper.held
    assert lost == []
    assert keeper.wait() is None, "nobody waits for a keeper that was stopped"
    other = store.take_lease("movies", "load", "other", TTL_S)
    assert other is not None
    store.release_lease(other)
    assert not keeper.renew(), "as a renewal that was under way"
    assert store.lease("movies", "load") is None


def test_stopping_does_not_need_the_state_store(keeper: LeaseKeeper, tmp_path: Path) -> None:
    taken(keeper)
    with cut_off(tmp_path):
        keeper.stop()
    assert not keeper.held


def test_the_next_one_in_line(store: StateStore) -> None:
    """In the background, by the real clock."""
    lost: list[Lease] = []
    with LeaseKeeper(store, "movies", "load", "first", TTL_S, on_lost=lost.append) as first:
        lease = first.wait(WAIT_S)
        assert lease is not None
        # its own renewals are a 20th of a second apart, so it has soon asked in vain
        with LeaseKeeper(store, "movies", "load", "second", 0.15) as second:
            assert second.wait(0) is None
            first.stop()
            successor = second.wait(WAIT_S)
            assert successor is not None
            assert successor.token > lease.token
    assert lost == []


def test_it_is_renewed_in_the_background(store: StateStore, clock: Clock) -> None:
    with LeaseKeeper(store, "movies", "load", "me", 0.3, clock=clock) as keeper:
        assert keeper.wait(WAIT_S) is not None
        for _ in range(5):  # each time beyond what the renewal before was good for
            clock.now_s += 0.3
            wait_until(lambda: keeper.held, WAIT_S, "a renewal")


def test_it_is_lost_while_a_renewal_hangs(tmp_path: Path, clock: Clock) -> None:
    lost = threading.Event()
    with StateStore.open("sqlite:///state.db", tmp_path, busy_timeout_s=10 * WAIT_S) as patient:
        keeper = LeaseKeeper(patient, "movies", "load", "me", 0.3, on_lost=lambda _: lost.set(), clock=clock)
        with keeper:
            assert keeper.wait(WAIT_S) is not None
            with cut_off(tmp_path):
                clock.now_s += 0.3
                assert lost.wait(WAIT_S)


def test_it_ends_while_the_state_store_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STOP_BUDGET_S", 0.01)
    ended = threading.Event()
    with StateStore.open("sqlite:///state.db", tmp_path, busy_timeout_s=10 * WAIT_S) as patient:
        keeper = LeaseKeeper(patient, "movies", "load", "me", TTL_S)
        assert keeper.renew()

        def stop() -> None:
            keeper.stop()
            ended.set()

        stopping = threading.Thread(target=stop, daemon=True)
        with cut_off(tmp_path):
            stopping.start()
            assert ended.wait(WAIT_S)
            assert not keeper.held
        wait_until(lambda: patient.lease("movies", "load") is None, WAIT_S, "giving it back when the store answers")


def test_what_is_written_needs_a_lease(keeper: LeaseKeeper, clock: Clock) -> None:
    """`keeper.lease` would be None when it is lost, which means a write without one."""
    with pytest.raises(LeaseLost, match="'me' does not have the lease 'load'"):
        keeper.require()
    assert taken(keeper) == keeper.require()
    clock.now_s += BELIEVED_S
    with pytest.raises(LeaseLost):
        keeper.require()
