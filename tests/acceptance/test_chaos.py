"""Everything at once: random writers, random faults, readers that watch all the time; every row compared at the end.

`DELTA_CHAOS_S` is how long faults go on, `DELTA_CHAOS_SEED` repeats the choices of a run (not its timing, which no seed
can repeat), `DELTA_CHAOS_FAULTS` limits them to some kinds, by the beginnings of their names, separated by commas.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psycopg
import pytest

from acceptance.harness import SHAPES, Actor, Scene, Shape, Shop, Stores, all_sinks
from delta_sync.errors import SinkBusy, SinkRefused
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import Server
from delta_sync.versions import MAX_POSITION, position_of

DURATION_S = float(os.environ.get("DELTA_CHAOS_S", "15"))
SEED = int(os.environ.get("DELTA_CHAOS_SEED", str(random.SystemRandom().randrange(1_000_000))))
FAULTS = tuple(filter(None, os.environ.get("DELTA_CHAOS_FAULTS", "").split(",")))

WRITERS = 4
FIRST_ROWS = 1500  # in several chunks, so that faults meet the first load
HOT_KEYS = 40  # few, so that writers meet each other at them
TRANSACTIONS_PER_KEY = 4  # then the hot keys move on by one: what went wrong must stay, not be written over soon
SLOW_S = 1.0  # how long a slow transaction keeps its id: a claim has to wait for it
SLOW_CHANGES = 8  # which it makes before, and which a claim that is too high would forget
# Where some events lack a value and others do not: a row that was read by key may hold changes above its version. A
# worker knows that, and reads them by key as well, but the next one does not know what the last one had read.
MAY_SHOW_OLDER_ROWS = frozenset({"note"})
PAUSE_S = 0.02  # between two transactions of a writer, and two looks of a reader: the machine has other things to do


# ── writers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Refrain(Exception):
    """The writer changes its mind: the transaction is rolled back."""


class HotKeys:
    """Which keys (as numbers) are written at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transactions = 0

    def move(self) -> None:
        """Note a transaction."""
        with self._lock:
            self._transactions += 1

    @property
    def now(self) -> range:
        first = self._transactions // TRANSACTIONS_PER_KEY
        return range(first, first + HOT_KEYS)


class Writer(Actor):
    """Changes random rows until it is stopped; when the source is away, it tries again."""

    def __init__(self, shop: Shop, hot: HotKeys, number: int) -> None:
        super().__init__(f"writer-{number}")
        self._hot = hot
        self.done: Counter[str] = Counter()
        self._shop = shop
        self._random = random.Random(f"{SEED} writer {number}")
        self._texts = 0

    def act(self) -> None:
        while not self.stopping.is_set():
            try:
                with self._shop.connect() as connection:
                    while not self.stopping.wait(PAUSE_S):
                        self._write(connection)
            except psycopg.OperationalError:
                self.done["source away"] += 1
                self.stopping.wait(0.2)

    def _write(self, connection: psycopg.Connection) -> None:
        """One transaction. What others do to the same rows may make it fail, as in life."""
        choose = self._random.random()
        self._hot.move()
        try:
            with connection.transaction():
                if choose < 0.0015:
                    self._count("truncate")
                    connection.execute(f"TRUNCATE {self._random.choice(SHAPES).name}".encode())
                for _ in range(self._random.choice((1, 1, 1, 2, 3, 30 if choose > 0.97 else 5))):
                    self._change(connection)
                    if self._random.random() < 0.15:
                        self._savepoint(connection)
                if 0.1 < choose < 0.14:
                    self._count("slow")
                    for _ in range(SLOW_CHANGES):
                        self._change(connection)
                    self.stopping.wait(SLOW_S)
                if 0.2 < choose < 0.3:
                    raise Refrain
        except Refrain:
            self._count("rolled back")
        except (
            psycopg.errors.UniqueViolation,
            psycopg.errors.DeadlockDetected,
            psycopg.errors.LockNotAvailable,
        ) as error:
            self._count(type(error).__name__)

    def _savepoint(self, connection: psycopg.Connection) -> None:
        try:
            with connection.transaction():
                self._change(connection)
                if self._random.random() < 0.5:
                    raise Refrain
        except Refrain:
            self._count("rolled back to savepoint")

    def _change(self, connection: psycopg.Connection) -> None:
        shape, number = self._random.choice(SHAPES), self._random.choice(self._hot.now)
        self._texts += 1
        text = f"{self.name} {self._texts} "
        choose = self._random.random()
        if choose < 0.12:
            self._shop.delete(connection, shape, number)
            self._count("delete")
        elif choose < 0.2:
            with connection.transaction():  # a unique violation would spoil all of it
                self._shop.change_key(connection, shape, number, self._random.choice(self._hot.now))
            self._count("key change")
        elif self._shop.update(connection, shape, number, text, whole=choose < 0.5):
            self._count("update")
        else:
            self._shop.insert(connection, shape, number, text)
            self._count("insert")

    def _count(self, what: str) -> None:
        self.done[what] += 1


