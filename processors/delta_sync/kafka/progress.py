"""How far the log is in the sinks, over all workers: what the load waits for, and what status and metrics show.

Partitions are independent, so no single record can tell. Instead: the connector has confirmed up to L (PostgreSQL: in
its slot), which it does only when Kafka has acknowledged everything before L; then the ends of all partitions are read;
and when the group's committed positions have reached these ends, everything before L has been applied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from delta_sync.errors import DeltaError, Transient
from delta_sync.kafka.consumer import Partition
from delta_sync.logs import logger
from delta_sync.progress import LogPosition
from delta_sync.sources.reader import CapturePosition, SourceReader

log = logger(__name__)

WAITED_FOR_S = 0.1  # between looks while a load waits for a position
RESTING_S = 1.0  # otherwise: the lag that is shown is no finer
RETRY_S = 1.0
TOPICS_S = 5.0  # between looks whether topics are still the same: as often as the slot is looked at


class Offsets(Protocol):
    """What a cluster says of a group and of the topics that it reads. Both raise KafkaBusy."""

    def ends(self) -> Mapping[Partition, int]:
        """Return the end of each partition that holds any record."""
        ...

    def committed(self) -> Mapping[Partition, int]:
        """Return the group's committed positions; a partition without one is missing."""
        ...

    def close(self) -> None:
        """Release connections. Idempotent."""
        ...


class Barrier(NamedTuple):
    """A position of the log, and what the group must have committed for everything before it to be applied."""

    lsn: int
    ends: Mapping[Partition, int]

    def is_passed(self, committed: Mapping[Partition, int]) -> bool:
        """Tell whether these committed positions are at or behind all of the ends."""
        return all(committed.get(partition, 0) >= end for partition, end in self.ends.items())


class GroupProgress(threading.Thread):
    """Advances `position` until `stopping` is set. `reader`, to which `place` belongs, and `offsets` are its own.

    `look_at_topics` is called every so often; it may raise Transient.
    """

    def __init__(
        self,
        *,
        reader: SourceReader,
        place: CapturePosition,
        offsets: Offsets,
        position: LogPosition,
        waits: Callable[[str | None], None],
        stopping: threading.Event,
        look_at_topics: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="progress", daemon=True)
        self._look_at_topics = look_at_topics
        self._clock = clock
        self._topics_at = -TOPICS_S
        self._reader = reader
        self._place = place
        self._offsets = offsets
        self._position = position
        self._waits = waits
        self._stopping = stopping
        self._barrier: Barrier | None = None

    def run(self) -> None:
        """Look, until Delta stops; what does not answer is asked again."""
        while not self._stopping.is_set():
            try:
                self.look()
                if self._clock() - self._topics_at >= TOPICS_S:
                    self._look_at_topics()
                    self._topics_at = self._clock()
                self._waits(None)
                pause_s = WAITED_FOR_S if self._position.waited_for else RESTING_S
            except Transient as error:
                self._waits(str(error))
                pause_s = RETRY_S
            except DeltaError as error:
                log.warning("progress_unknown", reason=str(error))
                self._waits(str(error))
                pause_s = RETRY_S
            self._stopping.wait(pause_s)
        self._offsets.close()
        self._reader.close()

    def look(self) -> None:
        """Set a barrier at what is confirmed now, or look whether the last one has been passed."""
        if self._barrier is None:
            confirmed = self._place.confirmed()
            if confirmed is None or confirmed <= self._position.passed_lsn:
                return
            self._barrier = Barrier(confirmed, self._offsets.ends())
        if self._barrier.is_passed(self._offsets.committed()):
            self._position.advance(self._barrier.lsn)
            self._barrier = None
