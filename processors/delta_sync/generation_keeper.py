"""A run's part in the generations of its sinks: it ends when they are others, leads readers, and removes old ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping

from delta_sync.errors import DeltaError, GenerationsChanged, Transient
from delta_sync.generations import Generations, GenerationStore, follow, written
from delta_sync.leases import LeaseKeeper
from delta_sync.logs import logger
from delta_sync.pipeline import Pipeline
from delta_sync.secrets import redact
from delta_sync.sinks import AnySink, open_sink
from delta_sync.spec import PipelineSpec
from delta_sync.starting import targets_of_sink
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Table

log = logger(__name__)

DROP_LOOK_S = 2.0  # between looks whether a generation of a sink is to be removed: nobody waits for that


class GenerationKeeper(threading.Thread):
    """Removes, as a thread, the generations that are given up, once nobody writes to them: `nobody_writes` tells.

    `rows` are the generations as they were when this run opened its `sinks`. Of several processes the one that has
    `keeper`'s lease removes.
    """

    def __init__(
        self,
        *,
        spec: PipelineSpec,
        pipeline: Pipeline,
        store: GenerationStore,
        rows: Mapping[str, Generations],
        sinks: Mapping[str, AnySink],
        dumps: DumpStore,
        tables: Collection[Table],
        nobody_writes: Callable[[str], bool],
        keeper: LeaseKeeper | None,
        stopping: threading.Event,
    ) -> None:
        super().__init__(name="generations", daemon=True)
        self._spec = spec
        self._pipeline = pipeline
        self._store = store
        self._rows = rows
        self._sinks = sinks
        self._dumps = dumps
        self._tables = tables
        self._nobody_writes = nobody_writes
        self._keeper = keeper
        self._stopping = stopping

    def unchanged(self) -> None:
        """Raise GenerationsChanged when the pipeline is to write to others than this run does; StateBusy."""
        self._unchanged(self._store.all())

    def lead_readers(self) -> None:
        """Lead readers to what is meant to serve, in case somebody died over it. Raises as `unchanged` does."""
        now = self._store.all()
        self._unchanged(now)
        for name, row in now.items():
            if name not in self._spec.sinks:
                continue

            def lead(number: int, of: Generations = row) -> None:
                sink = self._sinks.get(of.name(number))
                if sink is None:
                    raise GenerationsChanged("A sink has got another generation meanwhile.")
                sink.lead_readers(targets_of_sink(self._pipeline, sink, self._tables, self._spec))

            follow(lambda name=name: self._store.all()[name].serving, lead)  # type: ignore[misc]  # a default binds it now

    def run(self) -> None:
        """Look and remove until Delta stops."""
        while not self._stopping.wait(DROP_LOOK_S):
            if self._keeper is not None and not self._keeper.held:
                continue
            try:
                for name, row in self._store.all().items():
                    if row.state != "dropping" or name not in self._spec.sinks:
                        continue
                    assert row.other is not None, "it is dropped"
                    doomed = row.name(row.other)
                    if doomed not in self._sinks and self._nobody_writes(doomed):
                        self._drop(row, row.other)
            except Transient as error:
                log.warning("drop_waits", reason=redact(str(error)))
            except DeltaError as error:  # it can wait, and the stream goes on
                log.warning("drop_failed", reason=redact(str(error)))

    def _unchanged(self, now: Mapping[str, Generations]) -> None:
        if written(now) != written(self._rows):
            raise GenerationsChanged("A sink gets another generation, or loses one.")

    def _drop(self, row: Generations, number: int) -> None:
        for dump in self._dumps.all(unfinished=True):
            if dump.sinks == (row.name(number),):  # nobody writes there any more, so it would never end
                self._dumps.order(dump.id, "cancel")
        doomed = open_sink(row.sink, self._spec.sinks[row.sink], self._spec.tombstone_ttl, number)
        try:
            targets = targets_of_sink(self._pipeline, doomed, self._tables, self._spec)
            documents = sum(doomed.drop(target) for target in targets)
        finally:
            doomed.close()
        self._store.change(row, row.gone())
        log.info("generation_dropped", sink=doomed.name, documents=documents)
