"""What a connector keeps in Kafka when its source keeps nothing for it: its position, and the history of the schema.

Debezium writes its position behind each batch that Kafka has acknowledged, as one record of JSON, so the newest record
of that topic says from where the connector goes on, whichever sidecar starts it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar, cast

import orjson
from kafka.errors import KafkaError

from delta_sync.errors import CheckFailed, Problem
from delta_sync.kafka import settings
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.kafka.names import history_topic, offsets_topic
from delta_sync.secrets import redact
from delta_sync.sources.mysql.position import StoredOffset
from delta_sync.spec import PipelineSpec

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_kafka: Any = import_module("kafka")
_admin: Any = import_module("kafka.admin")
T = TypeVar("T")

RECORD_S = 10.0  # for the broker's answer, which takes milliseconds


class ConnectorStore:
    """The two topics of one pipeline. Used by one thread; connects when it is asked first. Methods raise KafkaBusy."""

    def __init__(self, spec: PipelineSpec) -> None:
        assert spec.kafka is not None, "the specification has transport: kafka"
        self._spec = spec.kafka
        self._offsets = _kafka.TopicPartition(offsets_topic(spec.name), 0)
        self._history = _kafka.TopicPartition(history_topic(spec.name), 0)
        self._consumer: Any = None

    @property
    def where(self) -> str:
        """The place, for messages."""
        return f"Kafka (topic {self._offsets.topic})"

    def close(self) -> None:
        """Release connections. Idempotent."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()

    def newest(self) -> StoredOffset | None:
        """Return the connector's position; None when it has none."""
        return self._asked(self._newest)

    def has_history(self) -> bool:
        """Tell whether the history of the schema holds anything."""

        def look(consumer: Any) -> bool:
            begins, ends = consumer.beginning_offsets([self._history]), consumer.end_offsets([self._history])
            return bool(ends[self._history] > begins[self._history])

        return self._asked(look)

    def clear(self) -> None:
        """Remove position and history, so that the connector begins at the log's end. It must not run."""
        found = self.newest()
        options = settings.resolved(settings.kafka_python(self._spec))
        try:
            if found is not None:
                producer = _kafka.KafkaProducer(**options, acks="all")
                try:
                    tombstone = producer.send(self._offsets.topic, key=found.key, value=None, partition=0)
                    tombstone.get(timeout=RECORD_S)
                finally:
                    producer.close()
            admin = _admin.KafkaAdminClient(**options)
            try:
                admin.delete_records({self._history: -1})  # all that there are
            finally:
                admin.close()
        except KafkaError as error:
            raise _busy(error) from error

    def _newest(self, consumer: Any) -> StoredOffset | None:
        (begins,) = consumer.beginning_offsets([self._offsets]).values()
        (ends,) = consumer.end_offsets([self._offsets]).values()
        if ends <= begins:
            return None
        # Compaction leaves the newest segment alone, so the last record is there.
        consumer.seek(self._offsets, ends - 1)
        polled = consumer.poll(timeout_ms=round(RECORD_S * 1000)).get(self._offsets, [])
        if not polled:
            raise KafkaBusy(f"Kafka does not answer: the last record of {self._offsets.topic} did not come.")
        record = polled[-1]
        if record.value is None:
            return None
        try:
            offset = orjson.loads(record.value)
        except orjson.JSONDecodeError:
            offset = None
        if not isinstance(offset, dict):
            what = f"its newest record is none of Debezium's: {record.value[:100]!r}"
            fix = "let nobody else write to it; delete the topic, and begin a new epoch"
            raise CheckFailed([Problem(f"topic {self._offsets.topic}", what, fix)])
        return StoredOffset(cast("dict[str, Any]", offset), record.offset, record.key, record.timestamp)

    def _asked(self, question: Callable[[Any], T]) -> T:
        try:
            if self._consumer is None:
                options = settings.resolved(settings.kafka_python(self._spec))
                self._consumer = _kafka.KafkaConsumer(**options, group_id=None, enable_auto_commit=False)
                self._consumer.assign([self._offsets])
            return question(self._consumer)
        except KafkaError as error:
            self.close()  # the next time with a new connection
            raise _busy(error) from error


def _busy(error: KafkaError) -> KafkaBusy:
    return KafkaBusy(f"Kafka does not answer: {redact(str(error) or type(error).__name__)}.")
