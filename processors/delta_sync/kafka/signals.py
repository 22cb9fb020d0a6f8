"""The topics by which a connector is told to take snapshots, and says how far they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from io import BytesIO
from typing import Any

from fastavro import parse_schema
from kafka.errors import KafkaError

from delta_sync.errors import UndecodableChange
from delta_sync.kafka import settings
from delta_sync.kafka.avro import HEADER_BYTES, Schemas, bare, schemaless_reader
from delta_sync.kafka.by_offset import schema_id_of
from delta_sync.kafka.connector import ConnectorStore
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.kafka.last_records import LastRecord, TopicEnds
from delta_sync.kafka.names import notifications_topic, signals_topic, topic_name
from delta_sync.kafka.registry import SchemaRegistry
from delta_sync.logs import logger
from delta_sync.secrets import redact
from delta_sync.signals import Connector, Heard, Signal, connector_of, notification_of, sent_in
from delta_sync.spec import PipelineSpec

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_kafka: Any = import_module("kafka")

log = logger(__name__)

SEND_S = 10.0  # for the broker's answer, which takes milliseconds
READ_AT_ONCE = 10_000


class SignalBoard:
    """What a pipeline's connector was told, and what it has said. Used by one thread; methods raise Transient."""

    def __init__(self, spec: PipelineSpec) -> None:
        assert spec.kafka is not None, "such a source has transport: kafka"
        self._spec = spec
        self._kafka = spec.kafka
        self._ends = TopicEnds(spec.kafka)
        self._store = ConnectorStore(spec)
        self._schemas: Schemas = SchemaRegistry(spec.kafka.registry)
        self._parsed: dict[int, Any] = {}
        self._places: dict[str, int] = {}  # of the next record to read, by topic
        self.sent_ms: dict[str, dict[str, int]] = defaultdict(dict)  # by id and type
        self.heard: dict[str, Heard] = defaultdict(Heard)  # by id
        self.connector: Connector | None = None

    def close(self) -> None:
        """Release connections. Idempotent."""
        self._ends.close()
        self._store.close()

    def read(self) -> None:
        """Read what is new."""
        found = self._store.newest()
        self.connector = None if found is None else connector_of(found.offset, found.number, found.timestamp_ms)
        signals, notifications = signals_topic(self._spec.name), notifications_topic(self._spec.name)
        ends = self._ends.ends((signals, notifications))
        for id_, type_, at_ms in sent_in((one.value, one.timestamp_ms) for one in self._new(signals, ends)):
            self.sent_ms[id_][type_] = at_ms
        for record in self._new(notifications, ends):
            said = self._notification(record)
            if said is not None:
                self.heard[said.id] = self.heard[said.id].with_(said)

    def _new(self, topic: str, ends: dict[str, tuple[int, int]]) -> Sequence[LastRecord]:
        begin, end = ends.get(topic, (0, 0))
        start = max(begin, self._places.get(topic, 0))
        found: list[LastRecord] = []
        while start < end:
            stop = min(end, start + READ_AT_ONCE)
            found += self._ends.read(topic, start, stop)
            start = stop
        self._places[topic] = end
        return found

    def _notification(self, record: LastRecord) -> Any:
        if record.value is None:
            return None
        try:
            number = schema_id_of(record.value)
            if number not in self._parsed:
                self._parsed[number] = parse_schema(bare(self._schemas.schema(number)))
            value = schemaless_reader(BytesIO(record.value[HEADER_BYTES:]), self._parsed[number], None)
        except (UndecodableChange, ValueError, EOFError) as error:
            log.warning("notification_passed_over", offset=record.offset, reason=str(error))
            return None
        return notification_of(value, record.timestamp_ms)

    def send(self, *signals: Signal) -> None:
        """Send signals, in their order."""
        producer: Any = None
        try:
            producer = _kafka.KafkaProducer(**settings.resolved(settings.kafka_python(self._kafka)), acks="all")
            for one in signals:
                key = f"delta_{self._spec.name}".encode()  # the connector's topic.prefix: others are not for it
                sent = producer.send(signals_topic(self._spec.name), key=key, value=one.encoded(), partition=0)
                sent.get(timeout=SEND_S)
        except KafkaError as error:
            raise KafkaBusy(f"Kafka does not take a signal: {redact(str(error) or type(error).__name__)}.") from error
        finally:
            if producer is not None:
                producer.close()
        for one in signals:
            log.info("signal_sent", id=one.id, type=one.type)  # a condition may hold what is masked

    def end_of(self, table: str) -> int:
        """Return where a table's topic ends."""
        topic = topic_name(self._spec.name, table)
        return self._ends.ends([topic]).get(topic, (0, 0))[1]

    def place_at(self, table: str, timestamp_ms: int) -> int:
        """Return the place of the first record of a table's topic that was sent at that time or later, or its end."""
        return self._ends.place_at(topic_name(self._spec.name, table), timestamp_ms)
