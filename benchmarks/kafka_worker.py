"""Workers on Kafka beside what else consumes its topics: Avro topic → documents in Redis, CPU time per change.

    python benchmarks/kafka_worker.py [--rows 100000] [--rounds 1] [--backlog 0] [--processes 1 2 4] [--only TEXT]

Debezium Server writes each row twice (an insert, an update) into a topic with four partitions. Then each consumer in
turn reads it from the beginning: CPU time of its process tree, its start included, until the newest change of every
partition is in Redis. The worker writes with versions, the others without. Quix Streams and Kafka Connect take part
when they are installed (README.md has the commands).

With `--backlog`, there are so many records in the topic: copies of those that Debezium wrote. With `--processes`, so
many workers are started with nothing to do; once the partitions are spread, copies come: CPU time per change without
the start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import confluent_kafka
import psutil
import redis
from common import PROCESSOR, cpu_s, fill, report, scratch, servers, source_spec
from kafka.errors import KafkaError
from plain_consumer import Decoder

from delta_debezium.distribution import distribution
from delta_debezium.render import server_environment, server_properties
from delta_debezium.server import DebeziumServer
from delta_sync.dumping import FIRST_LOAD
from delta_sync.kafka import settings
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.kafka.names import group_id, topic_name
from delta_sync.kafka.offsets import GroupOffsets
from delta_sync.kafka.topics import create_topics, wanted_topics
from delta_sync.pipeline import load_processor
from delta_sync.secrets import resolve
from delta_sync.sinks import open_sinks
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import PipelineSpec, dump_spec, spec_from
from delta_sync.starting import load_fingerprint, targets_of_table
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.testing import jars
from delta_sync.testing.kafka import Kafka, admin_client
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio

DEADLINE_S = 900.0
STOP_S = 30.0  # for a consumer to leave its group by itself; then it is killed
LOOK_S = 0.05
NAME = "bench"
TABLE = "public.movie"
PARTITIONS = 4
RUNNING_COPIES = 2  # of what Debezium wrote: long enough that the last, smaller batches do not count
CLIENTS = ("confluent-kafka", "kafka-python")

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache"
QUIX, CONNECT = CACHE / "quix" / "bin" / "python", CACHE / "connect"

# What Apicurio's converter needs of Debezium Server's jars; all of them would bring a logging of their own.
CONVERTER = re.compile(
    r"^(apicurio|.*kiota|.*vertx|.*netty|.*opentelemetry|std-uri|jspecify|commons-compress|.*uri-template|.*json-?schema)"
)

CONNECT_WORKER = """bootstrap.servers={brokers}
offset.storage.file.filename={folder}/offsets
listeners=http://127.0.0.1:0
plugin.discovery=service_load
key.converter=org.apache.kafka.connect.converters.ByteArrayConverter
value.converter=io.apicurio.registry.utils.converter.AvroConverter
value.converter.apicurio.registry.url={registry}
value.converter.apicurio.registry.headers.enabled=false
offset.flush.interval.ms=5000
consumer.max.poll.records=5000
consumer.max.partition.fetch.bytes=4194304
connector.client.config.override.policy=All
"""
CONNECT_SINK = """name={group}
connector.class=RedisSink
tasks.max=1
topics={topic}
redis.url={redis}
consumer.override.auto.offset.reset=earliest
"""


class Stage(NamedTuple):
    """The servers, and the topic that Debezium filled."""

    source: Any  # PostgreSQL
    cache: Any  # Redis
    kafka: Any
    registry: Any
    folder: Path
    events: int

    @property
    def topic(self) -> str:
        return topic_name(NAME, TABLE)

    def spec(self, client: str) -> PipelineSpec:
        return spec_of(self.source, self.cache, self.kafka, self.registry, client)


class Consumer(NamedTuple):
    """What takes part: a command, and the group with which it reads."""

    command: list[str]
    group: str
    environment: Mapping[str, str] = {}
    processes: int = 1


def spec_of(source: Any, cache: Any, kafka: Any, registry: Any, client: str) -> PipelineSpec:
    """Return the pipeline, with one of the two clients."""
    return spec_from(
        {
            "name": NAME,
            "source": source_spec(source) | {"slot": "delta_bench", "publication": "delta_bench"},
            "tables": {TABLE: {"sinks": {"cache": {"key": "movie:{id}"}}}},
            "sinks": {"cache": {"url": cache.url}},
            "transport": "kafka",
            "kafka": {
                "bootstrap_servers": kafka.url,
                "registry": {"url": registry.url},
                "client": client,
                "partitions": PARTITIONS,
                "replication_factor": 1,
                "min_insync_replicas": 1,
                "allow_unsafe": True,
            },
        },
        "benchmark",
    )


def capture(spec: PipelineSpec, folder: Path, write: Callable[[], int]) -> int:
    """Let Debezium Server bring what `write` writes into the topic; return how many changes that were."""
    assert spec.kafka is not None
    create_topics(spec.kafka, wanted_topics(spec))
    reader = PostgresReader(spec.source, "bench")
    tables = reader.tables([TABLE])
    reader.publish(spec.publication, list(tables.values()))
    reader.create_slot(spec.slot)
    changes = write()
    server = DebeziumServer(folder, distribution())
    server.start(server_properties(spec, tables, 1), server_environment(spec, tables, 1, resolve))
    end = reader.log_end()
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert server.alive, server.last_words()
        assert time.monotonic() < deadline, "the topic does not fill"
        reader.heartbeat(spec.heartbeat_prefix)
        slot = reader.slot(spec.slot)
        if slot is not None and (slot.confirmed_lsn or 0) >= end:
            break
        time.sleep(1.0)
    server.stop(10.0)
    reader.close()
    return changes


def prepare(spec: PipelineSpec, folder: Path) -> None:
    """Write the pipeline's folder and a state in which everything is loaded, so that only Kafka is read."""
    folder.mkdir(parents=True)
    (folder / "pipeline.yaml").write_text(dump_spec(spec))
    (folder / "processor.py").write_text(PROCESSOR)
    reader = PostgresReader(spec.source, "bench")
    sinks = open_sinks(spec)
    with StateStore.open(spec.state, folder) as state:
        identity = reader.identity()
        state.save_pipeline(PipelineState(spec.name, 1, identity.system_identifier, identity.timeline))
        table = reader.tables([TABLE])[TABLE]
        targets = targets_of_table(load_processor(folder, spec), sinks, table, spec)
        fingerprint = load_fingerprint(reader.fingerprints([TABLE])[TABLE], targets, sinks)
        state.save_load(spec.name, TableLoad(TABLE, "done", covered_from=1, fingerprint=fingerprint, reason=FIRST_LOAD))
    for sink in sinks.values():
        sink.close()
    reader.close()


