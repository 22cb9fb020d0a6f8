"""Rendered options against Debezium's own definitions, filters and parsers, and once against a real PostgreSQL."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from debezium_jvm import DebeziumJvm
from delta_debezium.engine import EmbeddedCapture
from delta_debezium.properties import expression_literal, properties_text
from delta_debezium.render import SOURCE_PREFIX, connector_config, engine_properties, server_properties
from delta_sync.capture import Batch
from delta_sync.maven import cache_dir
from delta_sync.secrets import resolve
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL

KAFKA = {"bootstrap_servers": "kafka:9092", "registry": {"url": "http://registry/apis/ccompat/v7"}}
NEWER_THAN_MARIADB_CONNECTOR = {"statistics.metrics.enabled"}  # came with 3.6; the published connector is of 3.5

# Everything that the URL of a source can turn into an option.
EVERY_PARAMETER = (
    "sslmode=verify-full&sslrootcert=/ca.pem&sslcert=/c.pem&sslkey=/k.pem&sslpassword=${env:KEY}&sslnegotiation=direct"
    "&channel_binding=require&gssencmode=disable&require_auth=scram-sha-256&connect_timeout=3&options=-c%20jit=off"
    "&target_session_attrs=primary&application_name=x&keepalives=1"
)

# No name is dots alone: `pipeline.yaml` could not tell it from the dot between schema and table.
NAMES = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: bool(name.strip("."))
)
ONE_JVM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def jvm() -> Iterator[DebeziumJvm]:
    child = DebeziumJvm()
    yield child
    child.close()


def table(name: str, key: tuple[str, ...] = ("id",), *, schema: str = "public", primary: bool = True) -> Table:
    return Table(schema, name, tuple(Column(each, "text", Kind.TEXT) for each in key), key, primary)


def pipeline(url: str, *tables: Table, name: str = "movies", **changes: Any) -> tuple[PipelineSpec, dict[str, Table]]:
    by_id = {each.id: each for each in tables}
    source = {"url": url, "password": "${env:PW}"}
    data = {"name": name, "source": source, "tables": dict.fromkeys(by_id), "sinks": {"c": {"url": "redis://c"}}}
    return spec_from({**data, **changes}, "test"), by_id


TABLES = (
    table("movie"),
    Table("public", "map", (Column("id", "int", Kind.INTEGER), Column("box", "box", Kind.TEXT, in_log=False)), ("id",)),
    table("Größe, x;y:z", ("k:1", "k,2"), primary=False),
)
POSTGRESQL = f"postgresql://delta@db:5433/studio?{EVERY_PARAMETER}"
MYSQL = "mysql://delta@db/studio?ssl-mode=VERIFY_CA"
MARIADB = "mariadb://delta@db/studio?ssl-mode=verify-full"


@pytest.mark.parametrize("url", [POSTGRESQL, MYSQL])
def test_every_option_is_known_and_valid(jvm: DebeziumJvm, url: str) -> None:
    options = engine_properties(*pipeline(url, *TABLES))
    assert jvm.ask("validate", options=options) == {"unknown": [], "errors": {}}


def test_an_engine_goes_on_from_the_place_that_the_last_one_said(jvm: DebeziumJvm, tmp_path: Path) -> None:
    """Where the source keeps none. It is read by Kafka Connect's own reader, as the engine does."""
    offset = {"file": "binlog.000012", "pos": 345, "gtids": "3d26fb2a-eca5-11f1-8512-02fc00000001:1-9", "row": 2}
    asked = {"name": "movies", "server": "delta_movies", "offset": offset, "file": str(tmp_path / "offsets.dat")}
    found = jvm.ask("goes_on_from", **asked)
    key, value = found["place"]
    assert json.loads(key) == ["movies", {"server": "delta_movies"}]
    assert json.loads(value) == offset
    assert found["read"] == {name: str(value) for name, value in offset.items()}


