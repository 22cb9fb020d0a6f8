"""Avro records become the events that were written, and what is no event comes back as what it is."""

from __future__ import annotations

import random
import struct
from decimal import Decimal
from io import BytesIO
from typing import Any

import pytest
from fastavro import parse_schema, schemaless_reader

from debezium_avro import (
    BINLOG_SOURCE,
    MESSAGE,
    MOVIE,
    SOURCE,
    Writer,
    binlog_event,
    envelope,
    event,
    key_of,
    movie,
    records,
    source,
)
from delta_sync.decoding import Stretch, decode
from delta_sync.errors import PipelineStopped, SchemaUnfit, SchemaUnknown, UndecodableChange
from delta_sync.kafka.avro import (
    AvroDecoder,
    DecodedRecords,
    adjusted_name,
    column_name,
    epoch_of,
)
from delta_sync.kafka.consumer import Partition
from delta_sync.sources.postgresql.codec import table_codec
from delta_sync.tables import Column, Kind, Table

MOVIES, MESSAGES, WIDER = 5, 6, 7
COLUMNS = [*("id", "title", "year", "rating", "studio_id", "tags", "updated_at"), "seen"]
MATTERS = ("schema", "table", "lsn", "txId", "ts_ms")  # of source


@pytest.fixture(scope="module")
def writer() -> Writer:
    wider = [*MOVIE, {"name": "seen", "type": ["null", "boolean"], "default": None}]
    return Writer({MOVIES: envelope(MOVIE), MESSAGES: MESSAGE, WIDER: envelope(wider)})


@pytest.fixture
def decoder(writer: Writer) -> AvroDecoder:
    return AvroDecoder(writer)


