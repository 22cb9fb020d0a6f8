"""Debezium Server as a process, and where it is: with small programs in the place of Java, which show the mechanics."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

from delta_debezium import quick_start
from delta_debezium.distribution import Distribution, distribution, wanted
from delta_debezium.server import DebeziumServer, reason
from delta_sync.errors import CheckFailed
from delta_sync.maven import FetchFailed, unpacked
from delta_sync.secrets import remember
from delta_sync.testing.processes import wait_until

SOON_S = 30.0


def program(folder: Path, script: str) -> str:
    """Return an executable shell script."""
    file = folder / "java"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def server(folder: Path, script: str) -> DebeziumServer:
    return DebeziumServer(folder / "server", Distribution(folder, program(folder, script)))


def said(one: DebeziumServer, text: str) -> bool:
    return text in one.log_file.read_text()


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_runs_in_its_folder_with_its_configuration_and_hardly_any_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBEZIUM_SOURCE_SLOT_NAME", "another")  # the server would take it for an option
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    one = server(tmp_path, 'cat config/application.properties; env; echo "$@"')
    one.start("a=${DELTA_SECRET_1}\n", {"DELTA_SECRET_1": "x"})
    wait_until(lambda: not one.alive, SOON_S, "its end")
    lines = one.log_file.read_text().splitlines()
    assert {"a=${DELTA_SECRET_1}", "DELTA_SECRET_1=x"} <= set(lines)
    assert not [line for line in lines if line.startswith(("DEBEZIUM", "PGPASSWORD"))]
    assert lines[-1].endswith("io.debezium.server.Main")
    assert one.pid is None


def test_a_new_start_ends_the_one_before_and_keeps_its_log(tmp_path: Path) -> None:
    one = server(tmp_path, "echo started $$; exec sleep 600")
    one.start("", {})
    wait_until(lambda: said(one, "started"), SOON_S, "its start")
    first = one.pid
    one.start("", {})
    wait_until(lambda: said(one, "started"), SOON_S, "its start")
    assert first != one.pid
    assert one.log_file.with_name("server.log.1").read_text() == f"started {first}\n"
    one.kill()
    one.kill()
    assert not one.alive
    assert "SIGKILL" in one.last_words()


def test_a_large_log_begins_anew_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_debezium.server.LOG_BYTES", 10)
    one = server(tmp_path, "echo a long first line; read nothing < gate; echo end; exec sleep 600")
    (tmp_path / "server").mkdir()
    os.mkfifo(tmp_path / "server" / "gate")
    one.start("", {})
    wait_until(lambda: said(one, "first"), SOON_S, "its first line")
    one.bound_log()
    assert one.log_file.read_text() == ""
    (tmp_path / "server" / "gate").write_text("\n")
    wait_until(lambda: said(one, "end"), SOON_S, "its second line")
    one.bound_log()  # not large enough
    assert one.log_file.read_text() == "end\n"
    assert one.log_file.with_name("server.log.1").read_text() == "a long first line\n"
    one.kill()


@pytest.mark.parametrize(("on_term", "signals"), [("exit 3", ""), (":", "SIGKILL")])
def test_it_is_asked_to_end_and_made_to_when_it_does_not(tmp_path: Path, on_term: str, signals: str) -> None:
    one = server(tmp_path, f"trap '{on_term}' TERM; echo ready; while :; do sleep 0.01; done")
    one.start("", {})
    wait_until(lambda: said(one, "ready"), SOON_S, "its start")
    one.stop(budget_s=SOON_S if not signals else 0.1)
    assert not one.alive
    assert signals in one.last_words()
    one.stop(budget_s=0)


def test_it_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    java = program(tmp_path, "exec sleep 600")
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from delta_debezium.distribution import Distribution
        from delta_debezium.server import DebeziumServer
        server = DebeziumServer(Path({str(tmp_path / "server")!r}), Distribution(Path("."), {java!r}))
        server.start("", {{}})
        print(server.pid, flush=True)
        sys.stdin.read()
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    command = Path(f"/proc/{pid}/cmdline")
    try:
        wait_until(lambda: command.read_bytes().startswith(b"sleep"), SOON_S, "its start")
        parent.kill()
        parent.communicate()
        wait_until(lambda: not command.exists() or not command.read_bytes(), SOON_S, "its end")  # empty: a zombie
    finally:
        if command.exists() and command.read_bytes():
            os.kill(pid, signal.SIGKILL)


# ── last words ───────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = """\
2026-11-24 10:57:16,100 INFO  [io.quarkus] (main) debezium-server-dist 3.6.3.Final started in 2.303s. Listening on:
2026-11-24 10:57:16,277 ERROR [io.debezium.embedded.async.AsyncEmbeddedEngine] (pool-7-thread-1) Engine has failed with\
 : java.util.concurrent.ExecutionException: java.lang.RuntimeException: io.netty.channel.AbstractChannel$Annotated\
