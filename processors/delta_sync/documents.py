"""Documents that are built from several tables: what they are made of, and which change makes which of them anew.

Declared are a root table and its parts; how their rows belong together comes from the source's foreign keys. A change
of any of these rows is only a reason to build documents anew: `watches` says which columns of it lead, over which hops
through the other tables, to the keys of the root. All decisions are pure; sources read and follow them in one snapshot.
`docs/design/documents.md` has the argument for why no change is missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from delta_sync.errors import Problem, UsageError
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Kind, Link, Part, Table

MOST = 10_000  # rows of a part in one document: more is no document that a store would take
DEBOUNCE = (
    "200ms"  # a reader hardly sees the difference, and a burst of a million changes builds a document a few times
)


class PartSpec(NamedTuple):
    """A declared part. `on` and `to` name the columns where there is no foreign key, or several; see `one`, `many`."""

    table: str
    many: bool
    through: str | None = None
    on: Mapping[str, str] | None = None
    to: Mapping[str, str] | None = None
    order_by: tuple[str, ...] = ()
    most: int = MOST
    parts: Mapping[str, PartSpec] | None = None


class DocumentSpec(NamedTuple):
    """A declared document: its root table, its parts by their names, and how often it may be built."""

    root: str
    parts: Mapping[str, PartSpec]
    query: str | None = None
    debounce_s: float = 0.2

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that it is made of, the root first."""
        return tuple(dict.fromkeys([self.root, *_tables_of(self.parts)]))


class ForeignKey(NamedTuple):
    """A foreign key of the source: these columns of `table` are those of `referenced`."""

    table: str
    columns: tuple[str, ...]
    referenced: str
    referenced_columns: tuple[str, ...]


def one(table: str, *, on: Mapping[str, str] | None = None, parts: Mapping[str, PartSpec] | None = None) -> PartSpec:
    """Declare a part that is one row of `table` (a dict), or None: what the row above refers to, or what refers to it.

    `on` maps columns of `table` to columns of the row above, for want of a foreign key, or when there are several.
    `parts` are the parts of this row.
    """
    return PartSpec(table, many=False, on=on, parts=parts)


def many(
    table: str,
    *,
    through: str | None = None,
    on: Mapping[str, str] | None = None,
    to: Mapping[str, str] | None = None,
    order_by: str | Sequence[str] = (),
    most: int = MOST,
    parts: Mapping[str, PartSpec] | None = None,
) -> PartSpec:
    """Declare a part that is a list of rows of `table` (dicts): those that refer to the row above, by `order_by`.

    With `through`, those that a row of that table links to it; `on` maps columns of the link to columns of the row
    above, and `to` columns of the link to columns of `table`. A document with more than `most` is a dead letter.
    """
    ordered = (order_by,) if isinstance(order_by, str) else tuple(order_by)
    return PartSpec(table, many=True, through=through, on=on, to=to, order_by=ordered, most=most, parts=parts)


def _tables_of(parts: Mapping[str, PartSpec] | None) -> Iterator[str]:
    for part in (parts or {}).values():
        yield part.table
        if part.through is not None:
            yield part.through
        yield from _tables_of(part.parts)


# ── from what is declared to what is read ────────────────────────────────────────────────────────────────────────


def resolved(spec: DocumentSpec, tables: Mapping[str, Table], keys: Sequence[ForeignKey]) -> Table:
    """Return the root table with its parts, as they are to be read.

    `tables` has all of the document's, by name. Raises UsageError: a part that does not belong to the row above, or
    does so in several ways; columns that the log does not tell; names that are taken.
    """
    root = tables[spec.root]
    parts = _resolved_parts(root, spec.parts, tables, keys, f"document {spec.root}")
    table = root._replace(parts=parts, query=spec.query)
    for watch in watches(table):
        _check_in_log(watch.table, watch.columns, spec.root)
    return table


