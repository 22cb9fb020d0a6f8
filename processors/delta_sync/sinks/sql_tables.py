"""A target's tables and view: what they are called, what is there, and how they are made, changed and shown.

The functions take a connection within a transaction, and leave its errors to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from delta_sync.errors import Problem
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.sinks.columns import ID_COLUMN, Kind, folded
from delta_sync.sinks.sql_values import POSTGRESQL_TYPES, SQLITE_TYPES, column_type

ROWS = "__delta"  # what a target's table is called, after the view
FLOOR = "__delta_floor"
DELETED_INDEX = f"{ROWS}_deleted"
DELETED_COLUMN = "_delta_deleted_ms"
OWN_COLUMNS = (ID_COLUMN, VERSION_FIELD, DELETED_COLUMN)

MAX_COLUMNS = 1000  # PostgreSQL's limit is 1,600, but a row of so many must fit into a page of 8 kB; SQLite's is 2,000


class Place(NamedTuple):
    """Where a target's documents are: the view's name, what its generation's tables are called after, and the columns
    whose types the user chose.
    """

    schema: str | None
    name: str
    own: str
    columns: Mapping[str, Kind]
    is_sqlite: bool

    @property
    def types(self) -> Mapping[Kind, str]:
        """The database's name of each kind's type."""
        return SQLITE_TYPES if self.is_sqlite else POSTGRESQL_TYPES

    @property
    def view(self) -> sa.Table:
        """The view, of which only the name is known."""
        return sa.Table(self.name, sa.MetaData(), schema=self.schema)

    def rows(self, kinds: Mapping[str, Kind | None] | None = None) -> sa.Table:
        """Return the table with Delta's own columns, and with those of fields of these kinds."""
        # The keys name parameters, and a field's name may have any character.
        fields = [
            sa.Column(name, column_type(kind, self.types), key=f"f{number}")
            for number, (name, kind) in enumerate((kinds or {}).items())
        ]
        id_type = sa.Text() if self.is_sqlite else sa.Text(collation="C")  # so that a scan's order is the bytes'
        return sa.Table(
            f"{self.own}{ROWS}",
            sa.MetaData(),
            sa.Column(ID_COLUMN, id_type, primary_key=True),
            sa.Column(VERSION_FIELD, sa.BigInteger, nullable=False),
            sa.Column(DELETED_COLUMN, sa.BigInteger),
            *fields,
            schema=self.schema,
        )

    @property
    def floor(self) -> sa.Table:
        """The table of one row that holds the floor, and how often columns were added."""
        return sa.Table(
            f"{self.own}{FLOOR}",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("version", sa.BigInteger, nullable=False),
            sa.Column("generation", sa.BigInteger, nullable=False),
            schema=self.schema,
        )


class Shape(NamedTuple):
    """A target's table as it is: the statements' table, and each field's kind (None: a type that is not Delta's)."""

    rows: sa.Table
    kinds: Mapping[str, Kind | None]
    generation: int  # rises whenever Delta adds columns


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def problems_of(connection: sa.Connection, where: str, place: Place, shown: str, *, rebuilt: bool) -> list[Problem]:
    """Return why a target, called `shown`, cannot be where it is to be. `rebuilt`: its view may show another table."""
    columns = columns_of(connection, place)
    fix = "set `table` to another name, or drop it"
    if columns and not set(OWN_COLUMNS) <= columns.keys():
        return [Problem(where, f"{shown}{ROWS} is there, and is not Delta's", fix)]
    inspector = sa.inspect(connection)
    if inspector.has_table(place.name, place.schema) and (
        (not columns and not rebuilt) or place.name in inspector.get_table_names(place.schema)
    ):
        what = f"{place.name} is there, and is not the view that Delta would create"
        return [Problem(where, what, fix)]
    if not columns and not place.is_sqlite:
        schema = place.schema or connection.scalar(sa.text("SELECT current_schema()"))
        if schema is None or not connection.scalar(
            sa.text(
                "SELECT coalesce(has_schema_privilege(n.oid, 'CREATE'), false) FROM pg_namespace n"
                " WHERE n.nspname = :schema"
            ),
            {"schema": schema},
        ):
            what = f"the schema {schema} is not there, or the user may not create tables in it"
            return [Problem(where, what, "create it, and grant CREATE on it to the user")]
    return []


