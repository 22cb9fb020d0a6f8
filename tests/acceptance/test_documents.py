"""Documents of six related tables, while all of them change, workers are killed and dumps run.

At the end every document is the join of the source, made by a query of the test's own; and no reader ever saw a row in
a document with an older `rev` than in one shown before.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import redis

from acceptance.harness import Actor, Run, Stage
from delta_sync.dumps import Dump
from delta_sync.spec import load_spec
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL, Redis

SEED = random.SystemRandom().randrange(1_000_000)
PATIENCE_S = 300.0  # no test may depend on speed
STATUS_REPLIES = 2  # of the connector to the source, every 5 s: so much time for a wrong confirmation to get there
TABLES = ("studio", "person", "movie", "review", "genre", "movie_genre")
MOVIES, STUDIOS, PEOPLE, GENRES = 40, 5, 12, 6
SETUP = f"""
CREATE TABLE studio (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0, name text NOT NULL);
CREATE TABLE person (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0, name text NOT NULL);
CREATE TABLE genre (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0, name text NOT NULL);
CREATE TABLE movie (
    id int PRIMARY KEY, rev int NOT NULL DEFAULT 0, title text NOT NULL,
    studio_id int REFERENCES studio ON DELETE SET NULL);
CREATE TABLE review (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, rev int NOT NULL DEFAULT 0, stars numeric(3,1) NOT NULL,
    movie_id int NOT NULL REFERENCES movie ON DELETE CASCADE ON UPDATE CASCADE,
    author_id int REFERENCES person ON DELETE SET NULL);
CREATE TABLE movie_genre (
    movie_id int REFERENCES movie ON DELETE CASCADE ON UPDATE CASCADE, genre_id int REFERENCES genre ON DELETE CASCADE,
    PRIMARY KEY (movie_id, genre_id));
CREATE INDEX ON review (movie_id); CREATE INDEX ON review (author_id); CREATE INDEX ON movie (studio_id);
ALTER TABLE review REPLICA IDENTITY FULL;
INSERT INTO studio SELECT i, 0, 'studio ' || i FROM generate_series(1, {STUDIOS}) AS i;
INSERT INTO person SELECT i, 0, 'person ' || i FROM generate_series(1, {PEOPLE}) AS i;
INSERT INTO genre SELECT i, 0, 'genre ' || i FROM generate_series(1, {GENRES}) AS i;
INSERT INTO movie SELECT i, 0, 'movie ' || i, 1 + i % {STUDIOS} FROM generate_series(1, {MOVIES}) AS i;
INSERT INTO review (stars, movie_id, author_id)
    SELECT i % 5, 1 + i % {MOVIES}, 1 + i % {PEOPLE} FROM generate_series(1, {5 * MOVIES}) AS i;
INSERT INTO movie_genre SELECT m, g FROM generate_series(1, {MOVIES}) AS m, generate_series(1, {GENRES}) AS g
    WHERE (m + g) % 3 = 0;
"""
PROCESSOR = """
from delta_sync import Pipeline, many, one

pipeline = Pipeline("{name}")


@pipeline.document(
    "{schema}.movie",
    parts={{
        "studio": one("{schema}.studio"),
        "reviews": many("{schema}.review", parts={{"author": one("{schema}.person")}}),
        "genres": many("{schema}.genre", through="{schema}.movie_genre"),
    }},
    debounce="{debounce}",
)
def movie(row):
    return row
"""
EXPECTED = """
SELECT m.id, jsonb_build_object(
  'id', m.id, 'rev', m.rev, 'title', m.title, 'studio_id', m.studio_id,
  'studio', (SELECT to_jsonb(s) FROM studio s WHERE s.id = m.studio_id),
  'reviews', coalesce((SELECT jsonb_agg(to_jsonb(r) || jsonb_build_object('author',
      (SELECT to_jsonb(p) FROM person p WHERE p.id = r.author_id)) ORDER BY r.id)
      FROM review r WHERE r.movie_id = m.id), '[]'),
  'genres', coalesce((SELECT jsonb_agg(to_jsonb(g) ORDER BY g.id) FROM genre g
      JOIN movie_genre l ON l.genre_id = g.id WHERE l.movie_id = m.id), '[]'))
