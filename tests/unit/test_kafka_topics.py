"""Topics: what they are to be like, and what is said of those that are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from delta_sync.errors import Problem, UsageError
from delta_sync.kafka.topics import Cluster, Topic, differences, wanted_topics
from delta_sync.spec import PipelineSpec, spec_from

MOVIES = "delta_movies.public.movie"
HEARTBEATS = "delta_movies.message"


def spec_of(*tables: str, **kafka: Any) -> PipelineSpec:
    given = {"bootstrap_servers": "kafka:9092", "registry": {"url": "http://registry"}, **kafka}
    data = {
        "name": "movies",
        "source": {"url": "postgresql://delta@db/studio"},
        "tables": dict.fromkeys(tables or ("public.movie",)),
        "sinks": {"cache": {"url": "redis://cache/0"}},
        "transport": "kafka",
        "kafka": given,
    }
    return spec_from(data, "test")


def sound(spec: PipelineSpec, brokers: int = 3, settings: Mapping[str, str] | None = None) -> Cluster:
    return Cluster(brokers, {topic.name: topic for topic in wanted_topics(spec)}, settings or {})


def changed(cluster: Cluster, **fields: Any) -> Cluster:
    topic = cluster.topics[MOVIES]
    configs = {**topic.configs, **fields.pop("configs", {})}
    return cluster._replace(topics={**cluster.topics, MOVIES: topic._replace(configs=configs, **fields)})


def one(found: list[Problem]) -> Problem:
    (problem,) = found
    return problem


def test_a_topic_for_each_table_and_one_for_heartbeats() -> None:
    topics = {topic.name: topic for topic in wanted_topics(spec_of(partitions=12, retention="2d"))}
    assert set(topics) == {MOVIES, HEARTBEATS}
    assert (topics[MOVIES].partitions, topics[HEARTBEATS].partitions) == (12, 1)
    for topic in topics.values():
        assert topic.replication_factor == 3
        assert topic.configs["min.insync.replicas"] == "2"
        assert topic.configs["unclean.leader.election.enable"] == "false"
        assert topic.configs["retention.ms"] == str(2 * 86_400_000)


def test_two_tables_must_not_share_a_topic() -> None:
    with pytest.raises(UsageError, match=r"public\.mövie and public\.m_vie would both have the topic"):
        wanted_topics(spec_of("public.mövie", "public.m_vie"))


def test_a_sound_cluster() -> None:
    spec = spec_of()
    assert differences(spec, sound(spec)) == []
    assert differences(spec, Cluster(3, {}, {})) == []  # topics are yet to be made


@pytest.mark.parametrize(
    ("configs", "what"),
    [
        ({"min.insync.replicas": "1"}, "min.insync.replicas is 1 instead of 2"),
        ({"unclean.leader.election.enable": "true"}, "a broker that lacks changes may take over"),
        ({"cleanup.policy": "compact"}, "cleanup.policy is compact"),
        ({"retention.ms": "3600000"}, "retention.ms is 3600000"),
        ({"retention.ms": "-1"}, "could bring deleted rows back"),
        ({"retention.bytes": "1000000"}, "a limit by size"),
        ({"max.message.bytes": "1048588"}, "a large row would end the connector"),
    ],
)
@pytest.mark.parametrize("allow_unsafe", [False, True])
def test_a_topic_that_could_lose_something(configs: dict[str, str], what: str, allow_unsafe: bool) -> None:
    spec = spec_of(allow_unsafe=allow_unsafe)
    problem = one(differences(spec, changed(sound(spec), configs=configs)))
    assert problem.where == f"topic {MOVIES}"
    assert what in problem.what
    assert problem.fix.startswith("type: kafka-configs.sh --alter")
    assert problem.fatal is not allow_unsafe


def test_more_than_is_needed_is_fine() -> None:
    spec = spec_of()
    configs = {"min.insync.replicas": "3", "max.message.bytes": str(64 << 20)}
    assert differences(spec, changed(sound(spec), configs=configs, partitions=64, replication_factor=5)) == []


def test_too_few_copies_or_partitions_of_a_topic() -> None:
    spec = spec_of()
    problem = one(differences(spec, changed(sound(spec), replication_factor=2)))
    assert problem.fatal
    assert "replication factor 2 instead of 3" in problem.what
    problem = one(differences(spec, changed(sound(spec), partitions=2)))
    assert not problem.fatal
    assert "--partitions 6" in problem.fix


def test_too_few_brokers() -> None:
    spec = spec_of()
    problem = one(differences(spec, sound(spec, brokers=1)))
    assert problem.fatal
    assert "1 broker, and replication_factor is 3" in problem.what


def test_what_is_lost_with_fewer_copies_is_said_and_has_to_be_accepted() -> None:
    for allow_unsafe in (False, True):
        spec = spec_of(replication_factor=1, min_insync_replicas=1, allow_unsafe=allow_unsafe)
        found = differences(spec, sound(spec, brokers=1))
        assert [problem.fatal for problem in found] == [not allow_unsafe] * 2
        assert "the loss of one broker loses changes" in found[0].what
        assert "--allow-unsafe" in found[0].fix
    spec = spec_of(replication_factor=2, allow_unsafe=True)
    assert "two brokers may lose" in one(differences(spec, sound(spec, brokers=2))).what


def test_brokers_that_make_topics_by_themselves() -> None:
    spec = spec_of()
    problem = one(differences(spec, sound(spec, settings={"auto.create.topics.enable": "true"})))
    assert not problem.fatal
    assert "unnoticed" in problem.what


def test_it_is_what_topics_are_compared_by() -> None:
    """A config that brokers do not tell of says nothing."""
    spec = spec_of()
    bare = Topic(MOVIES, 6, 3, {})
    assert differences(spec, Cluster(3, {MOVIES: bare}, {})) == []


MARIADB = "mariadb://delta@db/studio"


def test_what_mariadbs_connector_keeps_is_kept_for_ever_and_in_order() -> None:
    spec = spec_of("studio.movie")
    spec = spec.model_copy(update={"source": spec.source.model_copy(update={"url": MARIADB})})
    topics = {topic.name: topic for topic in wanted_topics(spec)}
    names = ("delta_movies.offsets", "delta_movies.schema-history", "__debezium-heartbeat.delta_movies")
    assert set(topics) == {"delta_movies.studio.movie", *names}
    offsets, history, heartbeats = (topics[name] for name in names)
    assert [offsets.partitions, history.partitions, heartbeats.partitions] == [1, 1, 1]
    kept = [(topic.configs["cleanup.policy"], topic.configs["retention.ms"]) for topic in (offsets, history)]
    assert kept == [("compact", "-1"), ("delete", "-1")]
    assert {topic.configs["min.insync.replicas"] for topic in topics.values()} == {"2"}
    there = {**topics, history.name: history._replace(partitions=6)}
    assert "belong into one" in one(differences(spec, Cluster(3, there, {}))).what
    shorter = history._replace(configs={**history.configs, "retention.ms": "604800000"})
    assert one(differences(spec, Cluster(3, {**topics, history.name: shorter}, {}))).fatal
