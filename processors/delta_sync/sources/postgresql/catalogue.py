"""Tables as PostgreSQL's catalogue has them: columns with the kind of their values, and the key.

One query for all tables. `columns_of` decides, without I/O, what a column's values are and whether the log carries them
(`Column.in_log`). What was seen of Debezium 3.6, and decided here because of it, is in `docs/types.md`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import tuple_row

from delta_sync.documents import ForeignKey
from delta_sync.errors import Problem
from delta_sync.tables import Column, Kind, Table

KINDS: Mapping[str, Kind] = {
    "bool": Kind.BOOLEAN,
    "int2": Kind.INTEGER,
    "int4": Kind.INTEGER,
    "int8": Kind.INTEGER,
    "oid": Kind.INTEGER,
    "float4": Kind.FLOAT,
    "float8": Kind.FLOAT,
    "numeric": Kind.DECIMAL,
    "money": Kind.DECIMAL,
    "bytea": Kind.BYTES,
    "date": Kind.DATE,
    "time": Kind.TIME,
    "timestamp": Kind.TIMESTAMP,
    "timestamptz": Kind.TIMESTAMP_TZ,
    "interval": Kind.INTERVAL,
    "uuid": Kind.UUID,
    "json": Kind.JSON,
    "jsonb": Kind.JSON,
}
"""Kinds of PostgreSQL's own types, by `pg_type.typname`; all others are text."""

EXTENSION_KINDS: Mapping[str, Kind] = {"hstore": Kind.MAP, "vector": Kind.FLOAT, "halfvec": Kind.FLOAT}
VECTORS = frozenset({"vector", "halfvec"})  # lists of floats, although not arrays; an array of them is one of text

TEXT_IN_LOG = frozenset(
    {"text", "varchar", "bpchar", "char", "xml", "tsvector", "inet", "cidr", "macaddr", "macaddr8"}
    | {"int4range", "int8range", "numrange", "tsrange", "tstzrange", "daterange"}
)
"""PostgreSQL's own types that are text to us and that Debezium writes as the server does."""

EXTENSION_IN_LOG = frozenset({"hstore", "citext", "ltree"})

ARRAYS_IN_LOG = frozenset({"int4", "int8", "text", "varchar", "bpchar", "bytea", "uuid", "json", "jsonb"})
"""Types whose arrays Debezium writes whole. Of the others an unchanged TOAST value ends the connector when the column
is NOT NULL and is NULL when not; and times lose digits, dates their era, enums the array when an element is NULL."""

LONGEST_BITS = 64  # longer ones may be stored out of line, and Debezium has no placeholder for them
ALWAYS_INLINE_BYTES = 24  # what the TOASTer never moves out: a value not longer than the pointer to it


class Attribute(NamedTuple):
    """A column as the query returns it. Types are those that domains come down to; of an array, its element's."""

    name: str
    type: str  # for SQL: `numeric(10,2)`, `public.mood`
    type_name: str  # pg_type.typname
    type_schema: str  # `pg_catalog`, `extension` for any extension's, else `user`
    type_class: str  # pg_type.typtype
    modifier: int  # pg_attribute.atttypmod, -1 without
    array: bool
    dimensions: int  # as declared
    domain: bool  # the column's type, or its element's
    not_null: bool
    generated: bool
    fixed_length: bool
    mistakable: bool  # another schema has a type of this name, and Debezium looks types up by name


