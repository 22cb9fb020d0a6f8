"""Look-ups: how often a service is asked, what is remembered, and what becomes of its failures. Nothing here waits."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import requests

from delta_sync.errors import LookupBusy, ProcessorError
from delta_sync.lookups import LookupCaller, is_transient, retry_after_of
from delta_sync.pipeline import Pipeline

BARRIER_TIMEOUT_S = 60.0  # for threads to start, however busy the machine is

Function = Callable[[list[Any]], Any]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Stopping(threading.Event):
    """Notes how long somebody wanted to wait, without waiting. Sets itself after so many waits."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.clock = Clock()
        self.stop_after = stop_after

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        self.clock.now_s += timeout
        if self.stop_after is not None and len(self.waits) >= self.stop_after:
            self.set()
        assert len(self.waits) < 1000, "it would never end"
        return self.is_set()


class Bench:
    """A caller with everything about it under control; `asked` has the keys of each call that was made."""

    def __init__(self, exits: ExitStack, function: Function, stop_after: int | None, options: dict[str, Any]) -> None:
        self.asked: list[list[Any]] = []
        self.reasons: list[str | None] = []
        self.stopping = Stopping(stop_after)
        self.clock = self.stopping.clock

        def counted(keys: list[Any]) -> Any:
            self.asked.append(keys)
            return function(keys)

        lookup = Pipeline("movies").lookup(**options)(counted)
        self.caller = LookupCaller(lookup, self.stopping, self.clock, self.reasons.append)
        exits.callback(self.caller.close)


MakeBench = Callable[..., Bench]


@pytest.fixture
def bench() -> Iterator[MakeBench]:
    with ExitStack() as exits:

        def make(function: Function = double, *, stop_after: int | None = None, **options: Any) -> Bench:
            return Bench(exits, function, stop_after, {"concurrency": 1, **options})

        yield make


def double(keys: list[Any]) -> dict[Any, Any]:
    return {key: 2 * key for key in keys}


def silent(keys: list[Any]) -> dict[Any, Any]:
    del keys
    return {}


def response_error(status: int, **headers: str) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return requests.HTTPError(f"status {status}", response=response)


# ── keys and batches ─────────────────────────────────────────────────────────────────────────────────────────────


def test_each_key_is_asked_for_once(bench: MakeBench) -> None:
    made = bench()
    assert made.caller.fetch([3, 1, 3, 2, 1]) == ({3: 6, 1: 2, 2: 4}, {}, frozenset())
    assert made.asked == [[3, 1, 2]]


def test_no_key_no_call(bench: MakeBench) -> None:
    made = bench()
    assert made.caller.fetch([]) == ({}, {}, frozenset())
    assert made.asked == []


def test_batches_have_at_most_so_many_keys(bench: MakeBench) -> None:
    made = bench(batch=3)
    assert made.caller.fetch(range(7)).found == {key: 2 * key for key in range(7)}
    assert made.asked == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_key_without_an_answer_is_none(bench: MakeBench) -> None:
    def partial(keys: list[Any]) -> dict[Any, Any]:
        return {1: "a", 99: "not asked for"}

    assert bench(partial).caller.fetch([1, 2]).found == {1: "a", 2: None}


