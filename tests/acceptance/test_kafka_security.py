"""Logins, TLS and certificates: both clients, the checks and Debezium Server with a broker that insists on them."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import confluent_kafka
import pytest
import yaml

from acceptance.harness import SHAPES
from acceptance.kafka_harness import KafkaStage, kafka_stage
from delta_sync.errors import CheckFailed, Problem
from delta_sync.kafka.clients import open_group
from delta_sync.kafka.consumer import ConsumerGroup, KafkaBusy
from delta_sync.kafka.settings import Timeouts
from delta_sync.spec import KafkaSpec, RegistrySpec, SecuritySpec, spec_from
from delta_sync.testing.kafka import admin_client
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis
from deltactl.checking import check_transport
from kafka_security import PASSWORD, USER, Authority, GuardedRegistry, SecureKafka

ROWS = 20
WAIT_S = 300.0  # for what takes a second
TIMEOUTS = Timeouts(session_s=10, heartbeat_s=0.5)
REGISTRY_PASSWORD, TOKEN = 're$ist"\\ry:é', "token-of-the-registry"
SEED = int(os.environ.get("DELTA_TEST_SEED", str(random.SystemRandom().randrange(1_000_000))))

_numbers = itertools.count(1)


class World(NamedTuple):
    """The broker, the registry with TLS and without, and files with what clients need."""

    broker: SecureKafka
    registry: GuardedRegistry
    plain_registry: GuardedRegistry
    files: dict[str, str]

    def secret(self, name: str) -> str:
        """Return a reference."""
        return f"${{file:{self.files[name]}}}"

    def by(self, way: str, **changes: str) -> tuple[str, dict[str, Any]]:
        """Return bootstrap servers and `kafka.security` for a mechanism of SASL, or `mTLS`."""
        ca = self.files["ca"]
        if way == "mTLS":
            client = {"certificate_file": self.files["certificate"], "key_file": self.files["key"]}
            return self.broker.ssl_url, {"protocol": "SSL", "ca_file": ca, **client, **changes}
        login = {"mechanism": way, "username": USER, "password": self.secret("password")}
        return self.broker.sasl_ssl_url, {"protocol": "SASL_SSL", "ca_file": ca, **login, **changes}


@pytest.fixture(scope="module")
def world(registry: Apicurio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("security")
    ours, others = Authority(folder / "ours", "ours"), Authority(folder / "others", "others")
    certificate, key = ours.issue("client")
    stranger, stranger_key = others.issue("stranger")
    secrets = {
        "password": PASSWORD,
        "wrong": "not-the-password",
        "registry": REGISTRY_PASSWORD,
        "token": TOKEN,
    }
    files = {name: folder / f"{name}.txt" for name in secrets}
    for name, text in secrets.items():
        files[name].write_text(f"{text}\n", encoding="utf-8")
    files |= {"ca": ours.certificate, "certificate": certificate, "key": key}
    files |= {"other ca": others.certificate, "stranger": stranger, "stranger's key": stranger_key}
    with (
        SecureKafka(ours) as broker,
        GuardedRegistry(registry.port, "me", REGISTRY_PASSWORD, TOKEN, ours) as guarded,
        GuardedRegistry(registry.port, "me", REGISTRY_PASSWORD, TOKEN) as plain,
    ):
        broker.add_user()
        yield World(broker, guarded, plain, {name: str(file) for name, file in files.items()})


def kafka_spec(world: World, url: str, security: dict[str, Any] | None, **more: Any) -> KafkaSpec:
    return KafkaSpec(
        bootstrap_servers=url,
        registry=RegistrySpec(url=world.registry.url, ca_file=world.files["ca"]),
        security=None if security is None else SecuritySpec(**security),
        **more,
    )


@pytest.mark.parametrize("client", ["kafka-python", "confluent-kafka"])
@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "mTLS"])
def test_both_clients_log_in_every_way(world: World, client: str, way: str) -> None:
    topic = f"topic_{next(_numbers)}"
    with admin_client(world.broker.url) as admin:
        admin.create_topics({topic: {"num_partitions": 1}}, wait_for_metadata=True)
    producer = confluent_kafka.Producer({"bootstrap.servers": world.broker.url})
    producer.produce(topic, b"hello")
    assert producer.flush(WAIT_S) == 0
    group = open_group(kafka_spec(world, *world.by(way), client=client), topic, TIMEOUTS)
    deadline = time.monotonic() + WAIT_S
    try:
        group.subscribe([topic], lambda _: None, lambda _: None)
        while not (found := group.poll(1.0)):
            assert time.monotonic() < deadline
        assert [list(records.values) for records in found] == [[b"hello"]]
        group.commit({found[0].partition: 1})
    finally:
        group.close()


# What is wrong, and what is said of it: where it is, and what to correct.
WRONG = {
    "password": ("SCRAM-SHA-512", {"password": "wrong"}, "refuses user delta by SCRAM-SHA-512", "correct username"),
    "plain password": ("PLAIN", {"password": "wrong"}, "refuses user delta by PLAIN", "correct username"),
    "authority": ("PLAIN", {"ca_file": "other ca"}, "no TLS with", "correct ca_file"),
    "certificate": (
        "mTLS",
        {"certificate_file": "stranger", "key_file": "stranger's key"},
        "no TLS with",
        "correct ca_file, certificate_file and key_file",
    ),
    "no certificate": ("mTLS", {"certificate_file": "", "key_file": ""}, "no TLS with", "certificate_file"),
    "key of another": ("mTLS", {"key_file": "stranger's key"}, "is not the key of certificate_file", "key_file"),
    "no such file": ("PLAIN", {"ca_file": "/nowhere/ca.pem"}, "/nowhere/ca.pem cannot be read", "correct ca_file"),
}


def wrong_spec(world: World, what: str, **more: Any) -> KafkaSpec:
    way, changes, _, _ = WRONG[what]
    url, security = world.by(way)
    for name, value in changes.items():
        if name == "password":
            security[name] = world.secret(value)
        elif value:
            security[name] = world.files.get(value, value)
        else:
            del security[name]
    return kafka_spec(world, url, security, **more)


@pytest.mark.parametrize("what", WRONG)
def test_pipeline_check_says_what_is_wrong(world: World, what: str) -> None:
    said = check(world, wrong_spec(world, what))
    assert len(said) == 1, said
    _, _, finding, fix = WRONG[what]
    assert finding in said[0].what, said
    assert fix in said[0].fix, said
    assert "not-the-password" not in str(said[0])


@pytest.mark.parametrize("client", ["kafka-python", "confluent-kafka"])
@pytest.mark.parametrize("what", ["password", "authority", "certificate"])
def test_workers_stop_and_say_what_is_wrong(world: World, client: str, what: str) -> None:
    _, _, finding, fix = WRONG[what]
    with ExitStack() as exits:
        group = open_group(wrong_spec(world, what, client=client), "nobody", TIMEOUTS)
        exits.callback(group.close)
        with pytest.raises(CheckFailed) as failed:
            until_refused(group)
        assert finding in str(failed.value)
        assert fix in str(failed.value)


def until_refused(group: ConsumerGroup) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with suppress(KafkaBusy):
            group.subscribe(["topic"], lambda _: None, lambda _: None)
            group.poll(0.1)


REGISTRIES: dict[str, tuple[dict[str, str], str]] = {
    "right": ({"username": "me", "password": "registry"}, ""),
    "token": ({"token": "token"}, ""),
    "nobody": ({}, "answers 401"),
    "wrong password": ({"username": "me", "password": "wrong"}, "answers 401"),
    "wrong token": ({"token": "wrong"}, "answers 401"),
    "other authority": ({"ca_file": "other ca"}, "does not hold"),
    "no such file": ({"ca_file": "/nowhere/ca.pem"}, "/nowhere/ca.pem cannot be read"),
}


@pytest.mark.parametrize("who", REGISTRIES)
def test_the_registrys_credentials_are_checked(world: World, who: str) -> None:
    given, expected = REGISTRIES[who]
    spec = kafka_spec(world, world.broker.url, None, replication_factor=1, min_insync_replicas=1, allow_unsafe=True)
    secret = {name: world.secret(value) for name, value in given.items() if name in ("password", "token")}
    ca_file = world.files.get(given.get("ca_file", "ca"), given.get("ca_file"))
    registry = RegistrySpec(url=world.registry.url, username=given.get("username"), ca_file=ca_file, **secret)
    said = check(world, spec.model_copy(update={"registry": registry}), of_registry=True)
    assert [problem.where for problem in said] == (["schema registry"] if expected else []), said
    assert all(expected in problem.what and "kafka.registry" in problem.fix for problem in said)


def check(world: World, kafka: KafkaSpec, *, of_registry: bool = False) -> list[Problem]:
    """Return what `deltactl pipeline check` says of Kafka, or of the registry."""
    spec = spec_from(
        {
            "name": "checked",
            "source": {"url": "postgresql://nobody@127.0.0.1/nothing"},
            "tables": {"public.item": {}},
            "sinks": {"cache": {"url": "redis://nowhere"}},
            "transport": "kafka",
            "kafka": kafka.model_dump(exclude_none=True),
        },
        "the test",
    )
    problems = check_transport(spec).problems
    return [one for one in problems if (one.where == "schema registry") == of_registry and one.fatal]


# ── a whole pipeline ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stage(
    postgresql: PostgreSQL, redis_server: Redis, registry: Apicurio, world: World, tmp_path: Path
) -> Iterator[KafkaStage]:
    print(f"DELTA_TEST_SEED={SEED}")
    with kafka_stage(postgresql, redis_server, world.broker, registry, tmp_path, ROWS) as made:
        yield made


@pytest.mark.long
def test_a_pipeline_with_logins_and_certificates(stage: KafkaStage, world: World) -> None:
    """Debezium Server and a worker of each client; then it is stopped and goes on by other credentials."""
    secure, plain = world.registry, world.plain_registry
    basic = {"url": secure.url, "ca_file": world.files["ca"], "username": "me", "password": world.secret("registry")}
    bearer = {"url": plain.url, "token": world.secret("token")}
    ways = (
        ("SCRAM-SHA-512", basic, "kafka-python", (secure, "Basic")),
        ("mTLS", bearer, "confluent-kafka", (plain, "Bearer")),
    )
    for way, registry, client, (asked, scheme) in ways:
        url, security = world.by(way)
        configure(stage, client=client, bootstrap_servers=url, security=security, registry=registry)
        asked.schemes_seen.clear()
        sidecar, worker = stage.start("sidecar"), stage.start("worker")
        writer = stage.writing(ROWS, SEED)
        print(f"{way}: {stage.comes_through(way, sidecar, worker):.1f} s")
        writer.stop()
        stage.in_step(sidecar, worker)
        assert asked.schemes_seen == {scheme}
        assert worker.stop() == 0
        assert sidecar.stop() == 0
    assert stage.pipeline.dead_letters() == []
    assert len(SHAPES) == len(stage.pipeline.tables)

    url, security = world.by("SCRAM-SHA-512", password=world.secret("wrong"))
    configure(stage, bootstrap_servers=url, security=security, registry=basic)
    checked = stage.pipeline.deltactl("pipeline", "check", stage.pipeline.name)
    assert checked.returncode == 1, checked
    assert "refuses user delta by SCRAM-SHA-512" in checked.stdout + checked.stderr
    for file in stage.pipeline.folder.rglob("*"):
        if file.is_file():
            text = file.read_bytes()
            for secret in (PASSWORD, PASSWORD.replace("\\", "\\\\"), REGISTRY_PASSWORD, TOKEN):
                assert secret.encode() not in text, file


def configure(stage: KafkaStage, *, registry: dict[str, str], **kafka: Any) -> None:
    """Change how the pipeline reaches Kafka and the registry, as an editor does."""
    file = stage.pipeline.home / "pipeline.yaml"
    head, _, text = file.read_text().partition("\n")
    written = yaml.safe_load(text)
    written["kafka"] |= {**kafka, "registry": registry}
    file.write_text(head + "\n" + yaml.safe_dump(written, sort_keys=False))
