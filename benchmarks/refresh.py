"""Refreshing documents by a notice, beside a dump of their table: rows per second, each with a look-up in a service.

    python benchmarks/refresh.py [--rows 100000] [--call-ms 20] [--rounds 2]

In turn, by one running pipeline: a dump of the whole table, and a notice over HTTP that names all of its keys. A dump's
time is from its beginning to its end, as the state store has it; the notice's also from the moment at which it is sent.
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

import requests
from common import bench_spec, fill, report, scratch, servers, write_pipeline
from lookups import PROCESSOR, START_S, answers

from delta_sync.dumps import Dump
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.testing.processes import ServerProcess, free_port, wait_until

DEADLINE_S = 600.0
TOKEN = "benchmark"


def ended(dumps: DumpStore, after: int, what: str) -> Dump:
    """Wait for the end of the dump that was added after that of id `after`; return it."""
    wait_until(lambda: any(d.id > after and not d.unfinished for d in dumps.all()), DEADLINE_S, what)
    return next(dump for dump in dumps.all() if dump.id > after)


def rate(dump: Dump) -> float:
    """Return a dump's rows per second."""
    assert dump.state == "done", dump.waits
    assert dump.started_at is not None, "it is done"
    assert dump.finished_at is not None, "it is done"
    return dump.rows / (dump.finished_at - dump.started_at).total_seconds()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--call-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    service_port, port = free_port(), free_port()
    url = f"http://127.0.0.1:{service_port}/stars"
    service = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).with_name("lookups.py")),
            "--serve",
            str(service_port),
            "--call-ms",
            str(arguments.call_ms),
        ]
    )
    os.environ["BENCH_NOTICE_TOKEN"] = TOKEN
    figures: dict[str, list[Any]] = {"dump_rows_per_s": [], "refresh_rows_per_s": [], "notice_to_end_s": []}
    try:
        wait_until(lambda: answers(url), START_S, "the service's first answer")
        with scratch() as scratch_name, servers() as (source, cache):
            fill(source, arguments.rows, updates=False)
            spec = bench_spec(source, cache, notices={"token": "${env:BENCH_NOTICE_TOKEN}"})
            folder = write_pipeline(scratch_name, spec)
            (folder / "processor.py").write_text(PROCESSOR.format(url=url))
            command = [sys.executable, "-m", "deltactl.main", "run", spec.name, "--dir", scratch_name]
            run = ServerProcess.start([*command, "--port", str(port)], log=Path(scratch_name) / "run.log", cwd=folder)
            try:
                opened: list[StateStore] = []

                def loaded() -> bool:
                    state = opened[0] if opened else StateStore.open(spec.state, folder, create=False)
                    if state is None:
                        return False
                    opened[:] = [state]
                    loads = state.loads(spec.name)
                    return bool(loads) and all(load.state == "done" for load in loads.values())

                wait_until(loaded, DEADLINE_S, "the first load")
                with opened[0] as state:
                    dumps = DumpStore(state, spec.name)
                    for _ in range(arguments.rounds):
                        last = dumps.add(Dump(table="public.movie", kind="table"))
                        figures["dump_rows_per_s"].append(round(rate(ended(dumps, last - 1, "the dump"))))
                        began = time.monotonic()
                        notice = {"lookup": "stars", "keys": list(range(1, arguments.rows + 1))}
                        headers = {"Authorization": f"Bearer {TOKEN}"}
                        told = requests.post(
                            f"http://127.0.0.1:{port}/notices", json=notice, headers=headers, timeout=60
                        )
                        told.raise_for_status()
                        found = ended(dumps, last, "the refresh")
                        figures["notice_to_end_s"].append(round(time.monotonic() - began, 1))
                        assert (found.kind, found.rows) == ("keys", arguments.rows), found
                        figures["refresh_rows_per_s"].append(round(rate(found)))
            finally:
                run.terminate(int(signal.SIGTERM), DEADLINE_S)
    finally:
        service.kill()
        service.wait()
    share = [round(r / d, 2) for r, d in zip(figures["refresh_rows_per_s"], figures["dump_rows_per_s"], strict=True)]
    report("refresh", {"rows": arguments.rows, "call_ms": arguments.call_ms, **figures, "share_of_dump": share})


if __name__ == "__main__":
    main()
