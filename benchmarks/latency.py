"""From commit to document, at 500 changes per second, with default settings; then what the idle pipeline costs.

    python benchmarks/latency.py [--seconds 30] [--rate 500]

A row's `updated_at` is the clock just before its commit; an observer is told by Redis of every write, reads the
document, and compares that with the same machine's clock. Also: time from the start of `deltactl run` to its first
document, resident memory of its processes, and the size of what is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import psycopg
import redis
from common import PROCESSOR, bench_spec, cpu_s, fill, report, scratch, servers

from delta_sync.spec import dump_spec

ROWS = 20_000
WARM_UP_S = 5.0
IDLE_S = 15.0
UPDATE = (
    "UPDATE movie SET rating = round((1 + random() * 8.9)::numeric, 1), updated_at = clock_timestamp() WHERE id = %s"
)


def generate(url: str, rate: int, seconds: float) -> None:
    """Commit single-row updates, evenly spread; run in a process of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        start, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            while done < elapsed * rate:
                connection.execute(UPDATE, [done * 7919 % ROWS + 1])
                done += 1
            time.sleep(0.001)


class Observer(threading.Thread):
    """Notes the age of every document as it appears."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._redis = redis.Redis.from_url(url)
        self._redis.config_set("notify-keyspace-events", "K$")
        self._events = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]  # redis-py's
        self._events.psubscribe("__keyspace@0__:movie:*")
        self.first: float | None = None
        self.ages_ms: list[float] = []
        self.measuring = threading.Event()

    def run(self) -> None:
        """Observe until Redis ends."""
        with contextlib.suppress(redis.ConnectionError):
            self._observe()

    def _observe(self) -> None:
        for event in self._events.listen():
            if self.first is None:
                self.first = time.time()
            if self.measuring.is_set():
                document = self._redis.get(event["channel"].removeprefix(b"__keyspace@0__:"))
                now = time.time()
                assert isinstance(document, bytes)
                self.ages_ms.append(
                    (now - datetime.fromisoformat(json.loads(document)["updated_at"]).timestamp()) * 1e3
                )


def installed_mb() -> int:
    """Return the size of the environment's packages."""
    packages = Path(sysconfig.get_path("purelib"))
    return round(sum(path.stat().st_size for path in packages.rglob("*") if path.is_file()) / 1e6)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        generate(arguments.generate, arguments.rate, arguments.seconds)
        return
    with scratch() as scratch_name, servers() as (source, cache):
        folder = Path(scratch_name) / "bench"
        folder.mkdir()
        spec = bench_spec(source, cache)
        (folder / "processor.py").write_text(PROCESSOR)
        (folder / "pipeline.yaml").write_text(dump_spec(spec))
        fill(source, ROWS, updates=False)
        observer = Observer(cache.url)
        observer.start()
        started = time.time()
        command = [sys.executable, "-m", "deltactl.main", "--dir", scratch_name, "run", "bench"]
        run = subprocess.Popen(command, stderr=(folder / "run.log").open("wb"))
        try:
            client = redis.Redis.from_url(cache.url)
            while client.dbsize() < ROWS:
                assert run.poll() is None, (folder / "run.log").read_text()[-2000:]
                time.sleep(0.05)
            assert observer.first is not None
            first_s = observer.first - started
            loaded_s = time.time() - started
            seconds = str(arguments.seconds + WARM_UP_S)
            generator = subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--generate",
                    source.url,
                    "--rate",
                    str(arguments.rate),
                    "--seconds",
                    seconds,
                ]
            )
            time.sleep(WARM_UP_S)
            busy_before = cpu_s(run.pid)
            observer.measuring.set()
            generator.wait()
            busy = (cpu_s(run.pid) - busy_before) / arguments.seconds
            observer.measuring.clear()
            time.sleep(2)
            idle_before = cpu_s(run.pid)
            time.sleep(IDLE_S)
            idle = (cpu_s(run.pid) - idle_before) / IDLE_S
            process = psutil.Process(run.pid)
            resident = {one.name(): one.memory_info().rss >> 20 for one in [process]}
            children = {f"capture {one.pid}": one.memory_info().rss >> 20 for one in process.children(recursive=True)}
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait()
    ages = sorted(observer.ages_ms)
    report(
        "latency",
        {
            "changes": len(ages),
            **{f"p{q}_ms": round(ages[min(len(ages) - 1, len(ages) * q // 100)], 1) for q in (50, 95, 99)},
            "cpu_of_a_core_busy": round(busy, 3),
            "cpu_of_a_core_idle": round(idle, 3),
            "first_document_s": round(first_s, 1),
            "loaded_20000_rows_s": round(loaded_s, 1),
            "resident_mb": {"worker": sum(resident.values()), "capture": sum(children.values())},
            "installed_mb": installed_mb(),
        },
    )


if __name__ == "__main__":
    main()
