"""What every state store must do, whatever its database: `class TestX(StateContract)` with a fixture `location`."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import sqlalchemy as sa

from delta_sync import secrets
from delta_sync.capture import CaptureDied
from delta_sync.dumps import Dump
from delta_sync.errors import LeaseLost, LoadOverruled, PipelineStopped, StateBusy
from delta_sync.generations import Generations, GenerationStore
from delta_sync.kafka.consumer import Partition
from delta_sync.kafka.topic_ids import TopicStore
from delta_sync.refreshing import KEPT_S, NoticeStore
from delta_sync.state import DeadLetter, Lease, PipelineState, StateStore, TableLoad, identity_of
from delta_sync.state_connector import ConnectorState
from delta_sync.state_dumps import DumpStore
from delta_sync.state_tables import METADATA, USED_KEYS
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.processes import wait_until
from delta_sync.used_keys import UsedKeyStore, Uses
from delta_sync.verified import Numbers, VerifiedStore
from delta_sync.verifying import Verified

NOW = dt.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=dt.UTC)
PROCESS_TIMEOUT_S = 120  # generous: a busy machine starts Python slowly
SECRET = "correct horse battery staple"
FOR_EVER_S = 3600.0  # of a lease that does not expire while its test runs, however slow the machine is
CLOCK_STEP = dt.timedelta(milliseconds=2)  # SQLite's clock has milliseconds
TOLD = 3  # a process's exit code: its call raised StateBusy
PLACE = (
    rb"""["[\"movies\",{\"server\":\"delta_movies\"}]", "{\"file\":\"binlog.000012\",\"pos\":345,\"gtids\":null}"]"""
)
AT_ONCE_S = 1e-6  # of one that has expired before anybody can ask


class Location(NamedTuple):
    """Where a store is: what `StateStore.open` takes, and the SQLAlchemy URL by which a test looks inside."""

    url: str
    folder: Path
    raw_url: str


def migrated(location: Location) -> Location:
    """Return the location of a store that is there now."""
    StateStore.open(location.url, location.folder).close()
    return location


def emptied(location: Location, folder: Path) -> Location:
    """Return the location of a store that is there, with nothing in it, for a test with that folder."""
    engine = sa.create_engine(location.raw_url)
    with engine.begin() as connection:
        for table in reversed(METADATA.sorted_tables):
            connection.execute(sa.delete(table))
    engine.dispose()
    return location._replace(folder=folder)


def _ignored(_value: object) -> None:
    pass


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


# Forked from one that has imported what takes half a second, and has neither threads nor connections.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *(
            "delta_sync.state",
            "delta_sync.state_dumps",
            "delta_sync.migrations",
            "alembic.command",
            "alembic.autogenerate",
        ),
        *(f"sqlalchemy.dialects.{name}" for name in ("mysql", "postgresql", "sqlite")),
        *("psycopg", "pymysql", "psutil", "pytest"),
    ]
)


# ── what other processes do ──


def add_when_all_are_ready(location: Location, barrier: Barrier, count: int) -> None:
    barrier.wait(PROCESS_TIMEOUT_S)
    with StateStore.open(location.url, location.folder) as store:
        for number in range(count):
            store.add_dead_letters("movies", [letter(number)])
            store.save_load("movies", TableLoad("public.movie", rows=number))


def die_at(location: Location, statement: str, occurrence: int) -> None:
    """Add three dead letters, but be killed right after the database has run such a statement so many times."""
    kill_behind(statement, occurrence)
    with StateStore.open(location.url, location.folder) as store:
        store.add_dead_letters("movies", [letter(1), letter(2), letter(3)])


def kill_behind(statement: str, occurrence: int) -> None:
    """Have this process killed right after a database has run such a statement so many times."""
    seen = 0

    def look(*arguments: Any) -> None:
        nonlocal seen
        seen += arguments[2].strip().startswith(statement)
        if seen == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    sa.event.listen(sa.Engine, "after_cursor_execute", look)


def die_saving_a_place(location: Location, statement: str) -> None:
    with StateStore.open(location.url, location.folder) as store:
        kill_behind(statement, 1)
        ConnectorState(store, "movies").save("run", PLACE.replace(b"345", b"678"), b"another\n")


def take_then_die(location: Location, ttl_s: float) -> None:
    StateStore.open(location.url, location.folder).take_lease("movies", "load", "the late", ttl_s)
    os.kill(os.getpid(), signal.SIGKILL)


def freeze_in_a_transaction(location: Location, call: str) -> None:
    """Make a call, but be frozen while it has the lease's row locked; the connection may idle for a second."""

    def look(*arguments: Any) -> None:
        if "FOR UPDATE" in arguments[2]:
            os.kill(os.getpid(), signal.SIGSTOP)

    with StateStore.open(location.url, location.folder, busy_timeout_s=1) as store:
        lease = store.take_lease("movies", "load", "frozen", AT_ONCE_S)
        assert lease is not None
        sa.event.listen(sa.Engine, "after_cursor_execute", look)
        try:
            if call == "take_lease":
                store.take_lease("movies", "load", "frozen", FOR_EVER_S)
            else:
                store.save_load("movies", TableLoad("a.b", rows=666), lease)
        except StateBusy:
            os._exit(TOLD)


