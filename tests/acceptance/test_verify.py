"""`deltactl verify` while a pipeline runs and rows change: it reports what was damaged, nothing else, and mends it.

`DELTA_VERIFY_TIMES` is how often it looks, under load, at what nobody has damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psycopg
import pymongo
import pytest
import redis
import requests

from acceptance.harness import PATIENCE_S, SHAPES, Actor, Scene, Shape, Shop, metrics
from delta_sync.changes import Write
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.tables import key_text
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.versions import MAX_POSITION, version_of
from deltactl.app import INTERRUPTED

SEED = random.SystemRandom().randrange(1_000_000)
ROWS = 200
QUIET = range(60)  # keys (as numbers) that no writer touches: what is damaged there stays as it is until it is mended
BUSY = range(60, 220)
HOT = range(60, 64)  # of these; so that some rows have just changed whenever they are looked at
TIMES_UNDER_LOAD = int(os.environ.get("DELTA_VERIFY_TIMES", "1"))
WRITER_PAUSE_S = 0.03  # the machine has other things to do
SINKS = ("cache", "docs", "search")
ACCOUNT, ITEM, PAGE, NOTE = SHAPES


class Damaged(NamedTuple):
    """What verify must say of a key."""

    sink: str
    table: str
    key: str
    kind: str


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def it(scene: Callable[..., Scene], port: int) -> Iterator[Scene]:
    """Yield a scene whose pipeline runs, with a writer at it."""
    print(f"seed {SEED}")
    it = scene(ROWS, SINKS, load={"chunk_rows": 50})
    run = it.run("--port", str(port))
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    yield it
    assert run.running, run.tail()
    it.in_step(run)  # by the harness's own comparison
    assert run.stop() == 0, run.tail()


class Writing(Actor):
    """Changes busy keys all the time: insert, update, delete, give another key, in transactions of several changes."""

    def __init__(self, shop: Shop) -> None:
        super().__init__("writer")
        self.done: Counter[str] = Counter()
        self._shop = shop

    def act(self) -> None:
        rng = random.Random(f"{SEED} writer")
        with self._shop.connect() as connection:
            while not self.stopping.wait(WRITER_PAUSE_S):
                with contextlib.suppress(psycopg.errors.UniqueViolation), connection.transaction():
                    for _ in range(rng.choice((1, 1, 2, 5))):
                        self.done[change(self._shop, connection, rng)] += 1


def change(shop: Shop, connection: psycopg.Connection, rng: random.Random) -> str:
    shape, text = rng.choice(SHAPES), f"text {rng.random()} "
    number = rng.choice(HOT if rng.random() < 0.7 else BUSY)
    match rng.random():
        case chance if chance < 0.2:
            shop.delete(connection, shape, number)
            return "delete"
        case chance if chance < 0.25:
            shop.change_key(connection, shape, number, rng.choice(BUSY))
            return "key"
        case chance if chance < 0.7 and shop.update(connection, shape, number, text, whole=chance < 0.5):
            return "update"
        case _:
            shop.insert(connection, shape, number, text)
            return "insert"


def verify(it: Scene, *options: str) -> tuple[int, list[Damaged], dict[str, Any]]:
    """Return the exit status, what was found, and the numbers."""
    done: subprocess.CompletedProcess[str] = it.pipeline.deltactl("verify", it.pipeline.name, "--json", *options)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    found = [line["finding"] for line in lines if "finding" in line]
    summary = lines[-1]
    assert "equal" in summary, done.stderr
    summary["unverified"] = [line["unverified"] for line in lines if "unverified" in line]
    summary["notes"] = {one["key"]: one["note"] for one in found}
    damaged = [Damaged(one["sink"], one["table"].rpartition(".")[2], one["key"], one["kind"]) for one in found]
    return done.returncode, sorted(damaged), summary


def damage(it: Scene) -> list[Damaged]:
    """Damage quiet keys in every way that there is; return what verify must find."""
    stores = it.stores
    expected: list[Damaged] = []

    def note(sink: str, shape: Shape, number: int, kind: str) -> None:
        expected.append(Damaged(sink, shape.name, key_text(shape.key(number)), kind))

    for sink in SINKS:
        store = stores.sinks[sink]
        for shape in stores.shapes(sink):
            target = stores.target(sink, shape)
            keys = [shape.key(number) for number in QUIET]
            found = store.read(target, keys)
            versions = [one.version for one in found if one is not None]
            documents = [dict(one.document or {}) for one in found if one is not None]
            assert len(versions) == len(keys)
            # 0, 1: taken away without a trace; 2: another value, the version as it was
            store.discard(target, [(keys[0], versions[0]), (keys[1], versions[1])])
            store.apply(target, [Write(keys[2], versions[2], {**documents[2], "rev": -1})])
            # 3: a field more; 4: the right document, with a version that outranks whatever comes
            store.apply(target, [Write(keys[3], versions[3], {**documents[3], "more": 1})])
            beyond = version_of(1, MAX_POSITION - 5)
            store.apply(target, [Write(keys[4], beyond, documents[4])])
            # 5: deleted, with such a version; 1000: a document without a row; 1001: such a one that outranks
            store.apply(target, [Write(keys[5], beyond, None)])
            store.apply(
                target, [Write(shape.key(1000), 7, {"made": "up"}), Write(shape.key(1001), beyond, {"made": "up"})]
            )
            for number, kind in (
                (0, "missing"), (1, "missing"), (2, "different"), (3, "different"), (4, "version"), (5, "missing"),
                (1000, "extra"), (1001, "extra"),
            ):  # fmt: skip
                note(sink, shape, number, kind)
    expected += wipe_versions(it)
    return sorted(expected)


def wipe_versions(it: Scene) -> list[Damaged]:
    """Take away the version of the account 6, as each store's own tools would."""
    stores, key = it.stores, ACCOUNT.key(6)
    cache = stores.sinks["cache"]
    name = cache.id_of(stores.target("cache", ACCOUNT), key)
    client: Any = redis.Redis
    with client.from_url(cache.url) as client:
        text = client.get(name)
        assert isinstance(text, bytes)
        client.set(name, re.sub(rb'"_version":"\d+",', b"", text))
    docs = stores.sinks["docs"]
    database, _, collection = stores.target("docs", ACCOUNT).place.partition(".")
    with pymongo.MongoClient[dict[str, Any]](docs.url) as mongo:
        done = mongo[database][collection].update_one({"_id": 6}, {"$unset": {VERSION_FIELD: 1}})
        assert done.modified_count == 1
    search = stores.sinks["search"]
    alias = stores.target("search", ACCOUNT).place
    (stored,) = search.read(stores.target("search", ACCOUNT), [key])
    assert stored is not None
    base = search.url.partition("/delta")[0].rstrip("/")
    requests.put(f"{base}/{alias}-1/_doc/6", json=stored.document, timeout=30).raise_for_status()
    return [
        Damaged("cache", "account", "6", "missing"),  # what has no version is not Delta's
        Damaged("docs", "account", "6", "version"),
        Damaged("search", "account", "6", "version"),
    ]


