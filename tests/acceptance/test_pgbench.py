"""pgbench's own workload on its own tables, kept in step while it runs."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Sequence

from acceptance.harness import PATIENCE_S, Stage, metrics
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.testing.servers import PostgreSQL

CLIENTS, DURATION_S = 4, 10
TIMEOUT_S = 300.0
TABLES = ("pgbench_branches", "pgbench_tellers", "pgbench_accounts")


def pgbench(server: PostgreSQL, database: str, *options: str) -> subprocess.Popen[str]:
    # It loads its library by its place, and PostgreSQL's own environment variables are none of its business.
    command: Sequence[str] = [str(server.bin_dir / "pgbench"), *options, "--dbname", server.url_of(database)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def test_pgbench(stage: Callable[..., Stage], postgresql: PostgreSQL) -> None:
    with contextlib.ExitStack() as exits:

        def initialised(database: str) -> None:
            finish(pgbench(postgresql, database, "--initialize", "--scale=1", "--quiet"))

        it = stage("", TABLES, schema="public", before_create=initialised, processor=None)
        port = free_port()
        run = it.run("--port", str(port))
        wait_until(lambda: bool(run.events("load_started")), PATIENCE_S, "the first load")
        work = pgbench(
            postgresql, it.pipeline.name, f"--client={CLIENTS}", f"--time={DURATION_S}", "--jobs=2", "--no-vacuum"
        )
        exits.callback(work.kill)
        output = finish(work)
        it.in_step(run)
        with it.source.connect() as connection:
            row = connection.execute("SELECT count(*), sum(delta) FROM pgbench_history").fetchone()
            balances = [
                connection.execute(f"SELECT sum({table[8]}balance) FROM {table}".encode()).fetchone()
                for table in TABLES
            ]
        assert row is not None
        assert row[0] > 100, output
        assert {total for (total,) in filter(None, balances)} == {row[1]}
        assert it.pipeline.dead_letters() == []
        measured = metrics(port)
        for kind in ("poll", "decode", "process", "apply", "commit"):
            assert measured[f"delta_stage_seconds_count {kind}"] > 0, measured
        assert measured["delta_latency_seconds_count"] == measured["delta_changes_total"] > 0
        assert 0 < measured["delta_latency_seconds_sum"] / measured["delta_changes_total"] < 3600  # seconds, of now
        assert run.stop() == 0


def test_its_history_has_no_key_and_is_refused(stage: Callable[..., Stage], postgresql: PostgreSQL) -> None:
    """Before anything is written, with the sentence that says what to do."""

    def initialised(database: str) -> None:
        finish(pgbench(postgresql, database, "--initialize", "--init-steps=tp", "--quiet"))

    it = stage("", TABLES[:1], schema="public", before_create=initialised)
    url = it.source.url.replace("postgres:postgres@", f"postgres:${{file:{it.pipeline.folder / 'password'}}}@")
    sink = it.stores.sinks["cache"].url
    refused = it.pipeline.deltactl(
        "pipeline", "create", "history", "--source", url, "--table", "public.pgbench_history", "--sink", f"cache={sink}"
    )
    assert refused.returncode == 1
    found, fix = (line.strip() for line in refused.stderr.partition("✗")[2].splitlines())
    assert found == "table public.pgbench_history: it has no primary key, so nothing says which row a change means."
    assert fix.startswith("type: ALTER TABLE public.pgbench_history ADD PRIMARY KEY")
    assert it.source.confirmed_lsn("delta_history") == 0
    assert not (it.pipeline.folder / "pipelines" / "history").exists()