def test_at_most_so_many_calls_at_once(bench: MakeBench) -> None:
    """Two calls can only both be at the barrier if they run at once; three never are."""
    barrier = threading.Barrier(2)
    lock = threading.Lock()
    running, most = 0, 0

    def service(keys: list[Any]) -> dict[Any, Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(BARRIER_TIMEOUT_S)
        with lock:
            running -= 1
        barrier.wait(BARRIER_TIMEOUT_S)
        return double(keys)

    made = bench(service, batch=1, concurrency=2, timeout="1h")
    assert made.caller.fetch(range(6)).found == {key: 2 * key for key in range(6)}
    assert most == 2


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_are_remembered_for_their_time(bench: MakeBench) -> None:
    made = bench(ttl=60)
    made.caller.fetch([1, 2])
    made.clock.now_s += 59
    assert made.caller.fetch([1, 2, 3]).found == {1: 2, 2: 4, 3: 6}
    made.clock.now_s += 1
    made.caller.fetch([1, 3])
    assert made.asked == [[1, 2], [3], [1]]
    assert (made.caller.numbers.hits, made.caller.numbers.asked) == (3, 4)


def test_a_missing_answer_may_be_remembered_for_another_time(bench: MakeBench) -> None:
    made = bench(lambda keys: {1: "a"}, ttl=60, missing_ttl=5)
    made.caller.fetch([1, 2])
    made.clock.now_s += 5
    made.caller.fetch([1, 2])
    assert made.asked == [[1, 2], [2]]


def test_a_missing_answer_is_remembered_too(bench: MakeBench) -> None:
    made = bench(silent)
    for _ in range(2):
        assert made.caller.fetch([1]).found == {1: None}
    assert made.asked == [[1]]


def test_the_cache_is_bounded(bench: MakeBench) -> None:
    made = bench(cache_size=2)
    assert made.caller.fetch([1, 2, 3]).found == {1: 2, 2: 4, 3: 6}
    made.caller.fetch([2, 3])
    assert made.asked == [[1, 2, 3]]
    made.caller.fetch([1])
    assert made.asked == [[1, 2, 3], [1]]


def test_without_a_time_to_live_nothing_is_remembered(bench: MakeBench) -> None:
    made = bench(ttl=0)
    for _ in range(2):
        assert made.caller.fetch([1]).found == {1: 2}
    assert made.asked == [[1], [1]]


def test_a_failure_is_not_remembered(bench: MakeBench) -> None:
    healthy = False

    def service(keys: list[Any]) -> dict[Any, Any]:
        if not healthy:
            raise ValueError("not yet")
        return double(keys)

    made = bench(service)
    assert list(made.caller.fetch([1]).failed) == [1]
    healthy = True
    assert made.caller.fetch([1]) == ({1: 2}, {}, frozenset())


# ── failures that pass ───────────────────────────────────────────────────────────────────────────────────────────


def failing(*errors: Exception) -> Function:
    """A service that fails so, call by call, and then answers."""
    left = list(errors)

    def service(keys: list[Any]) -> dict[Any, Any]:
        if left:
            raise left.pop(0)
        return double(keys)

    return service


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("refused"),
        requests.Timeout("late"),
        ConnectionResetError("reset"),
        TimeoutError("late"),
        LookupBusy("busy"),
        *(response_error(status) for status in (408, 429, 500, 502, 503, 504)),
    ],
    ids=repr,
)
def test_a_failure_that_may_pass_is_retried(bench: MakeBench, error: Exception) -> None:
    made = bench(failing(error, error))
    assert made.caller.fetch([1, 2]) == ({1: 2, 2: 4}, {}, frozenset())
    assert made.asked == [[1, 2]] * 3
    assert len(made.stopping.waits) == 2
    assert isinstance(made.reasons[0], str)
    assert made.reasons[1:] == [None]  # said once, and taken back


def test_another_reason_to_wait_is_told(bench: MakeBench) -> None:
    """Who reads the status looks for what is amiss now, not for what was an hour ago."""
    late, refused = requests.Timeout("late"), requests.ConnectionError("refused")
    made = bench(failing(late, late, refused, refused), trip_after=2)
    made.caller.fetch([1])
    assert [reason and reason.split(": ")[-1] for reason in made.reasons] == ["late", "refused", None]


def test_only_the_batch_that_failed_is_repeated(bench: MakeBench) -> None:
    made = bench(failing(requests.Timeout("late")), batch=2)
    assert made.caller.fetch([1, 2, 3, 4]).found == {1: 2, 2: 4, 3: 6, 4: 8}
    assert made.asked == [[1, 2], [3, 4], [1, 2]]


@pytest.mark.parametrize("error", [response_error(503, Retry_After="17"), LookupBusy("busy", 17.0)], ids=repr)
def test_a_service_may_say_how_long_to_wait(bench: MakeBench, error: Exception) -> None:
    made = bench(failing(error))
    made.caller.fetch([1])
    assert made.stopping.waits == [17.0]


def test_waits_grow_and_are_bounded(bench: MakeBench) -> None:
    made = bench(failing(*[requests.Timeout("late")] * 60))
    made.caller.fetch([1])
    assert len(made.asked) == 61
    assert all(0 <= wait <= 30 for wait in made.stopping.waits)
    assert max(made.stopping.waits[20:]) > 1  # of forty that are random between 0 and 30
    assert made.stopping.waits[0] <= 0.2


def test_stopping_ends_the_retries(bench: MakeBench) -> None:
    made = bench(failing(*[requests.Timeout("late")] * 100), stop_after=3)
    with pytest.raises(LookupBusy, match="late"):
        made.caller.fetch([1])
    assert len(made.asked) == 4  # once more after the wait that was cut short


