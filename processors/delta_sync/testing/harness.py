"""Tests of a `processor.py` without any server: rows in, documents out.

    from delta_sync.testing.harness import Harness

    def test_movies():
        movies = Harness("pipelines/movies", lookups={"ratings": {1: {"stars": 4.6}}})
        movies.insert("public.movie", id=1, title="Casablanca", year=1942)
        assert movies.document("cache", 1) == {"title": "Casablanca", "stars": 4.6}
        movies.stir()

What runs is Delta's own: compaction, look-ups, processing, versions, the in-memory sink. Left out are the source, its log
and the threads. So a document is as JSON has it, and its id is the row's key as text; what a sink adds to that (a key
template, a mapping, BSON's types) is not here.

A class and no pytest fixture: it needs no plugin and no clean-up, since it starts no thread and writes no file, and it
is the same in `unittest`. Each one imports the pipeline's folder anew, so that tests share nothing.
"""

from __future__ import annotations

import copy
import datetime as dt
import decimal
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import orjson
import structlog

from delta_sync.applying import Part
from delta_sync.changes import Change, Key
from delta_sync.decoding import Event, Image, Stretch, TableCodec, decode
from delta_sync.errors import UsageError
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import Lookup, LookupFunction, Pipeline, check_columns, load_processor
from delta_sync.processing import Failure, Processed, process
from delta_sync.secrets import redact
from delta_sync.sinks.memory import MemorySink, MemoryStore, MemoryTargetOptions
from delta_sync.spec import load_spec
from delta_sync.tables import Column, Kind, Table, key_text
from delta_sync.values import Interval, Row, to_json
from delta_sync.versions import dump_version, position_of

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

LookupAnswers = Mapping[Any, Any] | LookupFunction  # what stands in for a look-up: its answers by key, or a function
TableKey = Table | str | Sequence[str]  # what a test says of a table: all of it, or the columns of its key

EPOCH = 1
STEP = 16  # positions from one change of the log to the next: room for the versions of loads between the two
RUNS_MOST = 100  # of one stir: a mistake that shows in one order of twenty is missed once in 170 stirs
CHANGES_TO_STIR = 20_000  # so long histories get fewer runs: a stir takes about a second
RUNS_LEAST = 3
FAULTS_MOST = 6  # crashes, redeliveries and loads of one run: several may meet, and most of it is still work
JOBS_MOST = 4  # batches in flight, as in the worker
LOAD_LAG_MOST = 3  # changes by which a load's rows may be newer than they claim


