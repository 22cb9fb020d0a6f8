"""A sink is rebuilt while rows change: readers never see it half-built, and there is a way back.

Kills are in it: of the pipeline while it fills the new generation, and of the command wherever it is.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import redis

from acceptance.harness import Actor, Stage
from delta_sync.changes import Write
from delta_sync.generations import Generations, GenerationStore
from delta_sync.spec import load_spec
from delta_sync.state import StateStore
from delta_sync.testing.processes import wait_until

SEED = random.SystemRandom().randrange(1_000_000)
PATIENCE_S = 120.0  # no test may depend on speed
ROWS = 400
QUIET = range(1, 41)  # keys that are always there; whoever reads one must find it
TABLES = ("film", "actor")
SETUP = "".join(
    f"CREATE TABLE {table} (id int PRIMARY KEY, n bigint NOT NULL);"
    f"INSERT INTO {table} SELECT i, i FROM generate_series(1, {ROWS}) AS i;"
    for table in TABLES
)
# What the old generation has, and what the processor makes after it was changed: `v` tells them apart.
PROCESSOR = "return {**row, 'v': 1}"
CHANGED = "return {**row, 'v': 2}"


class Writing(Actor):
    """Inserts, updates and deletes all the time."""

    def __init__(self, it: Stage) -> None:
        super().__init__("writer")
        self._source = it.source
        self.done: Counter[str] = Counter()

    def act(self) -> None:
        rng = random.Random(f"{SEED} writer")
        with self._source.connect() as connection:
            while not self.stopping.wait(0.01):
                table, key = rng.choice(TABLES), rng.randrange(1, ROWS + 50)
                what = rng.choice(("insert", "update", "update", "delete")) if key not in QUIET else "update"
                statement = {
                    "insert": f"INSERT INTO {table} VALUES ({key}, {rng.randrange(1000)})",
                    "update": f"UPDATE {table} SET n = n + 1 WHERE id = {key}",
                    "delete": f"DELETE FROM {table} WHERE id = {key}",
                }[what]
                with contextlib.suppress(psycopg.errors.UniqueViolation):
                    connection.execute(statement.encode())
                    self.done[what] += 1


class Reading(Actor):
    """Reads as the how-to page says: the pointer, then the key. Each key is there, and never gets older."""

    def __init__(self, it: Stage) -> None:
        super().__init__("reader")
        self._url = it.stores.sinks["cache"].url
        self._schema = it.source.schema
        self.seen: Counter[str] = Counter()

    def act(self) -> None:
        rng = random.Random(f"{SEED} reader")
        newest: dict[tuple[str, int], int] = {}
        client: Any = redis.Redis
        with client.from_url(self._url) as client:
            while not self.stopping.wait(0.002):
                table, key = rng.choice(TABLES), rng.choice(QUIET)
                prefix = (client.get(f"delta:g:{self._schema}.{table}:{{id}}") or b"").decode()
                text = client.get(f"{prefix}{self._schema}.{table}:{key}")
                assert text is not None, f"{table} {key} is not there, with the prefix {prefix!r}"
                document = json.loads(text)
                assert document["n"] >= newest.get((table, key), 0) - self.slack(prefix), (table, key, document)
                newest[table, key] = max(newest.get((table, key), 0), document["n"])
                self.seen[prefix] += 1

    def slack(self, prefix: str) -> int:
        """Generations are written by threads of their own: right after a switch one may be behind by a batch."""
        del prefix
        return 50


def row(it: Stage) -> Generations | None:
    with StateStore.open(load_spec(it.pipeline.home).state, it.pipeline.home) as state:
        return GenerationStore(state, it.pipeline.name).all().get("cache")


def rebuild(it: Stage, *options: str) -> subprocess.CompletedProcess[str]:
    return it.pipeline.deltactl("pipeline", "rebuild", it.pipeline.name, "--sink", "cache", *options)


def test_a_sink_is_rebuilt_while_rows_change(stage: Callable[..., Stage]) -> None:
    print(f"seed {SEED}")
    it = stage(SETUP, TABLES, processor=PROCESSOR, load={"chunk_rows": 50})
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, f"the load; {run.tail()}")
    with Writing(it) as writer, Reading(it) as reader:
        planned = rebuild(it, "--dry-run")
        assert (planned.returncode, row(it)) == (0, None), planned.stderr
        done = rebuild(it)
        assert done.returncode == 0, done.stderr + run.tail()
        assert row(it) == Generations("cache", 2, 1, "kept", 2)
        seen = reader.seen["g2:"]
        wait_until(lambda: reader.seen["g2:"] > seen or not reader.is_alive(), PATIENCE_S, "a reader of the new one")
    assert sum(writer.done.values()) > 20
    print(writer.done, reader.seen, Write)
