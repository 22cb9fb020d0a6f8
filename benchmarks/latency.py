"""From commit to document, at 500 changes per second, with default settings; then what the idle pipeline costs.

    python benchmarks/latency.py [--seconds 30] [--rate 500] [--transport kafka]

With Kafka: one broker, a registry, a sidecar and a worker. Brokers' and registry's CPU time is not counted.

A row's `updated_at` is the clock just before its commit; an observer is told by Redis of every write, reads the
document, and compares that with the same machine's clock. Also: time from the start of Delta to its first
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
from collections.abc import Generator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis
from common import bench_spec, cpu_s, fill, report, scratch, servers, write_pipeline

from delta_sync.kafka.topics import create_topics, wanted_topics

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


def kafka_options(exits: contextlib.ExitStack) -> dict[str, Any]:
    """Start a broker and a registry; return what the specification says of them."""
    from delta_sync.testing.kafka import Kafka
    from delta_sync.testing.registry import Apicurio

    broker, registry = exits.enter_context(Kafka()), exits.enter_context(Apicurio())
    copies = {"replication_factor": 1, "min_insync_replicas": 1, "allow_unsafe": True}
    kafka = {"bootstrap_servers": broker.url, "registry": {"url": registry.url}, **copies}
    return {"transport": "kafka", "kafka": kafka}


@contextlib.contextmanager
def running(folder: str, command: str) -> Generator[subprocess.Popen[bytes]]:
    """Run one of Delta's processes."""
    arguments = [sys.executable, "-m", "deltactl.main", "--dir", folder, command, "bench"]
    log = Path(folder) / f"{command}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stderr=output)
    try:
        yield process
    except BaseException:
        print(log.read_text()[-2000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def cpu_of(runs: Mapping[str, subprocess.Popen[bytes]]) -> dict[str, float]:
    """Return the CPU seconds that each has used so far, its children included."""
    return {command: cpu_s(run.pid) for command, run in runs.items()}


def share(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return which part of a core each has used, and all together."""
    found = {command: round((after[command] - before[command]) / seconds, 3) for command in before}
    return found | {"all": round(sum(found.values()), 3)}


def resident_mb(runs: Mapping[str, subprocess.Popen[bytes]]) -> dict[str, int]:
    """Return the resident memory of each, and of its children."""
    found: dict[str, int] = {}
    for command, run in runs.items():
        process = psutil.Process(run.pid)
        found[command] = process.memory_info().rss >> 20
        if children := process.children(recursive=True):
            found[f"{command}'s connector"] = sum(child.memory_info().rss for child in children) >> 20
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--transport", choices=["embedded", "kafka"], default="embedded")
    parser.add_argument("--option", action="append", default=[], help="name=value, of the connector")
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        generate(arguments.generate, arguments.rate, arguments.seconds)
        return
    with contextlib.ExitStack() as exits:
        scratch_name = exits.enter_context(scratch())
        source, cache = exits.enter_context(servers())
        options: dict[str, Any] = dict(option.split("=", 1) for option in arguments.option)
        kafka = kafka_options(exits) if arguments.transport == "kafka" else {}
        spec = bench_spec(source, cache, **kafka, **({"connector": options} if options else {}))
        if spec.kafka is not None:  # `deltactl pipeline create` would have made them
            create_topics(spec.kafka, wanted_topics(spec))
        write_pipeline(scratch_name, spec)
        fill(source, ROWS, updates=False)
        observer = Observer(cache.url)
        observer.start()
        started = time.time()
        runs = {
            command: exits.enter_context(running(scratch_name, command))
            for command in (("sidecar", "worker") if kafka else ("run",))
        }
        client = redis.Redis.from_url(cache.url)
        while client.dbsize() < ROWS:
            assert all(run.poll() is None for run in runs.values()), "see the log above"
            time.sleep(0.05)
        assert observer.first is not None
        first_s = observer.first - started
        loaded_s = time.time() - started
        seconds = str(arguments.seconds + WARM_UP_S)
        generate_command = [sys.executable, __file__, "--generate", source.url, "--rate", str(arguments.rate)]
        generator = subprocess.Popen([*generate_command, "--seconds", seconds])
        time.sleep(WARM_UP_S)
        before = cpu_of(runs)
        observer.measuring.set()
        generator.wait()
        busy = share(before, cpu_of(runs), arguments.seconds)
        observer.measuring.clear()
        time.sleep(2)
        before = cpu_of(runs)
        time.sleep(IDLE_S)
        idle = share(before, cpu_of(runs), IDLE_S)
        resident = resident_mb(runs)
    ages = sorted(observer.ages_ms)
    report(
        "latency" if arguments.transport == "embedded" else "latency_kafka",
        {
            "changes": len(ages),
            **{f"p{q}_ms": round(ages[min(len(ages) - 1, len(ages) * q // 100)], 1) for q in (50, 95, 99)},
            "cpu_of_a_core_busy": busy,
            "cpu_of_a_core_idle": idle,
            "first_document_s": round(first_s, 1),
            "loaded_20000_rows_s": round(loaded_s, 1),
            "resident_mb": resident,
            "installed_mb": installed_mb(),
        },
    )


if __name__ == "__main__":
    main()
