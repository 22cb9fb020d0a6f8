"""What a run decides before it streams: the epoch, and which tables are to be loaded."""

from __future__ import annotations

import random
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from delta_sync.changes import Write
from delta_sync.errors import EpochRose, SlotMissing, SourceBusy, UsageError
from delta_sync.pipeline import Pipeline
from delta_sync.sinks import AnySink, target_for
from delta_sync.sinks.memory import MemorySink
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import PipelineSpec, TableSpec, spec_from
from delta_sync.starting import Delivered, Source, check_slot, prepare_source
from delta_sync.state import StateStore
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL
from delta_sync.values import Row
from delta_sync.versions import epoch_of, version_of

TABLE = "public.starting"


class Start:
    """A pipeline with sinks in memory, started as often as one likes, as far as the stream."""

    def __init__(self, postgresql: PostgreSQL, folder: Path, on_lost_log: str = "stop") -> None:
        self.folder = folder
        parts = urlsplit(postgresql.url)
        self.url = postgresql.url
        (folder / "password").write_text(f"{parts.password}\n")
        source = {
            "url": _without_password(postgresql.url),
            "password": f"${{file:{folder}/password}}",
            "on_lost_log": on_lost_log,
        }
        sinks = {"cache": {"url": "memory://cache"}, "search": {"url": "memory://search"}}
        self.spec: PipelineSpec = spec_from(
            {"name": "starting", "source": source, "tables": {TABLE: None}, "sinks": sinks}, "test"
        )
        self.sinks: dict[str, AnySink] = {"cache": MemorySink("cache"), "search": MemorySink("search")}
        for name, sink in self.sinks.items():
            sink.url = f"memory://{name}"  # two stores
        self.state = StateStore.open(self.spec.state, folder)
        self.reader = PostgresReader(self.spec.source, "test")

    def __call__(
        self,
        *to: str,
        new_slot: bool = False,
        reload: bool = False,
        delivered: Delivered | None = None,
        table: str = TABLE,
    ) -> Source:
        pipeline = Pipeline("starting")
        pipeline.table(table, to=to)(lambda row: row)
        return prepare_source(
            self.spec,
            pipeline,
            self.reader,
            self.state,
            self.sinks,
            new_slot=new_slot,
            reload=reload,
            delivered=delivered,
        )

    def goes_on_by_itself(self) -> None:
        """Set what `source.on_lost_log` is by default."""
        source = self.spec.source.model_copy(update={"on_lost_log": "new_epoch"})
        self.spec = self.spec.model_copy(update={"source": source})

    def loaded(self) -> None:
        """Pretend that the load has ended."""
        load = self.state.loads("starting")[TABLE]
        self.state.save_load("starting", load._replace(state="done", covered_from=1))

    def load(self) -> tuple[str, str]:
        """Return the state of the table's load, and why it is made."""
        load = self.state.loads("starting")[TABLE]
        return load.state, load.reason

    def to(self, url: str) -> None:
        """Turn to another server, as the source's host name does in a failover."""
        self.reader.close()
        self.reader = PostgresReader(self.spec.source.model_copy(update={"url": _without_password(url)}), "test")

    def confirm(self) -> None:
        """Do what the capture does with the bound, and what the connector does with the slot."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("INSERT INTO starting SELECT coalesce(max(id), 0) + 1 FROM starting")
            row = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
            assert row is not None
            self.state.raise_confirmed_most("starting", self.reader.durable_end())
            connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", [self.spec.slot, row[0]])

    def write(self, sink: str, version: int, row: Row) -> None:
        """Write a document, as another pipeline would have."""
        target = target_for(self.sinks[sink], self.reader.tables([TABLE])[TABLE], self.spec)
        self.sinks[sink].apply(target, [Write((1,), version, row)])


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"postgresql://{parts.username}@{parts.hostname}:{parts.port}{parts.path}"


@pytest.fixture
def start(postgresql: PostgreSQL, tmp_path: Path) -> Iterator[Start]:
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE starting (id int PRIMARY KEY, title text)")
        it = Start(postgresql, tmp_path)
        yield it
        it.reader.drop_slot(it.spec.slot)
        it.reader.drop_publication(it.spec.publication)
        it.reader.close()
        it.state.close()
        connection.execute("DROP TABLE starting")


def test_the_first_start_loads_and_the_next_goes_on(start: Start) -> None:
    assert start("cache").epoch == 1
    assert start.load() == ("pending", "first load")
    assert start("cache").epoch == 1, "what an early kill left is not another pipeline's"
    start.write("cache", version_of(1, 5), {"id": 1})
    start.loaded()
    assert start("cache").epoch == 1
    assert start.load() == ("done", "first load")


def test_a_place_that_is_full_already_begins_an_epoch_above(start: Start) -> None:
    start.write("cache", version_of(3, 1 << 50), {"id": 1})
    assert start("cache").epoch == 4


def test_a_new_sink_is_loaded(start: Start) -> None:
    start("cache")
    start.loaded()
    assert start("cache", "search").epoch == 1
    assert start.load() == ("pending", "its columns changed, or where its documents go")


def test_a_new_sink_that_holds_something_newer_raises_the_epoch(start: Start) -> None:
    """Else every write to it would be stale: positions of another source may be higher than this one's."""
    start("cache")
    start.loaded()
    start.write("cache", version_of(1, 5), {"id": 1})
    start.write("search", version_of(1, 1 << 50), {"id": 1})
    source = start("cache", "search")
    assert source.epoch == 2
    assert start.load() == ("pending", "the epoch rose")
    assert (
        epoch_of(
            start.sinks["search"].newest_version(target_for(start.sinks["search"], source.tables[TABLE], start.spec))
        )
        < 2
    )


