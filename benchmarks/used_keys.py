"""What it costs that the keys which rows used are kept (`keys="kept"`): notes of a batch beside those of a large table.

    python benchmarks/used_keys.py [--notes 1000000] [--state sqlite:///state.db]

The state store gets so many notes first. Then batches of 5,000 rows of that table, at random places, are noted with
another key each, as the worker does it before it asks a look-up; and rows are found by 3 keys that 10 rows used each.
The CPU time is this process's, which for SQLite is all of it, and so are the bytes written to the disk.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import psutil
from common import own_cpu_s, report, scratch

from delta_sync.state import StateStore
from delta_sync.tables import Column, Kind, Table
from delta_sync.used_keys import UsedKeyStore, Uses

TABLE = Table("public", "movie", (Column("id", "bigint", Kind.INTEGER),), ("id",))
BATCH = 5000
BATCHES = 10
AT_ONCE = 50_000  # of those that are there first


def noted(ids: list[int], version: int, keys: int) -> Uses:
    """Return the notes of rows whose keys are spread over so many."""
    return Uses(TABLE.id, "ratings", 1, [((id_,), version, f"key {(id_ + version) % keys}") for id_ in ids], [])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notes", type=int, default=1_000_000)
    parser.add_argument("--state", default="sqlite:///state.db")
    arguments = parser.parse_args()
    with scratch() as folder, StateStore.open(arguments.state, Path(folder)) as state:
        used, keys = UsedKeyStore(state, "bench"), arguments.notes // 10
        used.begin({(TABLE.id, "ratings"): "rows"})
        for first in range(0, arguments.notes, AT_ONCE):
            used.note([noted(list(range(first, min(first + AT_ONCE, arguments.notes))), 1, keys)])
        rng, process = random.Random(7), psutil.Process()
        written, cpu_s, began = process.io_counters().write_bytes, own_cpu_s(), time.perf_counter()
        longest_s = 0.0
        for version in range(2, BATCHES + 2):
            batch_began = time.perf_counter()
            used.note([noted(rng.sample(range(arguments.notes), BATCH), version, keys)])
            longest_s = max(longest_s, time.perf_counter() - batch_began)
        rows = BATCHES * BATCH
        results = {
            "notes": arguments.notes,
            "notes_per_s": round(rows / (time.perf_counter() - began)),
            "longest_batch_s": round(longest_s, 3),
            "cpu_us_per_note": round((own_cpu_s() - cpu_s) / rows * 1e6, 1),
            "bytes_per_note": round((process.io_counters().write_bytes - written) / rows),
        }
        began = time.perf_counter()
        found = used.rows(TABLE, "ratings", ["key 1", "key 2", "key 3"], 1000)
        assert found is not None
        results |= {"rows_found": len(found), "found_in_ms": round((time.perf_counter() - began) * 1000, 1)}
        report("used_keys", results)


if __name__ == "__main__":
    main()
