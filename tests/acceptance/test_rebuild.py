"""A sink is rebuilt while rows change: readers never see it half-built, and there is a way back.

Kills are in it: of the pipeline while it fills the new generation, and of the command wherever it is.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import redis
from pymongo import MongoClient

from acceptance.harness import Actor, Run, Stage
from delta_sync.generations import Generations, GenerationStore
from delta_sync.spec import load_spec
from delta_sync.state import StateStore
from delta_sync.testing.processes import wait_until

SEED = random.SystemRandom().randrange(1_000_000)
PATIENCE_S = 300.0  # no test may depend on speed
REBUILD_TIMEOUT_S = 600.0  # it waits for a new run, a dump and a verification
WRITE_PAUSE_S, READ_PAUSE_S = 0.05, 0.05  # the machine has other things to do
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
            while not self.stopping.wait(WRITE_PAUSE_S):
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
    """Reads as the how-to page says. Each key is there, and never gets older within a generation.

    `seen` counts what was read, by what `serving` said.
    """

    def __init__(self, it: Stage, sink: str) -> None:
        super().__init__(f"reader of {sink}")
        self.seen: Counter[str] = Counter()
        self._sink = sink
        self._url = it.stores.sinks[sink].url
        self._schema = it.source.schema

    def act(self) -> None:
        with contextlib.ExitStack() as exits:
            self._read_all_the_time(*self.open(exits))

    def _read_all_the_time(self, serving: Callable[[str], str], read: Callable[[str, str, int], int | None]) -> None:
        rng = random.Random(f"{SEED} reader")
        newest: dict[tuple[str, str, int], int] = {}
        while not self.stopping.wait(READ_PAUSE_S):
            table, key = rng.choice(TABLES), rng.choice(QUIET)
            place = serving(table)
            n = read(place, table, key)
            if n is None and serving(table) != place:
                continue  # it was dropped in between
            assert n is not None, f"{table} {key} is not there, at {place!r}"
            # Generations are written by threads of their own, so they may differ by what is on its way.
            assert n >= newest.get((place, table, key), 0), (place, table, key, n)
            newest[place, table, key] = n
            self.seen[place.removeprefix(table)] += 1

    def open(self, exits: contextlib.ExitStack) -> tuple[Callable[[str], str], Callable[[str, str, int], int | None]]:
        """Return what tells where a table's documents are, and what reads one there."""
        if self._sink == "docs":
            database = exits.enter_context(MongoClient[dict[str, Any]](self._url)).get_default_database()

            def led_to(table: str) -> str:
                led = database["delta_serving"].find_one({"_id": table})
                return table if led is None else str(led["collection"])

            def find(place: str, table: str, key: int) -> int | None:
                document = database[place].find_one({"_id": key})
                return None if document is None else int(document["n"])

            return led_to, find
        if self._sink == "warehouse":
            connection = exits.enter_context(psycopg.connect(self._url))

            def shown(table: str) -> str:
                connection.rollback()
                connection.execute(f"LOCK TABLE {table} IN ACCESS SHARE MODE".encode())  # until it is read
                found = connection.execute("SELECT pg_get_viewdef(to_regclass(%s))", [table]).fetchone()
                assert found is not None
                return f"{table}.g2" if f"{table}__g2__delta" in found[0] else table

            def select(_place: str, table: str, key: int) -> int | None:
                query = f"SELECT n FROM {table} WHERE _delta_id = %s"
                found = connection.execute(query.encode(), [str(key)]).fetchone()
                connection.rollback()
                return None if found is None else int(found[0])

            return shown, select
        client: Any = exits.enter_context(contextlib.closing(redis.Redis.from_url(self._url)))

        def pointer(table: str) -> str:
            return (client.get(f"delta:g:{self._schema}.{table}:{{id}}") or b"").decode()

        def get(place: str, table: str, key: int) -> int | None:
            text = client.get(f"{place}{self._schema}.{table}:{key}")
            if text is None:
                return None
            document = json.loads(text)
            assert document.get("made") == (None if place else "as before"), "each generation has a function of its own"
            return int(document["n"])

        return pointer, get

    def wait_for(self, place: str) -> None:
        """Wait until somebody reads this generation."""
        before = self.seen[place]
        wait_until(lambda: self.seen[place] > before or not self.is_alive(), PATIENCE_S, f"a reader of {place!r}")


def let_the_first_generation_be_as_it_was(it: Stage) -> None:
    """Give the cache's first generation a function of its own: it is there before the sink is rebuilt."""
    with (it.pipeline.home / "processor.py").open("a") as file:
        for number, table in enumerate(it.pipeline.tables):
            file.write(f"\n\n@pipeline.table({table!r}, to=['cache.1'])\ndef before_{number}(row):\n")
            file.write("    return {**row, 'made': 'as before'}\n")


def row(it: Stage, sink: str = "cache") -> Generations | None:
    with StateStore.open(load_spec(it.pipeline.home).state, it.pipeline.home) as state:
        return GenerationStore(state, it.pipeline.name).all().get(sink)


def command(it: Stage, *options: str, sink: str = "cache") -> list[str]:
    return ["pipeline", "rebuild", it.pipeline.name, "--sink", sink, *options]