def go_round(it: Scene) -> None:
    """Verify without end, until each row was looked at twice; then end it."""
    run = it.pipeline.background("verify", it.pipeline.name, "--continuous", "--load-share", "1", "--json")

    def rounds() -> list[dict[str, Any]]:
        assert run.running, run.tail()
        whole = [line for line in run.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        lines = [json.loads(line) for line in whole if line.startswith("{")]  # others say for what it waits
        return [line for line in lines if "oldest_s" in line]

    try:
        wait_until(lambda: len(rounds()) >= 2, PATIENCE_S, "two rounds")
        for one in rounds():
            assert sum(one[kind] for kind in ("missing", "different", "extra", "version")) == 0, one
            assert one["pipeline_runs"]
            assert one["rows"] >= len(SHAPES) * len(QUIET)
            assert one["oldest_s"] > 0, "all were looked at, none of them just now"
    finally:
        assert run.stop() == INTERRUPTED, run.tail()


def test_what_was_damaged_is_found_and_mended_while_rows_change(it: Scene, port: int) -> None:
    with Writing(it.shop) as writer:
        for _ in range(TIMES_UNDER_LOAD):
            status, found, numbers = verify(it)
            assert (status, found, numbers["failed"]) == (0, [], 0), numbers
            assert numbers["pipeline_runs"]
            assert numbers["rows"] >= len(SHAPES) * len(QUIET)
        expected = damage(it)
        status, found, numbers = verify(it, "--repair", "--yes")
        assert found == expected
        assert (status, numbers["repaired"], numbers["unverified"]) == (0, len(expected), []), numbers
        status, found, numbers = verify(it)
        assert (status, found) == (0, []), numbers
        go_round(it)
        print(writer.done)
        # Whoever verifies, the pipeline shows it: three times and two rounds at least, of which one found the damage.
        rows = 5 * len(SHAPES) * len(QUIET)

        def all_is_shown() -> bool:
            shown = metrics(port)
            repaired = shown.get("delta_verified_repaired_total", 0.0)
            return shown.get("delta_verified_rows_total", 0.0) >= rows and repaired >= len(expected)

        wait_until(all_is_shown, PATIENCE_S, "the numbers")
        measured = metrics(port)
        assert measured["delta_verified_differences_total"] == len(expected)
        assert measured["delta_verified_repaired_total"] == len(expected)
        assert measured["delta_verified_age_seconds"] > 0
    assert sum(writer.done.values()) > 100
