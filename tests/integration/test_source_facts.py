"""The queries behind the source's checks, on the oldest and the newest PostgreSQL that are to be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from delta_sync.errors import CheckFailed, SourceBusy
from delta_sync.sources.postgresql.checks import Facts, problems, read_facts, resolve_bare
from delta_sync.sources.postgresql.connection import connect
from delta_sync.spec import PipelineSpec, SourceSpec, spec_from
from delta_sync.testing.servers import PostgreSQL

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
TABLES = """
CREATE TABLE movie (id int PRIMARY KEY, slug text UNIQUE, title text NOT NULL UNIQUE);
CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE);
CREATE TABLE keyed (a int NOT NULL, "B" int NOT NULL);
CREATE UNIQUE INDEX keyed_key ON keyed ("B", a);
CREATE UNIQUE INDEX keyed_partial ON keyed (a) WHERE a > 0;
CREATE UNIQUE INDEX keyed_expression ON keyed ((a + 1));
ALTER TABLE keyed REPLICA IDENTITY USING INDEX keyed_key;
CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
CREATE SCHEMA "odd schema";
CREATE TABLE "odd schema"."Odd.Table" (id int PRIMARY KEY);
CREATE TABLE public."MOVIE" (id int PRIMARY KEY);
CREATE PUBLICATION ours FOR TABLE movie, parts WITH (publish = 'insert, update', publish_via_partition_root = true);
"""


@pytest.fixture(scope="module", params=["15", "16", "18"])
def server(request: pytest.FixtureRequest) -> Iterator[PostgreSQL]:
    """A server with few slots and the tables above."""
    settings: dict[str, Any] = {
        "max_replication_slots": 1,
        "max_slot_wal_keep_size": "64MB",
        "wal_sender_timeout": "5s",
    }
    if request.param == "15":
        if not DEBIAN_15.is_dir():
            pytest.skip("PostgreSQL 15 is not installed")
        made = PostgreSQL(bin_dir=DEBIAN_15, **settings)
    else:
        made = PostgreSQL(version=18 if request.param == "18" else 16, **settings)
    with made, psycopg.connect(made.url, autocommit=True) as connection:
        connection.execute(TABLES)
        connection.execute("SELECT pg_create_logical_replication_slot('delta_m', 'pgoutput')")
        yield made


def spec_of(server: PostgreSQL, *tables: str, **source: str) -> PipelineSpec:
    url = server.url.replace("postgres:postgres@", "postgres@")
    data = {"url": url, "password": "${env:DELTA_TEST_PASSWORD}", **source}
    return spec_from(
        {"name": "m", "source": data, "tables": dict.fromkeys(tables), "sinks": {"cache": {"url": "redis://h"}}}, "test"
    )


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTA_TEST_PASSWORD", "postgres")


def facts_of(spec: PipelineSpec) -> Facts:
    with connect(spec.source) as connection:
        return read_facts(connection, spec)


def test_what_the_catalogue_says_of_tables(server: PostgreSQL) -> None:
    names = ("public.movie", "public.deferred", "public.keyed", "public.parts", "odd schema.Odd.Table")
    found = {table.id: table for table in facts_of(spec_of(server, *names)).tables}
    assert set(found) == set(names)
    assert found["public.movie"].primary_key == ("id",)
    assert [(index.name, index.nullable) for index in found["public.movie"].unique_indexes] == [
        ("movie_slug_key", ("slug",)),
        ("movie_title_key", ()),
    ]
    assert found["public.deferred"].primary_key == (), "the log does not use a deferrable key"
    assert found["public.keyed"].identity_index == ('"B"', "a")
    assert [index.name for index in found["public.keyed"].unique_indexes] == ["keyed_key"]
    assert found["public.parts"].kind == "p"
    assert found["public.parts"].inherited_by == (), "partitions are none"
    assert found["odd schema.Odd.Table"].sql_name == '"odd schema"."Odd.Table"'


def test_what_the_server_says_of_itself(server: PostgreSQL) -> None:
    facts = facts_of(spec_of(server, "public.movie", "public.nope", publication="ours"))
    assert facts.replication_refused is None
    assert (facts.used_slots, facts.max_slots) == (1, 1)
    assert (facts.slot_wal_keep_mb, facts.sender_timeout_ms) == (64, 5000)
    assert facts.slot is not None
    assert (facts.slot.plugin, facts.slot.active) == ("pgoutput", False)
    assert facts.publication is not None
    assert facts.publication.tables == {"public.movie", "public.parts"}
    assert (facts.publication.update, facts.publication.delete, facts.publication.via_root) == (True, False, True)
    assert "public.movie" in facts.candidates


def test_no_slot_is_left(server: PostgreSQL) -> None:
    found = problems(facts_of(spec_of(server, "public.movie", slot="another")), spec_of(server, "public.movie"))
    assert [problem.what for problem in found if problem.fatal] == [
        "all 1 replication slots are taken (max_replication_slots)"
    ]


def test_a_server_that_is_not_set_up_for_it() -> None:
    with PostgreSQL(wal_level="replica", max_wal_senders=1, max_replication_slots=0) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE movie (id int PRIMARY KEY)")
        spec = spec_of(server, "public.movie")
        fatal = [problem.what for problem in problems(facts_of(spec), spec) if problem.fatal]
    assert fatal[0].startswith("wal_level is replica")
    assert fatal[1].startswith("all 0 replication slots")
    assert len(fatal) == 2


def test_a_bare_name_is_found_as_sql_finds_it(server: PostgreSQL) -> None:
    with psycopg.connect(server.url) as connection:
        assert resolve_bare(connection, ["movie", "MOVIE", "Movie", "Odd.Table", "nope"]) == {
            "movie": "public.movie",
            "MOVIE": "public.MOVIE",
            "Movie": "public.movie",
        }
        connection.execute('SET search_path = "odd schema", public')
        assert resolve_bare(connection, ["Odd.Table"]) == {"Odd.Table": "odd schema.Odd.Table"}


def test_a_server_that_is_down_passes_by_itself_and_a_wrong_password_does_not(server: PostgreSQL) -> None:
    source = spec_of(server, "public.movie").source
    wrong = SourceSpec(url=source.url, password="${env:DELTA_WRONG_PASSWORD}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTA_WRONG_PASSWORD", "not-it")
        with pytest.raises(CheckFailed, match="password of role postgres"):
            connect(wrong)
    server.stop()
    try:
        with pytest.raises(SourceBusy, match="nothing listens"):
            connect(source)
    finally:
        server.start()
