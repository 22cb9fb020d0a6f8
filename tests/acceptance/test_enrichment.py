"""Documents that are enriched by a real service in another process, in every mood that a service can be in.

No change is lost, a document never goes back to an older row, what a required look-up answers is always there, and what
an optional one left out is there in the end. What was cached and has changed is there once it is said so, by a command
or over HTTP; and what nobody says is there before it is too old.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from acceptance.harness import Actor, Run, Source, Stage, Stores
from acceptance.moody_service import MOODS, value_of
from delta_sync.testing.processes import ServerProcess, free_port, wait_until

SEED = random.SystemRandom().randrange(1_000_000)
ROWS = 300
PLACES = 7  # keys that a function of the row returns
CALLS = 10  # that the service gets in each mood before it changes
WRITER_PAUSE_S = 0.02
TIMEOUT_S = 300.0
TOKEN = "a token of notices"

SETUP = f"""
CREATE TABLE movie (id int PRIMARY KEY, rev int NOT NULL);
INSERT INTO movie SELECT i, 0 FROM generate_series(1, {ROWS}) i;
"""
PROCESSOR = """
from delta_sync import Pipeline, lookup

pipeline = Pipeline({name!r})
options = dict(batch=40, ttl="0s", timeout="5s", trip_after=3, pause="300ms", complete=True)
stars = pipeline.lookup(**options)(lookup.http("stars", "{url}/stars", key="id", timeout_s=3))
stock = pipeline.lookup(**options, required=False, deadline="250ms")(
    lookup.http("stock", "{url}/stock", key="id", timeout_s=3)
)
label = pipeline.lookup(ttl="1h")(lookup.http("label", "{url}/label", key="id"))
tag = pipeline.lookup(ttl="0s", refresh_after="{refresh_after}")(lookup.http("tag", "{url}/label", key="id"))
place = pipeline.lookup(ttl="1h", keys="kept")(lookup.http("place", "{url}/label", key="id"))


def place_of(row):
    return row["rev"] % {PLACES} + 1


asked = {{"star": stars.by("id"), "some": stock.by("id"), "name": label.by("id"), "tagged": tag.by("id")}}


@pipeline.table({table!r}, enrich={{**asked, "where": place.by(place_of)}})
def movie(row, star, some, name, tagged, where):
    stock = some["value"] if some else None
    document = {{"id": row["id"], "rev": row["rev"], "stars": star["value"], "stock": stock}}
    return {{**document, "label": name["value"], "tag": tagged["value"], "place": where["value"]}}
"""


class Service:
    """The service, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        script = str(Path(__file__).with_name("moody_service.py"))
        self.process = ServerProcess.start(
            [sys.executable, script, str(port), str(SEED)], log=folder / "service.log", cwd=folder
        )
        wait_until(self._answers, TIMEOUT_S, "the service's first answer")

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/mood", timeout=5).ok
        except requests.ConnectionError:
            return False

    def asked(self) -> int:
        """Return how often it was asked since its mood changed."""
        return int(requests.get(f"{self.url}/mood", timeout=30).json())

    def becomes(self, mood: str) -> None:
        requests.put(f"{self.url}/mood", data=json.dumps(mood), timeout=30).raise_for_status()

    def labels_are_shifted(self, by: int) -> None:
        requests.put(f"{self.url}/label", data=json.dumps(by), timeout=30).raise_for_status()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    yield made
    made.process.terminate(9, TIMEOUT_S)


class Writer(Actor):
    """Updates, deletes and inserts rows; `rev` rises with every change."""

    def __init__(self, source: Source) -> None:
        super().__init__("writer")
        self._source = source

    def act(self) -> None:
        rng = random.Random(f"{SEED} writer")
        rev = 0
        with self._source.connect() as connection:
            while not self.stopping.wait(WRITER_PAUSE_S):
                rev += 1
                change(connection, rng.randint(1, ROWS), rev, rng)


def change(connection: psycopg.Connection, id_: int, rev: int, rng: random.Random) -> None:
    if rng.random() < 0.1:
        connection.execute("DELETE FROM movie WHERE id = %s", [id_])
    else:
        change_to(connection, id_, rev)


def change_to(connection: psycopg.Connection, id_: int, rev: int) -> None:
    connection.execute("INSERT INTO movie VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET rev = %s", [id_, rev, rev])


