"""A pipeline on Kafka, from the commands to the sinks: sidecars, Debezium Server, Avro, workers in a group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import TopicPartition

from acceptance.harness import PATIENCE_S, SHAPES, Run, Shop, metrics
from acceptance.kafka_harness import KafkaStage, dump_by_both, kafka_stage
from delta_sync.generations import Generations, GenerationStore
from delta_sync.kafka.names import topic_name
from delta_sync.kafka.topics import create_topics, delete_topics, wanted_topics
from delta_sync.spec import load_spec
from delta_sync.state import StateStore
from delta_sync.testing.kafka import Kafka, admin_client
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis

ROWS = 300
SESSION_S = 6  # so that a test need not wait long for a killed worker's partitions


@pytest.fixture
def stage(
    postgresql: PostgreSQL, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> Iterator[KafkaStage]:
    with kafka_stage(postgresql, redis_server, kafka, registry, tmp_path, ROWS, state_in_source=True) as made:
        file = made.pipeline.home / "pipeline.yaml"
        text = file.read_text()
        assert "kafka:\n" in text
        file.write_text(text.replace("kafka:\n", f"kafka:\n  session_timeout: {SESSION_S}s\n", 1))
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


def marked(worker: Run) -> set[str]:
    """Return the tables that a worker has had loaded again."""
    return {table for event in worker.events("tables_loaded_again") for table in event["tables"]}


def verify(stage: KafkaStage) -> None:
    """What a store has lost is found and mended while rows change; and nothing else is found."""
    account = SHAPES[0]
    target = stage.stores.target("cache", account)
    key = (ROWS + 5,)  # which the writer leaves alone
    (stored,) = stage.stores.read("cache", account, [key])
    assert stored is not None
    stage.stores.sinks["cache"].discard(target, [(key, stored.version)])
    writer = stage.writing(ROWS, 1)
    done = stage.pipeline.deltactl("verify", stage.pipeline.name, "--json", "--repair", "--yes")
    writer.stop()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(one["finding"]["key"], one["finding"]["kind"]) for one in lines if "finding" in one]
    assert (done.returncode, found) == (0, [(str(key[0]), "missing")]), done.stdout + done.stderr
    assert lines[-1]["pipeline_runs"]


def dump(stage: KafkaStage, port_of_second: int) -> None:
    """A dump brings back what a store has lost, and the worker that does not plan reads some of it, if not at once."""
    account = SHAPES[0]
    target = stage.stores.target("cache", account)
    keys = [(number,) for number in range(ROWS)]
    found = zip(keys, stage.stores.read("cache", account, keys), strict=True)
    there = [(key, stored.version) for key, stored in found if stored is not None and stored.document is not None]
    stage.stores.sinks["cache"].discard(target, there)
    dump_by_both(stage.pipeline, stage.pipeline.tables[0], port_of_second)


def make_anew(stage: KafkaStage, sidecar: Run) -> None:
    """Nobody reads while somebody deletes a topic and makes it again: Kafka deletes the group's positions with it."""
    write(stage.shop, "into a topic that goes")
    written = stage.shop.insert_lsn()
    wait_until(lambda: stage.shop.confirmed_lsn(stage.pipeline.slot) >= written, PATIENCE_S, "the log")
    table = stage.pipeline.tables[0]
    topic = topic_name(stage.pipeline.name, table)
    spec = load_spec(stage.pipeline.home)
    assert delete_topics(stage.pipeline.kafka, [topic]) == [topic]
    (wanted,) = [one for one in wanted_topics(spec) if one.name == topic]
    wait_until(
        lambda: create_topics(stage.pipeline.kafka, [wanted]) == [topic], PATIENCE_S, "the topic to be made again"
    )
    checked = stage.pipeline.deltactl("pipeline", "check", stage.pipeline.name, "--json")
    found = [problem["what"] for problem in json.loads(checked.stdout)["problems"] if topic in problem["where"]]
    assert any("deleted and made again" in what for what in found), checked.stdout + checked.stderr
    worker = stage.start("worker")
    wait_until(lambda: marked(worker) == {table}, PATIENCE_S, f"a mark of {table}")
    stage.in_step(sidecar, worker)
    assert stage.pipeline.loads()[table].reason == "its topic was made anew"
    wait_until(  # the load may be done before Kafka has taken the new positions
        lambda: [event["topics"] for event in worker.events("topic_made_anew")] == [[topic]],
        PATIENCE_S,
        "new positions",
    )
    write(stage.shop, "into the new topic")
    stage.in_step(sidecar, worker)
    assert worker.stop() == 0


def generations(stage: KafkaStage) -> Generations | None:
    with StateStore.open(load_spec(stage.pipeline.home).state, stage.pipeline.home) as state:
        return GenerationStore(state, stage.pipeline.name).all().get("cache")


