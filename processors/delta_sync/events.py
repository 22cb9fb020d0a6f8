"""Events that start work: each change of a row, in the order of the log, for functions that are called at least once.

`docs/design/events.md` says what is promised and why.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import tenacity

from delta_sync.calling import Caller
from delta_sync.changes import Key
from delta_sync.delta_event import DeltaEvent
from delta_sync.errors import DeltaError, HandlersBusy, HandlerTimeout, PipelineStopped, Transient
from delta_sync.logs import logger
from delta_sync.secrets import redact
from delta_sync.tables import key_text
from delta_sync.values import Row

log = logger(__name__)

RETRY_FIRST_S, RETRY_MOST_S = 0.1, 15.0  # as for sinks: a restart is noticed soon, one that is down is not hammered

Op = Literal["insert", "update", "delete"]


class RowEvent(NamedTuple):
    """One change of one row.

    `after` is None for a delete. `before` is None where the source does not have it (PostgreSQL: without `REPLICA
    IDENTITY FULL`). Both may lack the columns in `missing`, whose values the log does not have. `at` (aware) is when
    the transaction committed.
    """

    table: str
    key: Key
    version: int
    op: Op
    before: Row | None
    after: Row | None
    at: dt.datetime
    missing: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The idempotency key: the same whenever this change is delivered, and no other change has it."""
        return f"{self.table}/{self.version}/{key_text(self.key)}"

    def delta_event(self, pipeline: str) -> DeltaEvent:
        """Return the change in the common form of dead letters and topics."""
        op: Literal["upsert", "delete"] = "delete" if self.op == "delete" else "upsert"
        return DeltaEvent(pipeline, self.table, self.key, op, self.version, self.after, self.at, "log", self.before)

    @classmethod
    def of(cls, event: DeltaEvent) -> RowEvent:
        """Return the change that was kept in the common form. Whether it was an insert shows only by `before`."""
        op: Op = "delete" if event.op == "delete" else "insert" if event.before is None else "update"
        return cls(event.table, event.key, event.version, op, event.before, event.row, event.at)


HandlerFunction = Callable[[RowEvent], object]
BatchFunction = Callable[[Sequence[RowEvent]], object]
Condition = Callable[[RowEvent], bool]


class Handler(NamedTuple):
    """A declared handler: what is called for the changes of a table, and how. `batch` 1: with one event, not a list."""

    table: str
    name: str
    function: Callable[..., object]
    when: Condition | None
    concurrency: int
    attempts: int
    batch: int
    timeout_s: float | None = None  # None: `processor.timeout`

    @property
    def place(self) -> str:
        """What its dead letters name in place of a sink."""
        return f"on:{self.name}"

    @property
    def ends_by_itself(self) -> bool:
        """Whether the function has time-outs of its own, as Delta's webhooks and topics do."""
        return bool(getattr(self.function, "ends_by_itself", False))

    def call(self, events: Sequence[RowEvent]) -> None:
        """Call the function once. Raises whatever it raises."""
        if self.batch > 1:
            self.function(events)
        else:
            (event,) = events
            self.function(event)


class Unhandled(NamedTuple):
    """An event that a handler did not take, and why."""

    handler: Handler
    event: RowEvent
    error: str
    trace: str


