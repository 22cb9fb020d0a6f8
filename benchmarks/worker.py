"""The worker alone: recorded change events → processor → Redis. What is timed is one run over all of them.

    python benchmarks/worker.py [--events 400000] [--profile]

The events are Debezium's own, recorded once from its engine, in the batches in which it delivered them. The capture is
replaced by one that hands them over at once; everything else is what `deltactl run` runs.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import orjson
from common import PROCESSOR, bench_spec, cpu_s, fill, own_cpu_s, report, scratch, servers

from delta_debezium.engine import EmbeddedCapture
from delta_debezium.render import engine_properties
from delta_sync.applying import SinkWriter
from delta_sync.capture import Batch
from delta_sync.decoding import Stretch
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import load_processor
from delta_sync.progress import LogPosition, Progress
from delta_sync.rereads import AheadOfLog
from delta_sync.running import settle_memory
from delta_sync.secrets import resolve
from delta_sync.sinks import open_sinks, target_for
from delta_sync.sources.postgresql import codec
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.submitting import TableRuntime
from delta_sync.tables import Table
from delta_sync.testing.servers import PostgreSQL, Redis
from delta_sync.worker import Worker


class Recorded:
    """A capture that delivers what was recorded, then nothing."""

    def __init__(self, batches: list[Batch], finished: threading.Event) -> None:
        self._batches = deque(batches)
        self._last = batches[-1].sequence
        self._finished = finished
        self.generation = 1
        self.pid = None

    def start(self) -> None:
        """Nothing to start."""

    def poll(self, timeout_s: float) -> Batch | None:
        """Return the next batch."""
        if self._batches:
            return self._batches.popleft()
        self._finished.wait(timeout_s)
        return None

    def confirm(self, batch: Batch) -> None:
        """Note when the last one is confirmed."""
        if batch.sequence == self._last:
            self._finished.set()

    def reconfigure(self) -> None:
        """Nothing to reconfigure."""

    def stop(self) -> None:
        """Nothing to stop."""


def record(source: PostgreSQL, properties: dict[str, str], events: int, folder: Path) -> list[Batch]:
    """Return the engine's batches until it has delivered so many events."""
    capture = EmbeddedCapture(lambda: properties, folder / "capture.log")
    capture.start()
    batches: list[Batch] = []
    total = 0
    while total < events:
        batch = capture.poll(60.0)
        assert batch is not None, "the engine delivers nothing"
        batches.append(batch)
        total += batch.events
        capture.confirm(batch)
    capture.stop()
    return batches


class Prepared(NamedTuple):
    """What a worker is made of, but for the processor, and the events for it."""

    folder: Path
    spec: PipelineSpec
    tables: Mapping[str, Table]
    batches: list[Batch]


def prepare(folder: Path, source: PostgreSQL, cache: Redis, events: int) -> Prepared:
    """Make the pipeline's slot, have the engine deliver so many events of inserts and updates, and record them."""
    spec = bench_spec(source, cache)
    reader = PostgresReader(spec.source, "bench")
    tables = reader.tables(["public.movie"])
    reader.publish(spec.publication, list(tables.values()))
    reader.create_slot(spec.slot)
    changes = fill(source, events // 2, updates=True)
    properties = {name: resolve(value) for name, value in engine_properties(spec, tables).items()}
    batches = record(source, properties, changes, folder)
    reader.drop_slot(spec.slot)
    reader.close()
    return Prepared(folder, spec, tables, batches)


class Measured(NamedTuple):
    """What a worker did: seconds by the clock and of this process's CPU, and its numbers."""

    wall_s: float
    cpu_s: float
    progress: Progress


def run_worker(prepared: Prepared, processor: str, profile: cProfile.Profile | None = None) -> Measured:
    """Run a worker with this `processor.py` over all that was recorded, its look-ups included."""
    folder, spec, tables, batches = prepared
    (folder / "processor.py").write_text(processor)
    pipeline = load_processor(folder, spec)
    settle_memory()
    stopping, giving_up, finished = threading.Event(), threading.Event(), threading.Event()
    sinks = open_sinks(spec)
    writers = {name: SinkWriter(sink, giving_up) for name, sink in sinks.items()}
    lookups = {name: LookupCaller(lookup, stopping, time.monotonic) for name, lookup in pipeline.lookups.items()}
    position = LogPosition(time.monotonic)
    progress = Progress(position, time.monotonic)
    progress.lookups = {name: caller.numbers for name, caller in lookups.items()}
    worker = Worker(
        spec=spec,
        pipeline=pipeline,
        epoch=1,
        capture=Recorded(batches, finished),
        stretches=lambda batch: [Stretch(1, orjson.loads(batch.payload))],
        writers=writers,
        lookups=lookups,
        state=StateStore.open(spec.state, folder),
        position=position,
        progress=progress,
        reread=lambda _table, _lacking: [],
        ahead=AheadOfLog(),
        refresh=lambda _names: {},
        columns_changed=lambda _names: None,
        check_slot=lambda: None,
        stopping=stopping,
        giving_up=giving_up,
    )
    table = tables["public.movie"]
    targets = {name: target_for(sink, table, spec) for name, sink in sinks.items()}
    worker.use({table.id: TableRuntime(codec.table_codec(table), targets)})

    def stop_when_done() -> None:
        finished.wait()
        stopping.set()
        worker.wake()

    threading.Thread(target=stop_when_done).start()
    cpu_before, wall_before = own_cpu_s(), time.perf_counter()
    if profile is not None:
        profile.runcall(worker.run)
    else:
        worker.run()
    measured = Measured(time.perf_counter() - wall_before, own_cpu_s() - cpu_before, progress)
    for writer in writers.values():
        writer.close()
    for lookup in lookups.values():
        lookup.close()
    return measured


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    profile = cProfile.Profile() if arguments.profile else None
    with scratch() as scratch_name, servers() as (source, cache):
        prepared = prepare(Path(scratch_name), source, cache, arguments.events)
        redis_before = cpu_s(cache.pid)
        wall_s, used_s, progress = run_worker(prepared, PROCESSOR, profile)
        if profile is not None:
            pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
        report(
            "worker",
            {
                "events": progress.events,
                "batches": len(prepared.batches),
                "wall_s": round(wall_s, 2),
                "cpu_s": round(used_s, 2),
                "changes_per_s": round(progress.events / wall_s),
                "changes_per_cpu_s": round(progress.events / used_s),
                "redis_cpu_s": round(cpu_s(cache.pid) - redis_before, 2),
                "writes": progress.writes,
            },
        )


if __name__ == "__main__":
    main()
