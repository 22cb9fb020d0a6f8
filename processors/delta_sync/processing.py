"""From rows to writes: look-ups for the whole batch, then the user's function for each row. One bad row fails alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

from delta_sync.changes import Change, Key, Write, newest_per_key
from delta_sync.errors import ProcessorError
from delta_sync.events import RowEvent
from delta_sync.lookups import Answers, LookupCaller
from delta_sync.pipeline import KeyFunction, TableProcessor
from delta_sync.tables import Kind, Table
from delta_sync.values import Document, Row
from delta_sync.watchdog import AtHand, ProcessorTimeout

Stage = Literal["decode", "process", "lookup", "apply", "handle"]
_KINDS_WITH_MANY_SPELLINGS = (Kind.DECIMAL, Kind.FLOAT, Kind.INTERVAL)  # 1.0 and 1.00 are one key


class Failure(NamedTuple):
    """A change that could not be processed: at which stage, and why."""

    change: Change
    stage: Stage
    error: str
    trace: str
    sink: str | None = None
    event: RowEvent | None = None  # of a handler


class Asked(NamedTuple):
    """Which keys the look-ups of a table's changes are asked with: `keys[i]` are those of `changes[i]`.

    In the order of the processor's arguments; None: it is not asked, as for a row that is gone. `failures` are the
    changes of which nobody knows.
    """

    processor: TableProcessor
    changes: list[Change]
    keys: list[tuple[Any, ...]]
    failures: list[Failure]


class Processed(NamedTuple):
    """What became of a table's changes: a write for each, but for the failures. `changes[i]` led to `writes[i]`."""

    changes: list[Change]
    writes: list[Write]
    failures: list[Failure]
    left: Mapping[str, list[Key]] = MappingProxyType({})  # by look-up that is not required: written without its answer


def process(
    table: Table,
    processor: TableProcessor,
    changes: Sequence[Change],
    lookups: Mapping[str, LookupCaller],
    at_hand: AtHand | None = None,
    asked: Asked | None = None,
) -> Processed:
    """Return the writes of a table's changes. Raises LookupBusy when a look-up did not answer before Delta stopped.

    `at_hand` is told which change the function is called with, and no other. `asked` is what `asked_of` returned of
    these changes, if it was called already.
    """
    at_hand = at_hand or AtHand()
    failures: list[Failure] = []
    left: dict[str, list[Key]] = {}
    if processor.enrich:
        changes, arguments = _enrich(asked or asked_of(processor, changes, at_hand), lookups, failures, left)
    else:
        arguments = None
    function, shape = processor.function, processor.shape
    parts = [part.name for part in table.parts] if table.query is None else []
    # What a NamedTuple's own does, without its call of a Python function.
    new = cast("Callable[..., Write]", tuple.__new__)  # pyright: ignore[reportUnknownMemberType] -- typeshed's is generic
    done: list[Change] = []
    writes: list[Write] = []
    for index, change in enumerate(changes):
        _, key, version, row = change
        if row is None:
            document = None
        else:
            try:
                at_hand.change = change
                # A copy: the row itself must stay as it was, for a dead letter.
                given = row.copy() if shape is None else shape(row)
                if parts:
                    given = _with_parts(row, given, parts)
                if given is None:
                    document = None
                else:
                    document = function(given) if arguments is None else function(given, **arguments[index])
                at_hand.change = None  # within: what ends the function is raised only while it is at hand
            except (Exception, ProcessorTimeout) as error:  # noqa: BLE001 -- it is the user's function: whatever it raises is this change's
                at_hand.change = None
                failures.append(failure(change, "process", error))
                continue
            if document is not None and type(document) is not dict:
                if not isinstance(document, dict):  # pyright: ignore[reportUnnecessaryIsInstance] -- the user's function
                    reason = ProcessorError(f"It returned a {type(document).__name__}; a document is a dict, or None.")
                    failures.append(failure(change, "process", reason))
                    continue
                document = dict(document)
        done.append(change)
        writes.append(new(Write, (key, version, document)))
    if len(writes) > 1 and any(table.column(name).kind in _KINDS_WITH_MANY_SPELLINGS for name in table.key):
        kept = newest_per_key(writes)
        if len(kept) < len(writes):
            by_write = {id(write): change for change, write in zip(done, writes, strict=True)}
            done, writes = [by_write[id(write)] for write in kept], kept
    return Processed(done, writes, failures, left)