# ── what takes part ──────────────────────────────────────────────────────────────────────────────────────────────


def worker(stage: Stage, client: str, processes: int = 1) -> Consumer:
    """Return Delta's worker."""
    home = stage.folder / f"worker-{client}-{processes}-{time.monotonic_ns()}"
    prepare(stage.spec(client), home / NAME)
    command = [sys.executable, "-m", "deltactl.main", "worker", NAME, "--dir", str(home)]
    return Consumer([*command, "--processes", str(processes)], group_id(NAME), processes=processes)


def plain(stage: Stage, client: str) -> Consumer:
    """Return what one would write by hand."""
    group = f"plain-{client}-{time.monotonic_ns()}"
    command = [sys.executable, str(HERE / "plain_consumer.py"), client]
    return Consumer([*command, stage.kafka.url, stage.registry.url, stage.topic, group, stage.cache.url], group)


def quix(stage: Stage) -> Consumer:
    """Return Quix Streams."""
    group = f"quix-{time.monotonic_ns()}"
    command = [str(QUIX), str(HERE / "quix_consumer.py"), stage.kafka.url, stage.registry.url, stage.topic, group]
    return Consumer([*command, stage.cache.url, str(stage.folder / group)], group, {"PYTHONPATH": ""})


def connect(stage: Stage) -> Consumer:
    """Return Kafka Connect with our own least sink, and the converter that Debezium Server brings."""
    group = f"connect-{time.monotonic_ns()}"
    folder = stage.folder / group
    folder.mkdir()
    registry = stage.registry.url.split("/apis/")[0] + "/apis/registry/v3"
    found = {"brokers": stage.kafka.url, "registry": registry, "folder": folder, "group": group}
    found |= {"topic": stage.topic, "redis": stage.cache.url}
    (folder / "worker.properties").write_text(CONNECT_WORKER.format(**found))
    (folder / "sink.properties").write_text(CONNECT_SINK.format(**found))
    jars_of = [jar for jar in (distribution().home / "lib").glob("*.jar") if CONVERTER.search(jar.name)]
    logging = Path(jars.class_path("kafka").split("*")[0]).glob("*log4j*.jar")
    classes = [CONNECT / "classes", CONNECT / "libs" / "*", *jars_of, *distribution().home.glob("avro-*.jar"), *logging]
    command = [jars.java(), "-Xmx768m", "-cp", os.pathsep.join(map(str, classes))]
    command += ["org.apache.kafka.connect.cli.ConnectStandalone"]
    return Consumer([*command, str(folder / "worker.properties"), str(folder / "sink.properties")], f"connect-{group}")


