"""`deltactl dump` by the real commands, on keys of every kind, while a writer runs and the pipeline is killed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from acceptance.harness import Actor, Run, Stage
from delta_sync.changes import Write
from delta_sync.dumps import ChunkCounts
from delta_sync.spec import load_spec
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.testing.processes import wait_until
from deltactl.dump import as_json

SEED = random.SystemRandom().randrange(1_000_000)
ROWS = 600
CHUNK_ROWS = 40
PATIENCE_S = 300.0  # no test may depend on speed
TABLES = ("sparse", "part", "place", "tagged", "event")
SETUP = f"""
CREATE TABLE sparse (id bigint PRIMARY KEY, n int, body text);  -- skewed: most keys are close together, some far away
INSERT INTO sparse SELECT CASE WHEN i % 50 = 0 THEN i * 1000000000::bigint ELSE i END, 0, 'b' || i
    FROM generate_series(1, {ROWS}) AS i;
CREATE TABLE part (id uuid PRIMARY KEY, n int, body text);
INSERT INTO part SELECT gen_random_uuid(), 0, 'b' || i FROM generate_series(1, {ROWS}) AS i;
CREATE TABLE place (region text, at timestamptz, n int, body text, PRIMARY KEY (region, at));
INSERT INTO place SELECT (ARRAY['a', 'B', 'é', 'sch:ön %', ''])[i % 5 + 1],
    timestamptz '2020-01-01' + i * interval '1 h', 0, 'b' || i FROM generate_series(1, {ROWS}) AS i;
