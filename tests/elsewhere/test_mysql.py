"""A pipeline from MySQL, through Debezium Server and Kafka, to a store: load, changes, faults, types."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from acceptance.harness import Run
from acceptance.kafka_harness import child_of
from acceptance.mariadb_harness import BinlogPipeline, MariaPipeline, MariaSource, execute, maria_pipeline
from acceptance.test_mariadb import BEGINS_S, LOADS_S, ROWS, SOME, Writing
from delta_sync.sinks import target_for
from delta_sync.sources.mysql.connection import Session
from delta_sync.sources.mysql.gtid_reader import MySQLReader
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.mysql import MySQL
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import Redis
from delta_sync.values import to_json
from mariadb_values import VALUES as MARIADB_VALUES

# (type, what is inserted, the value, whether the log has it faithfully)
VALUES: list[tuple[str, str, Any, bool]] = [
    *(value for value in MARIADB_VALUES if value[0] not in ("uuid", "inet4", "inet6")),  # which MySQL lacks
    ("json", '\'{"é": [1e2, -0.5, 18446744073709551615, true, "a\\\\"b", {}]}\'', None, True),
    ("json", "cast(1.10 as json)", None, True),
    ("json", "cast(timestamp'2024-02-29 12:34:56.5' as json)", None, True),
    ("json", "'null'", None, True),
    ("varchar(20) collate utf8mb4_0900_ai_ci", "'Straße '", "Straße ", True),
    ("geometry srid 4326", "st_srid(point(10, 50), 4326)", "POINT(50 10)", False),  # latitude first, as ST_AsText
    ("vector(2)", "to_vector('[1, -2.5]')", struct.pack("<ff", 1, -2.5), False),
    ("linestring", "st_linefromtext('linestring(0 0,1 2)')", "LINESTRING(0 0,1 2)", False),
    ("int invisible default 7", "default", 7, True),
    ("varchar(40) default (upper('x'))", "default", "X", True),
]

TABLES = {
    "account": "CREATE TABLE account (id int PRIMARY KEY, name varchar(40), balance decimal(12,2), at timestamp(3),"
    " since date NOT NULL, KEY ((lower(name))), KEY (balance) INVISIBLE)",
    "item": "CREATE TABLE item (region varchar(10) COLLATE utf8mb4_0900_ai_ci, number int, data json, place point,"
    " PRIMARY KEY (region, number))",
    "part": "CREATE TABLE part (id int PRIMARY KEY, account_id int, FOREIGN KEY (account_id) REFERENCES account (id)"
    " ON DELETE CASCADE ON UPDATE CASCADE)",
    "types": "CREATE TABLE types (id int PRIMARY KEY, "
    + ", ".join(f"c{number} {type_}" for number, (type_, *_) in enumerate(VALUES))
    + ")",
}


class MySQLSource(MariaSource):
    """A database in MySQL."""

    reader_class = MySQLReader
    privileges = "REPLICATION SLAVE, REPLICATION CLIENT, XA_RECOVER_ADMIN"


class WritingMySQL(Writing):
    """Changes rows, those that refer to others by the server's own doing, too."""

    def _change(self) -> str:
        id_, other, word = self._random.randrange(ROWS), self._random.randrange(ROWS), self._random.random()
        since = self._random.choice(("'0000-00-00'", "'1970-01-01'", "'2024-02-29'"))
        where = f"region = 'r{id_ % 7}' AND number = {id_}"
        return self._random.choice(
            [
                f"INSERT INTO account (id, name, balance, at, since) VALUES ({id_}, {word}, {word}, NOW(3), {since})",
                f"UPDATE account SET name = '{word}', balance = balance + 1, since = {since} WHERE id = {id_}",
                f"UPDATE account SET name = '{word}' WHERE id BETWEEN {id_} AND {id_ + 5}",
                f"DELETE FROM account WHERE id = {id_}",
                f"UPDATE account SET id = {other} WHERE id = {id_}",
                f"INSERT INTO part VALUES ({id_}, {other})",
                f"INSERT INTO item VALUES ('R{id_ % 7}', {id_}, '[{word}]', POINT({word}, {id_}))",
                f"UPDATE item SET place = POINT({word}, 0), data = JSON_SET(data, '$.a', {word}) WHERE {where}",
                f"UPDATE item SET region = 'moved' WHERE {where}",
                f"DELETE FROM item WHERE {where}",
            ]
        )


def fill(session: Session) -> None:
    """Write the rows that are there before the pipeline is."""
    values = ", ".join(text for _, text, *_ in VALUES)
    accounts = ", ".join(f"({n}, 'first', {n}.25, NOW(3), '2024-02-29')" for n in range(ROWS))
    items = ", ".join(f"('r{n % 7}', {n}, '{{}}', POINT({n}, 1))" for n in range(ROWS))
    parts = ", ".join(f"({n}, {n})" for n in range(0, ROWS, 3))
    columns = ", ".join(f"c{number}" for number in range(len(VALUES)))  # an invisible one has to be named
    execute(
        session,
        f"INSERT INTO account VALUES {accounts}",
        f"INSERT INTO item VALUES {items}",
        f"INSERT INTO part VALUES {parts}",
        f"INSERT INTO types (id, {columns}) VALUES (1, {values})",
    )