class SourceTable(NamedTuple):
    """A relation with what else the catalogue says of it."""

    table: Table
    relation_kind: str  # pg_class.relkind: r, p, v, m, f
    replica_identity: str  # pg_class.relreplident: d, i, f, n
    owned: bool  # by the current role, or by one it is a member of
    relation: int  # pg_class.oid

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever the names, the types or the key do: what documents are made of.

        And when the table is another one of the same name: the publication does not have that one.
        """
        columns = [(c.name, c.type, c.kind.value, c.dimensions, c.in_log) for c in self.table.columns]
        return hashlib.sha256(repr((self.relation, columns, self.table.key)).encode()).hexdigest()[:16]


def read_tables(connection: psycopg.Connection, names: Sequence[str]) -> dict[str, Table]:
    """Return the tables that exist, by `schema.table`. Raises psycopg.Error."""
    return {name: source.table for name, source in read_catalogue(connection, names).items()}


def read_fingerprints(
    connection: psycopg.Connection, names: Sequence[str], documented: Collection[str] = ()
) -> dict[str, str]:
    """Return, for each table that exists, a text that changes whenever its columns or its key do.

    For those of which documents are made, also when its replica identity does.
    """
    return {
        name: f"{source.fingerprint} {source.replica_identity}" if name in documented else source.fingerprint
        for name, source in read_catalogue(connection, names).items()
    }


def read_catalogue(connection: psycopg.Connection, names: Sequence[str]) -> dict[str, SourceTable]:
    """Return the relations that exist, by `schema.table`. Raises psycopg.Error."""
    found: dict[str, SourceTable] = {}
    with connection.cursor(row_factory=tuple_row) as cursor:
        for row in cursor.execute(_TABLES, {"names": list(names)}):
            schema, name, kind, identity, owned, relation, attributes, indexes = row
            columns = tuple(Attribute(*fields) for fields in json.loads(attributes))
            key, primary = key_of(identity, json.loads(indexes))
            table = Table(schema, name, columns_of(columns), key, primary, full_images=identity == "f")
            found[table.id] = SourceTable(table, kind, identity, owned, relation)
    return found


def read_foreign_keys(connection: psycopg.Connection, names: Sequence[str]) -> list[ForeignKey]:
    """Return the foreign keys between these tables. Raises psycopg.Error."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        rows = cursor.execute(_FOREIGN_KEYS, {"names": list(names)}).fetchall()
    return [ForeignKey(table, tuple(columns), referenced, tuple(of)) for table, columns, referenced, of in rows]


def read_first_columns(connection: psycopg.Connection, names: Sequence[str]) -> dict[str, set[str]]:
    """Return, for tables, the columns with which an index of all rows begins. Raises psycopg.Error."""
    found: dict[str, set[str]] = {}
    with connection.cursor(row_factory=tuple_row) as cursor:
        for table, column in cursor.execute(_FIRST_COLUMNS, {"names": list(names)}):
            found.setdefault(table, set()).add(column)
    return found


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────


class Index(NamedTuple):
    """A unique, valid, immediate index without predicate and expressions."""

    primary: bool
    identity: bool  # REPLICA IDENTITY USING INDEX names it
    not_null: bool  # all of its columns are
    columns: list[str]


def key_of(replica_identity: str, indexes: Sequence[Sequence[Any]]) -> tuple[tuple[str, ...], bool]:
    """Return the key, and whether it is the primary one. `indexes` are in order of name; the key is () without any.

    It has to be among what the log holds of a deleted row, so the replica identity decides.
    """
    known = [Index(*index) for index in indexes]
    chosen: list[Index] = []
    if replica_identity == "i":
        chosen = [index for index in known if index.identity]
    elif replica_identity in ("d", "f"):
        chosen = [index for index in known if index.primary]
        if not chosen and replica_identity == "f":
            chosen = [index for index in known if index.not_null]
    if not chosen:
        return (), False
    return tuple(chosen[0].columns), chosen[0].primary


def columns_of(attributes: Sequence[Attribute]) -> tuple[Column, ...]:
    """Return what the columns hold."""
    return tuple(_column(attribute) for attribute in attributes)


def _column(attribute: Attribute) -> Column:
    kind = Kind.TEXT
    if attribute.type_schema == "pg_catalog":
        kind = KINDS.get(attribute.type_name, Kind.TEXT)
    elif attribute.type_schema == "extension":
        kind = EXTENSION_KINDS.get(attribute.type_name, Kind.TEXT)
    dimensions = max(attribute.dimensions, 1) if attribute.array else 0
    if kind is Kind.FLOAT and attribute.type_name in VECTORS:
        kind, dimensions = (Kind.TEXT, dimensions) if attribute.array else (kind, 1)
    precision, scale = _precision(attribute)
    in_log = _in_log(attribute, precision, scale)
    return Column(
        name=attribute.name,
        type=attribute.type,
        kind=kind,
        dimensions=dimensions,
        nullable=not attribute.not_null,
        precision=precision,
        scale=scale,
        in_log=in_log,
        may_be_absent=in_log and _may_be_toasted(attribute, precision),
    )


def _precision(attribute: Attribute) -> tuple[int | None, int | None]:
    if attribute.type_schema != "pg_catalog" or attribute.type_name != "numeric" or attribute.modifier < 0:
        return None, None
    bits = attribute.modifier - 4  # the length of a varlena header, as everywhere in type modifiers
    scale = bits & 0x7FF  # eleven bits, signed
    return bits >> 16 & 0xFFFF, scale - 0x800 if scale & 0x400 else scale


