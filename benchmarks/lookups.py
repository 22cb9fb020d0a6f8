"""Enrichment by a slow service: recorded change events → look-up → processor → Redis; beside it a call per change.

    python benchmarks/lookups.py [--events 100000] [--singles 250] [--call-ms 20]

The service is an HTTP server in another process that takes so long for every call, whatever is asked for. Delta's
worker asks for 500 keys in a call, four calls at once, and remembers nothing (`ttl="0s"`), so every change is enriched
by the service. What it stands beside is what one writes in a plain consumer, or in a function of a stream processor:
for each change one call over a connection that is kept, then all documents into Redis in one pipeline, unversioned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import redis
import requests
from common import cpu_s, report, scratch, servers
from worker import Prepared, prepare, run_worker

from delta_sync.testing.processes import free_port, wait_until

START_S = 60.0
PROCESSOR = """from delta_sync import Pipeline, lookup

bench = Pipeline("bench")
stars = bench.lookup(batch=500, concurrency=4, ttl="0s")(lookup.http("stars", "{url}", key="id"))


@bench.table("public.movie", enrich={{"star": stars.by("id")}})
def movie(row, star):
    return {{
        "id": row["id"],
        "title": row["title"],
        "year": row["year"],
        "rating": row["rating"],
        "studio_id": row["studio_id"],
        "updated_at": row["updated_at"],
        "stars": star["stars"],
    }}
"""


class Service(BaseHTTPRequestHandler):
    """Takes its time for every call."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the head waits for the acknowledgement of what was before: 40 ms
    call_s = 0.02

    def do_POST(self) -> None:
        """Rate all ids of the list."""
        ids: list[int] = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(Service.call_s)
        body = orjson.dumps([{"id": id_, "stars": id_ % 50 / 10} for id_ in ids])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's signature
        """A call is no event."""


def serve(port: int, call_s: float) -> None:
    """Serve until this process is ended."""
    Service.call_s = call_s
    with ThreadingHTTPServer(("127.0.0.1", port), Service) as server:
        server.serve_forever()


def answers(url: str) -> bool:
    """Tell whether the service is there."""
    try:
        return requests.post(url, json=[1], timeout=5).ok
    except requests.ConnectionError:
        return False


def one_by_one(prepared: Prepared, url: str, store: Any, changes: int) -> float:
    """Enrich so many changes with one call each; return the seconds."""
    events = [event for batch in prepared.batches for event in orjson.loads(batch.payload) if event["op"] in "cu"]
    began = time.perf_counter()
    with requests.Session() as session:
        pipeline = store.pipeline(transaction=False)
        for event in events[:changes]:
            row = event["after"]
            reply = session.post(url, data=orjson.dumps([row["id"]]), timeout=5)
            reply.raise_for_status()
            pipeline.set(f"plain:{row['id']}", json.dumps({**row, "stars": reply.json()[0]["stars"]}))
        pipeline.execute()
    return time.perf_counter() - began


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--singles", type=int, default=250)
    parser.add_argument("--call-ms", type=float, default=20.0)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.call_ms / 1000)
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}/stars"
    command = [sys.executable, __file__, "--serve", str(port), "--call-ms", str(arguments.call_ms)]
    with scratch() as scratch_name, servers() as (source, cache):
        prepared = prepare(Path(scratch_name), source, cache, arguments.events)
        service = subprocess.Popen(command)
        try:
            wait_until(lambda: answers(url), START_S, "the service's first answer")
            with redis.Redis.from_url(cache.url) as store:
                singles_s = one_by_one(prepared, url, store, arguments.singles)
            service_before = cpu_s(service.pid)
            wall_s, used_s, progress = run_worker(prepared, PROCESSOR.format(url=url))
            service_s = cpu_s(service.pid) - service_before
        finally:
            service.kill()
            service.wait()
    rate, single_rate = progress.events / wall_s, arguments.singles / singles_s
    numbers = progress.lookups["stars"]
    report(
        "lookups",
        {
            "call_ms": arguments.call_ms,
            "events": progress.events,
            "wall_s": round(wall_s, 2),
            "changes_per_s": round(rate),
            "changes_per_cpu_s": round(progress.events / used_s),
            "calls": sum(numbers.calls.values()),
            "keys": numbers.asked,
            "service_cpu_s": round(service_s, 2),
            "one_call_per_change_per_s": round(single_rate, 1),
            "times": round(rate / single_rate),
        },
    )


if __name__ == "__main__":
    main()
