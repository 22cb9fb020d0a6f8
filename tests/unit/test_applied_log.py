"""How far the log is, asked from outside: it passes, stands while the pipeline runs, or rests because none does."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from typing import Any

import pytest

from delta_sync.applied_log import STANDS_S, AppliedLog, says_it_runs


class Clock(threading.Event):
    """Whoever waits lets time pass."""

    now_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += timeout or 0.0
        return False


def passed(applied_to: Callable[[float], int | None], *, alive: bool = True) -> tuple[str, float]:
    """Return how a wait for position 100 ends, and how long it takes."""
    clock = Clock()
    log = AppliedLog(
        mark=lambda: 100,
        applied_to=lambda: applied_to(clock.now_s),
        alive=lambda: alive,
        stopping=clock,
        clock=lambda: clock.now_s,
    )
    return log.pass_now(), clock.now_s


def test_it_is_passed_when_everything_before_the_mark_is_applied() -> None:
    assert passed(lambda _: 100) == ("passed", 0.0)
    state, took_s = passed(lambda now_s: 100 if now_s > 3 else 99)
    assert state == "passed"
    assert took_s == pytest.approx(3.0, abs=0.2)


def test_one_that_is_far_behind_is_waited_for_as_long_as_it_moves() -> None:
    state, took_s = passed(lambda now_s: int(now_s / 10))
    assert state == "passed"
    assert took_s > 30 * STANDS_S


@pytest.mark.parametrize("applied", [None, 0, 99])
def test_one_that_does_not_move_is_given_up(applied: int | None) -> None:
    state, took_s = passed(lambda _: applied)
    assert state == "stands"
    assert took_s == pytest.approx(STANDS_S, abs=0.2)


def test_nobody_waits_long_for_a_pipeline_that_does_not_run() -> None:
    state, took_s = passed(lambda _: 99, alive=False)
    assert state == "rests"
    assert took_s < 5
    assert passed(lambda now_s: 100 if now_s > 1 else 99, alive=False)[0] == "passed"  # its end was just being saved


@pytest.mark.parametrize(
    ("status", "age_s", "runs"),
    [
        ({"state": "streaming"}, 1, True),
        ({"state": "waiting"}, 9, True),
        ({"state": "streaming"}, 11, False),
        ({"state": "stopped"}, 0, False),
        ({"state": "failed"}, 0, False),
    ],
)
def test_what_a_status_says(status: dict[str, Any], age_s: float, runs: bool) -> None:
    assert says_it_runs(status, dt.timedelta(seconds=age_s)) is runs
