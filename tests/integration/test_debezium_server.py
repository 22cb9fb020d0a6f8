"""The real chain: PostgreSQL, Debezium Server, Kafka, and the registry with the schemas."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import psycopg
import pytest
import requests
from kafka import KafkaConsumer, TopicPartition

from delta_debezium.distribution import Distribution, distribution
from delta_debezium.render import server_environment, server_properties
from delta_debezium.server import DebeziumServer
from delta_sync.kafka.delivered import Delivered
from delta_sync.secrets import resolve
from delta_sync.sources.postgresql.catalogue import read_tables
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.kafka import Kafka, admin_client
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL
from delta_sync.versions import parse_lsn

EPOCH = 7
PARTITIONS = 3
ARRIVES_S = 240.0  # a start takes five seconds, on a machine that is very busy a minute
KEYS = 20  # of the writer's rows: each gets many versions

# What no file may hold. PostgreSQL's password is that of the test's server, `postgres`, which is also a name.
SECRETS = {"KAFKA": "delta-password", "REGISTRY": "re$ist\\ry"}

_numbers = count(1)


class Record(NamedTuple):
    """A record of a topic, as it is and decoded."""

    topic: str
    partition: int
    raw: tuple[bytes | None, bytes | None]
    headers: list[tuple[str, bytes]]
    key: Any
    value: Any

    @property
    def lsn(self) -> int:
        return int(self.value["source"]["lsn"])


class Schemas:
    """Decodes Confluent's wire format: a zero byte, the schema's id, the datum."""

    def __init__(self, registry: Apicurio) -> None:
        self._url = registry.url
        self._parsed: dict[int, Any] = {}

    def decode(self, data: bytes | None) -> Any:
        if data is None:
            return None
        magic, number = struct.unpack_from(">bI", data)
        assert magic == 0
        if number not in self._parsed:
            reply = requests.get(f"{self._url}/schemas/ids/{number}", timeout=ARRIVES_S)
            reply.raise_for_status()
            assert "references" not in reply.json()
            self._parsed[number] = fastavro.parse_schema(json.loads(reply.json()["schema"]))
        return fastavro.schemaless_reader(io.BytesIO(data[5:]), self._parsed[number], None)


class Chain:
    """A pipeline of its own on the session's servers: a table `item (id, v)`, its slot, publication and topics."""

    def __init__(
        self, postgresql: PostgreSQL, kafka: Kafka, registry: Apicurio, folder: Path, **registry_options: str
    ) -> None:
        self.name = f"chain{next(_numbers)}"
        self.table = f"{self.name}_item"
        self.kafka = kafka
        self.spec = self._spec(postgresql, kafka, registry, registry_options)
        self.db = psycopg.connect(postgresql.url, autocommit=True)
        self.db.execute(f"CREATE TABLE {self.table} (id int PRIMARY KEY, v text)")
        self.db.execute(f"CREATE PUBLICATION {self.spec.publication} FOR TABLE {self.table}")
        self.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self.spec.slot])
        self.topics = {f"delta_{self.name}.public.{self.table}": PARTITIONS, f"delta_{self.name}.message": 1}
        with admin_client(kafka.url) as admin:
            admin.create_topics(
                {topic: {"num_partitions": partitions} for topic, partitions in self.topics.items()},
                wait_for_metadata=True,
            )
        self.folder = folder / self.name
        self.server = DebeziumServer(self.folder, the_distribution())
        self._schemas = Schemas(registry)

    def _spec(
        self, postgresql: PostgreSQL, kafka: Kafka, registry: Apicurio, registry_options: dict[str, str]
    ) -> PipelineSpec:
        login = {"protocol": "SASL_PLAINTEXT", "mechanism": "PLAIN", "username": "delta", "password": "${env:KAFKA}"}
        return spec_from(
            {
                "name": self.name,
                "source": {
                    "url": f"postgresql://postgres@127.0.0.1:{postgresql.port}/postgres",
                    "password": "${env:POSTGRES}",
                },
                "tables": {f"public.{self.table}": {}},
                "sinks": {"cache": {"url": "redis://cache"}},
                "transport": "kafka",
                "kafka": {
                    "bootstrap_servers": kafka.sasl_url,
                    "security": login,
                    "registry": {"url": registry.url, **registry_options},
                },
            },
            "the test",
        )

    def start(self) -> None:
        tables = read_tables(self.db, list(self.spec.tables))
        secrets = {**SECRETS, "POSTGRES": "postgres"}
        environment = server_environment(self.spec, tables, EPOCH, lambda text: resolve(text, secrets))
        self.server.start(server_properties(self.spec, tables, EPOCH), environment)

    def write(self, row: int, value: str) -> None:
        self.db.execute(
            f"INSERT INTO {self.table} VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET v = excluded.v", [row, value]
        )

    def confirmed(self) -> int:
        """Return the position up to which the slot is confirmed."""
        query = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
        row = self.db.execute(query, [self.spec.slot]).fetchone()
        assert row is not None
        return parse_lsn(row[0])

    def records(self, until: Callable[[list[Record]], bool]) -> list[Record]:
        """Return everything that is in the topics, once the running server has made it what it should be."""

        def is_done(found: list[Record]) -> bool:
            assert self.server.alive, self.server.last_words()
            return until(found)

        return self._read(is_done)

    def stored(self) -> list[Record]:
        """Return what is in the topics now."""
        with closing(KafkaConsumer(bootstrap_servers=self.kafka.url)) as consumer:
            total = sum(consumer.end_offsets(self._partitions()).values())
        return self._read(lambda found: len(found) >= total)

    def _read(self, until: Callable[[list[Record]], bool]) -> list[Record]:
        found: list[Record] = []
        with closing(KafkaConsumer(bootstrap_servers=self.kafka.url)) as consumer:
            consumer.assign(self._partitions())
            consumer.seek_to_beginning(*self._partitions())

            def read() -> bool:
                for polled in consumer.poll(100).values():
                    found.extend(self._record(record) for record in polled)
                return until(found)

            wait_until(read, ARRIVES_S, "the arrival of everything")
        return found

    def _partitions(self) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for topic, numbers in self.topics.items() for number in range(numbers)]

    def _record(self, record: Any) -> Record:
        key, value = self._schemas.decode(record.key), self._schemas.decode(record.value)
        return Record(record.topic, record.partition, (record.key, record.value), record.headers, key, value)

    def flushed(self) -> str:
        """Return where the log ends, as far as it is on disk."""
        row = self.db.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None
        return str(row[0])

    def wait_until_released(self) -> None:
        """Wait until the source has noticed that the server is gone."""
        query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
        wait_until(lambda: self.db.execute(query, [self.spec.slot]).fetchone() == (False,), ARRIVES_S, "the release")

    def close(self) -> None:
        self.server.kill()
        self.wait_until_released()
        self.db.execute("SELECT pg_drop_replication_slot(%s)", [self.spec.slot])
        self.db.close()


