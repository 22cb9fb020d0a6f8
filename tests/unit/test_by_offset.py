"""Where a change has no position but its place in a topic: what comes out of records, in which versions."""

from __future__ import annotations

import datetime as dt
import random
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from debezium_avro import MESSAGE, MOVIE, Writer, envelope, event, key_of, movie, records
from delta_sync.changes import Write
from delta_sync.decoding import decode
from delta_sync.errors import EpochRose, PipelineStopped, SchemaUnfit, UndecodableChange, UsageError
from delta_sync.kafka.by_offset import EnvelopeReader, OffsetDecoder, epoch_and_term
from delta_sync.kafka.consumer import Partition, Records
from delta_sync.sinks.memory import MemorySink, MemoryTargetOptions
from delta_sync.sources.debezium.catalogue import ambiguous, table_of
from delta_sync.sources.debezium.codec import columns_of, table_codec
from delta_sync.tables import Kind, Table
from delta_sync.versions import MAX_OFFSET, OFFSET_BITS, epoch_of_term, position_in_topic, version_of

TOPIC, MOVIES, MESSAGES, WIDER = "delta_movies.shop.public.movie", 5, 6, 7
WIDE = [*MOVIE, {"name": "seen", "type": ["null", "boolean"], "default": None}]
HEADER = b'"3t1"'


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer({MOVIES: envelope(MOVIE), MESSAGES: MESSAGE, WIDER: envelope(WIDE)})


@pytest.fixture
def decoder(writer: Writer) -> OffsetDecoder:
    return OffsetDecoder(writer, {TOPIC: "shop.public.movie"})


@pytest.fixture(scope="module")
def table() -> Table:
    found = table_of("shop.public.movie", ["id"], envelope(MOVIE))
    assert found is not None
    return found


def polled(values: list[bytes | None], keys: list[bytes | None], headers: list[bytes | None], first: int) -> Records:
    return records(values, keys, headers, TOPIC, first)


def known(table: Table) -> Any:
    return lambda _name, _columns: table


def changes_of(decoder: OffsetDecoder, table: Table, *some: Records) -> list[Any]:
    decoded = decoder.decode(some, known(table))
    assert not decoded.undecodable
    found = decode(decoded.stretches, {table.id: table_codec(table)}, "")
    assert not found.lacking
    assert not found.misfits
    return found.changes.get(table.id, [])


def test_a_versions_position_is_the_place_in_the_topic(decoder: OffsetDecoder, writer: Writer, table: Table) -> None:
    """The log's own positions say nothing: of many databases there are none, or none that Delta understands."""
    values = [writer.value(MOVIES, event("r", None, movie(n), lsn=1000 - n)) for n in range(3)]
    found = changes_of(decoder, table, polled([*values], [key_of(n) for n in range(3)], [HEADER] * 3, 40))
    assert [(change.key, change.version) for change in found] == [
        ((n,), version_of(3, position_in_topic(1, 40 + n))) for n in range(3)
    ]
    assert found[0].row["updated_at"] == dt.datetime(2026, 9, 21, 14, 13, 20)  # noqa: DTZ001 -- it has no zone


def test_the_last_record_of_a_key_counts(decoder: OffsetDecoder, writer: Writer, table: Table) -> None:
    values = [writer.value(MOVIES, event("u", None, movie(1, title=title), lsn=9 - n)) for n, title in enumerate("abc")]
    (found,) = changes_of(decoder, table, polled([*values], [key_of(1)] * 3, [HEADER] * 3, 7))
    assert (found.row["title"], found.version) == ("c", version_of(3, position_in_topic(1, 9)))


def test_each_record_counts_for_handlers(decoder: OffsetDecoder, writer: Writer, table: Table) -> None:
    values: list[bytes | None] = [writer.value(MOVIES, event("u", None, movie(1), lsn=n)) for n in range(3)]
    decoded = decoder.decode([polled(values, [key_of(1)] * 3, [HEADER] * 3, 7)], known(table), [TOPIC])
    assert [len(stretch.events) for stretch in decoded.stretches] == [3]