# ── readers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Seen(NamedTuple):
    """The newest that was seen of a key."""

    version: int
    rev: int


class Reader(Actor):
    """Looks at the hot keys in one sink all the time: nothing may go back, neither its version nor the row itself."""

    def __init__(self, stores: Stores, hot: HotKeys, sink: str, run_began_at: Callable[[], int]) -> None:
        super().__init__(f"reader-{sink}")
        self._hot = hot
        self.complaints: list[str] = []
        self.looks = self.advances = self.older_rows = 0
        self._stores = stores
        self._sink = sink
        self._run_began_at = run_began_at
        self._seen: dict[tuple[str, int], Seen] = {}
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Begin anew. A store that is killed may lose what it showed and had not acknowledged; that comes again."""
        with self._lock:
            self._seen.clear()

    def act(self) -> None:
        while not self.stopping.wait(PAUSE_S):
            numbers = range(max(0, self._hot.now.start - HOT_KEYS), self._hot.now.stop)  # the sinks are behind
            for shape in self._stores.shapes(self._sink):
                try:
                    with self._lock:
                        stored = self._stores.read(self._sink, shape, [shape.key(number) for number in numbers])
                        for number, one in zip(numbers, stored, strict=True):
                            if one is not None and one.document is not None:
                                self._look(shape, number, Seen(one.version, one.document["rev"]))
                except SinkBusy:
                    self.stopping.wait(0.2)
                except SinkRefused:  # no such index: right before the pipeline has made it, and never after
                    if any(name == shape.name for name, _ in self._seen):
                        raise

    def _look(self, shape: Shape, number: int, now: Seen) -> None:
        """Compare a document with what was there before, also with what was there before the row was deleted."""
        self.looks += 1
        before = self._seen.get((shape.name, number), Seen(0, 0))
        older_row = now.rev < before.rev
        self.older_rows += older_row
        if now.version < before.version or (older_row and not self._excused(shape, now.version)):
            self.complaints.append(f"{self._sink} {shape.name} {shape.key(number)} went from {before} to {now}")
        self.advances += now.version > before.version
        self._seen[shape.name, number] = now

    def _excused(self, shape: Shape, version: int) -> bool:
        return shape.name in MAY_SHOW_OLDER_ROWS and position_of(version) < self._run_began_at()


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Fault(NamedTuple):
    """Something that goes wrong, and how it is put right; `heal` is called after some time."""

    name: str
    hit: Callable[[], None]
    heal: Callable[[], None]


class Runs:
    """The one run of the pipeline that there is at any time."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._began_at: int | None = 0
        self.run = scene.run()

    def began_at(self) -> int:
        """Return how far the log was when the run began, or later: the source may have been away then."""
        if self._began_at is None:
            with contextlib.suppress(psycopg.OperationalError):
                self._began_at = self._scene.shop.insert_lsn()
        return MAX_POSITION if self._began_at is None else self._began_at

    def kill(self) -> None:
        self.run.kill()

    def stop(self) -> None:
        came_up = bool(self.run.events())  # before, there was nobody to take the signal
        status = self.run.stop()
        assert status == 0 or not came_up, f"SIGTERM: exit status {status}; {self.run.tail()}"

    def start(self) -> None:
        self._began_at = None
        self.run = self._scene.run()

    def kill_capture(self) -> None:
        pid = self.run.capture_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def _nothing() -> None:
    """What heals by itself."""


