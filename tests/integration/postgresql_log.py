"""A PostgreSQL log as the Debezium Engine tells it, for tests of what is in it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict

from delta_debezium.engine import EmbeddedCapture
from delta_sync.sources.postgresql.codec import CONNECTOR_OPTIONS

START_TIMEOUT_S = 60.0
EVENTS_TIMEOUT_S = 60.0


class PostgresLog:
    """Events of one database, from the start on. `mark` and `until` bracket what a test did."""

    def __init__(self, url: str, capture: EmbeddedCapture) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.execute("SET synchronous_commit = local")  # a mark is to be seen whatever commits wait for
        self._connection.execute("CREATE TABLE IF NOT EXISTS public.log_mark (id int PRIMARY KEY)")
        self._capture = capture
        self._marks = 0

    def events(self) -> list[dict[str, Any]]:
        """Return the events of all that has been committed since the last call."""
        self._marks += 1
        self._connection.execute("INSERT INTO public.log_mark VALUES (%s)", [self._marks])
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + EVENTS_TIMEOUT_S
        while time.monotonic() < deadline:
            batch = self._capture.poll(1.0)
            if batch is None:
                continue
            self._capture.confirm(batch)
            for event in orjson.loads(batch.payload):
                if event["source"]["table"] != "log_mark":
                    found.append(event)
                elif event["after"]["id"] == self._marks:
                    return found
        raise AssertionError(f"the log did not bring mark {self._marks} within {EVENTS_TIMEOUT_S:.0f} s")

    def close(self) -> None:
        self._connection.close()


@contextmanager
def postgres_log(url: str, folder: Path, options: Mapping[str, str]) -> Iterator[PostgresLog]:
    """Run the engine on all tables of a database. `options` are added to those that the codec rests on."""
    parts = conninfo_to_dict(url)
    name = f"log_{parts['dbname']}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'CREATE PUBLICATION "{name}" FOR ALL TABLES')
    properties = {
        "name": name,
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "topic.prefix": name,
        "database.hostname": str(parts["host"]),
        "database.port": str(parts["port"]),
        "database.user": str(parts["user"]),
        "database.password": str(parts["password"]),
        "database.dbname": str(parts["dbname"]),
        "plugin.name": "pgoutput",
        "publication.name": name,
        "publication.autocreate.mode": "disabled",
        "slot.name": name,
        "snapshot.mode": "no_data",
        "skipped.operations": "none",
        "tombstones.on.delete": "false",
        "extended.headers.enabled": "false",
        "errors.max.retries": "0",
        "poll.interval.ms": "10",
        "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
        "converter.schemas.enable": "false",
        **CONNECTOR_OPTIONS,
        **options,
    }
    capture = EmbeddedCapture(lambda: properties, folder / "engine.log")
    capture.start()
    try:
        _wait_for_slot(url, name)
        log = PostgresLog(url, capture)
        try:
            yield log
        finally:
            log.close()
    finally:
        capture.stop()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [name]
            )


def _wait_for_slot(url: str, name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    query = "SELECT pg_sleep(0.05), (SELECT active FROM pg_replication_slots WHERE slot_name = %s)"
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < deadline:
            row = connection.execute(query, [name]).fetchone()
            if row is not None and row[1]:
                return
    raise AssertionError(f"the engine did not start streaming within {START_TIMEOUT_S:.0f} s")
