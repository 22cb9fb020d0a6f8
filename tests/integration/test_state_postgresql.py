"""The state store on real PostgreSQL servers: the contract, and what only a server can do."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from delta_sync.errors import StateBusy, StateRefused
from delta_sync.state import StateStore
from delta_sync.testing.servers import PostgreSQL
from dump_contract import DumpContract
from migration_contract import ServerMigrationContract
from state_contract import Location, ServerStateContract, emptied, letter, migrated

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def postgresql_15() -> Iterator[PostgreSQL]:
    if not (DEBIAN_15 / "postgres").exists():
        pytest.skip(f"there is no {DEBIAN_15}")
    with PostgreSQL(bin_dir=DEBIAN_15) as server:
        yield server


def new_location(server: PostgreSQL, folder: Path) -> Location:
    """Return the location of a fresh database."""
    name = f"state_{uuid.uuid4().hex}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"create database {name}")
    url = server.url_of(name)
    return Location(url, folder, url.replace("postgresql://", "postgresql+psycopg://"))


@pytest.fixture(scope="module")
def shared_18(postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Location:
    return migrated(new_location(postgresql, tmp_path_factory.mktemp("state")))


@pytest.fixture(scope="module")
def shared_15(postgresql_15: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Location:
    return migrated(new_location(postgresql_15, tmp_path_factory.mktemp("state")))


class TestPostgreSQL18(ServerStateContract, DumpContract):
    @pytest.fixture
    def location(self, shared_18: Location, tmp_path: Path) -> Location:
        return emptied(shared_18, tmp_path)


class TestPostgreSQL15(ServerStateContract, DumpContract):
    @pytest.fixture
    def location(self, shared_15: Location, tmp_path: Path) -> Location:
        return emptied(shared_15, tmp_path)


class TestMigrationsOfPostgreSQL18(ServerMigrationContract):
    @pytest.fixture
    def location(self, postgresql: PostgreSQL, tmp_path: Path) -> Location:
        return new_location(postgresql, tmp_path)


@pytest.mark.long
class TestMigrationsOfPostgreSQL15(ServerMigrationContract):
    @pytest.fixture
    def location(self, postgresql_15: PostgreSQL, tmp_path: Path) -> Location:
        return new_location(postgresql_15, tmp_path)


def test_a_server_that_is_gone_is_transient(postgresql: PostgreSQL, tmp_path: Path) -> None:
    location = new_location(postgresql, tmp_path)
    with StateStore.open(location.url, tmp_path) as store:
        store.add_dead_letters("movies", [letter(1)])
        postgresql.kill()
        with pytest.raises(StateBusy):
            store.add_dead_letters("movies", [letter(2)])
        with pytest.raises(StateBusy):
            StateStore.open(location.url, tmp_path)
        postgresql.start()
        store.add_dead_letters("movies", [letter(2)])
        assert store.count_dead_letters("movies") == 2


def test_credentials_that_are_wrong_are_not_transient(postgresql: PostgreSQL, tmp_path: Path) -> None:
    location = new_location(postgresql, tmp_path)
    with pytest.raises(StateRefused, match="password authentication failed") as caught:
        StateStore.open(location.url.replace("postgres:postgres@", "postgres:hunter2@"), tmp_path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StateRefused, match="does not exist"):
        StateStore.open(postgresql.url_of("no_such_database"), tmp_path)


def test_a_read_only_server_is_not_transient(postgresql: PostgreSQL, tmp_path: Path) -> None:
    location = new_location(postgresql, tmp_path)
    StateStore.open(location.url, tmp_path).close()
    database = location.url.rpartition("/")[2]
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute(f"alter database {database} set default_transaction_read_only = on")
    with StateStore.open(location.url, tmp_path) as store:
        assert store.count_dead_letters("movies") == 0
        with pytest.raises(StateRefused, match="read-only"):
            store.add_dead_letters("movies", [letter(1)])


def test_it_shares_a_database_with_another_application(postgresql: PostgreSQL, tmp_path: Path) -> None:
    location = new_location(postgresql, tmp_path)
    with psycopg.connect(location.url) as connection:
        connection.execute("create table alembic_version (version_num varchar(32) primary key)")
        connection.execute("insert into alembic_version values ('theirs')")
    with StateStore.open(location.url, tmp_path) as store:
        store.add_dead_letters("movies", [letter(1)])
    with psycopg.connect(location.url) as connection:
        assert connection.execute("select version_num from alembic_version").fetchall() == [("theirs",)]