def _in_log(attribute: Attribute, precision: int | None, scale: int | None) -> bool:
    if attribute.generated or attribute.mistakable:
        return False
    if attribute.array:
        return attribute.type_schema == "pg_catalog" and attribute.type_name in ARRAYS_IN_LOG and not attribute.domain
    if attribute.type_class == "e":
        return True
    if attribute.type_schema == "extension":
        return attribute.type_name in EXTENSION_IN_LOG
    if attribute.type_schema != "pg_catalog":
        return False
    if attribute.type_name == "interval":
        return False  # Debezium's arithmetic in doubles loses a microsecond here and there, and infinity becomes zero
    if attribute.type_name == "bit":
        return not attribute.domain and 0 < attribute.modifier <= LONGEST_BITS
    if precision is not None and scale is not None and scale < 0:
        return False  # Debezium takes the scale for an unsigned number, and appends 65,534 zeros
    return attribute.type_name in KINDS or attribute.type_name in TEXT_IN_LOG


NUMERIC_ALWAYS_INLINE_DIGITS = 28  # two bytes for four digits, two for a rest at either end, and a header of six


def _may_be_toasted(attribute: Attribute, precision: int | None) -> bool:
    if attribute.fixed_length:
        return False  # the storage of all others can be altered at any time
    if attribute.array or attribute.type_schema != "pg_catalog":
        return True
    match attribute.type_name:
        case "bit" | "inet" | "cidr":
            return False
        case "numeric" if precision is not None:
            return precision > NUMERIC_ALWAYS_INLINE_DIGITS
        case "varchar" | "bpchar" if attribute.modifier >= 0:
            characters = attribute.modifier - 4
            return 4 * characters + 4 > ALWAYS_INLINE_BYTES  # four bytes at most in any of the server's encodings
        case _:
            return True


# ── what Debezium cannot cope with ───────────────────────────────────────────────────────────────────────────────


def obstacles(connection: psycopg.Connection, sources: Sequence[SourceTable]) -> list[Problem]:
    """Return what would end the connector, or leave rows without a key that the log and the table agree on."""
    found = [
        Problem(
            "source",
            f"the type {name} ends Debezium when it starts, wherever in the database it is used: {why}",
            fix,
        )
        for name, why, fix in connection.execute(_FATAL_TYPES)
    ]
    for source in sources:
        where = f"table {source.table.id}"
        if '"' in source.table.id:
            found.append(Problem(where, "its name has a double quote, which ends Debezium", "rename it"))
        seen: dict[str, str] = {}
        for column in source.table.columns:
            other = seen.setdefault(column.name.lower(), column.name)
            if other != column.name:
                what = f"the columns {other} and {column.name} differ in case only, which Debezium refuses"
                found.append(Problem(where, what, "rename one of them"))
        for name in source.table.key:
            column = source.table.column(name)
            if not column.in_log:
                what = f"the key column {name} has the type {column.type}, which Debezium does not write faithfully"
                found.append(Problem(where, what, "use another unique index as the replica identity"))
    return found


_FOREIGN_KEYS = """
WITH named AS (
  SELECT c.oid, n.nspname || '.' || c.relname AS id
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname || '.' || c.relname = ANY (%(names)s)
)
SELECT t.id, k.own, r.id, k.other
FROM pg_constraint f JOIN named t ON t.oid = f.conrelid JOIN named r ON r.oid = f.confrelid CROSS JOIN LATERAL (
  SELECT array_agg(a.attname::text ORDER BY u.place) AS own, array_agg(b.attname::text ORDER BY u.place) AS other
  FROM unnest(f.conkey, f.confkey) WITH ORDINALITY AS u (own, other, place)
       JOIN pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = u.own
       JOIN pg_attribute b ON b.attrelid = f.confrelid AND b.attnum = u.other) k
WHERE f.contype = 'f'
ORDER BY t.id, f.conname
"""

_FIRST_COLUMNS = """
SELECT n.nspname || '.' || c.relname, a.attname::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_index i ON i.indrelid = c.oid
     JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
WHERE n.nspname || '.' || c.relname = ANY (%(names)s) AND i.indisvalid AND i.indpred IS NULL
"""

