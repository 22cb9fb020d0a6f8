"""The state store on a real MariaDB: the contract, and what only a server can do."""

from __future__ import annotations

import datetime as dt
import uuid
from pathlib import Path

import pymysql
import pytest

from delta_sync.errors import StateBusy, StateRefused
from delta_sync.state import StateStore
from delta_sync.testing.mariadb import PASSWORD, USER, MariaDB
from dump_contract import DumpContract
from migration_contract import ServerMigrationContract
from state_contract import CLOCK_STEP, Location, ServerStateContract, emptied, letter, migrated


def new_location(server: MariaDB, folder: Path) -> Location:
    """Return the location of a fresh database."""
    name = f"state_{uuid.uuid4().hex}"
    execute(server, f"CREATE DATABASE {name}")
    url = server.url_of(name)
    return Location(url, folder, url.replace("mariadb://", "mariadb+pymysql://"))


def execute(server: MariaDB, statement: str) -> None:
    with (
        pymysql.connect(host="127.0.0.1", port=server.port, user=USER, password=PASSWORD) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(statement)


@pytest.fixture(scope="module")
def shared(mariadb: MariaDB, tmp_path_factory: pytest.TempPathFactory) -> Location:
    return migrated(new_location(mariadb, tmp_path_factory.mktemp("state")))


class TestMariaDB(ServerStateContract, DumpContract):
    @pytest.fixture
    def location(self, shared: Location, tmp_path: Path) -> Location:
        return emptied(shared, tmp_path)


class TestMigrationsOfMariaDB(ServerMigrationContract):
    @pytest.fixture
    def location(self, mariadb: MariaDB, tmp_path: Path) -> Location:
        return new_location(mariadb, tmp_path)


def test_a_server_that_is_gone_is_transient(mariadb: MariaDB, tmp_path: Path) -> None:
    location = new_location(mariadb, tmp_path)
    with StateStore.open(location.url, tmp_path) as store:
        store.add_dead_letters("movies", [letter(1)])
        mariadb.kill()
        with pytest.raises(StateBusy):
            store.add_dead_letters("movies", [letter(2)])
        with pytest.raises(StateBusy):
            StateStore.open(location.url, tmp_path)
        mariadb.start()
        store.add_dead_letters("movies", [letter(2)])
        assert store.count_dead_letters("movies") == 2


def test_credentials_that_are_wrong_are_not_transient(mariadb: MariaDB, tmp_path: Path) -> None:
    location = new_location(mariadb, tmp_path)
    with pytest.raises(StateRefused, match="Access denied") as caught:
        StateStore.open(location.url.replace(f":{PASSWORD}@", ":hunter2@"), tmp_path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StateRefused, match="Unknown database"):
        StateStore.open(mariadb.url_of("no_such_database"), tmp_path)


def test_a_read_only_server_is_not_transient(mariadb: MariaDB, tmp_path: Path) -> None:
    location = new_location(mariadb, tmp_path)
    StateStore.open(location.url, tmp_path).close()
    name = location.url.rpartition("/")[2]
    execute(mariadb, f"CREATE OR REPLACE USER reader@'%' IDENTIFIED BY '{PASSWORD}'")
    execute(mariadb, f"GRANT SELECT ON {name}.* TO reader@'%'")
    with StateStore.open(location.url.replace(f"//{USER}:", "//reader:"), tmp_path) as store:
        assert store.count_dead_letters("movies") == 0
        with pytest.raises(StateRefused, match="denied"):
            store.add_dead_letters("movies", [letter(1)])


def test_its_clock_is_in_utc_whatever_the_servers_time_zone(mariadb: MariaDB, tmp_path: Path) -> None:
    execute(mariadb, "SET GLOBAL time_zone = '+05:00'")
    try:
        with StateStore.open(new_location(mariadb, tmp_path).url, tmp_path) as store:
            before = dt.datetime.now(dt.UTC)
            assert before - CLOCK_STEP <= store.database_now() <= dt.datetime.now(dt.UTC) + CLOCK_STEP
    finally:
        execute(mariadb, "SET GLOBAL time_zone = 'SYSTEM'")