def test_a_call_that_does_not_answer_in_time_is_repeated(bench: MakeBench) -> None:
    released = threading.Event()
    hung = threading.Event()

    def service(keys: list[Any]) -> dict[Any, Any]:
        if not hung.is_set():
            hung.set()
            assert released.wait(BARRIER_TIMEOUT_S)
        return double(keys)

    made = bench(service, timeout=0.05, concurrency=2)
    try:
        assert made.caller.fetch([1]).found == {1: 2}
        assert hung.is_set()
        assert made.reasons[0] is not None
        assert "did not answer within 0.05 s" in made.reasons[0]
    finally:
        released.set()


def test_of_several_wishes_the_longest_is_heeded(bench: MakeBench) -> None:
    errors = [response_error(429, Retry_After=text) for text in ("7", "31", "5")]
    made = bench(failing(*errors), batch=1)
    assert made.caller.fetch([1, 2, 3]).found == {1: 2, 2: 4, 3: 6}
    assert made.stopping.waits == [31.0]


def test_an_answer_that_lacks_keys_is_repeated_where_it_should_have_all(bench: MakeBench) -> None:
    answers = [{1: "a"}, {1: "a", 2: None}]
    made = bench(lambda keys: answers.pop(0), complete=True)
    assert made.caller.fetch([1, 2]).found == {1: "a", 2: None}
    assert made.asked == [[1, 2]] * 2
    assert made.reasons[0] is not None
    assert "it answered for 1 of 2 keys" in made.reasons[0]


# ── the breaker ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_service_that_is_down_is_left_alone_and_then_asked_with_one_call(bench: MakeBench) -> None:
    """Six batches, three rounds of which fail: then one call every pause, until one succeeds, and then all."""
    down = 3 * 6 + 2
    made = bench(failing(*[requests.ConnectionError("refused")] * down), batch=1, trip_after=3, pause="1h")
    assert made.caller.fetch(range(6)).found == {key: 2 * key for key in range(6)}
    assert len(made.asked) == down + 6
    assert [wait > 3000 for wait in made.stopping.waits].count(True) == 3, "a pause before each call of a probe"
    assert made.caller.numbers.breaker == "closed"
    assert made.caller.numbers.calls == {"answered": 6, "busy": down, "failed": 0}


def test_a_service_that_answers_in_part_is_not_down(bench: MakeBench) -> None:
    calls = 0

    def service(keys: list[Any]) -> dict[Any, Any]:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise requests.Timeout("late")
        return double(keys)

    made = bench(service, batch=1, trip_after=2, pause="1h")
    assert len(made.caller.fetch(range(64)).found) == 64
    assert all(wait <= 30 for wait in made.stopping.waits)
    assert made.caller.numbers.breaker == "closed"


def test_a_lasting_failure_does_not_open_the_breaker(bench: MakeBench) -> None:
    made = bench(failing(*[ValueError("bad")] * 20), trip_after=2)
    for key in range(20):
        assert key in made.caller.fetch([key]).failed
    assert made.caller.numbers.breaker == "closed"


# ── what is not required ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_required_is_left_at_its_deadline(bench: MakeBench) -> None:
    made = bench(
        failing(*[requests.Timeout("late")] * 1000), batch=2, required=False, deadline="2s", trip_after=4, pause="1h"
    )
    began = made.clock.now_s
    assert made.caller.fetch([1, 2, 3]) == ({}, {}, frozenset([1, 2, 3]))
    assert made.clock.now_s - began <= 2
    while made.caller.numbers.breaker == "closed":
        made.caller.fetch([1])
    asked, waits = len(made.asked), len(made.stopping.waits)
    assert made.caller.fetch([4, 5]).left == {4, 5}
    assert (len(made.asked), len(made.stopping.waits)) == (asked, waits), "neither asked nor waited for"
    assert made.reasons == [], "nobody waits"


def test_what_was_answered_before_the_deadline_counts(bench: MakeBench) -> None:
    late = {1, 2}

    def service(keys: list[Any]) -> dict[Any, Any]:
        if late.intersection(keys):
            raise requests.Timeout("late")
        return double(keys)

    made = bench(service, batch=1, required=False, deadline="1m", trip_after=1000)
    assert made.caller.fetch([1, 2, 3]) == ({3: 6}, {}, frozenset([1, 2]))
    assert made.caller.numbers.left == 2
    late.clear()
    assert made.caller.fetch([1, 2, 3]).left == frozenset(), "what was left is no answer that is remembered"


