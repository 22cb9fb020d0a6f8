"""What a real registry answers, and what Debezium Server's real records are: the same values that a dump reads."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
from kafka import KafkaConsumer, TopicPartition

import delta_schemas
from debezium_avro import MESSAGE, SOURCE, envelope
from delta_debezium.distribution import distribution
from delta_debezium.render import server_environment, server_properties
from delta_debezium.server import DebeziumServer
from delta_sync import delta_event
from delta_sync.decoding import decode
from delta_sync.errors import RegistryBusy, SchemaUnfit, SchemaUnknown
from delta_sync.events import RowEvent
from delta_sync.handlers.topic import Topic
from delta_sync.kafka.avro import AvroDecoder, adjusted_name
from delta_sync.kafka.consumer import Partition, Records
from delta_sync.kafka.registry import Schema, SchemaRegistry
from delta_sync.secrets import resolve
from delta_sync.sources.postgresql import codec
from delta_sync.sources.postgresql.catalogue import read_tables
from delta_sync.spec import RegistrySpec, spec_from
from delta_sync.tables import Table
from delta_sync.testing.kafka import Kafka, admin_client
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL
from integration.test_postgresql_values import (
    LONG,
    LONG_ARRAY,
    LONG_VALUES,
    SETUP,
    VALUES,
    differences,
    dump,
    quoted,
    read_types,
    sections_of,
)

ANSWERS_S = 30.0
ARRIVES_S = 60.0  # a start takes five seconds, on a busy machine some more
EPOCH = 3
AT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def register(server: Apicurio, subject: str, schema: Any, references: Any = ()) -> int:
    reply = requests.post(
        f"{server.url}/subjects/{subject}/versions",
        json={"schema": json.dumps(schema), "references": list(references)},
        timeout=ANSWERS_S,
    )
    reply.raise_for_status()
    return int(reply.json()["id"])


@pytest.fixture
def client(registry: Apicurio) -> Iterator[SchemaRegistry]:
    made = SchemaRegistry(RegistrySpec(url=registry.url))
    yield made
    made.close()


def record(name: str, kind: Any) -> Schema:
    return {"type": "record", "name": name, "namespace": "registry.test", "fields": [{"name": "f", "type": kind}]}


def test_a_schema_is_what_was_registered(registry: Apicurio, client: SchemaRegistry) -> None:
    schema = record("Registered", ["null", {"type": "string", "connect.parameters": {"ä": "ö"}}])
    assert client.schema(register(registry, "registered", schema)) == schema
    assert client.check() == []


def test_known_ids_go_on_while_the_registry_is_away(registry: Apicurio, client: SchemaRegistry) -> None:
    known, other = record("Known", "int"), record("Other", "int")
    known_id, other_id = register(registry, "known", known), register(registry, "other", other)
    assert client.schema(known_id) == known
    registry.kill()
    assert client.schema(known_id) == known
    with pytest.raises(RegistryBusy):
        client.schema(other_id)
    registry.start()
    assert client.schema(other_id) == other


def test_an_unknown_id_waits(client: SchemaRegistry) -> None:
    with pytest.raises(SchemaUnknown, match="no schema 2000000000"):
        client.schema(2_000_000_000)


def test_a_schema_that_refers_to_another_is_refused(registry: Apicurio, client: SchemaRegistry) -> None:
    register(registry, "inner", record("Inner", "int"))
    reference = {"name": "registry.test.Inner", "subject": "inner", "version": 1}
    schema_id = register(registry, "outer", record("Outer", "registry.test.Inner"), [reference])
    with pytest.raises(SchemaUnfit, match=r"refers to other schemas \(inner\)"):
        client.schema(schema_id)


def test_another_server_is_no_registry(registry: Apicurio) -> None:
    elsewhere = SchemaRegistry(RegistrySpec(url=registry.url.removesuffix("/ccompat/v7")))
    (problem,) = elsewhere.check()
    assert "/apis/ccompat/v7" in problem.fix


# ── the real chain ───────────────────────────────────────────────────────────────────────────────────────────────

NAME = "avrochain"
TABLE, LONG_TABLE = "public.wide", "public.long"
NAMES = ("дата2", "größe_1", "1st", "名", "a.b", "😀", "_", "MiXed")  # of columns, as Debezium has to escape them


class Chain:
    """PostgreSQL, Debezium Server, Kafka and Apicurio, with one table that has a column of every type."""

    def __init__(self, postgresql: PostgreSQL, kafka: Kafka, registry: Apicurio, folder: Path) -> None:
        with psycopg.connect(postgresql.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {NAME}")
        self.db = psycopg.connect(postgresql.url_of(NAME), autocommit=True)
        version = self.db.info.server_version // 10000
        self.db.execute("CREATE EXTENSION vector")
        self.db.execute(SETUP)
        codec.configure(self.db)
        types = read_types(VALUES, sections_of(version, extensions=False)).values()
        self.types = [type_ for type_ in types if type_.in_log]
        columns = [f"{quoted(name)} int DEFAULT 7" for name in NAMES]
        columns += [f"c_{number} {type_.name}" for number, type_ in enumerate(self.types)]
        self.db.execute(f"CREATE TABLE wide (id int PRIMARY KEY, {', '.join(columns)})")
        long_types = read_types(LONG_VALUES, sections_of(version, extensions=False)).values()
        self.long_types = [type_ for type_ in long_types if type_.in_log]
        columns = [f"c_{number} {type_.name}" for number, type_ in enumerate(self.long_types)]
        self.db.execute(f"CREATE TABLE long (id int PRIMARY KEY, {', '.join(columns)})")
        for number in range(len(columns)):
            self.db.execute(f"ALTER TABLE long ALTER c_{number} SET STORAGE EXTERNAL")
        self.spec = spec_from(
            {
                "name": NAME,
                "source": {
                    "url": f"postgresql://postgres@127.0.0.1:{postgresql.port}/{NAME}",
                    "password": "${env:POSTGRES}",
                },
                "tables": {TABLE: {}, LONG_TABLE: {}},
                "sinks": {"cache": {"url": "redis://cache"}},
                "transport": "kafka",
                "kafka": {"bootstrap_servers": kafka.url, "registry": {"url": registry.url}},
            },
            "the test",
        )
        self.db.execute(f"CREATE PUBLICATION {self.spec.publication} FOR TABLE wide, long")
        self.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self.spec.slot])
        self.topics = [f"delta_{NAME}.{name}" for name in (TABLE, "message", LONG_TABLE)]
        with admin_client(kafka.url) as admin:
            admin.create_topics({topic: {"num_partitions": 1} for topic in self.topics}, wait_for_metadata=True)
        self._kafka = kafka
        self.server = DebeziumServer(folder, distribution(print))
        tables = self.tables()
        environment = server_environment(self.spec, tables, EPOCH, lambda text: resolve(text, {"POSTGRES": "postgres"}))
        self.server.start(server_properties(self.spec, tables, EPOCH), environment)

    def tables(self) -> dict[str, Table]:
        return read_tables(self.db, [TABLE, LONG_TABLE])

    def polled(self, topic: str, count: int) -> Records:
        """Return all records of a topic, once there are so many."""
        found: list[Any] = []
        with closing(KafkaConsumer(bootstrap_servers=self._kafka.url)) as consumer:
            partition = TopicPartition(topic, 0)
            consumer.assign([partition])
            consumer.seek_to_beginning(partition)

            def read() -> bool:
                assert self.server.alive, self.server.last_words()
                found.extend(record for records in consumer.poll(100).values() for record in records)
                return len(found) >= count

            wait_until(read, ARRIVES_S, f"{count} records of {topic}")
        return Records(
            Partition(topic, 0),
            [record.key for record in found],
            [record.value for record in found],
            [dict(record.headers).get("delta.epoch") for record in found],
            [record.timestamp for record in found],
            found[-1].offset + 1,
        )

    def close(self) -> None:
        self.server.kill()
        query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
        wait_until(lambda: self.db.execute(query, [self.spec.slot]).fetchone() == (False,), ARRIVES_S, "the release")
        self.db.execute("SELECT pg_drop_replication_slot(%s)", [self.spec.slot])
        self.db.close()


@pytest.fixture(scope="module")
def chain(
    postgresql: PostgreSQL, kafka: Kafka, registry: Apicurio, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chain]:
    made = Chain(postgresql, kafka, registry, tmp_path_factory.mktemp("chain"))
    yield made
    made.close()


def test_debezium_servers_records_are_what_a_dump_reads(chain: Chain, client: SchemaRegistry) -> None:
    """Every type, every name, every operation, with one of Debezium's schemas; then with another."""
    plain = [[value for value in type_.values if value not in type_.ambiguous] for type_ in chain.types]
    rows = max(map(len, plain))
    for number in range(rows):
        values = {f"c_{at}": of[number] for at, of in enumerate(plain) if number < len(of)}
        values |= {quoted(name): str(at + 100) for at, name in enumerate(NAMES)}
        chain.db.execute(f"INSERT INTO wide (id, {', '.join(values)}) VALUES ({number}, {', '.join(values.values())})")
    tables = chain.tables()
    dumped = dump(chain.db, tables[TABLE])
    chain.db.execute("UPDATE wide SET id = 1000 WHERE id = 0")
    chain.db.execute("DELETE FROM wide WHERE id = 1")
    chain.db.execute('UPDATE wide SET "дата2" = NULL WHERE id = 2')
    chain.db.execute("TRUNCATE wide")
    chain.db.execute("ALTER TABLE wide ADD new_one int")
    chain.db.execute("INSERT INTO wide (id, new_one) VALUES (5000, 1)")
    chain.db.execute("SELECT pg_logical_emit_message(true, %s, 'x')", [chain.spec.heartbeat_prefix])

    # inserts; delete, tombstone and insert; delete and tombstone; update; truncate; insert
    polled = chain.polled(chain.topics[0], rows + 3 + 2 + 1 + 1 + 1)
    decoder = AvroDecoder(client, [column.name for column in tables[TABLE].columns])
    decoded = decoder.decode([polled._replace(keys=[None] * len(polled.keys))])  # so that all of them come out
    assert not decoded.undecodable
    (stretch,) = decoded.stretches
    assert stretch.epoch == EPOCH
    events = list(stretch.events)
    assert [event["op"] for event in events] == ["c"] * rows + ["d", "c", "d", "u", "t", "c"]
    assert [len(event["source"]) > 5 for event in events] == [True] + [False] * (rows + 4) + [True], "by templates"
    assert [event["after"]["id"] for event in events if event["after"]] == [*range(rows), 1000, 2, 5000]
    assert [event["before"]["id"] for event in events if event["op"] == "d"] == [0, 1]
    assert ["unsure" in event for event in events[rows:]] == [False, False, False, True, False, True]
    assert events[-1]["after"].keys() - events[0]["after"].keys() == {"new_one"}
    table_codec = codec.table_codec(tables[TABLE])
    for event in events[:rows]:
        image = event["after"]
        assert "unsure" not in event
        assert not table_codec.lacks(image), codec.unavailable_columns(tables[TABLE], image)
        held = dumped[image["id"]]
        different = differences(table_codec.row(image), held)
        types = [chain.types[int(name[2:])].name for name, _, _ in different if name.startswith("c_")]
        assert not different, (types, different)

    newest = [event["after"]["id"] for event in decoder.decode([polled]).stretches[0].events if event["after"]]
    assert newest == [*range(3, rows), 1000, 2, 5000], "the newest of each key"
    (message,) = decoder.decode([chain.polled(chain.topics[1], 1)]).stretches
    heartbeat = decode([message], {}, chain.spec.heartbeat_prefix).heartbeat_lsn
    assert heartbeat is not None
    assert heartbeat > events[-1]["source"]["lsn"]


