"""Every type of PostgreSQL through the real log and a real SELECT: the same value, of the same type, or read by key."""

from __future__ import annotations

import datetime as dt
import json
import math
import random
import struct
import uuid
from collections.abc import Collection, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from delta_debezium.options import column_exclude_list
from delta_sync.errors import UndecodableChange
from delta_sync.sources.postgresql import codec
from delta_sync.sources.postgresql.catalogue import read_tables
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.servers import PostgreSQL
from delta_sync.values import Interval
from integration.postgresql_log import PostgresLog, postgres_log

UTC = dt.UTC
VALUES, LONG_VALUES = "postgresql_types.txt", "postgresql_toast.txt"
LONG = "(SELECT string_agg(md5(g::text), '') FROM generate_series(1, 200) g)"
LONG_ARRAY = 4000  # elements: over 2 kB, so that they are stored out of line, even of smallint and boolean
LONG_SUFFIXES = ("", " NOT NULL")
CONTRIB = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian's: with the extensions that the wheel lacks

# ── values, in SQL ───────────────────────────────────────────────────────────────────────────────────────────────


class TypeUnderTest(NamedTuple):
    """A type, whether its columns are in the log, and values; `ambiguous` are those whose rows are read by key."""

    name: str
    in_log: bool
    values: list[str]
    ambiguous: set[str]


def read_types(file: str, sections: Collection[str]) -> dict[str, TypeUnderTest]:
    """Read a list of types as `postgresql_types.txt` describes it, with the sections of what a server has."""
    types: dict[str, TypeUnderTest] = {}
    wanted = True
    name = ""
    for line in (Path(__file__).parent / file).read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            wanted = line.strip("[]") in sections
        elif not wanted:
            continue
        elif not line.startswith(" "):
            name = line.removesuffix("by key").strip()
            types.setdefault(name, TypeUnderTest(name, not line.endswith("by key"), [], set()))
        else:
            value = line.strip().removeprefix("! ")
            types[name].values.append(value)
            if line.strip() != value:
                types[name].ambiguous.add(value)
    return types


def sections_of(version: int, extensions: bool) -> set[str]:
    later = {f"{since} and later" for since in (15, 17) if version >= since}
    return later | {"contrib" if extensions else "vector"}


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def table_of(kind: str, type_name: str) -> str:
    """Debezium does not take a table whose name has a quote."""
    return f"{kind} {type_name}".replace('"', "'")


# ── one run of the engine for all of them ────────────────────────────────────────────────────────────────────────


class Observed(NamedTuple):
    """What the log and the table had for one value: the event's image, decoded when it lacked nothing."""

    table: Table
    lacked: bool
    logged: dict[str, Any] | None
    dumped: dict[str, Any]


class Run(NamedTuple):
    """One server with a running engine."""

    version: int
    extensions: bool
    connection: psycopg.Connection  # as a dump uses it
    log: PostgresLog


SETUP = """
CREATE SCHEMA other;
CREATE TYPE mood AS ENUM ('happy day', 'O''Brien, "x"');
CREATE TYPE other.mood AS ENUM ('x');
CREATE TYPE "Mixed Case" AS ENUM ('é');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN d_int AS int CHECK (value > 0);
CREATE DOMAIN d_dd AS d_int;
CREATE DOMAIN d_num AS numeric(6,2);
CREATE DOMAIN d_text AS text;
CREATE DOMAIN d_arr AS int[];
CREATE DOMAIN d_ts AS timestamptz;
CREATE DOMAIN d_json AS jsonb;
CREATE DOMAIN d_bytea AS bytea;
CREATE DOMAIN d_bit AS bit(3);
CREATE DOMAIN d_vc AS varchar(4);
CREATE DOMAIN other.d_date AS date;
"""

# What a database may be set to by its owner: neither the log nor a dump may follow it.
HOSTILE = {
    "DateStyle": "German",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-5",
}


