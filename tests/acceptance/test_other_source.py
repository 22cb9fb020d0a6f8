"""A source that Delta has no client of: Debezium reads its rows by signal, and the place in a topic is the version.

No such database is to be had here, so Debezium's own connector for PostgreSQL is used as one would be that Delta does
not know: by its options alone.
"""

from __future__ import annotations

import contextlib
import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from acceptance.harness import PATIENCE_S, Actor, Run, Source
from acceptance.kafka_harness import KafkaPipeline, child_of
from delta_sync.changes import Write
from delta_sync.errors import SinkBusy, Transient
from delta_sync.kafka.signals import SignalBoard
from delta_sync.signals import Heard
from delta_sync.sinks import open_sinks, target_for
from delta_sync.sources.debezium.reader import TopicReader
from delta_sync.spec import load_spec
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis
from delta_sync.values import to_json
from delta_sync.versions import version_of

pytestmark = pytest.mark.long  # some minutes; its parts have unit tests

ROWS = 3000
CHUNK = 10  # rows: a dump has three hundred windows, so that there is time to disturb it
TABLES = {
    "item": "CREATE TABLE {schema}.item"
    " (id int PRIMARY KEY, note text, price numeric(12, 2), at timestamp, flag boolean)",
    "part": "CREATE TABLE {schema}.part (item int, name text, amount int NOT NULL, PRIMARY KEY (item, name))",
}