FROM movie m
"""


class Writing(Actor):
    """Changes all of the tables: rows, what they refer to, and keys; in transactions that are rolled back at times."""

    def __init__(self, it: Stage, number: int) -> None:
        super().__init__(f"writer {number}")
        self._source = it.source
        self._rng = random.Random(f"{SEED} writer {number}")
        self.done: Counter[str] = Counter()

    def act(self) -> None:
        ways = [getattr(self, name) for name in dir(self) if name.startswith("way_")]
        while not self.stopping.wait(0.02):
            with contextlib.suppress(psycopg.OperationalError), self._source.connect() as connection:
                while not self.stopping.wait(0.02):
                    with (
                        contextlib.suppress(
                            psycopg.errors.IntegrityError,
                            psycopg.errors.DeadlockDetected,
                            psycopg.Rollback,
                        ),
                        connection.transaction(),
                    ):
                        for _ in range(self._rng.choice((1, 1, 3))):
                            way = self._rng.choice(ways)
                            connection.execute(way().encode())
                            self.done[way.__name__] += 1
                        if self._rng.random() < 0.1:
                            raise psycopg.Rollback

    def _movie(self) -> int:
        return self._rng.randrange(1, MOVIES + 5)

    def way_change(self) -> str:
        table, most = self._rng.choice(
            (("studio", STUDIOS), ("person", PEOPLE), ("genre", GENRES), ("movie", MOVIES), ("review", 6 * MOVIES))
        )
        return f"UPDATE {table} SET rev = rev + 1 WHERE id = {self._rng.randrange(1, most + 1)}"

    def way_write_a_review(self) -> str:
        return (
            "INSERT INTO review (stars, movie_id, author_id)"
            f" VALUES (3.5, {self._movie()}, {self._rng.randrange(1, PEOPLE + 1)})"
        )

    def way_move_a_review(self) -> str:
        choice = "(SELECT id FROM review ORDER BY random() LIMIT 1)"
        return f"UPDATE review SET rev = rev + 1, movie_id = {self._movie()} WHERE id = {choice}"

    def way_delete_a_review(self) -> str:
        return "DELETE FROM review WHERE id = (SELECT id FROM review ORDER BY random() LIMIT 1)"

    def way_link(self) -> str:
        return f"INSERT INTO movie_genre VALUES ({self._movie()}, {self._rng.randrange(1, GENRES + 1)})"

    def way_move_a_link(self) -> str:
        return (
            f"UPDATE movie_genre SET movie_id = {self._movie()}, genre_id = {self._rng.randrange(1, GENRES + 1)}"
            " WHERE (movie_id, genre_id) = (SELECT movie_id, genre_id FROM movie_genre ORDER BY random() LIMIT 1)"
        )

    def way_unlink(self) -> str:
        return f"DELETE FROM movie_genre WHERE movie_id = {self._movie()}"

    def way_sell(self) -> str:
        studio = self._rng.choice((*range(1, STUDIOS + 1), "NULL"))
        return f"UPDATE movie SET rev = rev + 1, studio_id = {studio} WHERE id = {self._movie()}"

    def way_add_a_movie(self) -> str:
        return f"INSERT INTO movie VALUES ({self._movie()}, nextval('life'), 'again', 1)"

    def way_delete_a_movie(self) -> str:
        return f"DELETE FROM movie WHERE id = {self._rng.randrange(MOVIES - 3, MOVIES + 5)}"

    def way_rename_a_movie(self) -> str:
        return f"UPDATE movie SET id = {self._movie() + 100} WHERE id = {self._rng.randrange(MOVIES, MOVIES + 5)}"


class Reading(Actor):
    """Reads documents all the time: no row in one of them ever gets older."""

    def __init__(self, it: Stage, redis_server: Redis) -> None:
        super().__init__("reader")
        self._url = redis_server.url
        self._schema = it.source.schema
        self.looks = 0

    def act(self) -> None:
        rng = random.Random(f"{SEED} reader")
        newest: dict[int, dict[tuple[str, int], int]] = {}
        client: Any = redis.Redis
        with client.from_url(self._url, socket_timeout=5) as client:
            while not self.stopping.wait(0.005):
                key = rng.randrange(1, MOVIES + 1)
                text = client.get(f"{self._schema}.movie:{key}")
                if text is None:
                    newest.pop(key, None)  # it may be another movie when there is one again
                    continue
                known = newest.setdefault(key, {})
                for what, rev in rows_in(json.loads(text)):
                    assert rev >= known.get(what, 0), f"movie {key} shows {what} with {rev}, and had {known[what]}"
                    known[what] = rev
                self.looks += 1


def rows_in(movie: dict[str, Any]) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield the rows of which a document is made, each with its `rev`."""
    yield ("movie", movie["id"]), movie["rev"]
    for name, rows in (
        ("studio", [movie["studio"]]),
        ("review", movie["reviews"]),
        ("person", [review["author"] for review in movie["reviews"]]),
        ("genre", movie["genres"]),
    ):
        for row in rows:
            if row is not None:
                yield (name, row["id"]), row["rev"]


