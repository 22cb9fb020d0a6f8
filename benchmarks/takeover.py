"""From the end of the leading sidecar to the first change that comes through the next one, again and again.

    python benchmarks/takeover.py [--runs 20] [--frozen 5]

One PostgreSQL, one broker, a registry, two sidecars, a worker and Redis. The leader is killed (SIGKILL; its connector
ends with it) or frozen with its connector (SIGSTOP); a change is committed at once, and the clock stops when its
document is in Redis. Then the lost sidecar is replaced, and after a change has come through the next run begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import psycopg
import redis
from common import bench_spec, fill, report, scratch, servers, write_pipeline
from latency import kafka_options

from delta_sync.kafka.topics import create_topics, wanted_topics
from delta_sync.testing.processes import wait_until

ROWS = 1000
DEADLINE_S = 120.0
CONNECTOR = "io.debezium.server.Main"


class Processes:
    """Delta's processes, each with a log of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0

    def start(self, command: str, exits: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        """Start one, which ends with the benchmark."""
        self._started += 1
        log = self._folder / f"{command}-{self._started}.log"
        arguments = [sys.executable, "-m", "deltactl.main", "--dir", str(self._folder), command, "bench"]
        with log.open("wb") as output:
            process = subprocess.Popen([*arguments, "--log-format", "json"], stdout=output, stderr=output)
        exits.callback(end, process)
        return process


def stands_by(process: subprocess.Popen[bytes]) -> bool:
    """Whether a sidecar is past its start: the thread that takes the lease is there."""
    return psutil.Process(process.pid).num_threads() > 1


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, frozen or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.kill()
    process.wait()


def connector_of(sidecar: subprocess.Popen[bytes]) -> psutil.Process | None:
    """Return a sidecar's Debezium Server."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(sidecar.pid).children(recursive=True):
            if CONNECTOR in child.cmdline():
                return child
    return None


def comes_through(source: str, cache: redis.Redis, number: int) -> float:
    """Change a row and return how many seconds it took until that was in Redis."""
    title, began = f"run {number}", time.perf_counter()
    with psycopg.connect(source, autocommit=True) as connection:
        connection.execute("UPDATE movie SET title = %s WHERE id = 1", [title])

    def there() -> bool:
        document = cache.get("movie:1")
        return isinstance(document, bytes) and json.loads(document)["title"] == title

    wait_until(there, DEADLINE_S, "a change that comes through")
    return time.perf_counter() - began


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="with a leader that is killed")
    parser.add_argument("--frozen", type=int, default=5, help="with a leader that is frozen")
    arguments = parser.parse_args()
    killed: list[float] = []
    frozen: list[float] = []
    with contextlib.ExitStack() as exits:
        scratch_name = exits.enter_context(scratch())
        source, cache = exits.enter_context(servers())
        spec = bench_spec(source, cache, **kafka_options(exits))
        assert spec.kafka is not None
        create_topics(spec.kafka, wanted_topics(spec))
        write_pipeline(scratch_name, spec)
        fill(source, ROWS, updates=False)
        client = redis.Redis.from_url(cache.url)
        processes = Processes(Path(scratch_name))
        processes.start("worker", exits)
        sidecars = [processes.start("sidecar", exits)]
        wait_until(lambda: client.dbsize() == ROWS, DEADLINE_S, "the load")
        for number in range(arguments.runs + arguments.frozen):
            sidecars.append(processes.start("sidecar", exits))
            wait_until(lambda: stands_by(sidecars[-1]), DEADLINE_S, "a standby")
            comes_through(source.url, client, 2 * number)
            (leader,) = [one for one in sidecars if connector_of(one) is not None]
            connector = connector_of(leader)
            assert connector is not None
            if number < arguments.runs:
                leader.kill()
                leader.wait()
                connector.wait(DEADLINE_S)
                figures = killed
            else:
                connector.suspend()
                leader.send_signal(signal.SIGSTOP)
                figures = frozen
            figures.append(comes_through(source.url, client, 2 * number + 1))
            print(f"{'killed' if figures is killed else 'frozen'}: {figures[-1]:.1f} s, load {os.getloadavg()[0]:.1f}")
            end(leader)
            sidecars.remove(leader)
    report("takeover", {"killed": summary(killed), "frozen": summary(frozen)})


def summary(seconds: list[float]) -> dict[str, float]:
    """Return what is told of some runs."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {
        "runs": len(ordered),
        "p50_s": round(ordered[len(ordered) // 2], 1),
        "p95_s": round(ordered[math.ceil(0.95 * len(ordered)) - 1], 1),
        "most_s": round(ordered[-1], 1),
    }


if __name__ == "__main__":
    main()
