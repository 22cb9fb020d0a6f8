"""The topics of a pipeline: what they are called, what they must be like, what the cluster has, and making them.

What is decided is pure; `read_cluster` and `create_topics` are all that talks to Kafka.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from delta_sync.errors import CheckFailed, Problem
from delta_sync.kafka import refusals, settings
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.secrets import redact
from delta_sync.spec import KafkaSpec

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_kafka: Any = import_module("kafka")
_errors: Any = import_module("kafka.errors")
_admin: Any = import_module("kafka.admin")

LONGEST_NAME = 249  # Kafka's limit, at which Debezium cuts
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")
MESSAGES = "message"  # Debezium's name for what pg_logical_emit_message wrote
# Broker-wide settings that are looked at: they decide over what a topic does not say itself.
BROKER_SETTINGS = ("auto.create.topics.enable", "offsets.topic.replication.factor")


class Topic(NamedTuple):
    """A topic as it should be or is. `settings` has those that Delta cares for, by Kafka's names."""

    name: str
    partitions: int
    replication_factor: int
    settings: Mapping[str, str]


class Cluster(NamedTuple):
    """What there is: `brokers` that are alive, settings of one of them, and those of the topics that were asked for."""

    brokers: int
    settings: Mapping[str, str]
    topics: Mapping[str, Topic]


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────


