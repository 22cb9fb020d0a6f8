"""What a MariaDB or MySQL server and its tables must be like before Delta reads them.

`read_facts` asks the server, in a handful of queries; `problems` decides, without any. A fix is what to type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pymysql
from pymysql.cursors import DictCursor

from delta_sync.errors import Problem
from delta_sync.sources.mysql.connection import Session, code_of, is_mariadb
from delta_sync.spec import PipelineSpec, format_duration

MINIMUM_MARIADB = (10, 5)  # the first with the privilege BINLOG MONITOR, which suffices to see where the log is
MINIMUM_MYSQL = (8, 4)  # the first with SHOW BINARY LOG STATUS that is still supported
RETENTION_S = 3 * 86400.0  # a weekend, and a day to notice: less is a warning
SHORT_RETENTION_S = 3600.0  # less than a night's outage, or one slow load: refused
MAX_CANDIDATES = 10_000  # names among which a misspelt table is looked for
READABLE_CHARSETS = frozenset(
    {"ascii", "latin1", "utf8", "utf8mb3", "utf8mb4", "ucs2", "utf16", "utf16le", "utf32", "binary"}
    | {"latin2", "latin5", "latin7", "cp1250", "cp1251", "cp1256", "cp1257", "cp850", "cp852", "cp866", "koi8r"}
    | {"koi8u", "greek", "hebrew", "tis620", "gbk", "gb2312", "big5", "sjis", "cp932", "ujis", "eucjpms", "euckr"}
)
"""Character sets that Java, and so Debezium, knows under some name."""

SELECT_DENIED, NO_SUCH_TABLE, NO_SUCH_DATABASE, DATABASE_DENIED = 1142, 1146, 1049, 1044
ACCESS_DENIED = 1227
XA_RECOVER_DENIED = 1401  # of all errors, MySQL chose the one that says that data may be damaged
SYSTEM_DATABASES = frozenset({"mysql", "information_schema", "performance_schema", "sys"})


class IndexFacts(NamedTuple):
    """A unique index on columns as they are, in order of its columns; `nullable` are those that may be NULL."""

    name: str
    columns: tuple[str, ...]
    nullable: tuple[str, ...] = ()


class CascadeFacts(NamedTuple):
    """A foreign key that changes or deletes this table's rows when the referenced ones are."""

    name: str
    references: str
    rules: str  # `ON DELETE CASCADE`


class TableFacts(NamedTuple):
    """A table of the source, by `database.table`."""

    id: str
    kind: str  # information_schema.TABLES.TABLE_TYPE
    engine: str | None
    may_select: bool
    indexes: tuple[IndexFacts, ...]  # unique ones; the primary one is called PRIMARY
    columns: tuple[str, ...]
    types: Mapping[str, str] = {}  # column → its type
    charsets: Mapping[str, str] = {}  # column → character set
    cascades: tuple[CascadeFacts, ...] = ()

    @property
    def sql_name(self) -> str:
        database, _, name = self.id.partition(".")
        return f"{quoted(database)}.{quoted(name)}"


class Facts(NamedTuple):
    """All that the checks need to know."""

    mariadb: bool
    version: tuple[int, int]
    version_text: str
    user: str  # `name`@`host`, quoted for SQL
    privileges: frozenset[str]  # global ones, in capitals
    may_see_log: bool  # SHOW MASTER STATUS is allowed
    log_bin: bool
    binlog_format: str  # the default of new sessions
    session_format: str  # this session's: a server may set another at the login
    row_image: str
    session_row_image: str
    log_bin_compress: bool
    row_value_options: str  # MySQL's PARTIAL_JSON
    compression: bool  # MySQL's binlog_transaction_compression
    retention_s: float  # 0: for ever
    server_id: int
    sync_binlog: int
    snapshot_position: bool  # a snapshot tells where in the log it is
    logged_databases: frozenset[str]  # binlog_do_db; empty: all
    ignored_databases: frozenset[str]  # binlog_ignore_db
    replicates: bool  # this server applies another one's log
    log_slave_updates: bool
    galera: bool
    gtid_strict: bool | None  # MariaDB's gtid_strict_mode; None: has none
    tables: tuple[TableFacts, ...] = ()
    hidden: frozenset[str] = frozenset()  # tables of which the server does not even say whether they are there
    candidates: tuple[str, ...] = ()  # existing tables, when one of the pipeline's is missing
    gtid_mode: str = ""  # MySQL's
    may_list_xa: bool = True  # XA RECOVER is allowed
    cascades_logged: bool = False  # what foreign keys change by themselves is in the log: MySQL since 9.6
    visible_as_logged: bool = True  # binlog_optimize_thread_scheduling: a snapshot's position is not ahead of it


