"""Every type of PostgreSQL through the whole pipeline: loaded, inserted and updated rows give the same documents.

`tests/integration/test_postgresql_values.py` holds each Python value against what the server says; here a row goes all
the way, in each of three ways, and what the stores make of it is compared and, for some of each kind, spelt out.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
import redis
from bson.decimal128 import Decimal128

from acceptance.harness import PATIENCE_S, Stage
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL
from integration.test_postgresql_values import CONTRIB, HOSTILE, SETUP, VALUES, read_types, sections_of

SINKS = ("cache", "hash", "docs", "search")
WAYS = ("loaded", "inserted", "updated")
# Rows of a table with one column that is not in the log are all read by key, and so is a row with an ambiguous value:
# a table for each, so that the others are decoded from their events.
TABLES = ("logged", "keyed", "ambiguous")
SOME_UUID = "uuid '00112233-4455-6677-8899-aabbccddeeff'"


class Case(NamedTuple):
    """One value of one type: a row of its own, with NULL in all other columns."""

    table: str
    column: str
    type_name: str
    value: str  # SQL

    def __str__(self) -> str:
        return f"{self.type_name} {self.value}"


def cases_of(sections: Iterable[str], *, only: bool) -> list[Case]:
    """Return the cases of the list of types; `only` those of these sections, without what every server has."""
    types = read_types(VALUES, set(sections))
    if only:
        types = {name: found for name, found in types.items() if name not in read_types(VALUES, set())}
    cases: list[Case] = []
    for number, found in enumerate(types.values()):
        for value in found.values:
            table = "keyed" if not found.in_log else "ambiguous" if value in found.ambiguous else "logged"
            # Each row has its own execution of the SQL, so what it says must be the same each time.
            cases.append(Case(table, f"c{number}", found.name, value.replace("gen_random_uuid()", SOME_UUID)))
    return cases


def tables_sql(cases: Iterable[Case]) -> str:
    """Return SQL that creates the tables, each with the columns that it needs."""
    columns: dict[str, dict[str, str]] = {table: {} for table in TABLES}
    for case in cases:
        columns[case.table][case.column] = case.type_name
    listed = {
        table: ", ".join(["id text PRIMARY KEY", *(f"{name} {type_name}" for name, type_name in found.items())])
        for table, found in columns.items()
    }
    return "".join(f"CREATE TABLE {table} ({text});\n" for table, text in listed.items())


def row_id(number: int, way: str) -> str:
    return f"{number} {way}"


def insert(connection: psycopg.Connection, number: int, way: str, case: Case, *, with_value: bool = True) -> None:
    value = case.value if with_value else "NULL"
    connection.execute(
        f"INSERT INTO {case.table} (id, {case.column}) VALUES ('{row_id(number, way)}', {value})".encode()
    )


# ── what stores make of values ───────────────────────────────────────────────────────────────────────────────────

ABSENT = "absent"  # a hash has no field for a null


class Mapping(NamedTuple):
    """What `docs/types.md` says of one value. JSON is compared as text, so that no digit is lost."""

    type_name: str
    value: str
    json: str
    hash: str
    bson: Any


def _utc(*parts: int) -> dt.datetime:
    return dt.datetime(*parts, tzinfo=dt.UTC)  # type: ignore[misc, arg-type]  # mypy: tzinfo beside unpacked parts


MAPPINGS = [
    Mapping("smallint", "-32768", "-32768", "-32768", -32768),
    Mapping("bigint", "9223372036854775807", "9223372036854775807", "9223372036854775807", 9223372036854775807),
    Mapping("oid", "4294967295", "4294967295", "4294967295", 4294967295),
    Mapping("numeric", "0.10", "0.10", "0.10", Decimal128("0.10")),
    Mapping("numeric", "'NaN'", "null", ABSENT, Decimal128("NaN")),
    Mapping("numeric", "'-Infinity'", "null", ABSENT, Decimal128("-Infinity")),
    Mapping(
        "numeric(38,10)",
        "1234567890123456789012345678.0123456789",
        "1234567890123456789012345678.0123456789",
        "1234567890123456789012345678.0123456789",
        "1234567890123456789012345678.0123456789",  # more than the 34 digits of a Decimal128
    ),
    Mapping("money", "-0.01", "-0.01", "-0.01", Decimal128("-0.01")),
    Mapping("real", "0.1", "0.1", "0.1", 0.1),
    Mapping("double precision", "1e308", "1e+308", "1e+308", 1e308),
    Mapping("boolean", "true", "true", "true", True),
    Mapping("text", "'😀é'", '"😀é"', "😀é", "😀é"),
    Mapping("text", "'null'", '"null"', "null", "null"),
    Mapping("character(5)", "'ab'", '"ab   "', "ab   ", "ab   "),
    Mapping("mood", "'happy day'", '"happy day"', "happy day", "happy day"),
    Mapping("bytea", r"'\x00ff'", '"AP8="', "AP8=", b"\x00\xff"),
    Mapping("date", "'2024-02-29'", '"2024-02-29"', "2024-02-29", _utc(2024, 2, 29)),
    Mapping("date", "'0044-03-15 BC'", '"0044-03-15 BC"', "0044-03-15 BC", "0044-03-15 BC"),
    Mapping(
        "timestamp",
        "'2024-02-29 12:34:56.1'",
        '"2024-02-29T12:34:56.100000"',
        "2024-02-29T12:34:56.100000",
        _utc(2024, 2, 29, 12, 34, 56, 100_000),
    ),
    Mapping(
        "timestamp with time zone",
        "'2024-02-29 12:34:56.123456+02'",
        '"2024-02-29T10:34:56.123456Z"',
        "2024-02-29T10:34:56.123456Z",
        _utc(2024, 2, 29, 10, 34, 56, 123_000),
    ),
    Mapping("timestamp with time zone", "'-infinity'", '"-infinity"', "-infinity", "-infinity"),
    Mapping("time", "'12:34:56.1'", '"12:34:56.100000"', "12:34:56.100000", "12:34:56.100000"),
    Mapping("time", "'24:00:00'", '"24:00:00"', "24:00:00", "24:00:00"),
    Mapping(
        "time with time zone",
        "'12:34:56.1-15:59'",
        '"12:34:56.1-15:59"',
        "12:34:56.1-15:59",
        "12:34:56.1-15:59",
    ),
    Mapping(
        "interval",
        "'1 year -2 months 3 days -04:05:06.7'",
        '"P10M3DT-4H-5M-6.7S"',
        "P10M3DT-4H-5M-6.7S",
        "P10M3DT-4H-5M-6.7S",
    ),
    Mapping(
        "uuid",
        "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
        '"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"',
        "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
        uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ),
    Mapping("jsonb", "'null'", "null", ABSENT, None),
    Mapping("jsonb", "'{}'", "{}", "{}", {}),
    Mapping("jsonb", "'1.10'", "1.1", "1.1", 1.1),
    Mapping("inet", "'192.168.0.1/24'", '"192.168.0.1/24"', "192.168.0.1/24", "192.168.0.1/24"),
    Mapping("int4range", "'[1,5]'", '"[1,6)"', "[1,6)", "[1,6)"),
    Mapping("bit(5)", "'00001'", '"00001"', "00001", "00001"),
    Mapping("point", "'(1,2.5)'", '"(1,2.5)"', "(1,2.5)", "(1,2.5)"),
    Mapping("pair", "'(1,abc)'", '"(1,abc)"', "(1,abc)", "(1,abc)"),
    Mapping("d_num", "1.50", "1.50", "1.50", Decimal128("1.50")),
    Mapping("integer[]", "'{1,NULL,3}'", "[1,null,3]", "[1,null,3]", [1, None, 3]),
    Mapping("integer[]", "'{{1,2},{3,4}}'", "[[1,2],[3,4]]", "[[1,2],[3,4]]", [[1, 2], [3, 4]]),
    Mapping("text[]", "'{}'", "[]", "[]", []),
    Mapping(
        "numeric[]",
        "'{1.10,NaN,NULL,Infinity}'",
        "[1.10,null,null,null]",
        "[1.10,null,null,null]",
        [Decimal128("1.10"), Decimal128("NaN"), None, Decimal128("Infinity")],
    ),
    Mapping("vector", "'[1,2.5,0.1]'", "[1.0,2.5,0.1]", "[1.0,2.5,0.1]", [1.0, 2.5, 0.1]),
    # Debian's server, with the extensions of contrib
    Mapping("hstore", "'é=>1,zz=>2'", '{"zz":"2","é":"1"}', '{"zz":"2","é":"1"}', {"zz": "2", "é": "1"}),
    Mapping("citext", "'AbC'", '"AbC"', "AbC", "AbC"),
    Mapping("ltree", "'a.b'", '"a.b"', "a.b", "a.b"),
    Mapping("xml", "'<a>1</a>'", '"<a>1</a>"', "<a>1</a>", "<a>1</a>"),
]


class Stores:
    """Documents of a stage as the stores have them."""

    def __init__(self, it: Stage) -> None:
        self._it = it
        self._redis = {name: redis.Redis.from_url(str(it.stores.sinks[name].url)) for name in ("cache", "hash")}

    def document(self, sink: str, case: Case, number: int, way: str) -> str:
        """Return a document in a form in which equal ones are equal: NaN too, and texts of numbers with all digits."""
        if sink in self._redis:
            raw: Any = self._content(sink, case, number, way)
            return "None" if not raw else str(raw)
        document = self._it.stores.document(sink, case.table, (row_id(number, way),))
        return repr({name: value for name, value in (document or {}).items() if name != "id"} or None)

    def json_text(self, case: Case, number: int) -> str:
        """Return the text of the case's value in the JSON document."""
        content = self._content("cache", case, number, "loaded")
        found = re.search(f'"{case.column}":(.*?)(,"c\\d+":|}}$)', content, re.DOTALL)
        assert found is not None, f"{case}: {content}"
        return found[1]

    def hash_text(self, case: Case, number: int) -> str:
        value: Any = self._redis["hash"].hget(self._id("hash", case, number, "loaded"), case.column)
        return ABSENT if value is None else str(value.decode())

    def bson_value(self, case: Case, number: int) -> Any:
        document = self._it.stores.document("docs", case.table, (row_id(number, "loaded"),))
        assert document is not None
        value = document[case.column]
        return value.replace(tzinfo=dt.UTC) if isinstance(value, dt.datetime) else value

    def _content(self, sink: str, case: Case, number: int, way: str) -> str:
        """Return what Redis holds, without version and key."""
        id_ = self._id(sink, case, number, way)
        if sink == "hash":
            fields: Any = self._redis[sink].hgetall(id_)
            rest = sorted(item for item in fields.items() if item[0] not in (b"_version", b"id"))
            return repr(rest) if fields else ""
        raw: Any = self._redis[sink].get(id_)
        return re.sub(r'^{"_version":"\d+","id":"[^"]*"', "{", raw.decode()) if raw else ""

    def _id(self, sink: str, case: Case, number: int, way: str) -> str:
        return self._it.stores.sinks[sink].id_of(self._it.stores.target(sink, case.table), (row_id(number, way),))


