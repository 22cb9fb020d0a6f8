"""What a batch's changes become: keys of look-ups noted, look-ups asked, documents made, writes handed to the sinks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from delta_sync.applying import Applied, Part, SinkWriter
from delta_sync.changes import Change
from delta_sync.decoding import TableCodec
from delta_sync.errors import SourceBusy, StateBusy
from delta_sync.generations import meant
from delta_sync.logs import logger
from delta_sync.lookups import LookupCaller
from delta_sync.mending import Left
from delta_sync.pipeline import Pipeline
from delta_sync.processing import Asked, Failure, asked_of, process
from delta_sync.progress import Progress
from delta_sync.secrets import redact
from delta_sync.sinks.base import Target
from delta_sync.used_keys import Uses, kept_of, uses_of
from delta_sync.watchdog import AtHand

log = logger(__name__)

STATE_RETRY_S = 1.0


class TableRuntime(NamedTuple):
    """All that the worker needs for one table, as its columns are now."""

    codec: TableCodec
    targets: Mapping[str, Target]  # by sink


class Submitter:
    """Makes documents of changes and hands them to the sinks. `tables` are the worker's, as they are at each call.

    `remember` keeps, durably, which documents were written without an optional look-up's answer, and `note` which keys
    of look-ups rows are about to use, and which tables were emptied by which version. `answered` is called whenever a
    sink has answered.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        tables: Mapping[str, TableRuntime],
        writers: Mapping[str, SinkWriter],
        lookups: Mapping[str, LookupCaller],
        progress: Progress,
        remember: Callable[[Sequence[Left]], None],
        note: Callable[[Sequence[Uses], Mapping[str, int]], None],
        answered: Callable[[], None],
        stopping: threading.Event,
        at_hand: AtHand | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pipeline = pipeline
        self._tables = tables
        self._writers = writers
        self._lookups = lookups
        self._progress = progress
        self._remember = remember
        self._note = note
        self._answered = answered
        self._stopping = stopping
        self._at_hand = at_hand
        self._clock = clock
        self._kept_tables = frozenset(table for table, _ in kept_of(pipeline))

    def submit(
        self,
        changes: Mapping[str, Sequence[Change]],
        truncates: Mapping[str, int],
        failures: list[Failure],
        *,
        of_dump: bool = False,
        only: frozenset[str] | None = None,
    ) -> list[Future[list[Applied]]]:
        """Process the changes of all tables and hand the writes to the sinks, each its part; to `only` some, if told.

        Failures are added to `failures`. Raises SourceBusy and LookupBusy when Delta stops before.
        """
        parts: dict[str, list[Part]] = {}
        left: list[Left] = []
        began, looked_up_s = self._clock(), 0.0
        enriching: dict[str, list[tuple[Asked, list[str]]]] = {}
        for name in {**changes, **truncates}:
            meant_ones = [sink for sink in self._tables[name].targets if meant(only, sink)]
            enriching[name] = [
                (asked_of(processor, changes.get(name, ()), self._at_hand), sinks)
                for processor, sinks in self._pipeline.made_by(name, meant_ones)
            ]
        noted_s = self._note_first([asked for some in enriching.values() for asked, _ in some], truncates)
        for name, some in enriching.items():
            runtime = self._tables[name]
            before_s = {lookup: caller.spent_s for lookup, caller in self._lookups.items()}
            targets = runtime.targets
            written = 0
            for asked, sinks in some:
                processed = process(
                    runtime.codec.table, asked.processor, changes.get(name, ()), self._lookups, self._at_hand, asked
                )
                whole = len(sinks) == len(runtime.targets)
                failures += processed.failures if whole else _for_each(processed.failures, sinks)
                left += [Left(lookup, name, keys) for lookup, keys in processed.left.items()]
                written = max(written, len(processed.writes))
                for sink in sinks:
                    part = Part(targets[sink], processed.writes, processed.changes, truncates.get(name))
                    if part.writes or part.truncate is not None:
                        parts.setdefault(sink, []).append(part)
            # They are asked at the same time, so the slowest one is what was waited for.
            spent = (caller.spent_s - before_s[lookup] for lookup, caller in self._lookups.items())
            looked_up_s += max(spent, default=0.0)
            self._progress.writes += written
        if changes:
            self._progress.stages["process"].add(max(0.0, self._clock() - began - looked_up_s - noted_s))
            if self._lookups:
                self._progress.stages["lookup"].add(looked_up_s)
        if left:
            self._remember_first(left)
        results: list[Future[list[Applied]]] = []
        for sink, sink_parts in parts.items():
            result = self._writers[sink].submit(sink_parts, of_dump=of_dump)
            result.add_done_callback(lambda _: self._answered())
            results.append(result)
        return results

    def _note_first(self, asked: Sequence[Asked], truncates: Mapping[str, int]) -> float:
        """Store which keys rows are enriched by, in one crossing; return the seconds. Raises SourceBusy as below.

        Before any look-up is asked, and its cache looked at: what is answered later is as new as a notice that did not
        find the note.
        """
        uses = [use for one in asked for use in uses_of(one)]
        kept = {table: version for table, version in truncates.items() if table in self._kept_tables}
        if not uses and not kept:
            return 0.0
        began = self._clock()
        self._until_stored(lambda: self._note(uses, kept))
        took_s = max(0.0, self._clock() - began)
        self._progress.stages["note"].add(took_s)
        return took_s

    def _remember_first(self, left: Sequence[Left]) -> None:
        """Store which documents will lack an optional answer. Raises SourceBusy when Delta stops before.

        Before any sink has them: however late such a document is written, and whatever becomes of this process,
        somebody then knows of it.
        """
        self._until_stored(lambda: self._remember(left))

    def _until_stored(self, store: Callable[[], None]) -> None:
        """Repeat a call until the state store answers. Raises SourceBusy when Delta stops before."""
        while True:
            try:
                store()
            except StateBusy as error:
                log.warning("state_waits", reason=redact(str(error)))
                if self._stopping.wait(STATE_RETRY_S):
                    raise SourceBusy("Delta stops before a batch could be processed.") from error
            else:
                return


def _for_each(failures: Iterable[Failure], sinks: Sequence[str]) -> list[Failure]:
    """Return failures of a function that is not for all of a table's sinks: others may have the document."""
    return [failed._replace(sink=sink) for failed in failures for sink in sinks]