# ── I/O ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_facts(session: Session, spec: PipelineSpec) -> Facts:
    """Ask the server. Reads catalogues, and asks for no rows.

    Raises pymysql.Error when the connection breaks.
    """
    variables = {row["Variable_name"].lower(): str(row["Value"]) for row in _rows(session, "SHOW GLOBAL VARIABLES")}
    mine = {row["Variable_name"].lower(): str(row["Value"]) for row in _rows(session, "SHOW SESSION VARIABLES")}
    names = list(spec.tables)
    tables = _tables(session, names)
    missing = [name for name in names if name not in {table.id for table in tables}]
    status, may_see_log = _log_status(session)
    grants = [str(next(iter(row.values()))) for row in _rows(session, "SHOW GRANTS")]
    return Facts(
        mariadb=is_mariadb(session),
        version=version_of(variables["version"]),
        version_text=variables["version"],
        user=_account(str(_rows(session, "SELECT CURRENT_USER() AS name")[0]["name"])),
        privileges=global_privileges(grants),
        may_see_log=may_see_log,
        log_bin=variables.get("log_bin") == "ON",
        binlog_format=variables.get("binlog_format", "ROW"),  # MySQL is about to do without
        session_format=mine.get("binlog_format", "ROW"),
        row_image=variables.get("binlog_row_image", "FULL"),
        session_row_image=mine.get("binlog_row_image", "FULL"),
        log_bin_compress=variables.get("log_bin_compress", "OFF") == "ON",
        row_value_options=variables.get("binlog_row_value_options", ""),
        compression=variables.get("binlog_transaction_compression", "OFF") == "ON",
        retention_s=retention_s(variables),
        server_id=int(variables["server_id"]),
        sync_binlog=int(variables.get("sync_binlog", "1")),
        snapshot_position=bool(_rows(session, "SHOW STATUS LIKE 'binlog\\_snapshot\\_file'")),
        logged_databases=_names(status.get("Binlog_Do_DB")),
        ignored_databases=_names(status.get("Binlog_Ignore_DB")),
        replicates=bool(variables.get("gtid_slave_pos")) or _is_replica(session, variables),
        log_slave_updates=variables.get("log_slave_updates", variables.get("log_replica_updates")) == "ON",
        galera=variables.get("wsrep_on") == "ON",
        gtid_mode=variables.get("gtid_mode", ""),
        may_list_xa=_may_list_xa(session),
        cascades_logged=variables.get("innodb_native_foreign_keys") == "OFF",
        gtid_strict=variables["gtid_strict_mode"] == "ON" if "gtid_strict_mode" in variables else None,
        tables=tables,
        hidden=frozenset(name for name in missing if _selecting(session, name) in (SELECT_DENIED, DATABASE_DENIED)),
        candidates=_candidates(session) if missing else (),
        visible_as_logged=variables.get("binlog_optimize_thread_scheduling", "ON") == "ON",
    )


def resolve_bare(session: Session, names: Sequence[str]) -> dict[str, str]:
    """Return `database.table` for names without a database, by the session's; those it cannot find are left out."""
    found = _rows(
        session,
        "SELECT table_name AS name, CONCAT(table_schema, '.', table_name) AS id FROM information_schema.tables"
        " WHERE table_schema = DATABASE()",
    )
    ids = {str(row["name"]): str(row["id"]) for row in found}
    return {name: ids[name] for name in names if name in ids}


