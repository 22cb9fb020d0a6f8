"""Connecting to a MariaDB source, and the queries behind its checks, on a real server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pymysql
import pytest

from delta_sync.errors import CheckFailed, SourceBusy
from delta_sync.sources.mysql import connection as module
from delta_sync.sources.mysql.checks import CascadeFacts, Facts, key_of, problems, read_facts, resolve_bare
from delta_sync.sources.mysql.connection import Session, connect
from delta_sync.spec import PipelineSpec, SourceSpec, spec_from
from delta_sync.testing.mariadb import PASSWORD, USER, MariaDB
from delta_sync.testing.processes import free_port

TABLES = """
CREATE DATABASE source_checks;
USE source_checks;
CREATE TABLE movie (id int PRIMARY KEY, slug varchar(50) UNIQUE, title text NOT NULL);
CREATE TABLE keyed (a int NOT NULL, `B c` int NOT NULL, t text, UNIQUE keyed_prefix (t(10)), UNIQUE k2 (`B c`, a));
CREATE TABLE keyless (a int, b int, UNIQUE half (a, b));
CREATE TABLE of_movie (id int PRIMARY KEY, movie int, CONSTRAINT acts FOREIGN KEY (movie) REFERENCES movie (id)
 ON DELETE CASCADE, CONSTRAINT rests FOREIGN KEY (id) REFERENCES movie (id));
CREATE TABLE old_engine (id int PRIMARY KEY) ENGINE = MyISAM;
CREATE TABLE history (id int PRIMARY KEY) WITH SYSTEM VERSIONING;
CREATE VIEW view_of AS SELECT id FROM movie;
CREATE SEQUENCE numbers;
CREATE TABLE `odd.``name` (id int PRIMARY KEY);
CREATE TABLE Movies (id int PRIMARY KEY);
CREATE USER poor@'%' IDENTIFIED BY 'of-a-test-server';
GRANT SELECT ON source_checks.movie TO poor@'%';
CREATE USER rich@'%' IDENTIFIED BY 'of-a-test-server';
CREATE ROLE streamer;
GRANT REPLICATION SLAVE, BINLOG MONITOR, BINLOG ADMIN ON *.* TO streamer;
GRANT SELECT ON source_checks.* TO streamer;
GRANT streamer TO rich@'%';
SET DEFAULT ROLE streamer FOR rich@'%';
"""


def admin(server: MariaDB, *, user: str = USER) -> Session:
    return connect(source_of(server, user))


def run(session: Session, statements: str) -> None:
    with session.cursor() as cursor:
        for statement in filter(str.strip, statements.split(";\n")):
            cursor.execute(statement)


def source_of(server: MariaDB, user: str = USER, *, database: str = "", query: str = "") -> SourceSpec:
    url = f"mariadb://{user}@127.0.0.1:{server.port}/{database}{query}"
    return SourceSpec(url=url, password="${env:DELTA_TEST_PASSWORD}")


def spec_of(server: MariaDB, *tables: str, user: str = USER) -> PipelineSpec:
    source = source_of(server, user).model_dump(exclude_none=True)
    return spec_from(
        {"name": "m", "source": source, "tables": dict.fromkeys(tables), "sinks": {"cache": {"url": "redis://h"}}},
        "test",
    )


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTA_TEST_PASSWORD", PASSWORD)


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDB]:
    """A server of these tests' own: they change settings."""
    with MariaDB(max_connections=10) as server:
        with (
            pymysql.connect(host="127.0.0.1", port=server.port, user=USER, password=PASSWORD) as session,
            session.cursor() as cursor,
        ):
            for statement in filter(str.strip, TABLES.split(";\n")):
                cursor.execute(statement)
        yield server


def facts_of(spec: PipelineSpec) -> Facts:
    with closing(connect(spec.source)) as session:
        return read_facts(session, spec)


