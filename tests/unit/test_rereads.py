"""Reading rows by key: with which version they are written, and for whom it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from delta_sync import rereads
from delta_sync.changes import Key
from delta_sync.decoding import Lacking
from delta_sync.errors import SourceBusy
from delta_sync.rereads import Ahead, AheadOfLog, Rereader
from delta_sync.samples import SharedSamples
from delta_sync.sources.postgresql.claims import Sample, Samples, Snapshot
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.sources.reader import Chunk
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Row
from delta_sync.versions import reread_version, version_of

EPOCH = 2
SEEN_TO = 6000
TABLE = Table("public", "movie", (Column("id", "integer", Kind.INTEGER),), ("id",))
MOVIE = "public.movie"
ROW: Row = {"id": 1, "title": "now"}


class Stopping(threading.Event):
    """Counts pauses instead of making them. `stop_after` so many it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []
        self.stop_after: int | None = None

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        assert len(self.pauses) < 10_000, "it would wait for ever"
        if self.stop_after is not None and len(self.pauses) >= self.stop_after:
            self.set()
        return self.is_set()


class FakeReader:
    """`snapshots` are given out one by one, the last for ever; row 1 is there, row 2 is not."""

    claim_wait_s = PostgresReader.claim_wait_s

    def __init__(self) -> None:
        self.samples = [Sample(5000, 30)]
        self.snapshots: list[Snapshot] = []
        self.errors: list[Exception] = []
        self.while_reading: Callable[[], None] = lambda: None
        self.reads = 0
        self.leaves_out = False

    def sample(self) -> Sample:
        if self.errors:
            raise self.errors.pop(0)
        return self.samples.pop(0) if len(self.samples) > 1 else self.samples[0]

    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Snapshot], bool]) -> Chunk | None:
        self.reads += 1
        snapshot = self.snapshots.pop(0) if len(self.snapshots) > 1 else self.snapshots[0]
        if not usable(snapshot):
            return None
        self.while_reading()
        return Chunk(SEEN_TO, [(key, ROW) for key in keys if key == (1,)], (1,) if self.leaves_out else None)


class Bench:
    def __init__(self) -> None:
        self.reader = FakeReader()
        self.samples = SharedSamples(Samples)
        self.stopping = Stopping()
        reader = cast("PostgresReader", self.reader)
        self.reread = Rereader(reader, self.samples, EPOCH, lambda _: TABLE, self.stopping)


def lacking(id_: int, lsn: int = 4000, xid: int = 20) -> Lacking:
    return Lacking(MOVIE, (id_,), version_of(EPOCH, lsn), xid)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_with_a_claim_above_the_change(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(30, 30, frozenset())]
    version = reread_version(EPOCH, 5000)
    assert bench.reread(MOVIE, [lacking(1), lacking(2)]) == [(lacking(1), ROW, version), (lacking(2), None, version)]
    assert bench.stopping.pauses == []


def test_a_row_that_was_left_out_is_not_taken_for_one_that_is_gone(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(30, 30, frozenset())]
    bench.reader.leaves_out = True
    assert bench.reread(MOVIE, [lacking(1), lacking(2)]) == [(lacking(1), ROW, reread_version(EPOCH, 5000))]


def test_a_claim_of_the_watch_that_is_newer_is_used(bench: Bench) -> None:
    bench.samples.add(Sample(4500, 25))
    bench.reader.samples = [Sample(5000, 30)]
    bench.reader.snapshots = [Snapshot(29, 33, frozenset({29}))]  # not of this sample, but of that one
    assert bench.reread(MOVIE, [lacking(1)]) == [(lacking(1), ROW, reread_version(EPOCH, 4500))]


def test_a_claim_below_the_change_is_none(bench: Bench) -> None:
    """The row might lack the change, and would still be written in its place."""
    bench.samples.add(Sample(4000, 25))
    bench.reader.snapshots = [Snapshot(26, 33, frozenset({26})), Snapshot(30, 33, frozenset())]
    assert bench.reread(MOVIE, [lacking(1, lsn=4000)]) == [(lacking(1, lsn=4000), ROW, reread_version(EPOCH, 5000))]
    assert len(bench.stopping.pauses) == 1


def test_it_waits_a_moment_for_those_that_run_now(bench: Bench) -> None:
    running = Snapshot(25, 33, frozenset({25}))
    bench.reader.snapshots = [running, running, Snapshot(30, 33, frozenset())]
    ((_, _, version),) = bench.reread(MOVIE, [lacking(1)])
    assert version == reread_version(EPOCH, 5000)
    assert bench.stopping.pauses == [rereads.POLL_S] * 2


def test_beside_a_long_transaction_the_changes_own_versions_do(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(10, 33, frozenset({10}))]
    items = [lacking(1, 3000, 20), lacking(2, 4000, 21)]
    assert bench.reread(MOVIE, items) == [(items[0], ROW, items[0].version), (items[1], None, items[1].version)]
    waited_s = sum(bench.stopping.pauses)
    assert PostgresReader.claim_wait_s - rereads.POLL_S <= waited_s <= PostgresReader.claim_wait_s + 2 * rereads.POLL_S


def test_for_the_same_long_transaction_it_waits_once(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(10, 33, frozenset({10}))]
    bench.reread(MOVIE, [lacking(1)])
    bench.stopping.pauses.clear()
    bench.reread(MOVIE, [lacking(1)])
    assert bench.stopping.pauses == []
    bench.reader.snapshots = [Snapshot(30, 33, frozenset())]
    assert bench.reread(MOVIE, [lacking(1)])[0][2] == reread_version(EPOCH, 5000)
    bench.reader.snapshots = [Snapshot(12, 33, frozenset({12}))]
    bench.reread(MOVIE, [lacking(1)])
    assert bench.stopping.pauses  # it is another one


