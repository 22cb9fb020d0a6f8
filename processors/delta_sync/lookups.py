"""Making look-ups: distinct keys of a batch in few calls, answers cached, calls repeated until the service answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import cachetools
import requests
import tenacity

from delta_sync.errors import LookupBusy, ProcessorError
from delta_sync.pipeline import Lookup

RETRY_FIRST_S, RETRY_MOST_S = 0.1, 30.0  # a blip costs little; a service that is down is asked twice a minute
RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_MISSING = object()


class Answers(NamedTuple):
    """What the keys' answers are, and for which keys the look-up fails whenever it is asked."""

    found: Mapping[Any, Any]
    failed: Mapping[Any, Exception]


class LookupCaller:
    """Calls one look-up for the worker. `stopping` ends retries; `clock` counts seconds for the cache.

    `waiting` is called with the reason when the service does not answer and, with None, when it does again. Calls are
    made in `pool`, which `close` shuts down; without it, in threads of its own.
    """

    def __init__(
        self,
        lookup: Lookup,
        stopping: threading.Event,
        clock: Callable[[], float],
        waiting: Callable[[str | None], None] = lambda _: None,
        pool: Executor | None = None,
    ) -> None:
        self._lookup = lookup
        self._stopping = stopping
        self._waiting = waiting
        self._cache: cachetools.TTLCache[Any, Any] = cachetools.TTLCache(lookup.cache_size, lookup.ttl_s, timer=clock)
        self._pool = pool or ThreadPoolExecutor(lookup.concurrency, thread_name_prefix=f"lookup-{lookup.name}")
        self.calls = 0
        self.hits = 0
        self.misses = 0
        self.spent_s = 0.0  # in `fetch`
        self._clock = clock

    def close(self) -> None:
        """Let go of the threads; a call that hangs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def fetch(self, keys: Iterable[Hashable]) -> Answers:
        """Return the answers for distinct keys; None where the look-up has none.

        A failure that may pass is retried until it does or until Delta stops (then LookupBusy is raised). One that
        will not is narrowed down to the keys that cause it by halving, so the others get their answers.
        """
        began = self._clock()
        answers = self._fetch(keys)
        self.spent_s += self._clock() - began
        return answers

    def _fetch(self, keys: Iterable[Hashable]) -> Answers:
        found: dict[Any, Any] = {}
        failed: dict[Any, Exception] = {}
        missing: list[Any] = []
        for key in dict.fromkeys(keys):
            cached = self._cache.get(key, _MISSING)
            if cached is _MISSING:
                missing.append(key)
            else:
                found[key] = cached
        self.hits += len(found)
        self.misses += len(missing)
        batches = [missing[i : i + self._lookup.batch] for i in range(0, len(missing), self._lookup.batch)]
        while batches:
            narrower: list[list[Any]] = []
            for batch, result in self._call_all(batches):
                if not isinstance(result, Exception):
                    for key in batch:
                        found[key] = self._cache[key] = result.get(key)
                elif len(batch) == 1:
                    failed[batch[0]] = result
                else:
                    narrower += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            batches = narrower
        return Answers(found, failed)

    def _call_all(self, batches: list[list[Any]]) -> list[tuple[list[Any], Mapping[Any, Any] | Exception]]:
        """Call for all batches, `concurrency` at once, and repeat those that failed in transit."""
        done: list[tuple[list[Any], Mapping[Any, Any] | Exception]] = []
        pending = batches

        def attempt() -> None:
            nonlocal pending
            calls = [(batch, self._pool.submit(self._call, batch)) for batch in pending]
            rounds = -(-len(calls) // self._lookup.concurrency)
            wait([future for _, future in calls], timeout=self._lookup.timeout_s * rounds)
            pending = list[list[Any]]()
            busy: LookupBusy | None = None
            for batch, future in calls:
                try:
                    done.append((batch, self._result(future)))
                except LookupBusy as error:
                    pending.append(batch)
                    busy = error
            if busy is not None:
                raise busy

        def before_sleep(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1 and state.outcome is not None:
                self._waiting(str(state.outcome.exception()))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(LookupBusy),
            wait=_wait_as_told,
            stop=tenacity.stop_when_event_set(self._stopping),
            sleep=tenacity.sleep_using_event(self._stopping),
            before_sleep=before_sleep,
            reraise=True,
        )
        retrying(attempt)
        if retrying.statistics.get("attempt_number", 1) > 1:
            self._waiting(None)
        return done

    def _call(self, keys: list[Any]) -> Mapping[Any, Any]:
        self.calls += 1
        answers = self._lookup.function(keys)
        if not isinstance(answers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] -- it is the user's function
            raise ProcessorError(
                f"Look-up {self._lookup.name} returned a {type(answers).__name__}, not a mapping by key."
            )
        return answers

    def _result(self, future: Future[Mapping[Any, Any]]) -> Mapping[Any, Any] | Exception:
        """Return a finished call's answers or lasting failure. Raises LookupBusy for one that may pass."""
        if not future.done():
            future.cancel()
            raise LookupBusy(f"Look-up {self._lookup.name} did not answer within {self._lookup.timeout_s:g} s.")
        error = future.exception()
        if error is None:
            return future.result()
        if not isinstance(error, Exception):
            raise error
        if is_transient(error):
            raise LookupBusy(f"Look-up {self._lookup.name}: {error}", retry_after_of(error)) from error
        return error


_backoff = tenacity.wait_random_exponential(RETRY_FIRST_S, RETRY_MOST_S)


def _wait_as_told(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    told = error.retry_after_s if isinstance(error, LookupBusy) else None
    return told if told is not None else _backoff(state)


def is_transient(error: BaseException) -> bool:
    """Tell whether a look-up's failure may pass by itself: transport failures, time-outs, and statuses that say so."""
    if isinstance(error, LookupBusy):
        return True
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in RETRYABLE_STATUS
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema | requests.JSONDecodeError):
        return False
    return isinstance(error, requests.RequestException | ConnectionError | TimeoutError)


def retry_after_of(error: BaseException) -> float | None:
    """Return the seconds that the service asked for (`Retry-After`, the form in seconds), if it did."""
    if isinstance(error, LookupBusy):
        return error.retry_after_s
    response = error.response if isinstance(error, requests.HTTPError) else None
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isdigit() else None
