"""From commit to document, at 500 changes per second, with default settings; then what the idle pipeline costs.

    python benchmarks/latency.py [--seconds 30] [--rate 500] [--transport kafka] [--dump-rows 0 [--rounds 4]]

With Kafka: one broker, a registry, a sidecar and a worker. Brokers' and registry's CPU time is not counted.

With `--dump-rows`, there is a second table of so many rows, and the changes come while the same worker dumps that, over
and over, and while it does not, in turn, in so many rounds. The ratio of the latencies is what counts.

A row's `updated_at` is the clock just before its commit; an observer is told by Redis of every write, reads the
document, and compares that with the same machine's clock. Also: time from the start of Delta to its first
document, resident memory of its processes, and the size of what is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis
from common import PROCESSOR, bench_spec, cpu_s, fill, report, scratch, servers, write_pipeline

from delta_sync.dumps import Dump
from delta_sync.kafka.topics import create_topics, wanted_topics
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore

ROWS = 20_000
WARM_UP_S = 3.0
IDLE_S = 15.0
UPDATE = (
    "UPDATE movie SET rating = round((1 + random() * 8.9)::numeric, 1), updated_at = clock_timestamp() WHERE id = %s"
)
TOLD_MOST = 100  # documents that the observer reads at once
TOLD_WITHIN_S = 0.0005
DUMPED = "public.narrow"
FILL_DUMPED = b"INSERT INTO narrow SELECT i, 'movie ' || i, 1900 + i %% 120 FROM generate_series(1, %d) AS i"
DUMPED_PROCESSOR = """

@bench.table("public.narrow")
def narrow(row: Row) -> Document | None:
    return {"id": row["id"], "title": row["title"], "year": row["year"]}
"""


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
        """Read what was told so far in one call: with one for each document this would wait for itself."""
        while True:
            first = self._events.get_message(timeout=None)
            if first is None:  # that it has subscribed
                continue
            told = [first]
            while len(told) < TOLD_MOST and (event := self._events.get_message(timeout=TOLD_WITHIN_S)) is not None:
                told.append(event)
            if self.first is None:
                self.first = time.time()
            if self.measuring.is_set():
                keys = [event["channel"].removeprefix(b"__keyspace@0__:") for event in told]
                documents: Any = self._redis.mget(keys)
                now = time.time()
                for document in documents:
                    changed_at = datetime.fromisoformat(json.loads(document)["updated_at"]).timestamp()
                    self.ages_ms.append((now - changed_at) * 1e3)


class Dumps(threading.Thread):
    """Dumps the second table over and over, one dump after the other."""

    def __init__(self, spec: PipelineSpec, folder: Path) -> None:
        super().__init__(daemon=True)
        self._spec = spec
        self._folder = folder
        self._enough = threading.Event()
        self.rows = 0

    def run(self) -> None:
        """Start the next dump when one has ended."""
        with StateStore.open(self._spec.state, self._folder) as state:
            dumps = DumpStore(state, self._spec.name)
            while not self._enough.is_set():
                id_ = dumps.add(Dump(table=DUMPED, kind="table", reason="benchmark"))
                while (dump := dumps.get(id_)) is not None and dump.unfinished and not self._enough.wait(0.1):
                    pass
                assert dump is not None
                self.rows += dump.rows

    def stop(self) -> None:
        """Start no more of them."""
        self._enough.set()
        self.join()


def during_dumps(
    spec: PipelineSpec, folder: Path, rounds: int, measure: Callable[[], tuple[list[float], dict[str, float]]]
) -> dict[str, Any]:
    """Measure while there are dumps and while there are none, in turn."""
    without, beside = list[list[float]](), list[list[float]]()
    dumped, busy = list[float](), dict[str, float]()
    for number in range(rounds):
        without.append(measure()[0])
        dumps = Dumps(spec, folder)
        began = time.perf_counter()
        dumps.start()
        ages, busy = measure()
        beside.append(ages)
        dumps.stop()
        dumped.append(dumps.rows / (time.perf_counter() - began))
        p99s = [shares(one[number])["p99_ms"] for one in (without, beside)]
        print(f"round {number + 1}: p99 {p99s} ms, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    calm, disturbed = (shares([age for one in some for age in one]) for some in (without, beside))
    each = [shares(two)["p99_ms"] / shares(one)["p99_ms"] for one, two in zip(without, beside, strict=True)]
    return {
        "without": calm,
        **disturbed,
        "cpu_of_a_core": busy,
        "dumped_rows_per_s": round(statistics.median(dumped)),
        "p50_ratio": round(disturbed["p50_ms"] / calm["p50_ms"], 2),
        "p99_ratio": round(disturbed["p99_ms"] / calm["p99_ms"], 2),
        "p99_ratio_of_rounds": [round(ratio, 2) for ratio in each],
        "p99_ratio_median": round(statistics.median(each), 2),
    }


def fill_dumped(url: str, rows: int) -> None:
    """Create the second table."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE narrow (id bigint PRIMARY KEY, title text, year int)")
        connection.execute(FILL_DUMPED % rows)
        connection.execute("VACUUM ANALYZE narrow")


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


