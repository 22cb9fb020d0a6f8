"""Writing to one sink: in the background, repeated until the sink acknowledges."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import tenacity

from delta_sync.changes import APPLIED, STALE, Change, Outcome, Write
from delta_sync.errors import SinkBusy, Transient
from delta_sync.logs import logger
from delta_sync.measures import STAGE_BOUNDS_S, Histogram
from delta_sync.secrets import redact
from delta_sync.sinks.base import Sink, Target

log = logger(__name__)

RETRY_FIRST_S, RETRY_MOST_S = 0.1, 15.0  # a restart of the sink is noticed soon; one that is down is not hammered
THREADS = 2  # batches of each lane that one sink is given at once: one on the wire while the next is encoded


class Part(NamedTuple):
    """What one sink is to do for one table. `changes[i]` led to `writes[i]`; `truncate` is a version, or None."""

    target: Target
    writes: Sequence[Write]
    changes: Sequence[Change]
    truncate: int | None = None


class Applied(NamedTuple):
    """What one sink made of a part: the outcome of each write."""

    sink: str
    part: Part
    outcomes: list[Outcome]


class SinkNumbers:
    """What one sink has done so far. Written under a lock, read without."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.applied = self.stale = self.rejected = self.retries = 0
        self.busy: str | None = None  # why it does not acknowledge at the moment
        self.seconds = Histogram(STAGE_BOUNDS_S)  # until it acknowledged a batch's part, with repetitions


class SinkWriter:
    """Hands batches to one sink. `stopping` ends retries: then a batch raises SinkBusy and stays unconfirmed."""

    def __init__(
        self, sink: Sink[Any, Any], stopping: threading.Event, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sink = sink
        self._clock = clock
        self.numbers = SinkNumbers()
        self._stopping = stopping
        # Dumps have threads of their own: behind two of their parts a change would wait for the longer part of its way.
        self._log_pool = ThreadPoolExecutor(THREADS, thread_name_prefix=f"sink-{sink.name}")
        self._dump_pool = ThreadPoolExecutor(THREADS, thread_name_prefix=f"sink-{sink.name}-dump")
        backoff = tenacity.wait_random_exponential(RETRY_FIRST_S, RETRY_MOST_S)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            told = error.retry_after_s if isinstance(error, Transient) else None
            return told if told is not None else backoff(state)

        self._wait = wait

    def submit(self, parts: Sequence[Part], *, of_dump: bool = False) -> Future[list[Applied]]:
        """Apply the parts in the background. The future has the outcomes, or SinkBusy, SinkRefused, or a defect."""
        return (self._dump_pool if of_dump else self._log_pool).submit(self._apply, parts)

    def prepare(self, targets: Sequence[Target]) -> None:
        """Create what the targets need, for as long as it takes. Raises SinkBusy when Delta stops before."""
        for target in targets:
            self._until_done(lambda target=target: self.sink.prepare(target))  # type: ignore[misc]  # mypy: lambda with a default

    def sweep(self, targets: Sequence[Target]) -> None:
        """Finish what a killed process left half done, for as long as it takes. Raises SinkBusy as `prepare` does."""
        for target in targets:
            self._until_done(lambda target=target: self.sink.sweep(target))  # type: ignore[misc]  # a default binds it now

    def close(self) -> None:
        """Wait for what is under way, then close the sink."""
        for pool in (self._log_pool, self._dump_pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self.sink.close()

    def _apply(self, parts: Sequence[Part]) -> list[Applied]:
        began = self._clock()
        applied = [self._apply_part(part) for part in parts]
        self.numbers.seconds.add(self._clock() - began)
        return applied

    def _apply_part(self, part: Part) -> Applied:
        version = part.truncate
        if version is not None:
            removed = self._until_done(lambda: self.sink.truncate(part.target, version))
            log.info("truncated", sink=self.sink.name, place=part.target.place, documents=removed)
        if not part.writes:
            return Applied(self.sink.name, part, [])
        outcomes = self._until_done(lambda: self.sink.apply(part.target, part.writes))
        assert len(outcomes) == len(part.writes), f"sink {self.sink.name} returned {len(outcomes)} outcomes"
        numbers = self.numbers
        applied, stale = outcomes.count(APPLIED), outcomes.count(STALE)
        with numbers.lock:
            numbers.applied += applied
            numbers.stale += stale
            numbers.rejected += len(outcomes) - applied - stale
        return Applied(self.sink.name, part, outcomes)

    def _until_done(self, call: Callable[[], Any]) -> Any:
        """Repeat a call until it no longer raises SinkBusy. Says so once, then counts."""
        numbers = self.numbers

        def before_sleep(state: tenacity.RetryCallState) -> None:
            reason = redact(str(state.outcome.exception())) if state.outcome is not None else ""
            with numbers.lock:
                first = numbers.busy is None
                numbers.busy = reason
                numbers.retries += 1
            if first:
                log.warning("sink_busy", sink=self.sink.name, reason=reason)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(SinkBusy),
            wait=self._wait,
            stop=tenacity.stop_when_event_set(self._stopping),
            sleep=tenacity.sleep_using_event(self._stopping),
            before_sleep=before_sleep,
            reraise=True,
        )
        result = retrying(call)
        if numbers.busy is not None:
            with numbers.lock:
                numbers.busy = None
            log.info("sink_recovered", sink=self.sink.name, retries=numbers.retries)
        return result
