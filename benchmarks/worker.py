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
from pathlib import Path

import orjson
from common import PROCESSOR, bench_spec, cpu_s, fill, own_cpu_s, report, scratch, servers

from delta_debezium.engine import EmbeddedCapture
from delta_debezium.render import engine_properties
from delta_sync.applying import SinkWriter
from delta_sync.capture import Batch
from delta_sync.decoding import Stretch
from delta_sync.pipeline import load_processor
from delta_sync.progress import LogPosition, Progress
from delta_sync.rereads import AheadOfLog
from delta_sync.running import settle_memory
from delta_sync.secrets import resolve
from delta_sync.sinks import open_sinks, target_for
from delta_sync.sources.postgresql import codec
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.state import StateStore
from delta_sync.testing.servers import PostgreSQL
from delta_sync.worker import TableRuntime, Worker


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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    with scratch() as scratch_name, servers() as (source, cache):
        folder = Path(scratch_name)
        spec = bench_spec(source, cache)
        (folder / "processor.py").write_text(PROCESSOR)
        pipeline = load_processor(folder, spec)
        reader = PostgresReader(spec.source, "bench")
        tables = reader.tables(["public.movie"])
        reader.publish(spec.publication, list(tables.values()))
        reader.create_slot(spec.slot)
        changes = fill(source, arguments.events // 2, updates=True)
        batches = record(
            source, {name: resolve(value) for name, value in engine_properties(spec, tables).items()}, changes, folder
        )
        reader.drop_slot(spec.slot)
        reader.close()

        settle_memory()
        stopping, giving_up, finished = threading.Event(), threading.Event(), threading.Event()
        sinks = open_sinks(spec)
        writers = {name: SinkWriter(sink, giving_up) for name, sink in sinks.items()}
        position = LogPosition(time.monotonic)
        progress = Progress(position, time.monotonic)
        worker = Worker(
            spec=spec,
            pipeline=pipeline,
            epoch=1,
            capture=Recorded(batches, finished),
            stretches=lambda batch: [Stretch(1, orjson.loads(batch.payload))],
            writers=writers,
            lookups={},
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
        redis_before, cpu_before, wall_before = cpu_s(cache.pid), own_cpu_s(), time.perf_counter()
        if arguments.profile:
            profile = cProfile.Profile()
            profile.runcall(worker.run)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
        else:
            worker.run()
        wall, cpu = time.perf_counter() - wall_before, own_cpu_s() - cpu_before
        report(
            "worker",
            {
                "events": progress.events,
                "batches": len(batches),
                "wall_s": round(wall, 2),
                "cpu_s": round(cpu, 2),
                "changes_per_s": round(progress.events / wall),
                "changes_per_cpu_s": round(progress.events / cpu),
                "redis_cpu_s": round(cpu_s(cache.pid) - redis_before, 2),
                "writes": progress.writes,
            },
        )
        for writer in writers.values():
            writer.close()


if __name__ == "__main__":
    main()