def test_the_servers_source_options_are_known_and_valid(jvm: DebeziumJvm) -> None:
    text = server_properties(*pipeline(POSTGRESQL, *TABLES, transport="kafka", kafka=KAFKA), 1)
    entries: dict[str, str] = jvm.ask("read_properties", text=text)
    options = {
        name.removeprefix(SOURCE_PREFIX): value for name, value in entries.items() if name.startswith(SOURCE_PREFIX)
    }
    assert "field.name.adjustment.mode" in options
    assert jvm.ask("validate", options=options) == {"unknown": [], "errors": {}}


OTHERS = {
    "io.debezium.connector.sqlserver.SqlServerConnector": ("shop.dbo.movie", {"database.names": "shop"}),
    "io.debezium.connector.oracle.OracleConnector": ("SHOP.MOVIE", {"database.dbname": "ORCLCDB"}),
    "io.debezium.connector.db2.Db2Connector": ("SHOP.MOVIE", {"database.dbname": "SHOP"}),
    "io.debezium.connector.postgresql.PostgresConnector": ("public.movie", {"database.dbname": "studio"}),
}


def other(name: str, **changes: Any) -> dict[str, str]:
    """Return the options of a connector that is treated as one that Delta does not know."""
    its_table, own = OTHERS[name]
    connector = {
        "database.hostname": "db",
        "database.user": "delta",
        "database.password": "${env:PW}",
        "signal.data.collection": "a.b.c",
        **own,
    }
    source: dict[str, Any] = {"source": {"url": f"debezium://{name}"}, "tables": {its_table: {}}}
    spec, _ = pipeline(POSTGRESQL, **source, transport="kafka", kafka=KAFKA, connector=connector | changes)
    return connector_config(spec, {})


@pytest.mark.parametrize("name", list(OTHERS))
def test_options_of_connectors_that_delta_does_not_know_are_known_and_valid(jvm: DebeziumJvm, name: str) -> None:
    """By their own definitions; those for clients of Kafka by Kafka's."""
    options = other(name)
    consumer, producer = "signal.consumer.", "schema.history.internal.producer."
    clients = {option: value for option, value in options.items() if option.startswith((consumer, producer))}
    found = jvm.ask("validate", options={one: value for one, value in options.items() if one not in clients})
    assert found == {"unknown": [], "errors": {}}
    of_consumer = {one.removeprefix(consumer): value for one, value in clients.items() if one.startswith(consumer)}
    deserializer = "org.apache.kafka.common.serialization.StringDeserializer"  # as Debezium sets it
    of_consumer |= {"key.deserializer": deserializer, "value.deserializer": deserializer}
    definition = "org.apache.kafka.clients.consumer.ConsumerConfig"
    assert jvm.ask("validate_client", definition=definition, options=of_consumer) == {"unknown": [], "errors": {}}


def test_a_wrong_option_of_such_a_connector_is_found(jvm: DebeziumJvm) -> None:
    name = next(iter(OTHERS))
    wrong = jvm.ask("validate", options=other(name, **{"snapshot.isolation.mode": "soon", "signal.kafka.tpic": "x"}))
    assert list(wrong["errors"]) == ["snapshot.isolation.mode"]
    assert "signal.kafka.tpic" in wrong["unknown"]


@pytest.mark.parametrize("name", list(OTHERS)[:3])
def test_such_a_connector_captures_its_tables(jvm: DebeziumJvm, name: str) -> None:
    schema, table_name = OTHERS[name][0].split(".")[-2:]
    captured = jvm.ask("included", options=other(name), tables=[[schema, table_name], [schema, "other"]])
    assert captured == [True, False]


SECURITY: list[dict[str, str] | None] = [
    None,
    {"protocol": "SASL_SSL", "mechanism": "SCRAM-SHA-512", "username": "u", "password": "${env:K}", "ca_file": "/ca"},
    {"protocol": "SSL", "certificate_file": "/c.pem", "key_file": "/k.pem"},
]


