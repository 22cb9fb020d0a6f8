"""Dumps: what is read when, with which claim, and what a restart goes on with. Source and time are fakes."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from delta_sync import load
from delta_sync.changes import Change, Key
from delta_sync.dumping import RETRY_S, DumperContext
from delta_sync.dumps import Dump
from delta_sync.errors import EpochRose, SourceBusy, UsageError
from delta_sync.load import Loader, Slice
from delta_sync.progress import LogPosition, Progress
from delta_sync.samples import SharedSamples
from delta_sync.sources.postgresql.claims import Sample, Samples, Snapshot
from delta_sync.sources.postgresql.reader import Blocker, PostgresReader
from delta_sync.sources.reader import Chunk
from delta_sync.spec import LoadSpec
from delta_sync.state import Lease, PipelineState, StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Row
from delta_sync.versions import dump_version

EPOCH = 2
CHUNK_ROWS = 3
MOVIE, GENRE = "public.movie", "public.genre"
EVERYTHING = Snapshot(50, 50, frozenset())  # a snapshot that sees every transaction of these tests
JOIN_TIMEOUT_S = 60.0


def table(name: str) -> Table:
    return Table("public", name, (Column("id", "integer", Kind.INTEGER),), ("id",))


class FakeReader:
    """A source whose log is a counter. `snapshots` are given out one by one; the last of them for ever."""

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows
        self.lsn = 1000
        self.snapshots = [EVERYTHING]
        self.read_behind: list[tuple[str, Key | None]] = []
        self.read_keys_of: list[list[Key]] = []
        self.rows_at_once = 1 << 30  # as if more had too many bytes
        self.conditions_fail = False
        self.while_reading: Callable[[], None] = lambda: None
        self.on_heartbeat: Callable[[int], None] = lambda lsn: None
        self.errors: list[Exception] = []

    def estimated_rows(self, table: Table) -> int | None:
        return 42

    def log_end(self) -> int:
        return self.lsn

    def heartbeat(self, prefix: str) -> int:
        assert prefix == "beat"
        if self.errors:
            raise self.errors.pop(0)
        self.lsn += 10
        lsn = self.lsn
        self.on_heartbeat(lsn)
        return lsn

    def blockers(self) -> list[Blocker]:
        return [Blocker(77, 40, 12.0, "UPDATE movie")]

    def key_behind(self, table: Table, after: Key | None, rows: int) -> Key | None:
        place = (-1 if after is None else after[0]) + rows
        return (place,) if place < self.rows else None

    def read_chunk(
        self,
        table: Table,
        after: Key | None,
        rows_most: int,
        bytes_most: int,
        usable: Callable[[Snapshot], bool],
        *,
        to: Key | None = None,
        where: str | None = None,
    ) -> Chunk | None:
        snapshot = self.snapshots.pop(0) if len(self.snapshots) > 1 else self.snapshots[0]
        if not usable(snapshot):
            return None
        self.while_reading()
        self.read_behind.append((table.id, after))
        if self.conditions_fail:
            raise UsageError(f"The condition {where!r} fails.")
        first = 0 if after is None else after[0] + 1
        end = self.rows if to is None else to[0] + 1
        ids = range(first, min(end, self.rows))[: min(rows_most, self.rows_at_once)]
        rows: list[tuple[Key, Row]] = [((id_,), {"id": id_}) for id_ in ids]
        return Chunk(0, rows, rows[-1][0] if len(rows) == min(rows_most, self.rows_at_once) else None)

    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Snapshot], bool]) -> Chunk | None:
        snapshot = self.snapshots.pop(0) if len(self.snapshots) > 1 else self.snapshots[0]
        if not usable(snapshot):
            return None
        self.read_keys_of.append(list(keys))
        rows: list[tuple[Key, Row]] = [(key, {"id": key[0]}) for key in keys if key[0] in range(self.rows)]
        if len(rows) >= self.rows_at_once:  # also when there are no more: a reader does not know
            return Chunk(0, rows[: self.rows_at_once], rows[self.rows_at_once - 1][0])
        return Chunk(0, rows, None)


class Stopping(threading.Event):
    """Notes the pauses instead of making them. `during` is called in each."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []
        self.during: Callable[[], None] = lambda: None

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        assert len(self.pauses) < 10_000, "it would wait for ever"
        self.during()
        return self.is_set()


