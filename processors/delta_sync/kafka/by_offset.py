"""Events of connectors that Delta does not know itself: their versions are their places in the topics of their tables.

All changes of a table are in one partition, in the order in which Debezium delivered them, and its incremental
snapshots put the rows that they read where these are newer than what is before, and older than what is behind. So the
offset is a position: as good a one as the connector's order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from io import BytesIO
from typing import Any, NamedTuple, cast

import orjson
from fastavro import parse_schema

from delta_sync.decoding import Event, Image, Stretch
from delta_sync.errors import PipelineStopped, SchemaUnfit, UndecodableChange
from delta_sync.kafka.avro import (
    HEADER_BYTES,
    MAGIC,
    PLACEHOLDER,
    DecodedRecords,
    Schemas,
    UndecodableRecord,
    bare,
    row_of,
    schemaless_reader,
)
from delta_sync.kafka.consumer import Records
from delta_sync.sources.debezium.codec import Convert, columns_of
from delta_sync.tables import Table, key_text
from delta_sync.versions import MAX_EPOCH, POSITION_BITS, position_in_topic

TableOf = Callable[[str, frozenset[str]], Table]
"""The table of a name as it is now, for records that have these columns. Raises EpochRose if it is another by now."""


class Placed(NamedTuple):
    """A record that is to be read: which one of those that were polled, and its epoch and position."""

    number: int
    epoch: int
    position: int


class OffsetDecoder:
    """Decodes records of some topics, each of the table that `tables` has for it. Used by one thread."""

    def __init__(self, schemas: Schemas, tables: Mapping[str, str]) -> None:
        self._schemas = schemas
        self._tables = tables
        self._readers: dict[bytes, EnvelopeReader] = {}  # by a record's first bytes

    def decode(self, polled: Iterable[Records], table_of: TableOf, each_of: Collection[str] = ()) -> DecodedRecords:
        """Return the events of some records in the order of each topic, as `AvroDecoder.decode` does.

        Raises PipelineStopped for a record of a second partition: no version tells its place among the first one's.
        """
        undecodable: list[UndecodableRecord] = []
        stretches: list[Stretch] = []
        count = 0
        for records in polled:
            if records.partition.number:
                raise PipelineStopped(second_partition(records.partition.topic))
            placed, events = _newest(records, undecodable, each=records.partition.topic in each_of)
            count += events
            stretches += self._read(records, placed, table_of, undecodable)
        stretches.sort(key=lambda stretch: int(stretch.events[-1]["source"]["ts_ms"]))
        return DecodedRecords(stretches, undecodable, count)

    def _read(
        self, records: Records, placed: Iterable[Placed], table_of: TableOf, undecodable: list[UndecodableRecord]
    ) -> list[Stretch]:
        name = self._tables[records.partition.topic]
        stretches: list[Stretch] = []
        events: list[Event] = []
        epoch_now = -1
        for index, epoch, position in placed:
            value = records.values[index]
            assert value is not None, "tombstones are not placed"
            try:
                reader = self.reader(value)
                table = table_of(name, reader.names)
                event = reader.event(value, table, position)
            except UndecodableChange as error:
                undecodable.append(_undecodable(records, index, error))
                continue
            if epoch != epoch_now:
                epoch_now, events = epoch, []
                stretches.append(Stretch(epoch, events))
            events.append(event)
        return stretches

    def reader(self, value: bytes) -> EnvelopeReader:
        """Return how a record is read. Raises Transient or UndecodableChange."""
        start = value[:HEADER_BYTES]
        reader = self._readers.get(start)
        if reader is None:
            schema_id = schema_id_of(value)
            reader = self._readers[start] = EnvelopeReader(schema_id, self._schemas.schema(schema_id))
        return reader


class EnvelopeReader:
    """How the records of one schema are read. `names` are the columns that they have."""

    def __init__(self, schema_id: int, schema: Mapping[str, Any]) -> None:
        """Raise SchemaUnfit if it is not one of Debezium's events of rows."""
        fields = {field["name"]: field["type"] for field in schema["fields"]}
        row = row_of(fields)
        source: Mapping[str, Any] = fields.get("source", {})
        of_source: list[dict[str, Any]] = source.get("fields", [])
        in_source = {field["name"] for field in of_source}
        if row is None or "op" not in fields or "ts_ms" not in in_source:
            raise SchemaUnfit(
                f"Schema {schema_id} ({schema.get('name')}) is not one of Debezium's events of rows, which have before,"
                " after, op, and source with ts_ms."
            )
        self.columns = columns_of(row)
        self.names = frozenset(one.column.name for one in self.columns)
        plain = bare(schema)
        plain_row = row_of({field["name"]: field["type"] for field in plain["fields"]})
        assert plain_row is not None, "it has one, as the schema does"
        for field, one in zip(plain_row["fields"], self.columns, strict=True):
            field["name"] = one.column.name
        self._schema = parse_schema(plain)
        self._steps: list[tuple[str, Convert]] = [
            (one.column.name, one.convert) for one in self.columns if one.convert is not None
        ]

    def event(self, value: bytes, table: Table, position: int) -> Event:
        """Return a record's event with the columns that the table has now. Raises UndecodableChange."""
        stream = BytesIO(value)
        stream.seek(HEADER_BYTES)
        try:
            found = schemaless_reader(stream, self._schema, None)
        except Exception as error:  # what it raises for bytes of another schema is not documented
            raise UndecodableChange(f"The record's bytes do not fit its schema: {error!r}.") from error
        op, before, after = found["op"], found["before"], found["after"]
        if op not in ("c", "u", "d", "r", "t") or (op != "t" and after is None and (before is None or op != "d")):
            raise UndecodableChange(f"The event has op {op!r}, and not the image that belongs to it.")
        if op == "t":
            before = after = None
        return {
            "op": op,
            "before": None if before is None else self._image(before, table),
            "after": None if after is None else self._image(after, table, whole=True),
            "source": {
                "schema": table.schema,
                "table": table.name,
                "lsn": position,
                "txId": 0,
                "ts_ms": found["source"]["ts_ms"],
            },
        }

    def _image(self, image: Image, table: Table, *, whole: bool = False) -> Image:
        """Read an image's values, in the order of the table's columns; what it lacks is None."""
        lacking = [name for name, value in image.items() if _was_left_out(value)] if whole else ()
        name = ""
        try:
            for name, convert in self._steps:
                value = image[name]
                if value is not None and not _was_left_out(value):
                    image[name] = convert(value)
        except Exception as error:
            raise UndecodableChange(f"{table.id}.{name}: the event's value cannot be read ({error!r}).") from error
        if lacking:
            key = key_text(tuple(image.get(part) for part in table.key))
            raise UndecodableChange(
                f"The event lacks {', '.join(lacking)}, which the source leaves out when it does not change, and Delta"
                f" has no client of this database to read it by: type `deltactl dump start … --table {table.id} --keys"
                f" {key}`."
            )
        return {column.name: image.get(column.name) for column in table.columns}


