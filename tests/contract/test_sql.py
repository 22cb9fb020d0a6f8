"""The SQL sink keeps the contract, on PostgreSQL and SQLite; and what is SQL's own."""

from __future__ import annotations

import decimal
import functools
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
import sqlalchemy as sa

from columns_contract import ColumnsContract
from delta_sync.changes import APPLIED, STALE, Write
from delta_sync.errors import SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.sql import SqlOptions, SqlSink, SqlTargetOptions
from delta_sync.sinks.sql_tables import ROWS
from delta_sync.testing.contract import MOVIE, AnySink, apply, scanned, storm
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.testing.servers import PostgreSQL
from delta_sync.values import Document

TTL_S = 3600
WAIT_S = 30.0  # far above what anything here takes


class TestSqlite(ColumnsContract):
    storm_seeds = range(1)
    storm_writes = 200

    @pytest.fixture
    def sink(self, tmp_path: Path) -> Iterator[AnySink]:
        sink = SqlSink("warehouse", f"sqlite:///{tmp_path}/warehouse.db", SqlOptions(), TTL_S)
        yield sink
        sink.close()

    @pytest.fixture
    def unreachable(self, tmp_path: Path) -> AnySink:
        return SqlSink("warehouse", f"sqlite:///{tmp_path}/nowhere/warehouse.db", SqlOptions(), TTL_S)


class TestPostgresql(ColumnsContract):
    storm_seeds = range(2)
    storm_writes = 200
    rejects: ClassVar[frozenset[str]] = frozenset({"zero_bytes"})

    @pytest.fixture
    def sink(self, postgresql: PostgreSQL) -> Iterator[AnySink]:
        sink = SqlSink("warehouse", postgresql.url, SqlOptions(), TTL_S)
        yield sink
        sink.close()

    @pytest.fixture
    def unreachable(self) -> AnySink:
        return SqlSink("warehouse", f"postgresql://nobody@127.0.0.1:{free_port()}/none", SqlOptions(), TTL_S)


@pytest.fixture(params=["sqlite", "postgresql"])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlSink]:
    url = f"sqlite:///{tmp_path}/warehouse.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql").url
    sink = SqlSink("warehouse", url, SqlOptions(), TTL_S)
    yield sink
    sink.close()


@pytest.fixture
def target(sink: SqlSink) -> Iterator[Target]:
    target = sink.target(MOVIE, SqlTargetOptions(columns={"rating": "float", "extra": "json"}))
    sink.drop(target)
    sink.prepare(target)
    yield target
    sink.drop(target)


def query(sink: SqlSink, statement: str) -> list[Mapping[str, Any]]:
    with sink._link.reading() as connection:
        found = connection.execute(sa.text(statement))
        return [dict(row) for row in found.mappings()] if found.returns_rows else []


def test_users_see_a_view_that_gets_a_column_for_each_field(sink: SqlSink, target: Target) -> None:
    apply(sink, target, (1,), 5, {"title": "Casablanca", "year": 1942})
    apply(sink, target, (2,), 6, {"title": "Notorious", "rating": 8, "note": None})
    apply(sink, target, (3,), 7, {"title": "Gone"})
    apply(sink, target, (3,), 8, None)
    assert query(sink, "SELECT * FROM movie ORDER BY _delta_id") == [
        {"_delta_id": "1", "_version": 5, "title": "Casablanca", "year": 1942, "rating": None},
        {"_delta_id": "2", "_version": 6, "title": "Notorious", "year": None, "rating": 8.0},
    ]


def test_a_value_of_another_type_is_rejected_and_says_where(sink: SqlSink, target: Target) -> None:
    writes = [Write((1,), 5, {"year": 1942}), Write((2,), 5, {"year": "soon"}), Write((3,), 5, {"year": 1943})]
    first, second, third = sink.apply(target, writes)
    assert (first, third) == (APPLIED, APPLIED)
    assert second.kind == "rejected"
    assert "the field year is of type text" in second.reason
    assert "movie, which is of type integer" in second.reason
    assert apply(sink, target, (1,), 6, {"year": 1942.5}).kind == "rejected"
    assert sink.read(target, [(1,)]) == [Stored(5, {"year": 1942})]


