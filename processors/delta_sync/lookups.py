"""Making look-ups: distinct keys of a batch in few calls, answers cached, calls repeated until the service answers.

A round is all the calls for the keys of a batch that have no answer yet, some at once. What fails in transit is asked
for in the next round. A breaker counts rounds in which nothing succeeded; once it is open the service is left alone,
and then asked with a single call until that succeeds: a service that is overloaded is not kept so.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import email.utils
import functools
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, cast

import cachetools
import pybreaker
import tenacity

from delta_sync.errors import LookupBusy, ProcessorError
from delta_sync.measures import LookupNumbers
from delta_sync.pipeline import Lookup

PERSON_WAITS_S = 30.0  # then the silence of the service is what there is to say
RETRY_FIRST_S, RETRY_MOST_S = 0.1, 30.0  # a blip costs little; a service that is down is asked twice a minute
RETRY_AFTER_MOST_S = 600.0  # a date far ahead is a mistake more often than a wish
RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
NEVER_S = 365 * 86400.0  # the breaker's own time-out, which goes by the wall clock: `_may_call` has ours
_MISSING = object()
# What other clients of HTTP raise when nothing was answered, by the names of their classes: none of them is imported.
_TRANSPORT_ERRORS = frozenset({"TransportError", "ClientConnectionError", "ClientPayloadError"})

Batch = list[Any]


class Answers(NamedTuple):
    """What the keys' answers are, and for which keys the look-up fails whenever it is asked.

    `left` are keys of a look-up that is not required for which the service has not answered in time.
    """

    found: Mapping[Any, Any]
    failed: Mapping[Any, Exception]
    left: frozenset[Any] = frozenset()


class _Partly(LookupBusy):
    """Some calls of a round succeeded, so the service is not down."""


class _Open(LookupBusy):
    """The breaker is open: nobody was asked."""


class LookupCaller:
    """Calls one look-up for the worker. `stopping` ends retries; `clock` counts seconds for cache, breaker, deadline.

    `waiting` is called with the reason when the service does not answer and, with None, when it does again. Calls are
    made in `pool`, which `close` shuts down; without it, in threads of its own: that is the bound of calls at once, for
    all tables. `insist`: a look-up that is not required is asked as if it were. `fetch` is called by one thread at a
    time.
    """

    def __init__(
        self,
        lookup: Lookup,
        stopping: threading.Event,
        clock: Callable[[], float],
        waiting: Callable[[str | None], None] = lambda _: None,
        pool: Executor | None = None,
        *,
        insist: bool = False,
    ) -> None:
        self._lookup = lookup
        self.required = lookup.required or insist
        self._stopping = stopping
        self._waiting = waiting
        self._cache: cachetools.TLRUCache[Any, Any] = cachetools.TLRUCache(
            lookup.cache_size,
            lambda _key, value, now: now + (lookup.missing_ttl_s if value is None else lookup.ttl_s),
            timer=clock,
        )
        self.inline = pool is not None  # whoever has a pool of his own decides about threads
        self._pool = pool or ThreadPoolExecutor(lookup.concurrency, thread_name_prefix=f"lookup-{lookup.name}")
        self._caching = threading.Lock()
        self._forgets = 0  # rises whenever something is dropped from the cache before its time
        self._trusted: Callable[[], bool] = lambda: True
        self.numbers = LookupNumbers()
        self.spent_s = 0.0  # in `fetch`
        self._clock = clock
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=lookup.trip_after,
            reset_timeout=NEVER_S,
            exclude=[lambda error: not isinstance(error, LookupBusy) or isinstance(error, _Partly)],
            listeners=[_Watcher(self)],
            throw_new_error_on_trip=False,
        )
        self._opened_s = 0.0
        self._last_reason = ""
        self._sample: deque[Any] = deque(maxlen=lookup.batch)  # of keys that were left, to ask for

    def close(self) -> None:
        """Let go of the threads; a call that hangs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def heed(self, trusted: Callable[[], bool]) -> None:
        """Use cached answers only when `trusted` says so, which is asked at the beginning of each `fetch`."""
        self._trusted = trusted

    def forget(self, keys: Iterable[Hashable] | None) -> None:
        """Drop the cached answers for these keys, or all (None). Called by another thread than `fetch` is.

        What is being asked for meanwhile is not cached either: it may have been answered before.
        """
        with self._caching:
            self._forgets += 1
            if keys is None:
                self._cache.clear()
            else:
                for key in keys:
                    self._cache.pop(key, None)

    def fetch(self, keys: Iterable[Hashable]) -> Answers:
        """Return the answers for distinct keys; None where the look-up has none.

        A failure that may pass is retried until it does or until Delta stops (then LookupBusy is raised), and of a
        look-up that is not required until its deadline. One that will not pass is narrowed down to the keys that cause
        it by halving, so the others get their answers.
        """
        began = self._clock()
        answers = self._fetch(keys, began)
        self.spent_s += self._clock() - began
        return answers

    def _fetch(self, keys: Iterable[Hashable], began: float) -> Answers:
        found: dict[Any, Any] = {}
        failed: dict[Any, Exception] = {}
        missing: list[Any] = []
        left: list[Any] = []
        trusted = self._trusted()
        with self._caching:
            forgets = self._forgets
            for key in dict.fromkeys(keys):
                cached = self._cache.get(key, _MISSING) if trusted else _MISSING
                if cached is _MISSING:
                    missing.append(key)
                else:
                    found[key] = cached
        self.numbers.hits += len(found)
        self.numbers.asked += len(missing)
        batches = [missing[i : i + self._lookup.batch] for i in range(0, len(missing), self._lookup.batch)]
        while batches:
            narrower: list[Batch] = []
            done, unanswered = self._call_all(batches, began)
            for batch in unanswered:
                left += batch
            for batch, result in done:
                if not isinstance(result, Exception):
                    answers = {key: result.get(key) for key in batch}
                    found.update(answers)
                    with self._caching:
                        if self._forgets == forgets:
                            self._cache.update(answers)
                elif len(batch) == 1:
                    failed[batch[0]] = result
                else:
                    narrower += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            batches = narrower
        if left:
            self.numbers.left += len(left)
            self._sample.extend(left)
        return Answers(found, failed, frozenset(left))

    def _call_all(
        self, batches: list[Batch], began: float
    ) -> tuple[list[tuple[Batch, Mapping[Any, Any] | Exception]], list[Batch]]:
        """Call for all batches, `concurrency` at once, and repeat those that failed in transit.

        Return results, and the batches that had none before the deadline, if there is one.
        """
        done: list[tuple[Batch, Mapping[Any, Any] | Exception]] = []
        pending = batches
        told: str | None = None
        deadline = None if self.required else began + (self._lookup.deadline_s or 0.0)

        def ask_round() -> None:
            nonlocal pending
            probing = self._breaker.current_state == pybreaker.STATE_HALF_OPEN
            asked, pending = (pending[:1], pending[1:]) if probing else (pending, [])
            calls = [(batch, self._pool.submit(self._call, batch)) for batch in asked]
            patience_s = self._lookup.timeout_s * -(-len(calls) // self._lookup.concurrency)
            if deadline is not None:
                patience_s = max(0.0, min(patience_s, deadline - self._clock()))
            wait([future for _, future in calls], timeout=patience_s)
            busy: list[LookupBusy] = []
            for batch, future in calls:
                try:
                    done.append((batch, self._result(future, patience_s)))
                except LookupBusy as error:
                    pending.append(batch)
                    busy.append(error)
            if busy:
                told = [error.retry_after_s for error in busy if error.retry_after_s is not None]
                kind = _Partly if len(busy) < len(calls) else LookupBusy
                raise kind(str(busy[-1]), max(told, default=None)) from busy[-1]

        def attempt() -> None:
            while pending:
                self._may_call()
                self._breaker.call(ask_round)

        def is_over(state: tenacity.RetryCallState) -> bool:
            if deadline is None:
                return self._stopping.is_set()
            opened = state.outcome is not None and isinstance(state.outcome.exception(), _Open)
            return opened or self._stopping.is_set() or self._clock() + state.upcoming_sleep >= deadline

        def before_sleep(state: tenacity.RetryCallState) -> None:
            nonlocal told
            error = state.outcome.exception() if state.outcome is not None else None
            # An open breaker says no more than the call that opened it, and another number of seconds each time.
            if self.required and not (told and isinstance(error, _Open)) and str(error) != told:
                told = str(error)
                self._waiting(told)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(LookupBusy),
            wait=self._wait_s,
            stop=is_over,
            sleep=tenacity.sleep_using_event(self._stopping),
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            retrying(attempt)
        except LookupBusy:
            if self.required:
                raise
        if self.required and retrying.statistics.get("attempt_number", 1) > 1:
            self._waiting(None)
        return done, pending

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """Return how long to wait for the next round: as told, for an open breaker's pause, or ever longer."""
        error = state.outcome.exception() if state.outcome is not None else None
        told = error.retry_after_s if isinstance(error, LookupBusy) else None
        if told is not None:
            return told
        return self._rest_s() if self._breaker.current_state == pybreaker.STATE_OPEN else _backoff(state)

    def _rest_s(self) -> float:
        """Return for how long an open breaker lets nothing through."""
        return max(0.0, self._opened_s + self._lookup.pause_s - self._clock())

    def _may_call(self) -> None:
        """Let one call through an open breaker after its pause. Raises LookupBusy before."""
        if self._breaker.current_state != pybreaker.STATE_OPEN:
            return
        rest_s = self._rest_s()
        if rest_s > 0:
            raise _Open(
                f"Look-up {self._lookup.name} is not asked for {rest_s:.0f} s, because its service does not answer:"
                f" {self._last_reason}",
                rest_s,
            )
        self._breaker.half_open()

    def answers_again(self) -> bool:
        """Ask for some of the keys that were left, and return whether there was an answer. Called by another thread."""
        keys = list(self._sample)
        if not keys:
            return self._breaker.current_state != pybreaker.STATE_OPEN
        future = self._pool.submit(self._call, keys)
        wait([future], timeout=self._lookup.timeout_s)
        try:
            self._result(future, self._lookup.timeout_s)
        except LookupBusy:
            return False
        self._sample.clear()
        self._breaker.close()
        return True

    def _call(self, keys: Batch) -> Mapping[Any, Any]:
        began = self._clock()
        self.numbers.batch_keys.add(len(keys))
        outcome = "failed"
        try:
            answers = self._lookup.function(keys)
            if inspect.isawaitable(answers):
                answers = _await(cast("Coroutine[Any, Any, Mapping[Any, Any]]", answers), self._lookup.timeout_s)
            if not isinstance(answers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] -- it is the user's function
                raise ProcessorError(
                    f"Look-up {self._lookup.name} returned a {type(answers).__name__}, not a mapping by key."
                )
            lacking = sum(key not in answers for key in keys) if self._lookup.complete else 0
            if lacking:
                raise LookupBusy(f"it answered for {len(keys) - lacking} of {len(keys)} keys")
            outcome = "answered"
        except Exception as error:
            outcome = "busy" if is_transient(error) else "failed"
            raise
        finally:
            self.numbers.called(outcome)
            self.numbers.seconds.add(max(0.0, self._clock() - began))
        return answers

    def _result(self, future: Future[Mapping[Any, Any]], waited_s: float) -> Mapping[Any, Any] | Exception:
        """Return a finished call's answers or lasting failure. Raises LookupBusy for one that may pass."""
        if not future.done():
            future.cancel()
            raise LookupBusy(
                f"Look-up {self._lookup.name} did not answer within {min(waited_s, self._lookup.timeout_s):g} s."
            )
        error = future.exception()
        if error is None:
            return future.result()
        if not isinstance(error, Exception):
            raise error
        if is_transient(error):
            raise LookupBusy(f"Look-up {self._lookup.name}: {error}", retry_after_of(error)) from error
        return error

    def breaker_is(self, state: str) -> None:
        """Note the breaker's new state."""
        self.numbers.breaker = state
        if state == pybreaker.STATE_OPEN:
            self._opened_s = self._clock()

    def failed_with(self, reason: str) -> None:
        """Note why the last round failed."""
        self._last_reason = reason


class _Watcher(pybreaker.CircuitBreakerListener):
    """Tells a caller what its breaker does."""

    def __init__(self, caller: LookupCaller) -> None:
        self._caller = caller

    def failure(self, cb: pybreaker.CircuitBreaker, exc: BaseException) -> None:
        """A round failed."""
        del cb
        self._caller.failed_with(str(exc))

    def state_change(self, cb: pybreaker.CircuitBreaker, old_state: Any, new_state: Any) -> None:
        """The breaker opened or closed."""
        del cb, old_state
        self._caller.breaker_is(new_state.name)


# ── coroutines ───────────────────────────────────────────────────────────────────────────────────────────────────

_starting_loop = threading.Lock()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the process's event loop for look-ups: one, because clients that are shared belong to one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lookups", daemon=True).start()
    return loop


def _await(coroutine: Coroutine[Any, Any, Mapping[Any, Any]], timeout_s: float) -> Mapping[Any, Any]:
    """Return a coroutine's result; it is cancelled when it takes too long. Raises TimeoutError, and what it raises."""
    with _starting_loop:
        loop = _event_loop()
    return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), loop).result()


