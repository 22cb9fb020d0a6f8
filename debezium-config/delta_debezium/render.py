"""From a specification to the configuration of its connector. Pure: same specification and tables, same bytes.

Secrets stay references (`${env:NAME}`, `${file:/path}`) in everything that is rendered here; whoever starts the
connector resolves them (`delta_sync.secrets.resolve`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from delta_debezium import mysql, others, postgresql
from delta_debezium.kafka_clients import JAAS, jaas_escape, security_options
from delta_debezium.options import Option, check_columns, overridden
from delta_debezium.properties import expression_literal, properties_text
from delta_sync.errors import UsageError
from delta_sync.kafka.names import offsets_topic
from delta_sync.secrets import has_reference
from delta_sync.sources import check_supported
from delta_sync.spec import KafkaSpec, PipelineSpec, RegistrySpec
from delta_sync.tables import Table

OFFSETS_FILE = "offsets.dat"  # of embedded connectors whose server keeps no position for them
SOURCE_PREFIX = "debezium.source."

_REFERENCE = re.compile(r"\$\{(?:env|file):[^}]*\}")


def connector_options(spec: PipelineSpec, tables: Mapping[str, Table], state_dir: str = ".") -> list[Option]:
    """Return the connector's options with the reason for each, in the order in which they are written.

    `tables` has every table of the specification, by its name there. `state_dir` is where a connector that needs files
    of its own keeps them. Raises UsageError for what cannot be meant, naming the option and the reason.
    """
    if spec.source.kind == "debezium":  # of which nobody knows the tables before their first record
        return overridden(others.options(spec), spec.connector, others.FORBIDDEN_HERE)
    chosen = [tables[name] for name in spec.tables]
    check_columns(chosen)
    match spec.source.kind:
        case "postgresql":
            options = postgresql.options(spec, chosen)
        case "mysql" | "mariadb":
            options = mysql.options(spec, chosen, state_dir)
        case kind:
            known = "postgresql, mysql or mariadb"
            raise UsageError(f"source.url begins with {kind}://, for which there is no connector; it can be {known}.")
    return overridden(options, spec.connector)


def connector_config(spec: PipelineSpec, tables: Mapping[str, Table], state_dir: str = ".") -> dict[str, str]:
    """Return the connector's options by Debezium's names: the `config` of a connector of Kafka Connect."""
    return {option.name: option.value for option in connector_options(spec, tables, state_dir)}


def connector_json(spec: PipelineSpec, tables: Mapping[str, Table]) -> str:
    """Return the text of `connector.json`, in the form in which Kafka Connect takes a connector."""
    document = {"name": spec.name, "config": connector_config(spec, tables)}
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


# ── the embedded engine ──────────────────────────────────────────────────────────────────────────────────────────


def engine_options(spec: PipelineSpec, state_dir: str = ".") -> list[Option]:
    """Return what the Debezium Engine needs beside the connector's options. Its builder chooses JSON."""
    return [
        Option("name", spec.name, "The pipeline's."),
        *offset_options(spec, state_dir),
        Option(
            "converter.schemas.enable",
            "false",
            "The default repeats the schema in every event, ten times the size of a row.",
        ),
        *(postgresql.converter_options() if spec.source.kind == "postgresql" else ()),
        Option(
            "record.processing.threads",
            "AVAILABLE_CORES",
            "Without a number the engine starts a thread for every record of a burst.",
        ),
    ]


def offset_options(spec: PipelineSpec, state_dir: str) -> list[Option]:
    """Return where engine or server keep the connector's position."""
    at_once = Option(
        "offset.flush.interval.ms", "0", "A batch that was acknowledged is confirmed at once; the default is a minute."
    )
    storage = "org.apache.kafka.connect.storage"
    if spec.source.kind == "postgresql":
        reason = "The slot is the only truth of positions: two records of one thing would differ some day."
        return [Option("offset.storage", f"{storage}.MemoryOffsetBackingStore", reason), at_once]
    if spec.kafka is not None:
        kafka = spec.kafka
        reason = "The server keeps no position for a client, and a standby sidecar must find it."
        security = security_options(kafka.security) if kafka.security else {}
        return [
            Option("offset.storage", f"{storage}.KafkaOffsetBackingStore", reason),
            Option("offset.storage.topic", offsets_topic(spec.name), "Made by `pipeline create`."),
            Option("offset.storage.partitions", "1", "As it was made."),
            Option("offset.storage.replication.factor", str(kafka.replication_factor), "As it was made."),
            Option("bootstrap.servers", kafka.bootstrap_servers, "Where the topic is."),
            *(Option(name, value, "To log in there.") for name, value in security.items()),
            at_once,
        ]
    return [
        Option("offset.storage", f"{storage}.FileOffsetBackingStore", "The server keeps no position for a client."),
        Option(
            "offset.storage.file.filename",
            f"{state_dir}/{OFFSETS_FILE}",
            "Written from the state store at each start; what the engine writes there itself is not read.",
        ),
        at_once,
    ]