@pytest.fixture
def pipeline(
    mysql: MySQL, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> Iterator[MariaPipeline]:
    with maria_pipeline(mysql, redis_server, kafka, registry, tmp_path, TABLES, MariaPipeline, MySQLSource) as made:
        yield made


def test_a_pipeline_from_mysql(pipeline: MariaPipeline) -> None:
    source = pipeline.source
    with closing(source.session()) as session, contextlib.ExitStack() as exits:

        def start(command: str) -> Run:
            run = pipeline.process(command)
            exits.callback(run.kill)
            return run

        fill(session)
        with WritingMySQL(pipeline) as writer:
            sidecar, worker = start("sidecar"), start("worker")
            wait_until(lambda: bool(worker.events("load_started")) or not worker.running, BEGINS_S, "the load")
            assert worker.running, worker.tail()
            worker.kill()  # both in the midst of it
            child_of(sidecar, "debezium").kill()
            worker = start("worker")
            wait_until(pipeline.loaded, LOADS_S, "the load's end")
            before = writer.transactions
            wait_until(lambda: writer.transactions > before + SOME, LOADS_S, "some transactions")
            worker.kill()
            child_of(sidecar, "debezium").kill()
            worker = start("worker")
        values = ", ".join(text for _, text, *_ in VALUES)
        columns = ", ".join(f"c{number}" for number in range(len(VALUES)))
        execute(session, f"INSERT INTO types (id, {columns}) VALUES (2, {values})")
        pipeline.in_step(sidecar, worker)
        check_types(pipeline)

        # ── columns are added and a table is emptied while the writer goes on ──
        with WritingMySQL(pipeline) as writer:
            execute(session, "ALTER TABLE account ADD COLUMN extra varchar(20) DEFAULT 'none'")
            execute(session, "TRUNCATE TABLE item", "INSERT INTO item VALUES ('after', 1, '[2]', POINT(1, 1))")
            wait_until(lambda: writer.transactions > SOME, LOADS_S, "some transactions")
        pipeline.in_step(sidecar, worker)
        with WritingMySQL(pipeline):
            check_repair(pipeline)
        pipeline.in_step(sidecar, worker)
        assert pipeline.epoch() == 1

        # ── the log begins anew: the epoch rises, and what was deleted meanwhile goes ──
        execute(session, "RESET BINARY LOGS AND GTIDS", "DELETE FROM account WHERE id % 2 = 0")
        with WritingMySQL(pipeline):
            wait_until(lambda: pipeline.loaded() and pipeline.epoch() == 2, LOADS_S, "a new epoch")
        pipeline.in_step(sidecar, worker)

        verified = pipeline.deltactl("verify", pipeline.name, "--json")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert pipeline.dead_letters() == []
        assert sidecar.stop() == 0
        assert worker.stop() == 0
    checked = pipeline.deltactl("pipeline", "check", pipeline.name, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert all(not problem["fatal"] for problem in json.loads(checked.stdout)["problems"])


def check_types(pipeline: BinlogPipeline) -> None:
    """Row 1 came by a load and row 2 by the log: both documents have every value as it is."""
    table = pipeline.source.reader.tables([pipeline.tables[-1]])[pipeline.tables[-1]]
    loaded, logged = (pipeline.document(table, (id_,)) for id_ in (1, 2))
    assert loaded is not None
    assert logged is not None
    assert {**loaded, "id": 2} == logged
    expected = json.loads(to_json({f"c{n}": value for n, (_, _, value, _) in enumerate(VALUES)}))
    for number, (type_, text, value, in_log) in enumerate(VALUES):
        column = table.column(f"c{number}")
        assert column.in_log is in_log, (type_, column)
        if value is not None or "'0000" in text:
            assert loaded[column.name] == expected[column.name], (type_, text)


def check_repair(pipeline: BinlogPipeline) -> None:
    """Of a document that is gone verify finds the row, and nothing that is on its way."""
    types = pipeline.tables[-1]
    table = pipeline.source.reader.tables([types])[types]
    cache = pipeline.sinks["cache"]
    target = target_for(cache, table, pipeline.spec)
    (stored,) = cache.read(target, [(2,)])
    assert stored is not None
    cache.discard(target, [((2,), stored.version)])
    repaired = pipeline.deltactl("verify", pipeline.name, "--repair", "--yes", "--json")
    lines = [json.loads(line) for line in repaired.stdout.splitlines()]
    found = [(line["finding"]["table"], line["finding"]["key"]) for line in lines if "finding" in line]
    assert (repaired.returncode, found) == (0, [(types, "2")]), repaired.stdout + repaired.stderr
    check_types(pipeline)
