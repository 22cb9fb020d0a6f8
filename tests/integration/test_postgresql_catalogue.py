"""Tables, keys and fingerprints as a real PostgreSQL has them."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from delta_sync.sources.postgresql import codec
from delta_sync.sources.postgresql.catalogue import obstacles, read_catalogue, read_fingerprints, read_tables
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.servers import PostgreSQL


@pytest.fixture
def connection(postgresql: PostgreSQL) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgresql.url, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS catalogue")
        admin.execute("CREATE DATABASE catalogue")
    with psycopg.connect(postgresql.url_of("catalogue"), autocommit=True) as connection:
        yield connection


def table_of(connection: psycopg.Connection, name: str) -> Table:
    return read_tables(connection, [name])[name]


def test_columns(connection: psycopg.Connection) -> None:
    connection.execute("CREATE TYPE mood AS ENUM ('x')")
    connection.execute("CREATE DOMAIN price AS numeric(6,2)")
    connection.execute("CREATE DOMAIN cheap AS price CHECK (value < 5)")
    connection.execute(
        "CREATE TABLE movie (id bigserial PRIMARY KEY, gone int, title text NOT NULL, rating numeric(3,1), cost cheap,"
        " costs cheap[], mood mood, moods mood[][], code varchar(5), tiny char(2), tags text[],"
        " twice bigint GENERATED ALWAYS AS (id * 2) STORED, plain text, raw bit(3), shift interval)"
    )
    connection.execute("ALTER TABLE movie ALTER plain SET STORAGE PLAIN, DROP gone")
    assert table_of(connection, "public.movie") == Table(
        "public",
        "movie",
        (
            Column("id", "bigint", Kind.INTEGER, nullable=False),
            Column("title", "text", Kind.TEXT, nullable=False, may_be_absent=True),
            Column("rating", "numeric(3,1)", Kind.DECIMAL, precision=3, scale=1),
            Column("cost", "numeric(6,2)", Kind.DECIMAL, precision=6, scale=2),
            Column("costs", "numeric(6,2)[]", Kind.DECIMAL, 1, precision=6, scale=2, in_log=False),
            Column("mood", "public.mood", Kind.TEXT),
            Column("moods", "public.mood[]", Kind.TEXT, 2, in_log=False),
            Column("code", "character varying(5)", Kind.TEXT),
            Column("tiny", "character(2)", Kind.TEXT),
            Column("tags", "text[]", Kind.TEXT, 1, may_be_absent=True),
            Column("twice", "bigint", Kind.INTEGER, in_log=False),
            Column("plain", "text", Kind.TEXT, may_be_absent=True),  # its storage can be altered at any time
            Column("raw", "bit(3)", Kind.TEXT),
            Column("shift", "interval", Kind.INTERVAL, in_log=False),
        ),
        ("id",),
    )


KEYS = [
    ("a int PRIMARY KEY, b int", "", ("a",), True),
    ("a int, b int, c int, PRIMARY KEY (b, a)", "", ("b", "a"), True),
    ("a int, b int, PRIMARY KEY (b) INCLUDE (a)", "", ("b",), True),
    ("a int PRIMARY KEY, b int NOT NULL UNIQUE", "REPLICA IDENTITY USING INDEX t_b_key", ("b",), False),
    ("a int PRIMARY KEY, b int NOT NULL UNIQUE", "REPLICA IDENTITY FULL", ("a",), True),
    ("a int PRIMARY KEY, b int", "REPLICA IDENTITY NOTHING", (), False),
    ("a int PRIMARY KEY DEFERRABLE, b int", "", (), False),
    ("a int, b int NOT NULL UNIQUE", "", (), False),
    ("a int, b int NOT NULL UNIQUE", "REPLICA IDENTITY FULL", ("b",), False),
    ("a int, b int UNIQUE", "REPLICA IDENTITY FULL", (), False),
    ("a int, b int", "REPLICA IDENTITY FULL", (), False),
]


@pytest.mark.parametrize(("columns", "alter", "key", "primary"), KEYS)
def test_keys(connection: psycopg.Connection, columns: str, alter: str, key: tuple[str, ...], primary: bool) -> None:
    connection.execute(f"CREATE TABLE t ({columns})")
    if alter:
        connection.execute(f"ALTER TABLE t {alter}")
    found = table_of(connection, "public.t")
    assert (found.key, found.key_is_primary) == (key, primary)


@pytest.mark.parametrize("index", ["t (b) WHERE a > 0", "t ((b + 1))", "t (b, (a + 1))"])
def test_indexes_that_identify_nothing(connection: psycopg.Connection, index: str) -> None:
    connection.execute("CREATE TABLE t (a int NOT NULL, b int NOT NULL)")
    connection.execute(f"CREATE UNIQUE INDEX ON {index}")
    connection.execute("ALTER TABLE t REPLICA IDENTITY FULL")
    assert table_of(connection, "public.t").key == ()


def test_relations(connection: psycopg.Connection) -> None:
    connection.execute('CREATE SCHEMA "Ä.b"')
    connection.execute('CREATE TABLE "Ä.b"."c""d" (id int PRIMARY KEY)')
    connection.execute("CREATE TABLE parted (id int, day date, PRIMARY KEY (day, id)) PARTITION BY RANGE (day)")
    connection.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')")
    connection.execute("CREATE VIEW v AS SELECT 1 AS one")
    found = read_catalogue(connection, ['Ä.b.c"d', "public.parted", "public.v", "public.none"])
    assert {name: (of.relation_kind, of.table.key, of.owned) for name, of in found.items()} == {
        'Ä.b.c"d': ("r", ("id",), True),
        "public.parted": ("p", ("day", "id"), True),
        "public.v": ("v", (), True),
    }
    connection.execute("CREATE ROLE stranger")
    connection.execute("SET ROLE stranger")
    assert not read_catalogue(connection, ["public.parted"])["public.parted"].owned
    connection.execute("RESET ROLE")
    connection.execute("DROP ROLE stranger")


CHANGES = [
    "ALTER TABLE t ADD c int",
    "ALTER TABLE t DROP b",
    "ALTER TABLE t RENAME b TO c",
    "ALTER TABLE t ALTER b TYPE bigint",
    "ALTER TABLE t REPLICA IDENTITY USING INDEX t_a_key",
    "ALTER TABLE t REPLICA IDENTITY NOTHING",
    "ALTER TABLE t ALTER d TYPE varchar(6)",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_columns_or_key_changes_the_fingerprint(connection: psycopg.Connection, change: str) -> None:
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL UNIQUE, b int, d varchar(50))")
    before = read_fingerprints(connection, ["public.t"])
    connection.execute("INSERT INTO t VALUES (1, 1, 1)")
    connection.execute("CREATE INDEX ON t (b)")
    connection.execute("ALTER TABLE t ALTER b SET NOT NULL, ALTER d SET STORAGE PLAIN, REPLICA IDENTITY FULL")
    connection.execute("ANALYZE t")
    codec.configure(connection)
    assert read_fingerprints(connection, ["public.t"]) == before
    connection.execute(change)
    assert read_fingerprints(connection, ["public.t"]) != before


def test_a_name_that_stands_for_two_types_is_read_by_key(connection: psycopg.Connection) -> None:
    """Debezium looks types up by name: first in the table's schema, then anywhere."""
    connection.execute("CREATE SCHEMA one")
    connection.execute("CREATE SCHEMA two")
    connection.execute("CREATE TYPE one.mood AS ENUM ('x')")
    connection.execute("CREATE TYPE two.mood AS ENUM ('x')")
    connection.execute("CREATE TYPE two.only AS ENUM ('x')")
    connection.execute("CREATE TABLE one.date (id int PRIMARY KEY)")  # a row type of this name
    connection.execute("CREATE TABLE one.t (id int PRIMARY KEY, a one.mood, b two.mood, c two.only, d date, e text)")
    connection.execute("CREATE TABLE public.t (id int PRIMARY KEY, d date, b two.mood)")
    in_log = {
        name: [column.name for column in table.columns if column.in_log]
        for name, table in read_tables(connection, ["one.t", "public.t"]).items()
    }
    assert in_log == {"one.t": ["id", "a", "c", "e"], "public.t": ["id", "d"]}


