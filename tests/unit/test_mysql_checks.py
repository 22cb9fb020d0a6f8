"""What the checks of a MariaDB or MySQL source decide, each finding by itself: facts in, problems out."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import pymysql
import pytest

from delta_sync.errors import UsageError
from delta_sync.sources.mysql.checks import (
    CascadeFacts,
    Facts,
    IndexFacts,
    TableFacts,
    global_privileges,
    problems,
    retention_s,
    version_of,
)
from delta_sync.sources.mysql.connection import Server, connect, explain, tls_options
from delta_sync.spec import PipelineSpec, SourceSpec, spec_from

MOVIE = TableFacts(
    id="studio.movie",
    kind="BASE TABLE",
    engine="InnoDB",
    may_select=True,
    indexes=(IndexFacts("PRIMARY", ("id",)),),
    columns=("id", "title"),
    types={"id": "int(11)", "title": "text"},
    charsets={"title": "utf8mb4"},
)
SOUND = Facts(
    mariadb=True,
    version=(10, 11),
    version_text="10.11.19-MariaDB",
    user="`delta`@`%`",
    privileges=frozenset({"REPLICATION SLAVE", "BINLOG MONITOR"}),
    may_see_log=True,
    log_bin=True,
    binlog_format="ROW",
    session_format="ROW",
    row_image="FULL",
    session_row_image="FULL",
    log_bin_compress=False,
    row_value_options="",
    compression=False,
    retention_s=7 * 86400.0,
    server_id=1,
    sync_binlog=1,
    snapshot_position=True,
    logged_databases=frozenset(),
    ignored_databases=frozenset(),
    replicates=False,
    log_slave_updates=False,
    galera=False,
    gtid_strict=False,
    tables=(MOVIE,),
)


def spec(*tables: str, scheme: str = "mariadb", **connector: str) -> PipelineSpec:
    return spec_from(
        {
            "name": "movies",
            "source": {"url": f"{scheme}://delta@db/"},
            "tables": dict.fromkeys(tables or ("studio.movie",)),
            "sinks": {"cache": {"url": "redis://h"}},
            "connector": connector,
        },
        "test",
    )


def test_nothing_to_find() -> None:
    assert problems(SOUND, spec()) == []


FINDINGS: list[tuple[dict[str, Any], str, str, bool]] = [
    ({"version": (10, 4)}, "this is MariaDB", "", True),
    ({"mariadb": False, "version": (5, 7)}, "this is MySQL", "", True),
    ({"mariadb": False, "version": (9, 7)}, "this is MySQL 10.11.19-MariaDB, not mariadb", "as mysql://…", True),
    ({"snapshot_position": False}, "a snapshot of this server", "use MariaDB 10.5", True),
    ({"log_bin": False}, "log_bin is off", "log_bin = binlog", True),
    ({"binlog_format": "STATEMENT"}, "binlog_format is STATEMENT", "SET GLOBAL binlog_format = 'ROW'", True),
    ({"session_format": "MIXED"}, "binlog_format is MIXED in a new session", "init_connect", True),
    ({"row_image": "NOBLOB"}, "binlog_row_image is NOBLOB", "SET GLOBAL binlog_row_image = 'FULL'", True),
    ({"visible_as_logged": False}, "binlog_optimize_thread_scheduling is OFF", "restart it", True),
    ({"log_bin_compress": True}, "log_bin_compress is on", "SET GLOBAL log_bin_compress = OFF", True),
    ({"row_value_options": "PARTIAL_JSON"}, "binlog_row_value_options", "SET GLOBAL", True),
    ({"compression": True}, "binlog_transaction_compression is on", "SET GLOBAL", True),
    ({"retention_s": 0.0}, "the log is kept for ever", "604800", False),
    ({"retention_s": 7200.0}, "the log is kept for 2h only", "604800", False),
    ({"retention_s": 60.0}, "the log is kept for 1m only", "604800", True),
    ({"server_id": 0}, "server_id is 0", "SET GLOBAL server_id = 1", True),
    ({"sync_binlog": 0}, "sync_binlog is 0", "SET GLOBAL sync_binlog = 1", False),
    ({"replicates": True, "gtid_strict": True}, "this server is a replica", "log_slave_updates = ON", True),
    ({"galera": True}, "this is a node of a Galera cluster", "name one node", False),
    ({"privileges": frozenset()}, "user `delta`@`%` may not read the log (REPLICATION SLAVE)", "GRANT REPL", True),
    ({"ignored_databases": frozenset({"studio"})}, "binlog_ignore_db keeps", "binlog_ignore_db", True),
    ({"logged_databases": frozenset({"other"})}, "binlog_do_db keeps", "binlog_do_db", True),
    ({"tables": (), "candidates": ("studio.movies",)}, "there is no such table", "did you mean studio.movies?", True),
    ({"tables": (), "candidates": ("studio.MOVIE",)}, "there is only studio.MOVIE", "write it as studio.MOVIE", True),
    ({"tables": (), "hidden": frozenset({"studio.movie"})}, "there is no such table, or", "GRANT SELECT ON `st", True),
    ({"tables": (MOVIE._replace(kind="VIEW"),)}, "this is a view", "give the tables", True),
    ({"tables": (MOVIE._replace(kind="SEQUENCE"),)}, "this is a sequence", "leave it out", True),
    ({"tables": (MOVIE._replace(kind="SYSTEM VERSIONED"),)}, "it keeps the history", "DROP SYSTEM VERSIONING", True),
    ({"tables": (MOVIE._replace(engine="Aria"),)}, "its engine is Aria", "ENGINE = InnoDB", True),
    ({"tables": (MOVIE._replace(may_select=False),)}, "user `delta`@`%` may not read", "GRANT SELECT", True),
    (
        {"tables": (MOVIE._replace(cascades=(CascadeFacts("of_studio", "studio", "ON DELETE CASCADE"),)),)},
        "its foreign key of_studio says ON DELETE CASCADE",
        "make of_studio, which refers to studio, ON DELETE RESTRICT",
        True,
    ),
    ({"tables": (MOVIE._replace(charsets={"title": "dec8"}),)}, "column title has the character", "CONVERT TO", True),
    ({"tables": (MOVIE._replace(indexes=()),)}, "it has no primary key", "ADD PRIMARY KEY (`id`)", True),
    (
        {"tables": (MOVIE._replace(indexes=(IndexFacts("one", ("id",), ("id",)),)),)},
        "it has no primary key",
        "MODIFY `id` int(11) NOT NULL",
        True,
    ),
]


@pytest.mark.parametrize(("changed", "what", "fix", "fatal"), FINDINGS)
def test_each_finding(changed: dict[str, Any], what: str, fix: str, fatal: bool) -> None:
    [found] = problems(SOUND._replace(**changed), spec())
    assert found.what.startswith(what)
    assert fix in found.fix
    assert found.fatal is fatal


MYSQL = SOUND._replace(
    mariadb=False, version=(9, 7), version_text="9.7.4", snapshot_position=False, gtid_strict=None, gtid_mode="ON"
)
CASCADING = MOVIE._replace(cascades=(CascadeFacts("of_studio", "studio", "ON DELETE CASCADE"),))
MYSQL_FINDINGS: list[tuple[dict[str, Any], str, str]] = [
    ({"version": (8, 0)}, "this is MySQL", ""),
    ({"mariadb": True, "version": (11, 4)}, "this is MariaDB 9.7.4, not mysql", "as mariadb://…"),
    ({"gtid_mode": "ON_PERMISSIVE"}, "gtid_mode is ON_PERMISSIVE", "SET GLOBAL gtid_mode = ON "),
    ({"may_list_xa": False}, "user `delta`@`%` may not read the log (XA_RECOVER_ADMIN)", "GRANT XA_RECOVER_ADMIN ON"),
    ({"row_value_options": "PARTIAL_JSON"}, "binlog_row_value_options", "SET GLOBAL"),
    ({"compression": True}, "binlog_transaction_compression is on", "SET GLOBAL"),
    ({"tables": (CASCADING,)}, "its foreign key of_studio says ON DELETE CASCADE", "ON DELETE RESTRICT"),
]


@pytest.mark.parametrize(("changed", "what", "fix"), MYSQL_FINDINGS)
def test_each_finding_of_mysql(changed: dict[str, Any], what: str, fix: str) -> None:
    assert problems(MYSQL, spec(scheme="mysql")) == []
    [found] = problems(MYSQL._replace(**changed), spec(scheme="mysql"))
    assert found.what.startswith(what)
    assert fix in found.fix
    assert found.fatal


def test_cascades_that_are_logged_are_no_matter() -> None:
    assert problems(MYSQL._replace(tables=(CASCADING,), cascades_logged=True), spec(scheme="mysql")) == []


def test_the_connectors_own_server_id() -> None:
    [found] = problems(SOUND, spec(**{"database.server.id": "1"}))
    assert "the server's own server_id" in found.what


def test_what_the_server_says_is_read() -> None:
    assert version_of("10.11.19-MariaDB-0+deb12u1-log") == (10, 11)
    assert version_of("5.5.5-10.4.2-MariaDB") == (10, 4)
    assert version_of("8.0.36") == (8, 0)
    grants = [
        "GRANT REPLICATION SLAVE, BINLOG MONITOR ON *.* TO `a`@`%` IDENTIFIED BY PASSWORD '*1'",
        "GRANT SELECT ON `studio`.* TO `a`@`%`",
        "GRANT PROCESS ON *.* TO `a_role`",
    ]
    assert global_privileges(grants) == {"REPLICATION SLAVE", "BINLOG MONITOR", "PROCESS"}
    assert retention_s({"binlog_expire_logs_seconds": "60", "expire_logs_days": "0.000694"}) == 60.0
    assert retention_s({"binlog_expire_logs_seconds": "0", "expire_logs_days": "2"}) == 172800.0
    assert retention_s({}) == 0.0


SERVER = Server("delta", "db.example", 3306, "studio")


@pytest.mark.parametrize(
    ("error", "what", "passing"),
    [
        (pymysql.OperationalError(1045, "Access denied"), "the password of user delta is wrong", False),
        (pymysql.OperationalError(1040, "Too many connections"), "the server on db.example:3306 has no", True),
        (pymysql.OperationalError(1053, "Server shutdown"), "the server on db.example:3306 is shutting", True),
        (
            RuntimeError(
                "'cryptography' package is required for sha256_password or caching_sha2_password auth methods"
            ),
            "user delta logs in by MySQL's method caching_sha2_password",
            False,
        ),
        (
            pymysql.OperationalError(9999, "Odd. See mysql://a:hunter2@b"),
            "cannot connect to db.example:3306: Odd",
            True,
        ),
        (ssl.SSLCertVerificationError("self-signed"), "TLS with db.example:3306 fails", False),
        (socket.gaierror(-2, "unknown"), "there is no host db.example", True),
        (TimeoutError("no answer"), "db.example:3306 does not answer", True),
        (ConnectionResetError(), "db.example:3306 closes connections at once", True),
        (OSError(113, "No route to host"), "db.example:3306 does not answer", True),
    ],
)
def test_errors_are_explained(error: Exception, what: str, passing: bool) -> None:
    problem, passes = explain(error, SERVER)
    assert problem.what.startswith(what)
    assert passes is passing
    assert "hunter2" not in problem.what


def test_tls() -> None:
    assert tls_options("") == {}
    assert tls_options("ssl-mode=disable") == {"ssl_disabled": True}
    context = tls_options("ssl-mode=trust")["ssl"]
    assert context.verify_mode is ssl.CERT_NONE
    context = tls_options("ssl-mode=VERIFY_CA")["ssl"]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)
    assert tls_options("ssl-mode=verify-full")["ssl"].check_hostname
    for query in ("ssl-mode=maybe", "charset=latin1"):
        with pytest.raises(UsageError, match="ssl-mode"):
            tls_options(query)


@pytest.mark.parametrize("url", ["postgresql://u@h/d", "mariadb://h/d"])
def test_urls_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(UsageError, match=r"source\.url"):
        connect(SourceSpec(url=url))