def test_what_a_frozen_connector_still_sends_is_older(decoder: OffsetDecoder, writer: Writer, table: Table) -> None:
    """Its records are behind those of the next one, and yet older: they are of an older term."""
    newer, older = (writer.value(MOVIES, event("u", None, movie(1, title=title), lsn=5)) for title in ("new", "old"))
    (found,) = changes_of(decoder, table, polled([newer, older], [key_of(1)] * 2, [b'"3t2"', b'"3t1"'], 50))
    assert (found.row["title"], found.version) == ("new", version_of(3, position_in_topic(2, 50)))


def test_a_truncate_empties_what_is_before_it(decoder: OffsetDecoder, writer: Writer, table: Table) -> None:
    values: list[bytes | None] = [
        writer.value(MOVIES, event("c", None, movie(1), lsn=1)),
        writer.value(MOVIES, event("t", None, None, lsn=2)),
        writer.value(MOVIES, event("c", None, movie(2), lsn=3)),
    ]
    decoded = decoder.decode([polled(values, [key_of(1), None, key_of(2)], [HEADER] * 3, 0)], known(table))
    found = decode(decoded.stretches, {table.id: table_codec(table)}, "")
    assert [change.key for change in found.changes[table.id]] == [(2,)]
    assert found.truncates == {table.id: version_of(3, position_in_topic(1, 1))}


def test_a_delete_needs_no_more_than_the_key(decoder: OffsetDecoder, writer: Writer, table: Table) -> None:
    before = {**dict.fromkeys(movie(1)), "id": 1}
    deleted = writer.value(MOVIES, event("d", before, None, lsn=1))
    (found,) = changes_of(decoder, table, polled([deleted], [key_of(1)], [HEADER], 0))
    assert (found.key, found.row) == ((1,), None)


def test_a_value_that_was_left_out_is_said_with_what_to_type(
    decoder: OffsetDecoder, writer: Writer, table: Table
) -> None:
    value = writer.value(MOVIES, event("u", None, movie(7, title="__debezium_unavailable_value"), lsn=1))
    decoded = decoder.decode([polled([value], [key_of(7)], [HEADER], 0)], known(table))
    (broken,) = decoded.undecodable
    assert not decoded.stretches
    assert "lacks title" in str(broken.error)
    assert "--table shop.public.movie --keys 7`" in str(broken.error)


def test_records_of_older_columns_are_read_as_the_table_is_now(decoder: OffsetDecoder, writer: Writer) -> None:
    now = table_of("shop.public.movie", ["id"], envelope(WIDE))
    assert now is not None
    old = writer.value(MOVIES, event("u", None, movie(1), lsn=1))
    (found,) = changes_of(decoder, now, polled([old], [key_of(1)], [HEADER], 0))
    assert found.row["seen"] is None
    assert list(found.row) == [column.name for column in now.columns]


def test_who_decodes_is_asked_for_the_table_with_the_records_columns(
    decoder: OffsetDecoder, writer: Writer, table: Table
) -> None:
    asked: list[frozenset[str]] = []

    def table_as_it_is(name: str, columns: frozenset[str]) -> Table:
        assert name == "shop.public.movie"
        asked.append(columns)
        raise EpochRose("it is another")

    value = writer.value(WIDER, event("u", None, movie(1) | {"seen": True}, lsn=1))
    with pytest.raises(EpochRose):
        decoder.decode([polled([value], [key_of(1)], [HEADER], 0)], table_as_it_is)
    assert asked == [frozenset({column.name for column in table.columns} | {"seen"})]


def test_a_second_partition_stops_the_pipeline(decoder: OffsetDecoder, writer: Writer, table: Table) -> None:
    value = writer.value(MOVIES, event("u", None, movie(1), lsn=1))
    other = polled([value], [key_of(1)], [HEADER], 0)._replace(partition=Partition(TOPIC, 1))
    with pytest.raises(PipelineStopped, match="more than one partition"):
        decoder.decode([other], known(table))


