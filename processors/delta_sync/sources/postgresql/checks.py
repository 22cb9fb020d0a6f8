"""What a PostgreSQL server and its tables must be like before Delta reads them.

`read_facts` asks the server, in a handful of queries; `problems` decides, without any. A fix is what to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import dict_row

from delta_sync.errors import Problem
from delta_sync.spec import PipelineSpec, format_duration
from delta_sync.tables import Table

MINIMUM_VERSION = 140000  # the first whose pgoutput carries logical messages, which the heartbeats are
PLUGIN = "pgoutput"
SHORT_SENDER_TIMEOUT_MS = 10_000  # the connector reports every 5 s; below twice that, one late report ends it
SMALL_WAL_KEEP_MB = 1024  # about a minute of a busy server: less than a restart of the worker may take
MAX_CANDIDATES = 10_000  # names among which a misspelt table is looked for

_RELATION_KINDS = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "S": "a sequence",
    "i": "an index",
    "I": "an index",
    "c": "a composite type",
}


class SlotFacts(NamedTuple):
    """A row of `pg_replication_slots`."""

    plugin: str | None
    slot_type: str
    database: str | None
    active: bool
    active_pid: int | None
    wal_status: str | None


class PublicationFacts(NamedTuple):
    """A publication; `tables` are those it names, by `schema.table`, as its subscribers see them."""

    owned: bool
    all_tables: bool
    insert: bool
    update: bool
    delete: bool
    truncate: bool
    via_root: bool
    tables: frozenset[str]
    restricted: frozenset[str] = frozenset()  # tables with a row filter or a list of columns


class IndexFacts(NamedTuple):
    """An index that could identify rows; `columns` are quoted for SQL."""

    name: str
    columns: tuple[str, ...]
    nullable: tuple[str, ...] = ()  # those of its columns that may be NULL


class TableFacts(NamedTuple):
    """A relation of the source; `sql_name` and column names are quoted for SQL."""

    id: str
    sql_name: str
    sql_schema: str
    kind: str  # pg_class.relkind
    persistence: str  # pg_class.relpersistence
    replica_identity: str  # pg_class.relreplident
    primary_key: tuple[str, ...]  # empty without one, and for a deferrable one, which identifies nothing in the log
    identity_index: tuple[str, ...]  # columns of the index that REPLICA IDENTITY USING INDEX names
    unique_indexes: tuple[IndexFacts, ...]
    columns: tuple[str, ...]
    owned: bool
    schema_usage: bool
    may_select: bool
    row_security: bool  # policies hide rows from this role
    inherited_by: tuple[str, ...] = ()  # tables that inherit from it (partitions are none)


class Facts(NamedTuple):
    """All that the checks need to know. Sizes and times are in the units of `pg_settings`, -1 and 0 as there."""

    version: int  # server_version_num
    version_text: str
    role: str  # quoted for SQL, as are the next two
    publication_name: str
    database: str
    database_name: str  # as it is
    in_recovery: bool
    wal_level: str
    superuser: bool
    replication_attribute: bool
    replication_refused: str | None  # what the server said to a replication connection; None: it let us in
    may_create: bool  # CREATE on the database
    max_slots: int
    used_slots: int
    max_senders: int
    used_senders: int
    slot_wal_keep_mb: int
    sender_timeout_ms: int
    idle_slot_timeout_s: int
    slot: SlotFacts | None = None
    publication: PublicationFacts | None = None
    tables: tuple[TableFacts, ...] = ()
    candidates: tuple[str, ...] = ()  # existing tables, when one of the pipeline's is missing


# ── I/O ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_facts(connection: psycopg.Connection, spec: PipelineSpec) -> Facts:
    """Ask the server. Reads catalogues only; opens and closes one replication connection to see whether it may.

    Raises psycopg.Error when the connection breaks.
    """
    server = _rows(connection, _SERVER, publication=spec.publication)[0]
    facts = Facts(**server, replication_refused=_replication_refused(connection))
    if facts.version < MINIMUM_VERSION:
        return facts  # the queries below ask for what older servers do not have
    slots = _rows(connection, _SLOT, slot=spec.slot)
    tables = _tables(connection, list(spec.tables))
    missing = set(spec.tables) - {table.id for table in tables}
    candidates = _rows(connection, _CANDIDATES, limit=MAX_CANDIDATES) if missing else []
    return facts._replace(
        slot=SlotFacts(**slots[0]) if slots else None,
        publication=_publication(connection, spec.publication, facts.version),
        tables=tables,
        candidates=tuple(row["id"] for row in candidates),
    )


def new_slot_command(spec: PipelineSpec) -> str:
    """Return the command that accepts that changes may have been lost, and begins anew."""
    return f"deltactl {'run' if spec.kafka is None else 'sidecar'} {spec.name} --new-slot"


def resolve_bare(connection: psycopg.Connection, names: Sequence[str]) -> dict[str, str]:
    """Return `schema.table` for names without a schema, by the role's search_path; those it cannot find are left out.

    As in SQL, a name that is only found in lower case is taken as that.
    """
    return {row["given"]: row["id"] for row in _rows(connection, _BARE, names=list(names))}


def _rows(connection: psycopg.Connection, query: str, **parameters: object) -> list[dict[str, Any]]:
    """Columns are called what the fields of the facts are called."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), parameters).fetchall()


