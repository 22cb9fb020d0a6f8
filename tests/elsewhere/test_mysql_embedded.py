"""A pipeline from MySQL without Kafka: load, changes, kills and outages, and what is lost. Every row is compared."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from acceptance.gate import Gate
from acceptance.harness import Run
from acceptance.mariadb_harness import EmbeddedPipeline, binlog_source, execute
from acceptance.test_mariadb import SOME
from delta_sync.sources.mysql.statements import fetch
from delta_sync.state_tables import CONNECTOR_HISTORY, CONNECTORS
from delta_sync.testing.mysql import MySQL
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import Redis
from elsewhere.test_mysql import TABLES, VALUES, MySQLSource, WritingMySQL, check_repair, check_types, fill

WAIT_S = 600.0  # far above what it takes: no test may depend on speed


@pytest.fixture
def gate(redis_server: Redis) -> Iterator[Gate]:
    with Gate(redis_server.port) as gate:
        yield gate


@pytest.fixture
def pipeline(mysql: MySQL, gate: Gate, tmp_path: Path) -> Iterator[EmbeddedPipeline]:
    with binlog_source(mysql, tmp_path, TABLES, MySQLSource) as source:
        pipeline = EmbeddedPipeline(source, tmp_path, f"redis://127.0.0.1:{gate.port}/0", list(TABLES))
        with closing(pipeline):
            yield pipeline


@pytest.fixture
def start(pipeline: EmbeddedPipeline) -> Iterator[Callable[[], Run]]:
    with ExitStack() as exits:

        def run() -> Run:
            started = pipeline.run()
            exits.callback(started.kill)
            return started

        yield run


def kill_capture(run: Run) -> None:
    """SIGKILL the child with the engine, and wait until the next one is there."""
    capture = run.capture_pid()
    assert capture is not None, run.tail()
    died = len(run.events("capture_died"))
    os.kill(capture, signal.SIGKILL)
    wait_until(lambda: len(run.events("capture_died")) > died, WAIT_S, "the end of the capture")
    wait_until(lambda: run.capture_pid() not in (None, capture), WAIT_S, "the next capture")


def write_some(writer: WritingMySQL) -> None:
    before = writer.transactions
    wait_until(lambda: writer.transactions > before + SOME, WAIT_S, "some transactions")


def test_kills_and_an_outage_lose_nothing(pipeline: EmbeddedPipeline, start: Callable[[], Run], gate: Gate) -> None:
    with closing(pipeline.source.session()) as session:
        fill(session)
        with WritingMySQL(pipeline) as writer:
            run = start()
            wait_until(lambda: bool(run.events("load_started")) or not run.running, WAIT_S, "the load")
            assert run.running, run.tail()
            run.kill()  # in the midst of it
            run = start()
            wait_until(lambda: run.capture_pid() is not None or not run.running, WAIT_S, "the capture")
            kill_capture(run)
            wait_until(pipeline.loaded, WAIT_S, "the load's end")
            write_some(writer)
            kill_capture(run)
            write_some(writer)
            run.kill()
            run = start()
        values = ", ".join(text for _, text, *_ in VALUES)
        columns = ", ".join(f"c{number}" for number in range(len(VALUES)))
        execute(session, f"INSERT INTO types (id, {columns}) VALUES (2, {values})")
        pipeline.in_step(run)
        check_types(pipeline)

        # ── columns are added and a table is emptied while the writer goes on, and the engine starts in between ──
        with WritingMySQL(pipeline) as writer:
            execute(session, "ALTER TABLE account ADD COLUMN extra varchar(20) DEFAULT 'none'")
            kill_capture(run)
            execute(session, "TRUNCATE TABLE item", "INSERT INTO item VALUES ('after', 1, '[2]', POINT(1, 1))")
            write_some(writer)
            execute(session, "ALTER TABLE account DROP COLUMN extra, ADD COLUMN more int FIRST, ALGORITHM=COPY")
            run.kill()
            write_some(writer)
            run = start()
        pipeline.in_step(run)
        with WritingMySQL(pipeline):
            check_repair(pipeline)
        pipeline.in_step(run)

        # ── the sink is away, and the worker is killed with what it could not write ──
        gate.close()
        execute(session, "INSERT INTO item VALUES ('first', 1, '[]', POINT(1, 1))")
        second = pipeline.source.insert_lsn()
        with WritingMySQL(pipeline) as writer:
            write_some(writer)
            wait_until(lambda: bool(run.events("sink_busy")), WAIT_S, "the sink's absence")
            execute(session, "DELETE FROM account WHERE id % 5 = 0")
            write_some(writer)
        assert pipeline.confirmed() < second, "nothing is saved that the sink has not acknowledged"
        run.kill()
        gate.open()
        run = start()
        pipeline.in_step(run)

        # ── the connector's own files are nobody's truth ──
        run.kill()
        execute(session, "UPDATE account SET name = 'files' WHERE id % 2 = 1")
        (pipeline.home / "offsets.dat").write_bytes(b"torn")
        (pipeline.home / "schema_history.dat").write_text('{"source": torn')
        run = start()
        pipeline.in_step(run)
        (pipeline.home / "schema_history.dat").unlink()
        execute(session, "ALTER TABLE account DROP COLUMN more")
        pipeline.in_step(run)

        assert pipeline.epoch() == 1
        assert pipeline.dead_letters() == []
        check_commands(pipeline, run)


def check_commands(pipeline: EmbeddedPipeline, run: Run) -> None:
    """Those that look at it, while it runs and later, and that which deletes all that it made."""
    wait_until(lambda: status_of(pipeline)["lag_bytes"] == 0, WAIT_S, "a lag of nothing")
    assert status_of(pipeline)["state"] == "streaming"
    verified = pipeline.deltactl("verify", pipeline.name, "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    dumped = pipeline.deltactl("dump", "start", pipeline.name, "--table", pipeline.tables[0], "--wait", "--json")
    assert dumped.returncode == 0, dumped.stdout + dumped.stderr
    assert run.stop() == 0
    checked = pipeline.deltactl("pipeline", "check", pipeline.name, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert all(not problem["fatal"] for problem in json.loads(checked.stdout)["problems"])
    deleted = pipeline.deltactl("pipeline", "delete", pipeline.name, "--documents", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    left = sorted(path.name for path in pipeline.home.iterdir() if path.name != "__pycache__")
    assert left == [".gitignore", "capture.log", "connector.json", "pipeline.yaml", "processor.py", "run.lock"]


def status_of(pipeline: EmbeddedPipeline) -> dict[str, object]:
    said = pipeline.deltactl("status", pipeline.name, "--json")
    assert said.returncode == 0, said.stderr
    found: dict[str, object] = json.loads(said.stdout)
    return found


def test_what_is_lost_is_noticed(pipeline: EmbeddedPipeline, start: Callable[[], Run]) -> None:
    """Then a new epoch begins by itself, every table is loaded, and documents of rows that went meanwhile go, too."""
    state = sa.create_engine(f"sqlite:///{pipeline.home / 'state.db'}")
    with closing(pipeline.source.session()) as session:
        fill(session)
        run = start()
        wait_until(lambda: pipeline.loaded() or not run.running, WAIT_S, "the load's end")
        pipeline.in_step(run)

        def begins_anew(why: str) -> None:
            epoch = pipeline.epoch() + 1
            wait_until(
                lambda: (pipeline.loaded() and pipeline.epoch() == epoch) or not run.running, WAIT_S, "a new epoch"
            )
            assert run.running, run.tail()
            assert [why in event["reason"] for event in run.events("epoch_rises")] == [True], run.tail()
            pipeline.in_step(run)

        # ── the log begins anew while it runs, and soon has as many transactions as it had ──
        execute(session, "RESET BINARY LOGS AND GTIDS", "DELETE FROM account WHERE id % 7 = 0")
        with WritingMySQL(pipeline):
            begins_anew("RESET MASTER")

        # ── the position is gone, and the history is, each without the other ──
        for table, why in ((CONNECTORS, "position in the state store is gone"), (CONNECTOR_HISTORY, "history")):
            run.kill()
            with state.begin() as connection:
                assert connection.execute(sa.delete(table)).rowcount > 0
            execute(session, f"DELETE FROM account WHERE id % 7 = {len(why) % 5 + 1}")
            run = start()
            begins_anew(why)

        # ── the server has removed what was not delivered ──
        run.kill()
        execute(session, "DELETE FROM item WHERE number % 3 = 0", "FLUSH BINARY LOGS")
        (*_, newest) = [row[0] for row in fetch(session, "SHOW BINARY LOGS")]
        execute(session, f"PURGE BINARY LOGS TO '{newest}'")
        checked = pipeline.deltactl("pipeline", "check", pipeline.name, "--json")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert "has removed the file of its log" in checked.stdout, checked.stdout
        run = start()
        begins_anew("has removed the file")
        assert pipeline.dead_letters() == []
        assert run.stop() == 0
    state.dispose()