_found: list[Distribution] = []


def the_distribution() -> Distribution:
    if not _found:
        _found.append(distribution(print))
    return _found[0]


@pytest.fixture
def chain(postgresql: PostgreSQL, kafka: Kafka, registry: Apicurio, tmp_path: Path) -> Iterator[Chain]:
    made = Chain(postgresql, kafka, registry, tmp_path)
    yield made
    made.close()


class Writer:
    """Writes in a thread of its own, one short transaction after the other, until it is stopped."""

    def __init__(self, chain: Chain, url: str) -> None:
        self.written: list[tuple[int, int]] = []  # row, version: committed, in this order
        self._db = psycopg.connect(url, autocommit=True)
        self._table = chain.table
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._db.close()

    def _run(self) -> None:
        statement = f"INSERT INTO {self._table} VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET v = excluded.v"
        for version in count():
            row = version % KEYS
            self._db.execute(statement, [row, str(version)])
            self.written.append((row, version))
            if self._stopping.wait(0.002):  # some hundred a second: enough in flight whenever something happens
                return

    def wait_for_more(self, rows: int) -> None:
        target = len(self.written) + rows
        wait_until(lambda: len(self.written) >= target, ARRIVES_S, "the writer")


def versions(records: list[Record]) -> dict[int, list[int]]:
    """Return the versions of each row in the order of their arrival."""
    found: dict[int, list[int]] = defaultdict(list)
    for record in records:
        if record.value is not None and record.value.get("after"):
            found[record.value["after"]["id"]].append(int(record.value["after"]["v"]))
    return found