class Bench:
    """A loader with everything about it under control. By default the log passes at once and slices are written."""

    def __init__(self, folder: Path, tables: Sequence[str] = (MOVIE,), rows: int = 0) -> None:
        self.folder = folder
        self.tables = {name: table(name.split(".")[1]) for name in tables}
        self.reader = FakeReader(rows)
        self.position = LogPosition(lambda: 0.0)
        self.reader.on_heartbeat = self.position.advance
        self.progress = Progress(self.position, lambda: 0.0)
        self.samples = SharedSamples(Samples)
        self.samples.add(Sample(5000, 10))
        self.stopping = Stopping()
        self.slices: list[Slice] = []
        self.finished: list[str] = []
        self.sinks = {"cache"}
        self.columns = "columns"
        self.changes_come = False
        self.make_dumps: type[DumpStore] = DumpStore
        self.threads = 1  # what is read in which order is told by one
        self.failures: list[BaseException] = []
        self.state = StateStore.open("sqlite:///state.db", folder)

    def hand_over(self, slice_: Slice) -> None:
        self.slices.append(slice_)
        slice_.done.set_result(None)

    def finish(self, done: Dump) -> None:
        self.finished.append(done.table)
        if len(self.finished) == len(self.tables):
            self.stopping.set()

    @property
    def dumps(self) -> DumpStore:
        return DumpStore(self.state, "movies")

    def stop_when_over(self) -> None:
        """End the loader when no dump is left that was there, or came."""
        prune, end = DumpStore.prune, DumpStore.end
        bench = self

        class Watched(DumpStore):
            def look(self) -> None:
                if not self.all(unfinished=True):
                    bench.stopping.set()

            def prune(self, most: int) -> None:
                prune(self, most)
                self.look()

            def end(self, id_: int, state: Any, why: str) -> None:
                end(self, id_, state, why)
                self.look()

        self.make_dumps = Watched
        self.finish = lambda done: self.finished.append(done.table)  # type: ignore[method-assign]  # it goes on

    def fail(self, error: BaseException) -> None:
        self.failures.append(error)
        self.stopping.set()  # as the worker does

    def loader(self, epoch: int = EPOCH) -> Loader:
        loader = self._loader(epoch)
        loader._dumps = self.make_dumps(self.state, "movies")
        return loader

    def _loader(self, epoch: int) -> Loader:
        context = DumperContext(
            pipeline="movies",
            owner=uuid.uuid4().hex,
            epoch=epoch,
            position=self.position,
            progress=self.progress,
            state=self.state,
            tables=lambda: self.tables,
            fingerprint=lambda name: f"{self.columns} of {name}",
            finished=lambda done: self.finish(done),
            failed=self.fail,
            stopping=self.stopping,
        )
        return Loader(
            context,
            reader=cast("PostgresReader", self.reader),
            readers=[cast("PostgresReader", self.reader)] * self.threads,
            samples=self.samples,
            options=LoadSpec(chunk_rows=CHUNK_ROWS),
            heartbeat_prefix="beat",
            hand_over=lambda slice_: self.hand_over(slice_),
            fills=lambda dump: dump.sinks is None or self.sinks.issuperset(dump.sinks),
            changes_come=lambda: self.changes_come,
        )

    @property
    def changes(self) -> list[Change]:
        return [change for slice_ in self.slices for change in slice_.changes]

    def saved(self, name: str = MOVIE) -> TableLoad:
        return self.state.loads("movies")[name]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def bench(**options: Any) -> Bench:
        made.append(Bench(tmp_path, **options))
        return made[-1]

    yield bench
    for each in made:
        each.state.close()


MakeBench = Callable[..., Bench]


def test_all_rows_come_in_chunks_with_a_version_below_their_claim(make: MakeBench) -> None:
    bench = make(rows=7)
    bench.loader().run()
    version = dump_version(EPOCH, 5000)
    assert bench.changes == [Change(MOVIE, (id_,), version, {"id": id_}) for id_ in range(7)]
    assert bench.reader.read_behind == [(MOVIE, None), (MOVIE, (2,)), (MOVIE, (5,))]
    assert bench.finished == [MOVIE]
    assert bench.failures == []
    saved = bench.saved()
    assert (saved.state, saved.rows, saved.epoch, saved.reason) == ("done", 7, EPOCH, "first load")
    assert saved.fingerprint == f"columns of {MOVIE}"
    assert saved.covered_from == 1010  # behind the first heartbeat, which the log has brought
    assert bench.progress.loads == {MOVIE: {"estimate": 42, "state": "done", "rows": 7, "reason": "first load"}}