def participants(only: str) -> dict[str, Callable[[Stage], Consumer]]:
    """Return those that can take part, by their labels."""
    found: dict[str, Callable[[Stage], Consumer]] = {}
    for client in CLIENTS:
        found[f"worker {client}"] = lambda stage, client=client: worker(stage, client)  # type: ignore[misc]  # bound now
        found[f"plain {client}"] = lambda stage, client=client: plain(stage, client)  # type: ignore[misc]  # ditto
    for label, place, call in (("Quix Streams", QUIX, quix), ("Kafka Connect", CONNECT, connect)):
        if place.exists():
            found[label] = call
        else:
            print(f"{label} is left out: it is not in {place}; benchmarks/README.md says how to install it.")
    return {label: call for label, call in found.items() if only in label}


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def records_of(stage: Stage) -> list[Any]:
    """Return the topic's records."""
    reader = confluent_kafka.Consumer({"bootstrap.servers": stage.kafka.url, "group.id": "bench-reader"})
    found: list[Any] = []
    ends = 0
    starts: list[confluent_kafka.TopicPartition] = []
    for number in range(PARTITIONS):
        low, high = reader.get_watermark_offsets(confluent_kafka.TopicPartition(stage.topic, number))
        starts.append(confluent_kafka.TopicPartition(stage.topic, number, low))
        ends += high - low
    reader.assign(starts)
    while len(found) < ends:
        found += reader.consume(10_000, 1.0)
    reader.close()
    return found


def newest(stage: Stage, records: Iterable[Any]) -> dict[str, datetime]:
    """Return the key in Redis of the last row of each partition, with when it was changed."""
    last = {record.partition(): record for record in records if record.value() is not None}
    decode = Decoder(stage.registry.url)
    rows = [decode(record.value())["after"] for record in last.values()]
    return {f"movie:{row['id']}": datetime.fromisoformat(row["updated_u005fat"]) for row in rows}


