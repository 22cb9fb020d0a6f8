"""Progress: how far the log is in the sinks, what the pipeline waits for, and its rates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from delta_sync.applying import SinkNumbers
from delta_sync.dumps import Dump
from delta_sync.progress import LogPosition, News, Progress

TIMEOUT_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def position(clock: Clock) -> LogPosition:
    return LogPosition(clock)


@pytest.fixture
def progress(position: LogPosition, clock: Clock) -> Progress:
    return Progress(position, clock)


# ── the log's position ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_position_never_goes_back(position: LogPosition) -> None:
    assert position.passed_lsn == 0
    for lsn, passed in ((20, 20), (10, 20), (30, 30)):  # a redelivered heartbeat is older
        position.advance(lsn)
        assert position.passed_lsn == passed


def test_waiting_for_the_log(position: LogPosition) -> None:
    position.advance(20)
    assert position.wait(20, 0)
    assert not position.wait(21, 0)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(position.wait, 30, TIMEOUT_S)
        position.advance(25)
        position.advance(31)
        assert waiting.result()


def test_the_lag_is_the_last_round_trip(position: LogPosition, clock: Clock) -> None:
    assert position.lag_s() is None
    position.sent(10)
    clock.now_s += 2
    position.advance(10)
    clock.now_s += 50
    assert position.lag_s() == 2.0


def test_a_heartbeat_that_is_still_out_makes_the_lag_grow(position: LogPosition, clock: Clock) -> None:
    position.sent(10)
    clock.now_s += 1
    position.advance(10)
    position.sent(20)
    position.sent(30)
    clock.now_s += 5
    assert position.lag_s() == 5.0
    position.advance(20)
    clock.now_s += 1
    assert position.lag_s() == 6.0  # of the other one
    position.advance(40)
    assert position.lag_s() == 6.0
    position.sent(50)
    position.advance(50)
    assert position.lag_s() == 0.0


def test_a_heartbeat_that_was_back_before_it_was_noted(position: LogPosition, clock: Clock) -> None:
    position.advance(10)
    position.sent(10)
    clock.now_s += 99
    assert position.lag_s() is None


# ── what state it is in ──────────────────────────────────────────────────────────────────────────────────────────


def test_states(progress: Progress) -> None:
    assert progress.state() == ("starting", None)
    progress.loads["public.movie"] = {"state": "running"}
    progress.loads["public.genre"] = {"state": "done"}
    assert progress.state() == ("starting", None)  # nothing has come through the log yet
    progress.position.advance(10)
    assert progress.state() == ("loading", "public.movie")
    progress.loads["public.movie"]["state"] = "done"
    assert progress.state() == ("streaming", None)
    progress.end("failed", "the disk is full")
    assert progress.state() == ("failed", "the disk is full")


def test_what_it_waits_for(progress: Progress) -> None:
    progress.position.advance(10)
    cache, search = SinkNumbers(), SinkNumbers()
    progress.sinks = {"cache": cache, "search": search}
    cache.busy = "it loads its data"
    progress.waits("load", "pid 77")
    assert progress.state() == ("waiting", "sink cache: it loads its data; load: pid 77")
    progress.sinks["cache"].busy = "sink cache: Redis at cache:6379 cannot be reached"  # as its error says
    assert progress.state() == ("waiting", "sink cache: Redis at cache:6379 cannot be reached; load: pid 77")
    progress.sinks["cache"].busy = "it loads its data"
    cache.busy = None
    progress.waits("load", "pid 78")
    assert progress.state() == ("waiting", "load: pid 78")
    progress.waits("load", None)
    progress.waits("look-up ratings", None)  # of which nobody knew
    assert progress.state() == ("streaming", None)


def test_the_lag_in_bytes(progress: Progress) -> None:
    progress.insert_lsn = 100
    assert progress.lag_bytes() is None  # nothing is known before the first heartbeat is back
    progress.position.advance(30)
    assert progress.lag_bytes() == 70
    progress.position.advance(130)  # a newer heartbeat than the sample
    assert progress.lag_bytes() == 0


# ── the document ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_rates_are_those_of_the_last_seconds(progress: Progress, clock: Clock) -> None:
    numbers = SinkNumbers()
    progress.sinks = {"cache": numbers}
    document = progress.document()
    assert document["rates"] == {"changes_per_s": 0.0}
    for _ in range(20):
        clock.now_s += 1
        progress.events += 100
        numbers.applied += 10
        document = progress.document()
    assert document["rates"] == {"changes_per_s": 100.0}
    assert document["sinks"]["cache"]["writes_per_s"] == 10.0
    for _ in range(6):
        clock.now_s += 1
        document = progress.document()
    assert document["rates"] == {"changes_per_s": 0.0}
    assert document["totals"]["changes"] == 2000
    assert document["sinks"]["cache"]["applied"] == 200


def test_the_document_says_since_when(progress: Progress) -> None:
    first = progress.document()
    assert (first["state"], first["lag_s"], first["lag_bytes"]) == ("starting", None, None)
    assert progress.document()["since"] == first["since"]
    progress.position.advance(1)
    again = progress.document()
    assert again["state"] == "streaming"
    assert again["since"] >= first["since"]


def test_a_log_has_a_line_for_each_change_of_state(progress: Progress) -> None:
    news = News(progress)
    assert news.look() == []
    progress.loads["public.movie"] = {"state": "running"}
    assert news.look() == [("loading", {"tables": ["public.movie"]})]
    progress.position.advance(10)
    assert news.look() == [("streaming", {"lag_s": None})]
    progress.loads["public.movie"]["state"] = "done"
    progress.position.advance(20)
    progress.waits("load", "somebody")
    progress.waits("load", None)
    assert news.look() == []
    progress.events, progress.writes, progress.dead_letters = 5, 4, 1
    progress.end("stopped", "it was asked to stop")
    expected = {"state": "stopped", "changes": 5, "writes": 4, "dead_letters": 1}
    assert news.look() == [("stopped", expected)]
    assert news.look() == []


def test_the_rate_of_a_dump_counts_from_when_it_was_first_seen(progress: Progress, clock: Clock) -> None:
    """Not from its beginning: another process may have read most of it."""
    progress.document()
    clock.now_s += 2
    progress.dumps = [Dump(id=3, table="public.movie", kind="table", state="running", rows=1000, estimate=1500)]
    assert progress.document()["dumps"][0]["rows_per_s"] is None
    clock.now_s += 2
    progress.dumps = [Dump(id=3, table="public.movie", kind="table", state="running", rows=1200, estimate=1500)]
    (dump,) = progress.document()["dumps"]
    assert (dump["rows_per_s"], dump["left_s"]) == (100.0, 3)
