"""Documents of several tables, read from a real MariaDB; and what becomes of them with weaker versions."""

from __future__ import annotations

import contextlib
import itertools
import random
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pymysql
import pytest

from delta_sync import many, one
from delta_sync.building import DocumentBuilder
from delta_sync.changes import Key
from delta_sync.documents import DocumentSpec, PartSpec, watches
from delta_sync.errors import ProcessorError, SourceBusy, UsageError
from delta_sync.sources import parts as parts_module
from delta_sync.sources.mysql.connection import Session, connect
from delta_sync.sources.mysql.reader import MariaReader
from delta_sync.spec import PipelineSpec, SourceSpec, spec_from
from delta_sync.state import StateStore
from delta_sync.tables import Table
from delta_sync.testing.mariadb import PASSWORD, USER, MariaDB
from delta_sync.testing.processes import wait_until
from integration.documents import Careless, Follower
from integration.mariadb_log import Event, Log, execute

SEED = random.SystemRandom().randrange(1_000_000)
WAIT_S = 240.0  # no test may depend on speed
SETUP = (
    # A collation that is not the connection's, so that values compare as the columns do, and not as literals.
    "CREATE TABLE `stu%dio` (`the id` varchar(20) COLLATE utf8mb4_unicode_ci PRIMARY KEY, name varchar(200))",
    "CREATE TABLE movie (id int PRIMARY KEY, title varchar(40), `studio %s` varchar(20) COLLATE utf8mb4_unicode_ci,"
    " FOREIGN KEY (`studio %s`) REFERENCES `stu%dio` (`the id`))",
    "CREATE TABLE review (id bigint PRIMARY KEY, movie_id int NOT NULL, stars decimal(3,1), body text,"
    " at datetime(3) NOT NULL DEFAULT '2024-02-29 12:00:00', FOREIGN KEY (movie_id) REFERENCES movie (id))",
    "CREATE TABLE reply (review_id bigint, n int, place int, PRIMARY KEY (review_id, n),"
    " FOREIGN KEY (review_id) REFERENCES review (id))",
    "CREATE TABLE tag (word varchar(20) PRIMARY KEY, weight int)",
    "CREATE TABLE movie_tag (word varchar(20), movie_id int, PRIMARY KEY (word, movie_id),"
    " FOREIGN KEY (word) REFERENCES tag (word), FOREIGN KEY (movie_id) REFERENCES movie (id))",
    "CREATE TABLE mark (id int PRIMARY KEY)",
    "INSERT INTO `stu%dio` VALUES ('one', 'first'), ('two', 'second')",
    "INSERT INTO movie SELECT seq, CONCAT('movie ', seq), ELT(seq % 3, 'One', 'two') FROM seq_1_to_9",
    "INSERT INTO review (id, movie_id, stars, body) SELECT seq, 1 + seq % 8, seq / 2, 'a' FROM seq_1_to_20",
    "INSERT INTO reply SELECT r.seq, n.seq, 10 - n.seq FROM seq_1_to_20_step_3 AS r JOIN seq_1_to_2 AS n",
    """INSERT INTO tag VALUES ('a\\'b', 1), ('%s', 2), ('{x},"', 3)""",
    "INSERT INTO movie_tag SELECT word, seq FROM tag JOIN seq_1_to_9_step_2",
)
TABLES = ("stu%dio", "movie", "review", "reply", "tag", "movie_tag", "mark")


