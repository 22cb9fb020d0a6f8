"""Documents with ten children each, from PostgreSQL into OpenSearch, beside pgsync.

    python benchmarks/documents.py [--pgsync DIR --postgresql BIN] [--movies 20000] [--rounds 3]

Both build movies with ten castings each, from databases of their own in one server, into indexes of one OpenSearch, one
after the other: first the load, with the program's start, which counts less the more movies there are; then, in each
round, one casting of 20,000 movies is updated, in 200 transactions of 100, until the index shows all of them. DIR is a
virtual environment with pgsync (`pip install pgsync`), which needs a Redis for its queue, and a PostgreSQL with
`test_decoding`, whose programs are in BIN (Debian's, such as /usr/lib/postgresql/15/bin); without it Delta runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
import requests
from common import report, scratch

from delta_sync.spec import dump_spec, spec_from
from delta_sync.testing.servers import OpenSearch, PostgreSQL, Redis

UPDATED, CHILDREN = 20_000, 10
DEADLINE_S = 900.0
LOOK_S = 0.2
SETUP = """
CREATE TABLE movie (id bigint PRIMARY KEY, title text, year int, rating numeric(3,1), studio_id bigint,
                    updated_at timestamptz);
CREATE TABLE casting (id bigint PRIMARY KEY, movie_id bigint NOT NULL REFERENCES movie (id), person text, role text,
                      rev int NOT NULL DEFAULT 0);
INSERT INTO movie SELECT i, 'Movie title number ' || i, 1950 + (i % 75),
    round((1 + (i * 7919 % 90) / 10.0)::numeric, 1), i % 500, now() FROM generate_series(1, {movies}) i;
INSERT INTO casting SELECT i, 1 + (i - 1) / {children}, 'Person ' || md5(i::text), 'role ' || (i % 37), 0
    FROM generate_series(1, {movies} * {children}) i;
CREATE INDEX ON casting (movie_id);
ANALYZE;
"""
PROCESSOR = """from delta_sync import Pipeline, many

bench = Pipeline("bench")


@bench.document("public.movie", parts={"castings": many("public.casting")})
def movie(row):
    for casting in row["castings"]:
        del casting["movie_id"]
    return row
