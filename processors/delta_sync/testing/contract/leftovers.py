"""What processes leave behind that die between two steps, and that `sweep` removes it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from delta_sync.changes import APPLIED, Write
from delta_sync.sinks.base import Target
from delta_sync.testing.contract.scene import AnySink, Scene, SecondStep, apply, scanned

OUTRANKED_BY: tuple[Literal["tombstone", "floor"], ...] = ("tombstone", "floor")


class Died(BaseException):
    """Ends `apply` where a killed process would: no sink catches it."""


class Leftovers(Scene):
    """Nothing that is too old stays for ever."""

    def die_in_a_late_upsert(self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"]) -> None:
        """Die in an upsert of row 1 at version 5, deleted (or truncated) at 6 after the upsert has begun.

        The process has written the document, and not looked yet whether it may stay. Nobody knows of it any more.
        """
        step = self.second_step
        if step is None:
            pytest.skip("this sink's `apply` has no second step to die before")
        if by not in step.outranked_by:
            pytest.skip(f"this sink's store does not even write what a {by} outranks")

        def overtake() -> None:
            if by == "tombstone":
                assert apply(sink, target, (1,), 6, None) == APPLIED
            else:
                sink.truncate(target, 6)

        with dying(sink, step, overtake), pytest.raises(Died):
            apply(sink, target, (1,), 5, {"n": 5})

    @pytest.mark.parametrize("by", OUTRANKED_BY)
    def test_a_process_that_dies_in_a_late_upsert_leaves_a_deleted_row_behind(
        self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"]
    ) -> None:
        """The flaw of two places without a transaction, for which `sweep` is there. Other writes do not remove it."""
        self.die_in_a_late_upsert(sink, target, by)
        apply(sink, target, (2,), 7, {"n": 7})
        apply(sink, target, (3,), 7, None)
        assert scanned(sink, target) == {sink.id_of(target, (1,)): 5, sink.id_of(target, (2,)): 7}

    @pytest.mark.parametrize("recent_s", [None, 3600.0])
    @pytest.mark.parametrize("by", OUTRANKED_BY)
    def test_sweep_removes_what_a_process_that_died_left_behind(
        self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"], recent_s: float | None
    ) -> None:
        self.die_in_a_late_upsert(sink, target, by)
        apply(sink, target, (2,), 7, {"n": 7})
        assert sink.sweep(target, recent_s) == 1
        assert scanned(sink, target) == {sink.id_of(target, (2,)): 7}
        assert sink.sweep(target, recent_s) == 0
        assert apply(sink, target, (1,), 5, {"n": 5}) == self.stale

    @pytest.mark.parametrize("by", OUTRANKED_BY)
    def test_the_same_write_again_removes_what_a_process_that_died_left_behind(
        self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"]
    ) -> None:
        self.die_in_a_late_upsert(sink, target, by)
        assert apply(sink, target, (1,), 5, {"n": 5}) == self.stale
        assert scanned(sink, target) == {}

    @pytest.mark.parametrize("recent_s", [None, 3600.0])
    def test_sweep_spares_whatever_is_not_older(self, sink: AnySink, target: Target, recent_s: float | None) -> None:
        """Rows that came back at the tombstone's version or later, are at the floor or above it, or are deleted."""
        sink.apply(target, [Write((n,), 6, None) for n in (1, 2, 3)])
        sink.truncate(target, 5)
        sink.apply(target, [Write((1,), 6, {"n": 1}), Write((2,), 7, {"n": 2}), Write((4,), 5, {"n": 4})])
        before = [sink.read(target, [(n,)]) for n in range(1, 5)]
        assert sink.sweep(target, recent_s) == 0
        assert [sink.read(target, [(n,)]) for n in range(1, 5)] == before
        assert scanned(sink, target) == {sink.id_of(target, (n,)): version for n, version in ((1, 6), (2, 7), (4, 5))}
        assert apply(sink, target, (3,), 5, {"n": 3}) == self.stale

    def test_sweep_of_nothing(self, sink: AnySink, target: Target) -> None:
        assert sink.sweep(target) == 0
        assert sink.sweep(target, 60.0) == 0


@contextmanager
def dying(sink: AnySink, step: SecondStep, overtake: Callable[[], object]) -> Generator[None, None, None]:
    """Let one `apply` of the sink raise Died in place of its second step.

    `overtake`, which may use the sink, is called just before documents are written: after the first look, if there is.
    """
    look = getattr(sink, step.method)
    looks: list[Any] = []

    def replacement(*args: Any) -> Any:
        if len(looks) == step.looks_first:
            raise Died
        looks.append(look(*args))
        delattr(sink, step.method)
        overtake()
        setattr(sink, step.method, replacement)
        return looks[0]

    if not step.looks_first:
        overtake()
    setattr(sink, step.method, replacement)  # hides the class's
    try:
        yield
    finally:
        delattr(sink, step.method)
