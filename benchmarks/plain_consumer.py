"""What one would write by hand: consume Avro, decode it whole, write JSON to Redis in one pipeline per poll.

    python benchmarks/plain_consumer.py kafka-python|confluent-kafka BROKERS REGISTRY TOPIC GROUP REDIS_URL

It stands beside Delta's worker in `kafka_worker.py`: the same records, the same documents, the same store; no versions.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Iterable
from typing import Any

import fastavro
import orjson
import redis
import requests

# By the names that the connector gives them in Avro.
COLUMNS = {"id": "id", "title": "title", "year": "year", "rating": "rating"} | {
    "studio_u005fid": "studio_id",
    "updated_u005fat": "updated_at",
}


class Decoder:
    """Confluent's wire format."""

    def __init__(self, registry: str) -> None:
        self._registry = registry
        self._schemas: dict[int, Any] = {}

    def __call__(self, data: bytes) -> Any:
        """Return a record."""
        number = int.from_bytes(data[1:5], "big")
        schema = self._schemas.get(number)
        if schema is None:
            reply = requests.get(f"{self._registry}/schemas/ids/{number}", timeout=10)
            schema = self._schemas[number] = fastavro.parse_schema(json.loads(reply.json()["schema"]))
        stream = io.BytesIO(data)
        stream.seek(5)
        return fastavro.schemaless_reader(stream, schema, None)


def write(client: Any, decode: Decoder, values: Iterable[bytes | None]) -> None:
    """Write the documents of some records."""
    pipeline = client.pipeline(transaction=False)
    for value in values:
        if value is None:
            continue
        event = decode(value)
        row = event["after"]
        if row is None:
            pipeline.delete(f"movie:{event['before']['id']}")
        else:
            pipeline.set(f"movie:{row['id']}", orjson.dumps({column: row[name] for name, column in COLUMNS.items()}))
    pipeline.execute()


def main() -> None:
    """Consume until killed."""
    kind, brokers, registry, topic, group, url = sys.argv[1:]
    client, decode = redis.Redis.from_url(url), Decoder(registry)
    if kind == "kafka-python":
        clients: Any = importlib.import_module("kafka")  # it has no types
        consumer = clients.KafkaConsumer(
            topic,
            bootstrap_servers=brokers,
            group_id=group,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            max_poll_records=5000,
        )
        while True:
            for records in consumer.poll(timeout_ms=200).values():
                write(client, decode, (record.value for record in records))
            consumer.commit_async()
    import confluent_kafka

    options = {"bootstrap.servers": brokers, "group.id": group, "auto.offset.reset": "earliest"}
    confluent = confluent_kafka.Consumer({**options, "enable.auto.commit": False})
    confluent.subscribe([topic])
    while True:
        messages = confluent.consume(5000, 0.2)
        if messages:
            write(client, decode, (message.value() for message in messages))
            confluent.commit(asynchronous=True)


if __name__ == "__main__":
    main()
