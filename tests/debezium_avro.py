"""Records as Debezium's Avro converter writes them, for tests and measurements without it.

The schemas are those that Debezium 3.6.3 registered for a table of these columns; `test_registry.py` compares.
"""

from __future__ import annotations

import copy
from io import BytesIO
from typing import Any

from fastavro import parse_schema, schemaless_writer

from delta_sync.kafka.consumer import Partition, Records

Schema = Any

SOURCE: Schema = {
    "type": "record",
    "name": "Source",
    "namespace": "io.debezium.connector.postgresql",
    "fields": [
        {"name": "version", "type": "string"},
        {"name": "connector", "type": "string"},
        {"name": "name", "type": "string"},
        {"name": "ts_ms", "type": "long"},
        {
            "name": "snapshot",
            "type": [
                {
                    "type": "string",
                    "connect.version": 1,
                    "connect.parameters": {"allowed": "true,first,first_in_data_collection,last,false,incremental"},
                    "connect.default": "false",
                    "connect.name": "io.debezium.data.Enum",
                },
                "null",
            ],
            "default": "false",
        },
        {"name": "db", "type": "string"},
        {"name": "sequence", "type": ["null", "string"], "default": None},
        {"name": "ts_us", "type": ["null", "long"], "default": None},
        {"name": "ts_ns", "type": ["null", "long"], "default": None},
        {"name": "schema", "type": "string"},
        {"name": "table", "type": "string"},
        {"name": "txId", "type": ["null", "long"], "default": None},
        {"name": "lsn", "type": ["null", "long"], "default": None},
        {"name": "xmin", "type": ["null", "long"], "default": None},
        {"name": "origin", "type": ["null", "string"], "default": None},
        {"name": "origin_lsn", "type": ["null", "long"], "default": None},
    ],
    "connect.name": "io.debezium.connector.postgresql.Source",
}
BINLOG_SOURCE: Schema = {
    "type": "record",
    "name": "Source",
    "namespace": "io.debezium.connector.mariadb",
    "fields": [
        *SOURCE["fields"][:9],
        {"name": "table", "type": ["null", "string"], "default": None},
        {"name": "server_id", "type": "long"},
        {"name": "gtid", "type": ["null", "string"], "default": None},
        {"name": "file", "type": "string"},
        {"name": "pos", "type": "long"},
        {"name": "row", "type": "int"},
        {"name": "thread", "type": ["null", "long"], "default": None},
        {"name": "query", "type": ["null", "string"], "default": None},
    ],
    "connect.name": "io.debezium.connector.mariadb.Source",
}
TRANSACTION: Schema = {
    "type": "record",
    "name": "block",
    "namespace": "event",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "total_order", "type": "long"},
        {"name": "data_collection_order", "type": "long"},
    ],
    "connect.version": 1,
    "connect.name": "event.block",
}
TIMES: Schema = [{"name": name, "type": ["null", "long"], "default": None} for name in ("ts_ms", "ts_us", "ts_ns")]
MOVIE: Schema = [
    {"name": "id", "type": "int"},
    {"name": "title", "type": ["null", "string"], "default": None},
    {"name": "year", "type": ["null", "int"], "default": None},
    {"name": "rating", "type": ["null", "string"], "default": None},
    {"name": "studio_u005fid", "type": ["null", "int"], "default": None},
    {"name": "tags", "type": ["null", "string"], "default": None},
    {
        "name": "updated_u005fat",
        "type": ["null", {"type": "long", "connect.version": 1, "connect.name": "io.debezium.time.MicroTimestamp"}],
        "default": None,
    },
]


def envelope(columns: Schema, table: str = "movie", source: Schema = SOURCE) -> Schema:
    """Return the schema of the events of a table with these columns, by their names in Avro."""
    row = {"type": "record", "name": "Value", "fields": columns, "connect.name": f"movies.public.{table}.Value"}
    return copy.deepcopy(
        {
            "type": "record",
            "name": "Envelope",
            "namespace": f"movies.public.{table}",
            "fields": [
                {"name": "before", "type": ["null", row], "default": None},
                {"name": "after", "type": ["null", "Value"], "default": None},
                {"name": "source", "type": source},
                {"name": "transaction", "type": ["null", TRANSACTION], "default": None},
                {"name": "op", "type": "string"},
                *TIMES,
            ],
            "connect.version": 2,
            "connect.name": f"movies.public.{table}.Envelope",
        }
    )