_FATAL_TYPES = """
SELECT format_type(t.oid, NULL),
       CASE t.typtype WHEN 'd' THEN 'it is a domain over an enum' ELSE 'it is an enum without values' END,
       CASE t.typtype WHEN 'd' THEN 'use the enum itself, with a CHECK constraint in the table'
                      ELSE 'drop it, or add a value: ALTER TYPE … ADD VALUE' END
FROM pg_type t
WHERE t.typcategory = 'E' AND NOT EXISTS (SELECT FROM pg_enum e WHERE e.enumtypid = t.oid)
ORDER BY 1
"""

# Domains come down to their base type first; an array type is one that some type names as its array.
_TABLES = """
WITH RECURSIVE domain (oid, base, modifier) AS (
  SELECT oid, typbasetype, typtypmod FROM pg_type WHERE typtype = 'd'
  UNION ALL
  SELECT d.oid, t.typbasetype, CASE WHEN d.modifier >= 0 THEN d.modifier ELSE t.typtypmod END
  FROM domain d JOIN pg_type t ON t.oid = d.base WHERE t.typtype = 'd'
), base AS (
  SELECT d.* FROM domain d JOIN pg_type t ON t.oid = d.base WHERE t.typtype <> 'd'
), wanted AS (
  SELECT c.*, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname || '.' || c.relname = ANY (%(names)s)
), columns AS (
  SELECT w.oid AS relation, a.attnum, a.attname, a.attnotnull, a.attgenerated <> '' AS generated,
         t.typlen > 0 AS fixed_length, e.oid IS NOT NULL AS is_array, greatest(a.attndims, d.typndims) AS dimensions,
         coalesce(eb.base, e.oid, t.oid) AS type, b.oid IS NOT NULL OR eb.oid IS NOT NULL AS domain,
         coalesce(eb.modifier, b.modifier, a.atttypmod) AS modifier,
         d.typnamespace <> w.relnamespace AND EXISTS (
           SELECT FROM pg_type o WHERE o.typname = d.typname AND o.oid <> d.oid
           AND (o.typnamespace = w.relnamespace OR d.typnamespace <> 'pg_catalog'::regnamespace)
         ) AS mistakable
  FROM wanted w JOIN pg_attribute a ON a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped
       JOIN pg_type d ON d.oid = a.atttypid
       LEFT JOIN base b ON b.oid = a.atttypid
       JOIN pg_type t ON t.oid = coalesce(b.base, a.atttypid)
       LEFT JOIN pg_type e ON e.typarray = t.oid
       LEFT JOIN base eb ON eb.oid = e.oid AND NOT EXISTS (SELECT FROM pg_type x WHERE x.typarray = eb.base)
), described AS (
  SELECT c.*, t.typname, t.typtype,
         CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN 'pg_catalog'
              WHEN EXISTS (SELECT FROM pg_depend p WHERE p.classid = 'pg_type'::regclass AND p.objid = t.oid
                           AND p.deptype = 'e') THEN 'extension'
              ELSE 'user' END AS type_schema,
         CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN format_type(t.oid, c.modifier)
              ELSE quote_ident(n.nspname) || '.' || quote_ident(t.typname)
                   || coalesce(substring(format_type(t.oid, c.modifier) FROM '\\([^()"]*\\)$'), '') END AS sql_type
  FROM columns c JOIN pg_type t ON t.oid = c.type JOIN pg_namespace n ON n.oid = t.typnamespace
)
SELECT w.nspname AS schema, w.relname AS name, w.relkind::text AS kind, w.relreplident::text AS replica_identity,
       pg_has_role(w.relowner, 'USAGE') AS owned, w.oid::bigint AS relation,
       coalesce((SELECT json_agg(json_build_array(
           attname, sql_type || CASE WHEN is_array THEN '[]' ELSE '' END, typname, type_schema, typtype, modifier,
           is_array, dimensions, domain, attnotnull, generated, fixed_length, mistakable) ORDER BY attnum)
         FROM described WHERE relation = w.oid), '[]')::text AS attributes,
       coalesce((SELECT json_agg(json_build_array(i.indisprimary, i.indisreplident, k.not_null, k.columns)
                                 ORDER BY x.relname)
         FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid CROSS JOIN LATERAL (
           SELECT json_agg(a.attname ORDER BY u.place) AS columns, bool_and(a.attnotnull) AS not_null
           FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS u (number, place)
                JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.number
           WHERE u.place <= i.indnkeyatts) k
         WHERE i.indrelid = w.oid AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
               AND i.indexprs IS NULL), '[]')::text AS indexes
FROM wanted w
"""