def _faults(
    runs: Runs, source: Server, servers: dict[str, Server], forget: dict[str, Callable[[], None]]
) -> list[Fault]:
    faults = [
        Fault("worker killed", runs.kill, runs.start),
        Fault("worker stopped", runs.stop, runs.start),
        Fault("worker frozen", lambda: runs.run.freeze(), lambda: runs.run.thaw()),
        Fault("capture killed", runs.kill_capture, _nothing),
        Fault("source killed", source.kill, source.start),
        Fault("source frozen", source.freeze, source.thaw),
    ]
    for name, server in servers.items():

        def again(name: str = name, server: Server = server) -> None:
            forget[name]()
            server.start()

        faults.append(Fault(f"{name} killed", server.kill, again))
        if name == "cache":  # the others' clients wait for a minute, which is right, but too long here
            faults.append(Fault(f"{name} frozen", server.freeze, server.thaw))
    return [fault for fault in faults if not FAULTS or fault.name.startswith(FAULTS)]


@pytest.mark.timeout(DURATION_S + 600)
def test_chaos(scene: Callable[..., Scene], request: pytest.FixtureRequest) -> None:
    print(f"DELTA_CHAOS_SEED={SEED} DELTA_CHAOS_S={DURATION_S}")
    sinks = all_sinks()
    it = scene(FIRST_ROWS, sinks, load={"chunk_rows": 200})
    fixtures = {"cache": "redis_server", "docs": "mongodb", "search": "opensearch"}
    servers: dict[str, Server] = {sink: request.getfixturevalue(fixtures[sink]) for sink in sinks}
    source: Server = request.getfixturevalue("postgresql")
    hot = HotKeys()
    writers = [Writer(it.shop, hot, number) for number in range(WRITERS)]
    runs = Runs(it)
    readers = {sink: Reader(it.new_stores(), hot, sink, runs.began_at) for sink in sinks}
    began = time.monotonic()
    actors: list[Actor] = [*writers, *readers.values()]
    for actor in actors:
        actor.start()
    try:
        _do_harm(_faults(runs, source, servers, {sink: reader.forget for sink, reader in readers.items()}), runs, began)
        for writer in writers:
            writer.stopping.set()
        for writer in writers:
            writer.join()
        print(f"{time.monotonic() - began:.1f} s: writers stopped")
        it.pipeline.wait_until_confirmed(it.shop.insert_lsn(), runs.run)
        print(f"{time.monotonic() - began:.1f} s: confirmed")
    finally:
        for actor in actors:
            actor.stopping.set()
        for server in (source, *servers.values()):
            server.start()  # whatever failed, or nobody below would come to an end
        for actor in actors:
            actor.join()
    for actor in actors:
        actor.stop()
    done = sum((writer.done for writer in writers), Counter[str]())
    print(f"writers: {dict(done)}")
    for sink, reader in readers.items():
        print(f"{sink}: {reader.looks} looks, {reader.advances} news, {reader.older_rows} older rows")
    _must_have_happened(done, [reader.advances for reader in readers.values()])
    differences = it.stores.differences()
    complaints = [complaint for reader in readers.values() for complaint in reader.complaints]
    assert (differences[:20], complaints[:20]) == ([], []), f"{len(differences)} differ, {len(complaints)} went back"
    assert it.pipeline.dead_letters() == []
    assert runs.run.stop() == 0


def _do_harm(faults: Sequence[Fault], runs: Runs, began: float) -> None:
    """Let things go wrong, one after the other, now and then two at once, until the time is up; then all is healed."""
    rng = random.Random(f"{SEED} faults")
    pause = threading.Event()  # never set: only its timeout is wanted, as faults come at random moments
    last: list[Fault] = []
    while time.monotonic() - began < DURATION_S:
        pause.wait(rng.uniform(0.2, 4.0))
        # Those of the worker and its capture stand alone: what is dead cannot die, and a new run must find a source.
        fault = rng.choice([fault for fault in faults if fault not in last] or list(faults))
        several = [fault]
        if rng.random() < 0.25 and not fault.name.startswith(("worker", "capture")):
            several.append(rng.choice([other for other in faults if other.name.split()[0] != fault.name.split()[0]]))
        print(f"{time.monotonic() - began:.1f} s: {' and '.join(fault.name for fault in several)}")
        for fault in several:
            fault.hit()
        pause.wait(rng.uniform(0.1, 2.5))
        for fault in reversed(several):
            fault.heal()
        last = several
        wait_until(lambda: runs.run.running, 5.0, "a run that goes on")


def _must_have_happened(done: Counter[str], advances: Sequence[int]) -> None:
    """A chaos in which nothing happened shows nothing."""
    for what in ("insert", "update", "delete", "key change", "rolled back", "rolled back to savepoint"):
        assert done[what] > 0, f"no {what} was done"
    assert all(advances), "a reader saw nothing change"
