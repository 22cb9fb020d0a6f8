"""Which keys rows used is noted before anything is asked, and rows are found by it when somebody says what changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from delta_sync.applying import SinkWriter
from delta_sync.capture import Batch
from delta_sync.changes import Change, Outcome, Write
from delta_sync.decoding import Decoded
from delta_sync.dumps import Dump
from delta_sync.errors import StateBusy, UsageError
from delta_sync.load import Slice
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import Pipeline
from delta_sync.processing import asked_of
from delta_sync.progress import LogPosition, Progress
from delta_sync.refresher import Refresher
from delta_sync.refreshing import NoticeStore, RowFinder, keys_of, typed, wanted_of
from delta_sync.rereads import AheadOfLog
from delta_sync.sinks.base import Target
from delta_sync.sinks.memory import MemorySink, MemoryTargetOptions
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.submitting import TableRuntime
from delta_sync.tables import Column, Kind, Table
from delta_sync.used_keys import UsedKeyStore, Uses, kept_of, slot_of, uses_of
from delta_sync.worker import Worker

TIMEOUT_S = 120.0
MOVIE = Table("public", "movie", (Column("id", "int", Kind.INTEGER), Column("by", "int", Kind.INTEGER)), ("id",))
NAME = "public.movie"


def place(row: Mapping[str, Any]) -> str | None:
    """A key that no column has."""
    return None if row["by"] is None else f"place {row['by'] % 10}"


class Bench:
    """A pipeline whose look-up is asked by a function of the row, and a worker over a real state store."""

    def __init__(self, state: StateStore, keys: str = "kept") -> None:
        self.order: list[str] = []
        self.pipeline = Pipeline("movies")

        @self.pipeline.lookup(keys=cast("Any", keys), ttl=0)
        def ratings(keys: list[Any]) -> Mapping[Any, Any]:
            self.order.append("asked")
            return {key: f"of {key}" for key in keys}

        @self.pipeline.table(NAME, enrich={"rating": ratings.by(place)})
        def movie(row: dict[str, Any], rating: str | None) -> dict[str, Any]:
            return {"rating": rating}

        del movie
        self.state = state
        self.ratings = ratings
        self.used = UsedKeyStore(state, "movies")
        self.dumps = DumpStore(state, "movies")
        self.tables = {NAME: MOVIE}
        self.used.begin(kept_of(self.pipeline))

    def found(self, *keys: str) -> list[int] | None:
        rows = self.used.rows(MOVIE, "ratings", keys, 100)
        return None if rows is None else sorted(id_ for (id_,) in rows)

    def refresher(self) -> Refresher:
        return Refresher(
            pipeline=self.pipeline,
            state=self.state,
            reader=cast("Any", None),  # the source is not asked
            tables=lambda: self.tables,
            ages=lambda _: None,
            stopping=threading.Event(),
        )

    def load(self) -> None:
        """As a dump of the whole table that has been made."""
        id_ = self.dumps.add(Dump(table=NAME, kind="table"))
        self.dumps.end(id_, "done", "")


class NotingSink(MemorySink):
    """Says when it is written to."""

    order: list[str]

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        self.order.append("applied")
        return super().apply(target, writes)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateStore]:
    with StateStore.open("sqlite:///state.db", tmp_path) as opened:
        yield opened


@pytest.fixture
def it(state: StateStore) -> Bench:
    return Bench(state)


def change(id_: int, version: int, by: int | None) -> Change:
    return Change(NAME, (id_,), version, {"id": id_, "by": by})


class Log:
    """A capture with so many batches of one event, which says when they are confirmed."""

    generation, pid = 1, None

    def __init__(self, batches: int, order: list[str], stopping: threading.Event) -> None:
        self.left = batches
        self.confirmed = threading.Event()
        self._order = order
        self._stopping = stopping

    def poll(self, timeout_s: float) -> Batch | None:
        if not self.left:
            self._stopping.wait(timeout_s)
            return None
        self.left -= 1
        return Batch(1, self.left + 1, 1, None)

    def confirm(self, _batch: Batch) -> None:
        self._order.append("confirmed")
        self.confirmed.set()

    def start(self) -> None: ...

    stop = reconfigure = start


def work(it: Bench, note: Callable[..., None], changes: Sequence[Change], origin: str = "load") -> MemorySink:
    """Let a worker write these changes, which come from a load or as a batch of the log."""
    stopping = threading.Event()
    sink = NotingSink("cache")
    sink.order = it.order
    writer = SinkWriter(sink, stopping)
    caller = LookupCaller(it.ratings, stopping, lambda: 0.0)
    position = LogPosition(lambda: 0.0)

    capture = Log(1 if origin == "log" else 0, it.order, stopping)
    worker = Worker(
        spec=cast("Any", SimpleNamespace(heartbeat_prefix="delta.movies")),
        pipeline=it.pipeline,
        epoch=1,
        capture=cast("Any", capture),
        stretches=lambda _: [],
        writers={"cache": writer},
        lookups={"ratings": caller},
        state=it.state,
        position=position,
        progress=Progress(position, lambda: 0.0),
        reread=lambda _table, _lacking: [],
        ahead=AheadOfLog(),
        refresh=lambda _names: {},
        columns_changed=lambda _names: None,
        check_slot=lambda: None,
        stopping=stopping,
        giving_up=threading.Event(),
        note=note,
    )
    target = sink.target(MOVIE, MemoryTargetOptions())
    worker.use({NAME: TableRuntime(cast("Any", SimpleNamespace(table=MOVIE)), {"cache": target})})
    slice_ = Slice(NAME, changes, Future())
    running = threading.Thread(target=worker.run)
    decoded = Decoded({NAME: list(changes)}, {}, {}, [], None, None, len(changes), frozenset())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("delta_sync.worker.decode", lambda *_: decoded)  # what events look like is not the point
        running.start()
        try:
            if origin == "log":
                assert capture.confirmed.wait(TIMEOUT_S)
            else:
                worker.hand_over(slice_)
                slice_.done.result(TIMEOUT_S)
        finally:
            stopping.set()
            worker.wake()
            running.join(TIMEOUT_S)
            writer.close()
            caller.close()
    return sink


@pytest.mark.parametrize("origin", ["load", "log"])
def test_what_rows_use_is_noted_before_it_is_asked_for_and_written(
    it: Bench, monkeypatch: pytest.MonkeyPatch, origin: str
) -> None:
    """An answer that was asked for before the note would be in no dump of a notice that came in between."""
    monkeypatch.setattr("delta_sync.submitting.STATE_RETRY_S", 0.0)
    busy = [StateBusy("locked")]

    def note(uses: Sequence[Uses], emptied: Mapping[str, int]) -> None:
        if busy:
            it.order.append("busy")
            raise busy.pop()
        it.order.append("noted")
        it.used.note(uses, emptied)

    changes = [change(1, 5, 13), change(2, 5, 23), change(3, 5, None), Change(NAME, (4,), 5, None)]
    sink = work(it, note, changes, origin)
    assert it.order == ["busy", "noted", "asked", "applied", *["confirmed"] * (origin == "log")]
    assert it.found("place 3") == [1, 2]
    documents = sink.documents(sink.target(MOVIE, MemoryTargetOptions()))
    assert [one["rating"] for one in documents.values()] == ["of place 3", "of place 3", None]


def test_a_row_is_found_by_what_it_used_last(it: Bench) -> None:
    work(it, it.used.note, [change(1, 5, 13), change(2, 5, 13)])
    work(it, it.used.note, [change(1, 6, 14), Change(NAME, (2,), 6, None)])
    assert (it.found("place 3"), it.found("place 4")) == ([], [1])
    work(it, it.used.note, [change(1, 5, 13)])
    assert (it.found("place 3"), it.found("place 4")) == ([], [1]), "an older one came late"


def test_a_key_is_a_text_or_a_number_and_whatever_else_fails_alone(it: Bench) -> None:
    by = [{"id": 1, "by": 1}, {"id": 2}, {"id": 3, "by": 3}]
    changes = [Change(NAME, (row["id"],), 1, row) for row in by]
    asked = asked_of(it.pipeline.tables[NAME], changes)
    assert asked.keys == [("place 1",), ("place 3",)]
    assert [(one.change.key, one.stage, one.error[:8]) for one in asked.failures] == [((2,), "lookup", "KeyError")]
    pipeline = Pipeline("movies")

    @pipeline.lookup()
    def odd(keys: list[Any]) -> Mapping[Any, Any]:
        return dict.fromkeys(keys)

    @pipeline.table(NAME, enrich={"odd": odd.by(cast("Any", lambda row: row.pop("by") / 2))})
    def movie(row: dict[str, Any], odd: Any) -> dict[str, Any]:
        return row

    del movie
    failed = asked_of(pipeline.tables[NAME], changes[:1]).failures
    assert "returned a float; a key is a text or a whole number" in failed[0].error
    assert changes[0].row == by[0] == {"id": 1, "by": 1}, "the row stays as it was"


def test_only_what_is_kept_is_noted(state: StateStore) -> None:
    derived = Bench(state, "derived")
    assert uses_of(asked_of(derived.pipeline.tables[NAME], [change(1, 1, 1)])) == []
    assert kept_of(derived.pipeline) == {}
    kept = Bench(state)
    assert kept_of(kept.pipeline) == {(NAME, "ratings"): "rows"}
    slot = slot_of((), "rating")
    gone = Change(NAME, (2,), 7, None)
    assert uses_of(asked_of(kept.pipeline.tables[NAME], [change(1, 1, 1), gone])) == [
        Uses(NAME, "ratings", slot, [((1,), 1, "place 1")], [((2,), 7)])
    ]
    assert len({slot, slot_of(["cache.2"], "rating"), slot_of((), "other")}) == 3


def test_a_function_of_the_row_needs_keys_that_are_kept(state: StateStore) -> None:
    with pytest.raises(UsageError, match=r'by a function of its rows, .* declare it with keys="kept"'):
        wanted_of(Bench(state, "derived").pipeline, {NAME: MOVIE}, "ratings", ["place 1"])
    with pytest.raises(UsageError, match="keys are derived or kept, not 'stored'"):
        Bench(state, "stored")
    wanted = wanted_of(Bench(state).pipeline, {NAME: MOVIE}, "ratings", ["place 1", "7", "07", "-0"])
    assert keys_of(wanted) == ["place 1", "7", 7, "07", "-0"], "whichever of the two it was, caches drop it"
    assert typed(MOVIE, place, ["7", "7"]) == ["7", 7]


def test_rows_are_looked_for_only_once_all_are_noted(it: Bench) -> None:
    finder = RowFinder(cast("Any", None), it.state, it.pipeline)
    wanted = wanted_of(it.pipeline, it.tables, "ratings", ["place 3"])
    it.used.begin({})
    assert finder.find(it.tables, "ratings", wanted) == {NAME: None}, "the pipeline never ran with it"
    it.used.begin(kept_of(it.pipeline))
    it.used.note(uses_of(asked_of(it.pipeline.tables[NAME], [change(1, 5, 13), change(2, 5, 14)])))
    assert finder.find(it.tables, "ratings", wanted) == {NAME: None}, "others may have used it before"
    it.load()
    assert finder.find(it.tables, "ratings", wanted) == {NAME: [(1,)]}
    assert finder.find(it.tables, "ratings", wanted, most=1) == {NAME: [(1,)]}


def test_a_notice_has_the_rows_dumped_that_used_its_keys(it: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_sync.refreshing.NOTICED_S", -1.0)  # every process has dropped them
    it.used.note(uses_of(asked_of(it.pipeline.tables[NAME], [change(1, 5, 13), change(2, 5, 14)])))
    refresher, notices = it.refresher(), NoticeStore(it.state, "movies")
    notices.add("ratings", ["place 3"], pending=True)
    refresher.look()
    assert [(dump.kind, dump.estimate) for dump in it.dumps.all()] == [("refresh", None)], "not all are noted yet"
    it.dumps.end(1, "done", "")
    refresher.look()
    assert it.used.keepings()[NAME, "ratings"].complete, "and that is known for good"
    notices.add("ratings", ["place 3"], pending=True)
    refresher.look()
    assert [(dump.kind, dump.estimate) for dump in it.dumps.all()][1:] == [("keys", 1)]