class Harness:
    """One pipeline, tables to change, and what its sinks hold.

    `dead_letters` has what failed, with the row, the stage and the error: `Failure(change, stage, error, trace, sink)`.
    `now_s` is the clock by which look-ups' answers get old; it stands still until a test moves it.
    """

    def __init__(
        self,
        pipeline: Pipeline | Path | str,
        *,
        tables: Mapping[str, TableKey] | None = None,
        lookups: Mapping[str, LookupAnswers] | None = None,
        sinks: Iterable[str] = (),
    ) -> None:
        """`pipeline` is its folder, with `pipeline.yaml` and `processor.py`, or the object itself.

        `tables` names the columns of a key that is not `id`, or gives the whole `Table`. Without the latter, a table has
        the columns of its first row. `lookups` replaces look-ups by their answers; a key that is left out has none.
        `sinks` is for a pipeline object of which no table says `to`.

        Raises UsageError: the folder is not as `deltactl pipeline check` wants it; a name that the pipeline lacks.
        """
        if isinstance(pipeline, Pipeline):
            self.pipeline = pipeline
            named = [sink for processor in pipeline.tables.values() for sink in processor.to]
            self.sinks = tuple(dict.fromkeys([*sinks, *named]))
        else:
            folder = Path(pipeline)
            spec = load_spec(folder)
            self.pipeline = load_processor(folder, spec)
            self.sinks = tuple(spec.sinks)
        if not self.sinks:
            raise UsageError(f'No table of pipeline {self.pipeline.name} says `to`; name its sinks: sinks=["cache"].')
        self._lookups = dict(self.pipeline.lookups)
        for name, answers in (lookups or {}).items():
            self._lookups[name] = _stand_in(_known("look-up", name, self.pipeline.lookups), answers)
        self._tables: dict[str, _SourceTable] = {}
        told = tables or {}
        for name in told:
            _known("table", name, self.pipeline.tables)
        for name in self.pipeline.tables:
            self._tables[name] = _SourceTable(name, told.get(name, "id"))
        self.now_s = 0.0
        self.dead_letters: list[Failure] = []
        self._log: list[Event] = []
        self._worker = self._new_worker()

    def _new_worker(self) -> _Worker:
        return _Worker(self.pipeline, self.sinks, self._lookups, self._tables, lambda: self.now_s)

    # ── rows in ──────────────────────────────────────────────────────────────────────────────────────────────────

    def insert(self, table: str, /, *rows: Mapping[str, Any], **columns: Any) -> None:
        """Insert a row, given by keywords, or several, given as mappings, which then come in one batch.

        A column that is left out is None, once the table's columns are known. Values are as in docs/types.md.

        Raises UsageError: the row is there already; a column or a value that the table cannot have. Raises LookupBusy
        when a look-up's service does not answer: the worker would ask it for ever. Then nothing was inserted.
        """
        source = _known("table", table, self._tables)
        after: dict[str, Row | None] = {}
        for given in _rows(rows, columns):
            row = source.complete(given)
            id_ = source.id_of(row)
            if id_ in source.rows or id_ in after:
                raise UsageError(f"{table} {id_} is there already; update it, or delete it before.")
            after[id_] = row
        self._commit(source, after)

    def update(self, table: str, /, *rows: Mapping[str, Any], **columns: Any) -> None:
        """Change the row that the key's columns name; the others get the values given. Several as with `insert`.

        A key never changes: in the log, too, that is a delete and an insert. Raises what `insert` does.
        """
        source = _known("table", table, self._tables)
        after: dict[str, Row | None] = {}
        for given in _rows(rows, columns):
            id_ = source.find(given)
            after[id_] = source.complete({**(after.get(id_) or source.rows[id_]), **given})
        self._commit(source, after)

    def delete(self, table: str, /, *keys: Mapping[str, Any], **key: Any) -> None:
        """Delete the row that the key's columns name. Several as with `insert`."""
        source = _known("table", table, self._tables)
        self._commit(source, {source.find(given): None for given in _rows(keys, key)})

    def truncate(self, table: str, /) -> None:
        """Delete all rows at once, as TRUNCATE does."""
        source = _known("table", table, self._tables)
        if source.table is None:
            raise UsageError(f"{table} has no rows yet.")
        self._deliver([self._event(source, "t", None, None, 1)])
        source.rows.clear()

    def _commit(self, source: _SourceTable, after: Mapping[str, Row | None]) -> None:
        check_columns(self.pipeline, {source.name: source.known})
        events: list[Event] = []
        for id_, row in after.items():
            before = source.rows.get(id_)
            op = "d" if row is None else "c" if before is None else "u"
            events.append(self._event(source, op, before, row, len(events) + 1))
        self._deliver(events)
        for id_, row in after.items():
            if row is None:
                del source.rows[id_]
            else:
                source.rows[id_] = row

    def _event(self, source: _SourceTable, op: str, before: Row | None, after: Row | None, ahead: int) -> Event:
        """Return a change as Debezium tells it, but with the values that a row has."""
        number = len(self._log) + ahead
        place = {"schema": source.known.schema, "table": source.known.name, "lsn": number * STEP}
        return {"op": op, "before": before, "after": after, "source": {**place, "txId": number, "ts_ms": number}}

    def _deliver(self, events: Sequence[Event]) -> None:
        """Process and apply what is new, and keep it in the log. When a look-up is busy, nothing has happened."""
        self._finish(self._worker.process(*self._worker.decode(events)))
        self._log += events

    def _finish(self, job: _Job) -> None:
        failures = job.failures + [failure for sink in self.sinks for failure in self._worker.apply(sink, job)]
        known = {_name_of(failure) for failure in self.dead_letters}
        for failure in failures:
            if _name_of(failure) not in known:
                self.dead_letters.append(failure)
                table, id_ = failure.change.table, key_text(failure.change.key)
                log.warning("dead_letter", table=table, key=id_, stage=failure.stage, error=redact(failure.error))

    # ── documents out ────────────────────────────────────────────────────────────────────────────────────────────

    def documents(self, sink: str, table: str | None = None) -> dict[str, dict[str, Any]]:
        """Return every document of a sink by its id, the key as text (`"1"`; of several columns `"1:de"`).

        `table` says which, when several tables go to the sink. Raises UsageError for a name that is not there.
        """
        return self._worker.documents(sink, self._table_of(sink, table))

    def document(self, sink: str, /, *key: object, table: str | None = None) -> dict[str, Any] | None:
        """Return the document of the row with this key, or None when there is none."""
        return self.documents(sink, table).get(key_text(key))

    def _table_of(self, sink: str, table: str | None) -> str:
        _known("sink", sink, dict.fromkeys(self.sinks))
        there = {name: None for name, processor in self.pipeline.tables.items() if sink in (processor.to or self.sinks)}
        if table is None and len(there) != 1:
            raise UsageError(f"Say of which table: to sink {sink} go {', '.join(there) or 'none'}.")
        if table is None:
            return next(iter(there))
        _known(f"table in sink {sink}", table, there)
        return table

    def check(self) -> None:
        """Raise AssertionError when any change became a dead letter; the message has the rows and the errors."""
        __tracebackhide__ = True  # pytest then shows the line of the test
        if self.dead_letters:
            told = "\n\n".join(_story(failure) for failure in self.dead_letters[:3])
            raise AssertionError(f"{len(self.dead_letters)} of the changes became dead letters.\n\n{told}")

    # ── what a pipeline lives through ────────────────────────────────────────────────────────────────────────────

    def redeliver(self) -> None:
        """Deliver everything again in one batch, as after a crash: to a new process, with nothing cached."""
        self._worker.restart()
        self._finish(self._worker.process(*self._worker.decode(self._log)))

    def load(self, table: str, /) -> None:
        """Load the table: its rows, as they are, are processed again. With newer answers of look-ups, say."""
        source = _known("table", table, self._tables)
        version = dump_version(EPOCH, _claim(len(self._log)))
        changes = [Change(table, source.key_of(row), version, _copied_row(row)) for row in source.rows.values()]
        self._finish(self._worker.process({table: changes}, {}))

    def stir(self, seed: int = 0, runs: int | None = None) -> None:
        """Show that the processor is fit for delivery at least once: whatever happens, the documents are the same.

        All changes so far come again in `runs` random histories (without it: as many as a second allows, at most
        RUNS_MOST): in batches of any size, redelivered from anywhere while the first delivery is still under way, with
        loads in between, and with crashes after which a dead process's writes arrive late. Each begins with empty sinks
        and caches, and ends with the documents that the changes in order lead to. What a look-up answers must not change
        meanwhile. The pipeline's module is not imported again: what it keeps in globals stays.

        Raises AssertionError when one row led to two documents, or when the processor changed a value inside a row;
        with the key, both documents, and the seed that shows it in the first run. What passes depends on the rows: give
        the processor some of each kind. It does not find what changes less often than once a second, such as a date.
        """
        __tracebackhide__ = True  # pytest then shows the line of the test
        if not self._log:
            raise UsageError("There is nothing to stir: insert some rows before.")
        if runs is None:
            runs = max(RUNS_LEAST, min(RUNS_MOST, CHANGES_TO_STIR // len(self._log)))
        judge = _Judge()
        worker = self._new_worker()
        for event in self._log:
            changes, truncates = worker.decode([event])
            job = judge.process(worker, changes, truncates, seed)
            for sink in self.sinks:
                worker.apply(sink, job)
        wanted = self._all_documents(worker)
        for number in range(seed, seed + runs):
            worker = self._new_worker()
            _Stirring(worker, self._log, judge, number).run()
            found = self._all_documents(worker)
            judge.compare(wanted, found, number)

    def _all_documents(self, worker: _Worker) -> dict[_Place, dict[str, Any]]:
        return {
            _Place(table, sink, id_): document
            for table, processor in self.pipeline.tables.items()
            for sink in processor.to or self.sinks
            for id_, document in worker.documents(sink, table).items()
        }


ThingT = TypeVar("ThingT")
P = ParamSpec("P")


def _known(what: str, name: str, there: Mapping[str, ThingT]) -> ThingT:
    if name not in there:
        raise UsageError(f"There is no {what} {name!r}; there is {', '.join(there) or 'none'}.")
    return there[name]


def _rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if bool(rows) == bool(columns):
        raise UsageError("Give one row by keywords, or rows as mappings.")
    return rows or [columns]


def _name_of(failure: Failure) -> tuple[object, ...]:
    """By which a dead letter is the same when its change is delivered again."""
    return failure.change.table, key_text(failure.change.key), failure.change.version, failure.sink


def _story(failure: Failure) -> str:
    change = failure.change
    where = f" in sink {failure.sink}" if failure.sink else ""
    story = (
        f"{change.table} {key_text(change.key)}, at stage {failure.stage}{where}: {failure.error}\nrow: {change.row}"
    )
    return f"{story}\n{failure.trace}" if failure.trace else story


# ── the source ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _SourceTable:
    """One table: its columns, as far as they are known, and its rows by id. `table` is None before the first row."""

    def __init__(self, name: str, told: TableKey) -> None:
        self.name = name
        self.rows: dict[str, Row] = {}
        self.table: Table | None = None
        self._unseen = set[str]()  # columns of which no value has shown the kind
        if isinstance(told, Table):
            if told.id != name:
                raise UsageError(f"tables has {told.id} under the name {name}.")
            self.key, self.table = told.key, told
        else:
            self.key = (told,) if isinstance(told, str) else tuple(told)

    @property
    def known(self) -> Table:
        """The table, of which there has been a row."""
        assert self.table is not None, "a row was completed before"
        return self.table

    @property
    def codec(self) -> TableCodec:
        """How its events are read: they hold rows as they are."""
        return TableCodec(self.known, _copied_row, self.key_of, _lacks_nothing)

    def key_of(self, row: Mapping[str, Any]) -> Key:
        """Return the values of the key's columns. Raises UsageError when one is missing."""
        for name in self.key:
            if row.get(name) is None:
                raise UsageError(
                    f"{self.name}: a row needs a value of {name}, a column of its key. If the key is another one, say"
                    f' so: Harness(…, tables={{"{self.name}": ["column", …]}}).'
                )
        return tuple(row[name] for name in self.key)

    def id_of(self, row: Mapping[str, Any]) -> str:
        """Return the key as text."""
        return key_text(self.key_of(row))

    def find(self, given: Mapping[str, Any]) -> str:
        """Return the id of the row that these columns name. Raises UsageError when it is not there."""
        id_ = self.id_of(given)
        if id_ not in self.rows:
            raise UsageError(f"{self.name} has no row {id_}; insert it before.")
        return id_

    def complete(self, given: Mapping[str, Any]) -> Row:
        """Return a copy with every column. Learns from it what the columns are, and what they hold."""
        row = {name: _copied(value, f"{self.name}.{name}") for name, value in given.items()}
        self.key_of(row)
        if self.table is None:
            schema, _, name = self.name.partition(".")
            self.table = Table(schema, name, tuple(Column(column, "?", Kind.TEXT) for column in row), self.key)
            self._unseen = set(row)
        names = [column.name for column in self.table.columns]
        unknown = row.keys() - set(names)
        if unknown:
            raise UsageError(
                f"{self.name} has no column {min(unknown)}; it has {', '.join(names)}. If it should: the first row says"
                " what the columns are."
            )
        if self._unseen:
            seen = {name: row[name] for name in self._unseen if row.get(name) is not None}
            if seen:
                columns = [_column(c.name, seen[c.name]) if c.name in seen else c for c in self.table.columns]
                self.table = self.table._replace(columns=tuple(columns))
                self._unseen -= seen.keys()
        return {name: row.get(name) for name in names}


_KINDS: dict[type, Kind] = {
    bool: Kind.BOOLEAN,
    int: Kind.INTEGER,
    float: Kind.FLOAT,
    decimal.Decimal: Kind.DECIMAL,
    str: Kind.TEXT,
    bytes: Kind.BYTES,
    dt.date: Kind.DATE,
    dt.time: Kind.TIME,
    dt.datetime: Kind.TIMESTAMP,
    Interval: Kind.INTERVAL,
    uuid.UUID: Kind.UUID,
    dict: Kind.JSON,
}


def _column(name: str, value: object) -> Column:
    """Return the column that holds such a value."""
    dimensions = 0
    while isinstance(value, list):
        dimensions += 1
        value = value[0] if value else None  # pyright: ignore[reportUnknownVariableType] -- any elements
    kind = _KINDS.get(type(value), Kind.TEXT)  # pyright: ignore[reportUnknownArgumentType] -- as above
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        kind = Kind.TIMESTAMP_TZ
    return Column(name, kind.value, kind, dimensions)


def _copied(value: Any, where: str = "") -> Any:
    """Return a value with copies of the lists and dicts in it. Raises UsageError for what no row holds."""
    kind = type(value)
    if kind is list:
        return [_copied(element, where) for element in value]
    if kind is dict:
        return {_text(name, where): _copied(element, where) for name, element in value.items()}
    if value is not None and kind not in _KINDS:
        raise UsageError(f"{where}: no column holds a {kind.__name__}; docs/types.md says what rows hold.")
    if kind is dt.datetime and value.tzinfo is not None and value.utcoffset():
        raise UsageError(f"{where}: {value} is not in UTC, as it is in rows; write value.astimezone(datetime.UTC).")
    return value


def _text(name: object, where: str) -> str:
    if type(name) is not str:
        raise UsageError(f"{where}: {name!r} is not a text; the names in a JSON object are.")
    return name


def _copied_row(row: Image) -> Row:
    return {name: _copied(value) for name, value in row.items()}


def _lacks_nothing(image: Image) -> bool:
    del image
    return False


# ── the worker ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Inline(Executor):
    """Makes each call at once, in the test's own thread: none is left behind, and a debugger stops where it should."""

    def submit(self, fn: Callable[P, ThingT], /, *args: P.args, **kwargs: P.kwargs) -> Future[ThingT]:
        future = Future[ThingT]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 -- the future is for whatever it is
            future.set_exception(error)
        return future


def _stand_in(lookup: Lookup, answers: LookupAnswers) -> Lookup:
    """Return the look-up with other answers. They are copies, as those of a service are."""

    def function(keys: list[Any]) -> Mapping[Any, Any]:
        found = answers(keys) if callable(answers) else {key: answers[key] for key in keys if key in answers}
        return copy.deepcopy(found)

    replaced = copy.copy(lookup)
    replaced.function = function
    return replaced


class _Job(NamedTuple):
    """What is to be applied, by sink, and what failed before."""

    parts: Mapping[str, list[Part]]
    processed: list[Processed]

    @property
    def failures(self) -> list[Failure]:
        """What failed before the sinks."""
        return [failure for processed in self.processed for failure in processed.failures]


Changes = Mapping[str, Sequence[Change]]  # by table
Truncates = Mapping[str, int]  # table → version


class _Worker:
    """A process of Delta with its sinks, without the threads: `worker.py` is what it follows."""

    def __init__(
        self,
        pipeline: Pipeline,
        sinks: Sequence[str],
        lookups: Mapping[str, Lookup],
        tables: Mapping[str, _SourceTable],
        clock: Callable[[], float],
    ) -> None:
        self.sinks = {name: MemorySink(name, store=MemoryStore(now=clock)) for name in sinks}
        self._pipeline = pipeline
        self._lookups = lookups
        self._tables = tables
        self._clock = clock
        self._stopping = threading.Event()
        self._stopping.set()  # nothing is retried: a test does not wait for a service
        self._callers: dict[str, LookupCaller] = {}
        self.restart()

    def restart(self) -> None:
        """Be a new process: nothing is cached. The sinks stay as they are."""
        pool = _Inline()
        self._callers = {
            name: LookupCaller(lookup, self._stopping, self._clock, pool=pool) for name, lookup in self._lookups.items()
        }

    def decode(self, events: Sequence[Event]) -> tuple[Changes, Truncates]:
        """Return the newest change of each key, with rows of its own, and the truncates."""
        codecs = {name: table.codec for name, table in self._tables.items() if table.table is not None}
        decoded = decode([Stretch(EPOCH, events)], codecs, self._pipeline.name)
        assert not decoded.lacking
        assert not decoded.undecodable
        return decoded.changes, decoded.truncates

    def process(self, changes: Changes, truncates: Truncates) -> _Job:
        """Make the writes of the changes. Raises LookupBusy."""
        job = _Job({sink: [] for sink in self.sinks}, [])
        for name in {**changes, **truncates}:
            table, processor = self._tables[name].known, self._pipeline.tables[name]
            processed = process(table, processor, changes.get(name, ()), self._callers)
            job.processed.append(processed)
            for sink in processor.to or self.sinks:
                target = self.sinks[sink].target(table, MemoryTargetOptions())
                job.parts[sink].append(Part(target, processed.writes, processed.changes, truncates.get(name)))
        return job

    def apply(self, sink: str, job: _Job) -> list[Failure]:
        """Apply a job's part for one sink; return what it rejects."""
        rejected: list[Failure] = []
        for part in job.parts[sink]:
            if part.truncate is not None:
                self.sinks[sink].truncate(part.target, part.truncate)
            outcomes = self.sinks[sink].apply(part.target, part.writes)
            for change, outcome in zip(part.changes, outcomes, strict=True):
                if outcome.kind == "rejected":
                    rejected.append(Failure(change, "apply", outcome.reason, "", sink))
        return rejected

    def documents(self, sink: str, table: str) -> dict[str, dict[str, Any]]:
        """Return a table's documents in a sink."""
        known = self._tables[table].table
        if known is None:
            return {}
        return self.sinks[sink].documents(self.sinks[sink].target(known, MemoryTargetOptions()))


# ── stirring ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Place(NamedTuple):
    """Where a document is."""

    table: str
    sink: str
    id_: str


Outcome = bytes | None | Failure  # what became of a row: a document as JSON, none, or a dead letter
WHY = (
    "After a crash changes come again, in other batches and in another order. So what a processor makes of a row must"
    " not depend on the clock, on chance, on earlier calls, or on what it changed outside of the row."
)


def _claim(changes: int) -> int:
    """Return the claim of rows that include the log's first so many changes."""
    return changes * STEP + STEP // 2


class _Judge:
    """Knows what each change of the log led to first, and says so when it leads to something else."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Outcome] = {}  # by position
        self._newest: dict[tuple[str, str], int] = {}  # table and id → position of its last change

    def process(
        self,
        worker: _Worker,
        changes: Changes,
        truncates: Truncates,
        seed: int,
        made_by: Mapping[Key, int] | None = None,
    ) -> _Job:
        """Let a worker process changes. `made_by` has the positions of the changes that made the rows of a load."""
        rows = [(change, _copied_row(change.row)) for some in changes.values() for change in some if change.row]
        job = worker.process(changes, truncates)
        for change, row in rows:
            if change.row != row:
                raise AssertionError(_changed_inside(change, row, seed))
        for change, outcome in _outcomes(job):
            position = position_of(change.version) if made_by is None else made_by[change.key]
            known = self._outcomes.setdefault(position, outcome)
            if not _alike(known, outcome):
                raise AssertionError(
                    _difference(f"{change.table} {key_text(change.key)}", change, known, outcome, seed)
                )
            row_id = change.table, key_text(change.key)
            self._newest[row_id] = max(position, self._newest.get(row_id, 0))
        return job

    def compare(
        self, wanted: Mapping[_Place, dict[str, Any]], found: Mapping[_Place, dict[str, Any]], seed: int
    ) -> None:
        """Compare the documents at the end, but for rows that became dead letters: of these an older one may be left."""
        for place in wanted.keys() | found.keys():
            newest = self._outcomes[self._newest[place.table, place.id_]]
            if wanted.get(place) != found.get(place) and not isinstance(newest, Failure):
                what = f"{place.table} {place.id_} in sink {place.sink}"
                raise AssertionError(_difference(what, None, wanted.get(place), found.get(place), seed))


def _outcomes(job: _Job) -> Iterator[tuple[Change, Outcome]]:
    for processed in job.processed:
        for failure in processed.failures:
            yield failure.change, failure
        for change, write in zip(processed.changes, processed.writes, strict=True):
            try:
                yield change, None if write.document is None else to_json(write.document)
            except TypeError as error:
                yield change, Failure(change, "apply", str(error), "")


def _alike(first: Outcome, second: Outcome) -> bool:
    """Whether two outcomes are the same. Of errors the text may differ, of documents the order of the fields."""
    if isinstance(first, bytes) and isinstance(second, bytes):
        return first == second or orjson.loads(first) == orjson.loads(second)
    return type(first) is type(second)


def _difference(what: str, change: Change | None, in_order: object, stirred: object, seed: int) -> str:
    lines = [f"{what}: the processor made two things of one row."]
    if change is not None:
        lines.append(f"  row:      {change.row}")
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


class _Stirring:
    """One random history of a worker that gets the whole log. One seed decides everything."""

    def __init__(self, worker: _Worker, events: Sequence[Event], judge: _Judge, seed: int) -> None:
        self._worker = worker
        self._events = events
        self._judge = judge
        self._seed = seed
        self._random = random.Random(seed)  # noqa: S311 -- no secret
        self._batch_most = self._random.choice([1, 3, 10, len(events)])
        places = [self._random.randint(0, len(events)) for _ in range(self._random.randint(1, FAULTS_MOST))]
        self._faults = sorted(places, reverse=True)  # how far the log has to be for the next one, which is the last
        self._next = 0  # event to be delivered
        self._confirmed = 0  # events before this one are in every sink
        self._in_flight: list[_InFlight] = []
        self._late: list[_InFlight] = []  # what a dead process, or a load, has sent and no sink has got yet

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
        claim = _claim(max(0, moment - self._random.randint(0, LOAD_LAG_MOST)))
        tables = [rows for rows in self._rows_at(moment).values() if rows]
        if not tables:
            return
        rows = list(self._random.choice(tables).values())
        start = self._random.randrange(len(rows))
        chunk = rows[start : start + self._batch_most]
        version = dump_version(EPOCH, claim)
        changes = [change._replace(version=version, row=_copied_row(change.row or {})) for change in chunk]
        made_by = {change.key: position_of(change.version) for change in chunk}
        job = self._judge.process(self._worker, {changes[0].table: changes}, {}, self._seed, made_by)
        self._late.append(_InFlight(job, set(self._worker.sinks), 0))

    def _rows_at(self, moment: int) -> dict[str, dict[str, Change]]:
        """Return what is in each table after so many changes: the change that made each row, by the row's id."""
        tables: dict[str, dict[str, Change]] = {}
        for event in self._events[:moment]:
            changes, truncates = self._worker.decode([event])
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

    job: _Job
    sinks: set[str]
    end: int
