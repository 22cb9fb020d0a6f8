"""Verification beside the load of the same table: rows per second, and CPU time of Delta's processes for a row.

    python benchmarks/verify.py [--rows 200000] [--rounds 3]

`deltactl run` loads a table into Redis; then `deltactl verify` compares it, while the pipeline runs and rests.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys

from common import bench_spec, cpu_s, fill, report, scratch, servers, write_pipeline

from delta_sync.state import StateStore, TableLoad
from delta_sync.testing.processes import wait_until

DEADLINE_S = 600.0


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with scratch() as scratch_name, servers() as (source, cache):
        spec = bench_spec(source, cache)
        folder = write_pipeline(scratch_name, spec)
        fill(source, arguments.rows, updates=False)
        command = [sys.executable, "-m", "deltactl.main", "--dir", str(folder.parent)]
        run = subprocess.Popen([*command, "run", folder.name], stderr=(folder / "run.log").open("wb"))
        try:

            def load_is(state: str) -> bool:
                assert run.poll() is None, (folder / "run.log").read_text()[-2000:]
                store = StateStore.open(spec.state, folder, create=False)
                if store is None:
                    return False
                with store:
                    load = store.loads("bench").get("public.movie")
                return load is not None and load.state == state

            wait_until(lambda: load_is("running"), DEADLINE_S, "the load's beginning")
            cpu_before = cpu_s(run.pid)
            wait_until(lambda: load_is("done"), DEADLINE_S, "the load's end")
            load_cpu_s = cpu_s(run.pid) - cpu_before
            with StateStore.open(spec.state, folder) as store:
                load: TableLoad = store.loads("bench")["public.movie"]
            assert load.started_at is not None
            assert load.finished_at is not None
            load_s = (load.finished_at - load.started_at).total_seconds()
            verified: list[dict[str, float]] = []
            for _ in range(arguments.rounds):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                done = subprocess.run([*command, "verify", folder.name, "--json"], capture_output=True, check=False)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                assert done.returncode == 0, done.stderr.decode()
                numbers = json.loads(done.stdout.splitlines()[-1])
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                verified.append({"rows_per_s": numbers["rows_per_s"], "cpu_us_per_row": 1e6 * cpu / arguments.rows})
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait()
        report(
            "verify",
            {
                "rows": arguments.rows,
                "load": {
                    "rows_per_s": round(arguments.rows / load_s),
                    "cpu_us_per_row": round(1e6 * load_cpu_s / arguments.rows, 1),
                },
                "verify": {name: round(statistics.median(one[name] for one in verified), 1) for name in verified[0]},
            },
        )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
