"""Dumps by signals: what is signalled and recorded, on a real state store, beside a connector that a test plays."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from delta_sync.dumping import FIRST_LOAD, DumperContext
from delta_sync.dumps import Dump
from delta_sync.errors import EpochRose
from delta_sync.kafka.signals import SignalBoard
from delta_sync.leases import LeaseKeeper
from delta_sync.progress import LogPosition, Progress
from delta_sync.signalled import SIDECAR_LEASE, SignalledLoader
from delta_sync.signals import RESEND_MS, Connector, Heard, Notification, Signal
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Column, Kind, Table
from delta_sync.versions import position_in_topic, version_of

NAME, MOVIE, STUDIO = "movies", "public.movie", "public.studio"
TABLE = Table("public", "movie", (Column("id", "int", Kind.INTEGER),), ("id",))
EPOCH, TERM, TTL_S = 2, 1, 3600.0


class Played:
    """In the place of the topics: what was signalled, and what a test lets the connector say and write."""

    def __init__(self) -> None:
        self.sent: list[Signal] = []
        self.sent_ms: dict[str, dict[str, int]] = defaultdict(dict)
        self.heard: dict[str, Heard] = defaultdict(Heard)
        self.connector: Connector | None = Connector(10, 1000, None)
        self.now_ms = 1000

    def read(self) -> None:
        pass

    def close(self) -> None:
        pass

    def send(self, *signals: Signal) -> None:
        for one in signals:
            self.now_ms += 1
            self.sent.append(one)
            self.sent_ms[one.id][one.type] = self.now_ms

    def end_of(self, table: str) -> int:
        return 90

    def place_at(self, table: str, timestamp_ms: int) -> int:
        return 70

    def say(self, type_: str, **data: str) -> None:
        """Have the connector say something about what was signalled last, and write its position behind that."""
        self.now_ms += 1
        id_ = self.sent[-1].id
        self.heard[id_] = self.heard[id_].with_(Notification(id_, type_, data, self.now_ms))
        self.beat(None if type_ in ("COMPLETED", "ABORTED") else id_)

    def beat(self, snapshot: str | None, after_ms: int = 1) -> None:
        assert self.connector is not None
        self.now_ms += after_ms
        self.connector = Connector(self.connector.number + 1, self.now_ms, snapshot)

    def read_all(self, rows: int) -> None:
        self.say("STARTED")
        self.say("TABLE_SCAN_COMPLETED", status="SUCCEEDED", total_rows_scanned=str(rows))
        self.say("COMPLETED")


class World:
    def __init__(self, state: StateStore) -> None:
        self.state = state
        self.dumps = DumpStore(state, NAME)
        self.board = Played()
        self.position = LogPosition(lambda: 0.0)
        self.finished: list[Dump] = []
        self.known: dict[str, Table] = {MOVIE: TABLE}
        state.save_pipeline(PipelineState(NAME, EPOCH, "class", 0))
        assert state.take_lease(NAME, SIDECAR_LEASE, "sidecar", TTL_S) is not None
        self.loader = self.planner("me")

    def planner(self, owner: str, epoch: int = EPOCH) -> SignalledLoader:
        keeper = LeaseKeeper(self.state, NAME, "load", owner, TTL_S)
        keeper.renew()
        context = DumperContext(
            pipeline=NAME,
            owner=owner,
            epoch=epoch,
            position=self.position,
            progress=Progress(self.position, lambda: 0.0),
            state=self.state,
            tables=lambda: self.known,
            fingerprint=lambda _: "columns",
            finished=self.finished.append,
            failed=lambda error: (_ for _ in ()).throw(error),
            stopping=threading.Event(),
            keeper=keeper,
        )
        board = cast("SignalBoard", self.board)
        return SignalledLoader(context, names=[MOVIE], board=board, now=lambda: 1000.0)

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.loader.look()

    def apply(self) -> None:
        """Have the sinks come past all that the connector has written."""
        assert self.board.connector is not None
        self.position.advance(self.board.connector.number + 1)

    def loaded(self) -> None:
        """Bring the first load to its end."""
        self.look(2)
        self.board.read_all(3)
        self.apply()
        self.look(2)
        assert self.state.loads(NAME)[MOVIE].state == "done"
        self.board.sent.clear()

    @property
    def types(self) -> list[str]:
        return [one.type for one in self.board.sent]

    def dump(self) -> Dump:
        return self.dumps.all()[-1]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        yield World(state)


def test_a_table_is_loaded_by_a_signal(world: World) -> None:
    world.look(2)
    (sent,) = world.board.sent
    assert (sent.type, sent.id.startswith("delta dump 1.1 of ")) == ("execute-snapshot", True)
    assert world.state.loads(NAME)[MOVIE].state == "running"
    assert world.loader.busy
    floor = version_of(EPOCH, position_in_topic(TERM, 70))
    assert (world.dump().kind, world.dump().floor, world.dump().reason) == ("load", floor, FIRST_LOAD)


def test_a_load_is_done_when_its_rows_are_in_the_sinks(world: World) -> None:
    """Not when Debezium has read them, nor when they are in Kafka."""
    world.look(2)
    world.board.read_all(3)
    world.position.wait = lambda lsn, timeout_s: world.position.passed_lsn >= lsn  # type: ignore[method-assign]  # without the wait
    world.look(2)
    assert world.state.loads(NAME)[MOVIE].state == "running"
    assert not world.finished
    world.apply()
    world.look(2)
    load = world.state.loads(NAME)[MOVIE]
    assert (load.state, load.rows) == ("done", 3)
    assert [dump.kind for dump in world.finished] == ["load"]
    assert world.types == ["execute-snapshot"]


def test_nothing_is_signalled_before_a_sidecar_leads(tmp_path: Path) -> None:
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        world = World(state)
        lease = state.take_lease(NAME, SIDECAR_LEASE, "sidecar", TTL_S)
        assert lease is not None
        state.release_lease(lease)
        world.look(2)
        assert not world.board.sent


def test_dumps_are_taken_one_after_the_other(world: World) -> None:
    world.loaded()
    for _ in range(2):
        world.dumps.add(Dump(table=MOVIE, kind="table"))
    world.look(3)
    assert world.types == ["execute-snapshot"]
    world.board.read_all(5)
    world.apply()
    world.look(3)
    assert [dump.state for dump in world.dumps.all()[-2:]] == ["done", "running"]
    assert world.types == ["execute-snapshot"] * 2


def test_keys_and_conditions_are_conditions_of_the_signal(world: World) -> None:
    world.loaded()
    world.dumps.add(Dump(table=MOVIE, kind="keys"), [(1,), (2,)])
    world.look(2)
    world.board.read_all(2)
    world.apply()
    world.look(2)
    world.dumps.add(Dump(table=MOVIE, kind="where", where="id < 9"))
    world.look(3)
    filters = [one.data["additional-conditions"][0]["filter"] for one in world.board.sent]
    assert filters == ["id IN (1, 2)", "id < 9"]
    assert [dump.kind for dump in world.finished] == ["load"]  # no other has met every row


def test_pausing_resuming_and_cancelling(world: World) -> None:
    world.loaded()
    id_ = world.dumps.add(Dump(table=MOVIE, kind="table"))
    world.look(3)
    world.board.say("STARTED")
    world.dumps.order(id_, "pause")
    world.look(2)
    world.board.say("PAUSED")
    world.look(2)
    world.dumps.order(id_, "resume")
    world.look(2)
    world.board.say("RESUMED")
    world.dumps.order(id_, "cancel")
    world.look(2)
    world.board.say("ABORTED")
    world.look(2)
    told = ["execute-snapshot", "pause-snapshot", "resume-snapshot", "stop-snapshot", "resume-snapshot"]
    assert world.types == told
    world.dumps.add(Dump(table=MOVIE, kind="table"))
    world.look(3)
    assert world.types == [*told, "execute-snapshot"]


def test_whoever_plans_next_goes_on_where_it_is(world: World) -> None:
    world.look(2)
    world.board.say("STARTED")
    world.dumps.release("me")  # as at an orderly end; of one that is killed the lease of the chunk expires
    mine = world.state.take_lease(NAME, "load", "me", TTL_S)
    assert mine is not None
    world.state.release_lease(mine)
    world.loader = world.planner("other")
    world.look(2)
    assert world.types == ["execute-snapshot"]  # once
    world.board.say("TABLE_SCAN_COMPLETED", status="SUCCEEDED", total_rows_scanned="3")
    world.board.say("COMPLETED")
    world.apply()
    world.look(2)
    assert world.state.loads(NAME)[MOVIE].state == "done"


def test_what_a_dead_planner_began_is_waited_for_before_another_dump(world: World) -> None:
    """Of two snapshots at once Debezium would say everything under the id of the second."""
    world.loaded()
    for _ in range(2):
        world.dumps.add(Dump(table=MOVIE, kind="table"))
    world.look(3)
    world.board.say("STARTED")
    mine = world.state.take_lease(NAME, "load", "me", TTL_S)  # as if it had expired; that of the chunk has not
    assert mine is not None
    world.state.release_lease(mine)
    world.loader = world.planner("other")
    world.look(3)
    assert world.types == ["execute-snapshot"]
    world.dumps.release("me")
    world.look(2)
    world.board.read_all(5)
    world.apply()
    world.look(3)
    assert [dump.state for dump in world.dumps.all()[-2:]] == ["done", "running"]
    assert world.types == ["execute-snapshot"] * 2


def test_a_snapshot_that_nobody_wants_any_more_is_stopped(world: World) -> None:
    """Whoever was to stop it died before."""
    world.loaded()
    id_ = world.dumps.add(Dump(table=MOVIE, kind="table"))
    world.look(3)
    signalled = world.board.sent[-1].id
    world.dumps.order(id_, "cancel")
    world.dumps.release("me")
    mine = world.state.take_lease(NAME, "load", "me", TTL_S)
    assert mine is not None
    world.state.release_lease(mine)
    world.loader = world.planner("other")
    world.board.beat(signalled, RESEND_MS + 1)
    world.look(2)
    assert world.types == ["execute-snapshot", "stop-snapshot", "resume-snapshot"]


def test_a_dump_that_debezium_cannot_read_fails_and_a_load_is_tried_again(world: World) -> None:
    world.look(2)
    world.board.say("STARTED")
    world.board.say("TABLE_SCAN_COMPLETED", status="SQL_EXCEPTION")
    world.board.say("COMPLETED")
    world.look(2)
    assert world.dump().state == "running"
    assert "database refused" in (world.dump().waits or "")
    world.board.beat(None, 60_000)
    world.look()
    assert world.types == ["execute-snapshot"] * 2
    world.board.read_all(3)
    world.apply()
    world.look(2)
    id_ = world.dumps.add(Dump(table=MOVIE, kind="where", where="nonsense"))
    world.look(3)
    world.board.say("STARTED")
    world.board.say("TABLE_SCAN_COMPLETED", status="SQL_EXCEPTION")
    world.board.say("COMPLETED")
    world.look(2)
    found = world.dumps.get(id_)
    assert found is not None
    assert (found.state, "database refused" in (found.waits or "")) == ("failed", True)


def test_a_dump_into_one_sink_cannot_be(world: World) -> None:
    world.loaded()
    world.dumps.add(Dump(table=MOVIE, kind="table", sinks=("cache",)))
    world.look()
    assert (world.dump().state, world.board.sent) == ("failed", [])


@pytest.mark.parametrize("why", ["its columns changed", "where its documents go"])
def test_a_table_that_changes_is_loaded_again(world: World, why: str) -> None:
    world.loaded()
    if why == "its columns changed":
        world.loader.reload(MOVIE, why)
    else:
        world.loader = world.planner("me")
        world.loader._fingerprint = lambda _: "other columns"
    world.look(2)
    assert world.types == ["execute-snapshot"]
    assert why in world.state.loads(NAME)[MOVIE].reason


def test_a_load_that_began_before_its_table_was_known_is_for_whatever_it_turns_out_to_be(world: World) -> None:
    world.known.clear()
    world.look(2)
    assert world.state.loads(NAME)[MOVIE].fingerprint == ""
    world.known[MOVIE] = TABLE
    world.state.fill_fingerprint(NAME, MOVIE, "columns")
    world.board.read_all(1)
    world.apply()
    world.look(3)
    assert world.state.loads(NAME)[MOVIE].state == "done"
    assert world.types == ["execute-snapshot"]


def test_a_new_epoch_ends_what_runs_in_the_old_one_and_loads_everything(world: World) -> None:
    world.loaded()
    world.state.raise_epoch(NAME, EPOCH + 1)
    with pytest.raises(EpochRose):
        world.look()
    world.loader = world.planner("me", EPOCH + 1)
    world.look(2)
    assert world.types == ["execute-snapshot"]
    assert world.state.loads(NAME)[MOVIE].reason == "the epoch rose"


def test_an_epoch_never_falls(world: World) -> None:
    known = world.state.pipeline(NAME)
    assert known is not None
    world.state.raise_epoch(NAME, 7)
    world.state.save_pipeline(known._replace(slot_lsn=5))
    world.state.raise_epoch(NAME, 6)
    now = world.state.pipeline(NAME)
    assert now is not None
    assert (now.epoch, now.slot_lsn) == (7, 5)


def test_a_load_of_an_unfinished_kind_is_stored_as_it_was(world: World) -> None:
    load = TableLoad(STUDIO, fingerprint="", reason=FIRST_LOAD, epoch=EPOCH)
    world.state.begin_load(NAME, load)
    world.state.fill_fingerprint(NAME, STUDIO, "a")
    world.state.fill_fingerprint(NAME, STUDIO, "b")  # it has one by now
    assert world.state.loads(NAME)[STUDIO].fingerprint == "a"
