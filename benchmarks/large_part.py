"""A document of one row with very many in a part, and a burst of changes of all of these.

    python benchmarks/large_part.py [--children 1000000] [--held 50000]

Two movies: one with so many reviews, of which its processor is to see at most `held`, so it is a dead letter; and one
with `held` of them, whose document holds all. Then all reviews of both are updated, in transactions of 10,000. It says
how often documents were built meanwhile, until the one that can be built shows the last change, and how much memory
`deltactl run` and its connector had at most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import psutil
import psycopg
import redis
from common import bench_spec, report, scratch, servers, write_pipeline

DEADLINE_S = 3600.0
LOOK_S = 0.2
AT_ONCE = 10_000  # children that one transaction updates
REVIEWS = """
INSERT INTO review SELECT i, CASE WHEN i <= %(children)s THEN 1 ELSE 2 END, 'review ' || i, 0
FROM generate_series(1, %(children)s + %(held)s) i
"""
PROCESSOR = """from delta_sync import Pipeline, many

bench = Pipeline("bench")


@bench.document("public.film", parts={{"reviews": many("public.review", most={held})}})
def film(row):
    reviews = row["reviews"]
    with open({builds!r}, "a") as builds:
        builds.write("x")
    return {{"id": row["id"], "count": len(reviews), "least": min(review["rev"] for review in reviews),
             "reviews": reviews}}
"""


class Memory:
    """The resident memory of a process and of its children, as it was at most."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.run_mb = self.connector_mb = 0

    def look(self) -> None:
        self.run_mb = max(self.run_mb, self._process.memory_info().rss >> 20)
        children = self._process.children(recursive=True)
        self.connector_mb = max(self.connector_mb, *(child.memory_info().rss >> 20 for child in children), 0)


def main() -> None:
    """Run it and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--children", type=int, default=1_000_000)
    parser.add_argument("--held", type=int, default=50_000)
    arguments = parser.parse_args()
    total = arguments.children + arguments.held
    with scratch() as scratch_name, servers() as (source, cache), redis.Redis.from_url(cache.url) as client:
        with psycopg.connect(source.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE film (id bigint PRIMARY KEY)")
            connection.execute(
                "CREATE TABLE review (id bigint PRIMARY KEY, film_id bigint NOT NULL REFERENCES film, body text,"
                " rev int NOT NULL)"
            )
            connection.execute("ALTER TABLE review REPLICA IDENTITY FULL")
            connection.execute("INSERT INTO film VALUES (1), (2)")
            connection.execute(REVIEWS, vars(arguments))
            connection.execute("CREATE INDEX ON review (film_id)")
            connection.execute("VACUUM ANALYZE review")
        tables: dict[str, Any] = {"public.film": {"sinks": {"cache": {"key": "film:{id}"}}}, "public.review": {}}
        spec = bench_spec(source, cache, tables=tables)
        folder = write_pipeline(scratch_name, spec)
        builds = folder / "builds"
        builds.touch()
        (folder / "processor.py").write_text(PROCESSOR.format(held=arguments.held, builds=str(builds)))
        command = [sys.executable, "-m", "deltactl.main", "--dir", str(folder.parent), "run", folder.name]
        with (folder / "run.log").open("wb") as output:
            run = subprocess.Popen(command, stderr=output)
            memory = Memory(run.pid)
            try:

                def wait_for(rev: int) -> float:
                    began = time.perf_counter()
                    while (shown := client.get("film:2")) is None or json.loads(shown)["least"] < rev:
                        assert run.poll() is None, (folder / "run.log").read_text()[-2000:]
                        assert time.perf_counter() < began + DEADLINE_S, "it does not come"
                        memory.look()
                        time.sleep(LOOK_S)
                    return time.perf_counter() - began

                loaded_s = wait_for(0)
                loaded = (memory.run_mb, memory.connector_mb)
                built = builds.stat().st_size
                began = time.perf_counter()
                with psycopg.connect(source.url) as connection:
                    for first in range(1, total + 1, AT_ONCE):
                        connection.execute(
                            "UPDATE review SET rev = 1 WHERE id BETWEEN %s AND %s", [first, first + AT_ONCE - 1]
                        )
                        connection.commit()
                        memory.look()
                written_s = time.perf_counter() - began
                wait_for(1)
                took_s = time.perf_counter() - began
                built = builds.stat().st_size - built
                document = client.get("film:2")
                assert document is not None
                assert client.get("film:1") is None, "it has more than it may have"
            finally:
                run.terminate()
                run.wait()
    report(
        "large_part",
        {
            "children": arguments.children,
            "held": arguments.held,
            "document_mb": round(len(document) / 1e6, 1),
            "loaded_s": round(loaded_s, 1),
            "changes": total,
            "written_s": round(written_s, 1),
            "shown_s": round(took_s, 1),
            "built": built,
            "run_rss_mb": {"loaded": loaded[0], "most": memory.run_mb},
            "connector_rss_mb": {"loaded": loaded[1], "most": memory.connector_mb},
        },
    )


if __name__ == "__main__":
    main()