@pytest.mark.parametrize("security", SECURITY)
def test_the_servers_other_options_are_known_and_valid(jvm: DebeziumJvm, security: dict[str, str] | None) -> None:
    """Those of Kafka's producer and of the transformation. The registry's: `test_debezium_server.py` uses them."""
    spec, tables = pipeline(POSTGRESQL, *TABLES, transport="kafka", kafka={**KAFKA, "security": security})
    entries: dict[str, str] = jvm.ask("read_properties", text=server_properties(spec, tables, 1))
    for definition, prefix in (
        ("org.apache.kafka.clients.producer.ProducerConfig", "debezium.sink.kafka.producer."),
        ("org.apache.kafka.connect.transforms.InsertHeader", "debezium.transforms.epoch."),
    ):
        options = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
        transformation = options.pop("type", definition)  # of whoever loads the transformation
        assert (transformation, bool(options)) == (definition, True)
        assert jvm.ask("validate_client", definition=definition, options=options) == {"unknown": [], "errors": {}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("poll.interval.ms", "soon"),
        ("max.queue.size", "5"),
        ("lsn.flush.mode", "driver"),
        ("provide.transaction.metadata", "maybe"),
        ("slot.name", "Delta"),
        ("table.include.list", "("),
        ("message.key.columns", "a.b:c:d"),
        ("message.prefix.include.list", "["),
        ("skipped.operations", "q"),
        ("time.precision.mode", "x"),
        ("decimal.handling.mode", "x"),
        ("binary.handling.mode", "x"),
        ("interval.handling.mode", "x"),
        ("hstore.handling.mode", "x"),
        ("database.hostname", "[::1]"),
        ("offset.flush.interval.ms", "-1"),
        ("offset.storage", "org.apache.kafka.connect.storage.NoSuchStore"),
        ("converter.schemas.enable", "x"),
        ("driver.channelBinding", "x"),
    ],
)
def test_a_wrong_value_would_be_found(jvm: DebeziumJvm, name: str, value: str) -> None:
    options = engine_properties(*pipeline(POSTGRESQL, *TABLES)) | {name: value}
    assert list(jvm.ask("validate", options=options)["errors"]) == [name]


@pytest.mark.parametrize(
    "name",
    ["logical.decoding.message.prefix.include.list", "slot.names", "driver.channel_binding", "converter.schemas"],
)
def test_an_unknown_option_would_be_found(jvm: DebeziumJvm, name: str) -> None:
    options = engine_properties(*pipeline(POSTGRESQL, *TABLES)) | {name: "x"}
    assert jvm.ask("validate", options=options)["unknown"] == [name]