def _rows(session: Session, query: str, parameters: tuple[Any, ...] | None = None) -> list[dict[str, Any]]:
    """Values are str; columns are called what the query calls them."""
    with session.cursor(DictCursor) as cursor:
        cursor.execute(query, parameters)
        return list(cursor.fetchall())


def _log_status(session: Session) -> tuple[Mapping[str, str], bool]:
    """Return where the log is and which databases it holds, and whether we may ask; by the name of newer MySQL, too."""
    for statement in ("SHOW MASTER STATUS", "SHOW BINARY LOG STATUS"):
        try:
            found = _rows(session, statement)
        except pymysql.OperationalError as error:
            if code_of(error) == ACCESS_DENIED:
                return {}, False
            raise
        except pymysql.ProgrammingError:
            continue  # it does not know the statement
        return (found[0] if found else {}), True
    return {}, False


def _is_replica(session: Session, variables: Mapping[str, str]) -> bool:
    """Whether a MySQL server applies another one's log; False where we may not ask, which is a finding by itself."""
    if "gtid_mode" not in variables:
        return False
    try:
        return bool(_rows(session, "SHOW REPLICA STATUS"))
    except pymysql.OperationalError as error:
        if code_of(error) != ACCESS_DENIED:
            raise
        return False


def _may_list_xa(session: Session) -> bool:
    try:
        _rows(session, "XA RECOVER")
    except pymysql.Error as error:
        if code_of(error) != XA_RECOVER_DENIED:
            raise
        return False
    return True


def _selecting(session: Session, name: str) -> int | None:
    """Try to read the table; return the error's number."""
    database, _, table = name.partition(".")
    try:
        _rows(session, f"SELECT 1 FROM {quoted(database)}.{quoted(table)} LIMIT 0")  # noqa: S608 -- quoted
    except pymysql.Error as error:
        if not session.open:
            raise
        return code_of(error)
    return None


def _tables(session: Session, names: Sequence[str]) -> tuple[TableFacts, ...]:
    found: list[TableFacts] = []
    for name in names:
        place = tuple(name.split(".", 1))  # one table each: for a list the server would open all that there are
        rows = [row for row in _rows(session, _TABLE, place) if row["id"] == name]  # which may ignore case
        if not rows:
            continue
        columns = _rows(session, _COLUMNS, place)
        found.append(
            TableFacts(
                id=name,
                kind=rows[0]["kind"],
                engine=rows[0]["engine"],
                may_select=_selecting(session, name) is None,
                indexes=unique_indexes(_rows(session, _INDEXES, place)),
                columns=tuple(column["name"] for column in columns),
                types={column["name"]: column["type"] for column in columns},
                charsets={column["name"]: column["charset"] for column in columns if column["charset"] is not None},
                cascades=tuple(cascades(_rows(session, _FOREIGN_KEYS, place))),
            )
        )
    return tuple(found)


