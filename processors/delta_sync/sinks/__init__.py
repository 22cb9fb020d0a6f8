"""The sinks that are installed, found by the entry-point group `delta_sync.sinks` and chosen by a URL's scheme.

A package adds one with `[project.entry-points."delta_sync.sinks"]`; nothing here knows a sink by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, cast
from urllib.parse import urlunsplit

from pydantic import ValidationError

from delta_sync.errors import UsageError
from delta_sync.secrets import resolve, resolve_url
from delta_sync.shaping import shaped_table
from delta_sync.sinks.base import Sink, Target
from delta_sync.spec import PipelineSpec, SinkSpec, validation_sentences
from delta_sync.tables import Table
from delta_sync.urls import parts_of

GROUP = "delta_sync.sinks"

AnySink = Sink[Any, Any]


class Installed(NamedTuple):
    """The sinks' classes by the name of their entry point, and why others could not be imported."""

    classes: Mapping[str, type[AnySink]]
    broken: Mapping[str, str]

    @property
    def schemes(self) -> dict[str, str]:
        """The kind of sink (the entry point's name) that each scheme stands for, in alphabetical order."""
        return {scheme: kind for kind in sorted(self.classes) for scheme in self.classes[kind].schemes}


@cache
def installed() -> Installed:
    """Import every sink that is installed. One that cannot be imported must not take the others with it."""
    classes: dict[str, type[AnySink]] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            classes[point.name] = point.load()
        except Exception as error:  # noqa: BLE001 -- somebody else's module may raise anything while it is imported
            broken[point.name] = f"{type(error).__name__}: {error}"
    return Installed(classes, broken)


def kind_of(name: str, url: str) -> str:
    """Return the kind of sink that a URL is for. Raises UsageError listing the schemes that are installed."""
    known = installed()
    scheme, separator, _ = url.partition("://")
    kind = known.schemes.get(scheme.lower()) if separator else None
    if kind is not None:
        return kind
    wrong = f"{scheme}:// is no kind of store that is installed" if separator else "the URL has no scheme"
    message = f"Sink {name}: {wrong}; there are {', '.join(f'{scheme}://' for scheme in known.schemes) or 'none'}."
    for broken, reason in known.broken.items():
        message += f" The sink {broken} is installed, but cannot be imported ({reason})."
    raise UsageError(message)


def sink_class(name: str, url: str) -> type[AnySink]:
    """Return the class for a sink's URL. Raises UsageError."""
    scheme = url.partition("://")[0].lower()
    # Most are called like their first scheme; to import only that one saves the other stores' clients.
    for point in entry_points(group=GROUP, name=scheme):
        with contextlib.suppress(Exception):  # `installed` tells what is wrong with it
            cls: type[AnySink] = point.load()
            if scheme in cls.schemes:
                return cls
    return installed().classes[kind_of(name, url)]


def open_sink(name: str, spec: SinkSpec, tombstone_ttl_s: float, number: int | None = None) -> AnySink:
    """Return the sink that a specification describes, its secrets resolved. Connects to nothing.

    With the number of a generation it is called `name.number`.

    Raises UsageError: unknown scheme, options that are not the sink's, a reference that cannot be resolved.
    """
    cls = sink_class(name, spec.url)
    try:
        validated = cls.options_model.model_validate(_resolved(spec.options))
    except ValidationError as error:
        raise UsageError(
            validation_sentences(error, f"sinks.{name}", cls.options_model)
        ) from None  # its own text quotes values
    full = name if number is None else f"{name}.{number}"
    sink = cls(full, resolve_url(spec.url), validated, round(tombstone_ttl_s))
    sink.number = number
    return sink


def _resolved(value: Any) -> Any:
    """Return an option's value, or all of them, with what its references stand for, however deep they are in it."""
    match value:
        case str():
            return resolve(value)
        case dict():
            return {name: _resolved(part) for name, part in cast("dict[str, Any]", value).items()}
        case list():
            return [_resolved(part) for part in cast("Sequence[Any]", value)]
        case _:
            return value


def base_name(name: str) -> str:
    """Return what `pipeline.yaml` calls a sink: without the number of its generation."""
    return name.partition(".")[0]


def open_sinks(spec: PipelineSpec) -> dict[str, AnySink]:
    """Return every sink of a pipeline, by name. Raises UsageError."""
    return {name: open_sink(name, sink, spec.tombstone_ttl) for name, sink in spec.sinks.items()}


def target_for(sink: AnySink, table: Table, spec: PipelineSpec) -> Target:
    """Return where a table's documents go in a sink. Raises UsageError when its options do not fit."""
    given = spec.tables[table.id].sinks.get(base_name(sink.name), {}) if table.id in spec.tables else {}
    table = shaped_table(table, spec.shapes.get(table.id))
    try:
        options = sink.target_model.model_validate(given)
    except ValidationError as error:
        raise UsageError(
            validation_sentences(error, f"tables.{table.id}.sinks.{sink.name}", sink.target_model)
        ) from None  # its own text quotes values
    return sink.target(table, options)


def targets_of(
    sinks: Iterable[AnySink], tables: Iterable[Table], spec: PipelineSpec
) -> list[tuple[AnySink, list[Target]]]:
    """Return the targets of all tables in all sinks. Raises UsageError, also when two would share a place."""
    listed = list(tables)
    found = [(sink, [target_for(sink, table, spec) for table in listed]) for sink in sinks]
    refuse_shared_places([(sink, target) for sink, targets in found for target in targets])
    return found


def refuse_shared_places(targets: Sequence[tuple[AnySink, Target]]) -> None:
    """Raise UsageError when two of these targets would be the same place: one would overwrite the other's documents.

    Two sinks are the same store when their URLs are, apart from who logs in and how.
    """
    owners: dict[tuple[str, str], tuple[AnySink, Target]] = {}
    for sink, target in targets:
        place = (store_of(sink.url), target.place)
        first = owners.setdefault(place, (sink, target))
        if first[1] is target:
            continue
        other_sink, other = first
        if other_sink is sink:
            raise UsageError(
                f"Sink {sink.name}: tables {other.table.id} and {target.table.id} would both be written to"
                f" {target.place}; leave that name out of the sink's url, so that each table has a place of its own, or"
                f" name one in pipeline.yaml under tables.{target.table.id}.sinks.{sink.name}."
            )
        tables = " and ".join(dict.fromkeys([other.table.id, target.table.id]))
        raise UsageError(
            f"Sinks {other_sink.name} and {sink.name} are the same store, and both would write {target.place}"
            f" (for {tables}); remove one of the sinks."
        )


def store_of(url: str) -> str:
    """Return which store a URL is for, without who logs in and how."""
    parts = parts_of(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2].lower(), parts.path.rstrip("/"), "", ""))