def produce(stage: Stage, records: list[Any], number: int) -> None:
    """Write so many of the records, over and over, into the partitions from which they came."""
    options = {
        "bootstrap.servers": stage.kafka.url,
        "compression.type": "lz4",
        "linger.ms": 20,
        "batch.size": 256 << 10,
    }
    producer = confluent_kafka.Producer(options | {"queue.buffering.max.messages": 50_000})
    for position in range(number):
        record = records[position % len(records)]
        while True:
            try:
                producer.produce(
                    stage.topic, record.value(), record.key(), record.partition(), headers=record.headers()
                )
            except BufferError:
                producer.poll(1)
            else:
                break
    producer.flush()


@contextlib.contextmanager
def running(consumer: Consumer, log: Path) -> Any:
    """Run a consumer; its group is free afterwards, because each of its processes was told to leave."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            consumer.command, stdout=output, stderr=output, env={**os.environ, **consumer.environment}
        )
    try:
        yield process
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def measure(stage: Stage, consumer: Consumer, wanted: Mapping[str, datetime], events: int) -> dict[str, float]:
    """Run a consumer from the beginning until the newest change of every partition is in Redis.

    With nothing `wanted`, because there are copies: until its group has committed the end.
    """
    client = redis.Redis.from_url(stage.cache.url)
    client.flushall()
    log = stage.folder / "consumer.log"
    options = settings.kafka_python(_kafka(stage))
    offsets = GroupOffsets(lambda: options, consumer.group, [stage.topic])
    first: tuple[float, int] | None = None  # CPU seconds when the first document was seen, and how many there were
    began = time.perf_counter()
    with running(consumer, log) as process:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            if first is None and (size := client.dbsize()):
                first = cpu_s(process.pid), size
            if wanted and all(map(_shows, client.mget(wanted), wanted.values())):
                break
            if not wanted and _at_end(offsets):
                break
            time.sleep(LOOK_S)
        wall, cpu = time.perf_counter() - began, cpu_s(process.pid)
        rss = _largest_mb(process.pid)
    offsets.close()
    assert first is not None
    return {
        "events_per_s": round(events / wall),
        "cpu_us_per_event": round(1e6 * cpu / events, 1),
        "cpu_us_per_event_after_first_write": round(1e6 * (cpu - first[0]) / (events - first[1]), 1),
        "rss_mb": rss,
    }


def measure_running(stage: Stage, consumer: Consumer, records: list[Any], events: int) -> dict[str, float]:
    """Let a consumer's processes share the partitions, then write records; return CPU time from there on."""
    options = settings.kafka_python(_kafka(stage))
    offsets = GroupOffsets(lambda: options, consumer.group, [stage.topic])
    client = redis.Redis.from_url(stage.cache.url)
    client.flushall()
    log = stage.folder / "consumer.log"
    with running(consumer, log) as process, admin_client(stage.kafka.url) as admin:
        share = PARTITIONS // consumer.processes
        wait_until(lambda: _shares(admin, consumer.group) == [share] * consumer.processes, DEADLINE_S, "even shares")
        time.sleep(2.0)  # what follows a rebalance
        before, began = cpu_s(process.pid), time.perf_counter()
        produce(stage, records, events)
        while not _at_end(offsets):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(LOOK_S)
        wall, cpu = time.perf_counter() - began, cpu_s(process.pid) - before
        offsets.close()
        return {
            "events_per_s": round(events / wall),
            "cpu_us_per_event": round(1e6 * cpu / events, 1),
            "rss_mb": _largest_mb(process.pid),
            "start_cpu_s": round(before, 2),
        }


def _at_end(offsets: GroupOffsets) -> bool:
    try:
        committed = offsets.committed()
        return all(committed.get(partition, 0) >= end for partition, end in offsets.ends().items())
    except KafkaBusy:  # the group's topic is being made
        return False


def _shows(document: Any, wanted: datetime) -> bool:
    return document is not None and datetime.fromisoformat(json.loads(document)["updated_at"]) >= wanted


def _shares(admin: Any, group: str) -> list[int]:
    """Return how many partitions each member of a group has."""
    found: list[int] = []
    for member in admin.describe_groups([group])[group]["members"]:
        assignment = member["member_assignment"]
        topics = assignment["assigned_partitions"] if assignment else []
        found.append(sum(len(topic["partitions"]) for topic in topics))
    return found


