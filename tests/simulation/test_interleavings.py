"""Thousands of random histories of source, worker, load, replays and crashes: whatever the order, the store is right.

`DELTA_TEST_SEED=17` runs the history of one seed, which a failure names; `DELTA_TEST_HISTORIES=100000` runs more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest

from delta_sync.changes import Write
from delta_sync.sinks.memory import Entry, MemorySink
from simulation.stores import AtomicStore, Steps, Store, TwoStepStore
from simulation.world import ITEM, Faults, Violation, World

HISTORIES = int(os.environ.get("DELTA_TEST_HISTORIES", "600"))
SEEDS = [int(os.environ["DELTA_TEST_SEED"])] if "DELTA_TEST_SEED" in os.environ else range(HISTORIES)
STEPS = 400
NOTICED_WITHIN = 5000  # histories; most faults need a handful, the rarest some hundreds

CORRECT: dict[str, Callable[[], Store]] = {"atomic": lambda: AtomicStore(ITEM), "two steps": TwoStepStore}


@pytest.mark.parametrize("toast", [False, True], ids=["whole rows", "rows read by key"])
@pytest.mark.parametrize("store", CORRECT)
def test_every_history_ends_well(store: str, toast: bool) -> None:
    for seed in SEEDS:
        World(seed, CORRECT[store], Faults(), toast=toast).run(STEPS)


# ── it can fail ──────────────────────────────────────────────────────────────────────────────────────────────────


class WithoutVersions(MemorySink):
    """Whoever comes last is right."""

    def _beats(self, version: int, stored: Entry | None, floor: int) -> bool:
        return True


class WithoutFloor(MemorySink):
    """A truncate deletes what is there, and what comes later comes in."""

    def _beats(self, version: int, stored: Entry | None, floor: int) -> bool:
        return super()._beats(version, stored, 0)


class WithoutTombstones(MemorySink):
    """A delete's version is not kept."""

    def _beats(self, version: int, stored: Entry | None, floor: int) -> bool:
        return super()._beats(version, stored if stored is not None and stored.body is not None else None, floor)


class TwoStepWithoutVersions(TwoStepStore):
    def _beats(self, write: Write, stored: Write | None) -> bool:
        return True


class TwoStepWithoutFloor(TwoStepStore):
    def _raise_floor(self, version: int) -> Steps:
        yield


class TwoStepWithoutTombstones(TwoStepStore):
    def _record_delete(self, write: Write) -> Steps:
        yield


class TwoStepThatObeysNothing(TwoStepStore):
    """An upsert does not look at tombstones."""

    def _obey_tombstones(self, written: Sequence[Write]) -> Steps:
        yield


class TwoStepWithoutSweep(TwoStepStore):
    """What a process leaves that died between the two steps stays."""

    def sweep(self) -> Steps:
        yield


class TombstonesFirst(TwoStepStore):
    """An upsert looks at tombstones before it writes, as one would do it first."""

    def apply(self, writes: Sequence[Write]) -> Steps:
        allowed = [write for write in writes if write.version >= self._least(write.key[0])]
        yield
        yield from super().apply(allowed)

    def _obey_tombstones(self, written: Sequence[Write]) -> Steps:
        yield


class TombstoneLast(TwoStepStore):
    """A delete removes the document first and records the tombstone then."""

    def apply(self, writes: Sequence[Write]) -> Steps:
        yield from super().apply(writes)
        for write in writes:
            if write.document is None:
                yield from super()._record_delete(write)

    def _record_delete(self, write: Write) -> Steps:
        yield


class FloorLast(TwoStepStore):
    """A truncate deletes first and records the floor then."""

    def truncate(self, version: int) -> Steps:
        for key in [key for key, stored in self.documents.items() if stored.version < version]:
            stored = self.documents.get(key)
            if stored is not None and stored.version < version:
                del self.documents[key]
            yield
        self.floor = max(self.floor, version)
        yield


STORES_AT_FAULT: dict[str, Callable[[], Store]] = {
    "no versions": lambda: AtomicStore(ITEM, WithoutVersions()),
    "no floor": lambda: AtomicStore(ITEM, WithoutFloor()),
    "no tombstones": lambda: AtomicStore(ITEM, WithoutTombstones()),
    "two steps: no versions": TwoStepWithoutVersions,
    "two steps: no floor": TwoStepWithoutFloor,
    "two steps: no tombstones": TwoStepWithoutTombstones,
    "two steps: an upsert does not obey": TwoStepThatObeysNothing,
    "two steps: never swept": TwoStepWithoutSweep,
    "two steps: an upsert looks first": TombstonesFirst,
    "two steps: a delete records last": TombstoneLast,
    "two steps: a truncate records last": FloorLast,
}
FAULTS = {
    "confirmed before applied": Faults(confirm_before_apply=True),
    "claim: position before the snapshot": Faults(claim_position_before_snapshot=True),
    "claim: without locks": Faults(claim_without_locks=True),
    "claim: before the log covers the table": Faults(claim_before_coverage=True),
    "load: handed over before the log has passed": Faults(hand_over_before_log=True),
    "load: recorded before it is written": Faults(record_before_written=True),
    "read by key: whatever is visible": Faults(read_by_key_whatever_is_visible=True),
    "read by key: then the log's own rows": Faults(forget_what_was_read_ahead=True),
    "read by key: twice at once": Faults(read_again_beside_the_first=True),
}
# Where the first history is that notices the rarest ones; those before it take a minute.
NOTICED_FROM = {
    "load: handed over before the log has passed": 840,
    "read by key: then the log's own rows": 1030,
    "read by key: twice at once": 2751,
}


def notice(make_store: Callable[[], Store], faults: Faults, first: int = 0) -> str:
    """Return the first violation. Fails when there is none."""
    toast = any(faults == FAULTS[name] for name in FAULTS if name.startswith("read by key"))
    for seed in range(first, first + NOTICED_WITHIN):
        try:
            World(seed, make_store, faults, toast=toast).run(STEPS)
        except Violation as violation:
            return str(violation)
    pytest.fail(f"nothing was noticed in {NOTICED_WITHIN} histories")


@pytest.mark.parametrize("fault", STORES_AT_FAULT)
def test_a_store_at_fault_is_noticed(fault: str) -> None:
    notice(STORES_AT_FAULT[fault], Faults())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_at_fault_is_noticed(fault: str) -> None:
    notice(CORRECT["atomic"], FAULTS[fault], NOTICED_FROM.get(fault, 0))


def test_a_violation_names_its_seed_which_repeats_it() -> None:
    violation = notice(STORES_AT_FAULT["no versions"], Faults())
    seed = int(violation.split(":")[0].removeprefix("seed "))
    with pytest.raises(Violation) as again:
        World(seed, STORES_AT_FAULT["no versions"], Faults()).run(STEPS)
    assert str(again.value) == violation