def create_tables(connection: sa.Connection, place: Place) -> None:
    """Create the tables, unless they are there."""
    rows, floor = place.rows(), place.floor
    if not columns_of(connection, place):
        connection.execute(sa.schema.CreateTable(rows, if_not_exists=True))
        deleted = rows.c[DELETED_COLUMN]
        where = deleted.is_not(None)
        name = f"{place.own}{DELETED_INDEX}"
        index = sa.Index(name, deleted, postgresql_where=where, sqlite_where=where)
        connection.execute(sa.schema.CreateIndex(index, if_not_exists=True))
    connection.execute(sa.schema.CreateTable(floor, if_not_exists=True))
    insert = sqlite.insert(floor) if place.is_sqlite else postgresql.insert(floor)
    connection.execute(insert.values(id=1, version=0, generation=0).on_conflict_do_nothing())


def drop_tables(connection: sa.Connection, place: Place) -> int:
    """Drop the tables, and the view if it shows them; return how many documents there were."""
    columns = columns_of(connection, place)
    if columns and not set(OWN_COLUMNS) <= columns.keys():  # somebody else's
        return 0
    rows = place.rows()
    alive = rows.c[DELETED_COLUMN].is_(None)
    counted = sa.select(sa.func.count()).select_from(rows).where(alive)
    count = (connection.scalar(counted) or 0) if columns else 0
    view = connection.dialect.identifier_preparer.format_table(place.view)
    lock_view(connection, place)
    if leads_here(connection, place):
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view}")
    connection.execute(sa.schema.DropTable(rows, if_exists=True))
    connection.execute(sa.schema.DropTable(place.floor, if_exists=True))
    return count


def columns_of(connection: sa.Connection, place: Place, view: str | None = None) -> dict[str, str]:
    """Return the types of the table's columns (or the view's), as the store writes them; none when it is absent."""
    name = view or f"{place.own}{ROWS}"
    if place.is_sqlite:
        asked = sa.text("SELECT name, type FROM pragma_table_info(:name)")
    else:
        asked = sa.text(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = to_regclass(:name) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        )
        name = _quoted(place.schema, name)
    return {str(row[0]): str(row[1]) for row in connection.execute(asked, {"name": name})}


def shape_of(connection: sa.Connection, place: Place) -> Shape | None:
    """Return the table as it is now; None when it is not there."""
    floor = place.floor
    columns = columns_of(connection, place)
    if not columns:
        return None
    # Before the columns are read again: a number that is too small only means that they are read once more.
    generation = connection.scalar(sa.select(floor.c.generation)) or 0
    columns = columns_of(connection, place)
    by_type: dict[str, Kind] = {type_: kind for kind, type_ in place.types.items()}
    kinds: dict[str, Kind | None] = {
        name: by_type.get(type_) for name, type_ in columns.items() if name not in OWN_COLUMNS
    }
    return Shape(place.rows(kinds), kinds, generation)


def add_columns(connection: sa.Connection, place: Place, shape: Shape, wanted: Mapping[str, Kind]) -> Shape:
    """Add the columns that are missing. Waits for the batches that know fewer, and lets the later ones know."""
    floor = place.floor
    lock_view(connection, place)  # first: whoever leads readers has it, and looks at the table then
    connection.execute(sa.update(floor).values(generation=floor.c.generation + 1))
    shape = shape_of(connection, place) or shape
    preparer = connection.dialect.identifier_preparer
    rows = preparer.format_table(shape.rows)
    for name in addable(shape, wanted, place.is_sqlite):
        if name not in shape.kinds:
            column = preparer.quote_identifier(name)
            connection.exec_driver_sql(f"ALTER TABLE {rows} ADD COLUMN {column} {place.types[wanted[name]]}")
    if leads_here(connection, place):
        show(connection, place)
    return shape_of(connection, place) or shape