def test_an_empty_table(make: MakeBench) -> None:
    bench = make()
    bench.loader().run()
    assert (bench.changes, bench.finished, bench.saved().state) == ([], [MOVIE], "done")


def test_a_table_of_exactly_one_chunk(make: MakeBench) -> None:
    bench = make(rows=CHUNK_ROWS)
    bench.loader().run()
    assert len(bench.changes) == CHUNK_ROWS
    assert bench.reader.read_behind == [(MOVIE, None), (MOVIE, (2,))]


def test_a_chunk_is_handed_over_in_slices(make: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SLICE_ROWS", 2)
    bench = make(rows=CHUNK_ROWS)
    bench.loader().run()
    assert [len(slice_.changes) for slice_ in bench.slices] == [2, 1]


def test_slices_are_smaller_while_changes_come(make: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SLICE_ROWS_BESIDE_LOG", 1)
    monkeypatch.setattr(load, "SLICES_MOST", 1)
    bench = make(rows=2 * CHUNK_ROWS)
    hand_over = bench.hand_over

    def change_comes(slice_: Slice) -> None:
        bench.changes_come = True
        hand_over(slice_)

    bench.hand_over = change_comes  # type: ignore[method-assign]  # the log wakes up behind the first slice
    bench.loader().run()
    assert [len(slice_.changes) for slice_ in bench.slices] == [CHUNK_ROWS, 1, 1, 1]
    assert [change.key for change in bench.changes] == [(id_,) for id_ in range(2 * CHUNK_ROWS)]


def test_no_more_is_read_while_much_has_to_wait_for_the_log(make: MakeBench) -> None:
    """So a dump is no faster than the log that it comes behind, and takes no memory meanwhile."""
    bench = make(rows=3 * load.HELD_ROWS * CHUNK_ROWS)
    loader = bench.loader()
    loader.look()
    for _ in range(load.HELD_ROWS):
        assert loader.has_room
        assert loader.read_chunk(cast("PostgresReader", bench.reader))
    assert not loader.has_room
    loader.ask_for_read()
    loader.pass_log_for_read()
    loader.write_chunks()
    loader.record_written()
    assert loader.has_room


@pytest.mark.parametrize("goes", [False, True])
def test_a_chunk_that_was_written_while_its_table_was_gone_is_read_again(make: MakeBench, goes: bool) -> None:
    """Nobody knows what was written where; that the table is back by the time of recording changes nothing."""
    bench = make(rows=2 * CHUNK_ROWS)
    loader = bench.loader()
    loader.look()
    assert loader.read_chunk(cast("PostgresReader", bench.reader))
    loader.ask_for_read()
    loader.pass_log_for_read()
    tables, hand_over = dict(bench.tables), bench.hand_over

    def table_goes(slice_: Slice) -> None:
        hand_over(slice_)
        if goes:
            bench.tables.clear()

    bench.hand_over = table_goes  # type: ignore[method-assign]  # while a sink has it
    loader.write_chunks()
    bench.tables.update(tables)
    loader.record_written()
    assert loader.recorded == (0 if goes else 1)
    assert loader.read_chunk(cast("PostgresReader", bench.reader))
    assert bench.reader.read_behind[-1] == (MOVIE, None if goes else (CHUNK_ROWS - 1,))


def test_tables_take_turns(make: MakeBench) -> None:
    bench = make(tables=(MOVIE, GENRE), rows=CHUNK_ROWS * 4)
    bench.loader().run()
    assert sorted(bench.finished) == [GENRE, MOVIE]
    order = [name for name, _ in bench.reader.read_behind]
    assert order.count(MOVIE) == order.count(GENRE) == 5
    assert order != [MOVIE] * 5 + [GENRE] * 5


def test_rows_are_handed_over_only_when_the_log_has_passed(make: MakeBench) -> None:
    """A row's own change may still be on its way through the log, behind older ones of the same row."""
    bench = make(rows=2)
    seen: list[tuple[int, int]] = []
    hand_over = bench.hand_over

    def watch(slice_: Slice) -> None:
        seen.append((bench.position.passed_lsn, bench.reader.lsn))
        hand_over(slice_)

    bench.hand_over = watch  # type: ignore[method-assign]  # to look at the moment
    beats: list[int] = []
    read = threading.Event()
    bench.reader.while_reading = read.set

    def beat(lsn: int) -> None:
        """The first one passes at once, so that the load begins; the second has to wait."""
        beats.append(lsn)
        if len(beats) == 1:
            bench.position.advance(lsn)
        else:
            asked.set()

    asked = threading.Event()
    bench.reader.on_heartbeat = beat
    loader = bench.loader()
    loader.start()
    assert asked.wait(JOIN_TIMEOUT_S)
    assert read.is_set()  # the heartbeat was written after the chunk was read
    assert seen == []
    bench.position.advance(beats[1])
    loader.join(JOIN_TIMEOUT_S)
    assert seen == [(beats[1], beats[1])]
    assert bench.finished == [MOVIE]


def test_a_chunk_waits_for_a_snapshot_that_can_claim(make: MakeBench) -> None:
    bench = make(rows=1)
    too_early = Snapshot(9, 12, frozenset({9}))
    bench.reader.snapshots = [too_early] * 100 + [EVERYTHING]
    states: list[tuple[str, str | None]] = []
    bench.stopping.during = lambda: states.append(bench.progress.state())
    bench.loader().run()
    assert bench.stopping.pauses == [load.CLAIM_POLL_S] * 100
    assert bench.finished == [MOVIE]
    told = [state for state in states if state[0] == "waiting"]
    assert 0 < len(told) < 100  # not for a moment's delay
    assert told[-1][1] == (
        f"load: {MOVIE} cannot be read before the end of pid 77 (xid 40, open for 12 s): UPDATE movie"
    )
    assert bench.progress.state()[0] != "waiting"


def test_a_claim_from_before_the_log_covers_the_table_is_none(make: MakeBench) -> None:
    bench = make(rows=1)
    bench.reader.lsn = 9000  # all samples are older

    def sample() -> None:
        if len(bench.stopping.pauses) == 3:
            bench.samples.add(Sample(9500, 20))

    bench.stopping.during = sample
    bench.loader().run()
    assert len(bench.stopping.pauses) == 3
    assert [change.version for change in bench.changes] == [dump_version(EPOCH, 9500)]


def test_samples_may_be_forgotten_while_rows_are_read(make: MakeBench) -> None:
    """The watch does so when the source does not answer it."""
    bench = make(rows=1)
    bench.reader.while_reading = bench.samples.forget
    bench.loader().run()
    assert bench.failures == []
    assert [change.version for change in bench.changes] == [dump_version(EPOCH, 5000)]


def test_a_restart_goes_on_behind_the_last_chunk_that_was_written(make: MakeBench) -> None:
    bench = make(rows=8)

    def stop_at_the_second(slice_: Slice) -> None:
        bench.slices.append(slice_)
        if len(bench.slices) < 2:
            slice_.done.set_result(None)
        else:
            bench.stopping.set()  # it is never acknowledged

    bench.hand_over = stop_at_the_second  # type: ignore[method-assign]  # a worker that stops in between
    bench.loader().run()
    assert (bench.saved().rows, bench.saved().state) == (3, "running")
    assert (bench.failures, bench.finished) == ([], [])

    again = make(rows=8)
    again.reader.lsn = 3000
    again.loader().run()
    assert again.reader.read_behind == [(MOVIE, (2,)), (MOVIE, (5,))]
    assert [change.key[0] for change in again.changes] == [3, 4, 5, 6, 7]
    assert again.saved().covered_from == bench.saved().covered_from == 1010
    assert again.saved().rows == 8


def test_a_loaded_table_is_not_loaded_again(make: MakeBench) -> None:
    make(rows=2).loader().run()
    again = make(tables=(MOVIE, GENRE), rows=2)
    again.finished.append("so that the next one ends the run")
    again.loader().run()
    assert again.reader.read_behind == [(GENRE, None)]
    assert again.progress.loads[MOVIE]["state"] == "done"


@pytest.mark.parametrize(("epoch", "reload"), [(EPOCH + 1, None), (EPOCH, "its columns changed")])
def test_a_new_epoch_or_a_reload_begins_at_the_start(make: MakeBench, epoch: int, reload: str | None) -> None:
    make(rows=2).loader().run()
    again = make(rows=2)
    again.reader.lsn = 2000
    loader = again.loader(epoch)
    if reload is not None:
        loader.reload(MOVIE, reload)
        assert loader.busy
    loader.run()
    assert [change.version for change in again.changes] == [dump_version(epoch, 5000)] * 2
    saved = again.saved()
    assert (saved.reason, saved.rows, saved.epoch, saved.covered_from) == (reload or "the epoch rose", 2, epoch, 2010)


def test_a_reload_that_is_asked_for_while_the_table_is_loaded(make: MakeBench) -> None:
    bench = make(rows=8)
    loader = bench.loader()
    asked: list[bool] = []

    def ask_once() -> None:
        if not asked:
            asked.append(True)
            loader.reload(MOVIE, "its columns changed")

    bench.reader.while_reading = ask_once
    loader.run()
    assert bench.reader.read_behind[-3:] == [(MOVIE, None), (MOVIE, (2,)), (MOVIE, (5,))]
    assert bench.finished == [MOVIE]
    assert bench.saved().reason == "its columns changed"


def test_a_source_that_does_not_answer_is_asked_again(make: MakeBench) -> None:
    bench = make(rows=1)
    bench.reader.errors = [SourceBusy("it starts up"), SourceBusy("it starts up")]
    states: list[tuple[str, str | None]] = []
    bench.stopping.during = lambda: states.append(bench.progress.state())
    bench.loader().run()
    assert bench.stopping.pauses == [RETRY_S] * 2
    assert states == [("waiting", "load: it starts up")] * 2
    assert bench.finished == [MOVIE]
    assert bench.progress.state()[0] != "waiting"


def test_a_defect_is_handed_on(make: MakeBench) -> None:
    bench = make(rows=1)
    defect = ZeroDivisionError("a defect")
    bench.reader.errors = [defect]
    bench.loader().run()
    assert bench.failures == [defect]


def test_what_a_sink_refuses_is_handed_on_and_nothing_is_saved(make: MakeBench) -> None:
    bench = make(rows=8)
    refused = RuntimeError("refused")

    def refuse(slice_: Slice) -> None:
        slice_.done.set_exception(refused)

    bench.hand_over = refuse  # type: ignore[method-assign]  # a worker that stops with it
    bench.loader().run()
    assert bench.failures == [refused]
    assert (bench.saved().rows, bench.saved().after_key) == (0, None)


def test_a_load_is_done_only_when_what_follows_it_is(make: MakeBench) -> None:
    """A kill while documents of rows that are gone are removed must not leave them there: it is loaded once more."""
    bench = make(rows=2)
    seen: list[str] = []
    finish = bench.finish

    def finished(done: Dump) -> None:
        seen.append(bench.saved().state)
        finish(done)

    bench.finish = finished  # type: ignore[method-assign]  # asks what a process that is killed now would leave
    bench.loader().run()
    assert seen == ["running"]
    assert bench.saved().state == "done"


def test_a_reload_that_is_asked_for_while_one_begins_is_not_lost(make: MakeBench) -> None:
    bench = make(rows=2)
    loader = bench.loader()
    begin_load = bench.state.begin_load
    asked: list[str] = []

    def begin(name: str, load: TableLoad, lease: Lease | None = None) -> TableLoad:
        begun = begin_load(name, load, lease)
        if load.reason == "the first" and not asked:  # it begins
            asked.append("the second")
            loader.reload(MOVIE, "the second")
        return begun

    bench.state.begin_load = begin  # type: ignore[method-assign]  # the watch's thread, which asks just now
    loader.reload(MOVIE, "the first")
    loader.run()
    assert asked
    assert bench.saved().reason == "the second"


def test_a_loader_of_an_epoch_that_is_over_ends(make: MakeBench) -> None:
    """What another process asked for in the new epoch stays as it is, whether this one sees that at once or not."""
    bench = make(rows=7)
    asked = TableLoad(MOVIE, reason="the epoch rose", epoch=EPOCH + 1)

    def rise() -> None:
        bench.state.save_pipeline(PipelineState("movies", EPOCH + 1, "7", 2))
        bench.state.save_load("movies", asked)

    bench.reader.while_reading = rise
    written: list[int] = []
    for _ in range(2):
        bench.loader().run()
        assert [type(failure) for failure in bench.failures] == [EpochRose]
        assert bench.saved() == asked
        written.append(len(bench.slices))
        bench.failures.clear()
        bench.stopping.clear()
    assert written[0] == written[1], "chunks that were planned before may be written; none after"


def test_a_load_that_another_process_overrules_begins_anew(make: MakeBench) -> None:
    """Rows that were read before may lack what was lost; and it is not done before they have been read again."""
    bench = make(rows=2 * CHUNK_ROWS)
    overruled: list[str] = []

    def while_reading() -> None:
        if len(bench.reader.read_behind) == 1 and not overruled:
            overruled.append(bench.saved().state)
            bench.reader.lsn = 3000
            bench.state.load_again("movies", [MOVIE], "positions expired")

    bench.reader.while_reading = while_reading
    bench.loader().run()
    assert bench.failures == []
    assert overruled == ["running"]
    assert [behind for _, behind in bench.reader.read_behind][-3:] == [
        None,
        (CHUNK_ROWS - 1,),
        (2 * CHUNK_ROWS - 1,),
    ]
    saved = bench.saved()
    assert (saved.state, saved.reason, saved.rows) == ("done", "positions expired", 2 * CHUNK_ROWS)
    assert saved.covered_from is not None
    assert saved.covered_from >= 3000  # what it covers begins anew, too
    assert bench.finished == [MOVIE]


# ── dumps that are asked for ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def loaded(make: MakeBench) -> Bench:
    """Return a bench whose table is loaded, for a dump to come."""
    make(rows=8).loader().run()
    bench = make(rows=8)
    bench.stop_when_over()
    return bench


def test_some_keys_are_read_and_those_without_a_row_are_deleted(loaded: Bench) -> None:
    id_ = loaded.dumps.add(Dump(table=MOVIE, kind="keys"), [(1,), (99,), (7,)])
    loader = loaded.loader()
    loader.look()
    assert [(dump.id, dump.state) for dump in loaded.progress.dumps] == [(id_, "running")]
    loader.run()
    version = dump_version(EPOCH, 5000)
    assert loaded.changes == [
        Change(MOVIE, (1,), version, {"id": 1}),
        Change(MOVIE, (7,), version, {"id": 7}),
        Change(MOVIE, (99,), version, None),
    ]
    found = loaded.dumps.get(id_)
    assert found is not None
    assert (found.state, found.rows, found.estimate) == ("done", 3, 3)
    assert loaded.finished == [], "only one that met every row knows which rows are gone"


def test_keys_whose_rows_are_too_large_to_be_read_at_once_are_not_taken_for_gone(loaded: Bench) -> None:
    loaded.reader.rows_at_once = 1
    loaded.dumps.add(Dump(table=MOVIE, kind="keys"), [(1,), (99,), (7,)])
    loaded.loader().run()
    assert [(change.key, change.row is None) for change in loaded.changes] == [
        ((1,), False),
        ((7,), False),
        ((99,), True),
    ]


def test_the_last_of_some_keys_may_be_as_large_as_all_may_be(loaded: Bench) -> None:
    """The reader has stopped behind it, and cannot tell that there was no more."""
    loaded.reader.rows_at_once = 2
    loaded.dumps.add(Dump(table=MOVIE, kind="keys"), [(1,), (7,)])
    loaded.loader().run()
    assert [change.key for change in loaded.changes] == [(1,), (7,)]


def test_a_chunk_that_is_too_large_is_split(loaded: Bench) -> None:
    loaded.reader.rows_at_once = 2
    loaded.dumps.add(Dump(table=MOVIE, kind="table", sinks=("cache",)))
    loaded.loader().run()
    assert sorted(change.key[0] for change in loaded.changes) == list(range(8))
    assert {slice_.sinks for slice_ in loaded.slices} == {frozenset(["cache"])}
    assert loaded.finished == [MOVIE]


def test_a_dump_into_a_new_generation_is_left_to_a_run_that_writes_to_it(loaded: Bench) -> None:
    id_ = loaded.dumps.add(Dump(table=MOVIE, kind="table", sinks=("cache.2",)))
    old = loaded.loader()
    old.look()
    found = loaded.dumps.get(id_)
    assert found is not None
    assert (found.state, found.covered_from) == ("pending", None), "what it covers would begin before both are written"
    loaded.sinks.add("cache.2")
    new = loaded.loader()
    new.look()  # killed, and a run of before is back
    loaded.sinks.remove("cache.2")
    old.look()
    assert not old.read_chunk(cast("PostgresReader", loaded.reader)), "its rows would go nowhere"
    loaded.sinks.add("cache.2")
    new.run()
    assert sorted(change.key[0] for change in loaded.changes) == list(range(8))
    assert {slice_.sinks for slice_ in loaded.slices} == {frozenset(["cache.2"])}


def test_a_condition_that_fails_ends_its_dump_and_nothing_else(loaded: Bench) -> None:
    loaded.reader.conditions_fail = True
    id_ = loaded.dumps.add(Dump(table=MOVIE, kind="where", where="1/0 = 1"))
    loaded.loader().run()
    found = loaded.dumps.get(id_)
    assert found is not None
    assert (found.state, found.waits) == ("failed", "The condition '1/0 = 1' fails.")
    assert loaded.failures == []


def test_a_load_that_cannot_be_read_stops_the_pipeline_and_is_not_begun_again_for_ever(make: MakeBench) -> None:
    """As a document's query that fails for one of the rows."""
    bench = make(rows=8)
    bench.reader.conditions_fail = True
    bench.loader().run()
    assert [str(error) for error in bench.failures] == ["The condition None fails."]
    (load,) = bench.dumps.all()
    assert load.state == "running", "it goes on once the query is corrected"


def test_the_wait_for_a_transaction_is_told_of_and_bounded(loaded: Bench) -> None:
    loaded.reader.snapshots = [Snapshot(9, 12, frozenset({9}))]
    id_ = loaded.dumps.add(Dump(table=MOVIE, kind="table", timeout_s=5.0))
    told: set[str | None] = set()

    def look() -> None:
        dump = loaded.dumps.get(id_)
        if dump is not None and dump.state == "running":
            told.add(dump.waits)

    loaded.stopping.during = look
    loaded.loader().run()
    whom = f"{MOVIE} cannot be read before the end of pid 77 (xid 40, open for 12 s): UPDATE movie"
    assert told == {None, whom}
    found = loaded.dumps.get(id_)
    assert found is not None
    assert (found.state, found.waits) == ("failed", f"It could not begin to read within 5 s: {whom}.")


def test_a_dump_of_a_table_that_is_to_be_loaded_is_cancelled_and_its_rows_stay_out(loaded: Bench) -> None:
    """They have older columns, and may have the same version as those of the load."""
    id_ = loaded.dumps.add(Dump(table=MOVIE, kind="table"))
    loader = loaded.loader()
    covered: list[int] = []

    def rise(lsn: int) -> None:
        """The log passes only when the chunk has been read, and the table is to be loaded."""
        if loaded.reader.read_behind and not covered:
            covered.append(lsn)
            loaded.columns = "other columns"
            loader.reload(MOVIE, "its columns changed")
        loaded.position.advance(lsn)

    loaded.reader.on_heartbeat = rise
    loader.run()
    assert covered
    found = loaded.dumps.get(id_)
    assert found is not None
    assert (found.state, found.waits) == ("cancelled", "the table is loaded: its columns changed")
    load = next(one for one in loaded.dumps.all() if one.kind == "load" and one.state == "done" and one.id > id_)
    assert len(loaded.changes) == load.rows == 8, "nothing of the one that was cancelled"


@pytest.mark.parametrize("threads", [1, 4])
def test_many_dumps_at_once_with_many_readers(make: MakeBench, threads: int) -> None:
    make(tables=(MOVIE, GENRE), rows=40).loader().run()
    bench = make(tables=(MOVIE, GENRE), rows=40)
    bench.threads = threads
    bench.stop_when_over()
    for name in (MOVIE, GENRE, MOVIE):
        bench.dumps.add(Dump(table=name, kind="table"))
    bench.loader().run()
    assert bench.failures == []
    for name, times in ((MOVIE, 2), (GENRE, 1)):
        keys = [change.key[0] for change in bench.changes if change.table == name]
        assert sorted(keys) == sorted([*range(40)] * times), "each row once by each dump"


def test_a_load_that_an_older_delta_began_goes_on_behind_its_last_key(make: MakeBench) -> None:
    bench = make(rows=8)
    bench.state.begin_load("movies", TableLoad(MOVIE, fingerprint=f"columns of {MOVIE}", epoch=EPOCH))
    began = TableLoad(MOVIE, "running", (2,), 3, 1010, f"columns of {MOVIE}", "first load", EPOCH)
    bench.state.save_load("movies", began)
    bench.loader().run()
    assert [change.key[0] for change in bench.changes] == [3, 4, 5, 6, 7]
    assert (bench.saved().state, bench.saved().rows, bench.saved().covered_from) == ("done", 8, 1010)
