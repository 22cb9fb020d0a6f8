"""Random histories of a worker, and the judgement whether a processor is fit for them. Used by `Harness.stir`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from delta_sync.changes import Change, Key
from delta_sync.decoding import Event
from delta_sync.processing import Failure
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.tables import key_text
from delta_sync.testing._source import claim_behind, copied_row
from delta_sync.testing._worker import EPOCH, Changes, HarnessWorker, Job, Truncates
from delta_sync.values import Document, Row, to_json
from delta_sync.versions import dump_version, position_of

FAULTS_MOST = 6  # crashes, redeliveries and loads of one run: several may meet, and most of it is still work
JOBS_MOST = 4  # batches in flight, as in the worker
LOAD_LAG_MOST = 3  # changes by which a load's rows may be newer than they claim


class Place(NamedTuple):
    """Where a document is."""

    table: str
    sink: str
    id_: str


Made = bytes | None | Failure  # what became of a row: a document as JSON, none, or a dead letter
WHY = """\
After a crash changes come again, in other batches and in another order. So what a processor makes of a row must not
depend on the clock, on chance, on earlier calls, or on what these changed outside of the row. (Look-ups must answer
in a stir what they answered before.)"""


class NotRepeatable(AssertionError):
    """The processor is not fit for delivery at least once; the message says on which row it shows."""


class Judge:
    """Knows what each change of the log led to at first, and says so when it leads to something else."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Made] = {}  # by position
        self._newest: dict[tuple[str, str], Made] = {}  # by table and id: of its last change

    def note(self, job: Job) -> None:
        """Note what changes of the log lead to, when they come first and in order."""
        for change, outcome in _outcomes(job):
            self._outcomes[position_of(change.version)] = self._newest[change.table, key_text(change.key)] = outcome

    def process(
        self,
        worker: HarnessWorker,
        changes: Changes,
        truncates: Truncates,
        seed: int,
        made_by: Mapping[Key, int] | None = None,
    ) -> Job:
        """Let a worker process changes again. `made_by` has the positions of the changes that made a load's rows.

        Raises NotRepeatable, with the seed, when one leads to something else than at first, or was changed.
        """
        rows = [(change, copied_row(change.row)) for some in changes.values() for change in some if change.row]
        job = worker.process(changes, truncates)
        for change, row in rows:
            if change.row != row:
                raise NotRepeatable(_changed_inside(change, row, seed))
        for change, outcome in _outcomes(job):
            first = self._outcomes[position_of(change.version) if made_by is None else made_by[change.key]]
            if not _alike(first, outcome):
                what = f"{change.table} {key_text(change.key)}"
                raise NotRepeatable(_difference(what, change.row, first, outcome, seed))
        return job

    def compare(self, wanted: Mapping[Place, dict[str, Any]], found: Mapping[Place, dict[str, Any]], seed: int) -> None:
        """Compare the documents at the end. Raises NotRepeatable.

        Not those of rows that are dead letters: of these an older document may be left or not, as batches had it.
        """
        for place in sorted(wanted.keys() | found.keys()):
            if wanted.get(place) != found.get(place) and not isinstance(self._newest[place.table, place.id_], Failure):
                what = f"{place.table} {place.id_} in sink {place.sink}"
                raise NotRepeatable(_difference(what, None, wanted.get(place), found.get(place), seed))


def _outcomes(job: Job) -> Iterator[tuple[Change, Made]]:
    for processed in job.processed:
        for failure in processed.failures:
            yield failure.change, failure
        for change, write in zip(processed.changes, processed.writes, strict=True):
            yield change, None if write.document is None else _json(change, write.document)


def _json(change: Change, document: Document) -> Made:
    """Return a document as JSON, or the dead letter that it becomes because no sink takes it."""
    try:
        json = to_json(document)
    except TypeError as error:
        return Failure(change, "apply", str(error), "")
    return Failure(change, "apply", f"it has a field {VERSION_FIELD}", "") if VERSION_FIELD in document else json


def _alike(first: Made, second: Made) -> bool:
    """Whether two outcomes are the same. Of errors the text may differ, of documents the order of the fields."""
    if isinstance(first, bytes) and isinstance(second, bytes):
        return first == second or orjson.loads(first) == orjson.loads(second)
    return type(first) is type(second)


def _difference(what: str, row: Row | None, in_order: object, stirred: object, seed: int) -> str:
    lines = [f"{what}: the processor made two things of one row."]
    if row is not None:
        lines.append(f"  row:      {row}")
    lines += [f"  in order: {_shown(in_order)}", f"  stirred:  {_shown(stirred)}", _again(seed), WHY]
    return "\n".join(lines)


def _shown(outcome: object) -> str:
    if isinstance(outcome, Failure):
        return f"a dead letter, {outcome.error}"
    if outcome is None:
        return "no document"
    return repr(orjson.loads(outcome) if isinstance(outcome, bytes) else outcome)