class HandlerNumbers:
    """What one handler has done so far. Written under a lock, read without."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.handled = self.failed = self.retries = 0  # handled: those that failed, too
        self.busy: str | None = None  # why it does not take events at the moment


class HandlerRunner:
    """Calls one handler, in lanes: events of a key always in the same one, in the order in which they were given.

    `stopping` ends retries: then a batch raises HandlersBusy and stays unconfirmed. What does not return within
    `timeout_s`, or the handler's own, is a dead letter.
    """

    def __init__(self, handler: Handler, stopping: threading.Event, timeout_s: float) -> None:
        self.handler = handler
        self.numbers = HandlerNumbers()
        self._stopping = stopping
        self._ended = threading.Event()  # nothing may follow what was given up, or a key's order would have a gap
        lanes = range(handler.concurrency)
        self._lanes = [ThreadPoolExecutor(1, thread_name_prefix=f"on-{handler.name}") for _ in lanes]
        self._callers = [
            Caller(handler.name, timeout_s=handler.timeout_s or timeout_s, note=self._note, ending=stopping)
            for _ in lanes
        ]
        self._backoff = tenacity.wait_random_exponential(RETRY_FIRST_S, RETRY_MOST_S)

    def submit(self, events: Sequence[RowEvent]) -> list[Future[list[Unhandled]]]:
        """Handle the events in the background. The futures have those that became dead letters, or HandlersBusy."""
        lanes: dict[int, list[RowEvent]] = {}
        for event in events:
            lanes.setdefault(lane_of(event.key, len(self._lanes)), []).append(event)
        return [self._lanes[lane].submit(self._handle, own, self._callers[lane]) for lane, own in lanes.items()]

    def close(self) -> None:
        """Wait for what is under way."""
        for lane in self._lanes:
            lane.shutdown(wait=True, cancel_futures=True)
        for caller in self._callers:
            caller.close()
        close = getattr(self.handler.function, "close", None)
        if callable(close):
            close()

    def _note(self, said: str | None) -> None:
        with self.numbers.lock:
            self.numbers.busy = said

    def _handle(self, events: Sequence[RowEvent], caller: Caller) -> list[Unhandled]:
        handler, unhandled = self.handler, list[Unhandled]()
        wanted = self._wanted(events, caller, unhandled)
        not_asked = len(unhandled)
        for start in range(0, len(wanted), handler.batch):
            unhandled += self._call(wanted[start : start + handler.batch], caller)
        with self.numbers.lock:
            self.numbers.handled += len(wanted) + not_asked
            self.numbers.failed += len(unhandled)
        return unhandled

    def _wanted(self, events: Sequence[RowEvent], caller: Caller, unhandled: list[Unhandled]) -> list[RowEvent]:
        """Return the events of which `when` is true; add those that it cannot be asked of to `unhandled`."""
        handler, when = self.handler, self.handler.when
        if when is None:
            return list(events)
        wanted: list[RowEvent] = []
        left = deque(events)

        def ask() -> None:
            while left:
                event = left[0]
                try:
                    if when(event):
                        wanted.append(event)
                except Exception as error:  # noqa: BLE001 -- it is the user's function: whatever it raises is this event's
                    unhandled.append(_unhandled(handler, event, error))
                left.popleft()

        def at_hand() -> RowEvent | None:
            with contextlib.suppress(IndexError):  # it may be taken at this moment
                return left[0]
            return None

        while left:
            try:
                caller.call(ask, at_hand)
            except HandlerTimeout as error:
                unhandled.append(_unhandled(handler, left.popleft(), error))
        return wanted

    def _call(self, events: Sequence[RowEvent], caller: Caller) -> list[Unhandled]:
        """Call the function until it takes the events; of a batch that it does not take, with each alone."""
        try:
            self._retrying(events, caller)
        except (HandlersBusy, PipelineStopped):
            raise
        except Exception as error:  # noqa: BLE001 -- it is the user's function: whatever it raises is these events'
            if len(events) == 1:
                return [_unhandled(self.handler, events[0], error)]
            return [one for event in events for one in self._call([event], caller)]
        return []

    def _retrying(self, events: Sequence[RowEvent], caller: Caller) -> None:
        handler, numbers = self.handler, self.numbers

        def call() -> None:
            if handler.ends_by_itself:
                handler.call(events)
            else:
                caller.call(lambda: handler.call(events), lambda: events[0])

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            told = error.retry_after_s if isinstance(error, Transient) else None
            return told if told is not None else self._backoff(state)

        def may_go_on(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome is not None else None
            if error is None or not isinstance(error, Exception):
                return False
            final = isinstance(error, DeltaError) or state.attempt_number >= handler.attempts
            return isinstance(error, Transient) or not final

        def before_sleep(state: tenacity.RetryCallState) -> None:
            reason = redact(str(state.outcome.exception())) if state.outcome is not None else ""
            with numbers.lock:
                first, numbers.busy = numbers.busy is None, reason
                numbers.retries += 1
            if first:
                log.warning("handler_busy", handler=handler.name, reason=reason)

        if self._ended.is_set():
            raise HandlersBusy(f"Delta stops before {handler.name} has had all events.")
        retrying = tenacity.Retrying(
            retry=may_go_on,
            wait=wait,
            stop=tenacity.stop_when_event_set(self._stopping),
            sleep=tenacity.sleep_using_event(self._stopping),
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            retrying(call)
        except Exception as error:
            if self._stopping.is_set() and (isinstance(error, Transient) or handler.attempts > 1):
                self._ended.set()
                raise HandlersBusy(f"Delta stops before {handler.name} has had all events: {error}") from error
            raise
        if numbers.busy is not None:
            with numbers.lock:
                numbers.busy = None
            log.info("handler_recovered", handler=handler.name, retries=numbers.retries)


def lane_of(key: Key, lanes: int) -> int:
    """Return the lane of a key: the same in every process."""
    return zlib.crc32(key_text(key).encode(errors="surrogatepass")) % lanes if lanes > 1 else 0


def _unhandled(handler: Handler, event: RowEvent, error: Exception) -> Unhandled:
    trace = "".join(traceback.format_exception(error))
    return Unhandled(handler, event, f"{type(error).__name__}: {error}", trace)