def test_numbers_of_a_new_column_find_a_type_that_holds_them_all(sink: SqlSink, target: Target) -> None:
    documents: list[Document] = [{"n": 1}, {"n": 0.5}, {"n": decimal.Decimal("0.1")}, {"n": 1 << 80}]
    assert sink.apply(target, [Write((n,), 5, one) for n, one in enumerate(documents)]) == [APPLIED] * 4
    expected = [Stored(5, sink.stored_form(target, one)) for one in documents]
    assert sink.read(target, [(n,) for n in range(4)]) == expected
    assert [found and found.document for found in expected] == [{"n": 1}, {"n": 0.5}, {"n": 0.1}, {"n": 1 << 80}]


def test_a_column_whose_type_the_user_chose(sink: SqlSink, target: Target) -> None:
    documents: list[Document] = [{"rating": 8, "extra": 1}, {"rating": 8.5, "extra": {"a": [1]}}]
    assert sink.apply(target, [Write((n,), 5, one) for n, one in enumerate(documents)]) == [APPLIED] * 2
    assert [found and found.document for found in sink.read(target, [(0,), (1,)])] == documents
    assert apply(sink, target, (2,), 5, {"rating": 2**53 + 1}).kind == "rejected", "no double is that number"


def test_names_that_a_column_cannot_have(sink: SqlSink, target: Target) -> None:
    for name in ("", "x" * 64, "_delta_id", "a\0b"):
        assert apply(sink, target, (1,), 5, {name: 1}).kind == "rejected", name
    assert apply(sink, target, (1,), 5, {'a"; DROP TABLE movie --': 1, "%s": 2, ":x": 3, "f0": 4}) == APPLIED
    outcome = apply(sink, target, (2,), 5, {"F0": 4})
    assert outcome.kind == ("rejected" if sink.is_sqlite else "applied")


def test_what_the_store_refuses_in_one_row_is_rejected_alone(sink: SqlSink, target: Target) -> None:
    apply(sink, target, (0,), 5, {"year": 1900})
    query(
        sink,
        "CREATE TRIGGER no_old BEFORE INSERT ON movie__delta WHEN new.year < 1900"
        " BEGIN SELECT raise(ABORT, 'no such film'); END"
        if sink.is_sqlite
        else "ALTER TABLE movie__delta ADD CONSTRAINT old CHECK (year >= 1900)",
    )
    outcomes = sink.apply(target, [Write((n,), 6, {"year": 1890 + n}) for n in range(20)])
    assert [outcome.kind for outcome in outcomes] == ["rejected"] * 10 + ["applied"] * 10
    assert len(scanned(sink, target)) == 11


def test_two_processes_add_the_same_column(sink: SqlSink, target: Target) -> None:
    other = SqlSink("warehouse", sink.url, SqlOptions(), TTL_S)
    apply(sink, target, (1,), 5, {"title": "Casablanca"})
    assert apply(other, target, (2,), 5, {"title": "Notorious", "year": 1946}) == APPLIED
    assert apply(sink, target, (3,), 5, {"year": "soon"}).kind == "rejected", "the other one was first"
    assert apply(sink, target, (2,), 4, {"year": 1}) == STALE
    other.drop(target)
    with pytest.raises(SinkBusy):
        apply(sink, target, (3,), 6, {"year": 1946})
    assert apply(sink, target, (3,), 6, {"year": 1946}) == APPLIED, "created again"
    other.close()


def test_a_column_that_another_process_added_is_emptied_by_a_newer_document(sink: SqlSink, target: Target) -> None:
    """An upsert that knew fewer columns would leave an older document's value in the others."""
    other = SqlSink("warehouse", sink.url, SqlOptions(), TTL_S)
    apply(sink, target, (1,), 4, {"title": "Casablanca"})
    apply(other, target, (1,), 5, {"title": "Casablanca", "year": 1942})
    assert apply(sink, target, (1,), 6, {"title": "Notorious"}) == APPLIED
    assert sink.read(target, [(1,)]) == [Stored(6, {"title": "Notorious"})]
    other.close()


