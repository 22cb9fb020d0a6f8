"""The shop's pipeline on Kafka: sidecars and workers as processes, and what it means that all is in step."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg

from acceptance.harness import PATIENCE_S, SHAPES, Actor, Pipeline, Run, Shape, Shop, Source, Stores, metrics
from delta_sync.errors import Transient
from delta_sync.kafka import settings
from delta_sync.kafka.names import group_id, topic_name
from delta_sync.kafka.offsets import GroupOffsets
from delta_sync.kafka.progress import Barrier
from delta_sync.spec import load_spec
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL, Redis, Server

WRITER_PAUSE_S = 0.1  # the machine has other things to do
MARKS_FROM = 1_000_000  # keys that only `comes_through` writes


class KafkaPipeline(Pipeline):
    """A pipeline with `transport: kafka`, as `Pipeline` makes one and an editor changes it."""

    def __init__(
        self,
        shop: Source,
        folder: Path,
        sinks: Mapping[str, str],
        name: str,
        tables: Sequence[str] = (),
        *,
        bootstrap_servers: str,
        registry: str,
        **options: Any,
    ) -> None:
        create = ["--kafka", bootstrap_servers, "--registry", registry, "--allow-unsafe"]
        super().__init__(shop, folder, sinks, name, tables, create=create, **options)
        kafka = load_spec(self.home).kafka
        assert kafka is not None
        self.kafka = kafka
        topics = [topic_name(name, table) for table in self.tables]
        self.offsets = GroupOffsets(lambda: settings.kafka_python(self.kafka), group_id(name), topics)

    def process(self, command: str, *options: str, environment: Mapping[str, str] | None = None) -> Run:
        """Start `deltactl sidecar` or `deltactl worker`, with a log of its own."""
        self._started = getattr(self, "_started", 0) + 1
        log = self.folder / f"{self.name}-{command}-{self._started}.log"
        return Run(self._arguments(command, self.name, "--log-format", "json", *options), log, self.folder, environment)

    def wait_until_applied(self, lsn: int, runs: Sequence[Run]) -> None:
        """Wait until everything before a position is applied and committed, and every table is loaded."""
        barrier: Barrier | None = None

        def applied() -> bool:
            nonlocal barrier
            for run in runs:
                assert run.running, f"a process ended with status {run.exit_status}; {run.tail()}"
            try:
                if barrier is None:
                    if self.shop.confirmed_lsn(self.slot) < lsn:
                        return False
                    barrier = Barrier(lsn, self.offsets.ends())
                return barrier.is_passed(self.offsets.committed()) and self.loaded()
            except Transient:
                return False

        wait_until(applied, PATIENCE_S, "applying what was written")


class Writing(Actor):
    """Changes random rows until it is stopped; when the source is away, it tries again."""

    def __init__(self, shop: Shop, rows: int, seed: int, pause_s: float) -> None:
        super().__init__("writer")
        self._pause_s = pause_s
        self.transactions = 0
        self._shop = shop
        self._rows = rows
        self._random = random.Random(seed)

    def act(self) -> None:
        while not self.stopping.is_set():
            try:
                with self._shop.connect() as connection:
                    while not self.stopping.wait(self._pause_s):
                        self._write(connection)
            except psycopg.OperationalError:
                self.stopping.wait(0.2)

    def _write(self, connection: psycopg.Connection) -> None:
        with connection.transaction():
            for _ in range(self._random.choice((1, 1, 3, 30))):
                shape, number = self._random.choice(SHAPES), self._random.randrange(self._rows)
                text = f"{self.transactions} "
                if self._random.random() < 0.2:
                    self._shop.delete(connection, shape, number)
                elif not self._shop.update(connection, shape, number, text, whole=self._random.random() < 0.5):
                    self._shop.insert(connection, shape, number, text)
        self.transactions += 1


class KafkaStage:
    """A shop, its pipeline on Kafka, and the processes that a test starts."""

    def __init__(self, shop: Shop, pipeline: KafkaPipeline, exits: contextlib.ExitStack) -> None:
        self.shop = shop
        self.pipeline = pipeline
        self._exits = exits
        self._marks = itertools.count(MARKS_FROM)
        self.stores = Stores(pipeline)
        exits.callback(self.stores.close)

    def start(self, command: str, *options: str, environment: Mapping[str, str] | None = None) -> Run:
        """Start a sidecar or a worker, which ends with the test."""
        run = self.pipeline.process(command, *options, environment=environment)
        self._exits.callback(run.kill)
        return run

    def writing(self, rows: int, seed: int, pause_s: float = WRITER_PAUSE_S) -> Writing:
        """Start a writer, which ends with the test."""
        writer = Writing(self.shop, rows, seed, pause_s)
        writer.start()
        self._exits.callback(writer.stop)
        return writer

    def comes_through(self, what: str, *runs: Run) -> float:
        """Insert a row, wait until it is in every sink, and return how many seconds that took."""
        number, shape = next(self._marks), SHAPES[0]
        began = time.monotonic()
        with self.shop.connect() as connection, connection.transaction():
            self.shop.insert(connection, shape, number, "mark")

        def there() -> bool:
            for run in runs:
                assert run.running, f"a process ended with status {run.exit_status}; {run.tail()}"
            return all(self.stores.revision(sink, shape, number) is not None for sink in self.stores.sinks)

        wait_until(there, PATIENCE_S, f"a change that comes through {what}")
        return time.monotonic() - began

    def status(self) -> dict[str, Any]:
        """Return what `deltactl status` says."""
        said = self.pipeline.deltactl("status", self.pipeline.name, "--json")
        assert said.returncode == 0, said.stderr
        found: dict[str, Any] = json.loads(said.stdout)
        return found

    def insert_marks(self, count: int) -> Callable[[], int]:
        """Insert so many rows into each table, and return what tells how many of all are in every sink."""
        numbers = [next(self._marks) for _ in range(count)]
        with self.shop.connect() as connection:
            for shape in SHAPES:
                with connection.transaction():
                    for number in numbers:
                        self.shop.insert(connection, shape, number, "mark")

        def through() -> int:
            return sum(map(self._in_every_sink, SHAPES, itertools.repeat(numbers)))

        return through

    def _in_every_sink(self, shape: Shape, numbers: Sequence[int]) -> int:
        sinks = [sink for sink in self.stores.sinks if shape in self.stores.shapes(sink)]
        found = [self.stores.read(sink, shape, [shape.key(number) for number in numbers]) for sink in sinks]
        return sum(all(one is not None for one in stored) for stored in zip(*found, strict=True))

    def in_step(self, *runs: Run) -> None:
        """Wait until everything that was written is in the stores, and compare every row."""
        self.pipeline.wait_until_applied(self.shop.insert_lsn(), runs)
        differences = self.stores.differences()
        assert differences[:10] == [], f"{len(differences)} differ: {differences[:3]}"


@contextlib.contextmanager
def kafka_stage(
    postgresql: PostgreSQL,
    cache: Redis,
    brokers: Server,
    registry: Server,
    folder: Path,
    rows: int,
    *,
    sinks: Mapping[str, str] | None = None,
    registry_url: str | None = None,
    state_in_source: bool = False,
    **options: Any,
) -> Iterator[KafkaStage]:
    """Make a stage with so many rows in each of the shop's tables.

    `sinks` are there in place of the cache alone, and `registry_url` in place of the registry's own. With
    `state_in_source` the state store is in the shop's database: whoever is frozen in the midst of a write would keep
    SQLite's lock from all others.
    """
    name = f"shop_{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as exits:
        with psycopg.connect(postgresql.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        shop = Shop(postgresql.url_of(name), name)
        shop.create(rows)
        if state_in_source:
            password = folder / "state-password"
            password.write_text("postgres\n")
            options["state"] = shop.url.replace("postgres:postgres@", f"postgres:${{file:{password}}}@")
        pipeline = KafkaPipeline(
            shop,
            folder,
            {"cache": cache.url} if sinks is None else sinks,
            name,
            bootstrap_servers=brokers.url,
            registry=registry_url or registry.url,
            load={"chunk_rows": 100},
            **options,
        )
        yield KafkaStage(shop, pipeline, exits)


def dump_by_both(pipeline: KafkaPipeline, table: str, port_of_second: int) -> None:
    """Dump a table, again and again until the worker that does not plan has read some of it, if not at once.

    No changes may come meanwhile that it could write.
    """
    before = metrics(port_of_second)["delta_writes_total"]

    def second_wrote() -> bool:
        limit = ("--rows-per-second", "400")  # slowly, so that there is something left for it
        done = pipeline.deltactl("dump", "start", pipeline.name, "--table", table, *limit, "--wait")
        assert done.returncode == 0, done.stdout + done.stderr
        return metrics(port_of_second)["delta_writes_total"] > before

    wait_until(second_wrote, PATIENCE_S, "a chunk for the second worker")


def child_of(run: Run, name: str) -> psutil.Process:
    """Return the child process of a run whose command line holds `name`."""
    for child in psutil.Process(run.pid).children(recursive=True):
        if any(name in part for part in child.cmdline()):
            return child
    raise AssertionError(f"process {run.pid} has no child {name}; {run.tail()}")