def wanted(it: Stage) -> dict[int, dict[str, Any]]:
    with it.source.connect() as connection:
        return dict(connection.execute(EXPECTED.encode()).fetchall())


def there(it: Stage, redis_server: Redis) -> dict[int, dict[str, Any]]:
    client: Any = redis.Redis
    with client.from_url(redis_server.url) as client:
        names = list(client.scan_iter(f"{it.source.schema}.movie:*"))
        documents = [json.loads(text) for text in client.mget(names)] if names else []
    for document in documents:
        del document["_version"]
    return {document["id"]: document for document in documents}


def in_step(it: Stage, redis_server: Redis, run: Run) -> None:
    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    assert there(it, redis_server) == wanted(it)


def begin(stage: Callable[..., Stage], debounce: str = "200ms") -> Stage:
    it = stage("CREATE SEQUENCE life;" + SETUP, TABLES, processor=None, load={"chunk_rows": 10})
    text = PROCESSOR.format(name=it.pipeline.name, schema=it.source.schema, debounce=debounce)
    (it.pipeline.home / "processor.py").write_text(text)
    it.pipeline.parts = {f"{it.source.schema}.{table}" for table in TABLES if table != "movie"}
    return it


def verify(it: Stage, *options: str) -> tuple[int, dict[str, str]]:
    """Return the exit status, and what was found, by key."""
    done = it.pipeline.deltactl("verify", it.pipeline.name, "--json", *options)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert "equal" in lines[-1], done.stderr
    found = {line["finding"]["key"]: line["finding"]["kind"] for line in lines if "finding" in line}
    return done.returncode, found | {line["unverified"]["key"]: "?" for line in lines if "unverified" in line}