ConnectException: Connection refused: /127.0.0.1:28014
\tat java.base/java.util.concurrent.FutureTask.report(Unknown Source)
\tat io.debezium.server.DebeziumServer.lambda$start$1(DebeziumServer.java:157)
Caused by: io.netty.channel.AbstractChannel$AnnotatedConnectException: Connection refused: /127.0.0.1:28014
Caused by: java.net.ConnectException: Connection refused
\tat java.base/sun.nio.ch.Net.pollConnect(Native Method)

2026-11-24 10:57:16,278 ERROR [io.debezium.server.ConnectorLifecycle] (pool-7-thread-1) Connector completed: success = \
'false', message = 'java.util.concurrent.ExecutionException', error = '...'
2026-11-24 10:57:16,300 INFO  [io.quarkus] (main) stopped in 0.022s
"""


def test_the_cause_behind_the_engines_failure_is_the_reason() -> None:
    assert reason(REFUSED) == "Connection refused: /127.0.0.1:28014"
    other = REFUSED.replace("java.net.ConnectException: Connection refused", "org.postgresql.util.PSQLException: FATAL")
    assert reason(other) == "FATAL"


def test_what_the_jvm_says_is_the_reason_when_the_server_did_not_come_to_it() -> None:
    missing = "Error: Could not find or load main class x\nCaused by: java.lang.ClassNotFoundException: x\n"
    assert (
        reason(missing) == "Error: Could not find or load main class x Caused by: java.lang.ClassNotFoundException: x"
    )
    died = "Terminating due to java.lang.OutOfMemoryError: Java heap space"
    assert reason(f"{REFUSED}{died}\n") == died


def test_a_log_without_errors_has_no_reason() -> None:
    assert reason("") == ""
    assert reason(REFUSED.splitlines()[0]) == ""


def test_last_words_hold_no_secret(tmp_path: Path) -> None:
    remember("s3cret-word")
    one = server(tmp_path, "echo the password is s3cret-word")
    one.start("", {})
    wait_until(lambda: not one.alive, SOON_S, "its end")
    assert one.last_words() == "Debezium Server ended: the password is ***"


# ── quick starts ─────────────────────────────────────────────────────────────────────────────────────────────────


def with_java(home: Path, version: str, script: str) -> Distribution:
    """An installation in `home`, and a Java of this version that is a script."""
    (home / "java" / "bin").mkdir(parents=True)
    (home / "java" / "release").write_text(f'JAVA_VERSION="{version}"\n')
    return Distribution(home, program(home / "java" / "bin", script))


RECORDS = """echo "$1" >> asked
grep -q PostgresConnector config/application.properties && : > "${1#-XX:AOTCacheOutput=}" """


def test_a_start_is_recorded_once_and_the_next_ones_use_it(tmp_path: Path) -> None:
    found = with_java(tmp_path, "25.0.2", RECORDS)
    reports: list[str] = []
    for _ in range(2):
        quick_start.record(found, reports.append)
    assert len(reports) == 1
    assert found.start_cache is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["java", found.start_cache.name]
    one = DebeziumServer(tmp_path / "server", found)
    one.start("", {})
    wait_until(lambda: not one.alive, SOON_S, "its end")
    assert (tmp_path / "server" / "asked").read_text() == f"-XX:AOTCache={found.start_cache}\n"


@pytest.mark.parametrize(("version", "script"), [("25.0.2", "exit 1"), ("21.0.9", RECORDS)])
def test_a_start_that_cannot_be_recorded_is_as_it_was(tmp_path: Path, version: str, script: str) -> None:
    found = with_java(tmp_path, version, script)
    quick_start.record(found, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["java"]
    assert found.start_cache is None or not found.start_cache.exists()


# ── where it is ──────────────────────────────────────────────────────────────────────────────────────────────────


def problem(monkeypatch: pytest.MonkeyPatch, **variables: object) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(CheckFailed) as caught:
        distribution()
    return str(caught.value)


def test_an_installation_is_used_where_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "-runner.jar" in problem(monkeypatch, DEBEZIUM_SERVER_HOME=tmp_path)
    (tmp_path / "debezium-server-dist-3.6.3.Final-runner.jar").touch()
    assert "org.apache.avro:avro" in problem(monkeypatch)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "avro-1.12.1.jar").touch()
    found = distribution()
    assert found.home == tmp_path
    assert found.class_path == f"{tmp_path}/*:{tmp_path}/lib/*"
    assert Path(found.java).exists()


def test_the_java_of_java_home_must_be_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "JAVA_HOME" in problem(monkeypatch, JAVA_HOME=tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").touch()
    (tmp_path / "release").write_text('IMPLEMENTOR="x"\nJAVA_VERSION="17.0.9"\n')
    assert "is Java 17" in problem(monkeypatch)


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("debezium-server-dist-3.6.3.Final-runner.jar", True),
        ("lib/debezium-connector-postgres-3.6.3.Final.jar", True),
        ("lib/pulsar-client-4.2.1.jar", False),
        ("lib_opt/groovy-4.0.17.jar", False),
        ("connectors/debezium-connector-cassandra-5/kafka-connect-avro-converter-7.0.16.jar", True),
        ("connectors/debezium-connector-cassandra-5/avro-1.11.3.jar", False),
        ("connectors/debezium-connector-cassandra-4/kafka-connect-avro-converter-7.0.16.jar", False),
        ("run.sh", False),
    ],
)
def test_only_what_is_needed_is_kept(path: str, kept: bool) -> None:
    assert wanted(path) == kept


MAVEN = """\
for argument; do
    case $argument in
        -Dartifact=*) artifact=${argument#-Dartifact=} ;;
        -DoutputDirectory=*) output=${argument#-DoutputDirectory=} ;;
    esac
done
mkdir -p "$output"
case $artifact in
    *:tar.gz) cp "$ARCHIVE" "$output/x.tar.gz" ;;
    *:missing) echo "[ERROR] Could not find artifact"; exit 1 ;;
    *) echo jar > "$output/y.jar" ;;
