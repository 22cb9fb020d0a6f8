"""A handler that writes events to a topic of Kafka, in the common form: what dead letters are, and what replays read.

A record's key is the table and the key as text, so a row's changes are in one partition, in their order. Its value is
the Delta event in Avro (`schemas/delta_schemas/delta_event.avsc`): with a registry in Confluent's wire format, under
the subject `<topic>-value`; without one in Avro's single-object encoding. The header `delta-id` is the idempotency
key.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Sequence
from typing import Any

from delta_sync import delta_event
from delta_sync.delta_event import encode_event
from delta_sync.errors import EventRefused, Transient, UsageError
from delta_sync.events import RowEvent
from delta_sync.kafka import settings
from delta_sync.kafka.registry import SchemaRegistry
from delta_sync.secrets import redact
from delta_sync.spec import KafkaSpec, RegistrySpec, SecuritySpec
from delta_sync.tables import key_text

DELIVERY_S = 30.0  # for a batch: a leader's election takes less; then the same events are sent again
NO_REGISTRY = "http://none"  # a specification has to have one


class Topic:
    """Writes events to a topic that is there; each is on all in-sync brokers before it counts as handled."""

    ends_by_itself = True  # its client has time-outs, after which it is called again

    def __init__(
        self,
        topic: str,
        *,
        bootstrap_servers: str,
        pipeline: str,
        registry: RegistrySpec | str | None = None,
        security: SecuritySpec | None = None,
        max_message_bytes: int = 16 << 20,
    ) -> None:
        """`pipeline` is what events name as their origin. Connects with the first event.

        Raises UsageError when kafka-python is not installed.
        """
        try:
            self._kafka: Any = importlib.import_module("kafka")
            self._errors: Any = importlib.import_module("kafka.errors")
        except ImportError as error:
            raise UsageError("A topic needs more; type: pip install 'delta-sync[kafka]'.") from error
        self._topic = topic
        self._pipeline = pipeline
        self._registry = RegistrySpec(url=registry) if isinstance(registry, str) else registry
        self._spec = KafkaSpec(
            bootstrap_servers=bootstrap_servers,
            registry=self._registry or RegistrySpec(url=NO_REGISTRY),
            security=security,
            max_message_bytes=max_message_bytes,
        )
        self._connecting = threading.Lock()
        self._producer: Any = None
        self._head: bytes | None = None

    def __call__(self, events: RowEvent | Sequence[RowEvent]) -> None:
        """Write one event, or several in their order. Raises Transient, or EventRefused."""
        batch = [events] if isinstance(events, RowEvent) else events
        try:
            records = [(self._key(event), self._value(event), event.id) for event in batch]
        except TypeError as error:
            raise EventRefused(f"An event cannot be written as Avro: {error}.") from error
        try:
            producer = self._connected()
            sent = [
                producer.send(
                    self._topic, key=key, value=value, headers=[("delta-id", id_.encode(errors="surrogatepass"))]
                )
                for key, value, id_ in records
            ]
            for one in sent:
                one.get(DELIVERY_S)
        except (self._errors.MessageSizeTooLargeError, self._errors.RecordListTooLargeError) as error:
            raise EventRefused(f"The topic {self._topic} takes no events of that size: {error}") from error
        except self._errors.KafkaError as error:
            raise Transient(f"The topic {self._topic} cannot be written: {redact(str(error))}") from error

    def close(self) -> None:
        """Close its connections."""
        with self._connecting:
            if self._producer is not None:
                self._producer.close(timeout=DELIVERY_S)
                self._producer = None

    def _key(self, event: RowEvent) -> bytes:
        return f"{event.table}/{key_text(event.key)}".encode(errors="surrogatepass")

    def _value(self, event: RowEvent) -> bytes:
        encoded = encode_event(event.delta_event(self._pipeline))
        head = self._header()
        return encoded if head is None else head + encoded[delta_event.HEADER_BYTES :]

    def _header(self) -> bytes | None:
        """Return what stands before a datum in Confluent's wire format; None without a registry."""
        if self._registry is None:
            return None
        with self._connecting:
            if self._head is None:
                client = SchemaRegistry(self._registry)
                try:
                    schema_id = client.register(f"{self._topic}-value", json.dumps(delta_event.SCHEMA))
                finally:
                    client.close()
                self._head = b"\0" + schema_id.to_bytes(4, "big")
            return self._head

    def _connected(self) -> Any:
        with self._connecting:
            if self._producer is None:
                options = settings.resolved(settings.kafka_python(self._spec)) | {
                    "acks": "all",
                    "enable_idempotence": True,  # so that the client's own repetitions change no order
                    "max_request_size": self._spec.max_message_bytes,
                    "delivery_timeout_ms": int(1000 * DELIVERY_S),
                }
                self._producer = self._kafka.KafkaProducer(**options)
            return self._producer