class Reader(Actor):
    """Looks at documents all the time: none is without its stars, and none is older than one seen before."""

    def __init__(self, stores: Stores) -> None:
        super().__init__("reader")
        self._stores = stores
        self.seen: dict[int, int] = {}
        self.without_stock = 0

    def act(self) -> None:
        while not self.stopping.wait(0.05):
            for id_, document in documents(self._stores).items():
                rev = document["rev"]
                assert document["stars"] == value_of(id_), f"seed {SEED}: {document}"
                assert rev >= self.seen.get(id_, 0), f"seed {SEED}: {document} after {self.seen[id_]}"
                self.seen[id_] = rev
                self.without_stock += document["stock"] is None


def documents(stores: Stores) -> dict[int, dict[str, Any]]:
    """Return the documents that there are, by id."""
    keys = [(id_,) for id_ in range(1, ROWS + 1)]
    found = stores.sinks["cache"].read(stores.target("cache", "movie"), keys)
    return {id_: one.document for (id_,), one in zip(keys, found, strict=True) if one and one.document is not None}


def lookups(it: Stage) -> dict[str, Any]:
    status = json.loads(it.pipeline.deltactl("status", it.pipeline.name, "--json").stdout)
    found: dict[str, Any] = status["lookups"]
    return found


def write_processor(it: Stage, service: Service, refresh_after: str) -> None:
    text = PROCESSOR.format(
        name=it.pipeline.name,
        url=service.url,
        table=it.pipeline.tables[0],
        refresh_after=refresh_after,
        PLACES=PLACES,
    )
    (it.pipeline.home / "processor.py").write_text(text)


