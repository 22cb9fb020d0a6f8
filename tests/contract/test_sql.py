"""The SQL sink keeps the contract, on PostgreSQL and SQLite; and what is SQL's own."""

from __future__ import annotations

import decimal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
import sqlalchemy as sa

from columns_contract import ColumnsContract
from delta_sync.changes import APPLIED, STALE, Write
from delta_sync.errors import SinkBusy, UsageError
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.sql import ROWS, SqlOptions, SqlSink, SqlTargetOptions
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
    with sink._connected().begin() as connection:
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