CREATE TABLE tagged (code text COLLATE "C" NOT NULL, n int, body text);  -- its only key is a unique index
CREATE UNIQUE INDEX tagged_code ON tagged (code);
ALTER TABLE tagged REPLICA IDENTITY USING INDEX tagged_code;
INSERT INTO tagged SELECT 'Code ' || i, 0, 'b' || i FROM generate_series(1, {ROWS}) AS i;
CREATE TABLE event (id int, n int, body text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE event_low PARTITION OF event FOR VALUES FROM (0) TO (100);
CREATE TABLE event_high PARTITION OF event DEFAULT;
INSERT INTO event SELECT i, 0, 'b' || i FROM generate_series(1, {ROWS}) AS i;
"""


class Writing(Actor):
    """Updates and deletes all the time."""

    def __init__(self, it: Stage, rng: random.Random) -> None:
        super().__init__("writer")
        self._source = it.source
        self._random = rng

    def act(self) -> None:
        rng = self._random
        with self._source.connect() as connection:
            while not self.stopping.wait(0.01):
                table = rng.choice(TABLES)
                some = f"ctid = (SELECT ctid FROM {table} OFFSET {rng.randrange(ROWS // 2)} LIMIT 1)"
                if table == "event":
                    some = f"id = {rng.randrange(ROWS)}"
                if rng.random() < 0.1:
                    statement = f"DELETE FROM {table} WHERE {some}"
                else:
                    statement = f"UPDATE {table} SET n = n + 1, body = md5(random()::text) WHERE {some}"
                connection.execute(statement.encode())


def dump(it: Stage, *arguments: str) -> Any:
    """Run a command of `deltactl dump`; return what it prints."""
    done = it.pipeline.deltactl("dump", *arguments[:1], it.pipeline.name, *arguments[1:], "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shown(it: Stage, id_: int) -> dict[str, Any]:
    """Return what `dump show` prints, without starting the command."""
    with StateStore.open(load_spec(it.pipeline.home).state, it.pipeline.home) as state:
        dumps = DumpStore(state, it.pipeline.name)
        found = dumps.get(id_)
        assert found is not None
        return {**as_json(found), "under_way": dumps.counts().get(id_, ChunkCounts()).leased}


def until(it: Stage, run: Run, id_: int, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until a dump is so."""
    wait_until(lambda: what(shown(it, id_)), PATIENCE_S, f"dump {id_}")
    return shown(it, id_)


def damage(it: Stage, rng: random.Random) -> None:
    """Take documents away, change some, and put some there that have no row: in the store's own terms."""
    sink = it.stores.sinks["cache"]
    for table in TABLES:
        target = it.stores.target("cache", table)
        keys = list(it.source.rows_of(it.stores.tables[f"{it.source.schema}.{table}"]))
        for key in rng.sample(keys, 60):
            (stored,) = sink.read(target, [key])
            if stored is None or stored.document is None:
                continue
            if rng.random() < 0.5:
                sink.discard(target, [(key, stored.version)])
            else:
                sink.apply(target, [Write(key, stored.version, {**stored.document, "body": "damaged"})])
        sink.apply(target, [Write(_other(keys[0], number), 7, {"made": "up"}) for number in range(3)])


def _other(key: Sequence[Any], number: int) -> tuple[Any, ...]:
    """Return a key like this one that no row has."""
    first = key[0]
    if isinstance(first, int):
        return (-1 - number, *key[1:])
    if isinstance(first, str):
        return (f"none {number}", *key[1:])
    return (type(first)(int=number), *key[1:])


def test_dumps_bring_every_row_whatever_is_killed_paused_or_damaged(stage: Callable[..., Stage]) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    it = stage(SETUP, TABLES, load={"chunk_rows": CHUNK_ROWS, "parallel": 2})
    run = it.run()
    with Writing(it, rng):
        for _ in range(2):  # in the midst of the load, so that another goes on
            rows = rng.randrange(ROWS * len(TABLES) // 2)
            wait_until(
                lambda rows=rows: sum(load.rows for load in it.pipeline.loads().values()) >= rows,  # type: ignore[misc]  # a default binds it now
                PATIENCE_S,
                "some rows",
            )
            run.kill()
            run = it.run()
        wait_until(it.pipeline.loaded, PATIENCE_S, "the load")
        loads = [one for one in dump(it, "list", "--all") if one["kind"] == "load" and one["state"] == "done"]
        assert sorted(one["table"].rpartition(".")[2] for one in loads) == sorted(TABLES)

        # Everything at once: slowly, paused, killed, resumed, at full speed.
        damage(it, rng)
        started = dump(it, "start", "--rows-per-second", "5", "--parallel", "1")
        assert len(started) == len(TABLES)
        first = started[0]["id"]
        until(it, run, first, lambda one: one["rows"] > 0)
        assert dump(it, "pause", str(first))["state"] == "paused"
        paused = until(it, run, first, lambda one: one["under_way"] == 0)
        assert paused["rows"] < ROWS / 2, "it was slow"
        run.kill()
        run = it.run()
        others = [one["id"] for one in started[1:]]
        for id_ in others:
            dump(it, "throttle", str(id_), "--unlimited")
        for id_ in others:
            until(it, run, id_, lambda one: one["state"] == "done")
        assert dump(it, "show", str(first))["rows"] == paused["rows"]
        dump(it, "throttle", str(first), "--unlimited")
        dump(it, "resume", str(first))
        done = until(it, run, first, lambda one: one["state"] == "done")
        assert done["rows"] >= ROWS / 2

    it.in_step(run)  # every row, and no other
    _some_rows(it, run)
    _cancelled(it, run)
    _held_up(it, run)
    it.in_step(run)
    assert run.stop() == 0


def _some_rows(it: Stage, run: Run) -> None:
    """By keys (two that are there, one that is not) and by a condition, into what was damaged."""
    sink = it.stores.sinks["cache"]
    target = it.stores.target("cache", "event")
    with it.source.connect() as connection:
        connection.execute("INSERT INTO event VALUES (7001, 0, 'x'), (7002, 0, 'x'), (7003, 0, 'other')")
    it.in_step(run)
    keys = [(7001,), (7002,), (7003,)]
    for key, stored in zip(keys, sink.read(target, keys), strict=True):
        assert stored is not None
        sink.discard(target, [(key, stored.version)])
    sink.apply(target, [Write((8000,), 7, {"made": "up"})])
    table = f"{it.source.schema}.event"
    (by_keys,) = dump(it, "start", "--table", table, "--keys", "7001,8000", "--wait")
    assert (by_keys["state"], by_keys["rows"], by_keys["estimate"]) == ("done", 2, 2)
    there = [one is not None and one.document is not None for one in sink.read(target, [*keys, (8000,)])]
    assert there == [True, False, False, False]
    (by_condition,) = dump(it, "start", "--table", table, "--where", "id > 7000 AND body LIKE 'x%' -- these", "--wait")
    assert (by_condition["state"], by_condition["rows"]) == ("done", 2)
    there = [one is not None and one.document is not None for one in sink.read(target, keys)]
    assert there == [True, True, False]
    refused = it.pipeline.deltactl("dump", "start", it.pipeline.name, "--table", table, "--where", "nothing = 1")
    assert refused.returncode == 2
    assert "nothing" in refused.stderr
    dump(it, "start", "--table", table, "--keys", "7003", "--wait")


def _cancelled(it: Stage, run: Run) -> None:
    (started,) = dump(it, "start", "--table", f"{it.source.schema}.part", "--rows-per-second", "1")
    until(it, run, started["id"], lambda one: one["rows"] > 0)
    assert dump(it, "cancel", str(started["id"]))["state"] == "cancelled"
    assert it.pipeline.deltactl("dump", "resume", it.pipeline.name, str(started["id"])).returncode == 2


def _held_up(it: Stage, run: Run) -> None:
    """A transaction that was there before the dump is waited for, told of, and not for ever."""
    table = f"{it.source.schema}.part"
    with psycopg.connect(it.source.url) as old:
        pid = old.info.backend_pid
        old.execute("SELECT pg_current_xact_id()")
        (started,) = dump(it, "start", "--table", table, "--timeout", "4")
        told = until(it, run, started["id"], lambda one: one["waits"] is not None)
        assert f"pid {pid}" in told["waits"]
        failed = until(it, run, started["id"], lambda one: one["state"] != "running")
        assert failed["state"] == "failed"
        assert f"pid {pid}" in failed["waits"]
