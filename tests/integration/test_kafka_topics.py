"""Topics on real clusters: made as wanted, found as made."""

from __future__ import annotations

import random
from typing import Any

import pytest

from delta_sync.errors import CheckFailed
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.kafka.topics import Topic, create_topics, delete_topics, differences, read_cluster, wanted_topics
from delta_sync.spec import KafkaSpec, PipelineSpec, spec_from
from delta_sync.testing.kafka import Kafka, KafkaCluster, admin_client


def spec_of(url: str, **kafka: Any) -> tuple[PipelineSpec, KafkaSpec, list[Topic]]:
    spec = spec_from(
        {
            "name": f"t{random.SystemRandom().randrange(1 << 32)}",
            "source": {"url": "postgresql://delta@db/studio"},
            "tables": {"public.movie": None, "public.my table": None},
            "sinks": {"cache": {"url": "redis://cache/0"}},
            "transport": "kafka",
            "kafka": {"bootstrap_servers": url, "registry": {"url": "http://registry"}, **kafka},
        },
        "test",
    )
    assert spec.kafka is not None
    return spec, spec.kafka, wanted_topics(spec)


def names(topics: list[Topic]) -> list[str]:
    return [topic.name for topic in topics]


def test_one_broker(kafka: Kafka) -> None:
    spec, settings, wanted = spec_of(
        kafka.url, replication_factor=1, min_insync_replicas=1, partitions=3, allow_unsafe=True
    )
    assert read_cluster(settings, names(wanted)).topics == {}
    assert create_topics(settings, wanted) == names(wanted)
    assert create_topics(settings, wanted) == []
    cluster = read_cluster(settings, names(wanted))
    assert cluster.brokers == 1
    for topic in wanted:
        there = cluster.topics[topic.name]
        assert there._replace(configs={name: there.configs[name] for name in topic.configs}) == topic
    assert not any(problem.fatal for problem in differences(spec, cluster))
    assert delete_topics(settings, names(wanted)) == sorted(names(wanted))
    assert read_cluster(settings, names(wanted)).topics == {}


def test_what_somebody_changed_is_found(kafka: Kafka) -> None:
    spec, settings, wanted = spec_of(kafka.url, replication_factor=1, min_insync_replicas=1)
    with admin_client(kafka.url) as admin:
        configs = {**wanted[0].configs, "cleanup.policy": "compact", "retention.ms": "1000"}
        admin.create_topics({wanted[0].name: {"num_partitions": 6, "configs": configs}}, wait_for_metadata=True)
    found = "; ".join(map(str, differences(spec, read_cluster(settings, names(wanted)))))
    assert "cleanup.policy is compact" in found
    assert "retention.ms is 1000" in found


def test_more_copies_than_brokers_are_refused(kafka: Kafka) -> None:
    spec, settings, wanted = spec_of(kafka.url)
    assert any(problem.fatal for problem in differences(spec, read_cluster(settings, names(wanted))))
    with pytest.raises(CheckFailed, match="kafka: "):
        create_topics(settings, wanted)


def test_three_brokers(kafka_cluster: KafkaCluster) -> None:
    spec, settings, wanted = spec_of(kafka_cluster.url)
    assert len(create_topics(settings, wanted)) == 3
    cluster = read_cluster(settings, names(wanted))
    assert cluster.brokers == 3
    assert differences(spec, cluster) == []


def test_a_cluster_that_is_not_there_is_transient() -> None:
    _, settings, wanted = spec_of("127.0.0.1:1")
    with pytest.raises(KafkaBusy, match=r"127\.0\.0\.1:1 does not answer"):
        read_cluster(settings, names(wanted))