def _resolved_parts(
    above: Table,
    declared: Mapping[str, PartSpec],
    tables: Mapping[str, Table],
    keys: Sequence[ForeignKey],
    where: str,
) -> tuple[Part, ...]:
    made: list[Part] = []
    taken = {column.name for column in above.columns}
    for name, spec in declared.items():
        place = f"{where}, part {name}"
        if name in taken:
            raise UsageError(f"{place}: {above.id} has a column of that name; call the part something else.")
        table = tables[spec.table]
        link: Link | None = None
        if spec.through is not None:
            between = tables[spec.through]
            columns, of = _joined(between, above, spec.on, keys, place, "on", down_only=True)
            to, part_columns = _joined(between, table, spec.to, keys, place, "to", down_only=True)
            link = Link(between, columns, to)
            columns = part_columns
        else:
            columns, of = _joined(table, above, spec.on, keys, place, "on", down_only=spec.many)
        nested = _resolved_parts(table, spec.parts or {}, tables, keys, place)
        unknown = next((c for c in spec.order_by if c not in {column.name for column in table.columns}), None)
        if unknown is not None:
            raise UsageError(f"{place}: order_by names {unknown}, and {table.id} has no such column.")
        made.append(
            Part(
                name,
                table._replace(parts=nested),
                spec.many,
                columns,
                of,
                link,
                tuple(dict.fromkeys([*spec.order_by, *table.key])),
                spec.most,
            )
        )
    return tuple(made)