def test_the_service_is_asked_whether_it_is_back_for_what_was_left(bench: MakeBench) -> None:
    made = bench(failing(*[requests.Timeout("late")] * 3), required=False, deadline="1m", trip_after=1, pause="1h")
    assert made.caller.fetch([1, 2]).left == {1, 2}
    assert not made.caller.answers_again()
    assert not made.caller.answers_again()
    assert made.caller.answers_again()
    assert made.asked == [[1, 2]] * 4
    assert made.caller.fetch([1]).found == {1: 2}, "the breaker is closed"


def test_who_insists_waits_for_what_is_not_required() -> None:
    lookup = Pipeline("movies").lookup(required=False)(failing(*[requests.Timeout("late")] * 20))
    stopping = Stopping()
    caller = LookupCaller(lookup, stopping, stopping.clock, insist=True)
    assert caller.fetch([1]).found == {1: 2}
    caller.close()


# ── coroutines ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_coroutines_run_in_one_loop_under_the_same_bound(bench: MakeBench) -> None:
    loops: set[int] = set()
    running, most = 0, 0

    async def service(keys: list[Any]) -> dict[Any, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0)
        running -= 1
        return double(keys)

    made = bench(service, batch=1, concurrency=2)
    other = bench(service)
    assert made.caller.fetch(range(8)).found == {key: 2 * key for key in range(8)}
    assert other.caller.fetch([1]).found == {1: 2}
    assert len(loops) == 1
    assert most <= 2


def test_a_coroutine_that_takes_too_long_is_cancelled(bench: MakeBench) -> None:
    cancelled = threading.Event()

    async def service(keys: list[Any]) -> dict[Any, Any]:
        if cancelled.is_set():
            return double(keys)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError("it waits for ever")

    assert bench(service, timeout=0.05).caller.fetch([1]).found == {1: 2}


# ── failures that last ───────────────────────────────────────────────────────────────────────────────────────────


def test_halving_finds_the_keys_that_fail(bench: MakeBench) -> None:
    poison = {3, 11}

    def service(keys: list[Any]) -> dict[Any, Any]:
        if poison & set(keys):
            raise ValueError(f"poison in {keys}")
        return double(keys)

    made = bench(service)
    found, failed, _ = made.caller.fetch(range(16))
    assert found == {key: 2 * key for key in range(16) if key not in poison}
    assert {key: str(error) for key, error in failed.items()} == {3: "poison in [3]", 11: "poison in [11]"}
    assert len(made.asked) == 15  # 1 + 2 + 4 + 4 + 4: both halves of what fails, level by level
    assert made.stopping.waits == []
    assert made.reasons == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad"),
        response_error(400),
        response_error(404),
        requests.exceptions.InvalidURL("no host"),
        requests.JSONDecodeError("no JSON", "", 0),
    ],
    ids=repr,
)
def test_a_failure_that_will_not_pass_is_not_retried(bench: MakeBench, error: Exception) -> None:
    made = bench(failing(error))
    assert made.caller.fetch([1]) == ({}, {1: error}, frozenset())
    assert made.asked == [[1]]


def test_what_is_no_mapping_fails_its_keys(bench: MakeBench) -> None:
    made = bench(list[Any])
    failed = made.caller.fetch([1]).failed
    assert isinstance(failed[1], ProcessorError)
    assert "counted returned a list, not a mapping by key" in str(failed[1])


def test_an_exit_of_the_function_is_not_swallowed(bench: MakeBench) -> None:
    def service(keys: list[Any]) -> dict[Any, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(service).caller.fetch([1])


# ── what is transient ────────────────────────────────────────────────────────────────────────────────────────────


def test_is_transient() -> None:
    assert is_transient(response_error(425))
    assert not is_transient(response_error(501))
    assert not is_transient(requests.HTTPError("without a response"))
    assert not is_transient(requests.exceptions.InvalidSchema("ftp"))
    assert not is_transient(OSError("no such file"))


def test_retry_after() -> None:
    assert retry_after_of(response_error(503, Retry_After="5")) == 5.0
    date = response_error(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
    assert retry_after_of(date, dt.datetime(2015, 10, 21, 7, 27, 30, tzinfo=dt.UTC)) == 30.0
    assert retry_after_of(date, dt.datetime(2015, 10, 21, 7, 29, tzinfo=dt.UTC)) == 0.0
    assert retry_after_of(date, dt.datetime(2015, 10, 20, tzinfo=dt.UTC)) == 600.0, "at most so long"
    assert retry_after_of(response_error(503, Retry_After="soon")) is None
    assert retry_after_of(response_error(503)) is None
    assert retry_after_of(ConnectionError()) is None
