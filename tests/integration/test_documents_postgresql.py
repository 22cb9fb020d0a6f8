"""Documents of several tables, read from a real PostgreSQL; and what becomes of them with weaker versions."""

from __future__ import annotations

import datetime as dt
import random
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from delta_sync import many, one
from delta_sync.building import KEYS_MOST, DocumentBuilder
from delta_sync.changes import Key
from delta_sync.documents import DocumentSpec, PartSpec, watches
from delta_sync.errors import ProcessorError, UsageError
from delta_sync.sources import parts as parts_module
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import SourceSpec
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Table
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL
from integration.documents import Careless, Follower
from integration.postgresql_log import postgres_log

SEED = random.SystemRandom().randrange(1_000_000)
WAIT_S = 60.0
SETUP = """
CREATE DOMAIN code AS text;
CREATE TABLE "stu%dio" ("the id" uuid PRIMARY KEY, name text);
CREATE TABLE movie (id int PRIMARY KEY, title text, "studio %s" uuid REFERENCES "stu%dio");
CREATE TABLE review (
    id bigint PRIMARY KEY, movie_id int NOT NULL REFERENCES movie, stars numeric(3,1), body text,
    at timestamptz NOT NULL DEFAULT '2024-02-29 12:00+00');
CREATE TABLE reply (review_id bigint REFERENCES review, n int, place int, PRIMARY KEY (review_id, n));
CREATE TABLE tag (word code PRIMARY KEY, weight int);
CREATE TABLE movie_tag (word code REFERENCES tag, movie_id int REFERENCES movie, PRIMARY KEY (word, movie_id));
CREATE INDEX ON review (movie_id);
ALTER TABLE movie REPLICA IDENTITY FULL; ALTER TABLE review REPLICA IDENTITY FULL;
INSERT INTO "stu%dio" VALUES ('00000000-0000-0000-0000-000000000001', 'one'),
    ('00000000-0000-0000-0000-000000000002', 'two');
INSERT INTO movie SELECT i, 'movie ' || i, CASE WHEN i % 3 > 0
    THEN ('00000000-0000-0000-0000-00000000000' || i % 3)::uuid END FROM generate_series(1, 9) AS i;
INSERT INTO review SELECT i, 1 + i % 8, i / 2.0, 'a' FROM generate_series(1, 20) AS i;
INSERT INTO reply SELECT i, n, 10 - n FROM generate_series(1, 20, 3) AS i, generate_series(1, 2) AS n;
INSERT INTO tag VALUES ('a''b', 1), ('%s', 2), ('{x},"', 3);
INSERT INTO movie_tag SELECT word, i FROM tag, generate_series(1, 9, 2) AS i;
"""
PARTS = {
    "studio": one("public.stu%dio"),
    "reviews": many("public.review", parts={"replies": many("public.reply", order_by="place")}),
    "tags": many("public.tag", through="public.movie_tag"),
}