def _replication_refused(connection: psycopg.Connection) -> str | None:
    """Try what the connector will do: `pg_hba.conf`, the role, a provider's own rules and poolers all have a say."""
    info = connection.info
    try:
        with psycopg.connect(
            info.dsn, password=info.password or None, replication="database", connect_timeout=10, autocommit=True
        ) as trial:
            result = trial.pgconn.exec_(b"IDENTIFY_SYSTEM")
            if result.status != psycopg.pq.ExecStatus.TUPLES_OK:
                return result.error_message.decode(errors="replace").strip()
    except psycopg.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if "FATAL" in line or "ERROR" in line]
        return (lines or [str(error).strip()])[-1].rpartition("FATAL:")[2].strip()
    return None


def _publication(connection: psycopg.Connection, name: str, version: int) -> PublicationFacts | None:
    found = _rows(connection, _PUBLICATION, name=name)
    if not found:
        return None
    tables = _rows(connection, _PUBLICATION_TABLES, name=name)
    # Row filters and lists of columns came with 15.
    restricted = _rows(connection, _PUBLICATION_RESTRICTED, name=name) if version >= 150000 else []
    return PublicationFacts(
        **found[0],
        tables=frozenset(row["id"] for row in tables),
        restricted=frozenset(row["id"] for row in restricted),
    )


def _tables(connection: psycopg.Connection, names: Sequence[str]) -> tuple[TableFacts, ...]:
    found: list[TableFacts] = []
    for row in _rows(connection, _TABLES, names=list(names)):
        fields: dict[str, Any] = {
            **row,
            **{name: tuple(row[name]) for name in _ARRAYS},
            "unique_indexes": tuple(
                IndexFacts(name, tuple(columns), tuple(nullable)) for name, columns, nullable in row["unique_indexes"]
            ),
        }
        found.append(TableFacts(**fields))
    return tuple(found)


_ARRAYS = ("primary_key", "identity_index", "columns", "inherited_by")

_SERVER = """
SELECT current_setting('server_version_num')::int AS version, current_setting('server_version') AS version_text,
       quote_ident(current_user) AS role, quote_ident(%(publication)s) AS publication_name,
       quote_ident(current_database()) AS database, current_database()::text AS database_name,
       pg_is_in_recovery() AS in_recovery, current_setting('wal_level') AS wal_level,
       r.rolsuper AS superuser, r.rolreplication AS replication_attribute,
       has_database_privilege(current_database(), 'CREATE') AS may_create,
       current_setting('max_replication_slots')::int AS max_slots,
       (SELECT count(*)::int FROM pg_replication_slots) AS used_slots,
       current_setting('max_wal_senders')::int AS max_senders,
       (SELECT count(*)::int FROM pg_stat_replication) AS used_senders,
       coalesce((SELECT setting::int FROM pg_settings WHERE name = 'max_slot_wal_keep_size'), -1) AS slot_wal_keep_mb,
       coalesce((SELECT setting::int FROM pg_settings WHERE name = 'wal_sender_timeout'), 60000) AS sender_timeout_ms,
       coalesce((SELECT extract(epoch FROM (setting || unit)::interval)::int FROM pg_settings
                 WHERE name = 'idle_replication_slot_timeout'), 0) AS idle_slot_timeout_s
FROM pg_roles r WHERE r.rolname = current_user
"""

_SLOT = """
SELECT plugin::text, slot_type, database::text, active, active_pid, wal_status
FROM pg_replication_slots WHERE slot_name = %(slot)s
"""

