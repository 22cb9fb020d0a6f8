"""What users write: a `Pipeline`, its tables and its look-ups. Declarations only; the worker does the rest.

    movies = Pipeline("movies")

    @movies.lookup(batch=500, ttl="10m")
    def ratings(movie_ids): ...

    @movies.table("public.movie", to=["cache"], enrich={"rating": ratings.by("id")})
    def movie(row, rating): ...

A mistake is an error at import, with the line of the function that it is about. What can be known only from the
specification (which sinks and tables there are) is checked too, when `pipeline.yaml` lies beside the file.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

from delta_sync.documents import DEBOUNCE, DocumentSpec, PartSpec, check_documents
from delta_sync.errors import DeltaError, UsageError
from delta_sync.events import Condition, Handler
from delta_sync.shaping import Shape, compiled
from delta_sync.spec import PROCESSOR_FILE, SPEC_FILE, PipelineSpec, ShapeSpec, load_spec, parse_duration_s
from delta_sync.tables import Kind, Table
from delta_sync.values import Document

ProcessorFunction = Callable[..., Document | None]
LookupFunction = Callable[[list[Any]], "Mapping[Any, Any] | Awaitable[Mapping[Any, Any]]"]
Keys = Literal["derived", "kept"]
KeyFunction = Callable[[Document], "str | int | None"]
DEADLINE = "2s"  # of a look-up that is not required: what readers of a document would wait for it, too
REFRESH_LEAST_S = 2.0  # a round of dumps is begun and ended by looks a second apart
HandlerT = TypeVar("HandlerT", bound=Callable[[Any], object])
FunctionT = TypeVar("FunctionT", bound=ProcessorFunction)


class Lookup:
    """A declared look-up: a batched call to a service, and how the worker is to make it."""

    def __init__(
        self,
        function: LookupFunction,
        *,
        batch: int,
        ttl_s: float,
        missing_ttl_s: float,
        cache_size: int,
        timeout_s: float,
        concurrency: int,
        required: bool,
        deadline_s: float | None,
        trip_after: int,
        pause_s: float,
        complete: bool,
        refresh_after_s: float | None = None,
        keys: Keys = "derived",
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.complete = complete
        self.batch = batch
        self.ttl_s = ttl_s
        self.missing_ttl_s = missing_ttl_s
        self.required = required
        self.deadline_s = deadline_s
        self.trip_after = trip_after
        self.pause_s = pause_s
        self.cache_size = cache_size
        self.timeout_s = timeout_s
        self.concurrency = concurrency
        self.refresh_after_s = refresh_after_s
        self.keys = keys

    @property
    def rounds_s(self) -> float | None:
        """How old an answer may be in a document before it is asked for again, without what the cache adds to it."""
        return None if self.refresh_after_s is None else self.refresh_after_s - max(self.ttl_s, self.missing_ttl_s)

    def by(self, key: str | KeyFunction) -> Enrichment:
        """Return the enrichment that asks this look-up with a key of the row: the value of a column, not if it is None.

        Or what a function of the row returns: a text, a whole number, or None. It must depend on nothing else.
        """
        return Enrichment(self, key)

    def __call__(self, keys: list[Any]) -> Mapping[Any, Any] | Awaitable[Mapping[Any, Any]]:
        """Call the function itself, as a test of it would."""
        return self.function(keys)


class Enrichment(NamedTuple):
    """An argument of a processor that a look-up fills: its answer for the row's `key` (a column, or a function)."""

    lookup: Lookup
    key: str | KeyFunction


class TableProcessor(NamedTuple):
    """A declared table: the function from its rows to documents, and where those go."""

    table: str
    function: ProcessorFunction
    to: tuple[str, ...]
    enrich: Mapping[str, Enrichment]
    shape: Shape | None = None  # what `pipeline.yaml` says is done to a row before the function sees it