@pytest.mark.parametrize("header", [None, b"3", b'"3"', b'"0t1"', b'"3t"', b"nonsense", b'"4000t1"'])
def test_records_that_are_not_of_deltas_connector_are_undecodable(
    decoder: OffsetDecoder, writer: Writer, table: Table, header: bytes | None
) -> None:
    value = writer.value(MOVIES, event("u", None, movie(1), lsn=1))
    decoded = decoder.decode([polled([value], [key_of(1)], [header], 12)], known(table))
    (broken,) = decoded.undecodable
    assert (broken.offset, "delta.epoch" in str(broken.error)) == (12, True)


@pytest.mark.parametrize("header", [b"7t12", b'"7t12"', b'{"schema": null, "payload": "7t12"}'])
def test_a_header_in_each_of_the_forms_that_converters_have(header: bytes) -> None:
    assert epoch_and_term(header) == (7, 12)


def test_a_record_that_is_no_event_of_rows(writer: Writer) -> None:
    with pytest.raises(SchemaUnfit):
        EnvelopeReader(MESSAGES, MESSAGE)
    with pytest.raises(UndecodableChange):
        OffsetDecoder(writer, {}).reader(b"{}")


# ── versions ──


def test_terms_and_places_do_not_overlap() -> None:
    assert position_in_topic(1, 0) > position_in_topic(0, MAX_OFFSET)
    assert position_in_topic(4096, 5) == position_in_topic(0, 5)  # so another epoch has begun by then
    assert [epoch_of_term(term) for term in (1, 4095, 4096, 8192)] == [1, 1, 2, 3]
    assert position_in_topic(1, 0) == 1 << OFFSET_BITS
    version_of(1, position_in_topic(4095, MAX_OFFSET))  # fits


def test_whatever_comes_again_the_store_ends_as_the_source_is(table: Table) -> None:
    """A connector that crashes sends what it was not sure of again; one that was frozen sends it late.

    The topic is applied in batches that are delivered again, too: after each restart of the worker.
    """
    for seed in range(200):
        rand = random.Random(seed)
        topic: list[tuple[int, int, int, str | None]] = []  # term, place, key, title
        log = [(rand.randrange(4), rand.choice(["a", "b", "c", None])) for _ in range(30)]
        confirmed, term = 0, 1
        while confirmed < len(log):
            reached = rand.randint(confirmed, len(log))
            topic += [(term, 0, *change) for change in log[confirmed:reached]]
            late = [(term, 0, *change) for change in log[reached : reached + rand.randrange(4)]]
            if rand.random() < 0.5:  # it crashes: what it had not confirmed comes again, by the next one
                confirmed, term = max(confirmed, reached - rand.randrange(5)), term + 1
                some = log[confirmed : reached + 1]
                topic += [(term, 0, *change) for change in some]
                topic += late  # by the old one, behind what is newer
                confirmed += len(some)
            else:
                confirmed = reached
        truth = dict(log)
        placed = [(term, place, number, title) for place, (term, _, number, title) in enumerate(topic)]
        sink = MemorySink()
        target = sink.target(table, MemoryTargetOptions())
        start = 0
        while start < len(placed):
            end = start + rand.randint(1, 9)
            for term_of, place, number, title in placed[max(0, start - rand.randrange(6)) : end]:
                document = None if title is None else {"id": number, "title": title}
                sink.apply(target, [Write((number,), version_of(3, position_in_topic(term_of, place)), document)])
            start = end
        for number, title in truth.items():
            (stored,) = sink.read(target, [(number,)])
            there = None if stored is None or stored.document is None else stored.document["title"]
            assert there == title, f"seed {seed}, key {number}"


# ── columns and values ──

DEBEZIUM = "io.debezium"
CONNECT = "org.apache.kafka.connect.data"


def named(kind: str, connect_name: str, **more: Any) -> Any:
    return {"type": kind, "connect.version": 1, "connect.name": connect_name, **more}