@pytest.fixture(scope="module")
def mariadb_jvm() -> Iterator[DebeziumJvm]:
    jars = cache_dir() / "mariadb-connector-3.5.0.Final"
    if not jars.exists():
        maven = shutil.which("mvn")
        if maven is None:
            pytest.skip("the connector for MariaDB comes by Maven, and mvn is not installed")
        scratch = jars.with_suffix(".part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        pom = shutil.copy(Path(__file__).with_name("mariadb-connector.xml"), scratch / "pom.xml")
        options = ["-q", "-B", "-f", str(pom), "-DincludeScope=runtime", f"-DoutputDirectory={scratch}"]
        subprocess.run([maven, *options, "dependency:copy-dependencies"], check=True, timeout=600)
        scratch.rename(jars)
    child = DebeziumJvm(jars)
    yield child
    child.close()


def test_mariadbs_options_are_known_and_valid(mariadb_jvm: DebeziumJvm) -> None:
    options = engine_properties(*pipeline(MARIADB, *TABLES))
    found = mariadb_jvm.ask("validate", options=options)
    assert found == {"unknown": sorted(NEWER_THAN_MARIADB_CONNECTOR), "errors": {}}
    wrong = mariadb_jvm.ask("validate", options=options | {"database.ssl.mode": "verify_ca", "slot.name": "x"})
    assert list(wrong["errors"]) == ["database.ssl.mode"]
    assert "slot.name" in wrong["unknown"]


# ── names, as Debezium's own filters read them ───────────────────────────────────────────────────────────────────


@ONE_JVM
@given(names=st.lists(NAMES, min_size=2, max_size=6, unique=True), schema=NAMES)
@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_exactly_the_named_tables_are_captured(jvm: DebeziumJvm, scheme: str, names: list[str], schema: str) -> None:
    chosen, others = names[::2], names[1::2]
    spec, tables = pipeline(f"{scheme}://delta@db/studio", *(table(name, schema=schema) for name in chosen))
    others = [
        name for name in (*others, *map(str.swapcase, chosen), *(f"{name}x" for name in chosen)) if name not in chosen
    ]
    options = connector_config(spec, tables)
    asked = [(schema, name) for name in (*chosen, *others)]
    included = jvm.ask("included", options=options, tables=asked)
    # MySQL's filter leaves out the server's own schemas whatever is named.
    system = scheme == "mysql" and schema.lower() in {"mysql", "sys", "performance_schema", "information_schema"}
    assert included == [not system] * len(chosen) + [False] * len(others)


@ONE_JVM
@given(
    columns=st.lists(NAMES, min_size=2, max_size=5, unique_by=str.lower).filter(lambda names: "other" not in names),
    name=NAMES,
)
def test_exactly_the_named_columns_are_the_key(jvm: DebeziumJvm, columns: list[str], name: str) -> None:
    key = tuple(columns[1:])
    spec, tables = pipeline("postgresql://delta@db/studio", table("movie"), table(name, key, primary=False))
    options = connector_config(spec, tables)
    found = jvm.ask("key_columns", options=options, schema="public", table=name, columns=columns, primary=columns[:1])
    assert found == list(key)
    found = jvm.ask(
        "key_columns", options=options, schema="public", table=f"{name}x", columns=columns, primary=columns[:1]
    )
    assert found == columns[:1]


@ONE_JVM
@given(columns=st.lists(NAMES, min_size=2, max_size=5, unique_by=str.lower), name=NAMES)
def test_exactly_the_columns_that_the_log_does_not_carry_are_left_out(
    jvm: DebeziumJvm, columns: list[str], name: str
) -> None:
    kept = columns[::2]
    of_table = tuple(Column(column, "text", Kind.TEXT, in_log=column in kept) for column in columns)
    options = connector_config(
        *pipeline("postgresql://delta@db/studio", Table("public", name, of_table, (columns[0],)))
    )
    found = jvm.ask("columns_included", options=options, schema="public", table=name, columns=columns)
    assert found == [column in kept for column in columns]
    assert all(jvm.ask("columns_included", options=options, schema="public", table=f"{name}x", columns=columns))


def test_only_the_pipelines_own_messages_are_delivered(jvm: DebeziumJvm) -> None:
    options = connector_config(*pipeline("postgresql://delta@db/studio", *TABLES))
    prefixes = ["delta.movies", "delta.movies2", "delta-movies", "DELTA.movies", ""]
    assert jvm.ask("message_included", options=options, prefixes=prefixes) == [True, False, False, False, False]


# ── properties files and Debezium Server's expressions ───────────────────────────────────────────────────────────


@ONE_JVM
@given(entries=st.dictionaries(NAMES, NAMES | st.just("") | st.just("  two blanks \\ \n ")))
def test_a_properties_file_reads_back_as_it_was(jvm: DebeziumJvm, entries: dict[str, str]) -> None:
    text = properties_text(entries)
    assert text.isascii()
    assert jvm.ask("read_properties", text=text) == entries


@ONE_JVM
@given(value=st.text(st.sampled_from("$\\{}:ab")), secret=st.text(st.sampled_from("$\\{}:ab")))
def test_dollars_mean_themselves_to_the_server(jvm: DebeziumJvm, value: str, secret: str) -> None:
    environment = {"SECRET": expression_literal(secret)}
    assert jvm.ask("expand", value=expression_literal(value), environment={}) == value
    assert jvm.ask("expand", value="${SECRET}", environment=environment) == secret


# ── a real server ────────────────────────────────────────────────────────────────────────────────────────────────


DATABASE = "stüdio 1"  # what the URL has to escape, and the driver to unescape
SLOT = "delta_rendered"


class Source:
    """A database with a publication, a slot, two tables whose names need care, and the engine as it is rendered."""

    def __init__(self, server: PostgreSQL, log_file: Path) -> None:
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute(f'DROP DATABASE IF EXISTS "{DATABASE}"')
            admin.execute(f'CREATE DATABASE "{DATABASE}"')
        self.db = psycopg.connect(server.url_of(DATABASE), autocommit=True)
        self.db.execute("CREATE TABLE rendered (id int PRIMARY KEY)")
        self.db.execute("""CREATE TABLE "Odd.Näme, x" (id int PRIMARY KEY, "K:1" text NOT NULL UNIQUE)""")
        self.db.execute(f"""CREATE PUBLICATION {SLOT} FOR TABLE rendered, "Odd.Näme, x" """)
        self.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [SLOT])
        tables = (table("rendered"), table("Odd.Näme, x", ("K:1",), primary=False))
        spec, by_id = pipeline(server.url_of(DATABASE).replace(":postgres@", "@"), *tables, name="rendered")
        properties = engine_properties(spec, by_id)
        resolved = {name: resolve(value, {"PW": "postgres"}) for name, value in properties.items()}
        self.capture = EmbeddedCapture(lambda: resolved, log_file)
        self.last: Batch | None = None

    def events(self, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """Return the next events, until there are enough."""
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + 60
        while not enough(found):
            assert time.monotonic() < deadline, f"only {found} arrived"
            batch = self.capture.poll(timeout_s=1.0)
            if batch is not None:
                self.last = batch
                found += json.loads(batch.payload)
        return found

    def confirm(self) -> None:
        """Confirm what has arrived, and wait until the server has it."""
        assert self.last is not None
        before = self.confirmed()
        self.capture.confirm(self.last)
        wait_until(lambda: self.confirmed() != before, 30, "the confirmation")

    def confirmed(self) -> str:
        """Return what the server holds for confirmed."""
        return str(self._slot("confirmed_flush_lsn"))

    def close(self) -> None:
        self.capture.stop()
        wait_until(lambda: not self._slot("active"), 30, "the slot's release")
        self.db.execute("SELECT pg_drop_replication_slot(%s)", [SLOT])
        self.db.close()

    def _slot(self, column: str) -> object:
        row = self.db.execute(f"SELECT {column} FROM pg_replication_slots WHERE slot_name = %s", [SLOT]).fetchone()
        return row[0] if row else None


@pytest.fixture
def source(postgresql: PostgreSQL, tmp_path: Path) -> Iterator[Source]:
    found = Source(postgresql, tmp_path / "engine.log")
    yield found
    found.close()


def test_on_a_real_server(source: Source) -> None:
    before = source.confirmed()
    source.db.execute("INSERT INTO rendered VALUES (1)")
    source.capture.start()
    assert [event["after"] for event in source.events(lambda found: len(found) == 1)] == [{"id": 1}]

    # Names that need escaping; foreign messages stay away, the pipeline's own arrive; TRUNCATE is an event.
    source.db.execute("""INSERT INTO "Odd.Näme, x" VALUES (2, 'k')""")
    source.db.execute("SELECT pg_logical_emit_message(false, 'delta.rendered2', 'x')")
    source.db.execute("SELECT pg_logical_emit_message(false, 'delta.rendered', 'x')")
    source.db.execute("TRUNCATE rendered")
    odd, message, truncate = source.events(lambda found: len(found) == 3)
    assert (odd["source"]["table"], odd["after"]) == ("Odd.Näme, x", {"id": 2, "K:1": "k"})
    assert message["message"]["prefix"] == "delta.rendered"
    assert (truncate["op"], truncate["source"]["table"]) == ("t", "rendered")

    # Nothing was acknowledged, so nothing is confirmed, whatever the driver's keep-alives say meanwhile.
    source.db.execute("SELECT pg_switch_wal()")
    assert source.confirmed() == before

    # What was acknowledged is confirmed at once, every time. (The engine's default is once a minute; but it counts in
    # two places, from the epoch on, so that the first two would be at once whatever the option says.)
    for _ in range(4):
        source.db.execute("SELECT pg_logical_emit_message(false, 'delta.rendered', 'x')")
        source.events(lambda found: len(found) == 1)
        source.confirm()

    # Positions are the slot's: what was written while nothing ran arrives at the next start.
    source.capture.stop()
    source.db.execute("INSERT INTO rendered VALUES (3)")
    source.capture.start()
    # The last transaction before what was confirmed may come again first.
    assert source.events(lambda found: bool(found) and found[-1]["op"] == "c")[-1]["after"] == {"id": 3}
