"""A shop with its pipeline, for each test its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from acceptance.harness import Pipeline, Scene, Shop, Source, Stage
from delta_sync.testing.servers import MongoStandIn, OpenSearch, PostgreSQL, Redis

LINES = 60  # of a log's end

_numbers = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show how the logs end of all that a failed test has run."""
    report = yield
    folder: Path | None = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        for log in sorted(folder.rglob("*.log")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            report.sections.append((f"{log.name} ends", "\n".join(lines[-LINES:])))
    return report


@pytest.fixture
def scene(postgresql: PostgreSQL, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    """Return a function that makes a scene with so many rows in each table, and with these sinks."""
    with contextlib.ExitStack() as exits:

        def make(rows: int, sinks: tuple[str, ...] = ("cache",), **options: Any) -> Scene:
            name = _database(postgresql, exits)
            shop = Shop(postgresql.url_of(name), name)
            shop.create(rows)
            urls = {sink: _url(request, sink, name, exits) for sink in sinks}
            pipeline = Pipeline(shop, tmp_path, urls, name, **options)
            if "docs" in sinks:
                # MongoDB's stand-in loses its way among ids that are documents, after some deletes ("No document with
                # key"): it orders them by their serialized form, in which equal ones differ.
                pipeline.leave_out("docs", "item")
            return Scene(shop, pipeline, exits)

        yield make


@pytest.fixture
def stage(postgresql: PostgreSQL, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """Return a function that makes a stage: these tables, made by this SQL in a schema of their own, with these sinks.

    Every row is its own document, unless `processor` has another body for the function that makes one of a `row`;
    None: what `deltactl pipeline create` writes. `before_create` is called with the name of the database.
    """
    with contextlib.ExitStack() as exits:

        def make(
            setup: str,
            tables: Sequence[str],
            sinks: tuple[str, ...] = ("cache",),
            *,
            processor: str | None = "return dict(row)",
            schema: str | None = None,
            server: PostgreSQL = postgresql,
            before_create: Callable[[str], None] = lambda database: None,
            **options: Any,
        ) -> Stage:
            name = _database(server, exits)
            before_create(name)
            source = Source(server.url_of(name), schema or name)
            source.execute(f"CREATE SCHEMA IF NOT EXISTS {source.schema}", setup)
            urls = {sink: _url(request, sink, name, exits) for sink in sinks}
            pipeline = Pipeline(source, tmp_path, urls, name, tables, **options)
            if processor is not None:
                pipeline.write_processor(processor)
            return Stage(pipeline, exits)

        yield make


def _database(postgresql: PostgreSQL, exits: contextlib.ExitStack) -> str:
    """Create a database and return its name; it is dropped at the end, with all that would prevent that."""
    name = f"shop_{next(_numbers)}"
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")

    def drop() -> None:
        postgresql.start()
        with psycopg.connect(postgresql.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(active_pid, 60000) FROM pg_replication_slots"
                " WHERE database = %s AND active",
                [name],
            )
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
            )
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    exits.callback(drop)
    return name


def _url(request: pytest.FixtureRequest, sink: str, name: str, exits: contextlib.ExitStack) -> str:
    match sink:
        case "cache" | "hash":
            server: Redis = request.getfixturevalue("redis_server")
            exits.callback(_empty, server)
            # In another database, where no other sink of the same pipeline is.
            return server.url if sink == "cache" else server.url.rstrip("/").removesuffix("/0") + "/1"
        case "docs":
            mongodb: MongoStandIn = request.getfixturevalue("mongodb")
            return f"{mongodb.url}{name}"
        case "warehouse":
            postgresql: PostgreSQL = request.getfixturevalue("postgresql")
            return postgresql.url_of(name)  # the source's tables are in a schema of their own
        case _:
            search: OpenSearch = request.getfixturevalue("opensearch")
            return search.url


def _empty(server: Redis) -> None:
    """Forget what a test wrote: a run whose state is new reads all keys, and 200,000 tombstones cost each of them."""
    server.start()
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