def _kafka(stage: Stage) -> Any:
    return stage.spec("auto").kafka


def _largest_mb(pid: int) -> int:
    """Return the most resident memory that one of the processes ever had."""
    process = psutil.Process(pid)
    peaks = [_peak_kb(one.pid) for one in [process, *process.children(recursive=True)]]
    return max(peaks) >> 10


def _peak_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return 0


def forget(kafka: Any, group: str) -> None:
    """Let the next consumer of this group begin at the beginning, once the last one counts as gone."""
    with admin_client(kafka.url) as admin:

        def gone() -> bool:
            with contextlib.suppress(KafkaError):  # it still has a member
                admin.delete_groups([group])
            return not admin.list_group_offsets({group: None})[group]

        wait_until(gone, DEADLINE_S, f"the end of group {group}")


def run(stage: Stage, arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measure all, in turn, in each round."""
    records = records_of(stage)
    wanted = newest(stage, records)
    events = len(records)
    if arguments.backlog > events:  # for workers: the others would have to be asked for their positions
        produce(stage, records, arguments.backlog - events)
        events, wanted = arguments.backlog, {}
    calls = participants(arguments.only)
    found: dict[str, list[dict[str, float]]] = {}

    def note(label: str, figures: dict[str, float]) -> None:
        found.setdefault(label, []).append(figures)
        print(label, figures, f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)

    for _ in range(arguments.rounds):
        for label, call in calls.items():
            consumer = call(stage)
            forget(stage.kafka, consumer.group)
            note(label, measure(stage, consumer, wanted, events))
    for _ in range(arguments.rounds):  # afterwards, for these make the topic longer
        for client in CLIENTS:
            for processes in arguments.processes:
                if arguments.only in (label := f"{processes} workers {client}, running"):
                    consumer = worker(stage, client, processes)
                    note(label, measure_running(stage, consumer, records, RUNNING_COPIES * stage.events))
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--backlog", type=int, default=0, help="at least so many records in the topic")
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="also with so many worker processes")
    parser.add_argument("--only", default="", help="those with this in their names")
    arguments = parser.parse_args()
    with servers() as (source, cache), Kafka() as kafka, Apicurio() as registry, scratch() as place:
        spec = spec_of(source, cache, kafka, registry, "auto")
        events = capture(spec, Path(place) / "server", lambda: fill(source, arguments.rows, updates=True))
        stage = Stage(source, cache, kafka, registry, Path(place), events)
        found = run(stage, arguments)
    medians = {
        label: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for label, rounds in found.items()
    }
    report("kafka", {"events": events, **medians, "ratios": ratios(medians)})


def ratios(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the worker's CPU time per change as a share of the others'."""

    def cpu(label: str, name: str = "cpu_us_per_event") -> float:
        return figures.get(label, {}).get(name, math.nan)

    found = {
        "confluent-kafka: worker to plain consumer": cpu("worker confluent-kafka") / cpu("plain confluent-kafka"),
        "confluent-kafka: worker to Quix Streams": cpu("worker confluent-kafka") / cpu("Quix Streams"),
        "confluent-kafka: worker to Kafka Connect after its first write": cpu("worker confluent-kafka")
        / cpu("Kafka Connect", "cpu_us_per_event_after_first_write"),
        "kafka-python: worker to plain consumer": cpu("worker kafka-python") / cpu("plain kafka-python"),
    }
    for client in CLIENTS:
        one = cpu(f"1 workers {client}, running")
        for count in (2, 4):
            found[f"{client}: {count} workers to one"] = cpu(f"{count} workers {client}, running") / one
    return {label: round(ratio, 2) for label, ratio in found.items() if not math.isnan(ratio)}


if __name__ == "__main__":
    main()
