"""Topics: what they must be like so that nothing is lost, what the cluster has, and creating them.

A record that Kafka has acknowledged to the connector is confirmed to the source, which then forgets it. So from then on
Kafka has the only copy: on several brokers, of which one that lacks it never takes over, and for long enough.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from delta_sync.errors import Problem, UsageError
from delta_sync.kafka import refusals, settings
from delta_sync.kafka.certificates import check_files
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.kafka.names import (
    heartbeat_topic,
    history_topic,
    message_topic,
    notifications_topic,
    offsets_topic,
    signals_topic,
    topic_name,
)
from delta_sync.kafka.network import LOGIN_ERRORS, network
from delta_sync.secrets import redact
from delta_sync.spec import KafkaSpec, PipelineSpec

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_admin: Any = import_module("kafka.admin")
_errors: Any = import_module("kafka.errors")

WHERE = "kafka"
SIGNALS_MS = 3_600_000  # a connector that was away for longer need not follow them: who waits for it signals again
UNSAFE = "or set kafka.allow_unsafe: true (--allow-unsafe), for tests and trials"


class Topic(NamedTuple):
    """A topic as it is to be, or as it is; `configs` are Kafka's, as text."""

    name: str
    partitions: int
    replication_factor: int
    configs: Mapping[str, str]


class Cluster(NamedTuple):
    """What a cluster has: so many brokers, those of the topics that were asked for, and settings of all brokers."""

    brokers: int
    topics: Mapping[str, Topic]
    settings: Mapping[str, str]


def wanted_topics(spec: PipelineSpec) -> list[Topic]:
    """Return the topics that a pipeline needs: one for each table, and those of its connector. Pure.

    Raises UsageError when two tables would have the same one: Kafka allows fewer characters in names than PostgreSQL.
    """
    assert spec.kafka is not None, "the specification has transport: kafka"
    owners: dict[str, str] = {}
    for table in spec.tables:
        name = topic_name(spec.name, table)
        if name in owners:
            raise UsageError(f"Tables {owners[name]} and {table} would both have the topic {name}; rename one of them.")
        owners[name] = table
    kafka = spec.kafka
    tables = [Topic(name, spec.partitions, kafka.replication_factor, _configs(kafka)) for name in owners]
    connector = {message_topic(spec.name): _configs(kafka)}
    if spec.source.kind != "postgresql":  # whose slot holds the position, and whose log takes heartbeats
        connector = {
            heartbeat_topic(spec.name): _configs(kafka),
            offsets_topic(spec.name): _configs(kafka) | {"cleanup.policy": "compact", "retention.ms": "-1"},
            history_topic(spec.name): _configs(kafka) | {"retention.ms": "-1"},
        }
    if spec.source.kind == "debezium":
        names = [signals_topic(spec.name), notifications_topic(spec.name)]
        if signal_table := spec.connector.get("signal.data.collection"):  # whose rows are changes like others
            names += [topic_name(spec.name, one.strip()) for one in str(signal_table).split(",")]
        connector |= {name: _configs(kafka) for name in names if name not in owners}
        connector[signals_topic(spec.name)] |= {"retention.ms": str(SIGNALS_MS)}
    return tables + [Topic(name, 1, kafka.replication_factor, configs) for name, configs in connector.items()]


def _configs(kafka: KafkaSpec) -> dict[str, str]:
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(round(kafka.retention * 1000)),
        "retention.bytes": "-1",
        "min.insync.replicas": str(kafka.min_insync_replicas),
        "unclean.leader.election.enable": "false",
        "max.message.bytes": str(kafka.max_message_bytes),
    }


def unsafe(kafka: KafkaSpec) -> list[Problem]:
    """Return what the specification itself gives away. Pure. Not fatal where `allow_unsafe` accepts it."""
    found: list[Problem] = []
    if kafka.replication_factor < 3:
        found.append(
            Problem(
                WHERE,
                f"with replication_factor {kafka.replication_factor} the loss of"
                f" {'one broker loses' if kafka.replication_factor == 1 else 'two brokers may lose'} changes for good",
                f"use three brokers and replication_factor: 3, {UNSAFE}",
                fatal=not kafka.allow_unsafe,
            )
        )
    if kafka.min_insync_replicas < 2:
        found.append(
            Problem(
                WHERE,
                "with min_insync_replicas 1 a change counts as written when one broker has it, and is lost with it",
                f"set min_insync_replicas: 2, {UNSAFE}",
                fatal=not kafka.allow_unsafe,
            )
        )
    return found


def differences(spec: PipelineSpec, cluster: Cluster) -> list[Problem]:
    """Return in what the cluster is not as the pipeline needs it. Pure. Topics that are missing are no problem."""
    assert spec.kafka is not None, "the specification has transport: kafka"
    kafka = spec.kafka
    found = unsafe(kafka)
    if cluster.brokers < kafka.replication_factor:
        found.append(
            Problem(
                WHERE,
                f"the cluster has {cluster.brokers} broker{'s' * (cluster.brokers != 1)}, and replication_factor is"
                f" {kafka.replication_factor}",
                "add brokers, or lower kafka.replication_factor, which means that fewer losses lose changes",
            )
        )
    if cluster.settings.get("auto.create.topics.enable") == "true":
        what = (
            "auto.create.topics.enable is on: a topic that somebody deletes comes back with other settings, unnoticed"
        )
        found.append(Problem(WHERE, what, "switch it off on the brokers", fatal=False))
    for topic in wanted_topics(spec):
        there = cluster.topics.get(topic.name)
        if there is not None:
            found += _topic_differences(topic, there, kafka)
    return found


