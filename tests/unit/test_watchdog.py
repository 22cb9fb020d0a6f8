"""A function of the user's that does not return is named and ended, alone; memory beyond its bound is told once."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from delta_sync.changes import Change
from delta_sync.pipeline import TableProcessor
from delta_sync.processing import Processed, process
from delta_sync.spec import ProcessorSpec
from delta_sync.tables import Column, Kind, Table
from delta_sync.watchdog import LOOK_S, SLOW_S, TRIES, AtHand, Watchdog

MOVIE = Table("public", "movie", (Column("id", "bigint", Kind.INTEGER),), ("id",))
FOR_EVER_S = 1e6
LOOKS = int(10 / LOOK_S) * (TRIES + 2)  # enough for every signal


class Watched:
    """A watchdog whose looks are the test's."""

    def __init__(self, timeout_s: float = 10) -> None:
        self.at_hand = AtHand()
        self.noted: list[str | None] = []
        self.given_up: list[str] = []
        self.gave_up = threading.Event()
        self.grown: list[int] = []
        self.rss = 0
        self.dog = Watchdog(
            self.at_hand,
            timeout_s=timeout_s,
            memory_most=1000,
            note=self.noted.append,
            give_up=self.give_up,
            outgrown=self.outgrown,
            stopping=threading.Event(),
            rss=lambda: self.rss,
        )

    def give_up(self, said: str) -> None:
        self.given_up.append(said)
        self.gave_up.set()

    def outgrown(self, bytes_: int) -> bool:
        self.grown.append(bytes_)
        return bytes_ > 1500

    def process(self, function: Callable[[dict[str, Any]], Any], *, looks: int = LOOKS) -> Processed:
        """Process rows 1, 2 and 3; the watchdog looks so often while the function has row 2."""
        entered, ended = threading.Event(), threading.Event()

        def look() -> None:
            entered.wait(FOR_EVER_S / 1e3)
            for _ in range(looks):
                self.dog.look()
                if ended.wait(0.01):  # for a signal to arrive
                    return

        def noting(row: dict[str, Any]) -> Any:
            if row["id"] == 2:
                entered.set()
            return function(row)

        looker = threading.Thread(target=look)
        looker.start()
        changes = [Change("public.movie", (id_,), 5, {"id": id_}) for id_ in (1, 2, 3)]
        try:
            return process(MOVIE, TableProcessor("public.movie", noting, (), {}), changes, {}, self.at_hand)
        finally:
            ended.set()
            looker.join()


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.dog.wind(0.0)


def spins(row: dict[str, Any]) -> Any:
    while row["id"] == 2:
        pass
    return row


def sleeps(row: dict[str, Any]) -> Any:
    if row["id"] == 2:
        time.sleep(FOR_EVER_S)
    return row


def waits_for_a_lock(row: dict[str, Any]) -> Any:
    if row["id"] == 2:
        threading.Event().wait(FOR_EVER_S)
    return row


def matches_for_ever(row: dict[str, Any]) -> Any:
    if row["id"] == 2:
        re.match(r"(a+)+$", "a" * 60 + "b")
    return row


def swallows(row: dict[str, Any]) -> Any:
    while row["id"] == 2:
        with contextlib.suppress(Exception):  # what users write
            time.sleep(FOR_EVER_S)
    return row


@pytest.mark.parametrize("function", [spins, sleeps, waits_for_a_lock, swallows])
def test_a_function_that_does_not_return_costs_its_own_change(
    watched: Watched, function: Callable[[dict[str, Any]], Any]
) -> None:
    found = watched.process(function)
    assert [write.key for write in found.writes] == [(1,), (3,)]
    (failed,) = found.failures
    assert (failed.change.key, failed.stage) == ((2,), "process")
    assert failed.error.startswith("ProcessorTimeout: It had not returned after 10 s (processor.timeout), at ")
    assert function.__name__ in failed.trace
    assert watched.dog.timeouts == 1
    assert watched.given_up == []
    assert watched.at_hand.change is None


def test_one_that_lets_no_other_thread_run_is_ended_by_the_kernels_timer() -> None:
    watched = Watched(timeout_s=0.5)
    watched.dog.look()
    found = watched.process(matches_for_ever, looks=1)
    watched.dog.wind(0.0)
    (failed,) = found.failures
    assert [write.key for write in found.writes] == [(1,), (3,)]
    assert failed.error.startswith("ProcessorTimeout: It had not returned after 0.5 s")
    assert "matches_for_ever" in failed.trace


def test_it_is_named_while_it_is_at_hand(watched: Watched) -> None:
    watched.process(sleeps)
    first = watched.noted[0]
    assert first is not None
    assert first.startswith(f"public.movie 2 has been in processor.py for {SLOW_S:.0f} s, at test_watchdog.py line")
    watched.dog.look()
    assert watched.noted[-1] is None, "it no longer waits"


def test_one_that_is_only_slow_is_left_alone(watched: Watched) -> None:
    def slow(row: dict[str, Any]) -> Any:
        if row["id"] == 2:
            time.sleep(0.2)
        return row

    found = watched.process(slow, looks=9)  # a look takes a hundredth of a second, and says LOOK_S
    assert ([write.key for write in found.writes], found.failures) == ([(1,), (2,), (3,)], [])
    assert watched.dog.timeouts == 0


def test_when_no_signal_helps_the_process_is_given_up(watched: Watched) -> None:
    def heeds_nothing(row: dict[str, Any]) -> Any:
        while row["id"] == 2 and not watched.gave_up.is_set():
            with contextlib.suppress(BaseException):  # as a call that never looks at signals
                watched.gave_up.wait(FOR_EVER_S)
        return row

    watched.process(heeds_nothing)
    assert "public.movie 2 has been in processor.py" in watched.given_up[0]
    assert "nothing ends it" in watched.given_up[0]


def test_memory_beyond_its_bound_is_told_until_it_is_heeded(watched: Watched) -> None:
    for watched.rss in (999, 1000, 1001, 2000, 3000):
        watched.dog.look()
    assert watched.grown == [1001, 2000]


def test_sizes_are_read_as_people_write_them() -> None:
    for text, bytes_ in (("1GiB", 1 << 30), ("800MB", 800 << 20), ("300 m", 300 << 20), (1 << 30, 1 << 30)):
        assert ProcessorSpec.model_validate({"memory": text}).memory == bytes_
    for text in ("lots", "1.5GiB", True, "10MiB"):
        with pytest.raises(ValueError, match="memory"):
            ProcessorSpec.model_validate({"memory": text})