def _changed_inside(change: Change, row: Row, seed: int) -> str:
    assert change.row is not None
    column = next(name for name, value in row.items() if change.row[name] != value)
    return (
        f"{change.table} {key_text(change.key)}: the processor changed what is inside column {column}. Copy it before:"
        " the row is kept for a dead letter.\n"
        f"  before:   {row[column]!r}\n  after:    {change.row[column]!r}\n{_again(seed)}"
    )


def _again(seed: int) -> str:
    return f"The same again: stir(seed={seed})."


class Told(NamedTuple):
    """What one event of the log says."""

    changes: Changes
    truncates: Truncates


class Stirring:
    """One random history of a worker that gets the whole log. One seed decides everything."""

    def __init__(
        self, worker: HarnessWorker, events: Sequence[Event], told: Sequence[Told], judge: Judge, seed: int
    ) -> None:
        """`told` has what each of the events says."""
        self._worker = worker
        self._events = events
        self._told = told
        self._judge = judge
        self._seed = seed
        self._random = random.Random(seed)  # noqa: S311 -- no secret
        small = 1 + len(events) // 1000  # of long logs no batch is tiny: each costs more than what is in it
        self._batch_most = self._random.choice([small, 3 * small, 10 * small, len(events)])
        places = [self._random.randint(0, len(events)) for _ in range(self._random.randint(1, FAULTS_MOST))]
        self._faults = sorted(places, reverse=True)  # how far the log has to be for each; the last comes first
        self._next = 0  # event to be delivered
        self._confirmed = 0  # events before this one are in every sink
        self._in_flight: list[_InFlight] = []
        self._late: list[_InFlight] = []  # what a dead process, or a load, has sent and some sink has not got yet

    def run(self) -> None:
        """Go on until everything was delivered and applied."""
        while self._faults or self._next < len(self._events) or self._in_flight or self._late:
            choice = self._random.random()
            if choice < 0.4:
                if self._next < len(self._events) and len(self._in_flight) < JOBS_MOST:
                    self._begin_batch()
            elif choice < 0.85:
                self._apply_one()
            elif self._faults and self._faults[-1] <= self._next:
                self._faults.pop()
                self._random.choice([self._crash, self._redeliver, self._load])()

    def _begin_batch(self) -> None:
        end = min(len(self._events), self._next + self._random.randint(1, self._batch_most))
        changes, truncates = self._worker.decode(self._events[self._next : end])
        job = self._judge.process(self._worker, changes, truncates, self._seed)
        self._in_flight.append(_InFlight(job, set(self._worker.sinks), end))
        self._next = end

    def _apply_one(self) -> None:
        """Let one sink get one of the batches, then confirm those that every sink has, in the order of the log."""
        waiting = [flight for flight in (*self._in_flight, *self._late) if flight.sinks]
        if waiting:
            flight = self._random.choice(waiting)
            sink = self._random.choice(sorted(flight.sinks))
            self._worker.apply(sink, flight.job)
            flight.sinks.remove(sink)
        while self._in_flight and not self._in_flight[0].sinks:
            self._confirmed = self._in_flight.pop(0).end
        self._late = [flight for flight in self._late if flight.sinks]

    def _crash(self) -> None:
        """A new process begins behind what was confirmed. What the old one had sent is lost, or arrives late."""
        self._late += [flight for flight in self._in_flight if self._random.random() < 0.5]
        self._in_flight.clear()
        self._worker.restart()
        self._next = self._confirmed

    def _redeliver(self) -> None:
        """The connector starts again, from anywhere; what is in flight goes on."""
        self._late += self._in_flight
        self._in_flight.clear()
        self._next = self._confirmed = self._random.randint(0, self._next)

    def _load(self) -> None:
        """Read some rows of a table, as they were after some change; they arrive whenever. Claims are careful."""
        moment = self._random.randint(1, len(self._events))
        claim = claim_behind(max(0, moment - self._random.randint(0, LOAD_LAG_MOST)))
        tables = [rows for rows in self._rows_at(moment).values() if rows]
        if not tables:
            return
        rows = list(self._random.choice(tables).values())
        start = self._random.randrange(len(rows))
        chunk = rows[start : start + self._batch_most]
        version = dump_version(EPOCH, claim)
        changes = [change._replace(version=version, row=copied_row(change.row or {})) for change in chunk]
        made_by = {change.key: position_of(change.version) for change in chunk}
        job = self._judge.process(self._worker, {changes[0].table: changes}, {}, self._seed, made_by)
        self._late.append(_InFlight(job, set(self._worker.sinks), 0))

    def _rows_at(self, moment: int) -> dict[str, dict[str, Change]]:
        """Return what is in each table after so many changes: the change that made each row, by the row's id."""
        tables: dict[str, dict[str, Change]] = {}
        for changes, truncates in self._told[:moment]:
            for table in truncates:
                tables[table] = {}
            for table, some in changes.items():
                rows = tables.setdefault(table, {})
                for change in some:
                    rows.pop(key_text(change.key), None)
                    if change.row is not None:
                        rows[key_text(change.key)] = change
        return tables


@dataclass
class _InFlight:
    """A job on its way: which sinks have yet to get it, and the place in the log behind it."""

    job: Job
    sinks: set[str]
    end: int