@pytest.mark.parametrize(
    ("kind", "raw", "value", "of"),
    [
        ("int", 5, 5, Kind.INTEGER),
        ("boolean", True, True, Kind.BOOLEAN),
        ("float", 0.10000000149011612, 0.1, Kind.FLOAT),
        ("bytes", b"\1", b"\1", Kind.BYTES),
        (named("int", f"{DEBEZIUM}.time.Date"), 1, dt.date(1970, 1, 2), Kind.DATE),
        (named("int", f"{CONNECT}.Date"), -1, dt.date(1969, 12, 31), Kind.DATE),
        (named("long", f"{DEBEZIUM}.time.MicroTime"), 3_600_000_001, dt.time(1, 0, 0, 1), Kind.TIME),
        (named("long", f"{DEBEZIUM}.time.Timestamp"), 1, dt.datetime(1970, 1, 1, microsecond=1000), Kind.TIMESTAMP),  # noqa: DTZ001 -- it has no zone
        (named("long", f"{DEBEZIUM}.time.NanoTimestamp"), -1_000, dt.datetime(1969, 12, 31, 23, 59, 59, 999_999), Kind.TIMESTAMP),  # noqa: DTZ001, E501 -- ditto
        (
            named("string", f"{DEBEZIUM}.time.ZonedTimestamp"),
            "2026-01-02T03:04:05.000006+02:00",
            dt.datetime(2026, 1, 2, 1, 4, 5, 6, dt.UTC),
            Kind.TIMESTAMP_TZ,
        ),
        (
            named("bytes", f"{CONNECT}.Decimal", **{"connect.parameters": {"scale": "2"}, "scale": 2}),
            b"\xff\x85",
            Decimal("-1.23"),
            Kind.DECIMAL,
        ),
        (
            named("record", f"{DEBEZIUM}.data.VariableScaleDecimal", name="VariableScaleDecimal", fields=[]),
            {"scale": 3, "value": b"\x01"},
            Decimal("0.001"),
            Kind.DECIMAL,
        ),
        (named("string", f"{DEBEZIUM}.data.Json"), '{"a": [1]}', {"a": [1]}, Kind.JSON),
        (
            named("string", f"{DEBEZIUM}.data.Uuid"),
            "00000000-0000-0000-0000-000000000001",
            UUID(int=1),
            Kind.UUID,
        ),
        (named("string", f"{DEBEZIUM}.data.Enum"), "red", "red", Kind.TEXT),
        ({"type": "array", "items": ["null", named("int", f"{DEBEZIUM}.time.Date")]}, [0, None], [dt.date(1970, 1, 1), None], Kind.DATE),  # noqa: E501 -- a row of a table
    ],
)  # fmt: skip
def test_values_are_what_their_schemas_say(kind: Any, raw: Any, value: Any, of: Kind) -> None:
    for nullable in (False, True):
        (one,) = columns_of({"fields": [{"name": "c", "type": ["null", kind] if nullable else kind}]})
        assert (one.column.kind, one.column.nullable) == (of, nullable)
        assert (raw if one.convert is None else one.convert(raw)) == value


def test_a_value_beyond_python_is_a_dead_letter_not_the_end(writer: Writer, table: Table) -> None:
    value = writer.value(MOVIES, event("u", None, movie(1, updated_u005fat=1 << 62), lsn=1))
    decoded = OffsetDecoder(writer, {TOPIC: table.id}).decode([polled([value], [key_of(1)], [HEADER], 0)], known(table))
    assert "updated_at" in str(decoded.undecodable[0].error)


def test_tables_are_what_the_last_records_schemas_say() -> None:
    found = table_of("shop.dbo.movie", ["id"], envelope(MOVIE))
    assert found is not None
    assert (found.schema, found.name, found.id, found.key) == ("shop.dbo", "movie", "shop.dbo.movie", ("id",))
    assert [column.name for column in found.columns][4] == "studio_id"
    assert table_of("shop.dbo.movie", ["id"], MESSAGE) is None
    with pytest.raises(UsageError, match="have no key"):
        table_of("shop.dbo.movie", [], envelope(MOVIE))


def test_columns_in_which_a_null_arrives_as_the_default_are_found() -> None:
    columns = [*MOVIE, {"name": "kind", "type": [{"type": "string", "connect.default": "x"}, "null"], "default": "x"}]
    assert ambiguous(envelope(columns)) == ["kind"]
