"""From Avro records to Debezium events as `decoding.py` takes them; what cannot be read comes back as what it is.

A record is a zero byte, the four bytes of its schema's id, and an envelope: the images `before` and `after`, then
`source` with the connector's version and name, position and transaction, then `op` and times. All but the images costs
most of the time of reading an envelope as a whole, for five values (of MariaDB's the position is three fields, and
there is no transaction). So for each schema a regular expression is learnt
from the first record, which finds these five in the bytes of the others, and tells where the images end. A record that
it does not fit is read as a whole.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from io import BytesIO
from typing import Any, Final, NamedTuple, Protocol, TypeGuard, cast

import orjson
from fastavro import parse_schema
from fastavro import schemaless_reader as _untyped_reader  # pyright: ignore[reportUnknownVariableType] -- its IO

from delta_sync.decoding import Event, Image, Stretch
from delta_sync.errors import SchemaUnfit, UndecodableChange
from delta_sync.kafka.consumer import Partition, Records
from delta_sync.sources.mysql.claims import MAX_OFFSET, OFFSET_BITS, binlog_source, position_of
from delta_sync.versions import MAX_EPOCH, POSITION_BITS

Json = Any  # an Avro schema or a part of it


class Schemas(Protocol):
    """Where schemas come from: `SchemaRegistry`."""

    def schema(self, schema_id: int) -> dict[str, Any]:
        """Return a schema. Raises Transient, after which the same call may be made again, or SchemaUnfit."""
        ...


class UndecodableRecord(NamedTuple):
    """A record that is no event. `offset` is exact while the topic has no gaps; Delta's are not compacted."""

    partition: Partition
    offset: int
    key: bytes | None
    value: bytes
    timestamp_ms: int
    error: UndecodableChange


class DecodedRecords(NamedTuple):
    """What some records hold. `events` counts those, too, that a newer one of the same key made needless."""

    stretches: list[Stretch]
    undecodable: list[UndecodableRecord]
    events: int


schemaless_reader = cast("Callable[[BytesIO, Json, None], Event]", _untyped_reader)

MAGIC = b"\0"
PLACEHOLDER = b"__debezium_unavailable_value"  # in place of a long value that did not change
HEADER_BYTES = 5  # the magic byte and the schema's id
MAX_EPOCH_HEADERS = 1000  # different ones, remembered; there is one for each start of a connector at most


