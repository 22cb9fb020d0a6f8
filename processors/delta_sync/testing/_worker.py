"""The worker of the test harness: what `worker.py` does with a batch, in the test's own thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple, ParamSpec, TypeVar

from delta_sync.applying import Part
from delta_sync.changes import Change
from delta_sync.decoding import Event, Stretch, decode
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import Lookup, LookupFunction, Pipeline
from delta_sync.processing import Failure, Processed, process
from delta_sync.sinks.memory import MemorySink, MemoryStore, MemoryTargetOptions
from delta_sync.testing._source import SourceTable

LookupAnswers = Mapping[Any, Any] | LookupFunction  # what stands in for a look-up: its answers by key, or a function

EPOCH = 1

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


class _Inline(Executor):
    """Makes each call at once, in the test's own thread: none is left behind, and a debugger stops where it should."""

    def submit(self, fn: Callable[P, ResultT], /, *args: P.args, **kwargs: P.kwargs) -> Future[ResultT]:
        future = Future[ResultT]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 -- the future is for whatever it is
            future.set_exception(error)
        return future


def _stand_in(lookup: Lookup, answers: LookupAnswers) -> Lookup:
    """Return the look-up with other answers. They are copies, as those of a service are."""

    def function(keys: list[Any]) -> Mapping[Any, Any] | Awaitable[Mapping[Any, Any]]:
        found = answers(keys) if callable(answers) else {key: answers[key] for key in keys if key in answers}
        return copy.deepcopy(found) if isinstance(found, Mapping) else found

    replaced = copy.copy(lookup)
    replaced.function = function
    return replaced


class Job(NamedTuple):
    """What is to be applied, by sink, and what failed before."""

    parts: Mapping[str, list[Part]]
    processed: list[Processed]

    @property
    def failures(self) -> list[Failure]:
        """What failed before the sinks."""
        return [failure for processed in self.processed for failure in processed.failures]


Changes = Mapping[str, Sequence[Change]]  # by table
Truncates = Mapping[str, int]  # table → version


class HarnessWorker:
    """A process of Delta with its sinks, without the threads: `worker.py` is what it follows.

    `load` imports the pipeline, `answers` stands in for its look-ups, by name. The sinks outlive a restart.
    """

    def __init__(
        self,
        load: Callable[[], Pipeline],
        sinks: Sequence[str],
        answers: Mapping[str, LookupAnswers],
        tables: Mapping[str, SourceTable],
        clock: Callable[[], float],
    ) -> None:
        self.sinks = {name: MemorySink(name, store=MemoryStore(now=clock)) for name in sinks}
        self._load = load
        self._answers = answers
        self._tables = tables
        self._clock = clock
        self._stopping = threading.Event()
        self._stopping.set()  # nothing is retried: a test does not wait for a service
        self.restart()

    def restart(self) -> None:
        """Be a new process: the pipeline is imported again, and nothing is cached."""
        self._pipeline, pool = self._load(), _Inline()
        self._callers: dict[str, LookupCaller] = {}
        for name, declared in self._pipeline.lookups.items():
            lookup = _stand_in(declared, self._answers[name]) if name in self._answers else declared
            self._callers[name] = LookupCaller(lookup, self._stopping, self._clock, pool=pool)

    def decode(self, events: Sequence[Event]) -> tuple[Changes, Truncates]:
        """Return the newest change of each key, with rows of its own, and the truncates."""
        codecs = {name: table.codec for name, table in self._tables.items() if table.table is not None}
        decoded = decode([Stretch(EPOCH, events)], codecs, self._pipeline.name)
        assert not decoded.lacking
        assert not decoded.undecodable
        return decoded.changes, decoded.truncates

    def process(self, changes: Changes, truncates: Truncates) -> Job:
        """Make the writes of the changes. Raises LookupBusy."""
        job = Job({sink: [] for sink in self.sinks}, [])
        for name in {**changes, **truncates}:
            table, processor = self._tables[name].known, self._pipeline.tables[name]
            processed = process(table, processor, changes.get(name, ()), self._callers)
            job.processed.append(processed)
            for sink in processor.to or self.sinks:
                target = self.sinks[sink].target(table, MemoryTargetOptions())
                job.parts[sink].append(Part(target, processed.writes, processed.changes, truncates.get(name)))
        return job

    def apply(self, sink: str, job: Job) -> list[Failure]:
        """Apply a job's part for one sink; return what it rejects."""
        rejected: list[Failure] = []
        for part in job.parts[sink]:
            if part.truncate is not None:
                self.sinks[sink].truncate(part.target, part.truncate)
            outcomes = self.sinks[sink].apply(part.target, part.writes)
            for change, outcome in zip(part.changes, outcomes, strict=True):
                if outcome.kind == "rejected":
                    rejected.append(Failure(change, "apply", outcome.reason, "", sink))
        return rejected

    def documents(self, sink: str, table: str) -> dict[str, dict[str, Any]]:
        """Return a table's documents in a sink."""
        known = self._tables[table].table
        if known is None:
            return {}
        return self.sinks[sink].documents(self.sinks[sink].target(known, MemoryTargetOptions()))
