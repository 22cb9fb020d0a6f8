"""Tables as their topics show them: by the schemas of the last record of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from delta_sync.errors import UndecodableChange, UsageError
from delta_sync.kafka.avro import Schemas, column_name, row_of
from delta_sync.kafka.by_offset import schema_id_of
from delta_sync.kafka.last_records import LastRecord, TopicEnds
from delta_sync.kafka.names import topic_name
from delta_sync.kafka.registry import SchemaRegistry
from delta_sync.logs import logger
from delta_sync.sources.debezium.codec import columns_of
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Table

log = logger(__name__)

LAST_RECORDS = 20  # one that is not Debezium's is passed over


class TopicCatalogue:
    """The tables of a pipeline's topics. Used by one thread; methods raise Transient.

    What was seen once is remembered: a topic whose last record has expired still is that of the table.
    """

    def __init__(self, spec: PipelineSpec, ends: TopicEnds | None = None, schemas: Schemas | None = None) -> None:
        assert spec.kafka is not None, "such a source has transport: kafka"
        self._spec = spec
        self._ends = ends or TopicEnds(spec.kafka)
        self._schemas: Schemas = schemas or SchemaRegistry(spec.kafka.registry)
        self._seen: dict[str, tuple[int, Table]] = {}  # by table: up to which place of its topic
        self.ambiguous: dict[str, list[str]] = {}  # by table, columns in which a NULL arrives as the default

    def close(self) -> None:
        """Release connections. Idempotent."""
        self._ends.close()

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables of which a record has come. Raises UsageError for one whose records have no key."""
        topics = {name: topic_name(self._spec.name, name) for name in names}
        ends = self._ends.ends(topics.values())
        for name, topic in topics.items():
            begin, end = ends.get(topic, (0, 0))
            seen_to, _ = self._seen.get(name, (0, None))
            start = max(begin, end - LAST_RECORDS)
            if start < end != seen_to:
                found = self._newest(name, self._ends.read(topic, start, end))
                if found is not None:
                    self._seen[name] = end, found
        return {name: self._seen[name][1] for name in names if name in self._seen}

    def _newest(self, name: str, records: Sequence[LastRecord]) -> Table | None:
        for record in reversed(records):
            if record.value is None:
                continue
            try:
                schema = self._schemas.schema(schema_id_of(record.value))
                self.ambiguous[name] = ambiguous(schema)
                return table_of(name, self._fields(record.key), schema)
            except UndecodableChange as error:
                log.warning("record_passed_over", table=name, offset=record.offset, reason=str(error))
        return None

    def _fields(self, key: bytes | None) -> Sequence[str]:
        if key is None:
            return ()
        return [field["name"] for field in self._schemas.schema(schema_id_of(key))["fields"]]


def table_of(name: str, key: Sequence[str], schema: Mapping[str, Any]) -> Table | None:
    """Return the table whose events have this schema; None when it is none of rows. Raises UsageError without a key.

    `key` are the fields of a record's key. Pure.
    """
    row = row_of({field["name"]: field["type"] for field in schema.get("fields", ())})
    if row is None:
        return None
    if not key:
        raise UsageError(
            f"Records of table {name} have no key: give it a primary key, or name columns by which its rows are told"
            " apart in connector: message.key.columns."
        )
    columns = tuple(one.column for one in columns_of(row))
    head, _, tail = name.rpartition(".")
    return Table(head, tail, columns, tuple(column_name(field) for field in key))


def ambiguous(schema: Mapping[str, Any]) -> list[str]:
    """Return the columns in which a NULL arrives as the column's default. Pure."""
    row = row_of({field["name"]: field["type"] for field in cast("list[dict[str, Any]]", schema.get("fields", []))})
    return [] if row is None else [one.column.name for one in columns_of(row) if one.default]
