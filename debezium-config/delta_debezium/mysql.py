"""The connectors for MariaDB and MySQL.

Unlike PostgreSQL's slot, the server keeps no position for a client: positions and the history of the schema are topics
in Kafka, or in the state store where the transport is another, and the connector's files are made of that at each start
(`delta_sync.state_connector`). `connect.keep.alive` must stay on, because the client of the binary
log takes an orderly end of the connection for the end of its work and would wait for ever; so it reconnects by itself,
and a failover has to be told from the server's id in the events.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from delta_debezium.connection import Connection, connection
from delta_debezium.kafka_clients import security_options
from delta_debezium.options import (
    Option,
    column_exclude_list,
    common_options,
    message_key_columns,
    table_include_list,
)
from delta_sync.errors import UsageError
from delta_sync.kafka.names import history_topic
from delta_sync.spec import KafkaSpec, PipelineSpec
from delta_sync.tables import Table

CONNECTOR_CLASSES = {
    "mysql": "io.debezium.connector.mysql.MySqlConnector",
    "mariadb": "io.debezium.connector.mariadb.MariaDbConnector",
}
DEFAULT_PORT = 3306

_HISTORY = "schema.history.internal"
SCHEMA_HISTORY_FILE = "schema_history.dat"
KEEP_ALIVE_INTERVAL_MS = 5_000  # after a restart of the server, changes resume within about this long (default: 67 s)

_SERVER_ID_BASE = 1_000_000_000  # ids of real servers are small, or made of an address's last bytes
_SERVER_ID_SPAN = 1_000_000_000

_FROM_THE_URL = "From source.url, which the checks and dumps use, too."
_SSL_MODES: Mapping[str, Mapping[str, str]] = {
    "mysql": {m: m for m in ("disabled", "preferred", "required", "verify_ca", "verify_identity")},
    "mariadb": {m: m for m in ("disable", "trust", "verify-ca", "verify-full")},
}

# How the connector writes values: what the decoders of `delta_sync.sources.mysql.codec` rest on.
_VALUE_OPTIONS = (
    Option("time.precision.mode", "microseconds", "One unit for every column.", fixed=True),
    Option("decimal.handling.mode", "string", "Exact; the default is base64 of an unscaled integer.", fixed=True),
    Option("binary.handling.mode", "bytes", "Base64 in JSON, and bytes as they are in Avro.", fixed=True),
    Option("bigint.unsigned.handling.mode", "precise", "By default values above 2^63 become negative.", fixed=True),
    Option(
        "enable.time.adjuster",
        "false",
        "The server has expanded two-digit years already; doing it again moves real years.",
        fixed=True,
    ),
)


def server_id(name: str) -> int:
    """Return the id with which a pipeline registers as a replica: the same at every start, and its own."""
    return _SERVER_ID_BASE + zlib.crc32(name.encode()) % _SERVER_ID_SPAN


def options(spec: PipelineSpec, tables: Sequence[Table], state_dir: str) -> list[Option]:
    """Return all options but the user's own. Raises UsageError for what this connector cannot be told."""
    return [
        Option("connector.class", CONNECTOR_CLASSES[spec.source.kind], "From the scheme of source.url.", fixed=True),
        *_connection_options(spec.source.kind, connection(spec.source, DEFAULT_PORT)),
        *_log_options(spec, state_dir),
        *_table_options(tables),
        *common_options(spec.name, kafka=spec.transport == "kafka"),
        *_VALUE_OPTIONS,
    ]


def _connection_options(kind: str, parts: Connection) -> list[Option]:
    found = [
        Option("database.hostname", parts.host, _FROM_THE_URL, fixed=True),
        Option("database.port", str(parts.port), _FROM_THE_URL, fixed=True),
        Option("database.user", parts.user, _FROM_THE_URL, fixed=True),
    ]
    if parts.password is not None:
        found.append(Option("database.password", parts.password, "A reference, resolved at the start.", fixed=True))
    for name, value in parts.parameters.items():
        mode = _SSL_MODES[kind].get(value.lower())
        if name not in ("ssl-mode", "ssl_mode", "sslmode") or mode is None:
            allowed = ", ".join(_SSL_MODES[kind])
            raise UsageError(f"source.url has the parameter {name}={value}; only ssl-mode is known: {allowed}.")
        found.append(Option("database.ssl.mode", mode, f"{name} of source.url."))
    return found


def _log_options(spec: PipelineSpec, state_dir: str) -> list[Option]:
    return [
        Option("database.server.id", str(server_id(spec.name)), "Must differ from every other replica's."),
        Option("snapshot.locking.mode", "none", "Reading the schema must not stop the writers.", fixed=True),
        Option(
            "connect.keep.alive", "true", "Without it, an orderly end of the connection goes unnoticed.", fixed=True
        ),
        Option("connect.keep.alive.interval.ms", str(KEEP_ALIVE_INTERVAL_MS), "The default means a minute of silence."),
        Option(
            "heartbeat.interval.ms",
            str(round(spec.source.heartbeat * 1000)),
            "source.heartbeat: while the tables rest, the stored position must follow the log, or its file is purged.",
        ),
        Option("include.schema.changes", "false", "DDL is for the connector; workers read the catalogue.", fixed=True),
        *(_history_in_file(state_dir) if spec.kafka is None else history_in_kafka(spec.name, spec.kafka)),
        Option(
            "schema.history.internal.store.only.captured.tables.ddl",
            "false",
            "A table that is added later needs its history, too.",
            fixed=True,
        ),
        Option("inconsistent.schema.handling.mode", "fail", "An event that cannot be read would be lost.", fixed=True),
    ]


def _history_in_file(state_dir: str) -> list[Option]:
    file, name = "io.debezium.storage.file.history.FileSchemaHistory", f"{state_dir}/{SCHEMA_HISTORY_FILE}"
    beside = "Written from the state store at each start, and saved there with the positions."
    return [
        Option(_HISTORY, file, "The default needs Kafka.", fixed=True),
        Option(f"{_HISTORY}.file.filename", name, beside, fixed=True),
    ]


def history_in_kafka(name: str, kafka: KafkaSpec) -> list[Option]:
    """Return the options of a connector whose history of the schema is a topic."""
    security = security_options(kafka.security) if kafka.security else {}
    store = "io.debezium.storage.kafka.history.KafkaSchemaHistory"
    beside = "Beside the positions, with which it belongs together."
    return [
        Option(_HISTORY, store, "A standby sidecar must find it.", fixed=True),
        Option(f"{_HISTORY}.kafka.topic", history_topic(name), beside, fixed=True),
        Option(f"{_HISTORY}.kafka.bootstrap.servers", kafka.bootstrap_servers, "From kafka:.", fixed=True),
        Option(f"{_HISTORY}.producer.acks", "all", "What is written must survive a broker.", fixed=True),
        *(
            Option(f"{_HISTORY}.{client}.{option}", value, "To log in there.", fixed=True)
            for client in ("producer", "consumer")
            for option, value in security.items()
        ),
    ]


def _table_options(tables: Sequence[Table]) -> list[Option]:
    found = [Option("table.include.list", table_include_list(tables), "The tables of the pipeline.", fixed=True)]
    if columns := column_exclude_list(tables):
        found.append(
            Option(
                "column.exclude.list",
                columns,
                "Columns that the log does not carry faithfully; their rows are read by key.",
                fixed=True,
            )
        )
    if keys := message_key_columns(tables):
        found.append(Option("message.key.columns", keys, "Tables whose key is a unique index.", fixed=True))
    return found