def has_all_of(written: list[tuple[int, int]]) -> Callable[[list[Record]], bool]:
    def check(records: list[Record]) -> bool:
        seen = {(row, version) for row, found in versions(records).items() for version in found}
        return seen.issuperset(written)

    return check


# ── the tests ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "registry_options",
    [
        pytest.param({"username": "me", "password": "${env:REGISTRY}"}, id="apicurio", marks=pytest.mark.long),
        pytest.param({"token": "${env:REGISTRY}"}, id="confluent"),
    ],
)
def test_changes_and_heartbeats_arrive_in_avro_with_the_epoch(
    postgresql: PostgreSQL, kafka: Kafka, registry: Apicurio, tmp_path: Path, registry_options: dict[str, str]
) -> None:
    """By both converters; the test's registry asks for no credentials, so that it takes them shows nothing."""
    with closing(Chain(postgresql, kafka, registry, tmp_path, **registry_options)) as chain:
        chain.start()
        chain.write(1, "one")
        chain.write(1, "two")
        chain.db.execute(f"DELETE FROM {chain.table}")
        chain.db.execute(f"TRUNCATE {chain.table}")
        with closing(PostgresReader(chain.spec.source.model_copy(update={"password": "postgres"}), "test")) as reader:
            heartbeat = reader.heartbeat(chain.spec.heartbeat_prefix)
        rows_topic, message_topic = chain.topics

        found = chain.records(lambda found: len(found) == 6)
        rows = [record for record in found if record.topic == rows_topic]
        keyed = [record for record in rows if record.raw[0] is not None]
        assert [record.value and record.value["op"] for record in keyed] == ["c", "u", "d", None]
        assert [record.key for record in keyed] == [{"id": 1}] * 4
        assert len({record.partition for record in keyed}) == 1
        assert [record.value["after"] for record in keyed[:3]] == [{"id": 1, "v": "one"}, {"id": 1, "v": "two"}, None]
        assert [one.lsn < other.lsn for one, other in pairwise(keyed[:3])] == [True, True]
        [truncate] = [record for record in rows if record.raw[0] is None]
        assert truncate.value["op"] == "t"
        [message] = [record for record in found if record.topic == message_topic]
        assert (message.value["message"]["prefix"], message.lsn) == (chain.spec.heartbeat_prefix, heartbeat)
        assert [record.headers for record in found] == [[("delta.epoch", b"7")]] * 6

        # Confirmed beyond the last of them, so the heartbeat shows that all of it is in Kafka.
        wait_until(lambda: chain.confirmed() > truncate.lsn, ARRIVES_S, "the confirmation")
        check_that_secrets_are_in_no_file(chain)


