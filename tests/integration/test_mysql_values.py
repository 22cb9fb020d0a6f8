"""MariaDB's catalogue, the values of a dump, and reading in chunks and by key, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from delta_sync.changes import Key
from delta_sync.sources.mysql import reader as module
from delta_sync.sources.mysql.catalogue import (
    column_notes,
    obstacles,
    read_catalogue,
    read_fingerprints,
    unreadable_columns,
)
from delta_sync.sources.mysql.claims import Snapshot
from delta_sync.sources.mysql.connection import Session, connect
from delta_sync.sources.mysql.reader import MariaReader
from delta_sync.spec import SourceSpec
from delta_sync.tables import Kind, Table
from delta_sync.testing.mariadb import PASSWORD, USER, MariaDB
from mariadb_values import VALUES

DATABASE = "source_values"


@pytest.fixture(scope="module")
def session(mariadb: MariaDB) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTA_TEST_PASSWORD", PASSWORD)
        with closing(connect(spec_of(mariadb))) as session:
            execute(session, f"CREATE OR REPLACE DATABASE {DATABASE}", f"USE {DATABASE}")
            yield session
            execute(session, f"DROP DATABASE {DATABASE}")  # its types end Debezium, which other tests run


def spec_of(server: MariaDB) -> SourceSpec:
    return SourceSpec(url=f"mariadb://{USER}@127.0.0.1:{server.port}/", password="${env:DELTA_TEST_PASSWORD}")


@pytest.fixture
def reader(mariadb: MariaDB, session: Session) -> Iterator[MariaReader]:
    with closing(MariaReader(spec_of(mariadb), "values")) as reader:
        yield reader


def execute(session: Session, *statements: str) -> None:
    with session.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def anything(_: Snapshot) -> bool:
    return True


def table_of(reader: MariaReader, name: str) -> Table:
    return reader.tables([f"{DATABASE}.{name}"])[f"{DATABASE}.{name}"]


def test_every_type(session: Session, reader: MariaReader) -> None:
    columns = ", ".join(f"c{number} {type_}" for number, (type_, *_) in enumerate(VALUES))
    values = ", ".join(text for _, text, *_ in VALUES)
    nulls = ", ".join("default" if text == "default" else "NULL" for _, text, *_ in VALUES)
    execute(
        session,
        f"CREATE TABLE types (id int PRIMARY KEY, {columns})",
        f"INSERT INTO types VALUES (1, {values})",
        f"INSERT INTO types VALUES (2, {nulls})",
    )
    table = table_of(reader, "types")
    chunk = reader.read_chunk(table, None, 10, 1 << 20, anything)
    assert chunk is not None
    (_, row), (_, empty) = chunk.rows
    for number, (type_, text, value, in_log) in enumerate(VALUES):
        column = table.column(f"c{number}")
        found = row[column.name]
        assert (found, type(found)) == (value, type(value)), f"{type_} {text}"
        assert column.in_log is in_log, type_
        assert empty[column.name] is None or text == "default", type_
    assert table.column("id").nullable is False
    assert [(c.precision, c.scale) for c in table.columns if c.kind is Kind.DECIMAL] == [(12, 3), (65, 30)]


KEYS: dict[str, tuple[str, list[str]]] = {
    "int": ("k int", ["-1", "0", "7", "100"]),
    "unsigned": ("k bigint unsigned", ["0", "9223372036854775808", "18446744073709551615"]),
    "decimal": ("k decimal(10,2)", ["-1.50", "0", "10.01"]),
    "double": ("k double", ["-0.1", "0.1", "1e300"]),
    "text": ("k varchar(20)", ["'A'", "'b'", "'C'", "'\u00e4a'", "'it''s'", "'\\\\'", "'%s'"]),
    "latin1": ("k varchar(20) character set latin1", ["'a'", "'\u00e9'", "'z'"]),
    "binary": ("k varbinary(10)", ["x'00'", "x'27'", "x'ff'"]),
    "enum": ("k enum('z','a','m')", ["'z'", "'a'", "'m'"]),
    "set": ("k set('z','a','m')", ["''", "'a'", "'z,m'"]),
    "bit": ("k bit(10)", ["1", "2", "512"]),
    "bool": ("k bool", ["0", "1"]),
    "date": ("k date", ["'2020-01-01'", "'2020-01-02'"]),
    "datetime": ("k datetime(3)", ["'2020-01-01 00:00:00.001'", "'2020-01-01 00:00:00.002'"]),
    "timestamp": ("k timestamp(6) not null default 0", ["'2020-01-01 00:00:00.000001'", "'2020-01-02'"]),
    "time": ("k time(1)", ["'-10:00:00.5'", "'-09:00:00'", "'09:00:00.5'", "'100:00:00'"]),
    "uuid": ("k uuid", ["'123e4567-e89b-12d3-a456-426655440000'", "'023e4567-e89b-12d3-a456-426655440001'"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_chunks_and_keys_of_every_type(session: Session, reader: MariaReader, name: str) -> None:
    """Each row is read once, whatever the chunk's size; and each is found by the key that it was read with."""
    column, values = KEYS[name]
    rows = ", ".join(
        f"({value}, {number % 2}, {number})" for number, value in enumerate(values) for number in (0, 1, 2)
    )
    execute(session, f"CREATE TABLE key_{name} ({column}, `o``%` int, n int, PRIMARY KEY (k, `o``%`))")
    execute(session, f"INSERT IGNORE INTO key_{name} VALUES {rows}")
    table = table_of(reader, f"key_{name}")
    assert table.key == ("k", "o`%")
    whole = reader.read_chunk(table, None, 1000, 1 << 20, anything)
    assert whole is not None
    assert len(whole.rows) == 2 * len(values)
    for size in (1, 2, 3):
        keys: list[Key] = []
        after: Key | None = None
        while (chunk := reader.read_chunk(table, after, size, 1 << 20, anything)) is not None:
            keys += [key for key, _ in chunk.rows]
            after = chunk.last_key
            if after is None:
                break
            assert len(keys) <= len(whole.rows)
        assert keys == [key for key, _ in whole.rows]
    assert [reader.key_behind(table, None, number + 1) for number in range(len(keys) + 1)] == [*keys, None]
    assert [reader.key_behind(table, key, 2) for key in keys] == [*keys[2:], None, None]
    wanted = keys[::2]
    found = reader.read_keys(table, wanted, anything)
    assert found is not None
    assert dict(found.rows) == {key: row for key, row in whole.rows if key in wanted}
    assert sorted(reader.keys_having(table, "k", [keys[0][0]]), key=repr) == sorted(keys[:2], key=repr)