_PLACEHOLDER_TEXT = PLACEHOLDER.decode()


def _was_left_out(value: object) -> bool:
    return value == _PLACEHOLDER_TEXT if type(value) is str else type(value) is bytes and value == PLACEHOLDER


def schema_id_of(value: bytes) -> int:
    """Return the id of the schema that a record was written with. Raises UndecodableChange."""
    if len(value) < HEADER_BYTES or value[:1] != MAGIC:
        raise UndecodableChange(
            f"The record is not in Confluent's wire format: it begins with {value[:HEADER_BYTES].hex(' ') or 'nothing'}"
            " instead of a zero byte and a schema's id."
        )
    return int.from_bytes(value[1:HEADER_BYTES], "big")


def epoch_and_term(header: bytes | None) -> tuple[int, int]:
    """Return what the header `delta.epoch` says: `7t12`, in JSON, bare or as a string. Raises UndecodableChange."""
    text = b"" if header is None else header
    try:
        value: object = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = text.decode(errors="replace")
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("payload")
    epoch, colon, term = value.partition("t") if isinstance(value, str) else ("", "", "")
    if not (colon and epoch.isdecimal() and term.isdecimal() and 0 < int(epoch) <= MAX_EPOCH):
        raise UndecodableChange(
            f"The record's header delta.epoch is {header!r}, not an epoch and a term: this record is not of Delta's"
            " connector."
        )
    return int(epoch), int(term)


def second_partition(topic: str) -> str:
    """Return what is wrong with a topic that has more than one partition, and what to do."""
    return (
        f"Topic {topic} has more than one partition, so the places of its records no longer tell which change of a row"
        " is newer: delete it, and type the `deltactl pipeline create` again; every table is loaded again then."
    )


def _newest(records: Records, undecodable: list[UndecodableRecord], *, each: bool) -> tuple[list[Placed], int]:
    """Return the newest record of each key, or each record, in the topic's order; and how many there are.

    Newest by version: behind those of a connector's term there may be some of one that was frozen.
    """
    first = records.next_offset - len(records.values)
    places: dict[bytes | None, tuple[int, int]] = {}
    newest: dict[bytes | int, tuple[int, Placed]] = {}  # by key; a record without one, and each of `each`, by its index
    count = 0
    for index, value in enumerate(records.values):
        if value is None:
            continue
        count += 1
        header = records.epochs[index]
        try:
            if header not in places:
                places[header] = epoch_and_term(header)
        except UndecodableChange as error:
            undecodable.append(_undecodable(records, index, error))
            continue
        epoch, term = places[header]
        position = position_in_topic(term, first + index)
        key = records.keys[index]
        name = index if each or key is None else key
        version = epoch << POSITION_BITS | position
        known = newest.get(name)
        if known is not None:
            if known[0] > version:
                continue
            del newest[name]  # so that it comes last
        newest[name] = version, Placed(index, epoch, position)
    return [placed for _, placed in newest.values()], count


def _undecodable(records: Records, index: int, error: UndecodableChange) -> UndecodableRecord:
    value = records.values[index]
    assert value is not None
    offset = records.next_offset - len(records.values) + index
    return UndecodableRecord(records.partition, offset, records.keys[index], value, records.timestamps_ms[index], error)
