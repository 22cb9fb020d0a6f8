"""Connections to a real PostgreSQL: how long Delta waits for one that says nothing."""

from __future__ import annotations

import datetime as dt

import psycopg
import pytest

from delta_sync.changes import Key
from delta_sync.errors import SourceBusy, UsageError
from delta_sync.masking import Mask
from delta_sync.sources.postgresql import reader as module
from delta_sync.sources.postgresql.connection import KEEP_ALIVE, connect
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import SourceSpec
from delta_sync.testing.servers import PostgreSQL


def source_of(server: PostgreSQL, options: str = "") -> SourceSpec:
    return SourceSpec(
        url=server.url.replace("postgres:postgres@", "postgres@") + options, password="${env:THE_PASSWORD}"
    )


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_PASSWORD", "postgres")


def test_a_source_that_says_nothing_is_waited_for_no_longer_than_was_said(postgresql: PostgreSQL) -> None:
    reader = PostgresReader(source_of(postgresql), "test", answer_s=0.5)
    first = reader.sample()
    postgresql.freeze()
    with pytest.raises(SourceBusy, match=r"said nothing for 0\.5 s|does not answer"):
        reader.sample()
    postgresql.thaw()
    assert reader.sample().position >= first.position
    reader.close()


def test_connections_are_kept_alive_unless_the_url_says_otherwise(postgresql: PostgreSQL) -> None:
    for options, expected in (("", KEEP_ALIVE["keepalives_idle"]), ("?keepalives_idle=77", 77)):
        with connect(source_of(postgresql, options)) as connection:
            assert connection.info.get_parameters()["keepalives_idle"] == str(expected)


def test_keys_are_walked_in_their_order(postgresql: PostgreSQL) -> None:
    """By a key of several columns and types, text in a collation of its own among them, and one that Python lacks."""
    reader = PostgresReader(source_of(postgresql), "test")
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute(
            'CREATE TABLE walked (name text COLLATE "C", "o k" date, n int, body text, PRIMARY KEY (name, "o k"))'
        )
        connection.execute(
            "INSERT INTO walked SELECT name, day::date, 1, 'body' FROM"
            " unnest(ARRAY['a', 'B', 'ü', '', 'a b']) AS name, unnest(ARRAY['2024-02-29', 'infinity']) AS day"
        )
        try:
            table = reader.tables(["public.walked"])["public.walked"]
            chunk = reader.read_chunk(table, None, 100, 1 << 20, lambda _: True)
            assert chunk is not None
            keys = [key for key, _ in chunk.rows]
            assert len(keys) == 10
            assert [reader.key_behind(table, None, number + 1) for number in range(11)] == [*keys, None]
            assert [reader.key_behind(table, key, 3) for key in keys] == [*keys[3:], None, None, None]
        finally:
            connection.execute("DROP TABLE walked")
            reader.close()