class OtherPipeline(KafkaPipeline):
    """A pipeline of tables that Debezium's connector alone knows."""

    def __init__(self, source: Source, folder: Path, cache: Redis, kafka: Kafka, registry: Apicurio) -> None:
        self.file = folder / "connector.yaml"
        super().__init__(
            source,
            folder,
            {"cache": cache.url},
            source.schema,
            list(TABLES),
            bootstrap_servers=kafka.url,
            registry=registry.url,
            source=["--source-connector", str(self.file)],
            load={"chunk_rows": CHUNK},
        )
        file = self.home / "pipeline.yaml"
        written = yaml.safe_load(file.read_text())
        written["kafka"]["session_timeout"] = "15s"  # or the partitions of a worker that was killed rest for 45 s
        written["source"]["heartbeat"] = "300ms"
        file.write_text(yaml.safe_dump(written, sort_keys=False))
        self.spec = load_spec(self.home)
        self.reader = TopicReader(self.spec)
        self.sink = open_sinks(self.spec)["cache"]

    def dump(self, *arguments: str) -> list[dict[str, Any]]:
        """Call `deltactl dump` and return what it says in JSON."""
        done = self.deltactl("dump", *arguments, "--json", timeout_s=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        return found if isinstance(found, list) else [found]

    def state_of(self, dump: int) -> str:
        """Return a dump's state."""
        (found,) = self.dump("show", self.name, str(dump))
        return str(found["state"])

    def differences(self) -> list[str]:
        """Compare every row with its document, and return a line for each that is not as it must be."""
        found: list[str] = []
        for table in self.reader.tables(self.tables).values():
            target = target_for(self.sink, table, self.spec)
            columns = ", ".join(column.name for column in table.columns)
            with self.shop.connect() as connection:
                cursor = connection.execute(f"SELECT {columns} FROM {table.id}")
                names = [column.name for column in cursor.description or ()]
                rows = {
                    tuple(row[names.index(part)] for part in table.key): dict(zip(names, row, strict=True))
                    for row in cursor
                }
            ids = {self.sink.id_of(target, key): key for key in rows}
            there = {id_: version for batch in self.sink.scan(target) for id_, version in batch}
            found += [f"{table.id} {id_}: no such row, version {there[id_]:#x}" for id_ in there.keys() - ids.keys()]
            found += [f"{table.id} {id_}: missing: {rows[ids[id_]]}" for id_ in ids.keys() - there.keys()]
            for key, stored in zip(rows, self.sink.read(target, list(rows)), strict=True):
                expected = json.loads(to_json(rows[key]))
                if stored is not None and stored.document is not None and stored.document != expected:
                    found.append(f"{table.id} {key}: {stored.document}, version {stored.version:#x}, not {expected}")
        return found

    def in_step(self, *runs: Run) -> None:
        """Wait until every table is loaded, and every row is in its place."""
        last: list[str] = []

        def right() -> bool:
            nonlocal last
            for run in runs:
                assert run.running, f"a process ended with status {run.exit_status}; {run.tail()}"
            try:
                last = self.differences() if self.loaded() else [f"loads {self.loads()}"]
            except (SinkBusy, Transient) as error:
                last = [str(error)]
            return not last

        try:
            wait_until(right, PATIENCE_S, "everything in its place")
        except Exception as error:
            tails = "; ".join(run.tail() for run in runs)
            raise AssertionError(f"{len(last)} differences: {last[:5]}; {tails}") from error

    def close(self) -> None:
        """Release connections."""
        self.reader.close()
        self.sink.close()


class Writing(Actor):
    """Changes random rows until it is stopped."""

    def __init__(self, source: Source, seed: int) -> None:
        super().__init__("writer")
        self._source = source
        self._random = random.Random(seed)
        self.transactions = 0

    def act(self) -> None:
        with self._source.connect() as connection:
            while not self.stopping.wait(0.02):
                with connection.transaction():
                    for _ in range(self._random.choice((1, 1, 5, 40))):
                        self._change(connection)
                self.transactions += 1

    def _change(self, connection: psycopg.Connection) -> None:
        number, text = self._random.randrange(ROWS + 200), f"{self.transactions} {self._random.random()}"
        schema = self._source.schema
        if self._random.random() < 0.2:
            connection.execute(f"DELETE FROM {schema}.item WHERE id = %s", [number])
            connection.execute(f"DELETE FROM {schema}.part WHERE item = %s", [number])
            return
        connection.execute(
            f"INSERT INTO {schema}.item VALUES (%s, %s, %s, now(), true)"
            " ON CONFLICT (id) DO UPDATE SET note = excluded.note, price = excluded.price, at = excluded.at",
            [number, text, self._random.randrange(100_000) / 100],
        )
        connection.execute(
            f"INSERT INTO {schema}.part VALUES (%s, 'a', 1)"
            " ON CONFLICT (item, name) DO UPDATE SET amount = part.amount + 1",
            [number],
        )


@pytest.fixture
def pipeline(
    postgresql: PostgreSQL, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> Iterator[OtherPipeline]:
    name = f"other_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    source = Source(postgresql.url_of(name), name)
    source.execute(
        f"CREATE SCHEMA {name}",
        *(statement.format(schema=name) for statement in TABLES.values()),
        f"CREATE TABLE {name}.signal (id varchar(64), type varchar(32), data varchar(2048))",
        f"INSERT INTO {name}.item SELECT n, 'note ' || n, n / 4.0, '2026-01-01', n % 2 = 0"
        f" FROM generate_series(1, {ROWS}) n",
        f"INSERT INTO {name}.part SELECT n, 'a', n FROM generate_series(1, {ROWS}) n",
    )
    password = tmp_path / "password"
    password.write_text("postgres\n")
    options = {
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "plugin.name": "pgoutput",
        "publication.autocreate.mode": "filtered",
        "publication.name": name,
        "slot.name": name,
        "database.hostname": "127.0.0.1",
        "database.port": postgresql.port,
        "database.user": "postgres",
        "database.password": f"${{file:{password}}}",
        "database.dbname": name,
        "signal.data.collection": f"{name}.signal",
    }
    (tmp_path / "connector.yaml").write_text(yaml.safe_dump(options))
    made = OtherPipeline(source, tmp_path, redis_server, kafka, registry)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def started(pipeline: OtherPipeline) -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as exits:
        yield exits


def start(pipeline: OtherPipeline, exits: contextlib.ExitStack, command: str) -> Run:
    run = pipeline.process(command)
    exits.callback(run.kill)
    return run


def said(board: SignalBoard) -> Heard:
    """Return what the connector has said about the snapshot that it is in the midst of."""
    board.read()
    running = board.connector.snapshot if board.connector is not None else None
    return board.heard[running] if running else Heard()


def ended(board: SignalBoard, dump: int) -> bool:
    """Tell whether the connector has read all of a dump. Call `said` before, which reads what it has said."""
    return any(f" {dump}." in id_ and heard.over for id_, heard in board.heard.items())


def dumps_with_a_pause(pipeline: OtherPipeline, board: SignalBoard, *options: str) -> list[int]:
    """Start dumps and pause the first one in its midst; return all of them, in the order in which they run.

    If Debezium had read everything of it before it was told to pause, this is done once more.
    """
    while True:
        dumps = sorted(found["id"] for found in pipeline.dump("start", pipeline.name, *options))
        first = dumps[0]
        wait_until(lambda: said(board).place is not None, PATIENCE_S, "the midst of a dump")
        pipeline.dump("pause", pipeline.name, str(first))
        wait_until(lambda: said(board).paused or ended(board, first), PATIENCE_S, "a pause")  # noqa: B023 -- called at once
        if not ended(board, first):
            return dumps
        pipeline.dump("resume", pipeline.name, str(first))
        for one in dumps:
            assert pipeline.dump("show", pipeline.name, str(one), "--wait")[0]["state"] == "done"


def test_rows_are_loaded_and_dumped_while_they_change_and_processes_die(
    pipeline: OtherPipeline, started: contextlib.ExitStack
) -> None:
    """Every row is compared at the end, and what has no row is gone."""
    name, (item, part) = pipeline.name, pipeline.tables
    board = SignalBoard(pipeline.spec)
    started.callback(board.close)
    writer = Writing(pipeline.shop, seed=4)
    writer.start()
    started.callback(writer.stop)
    sidecar, worker = (start(pipeline, started, command) for command in ("sidecar", "worker"))

    wait_until(lambda: said(board).place is not None, PATIENCE_S, "the midst of a load")
    worker.kill()
    child_of(sidecar, "io.debezium.server.Main").kill()
    worker = start(pipeline, started, "worker")
    wait_until(pipeline.loaded, PATIENCE_S, "the load")
    writer.stop()
    pipeline.in_step(sidecar, worker)

    checked = pipeline.deltactl("pipeline", "check", name)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "limit Rows are read by Debezium's incremental snapshots" in checked.stderr
    refused = pipeline.deltactl("verify", name)
    assert refused.returncode == 2
    assert "Delta has no client of its database" in refused.stderr

    # What nobody wrote to the source, and what only its removal can bring out of the store.
    table = pipeline.reader.tables([item])[item]
    stray = Write((-1,), version_of(1, 5), {"id": -1})
    pipeline.sink.apply(target_for(pipeline.sink, table, pipeline.spec), [stray])
    assert any(": no such row" in line for line in pipeline.differences())

    writer = Writing(pipeline.shop, seed=5)
    writer.start()
    started.callback(writer.stop)
    first, second = dumps_with_a_pause(pipeline, board)
    paused_ms = said(board).at_ms
    sidecar.kill()  # its Debezium Server ends with it; the next one reads on, and is paused again
    sidecar = start(pipeline, started, "sidecar")
    wait_until(lambda: said(board).paused and said(board).at_ms > paused_ms, PATIENCE_S, "another pause")
    assert [pipeline.state_of(one) for one in (first, second)] == ["paused", "running"]
    pipeline.dump("resume", name, str(first))
    for one in (first, second):
        assert pipeline.dump("show", name, str(one), "--wait")[0]["state"] == "done"

    (third,) = dumps_with_a_pause(pipeline, board, "--table", part)
    pipeline.dump("cancel", name, str(third))
    (some,) = pipeline.dump("start", name, "--table", item, "--keys", "1,2,3,999999", "--wait")
    assert some["state"] == "done"
    assert pipeline.state_of(third) == "cancelled"
    board.read()
    cancelled = board.heard[next(id_ for id_ in board.heard if f" {third}." in id_)]
    assert (cancelled.over, cancelled.status) == (True, None)  # it ended without having read the table
    writer.stop()
    assert some["rows"] <= 3
    (matching,) = pipeline.dump("start", name, "--table", part, "--where", "amount < 0", "--wait")
    assert (matching["state"], matching["rows"]) == ("done", 0)
    pipeline.in_step(sidecar, worker)
    assert not pipeline.dead_letters()

    wrong = pipeline.deltactl("dump", "start", name, "--table", part, "--where", "no such column", "--wait")
    assert wrong.returncode == 1
    assert "database refused" in wrong.stderr
    assert worker.stop() == sidecar.stop() == 0