def engine_properties(spec: PipelineSpec, tables: Mapping[str, Table], state_dir: str = ".") -> dict[str, str]:
    """Return the properties of an embedded Debezium Engine with this connector; secrets are still references."""
    config = connector_config(spec, tables, state_dir)
    return config | {option.name: option.value for option in engine_options(spec, state_dir)}


# ── Debezium Server ──────────────────────────────────────────────────────────────────────────────────────────────

EPOCH_HEADER = "delta.epoch"  # on every record: the epoch in decimal digits, ASCII, such as b"7"

LINGER_MS = 0  # a poll's records come together, so waiting for more (default 5) delays, and saves no time per event
BATCH_BYTES = 256 << 10  # of records of one partition in one request: some hundred; Kafka's 16 KB are some dozens
BUFFER_BYTES = 64 << 20  # of records that brokers have not acknowledged; Debezium sends a poll's and waits for them

_PRODUCER = "debezium.sink.kafka.producer."
_FORMAT = "debezium.format."
_COMPATIBLE_API = re.compile(r"/apis/ccompat/v\d+/*$")


def server_properties(spec: PipelineSpec, tables: Mapping[str, Table], epoch: int, term: int = 0) -> str:
    """Return `application.properties` of a Debezium Server that writes Avro to Kafka.

    Every record gets the header `delta.epoch` with `epoch`, and behind a `t` with the term of a connector that Delta
    does not know itself: its events have no position that would tell which of two connectors wrote what is newer. A
    value with a reference becomes an environment variable: start the server with those of `server_environment`. Raises
    UsageError.
    """
    entries = _server_entries(spec, tables, epoch, term)
    variables = _variables(entries)
    return properties_text(
        {
            name: f"${{{variables[name]}}}" if name in variables else expression_literal(value)
            for name, value in entries.items()
        }
    )


def server_environment(
    spec: PipelineSpec, tables: Mapping[str, Table], epoch: int, resolve: Callable[[str], str]
) -> dict[str, str]:
    """Return the environment variables that `server_properties` refers to. `resolve` turns a reference into its value.

    The values are escaped as the server expects them: it expands `$` in a variable's value, too.
    """
    entries = _server_entries(spec, tables, epoch)
    return {
        variable: expression_literal(_resolved(name, entries[name], resolve))
        for name, variable in _variables(entries).items()
    }


def _server_entries(spec: PipelineSpec, tables: Mapping[str, Table], epoch: int, term: int = 0) -> dict[str, str]:
    """Return the server's options; secrets are still references."""
    check_supported(spec)
    kafka = spec.kafka
    assert kafka is not None, "the specification asks for kafka: with transport: kafka"
    source = connector_config(spec, tables) | {option.name: option.value for option in offset_options(spec, ".")}
    # Avro's names are ASCII; this adjustment is the one that keeps different names different.
    source["record.processing.threads"] = "AVAILABLE_CORES"  # as for the engine
    source |= {"schema.name.adjustment.mode": "avro_unicode", "field.name.adjustment.mode": "avro_unicode"}
    entries = {
        "quarkus.http.host-enabled": "false",  # nobody asks it; it would need a port of its own
        "quarkus.log.console.json.enabled": "false",
        # It warns of every name with an underscore, which `avro_unicode` escapes.
        'quarkus.log.category."io.debezium.schema.SchemaNameAdjuster".level': "ERROR",
        # While the registry is away, this one warns with a Java stack every second, for each schema.
        'quarkus.log.category."io.apicurio.registry.resolver.cache.ERCache".level': "ERROR",
        "debezium.sink.type": "kafka",
        # The producer's own `delivery.timeout.ms` decides when a record has failed, not a second clock.
        "debezium.sink.kafka.wait.message.delivery.timeout.ms": "0",
        **{f"{_PRODUCER}{name}": value for name, value in _producer_options(kafka).items()},
        "debezium.format.key": "avro",
        "debezium.format.value": "avro",
        "debezium.format.header": "json",
        "debezium.format.header.schemas.enable": "false",  # else each header repeats a schema beside its number
        **{f"{_FORMAT}{name}": value for name, value in _registry_options(kafka.registry).items()},
        "debezium.transforms": "epoch",
        "debezium.transforms.epoch.type": "org.apache.kafka.connect.transforms.InsertHeader",
        "debezium.transforms.epoch.header": EPOCH_HEADER,
        "debezium.transforms.epoch.value.literal": f"{epoch}t{term}" if spec.source.kind == "debezium" else str(epoch),
        **{f"{SOURCE_PREFIX}{name}": value for name, value in source.items()},
    }
    return entries | {f"{SOURCE_PREFIX}custom.sanitize.pattern": _masked_names(entries)}


