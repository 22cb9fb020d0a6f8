"""The simulation: a source, a store, and processes that run Delta's own decoding, processing and claims between them.

A process follows `worker.py` and `load.py`, but as generators that take one step at a time, so that anything may come
between any two operations, and a crash, too. One seed decides everything.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import cast

import orjson

from delta_sync.changes import Change, Key
from delta_sync.decoding import Decoded, Stretch, decode
from delta_sync.delta_event import DeltaEvent, Origin, decode_event, encode_event
from delta_sync.pipeline import Pipeline
from delta_sync.processing import Failure, process
from delta_sync.rereads import Rereader
from delta_sync.samples import SharedSamples
from delta_sync.sources.postgresql.claims import Sample, Samples, Snapshot
from delta_sync.sources.postgresql.codec import table_codec
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.sources.reader import Chunk
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Document
from delta_sync.versions import dump_version, version_of
from simulation.source import HEARTBEAT_PREFIX, Row, Sampling, Source, payload
from simulation.stores import Steps, Store

KEYS = 8
EPOCH = 3
CHUNK_ROWS = 3
READERS = 2  # of a process
JOBS_MOST = 4
DRAIN_STEPS_MOST = 20_000  # a hundred times what it takes: beyond, something waits for ever

ITEM = Table(
    "public",
    "item",
    (
        Column("id", "integer", Kind.INTEGER),
        Column("rev", "bigint", Kind.INTEGER),
        Column("name", "text", Kind.TEXT, may_be_absent=True),
    ),
    ("id",),
)
AT = dt.datetime(2024, 2, 29, tzinfo=dt.UTC)


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Faults:
    """Mistakes that Delta does not make. The simulation must notice each."""

    confirm_before_apply: bool = False
    claim_position_before_snapshot: bool = False
    claim_without_locks: bool = False
    claim_before_coverage: bool = False
    hand_over_before_log: bool = False
    record_before_written: bool = False
    read_by_key_whatever_is_visible: bool = False
    forget_what_was_read_ahead: bool = False
    read_again_beside_the_first: bool = False


@dataclass
class LoadChunk:
    """What the state store keeps of a chunk. `token` rises whenever it is given out; `free` says that it may be."""

    after: int
    to: int | None
    token: int = 0
    free: bool = True


@dataclass
class Load:
    """What the state store keeps of a load, or of another dump of the whole table."""

    covered_from: int | None = None
    planned_to: int = -1
    planned: bool = False
    chunks: dict[int, LoadChunk] = field(default_factory=dict[int, "LoadChunk"])
    numbers: int = 0

    @property
    def done(self) -> bool:
        return self.planned and not self.chunks

    def add(self, after: int, to: int | None) -> None:
        self.numbers += 1
        self.chunks[self.numbers] = LoadChunk(after, to)

    def lease(self) -> tuple[int, LoadChunk] | None:
        """Give a chunk to whoever asks; return its number, and how it is now."""
        for number, chunk in self.chunks.items():
            if chunk.free:
                chunk.free, chunk.token = False, chunk.token + 1
                return number, dataclasses.replace(chunk)
        return None

    def holds(self, number: int, leased: LoadChunk) -> bool:
        """Whether nobody else was given the chunk since."""
        return number in self.chunks and self.chunks[number].token == leased.token

    def expire(self) -> None:
        """Let all leases end: those who have them do not notice."""
        for chunk in self.chunks.values():
            chunk.free = True


@dataclass
class Job:
    """Writes on their way to the store."""

    steps: Steps
    letters: list[bytes]
    end: int = 0  # of a batch: the place in the log behind it
    generation: int = 0
    decoded: Decoded | None = None
    done: bool = False

    def step(self) -> None:
        try:
            next(self.steps)
        except StopIteration:
            self.done = True


class World:
    """Runs one random history. Raises Violation, with the seed and what happened last."""

    def __init__(
        self,
        seed: int,
        make_store: Callable[[], Store],
        faults: Faults,
        *,
        toast: bool = False,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.faults = faults
        self.toast = toast
        self.source = Source(self.rng, self.rng.choice([2, KEYS]), toast=toast)
        self.store = make_store()
        self.crashes = self.rng.choice([0.003, 0.01])  # per step
        self.broken = True  # the processor, until somebody corrects it
        self.pipeline = Pipeline("simulated")
        self.pipeline.table("public.item")(self.processor)
        self.codecs = {"public.item": table_codec(ITEM)}
        self.load = Load()
        self.confirmed = 0
        self.letters: list[bytes] = []
        self.replays: list[Job] = []
        self.versions = dict.fromkeys(range(KEYS), 0)
        self.least_revs = dict.fromkeys(range(KEYS), 0)
        self.visible: dict[int, int] = {}  # key → rev of the document that a reader sees
        self.happened: deque[str] = deque(maxlen=25)
        self.killed = 0
        self.alone_since = 0  # from here on in the log, nobody but the active process has written
        self.swept_behind = 0  # so many had been killed when the last sweep began that has ended
        self.active = Process(self)
        self.zombies: list[Process] = []

    def processor(self, row: Row) -> Document | None:
        """The user's function: documents, none, or an exception."""
        if row["name"] == "poison" and self.broken:
            raise ValueError("poison")
        if row["name"] == "hidden":
            return None
        return {"id": row["id"], "rev": row["rev"], "title": row["name"].upper()}

    def writes_of(self, changes: Sequence[Change], truncate: int | None = None) -> tuple[Steps, list[Failure]]:
        """Return the steps that bring changes into the store, in the order of `SinkWriter`, and the failures."""
        processed = process(ITEM, self.pipeline.tables["public.item"], changes, {})

        def steps() -> Steps:
            if truncate is not None:
                yield from self.store.truncate(truncate)
            if processed.writes:
                yield from self.store.apply(processed.writes)

        return steps(), processed.failures

    # ── a history ────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, steps: int) -> None:
        try:
            self._prepare()
            for _ in range(steps):
                self._step()
            self._drain()
            if self.swept_behind == self.killed:
                self._compare()  # nobody has left anything half done
            self._sweep()
            self._compare()
        except Violation as error:
            history = "\n".join(self.happened)
            raise Violation(f"seed {self.seed}: {error}\nwhat happened last:\n{history}") from None

    def _prepare(self) -> None:
        """Rows that are there before the slot; and transactions that the log never delivers, yet not visible."""
        for _ in range(self.rng.randint(0, 60)):
            self.source.step()
            self.active.sampling_step()
        for xid in sorted(self.source.open):
            self.source.commit(xid)  # a slot is created when all that run have ended, in the log
        self.confirmed = self.active.next = len(self.source.log)

    def _step(self) -> None:
        choice = self.rng.random()
        if choice < 0.35:
            self.source.step()
        elif choice < 0.85:
            self.active.step()
        elif choice < 0.93 and self.zombies:
            self.rng.choice(self.zombies).step()
        elif choice < 0.95:
            self._replay()
        elif choice < 0.95 + self.crashes:
            self.tell("crash")
            self.killed += 1
            self.alone_since = self.source.lsn
            self.active = Process(self)
        elif 0.96 <= choice < 0.965:
            self.tell("lost its place, goes on")
            self.zombies.append(self.active)
            self.active = Process(self)
        elif choice < 0.97 and self.zombies:
            self._kill_zombie()
        elif choice < 0.975:
            self.active.restart_capture()
        elif choice < 0.98:
            self.broken = not self.broken
        elif choice < 0.985:
            self.tell("leases of chunks expire")
            self.load.expire()
        elif choice < 0.99 and self.load.done:
            self.tell("another dump")
            self.load = Load()
        self.step_job(self.replays)

    def _kill_zombie(self) -> None:
        self.zombies.remove(self.rng.choice(self.zombies))
        self.alone_since = self.source.lsn
        self.killed += 1

    def _drain(self) -> None:
        self.source.settle()
        self.broken = False
        for _ in range(DRAIN_STEPS_MOST):
            if self.zombies and self.rng.random() < 0.5:
                self.rng.choice(self.zombies).step()
            elif self.rng.random() < 0.02 and self.zombies:
                self._kill_zombie()
            if self.rng.random() < 0.003:
                self.load.expire()  # those of processes that are gone
            self.active.step()
            self.step_job(self.replays)
            if self.load.done and self.active.idle and not self.replays and not self.zombies:
                if not self.letters:
                    return
                self._replay()
        raise Violation("it does not come to an end")

    def _sweep(self) -> None:
        """Sweep, as is done now and then, also after the last process that was killed."""
        for _ in self.store.sweep():
            self.look()

    def _replay(self) -> None:
        """Replay a dead letter, as `replaying.py` does. Two people may do so at once."""
        if self.letters and not self.broken:
            letter = self.rng.choice(self.letters)
            change = decode_event(letter).change
            assert change is not None
            steps, failures = self.writes_of([change])
            assert not failures
            self.tell(f"replay of {change}")
            self.alone_since = self.source.lsn  # somebody else writes: the row as another reading by key had it
            self.replays.append(Job(steps, []))
            if self.rng.random() < 0.7:
                self.letters.remove(letter)

    def step_job(self, jobs: list[Job]) -> None:
        """Advance one of some jobs; forget it when it is done."""
        if jobs:
            job = self.rng.choice(jobs)
            job.step()
            if job.done:
                jobs.remove(job)
            self.look()

    def tell(self, what: str) -> None:
        """Note what happens, for the message of a violation."""
        self.happened.append(what)

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────

    def look(self) -> None:
        """Look at the store as a reader does: versions never go down, and no key goes back to an older state."""
        for key in range(KEYS):
            seen = self.store.see(key)
            if seen.version < self.versions[key]:
                raise Violation(f"the version of {key} went down from {self.versions[key]} to {seen.version}")
            self.versions[key] = seen.version
            if seen.going:
                continue  # the deletion's second step is under way
            if seen.document is None:
                if key in self.visible:
                    self.least_revs[key] = self.visible.pop(key) + 1
            else:
                rev = seen.document["rev"]
                if rev < self.least_revs[key] and not self._may_go_back():
                    raise Violation(f"a reader saw {key} go back to {rev} from {self.least_revs[key]}")
                self.visible[key] = self.least_revs[key] = rev

    def _may_go_back(self) -> bool:
        """Whether somebody else may write rows that were read by key ahead of the log, which this process cannot know.

        That lasts until the log is past them. A truncate of rows that were read ahead of it counts, too.
        """
        if self.zombies or self.replays:
            self.alone_since = self.source.lsn
        return self.toast and self.active.passed_lsn < self.alone_since

    def _compare(self) -> None:
        for key in range(KEYS):
            row = self.source.rows.get(key)
            wanted = self.processor(row) if row is not None else None
            found = self.store.see(key).document
            if found != wanted:
                raise Violation(f"{key} should be {wanted} and is {found}")