def topic_name(prefix: str, table: str) -> str:
    """Return the topic of `schema.table`, as Debezium makes it: each UTF-16 unit that Kafka does not allow is `_`.

    Two tables may come out alike; `plan` refuses them.
    """
    name = f"{prefix}.{table}"
    return NOT_IN_NAMES.sub(lambda match: "_" * (len(match.group().encode("utf-16-le")) // 2), name)[:LONGEST_NAME]


def message_topic(prefix: str) -> str:
    """Return the topic of the heartbeats, which are logical messages."""
    return topic_name(prefix, MESSAGES)


# ── what they must be like ───────────────────────────────────────────────────────────────────────────────────────


def plan(spec: KafkaSpec, prefix: str, tables: Collection[str]) -> list[Topic]:
    """Return the topics that a pipeline needs, the heartbeats' last. Raises CheckFailed when two tables share one."""
    tables_of: dict[str, list[str]] = {message_topic(prefix): ["(heartbeats)"]}
    for table in tables:
        tables_of.setdefault(topic_name(prefix, table), []).append(table)
    shared = {name: alike for name, alike in tables_of.items() if len(alike) > 1}
    if shared:
        raise CheckFailed(
            [
                Problem(
                    "kafka",
                    f"{' and '.join(alike)} would share topic {name}",
                    "rename one of them, or leave it to another pipeline",
                )
                for name, alike in shared.items()
            ]
        )
    wanted = {
        "cleanup.policy": "delete",
        "retention.ms": str(int(1000 * spec.retention)),
        "retention.bytes": "-1",  # records go by their age alone: by size, a burst would drop what nobody has read
        "min.insync.replicas": str(spec.min_insync_replicas),
        "unclean.leader.election.enable": "false",
        "max.message.bytes": str(spec.max_message_bytes),
    }
    names = [topic_name(prefix, table) for table in tables]
    topics = [Topic(name, spec.partitions, spec.replication_factor, wanted) for name in names]
    return [*topics, Topic(message_topic(prefix), 1, spec.replication_factor, wanted)]


def differences(spec: KafkaSpec, desired: Iterable[Topic], cluster: Cluster) -> list[Problem]:
    """Return what is not as it should be, each with what to type. Topics that are not there are no problem: they are
    made. With `allow_unsafe`, what could lose records is told but not fatal."""
    problems = _of_cluster(spec, cluster)
    for topic in desired:
        found = cluster.topics.get(topic.name)
        if found is not None:
            problems += _of_topic(spec, topic, found)
    return problems


def _of_cluster(spec: KafkaSpec, cluster: Cluster) -> list[Problem]:
    problems: list[Problem] = []

    def problem(what: str, fix: str, fatal: bool) -> None:
        problems.append(Problem("kafka", what, fix, fatal))

    if cluster.brokers < spec.replication_factor:
        problem(
            f"{spec.replication_factor} copies of a record need as many brokers, and {cluster.brokers} are alive",
            "start more, or lower kafka.replication_factor and kafka.min_insync_replicas",
            True,
        )
    if min(spec.replication_factor, spec.min_insync_replicas) < 2:
        problem(
            "a record counts as written when one broker has it, so changes are lost with that broker's disk",
            "set kafka.min_insync_replicas to 2 and kafka.replication_factor to 3, or kafka.allow_unsafe to true",
            not spec.allow_unsafe,
        )
    if spec.replication_factor > 1 and spec.replication_factor == spec.min_insync_replicas:
        problem(
            f"with {spec.min_insync_replicas} of {spec.replication_factor} copies needed, nothing can be written"
            " while one broker is down",
            "lower kafka.min_insync_replicas or raise kafka.replication_factor",
            False,
        )
    if cluster.settings.get("auto.create.topics.enable") == "true":
        problem(
            "the cluster makes topics by itself (auto.create.topics.enable), with settings that may lose records",
            _alter(spec, "--entity-type brokers --entity-default", "auto.create.topics.enable", "false")
            + ", or set it in server.properties",
            False,
        )
    copies = int(cluster.settings.get("offsets.topic.replication.factor", "3"))
    if copies < min(spec.replication_factor, 3):
        problem(
            f"the workers' positions have {copies} copies (offsets.topic.replication.factor)",
            "set it to 3 in server.properties before the first worker starts;"
            " afterwards raise it with kafka-reassign-partitions.sh",
            not spec.allow_unsafe,
        )
    return problems


def _of_topic(spec: KafkaSpec, desired: Topic, found: Topic) -> list[Problem]:
    problems: list[Problem] = []
    where = f"topic {desired.name}"
    unsafe = not spec.allow_unsafe

    def setting(name: str, why: str, fatal: bool) -> None:
        problems.append(
            Problem(
                where,
                f"{name} is {found.settings.get(name, '(unknown)')}, not {desired.settings[name]}: {why}",
                _alter(spec, f"--entity-type topics --entity-name {desired.name}", name, desired.settings[name]),
                fatal,
            )
        )

    if found.partitions < desired.partitions:
        problems.append(
            Problem(
                where,
                f"it has {found.partitions} partitions, not {desired.partitions}, so fewer workers help",
                f"kafka-topics.sh --bootstrap-server {spec.bootstrap_servers} --alter --topic {desired.name}"
                f" --partitions {desired.partitions}",
                False,
            )
        )
    if found.replication_factor < desired.replication_factor:
        problems.append(
            Problem(
                where,
                f"records have {found.replication_factor} copies, not {desired.replication_factor}",
                "add copies with kafka-reassign-partitions.sh, or delete the topic before the pipeline's first start",
                unsafe,
            )
        )
    have = found.settings
    if have.get("cleanup.policy") != "delete":
        setting("cleanup.policy", "a compacted topic keeps records beyond their time", True)
    if have.get("unclean.leader.election.enable") != "false":
        setting("unclean.leader.election.enable", "a broker that lags behind may lead, and drop what it lacks", unsafe)
    if int(have.get("min.insync.replicas", "1")) < int(desired.settings["min.insync.replicas"]):
        setting("min.insync.replicas", "a record counts as written with too few copies", unsafe)
    retention, wanted = int(have.get("retention.ms", "-1")), int(desired.settings["retention.ms"])
    if retention < 0 or retention > wanted:
        setting("retention.ms", "a record that outlives tombstone_ttl could bring a deleted row back", True)
    elif retention < wanted:
        setting("retention.ms", "workers may be away for a shorter time before records are lost", unsafe)
    if have.get("retention.bytes", "-1") != "-1":
        setting("retention.bytes", "a burst of changes drops records that nobody has read", unsafe)
    if int(have.get("max.message.bytes", "0")) < int(desired.settings["max.message.bytes"]):
        setting("max.message.bytes", "a large change would stop the connector", True)
    return problems


def _alter(spec: KafkaSpec, entity: str, name: str, value: str) -> str:
    return f"kafka-configs.sh --bootstrap-server {spec.bootstrap_servers} --alter {entity} --add-config {name}={value}"


# ── Kafka itself ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_cluster(spec: KafkaSpec, desired: Iterable[Topic]) -> Cluster:
    """Return what the cluster has of these topics. Raises KafkaBusy, CheckFailed."""
    names = [topic.name for topic in desired]
    with _administrator(spec) as admin:
        brokers = [broker["broker_id"] for broker in admin.describe_cluster()["brokers"] if not broker.get("is_fenced")]
        there = [topic for topic in admin.describe_topics(names) if topic["error_code"] == 0]
        resource, kinds = _admin.ConfigResource, _admin.ConfigResourceType
        asked = [
            resource(kinds.BROKER, str(brokers[0]), dict.fromkeys(BROKER_SETTINGS)),
            *(resource(kinds.TOPIC, topic["name"]) for topic in there),
        ]
        found: Mapping[str, Mapping[str, Mapping[str, Any]]] = admin.describe_configs(asked, config_filter="all")
    values = {
        kind: {
            name: {key: str(value["value"]) for key, value in entries.items()} for name, entries in resources.items()
        }
        for kind, resources in found.items()
    }
    topics = {
        topic["name"]: Topic(
            topic["name"],
            len(topic["partitions"]),
            min(len(partition["replica_nodes"]) for partition in topic["partitions"]),
            values["topic"][topic["name"]],
        )
        for topic in there
    }
    return Cluster(len(brokers), values["broker"][str(brokers[0])], topics)


def create_topics(spec: KafkaSpec, topics: Iterable[Topic]) -> list[str]:
    """Make those topics that are not there, and return their names. Raises KafkaBusy, CheckFailed.

    Two sidecars may do it at once: one of them finds it done.
    """
    made: list[str] = []
    with _administrator(spec) as admin:
        existing = {
            topic["name"]
            for topic in admin.describe_topics([topic.name for topic in topics])
            if not topic["error_code"]
        }
        for topic in topics:
            if topic.name in existing:
                continue
            wish = {
                "num_partitions": topic.partitions,
                "replication_factor": topic.replication_factor,
                "configs": dict(topic.settings),
            }
            try:
                admin.create_topics({topic.name: wish})
            except _errors.TopicAlreadyExistsError:
                continue
            made.append(topic.name)
        admin.wait_for_topics(made, timeout_ms=1000 * settings.REQUEST_TIMEOUT_S)
    return made


@contextmanager
def _administrator(spec: KafkaSpec) -> Generator[Any]:
    admin: Any = None
    try:
        admin = _kafka.KafkaAdminClient(**settings.resolved(settings.kafka_python(spec)))
        yield admin
    except (_errors.SaslAuthenticationFailedError, _errors.UnsupportedSaslMechanismError) as error:
        raise refusals.login_refused(spec, error) from error
    except (
        _errors.AuthorizationError,
        _errors.InvalidReplicationFactorError,
        _errors.InvalidPartitionsError,
        _errors.InvalidConfigurationError,
        _errors.PolicyViolationError,
        _errors.InvalidTopicError,
    ) as error:
        fix = "allow the user Create, Describe and DescribeConfigs, or make the topics as `kafka:` has them"
        raise refusals.refused(error, fix) from error
    except _errors.KafkaError as error:
        raise KafkaBusy(f"Kafka ({spec.bootstrap_servers}): {redact(str(error))}") from error
    finally:
        if admin is not None:
            admin.close()