def test_kafkas_producer_takes_a_certificate_and_a_key_as_pem(tmp_path: Path) -> None:
    """It reads them when it is made, so that needs no broker; then the server ends, because there is no source."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=delta"]
    subprocess.run([*request, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    nowhere = free_port()
    spec = spec_from(
        {
            "name": "tls",
            "source": {"url": f"postgresql://postgres@127.0.0.1:{nowhere}/postgres"},
            "tables": {"public.item": {}},
            "sinks": {"cache": {"url": "redis://cache"}},
            "transport": "kafka",
            "kafka": {
                "bootstrap_servers": f"127.0.0.1:{nowhere}",
                "registry": {"url": "http://registry/apis/ccompat/v7"},
                "security": {
                    "protocol": "SSL",
                    "ca_file": str(certificate),
                    "certificate_file": str(certificate),
                    "key_file": str(key),
                },
            },
        },
        "the test",
    )
    tables = {"public.item": Table("public", "item", (Column("id", "int", Kind.INTEGER),), ("id",))}
    server = DebeziumServer(tmp_path / "server", the_distribution())
    server.start(server_properties(spec, tables, EPOCH), server_environment(spec, tables, EPOCH, resolve))
    wait_until(lambda: not server.alive, ARRIVES_S, "its end")
    assert f"Connection to 127.0.0.1:{nowhere} refused" in server.last_words()
    log = server.log_file.read_text()
    assert "security.protocol = SSL" in log
    assert "consumer started" in log  # of Debezium: the sink, when its producer is made
    inside = key.read_text().splitlines()[1]
    assert not [file for file in server.log_file.parent.rglob("*") if file.is_file() and inside in file.read_text()]


def check_that_secrets_are_in_no_file(chain: Chain) -> None:
    files = [file for file in chain.folder.rglob("*") if file.is_file()]
    assert {"application.properties", "server.log"} <= {file.name for file in files}
    for file in files:
        text = file.read_text(errors="replace")
        assert [name for name, secret in SECRETS.items() if secret in text] == [], file
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(chain.folder.stat().st_mode) == 0o700
    log = chain.server.log_file.read_text()
    assert "database.password = ********" in log
    # The environment is where they are: else the check above would have looked for what is nowhere.
    environment = Path(f"/proc/{chain.server.pid}/environ").read_text()
    assert "delta-password" in environment
    assert "re\\$ist" in environment


@pytest.mark.parametrize("end", ["kill", pytest.param("stop", marks=pytest.mark.long)])
def test_what_is_confirmed_is_in_kafka(chain: Chain, postgresql: PostgreSQL, end: str) -> None:
    chain.start()
    with Writer(chain, postgresql.url) as writer:
        chain.records(lambda found: len(found) >= 100)
        chain.kafka.kill()
        writer.wait_for_more(500)  # of which some are on their way to Kafka, and time out there
        if end == "kill":
            chain.server.kill()
        else:
            chain.server.stop(budget_s=30)  # a clean end confirms what it may; not more
        confirmed = chain.confirmed()
    chain.kafka.start()
    stored = chain.stored()

    chain.start()
    found = chain.records(has_all_of(writer.written))
    positions = {int(record.value["after"]["v"]): record.lsn for record in found if record.value}
    in_topics = {int(record.value["after"]["v"]) for record in stored if record.value}
    assert in_topics, "nothing was there before, so this shows nothing"
    assert positions.keys() - in_topics, "everything was there before, so this shows nothing"
    assert [version for version, lsn in positions.items() if lsn < confirmed and version not in in_topics] == []


@pytest.mark.long
def test_a_running_server_goes_on_when_kafka_is_back(chain: Chain, postgresql: PostgreSQL) -> None:
    chain.start()
    with Writer(chain, postgresql.url) as writer:
        chain.records(lambda found: len(found) >= 100)
        chain.kafka.kill()
        writer.wait_for_more(300)
        chain.kafka.start()
        writer.wait_for_more(100)
    found = chain.records(has_all_of(writer.written))
    assert chain.server.alive
    # The producer is idempotent: what it sends again after a lost connection is there once, in order.
    assert all(lsns == sorted(set(lsns)) for lsns in versions(found).values())


@pytest.mark.long
def test_killing_the_server_loses_nothing(
    chain: Chain, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the slot is never beyond what `Delivered` finds in Kafka, or a kill would look like a slot that was moved."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    delivered = Delivered(chain.spec)
    assert delivered(EPOCH) == 0
    with Writer(chain, postgresql.url) as writer:
        seen = 0
        for _ in range(3):
            began = chain.confirmed()
            chain.start()
            target = seen + 100

            def is_more(found: list[Record], target: int = target) -> bool:
                return len(found) >= target

            seen = len(chain.records(is_more))

            def is_confirmed(began: int = began) -> bool:
                return chain.confirmed() > began

            wait_until(is_confirmed, ARRIVES_S, "a confirmation")
            os.kill(chain.server.pid or 0, 9)
            wait_until(lambda: not chain.server.alive, ARRIVES_S, "its end")
            assert "SIGKILL" in chain.server.last_words()
            chain.wait_until_released()
            bound = delivered(EPOCH)
            assert bound is not None
            assert chain.confirmed() <= bound
            assert bound < parse_lsn(chain.flushed()), "there is more in the log, so a slot that was moved shows"
            assert delivered(EPOCH + 1) == 0, "records of another epoch do not count"
    chain.start()
    found = versions(chain.records(has_all_of(writer.written)))
    # Each start goes back to what was confirmed, and from there on every version comes once, in order.
    for arrived in found.values():
        assert len([1 for one, other in pairwise(arrived) if other <= one]) <= 3
