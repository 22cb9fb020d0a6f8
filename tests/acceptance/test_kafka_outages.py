"""One stack with every kind of sink and its state in PostgreSQL: sinks, registry and state store go away and come back,
the connector freezes, workers come and go. A writer runs throughout; at the end of each test every row is compared.
"""

from __future__ import annotations

import datetime as dt
import os
import random
import select
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from acceptance.gate import Gate
from acceptance.harness import Run
from acceptance.kafka_harness import KafkaStage, child_of, kafka_stage
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import MongoStandIn, OpenSearch, PostgreSQL, Redis

ROWS = 60
PARTITIONS = 4 * 6  # of the shop's tables
HAPPENS_S = 240.0  # far above what anything here takes
SESSION_S = 6  # after so long, others have the partitions of a worker that was killed
RETRIES = 3  # with growing pauses, so that what was written meanwhile has been read
MARKS = 12  # rows in each table, so that each worker has some
PAUSE_S = 0.1  # of the writer: its rows go to three sinks
CONNECTOR = "io.debezium.server.Main"
SEED = int(os.environ.get("DELTA_TEST_SEED", str(random.SystemRandom().randrange(1_000_000))))

# So soon the connector looks its schemas up again, by default after 30 s.
SCHEMAS_AGE = "-Ddebezium.format.apicurio.registry.check-period-ms=500"

# Every process of the pipeline reads the processor first, so that is where a test can shorten what takes minutes.
SHORTER = """

import pathlib
import threading
import time

import delta_debezium.supervision
import delta_sync.applying
import delta_sync.sinks.mongodb_link
import delta_sync.sinks.redis_link
import delta_sync.sinks.search_link

delta_sync.applying.RETRY_MOST_S = 3.0  # of 15
delta_sync.sinks.mongodb_link.SERVER_SELECTION_TIMEOUT_MS = 2_000  # of 5
delta_sync.sinks.mongodb_link.CONNECT_TIMEOUT_MS = 2_000  # of 5
delta_sync.sinks.mongodb_link.SOCKET_TIMEOUT_MS = 3_000  # of 60
delta_sync.sinks.redis_link.CONNECT_TIMEOUT_S = delta_sync.sinks.redis_link.REPLY_TIMEOUT_S = 2.0  # of 5 and 15
delta_sync.sinks.search_link.CONNECT_TIMEOUT_S = 2.0  # of 5
delta_sync.sinks.search_link.READ_TIMEOUT_S = 3.0  # of 60


def watch():
    # Only while the test says so: on a machine that is busy a connector's start may take the whole minute.
    while True:
        impatient = pathlib.Path({impatient!r}).exists()
        delta_debezium.supervision.HANGS_AFTER_S = 10.0 if impatient else 60.0
        time.sleep(0.2)


threading.Thread(target=watch, daemon=True).start()
"""


class Scene:
    """The stage, with its processes and with gates before what goes away."""

    def __init__(self, stage: KafkaStage, gates: dict[str, Gate], slot_url: str, impatient: Path) -> None:
        self.stage = stage
        self.impatient = impatient  # while this file is there, a connector counts as hung after ten seconds
        self.gates = gates
        self.worker_port = free_port()
        self.leader = self.start("sidecar", "state of the leader")
        happens(lambda: bool(self.leader.events("leading")), "a leader")
        self.standby = self.start("sidecar", "state")
        self.worker = self.start("worker", "state", "--port", str(self.worker_port))
        self._slot_url = slot_url

    def start(self, command: str, state: str, *options: str) -> Run:
        """Start a process that reaches the state store through this gate."""
        environment = {"STATE_PORT": str(self.gates[state].port), "JAVA_TOOL_OPTIONS": SCHEMAS_AGE}
        return self.stage.start(command, *options, environment=environment)

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        return self.leader, self.standby, self.worker

    def sinks(self) -> dict[str, dict[str, Any]]:
        """Return what the worker says of each sink."""
        reply = requests.get(f"http://127.0.0.1:{self.worker_port}/status", timeout=HAPPENS_S)
        return dict(reply.json()["sinks"])

    def wait_for_retries(self) -> None:
        """Wait until the worker has tried each sink some times more, in vain."""
        retries = {name: sink["retries"] for name, sink in self.sinks().items()}
        happens(
            lambda: all(sink["retries"] >= retries[name] + RETRIES for name, sink in self.sinks().items()),
            "more attempts",
        )

    def slot_reader(self) -> int | None:
        """Return the process of PostgreSQL that sends the log to a connector; None while none reads it."""
        with psycopg.connect(self._slot_url, autocommit=True) as connection:
            query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
            row = connection.execute(query, [self.stage.pipeline.slot]).fetchone()
        assert row is not None
        return row[0] if row[0] is None else int(row[0])


