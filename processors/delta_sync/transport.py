"""What differs between the transports, seen from a run: where the log comes from, and what is said back to the source.

A run (`running.py`) calls these in the order in which they stand here, from one thread unless it says otherwise.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import orjson

from delta_sync.capture import Batch, Capture
from delta_sync.confirming import RecordingCapture
from delta_sync.decoding import Stretch
from delta_sync.leases import LeaseKeeper
from delta_sync.notices import NoticeIntake
from delta_sync.pipeline import Pipeline
from delta_sync.progress import Progress
from delta_sync.sinks import AnySink
from delta_sync.sources import open_reader
from delta_sync.sources.mysql.claims import events_of_binlog
from delta_sync.sources.mysql.position import position_in
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.starting import Source, check_slot, prepare_source
from delta_sync.state import StateStore
from delta_sync.state_connector import ConnectorRun, ConnectorState
from delta_sync.tables import Table

CONFIRM_ANSWER_S = 5.0  # it asks for one number; meanwhile nothing is polled, and whoever stops waits for it

Tables = Callable[[], Mapping[str, Table]]
Begin = Callable[[], bytes | None]
"""Asked at each start of a connector that is given its place, as `Batch.place`; None: it begins at the log's end."""


class Transport(ABC):
    """How changes come from the source to this run."""

    sends_heartbeats: ClassVar[bool] = True  # whether this run writes them into the log, or another process does

    @abstractmethod
    def prepare(
        self, pipeline: Pipeline, reader: SourceReader, state: StateStore, sinks: Mapping[str, AnySink]
    ) -> Source:
        """Make sure that the source is captured. Repeated as long as it raises Transient."""

    @abstractmethod
    def capture(self, source: Source, tables: Tables, progress: Progress, unchanged: Callable[[], None]) -> Capture:
        """Return the capture, for the tables as they are at each of its starts.

        Where other runs may go on with the log meanwhile, nothing is confirmed before `unchanged` was asked, which
        raises GenerationsChanged or StateBusy.
        """

    @abstractmethod
    def stretches(self, batch: Batch) -> Iterable[Stretch]:
        """Return the events of a batch of that capture. Raises Transient, after which it may be called again."""

    @abstractmethod
    def check(self, reader: SourceReader, state: StateStore) -> None:
        """Raise EpochRose or PipelineStopped if going on would lose changes.

        Called by the capture's thread before each start of it, and every so often by the watch's, with another reader.
        """

    @abstractmethod
    def publish(self, reader: SourceReader, tables: Sequence[Table]) -> None:
        """Make the changes of exactly these tables arrive, now that they are others than before."""

    def background(self, progress: Progress, stopping: threading.Event) -> Sequence[threading.Thread]:
        """Return threads that are to run beside the stream; they end when `stopping` is set."""
        del progress, stopping
        return ()

    def notices(self, intake: NoticeIntake, stopping: threading.Event) -> Sequence[threading.Thread]:
        """Return threads that give `intake` the notices that come this way; they end when `stopping` is set."""
        del intake, stopping
        return ()

    def load_lease(self, state: StateStore) -> LeaseKeeper | None:
        """Return who keeps the lease of the process that loads; None where there is only this one."""
        del state
        return None

    def nobody_writes(self, state: StateStore, sink: str) -> bool:
        """Tell whether no other run writes to a generation that was given up, as this one does not."""
        del state, sink
        return True

    @abstractmethod
    def save_status(self, state: StateStore, document: Mapping[str, Any]) -> None:
        """Keep what the run says of itself, for `deltactl status`. Called by a thread of its own."""


class EmbeddedTransport(Transport):
    """All in one process and its child: the source's log is the log.

    `make_capture` makes the capture; `history_file` is where its connector keeps the history of the schema, if the
    source keeps no position for it. `new_slot` accepts that changes may have been lost, `reload` loads every table
    again.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        make_capture: Callable[[Tables, Begin | None], Capture],
        history_file: Path,
        *,
        new_slot: bool = False,
        reload: bool = False,
    ) -> None:
        self._spec = spec
        self._make_capture = make_capture
        self._history_file = history_file
        self._new_slot = new_slot
        self._reload = reload
        self._epoch = 0
        self._state: StateStore | None = None

    def prepare(
        self, pipeline: Pipeline, reader: SourceReader, state: StateStore, sinks: Mapping[str, AnySink]
    ) -> Source:
        """Make sure of publication and slot, and decide the epoch."""
        self._state = state
        return prepare_source(self._spec, pipeline, reader, state, sinks, new_slot=self._new_slot, reload=self._reload)

    def capture(self, source: Source, tables: Tables, progress: Progress, unchanged: Callable[[], None]) -> Capture:
        """Return the child process with the Debezium Engine. What it confirms leaves a trace in the state store."""
        del unchanged  # there is no other run: the next one begins with what this one has confirmed
        self._epoch = source.epoch
        state = self._state
        assert state is not None, "it was prepared"
        spent = progress.stages["commit"].add
        if self._spec.source.kind == "postgresql":
            reader = open_reader(self._spec, f"delta {self._spec.name} confirm", CONFIRM_ANSWER_S)

            def raise_bound(_: Batch) -> None:
                state.raise_confirmed_most(self._spec.name, reader.durable_end())

            return RecordingCapture(self._make_capture(tables, None), raise_bound, reader.close, spent=spent)
        connector = ConnectorRun(ConnectorState(state, self._spec.name), self._history_file)

        def save_position(batch: Batch) -> None:
            progress.position.advance(position_in(connector.save(batch)))

        return RecordingCapture(self._make_capture(tables, connector.begin), save_position, spent=spent)

    def stretches(self, batch: Batch) -> Iterable[Stretch]:
        """Return a batch's events, which are JSON."""
        events = orjson.loads(batch.payload)
        return [Stretch(self._epoch, events if self._spec.source.kind == "postgresql" else events_of_binlog(events))]

    def check(self, reader: SourceReader, state: StateStore) -> None:
        """Raise EpochRose or SlotMissing unless the slot goes on where the pipeline's state was."""
        check_slot(self._spec, reader, state)

    def publish(self, reader: SourceReader, tables: Sequence[Table]) -> None:
        """Bring the publication up to date."""
        assert self._state is not None, "it was prepared"
        reader.capture_position(self._spec, self._state).publish(tables)

    def save_status(self, state: StateStore, document: Mapping[str, Any]) -> None:
        """Save it as the pipeline's."""
        state.save_status(self._spec.name, document)
