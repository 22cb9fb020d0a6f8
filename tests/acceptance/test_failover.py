"""The source fails over to a replica that lacks its last transactions, or is restored: everything goes on by itself.

Nothing is typed in between. At the end every row is compared, and documents of rows that the source lacks now are gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from acceptance.forwarder import Forwarder
from acceptance.harness import SHAPES, Pipeline, Scene, Shop
from acceptance.kafka_harness import KafkaStage, kafka_stage
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis

ROWS = 60
LOST = 1000  # and above: keys that only the transactions which are lost insert
TIMEOUT_S = 300.0


@pytest.fixture
def primary() -> Iterator[PostgreSQL]:
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def other() -> Iterator[PostgreSQL]:
    """Return the server that takes over; a test gives it its data, and starts it."""
    server = PostgreSQL()
    yield server
    server.close()


def write(shop: Shop, text: str, first: int = 0, new: int = 0) -> None:
    """Change every third row, delete some, and insert ten."""
    with shop.connect() as connection:
        for shape in SHAPES:
            with connection.transaction():
                for number in range(first, ROWS, 3):
                    shop.update(connection, shape, number, f"{text} {number} ", whole=number % 2 == 0)
                for number in range(first + 1, ROWS, 9):
                    shop.delete(connection, shape, number)
                for number in range(new, new + 10):
                    shop.delete(connection, shape, number)
                    shop.insert(connection, shape, number, text)


@pytest.mark.long
def test_on_kafka_a_replica_is_promoted(
    primary: PostgreSQL, other: PostgreSQL, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> None:
    with kafka_stage(primary, redis_server, kafka, registry, tmp_path, ROWS) as stage:
        sidecar, worker = stage.start("sidecar"), stage.start("worker")
        stage.comes_through("at first", sidecar, worker)
        other.copy(primary, standby=True)
        write(stage.shop, "lost", new=LOST)  # the replica is behind: it was asynchronous
        stage.in_step(sidecar, worker)

        primary.kill()
        other.port = primary.port  # as DNS has it now
        other.settings["primary_conninfo"] = ""  # where nobody is
        other.start()
        other.promote()
        write(stage.shop, "after the failover", first=1, new=ROWS)
        stage.in_step(sidecar, worker)
        (rise,) = sidecar.events("epoch_rises")
        assert "timeline 2, and was on 1" in rise["reason"]
        assert len(worker.events("run_begins_anew")) == 1

        sidecar.kill()
        wait_until(lambda: _released(stage), TIMEOUT_S, "the end of the connector")
        write(stage.shop, "never delivered", first=2, new=ROWS)
        stage.shop.execute(f"SELECT pg_replication_slot_advance('{stage.pipeline.slot}', pg_current_wal_flush_lsn())")
        sidecar = stage.start("sidecar")
        wait_until(lambda: bool(sidecar.events("epoch_rises")), TIMEOUT_S, "its notice")
        stage.in_step(sidecar, worker)
        (rise,) = sidecar.events("epoch_rises")
        assert "advanced by hand" in rise["reason"]
        assert stage.pipeline.dead_letters() == []


def _released(stage: KafkaStage) -> bool:
    with stage.shop.connect() as connection:
        query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
        return connection.execute(query, [stage.pipeline.slot]).fetchone() == (False,)


def test_embedded_a_backup_is_restored_beside_a_server_that_goes_on(
    primary: PostgreSQL, other: PostgreSQL, redis_server: Redis, tmp_path: Path
) -> None:
    """The harder failover: no connection breaks, so nothing but a look where the name leads to can tell."""
    with contextlib.ExitStack() as exits:
        name = "restored"
        Shop(primary.url_of("postgres"), "postgres").execute(f"CREATE DATABASE {name}")
        forwarder = exits.enter_context(Forwarder(primary.port))
        address = primary.url_of(name).replace(f":{primary.port}/", f":{forwarder.port}/")
        shop = Shop(address, name)
        shop.create(ROWS)
        it = Scene(shop, Pipeline(shop, tmp_path, {"cache": redis_server.url}, name), exits)
        run = it.run()
        it.in_step(run)
        other.copy(primary)
        write(shop, "lost", new=LOST)
        it.in_step(run)

        other.start()
        forwarder.target_port = other.port
        write(shop, "after the backup", first=1, new=ROWS)
        it.in_step(run)
        (rise,) = run.events("epoch_rises")
        assert "timeline 2, and was on 1" in rise["reason"]
        assert run.stop() == 0
        assert it.pipeline.dead_letters() == []
