"""A sink is rebuilt while rows change: readers never see it half-built, and there is a way back.

Kills are in it: of the pipeline while it fills the new generation, and of the command wherever it is.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import redis

from acceptance.harness import Actor, Run, Stage
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


class Writing(Actor):
    """Inserts, updates and deletes all the time."""

    def __init__(self, it: Stage) -> None:
        super().__init__("writer")
        self._source = it.source
        self.done: Counter[str] = Counter()

    def act(self) -> None:
        rng = random.Random(f"{SEED} writer")
        with self._source.connect() as connection:
            while not self.stopping.wait(0.03):
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
        newest: dict[tuple[str, str, int], int] = {}
        client: Any = redis.Redis
        with client.from_url(self._url) as client:
            while not self.stopping.wait(0.01):
                table, key = rng.choice(TABLES), rng.choice(QUIET)
                pointer = f"delta:g:{self._schema}.{table}:{{id}}"
                prefix = (client.get(pointer) or b"").decode()
                text = client.get(f"{prefix}{self._schema}.{table}:{key}")
                if text is None and (client.get(pointer) or b"").decode() != prefix:
                    continue  # it was dropped in between
                assert text is not None, f"{table} {key} is not there, with the prefix {prefix!r}"
                n = json.loads(text)["n"]
                # Generations are written by threads of their own, so they may differ by what is on its way.
                assert n >= newest.get((prefix, table, key), 0), (prefix, table, key, n)
                newest[prefix, table, key] = n
                self.seen[prefix] += 1


def row(it: Stage) -> Generations | None:
    with StateStore.open(load_spec(it.pipeline.home).state, it.pipeline.home) as state:
        return GenerationStore(state, it.pipeline.name).all().get("cache")


def command(it: Stage, *options: str) -> list[str]:
    return ["pipeline", "rebuild", it.pipeline.name, "--sink", "cache", *options]


def rebuild(it: Stage, *options: str) -> None:
    done = it.pipeline.deltactl(*command(it, *options))
    assert done.returncode == 0, done.stderr


def documents(it: Stage, prefix: str) -> dict[str, dict[int, int]]:
    """Return what a generation has, by table and key: asked of Redis itself."""
    client: Any = redis.Redis
    found: dict[str, dict[int, int]] = {}
    with client.from_url(it.stores.sinks["cache"].url) as client:
        for table in TABLES:
            names = list(client.scan_iter(f"{prefix}{it.source.schema}.{table}:*"))
            rows = [json.loads(text) for text in client.mget(names) if text is not None] if names else []
            found[table] = {row["id"]: row["n"] for row in rows}
    return found


def test_a_sink_is_rebuilt_while_rows_change_and_everybody_is_killed(stage: Callable[..., Stage]) -> None:
    print(f"seed {SEED}")
    it = stage(SETUP, TABLES, processor="return dict(row)", load={"chunk_rows": 20})
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, f"the load; {run.tail()}")
    with Writing(it) as writer, Reading(it) as reader:

        def seen(prefix: str) -> None:
            """Wait until somebody reads this generation."""
            before = reader.seen[prefix]
            wait_until(lambda: reader.seen[prefix] > before or not reader.is_alive(), PATIENCE_S, "a reader of it")

        # Whoever asks for it dies as soon as it has begun, and the pipeline with it.
        folder = it.pipeline.folder
        words = [sys.executable, "-m", "deltactl.main", *command(it), "--dir", str(folder / "pipelines")]
        asking = Run(words, folder / "rebuild.log", folder)
        wait_until(lambda: row(it) is not None or not asking.running, PATIENCE_S, "the beginning")
        asking.kill()
        assert row(it) == Generations("cache", 1, 2, "building", 2)
        run.kill()
        run = it.run()
        rebuild(it)
        assert row(it) == Generations("cache", 2, 1, "kept", 2)
        seen("g2:")

        # There and back: the old one had all changes, too.
        rebuild(it, "--back")
        seen("")
        # Forth again, by a command that is killed before it has led readers: the run that drops the old one does that.
        with StateStore.open(load_spec(it.pipeline.home).state, it.pipeline.home) as state:
            there = Generations("cache", 1, 2, "kept", 2)
            GenerationStore(state, it.pipeline.name).change(there, there.back())
        seen("")
        rebuild(it, "--drop-old", "--yes")
        wait_until(lambda: row(it) == Generations("cache", 2, None, "", 2), PATIENCE_S, f"the drop; {run.tail()}")
        assert not any(documents(it, "").values())
        seen("g2:")
        checked = it.pipeline.deltactl("pipeline", "check", it.pipeline.name)
        assert checked.returncode == 0, checked
    print(writer.done, reader.seen)
    assert writer.done

    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    table = f"{it.source.schema}.{TABLES[0]}"
    words = ["pipeline", "test", it.pipeline.name, "--table", table, "--keys", str(min(QUIET)), "--json"]
    tried = json.loads(it.pipeline.deltactl(*words).stdout)
    assert [(one["sink"], one["effect"]) for one in tried] == [("cache.2", "same")]
    with it.source.connect() as connection:
        for table, found in documents(it, "g2:").items():
            assert found == dict(connection.execute(f"SELECT id, n FROM {table}".encode()).fetchall())
    assert run.stop() == 0, run.tail()
    deleted = it.pipeline.deltactl("pipeline", "delete", it.pipeline.name, "--documents", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    client: Any = redis.Redis
    with client.from_url(it.stores.sinks["cache"].url) as client:
        left = [key for key in client.scan_iter() if it.source.schema.encode() in key]
        assert left == [], "neither documents, nor tombstones, nor pointers"