@pytest.fixture(scope="module", params=["18", "contrib"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    if request.param == "18":
        server: PostgreSQL = request.getfixturevalue("postgresql")
        yield from _run(server, tmp_path_factory.mktemp("log"), extensions=False)
    elif not CONTRIB:
        pytest.skip("no PostgreSQL with the extensions of contrib is installed")
    else:
        with PostgreSQL(bin_dir=CONTRIB[-1]) as server:
            yield from _run(server, tmp_path_factory.mktemp("log"), extensions=True)


def _run(server: PostgreSQL, folder: Path, extensions: bool) -> Iterator[Run]:
    database = "values_of_types"
    with psycopg.connect(server.url, autocommit=True) as connection:
        version = connection.info.server_version // 10000
        connection.execute(f"CREATE DATABASE {database}")
        for name, value in HOSTILE.items():
            connection.execute(f"ALTER DATABASE {database} SET {name} = '{value}'")
    url = server.url_of(database)
    with psycopg.connect(url, autocommit=True) as connection:
        for name in ("hstore", "citext", "ltree", "cube", "isn") if extensions else ("vector",):
            connection.execute(f"CREATE EXTENSION {name}")
        connection.execute(SETUP)
        codec.configure(connection)
        for name in read_types(VALUES, sections_of(version, extensions)):
            connection.execute(
                f"CREATE TABLE {quoted(table_of('of', name))} (id int PRIMARY KEY, v {name}, k int DEFAULT 7)"
            )
        for name in read_types(LONG_VALUES, sections_of(version, extensions)):
            for suffix in LONG_SUFFIXES:
                table = quoted(table_of("long", name + suffix))
                connection.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, v {name}{suffix}, k int)")
                connection.execute(f"ALTER TABLE {table} ALTER v SET STORAGE EXTERNAL")
        tables = list(read_tables(connection, all_tables(connection)).values())
        options = {"column.exclude.list": column_exclude_list(tables)}
        with postgres_log(url, folder, options) as log:
            yield Run(version, extensions, connection, log)


def all_tables(connection: psycopg.Connection) -> list[str]:
    rows = connection.execute(
        "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname IN ('public', 'other')"
    )
    return [name for (name,) in rows]


def dump(connection: psycopg.Connection, table: Table) -> dict[Any, dict[str, Any]]:
    """Return the table's rows by `id`."""
    query = sql.SQL("SELECT {} FROM {}").format(codec.select_list(table), sql.Identifier(table.schema, table.name))
    names = [column.name for column in table.columns]
    rows = (dict(zip(names, values, strict=True)) for values in connection.execute(query))
    return {row["id"]: row for row in rows}


def observe(table: Table, image: dict[str, Any], dumped: dict[str, Any]) -> Observed:
    decoder = codec.table_codec(table)
    assert decoder.key(image) == tuple(dumped[name] for name in table.key)
    lacked = decoder.lacks(image)
    assert lacked == bool(codec.unavailable_columns(table, image))
    try:
        return Observed(table, lacked, None if lacked else decoder.row(image), dumped)
    except UndecodableChange:
        return Observed(table, True, None, dumped)  # its row is read by key, too


@pytest.fixture(scope="module")
def observed(run: Run) -> dict[tuple[str, str], list[Observed]]:
    """By type and value in SQL: what an insert and an update showed."""
    types = read_types(VALUES, sections_of(run.version, run.extensions))
    tables = read_tables(run.connection, [f"public.{table_of('of', name)}" for name in types])
    for name, of in types.items():
        table = quoted(table_of("of", name))
        for number, value in enumerate([*of.values, "NULL"]):
            cast = f"{value}::{name}" if value.startswith("'") else value
            run.connection.execute(f"INSERT INTO {table} VALUES ({number}, {cast}, NULL)")
            run.connection.execute(f"UPDATE {table} SET k = 1 WHERE id = {number}")
    names = {table_of("of", name): name for name in types}
    dumps = {name: dump(run.connection, table) for name, table in tables.items()}
    found: dict[tuple[str, str], list[Observed]] = {}
    for event in run.log.events():
        source, image = event["source"], event["after"]
        table_name = f"{source['schema']}.{source['table']}"
        name = names[source["table"]]
        dumped = dict(dumps[table_name][image["id"]], k=image["k"])
        value = [*types[name].values, "NULL"][image["id"]]
        found.setdefault((name, value), []).append(observe(tables[table_name], image, dumped))
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of equal types all the way down; NaN is itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return [*one] == [*other] and all(map(same, one.values(), other.values()))
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, Decimal):
        return bool(one.as_tuple() == other.as_tuple())
    if isinstance(one, dt.datetime):
        return bool(one == other) and one.tzinfo is other.tzinfo
    return bool(one == other)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    assert list(one) == list(other)
    return [(name, value, other[name]) for name, value in one.items() if not same(value, other[name])]


