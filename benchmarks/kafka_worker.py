"""Workers on Kafka: Avro topic → processor → Redis, versioned, beside plain consumers, which write without versions.

    python benchmarks/kafka_worker.py [--rows 200000] [--rounds 1]

Debezium Server writes each row twice (an insert, an update) into a topic with four partitions. Then each consumer reads
it from the beginning, in turn: CPU time of its process tree, its start included, until its group has committed the end.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import redis
from common import PROCESSOR, cpu_s, fill, report, scratch, servers, source_spec
from kafka.errors import KafkaError

from delta_debezium.distribution import distribution
from delta_debezium.render import server_environment, server_properties
from delta_debezium.server import DebeziumServer
from delta_sync.kafka import settings
from delta_sync.kafka.consumer import KafkaBusy
from delta_sync.kafka.names import group_id, topic_name
from delta_sync.kafka.offsets import GroupOffsets
from delta_sync.kafka.topics import create_topics, wanted_topics
from delta_sync.load import FIRST_LOAD
from delta_sync.pipeline import load_processor
from delta_sync.secrets import resolve
from delta_sync.sinks import open_sinks
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import PipelineSpec, dump_spec, spec_from
from delta_sync.starting import load_fingerprint, targets_of_table
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.testing.kafka import Kafka, admin_client
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio

DEADLINE_S = 900.0
LOOK_S = 0.05
NAME = "bench"
TABLE = "public.movie"


def spec_of(source: Any, cache: Any, kafka: Kafka, registry: Apicurio, client: str) -> PipelineSpec:
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
                "partitions": 4,
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


def measure(command: list[str], offsets: GroupOffsets, events: int, log: Path) -> dict[str, float]:
    """Run a consumer until its group has committed the end; return its rate, CPU time and memory."""
    ends = offsets.ends()
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + DEADLINE_S
        rss = 0
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            try:
                committed = offsets.committed()
            except KafkaBusy:  # the group's topic is being made
                committed = {}
            rss = max(rss, _rss(process.pid))
            if all(committed.get(partition, 0) >= end for partition, end in ends.items()):
                break
            time.sleep(LOOK_S)
        wall, cpu = time.perf_counter() - began, cpu_s(process.pid)
        return {
            "events_per_s": round(events / wall),
            "cpu_us_per_event": round(1e6 * cpu / events, 1),
            "rss_mb": round(rss / 2**20),
        }
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def forget(kafka: Kafka, group: str) -> None:
    """Let the next consumer of this group begin at the beginning, once the killed one counts as gone."""
    with admin_client(kafka.url) as admin:

        def gone() -> bool:
            with contextlib.suppress(KafkaError):  # it still has a member
                admin.delete_groups([group])
            return not admin.list_group_offsets({group: None})[group]

        wait_until(gone, DEADLINE_S, f"the end of group {group}")


def _rss(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(int(one.memory_info().rss) for one in [process, *process.children(recursive=True)])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="also with so many worker processes")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with servers() as (source, cache), Kafka() as kafka, Apicurio() as registry, scratch() as place:
        spec = spec_of(source, cache, kafka, registry, "kafka-python")
        events = capture(spec, Path(place) / "server", lambda: fill(source, arguments.rows, updates=True))
        topic = topic_name(NAME, TABLE)
        assert spec.kafka is not None
        options = settings.kafka_python(spec.kafka)
        for number in range(arguments.rounds):
            for client in ("confluent-kafka", "kafka-python"):
                for label, processes in [(f"plain {client}", 0), (f"worker {client}", 1)] + [
                    (f"{count} workers {client}", count) for count in arguments.processes
                ]:
                    redis.Redis.from_url(cache.url).flushall()
                    if processes == 0:
                        group = f"plain-{client}-{number}"
                        script = str(Path(__file__).with_name("plain_consumer.py"))
                        command = [sys.executable, script, client, kafka.url, registry.url, topic, group, cache.url]
                    else:
                        group, home = group_id(NAME), Path(place) / f"{number}-{client}-{processes}"
                        prepare(spec_of(source, cache, kafka, registry, client), home / NAME)
                        command = [sys.executable, "-m", "deltactl.main", "worker", NAME]
                        command += ["--dir", str(home), "--processes", str(processes)]
                    offsets = GroupOffsets(lambda: options, group, [topic])
                    figures = measure(command, offsets, events, Path(place) / f"{group}.log")
                    offsets.close()
                    forget(kafka, group)
                    print(label, figures, file=sys.stderr)
                    found.setdefault(label, []).append(figures)
    medians = {
        label: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for label, rounds in found.items()
    }
    ratios = {
        client: round(
            medians[f"worker {client}"]["cpu_us_per_event"] / medians[f"plain {client}"]["cpu_us_per_event"], 2
        )
        for client in ("confluent-kafka", "kafka-python")
    }
    report("kafka", {"events": events, **medians, "cpu_of_worker_to_plain": ratios})


if __name__ == "__main__":
    main()
