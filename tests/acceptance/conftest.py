"""A shop with its pipeline, for each test its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from acceptance.harness import Pipeline, Scene, Shop
from delta_sync.testing.servers import MongoStandIn, OpenSearch, PostgreSQL, Redis

_numbers = itertools.count(1)


@pytest.fixture
def scene(postgresql: PostgreSQL, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    """Return a function that makes a scene with so many rows in each table, and with these sinks."""
    with contextlib.ExitStack() as exits:

        def make(rows: int, sinks: tuple[str, ...] = ("cache",), **options: Any) -> Scene:
            number = next(_numbers)
            name = f"shop_{number}"
            with psycopg.connect(postgresql.url, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")

            def drop() -> None:
                postgresql.start()
                with psycopg.connect(postgresql.url, autocommit=True) as connection:
                    connection.execute(
                        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                        " WHERE database = %s AND active",
                        [name],
                    )
                    connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
                    connection.execute(
                        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s",
                        [name],
                    )
                    connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

            exits.callback(drop)
            shop = Shop(postgresql.url_of(name), name)
            shop.create(rows)
            urls = {sink: _url(request, sink, name) for sink in sinks}
            return Scene(Pipeline(shop, tmp_path, urls, name, **options), exits)

        yield make


def _url(request: pytest.FixtureRequest, sink: str, name: str) -> str:
    match sink:
        case "cache":
            redis: Redis = request.getfixturevalue("redis_server")
            return redis.url
        case "docs":
            mongodb: MongoStandIn = request.getfixturevalue("mongodb")
            return f"{mongodb.url}{name}"
        case _:
            search: OpenSearch = request.getfixturevalue("opensearch")
            return search.url