def test_obstacles(connection: psycopg.Connection) -> None:
    connection.execute("CREATE TYPE mood AS ENUM ('x')")
    connection.execute("CREATE TABLE fine (id int PRIMARY KEY, m mood)")
    names = ["public.fine", "public.t", 'public.q"q']
    assert obstacles(connection, list(read_catalogue(connection, names).values())) == []
    connection.execute("CREATE DOMAIN good_mood AS mood")
    connection.execute("CREATE TYPE empty AS ENUM ()")
    connection.execute('CREATE TABLE t (span interval PRIMARY KEY, "Name" int, name int)')
    connection.execute('CREATE TABLE "q""q" (id int PRIMARY KEY)')
    found = obstacles(connection, list(read_catalogue(connection, names).values()))
    told = "\n".join(map(str, sorted(found)))
    assert told.splitlines() == [
        "source: the type empty ends Debezium when it starts, wherever in the database it is used: it is an enum"
        " without values; drop it, or add a value: ALTER TYPE … ADD VALUE",
        "source: the type good_mood ends Debezium when it starts, wherever in the database it is used: it is a domain"
        " over an enum; use the enum itself, with a CHECK constraint in the table",
        'table public.q"q: its name has a double quote, which ends Debezium; rename it',
        "table public.t: the columns Name and name differ in case only, which Debezium refuses; rename one of them",
        "table public.t: the key column span has the type interval, which Debezium does not write faithfully; use"
        " another unique index as the replica identity",
    ]