# ── connecting ───────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(source: SourceSpec) -> str:
    with pytest.raises((CheckFailed, SourceBusy)) as caught:
        connect(source)
    assert "hunter2" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_each_way_in_which_connecting_fails(server: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(server)
    assert refusal(source_of(server, database="no_such")).startswith(
        "CheckFailed: source: there is no database no_such"
    )
    assert "does not offer TLS" in refusal(source_of(server, query="?ssl-mode=trust"))
    poor = refusal(source_of(server, "poor", database="mysql"))
    assert "CheckFailed: source: user poor may not use database mysql" in poor
    monkeypatch.setenv("DELTA_TEST_PASSWORD", "hunter2")
    assert "CheckFailed: source: the password of user delta is wrong" in refusal(source)
    nobody = SourceSpec(url=f"mariadb://{USER}@127.0.0.1:{free_port()}/")
    assert "SourceBusy: source: nothing listens on" in refusal(nobody)
    nowhere = SourceSpec(url=f"mysql://{USER}@no-such-host.invalid/")
    assert "SourceBusy: source: there is no host no-such-host.invalid" in refusal(nowhere)


def test_a_server_without_connections_left(server: MariaDB) -> None:
    with contextlib.ExitStack() as exits:
        held = [exits.enter_context(closing(connect(source_of(server, "rich")))) for _ in range(10)]
        assert "SourceBusy: source: the server on" in refusal(source_of(server, "rich"))
        assert len(held) == 10


def test_what_listens_but_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.5)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        source = SourceSpec(url=f"mariadb://{USER}@127.0.0.1:{silent.getsockname()[1]}/")
        assert "SourceBusy: source: " in (said := refusal(source))
        assert "does not answer" in said


def test_what_closes_at_once() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def close() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=close)
        thread.start()
        source = SourceSpec(url=f"mariadb://{USER}@127.0.0.1:{listener.getsockname()[1]}/")
        assert "SourceBusy: source: 127.0.0.1" in (said := refusal(source))
        assert "closes connections at once" in said
        thread.join()


def test_a_session_is_told_what_reading_rests_on(server: MariaDB) -> None:
    with closing(admin(server)) as session, session.cursor() as cursor:
        run(session, "SET GLOBAL tx_isolation = 'READ-COMMITTED';\nSET GLOBAL sql_select_limit = 1;\n")
        try:
            with closing(admin(server)) as other, other.cursor() as told:
                told.execute("SELECT @@tx_isolation, @@time_zone, @@sql_mode, @@sql_select_limit")
                assert told.fetchone() == ("REPEATABLE-READ", "+00:00", "", str(2**64 - 1))
        finally:
            run(session, "SET GLOBAL tx_isolation = DEFAULT;\nSET GLOBAL sql_select_limit = DEFAULT;\n")
        cursor.execute("SELECT 1")


def test_another_thread_ends_what_waits(server: MariaDB) -> None:
    with closing(admin(server)) as session:
        timer = threading.Timer(0.2, session.abort)
        timer.start()
        with pytest.raises(pymysql.OperationalError), session.cursor() as cursor:
            cursor.execute("SELECT SLEEP(300)")
        timer.join()
        assert not session.open


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_catalogue_says_of_tables(server: MariaDB) -> None:
    names = ("movie", "keyed", "keyless", "old_engine", "history", "view_of", "numbers", "odd.`name", "of_movie")
    ids = [f"source_checks.{name}" for name in names]
    found = {table.id.partition(".")[2]: table for table in facts_of(spec_of(server, *ids)).tables}
    assert set(found) == set(names)
    assert key_of(found["movie"].indexes) == (("id",), True)
    assert found["movie"].columns == ("id", "slug", "title")
    assert found["movie"].charsets == {"slug": "utf8mb4", "title": "utf8mb4"}
    assert key_of(found["keyed"].indexes) == (("B c", "a"), False)  # not by a prefix
    assert key_of(found["keyless"].indexes) == ((), False)
    assert [index.nullable for index in found["keyless"].indexes] == [("a", "b")]
    assert found["old_engine"].engine == "MyISAM"
    kinds = {name: found[name].kind for name in ("movie", "history", "view_of", "numbers")}
    assert kinds == {"movie": "BASE TABLE", "history": "SYSTEM VERSIONED", "view_of": "VIEW", "numbers": "SEQUENCE"}
    assert all(table.may_select for table in found.values())
    assert found["of_movie"].cascades == (CascadeFacts("acts", "movie", "ON DELETE CASCADE"),)