def test_every_value_is_the_same_from_the_log_and_from_a_dump(
    run: Run, observed: dict[tuple[str, str], list[Observed]]
) -> None:
    types = read_types(VALUES, sections_of(run.version, run.extensions))
    assert observed.keys() == {(of.name, value) for of in types.values() for value in [*of.values, "NULL"]}
    for (name, value), seen in observed.items():
        assert [one.dumped["k"] for one in seen] == [None, 1], (
            f"{name} {value}: an insert (NULL is no default), an update"
        )
    wrong = [
        f"{name} {value}: log {one.logged['v']!r}, dump {one.dumped['v']!r}"
        for (name, value), seen in observed.items()
        for one in seen
        if one.logged is not None and not same(one.logged, one.dumped)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_what_the_log_cannot_tell_is_read_by_key(
    run: Run, observed: dict[tuple[str, str], list[Observed]]
) -> None:
    types = read_types(VALUES, sections_of(run.version, run.extensions))
    in_log = {name for (name, _), seen in observed.items() if seen[0].table.column("v").in_log}
    assert in_log == {of.name for of in types.values() if of.in_log}
    lacking = {of for of, seen in observed.items() if of[0] in in_log and seen[0].lacked}
    assert lacking == {(of.name, value) for of in types.values() for value in of.ambiguous}


# ── what the values are ──────────────────────────────────────────────────────────────────────────────────────────

PYTHON_VALUES: list[tuple[str, str, Any]] = [
    ("bigint", "9223372036854775807", 2**63 - 1),
    ("numeric", "0.10", Decimal("0.10")),
    ("numeric", "'-Infinity'", Decimal("-Infinity")),
    ("real", "0.1", 0.1),
    ("real", "1e-45", 1e-45),
    ("money", "'1234.56'", Decimal("1234.56")),
    ("character(5)", "'ab'", "ab   "),
    ("bytea", "'\\x00ff'", b"\x00\xff"),
    ("boolean", "true", True),
    ("date", "'2024-02-29'", dt.date(2024, 2, 29)),
    ("date", "'infinity'", "infinity"),
    ("date", "'0044-03-15 BC'", "0044-03-15 BC"),
    ("date", "'5874897-12-31'", "5874897-12-31"),
    ("timestamp", "'2024-02-29 12:34:56.1'", dt.datetime(2024, 2, 29, 12, 34, 56, 100000)),  # noqa: DTZ001 -- it has none
    ("timestamp", "'0044-03-15 01:02:03.4 BC'", "0044-03-15 01:02:03.4 BC"),
    ("timestamp", "'294276-12-31 23:59:59.999999'", "294276-12-31 23:59:59.999999"),
    ("timestamp", "'10000-01-01 10:20:30'", "10000-01-01 10:20:30"),
    ("timestamp with time zone", "'2024-02-29 12:34:56.123456+02'", dt.datetime(2024, 2, 29, 10, 34, 56, 123456, UTC)),
    ("timestamp with time zone", "'infinity'", "infinity"),
    ("timestamp with time zone", "'0044-03-15 01:02:03.4Z BC'", "0044-03-15 01:02:03.4+00 BC"),
    ("time", "'12:34:56.1'", dt.time(12, 34, 56, 100000)),
    ("time", "'24:00:00'", "24:00:00"),
    ("time with time zone", "'23:59:59.999999+02'", "23:59:59.999999+02"),
    ("interval", "'1 year -2 months 3 days -04:05:06.7'", Interval(10, 3, -14_706_700_000)),
    ("interval", "'0'", Interval(0, 0, 0)),
    ("uuid", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
    ("jsonb", "'null'", None),
    ("jsonb", "'1.10'", 1.1),
    ("json", "' [1 ,2] '", [1, 2]),
    ("bit(5)", "'00001'", "00001"),
    ("bit(1)", "'1'", "1"),
    ("inet", "'192.168.0.1'", "192.168.0.1"),
    ("int4range", "'[1,5]'", "[1,6)"),
    ("mood", "'happy day'", "happy day"),
    ("pair", "'(1,abc)'", "(1,abc)"),
    ("d_num", "1.50", Decimal("1.50")),
    ("integer[]", "'[2:3]={7,8}'", [7, 8]),
    ("integer[]", "'{{1,2},{3,4}}'", [[1, 2], [3, 4]]),
    ("mood[]", "array['happy day', null]::mood[]", ["happy day", None]),
    ("d_int[]", "'{1,2}'", [1, 2]),
    ("money[]", "'{1.5}'", [Decimal("1.50")]),
    ("inet[]", "'{10.0.0.1,10.0.0.1/8}'", ["10.0.0.1", "10.0.0.1/8"]),
    ("pair[]", "array['(1,abc)']::pair[]", ["(1,abc)"]),
    ("d_arr[]", "array['{1,2}']::d_arr[]", ["{1,2}"]),
    ("numeric(5,-2)", "12345", Decimal(12300)),
    ("int4multirange", "'{[1,5],[7,9]}'", "{[1,6),[7,10)}"),
    ("vector", "'[1,2.5,0.1]'", [1.0, 2.5, 0.1]),
    ("vector[]", "array['[1,2]']::vector[]", ["[1,2]"]),
    ("halfvec", "'[1,0.1]'", [1.0, 0.099975586]),
    ("hstore", '\'bb=>1, a=>NULL, "x y"=>"q\\"u", c=>""\'', {"a": None, "c": "", "bb": "1", "x y": 'q"u'}),
    ("hstore[]", "array['a=>1']::hstore[]", [{"a": "1"}]),
    ("citext[]", "'{AbC,null}'", ["AbC", None]),
]


def test_values_are_the_documented_ones(observed: dict[tuple[str, str], list[Observed]]) -> None:
    compared = 0
    for name, value, python in PYTHON_VALUES:
        for one in observed.get((name, value), ()):
            compared += 1
            assert same(one.dumped["v"], python), (name, value, one.dumped["v"])
    assert compared > len(PYTHON_VALUES)


PYTHON_TYPES: dict[Kind, tuple[type, ...]] = {
    Kind.BOOLEAN: (bool,),
    Kind.INTEGER: (int,),
    Kind.FLOAT: (float,),
    Kind.DECIMAL: (Decimal,),
    Kind.TEXT: (str,),
    Kind.BYTES: (bytes,),
    Kind.DATE: (dt.date, str),
    Kind.TIME: (dt.time, str),
    Kind.TIMESTAMP: (dt.datetime, str),
    Kind.TIMESTAMP_TZ: (dt.datetime, str),
    Kind.INTERVAL: (Interval, str),
    Kind.UUID: (uuid.UUID,),
    Kind.JSON: (object,),
    Kind.MAP: (dict,),
}


def leaves(value: Any, column: Column) -> Iterator[Any]:
    if column.dimensions and isinstance(value, list):
        for element in value:  # pyright: ignore[reportUnknownVariableType] -- any elements
            yield from leaves(element, column)
    else:
        yield value


def test_a_columns_kind_says_what_its_values_are(observed: dict[tuple[str, str], list[Observed]]) -> None:
    for (name, value), seen in observed.items():
        column = seen[0].table.column("v")
        held = seen[0].dumped["v"]
        assert held is None or isinstance(held, list) == bool(column.dimensions) or column.kind is Kind.JSON, (
            name,
            value,
        )
        for leaf in leaves(held, column):
            assert leaf is None or isinstance(leaf, PYTHON_TYPES[column.kind]), (name, value, leaf)


# ── unchanged TOAST values ───────────────────────────────────────────────────────────────────────────────────────


def test_unchanged_toast_values_are_seen_to_be_missing(run: Run) -> None:
    types = read_types(LONG_VALUES, sections_of(run.version, run.extensions))
    ids = [f"public.{table_of('long', name + suffix)}" for name in types for suffix in LONG_SUFFIXES]
    tables = read_tables(run.connection, ids)
    for name, of in types.items():
        value = of.values[0].replace("long", LONG)
        if name.endswith("[]"):
            value = f"(SELECT array_agg({value}) FROM generate_series(1, {LONG_ARRAY}) g)"
        for suffix in LONG_SUFFIXES:
            long_table = quoted(table_of("long", name + suffix))
            run.connection.execute(f"INSERT INTO {long_table} VALUES (1, {value}, 1)")
            run.connection.execute(f"UPDATE {long_table} SET k = 2")
            run.connection.execute(f"ALTER TABLE {long_table} REPLICA IDENTITY FULL")
            run.connection.execute(f"UPDATE {long_table} SET k = 3")
    events = run.log.events()
    assert len(events) == 3 * len(tables)
    missing: dict[str, list[bool]] = {}
    for event in events:
        table = tables[f"{event['source']['schema']}.{event['source']['table']}"]
        text = json.dumps(event["after"], separators=(",", ":")).encode()
        seen = observe(table, event["after"], dict(dump(run.connection, table)[1], k=event["after"]["k"]))
        missing.setdefault(table.id, []).append(seen.lacked)
        assert seen.logged is None or same(seen.logged, seen.dumped), table.id
        if table.column("v").in_log:
            assert seen.lacked == any(pattern in text for pattern in codec.PLACEHOLDER_BYTES), table.id
            assert table.column("v").may_be_absent, table.id
    assert missing == {
        f"public.{table_of('long', of.name + suffix)}": [False, True, False] if of.in_log else [True] * 3
        for of in types.values()
        for suffix in LONG_SUFFIXES
    }


# ── random rows of the common types ──────────────────────────────────────────────────────────────────────────────

ROWS = 2000  # some seconds of the engine's time
SEED = 20240229


def random_row(rng: random.Random) -> tuple[Any, ...]:
    def maybe(value: Any) -> Any:
        return value if rng.random() < 0.9 else None

    def text(most: int) -> str:
        letters = "abc \t\n\"'\\{}[],:é😀\u2028\x7fNULL"
        return "".join(rng.choices(letters, k=rng.randrange(most)))

    def json_value(depth: int = 3) -> Any:
        match rng.randrange(8 if depth else 5):
            case 0:
                return None
            case 1:
                return rng.choice([True, False])
            case 2:
                return rng.choice([0, -1, 2**53 + 1, -(2**63), 2**64 - 1, rng.randrange(10**6)])
            case 3:
                return rng.choice([0.1, 1e300, -2.5, rng.random(), rng.random() * 10 ** rng.randrange(-300, 300)])
            case 4:
                return text(10)
            case 5:
                return [json_value(depth - 1) for _ in range(rng.randrange(4))]
            case _:
                return {text(5): json_value(depth - 1) for _ in range(rng.randrange(4))}

    def moment() -> str:
        """Anywhere in PostgreSQL's range, but mostly near."""
        microseconds = (
            rng.randrange(-(10**15), 4 * 10**15) if rng.random() < 0.8 else rng.randrange(-2 * 10**17, 9 * 10**18)
        )
        return f"{microseconds} microseconds" if abs(microseconds) < 10**15 else f"{microseconds // 10**6} seconds"

    decimal = f"{rng.choice(['', '-'])}{rng.randrange(10 ** rng.randrange(1, 40))}.{rng.randrange(10**6)}"
    real = struct.unpack("f", rng.randbytes(4))[0]
    double = struct.unpack("d", rng.randbytes(8))[0]
    return (
        maybe(rng.randrange(-(2**63), 2**63)),
        maybe(decimal),
        maybe(str(round(rng.uniform(-99, 99), 1))),
        maybe(real),
        maybe(double),
        maybe(text(40)),
        maybe(rng.randbytes(rng.randrange(40))),
        maybe(rng.random() < 0.5),
        maybe(rng.randrange(-2_440_000, 3_000_000) if rng.random() < 0.9 else rng.randrange(-2_440_000, 2_000_000_000)),
        maybe(moment()),
        maybe(moment()),
        maybe(f"{rng.randrange(86_400_000_001)} microseconds"),
        maybe(uuid.UUID(bytes=rng.randbytes(16))),
        maybe(json.dumps(json_value())),
        maybe(json.dumps(json_value())),
        maybe([maybe(rng.randrange(2**31)) for _ in range(rng.randrange(5))]),
        maybe([maybe(text(8)) for _ in range(rng.randrange(5))]),
    )


RANDOM_TABLE = """
CREATE TABLE random_rows (
  id int PRIMARY KEY, big bigint, exact numeric, rating numeric(3,1), small real, wide double precision, words text,
  raw bytea, flag boolean, day date, local timestamp, instant timestamptz, clock time, ident uuid,
  doc json, docb jsonb, numbers int[], texts text[])
"""
RANDOM_INSERT = """
INSERT INTO random_rows VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, date '1970-01-01' + %s::int,
  timestamp '1970-01-01' + %s::interval, timestamptz '1970-01-01Z' + %s::interval,
  CASE %s::interval WHEN interval '24:00' THEN time '24:00' ELSE time '00:00' + %s::interval END,
  %s, %s, %s, %s, %s)
"""


def test_random_rows_are_the_same_from_the_log_and_from_a_dump(run: Run) -> None:
    rng = random.Random(SEED)
    run.connection.execute(RANDOM_TABLE)
    with run.connection.transaction(), run.connection.cursor() as cursor:
        parameters = [(number, *row[:12], *row[11:]) for number, row in ((n, random_row(rng)) for n in range(ROWS))]
        cursor.executemany(RANDOM_INSERT, parameters)
    table = read_tables(run.connection, ["public.random_rows"])["public.random_rows"]
    dumped = dump(run.connection, table)
    events = run.log.events()
    assert len(events) == ROWS
    seen = [observe(table, event["after"], dumped[event["after"]["id"]]) for event in events]
    for one in seen:
        different = [] if one.logged is None else differences(one.logged, one.dumped)
        assert not different, (SEED, one.dumped["id"], different)
    decoded = sum(one.logged is not None for one in seen)
    assert decoded > ROWS / 2, "most rows need nothing but the log"


# ── names, keys, generated columns ───────────────────────────────────────────────────────────────────────────────


def test_names_are_found_as_they_are(run: Run) -> None:
    """Quoted, mixed case, not ASCII, reserved, and those of Debezium's own fields."""
    names = ["select", "a.b", "ä ö", 'q"q', "before", "after", "source", "op", "ts_ms", "__x", "1st", "UPPER"]
    names += ["a-b", "a$b", "a:b", "a\\b", "a,b", "%s", "{0}"]
    columns = ", ".join(f"{quoted(name)} int" for name in names)
    run.connection.execute(f'CREATE TABLE "Wéird Täble.x" (id int PRIMARY KEY, {columns})')
    values = ", ".join(map(str, range(len(names) + 1)))
    run.connection.execute(f'INSERT INTO "Wéird Täble.x" VALUES ({values})')
    table = read_tables(run.connection, ["public.Wéird Täble.x"])["public.Wéird Täble.x"]
    (event,) = run.log.events()
    one = observe(table, event["after"], dump(run.connection, table)[0])
    assert one.logged == one.dumped == dict(zip(["id", *names], range(len(names) + 1), strict=True))


def test_deletes_and_changed_keys_tell_the_key(run: Run) -> None:
    run.connection.execute(
        "CREATE TABLE keyed (id int, day date, at timestamptz, amount numeric, ident uuid, words text NOT NULL,"
        " PRIMARY KEY (day, id, at, amount, ident))"
    )
    table = read_tables(run.connection, ["public.keyed"])["public.keyed"]
    assert table.key == ("day", "id", "at", "amount", "ident")
    run.connection.execute("INSERT INTO keyed VALUES (1, 'infinity', '2024-01-01Z', 1.50, gen_random_uuid(), 'x')")
    before = dump(run.connection, table)[1]
    run.connection.execute("UPDATE keyed SET id = 2, day = '0044-03-15 BC'")
    after = dump(run.connection, table)[2]
    run.connection.execute("DELETE FROM keyed")
    key = codec.table_codec(table).key
    told = [(event["op"], key(event["after"] or event["before"])) for event in run.log.events()]
    old, new = (tuple(row[name] for name in table.key) for row in (before, after))
    assert told == [("c", old), ("d", old), ("c", new), ("d", new)]
    assert old[0] == "infinity"
    assert new[0] == "0044-03-15 BC"


def test_generated_columns_are_read_by_key(run: Run) -> None:
    virtual = ", v int GENERATED ALWAYS AS (a * 3) VIRTUAL" if run.version >= 18 else ""
    run.connection.execute(
        f"CREATE TABLE made (id int PRIMARY KEY, a int, s int GENERATED ALWAYS AS (a * 2) STORED{virtual})"
    )
    table = read_tables(run.connection, ["public.made"])["public.made"]
    run.connection.execute("INSERT INTO made VALUES (1, 5)")
    (event,) = run.log.events()
    one = observe(table, event["after"], dump(run.connection, table)[1])
    assert one.lacked
    assert [one.dumped["s"], one.dumped.get("v", 15)] == [10, 15]
