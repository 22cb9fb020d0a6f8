"""Topics on real clusters: made as wanted, found as made; and found to be others than before."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any, Literal

import confluent_kafka
import pytest
from kafka import TopicPartition
from kafka.structs import OffsetAndMetadata

from delta_sync.errors import CheckFailed
from delta_sync.kafka import settings
from delta_sync.kafka.capture import KafkaCapture
from delta_sync.kafka.clients import open_group
from delta_sync.kafka.consumer import KafkaBusy, Partition
from delta_sync.kafka.names import group_id
from delta_sync.kafka.offsets import GroupOffsets
from delta_sync.kafka.topic_ids import SeenTopics, TopicStore, look_at_topics
from delta_sync.kafka.topics import Topic, create_topics, delete_topics, differences, read_cluster, wanted_topics
from delta_sync.progress import LogPosition, Progress
from delta_sync.spec import KafkaSpec, PipelineSpec, spec_from
from delta_sync.state import StateStore
from delta_sync.testing.kafka import Kafka, KafkaCluster, admin_client

TURNS_MOST = 600  # of a tenth of a second: minutes, on a machine where it takes seconds


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


@pytest.mark.parametrize("client", ["kafka-python", "confluent-kafka"])
def test_a_topic_that_was_made_anew_is_read_from_its_beginning(
    kafka: Kafka, tmp_path: Path, client: Literal["kafka-python", "confluent-kafka"]
) -> None:
    """Though a position is committed, of the old one, that lies within the new one."""
    small = {"replication_factor": 1, "min_insync_replicas": 1, "partitions": 1, "allow_unsafe": True}
    spec, kafka_spec, wanted = spec_of(kafka.url, client=client, **small)
    topic = wanted[0]
    at = Partition(topic.name, 0)
    create_topics(kafka_spec, [topic])
    lost: list[tuple[list[Partition], str]] = []
    got: list[int] = []

    with contextlib.ExitStack() as exits:
        state = exits.enter_context(StateStore.open("sqlite:///state.db", tmp_path))
        store = TopicStore(state, spec.name)
        options = settings.kafka_python(kafka_spec)
        offsets = GroupOffsets(lambda: options, group_id(spec.name), [topic.name])
        exits.callback(offsets.close)

        def look() -> SeenTopics:
            return look_at_topics(store, offsets.topic_ids)

        capture = KafkaCapture(
            lambda: open_group(kafka_spec, group_id(spec.name)),
            [topic.name],
            Progress(LogPosition(time.monotonic), time.monotonic),
            lambda partitions, why: lost.append((sorted(partitions), why)),
            look,
            store.replace,
        )
        exits.callback(capture.stop)

        def read_until(last: int) -> None:
            for _ in range(TURNS_MOST):
                batch = capture.poll(0.1)
                if batch is not None:
                    got.extend(int(value) for records in batch.payload for value in records.values)
                    capture.confirm(batch)
                if last in got:
                    return
            raise AssertionError(f"{last} does not come; {got}")

        capture.start()
        first = store.saved()
        assert first.keys() == {at}
        produce(kafka, topic.name, range(10))
        read_until(9)
        capture.stop()
        assert offsets.committed() == {at: 10}

        assert delete_topics(kafka_spec, [topic.name]) == [topic.name]
        make_again(kafka_spec, topic)
        produce(kafka, topic.name, range(100, 130))
        with admin_client(kafka.url) as admin:  # as a worker does that has not noticed
            admin.alter_group_offsets(group_id(spec.name), {TopicPartition(*at): OffsetAndMetadata(10, "", -1)})
        got.clear()
        capture.start()
        read_until(129)
        assert got == list(range(110, 130))  # so it is lost, unless somebody looks
        assert lost == []

        capture.topics_seen(look())
        got.clear()
        read_until(129)
        assert got == list(range(100, 130))
        assert lost == [([at], "its topic was made anew")]
        assert store.saved().keys() == {at}
        assert store.saved() != first
        capture.topics_seen(look())
        produce(kafka, topic.name, range(130, 131))
        read_until(130)
        capture.stop()
        assert len(lost) == 1
        assert offsets.committed() == {at: 31}


def produce(server: Kafka, topic: str, numbers: range) -> None:
    producer = confluent_kafka.Producer({"bootstrap.servers": server.url})
    for number in numbers:
        producer.produce(topic, str(number).encode(), partition=0)
    assert producer.flush(60) == 0


def make_again(kafka: KafkaSpec, topic: Topic) -> None:
    """Make a topic that has just been deleted, which takes a moment."""
    for _ in range(TURNS_MOST):
        if create_topics(kafka, [topic]):
            return
    raise AssertionError(f"{topic.name} is not gone")
