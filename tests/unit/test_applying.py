"""Applying: a sink is asked until it acknowledges, and says why it does not; what it refuses is raised."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import pytest
from structlog.testing import capture_logs

from delta_sync.applying import THREADS, Applied, Part, SinkWriter
from delta_sync.changes import APPLIED, STALE, Change, Outcome, Write
from delta_sync.errors import SinkBusy, SinkRefused
from delta_sync.sinks.base import Target
from delta_sync.sinks.memory import MemorySink, MemoryTargetOptions
from delta_sync.tables import Column, Kind, Table

TABLE = Table("public", "movie", (Column("id", "integer", Kind.INTEGER),), ("id",))
TIMEOUT_S = 60.0


class Stopping(threading.Event):
    """Notes pauses instead of making them; `during` is called in each."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.pauses: list[float] = []
        self.stop_after = stop_after
        self.seen: list[str | None] = []
        self.writer: SinkWriter | None = None

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert len(self.pauses) < 1000, "it would never end"
        self.pauses.append(timeout)
        self.seen.append(self.writer.numbers.busy if self.writer is not None else None)
        if self.stop_after is not None and len(self.pauses) >= self.stop_after:
            self.set()
        return self.is_set()


class Scripted(MemorySink):
    """Raises what it is told to, call by call, and then works. `calls` are the methods called."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__("cache")
        self.errors = list(errors)
        self.calls: list[str] = []

    def _next(self, call: str) -> None:
        self.calls.append(call)
        if self.errors:
            raise self.errors.pop(0)

    def prepare(self, target: Target) -> None:
        self._next("prepare")

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        self._next("apply")
        return super().apply(target, writes)

    def truncate(self, target: Target, version: int) -> int:
        self._next("truncate")
        return super().truncate(target, version)

    def close(self) -> None:
        self.calls.append("close")


@contextmanager
def writing(sink: MemorySink, stopping: Stopping | None = None) -> Generator[SinkWriter]:
    stopping = stopping or Stopping()
    writer = SinkWriter(sink, stopping)
    stopping.writer = writer
    try:
        yield writer
    finally:
        writer.close()


def part(sink: MemorySink, *writes: Write, truncate: int | None = None) -> Part:
    changes = [Change(TABLE.id, write.key, write.version, write.document) for write in writes]
    return Part(sink.target(TABLE, MemoryTargetOptions()), writes, changes, truncate)


def write(id_: int, version: int = 10) -> Write:
    return Write((id_,), version, {"id": id_})


def test_outcomes_come_back_with_their_part_and_sink() -> None:
    sink = Scripted()
    with writing(sink) as writer:
        first, second = part(sink, write(1), write(2)), part(sink, write(1, 5))
        found = writer.submit([first, second]).result(TIMEOUT_S)
    assert found == [Applied("cache", first, [APPLIED, APPLIED]), Applied("cache", second, [STALE])]
    numbers = writer.numbers
    assert (numbers.applied, numbers.stale, numbers.rejected, numbers.retries, numbers.busy) == (2, 1, 0, 0, None)
    assert sink.calls == ["apply", "apply", "close"]


def test_a_rejected_write_is_an_outcome() -> None:
    sink = Scripted()
    with writing(sink) as writer:
        ((_, _, outcomes),) = writer.submit([part(sink, Write((1,), 1, {"_version": 1}), write(2))]).result(TIMEOUT_S)
    assert [outcome.kind for outcome in outcomes] == ["rejected", "applied"]
    assert (writer.numbers.applied, writer.numbers.rejected) == (1, 1)


def test_a_truncate_goes_before_the_writes_behind_it() -> None:
    sink = Scripted()
    with writing(sink) as writer:
        writer.submit([part(sink, write(1, 10), write(2, 10))]).result(TIMEOUT_S)
        given = part(sink, write(1, 30), truncate=20)
        assert writer.submit([given]).result(TIMEOUT_S) == [Applied("cache", given, [APPLIED])]
    assert sink.calls == ["apply", "truncate", "apply", "close"]
    assert sink.documents(given.target) == {"1": {"id": 1}}


def test_a_truncate_alone() -> None:
    sink = Scripted()
    with writing(sink) as writer:
        given = part(sink, truncate=20)
        assert writer.submit([given]).result(TIMEOUT_S) == [Applied("cache", given, [])]
    assert sink.calls == ["truncate", "close"]


def test_a_busy_sink_is_asked_again_and_it_is_said_once() -> None:
    sink = Scripted(SinkBusy("it loads its data"), SinkBusy("it loads its data"), SinkBusy("not primary"))
    stopping = Stopping()
    with capture_logs() as logs, writing(sink, stopping) as writer:
        ((_, _, outcomes),) = writer.submit([part(sink, write(1))]).result(TIMEOUT_S)
    assert outcomes == [APPLIED]
    assert sink.calls == ["apply"] * 4 + ["close"]
    assert [(each["event"], each["sink"]) for each in logs] == [("sink_busy", "cache"), ("sink_recovered", "cache")]
    assert logs[0]["reason"] == "it loads its data"
    assert stopping.seen == ["it loads its data", "it loads its data", "not primary"]  # what the status shows
    assert (writer.numbers.retries, writer.numbers.busy, writer.numbers.applied) == (3, None, 1)


@pytest.mark.parametrize("call", ["truncate", "prepare"])
def test_other_calls_are_repeated_too(call: str) -> None:
    sink = Scripted(SinkBusy("later"))
    with writing(sink) as writer:
        if call == "truncate":
            writer.submit([part(sink, truncate=5)]).result(TIMEOUT_S)
        else:
            writer.prepare([part(sink).target])
    assert sink.calls == [call, call, "close"]


def test_a_sink_may_say_how_long_to_wait() -> None:
    sink, stopping = Scripted(SinkBusy("slow down", retry_after_s=7.0)), Stopping()
    with writing(sink, stopping) as writer:
        writer.submit([part(sink, write(1))]).result(TIMEOUT_S)
    assert stopping.pauses == [7.0]


def test_pauses_are_bounded() -> None:
    sink, stopping = Scripted(*[SinkBusy("down")] * 50), Stopping()
    with writing(sink, stopping) as writer:
        writer.submit([part(sink, write(1))]).result(TIMEOUT_S)
    assert len(stopping.pauses) == 50
    assert all(0 <= pause <= 15 for pause in stopping.pauses)
    assert stopping.pauses[0] <= 0.2


def test_stopping_ends_the_retries_and_nothing_counts_as_applied() -> None:
    sink = Scripted(*[SinkBusy("down")] * 50)
    with writing(sink, Stopping(stop_after=2)) as writer:
        with pytest.raises(SinkBusy, match="down"):
            writer.submit([part(sink, write(1))]).result(TIMEOUT_S)
        assert writer.numbers.applied == 0
        assert writer.numbers.busy == "down"


@pytest.mark.parametrize("error", [SinkRefused("wrong password"), ZeroDivisionError("a defect")], ids=repr)
def test_what_will_not_pass_is_raised_at_once(error: Exception) -> None:
    sink, stopping = Scripted(error), Stopping()
    with writing(sink, stopping) as writer, pytest.raises(type(error)):
        writer.submit([part(sink, write(1))]).result(TIMEOUT_S)
    assert sink.calls == ["apply", "close"]
    assert stopping.pauses == []


def test_a_reason_with_a_secret_is_redacted() -> None:
    sink = Scripted(SinkBusy("cannot reach redis://user:hunter2@cache/0"))
    stopping = Stopping()
    with capture_logs() as logs, writing(sink, stopping) as writer:
        writer.submit([part(sink, write(1))]).result(TIMEOUT_S)
    assert "hunter2" not in repr(logs) + repr(stopping.seen)
    assert "cannot reach redis://user:***@cache/0" in repr(stopping.seen)


def test_a_sink_that_forgets_an_outcome_is_a_defect() -> None:
    class Forgetful(MemorySink):
        def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
            return super().apply(target, writes)[1:]

    sink = Forgetful()
    with writing(sink) as writer, pytest.raises(AssertionError, match="returned 1 outcomes"):
        writer.submit([part(sink, write(1), write(2))]).result(TIMEOUT_S)


def test_two_batches_are_on_their_way_at_once() -> None:
    """Both are at the barrier, or none gets past it."""
    barrier = threading.Barrier(2)

    class Slow(MemorySink):
        def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
            barrier.wait(TIMEOUT_S)
            return super().apply(target, writes)

    sink = Slow()
    with writing(sink) as writer:
        futures = [writer.submit([part(sink, write(id_))]) for id_ in (1, 2)]
        assert [future.result(TIMEOUT_S)[0].outcomes for future in futures] == [[APPLIED], [APPLIED]]


def test_changes_do_not_wait_behind_dumps() -> None:
    """Whatever a dump has handed over stands still in the sink; a change gets through."""
    passed = threading.Event()
    under_way = threading.Semaphore(0)

    class Slow(MemorySink):
        def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
            if writes[0].key != (1,):
                under_way.release()
                assert passed.wait(TIMEOUT_S)
            return super().apply(target, writes)

    sink = Slow()
    with writing(sink) as writer:
        of_dump = [writer.submit([part(sink, write(id_))], of_dump=True) for id_ in range(10, 10 + 2 * THREADS)]
        for _ in range(THREADS):
            assert under_way.acquire(timeout=TIMEOUT_S)
        try:
            assert writer.submit([part(sink, write(1))]).result(TIMEOUT_S)[0].outcomes == [APPLIED]
        finally:
            passed.set()
        assert all(future.result(TIMEOUT_S)[0].outcomes == [APPLIED] for future in of_dump)