"""
PGSYNC_SCHEMA = [
    {
        "database": "pgs",
        "index": "pgs_movie",
        "nodes": {
            "table": "movie",
            "columns": ["id", "title", "year", "rating", "studio_id", "updated_at"],
            "children": [
                {
                    "table": "casting",
                    "columns": ["id", "person", "role", "rev"],
                    "label": "castings",
                    "relationship": {"variant": "object", "type": "one_to_many"},
                }
            ],
        },
    }
]


class Spent(threading.Thread):
    """The CPU seconds of a process and all of its children, those that have ended, too (as far as they were seen)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self.look()
        self.start()

    def look(self) -> float:
        try:
            for one in [self._process, *self._process.children(recursive=True)]:
                times = one.cpu_times()
                self._seen[one.pid, one.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            pass
        return sum(self._seen.values())

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()

    def end(self) -> None:
        self._ended.set()
        self.join()


class Bench:
    """A server, an index, and what is measured of whoever brings the one into the other."""

    def __init__(self, source: PostgreSQL, search: OpenSearch, database: str, index: str, movies: int) -> None:
        self._url = source.url_of(database)
        self._search, self._index, self._movies = search, index, movies
        self._updated = min(movies, UPDATED)
        self._spent = {"postgresql": Spent(source.pid), "opensearch": Spent(search.pid)}
        with psycopg.connect(source.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(SETUP.format(movies=movies, children=CHILDREN))

    def close(self) -> None:
        for one in self._spent.values():
            one.end()

    def count(self, query: dict[str, Any]) -> int:
        reply = requests.post(f"{self._search.url.rstrip('/')}/{self._index}/_count", json={"query": query}, timeout=30)
        return int(reply.json().get("count", 0)) if reply.ok else 0

    def measure(self, process: Spent, write: Callable[[], None], query: dict[str, Any], most: int) -> dict[str, float]:
        """Write, wait until the index shows so many movies, and return what it took."""
        spent = {**self._spent, "itself": process}
        before = {name: one.look() for name, one in spent.items()}
        began = time.perf_counter()
        write()
        while self.count(query) < most:
            assert time.perf_counter() < began + DEADLINE_S, "it does not come"
            time.sleep(LOOK_S)
        took = time.perf_counter() - began
        cpu = {f"{name}_cpu_us_per_document": 1e6 * (one.look() - before[name]) / most for name, one in spent.items()}
        return {"documents_per_s": most / took, **cpu}

    def update(self, number: int) -> None:
        """Update one casting of each of some movies."""
        ids = list(range(number, self._updated * CHILDREN + 1, CHILDREN))
        random.Random(number).shuffle(ids)
        with psycopg.connect(self._url) as connection:
            for start in range(0, self._updated, 100):
                some = ids[start : start + 100]
                connection.execute("UPDATE casting SET rev = %s, role = role || 'x' WHERE id = ANY(%s)", [number, some])
                connection.commit()

    def run(self, command: list[str], environment: dict[str, str], log: Path, rounds: int) -> dict[str, Any]:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=log.open("wb"), cwd=log.parent)
        spent = Spent(process.pid)
        try:
            figures: dict[str, Any] = {"load": self.measure(spent, lambda: None, {"match_all": {}}, self._movies)}
            streaming = [
                self.measure(
                    spent,
                    lambda number=number: self.update(number),  # type: ignore[misc]  # a default binds it now
                    {"term": {"castings.rev": number}},
                    self._updated,
                )
                for number in range(1, rounds + 1)
            ]
            figures["streaming"] = {name: statistics.median(one[name] for one in streaming) for name in streaming[0]}
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            spent.end()
        return figures


def delta(source: PostgreSQL, search: OpenSearch, folder: Path, movies: int, rounds: int) -> dict[str, Any]:
    bench = Bench(source, search, "bench", "movie", movies)
    parts = urlsplit(source.url_of("bench"))
    with psycopg.connect(source.url_of("bench"), autocommit=True) as connection:
        connection.execute("ALTER TABLE casting REPLICA IDENTITY FULL")
    spec = spec_from(
        {
            "name": "bench",
            "source": {
                "url": f"postgresql://{parts.username}@{parts.hostname}:{parts.port}/bench",
                "password": "${env:BENCH_SOURCE_PASSWORD}",
            },
            "tables": {"public.movie": {"sinks": {"search": {"index": "movie"}}}, "public.casting": {}},
            "sinks": {"search": {"url": search.url}},
        },
        "benchmark",
    )
    home = folder / "bench"
    home.mkdir()
    (home / "processor.py").write_text(PROCESSOR)
    (home / "pipeline.yaml").write_text(dump_spec(spec))
    command = [sys.executable, "-m", "deltactl.main", "--dir", str(folder), "run", "bench"]
    try:
        return bench.run(command, {"BENCH_SOURCE_PASSWORD": parts.password or ""}, home / "run.log", rounds)
    finally:
        bench.close()


def pgsync(
    source: PostgreSQL, search: OpenSearch, bin_: Path, folder: Path, movies: int, rounds: int
) -> dict[str, Any]:
    bench = Bench(source, search, "pgs", "pgs_movie", movies)
    home = folder / "pgsync"
    home.mkdir()
    (home / "schema.json").write_text(json.dumps(PGSYNC_SCHEMA))
    parts = urlsplit(source.url)
    with Redis() as queue:
        cache = urlsplit(queue.url)
        environment = {
            "PG_HOST": parts.hostname or "",
            "PG_PORT": str(parts.port),
            "PG_USER": parts.username or "",
            "PG_PASSWORD": parts.password or "",
            "OPENSEARCH": "true",
            "ELASTICSEARCH": "false",
            "ELASTICSEARCH_URL": search.url.rstrip("/"),
            "ELASTICSEARCH_USE_SSL": "false",
            "ELASTICSEARCH_VERIFY_CERTS": "false",
            "ELASTICSEARCH_TIMEOUT": "60",
            "REDIS_HOST": cache.hostname or "",
            "REDIS_PORT": str(cache.port),
            "CHECKPOINT_PATH": str(home),
            "CONSOLE_LOGGING_HANDLER_MIN_LEVEL": "WARNING",
            "GENERAL_LOGGING_LEVEL": "WARNING",
        }
        config = ["-c", str(home / "schema.json")]
        subprocess.run(
            [str(bin_ / "bootstrap"), *config], env={**os.environ, **environment}, cwd=home, check=True, timeout=600
        )
        try:
            return bench.run([str(bin_ / "pgsync"), *config, "-d"], environment, home / "run.log", rounds)
        finally:
            bench.close()


def main() -> None:
    """Run it and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pgsync", type=Path)
    parser.add_argument("--postgresql", type=Path)
    parser.add_argument("--movies", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with scratch() as name, PostgreSQL(bin_dir=options.postgresql) as source, OpenSearch(lasts=True) as search:
        figures: dict[str, Any] = {"documents": options.movies, "children": CHILDREN}
        if options.pgsync is not None:
            bin_ = options.pgsync.resolve() / "bin"
            figures["pgsync"] = pgsync(source, search, bin_, Path(name), options.movies, options.rounds)
        figures["delta"] = delta(source, search, Path(name), options.movies, options.rounds)
        if options.pgsync is not None:
            figures["ratios"] = {
                stage: {what: figures["delta"][stage][what] / found for what, found in figures["pgsync"][stage].items()}
                for stage in ("load", "streaming")
            }
        report("documents", figures)


if __name__ == "__main__":
    main()
