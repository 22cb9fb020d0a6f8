"""What every state store must do, whatever its database: `class TestX(StateContract)` with a fixture `location`."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from delta_sync import secrets
from delta_sync.errors import StaleStateStore
from delta_sync.state import DeadLetter, PipelineState, StateStore, TableLoad
from delta_sync.state_tables import METADATA, VERSION_TABLE

NOW = dt.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=dt.UTC)
PROCESS_TIMEOUT_S = 120  # generous: a busy machine starts Python slowly
SECRET = "correct horse battery staple"


class Location(NamedTuple):
    """Where a store is: what `StateStore.open` takes, and the SQLAlchemy URL by which a test looks inside."""

    url: str
    folder: Path
    raw_url: str


def letter(number: int = 1, **changed: Any) -> DeadLetter:
    """Return a dead letter that differs from others by its number."""
    fields: dict[str, Any] = {
        "table": "public.movie",
        "key_text": str(number),
        "version": 1 << 52 | number,
        "sink": "cache",
        "stage": "apply",
        "error": "too large",
        "trace": "Traceback …",
        "event": b"\xc3\x01\x00event",
        "created_at": NOW,
    }
    return DeadLetter(**(fields | changed))


def keys_of(letters: list[DeadLetter]) -> list[str]:
    return [each.key_text for each in letters]


# ── what other processes do ──


def add_when_all_are_ready(location: Location, barrier: Barrier, count: int) -> None:
    barrier.wait(PROCESS_TIMEOUT_S)
    with StateStore.open(location.url, location.folder) as store:
        for number in range(count):
            store.add_dead_letters("movies", [letter(number)])
            store.save_load("movies", TableLoad("public.movie", rows=number))


def die_at(location: Location, statement: str, occurrence: int) -> None:
    """Add three dead letters, but be killed right after the database has run such a statement so many times."""
    seen = 0

    def look(*arguments: Any) -> None:
        nonlocal seen
        seen += arguments[2].strip().startswith(statement)
        if seen == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    sa.event.listen(sa.Engine, "after_cursor_execute", look)
    with StateStore.open(location.url, location.folder) as store:
        store.add_dead_letters("movies", [letter(1), letter(2), letter(3)])


def run_processes(target: Callable[..., None], *argument_lists: tuple[Any, ...]) -> list[int | None]:
    """Run it once with each of the arguments, all at once; return the exit codes."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=target, args=arguments) for arguments in argument_lists]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(PROCESS_TIMEOUT_S)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


