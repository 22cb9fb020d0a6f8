"""The load of a long, narrow table into Redis, embedded: whether it goes on as it began.

    python benchmarks/long_table.py [--rows 20000000] [--part 1000000]

How long it takes until the first chunk is in Redis; the rate of the first and of the last part of the rows; and the
resident memory of `deltactl run` when the first part was there and at the end, without its connector's. The load is
looked at in the state store, chunk by chunk. CPU time is that of `deltactl run` alone, its connector's left out: on a
machine that others use, the CPU time for a row tells better than the clock whether the last part took longer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import NamedTuple

import psutil
import psycopg
from common import bench_spec, report, scratch, servers, write_pipeline

from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore

LOOK_S = 0.1
TABLE = "public.narrow"
FILL = b"INSERT INTO narrow SELECT i, 'movie ' || i, 1900 + i %% 120 FROM generate_series(%d, %d) AS i"
FILL_ROWS = 1_000_000
PROCESSOR = """from delta_sync import Document, Pipeline, Row

bench = Pipeline("bench")


@bench.table("public.narrow")
def narrow(row: Row) -> Document | None:
    return {"id": row["id"], "title": row["title"], "year": row["year"]}
"""


class Look(NamedTuple):
    """How far the load was at a moment, what it had cost, and how much memory it had."""

    at_s: float
    rows: int
    cpu_s: float
    rss_mb: int


def between(looks: list[Look], first: int, last: int) -> dict[str, float]:
    """Return the rate and the CPU time between two numbers of rows: from the first looks that had so many."""
    one, two = (next(look for look in looks if look.rows >= rows) for rows in (first, last))
    rows = two.rows - one.rows
    return {
        "rows_per_s": round(rows / (two.at_s - one.at_s)),
        "worker_cpu_us_per_row": round(1e6 * (two.cpu_s - one.cpu_s) / rows, 2),
    }


def watch(run: subprocess.Popen[bytes], dumps: DumpStore, rows: int) -> list[Look]:
    """Look at the load until all rows are there."""
    process = psutil.Process(run.pid)
    looks: list[Look] = []
    while not looks or looks[-1].rows < rows:
        assert run.poll() is None, "it has ended"
        of_load = [dump for dump in dumps.all() if dump.kind == "load"]
        if of_load:
            times = process.cpu_times()
            rss_mb = process.memory_info().rss >> 20
            looks.append(Look(time.perf_counter(), of_load[0].rows, times.user + times.system, rss_mb))
        time.sleep(LOOK_S)
    return looks


def main() -> None:
    """Run it and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--part", type=int, default=1_000_000)
    arguments = parser.parse_args()
    rows, part = arguments.rows, arguments.part
    assert rows >= 2 * part, "the first part and the last are to be two"
    with scratch() as scratch_name, servers() as (source, cache):
        with psycopg.connect(source.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE narrow (id bigint PRIMARY KEY, title text, year int)")
            for start in range(1, rows + 1, FILL_ROWS):
                connection.execute(FILL % (start, min(start + FILL_ROWS - 1, rows)))
            connection.execute("VACUUM ANALYZE narrow")
            connection.execute("CHECKPOINT")
        spec = bench_spec(source, cache, tables={TABLE: {"sinks": {"cache": {"key": "narrow:{id}"}}}})
        folder = write_pipeline(scratch_name, spec)
        (folder / "processor.py").write_text(PROCESSOR)
        command = [sys.executable, "-m", "deltactl.main", "--dir", str(folder.parent), "run", folder.name]
        with StateStore.open(spec.state, folder) as state, (folder / "run.log").open("wb") as output:
            run = subprocess.Popen(command, stderr=output)
            try:
                looks = watch(run, DumpStore(state, spec.name), rows)
            finally:
                run.terminate()
                run.wait()
    began, first_chunk = looks[0], next(look for look in looks if look.rows)
    filled = next(look for look in looks if look.rows >= part)
    first, last = between(looks, first_chunk.rows, part), between(looks, rows - part, rows)
    report(
        "long_table",
        {
            "rows": rows,
            "seconds": round(looks[-1].at_s - began.at_s, 1),
            "first_chunk_written_s": round(first_chunk.at_s - began.at_s, 2),
            "first_part": first,
            "last_part": last,
            "last_to_first": {name: round(last[name] / first[name], 3) for name in first},
            "worker_rss_mb": {
                "first_part": filled.rss_mb,
                "most": max(look.rss_mb for look in looks),
                "end": looks[-1].rss_mb,
            },
        },
    )


if __name__ == "__main__":
    main()
