"""The last record of some topics of one partition each, and what lies in such a topic behind a place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from kafka.errors import KafkaError

from delta_sync.kafka import settings
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.secrets import redact
from delta_sync.spec import KafkaSpec

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_kafka: Any = import_module("kafka")
T = TypeVar("T")

RECORD_S = 10.0  # for the broker's answer, which takes milliseconds
POLL_MS = 500.0
CONSUMERS_MOST = 9  # connections for eight topics; beyond that, another one for each read


class LastRecord(NamedTuple):
    """A record's key and value, its place in the topic, and when it was sent."""

    key: bytes | None
    value: bytes | None
    offset: int
    timestamp_ms: int


class TopicEnds:
    """Reads the first partition of topics without a group. Used by one thread; methods raise KafkaBusy."""

    def __init__(self, spec: KafkaSpec) -> None:
        self._spec = spec
        # One for questions, and one for each topic that was read of late: the client does not survive a late answer
        # about a partition that it has been told to leave, nor does it go on at once with one that was paused.
        self._consumers: dict[str, Any] = {}

    def close(self) -> None:
        """Release connections. Idempotent."""
        while self._consumers:
            _, consumer = self._consumers.popitem()
            consumer.close()

    def ends(self, topics: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return where each topic begins and ends: the place of its first record, and behind its last one.

        A topic that is not there is left out.
        """

        def ask(consumer: Any) -> dict[str, tuple[int, int]]:
            partitions = [_kafka.TopicPartition(topic, 0) for topic in topics if consumer.partitions_for_topic(topic)]
            begins, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
            if not all(at in begins and at in ends for at in partitions):  # it leaves out what has no leader
                raise KafkaBusy("Kafka does not say where topics end.")
            return {at.topic: (begins[at], ends[at]) for at in partitions}

        return self._asked(ask)

    def place_at(self, topic: str, timestamp_ms: int) -> int:
        """Return the place of the first record that was sent at that time or later; the topic's end without one."""
        at = _kafka.TopicPartition(topic, 0)

        def ask(consumer: Any) -> int:
            found = consumer.offsets_for_times({at: timestamp_ms}).get(at)
            if found is not None:
                return int(found.offset)
            ends = consumer.end_offsets([at])
            if at not in ends:
                raise KafkaBusy("Kafka does not say where a topic ends.")
            return int(ends[at])

        return self._asked(ask)

    def read(self, topic: str, start: int, end: int) -> list[LastRecord]:
        """Return the records from one place up to another; those that have expired are left out."""
        at = _kafka.TopicPartition(topic, 0)

        def ask(consumer: Any) -> list[LastRecord]:
            found: list[LastRecord] = []
            if not consumer.assignment():
                consumer.assign([at])
            consumer.seek(at, start)
            for _ in range(round(1000 * RECORD_S / POLL_MS)):
                polled = consumer.poll(timeout_ms=POLL_MS).get(at, [])
                found += [
                    LastRecord(one.key, one.value, one.offset, one.timestamp) for one in polled if one.offset < end
                ]
                if consumer.position(at) >= end:
                    return found
            raise KafkaBusy(f"Kafka does not answer: records of {topic} did not come.")

        return self._asked(ask, topic) if start < end else []

    def _asked(self, question: Callable[[Any], T], topic: str = "") -> T:
        try:
            consumer = self._consumers.pop(topic, None)
            if consumer is None:
                options: Mapping[str, Any] = settings.resolved(settings.kafka_python(self._spec))
                consumer = _kafka.KafkaConsumer(
                    **options,
                    group_id=None,
                    enable_auto_commit=False,
                    auto_offset_reset="earliest",  # of records that have just expired
                    allow_auto_create_topics=False,
                )
            self._consumers[topic] = consumer  # the last one is that of the last question
            if len(self._consumers) > CONSUMERS_MOST:
                self._consumers.pop(next(iter(self._consumers))).close()
            return question(consumer)
        except KafkaError as error:
            self.close()  # the next time with a new connection
            raise KafkaBusy(f"Kafka does not answer: {redact(str(error) or type(error).__name__)}.") from error