def test_a_chunk_ends_by_bytes_and_the_reader_goes_on(
    session: Session, reader: MariaReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(
        session,
        "CREATE TABLE large (id int PRIMARY KEY, body longtext)",
        "INSERT INTO large SELECT seq, repeat('x', 1000000) FROM seq_1_to_20",
    )
    table = table_of(reader, "large")
    seen: list[int] = []
    after: Key | None = None
    while True:
        chunk = reader.read_chunk(table, after, 1000, 2_500_000, anything)
        assert chunk is not None
        assert len(chunk.rows) <= 3
        seen += [row["id"] for _, row in chunk.rows]
        after = chunk.last_key
        if after is None:
            break
    assert seen == list(range(1, 21))
    monkeypatch.setattr(module, "KEYS_BYTES", 2_500_000)
    some = reader.read_keys(table, [(id_,) for id_ in range(5, 15)], anything)
    assert some is not None
    assert some.last_key is not None
    assert len(some.rows) == 3


def test_a_snapshot_that_is_not_usable(session: Session, reader: MariaReader) -> None:
    execute(session, "CREATE OR REPLACE TABLE few (id int PRIMARY KEY)")
    table = table_of(reader, "few")
    assert reader.read_chunk(table, None, 1, 1, lambda _: False) is None
    assert reader.read_keys(table, [(1,)], lambda _: False) is None
    empty = reader.read_chunk(table, None, 1, 1, anything)
    assert empty is not None
    assert (empty.rows, empty.last_key) == ([], None)
    assert empty.seen_to == reader.sample().position


def test_fingerprints_change_with_what_the_log_does_not_show(session: Session) -> None:
    name = f"{DATABASE}.odd-name"
    execute(session, "CREATE TABLE `odd-name` (id int PRIMARY KEY, n int)")
    seen = [read_fingerprints(session, [name])[name]]
    assert read_fingerprints(session, [name])[name] == seen[0]
    execute(session, "INSERT INTO `odd-name` VALUES (1, 1)", "ANALYZE TABLE `odd-name`")
    assert read_fingerprints(session, [name])[name] == seen[0]
    for statement in (
        "TRUNCATE TABLE `odd-name`",
        "ALTER TABLE `odd-name` MODIFY n bigint",
        "ALTER TABLE `odd-name` RENAME COLUMN n TO m",
        "ALTER TABLE `odd-name` DROP PRIMARY KEY, ADD PRIMARY KEY (id, m)",
        "ALTER TABLE `odd-name` PARTITION BY HASH (id) PARTITIONS 2",
        "ALTER TABLE `odd-name` TRUNCATE PARTITION p1",
        "CREATE OR REPLACE TABLE `odd-name` (id int, m bigint, PRIMARY KEY (id, m))",
    ):
        execute(session, statement)
        seen.append(read_fingerprints(session, [name])[name])
        assert len(set(seen)) == len(seen), statement
    execute(session, "DROP TABLE `odd-name`")
    assert read_fingerprints(session, [name]) == {}


def test_what_cannot_be_a_key_and_what_is_read_by_key(mariadb: MariaDB, session: Session) -> None:
    execute(
        session,
        "CREATE TABLE by_uuid (id uuid PRIMARY KEY, place point)",
        "CREATE TABLE by_float (id float PRIMARY KEY)",
        "CREATE TABLE by_index (a int NOT NULL, b int, UNIQUE (a)) PARTITION BY HASH (a) PARTITIONS 2",
        "CREATE OR REPLACE USER onlooker@'%' IDENTIFIED BY 'of-a-test-server'",
        f"GRANT SELECT ON {DATABASE}.* TO onlooker@'%'",
    )
    ids = [f"{DATABASE}.{name}" for name in ("by_uuid", "by_float", "by_index")]
    source = spec_of(mariadb).model_copy(update={"url": f"mariadb://onlooker@127.0.0.1:{mariadb.port}/"})
    with closing(connect(source)) as poor:
        found = list(read_catalogue(poor, ids).values())
    assert [problem.what.split(",")[0] for problem in obstacles(found)] == [
        "the key column id has the type uuid",
        "the key column id is a float",
    ]
    notes = [problem.what[:40] for problem in column_notes(found)]
    assert notes[0] == "the log does not carry id (uuid), place "
    assert notes[1:] == ["TRUNCATE, DROP and EXCHANGE PARTITION ar"]  # without PROCESS
    assert (found[2].table.key, found[2].table.key_is_primary) == (("a",), False)
    assert [source.ids for source in found] == [(), (), ()]


def test_json_is_recognised_by_a_user_who_may_only_read(mariadb: MariaDB, session: Session) -> None:
    execute(
        session,
        "CREATE TABLE with_json (id int PRIMARY KEY, `j``s` json, t longtext)",
        "CREATE OR REPLACE USER onlooker@'%' IDENTIFIED BY 'of-a-test-server'",
        f"GRANT SELECT ON {DATABASE}.* TO onlooker@'%'",
    )
    source = spec_of(mariadb).model_copy(update={"url": f"mariadb://onlooker@127.0.0.1:{mariadb.port}/"})
    with closing(MariaReader(source, "values")) as reader:
        kinds = [column.kind for column in table_of(reader, "with_json").columns]
    assert kinds == [Kind.INTEGER, Kind.JSON, Kind.TEXT]


def test_what_ends_debezium_wherever_it_is(session: Session) -> None:
    execute(session, "CREATE OR REPLACE TABLE addresses (id int PRIMARY KEY, a inet6)")
    found = unreadable_columns(session)
    assert f"{DATABASE}.addresses.a (inet6)" in found
    problem = obstacles([], [f"{DATABASE}.addresses.a (inet6)"])[0]
    assert problem.what.startswith(f"{DATABASE}.addresses.a (inet6) ends Debezium")
    execute(session, "DROP TABLE addresses")
    assert f"{DATABASE}.addresses.a (inet6)" not in unreadable_columns(session)
