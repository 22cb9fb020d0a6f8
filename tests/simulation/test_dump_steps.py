"""Every interleaving of what can happen to a small dump: orders, two readers, kills, leases that expire.

A model of the dump's steps is searched exhaustively, with the decisions of `delta_sync.dumps` themselves; random walks
through it are then taken on the real store, which must answer as the model does at every step. What a model of the log
and the stores can show, and this one leaves out, is in `test_interleavings`.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from delta_sync.delta_event import decode_key
from delta_sync.dumps import ChunkCounts, ChunkLease, Dump, Order, State, in_turn, is_over, ordered, to_plan
from delta_sync.errors import LeaseLost, UsageError
from delta_sync.state import LONG_AGO, StateStore
from delta_sync.state_database import create_engine
from delta_sync.state_dumps import DumpStore
from delta_sync.state_tables import CHUNKS, METADATA

PLAN = ((0, 2), (2, 3))  # the ranges that are planned, one after the other; keys are 0, 1, 2
KEYS = PLAN[-1][1]
NOBODY, DEAD = -1, -2  # in place of a reader
WALKS = [int(os.environ["DELTA_TEST_SEED"])] if "DELTA_TEST_SEED" in os.environ else range(8)
WALK_STEPS = 50
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
FOR_EVER_S = 1e9

Phase = Literal["idle", "read", "handed", "applied"]
Action = tuple[str, int]


class Violation(AssertionError):
    """What must never be so."""


class Chunk(NamedTuple):
    """A range of keys that is not recorded yet. `holder` is the reader whose lease counts."""

    number: int
    first: int
    end: int
    holder: int = NOBODY
    expired: bool = False

    @property
    def free(self) -> bool:
        return self.holder == NOBODY or self.expired


class Reader(NamedTuple):
    """A reader, and the chunk that it believes to have."""

    phase: Phase = "idle"
    chunk: Chunk | None = None


class World(NamedTuple):
    """The dump as it is stored, what readers are at, and which keys the sink has."""

    state: State = "running"
    planned: int = 0
    numbers: int = 0
    chunks: tuple[Chunk, ...] = ()
    parallel: int | None = None
    readers: tuple[Reader, Reader] = (Reader(), Reader())
    recorded: tuple[int, ...] = (0,) * KEYS
    sink: tuple[int, ...] = (0,) * KEYS
    orders: int = 1  # how many may still be given, of those that are not taken back
    kills: int = 1

    @property
    def dump(self) -> Dump:
        """The dump as the decisions know it."""
        return _dump(self.state, self.parallel, self.planned == len(PLAN))

    @property
    def counts(self) -> ChunkCounts:
        free = sum(chunk.free for chunk in self.chunks)
        return ChunkCounts(free, len(self.chunks) - free)

    @property
    def over(self) -> bool:
        return self.state in ("done", "cancelled")


@cache
def _dump(state: State, parallel: int | None, planned: bool) -> Dump:
    return Dump(id=1, table="a.b", kind="table", state=state, parallel=parallel, covered_from=1, planned=planned)


class Rules(NamedTuple):
    """What the model does as Delta does; each can be broken, to see that it is noticed."""

    one_process: bool = False  # both readers are threads of one
    asks_before_hand_over: bool = True
    records_under_lease: bool = True
    gives_out_expired: bool = True
    waits_for_leased: bool = True
    cancel_drops_chunks: bool = True
    split_keeps_rest: bool = True


# ── what can happen ──────────────────────────────────────────────────────────────────────────────────────────────────


def actions(world: World) -> Iterator[Action]:
    """Yield what may happen next, by whomever."""
    if not world.over:
        yield from (("plan", 0), ("finish", 0), ("resume", 0))
        if world.orders:
            yield from (("pause", 0), ("cancel", 0), ("throttle", 0))
    for number in (0, 1):
        reader = world.readers[number]
        if reader.phase == "idle":
            yield "lease", number
        elif reader.phase == "read":
            yield from (("split", number), ("hand over", number))
        elif reader.phase == "handed":
            yield "apply", number
        else:
            yield "record", number
        yield "renew", number
        if world.kills:
            yield from (("kill", number), ("stop", number))
    for chunk in world.chunks:
        yield "expire", chunk.number


def step(world: World, action: Action, rules: Rules) -> World | None:
    """Return the world after an action; None: it cannot happen now. Raises Violation."""
    name, number = action
    match name:
        case "plan":
            if not to_plan(world.dump, world.counts):
                return None
            first, end = PLAN[world.planned]
            chunk = Chunk(world.numbers + 1, first, end)
            return world._replace(planned=world.planned + 1, numbers=world.numbers + 1, chunks=(*world.chunks, chunk))
        case "finish":
            counts = world.counts if rules.waits_for_leased else ChunkCounts(world.counts.free, 0)
            return world._replace(state="done", chunks=()) if is_over(world.dump, counts) else None
        case "pause" | "resume" | "cancel" | "throttle":
            return _order(world, name, rules)
        case "expire":
            chunk = _of(world, number)
            if chunk.holder == NOBODY or chunk.expired:
                return None
            return _with(world, chunk._replace(expired=True))
        case "renew":
            mine = (0, 1) if rules.one_process else (number,)
            chunks = tuple(chunk._replace(expired=False) if chunk.holder in mine else chunk for chunk in world.chunks)
            return world._replace(chunks=chunks) if chunks != world.chunks else None
        case "kill" | "stop":
            return _died(world, (0, 1) if rules.one_process else (number,), released=name == "stop")
        case _:
            return _read(world, name, number, rules)


def _order(world: World, order: Order, rules: Rules) -> World | None:
    try:
        state = ordered(order, world.dump)
    except UsageError:
        return None
    if state == world.state and order != "throttle":
        return None
    world = world._replace(state=state, orders=world.orders - (order != "resume"))
    if order == "throttle":
        return world._replace(parallel=1 if world.parallel is None else None)
    return world._replace(chunks=()) if order == "cancel" and rules.cancel_drops_chunks else world


def _died(world: World, numbers: tuple[int, ...], *, released: bool) -> World:
    """Processes end; what a sink was given by then may be there or not, which `apply` before this decides."""
    chunks = tuple(
        chunk._replace(holder=NOBODY if released else DEAD, expired=False if released else chunk.expired)
        if chunk.holder in numbers
        else chunk
        for chunk in world.chunks
    )
    zero, one = (Reader() if number in numbers else world.readers[number] for number in (0, 1))
    return world._replace(chunks=chunks, readers=(zero, one), kills=world.kills - 1)


def _read(world: World, name: str, number: int, rules: Rules) -> World | None:
    reader = world.readers[number]
    if name == "lease":
        free = [c for c in world.chunks if (c.free if rules.gives_out_expired else c.holder == NOBODY)]
        if not in_turn([world.dump], {1: world.counts}) or not free:
            return None
        leased = free[0]._replace(holder=number, expired=False)
        return _now(_with(world, leased), number, "read", leased)
    assert reader.chunk is not None, "it has one"
    chunk = reader.chunk
    mine = any(one.number == chunk.number and one.holder == number for one in world.chunks)
    match name:
        case "split":
            if chunk.end - chunk.first < 2:
                return None
            if not mine:
                return _now(world, number, "idle", None)
            part = chunk._replace(end=chunk.first + 1)
            stored = _of(world, chunk.number)._replace(end=part.end)
            rest = Chunk(world.numbers + 1, part.end, chunk.end)
            world = _with(world, stored)._replace(numbers=world.numbers + 1)
            if rules.split_keeps_rest:
                world = world._replace(chunks=(*world.chunks, rest))
            return _now(world, number, "read", part)
        case "hand over":
            if not mine and rules.asks_before_hand_over:
                return _now(world, number, "idle", None)
            if world.state == "cancelled":
                raise Violation("rows were handed over after it was said that the dump is cancelled")
            return _now(world, number, "handed", chunk)
        case "apply":
            sink = tuple(1 if chunk.first <= key < chunk.end else held for key, held in enumerate(world.sink))
            return _now(world._replace(sink=sink), number, "applied", chunk)
        case _:
            assert name == "record", name
            if mine or not rules.records_under_lease:
                recorded = tuple(times + (chunk.first <= key < chunk.end) for key, times in enumerate(world.recorded))
                chunks = tuple(one for one in world.chunks if one.number != chunk.number)
                world = world._replace(recorded=recorded, chunks=chunks)
            return _now(world, number, "idle", None)


def _of(world: World, number: int) -> Chunk:
    return next(chunk for chunk in world.chunks if chunk.number == number)


def _with(world: World, chunk: Chunk) -> World:
    return world._replace(chunks=tuple(chunk if one.number == chunk.number else one for one in world.chunks))


def _now(world: World, number: int, phase: Phase, chunk: Chunk | None) -> World:
    reader = Reader(phase, chunk)
    return world._replace(readers=(reader, world.readers[1]) if number == 0 else (world.readers[0], reader))


# ── what must be so ──────────────────────────────────────────────────────────────────────────────────────────────────


def check(world: World) -> None:
    """Raise Violation for a world that must not be."""
    if max(world.recorded) > 1:
        raise Violation("rows were recorded twice")
    if any(times and not held for times, held in zip(world.recorded, world.sink, strict=True)):
        raise Violation("rows were recorded that the sink lacks")
    if world.state == "done" and world.recorded != (1,) * KEYS:
        raise Violation("the dump is done, and rows are lost")
    if not world.over:
        left = [key for chunk in world.chunks for key in range(chunk.first, chunk.end)]
        planned = PLAN[world.planned - 1][1] if world.planned else 0
        if sorted([*left, *(key for key in range(KEYS) if world.recorded[key])]) != list(range(planned)):
            raise Violation("rows are in no chunk, or in two")


def mirrored(world: World) -> World:
    """Return the same world with the readers in a certain order: which of them is which makes no difference."""
    zero, one = world.readers
    if (zero.phase, zero.chunk or ()) <= (one.phase, one.chunk or ()):
        return world
    swapped = {0: 1, 1: 0}
    zero, one = (
        reader
        if reader.chunk is None
        else Reader(reader.phase, reader.chunk._replace(holder=swapped[reader.chunk.holder]))
        for reader in (one, zero)
    )
    chunks = tuple(chunk._replace(holder=swapped.get(chunk.holder, chunk.holder)) for chunk in world.chunks)
    return world._replace(readers=(zero, one), chunks=chunks)


HELPFUL = {"plan", "finish", "resume", "expire", "lease", "hand over", "apply", "record"}


def search(rules: Rules, start: World) -> int:
    """Look at every world that can come about; return how many there are. Raises Violation.

    From each the dump must be able to end, by nothing but what goes on by itself and a resumption.
    """
    worlds = [start]
    places = {start: 0}
    before: list[list[int]] = [[]]  # from which worlds one comes about, if it goes well
    ended: list[int] = []
    place = 0
    while place < len(worlds):
        world = worlds[place]
        check(world)
        if world.over:
            ended.append(place)
        # Of one that is done nobody has a chunk, so nothing can be recorded.
        for action in actions(world) if world.state != "done" else ():
            after = step(world, action, rules)
            if after is None:
                continue
            after = mirrored(after)
            found = places.setdefault(after, len(worlds))
            if found == len(worlds):
                worlds.append(after)
                before.append([])
            if action[0] in HELPFUL:
                before[found].append(place)
        place += 1
    ends = set(ended)
    while ended:
        more = [one for one in before[ended.pop()] if one not in ends]
        ends.update(more)
        ended += more
    if len(ends) < len(worlds):
        raise Violation("the dump never ends")
    return len(worlds)


@pytest.mark.parametrize(
    ("one_process", "starts"),
    [(False, [World()]), (True, [World(orders=1, kills=0), World(orders=0, kills=1)])],
    ids=["two processes", "two threads of one"],
)
def test_whatever_happens_no_row_is_lost_or_recorded_twice_and_the_dump_ends(
    one_process: bool, starts: list[World]
) -> None:
    worlds = [search(Rules(one_process=one_process), start) for start in starts]
    print(worlds, "worlds")
    assert min(worlds) > 5_000


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        (Rules(asks_before_hand_over=False), "after it was said that the dump is cancelled"),
        (Rules(records_under_lease=False), "recorded twice|in two"),
        (Rules(gives_out_expired=False), "never ends"),
        (Rules(waits_for_leased=False), "rows are lost"),
        (Rules(cancel_drops_chunks=False), "after it was said that the dump is cancelled"),
        (Rules(split_keeps_rest=False), "in no chunk"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_is_noticed(rules: Rules, what: str) -> None:
    with pytest.raises(Violation, match=what):
        search(rules, World(orders=int(rules.gives_out_expired)))


# ── the real store does as the model ─────────────────────────────────────────────────────────────────────────────────


class Real:
    """A dump in a real store, and what each reader has leased there."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._engine = create_engine(make_url("sqlite://"), 1.0)
        METADATA.create_all(self._engine)
        self._dumps = DumpStore(StateStore(self._engine, "memory", lambda: NOW), "movies")
        id_ = self._dumps.add(Dump(table="a.b", kind="table"))
        self.id = id_
        assert self._dumps.begin(dataclasses.replace(self.dump, epoch=1, fingerprint="f", covered_from=1))
        self._started = 0
        self._owners = [self._new_owner(), ""]
        self._owners[1] = self._owners[0] if rules.one_process else self._new_owner()
        self._leases: dict[int, ChunkLease] = {}

    def close(self) -> None:
        self._engine.dispose()

    def _new_owner(self) -> str:
        self._started += 1
        return f"process {self._started}"

    @property
    def dump(self) -> Dump:
        found = self._dumps.get(self.id)
        assert found is not None
        return found

    @property
    def counts(self) -> ChunkCounts:
        return self._dumps.counts().get(self.id, ChunkCounts())

    def chunks(self) -> list[tuple[int, int, int]]:
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(CHUNKS).order_by(CHUNKS.c.number)).all()
        ends = [(None if data is None else int(decode_key(data)[0]) for data in row[3:5]) for row in rows]
        return [
            (row.number, first or 0, KEYS if end is None else end) for row, (first, end) in zip(rows, ends, strict=True)
        ]

    def act(self, action: Action, world: World) -> bool:
        """Do it there, too; `world` is the one before. Return whether the store let it happen."""
        name, number = action
        match name:
            case "plan":
                if not to_plan(self.dump, self.counts):
                    return False
                first, end = PLAN[world.planned]
                self._dumps.plan(self.id, [((first,) if first else None, (end,) if end < KEYS else None)])
                return True
            case "finish":
                return is_over(self.dump, self.counts) and self._dumps.finish(self.dump) is not None
            case "pause" | "resume" | "cancel":
                try:
                    before = self.dump.state
                    return self._dumps.order(self.id, name).state != before
                except UsageError:
                    return False
            case "throttle":
                self._dumps.order(self.id, "throttle", parallel=1 if world.parallel is None else None)
                return True
            case "expire":
                mine = (CHUNKS.c.number == number, CHUNKS.c.owner != "", CHUNKS.c.expires_at > LONG_AGO)
                with self._engine.begin() as connection:
                    return bool(connection.execute(sa.update(CHUNKS).where(*mine).values(expires_at=LONG_AGO)).rowcount)
            case "renew":
                counts = self.counts
                self._dumps.renew(self._owners[number], FOR_EVER_S)
                return self.counts != counts
            case "kill" | "stop":
                if name == "stop":
                    self._dumps.release(self._owners[number])
                new = self._new_owner()
                self._owners = [new if owner == self._owners[number] else owner for owner in self._owners]
                return True
            case "lease":
                found = self._dumps.lease(self._owners[number], FOR_EVER_S, 10, lambda _: True)
                if found is not None:
                    self._leases[number] = found
                return found is not None
            case _:
                return self._read(name, number)

    def _read(self, name: str, number: int) -> bool:
        lease = self._leases[number]
        first = 0 if lease.after is None else int(lease.after[0])
        end = KEYS if lease.to is None else int(lease.to[0])
        try:
            match name:
                case "split":
                    if end - first < 2:
                        return False
                    self._leases[number] = self._dumps.split(lease, (first + 1,))
                case "hand over":
                    self._dumps.standing(lease)
                case "record":
                    self._dumps.finish_chunk(lease, end - first)
                case _:
                    assert name == "apply", name
        except LeaseLost:
            del self._leases[number]
        return True

    def compare(self, world: World) -> None:
        """Raise AssertionError unless the store is as the model."""
        dump = self.dump
        there = (dump.state, dump.planned, dump.parallel, dump.rows)
        assert there == (world.state, world.planned == len(PLAN), world.parallel, sum(world.recorded))
        assert self.chunks() == [chunk[:3] for chunk in world.chunks]
        assert self.counts == world.counts


def likely(action: Action) -> float:
    """Return how often an action is to be taken, so that walks go far before they end."""
    return {"cancel": 0.1, "kill": 0.5, "stop": 0.5, "pause": 0.5, "throttle": 0.5}.get(action[0], 2.0)


def test_the_store_does_as_the_model_whatever_the_order() -> None:
    taken: Counter[str] = Counter()
    for walk in WALKS:
        rng = random.Random(walk)
        rules = Rules(one_process=bool(walk % 2))
        real, world = Real(rules), World(orders=3, kills=2)
        for _ in range(WALK_STEPS):
            every = list(actions(world))
            possible = [action for action in every if step(world, action, rules) is not None]
            some = possible if possible and rng.random() < 0.8 else every  # what cannot be, the store refuses, too
            if not some:
                break
            (action,) = rng.choices(some, [likely(one) for one in some])
            after = step(world, action, rules)
            assert real.act(action, world) == (after is not None), (walk, action, world)
            world = after or world
            real.compare(world)
            taken[action[0]] += after is not None
        real.close()
    print(dict(taken))
    assert {"pause", "cancel", "throttle", "renew", "kill", "stop", "split"} | HELPFUL <= {
        name for name in taken if taken[name]
    }