class Hold(NamedTuple):
    """A time in which a process surely had the lease, by the database's clock."""

    token: int
    since: int
    until: int


def microseconds(moment: dt.datetime) -> int:
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def fight(location: Location, barrier: Barrier, owner: str, rounds: int, seed: int) -> None:
    """Have the lease `rounds` times, against others who want it; give it back or let it expire.

    While it is had, add 1 to the rows of a load: read, then write with the lease.
    """
    rng = random.Random(f"{seed} {owner}")
    holds: list[Hold] = []
    added = 0
    with StateStore.open(location.url, location.folder) as store:
        barrier.wait(PROCESS_TIMEOUT_S)
        while len(holds) < rounds:
            expires = rng.random() < 0.4
            ttl_s = rng.uniform(0.001, 0.03) if expires else FOR_EVER_S
            asked_at = microseconds(store.database_now())
            lease = store.take_lease("movies", "load", owner, ttl_s)
            if lease is None:
                continue
            since = microseconds(store.database_now())
            rows = store.loads("movies").get("a.b", TableLoad("a.b")).rows
            try:
                store.save_load("movies", TableLoad("a.b", rows=rows + 1), lease)
                added += 1
            except LeaseLost:
                assert expires, "it was taken away"
            if expires:
                holds.append(Hold(lease.token, since, asked_at + int(ttl_s * 1e6)))
                wait_until(partial(is_over, store, lease), PROCESS_TIMEOUT_S, "the end of a lease")
                continue
            assert store.take_lease("movies", "load", owner, ttl_s) == lease, "a renewal keeps the token"
            holds.append(Hold(lease.token, since, microseconds(store.database_now())))
            store.release_lease(lease)
    (location.folder / f"{owner}.json").write_text(json.dumps({"holds": holds, "added": added}))


def has_it(store: StateStore, lease: Lease) -> bool:
    holder = store.lease(lease.pipeline, lease.name)
    return holder is not None and (holder.owner, holder.token) == (lease.owner, lease.token) and holder.left_s > 0


def is_over(store: StateStore, lease: Lease) -> bool:
    return not has_it(store, lease)


def run_processes(target: Callable[..., None], *argument_lists: tuple[Any, ...]) -> list[int | None]:
    """Run it once with each of the arguments, all at once; return the exit codes (None: others failed before)."""
    processes = [PROCESSES.Process(target=target, args=arguments) for arguments in argument_lists]
    try:
        for process in processes:
            process.start()
        running = list(processes)
        while running and not any(process.exitcode for process in processes):  # others may wait for one that failed
            ended = wait([process.sentinel for process in running], PROCESS_TIMEOUT_S)
            if not ended:
                break
            for process in [process for process in running if process.sentinel in ended]:
                process.join()
                running.remove(process)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


A_B = Table("a", "b", (Column("id", "int", Kind.INTEGER),), ("id",))


def uses(
    *rows: tuple[int, int, Any],
    gone: Sequence[tuple[int, int]] = (),
    table: str = "a.b",
    lookup: str = "ratings",
    slot: int = 1,
) -> Uses:
    """Return which keys rows use: id, version and key of each."""
    of_rows = [((id_,), version, key) for id_, version, key in rows]
    return Uses(table, lookup, slot, of_rows, [((id_,), version) for id_, version in gone])


def keeping(store: StateStore) -> UsedKeyStore:
    """Return the notes of a pipeline that has begun to keep them."""
    used = UsedKeyStore(store, "movies")
    used.begin({("a.b", "ratings"): "rows", ("a.b", "stock"): "rows", ("a.c", "ratings"): "rows"})
    return used


class StateFixtures:
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


