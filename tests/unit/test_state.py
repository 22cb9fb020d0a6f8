"""The state store on SQLite: the contract, and what only a file can do."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.schema import CreateIndex, CreateTable

from delta_sync import migrations
from delta_sync.errors import StateBusy, StateRefused, UsageError
from delta_sync.state import PipelineState, StateStore
from delta_sync.state_tables import METADATA, REVISION
from dump_contract import DumpContract
from migration_contract import MigrationContract
from state_contract import Location, StateContract, letter, migrated


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "state.db"


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold SQLite's write lock, as a process in the midst of its transaction does."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def location_of(file: Path) -> Location:
    file.parent.mkdir(exist_ok=True)
    return Location(f"sqlite:///{file.name}", file.parent, f"sqlite:///{file}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a store with nothing in it."""
    file = tmp_path_factory.mktemp("state") / "state.db"
    migrated(location_of(file))
    return file


class TestSQLite(StateContract, DumpContract):
    @pytest.fixture
    def location(self, shared: Path, file: Path) -> Location:
        location = location_of(file)
        shutil.copy(shared, file)
        return location


class TestMigrationsOfSQLite(MigrationContract):
    @pytest.fixture
    def location(self, file: Path) -> Location:
        return location_of(file)


def test_a_relative_path_is_relative_to_the_folder(tmp_path: Path) -> None:
    StateStore.open("sqlite:///deep/state.db", tmp_path / "movies").close()
    StateStore.open(f"sqlite:///{tmp_path}/elsewhere.db", tmp_path / "movies").close()
    assert (tmp_path / "movies" / "deep" / "state.db").exists()
    assert (tmp_path / "elsewhere.db").exists()


def test_the_newest_migration_is_the_one_that_a_store_is_compared_with() -> None:
    assert migrations.newest() == REVISION


def test_those_who_only_look_leave_no_file(tmp_path: Path) -> None:
    assert StateStore.open("sqlite:///deep/state.db", tmp_path, create=False) is None
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_no_store(tmp_path: Path) -> None:
    """One may be left by a process that was killed before it could create the tables."""
    (tmp_path / "state.db").touch()
    assert StateStore.open("sqlite:///state.db", tmp_path, create=False) is None
    StateStore.open("sqlite:///state.db", tmp_path).close()


def test_threads_open_stores_at_once(tmp_path: Path) -> None:
    """Alembic's environment is global to the process."""
    start = threading.Barrier(4)

    def work(number: int) -> int:
        start.wait()
        with StateStore.open(f"sqlite:///state{number}.db", tmp_path) as store:
            store.add_dead_letters("movies", [letter()])
            return store.count_dead_letters("movies")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [1] * 4


def test_only_the_owner_reads_it(file: Path) -> None:
    """Dead letters hold rows."""
    with StateStore.open("sqlite:///state.db", file.parent) as store:
        store.save_pipeline(PipelineState("movies", 1, "1", 1))
        files = sorted(file.parent.iterdir())
        assert [each.name for each in files] == ["state.db", "state.db-shm", "state.db-wal"]
        assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o600}


def test_a_url_may_refer_to_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "kept-apart")
    StateStore.open("sqlite:///${env:PLACE}.db", tmp_path).close()
    assert (tmp_path / "kept-apart.db").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "not an SQLAlchemy URL"),
        ("oracle://host/db", "does not know"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("sqlite:///state.db?mode=ro", "takes none"),
        ("sqlite:///.", "cannot be written"),
        ("sqlite:///taken/state.db", "cannot be written"),
        ("postgresql+nodriver://host/db", "driver"),
        ("sqlite:///${env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
    ],
)
def test_a_url_that_cannot_be_used_is_a_sentence(tmp_path: Path, url: str, said: str) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(UsageError, match=said):
        StateStore.open(url, tmp_path)


def test_a_message_never_quotes_the_password(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        StateStore.open("oracle://delta:hunter2@host/db", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_text("name: movies\n" * 1000)
    with pytest.raises(UsageError, match="not a database"):
        StateStore.open("sqlite:///state.db", tmp_path)


def test_a_lock_that_stays_is_transient(file: Path) -> None:
    with StateStore.open("sqlite:///state.db", file.parent, busy_timeout_s=0.01) as store:
        with locked(file):
            with pytest.raises(StateBusy, match="locked"):
                store.add_dead_letters("movies", [letter()])
            assert store.count_dead_letters("movies") == 0, "readers do not wait for a writer"
        store.add_dead_letters("movies", [letter()])
        assert store.count_dead_letters("movies") == 1


def test_opening_a_locked_store(file: Path) -> None:
    """One that is up to date needs no write; a fresh one has to wait for its turn."""
    StateStore.open("sqlite:///state.db", file.parent).close()
    with locked(file):
        StateStore.open("sqlite:///state.db", file.parent, busy_timeout_s=0.01).close()
        (file.parent / "fresh.db").touch()
        with locked(file.parent / "fresh.db"), pytest.raises(StateBusy):
            StateStore.open("sqlite:///fresh.db", file.parent, busy_timeout_s=0.01)
    StateStore.open("sqlite:///fresh.db", file.parent).close()


def test_a_full_disk_stops_the_pipeline(file: Path) -> None:
    with StateStore.open("sqlite:///state.db", file.parent) as store:
        with store._engine.connect() as connection:  # a limit of the connection, which the pool keeps
            connection.exec_driver_sql("PRAGMA max_page_count=1")
        with pytest.raises(StateRefused, match="full"):
            store.add_dead_letters("movies", [letter(event=b"x" * 1_000_000)])
        assert store.count_dead_letters("movies") == 0


def test_a_commit_is_on_the_disk(file: Path) -> None:
    """The source forgets a change once its dead letter is committed."""
    with StateStore.open("sqlite:///state.db", file.parent) as store, store._engine.connect() as connection:
        names = ("synchronous", "journal_mode", "foreign_keys")
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}
    assert pragmas == {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1}


def test_a_closed_store_cannot_be_used(tmp_path: Path) -> None:
    store = StateStore.open("sqlite:///state.db", tmp_path)
    store.close()
    store.close()
    with pytest.raises(AssertionError):
        store.status("movies")


@pytest.mark.parametrize("url", ["mysql+pymysql://", "mariadb+pymysql://", "postgresql+psycopg://"])
def test_other_databases_have_types_for_it(url: str) -> None:
    dialect = make_url(url).get_dialect()()
    statements = [str(CreateTable(table).compile(dialect=dialect)) for table in METADATA.sorted_tables]
    statements += [
        str(CreateIndex(index).compile(dialect=dialect)) for table in METADATA.sorted_tables for index in table.indexes
    ]
    text = "\n".join(statements)
    if dialect.name in {"mysql", "mariadb"}:
        assert "LONGBLOB" in text
        assert " BLOB" not in text, "it ends at 64 KiB"
        assert "LONGTEXT" in text
        assert " TEXT" not in text
        assert text.count("VARCHAR") == text.count("COLLATE utf8mb4_bin"), "names differ by case"
    else:
        assert "BYTEA" in text
        assert "BIGSERIAL" in text
