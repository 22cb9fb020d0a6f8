"""Kafka with three brokers, two sidecars, two workers: each is killed or frozen while a writer runs; all is there."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from acceptance.harness import PATIENCE_S, Run
from acceptance.kafka_harness import KafkaStage, child_of, kafka_stage
from delta_sync.kafka.names import topic_name
from delta_sync.testing.kafka import KafkaCluster, admin_client
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis

ROWS = 300
SESSION_S = 6  # so that a test need not wait long for a frozen worker's partitions
SEED = int(os.environ.get("DELTA_TEST_SEED", str(random.SystemRandom().randrange(1_000_000))))


@pytest.fixture
def stage(
    postgresql: PostgreSQL, redis_server: Redis, kafka_cluster: KafkaCluster, registry: Apicurio, tmp_path: Path
) -> Iterator[KafkaStage]:
    print(f"DELTA_TEST_SEED={SEED}")
    with kafka_stage(postgresql, redis_server, kafka_cluster, registry, tmp_path, ROWS, state_in_source=True) as made:
        file = made.pipeline.home / "pipeline.yaml"
        text = file.read_text()
        assert "kafka:\n" in text
        file.write_text(text.replace("kafka:\n", f"kafka:\n  session_timeout: {SESSION_S}s\n", 1))
        yield made


def wait_until_ready(run: Run, port: int, state: str) -> None:
    """Wait until a process says that it is ready, in this state."""

    def ready() -> bool:
        try:
            reply = requests.get(f"http://127.0.0.1:{port}/readyz", timeout=60)
        except requests.ConnectionError:  # it starts
            return False
        return (reply.status_code, reply.text.strip()) == (200, state)

    wait_until(ready, PATIENCE_S, f"{state}")


def leading(*sidecars: Run) -> tuple[Run, Run]:
    """Return the sidecar that leads, and the other."""
    wait_until(lambda: any(one.events("connector_started") for one in sidecars), PATIENCE_S, "a leader")
    first, second = sorted(sidecars, key=lambda one: not one.events("connector_started"))
    return first, second


@pytest.mark.long
def test_everything_dies_in_turn(stage: KafkaStage, kafka_cluster: KafkaCluster) -> None:
    ports = {}
    for _ in range(2):
        port = free_port()
        ports[stage.start("sidecar", "--port", str(port))] = port
    sidecars = tuple(ports)
    workers = stage.start("worker"), stage.start("worker")
    writer = stage.writing(ROWS, SEED)
    leader, standby = leading(*sidecars)
    assert not standby.events("connector_started")  # one of the two
    wait_until_ready(standby, ports[standby], "standby")
    stage.comes_through("at first", *sidecars, *workers)
    wait_until_ready(leader, ports[leader], "streaming")

    with admin_client(kafka_cluster.url) as admin:
        (topic,) = admin.describe_topics([topic_name(stage.pipeline.name, stage.pipeline.tables[0])])
    led_by = next(partition["leader_id"] for partition in topic["partitions"])
    nodes = sorted(kafka_cluster.nodes, key=lambda node: node.node_id != led_by)
    for node in nodes[:2]:  # the leader of a partition, and another one after it
        node.kill()
        took_s = stage.comes_through("without a broker", *sidecars, *workers)
        print(f"broker {node.node_id} killed: {took_s:.1f} s")
        kafka_cluster.start()

    child_of(leader, "io.debezium.server.Main").kill()
    print(f"connector killed: {stage.comes_through('after a connector was killed', *sidecars, *workers):.1f} s")

    leader.kill()
    print(f"leader killed: {stage.comes_through('after the leader was killed', standby, *workers):.1f} s")
    again = stage.start("sidecar")

    wait_until_ready(standby, ports[standby], "streaming")
    standby.freeze()  # it leads now; its connector goes on, and must not hold the slot
    print(f"leader frozen: {stage.comes_through('with a frozen leader', again, *workers):.1f} s")
    standby.thaw()

    workers[0].kill()
    third = stage.start("worker")
    stage.comes_through("after a worker was killed", again, workers[1], third)

    workers[1].freeze()
    wait_until(lambda: held_by_others(third), PATIENCE_S, "the partitions of a frozen worker")
    stage.comes_through("with a frozen worker", again, third)
    workers[1].thaw()

    writer.stop()
    stage.in_step(standby, again, workers[1], third)
    assert writer.transactions > 100
    assert stage.pipeline.dead_letters() == []
    rises = [rise for one in (leader, standby, again) for rise in one.events("epoch_rises")]
    assert rises == [], "the slot was moved by nobody but the connectors"
    for run in (third, workers[1], again, standby):
        assert run.stop() == 0, run.tail()


def held_by_others(worker: Run) -> bool:
    """Whether a worker has all partitions: four tables with six each."""
    assigned = worker.events("partitions_assigned")
    return bool(assigned) and assigned[-1]["of"] == 4 * 6


@pytest.mark.long
def test_the_leader_is_killed_in_the_first_load(stage: KafkaStage) -> None:
    sidecars = stage.start("sidecar"), stage.start("sidecar")
    worker = stage.start("worker")
    writer = stage.writing(ROWS, SEED)
    wait_until(lambda: bool(worker.events("load_started")), PATIENCE_S, "a load")
    leader, standby = leading(*sidecars)
    os.kill(child_of(leader, "io.debezium.server.Main").pid, signal.SIGSTOP)  # it will not see its parent go
    leader.kill()
    worker.kill()
    second = stage.start("worker")
    stage.comes_through("after leader and worker were killed", standby, second)
    writer.stop()
    stage.in_step(standby, second)
    assert stage.pipeline.dead_letters() == []