class StateContract(StateFixtures):
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

    # ── topics ──

    def test_topics_ids_are_kept_for_each_partition(self, store: StateStore) -> None:
        topics, others = TopicStore(store, "movies"), TopicStore(store, "other")
        first, second = Partition("delta_movies.a.b", 0), Partition("delta_movies.a.b", 1)
        assert topics.saved() == {}
        topics.add({first: "old", second: "old"})
        others.add({first: "others"})
        topics.add({first: "new"})  # what is saved stays
        assert topics.saved() == {first: "old", second: "old"}
        topics.replace({first: "new"})
        assert topics.saved() == {first: "new", second: "old"}
        assert others.saved() == {first: "others"}

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

    def test_a_load_that_was_overruled_says_nothing_more(self, store: StateStore) -> None:
        """However it was: from outside, or because it is begun anew."""
        running = TableLoad("a.b", "running", (7,), 7, 5, "f", "first load", 3, NOW)
        store.save_load("movies", running)
        store.save_load("movies", running._replace(table="a.c"))
        store.load_again("movies", ["a.b", "never.there"], "positions expired")
        pending = TableLoad("a.b", fingerprint="f", reason="positions expired", epoch=3, revision=1)
        assert store.loads("movies") == {"a.b": pending, "a.c": running._replace(table="a.c")}
        with pytest.raises(LoadOverruled, match=r"a\.b"):
            store.save_load("movies", running._replace(state="done"))
        assert store.loads("movies")["a.b"] == pending
        store.load_again("movies", ["a.b"], "positions expired")  # it looks the same, and is another
        with pytest.raises(LoadOverruled):
            store.save_load("movies", pending._replace(state="running"))
        begun = store.begin_load("movies", TableLoad("a.b", fingerprint="g", reason="its columns changed"))
        assert begun == TableLoad("a.b", fingerprint="g", reason="its columns changed", revision=3)
        assert store.loads("movies")["a.b"] == begun
        store.save_load("movies", begun._replace(state="done"))
        assert store.begin_load("movies", TableLoad("a.d")) == TableLoad("a.d")

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

    def test_keys_that_failed_are_found_with_their_sinks(self, store: StateStore) -> None:
        assert store.failed_keys("movies", "a.b", ["1"]) == set()
        failed = [("1", "cache"), ("1", "docs"), ("2", None), ("3", "cache"), ("A", "cache")]
        letters = [letter(n, table="a.b", key_text=key, sink=sink) for n, (key, sink) in enumerate(failed)]
        store.add_dead_letters("movies", [*letters, letter(9, table="a.other", key_text="4")])
        store.add_dead_letters("other", [letter(9, table="a.b", key_text="4")])
        keys = ["1", "2", "4", "a", *(f"n{number}" for number in range(1200))]
        assert store.failed_keys("movies", "a.b", keys) == {("1", "cache"), ("1", "docs"), ("2", None)}
        assert store.failed_keys("movies", "a.b", []) == set()

    def test_a_key_whose_text_cannot_be_stored_is_found_all_the_same(self, store: StateStore) -> None:
        store.add_dead_letters("movies", [letter(1, table="a.b", key_text="a\x00\ud800", sink=None)])
        assert store.failed_keys("movies", "a.b", ["a\x00\ud800", "a"]) == {("a\x00\ud800", None)}

    def test_those_of_the_last_minute_are_found_with_what_they_are_of(self, store: StateStore) -> None:
        later = NOW + dt.timedelta(seconds=30)
        old, new = letter(1, created_at=NOW), letter(2, created_at=later)
        store.add_dead_letters("movies", [new, old])
        store.add_dead_letters("other", [letter(3, created_at=later)])
        assert store.dead_letters_since("movies", NOW) == [(later, identity_of(new))]
        assert store.dead_letters_since("movies", NOW - dt.timedelta(seconds=1)) == [
            (NOW, identity_of(old)),
            (later, identity_of(new)),
        ]

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

    # ── leases ──

    def test_a_lease_is_one_owners_until_it_is_released(self, store: StateStore) -> None:
        assert store.lease("movies", "load") is None
        lease = store.take_lease("movies", "load", "me", FOR_EVER_S)
        assert lease == Lease("movies", "load", "me", 1, FOR_EVER_S)
        assert store.take_lease("movies", "load", "Me", FOR_EVER_S) is None
        holder = store.lease("movies", "load")
        assert holder is not None
        assert (holder.owner, holder.token) == ("me", 1)
        assert 0 < holder.left_s <= FOR_EVER_S
        store.release_lease(lease)
        assert store.lease("movies", "load") is None
        other = store.take_lease("movies", "load", "other", FOR_EVER_S)
        assert other is not None
        assert other.token > lease.token
        store.release_lease(lease)
        assert has_it(store, other), "a lease that was lost gives nothing back"

    def test_leases_differ_by_pipeline_and_name(self, store: StateStore) -> None:
        for pipeline, name in (("movies", "load"), ("movies", "Load"), ("movies", "sidecar"), ("other", "load")):
            assert store.take_lease(pipeline, name, f"{pipeline} {name}", FOR_EVER_S) is not None

    def test_renewal_keeps_the_token_and_moves_the_end(self, store: StateStore, raw: sa.Engine) -> None:
        first = store.take_lease("movies", "load", "me", FOR_EVER_S)
        end = self.end_of_the_lease(raw)
        again = store.take_lease("movies", "load", "me", 2 * FOR_EVER_S)
        assert first is not None
        assert again == first._replace(ttl_s=2 * FOR_EVER_S)
        assert self.end_of_the_lease(raw) >= end + FOR_EVER_S * 1e6

    def test_the_token_rises_with_every_change_of_hands(self, store: StateStore) -> None:
        """Also when it comes back to the same owner: another may have had it in between."""
        tokens: list[int] = []
        for owner, ttl_s, release in (
            ("me", AT_ONCE_S, False),
            ("me", AT_ONCE_S, False),
            ("other", FOR_EVER_S, True),
            ("other", FOR_EVER_S, True),
            ("me", FOR_EVER_S, False),
        ):
            wait_until(self.is_free(store), PROCESS_TIMEOUT_S, "the end of a lease")
            lease = store.take_lease("movies", "load", owner, ttl_s)
            assert lease is not None
            tokens.append(lease.token)
            if release:
                store.release_lease(lease)
        assert tokens == sorted(set(tokens))
        assert tokens[0] > 0

    @pytest.mark.parametrize("off", [dt.timedelta(days=-36500), dt.timedelta(days=36500)])
    def test_the_machines_clock_does_not_matter(self, location: Location, off: dt.timedelta) -> None:
        def now() -> dt.datetime:
            return dt.datetime.now(dt.UTC) + off

        with (
            StateStore.open(location.url, location.folder) as store,
            StateStore.open(location.url, location.folder, now=now) as wrong,
        ):
            mine = store.take_lease("movies", "load", "me", FOR_EVER_S)
            assert mine is not None
            assert wrong.take_lease("movies", "load", "wrong", FOR_EVER_S) is None
            store.release_lease(mine)
            assert wrong.take_lease("movies", "load", "wrong", AT_ONCE_S) is not None
            wait_until(self.is_free(store), PROCESS_TIMEOUT_S, "the end of a lease")
            assert store.take_lease("movies", "load", "me", FOR_EVER_S) is not None
            assert abs(wrong.database_now() - store.database_now()) < dt.timedelta(days=1)

    def test_the_databases_clock_is_in_utc(self, store: StateStore) -> None:
        """Every server here is on this machine."""
        before = dt.datetime.now(dt.UTC)
        assert before - CLOCK_STEP <= store.database_now() <= dt.datetime.now(dt.UTC) + CLOCK_STEP

    def test_processes_fight_for_a_lease(self, location: Location) -> None:
        seed = random.randrange(1 << 32)
        print(f"seed {seed}")
        fighters, rounds = 4, 12
        barrier = PROCESSES.Barrier(fighters)
        codes = run_processes(fight, *[(location, barrier, f"f{n}", rounds, seed) for n in range(fighters)])
        assert codes == [0] * fighters
        told = [json.loads((location.folder / f"f{n}.json").read_text()) for n in range(fighters)]
        holds = sorted(Hold(*hold) for each in told for hold in each["holds"])
        assert [hold.token for hold in holds] == list(range(1, fighters * rounds + 1)), "each had a token of its own"
        for earlier, later in itertools.pairwise(holds):
            assert earlier.until <= later.since, "two had it at once"
        with StateStore.open(location.url, location.folder) as store:
            assert store.loads("movies")["a.b"].rows == sum(each["added"] for each in told), "one undid another's work"

    def test_a_lease_that_nobody_ever_had_is_taken_at_once(self, store: StateStore) -> None:
        """There is no row to lock yet."""
        takers, names = 4, 25
        start = threading.Barrier(takers)

        def work(taker: int) -> list[Lease | None]:
            got: list[Lease | None] = []
            for number in range(names):
                start.wait(PROCESS_TIMEOUT_S)
                got.append(store.take_lease("movies", f"{number}", f"{taker}", FOR_EVER_S))
            return got

        with ThreadPoolExecutor(takers) as pool:
            columns = list(pool.map(work, range(takers)))
        for row in zip(*columns, strict=True):
            assert [lease.token for lease in row if lease is not None] == [1]

    def test_a_dead_holders_lease_is_anothers_after_its_end(
        self, store: StateStore, location: Location, raw: sa.Engine
    ) -> None:
        assert run_processes(take_then_die, (location, 2.0)) == [-signal.SIGKILL]
        end = self.end_of_the_lease(raw)

        def inherit() -> bool:
            before = microseconds(store.database_now())
            lease = store.take_lease("movies", "load", "heir", FOR_EVER_S)
            if lease is None:
                assert before < end, "it has expired, and nobody gets it"
                return False
            assert microseconds(store.database_now()) >= end, "it was taken from the living"
            assert lease.token == 2
            return True

        wait_until(inherit, PROCESS_TIMEOUT_S, "the end of a lease")

    # ── what is written with a lease ──

    WRITES: tuple[Callable[[StateStore, Lease], None], ...] = (
        lambda store, lease: store.save_load("movies", TableLoad("a.b", rows=2), lease),
        lambda store, lease: _ignored(store.begin_load("movies", TableLoad("a.b", rows=2), lease)),
        lambda store, lease: store.forget_load("movies", "a.b", lease),
        lambda store, lease: store.save_pipeline(PipelineState("movies", 2, "2", 2), lease),
    )

    @pytest.mark.parametrize(
        "fate", ["expired and taken", "mine again", "released and taken", "released", "forgotten", "anew"]
    )
    def test_an_outdated_token_writes_nothing(self, store: StateStore, raw: sa.Engine, fate: str) -> None:
        lease = store.take_lease(
            "movies", "load", "me", AT_ONCE_S if fate in {"expired and taken", "mine again"} else FOR_EVER_S
        )
        assert lease is not None
        match fate:
            case "expired and taken" | "mine again":
                wait_until(self.is_free(store), PROCESS_TIMEOUT_S, "the end of a lease")
            case "released" | "released and taken":
                store.release_lease(lease)
            case _:
                store.forget("movies")
        if fate not in {"released", "forgotten"}:
            other = store.take_lease("movies", "load", "me" if fate == "mine again" else "other", FOR_EVER_S)
            assert other is not None
            assert other.token == (1 if fate == "anew" else 2)
        store.save_load("movies", TableLoad("a.b", rows=1))
        store.save_pipeline(PipelineState("movies", 1, "1", 1))
        before = self.everything(raw)
        for write in self.WRITES:
            with pytest.raises(LeaseLost, match="'me' no longer has the lease 'load'"):
                write(store, lease)
            assert self.everything(raw) == before

    @pytest.mark.parametrize("fate", ["held", "renewed", "expired"])
    def test_a_lease_that_nobody_else_took_writes(self, store: StateStore, raw: sa.Engine, fate: str) -> None:
        """An expired one, too: nobody else has acted."""
        lease = store.take_lease("movies", "load", "me", AT_ONCE_S if fate == "expired" else FOR_EVER_S)
        assert lease is not None
        if fate == "expired":
            wait_until(self.is_free(store), PROCESS_TIMEOUT_S, "the end of a lease")
        if fate == "renewed":
            assert store.take_lease("movies", "load", "me", FOR_EVER_S) is not None
        store.take_lease("movies", "sidecar", "other", FOR_EVER_S)
        store.save_load("movies", TableLoad("a.b", rows=1))
        for write in self.WRITES:
            before = self.everything(raw)
            write(store, lease)
            assert self.everything(raw) != before

    def test_what_is_written_with_a_token_comes_before_the_next_one(
        self, store: StateStore, location: Location
    ) -> None:
        """Whoever has the lease has seen all that was written with it before."""
        lease = store.take_lease("movies", "load", "me", AT_ONCE_S)
        assert lease is not None
        wait_until(self.is_free(store), PROCESS_TIMEOUT_S, "the end of a lease")
        seen: list[int] = []

        def take_over() -> None:
            with StateStore.open(location.url, location.folder) as other:
                assert other.take_lease("movies", "load", "other", FOR_EVER_S) is not None
                seen.append(other.loads("movies")["a.b"].rows)

        taker = threading.Thread(target=take_over)

        def look(*arguments: Any) -> None:
            if "delta_lease" in arguments[2] and not taker.is_alive():
                taker.start()  # between the look at the token and the write
                taker.join(1)  # it has to wait for us: this only gives one who does not the time to show it

        store.save_load("movies", TableLoad("a.b", rows=1))
        sa.event.listen(store._engine, "after_cursor_execute", look)
        store.save_load("movies", TableLoad("a.b", rows=2), lease)
        sa.event.remove(store._engine, "after_cursor_execute", look)
        taker.join(PROCESS_TIMEOUT_S)
        assert seen == [2]

    @staticmethod
    def is_free(store: StateStore) -> Callable[[], bool]:
        def look() -> bool:
            holder = store.lease("movies", "load")
            return holder is None or holder.left_s <= 0

        return look

    @staticmethod
    def end_of_the_lease(raw: sa.Engine) -> int:
        with raw.connect() as connection:
            return int(connection.execute(sa.text("select expires_at from delta_lease")).scalar_one())

    @staticmethod
    def everything(raw: sa.Engine) -> list[Any]:
        with raw.connect() as connection:
            return [tuple(row) for table in METADATA.sorted_tables for row in connection.execute(sa.select(table))]

    # ── members ──

    def test_members_say_what_they_do(self, store: StateStore) -> None:
        assert store.members("movies") == []
        before = store.database_now()
        store.save_member("movies", "b", {"lag_s": 1.5})
        store.save_member("movies", "a", {"state": "starting"})
        store.save_member("movies", "a", {"since": NOW})
        store.save_member("movies", "A", {})
        store.save_member("other", "c", {})
        found = store.members("movies")
        assert sorted((member, status) for member, status, _ in found if status) == [
            ("a", {"since": "2024-02-29T12:30:15.123456Z"}),
            ("b", {"lag_s": 1.5}),
        ]
        assert {member for member, _, _ in found} == {"A", "a", "b"}
        assert all(before <= saved_at <= store.database_now() for _, _, saved_at in found)

    def test_silent_members_are_forgotten(self, store: StateStore) -> None:
        for member in ("gone", "there"):
            store.save_member("movies", member, {})
        store.save_member("other", "gone", {})
        first = max(saved_at for _, _, saved_at in store.members("movies"))
        wait_until(lambda: store.database_now() > first, PROCESS_TIMEOUT_S, "a tick of the clock")
        store.save_member("movies", "there", {})
        (there,) = [saved_at for member, _, saved_at in store.members("movies") if member == "there"]
        assert store.forget_members("movies", there) == 1
        assert [member for member, _, _ in store.members("movies")] == ["there"]
        assert len(store.members("other")) == 1
        assert store.forget_members("movies", there) == 0

    # ── status and the rest ──

    def test_a_status_is_saved_over_what_was_there(self, store: StateStore) -> None:
        assert store.status("movies") is None
        store.save_status("movies", {"state": "starting"})
        status = {"lag_s": 1.5, "sinks": [{"name": "cache", "busy": None}], "n": 2**53, "é": "\0"}
        store.save_status("movies", status | {"since": NOW})
        expected = status | {"since": "2024-02-29T12:30:15.123456Z", "é": "\\x00"}
        assert store.status("movies") == (expected, NOW)

    def test_notices_have_their_keys_and_are_kept_for_a_while(self, store: StateStore, raw: sa.Engine) -> None:
        notices = NoticeStore(store, "movies")
        NoticeStore(store, "other").add("ratings", [1])
        keys = [1, "it's \0 \u00e9", Decimal("1.50"), uuid.UUID(int=7), dt.date(2024, 2, 29), True]
        old, new = notices.add("ratings", keys), notices.add("stock", list(range(20_000)))  # beyond a MariaDB BLOB
        assert notices.ids() == {old, new}
        assert [(notice.lookup, notice.keys) for notice in notices.get([old])] == [("ratings", tuple(keys))]
        assert notices.get([new])[0].keys == tuple(range(20_000))
        assert notices.get([old - 1]) == [], "another pipeline's"
        with raw.begin() as connection:
            past = sa.text("UPDATE delta_notice SET created_at = created_at - :us WHERE id = :id")
            connection.execute(past, {"us": int(KEPT_S + 60) * 1_000_000, "id": old})
        last = notices.add("ratings", [2])
        assert notices.ids() == {new, last}

    def test_forgetting_leaves_other_pipelines_alone(self, store: StateStore, raw: sa.Engine) -> None:
        for name in ("movies", "other"):
            store.save_pipeline(PipelineState(name, 1, "1", 1))
            store.save_load(name, TableLoad("a.b"))
            store.add_dead_letters(name, [letter()])
            store.save_status(name, {})
            store.take_lease(name, "load", "me", FOR_EVER_S)
            store.save_member(name, "me", {})
            DumpStore(store, name).add(Dump(table="a.b", kind="keys"), [(1,)])
            GenerationStore(store, name).change(Generations("cache"), Generations("cache").begun())
            NoticeStore(store, name).add("ratings", [1])
            UsedKeyStore(store, name).begin({("a.b", "ratings"): "rows"})
            UsedKeyStore(store, name).note([uses((1, 1, name))])
            VerifiedStore(store, name).begin("a.b", "it")
            TopicStore(store, name).add({Partition("delta_movies.a.b", 0): "id"})
            ConnectorState(store, name).begin("run")
            ConnectorState(store, name).save("run", PLACE, b"line\n")
        store.forget("movies")
        UsedKeyStore(store, "movies").sweep()
        with raw.connect() as connection:
            for table in METADATA.sorted_tables:
                if table is USED_KEYS:
                    assert connection.scalar(sa.select(sa.func.count()).select_from(USED_KEYS)) == 1
                    continue
                pipeline = table.c["name" if table.name == "delta_pipeline" else "pipeline"]
                assert connection.execute(sa.select(pipeline)).scalars().all() == ["other"], table.name

    def test_a_loss_that_was_seen_is_remembered_until_the_epoch_rises(self, store: StateStore) -> None:
        known = PipelineState("movies", 3, "1", 1, 5)
        store.save_pipeline(known)
        store.note_loss("movies", 2, "of an epoch that is over")
        assert store.pipeline("movies") == known
        store.note_loss("movies", 3, "it was reset")
        store.note_loss("movies", 3, "it is gone")
        store.save_pipeline(known._replace(slot_lsn=9))  # by somebody who had not seen it
        assert store.pipeline("movies") == known._replace(slot_lsn=9, lost="it was reset")
        store.save_pipeline(known._replace(epoch=4))
        assert store.pipeline("movies") == known._replace(epoch=4)
        store.note_loss("other", 1, "nobody's")
        assert store.pipeline("other") is None

    # ── what an embedded connector keeps ──

    def test_a_connector_has_its_place_with_the_history_that_belongs_to_it(self, store: StateStore) -> None:
        kept, other = ConnectorState(store, "movies"), ConnectorState(store, "other")
        for name in ("movies", "other"):
            store.save_pipeline(PipelineState(name, 1, "1", 1))
        assert kept.begin("run") == (None, b"")
        assert (kept.newest(), kept.has_history()) == (None, False)
        kept.save("run", PLACE, b"first \xc3\xa9\0\n" + b"x" * 100_000 + b"\n")  # beyond a MariaDB BLOB
        kept.save("run", PLACE, b"")
        kept.save("run", PLACE.replace(b"345", b"678"), b"last\n")
        found = kept.newest()
        assert found is not None
        assert found.offset == {"file": "binlog.000012", "pos": 678, "gtids": None}
        history = b"first \xc3\xa9\0\n" + b"x" * 100_000 + b"\nlast\n"
        assert kept.begin("next") == (PLACE.replace(b"345", b"678"), history)
        assert kept.has_history()
        assert store.pipeline("movies") == PipelineState("movies", 1, "1", 1, slot_lsn=12 << 32 | 345), "the first"
        assert store.pipeline("other") == PipelineState("other", 1, "1", 1)
        assert other.newest() is None
        assert not other.has_history()
        kept.clear()
        assert (kept.newest(), kept.has_history(), kept.begin("run")) == (None, False, (None, b""))

    def test_what_a_run_says_of_another_ones_connector_is_refused(self, store: StateStore) -> None:
        """Two runs of a pipeline on two machines would mix up the histories of their connectors."""
        kept = ConnectorState(store, "movies")
        kept.begin("first")
        kept.save("first", PLACE, b"line\n")
        begun = kept.begin("second")
        with pytest.raises(PipelineStopped, match="movies was started by another process meanwhile"):
            kept.save("first", PLACE.replace(b"345", b"678"), b"line\n")
        kept.save("second", PLACE, b"another\n")
        assert kept.begin("third") == (PLACE, begun.history + b"another\n")
        kept.clear()  # a new epoch begins: what is left of the one before saves nothing
        with pytest.raises(CaptureDied, match="was removed"):
            kept.save("third", PLACE, b"line\n")
        assert kept.begin("fourth") == (None, b"")

    def test_killed_while_it_saves_where_its_connector_goes_on(self, location: Location) -> None:
        """Place and history are saved both or neither."""
        for statement in ("UPDATE delta_connector", "INSERT INTO delta_connector_history"):
            with StateStore.open(location.url, location.folder) as store:
                kept = ConnectorState(store, "movies")
                kept.clear()
                kept.begin("run")
                kept.save("run", PLACE, b"line\n")
            assert run_processes(die_saving_a_place, (location, statement)) == [-signal.SIGKILL]
            with StateStore.open(location.url, location.folder) as store:
                assert ConnectorState(store, "movies").begin("next") == (PLACE, b"line\n"), statement

    # ── keys that rows used ──

    def test_the_newest_note_of_a_row_stays_in_whatever_order_they_are_written(self, store: StateStore) -> None:
        used = keeping(store)
        orders = list(itertools.permutations([(1, "old"), (2, Decimal("2.50")), (3, "it's \0 \u00e9")]))
        for place in range(3):
            some = [(number, *order[place]) for number, order in enumerate(orders)]
            used.note([uses(*some), uses(*some, lookup="stock")])
        found = used.rows(A_B, "ratings", ["it's \0 \u00e9"], 100)
        assert sorted(found or ()) == [(number,) for number in range(len(orders))]
        assert used.rows(A_B, "ratings", ["old", Decimal("2.5")], 100) == []
        assert used.rows(A_B, "ratings", ["it's \0 \u00e9"], len(orders) - 1) is None, "there are more"
        assert UsedKeyStore(store, "other").rows(A_B, "ratings", ["it's \0 \u00e9"], 100) == []

    def test_many_spellings_of_a_number_are_one_key(self, store: StateStore) -> None:
        used = keeping(store)
        used.note([uses((1, 1, Decimal("2.50")), (2, 1, -0.0), (3, 1, 7), (4, 1, "7"), (5, 1, True))])
        for keys, ids in (([Decimal("2.5")], [1]), ([0.0], [2]), ([7], [3, 4]), ([True], [5]), ([8], [])):
            assert sorted(used.rows(A_B, "ratings", keys, 100) or ()) == [(id_,) for id_ in ids], keys

    def test_a_row_without_a_key_or_that_is_gone_leaves_no_note_that_is_older(self, store: StateStore) -> None:
        used = keeping(store)
        used.note([uses((1, 5, "a"), (2, 5, "a"), (3, 5, "a"), (4, 5, "a")), uses((1, 5, "a"), (3, 5, "b"), slot=2)])
        used.note([uses((1, 6, None), (2, 4, None), gone=[(3, 6), (4, 4)])])
        assert sorted(used.rows(A_B, "ratings", ["a"], 100) or ()) == [(1,), (2,), (4,)], "1 uses it for another one"
        assert used.rows(A_B, "ratings", ["b"], 100) == [], "all that is noted of a row goes with it"
        used.note([uses((3, 5, "a"))])
        assert (3,) in (used.rows(A_B, "ratings", ["a"], 100) or ()), "one too many, until somebody refreshes it"
        used.note([uses(gone=[(3, 9)])])
        assert (3,) not in (used.rows(A_B, "ratings", ["a"], 100) or ())

    def test_notes_of_rows_that_are_gone_by_a_version_go(
        self, store: StateStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("delta_sync.used_keys.DELETED_AT_ONCE", 2)
        used = keeping(store)
        used.note([uses(*((number, number, "a") for number in range(9)))])
        used.note([uses((1, 1, "a"), table="a.c")])
        used.note([], {"a.b": 6})
        assert sorted(used.rows(A_B, "ratings", ["a"], 100) or ()) == [(6,), (7,), (8,)]
        assert used.rows(A_B._replace(name="c"), "ratings", ["a"], 100) == [(1,)]

    def test_what_was_not_kept_for_a_time_begins_anew(self, store: StateStore, raw: sa.Engine) -> None:
        used, asking = UsedKeyStore(store, "movies"), ("a.b", "ratings")
        used.begin({asking: "rows"})
        used.note([uses((1, 1, "a"))])
        first = used.keepings()[asking]
        used.begin({asking: "rows"})
        assert used.keepings() == {asking: first}, "a restart changes nothing"
        for meanwhile in ({}, {asking: "documents"}):
            used.begin(meanwhile)
            used.begin({asking: "rows"})
            again = used.keepings()[asking]
            assert again.id > first.id
            assert again.since >= first.since
            assert used.rows(A_B, "ratings", ["a"], 100) == [], meanwhile
        used.note([uses((2, 1, "a")), uses((2, 1, "a"), lookup="stock")])
        assert used.rows(A_B, "stock", ["a"], 100) == [], "nobody keeps that"
        used.sweep()
        with raw.connect() as connection:
            assert connection.execute(sa.select(USED_KEYS.c.keeping)).scalars().all() == [again.id]

    def test_notes_are_complete_after_a_dump_of_all_that_began_later(self, store: StateStore) -> None:
        used, asking = UsedKeyStore(store, "movies"), ("a.b", "ratings")
        used.begin({asking: "rows"})
        since = used.keepings()[asking].since
        moment = dt.timedelta(microseconds=1)

        def complete(kind: str, state: str, after: dt.timedelta = moment, **more: Any) -> bool:
            dump = Dump(table="a.b", kind=kind, state=state, created_at=since + after, **more)  # type: ignore[arg-type]  # as a case has them
            return used.settle([dump])[asking].complete

        assert not complete("table", "done", -moment)
        assert not complete("table", "running")
        assert not complete("keys", "done")
        assert not complete("where", "done", where="id > 7")
        assert not complete("table", "done", sinks=("cache",))
        assert not complete("load", "cancelled")
        assert complete("load", "running")
        assert not used.settle([])[asking].complete, "it may still be overruled by another one"
        assert complete("refresh", "done")
        assert used.settle([])[asking].complete, "the dump may be forgotten"

    def test_threads_note_the_same_rows_at_once(self, store: StateStore) -> None:
        used = keeping(store)

        def work(version: int) -> None:
            numbers = list(range(50))
            random.Random(version).shuffle(numbers)
            while True:
                try:
                    return used.note([uses(*((number, version, f"v{version}") for number in numbers))])
                except StateBusy:  # as the worker does
                    continue

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(1, 13)))
        assert len(used.rows(A_B, "ratings", ["v12"], 100) or ()) == 50

    def test_a_verification_goes_on_where_it_was(self, store: StateStore) -> None:
        verified = VerifiedStore(store, "movies")
        assert verified.all() == {}
        assert verified.begin("a.b", "first") is None
        assert verified.begin("a.b", "first", resume=True) is None, "it has not come far"
        verified.reach("a.b", (Decimal("1.50"), "é"), Numbers(10, 2, 1))
        assert verified.begin("a.b", "first", resume=True) == (Decimal("1.50"), "é")
        assert verified.all() == {"a.b": Verified("a.b", None, 10, 2, 1)}, "nothing is known of the other rows"
        assert verified.begin("a.b", "another", resume=True) is None, "what was verified is no longer so"
        verified.reach("a.b", (2,), Numbers(5))
        verified.end("a.b", Numbers(7, 1))
        found = verified.all()["a.b"]
        assert found == Verified("a.b", found.age_s, 22, 3, 1)
        assert found.age_s is not None
        assert verified.begin("a.b", "another", resume=True) is None, "that one has ended"
        again = verified.all()["a.b"]
        assert again.age_s is not None, "the last one counts until this one has ended"
        verified.end("a.b", Numbers())
        verified.end("a.b", Numbers())  # of another process, which began earlier
        assert verified.all()["a.b"].age_s is not None
        assert VerifiedStore(store, "other").all() == {}

    def test_no_text_holds_a_secret(self, store: StateStore, raw: sa.Engine) -> None:
        secrets.remember(SECRET)
        said = f"cannot connect with {SECRET}"
        store.save_load("movies", TableLoad("a.b", reason=said))
        store.add_dead_letters("movies", [letter(key_text=said, error=said, trace=said)])
        store.save_status("movies", {said: {"nested": [said, (said,)]}})
        store.save_member("movies", "me", {said: [said]})
        with raw.connect() as connection:
            for table in METADATA.sorted_tables:
                for row in connection.execute(sa.select(table)):
                    assert SECRET not in str(row)
        (found,) = store.dead_letters("movies")
        assert found.error == "cannot connect with ***"

    # ── several at once ──

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