def _with_parts(row: Row, given: Document | None, parts: Sequence[str]) -> Document | None:
    """Return what a function is given of a document's row. Raises ProcessorError for one that could not be read."""
    error = next((row[name] for name in parts if isinstance(row[name], ProcessorError)), None)
    if error is not None:
        raise error
    return None if given is None else {**given, **{name: row[name] for name in parts}}


def failure(change: Change, stage: Stage, error: BaseException, sink: str | None = None) -> Failure:
    """Return the failure that an exception means for a change."""
    trace = "".join(traceback.format_exception(error))
    return Failure(change, stage, f"{type(error).__name__}: {error}", trace, sink)


def asked_of(processor: TableProcessor, changes: Sequence[Change], at_hand: AtHand | None = None) -> Asked:
    """Return with which keys the look-ups of a table's changes are to be asked.

    `at_hand` is told which change a function that returns a key is called with, and no other.
    """
    ways = [by for _, by in processor.enrich.values()]
    if not ways:
        return Asked(processor, [], [], [])  # nothing is asked, and `process` does not look at it
    none = (None,) * len(ways)
    columns = [by for by in ways if isinstance(by, str)]
    if len(columns) == len(ways):
        keys = [none if row is None else tuple(map(row.get, columns)) for _, _, _, row in changes]
        return Asked(processor, list(changes), keys, [])
    at_hand = at_hand or AtHand()
    asked = Asked(processor, [], [], [])
    for change in changes:
        found = none
        if change.row is not None:
            try:
                at_hand.change = change
                found = tuple(_key_of(by, change.row) for by in ways)
                at_hand.change = None  # within: as for the processor's function
            except (Exception, ProcessorTimeout) as error:  # noqa: BLE001 -- it is the user's function, too
                at_hand.change = None
                asked.failures.append(failure(change, "lookup", error))
                continue
        asked.changes.append(change)
        asked.keys.append(found)
    return asked


def _key_of(by: str | KeyFunction, row: Row) -> Any:
    """Return a row's key for a look-up. Raises what a function raises, and ProcessorError for what is no key."""
    if isinstance(by, str):
        return row.get(by)
    key = by(row.copy())  # the row itself must stay as it was
    if key is not None and type(key) not in (str, int):
        raise ProcessorError(f"It returned a {type(key).__name__}; a key is a text or a whole number, or None.")
    return key


def _enrich(
    asked: Asked,
    lookups: Mapping[str, LookupCaller],
    failures: list[Failure],
    left: dict[str, list[Key]],
) -> tuple[list[Change], list[dict[str, Any]]]:
    """Return the changes whose look-ups have answers, with the arguments for each; note in `left` which lack some."""
    enrich = asked.processor.enrich
    failures += asked.failures
    keys: dict[str, list[Any]] = {}  # by look-up: two columns may ask one
    for place, (lookup, _) in enumerate(enrich.values()):
        keys.setdefault(lookup.name, []).extend(some[place] for some in asked.keys if some[place] is not None)
    answers = _ask(keys, lookups)
    kept: list[Change] = []
    arguments: list[dict[str, Any]] = []
    for change, own in zip(asked.changes, asked.keys, strict=True):
        values: dict[str, Any] = {}
        error: Exception | None = None
        lacks: set[str] = set()
        if change.row is not None:
            for (name, (lookup, _)), key in zip(enrich.items(), own, strict=True):
                found, failed, left_out = answers[lookup.name]
                error = error or failed.get(key)
                values[name] = found.get(key)
                if key in left_out:
                    lacks.add(lookup.name)
        if error is not None:
            failures.append(failure(change, "lookup", error))
        else:
            kept.append(change)
            arguments.append(values)
            for name in lacks:
                left.setdefault(name, []).append(change.key)
    return kept, arguments


def _ask(keys: Mapping[str, Iterable[Any]], lookups: Mapping[str, LookupCaller]) -> dict[str, Answers]:
    """Ask several look-ups at once. Each has its own bound of calls; the one that takes longest is waited for."""
    first, *others = keys
    if not others or lookups[first].inline:
        return {name: lookups[name].fetch(some) for name, some in keys.items()}
    with ThreadPoolExecutor(len(others), thread_name_prefix="enrich") as pool:
        asked = {name: pool.submit(lookups[name].fetch, keys[name]) for name in others}
        answers = {first: lookups[first].fetch(keys[first])}
        return answers | {name: future.result() for name, future in asked.items()}