def test_expired_tombstones_are_swept(sink: SqlSink, target: Target) -> None:
    now_s = 1_000_000.0
    clocked = SqlSink("warehouse", sink.url, SqlOptions(), 60, now=lambda: now_s)
    apply(clocked, target, (1,), 5, None)
    now_s += 59.9
    assert clocked.sweep(target) == 0
    now_s += 1
    assert clocked.sweep(target) == 1
    assert clocked.read(target, [(1,)]) == [None]
    clocked.close()


def test_a_truncate_waits_for_a_batch_that_does_not_know_its_floor(postgresql: PostgreSQL) -> None:
    """Else a document below the floor would be committed after the look for such, and stay."""
    sink = SqlSink("warehouse", postgresql.url, SqlOptions(), TTL_S)
    target = sink.target(MOVIE, SqlTargetOptions())
    sink.drop(target)
    sink.prepare(target)
    apply(sink, target, (1,), 9, {"n": 9})
    with ThreadPoolExecutor(2) as pool, psycopg.connect(postgresql.url) as holder:
        holder.execute("SELECT 1 FROM movie__delta FOR UPDATE")  # so that the batch stands still at row 1
        batch = pool.submit(sink.apply, target, [Write((1,), 5, {"n": 5}), Write((2,), 5, {"n": 5})])
        wait_until(lambda: _waiting(postgresql) == 1, WAIT_S, "a batch that waits")
        truncate = pool.submit(sink.truncate, target, 6)
        wait_until(lambda: truncate.done() or _waiting(postgresql) == 2, WAIT_S, "a truncate that waits")
        holder.rollback()
        assert batch.result(WAIT_S) == [STALE, APPLIED]
        truncate.result(WAIT_S)
    assert scanned(sink, target) == {"1": 9}
    sink.drop(target)
    sink.close()


def _waiting(server: PostgreSQL) -> int:
    """Return how many sessions wait for a lock on the target's rows or its floor."""
    asked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%movie\\_\\_delta%'"
    with psycopg.connect(server.url) as connection:
        row = connection.execute(asked).fetchone()
    assert row is not None
    return int(row[0])


class VersionsOff(SqlSink):
    """What a naive sink does: the last write to arrive wins."""

    def _not_newer(self, table: sa.Table, excluded: Any) -> sa.ColumnElement[bool]:
        return sa.true()


def test_storms_find_a_sink_that_does_not_compare_versions(tmp_path: Path) -> None:
    sink = VersionsOff("warehouse", f"sqlite:///{tmp_path}/warehouse.db", SqlOptions(), TTL_S)
    with pytest.raises(AssertionError, match=r"seed \d+"):
        storm(TestSqlite(), sink, sink.target(MOVIE, SqlTargetOptions()), 0)
    sink.close()


def test_a_view_of_the_users_own_is_a_problem(sink: SqlSink, target: Target) -> None:
    sink.drop(target)
    query(sink, "CREATE TABLE movie (id integer)")
    problems = sink.check([target])
    query(sink, "DROP TABLE movie")
    assert any("movie is there" in problem.what for problem in problems)
    with pytest.raises(UsageError, match="ends as Delta's own"):
        sink.target(MOVIE, SqlTargetOptions(table=f"movie{ROWS}"))


def test_drop_removes_what_is_left_when_somebody_dropped_the_table(sink: SqlSink, target: Target) -> None:
    """Else the floor would stay, and keep out what a new pipeline of that name writes."""
    sink.truncate(target, 9)
    query(sink, "DROP TABLE movie__delta" + ("" if sink.is_sqlite else " CASCADE"))
    assert sink.drop(target) == 0
    assert [name for name in names_in(sink) if name.startswith("movie")] == []