class Library:
    """A database of its own, and readers of it whose roots have parts."""

    def __init__(self, server: PostgreSQL, exits: ExitStack, setup: str = SETUP) -> None:
        self._server = server
        self._exits = exits
        self.name = f"documents_{uuid.uuid4().hex}"
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self.name}".encode())
        exits.callback(self._drop)
        self.url = server.url_of(self.name)
        self.admin = self.connect()
        self.admin.execute(setup.encode())

    def _drop(self) -> None:
        with psycopg.connect(self._server.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [self.name]
            )
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)".encode())

    def connect(self) -> psycopg.Connection:
        connection = psycopg.connect(self.url, autocommit=True)
        self._exits.callback(connection.close)
        return connection

    def reader(self, parts: dict[str, PartSpec] | None = None, query: str | None = None) -> PostgresReader:
        url = self.url.replace("postgres:postgres@", "postgres@")
        made = PostgresReader(SourceSpec(url=url, password="${env:THE_PASSWORD}"), "documents")
        made.documents = {"public.movie": DocumentSpec("public.movie", PARTS if parts is None else parts, query)}
        self._exits.callback(made.close)
        return made


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def library(postgresql: PostgreSQL, exits: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("THE_PASSWORD", "postgres")
    return Library(postgresql, exits)


def test_indexes_that_hold_some_rows_only_do_not_count(library: Library) -> None:
    library.admin.execute("CREATE INDEX ON reply (place) WHERE n = 1; CREATE INDEX ON reply (lower(n::text))")
    library.admin.execute("CREATE INDEX ON reply (n, place)")
    found = library.reader().first_columns(["public.review", "public.reply", "public.stu%dio"])
    assert found == {
        "public.review": {"id", "movie_id"},
        "public.reply": {"review_id", "n"},
        "public.stu%dio": {"the id"},
    }


def movie_of(reader: PostgresReader) -> Table:
    return reader.tables(["public.movie"])["public.movie"]


def read(reader: PostgresReader, *ids: int) -> dict[Key, dict[str, Any]]:
    chunk = reader.read_keys(movie_of(reader), [(id_,) for id_ in ids], lambda _: True)
    assert chunk is not None
    return dict(chunk.rows)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_comes_with_its_parts_as_the_types_that_rows_have(library: Library) -> None:
    reader = library.reader()
    (row,) = read(reader, 1).values()
    assert row["studio"] == {"the id": uuid.UUID(int=1), "name": "one"}
    assert [review["id"] for review in row["reviews"]] == [8, 16]
    assert row["reviews"][0]["stars"] == Decimal("4.0")
    assert row["reviews"][0]["at"].isoformat() == "2024-02-29T12:00:00+00:00"
    assert [[reply["n"] for reply in review["replies"]] for review in row["reviews"]] == [[], [2, 1]]
    assert [tag["word"] for tag in row["tags"]] == sorted(["a'b", "%s", '{x},"'])
    bare = read(reader, 3, 9, 77)
    assert bare.keys() == {(3,), (9,)}
    assert (bare[9,]["studio"], bare[9,]["reviews"]) == (None, [])


def test_dates_that_python_cannot_hold_stand_beside_others(library: Library) -> None:
    """As values to find parts by, as values of these, and on the way back to the roots."""
    library.admin.execute(
        "CREATE TABLE edition (since timestamptz, movie_id int REFERENCES movie, PRIMARY KEY (since, movie_id))"
    )
    library.admin.execute(
        "CREATE TABLE copy (since timestamptz, movie_id int, n int, PRIMARY KEY (since, movie_id, n),"
        " FOREIGN KEY (since, movie_id) REFERENCES edition)"
    )
    library.admin.execute("INSERT INTO edition VALUES ('-infinity', 1), ('2024-02-29Z', 1), ('2024-02-29Z', 2)")
    library.admin.execute("INSERT INTO copy SELECT since, movie_id, n FROM edition, generate_series(1, 2) AS n")
    reader = library.reader({"editions": many("public.edition", parts={"copies": many("public.copy")})})
    leap_day = dt.datetime(2024, 2, 29, tzinfo=dt.UTC)
    expected = {1: ["-infinity", leap_day], 2: [leap_day], 3: []}
    for (id_,), row in read(reader, 1, 2, 3).items():
        assert [edition["since"] for edition in row["editions"]] == expected[id_]
        assert all([copy["n"] for copy in edition["copies"]] == [1, 2] for edition in row["editions"])
    assert roots(reader, "copy", ("-infinity", 1), (leap_day, 2)) == {(1,), (2,)}


def test_chunks_have_their_parts_and_the_snapshot_s_clock(library: Library) -> None:
    reader = library.reader()
    table = movie_of(reader)
    before = reader.clock()
    first = reader.read_chunk(table, None, 4, 1 << 30, lambda _: True)
    assert first is not None
    assert (first.last_key, first.clock, first.seen_to) == ((4,), before, before + 1)
    assert first.version(3, 0) == 3 << 52 | before
    library.admin.execute("UPDATE review SET body = 'b' WHERE id = 4")
    rest = reader.read_chunk(table, first.last_key, 10, 1 << 30, lambda _: True)
    assert rest is not None
    assert rest.clock is not None
    assert rest.clock > before
    assert [key for key, _ in [*first.rows, *rest.rows]] == [(id_,) for id_ in range(1, 10)]
    assert read(reader, *range(1, 10)) == dict([*first.rows, *rest.rows])


def test_what_does_not_fit_at_once_is_read_in_smaller_steps(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = library.reader()
    table = movie_of(reader)
    whole = read(reader, *range(1, 10))
    monkeypatch.setattr(parts_module, "ROWS_AT_ONCE", 7)
    found: dict[Key, dict[str, Any]] = {}
    after: Key | None = None
    steps = 0
    while True:
        chunk = reader.read_chunk(table, after, 100, 1 << 30, lambda _: True)
        assert chunk is not None
        found |= dict(chunk.rows)
        after, steps = chunk.last_key, steps + 1
        if after is None:
            break
    assert (found == whole, steps > 1) == (True, True)
    monkeypatch.setattr(parts_module, "ROWS_AT_ONCE", 1)
    (row,) = read(reader, 1).values()
    assert isinstance(row["studio"], ProcessorError), "no step is small enough"


def test_a_list_that_is_too_long_fails_its_document_alone_and_is_not_read(library: Library) -> None:
    library.admin.execute("INSERT INTO review SELECT i, 2, 1, 'x' FROM generate_series(1000, 30000) AS i")
    reader = library.reader({"reviews": many("public.review", most=5, parts={"replies": many("public.reply", most=1)})})
    found = read(reader, 1, 2, 7)
    assert str(found[2,]["reviews"]) == "It has more than 5 rows in reviews (its bound, `most`)."
    assert str(found[1,]["reviews"]) == "It has more than 1 rows in replies (its bound, `most`)."
    assert [review["id"] for review in found[7,]["reviews"]] == [6, 14]


def test_a_query_of_the_user_s_is_read_instead(library: Library) -> None:
    reader = library.reader(
        {"reviews": many("public.review")},
        "SELECT id, title, '100%%' AS full, (SELECT count(*) FROM review WHERE movie_id = m.id) AS reviews"
        " FROM movie AS m WHERE id = ANY(%(id)s) AND id <> 4",
    )
    assert read(reader, 1, 4, 77) == {(1,): {"id": 1, "title": "movie 1", "full": "100%", "reviews": 2}}
    chunk = reader.read_chunk(movie_of(reader), (2,), 3, 1 << 30, lambda _: True)
    assert chunk is not None
    assert ([key for key, _ in chunk.rows], chunk.last_key) == ([(3,), (5,)], (5,))
    for query, words in (
        ("SELECT title FROM movie WHERE id = ANY(%(id)s)", "returns no column id"),
        ("SELECT 1 AS id FROM movie", "several rows for the key 1"),
        ("SELECT nothing FROM movie WHERE id = ANY(%(id)s)", "The query of document public.movie fails"),
    ):
        wrong = library.reader({"reviews": many("public.review")}, query)
        with pytest.raises(UsageError, match=words):
            read(wrong, 1)
        if "several" not in words:
            with pytest.raises(UsageError, match=words):
                wrong.check_query(movie_of(wrong))
    reader.check_query(movie_of(reader))


def test_parts_whose_columns_cannot_be_compared_are_told_of(library: Library) -> None:
    reader = library.reader()
    reader.check_query(movie_of(reader))
    wrong = library.reader({"reviews": many("public.review", parts={"tags": many("public.review", on={"body": "id"})})})
    with pytest.raises(
        UsageError, match=r"document public\.movie, part tags: .* operator does not exist: text = bigint"
    ):
        wrong.check_query(movie_of(wrong))


# ── which documents a change is about ────────────────────────────────────────────────────────────────────────────


def roots(reader: PostgresReader, table: str, *values: Key) -> set[Key]:
    (watch,) = [watch for watch in watches(movie_of(reader)) if watch.table.name == table]
    if not watch.hops:
        return set(values)
    found = reader.root_keys(watch, values, 100, lambda _: True)
    assert found is not None
    where = reader.root_condition(movie_of(reader), watch, values)
    chunk = reader.read_chunk(movie_of(reader), None, 100, 1 << 30, lambda _: True, where=where)
    assert chunk is not None
    assert sorted(key for key, _ in chunk.rows) == sorted(found), "a condition finds the same"
    return set(found)


def test_values_lead_to_the_documents_in_which_they_are(library: Library) -> None:
    reader = library.reader()
    assert roots(reader, "stu%dio", (uuid.UUID(int=2),)) == {(2,), (5,), (8,)}
    assert roots(reader, "reply", (1,), (4,), (999,)) == {(2,), (5,)}
    assert roots(reader, "tag", ("%s",), ('{x},"',), ("none",)) == {(1,), (3,), (5,), (7,), (9,)}
    (watch,) = [watch for watch in watches(movie_of(reader)) if watch.table.name == "stu%dio"]
    assert len(reader.root_keys(watch, [(uuid.UUID(int=2),)], 2, lambda _: True) or []) == 2
    assert reader.root_keys(watch, [(uuid.UUID(int=2),)], 2, lambda _: False) is None


def test_a_table_without_whole_images_is_refused_and_its_identity_is_in_the_fingerprint(library: Library) -> None:
    reader = library.reader()
    (before,) = reader.fingerprints(["public.review"]).values()
    library.admin.execute("ALTER TABLE review REPLICA IDENTITY DEFAULT")
    assert reader.fingerprints(["public.review"]) != {"public.review": before}
    with pytest.raises(UsageError, match="it lacks the old movie_id"):
        reader.tables(["public.movie"])
    library.admin.execute("CREATE UNIQUE INDEX by_movie ON review (movie_id, id)")
    library.admin.execute("ALTER TABLE review REPLICA IDENTITY USING INDEX by_movie")
    assert movie_of(reader).parts


# ── while it changes ─────────────────────────────────────────────────────────────────────────────────────────────


def random_changes(connection: psycopg.Connection, rng: random.Random, changes: int) -> None:
    for _ in range(changes):
        review, movie, studio = rng.randrange(1, 30), rng.randrange(1, 10), uuid.UUID(int=rng.choice((1, 2)))
        statement = rng.choice(
            (
                f"UPDATE review SET movie_id = {movie} WHERE id = {review}",
                f"UPDATE review SET stars = stars + 0.1 WHERE id = {review} AND stars < 90",
                f"INSERT INTO review VALUES ({review}, {movie}, 1, 'new') ON CONFLICT DO NOTHING",
                f"DELETE FROM review WHERE id = {review} AND id NOT IN (SELECT review_id FROM reply)",
                f"UPDATE \"stu%dio\" SET name = name || '.' WHERE \"the id\" = '{studio}' AND length(name) < 90",
                f"UPDATE movie SET \"studio %s\" = '{studio}' WHERE id = {movie}",
                f"UPDATE reply SET place = place + 1 WHERE review_id = {review}",
                f"DELETE FROM movie_tag WHERE movie_id = {movie}",
                f"INSERT INTO movie_tag VALUES ('%s', {movie}) ON CONFLICT DO NOTHING",
                "UPDATE tag SET weight = weight + 1 WHERE word = '%s'",
            )
        )
        connection.execute(statement.encode())


def test_documents_follow_with_clocks_that_show_all_changes_and_with_less_they_do_not(
    library: Library, postgresql: PostgreSQL, tmp_path: Path
) -> None:
    """Random writers; at last, commits that are in the log for a while before anybody can see them."""
    print(f"seed {SEED}")
    with (
        StateStore.open("sqlite:///state.db", tmp_path) as state,
        postgres_log(library.url, tmp_path, {}) as log,
    ):
        honest = Follower(library.reader(), state, DocumentBuilder, SEED, versions=True)
        last_wins = Follower(library.reader(), state, DocumentBuilder, SEED, versions=False)
        careless = Follower(library.reader(), state, Careless, SEED, versions=True)
        everybody = (honest, last_wins, careless)

        def truth() -> dict[Key, dict[str, Any]]:
            return read(honest.reader, *range(1, 10))

        with ThreadPoolExecutor(4) as pool:
            for turn in range(6):
                writers = [
                    pool.submit(random_changes, library.connect(), random.Random(f"{SEED} {turn} {number}"), 25)
                    for number in range(3)
                ]
                events = log.events()  # some; the others come in the next turn
                for follower in everybody:
                    follower.follow(events)
                for writer in writers:
                    writer.result()
            events = log.events()
            for follower in everybody:
                follower.follow(events)
            for follower in everybody:
                follower.catch_up()
            assert honest.store.rows() == truth()
            assert last_wins.store.rows() != truth(), "what comes last is not always what is newest"

            set_standby(library, "absent")
            session = library.connect()
            try:
                hidden = pool.submit(session.execute, "UPDATE review SET body = 'hidden at first'")
                wait_until(lambda: waits_for_standby(library), WAIT_S, "a commit that waits for its standby")
                events = log.events()
                assert any(event["after"] and event["after"].get("body") == "hidden at first" for event in events)
                careless.follow(events)
                patient = pool.submit(honest.follow, events)
                looks = honest.count_looks()
                wait_until(lambda: looks() > 3, WAIT_S, "looks at snapshots that do not show it")
                assert not patient.done()
            finally:
                set_standby(library, "")
            hidden.result()
            patient.result()
        for follower in everybody:
            follower.catch_up()
        assert honest.store.rows() == truth()
        assert careless.store.rows() != truth(), "a snapshot that does not show a change has a clock all the same"


def set_standby(library: Library, name: str) -> None:
    library.admin.execute("SET synchronous_commit = local")
    library.admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'".encode())
    library.admin.execute("SELECT pg_reload_conf()")
    other = library.connect()

    def is_set() -> bool:
        row = other.execute("SHOW synchronous_standby_names").fetchone()
        return row is not None and row[0] == name

    wait_until(is_set, WAIT_S, "the reload")


def waits_for_standby(library: Library) -> bool:
    return bool(library.admin.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchall())


def test_a_change_of_many_documents_is_left_to_a_dump(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delta_sync.building.KEYS_MOST", 2)
    assert KEYS_MOST > 2
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        it = Follower(library.reader(), state, DocumentBuilder, SEED, versions=True)
        image = {"the id": str(uuid.UUID(int=2)), "name": "two"}
        source = {"schema": "public", "table": "stu%dio", "lsn": 8, "txId": 3, "ts_ms": 1}
        for _ in range(2):
            it.follow([{"op": "u", "before": None, "after": image, "source": source}])
        (dump,) = DumpStore(state, "movies").all()
        assert (dump.kind, dump.state, dump.reason) == ("where", "pending", "public.stu%dio changed")
        chunk = it.reader.read_chunk(movie_of(it.reader), None, 100, 1 << 30, lambda _: True, where=dump.where)
        assert chunk is not None
        assert [key for key, _ in chunk.rows] == [(2,), (5,), (8,)]
