"""End to end: a backlog of changes in PostgreSQL's log, through `deltactl run` into Redis, beside the engine alone.

    python benchmarks/end_to_end.py [--events 400000] [--rounds 3]

Both read the same log from the same kind of slot, in turn: the Debezium Engine in its child process with a consumer
that confirms each batch and does nothing else, and the whole pipeline. Timed from the first event to the last.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import requests
from common import bench_spec, cpu_s, fill, report, scratch, servers, write_pipeline

from delta_debezium.engine import EmbeddedCapture
from delta_debezium.render import engine_properties
from delta_sync.secrets import resolve
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import PipelineSpec
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.tables import Table
from delta_sync.testing.processes import free_port

DEADLINE_S = 600.0


def engine_alone(spec: PipelineSpec, table: Table, events: int, folder: Path) -> dict[str, float]:
    """Return the rate at which the engine delivers to a consumer that does nothing."""
    rendered = engine_properties(spec, {table.id: table})
    properties = {name: resolve(value) for name, value in rendered.items()}
    capture = EmbeddedCapture(lambda: properties, folder / "alone.log")
    capture.start()
    total, first = 0, 0.0
    cpu_before = 0.0
    while total < events:
        batch = capture.poll(60.0)
        assert batch is not None, "the engine delivers nothing"
        assert capture.pid is not None
        if not first:
            first, cpu_before, skipped = time.perf_counter(), cpu_s(capture.pid), batch.events
        total += batch.events
        capture.confirm(batch)
    wall = time.perf_counter() - first
    assert capture.pid is not None
    cpu = cpu_s(capture.pid) - cpu_before
    capture.stop()
    return {"events_per_s": (total - skipped) / wall, "cpu_us_per_event": 1e6 * cpu / (total - skipped)}


def whole_pipeline(folder: Path, events: int) -> dict[str, float]:
    """Return the rate of `deltactl run`, the CPU time of its two processes, and what memory they take."""
    port = free_port()
    run = subprocess.Popen(
        [sys.executable, "-m", "deltactl.main", "--dir", str(folder.parent), "run", folder.name, "--port", str(port)],
        stderr=(folder / "run.log").open("wb"),
    )
    try:
        first, cpu_before, skipped = 0.0, 0.0, 0
        deadline = time.perf_counter() + DEADLINE_S
        while time.perf_counter() < deadline:
            assert run.poll() is None, (folder / "run.log").read_text()[-2000:]
            try:
                done = requests.get(f"http://127.0.0.1:{port}/status", timeout=5).json()["totals"]["changes"]
            except requests.ConnectionError:
                done = 0
            if done > 100 and not first:
                first, cpu_before, skipped = time.perf_counter(), cpu_s(run.pid), done
            if done >= events:
                break
            time.sleep(0.02)
        wall, cpu = time.perf_counter() - first, cpu_s(run.pid) - cpu_before
        return {"events_per_s": (events - skipped) / wall, "cpu_us_per_event": 1e6 * cpu / (events - skipped)}
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with scratch() as scratch_name, servers() as (source, cache):
        spec = bench_spec(source, cache)
        folder = write_pipeline(scratch_name, spec)
        reader = PostgresReader(spec.source, "bench")
        table = reader.tables(["public.movie"])["public.movie"]
        reader.publish(spec.publication, [table])
        alone: list[dict[str, float]] = []
        piped: list[dict[str, float]] = []
        for number in range(arguments.rounds):
            for measure in (alone, piped):
                with psycopg.connect(source.url, autocommit=True) as connection:
                    connection.execute("TRUNCATE movie")
                lsn = reader.create_slot(spec.slot)
                changes = fill(source, arguments.events // 2, updates=True)
                if measure is alone:
                    alone.append(engine_alone(spec, table, changes, folder))
                else:
                    with StateStore.open(spec.state, folder) as state:
                        identity = reader.identity()
                        state.save_pipeline(PipelineState("bench", number + 1, *identity, lsn))
                        fingerprint = reader.fingerprints([table.id])[table.id]
                        state.save_load(
                            "bench",
                            TableLoad(
                                table.id, state="done", covered_from=lsn, fingerprint=fingerprint, epoch=number + 1
                            ),
                        )
                    piped.append(whole_pipeline(folder, changes))
                reader.drop_slot(spec.slot)
        reader.close()
        report("end_to_end", summary(alone, piped) | {"rounds": arguments.rounds, "events": arguments.events})


def summary(alone: list[dict[str, float]], piped: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians, and the median of the ratios of neighbouring runs."""
    ratios = [two["events_per_s"] / one["events_per_s"] for one, two in zip(alone, piped, strict=True)]
    return {
        "engine_alone": {name: round(statistics.median(run[name] for run in alone), 1) for name in alone[0]},
        "pipeline": {name: round(statistics.median(run[name] for run in piped), 1) for name in piped[0]},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