def own_names(image: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if image is None else {column_name(name): value for name, value in image.items()}


def what_matters(of: dict[str, Any]) -> dict[str, Any]:
    block = {name: of["source"][name] for name in MATTERS}
    return {"before": own_names(of["before"]), "after": own_names(of["after"]), "op": of["op"], "source": block}


def all_events(decoded: DecodedRecords) -> list[Any]:
    return [one for stretch in decoded.stretches for one in stretch.events]


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_come_out_as_they_were_written(writer: Writer, decoder: AvroDecoder) -> None:
    events = [
        event("c", None, movie(1), lsn=1000),
        event("u", None, movie(1, title=None), lsn=1200),
        event("u", movie(2, year=None), movie(2), lsn=1400),
        event("d", movie(1, title=None, tags=None), None, lsn=1600, xid=7001),
        event("t", None, None, lsn=1800, xid=7002),
        event("c", None, movie(3, title="ä" * 3000), lsn=2**51, xid=2**40),
    ]
    decoded = decoder.decode([records([writer.value(MOVIES, one) for one in events])])
    assert not decoded.undecodable
    assert decoded.events == len(events)
    found = all_events(decoded)
    assert [what_matters(one) for one in found] == [what_matters(one) for one in events]
    assert found[0]["after"].keys() == {"id", "title", "year", "rating", "studio_id", "tags", "updated_at"}
    assert found[0]["source"].keys() > set(MATTERS), "the first of a schema is read as a whole"
    assert all(one["source"].keys() == set(MATTERS) for one in found[1:]), "all others by its template"


def test_tombstones_are_left_out(writer: Writer, decoder: AvroDecoder) -> None:
    decoded = decoder.decode([records([None, writer.value(MOVIES, event("c", None, movie(1), lsn=1)), None])])
    assert [one["op"] for one in all_events(decoded)] == ["c"]
    assert decoded.events == 1
    assert decoder.decode([records([None])]) == DecodedRecords([], [], 0)
    assert decoder.decode([]) == DecodedRecords([], [], 0)


def test_a_message_is_read_as_a_whole(writer: Writer, decoder: AvroDecoder) -> None:
    block = source(5000, table="", schema="", txId=None)
    written = {"op": "m", "source": block, "message": {"prefix": "delta", "content": b"\x00\xff"}, "ts_ms": None}
    value = writer.value(MESSAGES, written | {"transaction": None})
    decoded = decoder.decode([records([value, value], [None, None])])
    for one in all_events(decoded):
        assert (one["op"], one["source"]["lsn"], one["message"]) == (
            "m",
            5000,
            {"prefix": "delta", "content": b"\0\xff"},
        )
    assert decode(decoded.stretches, {}, "delta").heartbeat_lsn == 5000


def test_each_record_has_its_own_schema(writer: Writer, decoder: AvroDecoder) -> None:
    old, new = event("u", None, movie(1), lsn=1), event("u", None, movie(2, seen=True), lsn=2)
    values: list[bytes | None] = [writer.value(MOVIES, old), writer.value(WIDER, new), writer.value(MOVIES, old)]
    found = all_events(decoder.decode([records(values)]))
    assert [one["after"].get("seen", "none") for one in found] == ["none", True, "none"]


def test_a_newer_connector_with_the_same_schema_is_read(writer: Writer, decoder: AvroDecoder) -> None:
    def polled(*versions: str) -> list[Any]:
        events = [event("u", None, movie(lsn), lsn=lsn, version=version) for lsn, version in enumerate(versions)]
        return [records([writer.value(MOVIES, one) for one in events])]

    def by_template(decoded: DecodedRecords) -> list[bool]:
        assert [one["source"]["lsn"] for one in all_events(decoded)] == list(range(decoded.events))
        return [len(one["source"]) == len(MATTERS) for one in all_events(decoded)]

    old, new = "3.6.3.Final", "3.7.0.Final"
    assert by_template(decoder.decode(polled(old, old, new))) == [False, True, False]
    assert by_template(decoder.decode(polled(new, new))) == [False, True]
    assert by_template(decoder.decode(polled(new, old, old, new))) == [True, False, True, False]


@pytest.mark.parametrize(
    "block",
    [
        {"xmin": 77},
        {"origin": "node_b", "origin_lsn": 12},
        {"snapshot": "true"},
        {"sequence": None},
        {"sequence": '[null,"1"]'},
        {"sequence": "[" + "9" * 100 + "]"},
        {"ts_us": None, "ts_ns": None},
        {"table": "other"},
        {"db": "elsewhere"},
    ],
)
def test_what_a_template_did_not_expect_is_read_all_the_same(
    writer: Writer, decoder: AvroDecoder, block: dict[str, Any]
) -> None:
    events = [event("u", None, movie(1), lsn=10), event("u", None, movie(2), lsn=20)]
    strange = event("u", None, movie(3), lsn=30)
    strange["source"] |= block
    transaction = event("u", None, movie(4), lsn=40)
    transaction["transaction"] = {"id": "7:40", "total_order": 1, "data_collection_order": 1}
    events += [strange, transaction]
    found = all_events(decoder.decode([records([writer.value(MOVIES, one) for one in events])]))
    assert [what_matters(one) for one in found] == [what_matters(one) for one in events]


def test_a_row_may_hold_what_a_source_begins_with(writer: Writer, decoder: AvroDecoder) -> None:
    """A row that quotes a record: of all places where a source could begin, the last one is it."""
    quoted = writer.value(MOVIES, event("u", None, movie(1), lsn=999))[5:].decode("latin-1").encode()
    try:
        text = quoted.decode()
    except UnicodeDecodeError:
        pytest.fail("it is text")
    lead = LEAD.decode()
    events = [event("u", None, movie(number, title=f"{lead}{text}{lead}"), lsn=10 + number) for number in range(3)]
    found = all_events(decoder.decode([records([writer.value(MOVIES, one) for one in events])]))
    assert [what_matters(one) for one in found] == [what_matters(one) for one in events]
    assert found[-1]["source"].keys() == set(MATTERS)


# ── the newest of each key ───────────────────────────────────────────────────────────────────────────────────────


def of_keys(writer: Writer, *changes: tuple[int, int], epochs: list[bytes | None] | None = None) -> Any:
    """Return records of (key, lsn)."""
    values: list[bytes | None] = [
        writer.value(MOVIES, event("u", None, movie(key, year=lsn), lsn=lsn)) for key, lsn in changes
    ]
    return records(values, [key_of(key) for key, _ in changes], epochs)


def test_only_the_newest_of_a_key_comes_out(writer: Writer, decoder: AvroDecoder) -> None:
    polled = of_keys(writer, (1, 10), (2, 20), (1, 30), (3, 40), (1, 50), (2, 60))
    decoded = decoder.decode([polled])
    assert [(one["after"]["id"], one["source"]["lsn"]) for one in all_events(decoded)] == [(3, 40), (1, 50), (2, 60)]
    assert decoded.events == 6


def test_each_event_comes_out_of_a_topic_where_that_is_wanted(writer: Writer, decoder: AvroDecoder) -> None:
    values: list[bytes | None] = [writer.value(MOVIES, event("u", None, movie(1), lsn=lsn)) for lsn in (10, 30, 20)]
    some, others = records(values, [key_of(1)] * 3, topic="wanted"), records(values, [key_of(1)] * 3)
    decoded = decoder.decode([some, others], ["wanted"])
    assert [one["source"]["lsn"] for one in all_events(decoded)] == [10, 30, 20, 30]
    assert decoded.events == 6


def test_the_newest_is_the_one_of_the_highest_version_not_the_last(writer: Writer, decoder: AvroDecoder) -> None:
    """A frozen connector goes on and sends what it still had, after its successor has sent newer changes."""
    decoded = decoder.decode([of_keys(writer, (1, 10), (1, 20), (1, 30), (2, 35), (1, 20))])
    assert [(one["after"]["id"], one["source"]["lsn"]) for one in all_events(decoded)] == [(1, 30), (2, 35)]


def test_a_later_epoch_is_newer_whatever_its_position(writer: Writer, decoder: AvroDecoder) -> None:
    polled = of_keys(writer, (1, 900), (2, 910), (1, 10), (2, 20), (2, 920), epochs=[b"3", b"3", b"4", b"4", b"3"])
    decoded = decoder.decode([polled])
    assert [(stretch.epoch, [one["source"]["lsn"] for one in stretch.events]) for stretch in decoded.stretches] == [
        (4, [10, 20])
    ]


def test_of_two_that_are_the_same_the_later_one_comes_out(writer: Writer, decoder: AvroDecoder) -> None:
    """A redelivery, in the order that `decode` has."""
    decoded = decoder.decode([of_keys(writer, (1, 10), (2, 20), (1, 10))])
    assert [one["after"]["id"] for one in all_events(decoded)] == [2, 1]


def test_truncates_and_placeholder_keys_are_no_keys(writer: Writer, decoder: AvroDecoder) -> None:
    values: list[bytes | None] = [
        writer.value(MOVIES, event("t", None, None, lsn=10)),
        writer.value(MOVIES, event("t", None, None, lsn=20)),
        writer.value(MOVIES, event("u", None, movie(1), lsn=30)),
        writer.value(MOVIES, event("u", None, movie(2), lsn=40)),
    ]
    long = b"\0\0\0\0\x01\x38__debezium_unavailable_value"
    assert len(all_events(decoder.decode([records(values, [None, None, long, long])]))) == 4


def test_events_of_one_epoch_are_together(writer: Writer, decoder: AvroDecoder) -> None:
    polled = of_keys(writer, (1, 10), (2, 20), (3, 5), (4, 30), epochs=[b"3", b'"3"', b"4", b"3"])
    stretches = decoder.decode([polled]).stretches
    assert [(stretch.epoch, len(stretch.events)) for stretch in stretches] == [(3, 2), (4, 1), (3, 1)]


def test_the_partition_with_the_newest_event_comes_last(writer: Writer, decoder: AvroDecoder) -> None:
    late = records([writer.value(MOVIES, event("u", None, movie(1), lsn=10, xid=8000))])
    early = records([writer.value(MOVIES, event("u", None, movie(2), lsn=20, xid=7000))], topic="other")
    for polled in ([late, early], [early, late]):
        assert [one["after"]["id"] for one in all_events(decoder.decode(polled))] == [2, 1]


# ── what is no event ─────────────────────────────────────────────────────────────────────────────────────────────


LEAD = b"\x163.6.3.Final\x14postgresql\x0cmovies"  # how a source begins


def good(writer: Writer, number: int) -> bytes:
    return writer.value(MOVIES, event("u", None, movie(number), lsn=100 + number))


def bad_values(writer: Writer) -> dict[str, bytes]:
    whole = good(writer, 9)
    lacking = event("u", None, movie(9), lsn=9)
    lacking["source"] |= {"lsn": None}
    no_xid = event("u", None, movie(9), lsn=9)
    no_xid["source"] |= {"txId": None}
    return {
        "empty": b"",
        "short": b"\0\0\0",
        "magic byte": b"{" + whole[1:],
        "no body": whole[:5],
        "truncated in the image": whole[:20],
        "truncated in the source": whole[:-30],
        "truncated at the end": whole[:-1],
        "trailing bytes": whole + b"x",
        "bytes before the source": whole.replace(LEAD, b"\0" + LEAD),
        "image cut out": whole[:7] + whole[17:],
        "not UTF-8": whole.replace(b"The film", b"\xff\xff\xff film"),
        "no such branch": whole[:5] + b"\x0a" + whole[6:],
        "other schema": b"\0\0\0\0" + bytes([WIDER]) + whole[5:],
        "no lsn": writer.value(MOVIES, lacking),
        "no txId": writer.value(MOVIES, no_xid),
        "no image": writer.value(MOVIES, event("u", None, None, lsn=9)),
        "update without after": writer.value(MOVIES, event("u", movie(9), None, lsn=9)),
        "delete without before": writer.value(MOVIES, event("d", None, None, lsn=9)),
        "position too large": writer.value(MOVIES, event("u", None, movie(9), lsn=1 << 52)),
        "position negative": writer.value(MOVIES, event("u", None, movie(9), lsn=-1)),
    }


@pytest.mark.parametrize("first", [False, True], ids=["by a template", "as a whole"])
def test_a_bad_record_comes_back_and_takes_no_other_with_it(writer: Writer, first: bool) -> None:
    for why, bad in bad_values(writer).items():
        decoder = AvroDecoder(writer)
        values: list[bytes | None] = [good(writer, 1), good(writer, 2), bad, None, good(writer, 3)]
        if first:
            values[0], values[2] = bad, good(writer, 1)
        at = values.index(bad)
        decoded = decoder.decode([records(values, first_offset=500)])
        (one,) = decoded.undecodable
        assert (one.partition, one.offset) == (Partition("movies.public.movie", 0), 500 + at), why
        assert (one.key, one.value, one.timestamp_ms) == (key_of(at), bad, 1_790_000_000_000), why
        assert isinstance(one.error, UndecodableChange), why
        assert sorted(found["after"]["id"] for found in all_events(decoded)) == [1, 2, 3], why
        assert decoded.events == 4


@pytest.mark.parametrize(
    "header", [None, b"", b"0", b"-1", b"2048", b"true", b"three", b'{"payload":null}', b"3.5", b"[3]"]
)
def test_a_record_without_an_epoch_is_undecodable(writer: Writer, decoder: AvroDecoder, header: bytes | None) -> None:
    polled = of_keys(writer, (1, 10), (2, 20), (3, 30), epochs=[b"3", header, header])
    decoded = decoder.decode([polled])
    assert [one["after"]["id"] for one in all_events(decoded)] == [1]
    assert [one.offset for one in decoded.undecodable] == [101, 102]
    assert "delta.epoch" in str(decoded.undecodable[0].error)


@pytest.mark.parametrize(
    "header", [b"3", b'"3"', b'{"schema":{"type":"int8","optional":false},"payload":3}', b'{"payload":"3"}']
)
def test_an_epoch_may_be_written_in_several_ways(header: bytes) -> None:
    assert epoch_of(header) == 3


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "record", "name": "Value", "fields": [{"name": "id", "type": "int"}]},
        {
            "type": "record",
            "name": "E",
            "fields": [{"name": "op", "type": "string"}, {"name": "source", "type": SOURCE}],
        },
        envelope(MOVIE) | {"fields": [one for one in envelope(MOVIE)["fields"] if one["name"] != "op"]},
    ],
)
def test_a_schema_that_is_not_of_an_event_spoils_its_records_only(writer: Writer, schema: Any) -> None:
    class Registry:
        def schema(self, schema_id: int) -> dict[str, Any]:
            return schema if schema_id == 99 else writer.schema(schema_id)

    values: list[bytes | None] = [b"\0\0\0\0\x63\x02", good(writer, 1), b"\0\0\0\0\x63\x02"]
    decoded = AvroDecoder(Registry()).decode([records(values)])
    assert [one["after"]["id"] for one in all_events(decoded)] == [1]
    assert [type(one.error) for one in decoded.undecodable] == [SchemaUnfit, SchemaUnfit]
    assert "Schema 99" in str(decoded.undecodable[0].error)


