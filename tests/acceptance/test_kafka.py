"""A pipeline on Kafka, from the commands to the sinks: sidecars, Debezium Server, Avro, workers in a group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from acceptance.harness import SHAPES, Shop
from acceptance.kafka_harness import KafkaStage, kafka_stage
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis

ROWS = 300


@pytest.fixture
def stage(
    postgresql: PostgreSQL, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> Iterator[KafkaStage]:
    with kafka_stage(postgresql, redis_server, kafka, registry, tmp_path, ROWS) as made:
        yield made


def write(shop: Shop, text: str) -> None:
    """Some of every kind of change."""
    with shop.connect() as connection:
        for shape in SHAPES:
            with connection.transaction():
                for number in range(0, ROWS, 3):
                    shop.update(connection, shape, number, f"{text} {number}", whole=number % 2 == 0)
                for number in range(1, ROWS, 9):
                    shop.delete(connection, shape, number)
                for number in range(ROWS, ROWS + 20):
                    shop.delete(connection, shape, number)
                    shop.insert(connection, shape, number, text)


def test_a_pipeline_on_kafka_loads_and_follows(stage: KafkaStage) -> None:
    sidecar, worker = stage.start("sidecar"), stage.start("worker")
    stage.in_step(sidecar, worker)
    write(stage.shop, "while one worker runs")
    stage.in_step(sidecar, worker)
    second = stage.start("worker")
    wait_until(lambda: bool(second.events("partitions_assigned")), 60.0, f"partitions for the second; {second.tail()}")
    write(stage.shop, "while two run")
    stage.in_step(sidecar, worker, second)
    status = json.loads(stage.pipeline.deltactl("status", stage.pipeline.name, "--json").stdout)
    assert status["state"] == "streaming", status
    assert [member["state"] for member in status["members"]] == ["leading", "streaming", "streaming"]
    assert all(member["partitions"] for member in status["members"][1:])
    worker.kill()
    write(stage.shop, "after one was killed")
    stage.in_step(sidecar, second)
    assert second.stop() == 0
    assert sidecar.stop() == 0
    assert stage.pipeline.dead_letters() == []
