"""A process of its own that writes to a Parquet sink: `parquet_process.py ACTION URL …`. It prints what it has done.

write NAME KIND     20 batches for 10 keys, with a field of its own kind in each
hang METHOD         a write and a merge, which stops for ever where it comes to _write or, of the file system, remove
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

from delta_sync.changes import Write
from delta_sync.sinks.parquet import ParquetOptions, ParquetSink, ParquetTargetOptions
from delta_sync.testing.contract import MOVIE

BATCHES, KEYS = 20, 10


def write(sink: ParquetSink, name: str, kind: str) -> None:
    """Write odd or even versions, as the name is; print which batches were rejected."""
    target = sink.target(MOVIE, ParquetTargetOptions())
    for n in range(BATCHES):
        version = 2 * n + (1 if name == "odd" else 2)
        value: Any = n if kind == "integer" else f"text {n}"
        batch = [Write((key,), version, {"by": name, f"field_{n}": value}) for key in range(KEYS)]
        outcomes = {outcome.kind for outcome in sink.apply(target, batch)}
        print(json.dumps({"n": n, "version": version, "outcomes": sorted(outcomes)}), flush=True)


def hang(sink: ParquetSink, method: str) -> None:
    """Come to a method, say so, and stay there until killed."""

    def stay(*_arguments: object) -> None:
        print("there", flush=True)
        threading.Event().wait()

    target = sink.target(MOVIE, ParquetTargetOptions())
    setattr(sink._fs if method == "remove" else sink, method, stay)
    sink.apply(target, [Write((1,), 7, {"n": 7, "late": "a text"})])
    sink.sweep(target)


if __name__ == "__main__":
    action, url, *arguments = sys.argv[1:]
    actions: dict[str, Callable[..., None]] = {"write": write, "hang": hang}
    actions[action](ParquetSink("lake", url, ParquetOptions(buckets=2), 3600), *arguments)