def test_each_change_of_a_part_builds_its_documents_anew(stage: Callable[..., Stage], redis_server: Redis) -> None:
    it = begin(stage)
    checked = it.pipeline.deltactl("pipeline", "check", it.pipeline.name, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    warned = {problem["fix"] for problem in json.loads(checked.stdout)["problems"] if "no index" in problem["what"]}
    assert warned == {f"type: CREATE INDEX ON {it.source.schema}.movie_genre (genre_id)"}
    run = it.run()
    in_step(it, redis_server, run)
    for statement in (
        "UPDATE studio SET name = 'sold' WHERE id = 2",
        "UPDATE person SET name = 'renamed' WHERE id = 3",
        "UPDATE genre SET name = 'noir' WHERE id = 1",
        "UPDATE review SET movie_id = 7 WHERE id = 1",
        "DELETE FROM review WHERE id = 2",
        "DELETE FROM movie_genre WHERE movie_id = 5",
        "UPDATE movie_genre SET movie_id = 5 WHERE movie_id = 6",
        "UPDATE movie SET studio_id = NULL WHERE id = 8",
        "DELETE FROM movie WHERE id = 9",
        "UPDATE movie SET id = 900 WHERE id = 40",
        "DELETE FROM person WHERE id = 5",
        "TRUNCATE review",
    ):
        it.source.execute(statement)
        in_step(it, redis_server, run)
    assert run.stop() == 0
    assert it.pipeline.dead_letters() == []


def not_confirmed(it: Stage, lsn: int) -> None:
    """Wait until a wrong confirmation would have got to the source; there must be none."""
    replies: set[Any] = set()

    def enough_replies() -> bool:
        assert it.source.confirmed_lsn(it.pipeline.slot) < lsn, "confirmed, though a document is not built"
        with it.source.connect() as connection:
            replies.update(connection.execute("SELECT reply_time FROM pg_stat_replication").fetchall())
        return len(replies) > STATUS_REPLIES

    wait_until(enough_replies, PATIENCE_S, "replies of the connector")


def test_a_document_that_waits_for_its_time_is_not_lost(stage: Callable[..., Stage], redis_server: Redis) -> None:
    """An hour after it was built last: nothing is confirmed until then, and both ways to end lead to it at once."""
    it = begin(stage, debounce="1h")
    run = it.run()
    in_step(it, redis_server, run)

    def title(movie: int) -> str:
        return str(there(it, redis_server)[movie]["title"])

    def change(movie: int, text: str) -> None:
        it.source.execute(f"UPDATE movie SET title = '{text}' WHERE id = {movie}")

    for movie, end in ((1, "kill"), (2, "stop")):
        change(movie, "first")
        wait_until(lambda movie=movie: title(movie) == "first", PATIENCE_S, "the first change")  # type: ignore[misc]  # a default binds it now
        change(movie, "second")
        change(movie + 10, "behind it")
        wait_until(lambda movie=movie: title(movie + 10) == "behind it", PATIENCE_S, "what is behind")  # type: ignore[misc]  # a default binds it now
        assert title(movie) == "first", "it is not its time"
        if end == "kill":
            not_confirmed(it, it.source.insert_lsn())
        getattr(run, end)()
        run = it.run()
        in_step(it, redis_server, run)
    assert run.stop() == 0


def test_documents_are_the_source_s_join_whatever_is_killed_meanwhile(
    stage: Callable[..., Stage], redis_server: Redis, postgresql: PostgreSQL
) -> None:
    print(f"seed {SEED}")
    it = begin(stage)
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the load")
    rng = random.Random(f"{SEED} faults")
    with Writing(it, 1) as first, Writing(it, 2) as second, Reading(it, redis_server) as reader:
        for _ in range(4):
            before = sum(first.done.values()) + sum(second.done.values()) + reader.looks
            started = it.pipeline.deltactl("dump", "start", it.pipeline.name)
            assert started.returncode == 0, started.stderr
            wait_until(
                lambda before=before: (
                    sum(first.done.values()) + sum(second.done.values()) + reader.looks > before + 150
                ),  # type: ignore[misc]  # a default binds it now
                PATIENCE_S,
                "work",
            )
            if rng.random() < 0.7:
                run.kill()
                run = it.run()
            else:
                postgresql.kill()
                postgresql.start()
    assert {way for way in dir(Writing) if way.startswith("way_")} <= first.done.keys() | second.done.keys()
    assert reader.looks > 0
    in_step(it, redis_server, run)
    status, found = verify(it)
    assert (status, found) == (0, {})
    assert run.stop() == 0
    assert it.pipeline.dead_letters() == []


def test_documents_that_were_damaged_are_found_and_mended(stage: Callable[..., Stage], redis_server: Redis) -> None:
    it = begin(stage)
    run = it.run()
    in_step(it, redis_server, run)
    client: Any = redis.Redis
    with client.from_url(redis_server.url) as client:
        name = f"{it.source.schema}.movie:"
        damaged = json.loads(client.get(f"{name}1"))
        damaged["reviews"].pop()
        client.set(f"{name}1", json.dumps(damaged, separators=(",", ":")))
        client.delete(f"{name}2", f"{name}4")
        extra = json.loads(client.get(f"{name}3"))
        client.set(f"{name}777", json.dumps({**extra, "id": 777}, separators=(",", ":")))
    # Until a dump has ended to which changes of documents may have been left, nobody knows.
    with StateStore.open(load_spec(it.pipeline.home).state, it.pipeline.home) as state:
        dumps = DumpStore(state, it.pipeline.name)
        left = Dump(table=f"{it.source.schema}.movie", kind="where", where="id = 4", reason="studio changed")
        id_ = dumps.add(left, paused=True)
        assert verify(it, "--patience", "1s") == (1, {"1": "?", "2": "?", "4": "?", "777": "?"})
        dumps.order(id_, "resume")
        wait_until(lambda: not dumps.all(unfinished=True), PATIENCE_S, "the dump")
    status, found = verify(it)
    assert status == 1
    assert found == {"1": "different", "2": "missing", "777": "extra"}
    status, found = verify(it, "--repair", "--yes")
    assert status == 0, found
    assert there(it, redis_server) == wanted(it)
    tried = it.pipeline.deltactl(
        "pipeline", "test", it.pipeline.name, "--table", f"{it.source.schema}.movie", "--keys", "1,888", "--json"
    )
    assert tried.returncode == 0, tried.stderr
    assert [(one["key"], one["effect"]) for one in json.loads(tried.stdout)] == [("1", "same"), ("888", "absent")]
    assert run.stop() == 0