def test_unchanged_toast_values_are_seen_to_be_missing(chain: Chain, client: SchemaRegistry) -> None:
    values: list[str] = []
    for type_ in chain.long_types:
        value = type_.values[0].replace("long", LONG)
        many = type_.name.endswith("[]")
        values.append(f"(SELECT array_agg({value}) FROM generate_series(1, {LONG_ARRAY}) g)" if many else value)
    chain.db.execute(f"INSERT INTO long VALUES (1, {', '.join(values)})")
    chain.db.execute("UPDATE long SET id = 2")
    polled = chain.polled(chain.topics[2], 4)  # insert; delete, tombstone and insert
    (stretch,) = AvroDecoder(client).decode([polled]).stretches
    (absent,) = [event["after"] for event in stretch.events if event["op"] == "c" and event["after"]["id"] == 2]
    (whole,) = [
        event["after"]
        for event in AvroDecoder(client).decode([polled._replace(keys=[None] * 4)]).stretches[0].events
        if event["op"] == "c" and event["after"]["id"] == 1
    ]
    table = chain.tables()[LONG_TABLE]
    long_columns = [column.name for column in table.columns if column.name != "id"]
    assert codec.unavailable_columns(table, absent) == long_columns
    assert codec.unavailable_columns(table, whole) == []
    assert codec.table_codec(table).row(whole) is not None


