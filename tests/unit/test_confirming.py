"""Confirming: what must be saved is saved first, and nothing that fails meanwhile is confirmed."""

from __future__ import annotations

import pytest

from delta_sync.capture import Batch, CaptureDied
from delta_sync.confirming import PAUSE_S, RecordingCapture
from delta_sync.errors import SourceBusy, StateBusy


class Recorded:
    """A capture, its source and its state store, as a list of what was asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.generation = 0
        self.pid = None
        self.sequence = 0
        self.now = 0.0
        self.fails: Exception | None = None
        self.delivers = True
        self.capture = RecordingCapture(self, self.record, lambda: self.calls.append("close"), self.clock)

    def clock(self) -> float:
        return self.now

    def record(self, batch: Batch) -> None:
        if self.fails is not None:
            raise self.fails
        self.calls.append(f"record {batch.generation}.{batch.sequence}")

    def start(self) -> None:
        self.generation += 1
        self.sequence = 0

    def poll(self, timeout_s: float) -> Batch | None:
        if not self.delivers:
            self.now += timeout_s
            return None
        self.sequence += 1
        return Batch(self.generation, self.sequence, 1, None)

    def confirm(self, batch: Batch) -> None:
        self.calls.append(f"confirm {batch.generation}.{batch.sequence}")

    def reconfigure(self) -> None:
        self.calls.append("reconfigure")

    def stop(self) -> None:
        self.calls.append("stop")

    def deliver(self) -> Batch:
        batch = self.capture.poll(1.0)
        assert batch is not None
        return batch


def started() -> Recorded:
    it = Recorded()
    it.capture.start()
    return it


def test_what_is_recorded_is_so_before_the_confirmation() -> None:
    it = started()
    it.capture.confirm(it.deliver())
    assert it.calls == []
    it.deliver()
    assert it.calls == ["record 1.1", "confirm 1.1"]


def test_confirmations_are_joined() -> None:
    it = started()
    for _ in range(5):
        it.capture.confirm(it.deliver())
    assert it.calls == ["record 1.1", "confirm 1.1"]
    it.now += PAUSE_S
    it.deliver()
    assert it.calls[2:] == ["record 1.5", "confirm 1.5"]


def test_one_that_comes_while_nothing_is_delivered_does_not_wait_for_the_poll_to_end() -> None:
    it = started()
    batch = it.deliver()
    it.now += PAUSE_S
    it.delivers = False
    inner = it.poll

    def poll(timeout_s: float) -> Batch | None:
        it.capture.confirm(batch)
        return inner(timeout_s)

    it.poll = poll  # type: ignore[method-assign]  # the worker, which confirms while the capture waits
    it.capture.poll(0.5)
    assert "confirm 1.1" in it.calls


def test_what_cannot_be_recorded_is_not_confirmed_until_it_can() -> None:
    it = started()
    it.capture.confirm(it.deliver())
    for error in (StateBusy("locked"), SourceBusy("away")):
        it.fails = error
        it.now += PAUSE_S
        it.deliver()
    assert it.calls == []
    it.fails = None
    it.now += PAUSE_S
    it.deliver()
    assert it.calls == ["record 1.1", "confirm 1.1"]


def test_what_an_earlier_start_delivered_is_not_confirmed() -> None:
    it = started()
    it.capture.confirm(it.deliver())
    it.capture.start()
    it.deliver()
    assert it.calls == []


def test_the_end_confirms_what_is_left() -> None:
    it = started()
    it.capture.confirm(it.deliver())
    it.capture.stop()
    assert it.calls == ["record 1.1", "confirm 1.1", "stop", "close"]


def test_a_capture_that_has_to_start_anew_is_not_waited_for() -> None:
    """And at the end it is no reason to leave it running: what it delivered comes again."""
    it = started()
    it.capture.confirm(it.deliver())
    it.fails = CaptureDied("its history is gone")
    with pytest.raises(CaptureDied, match="its history is gone"):
        it.deliver()
    it.capture.confirm(Batch(1, 1, 1, None))
    it.capture.stop()
    assert it.calls == ["stop", "close"]