class AvroDecoder:
    """Decodes records, with each record's own schema. Used by one thread."""

    def __init__(self, schemas: Schemas, columns: Iterable[str] = ()) -> None:
        self._schemas = schemas
        self._readers: dict[bytes, _Reader | SchemaUnfit] = {}  # by a record's first bytes
        self._epochs: dict[bytes | None, int | UndecodableChange] = {}
        self._names: dict[str, str] = {}
        self.use(columns)

    def use(self, columns: Iterable[str]) -> None:
        """Be told the names of the tables' columns: at the start, and when the catalogue was read again.

        Debezium's way to write a name that Avro does not allow is ambiguous (`column_name`); among these it is not.
        """
        self._names = {adjusted_name(name): name for name in columns}
        self._readers.clear()

    def decode(self, polled: Iterable[Records], each_of: Collection[str] = ()) -> DecodedRecords:
        """Return the events of some records, in the order of each partition, without tombstones.

        Of the events of one key and one partition only the one with the highest version comes out, except of the topics
        `each_of`. Raises Transient when the registry does not have a schema now: nothing has happened then, the same
        call may be made again.
        """
        undecodable: list[UndecodableRecord] = []
        stretches: list[Stretch] = []
        count = 0
        for records in polled:
            found, events = self._find(records, undecodable, each=records.partition.topic in each_of)
            count += events
            stretches += _read(records, found, undecodable)
        # Partitions have no order among themselves; the last event is the one that tells how far the log has got.
        stretches.sort(key=_newest_ts_ms)
        return DecodedRecords(stretches, undecodable, count)

    def _find(
        self, records: Records, undecodable: list[UndecodableRecord], *, each: bool
    ) -> tuple[list[_Found | None], int]:
        """Return where the newest event of each key is, or each event, in the records' order; and how many there are.

        Newest by version, not by place: a connector that was frozen may, when it goes on, send what it still had in
        its hands after another has sent newer changes, and is then ended. The last record of a key is not the newest
        then, and nothing would bring the newest one again. Two tables cannot have the same key: the schema's id is a
        part of it. A key that is a placeholder is not the key of one row.
        """
        keys, values, epochs = records.keys, records.values, records.epochs
        readers, known_epochs = self._readers, self._epochs
        found: list[_Found | None] = []
        newest: dict[bytes, tuple[int, int]] = {}  # by key: version, place in `found`
        count = 0
        relearnt: set[_Reader] = set()
        last_xid, xid, last_ts, ts_ms = b"", 0, b"", 0  # most events share them with the one before
        for index, value in enumerate(values):
            if value is None:
                continue
            count += 1
            try:
                epoch = known_epochs.get(epochs[index])
                if type(epoch) is not int:
                    epoch = self._epoch(epochs[index])
                reader = readers.get(value[:HEADER_BYTES])
                if type(reader) is not _Reader:
                    reader = self._reader(value)
                template = reader.template
                event: Event | None = None
                start = -1
                match = None
                if template is not None:
                    start = value.rfind(template.lead)
                    match = template.tail.match(value, start) if start >= 0 else None
                if template is not None and match is not None:
                    raw_ts, raw_xid, raw_lsn, op = match.group(*template.groups)
                    lsn = template.position(raw_lsn)
                    if lsn >> POSITION_BITS:
                        raise UndecodableChange(f"The event's lsn is {lsn}.")
                    if raw_xid != last_xid:
                        last_xid, xid = raw_xid, _long(raw_xid)
                    if raw_ts != last_ts:
                        last_ts, ts_ms = raw_ts, _long(raw_ts)
                    one: _Found = index, epoch, reader, template, start, op, lsn, xid, ts_ms, None
                else:
                    event = reader.whole(value)
                    lsn = event["source"]["lsn"]
                    if start < 0 and reader not in relearnt:
                        relearnt.add(reader)
                        reader.learn(value, event)
                    one = index, epoch, reader, template, 0, b"", lsn, 0, 0, event
            except UndecodableChange as error:
                undecodable.append(_undecodable(records, index, error))
                continue
            key = keys[index]
            if key is not None and not each and PLACEHOLDER not in key:
                version = epoch << POSITION_BITS | lsn
                known = newest.get(key)
                if known is not None:
                    if known[0] > version:
                        continue
                    found[known[1]] = None
                newest[key] = version, len(found)
            found.append(one)
        return found, count

    def _reader(self, value: bytes) -> _Reader:
        """Return how a record is read. Raises Transient or UndecodableChange."""
        start = value[:HEADER_BYTES]
        reader = self._readers.get(start)
        if reader is None:
            if len(start) < HEADER_BYTES or start[:1] != MAGIC:
                raise UndecodableChange(
                    f"The record is not in Confluent's wire format: it begins with {start.hex(' ') or 'nothing'} "
                    "instead of a zero byte and a schema's id."
                )
            schema_id = int.from_bytes(start[1:], "big")
            try:
                reader = _Reader(schema_id, self._schemas.schema(schema_id), self._names)
            except SchemaUnfit as error:
                reader = error
            self._readers[start] = reader
        if isinstance(reader, SchemaUnfit):
            raise SchemaUnfit(str(reader))  # a new one: an exception grows by each traceback
        return reader

    def _epoch(self, header: bytes | None) -> int:
        epoch = self._epochs.get(header)
        if epoch is None:
            if len(self._epochs) >= MAX_EPOCH_HEADERS:
                self._epochs.clear()
            try:
                epoch = epoch_of(header)
            except UndecodableChange as error:
                epoch = error
            self._epochs[header] = epoch
        if isinstance(epoch, UndecodableChange):
            raise UndecodableChange(str(epoch))
        return epoch