_PUBLICATION = """
SELECT pg_has_role(pubowner, 'USAGE') AS owned, puballtables AS all_tables, pubinsert AS insert, pubupdate AS update,
       pubdelete AS delete, pubtruncate AS truncate, pubviaroot AS via_root
FROM pg_publication WHERE pubname = %(name)s
"""

_PUBLICATION_TABLES = """
SELECT schemaname || '.' || tablename AS id FROM pg_publication_tables WHERE pubname = %(name)s
"""

_PUBLICATION_RESTRICTED = """
SELECT n.nspname || '.' || c.relname AS id
FROM pg_publication p JOIN pg_publication_rel pr ON pr.prpubid = p.oid
     JOIN pg_class c ON c.oid = pr.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE p.pubname = %(name)s AND (pr.prqual IS NOT NULL OR pr.prattrs IS NOT NULL)
"""

# Of the indexes, only those count that PostgreSQL accepts as a replica identity.
_TABLES = """
WITH wanted AS (
  SELECT c.*, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname || '.' || c.relname = ANY (%(names)s)
), indexed AS (
  SELECT i.indrelid, x.relname AS name, i.indisprimary, i.indisreplident,
         array_agg(quote_ident(a.attname) ORDER BY k.place) AS columns,
         coalesce(array_agg(quote_ident(a.attname) ORDER BY k.place) FILTER (WHERE NOT a.attnotnull), '{}') AS nullable
  FROM pg_index i JOIN wanted w ON w.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid
       CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, place)
       JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
  WHERE i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
        AND k.place <= i.indnkeyatts
  GROUP BY i.indrelid, x.relname, i.indisprimary, i.indisreplident
)
SELECT w.nspname || '.' || w.relname AS id, quote_ident(w.nspname) || '.' || quote_ident(w.relname) AS sql_name,
       quote_ident(w.nspname) AS sql_schema, w.relkind::text AS kind, w.relpersistence::text AS persistence,
       w.relreplident::text AS replica_identity,
       coalesce((SELECT columns FROM indexed WHERE indrelid = w.oid AND indisprimary), '{}') AS primary_key,
       coalesce((SELECT columns FROM indexed WHERE indrelid = w.oid AND indisreplident), '{}') AS identity_index,
       coalesce((SELECT json_agg(json_build_array(quote_ident(name), columns, nullable) ORDER BY name)
                 FROM indexed WHERE indrelid = w.oid AND NOT indisprimary), '[]') AS unique_indexes,
       a.columns,
       pg_has_role(w.relowner, 'USAGE') AS owned, has_schema_privilege(w.relnamespace, 'USAGE') AS schema_usage,
       has_table_privilege(w.oid, 'SELECT') AS may_select,
       w.relrowsecurity AND row_security_active(w.oid) AS row_security,
       coalesce((SELECT array_agg(h.inhrelid::regclass::text ORDER BY 1) FROM pg_inherits h
                 WHERE h.inhparent = w.oid AND w.relkind = 'r'), '{}') AS inherited_by
FROM wanted w CROSS JOIN LATERAL (
  SELECT coalesce(array_agg(quote_ident(attname) ORDER BY attnum), '{}') AS columns
  FROM pg_attribute WHERE attrelid = w.oid AND attnum > 0 AND NOT attisdropped
) a
"""

_CANDIDATES = """
SELECT n.nspname || '.' || c.relname AS id FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_t'
ORDER BY 1 LIMIT %(limit)s
"""

_BARE = """
SELECT DISTINCT ON (wanted.name) wanted.name AS given, n.nspname || '.' || c.relname AS id
FROM unnest(%(names)s::text[]) AS wanted (name)
     JOIN pg_class c ON c.relname IN (wanted.name, lower(wanted.name)) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
     JOIN pg_namespace n ON n.oid = c.relnamespace
     JOIN unnest(current_schemas(false)) WITH ORDINALITY AS path (schema, place) ON path.schema = n.nspname
ORDER BY wanted.name, c.relname <> wanted.name, path.place
"""


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────