def add_then_die(location: Location) -> None:
    StateStore.open(location.url, location.folder).add_dead_letters("movies", [letter(1), letter(2)])
    os.kill(os.getpid(), signal.SIGKILL)


class ServerStateContract(StateContract):
    """What every server must do, and a file cannot: its writer's lock is the process's, for as long as it lives."""

    @pytest.mark.parametrize("call", ["take_lease", "save_load"])
    def test_one_frozen_in_a_transaction_is_not_waited_for(
        self, store: StateStore, location: Location, call: str
    ) -> None:
        frozen = PROCESSES.Process(target=freeze_in_a_transaction, args=(location, call))
        frozen.start()
        try:
            assert frozen.pid is not None
            process = psutil.Process(frozen.pid)
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, PROCESS_TIMEOUT_S, "being frozen")
            heirs: list[Lease] = []

            def inherit() -> bool:
                try:
                    heirs.extend(filter(None, [store.take_lease("movies", "load", "heir", FOR_EVER_S)]))
                except StateBusy:
                    return False
                return heirs != []

            wait_until(inherit, PROCESS_TIMEOUT_S, "the end of a frozen process's transaction")
            process.resume()
            frozen.join(PROCESS_TIMEOUT_S)
            assert frozen.exitcode == TOLD
        finally:
            frozen.kill()
        assert has_it(store, heirs[0])
        assert store.loads("movies") == {}
