"""The capture of a worker in a consumer group: batches of records, with the positions to commit once they are applied.

A batch has records of several partitions, and partitions come and go. A position is committed when its batch and all
batches before it are confirmed, and only while the partition has been this member's without a break since the batch was
polled: after a break another member may be further already. What is not committed is delivered again, without harm.

Before a commit the state store is asked whether the sinks are still those that this run writes to (`unchanged`). So a
worker that was frozen while a sink got another generation cannot commit what that one lacks, and a dump into it need
not know who the workers are: whatever was committed without it had been read before it was there
(`docs/design/rebuild.md`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from delta_sync.capture import Batch
from delta_sync.errors import EpochRose, StateBusy
from delta_sync.kafka.consumer import ConsumerGroup, KafkaBusy, Partition, PositionsExpired, Records
from delta_sync.kafka.topic_ids import Ids, SeenTopics, made_anew
from delta_sync.logs import logger
from delta_sync.measures import PartitionLag
from delta_sync.progress import Progress

log = logger(__name__)

IN_FLIGHT_BATCHES = 8  # unconfirmed; enough to join some while others are in the sinks, at 20 MB less than 16 take
IN_FLIGHT_BYTES = 16 << 20  # and no more than this, beside the first: decoded, it is several times as much
PAUSE_AFTER_S = 5.0  # a pause lets clients throw away what they fetched ahead, so it is for sinks that are really stuck
LAGS_S = 1.0  # between looks at how far behind it is: as often as the status is saved
COMMIT_S = 0.2  # between commits: each is a round trip, and what is not committed is only delivered again
ASKED_S = 0.05  # an answer of the state store takes a millisecond; a slow one is waited for beside the stream
ASKED_LAST_S = 2.0  # before a partition is given away, or the group is left: what is not committed is delivered again
POSITIONS_EXPIRED = "positions expired"  # why a table is loaded again
TOPIC_MADE_ANEW = "its topic was made anew"  # likewise


class Flying(NamedTuple):
    """Records of one partition that were handed over: during which of its assignments, and what to commit then."""

    partition: Partition
    assignment: int
    next_offset: int
    records: int
    oldest_ms: int  # when the first of them was sent to Kafka


class Delivered(NamedTuple):
    """A batch that was handed over."""

    sequence: int
    size_bytes: int
    parts: Sequence[Flying]


class Asked(NamedTuple):
    """Positions that may be committed once it has been answered that the sinks are unchanged."""

    answer: Future[None]
    positions: dict[Partition, int]


class KafkaCapture:
    """Delivers the records of some topics. `payload` of its batches is a list of `Records`.

    `open_group` makes a new member; `progress` is told what it waits for, and how far behind it is. `lost` is called
    with partitions of which records were gone before they were read, and why. It has to record what will mend that:
    once it has returned, the positions behind the gap are committed. `look` looks at topics as `look_at_topics` does;
    it is called at each start before anything is read, and whoever calls it later tells by `topics_seen`. `mended` is
    told of which topics positions are committed now. `unchanged` is asked before anything else is committed, in a
    thread of its own: it raises EpochRose when this run must not commit any more, or StateBusy.
    """

    def __init__(
        self,
        open_group: Callable[[], ConsumerGroup],
        topics: Collection[str],
        progress: Progress,
        lost: Callable[[Collection[Partition], str], None],
        look: Callable[[], SeenTopics],
        mended: Callable[[Ids], None],
        unchanged: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._open_group = open_group
        self._topics = topics
        self._progress = progress
        self._unchanged = unchanged
        self._lost = lost
        self._look = look
        self._mended = mended
        self._seen: SeenTopics | None = None
        self._mended_now: dict[Partition, str] = {}  # since they are this member's: a look may have begun before
        self._clock = clock
        self._wall_clock = wall_clock
        self._group: ConsumerGroup | None = None
        self._generation = 0  # rises with every loss of partitions, too: their records are delivered again
        self._sequence = 0
        self._confirmed = 0
        self._delivered: deque[Delivered] = deque()
        self._assignments: dict[Partition, int] = {}  # of the partitions that are this member's
        self._assigned_ever = 0
        self._committable: dict[Partition, int] = {}
        self._committed_at = 0.0
        self._asked: Asked | None = None
        self._asking = ThreadPoolExecutor(1, "unchanged")
        self._reached_ms: dict[Partition, int] = {}  # when the newest record was sent that was read of each partition
        self._looked_at = -LAGS_S
        self._paused = self._busy = False
        self._full_since: float | None = None
        self._lock = threading.Lock()  # of _confirmed
        self._news = threading.Event()  # something was confirmed

    @property
    def generation(self) -> int:
        """How often it was started or lost partitions."""
        return self._generation

    @property
    def pid(self) -> int | None:
        """None: it is no process of its own."""
        return None

    @property
    def partitions(self) -> frozenset[Partition]:
        """The partitions that are this member's now."""
        return frozenset(self._assignments)

    def start(self) -> None:
        """Join the group."""
        self.stop()
        self._generation += 1
        self._paused = False
        self._full_since = None
        group = self._group = self._open_group()
        group.subscribe(self._topics, self._came, self._go)
        self._look()  # before anything is read: a topic that is made anew after that is known to be another

    def poll(self, timeout_s: float) -> Batch | None:
        """Return the next records. Nothing comes while too much is unconfirmed, but the membership is kept."""
        group = self._group
        assert group is not None, "it was started"
        try:
            self._mind_topics(group)
            self._commit_now_and_then()
            self._look_at_lags(group)
            if self._hold_back(group, timeout_s):
                return None
            try:
                records = group.poll(timeout_s)
            except PositionsExpired as error:
                self._go_on_behind_the_gap(group, error)
                return None
        except KafkaBusy as error:
            if not self._busy:
                log.warning("kafka_busy", reason=str(error))
            self._busy = True
            self._progress.waits("kafka", str(error))
            return None
        if self._busy:
            self._busy = False
            self._progress.waits("kafka", None)
        return self._deliver(records) if records else None

    def _deliver(self, records: Sequence[Records]) -> Batch:
        self._sequence += 1
        parts = [
            Flying(at, self._assignments[at], next_offset, len(values), timestamps_ms[0])
            for at, _, values, _, timestamps_ms, next_offset in records
        ]
        for some in records:
            self._reached_ms[some.partition] = some.timestamps_ms[-1]
        size_bytes = sum(len(value) for some in records for value in some.values if value is not None)
        self._delivered.append(Delivered(self._sequence, size_bytes, parts))
        return Batch(self._generation, self._sequence, sum(len(some.values) for some in records), records)

    def topics_seen(self, seen: SeenTopics) -> None:
        """Take note of what topics there are; any thread may call it. The next `poll` begins anew with other ones."""
        self._seen = seen

    def confirm(self, batch: Batch) -> None:
        """Let the batch and all before it be committed by the next `poll`."""
        with self._lock:
            self._confirmed = max(self._confirmed, batch.sequence)
        self._news.set()
        group = self._group
        if group is not None and self._paused:
            group.wake()

    def reconfigure(self) -> None:
        """Nothing to do: whoever runs the connector sees to that."""

    def stop(self) -> None:
        """Commit what is confirmed, and leave the group."""
        group, self._group = self._group, None
        if group is None:
            return
        self._settle()
        self._commit_last(group, self._committable)
        group.close()
        self._asked = None
        self._assignments.clear()
        self._committable.clear()
        self._delivered.clear()
        self._reached_ms.clear()
        self._progress.partition_lags = {}

    # ── partitions ───────────────────────────────────────────────────────────────────────────────────────────────

    def _came(self, partitions: Collection[Partition]) -> None:
        for partition in partitions:
            self._assigned_ever += 1
            self._assignments[partition] = self._assigned_ever
            self._mended_now.pop(partition, None)
        self._seen = None  # whose they were may have mended them since
        log.info("partitions_assigned", partitions=_texts(partitions), of=len(self._assignments))

    def _go(self, partitions: Collection[Partition]) -> None:
        """Commit what is confirmed of partitions that are about to be another's. What is in flight harms nobody."""
        self._settle()
        going = {
            partition: self._committable.pop(partition) for partition in partitions if partition in self._committable
        }
        if self._group is not None:
            self._commit_last(self._group, going)
        for partition in partitions:
            if self._asked is not None:
                self._asked.positions.pop(partition, None)
            self._assignments.pop(partition, None)
            self._reached_ms.pop(partition, None)
        self._generation += 1
        log.info("partitions_revoked", partitions=_texts(partitions), left=len(self._assignments))

    def _go_on_behind_the_gap(self, group: ConsumerGroup, error: PositionsExpired) -> None:
        positions, _ = self._begin_anew(group, error.positions, POSITIONS_EXPIRED)
        log.warning(
            "positions_expired",
            positions={_text(partition): offset for partition, offset in sorted(error.positions.items())},
            goes_on_at={_text(partition): offset for partition, offset in sorted(positions.items())},
            reason=str(error),
        )

    def _mind_topics(self, group: ConsumerGroup) -> None:
        """Begin anew with the partitions of topics that are others than those that the positions are of.

        What says that they are mended comes last, and only when the positions are committed: whoever is killed, or
        loses the partitions, before that, finds these topics to be others once more.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return
        anew = {at: id_ for at, id_ in made_anew(seen, self._assignments).items() if self._mended_now.get(at) != id_}
        if not anew:
            return
        positions, committed = self._begin_anew(group, anew, TOPIC_MADE_ANEW)
        log.warning(
            "topic_made_anew",
            topics=sorted({partition.topic for partition in anew}),
            goes_on_at={_text(partition): offset for partition, offset in sorted(positions.items())},
        )
        if committed:
            ids = {partition: anew[partition] for partition in positions}
            self._mended(ids)
            self._mended_now |= ids

    def _begin_anew(
        self, group: ConsumerGroup, partitions: Collection[Partition], why: str
    ) -> tuple[dict[Partition, int], bool]:
        """Go on with what is there. In this order, so that whoever is killed in between finds the gap once more.

        What is still in flight of these partitions must not be committed any more: it lies before the gap, or in a
        topic that is no longer there, whose positions could be beyond records of the new one. Returns the positions,
        and whether they are committed.
        """
        self._lost(partitions, why)
        self._settle()
        for partition in partitions:
            self._committable.pop(partition, None)
            if self._asked is not None:
                self._asked.positions.pop(partition, None)
            if partition in self._assignments:
                self._assigned_ever += 1
                self._assignments[partition] = self._assigned_ever
        self._generation += 1
        positions = group.rewind(partitions)
        return positions, group.commit(positions)

    # ── positions ────────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self) -> None:
        """Move the positions of confirmed batches to where they can be committed."""
        with self._lock:
            confirmed = self._confirmed
        while self._delivered and self._delivered[0].sequence <= confirmed:
            for part in self._delivered.popleft().parts:
                if self._assignments.get(part.partition) == part.assignment:
                    self._committable[part.partition] = part.next_offset

    def _commit_now_and_then(self) -> None:
        """Commit what may be. Raises what `unchanged` did, but for StateBusy: then it is asked again later."""
        self._settle()
        now = self._clock()
        if self._asked is None and self._committable and now - self._committed_at >= COMMIT_S:
            self._asked = Asked(self._asking.submit(self._unchanged), dict(self._committable))
            wait([self._asked.answer], ASKED_S)
        asked, group = self._asked, self._group
        if asked is None or group is None or not asked.answer.done():
            return
        self._asked = None
        self._committed_at = now
        try:
            asked.answer.result()
        except StateBusy as error:
            self._progress.waits("commit", str(error))
            return
        self._progress.waits("commit", None)
        if group.commit(asked.positions):  # else again: a partition that stays through a rebalance brings nothing new
            for partition, offset in asked.positions.items():
                if self._committable.get(partition) == offset:
                    del self._committable[partition]
        self._progress.stages["commit"].add(self._clock() - now)

    def _commit_last(self, group: ConsumerGroup, positions: Mapping[Partition, int]) -> None:
        """Commit what is not ours much longer, if the state store says soon that it may be."""
        if not positions:
            return
        try:
            self._asking.submit(self._unchanged).result(ASKED_LAST_S)
            group.commit(positions)
        except (KafkaBusy, StateBusy, EpochRose, TimeoutError) as error:
            log.warning("not_committed", reason=str(error) or type(error).__name__)

    def _look_at_lags(self, group: ConsumerGroup) -> None:
        """Tell now and then how far behind each partition is: what is not read, and what is not in every sink yet."""
        now = self._clock()
        if now - self._looked_at < LAGS_S:
            return
        self._looked_at = now
        flying: dict[Partition, tuple[int, int]] = {}
        for delivered in self._delivered:
            for part in delivered.parts:
                if self._assignments.get(part.partition) == part.assignment:
                    records, oldest_ms = flying.get(part.partition, (0, part.oldest_ms))
                    flying[part.partition] = records + part.records, oldest_ms
        wall_ms = 1000 * self._wall_clock()
        self._progress.partition_lags = {
            partition: lag_of(unread, flying.get(partition), self._reached_ms.get(partition), wall_ms)
            for partition, unread in group.lags().items()
            if partition in self._assignments
        }

    def _hold_back(self, group: ConsumerGroup, timeout_s: float) -> bool:
        """Wait for room, for so long; return whether to poll later. When that goes on, the group is paused instead."""
        if not self._is_full():
            self._full_since = None
            if self._paused:
                self._paused = False
                group.resume()
            return False
        if self._paused:
            return False  # `poll` returns nothing then, but keeps the membership
        now = self._clock()
        self._full_since = now if self._full_since is None else self._full_since
        if now - self._full_since >= PAUSE_AFTER_S:
            self._paused = True
            group.pause()
            return False
        self._news.clear()
        self._settle()  # what was confirmed before the clearing
        if self._is_full():
            self._news.wait(timeout_s)
        return True

    def _is_full(self) -> bool:
        size_bytes = sum(delivered.size_bytes for delivered in self._delivered)
        many = len(self._delivered)
        return many >= IN_FLIGHT_BATCHES or (many > 1 and size_bytes > IN_FLIGHT_BYTES)


def lag_of(unread: int, flying: tuple[int, int] | None, reached_ms: int | None, now_ms: float) -> PartitionLag:
    """Return how far behind a partition is.

    `flying` are the records that were read and are not in every sink yet, and when the oldest of them was sent;
    `reached_ms` is when the newest was sent that was read. What has not been read is newer than that.
    """
    records = unread + (flying[0] if flying is not None else 0)
    if not records:
        return PartitionLag(0, 0.0)
    since_ms = flying[1] if flying is not None else reached_ms
    return PartitionLag(records, None if since_ms is None else max(0.0, now_ms - since_ms) / 1000)


def _text(partition: Partition) -> str:
    return f"{partition.topic}[{partition.number}]"


def _texts(partitions: Collection[Partition]) -> list[str]:
    return [_text(partition) for partition in sorted(partitions)]
