"""The rendering of connector configuration: what the options are, what is refused, and how names are escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_debezium import mysql
from delta_debezium.options import quoted
from delta_debezium.properties import expression_literal
from delta_debezium.reference import reference_page
from delta_debezium.render import (
    connector_config,
    connector_json,
    engine_properties,
    server_environment,
    server_properties,
)
from delta_sync.errors import UsageError
from delta_sync.secrets import resolve
from delta_sync.sources.postgresql.codec import CONNECTOR_OPTIONS
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.tables import Column, Kind, Table

KAFKA: dict[str, Any] = {"bootstrap_servers": "kafka:9092", "registry": {"url": "http://registry/apis/ccompat/v7"}}
EPOCH = 3


def table(
    name: str = "movie", *, schema: str = "public", key: tuple[str, ...] = ("id",), primary: bool = True
) -> Table:
    columns = tuple(Column(column, "text", Kind.TEXT) for column in dict.fromkeys(("id", *key)))
    return Table(schema, name, columns, key, primary)


def pipeline(
    url: str = "postgresql://delta@db/studio", *tables: Table, **changes: Any
) -> tuple[PipelineSpec, dict[str, Table]]:
    by_id = {each.id: each for each in tables or (table(),)}
    source = {"url": url, "password": "${env:PW}", **changes.pop("source", {})}
    data = {"name": "movies", "source": source, "tables": dict.fromkeys(by_id), "sinks": {"c": {"url": "redis://c"}}}
    return spec_from({**data, **changes}, "test"), by_id


def config(url: str = "postgresql://delta@db/studio", *tables: Table, **changes: Any) -> dict[str, str]:
    return connector_config(*pipeline(url, *tables, **changes))


def refusal(url: str = "postgresql://delta@db/studio", *tables: Table, **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        config(url, *tables, **changes)
    return str(caught.value)


def test_the_connector_of_a_small_pipeline() -> None:
    assert config() == {
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "database.hostname": "db",
        "database.port": "5432",
        "database.user": "delta",
        "database.dbname": "studio",
        "database.password": "${env:PW}",
        "plugin.name": "pgoutput",
        "slot.name": "delta_movies",
        "slot.drop.on.stop": "false",
        "slot.max.retries": "10",
        "slot.retry.delay.ms": "500",
        "publication.name": "delta_movies",
        "publication.autocreate.mode": "disabled",
        "lsn.flush.mode": "connector",
        "status.update.interval.ms": "5000",
        "message.prefix.include.list": r"(?-i)delta\.movies",
        "heartbeat.interval.ms": "0",
        "schema.refresh.mode": "columns_diff",
        "table.include.list": r"(?-i)public\.movie",
        "table.ignore.builtin": "false",
        "topic.prefix": "delta_movies",
        "snapshot.mode": "no_data",
        "skipped.operations": "none",
        "tombstones.on.delete": "false",
        "provide.transaction.metadata": "false",
        "extended.headers.enabled": "false",
        "event.processing.failure.handling.mode": "fail",
        "errors.max.retries": "0",
        "poll.interval.ms": "20",
        "max.batch.size": "2048",
        "max.queue.size": "8192",
        "max.queue.size.in.bytes": "16777216",
        "statistics.metrics.enabled": "false",
        "driver.options": CONNECTOR_OPTIONS["driver.options"],
        "decimal.handling.mode": "string",
        "time.precision.mode": "microseconds",
        "binary.handling.mode": "bytes",
        "hstore.handling.mode": "json",
        "include.unknown.datatypes": "false",
        "unavailable.value.placeholder": "__debezium_unavailable_value",
        "event.converting.failure.handling.mode": "fail",
    }


def test_the_engine_gets_the_same_connector_and_keeps_no_positions_of_its_own() -> None:
    spec, tables = pipeline()
    properties = engine_properties(spec, tables)
    assert connector_config(spec, tables).items() <= properties.items()
    assert properties["offset.storage"] == "org.apache.kafka.connect.storage.MemoryOffsetBackingStore"
    assert properties["offset.flush.interval.ms"] == "0"
    assert properties["converter.schemas.enable"] == "false"
    assert CONNECTOR_OPTIONS.items() <= properties.items()


def test_connector_json_is_what_kafka_connect_takes_and_the_same_every_time() -> None:
    spec, tables = pipeline("postgresql://delta@db/studio", table("größe"))
    text = connector_json(spec, tables)
    assert json.loads(text) == {"name": "movies", "config": connector_config(spec, tables)}
    assert text == connector_json(spec, dict(reversed(tables.items())))
    assert text.endswith("}\n")


# ── the URL ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_url_is_percent_decoded_and_references_survive() -> None:
    found = config("postgresql://a%40b:${file:/run/secrets/db pw}@Db.Example:6432/my%20db", source={"password": None})
    assert (found["database.user"], found["database.password"]) == ("a@b", "${file:/run/secrets/db pw}")
    assert (found["database.hostname"], found["database.port"]) == ("db.example", "6432")
    assert found["database.dbname"] == "my db"
    assert config("postgresql://${env:USER}@${env:HOST}/${env:DB}")["database.hostname"] == "${env:HOST}"
    assert config("postgresql://${env:USER}@${env:HOST}/${env:DB}")["database.user"] == "${env:USER}"


def test_a_url_without_a_database_means_the_users_own() -> None:
    assert config("postgresql://delta@db")["database.dbname"] == "delta"


def test_libpqs_parameters_reach_the_driver_by_its_names() -> None:
    query = "sslmode=verify-full&sslrootcert=/etc/ca%20.pem&connect_timeout=3&target_session_attrs=read-write"
    found = config(f"postgresql://delta@db/studio?{query}&application_name=x&channel_binding=require")
    assert {name: value for name, value in found.items() if name.startswith(("driver.", "database.ssl"))} == {
        "database.sslmode": "verify-full",
        "database.sslrootcert": "/etc/ca .pem",
        "driver.connectTimeout": "3",
        "driver.targetServerType": "primary",
        "driver.channelBinding": "require",
        "driver.options": CONNECTOR_OPTIONS["driver.options"],
    }


def test_what_the_decoders_need_of_the_session_counts_more_than_the_urls_options() -> None:
    found = config("postgresql://delta@db/studio?options=-c%20IntervalStyle%3Diso_8601")
    assert found["driver.options"] == f"-c IntervalStyle=iso_8601 {CONNECTOR_OPTIONS['driver.options']}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://delta@[::1]/studio", "host names and IPv4"),
        ("postgresql://delta@dé/studio", "ASCII"),
        ("postgresql://delta@a:1,b:2/studio", "several hosts"),
        ("postgresql://delta@/studio", "names no host"),
        ("postgresql://delta@%2Frun%2Fpostgresql/studio", "TCP only"),
        ("postgresql://db/studio", "names no user"),
        ("postgresql://delta@db:port/studio", "cannot be read"),
        ("postgresql://delta@db/a%2Fb", "'/'"),
        ("postgresql://delta@db/studio?host=/tmp", "host=/tmp"),
        ("postgresql://delta@db/studio?target_session_attrs=prefer-standby", "target_session_attrs"),
        ("postgresql://delta@db/studio?sslpassword=x", "spells out sslpassword"),
        ("postgresql://delta:${env:A}@db/studio", "both hold a password"),
        ("oracle://delta@db/studio", "no connector"),
        ("mysql://delta@db/studio?ssl-mode=maybe", "verify_identity"),
        ("mariadb://delta@db/studio?compress=1", "only ssl-mode"),
    ],
)
def test_what_debezium_cannot_be_told_is_refused_in_words(url: str, words: str) -> None:
    assert words in refusal(url)


@pytest.mark.parametrize("name", ["Movies", "my pub", "o'clock", 'a"b', "a,b", "größe", "1st"])
def test_a_publication_whose_name_would_mean_another_one_is_refused(name: str) -> None:
    assert "source.publication" in refusal(source={"publication": name})


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_become_regular_expressions_that_debezium_cannot_split() -> None:
    odd = table("a.b,c;d:e f$", key=("k:1", "k,2"), primary=False)
    found = config("postgresql://delta@db/studio", table("Movie"), odd)
    name = r"(?-i)public\.a\.b\x{2c}c\x{3b}d\x{3a}e\x{20}f\x{24}"
    assert found["table.include.list"] == rf"(?-i)public\.Movie,{name}"
    assert found["message.key.columns"] == rf"{name}:k\x{{3a}}1,k\x{{2c}}2"


@given(st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_an_escaped_name_has_no_character_with_a_meaning_and_loses_none(name: str) -> None:
    pattern = quoted(name)
    assert re.fullmatch(r"(?:[A-Za-z0-9_]|\\\.|\\x\{[0-9a-f]+\})*", pattern)
    back = re.sub(r"\\x\{([0-9a-f]+)\}", lambda match: chr(int(match[1], 16)), pattern.replace("\\.", "\\x{2e}"))
    assert back == name


def test_columns_that_the_log_does_not_carry_are_left_out() -> None:
    columns = (Column("id", "int", Kind.INTEGER), Column("Area, m2", "box", Kind.TEXT, in_log=False))
    found = config("postgresql://delta@db/studio", Table("public", "movie", columns, ("id",)))
    assert found["column.exclude.list"] == r"(?-i)public\.movie\.Area\x{2c}\x{20}m2"


def test_columns_that_differ_by_case_only_are_refused() -> None:
    assert "'id' and 'ID'" in refusal("postgresql://delta@db/studio", table(key=("id", "ID")))


# ── overrides ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_override_wins_and_an_addition_comes_last() -> None:
    found = config(connector={"slot.failover": True, "max.batch.size": 100})
    assert found["max.batch.size"] == "100"
    assert list(found.items())[-1] == ("slot.failover", "true")
    assert list(found)[:-1] == list(config())


def test_what_correctness_rests_on_can_be_repeated_but_not_changed() -> None:
    assert config(connector={"snapshot.mode": "no_data"}) == config()
    for name, value in {
        "snapshot.mode": "initial",
        "lsn.flush.mode": "connector_and_driver",
        "errors.max.retries": -1,
    }.items():
        message = refusal(connector={name: value})
        assert message.startswith(f"connector.{name} cannot be changed. ")
        assert message.endswith(".")


@pytest.mark.parametrize(
    "name",
    ["transforms", "transforms.unwrap.type", "column.mask.with.5.chars", "signal.data.collection", "offset.storage"],
)
def test_what_would_break_delta_cannot_be_added(name: str) -> None:
    assert re.match(rf"connector\.{re.escape(name)} cannot be set: .+\.$", refusal(connector={name: "x"}))


def test_a_secret_among_the_overrides_must_be_a_reference() -> None:
    message = refusal(connector={"database.sslpassword": "s3cret"})
    assert "reference" in message
    assert "s3cret" not in message
    assert config(connector={"database.sslpassword": "${env:KEY}"})["database.sslpassword"] == "${env:KEY}"


# ── MySQL and MariaDB ────────────────────────────────────────────────────────────────────────────────────────────


def test_mysql_and_mariadb_keep_their_positions_in_files_and_register_under_an_id_of_their_own() -> None:
    for kind in ("mysql", "mariadb"):
        spec, tables = pipeline(f"{kind}://delta@db/studio", table(schema="studio"))
        properties = engine_properties(spec, tables, "/var/lib/delta/movies")
        assert properties["connector.class"] == mysql.CONNECTOR_CLASSES[kind]
        assert properties["table.include.list"] == r"(?-i)studio\.movie"
        assert properties["offset.storage.file.filename"] == "/var/lib/delta/movies/offsets.dat"
        assert properties["schema.history.internal.file.filename"] == "/var/lib/delta/movies/schema_history.dat"
        assert properties["snapshot.locking.mode"] == "none"
        assert properties["heartbeat.interval.ms"] == "1000"
    assert mysql.server_id("movies") == mysql.server_id("movies") == 1_323_915_568
    assert mysql.server_id("movies") != mysql.server_id("films")


# ── Debezium Server ──────────────────────────────────────────────────────────────────────────────────────────────


def on_kafka(url: str = "postgresql://delta@db/studio", **kafka: Any) -> tuple[PipelineSpec, dict[str, Table]]:
    return pipeline(url, transport="kafka", kafka={**KAFKA, **kafka})


def server_options(url: str = "postgresql://delta@db/studio", **kafka: Any) -> dict[str, str]:
    text = server_properties(*on_kafka(url, **kafka), EPOCH)
    return dict(line.split("=", 1) for line in text.splitlines())


def starting_with(prefix: str, options: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}


def test_mariadb_on_kafka_keeps_position_and_history_there() -> None:
    security = {"protocol": "SASL_SSL", "mechanism": "PLAIN", "username": "delta", "password": "${env:KAFKA_PW}"}
    spec, tables = on_kafka("mariadb://delta@db/studio", security=security)
    text = server_properties(spec, tables, EPOCH)
    options = dict(line.split("=", 1) for line in text.splitlines())
    ours = starting_with("debezium.source.", options)
    assert ours["offset.storage"].endswith(".KafkaOffsetBackingStore")
    assert ours["offset.storage.topic"] == "delta_movies.offsets"
    assert ours["schema.history.internal"].endswith(".KafkaSchemaHistory")
    assert ours["schema.history.internal.kafka.topic"] == "delta_movies.schema-history"
    assert {ours[name] for name in ("bootstrap.servers", "schema.history.internal.kafka.bootstrap.servers")} == {
        "kafka:9092"
    }
    for prefix in ("", "schema.history.internal.producer.", "schema.history.internal.consumer."):
        assert ours[f"{prefix}security.protocol"] == "SASL_SSL"
        assert ours[f"{prefix}sasl.jaas.config"].startswith("${DELTA_SECRET_")
    environment = server_environment(spec, tables, EPOCH, {"${env:PW}": "pw", "${env:KAFKA_PW}": 'a"b'}.__getitem__)
    logins = [value for value in environment.values() if "PlainLoginModule" in value]
    assert len(logins) == 4  # of the records' producer, too
    assert len({login.count("\\") for login in logins}) == 1, "and each is quoted as JAAS has it"


def test_the_server_gets_secrets_by_environment_and_never_in_its_file() -> None:
    spec, tables = on_kafka("postgresql://${env:USER}@db/studio")
    text = server_properties(spec, tables, EPOCH)
    assert "debezium.source.database.user=${DELTA_SECRET_1}\n" in text
    assert "debezium.source.database.password=${DELTA_SECRET_2}\n" in text
    assert "env:" not in text
    values = {"${env:USER}": "me", "${env:PW}": "pa$$wo${rd}"}
    environment = server_environment(spec, tables, EPOCH, values.__getitem__)
    assert environment == {"DELTA_SECRET_1": "me", "DELTA_SECRET_2": r"pa\$\$wo\${rd}"}


def test_the_server_does_not_log_what_is_a_secret() -> None:
    security = {"protocol": "SSL", "certificate_file": "/c.pem", "key_file": "/k.pem"}
    registry = {"url": "http://registry", "token": "${env:TOKEN}"}
    options = server_options(security=security, registry=registry)
    masked = re.compile(options["debezium.source.custom.sanitize.pattern"].replace("\\\\", "\\"))
    assert [name for name in options if options[name].startswith("${")] == [
        "debezium.sink.kafka.producer.ssl.keystore.certificate.chain",
        "debezium.sink.kafka.producer.ssl.keystore.key",
        "debezium.format.bearer.auth.token",
        "debezium.source.database.password",
    ]
    # As Debezium names them when it logs them.
    for name in (
        "schema.history.internal.kafka.producer.ssl.keystore.key",
        "value.converter.bearer.auth.token",
        "database.password",
        "database.sslpassword",
    ):
        assert masked.fullmatch(name)
    assert not masked.fullmatch("database.user")


def test_the_server_confirms_what_kafka_has_stored_for_good() -> None:
    options = server_options(max_message_bytes=40 << 20)
    producer = starting_with("debezium.sink.kafka.producer.", options)
    assert (producer["bootstrap.servers"], producer["acks"], producer["enable.idempotence"]) == (
        "kafka\\:9092".replace("\\", ""),
        "all",
        "true",
    )
    assert producer["max.request.size"] == str(40 << 20)
    assert int(producer["buffer.memory"]) >= 2 * (40 << 20)
    assert options["debezium.source.tombstones.on.delete"] == "true"
    assert options["debezium.source.offset.storage"].endswith("MemoryOffsetBackingStore")
    assert "security.protocol" not in producer


def test_every_record_has_the_epoch() -> None:
    assert starting_with("debezium.transforms", server_options()) == {
        "": "epoch",
        ".epoch.type": "org.apache.kafka.connect.transforms.InsertHeader",
        ".epoch.header": "delta.epoch",
        ".epoch.value.literal": "3",
    }


def test_a_login_to_kafka_is_quoted_as_jaas_has_it() -> None:
    security = {"mechanism": "SCRAM-SHA-512", "username": 'a"b', "password": "${env:KAFKA}"}
    spec, tables = on_kafka(security={"protocol": "SASL_SSL", "ca_file": "/ca.pem", **security})
    options = dict(line.split("=", 1) for line in server_properties(spec, tables, EPOCH).splitlines())
    producer = starting_with("debezium.sink.kafka.producer.", options)
    assert (producer["security.protocol"], producer["sasl.mechanism"]) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (producer["ssl.truststore.type"], producer["ssl.truststore.location"]) == ("PEM", "/ca.pem")
    assert producer["sasl.jaas.config"] == "${DELTA_SECRET_1}"
    values = {"${env:KAFKA}": 'x"y\\z$', "${env:PW}": "p"}
    assert server_environment(spec, tables, EPOCH, values.__getitem__)["DELTA_SECRET_1"] == (
        "org.apache.kafka.common.security.scram.ScramLoginModule required"
        r' username="a\"b" password="x\"y\\z\$";'
    )


def test_the_clients_certificate_and_key_are_read_when_the_server_starts(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    certificate.write_text("-----BEGIN CERTIFICATE-----\nAA==\n")
    key.write_text("-----BEGIN PRIVATE KEY-----\nBB==\n")
    security = {"protocol": "SSL", "certificate_file": str(certificate), "key_file": str(key)}
    spec, tables = on_kafka(security=security)
    environment = server_environment(spec, tables, EPOCH, lambda reference: resolve(reference, {"PW": "p"}))
    assert list(environment.values())[:2] == [certificate.read_text().rstrip(), key.read_text().rstrip()]


@pytest.mark.parametrize(
    ("registry", "expected"),
    [
        (
            {"url": "https://registry:8443/base/apis/ccompat/v7/", "ca_file": "/ca.pem"},
            {
                "apicurio.registry.url": "https://registry:8443/base/apis/registry/v3",
                "apicurio.registry.tls.truststore.type": "PEM",
                "apicurio.registry.tls.truststore.location": "/ca.pem",
            },
        ),
        (
            {"url": "http://registry/apis/ccompat/v8", "username": "me", "password": "${env:REGISTRY}"},
            {
                "apicurio.registry.url": "http://registry/apis/registry/v3",
                "apicurio.registry.auth.username": "me",
                "apicurio.registry.auth.password": "${DELTA_SECRET_1}",
            },
        ),
        (
            {"url": "http://registry:8081", "username": "me", "password": "${env:REGISTRY}"},
            {
                "schema.registry.url": "http://registry:8081",
                "basic.auth.credentials.source": "USER_INFO",
                "basic.auth.user.info": "${DELTA_SECRET_1}",
            },
        ),
        (
            {"url": "https://registry/apis/ccompat/v7", "token": "${env:REGISTRY}"},
            {
                "schema.registry.url": "https://registry/apis/ccompat/v7",
                "bearer.auth.credentials.source": "STATIC_TOKEN",
                "bearer.auth.token": "${DELTA_SECRET_1}",
            },
        ),
    ],
)
def test_the_registry_is_spoken_to_in_its_own_way(registry: dict[str, str], expected: dict[str, str]) -> None:
    options = starting_with("debezium.format.", server_options(registry=registry))
    fixed = ("key", "value", "header", "header.schemas.enable", "auto.register.schemas")
    ours = ("auto-register", "find-latest", "dereference-schema", "headers.enabled", "background-refresh-enabled")
    rest = {
        name: value
        for name, value in options.items()
        if name not in fixed and name.removeprefix("apicurio.registry.") not in ours
    }
    assert rest == expected
    assert ("apicurio.registry.dereference-schema" in options) == ("apicurio.registry.url" in options)


def test_an_authority_is_for_the_converter_that_can_read_it() -> None:
    with pytest.raises(UsageError, match="ca_file is for Apicurio without a token"):
        server_options(registry={"url": "https://registry:8081", "ca_file": "/ca.pem"})


def test_the_server_has_a_connector_for_mysql() -> None:
    options = server_options("mysql://delta@db/studio")
    assert options["debezium.source.connector.class"] == "io.debezium.connector.mysql.MySqlConnector"


def test_an_expression_literal_keeps_other_characters() -> None:
    assert expression_literal(r"a\b$c") == r"a\b\$c"


# ── the reference page ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_page_is_the_codes() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "connector.md"
    assert page.read_text(encoding="utf-8") == reference_page(), (
        "python -m delta_debezium.reference > docs/reference/connector.md"
    )
