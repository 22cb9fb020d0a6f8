"""The test kit's servers: what the other tests take for granted when they kill and freeze them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pymongo
import pytest
import redis
import requests
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from redis.backoff import NoBackoff
from redis.retry import Retry

from delta_sync.testing.kafka import Kafka, KafkaCluster, admin_client
from delta_sync.testing.processes import ServerError, free_port, wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import MongoStandIn, OpenSearch, PostgreSQL, Redis, Server
from delta_sync.testing.stack import Stack

NO_ANSWER_S = 1  # long enough for a server that runs to answer, as it has in every test before it is frozen
GONE_TIMEOUT_S = 60


class Probe:
    """Writes and reads one number through a server's own client, with a connection of its own each time."""

    def __init__(self, write: Callable[[int], object], read: Callable[[float], int]) -> None:
        self.write = write
        self.read = read


def postgresql_probe(server: PostgreSQL) -> Probe:
    def write(number: int) -> None:
        with psycopg.connect(server.url) as connection:
            connection.execute("create table if not exists probe (number int)")
            connection.execute("insert into probe values (%s)", [number])

    def read(timeout_s: float) -> int:
        with psycopg.connect(server.url, connect_timeout=max(2, int(timeout_s))) as connection:
            row = connection.execute("select max(number) from probe").fetchone()
            assert row is not None
            return int(row[0])

    return Probe(write, read)


def redis_probe(server: Redis) -> Probe:
    def client(timeout_s: float) -> Any:
        kind = redis.RedisCluster if server.cluster else redis.Redis
        once = Retry(NoBackoff(), 0)  # or it keeps trying for longer than its timeout
        return kind(port=server.port, host="127.0.0.1", socket_timeout=timeout_s, retry=once)

    def write(number: int) -> None:
        with closing(client(GONE_TIMEOUT_S)) as connection:
            connection.set("probe", number)

    def read(timeout_s: float) -> int:
        with closing(client(timeout_s)) as connection:
            return int(connection.get("probe"))

    return Probe(write, read)


def mongodb_probe(server: MongoStandIn) -> Probe:
    def write(number: int) -> None:
        with pymongo.MongoClient[dict[str, int]](server.url) as client:
            client.test.probe.insert_one({"number": number})

    def read(timeout_s: float) -> int:
        timeout_ms = int(timeout_s * 1000)
        with pymongo.MongoClient[dict[str, int]](
            server.url, serverSelectionTimeoutMS=timeout_ms, socketTimeoutMS=timeout_ms
        ) as client:
            return max(document["number"] for document in client.test.probe.find())

    return Probe(write, read)


def opensearch_probe(server: OpenSearch) -> Probe:
    document = f"{server.url}/probe/_doc/1"

    def write(number: int) -> None:
        requests.put(document, json={"number": number}, timeout=GONE_TIMEOUT_S).raise_for_status()

    def read(timeout_s: float) -> int:
        reply = requests.get(document, timeout=timeout_s)
        reply.raise_for_status()
        return int(reply.json()["_source"]["number"])

    return Probe(write, read)


def registry_probe(server: Apicurio) -> Probe:
    versions = f"{server.url}/subjects/probe/versions"

    def write(number: int) -> None:
        symbols = [f"n{each}" for each in range(number + 1)]  # a registry refuses changes that no reader could follow
        schema = json.dumps({"type": "enum", "name": "probe", "symbols": symbols, "default": "n0"})
        requests.post(versions, json={"schema": schema}, timeout=GONE_TIMEOUT_S).raise_for_status()

    def read(timeout_s: float) -> int:
        reply = requests.get(f"{versions}/latest", timeout=timeout_s)
        reply.raise_for_status()
        return len(json.loads(reply.json()["schema"])["symbols"]) - 1

    return Probe(write, read)


def kafka_probe(server: Kafka | KafkaCluster) -> Probe:
    def create() -> None:
        with admin_client(server.url) as admin:
            if "probe" not in admin.list_topics():
                admin.create_topics({"probe": {"num_partitions": 1}}, wait_for_metadata=True)

    def write(number: int) -> None:
        create()
        with closing(KafkaProducer(bootstrap_servers=server.url.split(","), acks="all")) as producer:
            producer.send("probe", str(number).encode()).get(GONE_TIMEOUT_S)

    def read(timeout_s: float) -> int:
        timeout_ms = int(timeout_s * 1000)
        with KafkaConsumer(bootstrap_servers=server.url.split(","), bootstrap_timeout_ms=timeout_ms) as consumer:
            partition = TopicPartition("probe", 0)
            consumer.assign([partition])
            end = consumer.end_offsets([partition], timeout_ms)[partition]
            consumer.seek(partition, end - 1)
            [record] = consumer.poll(timeout_ms)[partition]
            return int(record.value)

    return Probe(write, read)


PROBES: dict[str, Callable[[Any], Probe]] = {
    "postgresql": postgresql_probe,
    "redis_server": redis_probe,
    "redis_cluster": redis_probe,
    "mongodb": mongodb_probe,
    "opensearch": opensearch_probe,
    "kafka": kafka_probe,
    "kafka_cluster": kafka_probe,
    "registry": registry_probe,
}


@pytest.fixture(params=list(PROBES))
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def probe(request: pytest.FixtureRequest, server: Server) -> Probe:
    return PROBES[request.node.callspec.params["server"]](server)