def unique_indexes(rows: Iterable[Mapping[str, Any]]) -> tuple[IndexFacts, ...]:
    """Return the unique indexes among rows of `information_schema.STATISTICS`: none on prefixes or expressions."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    return tuple(
        IndexFacts(
            name,
            tuple(part["column_name"] for part in parts),
            tuple(part["column_name"] for part in parts if part["nullable"] == "YES"),
        )
        for name, parts in by_name.items()
        if all(part["prefix"] is None and part["column_name"] is not None for part in parts)
    )


_CASCADING = frozenset({"CASCADE", "SET NULL", "SET DEFAULT"})


def cascades(rows: Iterable[Mapping[str, Any]]) -> list[CascadeFacts]:
    """Return the foreign keys that act on their own table, of `information_schema.REFERENTIAL_CONSTRAINTS`. Pure."""
    found: list[CascadeFacts] = []
    for row in rows:
        rules = {"ON DELETE": row["on_delete"], "ON UPDATE": row["on_update"]}
        acting = " ".join(f"{when} {rule}" for when, rule in rules.items() if rule in _CASCADING)
        if acting:
            found.append(CascadeFacts(row["name"], row["table"], acting))
    return found


def _candidates(session: Session) -> tuple[str, ...]:
    return tuple(row["id"] for row in _rows(session, _CANDIDATES, (MAX_CANDIDATES,)))


_TABLE = """
SELECT CONCAT(table_schema, '.', table_name) AS id, table_type AS kind, engine AS engine
FROM information_schema.tables WHERE table_schema = %s AND table_name = %s
"""
_COLUMNS = """
SELECT column_name AS name, column_type AS type, character_set_name AS charset
FROM information_schema.columns WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position
"""
_INDEXES = """
SELECT index_name AS name, column_name AS column_name, nullable AS nullable, sub_part AS prefix
FROM information_schema.statistics WHERE table_schema = %s AND table_name = %s AND non_unique = 0
ORDER BY index_name <> 'PRIMARY', index_name, seq_in_index
"""
_FOREIGN_KEYS = """
SELECT constraint_name AS name, referenced_table_name AS `table`, delete_rule AS on_delete, update_rule AS on_update
FROM information_schema.referential_constraints WHERE constraint_schema = %s AND table_name = %s ORDER BY 1
"""
_CANDIDATES = """
SELECT CONCAT(table_schema, '.', table_name) AS id FROM information_schema.tables
WHERE table_type = 'BASE TABLE' AND table_schema NOT IN ('mysql', 'sys', 'information_schema', 'performance_schema')
ORDER BY 1 LIMIT %s
"""


def _names(text: str | None) -> frozenset[str]:
    return frozenset(filter(None, (text or "").split(",")))


def _account(current_user: str) -> str:
    name, _, host = current_user.rpartition("@")
    return f"{quoted(name)}@{quoted(host)}"


def quoted(name: str) -> str:
    """Return a name as SQL has it."""
    return "`" + name.replace("`", "``") + "`"


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────


def version_of(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version: `10.11.19-MariaDB-…`, and `5.5.5-10.4.2-MariaDB` behind a proxy."""
    numbers = re.match(r"(?:5\.5\.5-)?(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def global_privileges(grants: Iterable[str]) -> frozenset[str]:
    """Return the privileges that `SHOW GRANTS` lists for everything, its own and those of the current roles."""
    found: set[str] = set()
    for line in grants:
        if match := re.match(r"GRANT (.+) ON \*\.\* TO ", line):
            found.update(name.strip().upper() for name in match[1].split(","))
    return frozenset(found)


def retention_s(variables: Mapping[str, str]) -> float:
    """Return how long the log is kept; 0 for ever. MariaDB's two variables are one, in seconds and in days."""
    seconds = float(variables.get("binlog_expire_logs_seconds") or 0)
    return seconds or float(variables.get("expire_logs_days") or 0) * 86400.0


def problems(facts: Facts, spec: PipelineSpec) -> list[Problem]:
    """Return what has to change, the server's findings first. Pure."""
    minimum, product = (MINIMUM_MARIADB, "MariaDB") if facts.mariadb else (MINIMUM_MYSQL, "MySQL")
    if facts.version < minimum:
        needed = ".".join(map(str, minimum))
        return [Problem("source", f"this is {product} {facts.version_text}, and Delta needs {needed} or later", "")]
    if facts.mariadb != (spec.source.kind == "mariadb"):
        fix = f"write source.url as {product.lower()}://…"
        return [Problem("source", f"this is {product} {facts.version_text}, not {spec.source.kind}", fix)]
    found = _log_problems(facts) + _session_problems(facts) + _retention_problems(facts)
    found += _server_problems(facts, spec) + _privilege_problems(facts)
    tables = {table.id: table for table in facts.tables}
    for name in spec.tables:
        found += _database_problems(name, facts)
        found += _table_problems(tables[name], facts) if name in tables else [_no_table(name, facts)]
    return found


def _log_problems(facts: Facts) -> list[Problem]:
    if not facts.log_bin:
        return [
            Problem(
                "source",
                "log_bin is off, so there is no log of what changed",
                "write log_bin = binlog and binlog_format = ROW under [mysqld] in the server's configuration, and"
                " restart it",
            )
        ]
    found: list[Problem] = []
    if facts.binlog_format != "ROW":
        found.append(
            Problem(
                "source",
                f"binlog_format is {facts.binlog_format}, so the log does not hold every row that changed",
                "type: SET GLOBAL binlog_format = 'ROW' (and write it into the server's configuration), then let the"
                " applications connect anew: a session keeps the format that it began with",
            )
        )
    if facts.row_image != "FULL":
        found.append(
            Problem(
                "source",
                f"binlog_row_image is {facts.row_image}, so the log does not hold whole rows",
                "type: SET GLOBAL binlog_row_image = 'FULL' (and write it into the server's configuration), then let"
                " the applications connect anew",
            )
        )
    if facts.log_bin_compress:
        found.append(
            Problem(
                "source",
                "log_bin_compress is on, and Debezium leaves out compressed changes without a word",
                "type: SET GLOBAL log_bin_compress = OFF (and write it into the server's configuration)",
            )
        )
    if facts.row_value_options:
        found.append(
            Problem(
                "source",
                f"binlog_row_value_options is {facts.row_value_options}, so the log holds parts of JSON values only",
                "type: SET GLOBAL binlog_row_value_options = ''",
            )
        )
    if facts.compression:
        found.append(
            Problem(
                "source",
                "binlog_transaction_compression is on, so the changes of a transaction have no positions of their own",
                "type: SET GLOBAL binlog_transaction_compression = OFF",
            )
        )
    if not facts.visible_as_logged:
        found.append(
            Problem(
                "source",
                "binlog_optimize_thread_scheduling is OFF, so a snapshot's position is ahead of what it shows",
                "take it out of the server's configuration, and restart it",
            )
        )
    if facts.mariadb and not facts.snapshot_position:
        found.append(
            Problem(
                "source",
                "a snapshot of this server does not say where in the log it is (there is no status variable"
                " Binlog_snapshot_file), so rows that are there already cannot be read without locks",
                "use MariaDB 10.5 or later",
            )
        )
    if not facts.mariadb and facts.gtid_mode != "ON":
        found.append(
            Problem(
                "source",
                f"gtid_mode is {facts.gtid_mode}, and without GTIDs nothing tells which changes a snapshot shows",
                "type, each when its predecessor is done: SET GLOBAL enforce_gtid_consistency = ON; SET GLOBAL"
                " gtid_mode = OFF_PERMISSIVE; SET GLOBAL gtid_mode = ON_PERMISSIVE; SET GLOBAL gtid_mode = ON (and"
                " write both into the server's configuration)",
            )
        )
    return found


def _session_problems(facts: Facts) -> list[Problem]:
    """Other values in the session that checks than in new sessions: something sets them at the login."""
    differing = {
        "binlog_format": (facts.binlog_format, facts.session_format, "ROW"),
        "binlog_row_image": (facts.row_image, facts.session_row_image, "FULL"),
    }
    return [
        Problem(
            "source",
            f"{name} is {own} in a new session, not {of_server} as the server's (init_connect or a proxy sets it)",
            f"let sessions have {wanted}: see SELECT @@init_connect",
        )
        for name, (of_server, own, wanted) in differing.items()
        if of_server == wanted != own
    ]


def _retention_problems(facts: Facts) -> list[Problem]:
    if facts.retention_s <= 0:
        return [
            Problem(
                "source",
                "the log is kept for ever (binlog_expire_logs_seconds is 0)",
                "watch the disk, or type: SET GLOBAL binlog_expire_logs_seconds = 604800",
                fatal=False,
            )
        ]
    if facts.retention_s >= RETENTION_S:
        return []
    return [
        Problem(
            "source",
            f"the log is kept for {format_duration(facts.retention_s)} only: a pipeline that is stopped for longer"
            " loses changes, and its tables are loaded again",
            "type: SET GLOBAL binlog_expire_logs_seconds = 604800 (and write it into the server's configuration;"
            " Amazon RDS: CALL mysql.rds_set_configuration('binlog retention hours', 168))",
            fatal=facts.retention_s < SHORT_RETENTION_S,
        )
    ]


def _server_problems(facts: Facts, spec: PipelineSpec) -> list[Problem]:
    found: list[Problem] = []
    if facts.server_id == 0:
        found.append(
            Problem(
                "source",
                "server_id is 0, and such a server lets nobody read its log",
                "type: SET GLOBAL server_id = 1 (and write it into the server's configuration)",
            )
        )
    wanted = spec.connector.get("database.server.id")
    if wanted is not None and str(wanted) == str(facts.server_id):
        found.append(
            Problem(
                "source",
                f"connector.database.server.id is {wanted}, which is the server's own server_id",
                "choose another number in pipeline.yaml, one that no replica has, or leave it out",
            )
        )
    if facts.replicates and not facts.log_slave_updates:
        found.append(
            Problem(
                "source",
                "this server is a replica that does not write what it replicates into its own log (log_slave_updates)",
                "give the primary's host in source.url, or write log_slave_updates = ON into the configuration and"
                " restart the server",
            )
        )
    if facts.galera:
        found.append(
            Problem(
                "source",
                "this is a node of a Galera cluster: positions are each node's own, so when source.url leads to another"
                " node, a new epoch begins and every table is loaded again",
                "name one node in source.url, not a balancer",
                fatal=False,
            )
        )
    if facts.sync_binlog != 1:
        found.append(
            Problem(
                "source",
                f"sync_binlog is {facts.sync_binlog}: when the machine crashes, changes that were delivered already may"
                " be lost at the source",
                "type: SET GLOBAL sync_binlog = 1 (and write it into the server's configuration)",
                fatal=False,
            )
        )
    if facts.replicates and facts.gtid_strict is False:
        found.append(
            Problem(
                "source",
                "gtid_strict_mode is off on a replica, so its log may be in another order than its primary's",
                "type: SET GLOBAL gtid_strict_mode = ON",
                fatal=False,
            )
        )
    return found


_ALL = "ALL PRIVILEGES"
_REPLICATION = frozenset({"REPLICATION SLAVE", "REPLICATION REPLICA", _ALL})
_SEES_LOG = frozenset({"BINLOG MONITOR", "REPLICATION CLIENT", "SUPER", _ALL})


def _privilege_problems(facts: Facts) -> list[Problem]:
    lacking: list[str] = []
    if not facts.privileges & _REPLICATION:
        lacking.append("REPLICATION SLAVE")
    if not facts.may_see_log and not facts.privileges & _SEES_LOG:
        lacking.append("BINLOG MONITOR" if facts.mariadb else "REPLICATION CLIENT")
    if not facts.may_list_xa:
        lacking.append("XA_RECOVER_ADMIN")
    if not lacking:
        return []
    return [
        Problem(
            "source",
            f"user {facts.user} may not read the log ({', '.join(lacking)})",
            f"type: GRANT {', '.join(lacking)} ON *.* TO {facts.user}",
        )
    ]


def _database_problems(name: str, facts: Facts) -> list[Problem]:
    database = name.partition(".")[0]
    if database in facts.ignored_databases or (facts.logged_databases and database not in facts.logged_databases):
        option = "binlog_ignore_db" if database in facts.ignored_databases else "binlog_do_db"
        return [
            Problem(
                f"table {name}",
                f"{option} keeps what is written under USE {database} out of the log",
                f"take {option} out of the server's configuration, and restart it",
            )
        ]
    return []


def _no_table(name: str, facts: Facts) -> Problem:
    where = f"table {name}"
    database, _, bare = name.partition(".")
    if name in facts.hidden:
        return Problem(
            where,
            f"there is no such table, or user {facts.user} may not read it",
            f"type: GRANT SELECT ON {quoted(database)}.{quoted(bare)} TO {facts.user}",
        )
    same = [candidate for candidate in facts.candidates if candidate.lower() == name.lower()]
    if same:
        return Problem(where, f"there is only {' and '.join(same)}, and case matters here", f"write it as {same[0]}")
    bares = {candidate.partition(".")[2].lower(): candidate for candidate in facts.candidates}
    elsewhere = [candidate for candidate in facts.candidates if candidate.partition(".")[2].lower() == bare.lower()]
    close = [bares[match] for match in difflib.get_close_matches(bare.lower(), bares, n=3, cutoff=0.7)]
    meant = list(dict.fromkeys(elsewhere + close))[:3]
    if meant:
        return Problem(where, "there is no such table", f"did you mean {' or '.join(meant)}?")
    some = ", ".join(facts.candidates[:5]) + (", …" if len(facts.candidates) > 5 else "")
    return Problem(
        where, "there is no such table", f"there are {some}" if some else f"user {facts.user} can see no tables at all"
    )


def _table_problems(table: TableFacts, facts: Facts) -> list[Problem]:
    where = f"table {table.id}"
    if table.id.partition(".")[0].lower() in SYSTEM_DATABASES:
        return [Problem(where, "the system's own tables are not for pipelines", "leave it out")]
    if table.kind in ("VIEW", "SYSTEM VIEW"):
        return [
            Problem(
                where,
                "this is a view, which has no changes of its own in the log",
                "give the tables that it is made from",
            )
        ]
    if table.kind == "SYSTEM VERSIONED":
        return [
            Problem(
                where,
                "it keeps the history of its rows (WITH SYSTEM VERSIONING), with which Delta has not been tried",
                f"type: ALTER TABLE {table.sql_name} DROP SYSTEM VERSIONING, or leave it out",
            )
        ]
    if table.kind != "BASE TABLE":
        return [Problem(where, f"this is a {table.kind.lower()}, which has no rows in the log", "leave it out")]
    found: list[Problem] = []
    if not table.may_select:
        found.append(
            Problem(
                where,
                f"user {facts.user} may not read all of it",
                f"type: GRANT SELECT ON {table.sql_name} TO {facts.user}",
            )
        )
    if (table.engine or "").upper() != "INNODB":
        found.append(
            Problem(
                where,
                f"its engine is {table.engine}, which has no snapshots, so a row's place in the log is unknown",
                f"type: ALTER TABLE {table.sql_name} ENGINE = InnoDB",
            )
        )
    found += _key_problems(where, table)
    found += [
        Problem(
            where,
            f"its foreign key {name} says {rules}, and what a server changes by that is not in the log",
            f"let the applications do it: make {name}, which refers to {references}, ON DELETE RESTRICT ON UPDATE"
            " RESTRICT",
        )
        for name, references, rules in table.cascades
        if not facts.cascades_logged
    ]
    found += [
        Problem(
            where,
            f"column {column} has the character set {charset}, which Debezium cannot read",
            f"type: ALTER TABLE {table.sql_name} CONVERT TO CHARACTER SET utf8mb4",
        )
        for column, charset in table.charsets.items()
        if charset not in READABLE_CHARSETS
    ]
    return found


def key_of(indexes: Sequence[IndexFacts]) -> tuple[tuple[str, ...], bool]:
    """Return the key, and whether it is the primary one; () without any. Of several the first by name."""
    for index in indexes:
        if index.name == "PRIMARY":
            return index.columns, True
    for index in indexes:
        if not index.nullable:
            return index.columns, False
    return (), False


def _key_problems(where: str, table: TableFacts) -> list[Problem]:
    key, _ = key_of(table.indexes)
    if key:
        return []
    if table.indexes:
        index = table.indexes[0]
        changes = ", ".join(
            f"MODIFY {quoted(column)} {table.types.get(column, '…')} NOT NULL" for column in index.nullable
        )
        fix = f"type: ALTER TABLE {table.sql_name} {changes}"
    else:
        column = table.columns[0] if table.columns else "id"
        fix = f"type: ALTER TABLE {table.sql_name} ADD PRIMARY KEY ({quoted(column)})" + (
            " (or the columns that identify a row)" if len(table.columns) > 1 else ""
        )
    return [Problem(where, "it has no primary key, so nothing says which row a change means", fix)]