esac
"""


@pytest.fixture
def maven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in Maven's place: fetching from a registry takes minutes, and is what `make jars` does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    mvn = folder / "mvn"
    mvn.write_text(f"#!/bin/sh\n{MAVEN}")
    mvn.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DELTA_JARS", str(tmp_path / "jars"))
    monkeypatch.setenv("ARCHIVE", str(tmp_path / "archive.tar.gz"))
    return tmp_path / "archive.tar.gz"


def archive(place: Path, *names: str) -> None:
    with tarfile.open(place, "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())


@pytest.mark.parametrize("around", ["", "./", "app-1/", "./app-1/"])
def test_an_archive_is_unpacked_without_the_folder_around_it(maven: Path, around: str) -> None:
    archive(maven, f"{around}run.jar", f"{around}lib/a.jar", f"{around}lib/b.jar")
    found = unpacked("app", ("g:a:1:tar.gz", "g:b:1"), lambda path: path != "lib/b.jar")
    files = sorted(str(file.relative_to(found)) for file in found.rglob("*") if file.is_file())
    assert files == ["lib/a.jar", "run.jar", "y.jar"]
    maven.unlink()
    assert unpacked("app", ("g:a:1:tar.gz",)) == found  # without another look
    assert [file.name for file in found.parent.iterdir() if not file.name.endswith(".lock")] == ["app"]


def test_an_archive_cannot_write_outside_its_folder(maven: Path, tmp_path: Path) -> None:
    archive(maven, "lib/a.jar", "b.jar", "../evil")
    with pytest.raises(FetchFailed):
        unpacked("app", ("g:a:1:tar.gz",))
    assert not (tmp_path / "jars" / "app").exists()


def test_what_cannot_be_fetched_leaves_nothing_behind(
    maven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FetchFailed, match="Could not find artifact"):
        unpacked("app", ("g:a:1:missing",))
    assert [file.name for file in (tmp_path / "jars").iterdir()] == ["app.lock"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchFailed, match="install `mvn`"):
        unpacked("app", ("g:a:1:missing",))