class StateContract:
    @pytest.fixture
    def location(self) -> Location:
        raise NotImplementedError

    @pytest.fixture
    def store(self, location: Location) -> Iterator[StateStore]:
        with StateStore.open(location.url, location.folder, now=lambda: NOW) as opened:
            yield opened

    @pytest.fixture
    def raw(self, location: Location) -> Iterator[sa.Engine]:
        engine = sa.create_engine(location.raw_url)
        yield engine
        engine.dispose()

    # ── pipelines ──

    def test_a_pipeline_is_saved_over_what_was_there(self, store: StateStore, location: Location) -> None:
        assert store.pipeline("movies") is None
        store.save_pipeline(PipelineState("movies", 1, "7318", 1))
        store.save_pipeline(PipelineState("other", 9, "1", 1, 5))
        newer = PipelineState("movies", 2047, "18446744073709551615", 4294967295, (1 << 52) - 1)
        store.save_pipeline(newer)
        with StateStore.open(location.url, location.folder) as reopened:
            assert reopened.pipeline("movies") == newer
            assert reopened.pipeline("other") == PipelineState("other", 9, "1", 1, 5)

    # ── loads ──

    def test_a_load_is_saved_over_what_was_there(self, store: StateStore) -> None:
        assert store.loads("movies") == {}
        pending = TableLoad("public.movie", reason="new table")
        store.save_load("movies", pending)
        assert store.loads("movies") == {"public.movie": pending}
        running = pending._replace(
            state="running", rows=1 << 40, covered_from=1 << 51, fingerprint="f" * 64, epoch=3, started_at=NOW
        )
        store.save_load("movies", running)
        done = TableLoad("public.person", "done", finished_at=NOW)
        store.save_load("movies", done)
        assert store.loads("movies") == {"public.movie": running, "public.person": done}
        assert store.loads("other") == {}

    @pytest.mark.parametrize(
        "key",
        [
            (1,),
            (),
            (1 << 80, -1),
            ("é\0:%", b"\0\xff"),
            (Decimal("1.10"), True, uuid.UUID(int=5)),
            (dt.date(1, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=dt.UTC), dt.datetime(2020, 1, 1)),  # noqa: DTZ001 -- naive is the case
        ],
    )
    def test_the_key_to_go_on_after_keeps_its_types(self, store: StateStore, key: tuple[Any, ...]) -> None:
        store.save_load("movies", TableLoad("public.movie", after_key=key))
        assert repr(store.loads("movies")["public.movie"].after_key) == repr(key)

    def test_tables_differ_by_case(self, store: StateStore) -> None:
        store.save_load("movies", TableLoad("public.movie", rows=1))
        store.save_load("movies", TableLoad("public.Movie", rows=2))
        assert {load.rows for load in store.loads("movies").values()} == {1, 2}

    def test_a_load_is_forgotten_alone(self, store: StateStore) -> None:
        for pipeline, table in (("movies", "a.a"), ("movies", "a.b"), ("other", "a.a")):
            store.save_load(pipeline, TableLoad(table))
        store.forget_load("movies", "a.a")
        store.forget_load("movies", "never.there")
        assert set(store.loads("movies")) == {"a.b"}
        assert set(store.loads("other")) == {"a.a"}

    # ── dead letters ──

    def test_a_dead_letter_comes_back_as_it_was(self, store: StateStore) -> None:
        given = letter(sink=None, stage="process", version=(1 << 63) - 1, event=bytes(range(256)) * 1000)
        store.add_dead_letters("movies", [given])
        (found,) = store.dead_letters("movies")
        assert found == letter(
            id=found.id, sink=None, stage="process", version=(1 << 63) - 1, event=bytes(range(256)) * 1000
        )
        assert store.dead_letter("movies", found.id) == found
        assert store.dead_letter("other", found.id) is None
        assert store.dead_letter("movies", found.id + 1) is None

    def test_the_same_dead_letter_again_counts_an_attempt(self, store: StateStore) -> None:
        store.add_dead_letters("movies", [letter(1), letter(2)])
        later = NOW + dt.timedelta(days=1)
        store.add_dead_letters(
            "movies", [letter(1, error="still", trace="T", stage="process", event=b"new", created_at=later)]
        )
        second, first = store.dead_letters("movies")
        assert (first.error, first.trace, first.stage, first.event, first.attempts) == (
            "still",
            "T",
            "process",
            b"new",
            2,
        )
        assert first.created_at == NOW, "or it could outlive the tombstone that protects its key"
        assert (second.error, second.attempts) == ("too large", 1)

    def test_dead_letters_differ_by_table_key_sink_version_and_pipeline(self, store: StateStore) -> None:
        differences: list[dict[str, Any]] = [
            {},
            {"table": "a.b"},
            {"key_text": "x"},
            {"key_text": "X"},
            {"sink": "s"},
            {"sink": None},
            {"version": 7},
        ]
        store.add_dead_letters("movies", [letter(**difference) for difference in differences])
        store.add_dead_letters("other", [letter()])
        assert store.count_dead_letters("movies") == 7
        assert store.count_dead_letters("other") == 1
        assert store.count_dead_letters("none") == 0

    def test_failures_since_a_version_are_counted(self, store: StateStore) -> None:
        store.add_dead_letters("movies", [letter(n, table="a.b", version=n) for n in range(1, 6)])
        store.add_dead_letters("movies", [letter(9, table="a.other", version=9)])
        store.add_dead_letters("other", [letter(9, table="a.b", version=9)])
        assert store.count_failed_since("movies", "a.b", 4) == 2
        assert store.count_failed_since("movies", "a.b", 6) == 0

    def test_all_dead_letters_are_added_or_none(self, store: StateStore) -> None:
        broken = letter(2, event=None)
        with pytest.raises(Exception):  # noqa: B017, PT011 -- the databases differ in what they raise
            store.add_dead_letters("movies", [letter(1), broken])
        assert store.count_dead_letters("movies") == 0

    def test_listing_is_by_page_and_table_latest_first(self, store: StateStore) -> None:
        store.add_dead_letters("movies", [letter(n, table="a.odd" if n % 2 else "a.even") for n in range(7)])
        first = store.dead_letters("movies", limit=3)
        assert keys_of(first) == ["6", "5", "4"]
        second = store.dead_letters("movies", limit=3, before_id=first[-1].id)
        assert keys_of(second) == ["3", "2", "1"]
        assert keys_of(store.dead_letters("movies", limit=3, before_id=second[-1].id)) == ["0"]
        assert keys_of(store.dead_letters("movies", table="a.odd", limit=2)) == ["5", "3"]

    def test_discarding_counts_and_leaves_other_pipelines_alone(self, store: StateStore) -> None:
        store.add_dead_letters("movies", [letter(n) for n in range(1100)])
        store.add_dead_letters("other", [letter()])
        others = [each.id for each in store.dead_letters("other")]
        ids = [each.id for each in store.dead_letters("movies", limit=2000)]
        assert store.discard("movies", []) == 0
        assert store.discard("movies", [*ids[1:], *others, 10**15]) == 1099
        assert [each.id for each in store.dead_letters("movies")] == ids[:1]
        assert store.count_dead_letters("other") == 1

    def test_an_id_is_never_given_twice(self, store: StateStore) -> None:
        store.add_dead_letters("movies", [letter(1)])
        (old,) = store.dead_letters("movies")
        store.discard("movies", [old.id])
        store.add_dead_letters("movies", [letter(2)])
        assert store.dead_letters("movies")[0].id > old.id

    def test_pruning_is_by_the_first_failure(self, store: StateStore) -> None:
        moment = dt.timedelta(microseconds=1)
        store.add_dead_letters(
            "movies", [letter(1, created_at=NOW - moment), letter(2), letter(3, created_at=NOW + moment)]
        )
        store.add_dead_letters("other", [letter(1, created_at=NOW - moment)])
        assert store.prune("movies", NOW) == 1
        assert keys_of(store.dead_letters("movies")) == ["3", "2"]
        assert store.count_dead_letters("other") == 1

    @pytest.mark.parametrize("text", ["\0", "a\ud800b", "é中🎬", "x" * 500_000])
    def test_any_text_is_stored(self, store: StateStore, text: str) -> None:
        store.add_dead_letters("movies", [letter(key_text=text, error=text, trace=text)])
        store.save_load("movies", TableLoad("a.b", reason=text))
        (found,) = store.dead_letters("movies")
        assert found.error == found.trace
        assert found.error[:10] == text.replace("\0", "\\x00").replace("\ud800", "\\ud800")[:10]
        assert len(found.error) < 100_000

    # ── status and the rest ──

    def test_a_status_is_saved_over_what_was_there(self, store: StateStore) -> None:
        assert store.status("movies") is None
        store.save_status("movies", {"state": "starting"})
        status = {"lag_s": 1.5, "sinks": [{"name": "cache", "busy": None}], "n": 2**53, "é": "\0"}
        store.save_status("movies", status | {"since": NOW})
        expected = status | {"since": "2024-02-29T12:30:15.123456Z", "é": "\\x00"}
        assert store.status("movies") == (expected, NOW)

    def test_forgetting_leaves_other_pipelines_alone(self, store: StateStore, raw: sa.Engine) -> None:
        for name in ("movies", "other"):
            store.save_pipeline(PipelineState(name, 1, "1", 1))
            store.save_load(name, TableLoad("a.b"))
            store.add_dead_letters(name, [letter()])
            store.save_status(name, {})
        store.forget("movies")
        with raw.connect() as connection:
            for table in METADATA.sorted_tables:
                pipeline = table.c["name" if table.name == "delta_pipeline" else "pipeline"]
                assert connection.execute(sa.select(pipeline)).scalars().all() == ["other"], table.name

    def test_no_text_holds_a_secret(self, store: StateStore, raw: sa.Engine) -> None:
        secrets.remember(SECRET)
        said = f"cannot connect with {SECRET}"
        store.save_load("movies", TableLoad("a.b", reason=said))
        store.add_dead_letters("movies", [letter(key_text=said, error=said, trace=said)])
        store.save_status("movies", {said: {"nested": [said, (said,)]}})
        with raw.connect() as connection:
            for table in METADATA.sorted_tables:
                for row in connection.execute(sa.select(table)):
                    assert SECRET not in str(row)
        (found,) = store.dead_letters("movies")
        assert found.error == "cannot connect with ***"

    # ── migrations ──

    def test_a_fresh_store_is_what_the_code_expects(self, store: StateStore, raw: sa.Engine) -> None:
        with raw.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            assert compare_metadata(context, METADATA) == []
            for table in METADATA.sorted_tables:  # what compare_metadata does not look at
                expected = [column.name for column in table.primary_key]
                assert sa.inspect(connection).get_pk_constraint(table.name)["constrained_columns"] == expected

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

    # ── several at once ──

    def test_processes_create_and_write_at_once(self, location: Location) -> None:
        writers, count = 3, 20
        barrier = multiprocessing.get_context("spawn").Barrier(writers)
        assert run_processes(add_when_all_are_ready, *[(location, barrier, count)] * writers) == [0] * writers
        with StateStore.open(location.url, location.folder) as store:
            found = store.dead_letters("movies", limit=1000)
            assert len(found) == count
            assert {each.attempts for each in found} == {writers}
            assert store.loads("movies")["public.movie"].rows == count - 1

    def test_threads_write_at_once(self, store: StateStore) -> None:
        def work(thread: int) -> None:
            for number in range(20):
                store.add_dead_letters("movies", [letter(number)])
                store.save_load("movies", TableLoad(f"a.t{thread}", rows=number))
                assert store.loads("movies")[f"a.t{thread}"].rows == number

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert {each.attempts for each in store.dead_letters("movies")} == {4}

    @pytest.mark.parametrize("occurrence", [1, 2, 3])
    def test_killed_between_dead_letters(self, store: StateStore, location: Location, occurrence: int) -> None:
        """As if it had never begun, and nobody has to wait for the dead."""
        killed = run_processes(die_at, (location, "INSERT INTO delta_dead_letter", occurrence))
        assert killed == [-signal.SIGKILL]
        assert store.count_dead_letters("movies") == 0
        store.add_dead_letters("movies", [letter(1)])
        assert store.dead_letters("movies")[0].attempts == 1

    def test_killed_after_the_commit(self, store: StateStore, location: Location) -> None:
        """What was added is there, and the same batch again multiplies nothing."""
        assert run_processes(add_then_die, (location,)) == [-signal.SIGKILL]
        store.add_dead_letters("movies", [letter(1), letter(2)])
        assert [each.attempts for each in store.dead_letters("movies")] == [2, 2]

    @pytest.mark.parametrize("occurrence", [1, 3])
    def test_killed_while_it_migrates(self, location: Location, occurrence: int) -> None:
        assert run_processes(die_at, (location, "CREATE TABLE", occurrence)) == [-signal.SIGKILL]
        with StateStore.open(location.url, location.folder) as store:
            store.add_dead_letters("movies", [letter(1)])
            assert store.count_dead_letters("movies") == 1


def add_then_die(location: Location) -> None:
    StateStore.open(location.url, location.folder).add_dead_letters("movies", [letter(1), letter(2)])
    os.kill(os.getpid(), signal.SIGKILL)