def problems(facts: Facts, spec: PipelineSpec, *, running: bool = False, fresh: bool = False) -> list[Problem]:
    """Return what has to change, the server's findings first. Pure.

    `running`: this pipeline runs at the moment, so that its own slot is expected to be active. `fresh`: it is about to
    be created, so that a slot of its name is somebody else's, or left over.
    """
    if facts.version < MINIMUM_VERSION:
        return [
            Problem(
                "source",
                f"this is PostgreSQL {facts.version_text}, and Delta needs 14 or later",
                "upgrade the server: only from 14 on does the log carry the messages that Delta's heartbeats are",
            )
        ]
    found = _server_problems(facts)
    found += _slot_problems(facts, spec, running=running, fresh=fresh)
    tables = {table.id: table for table in facts.tables}
    for name in spec.tables:
        found += _table_problems(tables[name], facts) if name in tables else [_no_table(name, facts.candidates)]
    found += _publication_problems(facts, spec, [tables[name] for name in spec.tables if name in tables])
    return found


def _server_problems(facts: Facts) -> list[Problem]:
    found: list[Problem] = []
    if facts.in_recovery:
        found.append(
            Problem(
                "source", "this server is a standby, which takes no heartbeats", "give the primary's host in the URL"
            )
        )
    if facts.wal_level != "logical":
        found.append(
            Problem(
                "source",
                f"wal_level is {facts.wal_level}, so the log does not hold what changed",
                "type: ALTER SYSTEM SET wal_level = 'logical', and restart PostgreSQL (Amazon RDS: set"
                " rds.logical_replication = 1 in the parameter group and reboot)",
            )
        )
    if facts.replication_refused is not None:
        found.append(_replication_problem(facts, facts.replication_refused))
    if facts.slot is None and facts.used_slots >= facts.max_slots:
        found.append(
            Problem(
                "source",
                f"all {facts.max_slots} replication slots are taken (max_replication_slots)",
                f"type: ALTER SYSTEM SET max_replication_slots = {facts.used_slots + 4}, and restart PostgreSQL; or"
                " drop one that nobody reads (see pg_replication_slots)",
            )
        )
    if facts.slot_wal_keep_mb < 0:
        found.append(
            Problem(
                "source",
                "max_slot_wal_keep_size is not set, so while this pipeline is stopped the source keeps all its WAL",
                "watch the disk, or type: ALTER SYSTEM SET max_slot_wal_keep_size = '50GB' (a slot that falls further"
                " behind is lost, and the tables are loaded again)",
                fatal=False,
            )
        )
    elif facts.slot_wal_keep_mb < SMALL_WAL_KEEP_MB:
        found.append(
            Problem(
                "source",
                f"max_slot_wal_keep_size is {facts.slot_wal_keep_mb} MB: a pipeline that falls further behind loses its"
                " slot, and its tables are loaded again",
                "type: ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'",
                fatal=False,
            )
        )
    if 0 < facts.sender_timeout_ms < SHORT_SENDER_TIMEOUT_MS:
        found.append(
            Problem(
                "source",
                f"wal_sender_timeout is {facts.sender_timeout_ms} ms, and the connector reports every 5 s only",
                f"type: ALTER ROLE {facts.role} SET wal_sender_timeout = '60s'",
                fatal=False,
            )
        )
    if facts.idle_slot_timeout_s > 0:
        found.append(
            Problem(
                "source",
                f"idle_replication_slot_timeout is {format_duration(facts.idle_slot_timeout_s)}: a pipeline stopped for"
                " longer loses its slot, and its tables are loaded again",
                "raise it above the longest pause that you plan",
                fatal=False,
            )
        )
    return found


def _replication_problem(facts: Facts, said: str) -> Problem:
    if "max_wal_senders" in said or facts.used_senders >= facts.max_senders:
        return Problem(
            "source",
            f"all {facts.max_senders} WAL senders are busy (max_wal_senders)",
            f"type: ALTER SYSTEM SET max_wal_senders = {facts.used_senders + 4}, and restart PostgreSQL",
        )
    if "pg_hba.conf" in said:
        return Problem(
            "source",
            f"pg_hba.conf does not let role {facts.role} open a replication connection",
            f"add a line there for database {facts.database} and role {facts.role} from this machine",
        )
    if not facts.superuser and not facts.replication_attribute:
        return Problem(
            "source",
            f"role {facts.role} may not read the log",
            f"type: ALTER ROLE {facts.role} REPLICATION (Amazon RDS: GRANT rds_replication TO {facts.role})",
        )
    return Problem(
        "source",
        f"the server refuses a replication connection: {said}",
        "connect to PostgreSQL itself, not to a pooler in front of it",
    )