# ── the tests ────────────────────────────────────────────────────────────────────────────────────────────────────

# Values that a store cannot hold, whichever way the row came: dead letters of that sink alone.
LONE_SURROGATE = "'" + r'"\ud83d"' + "'"
LONG_NUMBERS = ("1e-16383", "('1' || repeat('0', 131071))::numeric")  # OpenSearch takes 1000 digits


def refused_by(sink: str, case: Case) -> bool:
    return case.value == LONE_SURROGATE or (sink == "search" and case.value in LONG_NUMBERS)


class Under(NamedTuple):
    """A server, with the extensions that it has and the values that only it can try."""

    server: PostgreSQL
    extensions: tuple[str, ...]
    cases: list[Case]


@pytest.fixture(scope="module", params=["18", "contrib"])
def under(request: pytest.FixtureRequest) -> Iterator[Under]:
    if request.param == "18":
        server: PostgreSQL = request.getfixturevalue("postgresql")
        yield Under(server, ("vector",), cases_of(sections_of(18, extensions=False), only=False))
    elif not CONTRIB:
        pytest.skip("no PostgreSQL with the extensions of contrib is installed")
    else:
        with PostgreSQL(bin_dir=CONTRIB[-1]) as other:
            yield Under(other, ("hstore", "citext", "ltree", "cube", "isn"), cases_of({"contrib"}, only=True))