class End(threading.Thread):
    """Takes down when a process ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(name=f"end of {pid}", daemon=True)
        self.at: dt.datetime | None = None
        self._descriptor = os.pidfd_open(pid)
        self.start()

    def run(self) -> None:
        select.select([self._descriptor], [], [])
        self.at = dt.datetime.now(dt.UTC)
        os.close(self._descriptor)


def happens(condition: Callable[[], bool], what: str) -> None:
    wait_until(condition, HAPPENS_S, what)


def when(event: dict[str, Any]) -> dt.datetime:
    return dt.datetime.fromisoformat(event["timestamp"])


@pytest.fixture(scope="module")
def scene(
    postgresql: PostgreSQL,
    redis_server: Redis,
    mongodb: MongoStandIn,
    opensearch: OpenSearch,
    kafka: Kafka,
    registry: Apicurio,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scene]:
    print(f"DELTA_TEST_SEED={SEED}")
    folder = tmp_path_factory.mktemp("outages")
    (folder / "state-password").write_text("postgres\n")
    password = f"${{file:{folder / 'state-password'}}}"
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE outages_state")
    ports = {
        "cache": redis_server.port,
        "docs": mongodb.port,
        "search": opensearch.port,
        "registry": registry.port,
        "state": postgresql.port,
        "state of the leader": postgresql.port,
    }
    gates = {name: Gate(port) for name, port in ports.items()}
    urls = {
        name: url.replace(str(ports[name]), str(gates[name].port))
        for name, url in {
            "cache": redis_server.url,
            "docs": f"{mongodb.url}outages",
            "search": opensearch.url,
            "registry": registry.url,
        }.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATE_PORT", str(postgresql.port))  # of commands, and of the test itself
        with kafka_stage(
            postgresql,
            redis_server,
            kafka,
            registry,
            folder,
            ROWS,
            sinks={name: urls[name] for name in ("cache", "docs", "search")},
            registry_url=urls["registry"],
            state=f"postgresql://postgres:{password}@127.0.0.1:${{env:STATE_PORT}}/outages_state",
        ) as stage:
            # Its ids that are documents are too much for MongoDB's stand-in, see conftest.py.
            stage.pipeline.leave_out("docs", "item")
            processor = stage.pipeline.home / "processor.py"
            specification = stage.pipeline.home / "pipeline.yaml"
            text = specification.read_text()
            assert "kafka:\n" in text
            specification.write_text(text.replace("kafka:\n", f"kafka:\n  session_timeout: {SESSION_S}s\n", 1))
            impatient = folder / "impatient"
            processor.write_text(processor.read_text() + SHORTER.format(impatient=str(impatient)))
            made = Scene(stage, gates, postgresql.url, impatient)
            stage.comes_through("at first", *made.runs)
            yield made
        for gate in gates.values():
            gate.end()


def check(scene: Scene, *runs: Run) -> None:
    """Everything that was written is in every sink, and nothing became a dead letter."""
    scene.stage.in_step(*runs)
    assert scene.stage.pipeline.dead_letters() == []


@pytest.mark.long
def test_sinks_and_registry_are_away(scene: Scene) -> None:
    stage, gates = scene.stage, scene.gates
    writer = stage.writing(ROWS, SEED, PAUSE_S)
    away = [gates[name] for name in ("cache", "docs", "search")]
    for gate in away:
        gate.silence()
    unwritten = stage.insert_marks(MARKS)
    happens(lambda: all(sink["state"] == "busy" for sink in scene.sinks().values()), "that all are busy")
    print({name: sink["reason"] for name, sink in scene.sinks().items()})
    for gate in away:
        gate.close()
    scene.wait_for_retries()
    scene.worker.kill()  # what it has read, and no sink has, must not be lost with it
    scene.worker = scene.start("worker", "state", "--port", str(scene.worker_port))
    for gate in away:
        gate.open()
    happens(lambda: unwritten() == 4 * MARKS, "what was read and not written")
    print(f"sinks were away: {stage.comes_through('when the sinks are back', *scene.runs):.1f} s")

    stage.pipeline.wait_until_applied(stage.shop.insert_lsn(), scene.runs)  # the connector knows all schemas
    gates["registry"].close()
    second = scene.start("worker", "state")  # it knows no schema yet, the first one knows all
    happens(lambda: bool(second.events("events_wait")), "a wait for schemas")
    through = stage.insert_marks(MARKS)
    happens(lambda: through() > 0, "changes of the worker that knows the schemas")
    # Now changes come whose schema nobody can register: the connector ends, and is started until it can go on.
    stage.shop.execute("ALTER TABLE account ADD COLUMN added text DEFAULT 'new'", "UPDATE account SET rev = rev + 1")
    happens(lambda: bool(scene.leader.events("connector_died")), "that they cannot be written")
    gates["registry"].open()
    happens(lambda: through() == 4 * MARKS, "the other's, too")
    loads = [scene.worker, second]  # whichever has the lease
    happens(
        lambda: any(load["reason"] == "its columns changed" for run in loads for load in run.events("load_started")),
        "a load with the new column",
    )
    stage.shop.execute("ALTER TABLE account DROP COLUMN added")  # the processor names its columns
    print(f"a schema was new meanwhile: {stage.comes_through('when the registry is back', *scene.runs, second):.1f} s")
    writer.stop()
    check(scene, *scene.runs, second)
    assert second.stop() == 0


@pytest.mark.long
def test_the_leader_is_cut_off_from_the_state_store(scene: Scene) -> None:
    """First the store is away for all, so that nobody may lead; then it is back for all but the one who led."""
    stage, gates = scene.stage, scene.gates
    starts = len(scene.leader.events("connector_started"))
    writer = stage.writing(ROWS, SEED + 1, PAUSE_S)
    connector = child_of(scene.leader, CONNECTOR)
    end = End(connector.pid)
    gates["state of the leader"].silence()
    gates["state"].close()
    happens(lambda: end.at is not None, "the end of the connector")
    happens(lambda: scene.slot_reader() is None, "the end of the slot's reader")
    gates["state"].open()
    took_s = stage.comes_through("when the other leads", *scene.runs)
    led, started = (when(scene.standby.events(name)[0]) for name in ("leading", "connector_started"))
    assert end.at is not None
    print(f"state store was away: {took_s:.1f} s; another led {(led - end.at).total_seconds():.1f} s after the end")
    assert end.at < led < started
    gates["state of the leader"].open()
    happens(lambda: bool(scene.leader.events("not_leading") or scene.leader.events("lease_lost")), "it")
    scene.leader, scene.standby = scene.standby, scene.leader
    writer.stop()
    check(scene, *scene.runs)
    assert len(scene.standby.events("connector_started")) == starts, "it did not start another one"


@pytest.mark.long
def test_the_connector_freezes(scene: Scene) -> None:
    """It holds the slot and answers nothing: that no heartbeat is confirmed is all that there is to see."""
    stage = scene.stage
    writer = stage.writing(ROWS, SEED + 2, PAUSE_S)
    before = len(scene.leader.events("connector_started"))
    os.kill(child_of(scene.leader, CONNECTOR).pid, signal.SIGSTOP)
    scene.impatient.touch()
    happens(lambda: bool(scene.leader.events("connector_killed")), "the end of the connector")
    scene.impatient.unlink()
    print(f"connector frozen and killed: {stage.comes_through('a frozen connector', *scene.runs):.1f} s")
    (killed,) = scene.leader.events("connector_killed")
    assert "No heartbeat was confirmed for 10 s" in killed["reason"]
    assert len(scene.leader.events("connector_started")) == before + 1
    writer.stop()
    check(scene, *scene.runs)


@pytest.mark.long
def test_workers_come_and_go(scene: Scene) -> None:
    stage = scene.stage
    rng = random.Random(SEED + 3)
    writer = stage.writing(ROWS, SEED + 3, PAUSE_S)
    there = [scene.worker]
    for number, change in enumerate(("join", "join", "leave", "join", "kill", "join", "leave", "leave")):
        if change == "join":
            there.append(scene.start("worker", "state"))
        else:
            gone = there.pop(rng.randrange(1, len(there)))  # of the first the tests before had its port
            if change == "leave":
                assert gone.stop() == 0, gone.tail()
            else:
                gone.kill()
        happens(lambda: held(there) >= PARTITIONS and holds_all(there), f"a group of {len(there)}")
        print(f"{change}: {stage.comes_through(f'change {number}', *there):.1f} s")
    writer.stop()
    check(scene, scene.leader, *there)


def held(workers: list[Run]) -> int:
    """Return how many partitions the workers have together, as far as they have logged it."""
    found = 0
    for worker in workers:
        events = [event for event in worker.events() if event["event"] in ("partitions_assigned", "partitions_revoked")]
        if events:
            last = events[-1]
            found += last["of"] if last["event"] == "partitions_assigned" else last["left"]
    return found


def holds_all(workers: list[Run]) -> bool:
    """Whether each has some."""
    return all(held([worker]) for worker in workers)