@pytest.mark.parametrize(("size", "most", "left_out"), [(1, 10, 0), (1_000_000, 2, 2), (1_000_000, 10, 0)])
def test_rows_of_more_keys_than_a_statement_takes(
    size: int, most: int, left_out: int, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with long values, until these have so many bytes (`most` rows); with short ones all of them."""
    monkeypatch.setattr(module, "KEYS_AT_ONCE", 2)
    monkeypatch.setattr(module, "KEYS_BYTES", (most - 1) * 1_000_000 + 1)
    reader = PostgresReader(source_of(postgresql), "test")
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE sized (id int PRIMARY KEY, body text)")
        connection.execute("ALTER TABLE sized ALTER body SET STORAGE EXTERNAL")
        connection.execute(f"INSERT INTO sized SELECT id, repeat('x', {size}) FROM generate_series(1, 9) id")
        try:
            table = reader.tables(["public.sized"])["public.sized"]
            chunk = reader.read_keys(table, [(9,), (77,), (5,), (1,), (3,)], lambda _: True)
            assert chunk is not None
            assert (chunk.last_key is None) == (not left_out)
            found = [key for key, _ in chunk.rows]
            assert len(found) == len(set(found)) == 4 - left_out
            assert set(found) <= {(9,), (5,), (1,), (3,)}
        finally:
            connection.execute("DROP TABLE sized")
            reader.close()


def test_keys_beyond_python_stand_beside_others_and_those_beyond_their_type_have_no_row(postgresql: PostgreSQL) -> None:
    """`valid_to = infinity` is in many a key; psycopg takes no list of datetimes and texts."""
    reader = PostgresReader(source_of(postgresql), "test")
    day = dt.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=dt.UTC)
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("CREATE TYPE grade AS ENUM ('a', 'b')")
        connection.execute("CREATE TABLE valid (id int, upto timestamptz, grade grade, PRIMARY KEY (id, upto, grade))")
        connection.execute("INSERT INTO valid VALUES (1, 'infinity', 'a'), (1, %s, 'a')", [day])
        try:
            table = reader.tables(["public.valid"])["public.valid"]
            keys: list[Key] = [(1, "infinity", "a"), (1, day, "a")]
            for others in ([], [(1, day, "z")], [(1 << 40, day, "a"), (1, day, "\x00"), (1, day, "\ud800")]):
                chunk = reader.read_keys(table, [*others, *keys], lambda _: True)
                assert chunk is not None
                assert {key for key, _ in chunk.rows} == set(keys)
            assert set(reader.keys_having(table, "upto", ["infinity", day])) == set(keys)
        finally:
            connection.execute("DROP TABLE valid; DROP TYPE grade")
            reader.close()


def test_what_the_server_says_of_a_condition_quotes_no_value_that_is_masked(postgresql: PostgreSQL) -> None:
    reader = PostgresReader(source_of(postgresql), "test")
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE hidden (id int PRIMARY KEY, mail text)")
        connection.execute("INSERT INTO hidden VALUES (1, 'ann@example.org')")
        try:
            table = reader.tables(["public.hidden"])["public.hidden"]
            columns = [column._replace(mask=Mask("redact", "***")) for column in table.columns if column.name == "mail"]
            for read, said in (
                (table, "ann@example"),
                (table._replace(columns=(table.columns[0], *columns)), "masked"),
            ):
                with pytest.raises(UsageError, match=f"The condition .* fails: .*{said}") as raised:
                    reader.read_chunk(read, None, 10, 1 << 20, lambda _: True, where="mail::int = 1")
            assert "ann" not in str(raised.value)
            for where in ("id = 1) OR (id = 2", "id = 1 THEN 1 END) OR (CASE WHEN true", "id = 1; DROP TABLE hidden"):
                with pytest.raises(UsageError, match=r"The condition .* fails: syntax error"):
                    reader.check_condition(table, where)
            for where in ("mail LIKE '%n%' -- Ann", "id IN (SELECT 1) AND (true)", "id = 1 /* one */"):
                reader.check_condition(table, where)
            with pytest.raises(UsageError, match='column "nothing" does not exist'):
                reader.read_chunk(read, None, 10, 1 << 20, lambda _: True, where="nothing = 1")
        finally:
            connection.execute("DROP TABLE hidden")
            reader.close()


def test_names_with_a_percent_sign_are_no_placeholders(postgresql: PostgreSQL) -> None:
    reader = PostgresReader(source_of(postgresql), "test")
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("CREATE TYPE \"50%s\" AS ENUM ('a', 'b')")
        connection.execute('CREATE TABLE "per%s" ("k%" "50%s" PRIMARY KEY, "v%%(x)s" text)')
        connection.execute("INSERT INTO \"per%s\" VALUES ('a', '1%'), ('b', '2')")
        try:
            table = reader.tables(["public.per%s"])["public.per%s"]
            expected = [(("a",), {"k%": "a", "v%%(x)s": "1%"}), (("b",), {"k%": "b", "v%%(x)s": "2"})]
            read = [
                reader.read_chunk(table, None, 10, 1 << 20, lambda _: True),
                reader.read_keys(table, [("a",), ("b",)], lambda _: True),
            ]
            assert [chunk and sorted(chunk.rows, key=str) for chunk in read] == [expected] * 2
            rest = reader.read_chunk(table, ("a",), 10, 1 << 20, lambda _: True, to=("b",), where="\"v%%(x)s\" <> '%'")
            assert rest is not None
            assert rest.rows == expected[1:]
            assert [reader.key_behind(table, after, 1) for after in (None, ("a",), ("b",))] == [("a",), ("b",), None]
            assert reader.keys_having(table, "k%", ["a", "b"]) == [("a",), ("b",)]
            assert reader.keys_having(table, "v%%(x)s", ["2", "'1%'", "1"]) == [("b",)]
            with pytest.raises(UsageError, match=r"Rows cannot be found by .* invalid input value for enum"):
                reader.keys_having(table, "k%", ["a", "c"])
        finally:
            connection.execute('DROP TABLE "per%s"; DROP TYPE "50%s"')
            reader.close()
