"""What MariaDB's and MySQL's catalogue say of tables: columns, keys, and what the log does not carry faithfully."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import pymysql
from pymysql.cursors import DictCursor

from delta_sync.documents import ForeignKey
from delta_sync.errors import Problem
from delta_sync.sources.mysql.checks import key_of, unique_indexes
from delta_sync.sources.mysql.connection import Session, code_of, is_mariadb
from delta_sync.tables import Column, Kind, Table

KINDS: Final[Mapping[str, Kind]] = {
    "tinyint": Kind.INTEGER,
    "smallint": Kind.INTEGER,
    "mediumint": Kind.INTEGER,
    "int": Kind.INTEGER,
    "bigint": Kind.INTEGER,
    "year": Kind.INTEGER,
    "bit": Kind.INTEGER,
    "decimal": Kind.DECIMAL,
    "float": Kind.FLOAT,
    "double": Kind.FLOAT,
    "binary": Kind.BYTES,
    "varbinary": Kind.BYTES,
    "tinyblob": Kind.BYTES,
    "blob": Kind.BYTES,
    "mediumblob": Kind.BYTES,
    "longblob": Kind.BYTES,
    "vector": Kind.BYTES,  # MariaDB and MySQL have other functions that would make text of it
    "date": Kind.DATE,
    "time": Kind.TIME,
    "datetime": Kind.TIMESTAMP,
    "timestamp": Kind.TIMESTAMP_TZ,
    "json": Kind.JSON,
    "uuid": Kind.UUID,
}
"""Kinds by `information_schema.COLUMNS.DATA_TYPE`; all others are text."""

BOOLEANS: Final = frozenset({"tinyint(1)", "bit(1)"})
"""What `bool` is to these servers. Debezium writes a tinyint(1) as a boolean or as a number, by how the statement that
made it was written, so only whether it is zero is the same everywhere."""

GEOMETRIES: Final = frozenset(
    {"geometry", "point", "linestring", "polygon", "multipoint", "multilinestring", "multipolygon"}
    | {"geometrycollection", "geomcollection"}
)

IN_LOG: Final = frozenset(
    {"tinyint", "smallint", "mediumint", "int", "bigint", "year", "bit", "decimal", "float", "double", "binary"}
    | {"varbinary", "tinyblob", "blob", "mediumblob", "longblob", "date", "time", "datetime", "timestamp", "json"}
    | {"char", "varchar", "tinytext", "text", "mediumtext", "longtext", "enum", "set"}
)
"""Types that the log carries as the table has them. The others (uuid, inet, geometry, …) are read by key."""

NO_PRIVILEGE: Final = 1227


class SourceTable(NamedTuple):
    """A table with what else the catalogue says of it."""

    table: Table
    kind: str  # information_schema.TABLES.TABLE_TYPE
    engine: str | None
    created: str  # when; also a rebuild by ALTER or OPTIMIZE, but no TRUNCATE
    ids: tuple[str, ...]  # of its tablespaces: TRUNCATE makes new ones; () without the privilege PROCESS
    partitioned: bool

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever the names, the types or the key do: what documents are made of.

        And when the table is another one of the same name, or a partition of it was emptied or exchanged: neither is a
        change of rows in the log. It also changes with TRUNCATE, which is in the log, and when the table is rebuilt,
        which then costs a load in vain.
        """
        columns = [(c.name, c.type, c.kind.value, c.in_log) for c in self.table.columns]
        return hashlib.sha256(repr((self.created, self.ids, columns, self.table.key)).encode()).hexdigest()[:16]


def read_tables(session: Session, names: Sequence[str]) -> dict[str, Table]:
    """Return the tables that exist, by `database.table`. Raises pymysql.Error."""
    return {name: source.table for name, source in read_catalogue(session, names).items()}


def read_fingerprints(session: Session, names: Sequence[str]) -> dict[str, str]:
    """Return, for each table that exists, a text that changes whenever its columns, its key or its rows' history do."""
    return {name: source.fingerprint for name, source in read_catalogue(session, names).items()}


