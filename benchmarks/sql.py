"""The SQL sink alone: documents of six fields into PostgreSQL, beside what it cannot do without.

    python benchmarks/sql.py [--rows 100000] [--batch 2000]

In turn, into the same server, as one client: `COPY` into a table with the same columns, which compares nothing; the
sink, which compares versions, into an empty table; and the sink once more with newer versions of the same rows.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime as dt
import decimal
import pstats
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
from common import own_cpu_s, report

from delta_sync.changes import APPLIED, Write
from delta_sync.sinks.base import Target
from delta_sync.sinks.sql import SqlOptions, SqlSink, SqlTargetOptions
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.servers import PostgreSQL

MOVIE = Table("public", "movie", (Column("id", "bigint", Kind.INTEGER, nullable=False),), ("id",))
COPIED = """
DROP TABLE IF EXISTS copied;
CREATE TABLE copied (_delta_id text COLLATE "C" PRIMARY KEY, _version bigint NOT NULL, _delta_deleted_ms bigint,
                     id bigint, title text, year bigint, rating numeric, studio_id bigint, updated_at timestamptz)
"""


def document(number: int) -> dict[str, Any]:
    """Return what the benchmarks' processor makes of a row."""
    return {
        "id": number,
        "title": f"Movie title number {number} {number * 7919:012x}",
        "year": 1950 + number % 75,
        "rating": decimal.Decimal(10 + number * 31 % 90) / 10,
        "studio_id": number % 5000,
        "updated_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=number),
    }


def copy(url: str, documents: list[dict[str, Any]]) -> None:
    """Write the documents with `COPY`."""
    with psycopg.connect(url) as connection:
        connection.execute(COPIED)
        with connection.cursor().copy("COPY copied FROM STDIN") as to:
            for one in documents:
                to.write_row((str(one["id"]), 1, None, *one.values()))


def write(sink: SqlSink, target: Target, writes: list[Write], batch: int) -> None:
    """Have the sink apply the writes, batch by batch."""
    for start in range(0, len(writes), batch):
        outcomes = sink.apply(target, writes[start : start + batch])
        assert set(outcomes) == {APPLIED}, "every write is newer"


def timed(call: Callable[[], None], rows: int) -> dict[str, float]:
    """Return what a call took, by the clock and of this process's CPU time."""
    began, cpu = time.monotonic(), own_cpu_s()
    call()
    took = time.monotonic() - began
    return {"rows_per_s": round(rows / took), "cpu_us_per_row": round((own_cpu_s() - cpu) / rows * 1e6, 1)}


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    documents = [document(number) for number in range(options.rows)]
    profile = cProfile.Profile()
    with PostgreSQL() as server:
        copied = timed(lambda: copy(server.url, documents), options.rows)
        sink = SqlSink("warehouse", server.url, SqlOptions(), 3600)
        target = sink.target(MOVIE, SqlTargetOptions())
        sink.prepare(target)
        figures: dict[str, dict[str, float]] = {}
        for name, version in (("inserted", 1), ("updated", 2)):
            writes = [Write((one["id"],), version, one) for one in documents]
            if options.profile:
                profile.enable()
            figures[name] = timed(partial(write, sink, target, writes, options.batch), options.rows)
            profile.disable()
        sink.close()
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    share = {name: round(of["rows_per_s"] / copied["rows_per_s"], 2) for name, of in figures.items()}
    report("sql", {"rows": options.rows, "batch": options.batch, "copy": copied, **figures, "share_of_copy": share})


if __name__ == "__main__":
    main()
