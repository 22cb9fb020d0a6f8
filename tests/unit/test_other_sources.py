"""A source that is given by its connector's options: what it becomes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from delta_debezium.render import connector_config, connector_json, server_environment, server_properties
from delta_sync.errors import UsageError
from delta_sync.kafka.delivered import delivered_of
from delta_sync.kafka.topics import SIGNALS_MS, wanted_topics
from delta_sync.sources import check_supported, open_inspector, open_reader, position_text
from delta_sync.sources.debezium.limits import need_client, problems
from delta_sync.sources.debezium.reader import TopicReader
from delta_sync.spec import PipelineSpec, parse_spec, spec_from
from delta_sync.tables import Table
from delta_sync.versions import position_in_topic
from deltactl.generate import processor_source, source_from_connector, spec_from_options

SQL_SERVER = "io.debezium.connector.sqlserver.SqlServerConnector"
POSTGRESQL = "io.debezium.connector.postgresql.PostgresConnector"
KAFKA: dict[str, Any] = {"bootstrap_servers": "kafka:9092", "registry": {"url": "http://registry/apis/ccompat/v7"}}
OPTIONS: dict[str, str | int | bool] = {
    "database.hostname": "db",
    "database.user": "delta",
    "database.password": "${env:PW}",
    "database.names": "shop",
    "signal.data.collection": "shop.dbo.signal",
}


def other(class_: str = SQL_SERVER, **changes: Any) -> PipelineSpec:
    data: dict[str, Any] = {
        "name": "orders",
        "source": {"url": f"debezium://{class_}"},
        "tables": {"shop.dbo.order": {}},
        "sinks": {"cache": {"url": "redis://cache"}},
        "transport": "kafka",
        "kafka": KAFKA,
        "connector": OPTIONS,
    }
    return spec_from({**data, **changes}, "test")


def refused(spec: PipelineSpec) -> str:
    with pytest.raises(UsageError) as caught:
        connector_config(spec, {})
    return str(caught.value)


# ── the specification ──


def test_a_source_by_its_connector() -> None:
    spec = other()
    assert (spec.source.kind, spec.source.connector_class, spec.partitions) == ("debezium", SQL_SERVER, 1)
    check_supported(spec)
    assert delivered_of(spec)(1) is None
    assert spec_from({**spec.model_dump(mode="json"), "source": {"url": "mysql://d@h/b"}}, "it").partitions == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": {"url": "debezium://"}}, "must name a class"),
        ({"source": {"url": "debezium://sqlserver"}}, "must name a class"),
        ({"source": {"url": "debezium://a.b;rm"}}, "must name a class"),
        ({"kafka": KAFKA | {"partitions": 3}}, "kafka.partitions must be 1"),
        ({"connector": OPTIONS | {"database.password": "geheim"}}, "must be a reference"),
    ],
)
def test_what_the_specification_cannot_say(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        other(**changes)
    assert words in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_it_needs_kafka() -> None:
    with pytest.raises(UsageError, match="needs Kafka"):
        check_supported(other(transport="embedded", kafka=None))


# ── topics ──


def test_the_topics_of_signals_and_of_the_signal_table_are_made() -> None:
    topics = {topic.name: topic for topic in wanted_topics(other())}
    assert topics.keys() == {
        "delta_orders.shop.dbo.order",
        "delta_orders.shop.dbo.signal",
        "delta_orders.signals",
        "delta_orders.notifications",
        "delta_orders.offsets",
        "delta_orders.schema-history",
        "__debezium-heartbeat.delta_orders",
    }
    assert {topic.partitions for topic in topics.values()} == {1}
    assert topics["delta_orders.signals"].configs["retention.ms"] == str(SIGNALS_MS)


# ── the connector ──


def test_the_connectors_options() -> None:
    config = connector_config(other(), {})
    assert config["connector.class"] == SQL_SERVER
    assert config["table.include.list"] == r"(?-i)dbo\.order"  # SQL Server's list has no database
    assert config["database.hostname"] == "db"
    assert config["snapshot.mode"] == "no_data"
    assert config["signal.enabled.channels"] == "source,kafka"
    assert config["signal.kafka.topic"] == "delta_orders.signals"
    assert config["notification.sink.topic.name"] == "delta_orders.notifications"
    assert config["incremental.snapshot.chunk.size"] == "10000"
    assert config["tombstones.on.delete"] == "false"
    assert config["schema.history.internal.kafka.topic"] == "delta_orders.schema-history"
    assert json.loads(connector_json(other(), {}))["config"] == config


def test_a_connector_without_history_gets_none() -> None:
    config = connector_config(other(POSTGRESQL, tables={"public.movie": {}}), {})
    assert not [name for name in config if name.startswith("schema.history")]
    assert config["table.include.list"] == r"(?-i)public\.movie"


def test_logins_go_to_the_consumer_of_signals() -> None:
    security = {"protocol": "SASL_SSL", "mechanism": "PLAIN", "username": "u", "password": "${env:K}"}
    config = connector_config(other(kafka=KAFKA | {"security": security}), {})
    assert config["signal.consumer.security.protocol"] == "SASL_SSL"
    assert "${env:K}" in config["signal.consumer.sasl.jaas.config"]


def test_secrets_are_in_the_servers_environment_alone() -> None:
    properties = server_properties(other(), {}, 3, 12)
    assert "debezium.transforms.epoch.value.literal=3t12" in properties
    environment = server_environment(other(), {}, 3, lambda text: text.replace("${env:PW}", "geheim"))
    assert "geheim" not in properties
    assert "geheim" in environment.values()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("signal.kafka.topic", "mine"),
        ("notification.enabled.channels", "log"),
        ("snapshot.mode", "initial"),
        ("tombstones.on.delete", "true"),
        ("topic.prefix", "mine"),
        ("transforms", "unwrap"),
        ("topic.naming.strategy", "mine"),
        ("offset.storage", "mine"),
    ],
)
def test_what_would_break_it_cannot_be_set(name: str, value: str) -> None:
    assert f"connector.{name} cannot be" in refused(other(connector=OPTIONS | {name: value}))


@pytest.mark.parametrize(
    "name", ["table.include.list", "incremental.snapshot.chunk.size", "message.key.columns", "snapshot.isolation.mode"]
)
def test_what_is_the_users_can(name: str) -> None:
    assert connector_config(other(connector=OPTIONS | {name: "7"}), {})[name] == "7"


@pytest.mark.parametrize(
    "name", ["io.debezium.connector.mongodb.MongoDbConnector", "io.debezium.connector.spanner.SpannerConnector"]
)
def test_a_connector_whose_events_are_not_of_tables(name: str) -> None:
    assert "cannot be a source" in refused(other(name))


# ── checks and refusals ──


def test_a_signal_table_is_asked_for() -> None:
    without = {name: value for name, value in OPTIONS.items() if name != "signal.data.collection"}
    (found,) = problems(other(connector=without))
    assert (found.fatal, "signal.data.collection" in found.fix) == (True, True)
    assert not problems(other(connector=without | {"read.only": True}))
    assert not problems(other())


def test_a_source_that_delta_knows_itself_is_said() -> None:
    (found,) = problems(other(POSTGRESQL))
    assert (found.fatal, "postgresql://" in found.fix) == (False, True)


def test_what_needs_the_database_is_refused_in_one_sentence() -> None:
    spec = other()
    with pytest.raises(UsageError, match=r"`deltactl verify` is not possible for pipeline orders"):
        need_client(spec, "`deltactl verify`")
    reader = open_reader(spec, "test")
    assert isinstance(reader, TopicReader)
    table = Table("shop.dbo", "order", (), ("id",))
    calls = [
        lambda: reader.read_chunk(table, None, 1, 1, lambda _: True),
        lambda: reader.read_keys(table, [(1,)], lambda _: True),
        lambda: reader.key_behind(table, None, 1),
        lambda: reader.keys_having(table, "id", [1]),
        reader.clock,
    ]
    for call in calls:
        with pytest.raises(UsageError, match="Delta has no client of this source's database"):
            call()
    with pytest.raises(UsageError, match="Documents of several tables"):
        open_reader(spec, "test", documents={"shop.dbo.order": None})  # type: ignore[dict-item]  # nobody looks at it
    with open_inspector(spec) as inspector, pytest.raises(UsageError, match="as the connector names it"):
        inspector.resolve_bare(["order"])


def test_a_position_for_people() -> None:
    assert position_text("debezium", position_in_topic(3, 41)) == "record 41, term 3"


# ── what `pipeline create` makes of a file ──


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".properties"])
def test_a_connectors_options_from_a_file(tmp_path: Path, suffix: str) -> None:
    options = {"connector.class": SQL_SERVER, "name": "it", "topic.prefix": "x", "database.port": 1433, **OPTIONS}
    file = tmp_path / f"connector{suffix}"
    match suffix:
        case ".yaml":
            file.write_text(yaml.safe_dump(options))
        case ".json":
            file.write_text(json.dumps({"name": "it", "config": options}))
        case _:
            file.write_text("# of mine\n\n" + "\n".join(f"{name} = {value}" for name, value in options.items()))
    source, connector = source_from_connector(file)
    port = "1433" if suffix == ".properties" else 1433
    assert (source, connector) == ({"url": f"debezium://{SQL_SERVER}"}, OPTIONS | {"database.port": port})
    draft = spec_from_options("orders", source, ["shop.dbo.order"], {"cache": "redis://cache"}, None, KAFKA, connector)
    assert parse_spec(yaml.safe_dump(draft.spec.model_dump(mode="json", exclude_defaults=True)), "it") == draft.spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "must hold a connector's options"),
        ("database.user: me", "must hold a connector's options"),
        (f"connector.class: {SQL_SERVER}\ndatabase.names: [a, b]", "database.names in"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "connector.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match="--source-connector") as caught:
        source_from_connector(file)
    assert words in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        source_from_connector(tmp_path / "connector.yaml")


def test_a_processor_of_columns_that_are_not_known() -> None:
    text = processor_source("orders", [Table("shop.dbo", "order", (), ())], ["cache"])
    assert "return dict(row)" in text
    compile(text, "processor.py", "exec")