def test_a_sound_source_has_no_fatal_problem(server: MariaDB) -> None:
    spec = spec_of(server, "source_checks.movie", "source_checks.keyed", "source_checks.odd.`name", user="rich")
    found = problems(facts_of(spec), spec)
    assert [problem for problem in found if problem.fatal] == []
    assert [problem.what[:20] for problem in found] == ["the log is kept for ", "sync_binlog is 0: wh"]


def test_the_fixes_are_what_to_type(server: MariaDB) -> None:
    """Each finding goes when its fix is typed."""
    ids = ["source_checks.movie", "source_checks.keyless", "source_checks.old_engine", "source_checks.keyed"]
    spec = spec_of(server, *ids, user="poor")
    with closing(admin(server)) as session:
        breaks = {
            "binlog_format": "'MIXED'",
            "binlog_row_image": "'MINIMAL'",
            "log_bin_compress": "ON",
            "expire_logs_days": "0.01",
        }
        for name, value in breaks.items():
            run(session, f"SET GLOBAL {name} = {value}")
        found = [problem for problem in problems(facts_of(spec), spec) if problem.fatal]
        hidden = [f"table {name}: there is no such table, or user `poor`@`%` may not read it" for name in ids[1:]]
        expected = [
            "source: binlog_format is MIXED",
            "source: binlog_row_image is MINIMAL",
            "source: log_bin_compress is on",
            "source: the log is kept for 863s only",
            "source: user `poor`@`%` may not read the log (REPLICATION SLAVE, BINLOG MONITOR)",
            *hidden,
        ]
        whats = [f"{problem.where}: {problem.what}" for problem in found]
        assert [what[: len(start)] for what, start in zip(whats, expected, strict=True)] == expected
        for _ in range(2):  # the second time for the tables that could not be seen before
            for problem in problems(facts_of(spec), spec):
                for statement in problem.fix.removeprefix("type: ").split(" (")[0].split(", then ")[:1]:
                    if problem.fix.startswith("type: "):
                        run(session, statement)
        left = [problem for problem in problems(facts_of(spec), spec) if problem.fatal]
        assert left == []


def test_no_such_table(server: MariaDB) -> None:
    spec = spec_of(server, "source_checks.movi", "source_checks.MOVIE", "no_such.movie")
    whats = {problem.where: f"{problem.what}; {problem.fix}" for problem in problems(facts_of(spec), spec)}
    assert whats["table source_checks.movi"] == (
        "there is no such table; did you mean source_checks.movie or source_checks.Movies?"
    )
    assert "case matters here; write it as source_checks.movie" in whats["table source_checks.MOVIE"]
    assert whats["table no_such.movie"].startswith("there is no such table; did you mean source_checks.movie")


def test_what_the_login_sets(server: MariaDB) -> None:
    spec = spec_of(server, "source_checks.movie", user="rich")  # init_connect spares those with every privilege
    with closing(admin(server)) as session:
        run(session, "SET GLOBAL init_connect = 'SET SESSION binlog_row_image = MINIMAL'")
        try:
            found = problems(facts_of(spec), spec)
        finally:
            run(session, "SET GLOBAL init_connect = ''")
    assert [problem.what for problem in found if problem.fatal] == [
        "binlog_row_image is MINIMAL in a new session, not FULL as the server's (init_connect or a proxy sets it)"
    ]


def test_bare_names(server: MariaDB) -> None:
    with closing(connect(source_of(server, database="source_checks"))) as session:
        assert resolve_bare(session, ["movie", "nothing"]) == {"movie": "source_checks.movie"}


def test_a_log_that_is_off() -> None:
    with MariaDB(skip_log_bin=True) as server:
        spec = spec_of(server, "delta.item")
        assert problems(facts_of(spec), spec)[0].what == "log_bin is off, so there is no log of what changed"