def read_catalogue(session: Session, names: Sequence[str]) -> dict[str, SourceTable]:
    """Return the tables that exist, by `database.table`. Raises pymysql.Error."""
    found: dict[str, SourceTable] = {}
    mariadb = is_mariadb(session)
    for name in names:
        database, _, bare = name.partition(".")
        place = (database, bare)  # one table each: for a list the server would open all that there are
        rows = [row for row in _rows(session, _TABLE, place) if row["id"] == name]  # which may ignore case
        if not rows:
            continue
        checks = _rows(session, _CHECKS, place) if mariadb else []
        json_columns = {column for check in checks if (column := validated_column(check["clause"])) is not None}
        columns = tuple(column_of(row, json_columns) for row in _rows(session, _COLUMNS, place))
        key, primary = key_of(unique_indexes(_rows(session, _INDEXES, place)))
        ids = _tablespaces(session, database, bare, mariadb=mariadb)
        # The log has whole rows (binlog_row_image), or the checks refuse the source, and Debezium ends.
        table = Table(database, bare, columns, key, primary, full_images=True)
        partitioned = "partitioned" in str(rows[0]["options"])
        found[name] = SourceTable(table, rows[0]["kind"], rows[0]["engine"], str(rows[0]["created"]), ids, partitioned)
    return found


def read_foreign_keys(session: Session, names: Sequence[str]) -> list[ForeignKey]:
    """Return the foreign keys between these tables. Raises pymysql.Error."""
    found: list[ForeignKey] = []
    for name in names:
        by_name: dict[str, list[dict[str, Any]]] = {}
        for row in _rows(session, _FOREIGN_KEYS, tuple(name.split(".", 1))):
            if row["referenced"] in names:
                by_name.setdefault(row["name"], []).append(row)
        found += [
            ForeignKey(
                name,
                tuple(row["column_name"] for row in rows),
                rows[0]["referenced"],
                tuple(row["referenced_column"] for row in rows),
            )
            for rows in by_name.values()
        ]
    return found


def read_first_columns(session: Session, names: Sequence[str]) -> dict[str, set[str]]:
    """Return, for tables, the columns with which an index begins. Raises pymysql.Error."""
    return {
        name: {row["column_name"] for row in _rows(session, _FIRST_COLUMNS, tuple(name.split(".", 1)))}
        for name in names
    }


def unreadable_columns(session: Session) -> list[str]:
    """Return the columns of any table with a type whose name Debezium's parser of SQL does not know.

    As `database.table.column (type)`. Seen with Debezium 3.6.3: `inet4` and `inet6`. Raises pymysql.Error.
    """
    rows = _rows(session, _UNREADABLE, ())
    return [f"{row['schema']}.{row['table']}.{row['name']} ({row['type']})" for row in rows]


def _rows(session: Session, query: str, parameters: tuple[Any, ...]) -> list[dict[str, Any]]:
    with session.cursor(DictCursor) as cursor:
        cursor.execute(query, parameters)
        return list(cursor.fetchall())


def _tablespaces(session: Session, database: str, table: str, *, mariadb: bool) -> tuple[str, ...]:
    name = f"{file_name(database)}/{file_name(table)}"
    view = "INNODB_SYS_TABLES" if mariadb else "INNODB_TABLES"
    try:
        rows = _rows(session, _TABLESPACES.format(view), (name, f"{name}#p#", f"{name}#p#"))
    except pymysql.OperationalError as error:
        if code_of(error) == NO_PRIVILEGE:
            return ()
        raise
    return tuple(f"{row['name']} {row['id']}" for row in rows)


_TABLE: Final = """
SELECT CONCAT(table_schema, '.', table_name) AS id, table_type AS kind, engine AS engine, create_time AS created,
       create_options AS options
FROM information_schema.tables WHERE table_schema = %s AND table_name = %s
"""
_COLUMNS: Final = """
SELECT column_name AS name, column_type AS type, data_type AS data_type, is_nullable AS nullable,
       numeric_precision AS `precision`, numeric_scale AS scale, extra AS extra
FROM information_schema.columns WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position
"""
_CHECKS: Final = """
SELECT check_clause AS clause FROM information_schema.check_constraints
WHERE constraint_schema = %s AND table_name = %s
"""
_FIRST_COLUMNS: Final = """
SELECT column_name AS column_name FROM information_schema.statistics
WHERE table_schema = %s AND table_name = %s AND seq_in_index = 1 AND column_name IS NOT NULL
"""
_FOREIGN_KEYS: Final = """
SELECT constraint_name AS name, column_name AS column_name, referenced_column_name AS referenced_column,
       CONCAT(referenced_table_schema, '.', referenced_table_name) AS referenced
FROM information_schema.key_column_usage
WHERE table_schema = %s AND table_name = %s AND referenced_table_name IS NOT NULL
ORDER BY constraint_name, ordinal_position
"""
_UNREADABLE: Final = """
SELECT table_schema AS `schema`, table_name AS `table`, column_name AS name, data_type AS type
FROM information_schema.columns WHERE data_type IN ('inet4', 'inet6') ORDER BY 1, 2, 3 LIMIT 10
"""
_INDEXES: Final = """
SELECT index_name AS name, column_name AS column_name, nullable AS nullable, sub_part AS prefix
FROM information_schema.statistics WHERE table_schema = %s AND table_name = %s AND non_unique = 0
ORDER BY index_name <> 'PRIMARY', index_name, seq_in_index
"""
_TABLESPACES: Final = """
SELECT name AS name, table_id AS id FROM information_schema.{}
WHERE name = %s OR LEFT(LOWER(name), CHAR_LENGTH(%s)) = LOWER(%s) ORDER BY name
"""


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────


