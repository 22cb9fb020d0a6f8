"""What the benchmarks share: the workload, the servers, and CPU time of processes."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg

from delta_sync.capture import Batch
from delta_sync.spec import PipelineSpec, dump_spec, spec_from
from delta_sync.testing.servers import PostgreSQL, Redis

RESULTS = Path(__file__).parent / "results"

# The workload of the comparisons in README.md: a row of seven columns, some 300 bytes of JSON.
SCHEMA = """
CREATE TABLE {table} (id bigint PRIMARY KEY, title text, year int, rating numeric(3,1), studio_id bigint,
                      updated_at timestamptz, payload jsonb)
"""
FILL = """
INSERT INTO {table}
SELECT i, 'Movie title number ' || i || ' ' || substr(md5(i::text), 1, 12), 1950 + (i % 75),
       round((1 + (i * 7919 % 90) / 10.0)::numeric, 1), i % 5000, clock_timestamp(),
       jsonb_build_object('tagline', md5((i * 3)::text) || md5((i * 5)::text), 'country',
                          (ARRAY['DE', 'FR', 'US', 'JP'])[1 + i % 4], 'budget', i * 13,
                          'genres', jsonb_build_array('drama', 'g' || i % 17, 'g' || i % 23),
                          'note', md5((i * 7)::text))
FROM generate_series({first}, {last}) i
"""
UPDATE = (
    "UPDATE {table} SET rating = round((1 + (id * 31 % 90) / 10.0)::numeric, 1), updated_at = clock_timestamp()"
    " WHERE id BETWEEN {first} AND {last}"
)

PROCESSOR = """from delta_sync import Document, Pipeline, Row

bench = Pipeline("bench")


@bench.table("public.movie")
def movie(row: Row) -> Document | None:
    return {
        "id": row["id"],
        "title": row["title"],
        "year": row["year"],
        "rating": row["rating"],
        "studio_id": row["studio_id"],
        "updated_at": row["updated_at"],
    }
"""


@contextmanager
def servers() -> Generator[tuple[PostgreSQL, Redis]]:
    """A PostgreSQL with the table, and a Redis without persistence."""
    with PostgreSQL() as source, Redis() as cache:
        with psycopg.connect(source.url, autocommit=True) as connection:
            connection.execute(SCHEMA.format(table="movie"))
        yield source, cache


def write_pipeline(scratch_name: str, spec: PipelineSpec) -> Path:
    """Write the pipeline's folder, and return it."""
    folder = Path(scratch_name) / spec.name
    folder.mkdir()
    (folder / "processor.py").write_text(PROCESSOR)
    (folder / "pipeline.yaml").write_text(dump_spec(spec))
    return folder


def source_spec(source: PostgreSQL) -> dict[str, str]:
    """Return the source as a specification has it, with its password in the environment."""
    parts = urlsplit(source.url)
    os.environ["BENCH_SOURCE_PASSWORD"] = parts.password or ""
    url = urlunsplit(parts._replace(netloc=f"{parts.username}@{parts.hostname}:{parts.port}"))
    return {"url": url, "password": "${env:BENCH_SOURCE_PASSWORD}"}


def bench_spec(source: PostgreSQL, cache: Redis, **more: Any) -> PipelineSpec:
    """Return the pipeline that all benchmarks run: one table into one Redis, and what else the specification says."""
    return spec_from(
        {
            "name": "bench",
            "source": source_spec(source),
            "tables": {"public.movie": {"sinks": {"cache": {"key": "movie:{id}"}}}},
            "sinks": {"cache": {"url": cache.url}},
            **more,
        },
        "benchmark",
    )


def fill(source: PostgreSQL, rows: int, *, updates: bool) -> int:
    """Insert rows and, where asked, update each, in transactions of 1,000; return the number of changes."""
    with psycopg.connect(source.url, autocommit=True) as connection:
        for first in range(1, rows + 1, 1000):
            connection.execute(FILL.format(table="movie", first=first, last=min(first + 999, rows)))
        if updates:
            for first in range(1, rows + 1, 1000):
                connection.execute(UPDATE.format(table="movie", first=first, last=min(first + 999, rows)))
        connection.execute("ANALYZE movie")
    return rows * (2 if updates else 1)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process and its living children have used."""
    process = psutil.Process(pid)
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        times = one.cpu_times()
        total += times.user + times.system
    return total


def own_cpu_s() -> float:
    """Return the CPU seconds of this process, without children."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(name: str, figures: dict[str, Any]) -> None:
    """Print a benchmark's figures and keep them in `results/`."""
    RESULTS.mkdir(exist_ok=True)
    document = {"benchmark": name, **figures, "machine": machine()}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


def batches_of(events: list[bytes], size: int) -> list[Batch]:
    """Return events (JSON texts) as the batches in which the capture hands them over."""
    return [
        Batch(1, number, len(part), b"[" + b",".join(part) + b"]")
        for number, part in enumerate((events[i : i + size] for i in range(0, len(events), size)), 1)
    ]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes away."""
    return tempfile.TemporaryDirectory(prefix="delta-bench-")


if __name__ == "__main__":
    print(machine(), file=sys.stderr)