def test_drop_leaves_tables_of_others(sink: SqlSink, target: Target) -> None:
    sink.drop(target)
    query(sink, "CREATE TABLE movie__delta (id integer)")
    query(sink, "CREATE TABLE movie__delta_floor (id integer)")
    assert sink.drop(target) == 0
    assert {"movie__delta", "movie__delta_floor"} <= set(names_in(sink))
    query(sink, "DROP TABLE movie__delta_floor")
    query(sink, "DROP TABLE movie__delta")


def test_tables_are_in_the_schema_that_the_user_chose(postgresql: PostgreSQL) -> None:
    sink = SqlSink("warehouse", postgresql.url, SqlOptions(db_schema="films %s"), TTL_S)
    query(sink, 'CREATE SCHEMA IF NOT EXISTS "films %s"')
    target = sink.target(MOVIE, SqlTargetOptions(table="movie 50%"))
    assert target.place == "films %s.movie 50%"
    assert sink.check([target]) == []
    sink.prepare(target)
    assert apply(sink, target, (1,), 5, {"a %": 1}) == APPLIED
    assert apply(sink, target, (1,), 4, {"b": 2}) == STALE
    assert query(sink, 'SELECT "a %" AS a FROM "films %s"."movie 50%"') == [{"a": 1}]
    assert sink.drop(target) == 1
    query(sink, 'DROP SCHEMA "films %s"')
    sink.close()


# ── generations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def generation(sink: SqlSink, number: int) -> tuple[SqlSink, Target]:
    other = SqlSink("warehouse", sink.url, SqlOptions(), TTL_S)
    other.number = number
    return other, other.target(MOVIE, SqlTargetOptions())


@pytest.fixture
def both(sink: SqlSink, target: Target) -> Iterator[tuple[tuple[SqlSink, Target], tuple[SqlSink, Target]]]:
    """Yield a sink's first generation, which has been written to and is read, and a second one beside it."""
    for key in (1, 3):
        apply(sink, target, (key,), 5, {"title": "old", "year": 1942, "old": True})
    first, second = generation(sink, 1), generation(sink, 2)
    assert first[1].place == target.place, "the first is where it always was"
    for one, of in (first, second):
        one.prepare(of)
        one.prepare(of)  # a run begins anew
    yield first, second
    for one, of in (first, second):
        one.drop(of)
        one.close()


def films(sink: SqlSink, name: str = "movie") -> dict[str, Mapping[str, Any]]:
    rows = query(sink, f"SELECT * FROM {name} ORDER BY _delta_id")  # as the how-to page says
    return {row["_delta_id"]: {k: v for k, v in row.items() if not k.startswith("_")} for row in rows}


def test_a_new_generation_is_built_beside_the_old_one_and_takes_the_view_over(
    sink: SqlSink, target: Target, both: tuple[tuple[SqlSink, Target], tuple[SqlSink, Target]]
) -> None:
    (first, old), (second, new) = both
    before = {"title": "old", "year": 1942, "old": True}
    assert first.check([old]) == second.check([new]) == []
    first.truncate(old, 4)
    assert second.newest_version(new) == 0, "the floor is its own, too"
    for key in (1, 2, 3):
        assert apply(second, new, (key,), 6, {"year": "soon", "title": "new"}) == APPLIED, "types of its own"
    apply(second, new, (3,), 7, None)
    assert second.apply(new, [Write((3,), 6, {"title": "late"})]) == [STALE]
    apply(first, old, (3,), 7, None)
    assert films(sink) == {"1": before}, "nothing of the new one is seen"

    second.lead_readers([new])
    second.lead_readers([new])  # again, by whoever was killed
    now = {"year": "soon", "title": "new"}
    assert films(sink) == {"1": now, "2": now}
    with pytest.raises(SinkRefused, match="shows another table"):
        sink.prepare(target)  # it lost its state, and would write where nobody looks
    assert apply(first, old, (4,), 8, {**before, "more": 1}) == APPLIED
    assert apply(sink, target, (5,), 8, {**before, "most": 1}) == APPLIED, "a process that knows of no generations yet"
    assert films(sink) == {"1": now, "2": now}, "columns of the old one lead nobody back"
    assert apply(second, new, (2,), 8, {**now, "more": 1}) == APPLIED
    assert films(sink) == {"1": {**now, "more": None}, "2": {**now, "more": 1}}

    first.lead_readers([old])
    rest = {"more": None, "most": None}
    assert films(sink) == {"1": {**before, **rest}, "4": {**before, "more": 1, "most": None},
                           "5": {**before, "more": None, "most": 1}}, "the way back"  # fmt: skip
    sink.prepare(target)
    second.lead_readers([new])
    assert first.drop(old) == 3
    assert films(sink).keys() == {"1", "2"}, "the view is not the first one's any more"
    assert second.drop(new) == 2
    assert [name for name in names_in(sink) if name.startswith("movie")] == []