def column_of(row: Mapping[str, Any], json_columns: frozenset[str] | set[str] = frozenset()) -> Column:
    """Return what a column of `information_schema.COLUMNS` holds."""
    name, type_, data_type = str(row["name"]), str(row["type"]).lower(), str(row["data_type"]).lower()
    kind = KINDS.get(data_type, Kind.TEXT)
    if type_ in BOOLEANS:
        kind = Kind.BOOLEAN
    elif data_type == "longtext" and name in json_columns:
        kind = Kind.JSON
    generated = "GENERATED" in str(row["extra"]).upper().replace("DEFAULT_GENERATED", "")
    return Column(
        name=name,
        type=str(row["type"]) if data_type in ("enum", "set") else type_,  # the case of their values matters
        kind=kind,
        nullable=row["nullable"] == "YES",
        precision=int(row["precision"]) if kind is Kind.DECIMAL else None,
        scale=int(row["scale"]) if kind is Kind.DECIMAL else None,
        in_log=data_type in IN_LOG and not generated,
    )


_JSON_VALID = re.compile(r"json_valid\(`((?:[^`]|``)+)`\)", re.IGNORECASE)


def validated_column(clause: str) -> str | None:
    """Return the column that a check constraint makes JSON, as MariaDB's type `json` does; None for any other."""
    match = _JSON_VALID.fullmatch(clause)
    return match[1].replace("``", "`") if match else None


_IN_FILE_NAMES = re.compile(r"[^A-Za-z0-9_]")


def file_name(name: str) -> str:
    """Return the name of a database or table as InnoDB has it: `odd.name` is `odd@002ename`.

    Letters beyond ASCII have codes of their own, so their tables are not found, as without the privilege.
    """
    return _IN_FILE_NAMES.sub(lambda match: f"@{ord(match[0]):04x}", name)


def obstacles(sources: Sequence[SourceTable], unreadable: Sequence[str] = ()) -> list[Problem]:
    """Return what would end the connector, or leave rows without a key that the log and the table agree on. Pure.

    `unreadable` is what `unreadable_columns` found.
    """
    found = [
        Problem(
            "source",
            f"{column} ends Debezium, which reads the definition of every table, whether in the pipeline or not",
            "use varbinary(16) with INET6_ATON, or varchar(39), instead; or hide the table from the source's user",
        )
        for column in unreadable
    ]
    for source in sources:
        where = f"table {source.table.id}"
        for name in source.table.key:
            column = source.table.column(name)
            if not column.in_log:
                what = f"the key column {name} has the type {column.type}, which the log does not carry faithfully"
                found.append(Problem(where, what, "use another unique index without NULLs as the key"))
            elif column.type.startswith("float"):
                what = f"the key column {name} is a float, which compares equal to none of its printed values"
                found.append(Problem(where, what, f"make it a double or decimal: MODIFY `{name}` double NOT NULL"))
    return found


def column_notes(sources: Sequence[SourceTable]) -> list[Problem]:
    """Return what is slower or weaker than it could be. Pure."""
    found: list[Problem] = []
    for source in sources:
        where = f"table {source.table.id}"
        columns = [f"{column.name} ({column.type})" for column in source.table.columns if not column.in_log]
        if columns:
            found.append(
                Problem(
                    where,
                    f"the log does not carry {', '.join(columns)} faithfully",
                    "nothing to do: each changed row is read by its key, which is slower",
                    fatal=False,
                )
            )
        if source.partitioned and not source.ids:
            found.append(
                Problem(
                    where,
                    "TRUNCATE, DROP and EXCHANGE PARTITION are not in the log as changes of rows, and"
                    " without the privilege PROCESS they are not noticed",
                    "type: GRANT PROCESS ON *.* TO the source's user; or start the sidecar with --reload after one",
                    fatal=False,
                )
            )
    return found