class Process:
    """One process of Delta: a worker, its load, its samples."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        self.source = world.source
        self.next = world.confirmed
        self.generation = 1
        self.jobs: list[Job] = []
        self.load_jobs: list[Job] = []
        self.passed_lsn = 0
        self.samples = SharedSamples(Samples)
        self.sampling = Sampling(self.source, with_locks=not world.faults.claim_without_locks)
        self.loading = [self._plan(), *(self._read() for _ in range(READERS))]
        self.killed_before = world.killed
        self.sweeping: Steps | None = self.world.store.sweep()
        pause = Pause(self.source)
        reader = cast("PostgresReader", KeyReader(self.source, blind=world.faults.read_by_key_whatever_is_visible))
        self.rereader = Rereader(reader, self.samples, EPOCH, lambda _: ITEM, pause)

    @property
    def idle(self) -> bool:
        return self.next == len(self.source.log) and not self.jobs and not self.load_jobs

    def step(self) -> None:
        choice = self.rng.random()
        if self.sweeping is not None:  # before it writes anything
            if next(self.sweeping, self) is self:
                self.sweeping = None
                self.world.swept_behind = self.killed_before
            self.world.look()
        elif choice < 0.2:
            self.sampling_step()
        elif choice < 0.45:
            next(self.rng.choice(self.loading))
        elif choice < 0.6:
            if self.next < len(self.source.log) and len(self.jobs) < JOBS_MOST:
                self._begin_batch()
        elif choice < 0.85:
            jobs = [job for job in (*self.jobs, *self.load_jobs) if not job.done]
            if jobs:
                self.rng.choice(jobs).step()
                self.world.look()
        else:
            self._finish()

    def sampling_step(self) -> None:
        sample = self.sampling.step()
        if sample is not None:
            self.samples.add(sample)

    def restart_capture(self) -> None:
        """The connector ended and starts again behind what was confirmed; what is in flight goes on."""
        self.world.tell("capture restarts")
        self.generation += 1
        self.next = self.world.confirmed

    def _begin_batch(self) -> None:
        end = min(len(self.source.log), self.next + self.rng.randint(1, 5))
        decoded = decode(
            [Stretch(EPOCH, orjson.loads(payload([entry]))) for entry in self.source.log[self.next : end]],
            self.world.codecs,
            HEARTBEAT_PREFIX,
            {} if self.world.faults.forget_what_was_read_ahead else self.rereader.ahead.by_table(),
        )
        assert not decoded.undecodable
        changes = list(decoded.changes.get("public.item", ()))
        lacking = decoded.lacking.get("public.item", [])
        if lacking:
            if not self.world.faults.read_again_beside_the_first:
                for job in self.jobs:
                    again = job.decoded is not None and decoded.reads_rows_of(job.decoded)
                    while (job.generation != self.generation or again) and not job.done:
                        job.step()
            changes += [
                Change("public.item", item.key, version, row)
                for item, row, version in self.rereader("public.item", lacking)
            ]
        if decoded.truncates:
            self.world.alone_since = (
                self.source.lsn
            )  # it removes rows that were read ahead of it, until the log has them
        steps, failures = self.world.writes_of(changes, decoded.truncates.get("public.item"))
        self.world.tell(f"batch {self.next}–{end}: {[*changes]} {decoded.truncates or ''}")
        self.jobs.append(Job(steps, letters_of(failures, "log"), end, self.generation, decoded))
        self.next = end
        if self.world.faults.confirm_before_apply:
            self._confirm(self.jobs[-1])

    def _confirm(self, job: Job) -> None:
        if job.generation == self.generation and self is self.world.active:  # a zombie's connection is gone
            self.world.confirmed = max(self.world.confirmed, job.end)

    def _finish(self) -> None:
        if self.jobs and self.jobs[0].done:
            job = self.jobs.pop(0)
            self.world.letters += job.letters
            self._confirm(job)
            if job.decoded is not None and job.decoded.heartbeat_lsn is not None:
                self.passed_lsn = max(self.passed_lsn, job.decoded.heartbeat_lsn)
                self.rereader.ahead.passed(version_of(EPOCH, job.decoded.heartbeat_lsn))
        for job in [job for job in self.load_jobs if job.done]:
            self.world.letters += job.letters
            self.load_jobs.remove(job)

    # ── as load.py ───────────────────────────────────────────────────────────────────────────────────────────────

    def _plan(self) -> Steps:
        """Begin what is to be loaded and plan its chunks, for ever."""
        while True:
            yield
            load = self.world.load
            if load.covered_from is None:
                yield from self._pass_log()
                if load.covered_from is None:
                    load.covered_from = self.source.lsn
            elif not load.planned and sum(chunk.free for chunk in load.chunks.values()) < READERS:
                _, visible = self.source.snapshot()
                behind = sorted(key for key in visible if key > load.planned_to)
                end = behind[CHUNK_ROWS - 1] if len(behind) >= CHUNK_ROWS else None
                load.add(load.planned_to, end)
                load.planned, load.planned_to = end is None, load.planned_to if end is None else end

    def _read(self) -> Steps:
        """Lease chunks, read them, and bring their rows to the store, for ever."""
        while True:
            yield
            load = self.world.load
            leased = load.lease()
            if leased is None:
                continue
            number, chunk = leased
            yield
            assert load.covered_from is not None, "it was begun before it was planned"
            rows, claim = yield from self._read_chunk(chunk.after, load.covered_from)
            rows = [row for row in rows if chunk.to is None or row["id"] <= chunk.to]
            most = self.rng.randint(1, CHUNK_ROWS)  # as if more had too many bytes
            if len(rows) >= most:
                rows = rows[:most]
                if not load.holds(number, chunk):
                    continue
                load.add(rows[-1]["id"], chunk.to)
                load.chunks[number].to = rows[-1]["id"]
            if not self.world.faults.hand_over_before_log:
                yield from self._pass_log()
            if not load.holds(number, chunk):
                continue
            yield  # and may lose it in between
            version = dump_version(EPOCH, claim)
            changes = [Change("public.item", (row["id"],), version, row) for row in rows]
            steps, failures = self.world.writes_of(changes)
            job = Job(steps, letters_of(failures, "load"))
            self.world.tell(f"load {changes}")
            if self.world.faults.record_before_written:
                load.chunks.pop(number, None)
                yield
            self.load_jobs.append(job)
            while job in self.load_jobs:
                yield
            if load.holds(number, chunk):  # for the count alone: what it would record, it has written
                del load.chunks[number]

    def _read_chunk(self, after: int, covered_from: int) -> Generator[None, None, tuple[list[Row], int]]:
        """Return the rows of a snapshot that can claim something, and the claim."""
        while True:
            position = self.source.lsn
            yield
            snapshot, visible = self.source.snapshot()
            claim = self.samples.claim(snapshot, 0 if self.world.faults.claim_before_coverage else covered_from)
            if self.world.faults.claim_position_before_snapshot:
                claim = position
            if claim is not None:
                rows = [visible[key] for key in sorted(visible) if key > after]
                yield
                return rows, claim

    def _pass_log(self) -> Steps:
        lsn = self.source.heartbeat()
        while self.passed_lsn < lsn:
            yield


class KeyReader:
    """What `Rereader` asks of a `PostgresReader`."""

    claim_wait_s = PostgresReader.claim_wait_s

    def __init__(self, source: Source, *, blind: bool) -> None:
        self._source = source
        self._blind = blind

    def sample(self) -> Sample:
        sampling = Sampling(self._source, with_locks=True)
        while (sample := sampling.step()) is None:
            self._source.step()
        return sample

    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Snapshot], bool]) -> Chunk | None:
        snapshot, visible = self._source.snapshot()
        if not self._blind and not usable(snapshot):
            return None
        rows = [(key, dict(visible[key[0]])) for key in keys if key[0] in visible]
        return Chunk(self._source.lsn, rows, None)


class Pause(threading.Event):
    """While something waits, commits become visible. Nothing new is written, or the log would grow faster than it is
    read; open transactions stay open, so that some wait in vain."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def wait(self, timeout: float | None = None) -> bool:
        if self._source.committing and self._source.rng.random() < 0.05:
            self._source.show(self._source.rng.choice(sorted(self._source.committing)))
        return False


def letters_of(failures: Sequence[Failure], origin: Origin) -> list[bytes]:
    """Return dead letters as they are kept."""
    return [encode_event(DeltaEvent.of("simulated", item.change, AT, origin)) for item in failures]