def test_columns_that_changed_while_it_was_stopped_are_loaded(start: Start, postgresql: PostgreSQL) -> None:
    start("cache")
    start.loaded()
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("ALTER TABLE starting ADD COLUMN year int")
    start("cache")
    assert start.load() == ("pending", "its columns changed, or where its documents go")


def test_a_shape_that_changed_while_it_was_stopped_is_loaded(start: Start, postgresql: PostgreSQL) -> None:
    start("cache")
    start.loaded()
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("INSERT INTO starting VALUES (1, 'planted')")
    for shape, title in (
        ({}, "planted"),
        ({"mask": {"title": "redact"}}, "***"),
        ({"mask": {"title": {"truncate": 2}}}, "pl"),
    ):
        table = TableSpec.model_validate({"shape": shape})
        start.spec = start.spec.model_copy(update={"tables": {TABLE: table}})
        start.reader.shapes = start.spec.shapes  # as `open_reader` does
        source = start("cache")
        assert start.load() == ("pending", "its columns changed, or where its documents go")
        chunk = start.reader.read_keys(source.tables[TABLE], [(1,)], lambda _: True)
        assert chunk is not None
        assert chunk.rows == [((1,), {"id": 1, "title": title})]
        start.loaded()
        start("cache")
        assert start.load()[0] == "done", "once for each change"
    start.spec = start.spec.model_copy(
        update={"tables": {TABLE: TableSpec.model_validate({"shape": {"mask": {"id": "redact"}}})}}
    )
    start.reader.shapes = start.spec.shapes
    with pytest.raises(UsageError, match="a key cannot be masked"):
        start("cache")


def test_a_load_that_is_asked_for(start: Start) -> None:
    start("cache")
    start.loaded()
    assert start("cache", reload=True).epoch == 1
    assert start.load() == ("pending", "it was asked for")


def test_a_slot_that_is_gone_stops_it_unless_that_is_accepted(start: Start) -> None:
    start("cache")
    start.loaded()
    start.reader.drop_slot(start.spec.slot)
    with pytest.raises(SlotMissing, match="delta_starting is gone"):
        start("cache")
    assert start("cache", new_slot=True).epoch == 2
    assert start.load() == ("pending", "the epoch rose")
    assert start.reader.slot(start.spec.slot) is not None


def test_a_slot_that_was_made_anew_is_not_taken_for_the_old_one(start: Start) -> None:
    start("cache")
    start.confirm()
    start("cache")
    check_slot(start.spec, start.reader, start.state)
    start.reader.drop_slot(start.spec.slot)
    start.reader.create_slot(start.spec.slot)
    for refuse in (lambda: start("cache"), lambda: check_slot(start.spec, start.reader, start.state)):
        with pytest.raises(SlotMissing, match="dropped and made anew, or advanced"):
            refuse()
    assert start("cache", new_slot=True).epoch == 2
    assert start("cache").epoch == 2, "that was to be accepted once"


def test_a_slot_that_was_made_anew_before_anything_was_confirmed(start: Start) -> None:
    start("cache")
    start.reader.drop_slot(start.spec.slot)
    start.reader.create_slot(start.spec.slot)
    with pytest.raises(SlotMissing, match="made anew"):
        start("cache")


def test_a_slot_that_was_advanced_by_hand_is_noticed(start: Start) -> None:
    start("cache")
    start.confirm()
    with psycopg.connect(start.url, autocommit=True) as connection:
        connection.execute("INSERT INTO starting VALUES (1000)")
        connection.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", [start.spec.slot])
    with pytest.raises(SlotMissing, match="advanced by hand"):
        start("cache")


def advance(start: Start, id_: int) -> None:
    """Do what somebody does who wants to be rid of a change, with the slot that has it."""
    with psycopg.connect(start.url, autocommit=True) as connection:
        connection.execute("INSERT INTO starting VALUES (%s)", [id_])
        connection.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", [start.spec.slot])