class Pipeline:
    """The declarations of one pipeline. `name` is the specification's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tables: dict[str, TableProcessor] = {}
        self.generations: dict[str, dict[str, TableProcessor]] = {}  # by table, and by the generation of a sink
        self.lookups: dict[str, Lookup] = {}
        self.handlers: dict[str, Handler] = {}
        self.documents: dict[str, DocumentSpec] = {}

    def affected(self, tables: Iterable[str]) -> list[str]:
        """Return the tables with documents of their own that are made of rows of these: themselves, and roots."""
        wanted = set(tables)
        roots = {root for root, document in self.documents.items() if not wanted.isdisjoint(document.tables)}
        return [name for name in self.tables if name in wanted or name in roots]

    def check_has_documents(self, table: str, option: str) -> None:
        """Raise UsageError unless a table has documents of its own; `option` is where it was named."""
        if table in self.tables:
            return
        roots = self.affected([table])
        if roots:
            raise UsageError(
                f"{option}: rows of {table} are parts of documents of {', '.join(roots)}; name that table."
            )
        raise UsageError(f"{option}: pipeline {self.name} has no {table!r}; it has {', '.join(self.tables)}.")

    def going_to(self, sinks: Collection[str], named: Collection[str]) -> list[str]:
        """Return the tables of which documents go to some of these sinks (all of them, if none is given).

        Of all tables, unless some are `named`. Raises UsageError when one of these has none there, or none at all has:
        who is told that all is done, or equal, takes it for more than nothing.
        """
        wanted = {sink.partition(".")[0] for sink in sinks}  # without the numbers of generations
        chosen = list(dict.fromkeys(named or self.tables))
        found = [name for name in chosen if not wanted or not self.tables[name].to or wanted & {*self.tables[name].to}]
        left_out = next((name for name in chosen if name not in found), None)
        if left_out is not None and (named or not found):
            raise UsageError(
                f"--sink: no document of {left_out} goes to {', '.join(sorted(wanted))}; they go to"
                f" {', '.join(self.tables[left_out].to)}."
            )
        return found

    def document(
        self,
        table: str,
        *,
        parts: Mapping[str, PartSpec] | None = None,
        query: str | None = None,
        to: Sequence[str] | None = None,
        enrich: Mapping[str, Enrichment] | None = None,
        debounce: str | float = DEBOUNCE,
    ) -> Callable[[FunctionT], FunctionT]:
        """Declare the function that makes a document of a row of `table` and of its parts, which other tables have.

        `parts` maps names to `one(…)` and `many(…)`: the function gets the row with a dict (or None), or a list of
        dicts, by each name. A change of any of these rows builds the document anew, from one snapshot of the source; a
        document is built at most once within `debounce`, and no later than that after a change. With `query` the row is
        what this SELECT returns instead; it has a parameter for each key column, an array (`WHERE id = ANY(%(id)s)`),
        returns one row for each key that has one, and `parts` says of which tables' rows it is made. The rest is as for
        `table`.

        Raises UsageError as `table` does, and for parts that cannot be meant. What only the source knows (foreign keys,
        columns) is checked when the pipeline is.
        """
        if callable(table):  # pyright: ignore[reportUnnecessaryComparison] -- users need not type-check
            raise UsageError(f'{_where(table)}: @….document needs the table\'s name; write @….document("schema.name").')

        def declare(function: FunctionT) -> FunctionT:
            where = _where(function)
            if not parts and query is None:
                raise UsageError(f"{where}: a document has parts, or a query; without them it is a row: use @….table.")
            try:
                debounce_s = parse_duration_s(debounce)
            except ValueError as error:
                raise UsageError(f"{where}: {error}.") from None
            if debounce_s < 0:
                raise UsageError(f"{where}: debounce cannot be below 0.")
            _check_to(to, where)
            if to and _are_generations(to, where):
                raise UsageError(
                    f"{where}: the parts are the same in every generation; declare its function with"
                    f' @….table("{table}", to={list(to)}).'
                )
            document = DocumentSpec(table, dict(parts or {}), query, debounce_s)
            _check_parts(document.parts, where)
            spec = _spec_beside(function)
            if spec is not None:
                check_documents([document], spec, where)
            declared = self.table(table, to=to, enrich=enrich)(function)
            self.documents[table] = document
            return declared

        return declare

    def table(
        self, table: str, *, to: Sequence[str] | None = None, enrich: Mapping[str, Enrichment] | None = None
    ) -> Callable[[FunctionT], FunctionT]:
        """Declare the function that turns a row of `table` (`schema.name`) into a document, or None to leave it out.

        The function is called with the row, a dict that it may keep and change (but not the lists and dicts that a
        column holds: they are kept for a dead letter), and, by name, with each value of
        `enrich`. It must depend on nothing else: it runs again whenever a row is read again. `to` names sinks of the
        specification; without it the documents go to all of them. A second function of the same table may be for a
        generation of a sink, such as `to=["search.1"]`: while the sink is rebuilt, that one gets its documents instead.
        A sink that was never rebuilt is its first generation.

        Raises UsageError: unknown sink or table, table declared twice, arguments that do not match `enrich`.
        """

        if callable(table):  # pyright: ignore[reportUnnecessaryComparison] -- users need not type-check
            raise UsageError(f'{_where(table)}: @….table needs the table\'s name; write @….table("schema.name").')

        def declare(function: FunctionT) -> FunctionT:
            where = _where(function)
            _check_to(to, where)
            of_generations = _are_generations(to or (), where)
            same = self.generations.setdefault(table, {}) if of_generations else self.tables
            for name in to or () if of_generations else (table,):
                if name in same:
                    what = f"{table} for {name}" if of_generations else table
                    raise UsageError(
                        f"{where}: table {what} is declared twice, before in {_where(same[name].function)}."
                    )
            enrichments = dict(enrich or {})
            for name, enrichment in enrichments.items():
                if not isinstance(enrichment, Enrichment):  # pyright: ignore[reportUnnecessaryIsInstance] -- users need not type-check
                    raise UsageError(f'{where}: enrich={{"{name}": …}} takes `lookup.by("column")`.')
                by = enrichment.key
                if not callable(by) and not (isinstance(by, str) and by):  # pyright: ignore[reportUnnecessaryIsInstance] -- likewise
                    raise UsageError(f"{where}: {name} is looked up by a column's name or a function, not by {by!r}.")
                if callable(by) and (not _is_plain(by) or len(_positional(by)) != 1):
                    raise UsageError(
                        f"{where}: {name} is looked up by a plain function that takes one argument, the row."
                    )
            _check_signature(function, where, enrichments)
            spec = _spec_beside(function)
            if spec is not None:
                _check_against(spec, self.name, table, to or (), where)
            declared = TableProcessor(table, function, tuple(to or ()), enrichments)
            same.update(dict.fromkeys((to or ()) if of_generations else (table,), declared))
            return function

        return declare

    def functions(self) -> list[TableProcessor]:
        """Return every function that is declared for a table's rows."""
        return [*self.tables.values(), *(one for some in self.generations.values() for one in some.values())]

    def made_by(self, table: str, sinks: Iterable[str]) -> list[tuple[TableProcessor, list[str]]]:
        """Return what makes a table's documents for these sinks, each with those that it is for. Pure."""
        own = self.generations.get(table)
        if not own:
            return [(self.tables[table], list(sinks))]
        found: dict[int, tuple[TableProcessor, list[str]]] = {}
        for sink in sinks:
            processor = own.get(sink if "." in sink else f"{sink}.1", self.tables[table])
            found.setdefault(id(processor), (processor, []))[1].append(sink)
        return list(found.values())

    def on(
        self,
        table: str,
        *,
        when: Condition | None = None,
        name: str | None = None,
        concurrency: int = 1,
        attempts: int = 3,
        batch: int = 1,
        timeout: str | float | None = None,
    ) -> Callable[[HandlerT], HandlerT]:
        """Declare a function that is called with each change (`RowEvent`) of `table`, at least once, in order per key.

        Of those, only with events of which `when` is true. Loads and dumps do not call it. With `batch` above 1 it is
        called with a list of so many events at most. It runs beside the sinks, in `concurrency` threads, a key always
        in the same one. When it raises `Transient` it is called again until it does not; after any other error,
        `attempts` times in all, then the change is a dead letter of stage `handle`, and the next one follows. So it is
        when a call takes longer than `timeout` (default: `processor.timeout`).

        The trap: it is called again for changes that it has had, whenever a process dies. `event.id` is the same then.

        Raises UsageError: a name that is taken, a wrong signature, a number below 1, a `when` that is no function.
        """
        if callable(table):  # pyright: ignore[reportUnnecessaryComparison] -- users need not type-check
            raise UsageError(f'{_where(table)}: @….on needs the table\'s name; write @….on("schema.name").')

        def declare(function: HandlerT) -> HandlerT:
            where = _where(function)
            own_name = name or str(getattr(function, "__name__", type(function).__name__))
            if own_name in self.handlers:
                raise UsageError(f"{where}: a handler named {own_name} is declared twice; give one another `name`.")
            if not _is_plain(function) or len(_positional(function)) != 1:
                raise UsageError(f"{where}: a handler is a plain function that takes one argument, the event.")
            if min(concurrency, attempts, batch) < 1:
                raise UsageError(f"{where}: concurrency, attempts and batch must be above 0.")
            if when is not None and not callable(when):  # pyright: ignore[reportUnnecessaryComparison] -- users need not type-check
                raise UsageError(f"{where}: when={when!r} is no function; write when=lambda event: ….")
            spec = _spec_beside(function)
            if spec is not None:
                _check_against(spec, self.name, table, (), where)
            try:
                timeout_s = None if timeout is None else parse_duration_s(timeout)
            except ValueError as error:
                raise UsageError(f"{where}: {error}.") from None
            if timeout_s is not None and timeout_s <= 0:
                raise UsageError(f"{where}: timeout must be above 0.")
            self.handlers[own_name] = Handler(table, own_name, function, when, concurrency, attempts, batch, timeout_s)
            return function

        return declare

    def lookup(
        self,
        without_parentheses: None = None,
        /,
        *,
        batch: int = 500,
        ttl: str | float = "10m",
        missing_ttl: str | float | None = None,
        cache_size: int = 100_000,
        timeout: str | float = "10s",
        concurrency: int = 4,
        required: bool = True,
        deadline: str | float | None = None,
        trip_after: int = 5,
        pause: str | float = "10s",
        complete: bool = False,
        refresh_after: str | float | None = None,
        keys: Keys = "derived",
    ) -> Callable[[LookupFunction], Lookup]:
        """Declare a batched call to a service: a list of distinct keys in, a mapping from key to answer out.

        A key without an answer is None for the processor. The function may be a coroutine (`async def`): all of them
        run in one event loop of the process. The worker calls it with at most `batch` keys, at most `concurrency` times
        at once, from several threads; it caches answers for `ttl` (missing ones for `missing_ttl`, by default as long),
        at most `cache_size` of them, and repeats a call that fails in transit or takes longer than `timeout`. After
        `trip_after` rounds of calls in which none succeeded, the service is left alone for `pause`, and then asked with
        one call until that succeeds.

        `required`: a change waits for its answer, as long as it takes. If it is not, its documents are written without
        (the argument is None) when the service has not answered within `deadline` (2 s by default), and again when it
        is back. `complete`: the service answers for every key, if only with None; an answer that lacks some is
        repeated. `refresh_after`: so old, and no older, an answer becomes in a document while the pipeline runs; the
        tables that ask are read over and over, at a rate that suffices for it. At least twice `ttl`.

        `keys`: how the rows are found whose answers are said to have changed. `derived`: in the source, by the columns
        that they were asked by. `kept`: by a note in the state store for each row, written with every change of it.

        Raises UsageError: a look-up of that name exists, a wrong signature, a limit that is not above 0.
        """

        if callable(without_parentheses):
            raise UsageError(f"{_where(without_parentheses)}: @….lookup needs parentheses; write @….lookup().")

        def declare(function: LookupFunction) -> Lookup:
            where = _where(function)
            name = function.__name__
            numbers = {"batch": batch, "cache_size": cache_size, "concurrency": concurrency, "trip_after": trip_after}
            for option, number in numbers.items():
                if not isinstance(number, int) or isinstance(number, bool):  # pyright: ignore[reportUnnecessaryIsInstance] -- users need not type-check
                    raise UsageError(f"{where}: {option} takes a whole number, not {number!r}.")
            if name in self.lookups:
                raise UsageError(f"{where}: look-up {name} is declared twice.")
            if keys not in get_args(Keys):
                raise UsageError(f"{where}: keys are {' or '.join(get_args(Keys))}, not {keys!r}.")
            if not _is_plain(function) and not inspect.iscoroutinefunction(function):
                raise UsageError(f"{where}: a look-up is no generator; it returns a mapping from key to answer.")
            if required and deadline is not None:
                raise UsageError(f"{where}: a look-up that is required has no deadline; write required=False as well.")
            if len(_positional(function)) != 1:
                raise UsageError(f"{where}: a look-up takes one argument, the list of keys.")
            try:
                ttl_s, timeout_s, pause_s = map(parse_duration_s, (ttl, timeout, pause))
                missing_ttl_s = ttl_s if missing_ttl is None else parse_duration_s(missing_ttl)
                deadline_s = None if required else parse_duration_s(DEADLINE if deadline is None else deadline)
                refresh_after_s = None if refresh_after is None else parse_duration_s(refresh_after)
            except ValueError as error:
                raise UsageError(f"{where}: {error}.") from None
            if min(numbers.values()) < 1 or timeout_s <= 0 or min(ttl_s, missing_ttl_s) < 0:
                raise UsageError(f"{where}: batch, cache_size, concurrency, trip_after and timeout must be above 0.")
            if pause_s <= 0 or (deadline_s is not None and deadline_s <= 0):
                raise UsageError(f"{where}: pause and deadline must be above 0.")
            if refresh_after_s is not None and refresh_after_s < max(2 * ttl_s, 2 * missing_ttl_s, REFRESH_LEAST_S):
                raise UsageError(
                    f"{where}: refresh_after must be at least twice ttl and missing_ttl, for as old an answer may be"
                    f" when it is written, and {REFRESH_LEAST_S:g} s."
                )
            declared = Lookup(
                function,
                batch=batch,
                ttl_s=ttl_s,
                missing_ttl_s=missing_ttl_s,
                cache_size=cache_size,
                timeout_s=timeout_s,
                concurrency=concurrency,
                required=required,
                deadline_s=deadline_s,
                trip_after=trip_after,
                pause_s=pause_s,
                complete=complete,
                refresh_after_s=refresh_after_s,
                keys=keys,
            )
            self.lookups[name] = declared
            return declared

        return declare