# ── what may pass ────────────────────────────────────────────────────────────────────────────────────────────────

_backoff = tenacity.wait_random_exponential(RETRY_FIRST_S, RETRY_MOST_S)


@contextlib.contextmanager
def asked_by_a_person(lookups: Mapping[str, Lookup]) -> Generator[dict[str, LookupCaller]]:
    """Yield callers that insist on an answer, for PERSON_WAITS_S in all; then they raise LookupBusy."""
    too_long = threading.Event()
    timer = threading.Timer(PERSON_WAITS_S, too_long.set)
    timer.daemon = True
    timer.start()
    callers = {name: LookupCaller(lookup, too_long, time.monotonic, insist=True) for name, lookup in lookups.items()}
    try:
        yield callers
    finally:
        timer.cancel()
        for caller in callers.values():
            caller.close()


def is_transient(error: BaseException) -> bool:
    """Tell whether a look-up's failure may pass by itself: transport failures, time-outs, and statuses that say so."""
    if isinstance(error, LookupBusy):
        return True
    import requests  # only here: many pipelines ask nobody over HTTP, and their starts would wait for it

    status = _status_of(error)
    if status is not None or isinstance(error, requests.HTTPError):
        return status in RETRYABLE_STATUS
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema | requests.JSONDecodeError):
        return False
    if isinstance(error, requests.RequestException | ConnectionError | TimeoutError):
        return True
    return any(cls.__name__ in _TRANSPORT_ERRORS for cls in type(error).__mro__)


def _status_of(error: BaseException) -> int | None:
    """Return the status of an answer that requests, httpx or aiohttp have made an exception of."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) if response is None else getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def retry_after_of(error: BaseException, now: dt.datetime | None = None) -> float | None:
    """Return the seconds that the service asked for (`Retry-After`, in seconds or as a date), if it did."""
    if isinstance(error, LookupBusy):
        return error.retry_after_s
    response = getattr(error, "response", None)
    headers: Mapping[str, str] = getattr(response if response is not None else error, "headers", None) or {}
    text = headers.get("Retry-After", "")
    if text.isdigit():
        return min(float(text), RETRY_AFTER_MOST_S)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    rest_s = (at - (now or dt.datetime.now(dt.UTC))).total_seconds()
    return min(max(rest_s, 0.0), RETRY_AFTER_MOST_S)