@pytest.mark.long
def test_what_was_acknowledged_survives_a_kill(server: Server, probe: Probe) -> None:
    url = server.url
    probe.write(1)
    for number in (2, 3):
        probe.write(number)
        server.kill()  # at once: nothing may still be in the server's memory alone
        assert not server.alive
        with pytest.raises(Exception):  # noqa: B017, PT011 -- each client has its own
            probe.read(NO_ANSWER_S)
        server.start()
        assert server.url == url
        assert probe.read(GONE_TIMEOUT_S) == number


@pytest.mark.long
def test_what_was_acknowledged_survives_a_restart(server: Server, probe: Probe) -> None:
    probe.write(4)
    server.restart()
    assert probe.read(GONE_TIMEOUT_S) == 4


@pytest.mark.long
def test_a_frozen_server_is_silent_until_it_thaws(server: Server, probe: Probe) -> None:
    probe.write(5)
    with ThreadPoolExecutor(1) as other:
        server.freeze()
        assert server.alive
        with pytest.raises(Exception):  # noqa: B017, PT011 -- each client has its own
            probe.read(NO_ANSWER_S)
        waiting = other.submit(probe.read, GONE_TIMEOUT_S)
        server.thaw()
        assert waiting.result() == 5


def test_a_frozen_server_can_be_killed_and_stopped(redis_server: Redis) -> None:
    for end in (redis_server.kill, redis_server.stop):
        redis_server.freeze()
        end()
        assert not redis_server.alive
        redis_server.start()


def test_sessions_of_postgresql_are_frozen_and_killed_with_it(stack: Stack, postgresql: PostgreSQL) -> None:
    if stack.services != "native":
        pytest.skip("process ids of a container are its own; freezing and killing all of it is the engine's business")
    with psycopg.connect(postgresql.url, autocommit=True) as session:
        backend = session.info.backend_pid
        postgresql.freeze()
        assert state_of(backend) == "T"
        postgresql.thaw()
        assert session.execute("select 1").fetchone() == (1,)
        postgresql.kill()
        assert state_of(backend) in {"", "Z"}


def test_a_test_may_leave_a_server_dead(redis_server: Redis) -> None:
    redis_server.kill()


def test_the_next_one_finds_it_running(redis_server: Redis) -> None:
    """Together with the one before: run alone it shows nothing."""
    assert redis_server.alive


def test_a_start_that_fails_quotes_the_log() -> None:
    with closing(Redis(no_such_directive=1)) as server:
        with pytest.raises(ServerError, match=r"(?s)redis ended with status 1 .*no-such-directive"):
            server.start()
        assert not server.alive


def test_close_deletes_only_a_folder_of_its_own(tmp_path: Path) -> None:
    with Redis() as temporary, Redis(tmp_path / "kept") as kept:
        redis_probe(kept).write(6)
    assert not temporary.directory.exists()
    with Redis(tmp_path / "kept") as kept:
        assert redis_probe(kept).read(GONE_TIMEOUT_S) == 6


@pytest.mark.parametrize("end", [PostgreSQL.stop, PostgreSQL.kill, PostgreSQL.freeze])
def test_nothing_of_postgresql_stays_in_shared_memory(end: Callable[[PostgreSQL], None]) -> None:
    with PostgreSQL() as server:
        segment = (server.directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert segment in shared_memory_segments()
        end(server)
    assert segment not in shared_memory_segments()


def test_a_server_outlives_the_thread_that_started_it() -> None:
    with Redis() as server:
        server.stop()
        with ThreadPoolExecutor(1) as other:
            other.submit(server.start).result()
        assert redis_probe(server).write(7) is None
        assert server.alive


@pytest.fixture
def orphans() -> Iterator[list[int]]:
    """Process ids that are killed if a test leaves them behind."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if state_of(pid) not in {"", "Z"}:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("frozen", [False, True])
def test_servers_die_with_the_program_that_started_them(tmp_path: Path, orphans: list[int], frozen: bool) -> None:
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        import psycopg
        from delta_sync.testing.servers import PostgreSQL, Redis
        database, cache = PostgreSQL(), Redis(Path({str(tmp_path)!r}))
        database.start(), cache.start()
        session = psycopg.connect(database.url)
        if {frozen}:
            database.freeze(), cache.freeze()
        print(database.pid, session.info.backend_pid, cache.pid, database.directory, flush=True)
        sys.stdin.read()
    """)
    program = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    *pids, directory = program.stdout.readline().split()
    orphans += map(int, pids)
    assert [state_of(pid) in {"", "Z"} for pid in orphans] == [False] * 3
    program.kill()
    program.communicate()
    wait_until(lambda: all(state_of(pid) in {"", "Z"} for pid in orphans), GONE_TIMEOUT_S, "the servers' end")
    shutil.rmtree(directory)  # which nobody else can do any more


def test_ports_are_not_among_those_of_outgoing_connections() -> None:
    lowest_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(free_port(10_000) + 10_000 < lowest_ephemeral for _ in range(100))


@pytest.mark.parametrize("version", [16, 18])
def test_postgresql_of_either_version_decodes_its_log(version: Any) -> None:
    with PostgreSQL(version=version, max_replication_slots=3) as server, psycopg.connect(server.url) as session:
        session.autocommit = True
        shown = session.execute(
            "select current_setting('server_version_num')::int / 10000, current_setting('max_replication_slots')"
        ).fetchone()
        assert shown == (version, "3")
        assert session.execute("select pg_create_logical_replication_slot('probe', 'pgoutput')").fetchone()


def shared_memory_segments() -> set[str]:
    """Return the ids of the System V segments."""
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def state_of(pid: int) -> str:
    """Return the state letter of /proc; nothing when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text[text.rindex(")") + 2]
