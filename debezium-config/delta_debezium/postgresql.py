"""The connector for PostgreSQL 14 and later.

What is confirmed to the server follows from three of Debezium's workings (read in 3.6, seen with 3.6.3): the driver
repeats the last confirmed position in its keep-alives and, with `lsn.flush.mode=connector`, never moves it by itself;
the connector moves it only when the engine commits a record that was marked as processed; and it moves it to the last
*commit* before that record, so a transaction that was half acknowledged is delivered again as a whole. Tables at rest
are confirmed by the heartbeat, a logical message that passes through the log like a change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from delta_debezium.connection import Connection, connection
from delta_debezium.options import (
    Option,
    column_exclude_list,
    common_options,
    exactly,
    message_key_columns,
    table_include_list,
)
from delta_sync.errors import UsageError
from delta_sync.secrets import has_reference
from delta_sync.sources.postgresql.codec import CONNECTOR_OPTIONS
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Table

CONNECTOR_CLASS = "io.debezium.connector.postgresql.PostgresConnector"
DEFAULT_PORT = 5432

STATUS_INTERVAL_MS = 5_000  # a walsender gives up after wal_sender_timeout without one: 60 s, seldom set below 10
SLOT_RETRIES = 10  # times SLOT_RETRY_DELAY_MS: a killed process's walsender holds the slot for some moments
SLOT_RETRY_DELAY_MS = 500

# Debezium looks the publication up by this text, and the server reads it as an identifier: both must mean the same one.
_PUBLICATION = re.compile(r"[a-z_][a-z0-9_$]*")

# In a JDBC URL the database's name is text between `/` and `?`, percent-decoded; in Debezium's queries it is itself.
_NOT_IN_DATABASE = re.compile(r"[/?%+\\#&]")

SESSION_OPTION = "driver.options"
CONVERTER_PREFIX = "converter."  # options of the format, which is the engine's

# Why the decoders need what they need (`delta_sync.sources.postgresql.codec`).
_REASONS: Mapping[str, str] = {
    "decimal.handling.mode": "Exact, NaN included; the default is base64 of an unscaled integer.",
    "time.precision.mode": "One unit for every column.",
    "binary.handling.mode": "Base64 in JSON, and bytes as they are in Avro.",
    "hstore.handling.mode": "A JSON object, with null apart from the empty string.",
    "include.unknown.datatypes": "Values of other types are read from the table by key, as the server writes them.",
    "unavailable.value.placeholder": "What an unchanged TOAST value looks like; a row that really holds it is read "
    "by key, so nothing goes wrong.",
    "event.converting.failure.handling.mode": "By default a value that cannot be converted becomes NULL.",
    SESSION_OPTION: "How the server writes values, whatever a role or the database sets; `options` of source.url come "
    "first.",
    "converter.replace.null.with.default": "By default a NULL in a column with a default becomes that default.",
}

_FROM_THE_URL = "From source.url, which the checks and dumps use, too."


def options(spec: PipelineSpec, tables: Sequence[Table]) -> list[Option]:
    """Return all options but the user's own. Raises UsageError for what this connector cannot be told."""
    return [
        Option("connector.class", CONNECTOR_CLASS, "From the scheme of source.url.", fixed=True),
        *_connection_options(connection(spec.source, DEFAULT_PORT)),
        *_log_options(spec),
        *_table_options(tables),
        *common_options(spec.name, kafka=spec.transport == "kafka"),
        *_value_options(),
    ]


def _connection_options(parts: Connection) -> list[Option]:
    database = parts.database or parts.user  # libpq's default
    if bad := _NOT_IN_DATABASE.search(database):
        raise UsageError(
            f"source.url has the database {database!r}; Debezium cannot connect to a name with {bad[0]!r}."
        )
    found = [
        Option("database.hostname", parts.host, _FROM_THE_URL, fixed=True),
        Option("database.port", str(parts.port), _FROM_THE_URL, fixed=True),
        Option("database.user", parts.user, _FROM_THE_URL, fixed=True),
        Option("database.dbname", database, _FROM_THE_URL, fixed=True),
    ]
    if parts.password is not None:
        found.append(Option("database.password", parts.password, "A reference, resolved at the start.", fixed=True))
    return [*found, *_parameter_options(parts.parameters)]


# libpq's parameters by what Debezium or, below `driver.`, pgjdbc calls them.
_PARAMETERS: Mapping[str, str] = {
    "sslmode": "database.sslmode",
    "sslrootcert": "database.sslrootcert",
    "sslcert": "database.sslcert",
    "sslkey": "database.sslkey",
    "sslpassword": "database.sslpassword",
    "sslnegotiation": "driver.sslNegotiation",
    "channel_binding": "driver.channelBinding",
    "gssencmode": "driver.gssEncMode",
    "require_auth": "driver.requireAuth",
    "connect_timeout": "driver.connectTimeout",
}
# These change nothing that matters to the connector: it sets its own, or the driver has its own ways.
_IGNORED_PARAMETERS = frozenset(
    {
        "application_name",
        "fallback_application_name",
        "client_encoding",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
    }
)
_TARGETS = {"any": None, "read-write": "primary", "primary": "primary", "standby": "secondary"}


