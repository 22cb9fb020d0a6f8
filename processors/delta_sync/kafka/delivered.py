"""How far the connector may have confirmed the source's log, by what is in Kafka: a slot beyond that was moved.

Debezium Server confirms by itself. What it confirms is told by the record that Kafka acknowledged last: the commit
before it, which the record has as the first position of `source.sequence`; its own position while the connector has
seen no commit yet (a heartbeat is a commit of its own). These numbers only rise from record to record of one connector,
and it confirms nothing without a record, so at every moment the slot is at or before the highest of them: exactly
before what this connector delivered, or where it began, which the sidecar saves (`slot_lsn`).

It is enough to look at the end of each partition. A connector of ours writes them in the log's order, so the last
record that it had acknowledged is at the end of some partition, unless another connector of ours has written behind it;
and that one began where the slot was. Records of other epochs do not count: their positions are of another log.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

from fastavro import parse_schema
from fastavro import schemaless_reader as _untyped_reader  # pyright: ignore[reportUnknownVariableType] -- its IO

from delta_sync.errors import SchemaUnfit, SchemaUnknown
from delta_sync.kafka import settings
from delta_sync.kafka.avro import HEADER_BYTES, Schemas
from delta_sync.kafka.consumer import EPOCH_HEADER, KafkaBusy
from delta_sync.kafka.names import message_topic, topic_name
from delta_sync.kafka.registry import SchemaRegistry
from delta_sync.logs import logger
from delta_sync.secrets import redact
from delta_sync.spec import PipelineSpec

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_kafka: Any = import_module("kafka")
_errors: Any = import_module("kafka.errors")
_read = cast("Any", _untyped_reader)

log = logger(__name__)

LAST_RECORDS = 5  # of a partition: a delete has a tombstone behind it, a connector that was frozen an older record
POLL_MS = 500.0
POLLS_MOST = 60  # half a minute for brokers that are slow; then it is tried anew


def delivered_of(spec: PipelineSpec) -> Callable[[int], int | None]:
    """Return what tells, for an epoch, up to which position a connector of it may have confirmed.

    Where that place is in Kafka itself (MariaDB), there is nothing to compare it with.
    """
    return Delivered(spec) if spec.source.kind == "postgresql" else lambda _: None


class Delivered:
    """Answers, for an epoch, up to which position a connector of it may have confirmed. Used by one thread.

    None: Kafka cannot tell, because records have expired, cannot be read, or may not be read by this user. Raises
    Transient when brokers or registry do not answer.
    """

    def __init__(self, spec: PipelineSpec) -> None:
        assert spec.kafka is not None, "the specification has transport: kafka"
        self._kafka = spec.kafka
        self._topics = [message_topic(spec.name), *(topic_name(spec.name, table) for table in spec.tables)]
        self._schemas: Schemas = SchemaRegistry(spec.kafka.registry)
        self._parsed: dict[int, Any] = {}

    def __call__(self, epoch: int) -> int | None:
        """Return the highest position that was ever to be confirmed; 0 when nothing of the epoch was delivered."""
        try:
            return self._highest(epoch)
        except (_errors.TopicAuthorizationFailedError, SchemaUnknown, SchemaUnfit) as error:
            log.warning("slot_not_compared", reason=redact(str(error) or type(error).__name__))
            return None

    def _highest(self, epoch: int) -> int | None:
        with self._consumer() as consumer:
            partitions = [
                _kafka.TopicPartition(topic, number)
                for topic in self._topics
                for number in sorted(consumer.partitions_for_topic(topic) or ())
            ]
            beginnings, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
            if any(beginnings[one] == ends[one] > 0 for one in partitions if one.topic == self._topics[0]):
                return None  # a heartbeat comes every second: the connector was away for longer than records are kept
            wanted = {one: max(beginnings[one], ends[one] - LAST_RECORDS) for one in partitions}
            wanted = {one: start for one, start in wanted.items() if start < ends[one]}
            return max(
                (
                    confirmable(self._source_of(record.value))
                    for record in self._records(consumer, wanted, ends)
                    if record.value is not None and _epoch_of(record.headers) == epoch
                ),
                default=0,
            )

    def _records(self, consumer: Any, starts: dict[Any, int], ends: dict[Any, int]) -> Generator[Any]:
        """Yield the records from these positions to the ends."""
        if not starts:
            return
        consumer.assign(list(starts))
        for partition, start in starts.items():
            consumer.seek(partition, start)
        left = set(starts)
        for _ in range(POLLS_MOST):
            for records in consumer.poll(timeout_ms=POLL_MS).values():
                yield from records
            left = {one for one in left if consumer.position(one) < ends[one]}
            if not left:
                return
        raise KafkaBusy(f"Kafka does not hand out the end of {len(left)} partitions.")

    def _source_of(self, value: bytes) -> dict[str, Any]:
        """Return the part of an event that tells where it comes from. Raises SchemaUnfit, Transient."""
        if len(value) < HEADER_BYTES or value[0]:
            raise SchemaUnfit("A record is not in the format of Confluent's registry.")
        (number,) = struct.unpack_from(">I", value, 1)
        if number not in self._parsed:
            self._parsed[number] = parse_schema(self._schemas.schema(number))
        event = _read(io.BytesIO(value[HEADER_BYTES:]), self._parsed[number], None)
        if not isinstance(event, dict) or "source" not in event:
            raise SchemaUnfit("A record is not an event of Debezium's.")
        return dict(cast("dict[str, Any]", event)["source"])

    @contextmanager
    def _consumer(self) -> Generator[Any]:
        options = settings.resolved(settings.kafka_python(self._kafka))
        try:
            consumer = _kafka.KafkaConsumer(
                **options,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                allow_auto_create_topics=False,
                check_crcs=False,
            )
            try:
                yield consumer
            finally:
                consumer.close()
        except _errors.TopicAuthorizationFailedError:
            raise
        except _errors.KafkaError as error:
            raise KafkaBusy(f"Kafka does not answer: {redact(str(error) or type(error).__name__)}.") from error


def confirmable(source: dict[str, Any]) -> int:
    """Return what Debezium confirms when Kafka has acknowledged the event with this `source`. Pure."""
    commit = json.loads(source.get("sequence") or "[null]")[0]
    return int(source["lsn"] if commit is None else commit)


def _epoch_of(headers: Sequence[tuple[str, bytes]]) -> int | None:
    found = dict(headers).get(EPOCH_HEADER, b"")
    return int(found) if found.isdigit() else None
