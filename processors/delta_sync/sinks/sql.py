"""The SQL sink: PostgreSQL and SQLite, a column for each field of the documents.

A target is a table `<name>__delta` and a view `<name>`. The table has a row for each key, with Delta's own columns
(`_delta_id`, the key as text; `_version`; `_delta_deleted_ms`, of a tombstone) and the fields' columns. The view shows
what is not deleted, and is what users read. One upsert per batch compares versions and writes, in one step. The floor
(`truncate`) is a row of `<name>__delta_floor`: a batch locks it (shared) before it writes, so a truncate waits for the
batches that do not know its floor, and later ones see it. The same holds for a process that adds columns.

A generation N of a sink that is rebuilt has tables of its own, `<name>__gN__delta`, and the view shows one of them. Its
columns keep their order whichever that is: so PostgreSQL can replace it, and it stays what users' privileges and their
own views are about, unless a column goes or changes its type.

What a column holds is in `sql_values.py`, the tables and the view are made in `sql_tables.py`.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import sqlalchemy as sa
from pydantic import Field
from sqlalchemy import exc

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write, rejected
from delta_sync.errors import ColumnsAdded, DeltaError, Problem, SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import VERSION_FIELD, LoginOptions, Options, Sink, Stored, Target, TargetOptions
from delta_sync.sinks.columns import ID_COLUMN, MAX_NAME_BYTES, Kind, fields_of, is_storable, name_conflict, plain
from delta_sync.sinks.sql_link import Link, is_about_content, is_about_shape
from delta_sync.sinks.sql_tables import (
    DELETED_COLUMN,
    DELETED_INDEX,
    FLOOR,
    ROWS,
    Place,
    Shape,
    add_columns,
    addable,
    columns_of,
    create_tables,
    drop_tables,
    leads_here,
    lock_view,
    problems_of,
    shape_of,
    show,
)
from delta_sync.sinks.sql_upsert import Row, insertion, rows_of, upserting, values_of
from delta_sync.sinks.sql_values import document_of
from delta_sync.state_database import reading_of
from delta_sync.tables import Table, key_text
from delta_sync.values import Document

SCAN_BATCH = 5000  # ids and versions are some 60 bytes each
READ_KEYS = 10_000  # in one statement, below the 32,766 parameters that either database takes
SHAPE_LOOKS = 5  # at a table to which others add columns; each adds all of a batch's, so soon there is none left
SQLITE_NEEDED = (3, 35, 0)  # RETURNING


class SqlOptions(LoginOptions):
    """What a SQL sink may say beside its URL."""

    db_schema: str | None = Field(
        default=None,
        min_length=1,
        description="PostgreSQL's schema for tables and views; default: the first of the user's search_path.",
    )


class SqlTargetOptions(TargetOptions):
    """What one table may say about its place in a SQL sink."""

    table: str | None = Field(default=None, min_length=1, description="The view's name; default: the table's.")
    columns: dict[str, Kind] = Field(
        default_factory=dict,
        description="Types of fields' columns, where the first value must not decide, such as {rating: float}.",
    )


class SqlSink(Sink[SqlOptions, SqlTargetOptions]):
    """`postgresql://host[:port]/database` or `sqlite:////path/file.db`; see the module's text for what is stored."""

    schemes: ClassVar[tuple[str, ...]] = ("postgresql", "postgres", "sqlite")
    options_model: ClassVar[type[Options]] = SqlOptions
    target_model: ClassVar[type[TargetOptions]] = SqlTargetOptions
    generations: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        url: str,
        options: SqlOptions,
        tombstone_ttl_s: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Raise UsageError when the URL names no database or file. `now`, in seconds since 1970, dates tombstones."""
        super().__init__(name, url, options, tombstone_ttl_s)
        self._now = now
        self._link = Link(name, url, options)
        self.is_sqlite = self._link.is_sqlite
        self._shapes: dict[str, Shape] = {}

    # ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────

    def target(self, table: Table, options: SqlTargetOptions) -> Target:
        name, schema = options.table or table.name, self.options.db_schema
        own = name if self.number in (None, 1) else f"{name}__g{self.number}"
        if len(f"{own}{DELETED_INDEX}".encode()) > MAX_NAME_BYTES or "\0" in name:
            raise UsageError(
                f"sink {self.name}: the name {own!r} is too long: with {DELETED_INDEX} behind it, it must have at most"
                f" {MAX_NAME_BYTES} bytes; set `table`."
            )
        if name.endswith((ROWS, FLOOR)) or re.search(r"__g\d+$", name):
            raise UsageError(f"sink {self.name}: {name!r} ends as Delta's own tables do; set `table`.")
        for column in options.columns:
            if (reason := name_conflict(column)) is not None:
                raise UsageError(f"sink {self.name}: columns: {reason}.")
        place = f"{schema}.{own}" if schema else own
        settings = Place(schema, name, own, dict(options.columns), self.is_sqlite)
        return Target(table, place.lower() if self.is_sqlite else place, settings)

    def check(self, targets: Sequence[Target]) -> list[Problem]:
        where = f"sink {self.name}"
        if self._link.file is not None:
            folder = self._link.file.parent
            if not folder.is_dir():
                return [Problem(where, f"there is no folder {folder}", "create it, or correct the URL")]
            if not self._link.file.exists():
                return []  # to look would create it
        try:
            with self._link.typed_errors(), self._link.reading() as connection:
                problems = self._server_problems(where, connection)
                for target in targets:
                    place: Place = target.settings
                    problems += problems_of(connection, where, place, target.place, rebuilt=self.number is not None)
                return problems
        except DeltaError as error:
            fix = (
                "check its user and rights" if isinstance(error, SinkRefused) else "check its address and that it runs"
            )
            return [Problem(where, str(error), fix)]

    def _server_problems(self, where: str, connection: sa.Connection) -> list[Problem]:
        if self.is_sqlite:
            found = connection.dialect.server_version_info or ()
            if found < SQLITE_NEEDED:
                return [
                    Problem(where, f"SQLite is {'.'.join(map(str, found))}", "use a Python with SQLite 3.35 or later")
                ]
            return []
        if connection.scalar(sa.text("SELECT pg_is_in_recovery()")):
            return [Problem(where, "the server is a replica, which takes no writes", "name the primary in the URL")]
        return []

    def prepare(self, target: Target) -> None:
        place: Place = target.settings
        with self._link.typed_errors(), self._link.writing() as connection:
            create_tables(connection, place)
            if self.number is None:
                lock_view(connection, place)
                if not columns_of(connection, place, place.name):
                    show(connection, place)
                elif not leads_here(connection, place):
                    raise SinkRefused(
                        f"The view {place.name} shows another table than {place.own}{ROWS}, and the state store knows"
                        " nothing of it; give the pipeline its state back, or drop that view and --reload"
                    )

    def lead_readers(self, targets: Sequence[Target]) -> None:
        """Let each target's view show this generation's table, all in one transaction."""
        with self._link.typed_errors(), self._link.writing() as connection:
            places: list[Place] = sorted((target.settings for target in targets), key=lambda place: place.name)
            for place in places:
                lock_view(connection, place)
            for place in places:
                if not leads_here(connection, place):
                    show(connection, place)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Apply the writes: one transaction of two statements; more where they have too many parameters for one."""
        rows, wanted, outcomes = rows_of(target.settings, writes)
        if rows:
            with self._typed_errors(target):
                outcomes |= self._write_known(target, wanted, rows)
        return [outcomes[index] for index in range(len(writes))]

    def _write_known(self, target: Target, wanted: Mapping[str, Kind], rows: Sequence[Row]) -> dict[int, Outcome]:
        """Write the rows to the table as it is: a column that is not known would keep an older document's value."""
        looks = 0
        while True:
            try:
                return self._write(target, self._shape_for(target, wanted), rows)
            except ColumnsAdded:
                self._shapes.pop(target.place, None)
                looks += 1
                if looks == SHAPE_LOOKS:
                    raise

    def _shape_for(self, target: Target, wanted: Mapping[str, Kind]) -> Shape:
        """Return the table's shape with columns for these fields, as far as it can have them."""
        place: Place = target.settings
        shape = self._shapes.get(target.place)
        if shape is None:
            with self._link.reading() as connection:
                shape = shape_of(connection, place)
            if shape is None:
                self.prepare(target)  # somebody has dropped it
                with self._link.reading() as connection:
                    shape = shape_of(connection, place)
            assert shape is not None, "it has just been created"
        if not all(name in shape.kinds for name in addable(shape, wanted, place.is_sqlite)):
            with self._link.writing() as connection:
                shape = add_columns(connection, place, shape, wanted)
        self._shapes[target.place] = shape
        return shape

    def _write(self, target: Target, shape: Shape, rows: Sequence[Row]) -> dict[int, Outcome]:
        """Write the rows that fit the table, and return the outcome of each by its index."""
        fit, outcomes = values_of(target.place, target.settings, shape, rows, round(self._now() * 1000))
        return outcomes | self._upsert_apart(target, shape, fit)

    def _upsert_apart(
        self, target: Target, shape: Shape, rows: Sequence[tuple[Row, dict[str, Any]]]
    ) -> dict[int, Outcome]:
        """Upsert rows. Those that the store refuses for what they hold are found by halves, and rejected."""
        if not rows:
            return {}
        try:
            applied = self._upsert(target, shape, [values for _, values in rows])
        except exc.DBAPIError as error:
            if not is_about_content(error):
                raise
            if len(rows) == 1:
                return {rows[0][0].number: rejected(reading_of(error).said)}
            half = len(rows) // 2
            return self._upsert_apart(target, shape, rows[:half]) | self._upsert_apart(target, shape, rows[half:])
        return {row.number: APPLIED if row.id in applied else STALE for row, _ in rows}

    def _upsert(self, target: Target, shape: Shape, values: Sequence[dict[str, Any]]) -> set[str]:
        """Upsert rows in one transaction, and return the ids of those that were not stale."""
        place: Place = target.settings
        table, floor = shape.rows, place.floor
        with self._link.writing() as connection:
            state = sa.select(floor.c.version, floor.c.generation).with_for_update(read=True)
            least, generation = connection.execute(state).one()
            if generation != shape.generation:
                raise ColumnsAdded(f"Another process has added columns to {target.place}.")
            live = [one for one in values if one[VERSION_FIELD] >= least]
            if not live:
                return set()
            insert = insertion(table, live, is_sqlite=place.is_sqlite)
            upsert = upserting(table, insert, self._not_newer(table, insert.excluded))
            if not place.is_sqlite:
                return set(connection.execute(upsert).scalars())
            paged = {"insertmanyvalues_page_size": len(live)}  # the limit of parameters holds beside it
            return set(connection.execute(upsert, live, execution_options=paged).scalars())

    def _not_newer(self, table: sa.Table, excluded: Any) -> sa.ColumnElement[bool]:
        """Return the condition that what is there is not newer than what is to be written."""
        return table.c[VERSION_FIELD] <= cast("sa.ColumnElement[int]", excluded[VERSION_FIELD])

    def truncate(self, target: Target, version: int) -> int:
        place: Place = target.settings
        floor, rows = place.floor, place.rows()
        with self._typed_errors(target):
            # It waits for the batches that have read the floor, and keeps out others.
            with self._link.writing() as connection:
                raised = sa.update(floor).where(floor.c.version < version).values(version=version)
                connection.execute(raised)
            with self._link.writing() as connection:
                old = sa.and_(rows.c[DELETED_COLUMN].is_(None), rows.c[VERSION_FIELD] < version)
                return connection.execute(sa.delete(rows).where(old)).rowcount

    def sweep(self, target: Target, recent_s: float | None = None) -> int:
        """Remove expired tombstones; nothing is ever half done."""
        del recent_s
        place: Place = target.settings
        rows = place.rows()
        expired_ms = round((self._now() - self.tombstone_ttl_s) * 1000)
        with self._typed_errors(target), self._link.writing() as connection:
            return connection.execute(sa.delete(rows).where(rows.c[DELETED_COLUMN] < expired_ms)).rowcount

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        ids = [(key_text(key), version) for key, version in items]
        exact = [{"id": id_, "version": version} for id_, version in ids if is_storable(id_, self.is_sqlite)]
        if not exact:
            return
        place: Place = target.settings
        rows = place.rows()
        exactly = (rows.c[ID_COLUMN] == sa.bindparam("id"), rows.c[VERSION_FIELD] == sa.bindparam("version"))
        with self._typed_errors(target), self._link.writing() as connection:
            connection.execute(sa.delete(rows).where(*exactly), exact)

    def drop(self, target: Target) -> int:
        self._shapes.pop(target.place, None)
        if self._link.file is not None and not self._link.file.exists():
            return 0
        with self._link.typed_errors(), self._link.writing() as connection:
            return drop_tables(connection, target.settings)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        ids = [key_text(key) for key in keys]
        found: dict[str, Stored] = {}
        with self._typed_errors(target), self._link.reading() as connection:
            shape = shape_of(connection, target.settings)  # as it is now: others may have added columns
            if shape is None:
                return [None] * len(keys)
            wanted = [id_ for id_ in ids if is_storable(id_, self.is_sqlite)]
            for start in range(0, len(wanted), READ_KEYS):
                among = shape.rows.c[ID_COLUMN].in_(wanted[start : start + READ_KEYS])
                for id_, version, deleted, *values in connection.execute(sa.select(shape.rows).where(among)):
                    document = None if deleted is not None else document_of(shape.kinds, values)
                    found[id_] = Stored(version, document)
        return [found.get(id_) for id_ in ids]

    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        place: Place = target.settings
        rows = place.rows()
        id_, version = rows.c[ID_COLUMN], rows.c[VERSION_FIELD]
        alive = sa.select(id_, version).where(rows.c[DELETED_COLUMN].is_(None)).order_by(id_).limit(SCAN_BATCH)
        page = alive
        while True:
            with self._typed_errors(target), self._link.reading() as connection:
                if not columns_of(connection, place):
                    return
                batch = [(found, of) for found, of in connection.execute(page)]
            if batch:
                yield batch
            if len(batch) < SCAN_BATCH:
                return
            page = alive.where(id_ > batch[-1][0])

    def newest_version(self, target: Target) -> int:
        place: Place = target.settings
        rows, floor = place.rows(), place.floor
        with self._typed_errors(target), self._link.reading() as connection:
            newest = connection.scalar(sa.select(sa.func.max(rows.c[VERSION_FIELD])))
            least = connection.scalar(sa.select(floor.c.version))
        return max(newest or 0, least or 0)

    def stored_form(self, target: Target, document: Document) -> dict[str, Any]:
        """Return the fields that have a value, as JSON values; numbers in one form, whatever their column's type."""
        del target
        fields = fields_of(document, self.is_sqlite)
        return {name: plain(kind, value) for name, (kind, value) in fields.items()}

    def close(self) -> None:
        self._link.close()

    @contextlib.contextmanager
    def _typed_errors(self, target: Target) -> Generator[None]:
        """Raise the database's errors as `SinkBusy` or `SinkRefused`; a table that has changed is looked at again."""
        with self._link.typed_errors():
            try:
                yield
            except exc.DBAPIError as error:
                if not is_about_shape(error):
                    raise
                self._shapes.pop(target.place, None)
                said = reading_of(error).said
                raise SinkBusy(f"The table of {target.place} has changed: {said}.") from error