def _slot_problems(facts: Facts, spec: PipelineSpec, *, running: bool, fresh: bool) -> list[Problem]:
    slot = facts.slot
    if slot is None:
        return []
    drop = f"SELECT pg_drop_replication_slot('{spec.slot}')"
    rename = "set source.slot in pipeline.yaml to another name"
    if slot.plugin != PLUGIN:
        kind = f"of plugin {slot.plugin}" if slot.slot_type == "logical" else "a physical one"
        return [Problem("source", f"slot {spec.slot} exists already and is {kind}", f"{rename}, or type: {drop}")]
    if slot.database != facts.database_name:
        return [Problem("source", f"slot {spec.slot} exists already and belongs to database {slot.database}", rename)]
    if slot.wal_status == "lost":
        by_itself = spec.source.on_lost_log == "new_epoch" and not fresh
        what = "the next start" if by_itself else f"type: {new_slot_command(spec)}, which"
        return [
            Problem(
                "source",
                f"slot {spec.slot} is invalidated: the source has removed WAL that this pipeline had not read",
                f"{what} makes a new one and loads the tables again",
                fatal=not by_itself,
            )
        ]
    if slot.active and not running:
        return [
            Problem(
                "source",
                f"slot {spec.slot} is being read by another process (pid {slot.active_pid} on the server)",
                f"stop it, or {rename}: a slot has one reader",
            )
        ]
    if fresh:
        return [
            Problem(
                "source",
                f"slot {spec.slot} exists already, so another pipeline may be of that name, and this one would take its"
                " changes",
                f"choose another name; or, if it is left over, type: {drop}",
                fatal=False,
            )
        ]
    return []


def _no_table(name: str, candidates: Sequence[str]) -> Problem:
    where = f"table {name}"
    same = [candidate for candidate in candidates if candidate.lower() == name.lower()]
    if same:
        return Problem(where, f"there is only {' and '.join(same)}, and case matters here", f"write it as {same[0]}")
    bare = name.partition(".")[2].lower()
    elsewhere = [candidate for candidate in candidates if candidate.partition(".")[2].lower() == bare]
    bares = {candidate.partition(".")[2].lower(): candidate for candidate in candidates}
    close = [bares[match] for match in difflib.get_close_matches(bare, bares, n=3, cutoff=0.7)]
    meant = list(dict.fromkeys(elsewhere + close))[:3]
    if meant:
        return Problem(where, "there is no such table", f"did you mean {' or '.join(meant)}?")
    some = ", ".join(candidates[:5]) + (", …" if len(candidates) > 5 else "")
    return Problem(
        where, "there is no such table", f"the database has {some}" if some else "the database has no tables"
    )


def _table_problems(table: TableFacts, facts: Facts) -> list[Problem]:
    where = f"table {table.id}"
    name, role = table.sql_name, facts.role
    if table.id.startswith(("pg_catalog.", "information_schema.")):
        return [Problem(where, "the system's catalogue is not in the log", "leave it out")]
    if table.kind in _RELATION_KINDS:
        return [
            Problem(
                where,
                f"this is {_RELATION_KINDS[table.kind]}, which has no changes of its own in the log",
                "give the tables that it is made from",
            )
        ]
    if table.persistence == "u":
        return [
            Problem(where, "this is an unlogged table, so it is not in the log", f"type: ALTER TABLE {name} SET LOGGED")
        ]
    if table.persistence == "t":
        return [Problem(where, "this is a temporary table, so it is not in the log", "leave it out")]
    found: list[Problem] = []
    if table.inherited_by:
        found.append(
            Problem(
                where,
                f"other tables inherit from it ({', '.join(table.inherited_by)}): reading it reads their rows, but"
                " their changes are not its own",
                "make it a partitioned table, or give the tables that inherit instead",
            )
        )
    found += _key_problems(where, table)
    if not table.schema_usage:
        found.append(
            Problem(
                where,
                f"role {role} may not use schema {table.sql_schema}",
                f"type: GRANT USAGE ON SCHEMA {table.sql_schema} TO {role}",
            )
        )
    if not table.may_select:
        found.append(Problem(where, f"role {role} may not read it", f"type: GRANT SELECT ON {name} TO {role}"))
    if table.row_security:
        found.append(
            Problem(
                where,
                f"row level security hides rows from role {role}, so they would be missing from the sinks",
                f"type: ALTER ROLE {role} BYPASSRLS",
            )
        )
    return found