def _producer_options(kafka: KafkaSpec) -> dict[str, str]:
    return {
        "bootstrap.servers": kafka.bootstrap_servers,
        "key.serializer": "org.apache.kafka.common.serialization.ByteArraySerializer",
        "value.serializer": "org.apache.kafka.common.serialization.ByteArraySerializer",
        "acks": "all",  # what is confirmed to the source must survive a broker
        "enable.idempotence": "true",  # a retry keeps the order of a key's changes
        "compression.type": "lz4",
        "linger.ms": str(LINGER_MS),
        "batch.size": str(BATCH_BYTES),
        "max.request.size": str(kafka.max_message_bytes),
        "buffer.memory": str(max(BUFFER_BYTES, 2 * kafka.max_message_bytes)),
        **(security_options(kafka.security) if kafka.security else {}),
    }


def _registry_options(registry: RegistrySpec) -> dict[str, str]:
    """Return the options of the converter: Apicurio's own, or Confluent's, which any registry with its API serves.

    Both write the schema's id into the payload (a zero byte, then four bytes), and schemas that refer to no others.
    Apicurio's client cannot be given a token, so Confluent's is used with one.
    """
    if _COMPATIBLE_API.search(registry.url) and registry.token is None:
        options = {
            "url": _COMPATIBLE_API.sub("/apis/registry/v3", registry.url),
            "auto-register": "true",
            "find-latest": "false",  # a record is written with its own schema, not with a later one
            "dereference-schema": "true",  # else a schema refers to others, and cannot be read by itself
            "headers.enabled": "false",  # the schema's id is in the payload, as Confluent's format has it
            # A schema that is known is used while it is looked up again. Without it that is every 30 s, and the
            # connector ends when the registry is away for longer, though an id never changes its meaning.
            "background-refresh-enabled": "true",
        }
        if registry.ca_file is not None:
            options |= {"tls.truststore.type": "PEM", "tls.truststore.location": registry.ca_file}
        if registry.username is not None and registry.password is not None:
            options |= {"auth.username": registry.username, "auth.password": registry.password}
        return {f"apicurio.registry.{name}": value for name, value in options.items()}
    options = {"schema.registry.url": registry.url, "auto.register.schemas": "true"}
    if registry.ca_file is not None:
        raise UsageError(
            "kafka.registry: ca_file is for Apicurio without a token; Confluent's converter, which is used otherwise, "
            "reads no PEM. Leave it out, and give the authority to Java (in the sidecar's environment, "
            "JAVA_TOOL_OPTIONS=-Djavax.net.ssl.trustStore=FILE) and to the workers (REQUESTS_CA_BUNDLE=FILE)."
        )
    if registry.token is not None:
        options |= {"bearer.auth.credentials.source": "STATIC_TOKEN", "bearer.auth.token": registry.token}
    elif registry.username is not None:
        options["basic.auth.credentials.source"] = "USER_INFO"
        options["basic.auth.user.info"] = f"{registry.username}:{registry.password}"
    return options


# ── secrets: by the server's environment, never in its file ──────────────────────────────────────────────────────


def _variables(entries: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variable of each entry that has a reference (`${env:NAME}` means something else there)."""
    secret = [name for name, value in entries.items() if has_reference(value)]
    return {name: f"DELTA_SECRET_{number}" for number, name in enumerate(secret, 1)}


def _masked_names(entries: Mapping[str, str]) -> str:
    """Return a regular expression for the options whose values Debezium shall not log: its own, and all references.

    It logs every option when it starts, with prefixes of its own, and by itself it knows of neither tokens nor keys.
    """
    prefixes = re.compile(rf"{re.escape(SOURCE_PREFIX)}|{re.escape(_PRODUCER)}|{re.escape(_FORMAT)}")
    secret = [re.escape(prefixes.sub("", name, count=1)) for name in _variables(entries)]
    return f".*({'|'.join(['secret', 'password', *secret])})"


def _resolved(name: str, value: str, resolve: Callable[[str], str]) -> str:
    escape = jaas_escape if name.endswith(JAAS) else str
    return _REFERENCE.sub(lambda match: escape(resolve(match[0])), value)
