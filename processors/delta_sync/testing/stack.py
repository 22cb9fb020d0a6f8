"""Pytest fixtures for real servers. In your `conftest.py`:

    pytest_plugins = ["delta_sync.testing.stack"]

    def test_it(postgresql, redis_server):
        psycopg.connect(postgresql.url)

Each server is started when a test first asks for it, and serves the whole session: use names of your own in it. A test
may kill, freeze or stop one; it runs again before the next test.

`DELTA_TEST_SERVICES` chooses what the servers are: `native` (the default): processes of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

import pytest

from delta_sync.testing.servers import MongoStandIn, OpenSearch, PostgreSQL, Redis, Server

if TYPE_CHECKING:  # they need packages that not everybody who tests has: each is imported when it is asked for
    from delta_sync.testing.kafka import Kafka, KafkaCluster
    from delta_sync.testing.mariadb import MariaDB
    from delta_sync.testing.registry import Apicurio

__all__ = [
    "kafka",
    "kafka_cluster",
    "mariadb",
    "mongodb",
    "opensearch",
    "postgresql",
    "redis_cluster",
    "redis_server",
    "registry",
]

SERVICES_VARIABLE = "DELTA_TEST_SERVICES"

ServerT = TypeVar("ServerT", bound=Server)


class Stack:
    """The servers that this session has started."""

    def __init__(self, services: str) -> None:
        if services != "native":
            raise pytest.UsageError(f"{SERVICES_VARIABLE} is {services!r}; it can be native")
        self._exits = ExitStack()
        self._started: list[Server] = []

    def start(self, make: Callable[[], ServerT]) -> ServerT:
        """Start a server that lives until the session ends."""
        server = make()
        self._exits.enter_context(server)
        self._started.append(server)
        return server

    def repair(self) -> None:
        """Start again what a test left dead or frozen."""
        for server in self._started:
            server.start()

    def close(self) -> None:
        self._exits.close()


_STACK = pytest.StashKey[Stack]()


@pytest.fixture(scope="session")
def server_stack(pytestconfig: pytest.Config) -> Iterator[Stack]:
    """All servers of the session."""
    stack = Stack(os.environ.get(SERVICES_VARIABLE, "native"))
    pytestconfig.stash[_STACK] = stack
    yield stack
    del pytestconfig.stash[_STACK]
    stack.close()


@pytest.hookimpl(tryfirst=True)  # so that fixtures which clean up after the test find the servers running
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Start again what the test left dead or frozen."""
    stack = item.config.stash.get(_STACK, None)
    if stack is not None:
        stack.repair()


@pytest.fixture(scope="session")
def postgresql(server_stack: Stack) -> PostgreSQL:
    """PostgreSQL with `wal_level=logical`."""
    return server_stack.start(PostgreSQL)


@pytest.fixture(scope="session")
def mariadb(server_stack: Stack) -> MariaDB:
    """MariaDB with a row-based binary log."""
    from delta_sync.testing.mariadb import MariaDB

    return server_stack.start(MariaDB)


@pytest.fixture(scope="session")
def redis_server(server_stack: Stack) -> Redis:
    """Redis with an append-only file."""
    return server_stack.start(Redis)


@pytest.fixture(scope="session")
def redis_cluster(server_stack: Stack) -> Redis:
    """A Redis cluster of one node."""
    return server_stack.start(lambda: Redis(cluster=True))


@pytest.fixture(scope="session")
def mongodb(server_stack: Stack) -> MongoStandIn:
    """A stand-in for MongoDB."""
    return server_stack.start(MongoStandIn)


@pytest.fixture(scope="session")
def opensearch(server_stack: Stack) -> OpenSearch:
    """OpenSearch, one node."""
    return server_stack.start(OpenSearch)


@pytest.fixture(scope="session")
def registry(server_stack: Stack) -> Apicurio:
    """Apicurio Registry."""
    from delta_sync.testing.registry import Apicurio

    return server_stack.start(Apicurio)


@pytest.fixture(scope="session")
def kafka(server_stack: Stack) -> Kafka:
    """Kafka, one broker."""
    from delta_sync.testing.kafka import Kafka

    return server_stack.start(Kafka)


@pytest.fixture(scope="session")
def kafka_cluster(server_stack: Stack) -> KafkaCluster:
    """Kafka, three brokers. They take a GB of memory: for what one broker cannot show."""
    from delta_sync.testing.kafka import KafkaCluster

    return server_stack.start(KafkaCluster)
