"""What every state store must do with tables of another version, or none: `class TestX(MigrationContract)`.

Each test has a database of its own, of which `StateContract`'s tests share one: making it takes longer than they do.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from delta_sync.delta_event import encode_key
from delta_sync.errors import StaleStateStore, StateBusy
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.state_database import migration_lock
from delta_sync.state_tables import METADATA, VERSION_TABLE
from state_contract import (
    FOR_EVER_S,
    NOW,
    PROCESSES,
    Location,
    StateFixtures,
    add_when_all_are_ready,
    die_at,
    letter,
    microseconds,
    run_processes,
)


class MigrationContract(StateFixtures):
    def test_a_fresh_store_is_what_the_code_expects(self, store: StateStore, raw: sa.Engine) -> None:
        with raw.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            assert compare_metadata(context, METADATA) == []
            for table in METADATA.sorted_tables:  # what compare_metadata does not look at
                expected = [column.name for column in table.primary_key]
                assert sa.inspect(connection).get_pk_constraint(table.name)["constrained_columns"] == expected

    @staticmethod
    def make_v0001(raw: sa.Engine) -> None:
        """Make what the first Delta made, with a row in each table."""
        config = Config()
        config.set_main_option("script_location", "delta_sync:migrations")
        with raw.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")
        tables = sa.MetaData()
        tables.reflect(raw)
        rows: dict[str, dict[str, Any]] = {
            "delta_pipeline": {"name": "movies", "epoch": 3, "system_identifier": "7", "timeline": 1, "slot_lsn": 9},
            "delta_load": {
                "pipeline": "movies",
                "table_name": "a.b",
                "state": "running",
                "after_key": encode_key((7,)),
                "row_count": 7,
                "covered_from": 5,
                "fingerprint": "f",
                "reason": "new",
                "epoch": 3,
                "started_at": microseconds(NOW),
            },
            "delta_dead_letter": {
                "pipeline": "movies",
                "identity": "0" * 64,
                "table_name": "a.b",
                "key_text": "1",
                "version": 8,
                "stage": "apply",
                "error": "e",
                "trace": "t",
                "event": b"\0\xff",
                "created_at": microseconds(NOW),
                "attempts": 2,
            },
            "delta_status": {"pipeline": "movies", "status": '{"n": 1}', "saved_at": microseconds(NOW)},
        }
        assert set(tables.tables) == {*rows, VERSION_TABLE}
        with raw.begin() as connection:
            for name, row in rows.items():
                connection.execute(sa.insert(tables.tables[name]).values(**row))

    @staticmethod
    def check_what_v0001_had(store: StateStore) -> None:
        assert store.pipeline("movies") == PipelineState("movies", 3, "7", 1, 9)
        load = TableLoad("a.b", "running", (7,), 7, 5, "f", "new", 3, NOW)
        assert store.loads("movies") == {"a.b": load}
        (found,) = store.dead_letters("movies")
        assert (found.event, found.created_at, found.attempts) == (b"\0\xff", NOW, 2)
        assert store.status("movies") == ({"n": 1}, NOW)
        lease = store.take_lease("movies", "load", "me", FOR_EVER_S)
        assert lease is not None
        store.save_load("movies", load._replace(rows=8), lease)
        store.save_member("movies", "me", {})

    def test_a_store_of_the_first_version_keeps_its_rows(self, location: Location, raw: sa.Engine) -> None:
        self.make_v0001(raw)
        with StateStore.open(location.url, location.folder) as store:
            self.check_what_v0001_had(store)
            self.test_a_fresh_store_is_what_the_code_expects(store, raw)
        with StateStore.open(location.url, location.folder) as store:
            assert store.loads("movies")["a.b"].rows == 8

    @pytest.mark.parametrize(
        ("statement", "occurrence"), [("CREATE TABLE", 1), ("CREATE TABLE", 2), (f"UPDATE {VERSION_TABLE}", 1)]
    )
    def test_killed_while_it_migrates_the_first_version(
        self, location: Location, raw: sa.Engine, statement: str, occurrence: int
    ) -> None:
        self.make_v0001(raw)
        assert run_processes(die_at, (location, statement, occurrence)) == [-signal.SIGKILL]
        with StateStore.open(location.url, location.folder) as store:
            self.check_what_v0001_had(store)

    def test_those_who_only_look_bring_an_old_store_up_to_date(self, location: Location, raw: sa.Engine) -> None:
        self.make_v0001(raw)
        store = StateStore.open(location.url, location.folder, create=False)
        assert store is not None
        with store:
            assert store.members("movies") == []

    def test_there_is_no_way_back(self, store: StateStore, raw: sa.Engine) -> None:
        config = Config()
        config.set_main_option("script_location", "delta_sync:migrations")
        with raw.connect() as connection:
            config.attributes["connection"] = connection
            with pytest.raises(NotImplementedError, match="not taken back"):
                command.downgrade(config, "base")

    @pytest.mark.parametrize("create", [True, False])
    def test_a_newer_store_is_refused(
        self, store: StateStore, location: Location, raw: sa.Engine, create: bool
    ) -> None:
        with raw.begin() as connection:
            connection.execute(sa.text(f"update {VERSION_TABLE} set version_num = '9999'"))
        with pytest.raises(StaleStateStore, match="9999"):
            StateStore.open(location.url, location.folder, create=create)
        with raw.connect() as connection:
            assert connection.execute(sa.text(f"select version_num from {VERSION_TABLE}")).scalar() == "9999"

    def test_nothing_is_created_for_those_who_only_look(self, location: Location, raw: sa.Engine) -> None:
        assert StateStore.open(location.url, location.folder, create=False) is None
        assert sa.inspect(raw).get_table_names() == []
        StateStore.open(location.url, location.folder).close()
        existing = StateStore.open(location.url, location.folder, create=False)
        assert existing is not None
        existing.close()

    def test_processes_create_and_write_at_once(self, location: Location) -> None:
        writers, count = 3, 20
        barrier = PROCESSES.Barrier(writers)
        assert run_processes(add_when_all_are_ready, *[(location, barrier, count)] * writers) == [0] * writers
        with StateStore.open(location.url, location.folder) as store:
            found = store.dead_letters("movies", limit=1000)
            assert len(found) == count
            assert {each.attempts for each in found} == {writers}
            assert store.loads("movies")["public.movie"].rows == count - 1

    @pytest.mark.parametrize("occurrence", [1, 3])
    def test_killed_while_it_migrates(self, location: Location, occurrence: int) -> None:
        assert run_processes(die_at, (location, "CREATE TABLE", occurrence)) == [-signal.SIGKILL]
        with StateStore.open(location.url, location.folder) as store:
            store.add_dead_letters("movies", [letter(1)])
            assert store.count_dead_letters("movies") == 1


class ServerMigrationContract(MigrationContract):
    """What every server must do, and a file cannot: its writer's lock is the process's, for as long as it lives."""

    def test_one_that_migrates_for_too_long_is_not_waited_for(self, location: Location, raw: sa.Engine) -> None:
        with raw.begin() as connection, migration_lock(connection), pytest.raises(StateBusy):
            StateStore.open(location.url, location.folder, busy_timeout_s=1)
        assert not set(sa.inspect(raw).get_table_names()) & set(METADATA.tables)
        StateStore.open(location.url, location.folder).close()
