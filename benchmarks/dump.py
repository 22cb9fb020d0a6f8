"""One table's load into Redis, embedded: rows per second and CPU per row, beside another revision's loader.

    python benchmarks/dump.py [--rows 1000000] [--other PATH]

`--other` is a worktree of the revision to compare with, for example one made by `git worktree add`. The two take turns
of which each starts with an empty store; the ratio is what counts, because machines differ.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
import redis
from common import report, scratch, servers

from delta_sync.testing.processes import ServerProcess

DEADLINE_S = 900.0
LOOK_S = 0.2
STOP_S = 60.0  # a drain takes ten
SOURCES = ("processors", "schemas", "debezium-config", "cli")


def tree_cpu_s(pid: int) -> float:
    """Return the CPU time of a process without its children: the worker's, not the connector's."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def load(root: Path, source: Any, cache: Any, rows: int, folder: Path) -> dict[str, float]:
    """Create a pipeline with the code of a worktree, run it until the table is loaded; return the figures."""
    client: Any = redis.Redis.from_url(cache.url)
    client.flushdb()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / name) for name in SOURCES)}
    deltactl = [sys.executable, "-m", "deltactl.main"]
    home = ["--dir", str(folder / "pipelines")]
    password = folder / "password"
    password.write_text(urlsplit(source.url).password or "")
    url = source.url.replace(f":{urlsplit(source.url).password}@", f":${{file:{password}}}@")
    name = f"bench_{folder.name}"
    subprocess.run(
        [
            *deltactl,
            "pipeline",
            "create",
            name,
            "--source",
            url,
            "--table",
            "public.narrow",
            "--sink",
            f"cache={cache.url}",
            *home,
        ],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    started = time.monotonic()
    log = folder / "run.log"
    run = ServerProcess.start(
        [*deltactl, "run", name, "--log-format", "json", *home], log=log, cwd=folder, env=environment
    )
    began = cpu = 0.0
    try:
        while b'"load_finished"' not in log.read_bytes():
            assert run.running, log.read_text()[-2000:]
            assert time.monotonic() - started < DEADLINE_S, log.read_text()[-2000:]
            if not began and b'"load_started"' in log.read_bytes():
                began, cpu = time.monotonic(), tree_cpu_s(run.pid)
            time.sleep(LOOK_S)
        took_s, cpu_s = time.monotonic() - began, tree_cpu_s(run.pid) - cpu
    finally:
        run.terminate(signal.SIGTERM, STOP_S)
        subprocess.run([*deltactl, "pipeline", "delete", name, "--yes", *home], env=environment, check=False)
    return {"rows_per_s": rows / took_s, "worker_us_per_row": cpu_s / rows * 1e6, "seconds": took_s}


def main() -> None:
    """Run it and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--other", type=Path)
    options = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    results: dict[str, dict[str, float]] = {}
    with servers() as (source, cache), scratch() as scratched:
        folder = Path(scratched)
        with psycopg.connect(source.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE narrow (id bigint PRIMARY KEY, title text, year int)")
            fill = b"INSERT INTO narrow SELECT i, 'movie ' || i, 1900 + i %% 120 FROM generate_series(1, %d) AS i"
            connection.execute(fill % options.rows)
            connection.execute("VACUUM ANALYZE narrow")
        for label, root in (("this", here), ("other", options.other)):
            if root is not None:
                (folder / label).mkdir()
                results[label] = load(root, source, cache, options.rows, folder / label)
                print(label, results[label], flush=True)
    if options.other is not None:
        results["ratio"] = {key: results["this"][key] / results["other"][key] for key in results["this"]}
    report("dump", {"rows": options.rows, **results})


if __name__ == "__main__":
    main()
