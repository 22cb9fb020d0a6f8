"""From a specification to the configuration of its connector. Pure: same specification and tables, same bytes.

Secrets stay references (`${env:NAME}`, `${file:/path}`) in everything that is rendered here; whoever starts the
connector resolves them (`delta_sync.secrets.resolve`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from delta_debezium import mysql, postgresql
from delta_debezium.options import Option, check_columns, overridden
from delta_debezium.properties import expression_literal, properties_text
from delta_sync.errors import UsageError
from delta_sync.secrets import has_reference
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Table

OFFSETS_FILE = "offsets.dat"  # of connectors whose server keeps no position for them
SOURCE_PREFIX = "debezium.source."

_REFERENCE = re.compile(r"\$\{(?:env|file):[^}]*\}")


def connector_options(spec: PipelineSpec, tables: Mapping[str, Table], state_dir: str = ".") -> list[Option]:
    """Return the connector's options with the reason for each, in the order in which they are written.

    `tables` has every table of the specification, by its name there. `state_dir` is where a connector that needs files
    of its own keeps them. Raises UsageError for what cannot be meant, naming the option and the reason.
    """
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
        *_offset_options(spec, state_dir),
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


def _offset_options(spec: PipelineSpec, state_dir: str) -> list[Option]:
    at_once = Option(
        "offset.flush.interval.ms", "0", "A batch that was acknowledged is confirmed at once; the default is a minute."
    )
    storage = "org.apache.kafka.connect.storage"
    if spec.source.kind == "postgresql":
        reason = "The slot is the only truth of positions: two records of one thing would differ some day."
        return [Option("offset.storage", f"{storage}.MemoryOffsetBackingStore", reason), at_once]
    return [
        Option("offset.storage", f"{storage}.FileOffsetBackingStore", "The server keeps no position for a client."),
        Option("offset.storage.file.filename", f"{state_dir}/{OFFSETS_FILE}", "Beside the history of the schema."),
        at_once,
    ]


def engine_properties(spec: PipelineSpec, tables: Mapping[str, Table], state_dir: str = ".") -> dict[str, str]:
    """Return the properties of an embedded Debezium Engine with this connector; secrets are still references."""
    config = connector_config(spec, tables, state_dir)
    return config | {option.name: option.value for option in engine_options(spec, state_dir)}


# ── Debezium Server ──────────────────────────────────────────────────────────────────────────────────────────────

MAX_REQUEST_BYTES = (
    16 << 20
)  # three times a row of 5 MB: with its `before`, and escaping; brokers and topics must agree


class KafkaSettings(NamedTuple):
    """Where Debezium Server writes. `producer` has further options of Kafka's producer, which win."""

    bootstrap_servers: str
    registry_url: str  # Apicurio Registry's API: http://host:8080/apis/registry/v3
    producer: Mapping[str, str] = {}
    http_port: int = 8080  # of Debezium Server's health checks


def server_properties(spec: PipelineSpec, tables: Mapping[str, Table], kafka: KafkaSettings) -> str:
    """Return `application.properties` of a Debezium Server that writes Avro to Kafka.

    A reference becomes an environment variable, because `${env:NAME}` means something else there: start the server with
    those of `server_environment`. Raises UsageError.
    """
    if spec.source.kind != "postgresql":
        raise UsageError(
            f"transport: kafka is for PostgreSQL so far, and source.url begins with {spec.source.kind}://."
        )
    entries = _server_entries(spec, tables, kafka)
    variables = _variables(entries)
    return properties_text({name: _expression(value, variables) for name, value in entries.items()})


def server_environment(
    spec: PipelineSpec, tables: Mapping[str, Table], kafka: KafkaSettings, resolve: Callable[[str], str]
) -> dict[str, str]:
    """Return the environment variables that `server_properties` refers to. `resolve` turns a reference into its value.

    The values are escaped as the server expects them: it expands `$` in a variable's value, too.
    """
    variables = _variables(_server_entries(spec, tables, kafka))
    return {variable: expression_literal(resolve(reference)) for reference, variable in variables.items()}


def _server_entries(spec: PipelineSpec, tables: Mapping[str, Table], kafka: KafkaSettings) -> dict[str, str]:
    source = connector_config(spec, tables) | {option.name: option.value for option in _offset_options(spec, ".")}
    # Avro's names are ASCII; this adjustment is the one that keeps different names different.
    source |= {"schema.name.adjustment.mode": "avro_unicode", "field.name.adjustment.mode": "avro_unicode"}
    producer = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "key.serializer": "org.apache.kafka.common.serialization.ByteArraySerializer",
        "value.serializer": "org.apache.kafka.common.serialization.ByteArraySerializer",
        "acks": "all",  # what is confirmed to the source must survive a broker
        "enable.idempotence": "true",  # a retry keeps the order of a key's changes
        "compression.type": "lz4",
        "linger.ms": "5",
        "max.request.size": str(MAX_REQUEST_BYTES),
        **kafka.producer,
    }
    registry = {
        "url": kafka.registry_url,
        "auto-register": "true",
        "find-latest": "false",
        "dereference-schema": "true",  # else a schema refers to others, and cannot be read by itself
        "headers.enabled": "false",  # the schema's id is in the payload, as Confluent's format has it
    }
    return {
        "quarkus.http.port": str(kafka.http_port),
        "quarkus.log.console.json.enabled": "false",
        "debezium.sink.type": "kafka",
        **{f"debezium.sink.kafka.producer.{name}": value for name, value in producer.items()},
        "debezium.format.key": "avro",
        "debezium.format.value": "avro",
        **{f"debezium.format.apicurio.registry.{name}": value for name, value in registry.items()},
        **{f"{SOURCE_PREFIX}{name}": value for name, value in source.items()},
    }


def _variables(entries: Mapping[str, str]) -> dict[str, str]:
    found = dict.fromkeys(reference for value in entries.values() for reference in _REFERENCE.findall(value))
    return {reference: f"DELTA_SECRET_{number}" for number, reference in enumerate(found, 1)}


def _expression(value: str, variables: Mapping[str, str]) -> str:
    if not has_reference(value):
        return expression_literal(value)
    literals, references = _REFERENCE.split(value), _REFERENCE.findall(value)
    expanded = [f"${{{variables[reference]}}}" for reference in references]
    return "".join(expression_literal(text) + then for text, then in zip(literals, [*expanded, ""], strict=True))