def latencies(
    observer: Observer, runs: Mapping[str, subprocess.Popen[bytes]], url: str, rate: int, seconds: float
) -> tuple[list[float], dict[str, float]]:
    """Generate changes; return how old documents were when they appeared, and what part of a core each process used."""
    command = [sys.executable, __file__, "--generate", url, "--rate", str(rate)]
    generator = subprocess.Popen([*command, "--seconds", str(seconds + WARM_UP_S)])
    time.sleep(WARM_UP_S)
    before = cpu_of(runs)
    observer.ages_ms = []
    observer.measuring.set()
    generator.wait()
    busy = share(before, cpu_of(runs), seconds)
    observer.measuring.clear()
    return observer.ages_ms, busy


def shares(ages_ms: Sequence[float]) -> dict[str, float]:
    """Return how many ages there are, and which of them half, 95 and 99 percent do not exceed."""
    ages = sorted(ages_ms)
    found = {f"p{q}_ms": round(ages[min(len(ages) - 1, len(ages) * q // 100)], 1) for q in (50, 95, 99)}
    return {"changes": len(ages), **found}


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
    parser.add_argument("--dump-rows", type=int, default=0, help="of a second table, dumped meanwhile")
    parser.add_argument("--rounds", type=int, default=4, help="with --dump-rows")
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
        more: dict[str, Any] = {"connector": options} if options else {}
        if arguments.dump_rows:
            fill_dumped(source.url, arguments.dump_rows)
            movies = {"sinks": {"cache": {"key": "movie:{id}"}}}
            more["tables"] = {"public.movie": movies, DUMPED: {"sinks": {"cache": {"key": "narrow:{id}"}}}}
        spec = bench_spec(source, cache, **kafka, **more)
        if spec.kafka is not None:  # `deltactl pipeline create` would have made them
            create_topics(spec.kafka, wanted_topics(spec))
        folder = write_pipeline(scratch_name, spec)
        if arguments.dump_rows:
            (folder / "processor.py").write_text(PROCESSOR + DUMPED_PROCESSOR)
        fill(source, ROWS, updates=False)
        observer = Observer(cache.url)
        observer.start()
        started = time.time()
        runs = {
            command: exits.enter_context(running(scratch_name, command))
            for command in (("sidecar", "worker") if kafka else ("run",))
        }
        client = redis.Redis.from_url(cache.url)
        while client.dbsize() < ROWS + arguments.dump_rows:
            assert all(run.poll() is None for run in runs.values()), "see the log above"
            time.sleep(0.05)
        assert observer.first is not None
        first_s = observer.first - started
        loaded_s = time.time() - started
        changes = runs, source.url, arguments.rate, arguments.seconds
        ages, busy = latencies(observer, *changes)
        time.sleep(2)
        before = cpu_of(runs)
        time.sleep(IDLE_S)
        idle = share(before, cpu_of(runs), IDLE_S)
        resident = resident_mb(runs)
        beside: dict[str, Any] = {}
        if arguments.dump_rows:
            beside = during_dumps(spec, folder, arguments.rounds, lambda: latencies(observer, *changes))
    name = "latency" if arguments.transport == "embedded" else "latency_kafka"
    report(
        f"{name}_dumps" if beside else name,
        {
            **shares(ages),
            **({"during_dumps": beside} if beside else {}),
            "cpu_of_a_core_busy": busy,
            "cpu_of_a_core_idle": idle,
            "first_document_s": round(first_s, 1),
            f"loaded_{ROWS + arguments.dump_rows}_rows_s": round(loaded_s, 1),
            "resident_mb": resident,
            "installed_mb": installed_mb(),
        },
    )


if __name__ == "__main__":
    main()