MESSAGE: Schema = {
    "type": "record",
    "name": "MessageValue",
    "namespace": "io.debezium.connector.postgresql",
    "fields": [
        {"name": "op", "type": "string"},
        TIMES[0],
        {"name": "source", "type": SOURCE},
        {"name": "transaction", "type": ["null", TRANSACTION], "default": None},
        {
            "name": "message",
            "type": {
                "type": "record",
                "name": "Message",
                "namespace": "io.debezium.connector.postgresql",
                "fields": [
                    {"name": "prefix", "type": ["null", "string"], "default": None},
                    {"name": "content", "type": ["null", "bytes"], "default": None},
                ],
            },
        },
    ],
}


def source(lsn: int, table: str = "movie", xid: int = 7000, **more: Any) -> dict[str, Any]:
    """Return the source block of an event."""
    ts_ms = 1_790_000_000_000 + xid
    return {
        "version": "3.6.3.Final",
        "connector": "postgresql",
        "name": "movies",
        "ts_ms": ts_ms,
        "snapshot": "false",
        "db": "studio",
        "sequence": f'["{lsn - 300}","{lsn}"]',
        "ts_us": ts_ms * 1000 + 123,
        "ts_ns": ts_ms * 1_000_000 + 123_456,
        "schema": "public",
        "table": table,
        "txId": xid,
        "lsn": lsn,
        "xmin": None,
        "origin": None,
        "origin_lsn": None,
        **more,
    }


def event(op: str, before: Any, after: Any, lsn: int, **more: Any) -> dict[str, Any]:
    """Return an event. `more` is for its source block."""
    block = source(lsn, **more)
    now_ms = block["ts_ms"] + 9
    return {
        "before": before,
        "after": after,
        "source": block,
        "transaction": None,
        "op": op,
        "ts_ms": now_ms,
        "ts_us": now_ms * 1000,
        "ts_ns": now_ms * 1_000_000,
    }


def binlog_event(op: str, before: Any, after: Any, pos: int, **more: Any) -> dict[str, Any]:
    """Return an event of MariaDB's. `more` is for its source block."""
    ts_ms = 1_790_000_000_000 + pos
    block = {
        "version": "3.6.3.Final",
        "connector": "mariadb",
        "name": "movies",
        "ts_ms": ts_ms,
        "snapshot": "false",
        "db": "studio",
        "sequence": None,
        "ts_us": ts_ms * 1000,
        "ts_ns": ts_ms * 1_000_000,
        "table": "movie",
        "server_id": 1,
        "gtid": "0-1-27",
        "file": "binlog.000012",
        "pos": pos,
        "row": 0,
        "thread": 7,
        "query": None,
    }
    return event(op, before, after, lsn=0) | {"source": block | more}


def movie(number: int, **more: Any) -> dict[str, Any]:
    """Return a row, by its names in Avro."""
    return {
        "id": number,
        "title": f"The film number {number}",
        "year": 1950 + number % 70,
        "rating": f"{number % 100 / 10}",
        "studio_u005fid": number % 50,
        "tags": "a,b,c",
        "updated_u005fat": 1_790_000_000_000_000 + number,
        **more,
    }


class Writer:
    """Writes records in the wire format, and is the registry that knows their schemas."""

    def __init__(self, schemas: dict[int, Schema]) -> None:
        self._schemas = schemas
        self._parsed = {schema_id: parse_schema(copy.deepcopy(schema)) for schema_id, schema in schemas.items()}
        self.asked: list[int] = []

    def schema(self, schema_id: int) -> dict[str, Any]:
        """Return a schema, as `SchemaRegistry.schema` does."""
        self.asked.append(schema_id)
        found: dict[str, Any] = self._schemas[schema_id]
        return found

    def value(self, schema_id: int, datum: Any) -> bytes:
        """Return a record's value."""
        stream = BytesIO()
        stream.write(b"\0" + schema_id.to_bytes(4, "big"))
        schemaless_writer(stream, self._parsed[schema_id], datum)
        return stream.getvalue()


def key_of(number: int) -> bytes:
    """Return something that stands for the key of a row: nobody decodes it."""
    return b"\0\0\0\0\x01" + number.to_bytes(4, "big")


def records(
    values: list[bytes | None],
    keys: list[bytes | None] | None = None,
    epochs: list[bytes | None] | None = None,
    topic: str = "movies.public.movie",
    first_offset: int = 100,
) -> Records:
    """Return records of one partition; without keys each has its own."""
    count = len(values)
    return Records(
        Partition(topic, 0),
        [key_of(number) for number in range(count)] if keys is None else keys,
        values,
        [b"3"] * count if epochs is None else epochs,
        [1_790_000_000_000] * count,
        first_offset + count,
    )