@pytest.mark.timeout(600)
def test_loaded_inserted_and_updated_are_the_same(under: Under, stage: Callable[..., Stage]) -> None:
    server, extensions, cases = under
    extend = "".join(f"CREATE EXTENSION {name};\n" for name in extensions)
    it = stage(
        extend + SETUP + tables_sql(cases),
        TABLES,
        SINKS,
        schema="public",  # where the list of types has them
        server=server,
        sink_options={"hash": {"format": "hash"}},
    )
    with it.source.connect() as connection:
        for name, value in HOSTILE.items():  # as the owner of a database may set it: nothing may follow that
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET {name} = '{value}'".encode())
        with connection.transaction():
            for number, case in enumerate(cases):
                insert(connection, number, "loaded", case)
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    with it.source.connect() as connection:
        with connection.transaction():
            for number, case in enumerate(cases):
                insert(connection, number, "inserted", case)
                insert(connection, number, "updated", case, with_value=False)
        it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)  # or only the newest of each row would be seen
        with connection.transaction():
            for number, case in enumerate(cases):
                id_ = row_id(number, "updated")
                connection.execute(f"UPDATE {case.table} SET {case.column} = {case.value} WHERE id = '{id_}'".encode())
    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    stores = Stores(it)
    refused = {(letter["table"], letter["key"], letter["sink"]) for letter in it.pipeline.dead_letters()}
    expected_refused = {
        (f"public.{case.table}", row_id(number, way), sink)
        for number, case in enumerate(cases)
        for sink in SINKS
        for way in WAYS
        if refused_by(sink, case)
    }
    wrong: list[str] = []
    for number, case in enumerate(cases):
        for sink in SINKS:
            found = [stores.document(sink, case, number, way) for way in WAYS]
            if (len(set(found)) > 1 or found[0] == "None") and not refused_by(sink, case):
                wrong.append(f"{sink}: {case}: {found}")
    assert (wrong, refused) == ([], expected_refused)
    _mapped_as_documented(stores, cases)
    assert run.stop() == 0


