"""The same as `plain_consumer.py` on Quix Streams: its consumer, its checkpoints, a batching sink that writes to Redis.

    .cache/quix/bin/python benchmarks/quix_consumer.py BROKERS REGISTRY TOPIC GROUP REDIS_URL STATE_FOLDER

It runs in an environment of its own, because it wants a confluent-kafka that is older than ours (see README.md). Its
own deserialiser would read Avro with the same library; this one is what `plain_consumer.py` has. No versions.
"""

from __future__ import annotations

import sys
from typing import Any

import orjson
import redis
from plain_consumer import COLUMNS, Decoder
from quixstreams import Application  # type: ignore[import-not-found]  # of the other environment
from quixstreams.models.serializers import Deserializer  # type: ignore[import-not-found]  # ditto
from quixstreams.sinks import BatchingSink, SinkBatch  # type: ignore[import-not-found]  # ditto


class Envelope(Deserializer):  # type: ignore[misc]  # untyped here
    """Debezium's event, by its registered schema."""

    def __init__(self, registry: str) -> None:
        super().__init__()
        self._decode = Decoder(registry)

    def __call__(self, value: bytes, ctx: Any) -> Any:
        return self._decode(value)


class RedisDocuments(BatchingSink):  # type: ignore[misc]  # untyped here
    """One pipeline for each checkpoint and partition."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def setup(self) -> None:
        """Connect."""
        self._client = redis.Redis.from_url(self._url)

    def write(self, batch: SinkBatch) -> None:
        """Write what was collected since the last checkpoint."""
        pipeline = self._client.pipeline(transaction=False)
        for item in batch:
            name, document = item.value
            if document is None:
                pipeline.delete(name)
            else:
                pipeline.set(name, document)
        pipeline.execute()


def document_of(event: Any) -> tuple[str, bytes | None]:
    """Return a key of Redis and what to store there."""
    row = event["after"]
    if row is None:
        return f"movie:{event['before']['id']}", None
    return f"movie:{row['id']}", orjson.dumps({column: row[name] for name, column in COLUMNS.items()})


def main() -> None:
    """Consume until killed."""
    brokers, registry, topic, group, url, folder = sys.argv[1:]
    application = Application(
        broker_address=brokers,
        consumer_group=group,
        auto_offset_reset="earliest",
        auto_create_topics=False,
        use_changelog_topics=False,
        loglevel="WARNING",
        state_dir=folder,
    )
    source = application.topic(topic, value_deserializer=Envelope(registry), key_deserializer="bytes")
    application.dataframe(source).apply(document_of).sink(RedisDocuments(url))
    application.run()


if __name__ == "__main__":
    main()