def names_in(sink: SqlSink) -> list[str]:
    with sink._link.reading() as connection:
        inspector = sa.inspect(connection)
        return [*inspector.get_table_names(), *inspector.get_view_names()]


def test_readers_see_one_generation_or_the_other(
    sink: SqlSink, both: tuple[tuple[SqlSink, Target], tuple[SqlSink, Target]]
) -> None:
    (first, old), (second, new) = both
    for key in (1, 3):
        apply(second, new, (key,), 6, {"title": "new"})  # a column less, so the view cannot just be replaced
    seen: Counter[str] = Counter()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            titles = {row["title"] for row in query(sink, "SELECT title FROM movie")}
            assert titles in ({"old"}, {"new"})
            seen.update(titles)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            for one, of, title in 5 * ((second, new, "new"), (first, old, "old")):
                before = seen[title]
                one.lead_readers([of])
                sees = functools.partial(lambda title, before: seen[title] > before or reader.done(), title, before)
                wait_until(sees, WAIT_S, f"a reader of {title}")
        finally:
            done.set()
        reader.result()


def test_privileges_and_views_of_the_users_own_stay(postgresql: PostgreSQL, request: pytest.FixtureRequest) -> None:
    sink = SqlSink("warehouse", postgresql.url, SqlOptions(), TTL_S)
    target = sink.target(MOVIE, SqlTargetOptions())
    sink.drop(target)
    sink.prepare(target)
    second, new = generation(sink, 2)

    def clean() -> None:
        query(sink, "DROP VIEW IF EXISTS theirs")
        for one, of in ((second, new), (generation(sink, 1))):
            one.drop(of)
            one.close()
        query(sink, 'DROP ROLE IF EXISTS "read %s er"')
        sink.close()

    request.addfinalizer(clean)
    apply(sink, target, (1,), 5, {"title": "old", "year": 1942})
    query(sink, 'CREATE ROLE "read %s er"')
    query(sink, 'GRANT SELECT ON movie TO "read %s er" WITH GRANT OPTION')
    query(sink, "CREATE VIEW theirs AS SELECT _delta_id, title FROM movie")
    second.prepare(new)
    apply(second, new, (1,), 6, {"more": 1, "title": "new", "year": 1943})
    second.lead_readers([new])
    assert films(sink, "theirs") == {"1": {"title": "new"}}, "the view was replaced, so theirs follows"

    first, old = generation(sink, 1)
    apply(second, new, (1,), 7, {"title": "new"})
    with pytest.raises(SinkRefused, match="theirs depends on view movie"):
        first.lead_readers([old])  # it has no column `more`
    first.close()
    assert films(sink, "theirs") == {"1": {"title": "new"}}, "and nothing has changed"
    query(sink, "DROP VIEW theirs")
    first.lead_readers([old])
    assert films(sink) == {"1": {"title": "old", "year": 1942}}
    granted = "SELECT has_table_privilege('read %s er', 'movie', 'SELECT WITH GRANT OPTION') AS may"
    assert query(sink, granted) == [{"may": True}]