def rebuild(stage: KafkaStage, *runs: Run, frozen: Run) -> None:
    """A sink is rebuilt while rows change, and dropped; one worker notices late, and another when all is over."""
    words = ["pipeline", "rebuild", stage.pipeline.name, "--sink", "cache"]
    writer = stage.writing(ROWS, 2)
    stage.comes_through("before", *runs, frozen)
    frozen.freeze()
    done = stage.pipeline.deltactl(*words, timeout_s=600)  # it waits for new runs, dumps and verifications
    assert done.returncode == 0, done.stdout + done.stderr
    assert generations(stage) == Generations("cache", 2, 1, "kept", 2)
    done = stage.pipeline.deltactl(*words, "--drop-old", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    # Only once no worker that is alive writes to it.
    wait_until(lambda: generations(stage) == Generations("cache", 2, None, "", 2), PATIENCE_S, "the drop")
    assert [one["sink"] for run in runs for one in run.events("generation_dropped")] == ["cache.1"]
    stage.stores.sinks["cache"].number = 2  # from here on this is what is compared
    frozen.thaw()
    stage.comes_through("after a frozen worker woke", *runs, frozen)
    writer.stop()
    stage.in_step(*runs, frozen)
    assert writer.transactions > 20


def test_a_pipeline_on_kafka_loads_and_follows(stage: KafkaStage, kafka: Kafka) -> None:
    sidecar, worker = stage.start("sidecar"), stage.start("worker")
    stage.in_step(sidecar, worker)
    write(stage.shop, "while one worker runs")
    stage.in_step(sidecar, worker)
    port = free_port()
    second = stage.start("worker", "--port", str(port))
    wait_until(lambda: bool(second.events("partitions_assigned")), PATIENCE_S, "partitions for the second")
    write(stage.shop, "while two run")
    stage.in_step(sidecar, worker, second)
    status = stage.status()
    assert status["state"] == "streaming", status
    assert [member["state"] for member in status["members"]] == 3 * ["streaming"]
    assert [member["leads"] for member in status["members"]] == [True, False, False]
    assert all(member["partitions"] for member in status["members"][1:])
    assert len(status["partitions"]) == 4 * 6
    assert worker.events("lease_taken")  # of the load
    dump(stage, port)
    stage.in_step(sidecar, worker, second)
    third = stage.start("worker")
    wait_until(lambda: bool(third.events("partitions_assigned")), PATIENCE_S, "partitions for the third")
    rebuild(stage, sidecar, worker, second, frozen=third)
    assert third.stop() == 0
    worker.kill()
    write(stage.shop, "after one was killed")
    stage.in_step(sidecar, second)
    verify(stage)
    stage.in_step(sidecar, second)
    assert second.stop() == 0

    # Nobody reads for longer than Kafka keeps what comes: of all tables but the last.
    write(stage.shop, "while no worker ran")
    *expiring, kept = stage.pipeline.tables
    topics = {topic_name(stage.pipeline.name, table) for table in expiring}
    written = stage.shop.insert_lsn()
    wait_until(lambda: stage.shop.confirmed_lsn(stage.pipeline.slot) >= written, PATIENCE_S, "the log")
    ends = stage.pipeline.offsets.ends()
    with admin_client(kafka.url) as admin:
        admin.delete_records({TopicPartition(*at): end for at, end in ends.items() if at.topic in topics})
    port = free_port()
    third = stage.start("worker", "--port", str(port))
    wait_until(lambda: marked(third) == set(expiring), PATIENCE_S, f"marks of {expiring}")
    stage.in_step(sidecar, third)
    loads = stage.pipeline.loads()
    assert {loads[table].reason for table in expiring} == {"positions expired"}
    assert loads[kept].reason == "first load"
    gaps = [place for event in third.events("positions_expired") for place in event["positions"]]
    assert {place.partition("[")[0] for place in gaps} == topics
    marks = len(third.events("tables_loaded_again"))
    write(stage.shop, "after that")
    stage.in_step(sidecar, third)
    assert len(third.events("tables_loaded_again")) == marks
    wait_until(lambda: metrics(port)["delta_partition_lag_records"] == 0, PATIENCE_S, "no lag")
    measured = metrics(port)
    assert measured["partitions"] == 4 * 6
    for kind in ("poll", "decode", "process", "apply", "commit"):
        assert measured[f"delta_stage_seconds_count {kind}"] > 0, measured
    assert measured["delta_latency_seconds_count"] == measured["delta_changes_total"] > 0
    assert measured["delta_positions_expired_total"] == len(gaps)
    assert third.stop() == 0

    make_anew(stage, sidecar)
    assert sidecar.stop() == 0
    assert stage.pipeline.dead_letters() == []
