"""Shaping without code: what `pipeline.yaml` says about a table's rows before anybody's function sees them.

Masks are applied where a value is read (`masking.py`); the rest, here, once for each row that is processed: filters,
then columns, constants and computed fields. All of it is pure, so every way that a row takes leads to one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from delta_sync.changes import Change
from delta_sync.errors import ProcessorError, UsageError
from delta_sync.expressions import parse_expression
from delta_sync.masking import Mask
from delta_sync.spec import ShapeSpec
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Document, Row, to_json

Shape = Callable[[Row], "Document | None"]


def compiled(shape: ShapeSpec) -> Shape:
    """Return the function from a row, which stays as it is, to what is left of it; None: the filter leaves it out.

    It raises ProcessorError for a row of which a field cannot be computed.
    """
    filter_ = parse_expression(shape.where).evaluate if shape.where is not None else None
    included = [(name, shape.rename.get(name, name)) for name in shape.include or ()]
    dropped, renamed = frozenset(shape.exclude), dict(shape.rename)
    constant = dict(shape.constant)
    computed = [(name, parse_expression(text).evaluate) for name, text in shape.computed.items()]

    def shaped(row: Row) -> Document | None:
        if filter_ is not None and not filter_(row):
            return None
        document: Document
        if included:
            document = {new: row[old] for old, new in included}
        elif renamed or dropped:
            document = {renamed.get(name, name): value for name, value in row.items() if name not in dropped}
        else:
            document = row.copy()
        document.update(constant)
        for name, evaluate in computed:
            try:
                document[name] = evaluate(row)
            except ProcessorError as error:
                raise ProcessorError(f"Computed field {name}: {error}") from error
        return document

    return shaped


def masked(table: Table, shape: ShapeSpec | None) -> Table:
    """Return the table with its columns' masks. Raises UsageError for a shape that does not fit the table's columns.

    That includes a column that is not there: a mask of a name that has changed would mask nothing.
    """
    if shape is None:
        return table
    names = [column.name for column in table.columns]
    where = f"pipeline.yaml, tables.{table.id}.shape"
    for option, given in _columns_named(shape).items():
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise UsageError(f"{where}.{option}: {table.id} has no column {unknown}; it has {', '.join(names)}.")
    key = next((name for name in table.key if name in shape.mask), None)
    if key is not None:
        raise UsageError(
            f"{where}.mask: {key} is of the key, and a key cannot be masked: it is what documents are found, written"
            " and deleted by. Give the table a key without meaning, or leave the column out of the documents by"
            " `exclude` where its value may be in ids and messages."
        )
    fields = _fields(table, shape)
    twice = next((name for name in fields if fields.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{where}: two fields of a document would be called {twice}; rename one, or exclude it.")
    masks = {name: mask.mask for name, mask in shape.mask.items()}
    return table._replace(columns=tuple(c._replace(mask=masks.get(c.name)) for c in table.columns))


def _columns_named(shape: ShapeSpec) -> dict[str, list[str]]:
    return {
        "mask": list(shape.mask),
        "include": list(shape.include or ()),
        "exclude": list(shape.exclude),
        "rename": list(shape.rename),
        **({"where": sorted(parse_expression(shape.where).columns)} if shape.where is not None else {}),
        **{f"computed.{name}": sorted(parse_expression(text).columns) for name, text in shape.computed.items()},
    }


def _fields(table: Table, shape: ShapeSpec) -> list[str]:
    kept = shape.include or [column.name for column in table.columns if column.name not in shape.exclude]
    return [*(shape.rename.get(name, name) for name in kept), *shape.constant, *shape.computed]


def shaped_table(table: Table, shape: ShapeSpec | None) -> Table:
    """Return the table as its documents are, for a sink that makes a mapping of it. Its key stays, by its names."""
    if shape is None:
        return table
    kept = shape.include or [column.name for column in table.columns if column.name not in shape.exclude]
    there = {column.name: column for column in table.columns}  # one that is not is told of by `masked`
    columns = {shape.rename.get(name, name): _as_masked(there[name], shape) for name in kept if name in there}
    of_key = {name: table.column(name) for name in table.key if name not in columns}
    made = tuple(column._replace(name=name) for name, column in columns.items())
    return table._replace(columns=(*of_key.values(), *made))


def _as_masked(column: Column, shape: ShapeSpec) -> Column:
    return Column(column.name, "text", Kind.TEXT) if column.name in shape.mask else column


def fingerprint(shape: ShapeSpec | None) -> str:
    """Return a text that changes whenever the shape does; empty without one. No secret goes into it."""
    if shape is None:
        return ""
    return "shape " + hashlib.sha256(to_json(shape.model_dump(mode="json"))).hexdigest()[:32]


def mask_functions(table: Table) -> dict[str, Callable[[Any], Any]]:
    """Return what masks the columns' values, by column; nothing for most tables. Raises UsageError as `Mask` does."""
    return {column.name: column.mask.function() for column in table.columns if column.mask is not None}


def masked_again(table: Table, change: Change) -> Change:
    """Return a change that was kept with its row masked: it may be from before there was a mask."""
    functions = mask_functions(table)
    if change.row is None or not functions:
        return change
    row = change.row.copy()
    for name, function in functions.items():
        if row.get(name) is not None:
            row[name] = function(row[name])
    return change._replace(row=row)


def without_values(table: Table | None, event: Mapping[str, object]) -> Mapping[str, object]:
    """Return what may be shown of an event that could not be decoded: of a table with masks, no column's value."""
    if table is None or not any(column.mask for column in table.columns):
        return event
    return {name: event[name] for name in ("record", "op", "source") if name in event}


__all__ = ["Mask", "Shape", "compiled", "fingerprint", "mask_functions", "masked", "shaped_table", "without_values"]
