"""Tests of a `processor.py` without any server: rows in, documents out.

    from delta_sync.testing.harness import Harness

    def test_movies():
        movies = Harness("pipelines/movies", lookups={"ratings": {1: {"stars": 4.6}}})
        movies.insert("public.movie", id=1, title="Casablanca", year=1942)
        assert movies.document("cache", 1) == {"title": "Casablanca", "stars": 4.6}
        movies.stir()

What runs is Delta's own: compaction, look-ups, processing, versions, the in-memory sink. Left out are the source, its
log and the threads. So a document is as JSON has it, and its id is the row's key as text; what a sink adds to that (a
key template, a mapping, BSON's types) is not here.

A class and no pytest fixture: it needs no plugin and no clean-up, since it starts no thread and writes no file, and it
is the same in `unittest`. Each one imports the pipeline's folder anew, so that tests share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from delta_sync.changes import Change
from delta_sync.decoding import Event
from delta_sync.errors import UsageError
from delta_sync.logs import logger
from delta_sync.pipeline import Pipeline, check_columns, load_processor
from delta_sync.processing import Failure
from delta_sync.secrets import redact
from delta_sync.spec import ShapeSpec, load_spec
from delta_sync.tables import key_text
from delta_sync.testing._source import SourceTable, TableKey, claim_behind
from delta_sync.testing._stirring import Judge, NotRepeatable, Place, Stirring, Told
from delta_sync.testing._worker import EPOCH, HarnessWorker, Job, LookupAnswers
from delta_sync.values import Row
from delta_sync.versions import dump_version

log = logger(__name__)

RUNS_MOST = 100  # of one stir: a mistake that shows in one order of twenty is missed once in 170 stirs
CHANGES_TO_STIR = 20_000  # so long logs get fewer runs: a stir takes about a second
RUNS_LEAST = 3
SHOWN_MOST = 3  # dead letters in one message: with their traces more would hide the first


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

        `tables` names the columns of a key that is not `id`, or gives the whole `Table`. Without the latter, a table
        has the columns of its first row. `lookups` replaces look-ups: by their answers, where a key that is left out
        has none, or by another function. `sinks` is for a pipeline object of which no table says `to`.

        Raises UsageError: the folder is not as `deltactl pipeline check` wants it; a name that the pipeline lacks.
        """
        self._load_pipeline: Callable[[], Pipeline]
        if isinstance(pipeline, Pipeline):
            self._load_pipeline = lambda: pipeline
            shapes: Mapping[str, ShapeSpec] = {}
            named = [sink for processor in pipeline.tables.values() for sink in processor.to]
            self.sinks = tuple(dict.fromkeys([*sinks, *named]))
        else:
            folder = Path(pipeline).absolute()  # a test may change the working directory
            spec = load_spec(folder)
            self._load_pipeline = lambda: load_processor(folder, spec)
            self.sinks = tuple(spec.sinks)
            shapes = spec.shapes
        self.pipeline = self._load_pipeline()
        if not self.sinks:
            raise UsageError(f'No table of pipeline {self.pipeline.name} says `to`; name its sinks: sinks=["cache"].')
        self._answers, told = dict(lookups or {}), dict(tables or {})
        for name in self._answers:
            _known("look-up", name, self.pipeline.lookups)
        for name in told:
            _known("table", name, self.pipeline.tables)
        self._tables = {
            name: SourceTable(name, told.get(name, "id"), shapes.get(name)) for name in self.pipeline.tables
        }
        self.now_s = 0.0
        self.dead_letters: list[Failure] = []
        self._log: list[Event] = []
        self._judge = Judge()
        self._worker = self._new_worker()

    def _new_worker(self) -> HarnessWorker:
        return HarnessWorker(self._load_pipeline, self.sinks, self._answers, self._tables, lambda: self.now_s)

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
        self._deliver([source.event("t", None, None, len(self._log) + 1)])
        source.rows.clear()

    def _commit(self, source: SourceTable, after: Mapping[str, Row | None]) -> None:
        check_columns(self.pipeline, {source.name: source.known})
        events: list[Event] = []
        for id_, row in after.items():
            before = source.rows.get(id_)
            op = "d" if row is None else "c" if before is None else "u"
            events.append(source.event(op, before, row, len(self._log) + len(events) + 1))
        self._deliver(events)
        for id_, row in after.items():
            if row is None:
                del source.rows[id_]
            else:
                source.rows[id_] = row

    def _deliver(self, events: Sequence[Event]) -> None:
        """Process and apply what is new, and keep it in the log. When a look-up is busy, nothing has happened."""
        job = self._worker.process(*self._worker.decode(events))
        self._finish(job)
        self._judge.note(job)
        self._log += events

    def _finish(self, job: Job) -> None:
        failures = job.failures + [failure for sink in self.sinks for failure in self._worker.apply(sink, job)]
        if not failures:
            return
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
        """Raise AssertionError when any change became a dead letter; the message has the first rows and errors."""
        __tracebackhide__ = True  # pytest then shows the line of the test
        if self.dead_letters:
            told = "\n\n".join(_story(failure) for failure in self.dead_letters[:SHOWN_MOST])
            raise AssertionError(f"Dead letters: {len(self.dead_letters)}.\n\n{told}")

    # ── what a pipeline lives through ────────────────────────────────────────────────────────────────────────────

    def redeliver(self) -> None:
        """Deliver everything again in one batch, as after a crash: to a new process."""
        self._worker.restart()
        self._finish(self._worker.process(*self._worker.decode(self._log)))

    def load(self, table: str, /) -> None:
        """Load the table: its rows, as they are, are processed again. With newer answers of look-ups, say."""
        source = _known("table", table, self._tables)
        version = dump_version(EPOCH, claim_behind(len(self._log)))
        changes = [Change(table, source.key_of(row), version, source.read(row)) for row in source.rows.values()]
        if changes:
            self._finish(self._worker.process({table: changes}, {}))

    def stir(self, seed: int = 0, runs: int | None = None) -> None:
        """Show that the processor is fit for delivery at least once: whatever happens, the documents are the same.

        All changes so far come again in `runs` random histories (without it: a hundred, fewer of a long log). They come
        in batches of any size, redelivered from anywhere while the first delivery is still under way, with loads in
        between, and with crashes after which a dead process's writes arrive late. Each history begins with empty sinks,
        and every process with empty caches and a processor that is imported again, if it was given as a folder. At the
        end the documents must be those that are there now. The same `seed` gives the same histories.

        Raises AssertionError when one row led to two documents, or when the processor changed a value inside a row:
        with the key, both documents, and the seed that shows it in the first run. Look-ups must answer what they
        answered before. What shows depends on the rows, so insert some of each kind; what changes less often than once
        a second, such as a date, does not show.
        """
        __tracebackhide__ = True  # pytest then shows the line of the test
        if not self._log:
            raise UsageError("There is nothing to stir: insert some rows before.")
        if runs is None:
            runs = max(RUNS_LEAST, min(RUNS_MOST, CHANGES_TO_STIR // len(self._log)))
        try:
            self._stir(seed, runs)
        except NotRepeatable as error:
            raise AssertionError(str(error)) from None  # without the frames of what is inside

    def _stir(self, seed: int, runs: int) -> None:
        told = [Told(*self._worker.decode([event])) for event in self._log]
        wanted = self._all_documents(self._worker)
        for number in range(seed, seed + runs):
            worker = self._new_worker()
            Stirring(worker, self._log, told, self._judge, number).run()
            self._judge.compare(wanted, self._all_documents(worker), number)

    def _all_documents(self, worker: HarnessWorker) -> dict[Place, dict[str, Any]]:
        return {
            Place(table, sink, id_): document
            for table, processor in self.pipeline.tables.items()
            for sink in processor.to or self.sinks
            for id_, document in worker.documents(sink, table).items()
        }


ThingT = TypeVar("ThingT")


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