_Found = tuple[int, int, "_Reader", "_Template | None", int, bytes, int, int, int, Event | None]
"""A record's index, epoch, reader, template; what was found with it: where the images end, op, lsn, txId, ts_ms; or the
event, where it was read as a whole. A plain tuple: there is one for each record."""


def _read(records: Records, found: Iterable[_Found | None], undecodable: list[UndecodableRecord]) -> list[Stretch]:
    """Return the events of one partition. What cannot be read is added to `undecodable`."""
    values = records.values
    stretches: list[Stretch] = []
    epoch_now = -1
    events: list[Event] = []
    for one in found:
        if one is None:
            continue
        index, epoch, reader, template, start, op, lsn, xid, ts_ms, event = one
        if event is None:
            value = values[index]
            assert value is not None
            try:
                event = reader.images(value, start, op)
            except UndecodableChange as error:
                undecodable.append(_undecodable(records, index, error))
                continue
            event["op"] = op.decode()
            assert template is not None
            event["source"] = {
                "schema": template.schema,
                "table": template.table,
                "lsn": lsn,
                "txId": xid,
                "ts_ms": ts_ms,
            }
        if epoch != epoch_now:
            epoch_now = epoch
            events = []
            stretches.append(Stretch(epoch, events))
        events.append(event)
    return stretches


def _undecodable(records: Records, index: int, error: UndecodableChange) -> UndecodableRecord:
    value = records.values[index]
    assert value is not None
    offset = records.next_offset - len(records.values) + index
    return UndecodableRecord(records.partition, offset, records.keys[index], value, records.timestamps_ms[index], error)


def _newest_ts_ms(stretch: Stretch) -> int:
    ts_ms: int = stretch.events[-1]["source"]["ts_ms"]
    return ts_ms


def epoch_of(header: bytes | None) -> int:
    """Return the epoch that the header `delta.epoch` says: a number in JSON, bare, as a string, or with its schema.

    Kafka Connect's converter writes `{"schema": …, "payload": 3}` unless it is told `schemas.enable=false`.
    """
    try:
        value: object = None if header is None else orjson.loads(header)
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("payload")
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if type(value) is not int or not 0 < value <= MAX_EPOCH:
        raise UndecodableChange(
            f"The record's header delta.epoch is {header!r}, not an epoch: this record is not of Delta's connector."
        )
    return value


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────


def adjusted_name(name: str) -> str:
    """Return what Debezium makes of a column's name with `field.name.adjustment.mode=avro_unicode`.

    A character that is neither an ASCII letter nor a digit (at the beginning: nor a letter) becomes `_u` and its code
    in hexadecimal: of UTF-16, so that there may be two; after `00` up to U+00FF, and without leading zeros above. So a
    code has three or four digits, and `_u4302` may be U+4302 or U+0430 and a 2. As in 3.6.3's
    `UnicodeReplacementFunction`.
    """
    if name.isascii() and name.isalnum() and not name[0].isdigit():
        return name
    utf16 = name.encode("utf-16-be", "surrogatepass")
    parts: list[str] = []
    for code in struct.unpack(f">{len(utf16) // 2}H", utf16):
        character = chr(code)
        if character.isascii() and (character.isalpha() or (parts and character.isdigit())):
            parts.append(character)
        else:
            parts.append(f"_u00{code:x}" if code < 0x100 else f"_u{code:x}")
    return "".join(parts)


_ADJUSTED = re.compile(r"_u([0-9a-f]{3,4})")


def column_name(adjusted: str) -> str:
    """Return a column's name from what Debezium made of it. Of two that are possible: the one with the longer code."""
    if "_u" not in adjusted:
        return adjusted
    name = _ADJUSTED.sub(lambda match: chr(int(match[1], 16)), adjusted)
    return name.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "replace")


