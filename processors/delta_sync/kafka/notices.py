"""Notices from a topic of Kafka's: workers share its partitions, and a position is committed once its notices are kept.

The topic is its producers': Delta neither makes nor changes it. A message that is no notice is counted and logged with
its place, and the next one follows. Whatever else goes wrong, the group is left and joined again, which reads from what
was committed; a notice that is taken twice does no harm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from delta_sync.errors import DeltaError
from delta_sync.kafka.consumer import ConsumerGroup, PositionsExpired, Records
from delta_sync.logs import logger
from delta_sync.notices import NoticeIntake
from delta_sync.secrets import redact

log = logger(__name__)

POLL_S = 0.5
AGAIN_S = 2.0  # after brokers, topic or state store did not answer; the stream does not wait for it
LOGGED = 3  # refused messages of one answer: more would say the same


class KafkaNotices(threading.Thread):
    """Reads a topic of notices until Delta stops. `open_group` makes a member of their consumer group."""

    def __init__(
        self, open_group: Callable[[], ConsumerGroup], topic: str, intake: NoticeIntake, stopping: threading.Event
    ) -> None:
        super().__init__(name="kafka notices", daemon=True)
        self._open_group = open_group
        self._topic = topic
        self._intake = intake
        self._stopping = stopping

    def run(self) -> None:
        """Read, and begin anew after any failure: the changes of the source do not wait for notices."""
        said: str | None = None
        while not self._stopping.is_set():
            try:
                group = self._open_group()
                try:
                    group.subscribe([self._topic], lambda _: None, lambda _: None)
                    while not self._stopping.is_set():
                        self.read(group)
                        said = None
                finally:
                    group.close()
            except DeltaError as error:
                if str(error) != said and not self._stopping.is_set():
                    said = str(error)
                    log.warning("notices_topic_waits", topic=self._topic, reason=redact(said))
            except Exception as error:  # a defect here must not stop the stream
                log.error("notices_topic_failed", topic=self._topic, reason=redact(str(error)), exc_info=True)
            self._stopping.wait(AGAIN_S)

    def read(self, group: ConsumerGroup) -> None:
        """Take what has come, then commit it. One step of `run`. Raises StateBusy, NoticesWait, KafkaBusy."""
        try:
            found = group.poll(POLL_S)
        except PositionsExpired as error:
            positions = group.rewind(list(error.positions))
            log.warning("notices_expired", topic=self._topic, reason=str(error))
            group.commit(positions)
            return
        for records in found:
            self._take(records)
        if found:
            group.commit({records.partition: records.next_offset for records in found})

    def _take(self, records: Records) -> None:
        bodies = [value or b"" for value in records.values]
        _, refused = self._intake.take("kafka", bodies)
        for one in refused[:LOGGED]:
            # From the end: of a topic that is compacted, or has transactions, some offsets have no record.
            log.warning(
                "notice_refused",
                topic=self._topic,
                partition=records.partition.number,
                before_offset=records.next_offset,
                message=one.place + 1,
                of=len(bodies),
                refused=len(refused),
                reason=redact(one.reason),
            )