def _topic_differences(topic: Topic, there: Topic, kafka: KafkaSpec) -> list[Problem]:
    where = f"topic {topic.name}"
    fatal = not kafka.allow_unsafe
    found: list[Problem] = []
    if there.replication_factor < topic.replication_factor:
        found.append(
            Problem(
                where,
                f"it has replication factor {there.replication_factor} instead of {topic.replication_factor}",
                "reassign its partitions (kafka-reassign-partitions.sh)",
                fatal,
            )
        )
    if topic.partitions == 1 < there.partitions:
        what = f"it has {there.partitions} partitions, and its records belong into one"
        found.append(Problem(where, what, "delete it, and type the `deltactl pipeline create` again", fatal))
    if there.partitions < topic.partitions:
        fix = f"type: kafka-topics.sh --alter --topic {topic.name} --partitions {topic.partitions}"
        what = f"it has {there.partitions} partitions instead of {topic.partitions}, so fewer workers help"
        found.append(Problem(where, what, fix, fatal=False))
    for name, value in topic.configs.items():
        is_there = there.configs.get(name)
        if is_there is not None and not _as_good(name, value, is_there):
            fix = (
                "type: kafka-configs.sh --alter --entity-type topics --entity-name"
                f" {topic.name} --add-config {name}={value}"
            )
            found.append(Problem(where, f"{name} is {is_there} instead of {value}: {_WHY[name]}", fix, fatal))
    return found


def _as_good(name: str, wanted: str, there: str) -> bool:
    if name in ("min.insync.replicas", "max.message.bytes"):
        return int(there) >= int(wanted)
    return there == wanted


_WHY = {
    "cleanup.policy": "compaction of a table's changes takes records away before they are read, none keeps them for"
    " ever; a connector's position is compacted, and its history is not",
    "retention.ms": "longer than tombstone_ttl could bring deleted rows back, shorter loses what workers have not read;"
    " a connector's position and history are needed for ever",
    "retention.bytes": "a limit by size takes away what workers have not read",
    "min.insync.replicas": "a change counts as written when fewer brokers have it",
    "unclean.leader.election.enable": "a broker that lacks changes may take over, and they are gone",
    "max.message.bytes": "a large row would end the connector",
}


# ── the cluster ──────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _client(spec: KafkaSpec) -> Generator[Any]:
    """Connect as an administrator. Raises KafkaBusy, CheckFailed."""
    try:
        check_files(spec)
        client = _admin.KafkaAdminClient(**settings.resolved(settings.kafka_python(spec)), kafka_client=network)
        try:
            yield client
        finally:
            client.close()
    except LOGIN_ERRORS as error:
        raise refusals.login_refused(spec, error) from error
    except (_errors.TopicAuthorizationFailedError, _errors.ClusterAuthorizationFailedError) as error:
        raise refusals.refused(
            error, "allow the user Describe and DescribeConfigs on the cluster, and Create on its topics"
        ) from error
    except (
        _errors.InvalidReplicationFactorError,
        _errors.PolicyViolationError,
        _errors.InvalidConfigurationError,
    ) as error:
        raise refusals.refused(error, "correct the section kafka: of pipeline.yaml") from error
    except _errors.KafkaError as error:
        if refusals.is_about_certificates(str(error)):
            raise refusals.certificate_refused(spec, error) from error
        said = redact(str(error) or type(error).__name__)
        raise KafkaBusy(f"Kafka at {spec.bootstrap_servers} does not answer: {said}.") from error


def read_cluster(spec: KafkaSpec, names: Sequence[str]) -> Cluster:
    """Return what the cluster has of these topics. Raises KafkaBusy, CheckFailed."""
    with _client(spec) as client:
        brokers = client.describe_cluster()["brokers"]
        present = sorted(set(names) & set(client.list_topics()))
        kind = _admin.ConfigResourceType
        asked = [_admin.ConfigResource(kind.TOPIC, name) for name in present]
        asked.append(_admin.ConfigResource(kind.BROKER, str(brokers[0]["broker_id"])))
        configs = client.describe_configs(asked, config_filter="all")
        topics = {
            one["name"]: Topic(
                one["name"],
                len(one["partitions"]),
                min(len(partition["replica_nodes"]) for partition in one["partitions"]),
                _values(configs["topic"][one["name"]]),
            )
            for one in (client.describe_topics(present) if present else ())
            if one["partitions"]  # else it has been deleted since it was listed
        }
        (broker,) = configs["broker"].values()
        return Cluster(len(brokers), topics, _values(broker))


def _values(configs: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(config["value"]) for name, config in configs.items()}


def create_topics(spec: KafkaSpec, topics: Sequence[Topic]) -> list[str]:
    """Create the topics that are not there yet, and return their names. Raises KafkaBusy, CheckFailed."""
    with _client(spec) as client:
        present = set(client.list_topics())
        missing = [topic for topic in topics if topic.name not in present]
        if missing:
            wanted = {
                topic.name: {
                    "num_partitions": topic.partitions,
                    "replication_factor": topic.replication_factor,
                    "configs": dict(topic.configs),
                }
                for topic in missing
            }
            client.create_topics(wanted, wait_for_metadata=True)
    return [topic.name for topic in missing]


def delete_topics(spec: KafkaSpec, names: Sequence[str]) -> list[str]:
    """Delete those of the topics that are there, and return their names. Raises KafkaBusy, CheckFailed."""
    with _client(spec) as client:
        present = sorted(set(names) & set(client.list_topics()))
        if present:
            client.delete_topics(present)
    return present