# ── schemas ──────────────────────────────────────────────────────────────────────────────────────────────────────

_SOURCE = frozenset({"schema", "table", "lsn", "txId", "ts_ms"})  # what is read of it
_BINLOG_SOURCE = frozenset({"db", "table", "file", "pos", "row", "ts_ms"})  # … of a source with a binary log
_IMAGES = frozenset({"before", "after"})


class _Reader:
    """How the records of one schema are read. `template` is None until `learn` has found one."""

    def __init__(self, schema_id: int, schema: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Raise SchemaUnfit if it is not one of Debezium's events."""
        envelope = bare(schema)
        fields = {field["name"]: field["type"] for field in envelope["fields"]}
        row = row_of(fields)
        source = fields.get("source")
        of_source = {field["name"] for field in source.get("fields", ())} if _is_object(source) else set[str]()
        self._has_binlog = of_source >= _BINLOG_SOURCE
        if (
            not (of_source >= _SOURCE or self._has_binlog)
            or "op" not in fields
            or (row is None and "message" not in fields)
        ):
            raise SchemaUnfit(
                f"Schema {schema_id} ({schema.get('name')}) is not one of Debezium's events, which have before, after,"
                " op, and source with ts_ms, table and, of PostgreSQL, schema, lsn and txId, of MariaDB db, file, pos"
                " and row: this record is not of Delta's connector."
            )
        self._floats: list[str] = []
        self._defaults: list[tuple[str, object]] = []
        if row is not None:
            whole_row = row_of({field["name"]: field["type"] for field in schema["fields"]})
            assert whole_row is not None
            for field, whole_field in zip(row["fields"], whole_row["fields"], strict=True):
                field["name"] = names.get(field["name"]) or column_name(field["name"])
                self._defaults += [(field["name"], value) for value in _defaults(whole_field)]
            self._floats = [field["name"] for field in row["fields"] if _has_float(field["type"])]
        self._envelope = envelope
        self._whole = parse_schema(envelope)
        self._has_rows = row is not None
        ordered = list(fields)
        self._images: Json = None  # of what comes before `source`, if that is the images and no more
        if sorted(ordered[: ordered.index("source")]) == ["after", "before"]:
            self._images = parse_schema(envelope | {"fields": envelope["fields"][:2]})
        self.template: _Template | None = None

    def whole(self, value: bytes) -> Event:
        """Return a record's event, with all that it has. Raises UndecodableChange."""
        event, end = self._decode(value, self._whole)
        if end != len(value):
            raise UndecodableChange(f"The record goes on for {len(value) - end} bytes after the event's end.")
        if self._has_binlog:
            event["source"] = binlog_source(event["source"], event["op"])
        source = event["source"]
        lsn, xid = source["lsn"], source["txId"]
        if type(lsn) is not int or lsn >> POSITION_BITS or type(source["ts_ms"]) is not int:
            raise UndecodableChange(f"The event's lsn is {lsn!r}, its ts_ms {source['ts_ms']!r}.")
        op = event["op"]
        if op != "m":
            if type(xid) is not int:
                raise UndecodableChange("The event has no txId.")
            self._check_images(event, op)
        elif "message" not in event:
            raise UndecodableChange("The event is said to be of a message, and has none.")
        return event

    def images(self, value: bytes, end: int, op: bytes) -> Event:
        """Return a dict with a record's `before` and `after`, which end there. Raises UndecodableChange."""
        event, found_end = self._decode(value, self._images)
        if found_end != end:
            raise UndecodableChange(f"The images end after {found_end} bytes instead of {end}.")
        self._check_images(event, op.decode())
        return event

    def _decode(self, value: bytes, schema: Json) -> tuple[Event, int]:
        stream = BytesIO(value)
        stream.seek(HEADER_BYTES)
        try:
            event = schemaless_reader(stream, schema, None)
        except Exception as error:  # what it raises for bytes of another schema is not documented
            raise UndecodableChange(f"The record's bytes do not fit its schema: {error!r}.") from error
        return event, stream.tell()

    def _check_images(self, event: Event, op: str) -> None:
        """`decoding.py` takes the key from `after`, or else from `before`."""
        if not self._has_rows:
            raise UndecodableChange(f"The event has op {op!r}, and no images.")
        after, before = event["after"], event["before"]
        if op == "t":
            return
        if after is None and (before is None or op != "d"):
            raise UndecodableChange(f"The event has op {op!r}, and not the image that belongs to it.")
        if self._floats:
            for image in (after, before):
                if image is not None:
                    _shorten(image, self._floats)
        if self._defaults and after is not None:
            for name, default in self._defaults:
                if default is _ANY or after[name] == default:
                    event["unsure"] = True

    def learn(self, value: bytes, event: Event) -> None:
        """Try to find a template in a record that was read as a whole, and in none before."""
        if self._images is None or event["op"] == "m":
            return
        whole, _ = self._decode(value, self._whole)  # with all of `source`, of which a binary log's keeps little
        template = _template(self._envelope, whole)
        if template is None:
            return
        start = value.rfind(template.lead)
        match = template.tail.match(value, start)
        if match is None or self._decode(value, self._images)[1] != start:
            return
        raw_ts, raw_xid, raw_lsn, op = match.group(*template.groups)
        source = event["source"]
        found = _long(raw_ts), _long(raw_xid), template.position(raw_lsn), op.decode()
        if found == (source["ts_ms"], source["txId"], source["lsn"], event["op"]):
            self.template = template


def row_of(fields: Mapping[str, Json]) -> dict[str, Any] | None:
    """Return the record of a row: defined where it comes first, and referred to by its name where it comes second."""
    if not fields.keys() >= _IMAGES:
        return None
    for name in ("before", "after"):
        union = fields[name]
        for branch in union if _is_list(union) else [union]:
            if _is_object(branch) and branch["type"] == "record":
                return branch
    return None


_ANY: Final = object()  # any value


def _defaults(field: Mapping[str, Any]) -> list[object]:
    """Return the values of a nullable column that may stand for NULL.

    The converters of Apicurio (3.2) and Confluent (before 7.3) write a column's default in place of NULL, and have no
    option not to. So its default may be one or the other.
    """
    kind = field["type"]
    if not _is_list(kind) or "null" not in kind:
        return []
    found = [field.get("default")]
    found += [branch.get("connect.default") for branch in kind if _is_object(branch)]
    others = [branch for branch in kind if branch != "null"]
    plain = bare(others[0]) if len(others) == 1 else None
    return [_default(plain, value) for value in found if value is not None]


def _default(kind: Json, value: Any) -> object:
    match kind:
        case "boolean" | "int" | "long" | "double" | "string":
            return value
        case "float":
            return shortened(value)
        case "bytes" if isinstance(value, str):
            return value.encode("latin-1", "replace")  # what JSON has for Avro's bytes
        case _:
            return _ANY


def _is_list(value: Json) -> TypeGuard[list[Json]]:
    return isinstance(value, list)


def _is_object(value: Json) -> TypeGuard[dict[str, Json]]:
    return isinstance(value, dict)


def bare(schema: Json) -> Json:
    """Return a copy of a schema with nothing in it but what tells how bytes are read.

    So a logical type does not turn numbers into values of its own kind: `codec.py` expects them as they are.
    """
    if isinstance(schema, str):
        return schema
    if _is_list(schema):
        return [bare(branch) for branch in schema]
    match schema["type"]:
        case "record" | "error":
            fields = [{"name": field["name"], "type": bare(field["type"])} for field in schema["fields"]]
            return _named(schema) | {"type": "record", "fields": fields}
        case "enum":
            return _named(schema) | {"symbols": schema["symbols"]}
        case "fixed":
            return _named(schema) | {"size": schema["size"]}
        case "array":
            return {"type": "array", "items": bare(schema["items"])}
        case "map":
            return {"type": "map", "values": bare(schema["values"])}
        case other:
            return bare(other)


def _named(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("type", "name", "namespace") if key in schema}


# ── reals ────────────────────────────────────────────────────────────────────────────────────────────────────────

_REAL = struct.Struct("<f")


def _has_float(schema: Json) -> bool:
    """Tell whether it is a float (of four bytes), or an array of such."""
    if _is_list(schema):
        return any(map(_has_float, schema))
    return schema == "float" or (_is_object(schema) and _has_float(schema.get("items", "")))


def _shorten(image: Image, names: Iterable[str]) -> None:
    for name in names:
        image[name] = shortened(image[name])


def shortened(value: Any) -> Any:
    """Return the number with the fewest digits that is the same real: what JSON has, and what PostgreSQL writes.

    Read from four bytes, 0.1 is 0.10000000149011612.
    """
    if _is_list(value):
        return [shortened(element) for element in value]
    if type(value) is not float or value - value != 0:  # not a number or infinite
        return value
    packed = _REAL.pack(value)
    # Any number of six digits survives as a real, but for the smallest ones; nine digits tell all reals apart.
    for digits in (6, 7, 8) if abs(value) >= _SMALLEST_NORMAL_REAL else range(1, 9):
        short = float(f"{value:.{digits}g}")
        if abs(short) <= _LARGEST_REAL and _REAL.pack(short) == packed:
            return short
    return float(f"{value:.9g}")


_LARGEST_REAL = 3.4028235e38
_SMALLEST_NORMAL_REAL = 2.0**-126

# ── templates ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Template(NamedTuple):
    """What the records of one schema and one connector have in common, from `source` on.

    `lead` is how `source` begins, with what never changes: a record's last place where it stands is `source`. `tail`
    matches from there to the record's end, with the groups ts_ms, txId, lsn, op. `position` reads the lsn.
    """

    lead: bytes
    tail: re.Pattern[bytes]
    groups: tuple[int, int, int, int]
    schema: str
    table: str
    position: Callable[[bytes], int]


_GROUPS = ("ts_ms", "txId", "lsn", "op")
_CONSTANT = frozenset({"version", "connector", "name", "snapshot", "db", "schema", "table"})
_LONG = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
# A sequence is a JSON array of two positions, a GTID some numbers; their length is one byte, for it is below 64.
_NULLABLE_STRINGS = {"sequence": rb"[\x00-\x7f]\[[^\]]*\]", "gtid": rb"[\x00-\x7f][0-9a-f:,-]*"}
_STRINGS = _NULLABLE_STRINGS | {"op": rb"\x02(?P<op>[crudt])"}
_PLACE = ["file", "pos", "row"]  # in a binary log, in this order
_FILE = re.compile(r"(.*\.)\d{6}", re.DOTALL)
_FILE_DIGITS = 6  # a server's files get a seventh after 31 years at one a quarter of an hour: that is read as a whole
MIN_LEAD_BYTES = (
    16  # shorter, and it might stand in a row by chance, which costs time; version, connector and name are 25
)


def _template(envelope: Json, event: Event) -> _Template | None:
    """Return the template for an event's schema; None if the schema has what templates do not know."""
    source = event["source"]
    names = list(source)
    of_binlog = _binlog_patterns(source["file"]) if "file" in names else {}
    if of_binlog is None or (of_binlog and names[names.index("file") :][: len(_PLACE)] != _PLACE):
        return None
    patterns: list[bytes] = []
    lead = b""
    leading = True
    for field in envelope["fields"][2:]:
        inside: list[tuple[str, Json, Any]] = [(field["name"], field["type"], event[field["name"]])]
        if field["name"] == "source":
            inside = [(inner["name"], inner["type"], source[inner["name"]]) for inner in field["type"]["fields"]]
        for name, schema, value in inside:
            in_source = field["name"] == "source"
            if in_source and name in _CONSTANT and value is not None:
                constant = _constant(schema, value)
                if constant is None:
                    return None
                if leading:
                    lead += constant
                patterns.append(re.escape(constant))
                continue
            leading = False
            if name in of_binlog:
                patterns.append(of_binlog[name])
                continue
            group = name if name in _GROUPS and in_source == (name != "op") else None
            pattern = _pattern(name, schema, value, group)
            if pattern is None:
                return None
            patterns.append(pattern)
    if len(lead) < MIN_LEAD_BYTES:
        return None
    tail = re.compile(b"".join(patterns) + rb"\Z", re.DOTALL)
    ts_ms, xid, lsn, op = (tail.groupindex[name] for name in _GROUPS)
    schema, position = (source["db"], _binlog_position) if of_binlog else (source["schema"], _long)
    return _Template(lead, tail, (ts_ms, xid, lsn, op), schema, source["table"], position)


def _binlog_patterns(file: str) -> dict[str, bytes] | None:
    """Return what matches the fields of a record of a binary log that others have not; None: its file has no number.

    The lsn is the number of the file and the two fields behind it. There is no transaction: its group is empty, which
    is zero. A TRUNCATE is not matched: its row is not its own, so it is read as a whole.
    """
    match = _FILE.fullmatch(file)
    if match is None:
        return None
    name = _varint(len(file.encode())) + match[1].encode()
    number = b"[0-9]{%d}" % _FILE_DIGITS
    return {
        "file": re.escape(name) + b"(?P<txId>)(?P<lsn>" + number,
        "pos": _LONG,
        "row": _LONG + b")",
        "op": rb"\x02(?P<op>[crud])",
    }


def _binlog_position(data: bytes) -> int:
    """Return a change's position from the number of its file, where its event starts, and its place in that."""
    offset = number = shift = 0
    for byte in data[_FILE_DIGITS:]:
        number |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
        else:
            offset += number >> 1 ^ -(number & 1)
            number = shift = 0
    digits = data[:_FILE_DIGITS]
    file = int(digits)
    return file << OFFSET_BITS | offset if 0 <= offset <= MAX_OFFSET else position_of(f".{digits.decode()}", offset)


def _constant(schema: Json, text: object) -> bytes | None:
    """Return the bytes of a text in a field of type string or of a union with it."""
    if not isinstance(text, str):
        return None
    prefix = b""
    if _is_list(schema):
        if "string" not in schema:
            return None
        prefix = _branch(schema, "string")
    elif schema != "string":
        return None
    data = text.encode()
    return prefix + _varint(len(data)) + data


def _pattern(name: str, schema: Json, value: object, group: str | None) -> bytes | None:
    """Return what matches a field that changes. A union with null must be of a number, or sequence; or be null here."""
    if _is_list(schema):
        if len(schema) != 2 or "null" not in schema:
            return None
        null = re.escape(_branch(schema, "null"))
        (other,) = (branch for branch in schema if branch != "null")
        if other not in ("long", "int") and name not in _NULLABLE_STRINGS:
            return null if value is None else None
        inner = _pattern(name, other, value, group)
        if inner is None:
            return None
        some = re.escape(_branch(schema, other)) + inner
        return some if group else b"(?:" + null + b"|" + some + b")"
    if schema in ("long", "int"):
        return b"(?P<" + group.encode() + b">" + _LONG + b")" if group else _LONG
    return _STRINGS.get(name) if schema == "string" else None


def _branch(union: list[Json], branch: Json) -> bytes:
    return _varint(union.index(branch))


def _varint(number: int) -> bytes:
    """Return a number that is not negative as Avro's long."""
    number <<= 1
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _long(data: bytes) -> int:
    """Return the number of Avro's long."""
    number = 0
    for byte in reversed(data):
        number = number << 7 | byte & 0x7F
    return number >> 1 ^ -(number & 1)