def test_the_snapshot_must_see_each_change(bench: Bench) -> None:
    """In the log, and not visible yet: a synchronous standby is slow."""
    blind = Snapshot(10, 33, frozenset({10, 21}))
    bench.reader.snapshots = [*[blind] * 500, Snapshot(10, 33, frozenset({10}))]
    bench.reread(MOVIE, [lacking(1, xid=20), lacking(2, xid=21)])
    assert bench.reader.reads == 501


def test_ids_in_the_log_have_32_bits(bench: Bench) -> None:
    """After four thousand million transactions: 21 is the newest, and a small number all the same."""
    era = 1 << 32
    bench.reader.samples = [Sample(5000, era + 30)]
    blind = Snapshot(era + 10, era + 20, frozenset({era + 10}))
    bench.reader.snapshots = [*[blind] * 500, Snapshot(era + 10, era + 33, frozenset({era + 10}))]
    bench.reread(MOVIE, [lacking(1, xid=21)])
    assert bench.reader.reads == 501


def test_samples_may_be_forgotten_while_rows_are_read(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(30, 30, frozenset())]
    bench.reader.while_reading = bench.samples.forget
    ((_, _, version),) = bench.reread(MOVIE, [lacking(1)])
    assert version == reread_version(EPOCH, 5000)


def test_a_source_that_does_not_answer_is_asked_again(bench: Bench) -> None:
    bench.reader.errors = [SourceBusy("it restarts"), SourceBusy("it restarts")]
    bench.reader.snapshots = [Snapshot(30, 30, frozenset())]
    assert len(bench.reread(MOVIE, [lacking(1)])) == 1
    assert bench.stopping.pauses == [rereads.RETRY_S] * 2


def test_stopping_ends_the_wait(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(10, 33, frozenset({10, 20}))]
    bench.stopping.stop_after = 3
    with pytest.raises(SourceBusy):
        bench.reread(MOVIE, [lacking(1)])


# ── ahead of the log ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_row_may_hold_beyond_its_claim_is_ahead(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(30, 30, frozenset())]
    bench.reread(MOVIE, [lacking(1), lacking(2)])
    ahead = bench.reread.ahead.by_table()[MOVIE]
    positions = [(4999, False), (5000, True), (SEEN_TO - 1, True), (SEEN_TO, False)]
    assert [ahead((1,), version_of(EPOCH, position)) for position, _ in positions] == [is_it for _, is_it in positions]
    assert ahead((2,), version_of(EPOCH, 5000))  # that it is gone may be ahead, too
    assert not ahead((3,), version_of(EPOCH, 5000))


def test_without_a_claim_all_that_follows_the_change_is_ahead(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(10, 33, frozenset({10}))]
    bench.reread(MOVIE, [lacking(1, 3000, 20), lacking(2, 4000, 21)])
    ahead = bench.reread.ahead.by_table()[MOVIE]
    for key, change in (((1,), version_of(EPOCH, 3000)), ((2,), version_of(EPOCH, 4000))):
        assert (ahead(key, change), ahead(key, change + 1)) == (False, True)


def test_a_row_that_was_left_out_is_not_ahead(bench: Bench) -> None:
    bench.reader.snapshots = [Snapshot(30, 30, frozenset())]
    bench.reader.leaves_out = True
    bench.reread(MOVIE, [lacking(1), lacking(2)])
    assert not bench.reread.ahead.by_table()[MOVIE]((2,), version_of(EPOCH, 5000))


def test_the_log_comes_past() -> None:
    noted = AheadOfLog()
    noted.note(MOVIE, (1,), Ahead(10, 20))
    noted.note(MOVIE, (2,), Ahead(10, 30))
    noted.passed(19)
    assert noted.by_table()[MOVIE]((1,), 10)
    noted.passed(20)
    assert not noted.by_table()[MOVIE]((1,), 10)
    assert noted.by_table()[MOVIE]((2,), 10)
    noted.passed(30)
    assert noted.by_table() == {}


def test_a_key_that_is_read_twice_is_ahead_since_the_first() -> None:
    """The second row may reach the sink after a change that it makes stale."""
    noted = AheadOfLog()
    noted.note(MOVIE, (1,), Ahead(10, 30))
    noted.note(MOVIE, (1,), Ahead(20, 40))
    ahead = noted.by_table()[MOVIE]
    assert [ahead((1,), position) for position in (9, 10, 39, 40)] == [False, True, True, False]


def test_too_many_keys_stand_for_all() -> None:
    noted = AheadOfLog(limit=2)
    for id_, stretch in enumerate([Ahead(30, 40), Ahead(10, 50), Ahead(20, 60)]):
        noted.note(MOVIE, (id_,), stretch)
    ahead = noted.by_table()[MOVIE]
    assert [ahead((77,), position) for position in (9, 10, 59, 60)] == [False, True, True, False]
    for id_ in range(3):
        noted.note(MOVIE, (id_,), Ahead(70, 80))
    ahead = noted.by_table()[MOVIE]
    assert [ahead((77,), position) for position in (9, 10, 79, 80)] == [False, True, True, False]
    noted.passed(80)
    assert noted.by_table() == {}