def _key_problems(where: str, table: TableFacts) -> list[Problem]:
    name = table.sql_name
    if table.replica_identity == "n":
        return [
            Problem(
                where,
                "its replica identity is NOTHING, so updates and deletes do not say which row they mean",
                f"type: ALTER TABLE {name} REPLICA IDENTITY DEFAULT",
            )
        ]
    if table.replica_identity == "i" and not table.identity_index:
        return [
            Problem(
                where,
                "the index of its replica identity is gone",
                f"type: ALTER TABLE {name} REPLICA IDENTITY DEFAULT",
            )
        ]
    if table.primary_key or (table.replica_identity == "i" and table.identity_index):
        return []
    usable = [index for index in table.unique_indexes if not index.nullable]
    if usable and table.replica_identity == "f":
        return []  # the log holds whole old rows, so any key of the table is in it
    if usable:
        fix = f"type: ALTER TABLE {name} REPLICA IDENTITY USING INDEX {usable[0].name}"
    elif table.unique_indexes:
        index = table.unique_indexes[0]
        not_null = ", ".join(f"ALTER COLUMN {column} SET NOT NULL" for column in index.nullable)
        fix = f"type: ALTER TABLE {name} {not_null}; ALTER TABLE {name} REPLICA IDENTITY USING INDEX {index.name}"
    else:
        column = table.columns[0] if table.columns else "id"
        fix = f"type: ALTER TABLE {name} ADD PRIMARY KEY ({column})" + (
            " (or the columns that identify a row)" if len(table.columns) > 1 else ""
        )
    return [Problem(where, "it has no primary key, so nothing says which row a change means", fix)]


def column_notes(tables: Iterable[Table]) -> list[Problem]:
    """Return what is slower than it could be, because the log does not carry some columns faithfully. Pure."""
    found: list[Problem] = []
    for table in tables:
        columns = [f"{column.name} ({column.type})" for column in table.columns if not column.in_log]
        if columns:
            found.append(
                Problem(
                    f"table {table.id}",
                    f"the log does not carry {', '.join(columns)} faithfully",
                    "nothing to do: each changed row is read by its key, which is slower",
                    fatal=False,
                )
            )
    return found


def _publication_problems(facts: Facts, spec: PipelineSpec, tables: Sequence[TableFacts]) -> list[Problem]:
    publication = facts.publication
    tables = [table for table in tables if table.kind in "rp"]
    if publication is None:
        return _creation_problems(facts, tables)
    where = f"publication {spec.publication}"
    name = facts.publication_name
    found: list[Problem] = []
    lacking = [op for op in ("insert", "update", "delete", "truncate") if not getattr(publication, op)]
    if lacking:
        found.append(
            Problem(
                where,
                f"it does not publish {', '.join(lacking)}",
                f"type: ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate')",
            )
        )
    if not publication.via_root and any(table.kind == "p" for table in tables):
        found.append(
            Problem(
                where,
                "it publishes a partitioned table's changes under the names of its partitions",
                f"type: ALTER PUBLICATION {name} SET (publish_via_partition_root = true)",
            )
        )
    found += [
        Problem(
            where,
            f"it has a row filter or a list of columns for {table.id}, so changes would be missing",
            f"type: ALTER PUBLICATION {name} DROP TABLE {table.sql_name}; ALTER PUBLICATION {name} ADD TABLE"
            f" {table.sql_name}",
        )
        for table in tables
        if table.id in publication.restricted
    ]
    absent = [] if publication.all_tables else [table for table in tables if table.id not in publication.tables]
    absent = [table for table in absent if table.kind == "r" or publication.via_root]
    beyond_us = [table for table in absent if not (publication.owned and table.owned)]
    if beyond_us:
        names = ", ".join(table.sql_name for table in beyond_us)
        found.append(
            Problem(
                where,
                f"it lacks {names}, and role {facts.role} does not own the publication and the table",
                f"let their owner type: ALTER PUBLICATION {name} ADD TABLE {names}",
            )
        )
    return found


def _creation_problems(facts: Facts, tables: Sequence[TableFacts]) -> list[Problem]:
    foreign = [table.sql_name for table in tables if not table.owned]
    if facts.may_create and not foreign:
        return []
    why = (
        f"role {facts.role} does not own {', '.join(foreign)}"
        if foreign
        else f"role {facts.role} lacks CREATE on database {facts.database}"
    )
    names = ", ".join(table.sql_name for table in tables)
    return [
        Problem(
            "source",
            f"there is no publication {facts.publication_name} yet, and {why}, which creating it takes",
            f"let the owner or a superuser type: CREATE PUBLICATION {facts.publication_name} FOR TABLE {names}"
            " WITH (publish_via_partition_root = true)",
        )
    ]