def _where(function: Callable[..., object]) -> str:
    """`processor.py line 12 (movie)`: where a function is, as a message names it."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__name__", repr(function))
    return f"{Path(code.co_filename).name} line {code.co_firstlineno} ({name})" if code else name


def _check_parts(parts: Mapping[str, PartSpec], where: str) -> None:
    for name, part in parts.items():
        if not isinstance(part, PartSpec):  # pyright: ignore[reportUnnecessaryIsInstance] -- users need not type-check
            raise UsageError(f'{where}: parts={{"{name}": …}} takes one("schema.name") or many("schema.name").')
        if part.most < 1:
            raise UsageError(f"{where}, part {name}: most must be above 0.")
        if part.to is not None and part.through is None:
            raise UsageError(f"{where}, part {name}: `to` is of the table that is named by `through`.")
        _check_parts(part.parts or {}, f"{where}, part {name}")


def _positional(function: Callable[..., object]) -> list[inspect.Parameter]:
    """Return the parameters that a call by position must fill."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _is_plain(function: Callable[..., object]) -> bool:
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return not any(is_kind(function) for is_kind in kinds)


def _check_to(to: object, where: str) -> None:
    if isinstance(to, str):
        raise UsageError(f'{where}: `to` takes a list of sinks; write to=["{to}"].')
    names = cast("Sequence[object]", to) if isinstance(to, list | tuple) else None
    if to is not None and (names is None or not all(isinstance(name, str) for name in names)):
        raise UsageError(f'{where}: `to` takes a list of sinks\' names, such as to=["cache"].')
    if names is not None and not names:
        raise UsageError(f"{where}: to=[] names no sink; leave `to` out for all of them.")
    twice = next((name for name in names or () if (names or ()).count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{where}: `to` names {twice!r} twice.")


def _are_generations(to: Iterable[str], where: str) -> bool:
    """Tell whether these are generations of sinks, as `search.1`. Raises UsageError when some are and some are not."""
    parts = [name.partition(".") for name in to]
    if not any(dot for _, dot, _ in parts):
        return False
    if not all(dot and number.isdecimal() for _, dot, number in parts):
        raise UsageError(
            f'{where}: `to` names a generation, as "search.1", so it can name nothing else; declare one function for'
            " the sinks, and another for the generation."
        )
    return True


def _check_signature(function: ProcessorFunction, where: str, enrich: Mapping[str, Enrichment]) -> None:
    if not _is_plain(function):
        raise UsageError(f"{where}: a processor is a plain function; it returns a document or None.")
    try:
        inspect.signature(function).bind({}, **dict.fromkeys(enrich))
    except TypeError as error:
        expected = ", ".join(["row", *enrich])
        raise UsageError(f"{where}: it must take ({expected}), as `enrich` says, but {error}.") from None


def _spec_beside(function: Callable[..., object]) -> PipelineSpec | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    folder = Path(code.co_filename).resolve().parent if code else None
    return load_spec(folder) if folder is not None and (folder / SPEC_FILE).is_file() else None


def _check_against(spec: PipelineSpec, name: str, table: str, to: Iterable[str], where: str) -> None:
    if spec.name != name:
        raise UsageError(f"{where}: Pipeline({name!r}), but {SPEC_FILE} is of {spec.name!r}; they must be the same.")
    if table not in spec.tables:
        raise UsageError(f"{where}: table {table!r} is not in {SPEC_FILE}, which has {', '.join(spec.tables)}.")
    for sink in to:
        if sink.partition(".")[0] not in spec.sinks:
            raise UsageError(f"{where}: there is no sink {sink!r} in {SPEC_FILE}, which has {', '.join(spec.sinks)}.")


def check_complete(pipeline: Pipeline, spec: PipelineSpec) -> None:
    """Raise UsageError unless pipeline and specification name the same tables and sinks."""
    for processor in pipeline.functions():
        _check_against(spec, pipeline.name, processor.table, processor.to, _where(processor.function))
    for handler in pipeline.handlers.values():
        _check_against(spec, pipeline.name, handler.table, (), _where(handler.function))
    for root, document in pipeline.documents.items():
        check_documents([document], spec, _where(pipeline.tables[root].function))
    parts = {table for document in pipeline.documents.values() for table in document.tables}
    for table in spec.tables:
        if table not in pipeline.tables and table not in parts:
            raise UsageError(
                f"{SPEC_FILE} has table {table}, but processor.py has no function for it; declare one, or give the"
                " table a `shape` (shape: {} is the row as it is), or make it a part of a document."
            )


def check_columns(pipeline: Pipeline, tables: Mapping[str, Table]) -> None:
    """Raise UsageError unless every look-up is asked by a column that is there, and whose values can be compared."""
    for processor in pipeline.functions():
        name = processor.table
        columns = {column.name: column for column in tables[name].columns} if name in tables else {}
        for argument, (lookup, column_name) in processor.enrich.items():
            if not isinstance(column_name, str):
                continue
            where = f"{_where(processor.function)}: {argument}={lookup.name}.by({column_name!r})"
            column = columns.get(column_name)
            if columns and column is None:
                raise UsageError(f"{where}, but {name} has no such column; it has {', '.join(columns)}.")
            if column is not None and (column.dimensions or column.kind in (Kind.JSON, Kind.MAP)):
                raise UsageError(f"{where}, but {column_name} is {column.type}; a look-up is asked by single values.")


def load_processor(folder: Path, spec: PipelineSpec) -> Pipeline:
    """Import `processor.py` of a pipeline's folder and return its pipeline.

    Raises UsageError: it is missing, does not import, or does not fit the specification.
    """
    path = folder / PROCESSOR_FILE
    if not path.is_file() and spec.shapes.keys() == spec.tables.keys():
        return with_shapes(Pipeline(spec.name), spec)
    if not path.is_file():
        raise UsageError(f"There is no {path}; `deltactl pipeline create` writes one.")
    module_name = f"delta_processor_{spec.name}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except DeltaError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file raises is about that file
        line = _line_in(error, path)
        raise UsageError(f"{path}{line} does not import: {type(error).__name__}: {error}.") from error
    found = [value for value in vars(module).values() if isinstance(value, Pipeline)]
    if len(found) != 1:
        raise UsageError(f"{path} must define one Pipeline, and defines {len(found)}.")
    made = with_shapes(found[0], spec)
    check_complete(made, spec)
    return made


def with_shapes(pipeline: Pipeline, spec: PipelineSpec) -> Pipeline:
    """Return the pipeline with the tables' shapes; one that has a shape and no function is a document by that alone.

    The shape is done first, so a function is called with what is left of the row. Look-ups are asked by the source's
    columns all the same. The pipeline that was declared stays as it is.
    """
    made = Pipeline(pipeline.name)
    made.lookups, made.tables = pipeline.lookups, dict(pipeline.tables)
    made.handlers, made.documents = pipeline.handlers, pipeline.documents
    made.generations = dict(pipeline.generations)
    parts = {table for document in pipeline.documents.values() for table in document.tables}
    for name, shape in spec.shapes.items():
        if name in parts and name not in pipeline.tables:
            if shape != ShapeSpec(mask=shape.mask):
                raise UsageError(
                    f"{SPEC_FILE}, tables.{name}.shape: {name} is a part of a document, of which a shape can only mask"
                    " columns; the document's function does the rest."
                )
            continue
        declared = pipeline.tables.get(name) or TableProcessor(name, _as_it_is, (), {})
        made.tables[name] = declared._replace(shape=compiled(shape))
        own = pipeline.generations.get(name, {})
        made.generations[name] = {sink: one._replace(shape=made.tables[name].shape) for sink, one in own.items()}
    return made


def _as_it_is(row: Document) -> Document:
    return row


def _line_in(error: BaseException, path: Path) -> str:
    own = path.resolve()  # Python names a module's file by its absolute path, whatever path it was loaded by
    if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename).resolve() == own:
        return f" line {error.lineno}"
    trace, line = error.__traceback__, None
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == own:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" line {line}" if line else ""