class Library:
    """A database of its own, and readers of it whose roots have parts."""

    def __init__(self, server: MariaDB, exits: ExitStack) -> None:
        self._server = server
        self._exits = exits
        self.name = f"documents_{uuid.uuid4().hex[:8]}"
        self.root = f"{self.name}.movie"
        with closing(self._connect("")) as session:
            execute(session, f"CREATE DATABASE {self.name}")
        self.admin = self.connect()
        exits.callback(lambda: execute(self.admin, f"DROP DATABASE {self.name}"))
        execute(self.admin, *SETUP)

    def _connect(self, database: str) -> Session:
        return connect(self.source(database))

    def source(self, database: str) -> SourceSpec:
        return SourceSpec(url=f"mariadb://{USER}@127.0.0.1:{self._server.port}/{database}", password="${env:DELTA_P}")

    def connect(self) -> Session:
        session = self._connect(self.name)
        self._exits.callback(session.shut)
        return session

    @property
    def spec(self) -> PipelineSpec:
        return spec_from(
            {
                "name": "documents",
                "source": self.source("").model_dump(mode="json", exclude_none=True),
                "tables": {f"{self.name}.{table}": {} for table in TABLES},
                "sinks": {"cache": {"url": "redis://cache"}},
            },
            "the test",
        )

    @property
    def parts(self) -> dict[str, PartSpec]:
        reviews = many(f"{self.name}.review", parts={"replies": many(f"{self.name}.reply", order_by="place")})
        tags = many(f"{self.name}.tag", through=f"{self.name}.movie_tag")
        return {"studio": one(f"{self.name}.stu%dio"), "reviews": reviews, "tags": tags}

    def reader(self, parts: dict[str, PartSpec] | None = None, query: str | None = None) -> MariaReader:
        made = MariaReader(self.source(self.name), "documents")
        made.documents = {self.root: DocumentSpec(self.root, self.parts if parts is None else parts, query)}
        self._exits.callback(made.close)
        return made

    def movie(self, reader: MariaReader) -> Table:
        return reader.tables([self.root])[self.root]

    def read(self, reader: MariaReader, *ids: int) -> dict[Key, dict[str, Any]]:
        chunk = reader.read_keys(self.movie(reader), [(id_,) for id_ in ids], lambda _: True)
        assert chunk is not None
        return dict(chunk.rows)


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def library(mariadb: MariaDB, exits: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("DELTA_P", PASSWORD)
    return Library(mariadb, exits)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_comes_with_its_parts_as_the_types_that_rows_have(library: Library) -> None:
    reader = library.reader()
    (row,) = library.read(reader, 1).values()
    assert row["studio"] == {"the id": "one", "name": "first"}, "the server says that One is one"
    assert [review["id"] for review in row["reviews"]] == [8, 16]
    assert row["reviews"][0]["stars"] == Decimal("4.0")
    assert row["reviews"][0]["at"].isoformat() == "2024-02-29T12:00:00"
    assert [[reply["n"] for reply in review["replies"]] for review in row["reviews"]] == [[], [2, 1]]
    assert {tag["word"] for tag in row["tags"]} == {"a'b", "%s", '{x},"'}
    bare = library.read(reader, 3, 9, 77)
    assert bare.keys() == {(3,), (9,)}
    assert (bare[9,]["studio"], bare[9,]["reviews"]) == (None, [])


def test_chunks_have_their_parts_and_the_place_of_the_log_as_their_clock(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = library.reader()
    table = library.movie(reader)
    before = reader.clock()
    first = reader.read_chunk(table, None, 4, 1 << 30, lambda _: True)
    assert first is not None
    assert (first.last_key, first.clock, first.seen_to) == ((4,), before, before + 1)
    assert before + 1 == reader.log_end()
    assert first.version(3, 0) == 3 << 52 | before
    execute(library.admin, "UPDATE review SET body = 'b' WHERE id = 4")
    rest = reader.read_chunk(table, first.last_key, 10, 1 << 30, lambda _: True)
    assert rest is not None
    assert rest.clock is not None
    assert rest.clock > before
    everything = dict([*first.rows, *rest.rows])
    assert list(everything) == [(id_,) for id_ in range(1, 10)]
    assert library.read(reader, *range(1, 10)) == everything
    one_row = reader.read_chunk(table, None, 10, 1, lambda _: True)
    assert one_row is not None
    assert (dict(one_row.rows), one_row.last_key) == ({(1,): everything[1,]}, (1,)), "its bytes are its bound"

    monkeypatch.setattr(parts_module, "ROWS_AT_ONCE", 7)
    found: dict[Key, dict[str, Any]] = {}
    after: Key | None = None
    steps = 0
    while after is not None or steps == 0:
        chunk = reader.read_chunk(table, after, 100, 1 << 30, lambda _: True)
        assert chunk is not None
        found |= dict(chunk.rows)
        after, steps = chunk.last_key, steps + 1
    assert (found == everything, steps > 1) == (True, True), "in smaller steps it is the same"
    monkeypatch.setattr(parts_module, "ROWS_AT_ONCE", 1)
    (row,) = library.read(reader, 1).values()
    assert isinstance(row["studio"], ProcessorError), "no step is small enough"


def test_a_list_that_is_too_long_fails_its_document_alone_and_is_not_read(library: Library) -> None:
    execute(library.admin, "INSERT INTO review (id, movie_id, stars) SELECT seq, 2, 1 FROM seq_1000_to_60000")
    reply = many(f"{library.name}.reply", most=1)
    reader = library.reader({"reviews": many(f"{library.name}.review", most=5, parts={"replies": reply})})
    found = library.read(reader, 1, 2, 7)
    assert str(found[2,]["reviews"]) == "It has more than 5 rows in reviews (its bound, `most`)."
    assert str(found[1,]["reviews"]) == "It has more than 1 rows in replies (its bound, `most`)."
    assert [review["id"] for review in found[7,]["reviews"]] == [6, 14]


def test_a_query_of_the_user_s_is_read_instead(library: Library) -> None:
    reviews = {"reviews": many(f"{library.name}.review")}
    reader = library.reader(
        reviews,
        "SELECT id, title, '100%%' AS full, (SELECT count(*) FROM review WHERE movie_id = m.id) AS reviews,"
        " (SELECT avg(stars) FROM review WHERE movie_id = m.id) AS stars"
        " FROM movie AS m WHERE id IN %(id)s AND id <> 4 -- as they are",
    )
    wanted = {"id": 1, "title": "movie 1", "full": "100%", "reviews": 2, "stars": Decimal("6.00000")}
    assert library.read(reader, 1, 4, 77) == {(1,): wanted}
    chunk = reader.read_chunk(library.movie(reader), (2,), 3, 1 << 30, lambda _: True)
    assert chunk is not None
    assert ([key for key, _ in chunk.rows], chunk.last_key) == ([(3,), (5,)], (5,))
    reader.check_query(library.movie(reader))
    for query, words in (
        ("SELECT title FROM movie WHERE id IN %(id)s", "returns no column id"),
        ("SELECT 1 AS id FROM movie", "several rows for the key 1"),
        ("SELECT nothing FROM movie WHERE id IN %(id)s", "The query of document .* fails: Unknown column"),
        ("SELECT id FROM movie WHERE id IN %(movie)s", r"its placeholders are %\(id\)s"),
    ):
        wrong = library.reader(reviews, query)
        with pytest.raises(UsageError, match=words):
            library.read(wrong, 1)
        if "several" not in words:
            with pytest.raises(UsageError, match=words):
                wrong.check_query(library.movie(wrong))


def roots(library: Library, reader: MariaReader, table: str, *values: Key) -> set[Key]:
    (watch,) = [watch for watch in watches(library.movie(reader)) if watch.table.name == table]
    found = reader.root_keys(watch, values, 100, lambda _: True)
    assert found is not None
    where = reader.root_condition(library.movie(reader), watch, values)
    reader.check_condition(library.movie(reader), where)
    chunk = reader.read_chunk(library.movie(reader), None, 100, 1 << 30, lambda _: True, where=where)
    assert chunk is not None
    assert sorted(key for key, _ in chunk.rows) == sorted(found), "a condition finds the same"
    return set(found)


def test_values_lead_to_the_documents_in_which_they_are(library: Library) -> None:
    reader = library.reader()
    assert roots(library, reader, "stu%dio", ("two",)) == {(2,), (5,), (8,)}
    assert roots(library, reader, "stu%dio", ("one",)) == {(1,), (4,), (7,)}, "by the server's idea of equality"
    assert roots(library, reader, "reply", (1,), (4,), (999,)) == {(2,), (5,)}
    assert roots(library, reader, "tag", ("%s",), ('{x},"',), ("none",)) == {(1,), (3,), (5,), (7,), (9,)}
    (watch,) = [watch for watch in watches(library.movie(reader)) if watch.table.name == "stu%dio"]
    assert len(reader.root_keys(watch, [("two",)], 2, lambda _: True) or []) == 2
    assert reader.root_keys(watch, [("two",)], 2, lambda _: False) is None


# ── while it changes ─────────────────────────────────────────────────────────────────────────────────────────────


def random_changes(session: Session, rng: random.Random, changes: int) -> None:
    for _ in range(changes):
        review, movie, studio = rng.randrange(1, 30), rng.randrange(1, 10), rng.choice(("one", "TWO"))
        statement = rng.choice(
            (
                f"UPDATE review SET movie_id = {movie} WHERE id = {review}",
                f"UPDATE review SET stars = stars + 0.1 WHERE id = {review} AND stars < 90",
                f"INSERT IGNORE INTO review (id, movie_id, stars, body) VALUES ({review}, {movie}, 1, 'new')",
                f"DELETE FROM review WHERE id = {review} AND id NOT IN (SELECT review_id FROM reply)",
                f"UPDATE `stu%dio` SET name = CONCAT(name, '.') WHERE `the id` = '{studio}' AND LENGTH(name) < 90",
                f"UPDATE movie SET `studio %s` = '{studio}' WHERE id = {movie}",
                f"UPDATE reply SET place = place + 1 WHERE review_id = {review}",
                f"DELETE FROM movie_tag WHERE movie_id = {movie}",
                f"INSERT IGNORE INTO movie_tag VALUES ('%s', {movie})",
                "UPDATE tag SET weight = weight + 1 WHERE word = '%s'",
            )
        )
        with contextlib.suppress(pymysql.OperationalError):  # a deadlock
            execute(session, statement)


def says(body: str) -> Any:
    return lambda event: event["after"] is not None and event["after"].get("body") == body


def test_documents_follow_with_places_that_show_all_changes_and_with_less_they_do_not(
    library: Library, tmp_path: Path
) -> None:
    """Random writers; at last, changes that are in the log for a while before anybody can see them: of a commit that
    waits for a replica, and of an XA transaction that is prepared."""
    print(f"seed {SEED}")
    marks = itertools.count(1)

    def mark() -> int:
        number = next(marks)
        execute(library.admin, f"INSERT INTO mark VALUES ({number})")
        return number

    def events_so_far() -> list[Event]:
        number = mark()
        return log.until(lambda event: bool(event["source"]["table"] == "mark" and event["after"]["id"] == number))

    with (
        StateStore.open("sqlite:///state.db", tmp_path) as state,
        closing(Log(tmp_path, library.spec, library.reader())) as log,
        ThreadPoolExecutor(5) as pool,
    ):

        def begun() -> bool:
            assert log.server.alive, log.server.last_words()
            mark()
            return bool(log.events)

        wait_until(begun, WAIT_S, "the first event")
        honest = Follower(library.reader(), state, DocumentBuilder, SEED, versions=True)
        last_wins = Follower(library.reader(), state, DocumentBuilder, SEED, versions=False)
        careless = Follower(library.reader(), state, Careless, SEED, versions=True)
        everybody = (honest, last_wins, careless)

        def truth() -> dict[Key, dict[str, Any]]:
            return library.read(library.reader(), *range(1, 10))

        events = events_so_far()
        for turn in range(5):
            writers = [
                pool.submit(random_changes, library.connect(), random.Random(f"{SEED} {turn} {number}"), 25)
                for number in range(3)
            ]
            for follower in everybody:
                follower.follow(events)  # while the next are made
            for writer in writers:
                writer.result()
            events = events_so_far()
        for follower in everybody:
            follower.follow(events)
            follower.catch_up()
        assert honest.store.rows() == truth()
        assert last_wins.store.rows() != truth(), "what comes last is not always what is newest"

        execute(
            library.admin,
            "SET GLOBAL rpl_semi_sync_master_wait_point = 'AFTER_SYNC'",
            "SET GLOBAL rpl_semi_sync_master_timeout = 3600000",
            "SET GLOBAL rpl_semi_sync_master_enabled = ON",
        )
        session = library.connect()
        try:
            waiting = pool.submit(execute, session, "UPDATE review SET body = 'without a replica' WHERE id = 4")
            looks = honest.count_looks()
            events = log.until(says("without a replica"))
            careless.follow(events)
            patient = pool.submit(honest.follow, events)
            wait_until(lambda: looks() > 3, WAIT_S, "looks at snapshots that do not show it")
            assert not patient.done()
        finally:
            execute(library.admin, "SET GLOBAL rpl_semi_sync_master_enabled = OFF")
        waiting.result()
        patient.result()
        for follower in everybody:
            follower.catch_up()
        assert honest.store.rows() == truth()
        assert careless.store.rows() != truth(), "a snapshot that does not show a change has a place all the same"

        execute(session, "XA START 'one'", "UPDATE review SET body = 'prepared' WHERE id = 7")
        execute(session, "XA END 'one'", "XA PREPARE 'one'")
        try:
            with pytest.raises(SourceBusy, match="before the end of the XA transaction"):
                library.reader().clock()
            patient = pool.submit(honest.follow, log.until(says("prepared")))
            wait_until(lambda: "XA transaction" in honest.waits_for(), WAIT_S, "a builder that waits")
            assert not patient.done()
        finally:
            execute(session, "XA COMMIT 'one'")
        patient.result()
        honest.catch_up()
        assert honest.store.rows() == truth()