def rebuild(it: Stage, *options: str, sink: str = "cache") -> None:
    done = it.pipeline.deltactl(*command(it, *options, sink=sink), timeout_s=REBUILD_TIMEOUT_S)
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
    sinks = ("cache", "docs", "warehouse")
    it = stage(SETUP, TABLES, processor="return dict(row)", sinks=sinks, load={"chunk_rows": 20})
    let_the_first_generation_be_as_it_was(it)
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the load")
    with (
        Writing(it) as writer,
        Reading(it, "cache") as reader,
        Reading(it, "docs") as documents_reader,
        Reading(it, "warehouse") as rows_reader,
    ):
        # Whoever asks for it dies as soon as it has begun, and the pipeline with it.
        folder = it.pipeline.folder
        asking = Run([*command(it), "--dir", str(folder / "pipelines")], folder / "rebuild.log", folder)
        wait_until(lambda: row(it) is not None or not asking.running, PATIENCE_S, "the beginning")
        asking.kill()
        assert row(it) == Generations("cache", 1, 2, "building", 2)
        run.kill()
        run = it.run()
        rebuild(it)
        assert row(it) == Generations("cache", 2, 1, "kept", 2)
        reader.wait_for("g2:")

        # There and back: the old one had all changes, too.
        verified = it.pipeline.deltactl("verify", it.pipeline.name, "--json", timeout_s=REBUILD_TIMEOUT_S)
        assert verified.returncode == 0, verified.stdout
        rebuild(it, "--back")
        reader.wait_for("")
        # Forth again, by a command that is killed before it has led readers: the run that drops the old one does that.
        with StateStore.open(load_spec(it.pipeline.home).state, it.pipeline.home) as state:
            there = Generations("cache", 1, 2, "kept", 2)
            GenerationStore(state, it.pipeline.name).change(there, there.back())
        reader.wait_for("")
        rebuild(it, "--drop-old", "--yes")
        wait_until(lambda: row(it) == Generations("cache", 2, None, "", 2), PATIENCE_S, "the drop")
        assert not any(documents(it, "").values())
        reader.wait_for("g2:")
        checked = it.pipeline.deltactl("pipeline", "check", it.pipeline.name)
        assert checked.returncode == 0, checked

        # MongoDB: a collection beside the other, with the indexes that readers have.
        documents_reader.wait_for("")
        with MongoClient[dict[str, Any]](it.stores.sinks["docs"].url) as mongo:
            database = mongo.get_default_database()
            database[TABLES[0]].create_index("n", name="theirs")
            rebuild(it, sink="docs")
            documents_reader.wait_for(".g2")
            assert "theirs" in database[f"{TABLES[0]}.g2"].index_information()
            rebuild(it, "--drop-old", "--yes", sink="docs")
            alone = Generations("docs", 2, None, "", 2)
            wait_until(lambda: row(it, "docs") == alone, PATIENCE_S, "the drop")
            documents_reader.wait_for(".g2")
            assert set(database.list_collection_names()).isdisjoint(TABLES)

        # A SQL database: the view shows another table.
        rows_reader.wait_for("")
        words = [*command(it, sink="warehouse"), "--dir", str(folder / "pipelines")]
        asking = Run(words, folder / "warehouse.log", folder)
        wait_until(lambda: row(it, "warehouse") is not None or not asking.running, PATIENCE_S, "the beginning")
        with psycopg.connect(it.stores.sinks["warehouse"].url, autocommit=True) as warehouse:
            place = f"{TABLES[0]}__g2__delta"
            warehouse.execute(f"INSERT INTO {place} (_delta_id, _version) VALUES ('100000', {1 << 62})".encode())
            wait_until(lambda: not asking.running, REBUILD_TIMEOUT_S, "a verification that finds that")
            assert (asking.exit_status, row(it, "warehouse")) == (1, Generations("warehouse", 1, 2, "building", 2))
            rows_reader.wait_for("")
            warehouse.execute(f"DELETE FROM {place} WHERE _delta_id = '100000'".encode())
        assert rows_reader.seen[".g2"] == 0
        rebuild(it, sink="warehouse")
        rows_reader.wait_for(".g2")
    print(writer.done, reader.seen, documents_reader.seen, rows_reader.seen)
    assert writer.done

    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    table = f"{it.source.schema}.{TABLES[0]}"
    words = ["pipeline", "test", it.pipeline.name, "--table", table, "--keys", str(min(QUIET)), "--json"]
    tried = json.loads(it.pipeline.deltactl(*words).stdout)
    assert sorted(one["sink"] for one in tried) == ["cache.2", "docs.2", "warehouse.1", "warehouse.2"]
    assert {one["effect"] for one in tried} == {"same"}
    for sink in it.stores.sinks.values():
        sink.number = 2
    it.in_step(run)
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
    with MongoClient[dict[str, Any]](it.stores.sinks["docs"].url) as mongo:
        database = mongo.get_default_database()
        assert [name for name in database.list_collection_names() if database[name].find_one() is not None] == []
    with psycopg.connect(it.stores.sinks["warehouse"].url) as connection:
        relations = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert connection.execute(relations).fetchall() == []
