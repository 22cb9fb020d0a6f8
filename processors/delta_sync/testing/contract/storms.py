"""Storms: writes of some keys, delivered by several threads, out of order and more than once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from delta_sync.changes import Key, Write
from delta_sync.sinks.base import Stored, Target
from delta_sync.testing.contract.scene import AnySink, Scene, scanned


class Storms(Scene):
    """All at once."""

    def test_any_order_any_batches_any_duplicates(self, sink: AnySink, target: Target) -> None:
        for seed in self.storm_seeds:
            storm(self, sink, target, seed)

    def test_any_order_with_a_truncate_between(self, sink: AnySink, target: Target) -> None:
        for seed in self.storm_seeds:
            storm(self, sink, target, seed, truncate=True)


class Storm(NamedTuple):
    """Writes of some keys, and how several threads deliver them: all of them, out of order, some more than once."""

    writes: list[Write]
    deliveries: list[list[list[Write]]]  # thread → batches
    floor: int  # 0: no truncate
    truncate_before: int  # which batch of the first thread

    def ends_with(self) -> dict[Key, Write]:
        """Return the newest write of each key that the floor lets in: what must be there when all is delivered."""
        newest: dict[Key, Write] = {}
        for write in sorted(self.writes, key=lambda write: write.version):
            if write.version >= self.floor:
                newest[write.key] = write
        return newest


def plan_storm(seed: int, size: int, *, threads: int = 4, keys: int = 25, truncate: bool = False) -> Storm:
    """Plan a storm. Same arguments, same storm."""
    rng = random.Random(seed)  # noqa: S311 -- reproducible, not secret
    versions = rng.sample(range(1, size * 3), size)
    writes = [
        Write((rng.randrange(keys),), version, None if rng.random() < 0.3 else {"v": version, "seed": seed})
        for version in versions
    ]
    deliveries: list[list[list[Write]]] = [[] for _ in range(threads)]
    floor = rng.choice(versions) if truncate else 0
    for write in writes:
        for thread in rng.sample(range(threads), min(threads, rng.choice((1, 2, 2, 3)))):
            deliveries[thread].append([write])
    batches = [_batched(rng, [write for batch in own for write in batch]) for own in deliveries]
    return Storm(writes, batches, floor, rng.randrange(len(batches[0]) // 2 + 1))


def _batched(rng: random.Random, writes: list[Write]) -> list[list[Write]]:
    """Shuffle the writes and cut them into batches of different sizes with at most one write per key."""
    rng.shuffle(writes)
    batches: list[list[Write]] = [[]]
    limit = rng.randrange(1, 30)
    for write in writes:
        if len(batches[-1]) >= limit or any(write.key == other.key for other in batches[-1]):
            batches.append([])
            limit = rng.randrange(1, 30)
        batches[-1].append(write)
    return batches


def storm(contract: Scene, sink: AnySink, target: Target, seed: int, *, truncate: bool = False) -> None:
    """Deliver a storm by several threads at once, watched by a reader, and compare what it ends in."""
    __tracebackhide__ = True
    sink.drop(target)
    sink.prepare(target)
    plan = plan_storm(seed, contract.storm_writes, truncate=truncate)
    keys = sorted({write.key for write in plan.writes})
    done = threading.Event()
    started = threading.Barrier(len(plan.deliveries) + 1)
    errors: list[BaseException] = []

    def thread(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                started.wait()
                work()
            except BaseException as error:  # noqa: BLE001 -- it is raised again below, on the test's own thread
                errors.append(error)

        return threading.Thread(target=run)

    def deliver(batches: list[list[Write]], truncate_before: int | None = None) -> None:
        for number, batch in enumerate(batches):
            if number == truncate_before:
                sink.truncate(target, plan.floor)
            outcomes = sink.apply(target, batch)
            assert {outcome.kind for outcome in outcomes} <= {"applied", "stale"}
            assert len(outcomes) == len(batch)

    def watch() -> None:
        seen: dict[Key, int] = {}
        while not done.is_set():
            for key, found in zip(keys, sink.read(target, keys), strict=True):
                version = 0 if found is None else found.version
                assert version >= seen.get(key, 0), f"seed {seed}: {key} went back from {seen[key]} to {version}"
                assert found is None or found.document is None or found.document["v"] in (version, str(version))
                seen[key] = version

    # One of the threads truncates, with half of its writes still to come: left to a thread of its own, it could always
    # be the last, and then a sink without a floor would pass.
    first, *others = plan.deliveries
    writers = [thread(partial(deliver, first, plan.truncate_before if truncate else None))]
    writers += [thread(partial(deliver, batches)) for batches in others]
    watches = contract.reads_never_go_back and not truncate
    reader = thread(watch if watches else lambda: None)
    for each in (*writers, reader):
        each.start()
    for each in writers:
        each.join()
    done.set()
    reader.join()
    if errors:
        raise AssertionError(f"seed {seed}: {errors[0]}") from errors[0]
    check_end(contract, sink, target, plan, f"seed {seed}")


def check_end(contract: Scene, sink: AnySink, target: Target, plan: Storm, where: str) -> None:
    """Compare a store at rest with what a storm must end in, through `read` and through `scan`."""
    keys = sorted({write.key for write in plan.writes})
    newest = plan.ends_with()
    wrong: list[str] = []
    for key, found in zip(keys, sink.read(target, keys), strict=True):
        write = newest.get(key)
        if write is None:
            right = found is None or found.document is None
        else:
            document = None if write.document is None else contract.stored_form(write.document)
            right = found == Stored(write.version, document)
        if not right:
            wrong.append(f"{key} should be {write} and is {found}")
    assert not wrong, f"{where}: {len(wrong)} keys are wrong: {'; '.join(wrong[:3])}"
    expected = {sink.id_of(target, key): write.version for key, write in newest.items() if write.document is not None}
    assert scanned(sink, target) == expected, where