def _mapped_as_documented(stores: Stores, cases: list[Case]) -> None:
    documented = {(mapping.type_name, mapping.value): mapping for mapping in MAPPINGS}
    wrong: list[str] = []
    seen = 0
    for number, case in enumerate(cases):
        mapping = documented.get((case.type_name, case.value))
        if mapping is None:
            continue
        seen += 1
        got = Mapping(*mapping[:2], stores.json_text(case, number), stores.hash_text(case, number), None)
        bson_value = stores.bson_value(case, number)
        if repr((got.json, got.hash, bson_value)) != repr((mapping.json, mapping.hash, mapping.bson)):
            wrong.append(f"{case}: {got.json}, {got.hash}, {bson_value!r}, where it should be {mapping[2:]}")
    assert wrong == []
    assert seen >= 4, "the list of types no longer has these values"


NAMES = """
CREATE TABLE "Größe & Maß" ("Straße" text, "Haus Nr" int, "Mixed Case" numeric(6,2), "select" text, "数" int[],
    PRIMARY KEY ("Straße", "Haus Nr"));
CREATE TABLE without_primary_key (label text, code uuid NOT NULL, part smallint NOT NULL);
CREATE UNIQUE INDEX identity ON without_primary_key (part, code);
ALTER TABLE without_primary_key REPLICA IDENTITY USING INDEX identity;
CREATE TABLE computed (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, word text,
    stored text GENERATED ALWAYS AS (upper(word)) STORED, length int GENERATED ALWAYS AS (length(word)) VIRTUAL);
"""


@pytest.mark.parametrize("processor", [None, "return dict(row)"], ids=["generated", "rows as they are"])
def test_names_keys_and_computed_columns(processor: str | None, stage: Callable[..., Stage]) -> None:
    """Also through the processor that `deltactl pipeline create` writes, whose documents have every column."""
    sinks = ("cache", "docs", "search")
    it = stage(NAMES, ["Größe & Maß", "without_primary_key", "computed"], sinks, processor=processor)

    def write(way: str, number: int) -> None:
        it.source.execute(
            f"""INSERT INTO "Größe & Maß" VALUES ('{way} Straße', {number}, 1.50, 'x', '{{1,2}}'),
                ('{way}: %3A"', {number}, NULL, '', NULL), ('{way}', -{number}, 0, NULL, '{{}}')""",
            f"INSERT INTO without_primary_key VALUES ('{way}', {SOME_UUID}, {number}), (NULL, {SOME_UUID}, -{number})",
            f"INSERT INTO computed (word) VALUES ('{way} é'), (NULL), ('')",
        )

    write("loaded", 1)
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    write("inserted", 2)
    write("changed", 3)
    it.in_step(run)
    it.source.execute(
        """UPDATE "Größe & Maß" SET "Mixed Case" = 9.99, "数" = '{7}' WHERE "Haus Nr" = 3""",
        """UPDATE "Größe & Maß" SET "Straße" = "Straße" || ' neu' WHERE "Haus Nr" = 2""",
        """DELETE FROM "Größe & Maß" WHERE "Haus Nr" = -1""",
        "UPDATE without_primary_key SET label = 'other' WHERE part = 1",
        "UPDATE without_primary_key SET part = 30 WHERE part = 3",
        "DELETE FROM without_primary_key WHERE part = -2",
        "UPDATE computed SET word = 'new ' || word WHERE id IN (1, 4)",
        "DELETE FROM computed WHERE id = 2",
    )
    it.in_step(run)
    assert it.pipeline.dead_letters() == []
    document = it.stores.document("cache", "computed", (1,))
    assert document == {"id": 1, "word": "new loaded é", "stored": "NEW LOADED É", "length": 12}
    assert run.stop() == 0