def test_whatever_the_service_does(
    stage: Callable[..., Stage], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {SEED}")
    it = stage(SETUP, ["movie"])
    write_processor(it, service, "1d")
    monkeypatch.setenv("NOTICE_TOKEN", TOKEN)
    specification = it.pipeline.home / "pipeline.yaml"
    specification.write_text(specification.read_text() + "notices: {token: '${env:NOTICE_TOKEN}'}\n")
    port = free_port()
    run = it.run("--port", str(port))
    wait_until(it.pipeline.loaded, TIMEOUT_S, "the first load")
    with Writer(it.source), Reader(it.new_stores()) as reader:
        for mood in MOODS:
            service.becomes(mood)
            # Down, an open breaker lets a call through every now and then.
            wait_until(lambda: service.asked() >= CALLS, TIMEOUT_S, f"calls while it is {mood}")
        wait_until(lambda: reader.without_stock > 0, TIMEOUT_S, "documents without what is optional")
        service.becomes("well")
        wait_until(lambda: service.asked() >= CALLS, TIMEOUT_S, "calls after that")
    mended(it, run)
    assert it.pipeline.dead_letters() == []
    told = lookups(it)
    assert told["stars"]["left"] == 0
    assert told["stock"]["left"] > 0
    assert min(told[name]["calls"]["busy"] for name in ("stars", "stock")) > 0
    assert run.events("lookup_left")
    assert run.events("lookup_mends")
    refreshed_by_what_is_kept(it, service, run)
    refreshed(it, service, run)
    told_over_http(it, service, run, port)


def place_of(rev: int) -> int:
    """Return by which key `place` is asked, as the processor does."""
    return rev % PLACES + 1


def refreshed_by_what_is_kept(it: Stage, service: Service, run: Run) -> None:
    """No column has the key by which `place` was asked: those rows are found that used it last, and no others."""
    with it.source.connect() as connection:
        revs: dict[int, int] = dict(connection.execute("SELECT id, rev FROM movie").fetchall())
    key = place_of(revs[min(revs)])
    service.labels_are_shifted(500)
    refresh = ("refresh", it.pipeline.name, "--lookup", "place", "--keys", f"{key},nowhere", "--wait", "--json")
    done = it.pipeline.deltactl(*refresh)
    assert done.returncode == 0, done.stderr
    users = [id_ for id_, rev in revs.items() if place_of(rev) == key]
    (rows,) = json.loads(done.stdout)["rows"].values()
    assert rows >= len(users), f"seed {SEED}; {run.tail()}"  # a note of a row that is gone may be left over
    found = documents(it.stores)
    wanted = {id_: value_of(place_of(rev)) + 500 * (id_ in users) for id_, rev in revs.items()}
    assert {id_: one["place"] for id_, one in found.items()} == wanted, f"seed {SEED}; {run.tail()}"
    service.labels_are_shifted(0)
    assert it.pipeline.deltactl(*refresh).returncode == 0
    assert {documents(it.stores)[id_]["place"] for id_ in users} == {value_of(key)}


def refreshed(it: Stage, service: Service, run: Run) -> None:
    """What the service says changes: nothing happens, until it is said so of some keys; these have it for good."""
    with it.source.connect() as connection:
        ids: list[int] = [id_ for (id_,) in connection.execute("SELECT id FROM movie ORDER BY id LIMIT 3")]
    first, second, _ = ids

    def shifts() -> list[int]:
        found = documents(it.stores)
        return [found[id_]["label"] - value_of(id_) for id_ in ids]

    service.labels_are_shifted(1000)
    refresh = ("refresh", it.pipeline.name, "--lookup", "label", "--keys", f"{first},{second},0")
    dry = it.pipeline.deltactl(*refresh, "--dry-run", "--json")
    assert json.loads(dry.stdout)["rows"] == {it.pipeline.tables[0]: 2}, dry.stderr
    assert shifts() == [0, 0, 0]
    done = it.pipeline.deltactl(*refresh, "--wait")
    assert done.returncode == 0, done.stderr
    assert shifts() == [1000, 1000, 0], f"seed {SEED}; {run.tail()}"
    with it.source.connect() as connection:
        change_to(connection, first, 1_000_000)
    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    assert documents(it.stores)[first]["rev"] == 1_000_000
    assert shifts() == [1000, 1000, 0], "a change of the log gets what was cached before"


def told_over_http(it: Stage, service: Service, run: Run, port: int) -> None:
    """A notice that was taken is heeded, though the process is killed at once; what is none is refused.

    Then, what nobody says is found out: no answer of `tag` grows older than its `refresh_after`, over restarts.
    """
    notices = f"http://127.0.0.1:{port}/notices"
    last = documents(it.stores)[ROWS - 1] if ROWS - 1 in documents(it.stores) else documents(it.stores)[ROWS]
    id_: int = last["id"]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    service.labels_are_shifted(2000)
    assert requests.post(notices, json={"lookup": "label", "keys": [id_]}, timeout=30).status_code == 401
    wrong = requests.post(notices, json={"lookup": "label", "keys": ["x"]}, headers=headers, timeout=30)
    assert (wrong.status_code, "'x' is no value of" in wrong.json()["error"]) == (400, True)
    taken = requests.post(notices, json={"lookup": "label", "keys": [id_]}, headers=headers, timeout=30)
    assert taken.status_code == 202, taken.text
    assert documents(it.stores)[id_]["label"] == last["label"], "it takes seconds to be heeded"
    run.kill()
    write_processor(it, service, "4s")
    for shift in (2000, 3000):
        service.labels_are_shifted(shift)
        run = it.run()

        def follows(by: int = shift) -> bool:
            found = documents(it.stores)
            heeded = found[id_]["label"] in (value_of(id_) + 2000, value_of(id_) + 3000)  # a round asks for it, too
            return heeded and all(one["tag"] == value_of(other) + by for other, one in found.items())

        wait_until(follows, TIMEOUT_S, "the answers that nobody told of")
        ages = json.loads(it.pipeline.deltactl("status", it.pipeline.name, "--json").stdout)["enrichment_ages_s"]
        assert list(ages) == [it.pipeline.tables[0]], ages
        assert run.stop() == 0


def mended(it: Stage, run: Run) -> None:
    """Wait until every document equals its row and both answers; there is one for each row, and no other."""
    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    with it.source.connect() as connection:
        rows: dict[int, int] = dict(connection.execute("SELECT id, rev FROM movie").fetchall())
    same = ("stars", "stock", "label", "tag")
    wanted = {
        id_: {"id": id_, "rev": rev, "place": value_of(place_of(rev)), **dict.fromkeys(same, value_of(id_))}
        for id_, rev in rows.items()
    }
    found: dict[int, Any] = {}

    def equal() -> bool:
        found.clear()
        found.update(documents(it.stores))
        return found == wanted

    try:
        wait_until(equal, TIMEOUT_S, "the last enrichments")
    except BaseException:
        differing = {
            id_: (wanted.get(id_), found.get(id_)) for id_ in {*wanted, *found} if wanted.get(id_) != found.get(id_)
        }
        print(f"seed {SEED}: {dict(list(differing.items())[:5])}")
        raise