def _joined(
    table: Table,
    above: Table,
    given: Mapping[str, str] | None,
    keys: Sequence[ForeignKey],
    place: str,
    option: str,
    *,
    down_only: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return columns of `table`, and those of `above` that they equal.

    `down_only`: only foreign keys of `table` count; without, those of `above`, too.
    """
    if given is not None:
        for owner, names in ((table, given.keys()), (above, given.values())):
            unknown = next((name for name in names if name not in {column.name for column in owner.columns}), None)
            if unknown is not None:
                raise UsageError(f"{place}: `{option}` names {unknown}, and {owner.id} has no such column.")
        return _unmasked(table, tuple(given.keys()), place), _unmasked(above, tuple(given.values()), place)
    found = [
        (key.columns, key.referenced_columns) for key in keys if (key.table, key.referenced) == (table.id, above.id)
    ]
    if not down_only:
        found += [
            (key.referenced_columns, key.columns) for key in keys if (key.table, key.referenced) == (above.id, table.id)
        ]
    found = list(dict.fromkeys(found))
    example = f'{option}={{"a column of {table.name}": "a column of {above.name}"}}'
    if not found:
        ways = f"from {table.id} to {above.id}" + ("" if down_only else ", or back")
        raise UsageError(f"{place}: there is no foreign key {ways}; say which columns are equal, with {example}.")
    if len(found) > 1:
        by = "; ".join(f"{', '.join(own)} = {', '.join(other)}" for own, other in found)
        raise UsageError(
            f"{place}: {table.id} and {above.id} belong together in {len(found)} ways ({by}); say which,"
            f" with {example}."
        )
    ((columns, of),) = found
    return _unmasked(table, columns, place), _unmasked(above, of, place)


def _unmasked(table: Table, names: tuple[str, ...], place: str) -> tuple[str, ...]:
    for name in names:
        column = table.column(name)
        if column.mask is not None:
            raise UsageError(f"{place}: {table.id}.{name} is masked, and rows are found by it; leave the mask out.")
        if column.dimensions or column.kind in (Kind.JSON, Kind.MAP):
            raise UsageError(f"{place}: {table.id}.{name} is {column.type}, and rows are found by single values.")
    return names


def _check_in_log(table: Table, columns: Sequence[str], root: str) -> None:
    """Raise UsageError unless the log tells these columns of a row that was deleted or changed, as they were before."""
    unseen = next((name for name in columns if not table.column(name).in_log), None)
    if unseen is not None:
        raise UsageError(
            f"{table.id}.{unseen} is {table.column(unseen).type}, which the log does not carry, and by it documents of"
            f" {root} are found; use another column."
        )
    hidden = next((name for name in columns if name not in table.key), None)
    if hidden is not None and not table.full_images:
        raise UsageError(
            f"The log does not say to which document of {root} a row of {table.id} belonged that is deleted or moved:"
            f" it lacks the old {hidden}. Type: ALTER TABLE {table.id} REPLICA IDENTITY FULL; or, for less log, make a"
            f" unique index on {', '.join(dict.fromkeys([*columns, *table.key]))} its identity."
        )


def fingerprint(table: Table, columns: Mapping[str, str]) -> str:
    """Return a text that changes whenever the columns of a table do, or anything that its documents are made of.

    `columns` has the same of each table by itself.
    """
    own = columns[table.id]
    if not table.is_document:
        return own
    of_parts = [f"{name} {columns.get(name, '')}" for name in sorted({part.id for part in tables_of(table)})]
    shape = repr((_shape(table), table.query, of_parts))
    return f"{own} document {hashlib.sha256(shape.encode()).hexdigest()[:16]}"


def _shape(table: Table) -> list[object]:
    links = [part.through and (part.through.table.id, *part.through[1:]) for part in table.parts]
    return [
        (part.name, part.table.id, part.many, part.columns, part.of, link, part.order_by, _shape(part.table))
        for part, link in zip(table.parts, links, strict=True)
    ]


def names_of(table: Table) -> set[str]:
    """Return the names of a table and of all that its documents are made of."""
    return {table.id, *(part.id for part in tables_of(table))}


def tables_of(table: Table) -> Iterator[Table]:
    """Yield the tables of a document's parts, some perhaps several times."""
    for part in table.parts:
        yield part.table
        if part.through is not None:
            yield part.through.table
        yield from tables_of(part.table)


def check_documents(documents: Iterable[DocumentSpec], spec: PipelineSpec, where: str) -> None:
    """Raise UsageError unless the specification has the documents' tables."""
    for document in documents:
        missing = next((name for name in document.tables if name not in spec.tables), None)
        if missing is not None:
            raise UsageError(
                f"{where}: table {missing!r} is not in pipeline.yaml, which has {', '.join(spec.tables)}; only what is"
                " there is captured."
            )


# ── which documents a change is about ────────────────────────────────────────────────────────────────────────────


class Hop(NamedTuple):
    """From values to values: of the rows of `table` whose columns `where` have the values, the columns `take`."""

    table: Table
    where: tuple[str, ...]
    take: tuple[str, ...]


class Watch(NamedTuple):
    """How a change of `table` leads to documents: by the values of `columns`, before and after, and over hops.

    The last hop's values are the root's key; without hops the columns' own are.
    """

    table: Table
    columns: tuple[str, ...]
    hops: tuple[Hop, ...]

    @property
    def needs_before(self) -> bool:
        """Whether the log has the old values only because the table's replica identity is FULL."""
        return not set(self.columns) <= set(self.table.key)


ToRoot = Callable[[tuple[str, ...]], tuple[Hop, ...]]
"""The hops to the root's key from values of some columns of a table above."""


def watches(root: Table) -> list[Watch]:
    """Return how changes of each table lead to documents of a root. Pure."""

    def to_root(columns: tuple[str, ...]) -> tuple[Hop, ...]:
        return () if columns == root.key else (Hop(root, columns, root.key),)

    return list(dict.fromkeys([Watch(root, root.key, ()), *_watches_of(root.parts, to_root)]))


def searches(root: Table) -> list[tuple[Table, tuple[str, ...]]]:
    """Return by which columns rows of which tables are looked up, to build documents and to find them. Pure."""
    found = [(hop.table, hop.where) for watch in watches(root) for hop in watch.hops]
    if root.query is None:
        found += _searches_of(root.parts)
    return list({(table.id, columns): (table, columns) for table, columns in found}.values())


def _searches_of(parts: Iterable[Part]) -> Iterator[tuple[Table, tuple[str, ...]]]:
    for part in parts:
        if part.through is not None:
            yield part.through.table, part.through.columns
        yield part.table, part.columns
        yield from _searches_of(part.table.parts)


def without_index(root: Table, first_columns: Mapping[str, Collection[str]]) -> list[Problem]:
    """Return a warning for each look-up that has to read a whole table. Pure.

    `first_columns` are the columns with which the indexes of a table begin.
    """
    return [
        Problem(
            f"document {root.id}",
            f"no index of {table.id} begins with {' or '.join(columns)}, by which its rows are looked up, so each time"
            " the whole table is read",
            f"type: CREATE INDEX ON {table.id} ({', '.join(columns)})",
            fatal=False,
        )
        for table, columns in searches(root)
        if not set(columns) & set(first_columns.get(table.id, ()))
    ]


def _watches_of(parts: Iterable[Part], above: ToRoot) -> Iterator[Watch]:
    for part in parts:
        link, way = part.through, above(part.of)
        if link is not None:
            yield Watch(link.table, link.columns, way)
            way = (Hop(link.table, link.to, link.columns), *way)
        yield Watch(part.table, part.columns, way)

        def to_root(columns: tuple[str, ...], part: Part = part, way: tuple[Hop, ...] = way) -> tuple[Hop, ...]:
            return way if columns == part.columns else (Hop(part.table, columns, part.columns), *way)

        yield from _watches_of(part.table.parts, to_root)