def test_on_kafka_the_slot_is_compared_with_what_was_delivered(start: Start) -> None:
    """And a bound that an embedded run had saved before is not left behind for the next one."""
    start("cache")
    start("cache", delivered=lambda epoch: 0)
    advance(start, 1000)
    delivered = start.reader.durable_end()
    start("cache", delivered=lambda epoch: delivered if epoch == 1 else 0)
    advance(start, 1001)
    for refuse in (
        lambda: start("cache", delivered=lambda _: delivered),
        lambda: check_slot(start.spec, start.reader, start.state, lambda _: delivered),
    ):
        with pytest.raises(SlotMissing, match="advanced by hand"):
            refuse()
    check_slot(start.spec, start.reader, start.state)  # while the connector runs, that is not asked for
    start("cache", delivered=lambda _: None)  # nor when Kafka cannot tell
    start("cache")
    start.confirm()
    start("cache")
    advance(start, 2000)
    with pytest.raises(SlotMissing):
        start("cache")


def test_a_source_that_was_restored_with_its_slot_is_noticed(start: Start) -> None:
    """A copy of the server's files has identifier, timeline and slot as they were; but the log has gone back."""
    start("cache")
    known = start.state.pipeline("starting")
    assert known is not None
    start.state.save_pipeline(known._replace(slot_lsn=start.reader.durable_end() + (1 << 30)))
    with pytest.raises(SlotMissing, match="from a copy of its files"):
        start("cache")


def test_another_database_is_never_taken_by_itself(start: Start) -> None:
    start.goes_on_by_itself()
    start("cache")
    known = start.state.pipeline("starting")
    assert known is not None
    for other in (known._replace(system_identifier="1"), known._replace(timeline=known.timeline + 1)):
        start.state.save_pipeline(other)
        with pytest.raises(SlotMissing, match="wrong server"):
            start("cache")
    assert start("cache", new_slot=True).epoch == 2


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("on_kafka", [False, True], ids=["embedded", "kafka"])
def test_a_new_epoch_that_is_killed_at_any_step_is_begun_by_the_next_start(
    start: Start, monkeypatch: pytest.MonkeyPatch, on_kafka: bool
) -> None:
    start.goes_on_by_itself()
    delivered: Delivered | None = (lambda _: 0) if on_kafka else None
    start("cache", delivered=delivered)
    places = [
        (PostgresReader, "drop_slot"),
        (StateStore, "save_pipeline"),
        (StateStore, "save_load"),
        (PostgresReader, "publish"),
        (PostgresReader, "create_slot"),
    ]
    steps = 0
    left = [0]

    def killed(owner: type, name: str) -> None:
        call = getattr(owner, name)

        def step(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            result = call(*arguments, **options)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, step)

    for owner, name in places:
        killed(owner, name)
    while True:
        left[0] = 0
        before = start("cache", delivered=delivered).epoch
        start.loaded()
        start.confirm()
        with psycopg.connect(start.url, autocommit=True) as connection:  # as if it were another timeline
            connection.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", [start.spec.slot])
        known = start.state.pipeline("starting")
        assert known is not None
        start.state.save_pipeline(known._replace(timeline=known.timeline - 1))
        steps += 1
        left[0] = steps
        try:
            start("cache", delivered=delivered)
        except Killed:
            left[0] = 0
            source = start("cache", delivered=delivered)
        else:
            break
        load = start.state.loads("starting")[TABLE]
        assert source.epoch == before + 1, steps
        assert (load.state, load.epoch) == ("pending", source.epoch), steps
        check_slot(start.spec, start.reader, start.state, delivered)
        assert start("cache", delivered=delivered).epoch == source.epoch, steps
    assert steps > 2 * len(places), "each was killed before and after"


CONFIRM_FOR_EVER = """
import itertools, sys
from pathlib import Path
import psycopg
from delta_sync.capture import Batch
from delta_sync.confirming import RecordingCapture
from delta_sync.state import StateStore

url, folder, slot = sys.argv[1:]
state = StateStore.open("sqlite:///state.db", Path(folder))
source = psycopg.connect(url, autocommit=True)


class Slot:
    generation, pid, sequence = 1, None, 0

    def start(self): pass
    def stop(self): pass

    def poll(self, timeout_s):
        self.sequence += 1
        source.execute("INSERT INTO starting SELECT coalesce(max(id), 0) + 1 FROM starting")
        (lsn,) = source.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        return Batch(1, self.sequence, 1, lsn)

    def confirm(self, batch):
        source.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", [slot, batch.payload])


def record(batch):
    (lsn,) = source.execute("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint").fetchone()
    state.raise_confirmed_most("starting", lsn)


never_waits = itertools.count().__next__
capture = RecordingCapture(Slot(), record, clock=never_waits)
capture.start()
capture.confirm(capture.poll(0.0))
capture.poll(0.0)
print("confirmed", flush=True)
while True:
    capture.confirm(capture.poll(0.0))
"""


