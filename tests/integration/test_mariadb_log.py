"""What Debezium writes of a MariaDB's log, by the connector's own options, has the values and positions of a dump."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count, pairwise
from pathlib import Path

import pytest

from delta_sync.sources.mysql.catalogue import unreadable_columns
from delta_sync.sources.mysql.claims import Snapshot, event_position
from delta_sync.sources.mysql.codec import table_codec
from delta_sync.sources.mysql.connection import Session, connect
from delta_sync.sources.mysql.reader import MariaReader
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.testing.mariadb import PASSWORD, USER, MariaDB
from delta_sync.testing.processes import wait_until
from integration.mariadb_log import ARRIVES_S, Log, execute
from mariadb_values import VALUES as ALL_VALUES

DATABASE = "log_values"
TABLE = f"{DATABASE}.types"
UNREADABLE = frozenset({"inet4", "inet6"})
VALUES = [value for value in ALL_VALUES if value[0] not in UNREADABLE]


@pytest.fixture
def session(mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setenv("DELTA_TEST_PASSWORD", PASSWORD)
    with closing(connect(spec_of(mariadb).source)) as session:
        execute(session, f"CREATE OR REPLACE DATABASE {DATABASE}", f"USE {DATABASE}")
        yield session
        execute(session, f"DROP DATABASE {DATABASE}")


def spec_of(server: MariaDB) -> PipelineSpec:
    return spec_from(
        {
            "name": "types",
            "source": {
                "url": f"mariadb://{USER}@127.0.0.1:{server.port}/",
                "password": "${env:DELTA_TEST_PASSWORD}",
            },
            "tables": {TABLE: {}},
            "sinks": {"cache": {"url": "redis://cache"}},
        },
        "the test",
    )


def anything(_: Snapshot) -> bool:
    return True


def test_log_and_dump_have_the_same_values(mariadb: MariaDB, session: Session, tmp_path: Path) -> None:
    columns = ", ".join(f"c{number} {type_}" for number, (type_, *_) in enumerate(VALUES))
    values = ", ".join(text for _, text, *_ in VALUES)
    nulls = ", ".join("default" if text == "default" else "NULL" for _, text, *_ in VALUES)
    execute(session, f"CREATE TABLE types (id int PRIMARY KEY, {columns})")
    with (
        closing(MariaReader(spec_of(mariadb).source, "log")) as reader,
        closing(Log(tmp_path, spec_of(mariadb), reader)) as log,
    ):
        numbers = count(1000)

        def begun() -> bool:
            assert log.server.alive, log.server.last_words()
            execute(session, f"INSERT INTO types (id) VALUES ({next(numbers)})")
            return bool(log.events)

        wait_until(begun, ARRIVES_S, "the first event")
        start = reader.log_end()
        execute(
            session,
            f"INSERT INTO types VALUES (1, {values}), (2, {nulls}), (3, {values})",
            "UPDATE types SET c0 = 7 WHERE id = 1",
            "UPDATE types SET id = 4 WHERE id = 3",
            "DELETE FROM types WHERE id = 2",
        )
        events = [
            log.wait_for(*wanted) for wanted in [(1, "c"), (2, "c"), (3, "c"), (1, "u"), (3, "d"), (4, "c"), (2, "d")]
        ]
        end = reader.log_end()

        table = reader.tables([TABLE])[TABLE]
        in_log = [column.name for column in table.columns if column.in_log]
        codec = table_codec(table._replace(columns=tuple(c for c in table.columns if c.in_log)))
        dumped = reader.read_keys(table, [(1,), (4,)], anything)
        assert dumped is not None
        rows = dict(dumped.rows)
        for event, key in ((events[3], (1,)), (events[5], (4,))):
            image = event["after"]
            assert list(image) == in_log
            assert codec.key(image) == key
            assert not codec.lacks(image)
            logged = codec.row(image)
            for column in table.columns:
                if column.in_log:
                    one, other = logged[column.name], rows[key][column.name]
                    assert (one, type(one)) == (other, type(other)), column
        empty = codec.row(events[1]["after"])
        assert {name for name in in_log if empty[name] is not None} == {"id"}

        positions = [event_position(e["source"]["file"], e["source"]["pos"], e["source"]["row"]) for e in events]
        assert start <= positions[0]
        assert [one < other for one, other in pairwise(positions)] == [True, True, True, True, False, True]
        assert positions[4] == positions[5]  # a change of the key is two changes of one row, of different keys
        assert positions[-1] < end - 2  # what dumps that claim the end are written with


def test_what_is_refused_does_end_debezium(mariadb: MariaDB, session: Session, tmp_path: Path) -> None:
    """Were it not so any more, there would be no reason to refuse a server for a table that is not the pipeline's."""
    execute(session, "CREATE TABLE types (id int PRIMARY KEY)", "CREATE TABLE elsewhere (a inet6 PRIMARY KEY)")
    assert unreadable_columns(session) == [f"{DATABASE}.elsewhere.a (inet6)"]
    with (
        closing(MariaReader(spec_of(mariadb).source, "log")) as reader,
        closing(Log(tmp_path, spec_of(mariadb), reader)) as log,
    ):
        wait_until(lambda: not log.server.alive, ARRIVES_S, "Debezium's end")
        assert "NoViableAlt" in log.server.last_words()
