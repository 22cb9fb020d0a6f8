"""Whose turn it is in the worker: changes go first, and a dump comes to an end all the same."""

from __future__ import annotations

import pytest

from delta_sync.turns import CHANGES_COME_S, GIVE_WAY_S, SLICES_IN_FLIGHT_MOST, Turns


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(clock)


def test_a_slice_begins_at_once_while_the_log_has_nothing_in_hand(turns: Turns) -> None:
    for in_flight in range(SLICES_IN_FLIGHT_MOST):
        assert turns.slice_waits_s(in_flight=in_flight, log_in_hand=False) == 0
        turns.slice_began()


def test_no_more_slices_are_in_flight_than_the_sinks_have_threads_for(turns: Turns) -> None:
    assert turns.slice_waits_s(in_flight=SLICES_IN_FLIGHT_MOST, log_in_hand=False) is None


def test_a_slice_gives_way_to_the_log_for_a_while(turns: Turns, clock: Clock) -> None:
    """Of a backlog the next batch is always in hand; the dump goes on beside it."""
    turns.slice_began()
    assert turns.slice_waits_s(in_flight=0, log_in_hand=True) == pytest.approx(GIVE_WAY_S)
    clock.now += GIVE_WAY_S / 2
    assert turns.slice_waits_s(in_flight=1, log_in_hand=True) == pytest.approx(GIVE_WAY_S / 2)
    assert turns.slice_waits_s(in_flight=1, log_in_hand=False) == 0
    clock.now += GIVE_WAY_S
    assert turns.slice_waits_s(in_flight=1, log_in_hand=True) == 0


def test_changes_come_until_a_while_after_the_last(turns: Turns, clock: Clock) -> None:
    assert not turns.changes_come
    turns.changed()
    clock.now += CHANGES_COME_S / 2
    assert turns.changes_come
    clock.now += CHANGES_COME_S / 2
    assert not turns.changes_come
