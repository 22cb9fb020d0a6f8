"""Names of topics, and what is not as it should be."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from delta_sync.errors import CheckFailed
from delta_sync.kafka.topics import Cluster, Topic, differences, message_topic, plan, topic_name
from delta_sync.spec import KafkaSpec, RegistrySpec

SPEC = KafkaSpec(bootstrap_servers="one:9092", registry=RegistrySpec(url="http://registry:8080"))
SAFE = {"auto.create.topics.enable": "false", "offsets.topic.replication.factor": "3"}
[MOVIE, HEARTBEATS] = plan(SPEC, "delta.movies", ["public.movie"])


def spec(**changes: Any) -> KafkaSpec:
    return SPEC.model_copy(update=changes)


def cluster(
    brokers: int = 3, settings: Mapping[str, str] = SAFE, changes: Mapping[str, str] = MappingProxyType({})
) -> Cluster:
    movie = MOVIE._replace(settings={**MOVIE.settings, **changes})
    return Cluster(brokers, settings, {MOVIE.name: movie})


@pytest.mark.parametrize(
    ("table", "topic"),
    [
        ("public.movie", "delta.public.movie"),
        ("public.Movie-2_x", "delta.public.Movie-2_x"),
        ("public.my table", "delta.public.my_table"),
        ("public.größe", "delta.public.gr__e"),
        ("public.🎬", "delta.public.__"),  # two units of UTF-16
        ("public." + "x" * 300, ("delta.public." + "x" * 300)[:249]),
    ],
)
def test_topics_are_called_as_debezium_calls_them(table: str, topic: str) -> None:
    assert topic_name("delta", table) == topic


def test_a_plan_has_a_topic_for_each_table_and_one_for_heartbeats() -> None:
    topics = plan(spec(partitions=4), "delta.movies", ["public.movie", "public.studio"])
    assert [(topic.name, topic.partitions) for topic in topics] == [
        ("delta.movies.public.movie", 4),
        ("delta.movies.public.studio", 4),
        ("delta.movies.message", 1),
    ]
    assert all(topic.replication_factor == 3 for topic in topics)
    assert topics[0].settings["retention.ms"] == str(5 * 86_400_000)
    assert topics[0].settings["unclean.leader.election.enable"] == "false"
    assert topics[-1].name == message_topic("delta.movies")


def test_tables_that_would_share_a_topic_are_refused() -> None:
    with pytest.raises(CheckFailed, match=r"public\.a b and public\.a_b would share topic delta\.public\.a_b"):
        plan(SPEC, "delta", ["public.a b", "public.a_b"])


def test_what_is_as_planned_is_no_problem() -> None:
    assert differences(SPEC, [MOVIE, HEARTBEATS], cluster()) == []
    assert differences(SPEC, [MOVIE, HEARTBEATS], Cluster(3, SAFE, {})) == []


@pytest.mark.parametrize(
    ("name", "value", "fatal", "fatal_when_unsafe"),
    [
        ("cleanup.policy", "compact", True, True),
        ("cleanup.policy", "compact,delete", True, True),
        ("unclean.leader.election.enable", "true", True, False),
        ("min.insync.replicas", "1", True, False),
        ("retention.ms", "-1", True, True),
        ("retention.ms", str(30 * 86_400_000), True, True),
        ("retention.ms", "3600000", True, False),
        ("retention.bytes", "1000000", True, False),
        ("max.message.bytes", "1048588", True, True),
    ],
)
def test_a_setting_that_differs_is_named_with_what_to_type(
    name: str, value: str, fatal: bool, fatal_when_unsafe: bool
) -> None:
    found = cluster(changes={name: value})
    [problem] = differences(SPEC, [MOVIE, HEARTBEATS], found)
    assert problem.where == f"topic {MOVIE.name}"
    assert problem.what.startswith(f"{name} is {value}, not {MOVIE.settings[name]}: ")
    assert problem.fix == (
        f"kafka-configs.sh --bootstrap-server one:9092 --alter --entity-type topics --entity-name {MOVIE.name}"
        f" --add-config {name}={MOVIE.settings[name]}"
    )
    assert problem.fatal is fatal
    [problem] = differences(spec(allow_unsafe=True), [MOVIE], found)
    assert problem.fatal is fatal_when_unsafe


def test_partitions_and_copies_are_compared() -> None:
    few: Topic = MOVIE._replace(partitions=2, replication_factor=1)
    partitions, copies = differences(SPEC, [MOVIE], Cluster(3, SAFE, {MOVIE.name: few}))
    assert (partitions.fatal, copies.fatal) == (False, True)
    assert partitions.fix.endswith(f"--alter --topic {MOVIE.name} --partitions 6")
    more = MOVIE._replace(partitions=12, replication_factor=5)
    assert differences(SPEC, [MOVIE], Cluster(3, SAFE, {MOVIE.name: more})) == []


def test_the_cluster_is_looked_at() -> None:
    [few] = differences(SPEC, [MOVIE], cluster(brokers=2))
    assert "3 copies of a record need as many brokers, and 2 are alive" in few.what
    assert few.fatal
    [automatic] = differences(SPEC, [MOVIE], cluster(settings={**SAFE, "auto.create.topics.enable": "true"}))
    assert not automatic.fatal
    [positions] = differences(SPEC, [MOVIE], cluster(settings={**SAFE, "offsets.topic.replication.factor": "1"}))
    assert positions.fatal


def test_one_copy_has_to_be_asked_for() -> None:
    alone = spec(replication_factor=1, min_insync_replicas=1)
    [problem] = differences(alone, [], Cluster(1, {**SAFE, "offsets.topic.replication.factor": "1"}, {}))
    assert "lost with that broker's disk" in problem.what
    assert problem.fatal
    [problem] = differences(alone.model_copy(update={"allow_unsafe": True}), [], Cluster(1, SAFE, {}))
    assert not problem.fatal


def test_no_broker_may_be_down_is_said() -> None:
    [problem] = differences(spec(replication_factor=3, min_insync_replicas=3), [], Cluster(3, SAFE, {}))
    assert "while one broker is down" in problem.what
    assert not problem.fatal
