"""What failed becomes dead letters, unless so much fails that the pipeline had better stop."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal, TypeVar

import tenacity

from delta_sync.applying import Applied
from delta_sync.changes import APPLIED, Change
from delta_sync.decoding import TableCodec, Undecodable
from delta_sync.delta_event import DeltaEvent, encode_event
from delta_sync.errors import DeltaError, StateBusy, TooManyDeadLetters
from delta_sync.events import Unhandled
from delta_sync.logs import logger
from delta_sync.processing import Failure, failure
from delta_sync.progress import Progress
from delta_sync.secrets import redact
from delta_sync.shaping import without_values
from delta_sync.spec import PipelineSpec
from delta_sync.state import DeadLetter, StateStore, identity_of
from delta_sync.tables import key_text

log = logger(__name__)

WINDOW_S = 60.0  # of errors.max_dead_letters_per_minute
Origin = Literal["log", "load"]

T = TypeVar("T")


class DeadLetterReporter:
    """Keeps failures as dead letters. `documents` are the roots of documents from several tables.

    A call to the state store is repeated until it answers, or `giving_up` is set.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        documents: Collection[str],
        state: StateStore,
        progress: Progress,
        giving_up: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._documents = documents
        self._state = state
        self._progress = progress
        self._giving_up = giving_up
        self._clock = clock
        self._recent: deque[tuple[float, str]] | None = None  # of the last minute, of earlier runs, too

    def report(self, failures: Sequence[Failure], origin: Origin) -> None:
        """Store dead letters. Raises TooManyDeadLetters and stores none; StateBusy when Delta gives up before."""
        letters = [letter_of(self._spec.name, item, origin, self._documents) for item in failures]
        if self._recent is None:
            self._recent = deque(self._keep_trying(self._of_earlier_runs))
        recent, now = self._recent, self._clock()
        while recent and now - recent[0][0] > WINDOW_S:
            recent.popleft()
        known = {identity for _, identity in recent}  # those that are delivered again are not failing faster
        recent.extend((now, identity) for identity in map(identity_of, letters) if identity not in known)
        most = self._spec.errors.max_dead_letters_per_minute
        if len(recent) > most:
            first = failures[0]
            raise TooManyDeadLetters(
                f"{len(recent)} changes failed within a minute, and errors.max_dead_letters_per_minute is {most}; the"
                f" last one is {first.change.table} {key_text(first.change.key)}, at stage {first.stage}:"
                f" {redact(first.error)}. Correct the cause and run the pipeline again: nothing was dropped."
            )
        self._keep_trying(lambda: self._state.add_dead_letters(self._spec.name, letters))
        self._progress.dead_letters += len(letters)
        for item in failures[:3]:
            log.warning(
                "dead_letter",
                table=item.change.table,
                key=key_text(item.change.key),
                stage=item.stage,
                sink=item.sink,
                error=redact(item.error),
                of=len(failures),
            )

    def _of_earlier_runs(self) -> list[tuple[float, str]]:
        """Return the dead letters of the last minute, with when they failed by this run's clock.

        Else one that is started again and again, as a service manager does, would be allowed as many at each start.
        """
        now, today = self._clock(), dt.datetime.now(dt.UTC)
        since = today - dt.timedelta(seconds=WINDOW_S)
        found = self._state.dead_letters_since(self._spec.name, since)
        return [(now - max(0.0, (today - at).total_seconds()), identity) for at, identity in found]

    def _keep_trying(self, call: Callable[[], T]) -> T:
        """Repeat a call to the state store until it answers, or Delta gives up."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StateBusy),
            wait=tenacity.wait_random_exponential(0.1, 5.0),
            stop=tenacity.stop_when_event_set(self._giving_up),
            sleep=tenacity.sleep_using_event(self._giving_up),
            reraise=True,
        )
        return retrying(call)


def rejections(results: Iterable[Future[list[Applied]]]) -> list[Failure]:
    """Return a failure for each write that a sink rejected. Raises what a sink raised."""
    return [
        Failure(change, "apply", outcome.reason, "", sink)
        for result in results
        for sink, part, outcomes in result.result()
        if outcomes.count(APPLIED) < len(outcomes)
        for change, outcome in zip(part.changes, outcomes, strict=True)
        if outcome.kind == "rejected"
    ]


def not_handled(results: Iterable[Future[list[Unhandled]]]) -> list[Failure]:
    """Return a failure for each event that a handler did not take. Raises HandlersBusy when Delta stopped before."""
    return [
        Failure(
            Change(event.table, event.key, event.version, event.after), "handle", error, trace, handler.place, event
        )
        for result in results
        for handler, event, error, trace in result.result()
    ]


def undecodable(item: Undecodable, codecs: Mapping[str, TableCodec]) -> Failure:
    """A change of which not even the key can be read; what there is of the event stands in the error.

    Not of a table with masks: nobody knows what is in which column of an event that cannot be read.
    """
    table = codecs[item.table].table if item.table in codecs else None
    event = without_values(table, item.event)
    reason = str(item.error) if event is item.event else "The event cannot be read; columns of its table are masked."
    error = DeltaError(f"{reason} The event was {event!r:.2000}")
    return failure(Change(item.table, item.key, item.version, None), "decode", error)


def letter_of(pipeline: str, item: Failure, origin: Origin, documents: Collection[str]) -> DeadLetter:
    """Return a failure as a dead letter, with the event by which it is replayed. Pure but for the time."""
    now = dt.datetime.now(dt.UTC)
    if item.event is None:
        event = DeltaEvent.of(pipeline, item.change, now, origin)
        if item.change.table in documents:
            event = event._replace(row=None)  # it is read again when it is replayed
    else:
        event = item.event.delta_event(pipeline)
    try:
        encoded = encode_event(event)
    except TypeError:
        encoded = encode_event(event._replace(row=None, before=None))
    return DeadLetter(
        table=item.change.table,
        key_text=key_text(item.change.key) if item.change.key else "?",
        version=item.change.version,
        sink=item.sink,
        stage=item.stage,
        error=item.error,
        trace=item.trace,
        event=encoded,
        created_at=now,
    )