def test_no_kill_at_any_moment_makes_a_false_alarm(start: Start, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moment = random.Random(seed)
    confirmed: set[int | None] = set()
    for _ in range(12):
        start("cache")
        arguments = [start.url, str(tmp_path), start.spec.slot]
        with subprocess.Popen([sys.executable, "-c", CONFIRM_FOR_EVER, *arguments], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"confirmed\n"
            select.select([process.stdout], [], [], moment.uniform(0.0, 0.05))  # it prints no more
            process.kill()
        slot = start.reader.slot(start.spec.slot)
        assert slot is not None
        confirmed.add(slot.confirmed_lsn)
    start("cache")
    assert len(confirmed) == 12, "each of them confirmed something"


def test_a_table_that_was_taken_out_and_put_back_is_loaded_again(start: Start) -> None:
    """What changed in it meanwhile was not captured."""
    start("cache")
    start.loaded()
    both = start.spec
    with psycopg.connect(start.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE starting_too (id int PRIMARY KEY)")
    try:
        other = "public.starting_too"
        start.spec = both.model_copy(update={"tables": {other: both.tables[TABLE]}})
        start("cache", table=other)
        assert set(start.state.loads("starting")) == {other}
        start.spec = both
        start("cache")
        assert start.load() == ("pending", "first load")
    finally:
        with psycopg.connect(start.url, autocommit=True) as connection:
            connection.execute("DROP TABLE starting_too")


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[PostgreSQL]:
    """A server of the test's own: what is done to it would spoil the slots of others."""
    del tmp_path
    with PostgreSQL(min_wal_size="32MB", max_wal_size="32MB") as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE starting (id int PRIMARY KEY, title text)")
        yield server


def _invalidate(server: PostgreSQL, slot: str) -> None:
    """Make the server remove log that the slot still needs."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
        connection.execute("SELECT pg_reload_conf()")

        def lost() -> bool:
            connection.execute("SELECT pg_logical_emit_message(false, 'x', ''), pg_switch_wal()")
            connection.execute("CHECKPOINT")
            row = connection.execute(
                "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s", [slot]
            ).fetchone()
            return row == ("lost",)

        wait_until(lost, 60, "the slot's end")
        connection.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        connection.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize("known", [True, False], ids=["of a pipeline with state", "left over"])
def test_a_slot_that_was_invalidated(own_server: PostgreSQL, tmp_path: Path, known: bool) -> None:
    """It is still there, so it is not gone; and it must make room for the new one."""
    start = Start(own_server, tmp_path)
    try:
        if known:
            start("cache")
            start.loaded()
        else:
            start.reader.create_slot(start.spec.slot)
        _invalidate(own_server, start.spec.slot)
        with pytest.raises(SlotMissing, match="removed log that replication slot"):
            start("cache")
        start.goes_on_by_itself()
        if known:
            with pytest.raises(EpochRose):
                check_slot(start.spec, start.reader, start.state)
            start.state.save_load("starting", start.state.loads("starting")[TABLE]._replace(state="running"))
            with pytest.raises(SlotMissing, match="would be overtaken again: raise max_slot_wal_keep_size"):
                start("cache")
            start.loaded()
        assert start("cache").epoch == (2 if known else 1)
        slot = start.reader.slot(start.spec.slot)
        assert slot is not None
        assert slot.wal_status == "reserved"
        check_slot(start.spec, start.reader, start.state)
    finally:
        start.reader.close()
        start.state.close()


def test_a_replica_that_was_promoted(own_server: PostgreSQL, tmp_path: Path) -> None:
    """It has the same system identifier, and even a slot of that name, made by whoever promoted it."""
    start = Start(own_server, tmp_path)
    replica = PostgreSQL()
    replica.copy(own_server, standby=True)
    with replica:
        try:
            start("cache")
            start.loaded()
            start.goes_on_by_itself()
            start.to(replica.url)
            with pytest.raises(SourceBusy):
                start("cache")  # not promoted yet
            with psycopg.connect(replica.url, autocommit=True) as connection:
                connection.execute("SELECT pg_promote(true, 60)")
            start.reader.create_slot(start.spec.slot)
            with pytest.raises(EpochRose, match="timeline 2, and was on 1"):
                check_slot(start.spec, start.reader, start.state)
            assert start("cache").epoch == 2
            check_slot(start.spec, start.reader, start.state)
            start.to(own_server.url)
            with pytest.raises(SlotMissing, match="left behind is back"):
                start("cache")
        finally:
            start.reader.close()
            start.state.close()
