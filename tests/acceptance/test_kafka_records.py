"""What may be in a topic, or with it: records that are none, large ones, more partitions, a new column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from acceptance.harness import PATIENCE_S, SHAPES
from acceptance.kafka_harness import KafkaStage, kafka_stage
from delta_sync.kafka.names import topic_name
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis

ROWS = 30
LARGE_BYTES = 10_000_000


@pytest.fixture
def stage(
    postgresql: PostgreSQL, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> Iterator[KafkaStage]:
    with kafka_stage(postgresql, redis_server, kafka, registry, tmp_path, ROWS) as made:
        yield made


def test_what_may_be_in_a_topic(stage: KafkaStage, kafka: Kafka) -> None:
    stage.pipeline.write_processor("return dict(row)")  # a column that is added must be in it
    sidecar, worker = stage.start("sidecar"), stage.start("worker")
    stage.comes_through("at first", sidecar, worker)
    table = stage.pipeline.tables[0]
    topic = topic_name(stage.pipeline.name, table)

    producer = KafkaProducer(bootstrap_servers=kafka.url, acks="all")
    for number, value in enumerate([b"", b"{}", b"\0\0\0\0", b"not Avro at all"]):
        producer.send(topic, value, key=str(number).encode(), headers=[("delta.epoch", b"1")]).get(60)
    producer.close()
    wait_until(lambda: len(stage.pipeline.dead_letters()) >= 4, PATIENCE_S, "dead letters")
    assert all(topic in letter["key"] for letter in stage.pipeline.dead_letters()), stage.pipeline.dead_letters()
    stage.comes_through("after records that are none", sidecar, worker)

    stage.shop.execute(
        f"UPDATE note SET rev = rev + 1, body = repeat('0123456789', {LARGE_BYTES // 10})"
        " WHERE id = (SELECT min(id) FROM note)"
    )
    stage.in_step(sidecar, worker)

    admin = KafkaAdminClient(bootstrap_servers=kafka.url)
    admin.create_partitions({topic: 12})
    admin.close()
    wait_until(
        lambda: any(event["of"] == 3 * 6 + 12 for event in worker.events("partitions_assigned")),
        PATIENCE_S,
        "more partitions",
    )
    with stage.shop.connect() as connection, connection.transaction():
        for number in range(ROWS, 3 * ROWS):
            stage.shop.insert(connection, SHAPES[0], number, "over more partitions")
    stage.in_step(sidecar, worker)

    stage.shop.execute("ALTER TABLE account ADD COLUMN added text DEFAULT 'new'", "UPDATE account SET rev = rev + 1")
    wait_until(
        lambda: any(event["reason"] == "its columns changed" for event in worker.events("load_started")),
        PATIENCE_S,
        "a load with the new column",
    )
    stage.in_step(sidecar, worker)
    assert len(stage.pipeline.dead_letters()) == 4
    assert worker.stop() == 0
    assert sidecar.stop() == 0
