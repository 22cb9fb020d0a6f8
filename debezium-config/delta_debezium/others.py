"""Connectors that Delta does not know itself: the user's options, and what Delta needs for changes, signals and ends.

Their rows are read by Debezium's own incremental snapshots, which the topic of signals asks for, and which say how far
they are in the topic of notifications (`delta_sync.signalled`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from delta_debezium.kafka_clients import security_options
from delta_debezium.mysql import history_in_kafka
from delta_debezium.options import FORBIDDEN, Option, common_options, exactly
from delta_sync.errors import UsageError
from delta_sync.kafka.names import notifications_topic, signals_group_id, signals_topic
from delta_sync.spec import KafkaSpec, PipelineSpec

SIGNAL_POLL_INTERVAL_MS = 1000  # how soon a dump begins, is paused or ends; the default is 5 s

_SQL_SERVER = "io.debezium.connector.sqlserver.SqlServerConnector"
_WITHOUT_HISTORY = "io.debezium.connector.postgresql."  # the others need the history of the schema
# Their events are not of tables, or they take no incremental snapshots.
_UNFIT = ("io.debezium.connector.mongodb.", "io.debezium.connector.spanner.", "io.debezium.connector.cassandra.")

_ALLOWED = frozenset(
    {
        "converters",  # Debezium reads the rows of dumps, too, and treats them alike
        "column",
        "incremental.snapshot",
        "message.key.columns",
        "post.processors",
        "signal",
        "snapshot",
        "schema.include.list",
        "schema.exclude.list",
        "database.include.list",
        "database.exclude.list",
        "message.prefix.exclude.list",
        "flush.lsn.source",
        "sourceinfo.struct.maker",
    }
)
FORBIDDEN_HERE: Mapping[str, str] = {name: why for name, why in FORBIDDEN.items() if name not in _ALLOWED}


def options(spec: PipelineSpec) -> list[Option]:
    """Return all options but the user's own. Raises UsageError for a connector that cannot be a source."""
    kafka = spec.kafka
    assert kafka is not None, "such a source has transport: kafka"
    name = spec.source.connector_class
    if name.startswith(_UNFIT):
        raise UsageError(
            f"source.url: {name} cannot be a source, because its events are not of tables, or it takes no incremental"
            " snapshots."
        )
    found = [
        Option("connector.class", name, "From source.url.", fixed=True),
        Option(
            "table.include.list",
            ",".join(_included(name, spec.tables)),
            "The tables of the pipeline, as most connectors name them.",
        ),
        *(_without_tombstones(option) for option in common_options(spec.name, kafka=True)),
        Option(
            "heartbeat.interval.ms",
            str(round(spec.source.heartbeat * 1000)),
            "source.heartbeat: by it the sidecar sees that the connector works, and how far it is.",
        ),
        *_signal_options(spec, kafka),
        Option(
            "incremental.snapshot.chunk.size",
            str(spec.load.chunk_rows),
            "load.chunk_rows: what is read in one window.",
        ),
    ]
    if not name.startswith(_WITHOUT_HISTORY):
        found += [
            Option("include.schema.changes", "false", "DDL is for the connector; records have their schemas."),
            *history_in_kafka(spec.name, kafka),
        ]
    return found


def _included(connector: str, tables: Iterable[str]) -> list[str]:
    """Return `table.include.list`. SQL Server's has no database, which its topics and signals do have."""
    if connector == _SQL_SERVER:
        tables = [table.partition(".")[2] if table.count(".") > 1 else table for table in tables]
    return [exactly(table) for table in tables]


def _without_tombstones(option: Option) -> Option:
    if option.name != "tombstones.on.delete":
        return option
    return Option(option.name, "false", "Its topics are not compacted, and the last record tells the schema.", True)


def _signal_options(spec: PipelineSpec, kafka: KafkaSpec) -> list[Option]:
    security = security_options(kafka.security) if kafka.security else {}
    return [
        Option("signal.enabled.channels", "source,kafka", "`deltactl dump` signals by Kafka.", fixed=True),
        Option("signal.kafka.topic", signals_topic(spec.name), "Made by `pipeline create`.", fixed=True),
        Option("signal.kafka.bootstrap.servers", kafka.bootstrap_servers, "From kafka:.", fixed=True),
        Option("signal.kafka.groupId", signals_group_id(spec.name), "The default is that of every connector."),
        Option(
            "signal.consumer.auto.offset.reset",
            "earliest",
            "A first start follows what was signalled before; what is old has expired by then.",
            fixed=True,
        ),
        *(Option(f"signal.consumer.{option}", value, "To log in there.", True) for option, value in security.items()),
        Option("signal.poll.interval.ms", str(SIGNAL_POLL_INTERVAL_MS), "How soon a signal is followed."),
        Option("notification.enabled.channels", "sink", "How far a dump is, behind its rows.", fixed=True),
        Option("notification.sink.topic.name", notifications_topic(spec.name), "Made by `pipeline create`.", True),
    ]