def test_a_schema_that_is_not_there_now_decodes_nothing_until_it_is(writer: Writer) -> None:
    class Restored:
        there = False

        def schema(self, schema_id: int) -> dict[str, Any]:
            if schema_id == WIDER and not self.there:
                raise SchemaUnknown("no schema", schema_id)
            return writer.schema(schema_id)

    registry = Restored()
    decoder = AvroDecoder(registry)
    polled = [
        records([good(writer, 1), b"bad"]),
        records([writer.value(WIDER, event("c", None, movie(2, seen=True), lsn=7))], topic="wider"),
    ]
    for _ in range(2):
        with pytest.raises(SchemaUnknown):
            decoder.decode(polled)
    assert len(all_events(decoder.decode(polled[:1]))) == 1, "known ids go on"
    registry.there = True
    decoded = decoder.decode(polled)
    assert sorted(one["after"]["id"] for one in all_events(decoded)) == [1, 2]
    assert len(decoded.undecodable) == 1


def test_a_schema_is_asked_for_once(writer: Writer, decoder: AvroDecoder) -> None:
    writer.asked.clear()
    for _ in range(3):
        decoder.decode([records([good(writer, 1), good(writer, 2)])])
    assert writer.asked == [MOVIES]


def test_no_bytes_end_the_decoder(writer: Writer) -> None:
    """Bytes flipped, cut out and put in at random: each record is an event or undecodable, the good ones are events."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    sound = good(writer, 1)
    base = [good(writer, 2), writer.value(MOVIES, event("d", movie(3), None, lsn=5))]
    decoder = AvroDecoder(writer)
    for _ in range(3000):
        value = bytearray(rng.choice(base))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(5, len(value)) if len(value) > 5 else 4
            match rng.randrange(3):
                case 0:
                    value[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    del value[at : at + rng.randrange(1, 20)]
                case _:
                    value[at:at] = rng.randbytes(rng.randrange(1, 12))
        decoded = decoder.decode([records([sound, bytes(value), sound])])
        found = all_events(decoded)
        assert len(found) + len(decoded.undecodable) == 3, (seed, bytes(value))
        assert [what_matters(one) for one in found].count(what_matters(event("u", None, movie(1), lsn=101))) >= 2, seed
        decode(decoded.stretches, {}, "delta")


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────


def optional(kind: Any) -> Any:
    return ["null", kind]


def semantic(kind: str, name: str) -> Any:
    return {"type": kind, "connect.version": 1, "connect.name": f"io.debezium.{name}"}


def array(kind: Any) -> Any:
    return {"type": "array", "items": kind}


# What Debezium has for columns of PostgreSQL, with the options that Delta sets: Avro's type, and random values of it.
TYPES: dict[str, tuple[Any, Any]] = {
    "boolean": ("boolean", lambda rng: rng.random() < 0.5),
    "smallint": ({"type": "int", "connect.type": "int16"}, lambda rng: rng.randrange(-(2**15), 2**15)),
    "integer": ("int", lambda rng: rng.randrange(-(2**31), 2**31)),
    "bigint": ("long", lambda rng: rng.randrange(-(2**63), 2**63)),
    "real": ("float", lambda rng: struct.unpack("<f", rng.randbytes(4))[0]),
    "double": ("double", lambda rng: rng.choice([0.1, 1e300, -0.0, float("inf"), rng.random()])),
    "numeric": ("string", lambda rng: str(Decimal(rng.randrange(-(10**20), 10**20)).scaleb(-rng.randrange(20)))),
    "text": ("string", lambda rng: "".join(rng.choices("aé😀\0\n\u2028__debezium", k=rng.randrange(80)))),
    "bytea": ("bytes", lambda rng: rng.randbytes(rng.randrange(100))),
    "bits": (
        {"type": "bytes", "connect.parameters": {"length": "9"}, "connect.name": "io.debezium.data.Bits"},
        lambda rng: rng.randbytes(2),
    ),
    "date": (semantic("int", "time.Date"), lambda rng: rng.randrange(-(10**6), 10**6)),
    "time": (semantic("long", "time.MicroTime"), lambda rng: rng.randrange(86_400_000_001)),
    "timestamp": (semantic("long", "time.MicroTimestamp"), lambda rng: rng.randrange(-(2**60), 2**60)),
    "timestamptz": (
        semantic("string", "time.ZonedTimestamp"),
        lambda rng: f"2024-02-{rng.randrange(10, 29)}T00:00:00Z",
    ),
    "interval": (semantic("long", "time.MicroDuration"), lambda rng: rng.randrange(10**15)),
    "uuid": (semantic("string", "data.Uuid"), lambda rng: f"{rng.getrandbits(128):032x}"),
    "json": (semantic("string", "data.Json"), lambda rng: '{"a": [1, null]}'),
    "enum": (
        {"type": "string", "connect.parameters": {"allowed": "a,b"}, "connect.name": "io.debezium.data.Enum"},
        lambda rng: rng.choice("ab"),
    ),
    "integers": (array(optional("int")), lambda rng: [rng.choice([None, 1, -5]) for _ in range(rng.randrange(4))]),
    "texts": (array(optional("string")), lambda rng: [rng.choice([None, "", "x"]) for _ in range(rng.randrange(4))]),
    "blobs": (array(optional("bytes")), lambda rng: [rng.choice([None, b"", b"\0"]) for _ in range(rng.randrange(4))]),
    # Not with Delta's options, but a logical type must not turn numbers into something else.
    "millis": ({"type": "long", "logicalType": "timestamp-millis"}, lambda rng: rng.randrange(2**40)),
    "decimal": (
        {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
        lambda rng: rng.randbytes(3),
    ),
}


def without_logical_types(schema: Any) -> Any:
    """What plain fastavro is asked with: it would make values of other types of these two."""
    if isinstance(schema, list):
        return [without_logical_types(one) for one in schema]
    if isinstance(schema, dict):
        return {key: without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
    return schema


def as_written(value: Any, of: str) -> Any:
    """The value that has to come out: of a real, the number with the fewest digits."""
    if of != "real" or value is None or value != value or abs(value) == float("inf"):
        return value
    return (
        next(
            short
            for digits in range(1, 10)
            if struct.pack("<f", short := float(f"{value:.{digits}g}")) == struct.pack("<f", value)
        )
        if abs(value) < 3.4e38
        else value
    )


def test_random_rows_are_what_plain_fastavro_reads() -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for round_number in range(40):
        chosen = rng.sample(sorted(TYPES), rng.randrange(1, len(TYPES) + 1))
        may_be_null = {name for name in chosen if rng.random() < 0.7}
        columns = [
            {"name": f"{name}_u005fof", "type": optional(TYPES[name][0]) if name in may_be_null else TYPES[name][0]}
            for name in chosen
        ]
        schema = without_logical_types(envelope(columns))
        writer = Writer({round_number: schema})
        told = Writer({round_number: envelope(columns)})
        decoder, plain = AvroDecoder(told), parse_schema(schema)

        def row(chosen: list[str] = chosen, may_be_null: set[str] = may_be_null) -> dict[str, Any]:
            return {
                f"{name}_u005fof": None if name in may_be_null and rng.random() < 0.3 else TYPES[name][1](rng)
                for name in chosen
            }

        values: list[bytes | None] = []
        for number in range(50):
            op = rng.choice("cud")
            before = row() if op == "d" or rng.random() < 0.3 else None
            lsn = rng.randrange(1 << rng.randrange(1, 52))
            one = event(op, before, None if op == "d" else row(), lsn, xid=rng.randrange(1 << 33))
            one["source"]["xmin"] = rng.choice([None, None, number])
            values.append(writer.value(round_number, one))
        decoded = decoder.decode([records(values)])
        assert not decoded.undecodable, (seed, decoded.undecodable[0])
        for value, found in zip(values, all_events(decoded), strict=True):
            assert value is not None
            stream = BytesIO(value)
            stream.seek(5)
            expected: Any = what_matters(schemaless_reader(stream, plain, None))  # type: ignore[arg-type]  # a schema is any JSON
            for image in ("before", "after"):
                if expected[image] is not None:
                    expected[image] = {
                        name: as_written(held, name.removesuffix("_of")) for name, held in expected[image].items()
                    }
            assert repr(what_matters(found)) == repr(expected), seed  # repr: NaN, and -0.0


def test_reals_have_the_digits_that_json_has() -> None:
    columns = [
        {"name": "id", "type": "int"},
        {"name": "r", "type": "float"},
        {"name": "rs", "type": optional(array(optional("float")))},
    ]
    writer = Writer({1: envelope(columns)})
    numbers = [
        0.1,
        16777216.0,
        9.99994610111476e-43,
        3.4028234663852886e38,
        1.401298464324817e-45,
        1e10,
        1 / 3,
        -2.5,
        float("inf"),
    ]
    rows = [{"id": 1, "r": number, "rs": [number, None]} for number in numbers]
    values: list[bytes | None] = [writer.value(1, event("c", None, row, lsn=1)) for row in rows]
    found = [one["after"] for one in all_events(AvroDecoder(writer).decode([records(values)]))]
    shortest = [0.1, 16777216.0, 1e-42, 3.4028235e38, 1e-45, 1e10, 0.33333334, -2.5, float("inf")]
    assert [row["r"] for row in found] == shortest
    assert [row["rs"] for row in found] == [[number, None] for number in shortest]


def test_events_are_what_the_tables_codec_takes(writer: Writer, decoder: AvroDecoder) -> None:
    def column(name: str, type_: str, kind: Kind) -> Column:
        return Column(name, type_, kind)

    table = Table(
        "public",
        "movie",
        (
            column("id", "integer", Kind.INTEGER),
            column("title", "text", Kind.TEXT),
            column("year", "integer", Kind.INTEGER),
            column("rating", "numeric(3,1)", Kind.DECIMAL),
            column("studio_id", "integer", Kind.INTEGER),
            column("tags", "text", Kind.TEXT),
            column("updated_at", "timestamp", Kind.TIMESTAMP),
        ),
        ("id",),
    )
    values: list[bytes | None] = [
        writer.value(MOVIES, event("u", None, movie(1), lsn=10)),
        writer.value(MOVIES, event("u", None, movie(2), lsn=20)),
        writer.value(MOVIES, event("d", movie(1), None, lsn=30)),
    ]
    keys: list[bytes | None] = [key_of(1), key_of(2), key_of(1)]
    decoded = decode(decoder.decode([records(values, keys)]).stretches, {"public.movie": table_codec(table)}, "delta")
    first, second = decoded.changes["public.movie"]
    assert (first.key, first.version, first.row) == ((2,), 3 << 52 | 20, first.row)
    assert first.row is not None
    assert first.row["rating"] == Decimal("0.2")
    assert (second.key, second.row) == ((1,), None)


def default(name: str, kind: Any, value: Any) -> Any:
    """A nullable column with a default, as the converters of Apicurio and Confluent describe it."""
    inner = kind if isinstance(kind, dict) else {"type": kind}
    return {"name": name, "type": [inner | {"connect.default": value}, "null"], "default": value}


def test_a_default_may_stand_for_null(writer: Writer) -> None:
    """The converters write a column's default where the row has NULL, so nobody can tell: the row is read by key."""
    columns = [
        {"name": "id", "type": {"type": "int", "connect.default": 7}, "default": 7},  # NOT NULL: it is what it is
        default("i", "int", 7),
        default("s", "string", ""),
        default("r", "float", 0.1),
        default("y", "bytes", "\u00ff\u0000"),
        {"name": "n", "type": ["null", "int"], "default": None},
    ]
    told = Writer({1: envelope(columns)})
    usual = {"id": 7, "i": 8, "s": "x", "r": 0.5, "y": b"", "n": None}
    rows = [usual, usual | {"i": 7}, usual | {"s": ""}, usual | {"r": 0.1}, usual | {"y": b"\xff\0"}, usual]
    events = [event("c", None, row, lsn=number) for number, row in enumerate(rows)] + [event("d", usual, None, lsn=9)]
    found = all_events(AvroDecoder(told).decode([records([told.value(1, one) for one in events])]))
    assert ["unsure" in one for one in found] == [False, True, True, True, True, False, False]
    table = Table(
        "public",
        "movie",
        (
            Column("id", "integer", Kind.INTEGER),
            Column("i", "integer", Kind.INTEGER),
            Column("s", "text", Kind.TEXT),
            Column("r", "real", Kind.FLOAT),
            Column("y", "bytea", Kind.BYTES),
            Column("n", "integer", Kind.INTEGER),
        ),
        ("id",),
    )
    for one, lacks in zip(found, [False, True, True, True, True, False, False], strict=True):
        decoded = decode([Stretch(3, [one])], {"public.movie": table_codec(table)}, "delta")
        assert bool(decoded.lacking) == lacks
        assert bool(decoded.changes) != lacks
        assert not decoded.misfits


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = {
    "id": "id",
    "studio_id": "studio_u005fid",
    "_": "_u005f",
    "1st": "_u0031st",
    "a1": "a1",
    "a.b-c": "a_u002eb_u002dc",
    "größe": "gr_u00f6_u00dfe",
    "имя": "_u438_u43c_u44f",
    "名": "_u540d",
    "😀": "_ud83d_ude00",
    "a\tb": "a_u009b",
    "select": "select",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_as_debezium_writes_them(name: str) -> None:
    assert adjusted_name(name) == NAMES[name]


@pytest.mark.parametrize("name", [name for name in NAMES if "\t" not in name])
def test_names_are_turned_back(name: str) -> None:
    assert column_name(NAMES[name]) == name


def test_an_ambiguous_name_is_the_one_that_the_table_has() -> None:
    """Debezium does not fill up a code of three digits, so that a 2 behind it looks like its fourth."""
    names = ["дата2", "я_1", "a\tb", "\u4302"]
    columns = [{"name": adjusted_name(name), "type": "int"} for name in names[:3]]
    columns.append({"name": "_u540d", "type": "int"})
    writer = Writer({1: envelope(columns)})
    row = {column["name"]: number for number, column in enumerate(columns)}
    polled = [records([writer.value(1, event("c", None, row, lsn=1))])]
    decoder = AvroDecoder(writer, [*names[:3], "not in the event"])
    (found,) = all_events(decoder.decode(polled))
    assert list(found["after"]) == [*names[:3], "名"]
    decoder.use([])
    (found,) = all_events(decoder.decode(polled))
    assert next(iter(found["after"])) != "дата2", "without the table's columns it cannot be known"


def test_random_names_are_turned_back_when_the_columns_are_known() -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(300):
        alphabet = rng.choice(["ab1_", "яёa1_f", "名字a9", "\t\u0091a1", "aé😀_u4"])
        names = list(dict.fromkeys("".join(rng.choices(alphabet, k=rng.randrange(1, 8))) for _ in range(4)))
        adjusted = [adjusted_name(name) for name in names]
        if len(set(adjusted)) < len(names):
            continue  # Debezium itself cannot tell them apart
        writer = Writer({1: envelope([{"name": name, "type": "int"} for name in adjusted])})
        value = writer.value(1, event("c", None, dict.fromkeys(adjusted, 1), lsn=1))
        (found,) = all_events(AvroDecoder(writer, names).decode([records([value])]))
        assert list(found["after"]) == names, seed


def test_a_stretch_is_what_decoding_takes(writer: Writer, decoder: AvroDecoder) -> None:
    (stretch,) = decoder.decode([records([good(writer, 1)], epochs=[b"7"])]).stretches
    assert isinstance(stretch, Stretch)
    assert stretch.epoch == 7


# ── MariaDB ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def binlog_writer() -> Writer:
    return Writer({MOVIES: envelope(MOVIE, source=BINLOG_SOURCE)})


def positions(writer: Writer, events: list[Any]) -> list[int]:
    decoded = AvroDecoder(writer).decode([records([writer.value(MOVIES, one) for one in events])])
    assert not decoded.undecodable
    found = all_events(decoded)
    for one, written in zip(found, events, strict=True):
        of = {"op": written["op"], "before": own_names(written["before"]), "after": own_names(written["after"])}
        block = {"schema": "studio", "table": "movie", "txId": 0, "ts_ms": written["source"]["ts_ms"]}
        assert one | {"source": {**one["source"], "lsn": None}} == one | of | {"source": {**block, "lsn": None}}
    return [one["source"]["lsn"] for one in found]


def by_template(writer: Writer, *events: Any) -> list[bool]:
    """Tell which were read by a template, which leaves out what is behind `op`."""
    found = all_events(AvroDecoder(writer).decode([records([writer.value(MOVIES, one) for one in events])]))
    return ["ts_ns" not in one for one in found]


def test_a_binary_logs_events_are_in_the_order_of_their_places(binlog_writer: Writer) -> None:
    events = [
        binlog_event("c", None, movie(1), 500),
        binlog_event("c", None, movie(2), 500, row=499),
        binlog_event("t", None, None, 600, row=499),  # the number is the row's before
        binlog_event("c", None, movie(3), 650, gtid="0-1-28"),
        binlog_event("u", movie(3), movie(3, title=None), 4, file="binlog.000013", gtid=None, thread=None),
        binlog_event("d", movie(4), None, 2**32 - 9, row=8, file="binlog.000013"),
    ]
    found = positions(binlog_writer, events)
    begins = [12 << 32 | 500, 12 << 32 | 999, 12 << 32 | 600, 12 << 32 | 650]
    assert found == [*begins, 13 << 32 | 4, 13 << 32 | 2**32 - 1]
    assert found[3] > found[2], "a row that comes after a TRUNCATE outlives it"
    assert by_template(binlog_writer, *events) == [False, True, False, True, True, True]


@pytest.mark.parametrize(
    "block",
    [
        {"file": "binlog.1000000"},
        {"file": "another.000012"},
        {"sequence": "[1]"},
        {"gtid": "no GTID"},
        {"query": "UPDATE movie SET title = 'x'"},
        {"snapshot": "true"},
        {"server_id": 2**31},
    ],
)
def test_what_a_binary_logs_template_did_not_expect_is_read_all_the_same(
    binlog_writer: Writer, block: dict[str, Any]
) -> None:
    events = [binlog_event("u", None, movie(number), 10 * number + 200) for number in range(3)]
    events[1]["source"] |= block
    file = int(events[1]["source"]["file"].partition(".")[2])
    assert positions(binlog_writer, events) == [12 << 32 | 200, file << 32 | 210, 12 << 32 | 220]
    assert by_template(binlog_writer, *events)[::2] == [False, True]


@pytest.mark.parametrize("file", ["mysql-bin.000001", "mariadb-server-bin.000001", "a.b.c.999999", "f.000001"])
def test_a_binary_logs_files_may_have_any_name(binlog_writer: Writer, file: str) -> None:
    """Where the length of the name is a digit, too."""
    events = [
        binlog_event("u", None, movie(number), pos, row=number, file=file, gtid=f"1-2-{pos}")
        for number, pos in enumerate([4, 63, 64, 8191, 8192, 2**31, 2**32 - 9])
    ]
    number = int(file.rpartition(".")[2])
    assert positions(binlog_writer, events) == [
        number << 32 | one["source"]["pos"] + one["source"]["row"] for one in events
    ]
    assert by_template(binlog_writer, *events) == [False, *6 * [True]]


@pytest.mark.parametrize("first", [False, True], ids=["by a template", "as a whole"])
def test_a_transaction_beyond_4_gib_stops_the_pipeline(binlog_writer: Writer, first: bool) -> None:
    events = [binlog_event("u", None, movie(1), 4), binlog_event("u", None, movie(2), 2**32 - 2, row=2)]
    values: list[bytes | None] = [binlog_writer.value(MOVIES, one) for one in events]
    with pytest.raises(PipelineStopped, match=r"beyond 4 GiB"):
        AvroDecoder(binlog_writer).decode([records(values[first:])])


def test_a_place_without_a_number_is_undecodable(binlog_writer: Writer) -> None:
    value = binlog_writer.value(MOVIES, binlog_event("c", None, movie(1), 4, file="binlog"))
    (broken,) = AvroDecoder(binlog_writer).decode([records([value])]).undecodable
    assert "'binlog':4, row 0" in str(broken.error)