def test_the_schemas_of_the_unit_tests_are_debeziums(chain: Chain, client: SchemaRegistry) -> None:
    polled = chain.polled(chain.topics[0], 1)
    schema = client.schema(int.from_bytes((polled.values[0] or b"")[1:5], "big"))
    (value,) = [branch for branch in schema["fields"][0]["type"] if branch != "null"]
    written = {field["name"] for field in value["fields"]}
    assert written >= {"id", *map(adjusted_name, NAMES)}
    ours = envelope(value["fields"])
    assert shape(schema) == shape(ours)
    message = client.schema(int.from_bytes((chain.polled(chain.topics[1], 1).values[0] or b"")[1:5], "big"))
    assert shape(message) == shape(MESSAGE)
    assert [field["name"] for field in SOURCE["fields"]].index("lsn") == 12


def shape(schema: Any) -> Any:
    """Return what tells how bytes are read: fields, their order and their types."""
    if isinstance(schema, list):
        return [shape(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    if schema["type"] == "record":
        return [schema["name"], *((field["name"], shape(field["type"])) for field in schema["fields"])]
    return [schema["type"], shape(schema["items"])] if "items" in schema else shape(schema["type"])


# ── events as a topic ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("registered", [True, False], ids=["with a registry", "alone"])
def test_events_are_written_to_a_topic_in_order_and_read_back(
    kafka: Kafka, registry: Apicurio, registered: bool
) -> None:
    """Whoever has the registry's schema reads them, and what a dead letter is read by reads them without."""
    topic = f"events-{registered}".lower()
    with closing(admin_client(kafka.url)) as admin:
        admin.create_topics({topic: {"num_partitions": 3, "replication_factor": 1}})
    rows: list[dict[str, Any]] = [{"id": key, "title": "Amélie", "price": None} for key in range(5)]
    events = [
        RowEvent("public.movie", (row["id"],), version, "update", {**row, "price": 1}, row, AT)
        for version in range(1, 5)
        for row in rows
    ]
    write = Topic(topic, bootstrap_servers=kafka.url, pipeline="movies", registry=registry.url if registered else None)
    write(events[:3])
    for event in events[3:]:
        write(event)
    write.close()
    found: list[Any] = []
    consumer = KafkaConsumer(topic, bootstrap_servers=kafka.url, auto_offset_reset="earliest")

    def all_are_there() -> bool:
        found.extend(one for batch in consumer.poll(100).values() for one in batch)
        return len(found) >= len(events)

    with closing(consumer):
        wait_until(all_are_there, ARRIVES_S, "all events")
    by_key: dict[bytes, list[RowEvent]] = {}
    for one in found:
        value = one.value
        if registered:
            assert value[:1] == b"\0"
            with closing(SchemaRegistry(RegistrySpec(url=registry.url))) as client:
                schema = client.schema(int.from_bytes(value[1:5], "big"))
            # The registry writes names in full; the canonical form is the same.
            assert delta_schemas.fingerprint(schema) == delta_schemas.fingerprint(delta_event.SCHEMA)
            value = delta_event.encode_event(events[0].delta_event("movies"))[: delta_event.HEADER_BYTES] + value[5:]
        kept = delta_event.decode_event(value)
        assert kept.pipeline == "movies"
        by_key.setdefault(one.key, []).append(RowEvent.of(kept))
        assert dict(one.headers)["delta-id"].decode() == by_key[one.key][-1].id
    assert by_key == {f"public.movie/{key}".encode(): [e for e in events if e.key == (key,)] for key in range(5)}
    assert len({one.partition for one in found}) > 1


def test_a_schema_that_is_registered_twice_has_one_id(registry: Apicurio, client: SchemaRegistry) -> None:
    schema = json.dumps(record("Twice", "int"))
    assert client.register("twice-value", schema) == client.register("twice-value", schema)
    assert client.schema(client.register("twice-value", schema)) == json.loads(schema)