def _parameter_options(parameters: Mapping[str, str]) -> list[Option]:
    found: list[Option] = []
    session = CONNECTOR_OPTIONS[SESSION_OPTION]
    for name, value in parameters.items():
        if name == "sslpassword" and not has_reference(value):
            raise UsageError("source.url spells out sslpassword; write it as ${env:NAME} or ${file:/path}.")
        if name == "options":
            session = f"{value} {session}"  # of two settings of one parameter the later counts
        elif name in _PARAMETERS:
            found.append(Option(_PARAMETERS[name], value, f"{name} of source.url."))
        elif name == "target_session_attrs" and value in _TARGETS:
            target = _TARGETS[value]
            if target is not None:
                found.append(Option("driver.targetServerType", target, f"{name} of source.url."))
        elif name not in _IGNORED_PARAMETERS:
            raise UsageError(
                f"source.url has the parameter {name}={value}, which Debezium's driver cannot be told; leave it out."
            )
    return [*found, Option(SESSION_OPTION, session, _REASONS[SESSION_OPTION], fixed=True)]


def _log_options(spec: PipelineSpec) -> list[Option]:
    if not _PUBLICATION.fullmatch(spec.publication):
        raise UsageError(
            f"source.publication is {spec.publication!r}; Debezium takes only names of lower-case letters, digits and "
            "underscores, so choose another, or recreate the publication by such a name."
        )
    return [
        Option("plugin.name", "pgoutput", "The server's own; the default needs an extension.", fixed=True),
        Option("slot.name", spec.slot, "Delta's slot: it holds the only record of what was confirmed.", fixed=True),
        Option(
            "slot.drop.on.stop",
            "false",
            "Without the slot the server forgets the changes of the time until the next start.",
            fixed=True,
        ),
        Option("slot.max.retries", str(SLOT_RETRIES), "While a killed process's server side still holds the slot."),
        Option("slot.retry.delay.ms", str(SLOT_RETRY_DELAY_MS), "It lets go within moments; the default is 10 s."),
        Option("publication.name", spec.publication, "Delta's publication.", fixed=True),
        Option(
            "publication.autocreate.mode",
            "disabled",
            "Delta creates and alters it; the default publishes every table of the database.",
            fixed=True,
        ),
        Option(
            "lsn.flush.mode",
            "connector",
            "Confirms what the sinks have acknowledged, and nothing else does: in the other modes the driver confirms "
            "by a rule of its own, or nobody does.",
            fixed=True,
        ),
        Option(
            "status.update.interval.ms",
            str(STATUS_INTERVAL_MS),
            "Tells the server that it is alive while a sink holds everything up; must be below wal_sender_timeout.",
        ),
        Option(
            "message.prefix.include.list",
            exactly(spec.heartbeat_prefix),
            "Of the logical messages in the log, the pipeline's heartbeats.",
            fixed=True,
        ),
        Option(
            "heartbeat.interval.ms",
            "0",
            "Delta's heartbeats pass through the log itself, so they prove more than Debezium's own.",
            fixed=True,
        ),
        Option(
            "schema.refresh.mode",
            "columns_diff",
            "The safe mode: a message whose columns differ from what is known makes the connector look again.",
        ),
    ]


def _table_options(tables: Sequence[Table]) -> list[Option]:
    found = [
        Option("table.include.list", table_include_list(tables), "The tables of the pipeline.", fixed=True),
        Option(
            "table.ignore.builtin",
            "false",
            "All tables are named, so none has to be left out for its name.",
            fixed=True,
        ),
    ]
    if columns := column_exclude_list(tables):
        reason = "Columns whose values the log does not carry faithfully: they are read from the table by key."
        found.append(Option("column.exclude.list", columns, reason, fixed=True))
    if keys := message_key_columns(tables):
        found.append(Option("message.key.columns", keys, "Tables whose key is a unique index.", fixed=True))
    return found


def _value_options() -> list[Option]:
    return [
        Option(name, value, _REASONS[name], fixed=True)
        for name, value in CONNECTOR_OPTIONS.items()
        if name != SESSION_OPTION and not name.startswith(CONVERTER_PREFIX)
    ]


def converter_options() -> list[Option]:
    """Return what the decoders need of the engine's JSON converter."""
    return [
        Option(name, value, _REASONS[name], fixed=True)
        for name, value in CONNECTOR_OPTIONS.items()
        if name.startswith(CONVERTER_PREFIX)
    ]
