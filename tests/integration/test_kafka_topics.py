"""Topics on real clusters: made as planned, found as made."""

from __future__ import annotations

import random

import pytest

from delta_sync.errors import CheckFailed
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.kafka.topics import create_topics, differences, plan, read_cluster
from delta_sync.spec import KafkaSpec, RegistrySpec
from delta_sync.testing.kafka import Kafka, KafkaCluster, admin_client
from delta_sync.testing.processes import wait_until

WAIT_S = 120.0  # a killed broker counts as alive for some seconds
REGISTRY = RegistrySpec(url="http://127.0.0.1:1")


def new_prefix() -> str:
    return f"delta.t{random.SystemRandom().randrange(1 << 32)}"


def test_one_broker_has_what_was_planned(kafka: Kafka) -> None:
    spec = KafkaSpec(
        bootstrap_servers=kafka.url,
        registry=REGISTRY,
        replication_factor=1,
        min_insync_replicas=1,
        partitions=3,
        allow_unsafe=True,
    )
    desired = plan(spec, new_prefix(), ["public.movie", "public.my table"])
    assert read_cluster(spec, desired).topics == {}
    assert create_topics(spec, desired) == [topic.name for topic in desired]
    assert create_topics(spec, desired) == []
    found = read_cluster(spec, desired)
    assert found.brokers == 1
    assert [
        (found.topics[topic.name].partitions, found.topics[topic.name].replication_factor) for topic in desired
    ] == [
        (3, 1),
        (3, 1),
        (1, 1),
    ]
    assert not any(problem.fatal for problem in differences(spec, desired, found))
    with admin_client(kafka.url) as admin:
        admin.create_topics(
            {f"{desired[0].name}.other": {"num_partitions": 1, "configs": {"cleanup.policy": "compact"}}},
            wait_for_metadata=True,
        )
    other = desired[0]._replace(name=f"{desired[0].name}.other")
    assert "cleanup.policy is compact" in "; ".join(map(str, differences(spec, [other], read_cluster(spec, [other]))))


def test_more_copies_than_brokers_are_refused(kafka: Kafka) -> None:
    spec = KafkaSpec(bootstrap_servers=kafka.url, registry=REGISTRY)
    desired = plan(spec, new_prefix(), ["public.movie"])
    assert any(problem.fatal for problem in differences(spec, desired, read_cluster(spec, desired)))
    with pytest.raises(CheckFailed, match="kafka: "):
        create_topics(spec, desired)


def test_three_brokers_have_what_was_planned(kafka_cluster: KafkaCluster) -> None:
    spec = KafkaSpec(bootstrap_servers=kafka_cluster.url, registry=REGISTRY)
    desired = plan(spec, new_prefix(), ["public.movie"])
    assert len(create_topics(spec, desired)) == 2
    found = read_cluster(spec, desired)
    assert found.brokers == 3
    assert differences(spec, desired, found) == []
    kafka_cluster.nodes[2].kill()

    def alive() -> int:
        try:
            return read_cluster(spec, desired).brokers
        except KafkaBusy:  # it asked the one that is gone
            return 3

    wait_until(lambda: alive() == 2, WAIT_S, "the end of a broker")
    [problem] = differences(spec, desired, read_cluster(spec, desired))
    assert "2 are alive" in problem.what
    assert create_topics(spec, desired) == []
