"""The Redis sink keeps the contract: as JSON and as hashes, with and without expiry, alone and as a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import orjson
import pytest

from delta_sync.sinks.redis import RedisOptions, RedisSink, RedisTargetOptions
from delta_sync.sinks.redis_scripts import JSON
from delta_sync.testing.contract import MOVIE, AnySink, SecondStep, SinkContract, storm
from delta_sync.testing.processes import free_port
from delta_sync.testing.servers import Redis
from delta_sync.values import Document, to_json


class RedisContract(SinkContract):
    """The contract, with a store that is not there."""

    second_step: ClassVar[SecondStep | None] = None  # one call of a script compares and writes

    @pytest.fixture
    def unreachable(self) -> Iterator[AnySink]:
        sink = RedisSink("cache", f"redis://127.0.0.1:{free_port()}/0", RedisOptions(), 3600)
        yield sink
        sink.close()


class TestJson(RedisContract):
    storm_seeds = range(30)

    @pytest.fixture
    def sink(self, redis_server: Redis) -> Iterator[AnySink]:
        sink = RedisSink("cache", redis_server.url, RedisOptions(), 3600)
        yield sink
        sink.close()


class TestJsonWithExpiry(RedisContract):
    """Documents that live for a minute, beside which a version is kept for an hour."""

    @pytest.fixture
    def sink(self, redis_server: Redis) -> Iterator[AnySink]:
        sink = RedisSink("cache", redis_server.url, RedisOptions(ttl=60, prefix="app:"), 3600)
        yield sink
        sink.close()


def hash_form(document: Document) -> dict[str, Any]:
    """Return what a hash holds of a document."""
    form: dict[str, Any] = {}
    for name, value in orjson.loads(to_json(document)).items():
        if isinstance(value, str):
            form[name] = value
        elif value is not None:
            form[name] = to_json(document[name]).decode()
    return form


class TestHash(RedisContract):
    @pytest.fixture
    def sink(self, redis_server: Redis) -> Iterator[AnySink]:
        sink = RedisSink("cache", redis_server.url, RedisOptions(format="hash"), 3600)
        yield sink
        sink.close()

    def stored_form(self, document: Document) -> dict[str, Any]:
        return hash_form(document)


# A script cannot see the floor, which is in another slot.
CLUSTERS_SECOND_STEP = SecondStep("_floor", frozenset({"floor"}), looks_first=True)


class TestCluster(RedisContract):
    second_step = CLUSTERS_SECOND_STEP

    @pytest.fixture
    def sink(self, redis_cluster: Redis) -> Iterator[AnySink]:
        sink = RedisSink("cache", redis_cluster.url, RedisOptions(), 3600)
        yield sink
        sink.close()


class TestClusterHash(RedisContract):
    second_step = CLUSTERS_SECOND_STEP
    storm_seeds = range(3)  # what differs from the two above is covered by the rest

    @pytest.fixture
    def sink(self, redis_cluster: Redis) -> Iterator[AnySink]:
        sink = RedisSink("cache", redis_cluster.url, RedisOptions(format="hash", ttl=60), 3600)
        yield sink
        sink.close()

    def stored_form(self, document: Document) -> dict[str, Any]:
        return hash_form(document)


@pytest.mark.parametrize(
    ("line", "without", "truncate"),
    [
        ("version < floor or version < current", "version < floor", False),
        ("version < floor or version < current", "version < current", True),
        ("redis.call('SET', tombstone, version, 'PX', tombstone_ms)", "", False),
        ("and redis.call('EXISTS', unpack(KEYS, first + 1)) == 0", "", False),
    ],
    ids=["versions", "floor", "tombstones", "what is there"],
)
def test_storms_find_a_script_that_breaks_the_rule(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch, line: str, without: str, truncate: bool
) -> None:
    assert line in JSON.write
    broken = JSON._replace(write=JSON.write.replace(line, without))
    monkeypatch.setattr("delta_sync.sinks.redis.JSON", broken)
    sink = RedisSink("cache", redis_server.url, RedisOptions(), 3600)
    target = sink.target(MOVIE, RedisTargetOptions())

    def storms() -> None:
        for seed in range(20):
            storm(SinkContract(), sink, target, seed, truncate=truncate)

    with pytest.raises(AssertionError, match=r"seed \d+"):
        storms()
    sink.drop(target)
    sink.close()