def addable(shape: Shape, wanted: Mapping[str, Kind], is_sqlite: bool) -> list[str]:
    """Return the fields that have a column, or can get one. SQLite takes no two names that differ in case only."""
    taken = {folded(name) for name in (*shape.kinds, *OWN_COLUMNS)} if is_sqlite else set[str]()
    room = MAX_COLUMNS - len(shape.kinds)
    found: list[str] = []
    for name in wanted:
        if name not in shape.kinds:
            if room <= 0 or (is_sqlite and folded(name) in taken):
                continue
            room -= 1
            taken.add(folded(name))
        found.append(name)
    return found


# ── the view ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def lock_view(connection: sa.Connection, place: Place) -> None:
    """Keep everybody else from changing the view in this transaction. SQLite has one writer anyway."""
    if not place.is_sqlite:
        name = f"delta view {place.schema or ''}.{place.name}"
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})


def leads_here(connection: sa.Connection, place: Place) -> bool:
    """Tell whether the view shows this generation's table."""
    if place.is_sqlite:
        rows = connection.dialect.identifier_preparer.format_table(place.rows())
        asked = sa.text("SELECT sql FROM sqlite_master WHERE type = 'view' AND name = :name COLLATE NOCASE")
        return f" FROM {rows} WHERE " in (connection.scalar(asked, {"name": place.name}) or "")
    depends = sa.text(
        "SELECT 1 FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass"
        " WHERE r.ev_class = to_regclass(:view) AND d.refobjid = to_regclass(:rows) LIMIT 1"
    )
    names = {"view": _quoted(place.schema, place.name), "rows": _quoted(place.schema, f"{place.own}{ROWS}")}
    return connection.scalar(depends, names) is not None


def show(connection: sa.Connection, place: Place) -> None:
    """Let the view show this generation's table with all columns that it has by now, behind those that it showed.

    Where PostgreSQL cannot replace the view, another takes its place, with its privileges; in the same transaction.
    """
    preparer = connection.dialect.identifier_preparer
    view = preparer.format_table(place.view)
    rows = preparer.format_table(place.rows())
    before = columns_of(connection, place, place.name)
    types = {name: of for name, of in columns_of(connection, place).items() if name != DELETED_COLUMN}
    kept = [name for name, of in before.items() if types.get(name) == of]
    columns = ", ".join(map(preparer.quote_identifier, dict.fromkeys([*kept, *types])))
    grants: Sequence[str] = ()
    if place.is_sqlite:  # it cannot replace one
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view}")
    elif len(kept) < len(before):
        grants = connection.execute(_GRANTS, {"view": _quoted(place.schema, place.name)}).scalars().all()
        connection.exec_driver_sql(f"DROP VIEW {view}")
    replace = "" if place.is_sqlite else "OR REPLACE "
    connection.exec_driver_sql(
        f"CREATE {replace}VIEW {view} AS SELECT {columns} FROM {rows} WHERE {DELETED_COLUMN} IS NULL"  # noqa: S608 -- quoted above
    )
    for grant in grants:
        connection.exec_driver_sql(grant.replace("%", "%%"))


# Each privilege on a view that somebody else has, as the statement that gives it.
_GRANTS = sa.text(
    "SELECT format('GRANT %s ON %s TO %s%s', a.privilege_type, c.oid::regclass,"
    " CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,"
    " CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)"
    " FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = to_regclass(:view) AND a.grantee <> c.relowner"
)


def _quoted(schema: str | None, name: str) -> str:
    """Return a name as a parameter for `to_regclass`. SQLAlchemy would double a % in it, for the driver."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in (schema, name) if part is not None)
