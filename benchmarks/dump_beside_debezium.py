"""Delta's dumps beside Debezium's own incremental snapshot of the same table into Redis: rows per second, CPU per row.

    python benchmarks/dump_beside_debezium.py [--rows 500000] [--rounds 2] [--client kafka-python] [--only TEXT]

In turn, each with one worker unless it says otherwise, from the request until all rows are in a Redis that was empty:

- Debezium Server: a row in its signalling table, chunks of 8,192 rows, Avro, Kafka, Delta's worker
- a dump with Kafka: `deltactl dump start` beside a sidecar and a worker, which reads the table itself
- a dump with Kafka and two workers
- a dump without Kafka: `deltactl dump start` beside `deltactl run`

Each brings the whole table once before it is measured. CPU time is that of all processes that take part: servers,
connector, Delta's, and `deltactl dump start` itself. A dump of a whole table ends some time after its last row, for it
looks through the sink for documents that have no row; `…_until_ended` includes that.

Delta's worker refuses what Debezium's incremental snapshots read, for those records have no position in the log by
which they could be put in order with changes. Here it gives all of them the same one, so that each costs what a change
does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import psycopg
import redis
from common import report, scratch, servers, source_spec
from kafka_worker import Consumer, running

from delta_debezium.distribution import distribution
from delta_debezium.render import server_environment, server_properties
from delta_debezium.server import DebeziumServer
from delta_sync.dumping import FIRST_LOAD
from delta_sync.kafka import avro
from delta_sync.kafka.names import group_id
from delta_sync.kafka.topics import create_topics, wanted_topics
from delta_sync.pipeline import load_processor
from delta_sync.secrets import resolve
from delta_sync.sinks import open_sinks
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import PipelineSpec, dump_spec, spec_from
from delta_sync.starting import load_fingerprint, targets_of_table
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio

DEADLINE_S = 900.0
LOOK_S = 0.05
SAMPLE = 1000  # rows whose documents are compared afterwards
TABLE, SIGNALS = "public.narrow", "public.debezium_signal"
CHUNK_ROWS = 8192
PARTITIONS = 4
POSITION = 1  # of all rows that Debezium's incremental snapshots read
DEBEZIUM, WITH_KAFKA, EMBEDDED = "Debezium", "dump, Kafka", "dump, embedded"
TWO_WORKERS = "dump, Kafka, two workers"
ENDED = "incremental snapshotting of table"  # … finished: what Debezium logs

SCHEMA = """
CREATE TABLE narrow (id bigint PRIMARY KEY, title text, year int);
CREATE TABLE debezium_signal (id varchar(42) PRIMARY KEY, type varchar(32) NOT NULL, data varchar(2048))
"""
FILL = "INSERT INTO narrow SELECT i, 'movie ' || i, 1900 + i %% 120 FROM generate_series(1, %d) AS i"
PROCESSOR = """from delta_sync import Document, Pipeline, Row

pipeline = Pipeline("{name}")


@pipeline.table("public.narrow")
def narrow(row: Row) -> Document | None:
    return {{"id": row["id"], "title": row["title"], "year": row["year"]}}
"""
SIGNAL_OPTIONS = f"""
debezium.source.signal.enabled.channels=source
debezium.source.signal.data.collection={SIGNALS}
debezium.source.incremental.snapshot.chunk.size={CHUNK_ROWS}
"""
SIGNAL = "INSERT INTO debezium_signal VALUES (gen_random_uuid()::text, 'execute-snapshot', %s)"


class Stage(NamedTuple):
    """The servers."""

    source: Any  # PostgreSQL
    cache: Any  # Redis
    kafka: Any
    registry: Any
    folder: Path
    rows: int
    client: str


class Arm(NamedTuple):
    """One that takes part, while it runs: its processes, and how it is asked for the whole table.

    `begin` returns a function that tells whether it has ended.
    """

    processes: Mapping[str, int]
    begin: Callable[[], Callable[[], bool]]


def spec_of(stage: Stage, name: str, transport: str, *more_tables: str) -> PipelineSpec:
    """Return a pipeline with slot, publication and topics of its own."""
    kafka = {
        "bootstrap_servers": stage.kafka.url,
        "registry": {"url": stage.registry.url},
        "client": stage.client,
        "partitions": PARTITIONS,
        "replication_factor": 1,
        "min_insync_replicas": 1,
        "allow_unsafe": True,
    }
    return spec_from(
        {
            "name": name,
            "source": source_spec(stage.source) | {"slot": f"delta_{name}", "publication": f"delta_{name}"},
            "tables": {table: {"sinks": {"cache": {"key": "narrow:{id}"}}} for table in (TABLE, *more_tables)},
            "sinks": {"cache": {"url": stage.cache.url}},
            "transport": transport,
            **({"kafka": kafka} if transport == "kafka" else {}),
        },
        "benchmark",
    )


def write_folder(stage: Stage, spec: PipelineSpec) -> Path:
    """Write the pipeline's folder, once, and return it."""
    folder = stage.folder / "pipelines" / spec.name
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "pipeline.yaml").write_text(dump_spec(spec))
        (folder / "processor.py").write_text(PROCESSOR.format(name=spec.name))
    return folder


# ── Debezium ─────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def debezium(stage: Stage) -> Generator[Arm]:
    """Debezium Server, as the sidecar runs it but for its signals, and the worker."""
    spec = spec_of(stage, "peer", "kafka")
    captured = spec_of(stage, "peer", "kafka", SIGNALS)
    reader = PostgresReader(spec.source, "bench")
    tables = reader.tables([TABLE, SIGNALS])
    home = stage.folder / "pipelines"
    if not (home / spec.name).exists():
        assert captured.kafka is not None
        create_topics(captured.kafka, wanted_topics(captured))
        reader.publish(spec.publication, list(tables.values()))
        reader.create_slot(spec.slot)
        save_as_loaded(spec, write_folder(stage, spec), reader)
    reader.close()
    server = DebeziumServer(stage.folder / "server", distribution())
    properties = server_properties(captured, tables, 1) + SIGNAL_OPTIONS
    server.start(properties, server_environment(captured, tables, 1, resolve))
    worker = Consumer(
        [sys.executable, __file__, "--as-worker", "worker", spec.name, "--dir", str(home)], group_id(spec.name)
    )
    try:
        with running(worker, stage.folder / "worker.log") as process:
            assert server.pid is not None

            def begin() -> Callable[[], bool]:
                snapshots = log_of(server).count(ENDED)
                what = json.dumps({"type": "incremental", "data-collections": [TABLE]})
                with psycopg.connect(stage.source.url, autocommit=True) as connection:
                    connection.execute(SIGNAL, [what])

                def ended() -> bool:
                    assert server.alive, server.last_words()
                    return log_of(server).count(ENDED) > snapshots

                return ended

            yield Arm({**servers_of(stage, kafka=True), "Debezium Server": server.pid, "worker": process.pid}, begin)
    finally:
        server.stop(10.0)


def log_of(server: DebeziumServer) -> str:
    """Return what Debezium Server has printed."""
    return server.log_file.read_text(errors="replace")


def save_as_loaded(spec: PipelineSpec, folder: Path, reader: PostgresReader) -> None:
    """Save a state in which the table is loaded, so that the worker only reads Kafka."""
    sinks = open_sinks(spec)
    with StateStore.open(spec.state, folder) as state:
        identity = reader.identity()
        state.save_pipeline(PipelineState(spec.name, 1, identity.system_identifier, identity.timeline))
        targets = targets_of_table(load_processor(folder, spec), sinks, reader.tables([TABLE])[TABLE], spec)
        fingerprint = load_fingerprint(reader.fingerprints([TABLE])[TABLE], targets, sinks)
        state.save_load(spec.name, TableLoad(TABLE, "done", covered_from=1, fingerprint=fingerprint, reason=FIRST_LOAD))
    for sink in sinks.values():
        sink.close()


def run_as_worker(arguments: list[str]) -> None:
    """Be `deltactl` with a decoder that gives a record without a position one, and reads it by its template."""
    from deltactl.main import main as deltactl

    decode, pattern, long = avro._Reader._decode, avro._pattern, avro._long  # pyright: ignore[reportPrivateUsage]

    def decode_any(reader: Any, value: bytes, schema: Any) -> tuple[Any, int]:
        event, end = decode(reader, value, schema)
        source = event.get("source")
        if source is not None:
            source |= {name: POSITION for name in ("lsn", "txId") if source[name] is None}
        return event, end

    def pattern_of_any(name: str, schema: Any, value: object, group: str | None) -> bytes | None:
        found = pattern(name, schema, value, group)
        if found is None or group not in ("lsn", "txId") or "null" not in schema:
            return found
        null = re.escape(avro._branch(schema, "null"))  # pyright: ignore[reportPrivateUsage]
        return b"(?:" + null + b"|" + found + b")"

    def long_of_any(data: bytes | None) -> int:
        return POSITION if data is None else long(data)

    with (
        mock.patch.object(avro._Reader, "_decode", decode_any),  # pyright: ignore[reportPrivateUsage]
        mock.patch.multiple(avro, _pattern=pattern_of_any, _long=long_of_any),
    ):
        deltactl(arguments)


# ── Delta ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def with_kafka(stage: Stage, workers: int = 1) -> Generator[Arm]:
    """A sidecar and so many workers."""
    spec = spec_of(stage, "bench", "kafka")
    assert spec.kafka is not None
    create_topics(spec.kafka, wanted_topics(spec))
    with delta(stage, spec, "sidecar", *["worker"] * workers) as arm:
        yield arm


@contextmanager
def embedded(stage: Stage) -> Generator[Arm]:
    """`deltactl run`."""
    with delta(stage, spec_of(stage, "embedded", "embedded"), "run") as arm:
        yield arm


@contextmanager
def delta(stage: Stage, spec: PipelineSpec, *commands: str) -> Generator[Arm]:
    """Delta's processes, once the table is loaded."""
    folder = write_folder(stage, spec)
    deltactl = [sys.executable, "-m", "deltactl.main", "--dir", str(folder.parent)]
    with contextlib.ExitStack() as exits:
        pids: dict[str, int] = {}
        for number, command in enumerate(commands):
            consumer = Consumer([*deltactl, command, spec.name], group_id(spec.name))
            process = exits.enter_context(running(consumer, stage.folder / f"{number}-{command}.log"))
            pids[command if command not in pids else f"{command} {number}"] = process.pid
        wait_until(lambda: _is_loaded(spec, folder), DEADLINE_S, "the first load")
        dumps = DumpStore(exits.enter_context(StateStore.open(spec.state, folder)), spec.name)

        def begin() -> Callable[[], bool]:
            command = [*deltactl, "dump", "start", spec.name, "--table", TABLE, "--json"]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            (asked,) = json.loads(done.stdout)

            def ended() -> bool:
                found = dumps.get(asked["id"])
                assert found is not None
                assert found.state not in ("failed", "cancelled"), found.waits
                return found.state == "done"

            return ended

        yield Arm({**servers_of(stage, kafka="worker" in commands), **pids}, begin)


def _is_loaded(spec: PipelineSpec, folder: Path) -> bool:
    store = StateStore.open(spec.state, folder, create=False)
    if store is None:
        return False
    with store:
        load = store.loads(spec.name).get(TABLE)
    return load is not None and load.state == "done"


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def servers_of(stage: Stage, *, kafka: bool) -> dict[str, int]:
    """Return the main processes of the servers that take part."""
    found = {"PostgreSQL": stage.source.pid, "Redis": stage.cache.pid}
    return found | ({"Kafka": stage.kafka.pid, "registry": stage.registry.pid} if kafka else {})


def used_s(pid: int) -> float:
    """Return the CPU seconds of a process and all that came from it, those that have ended as well."""
    process = psutil.Process(pid)
    used = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended counts with its parent
            used += sum(one.cpu_times()[:4])
    return used


def _runs(pid: int) -> bool:
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def commands_s() -> float:
    """Return the CPU seconds of this program's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def bring(stage: Stage, arm: Arm) -> dict[str, float]:
    """Empty Redis, have the table brought, and return the figures."""
    client: Any = redis.Redis.from_url(stage.cache.url)
    client.flushall()
    before = used_us(arm)
    began = time.perf_counter()
    has_ended = arm.begin()
    asked_s = time.perf_counter() - began
    while client.dbsize() < stage.rows:
        assert all(map(_runs, arm.processes.values())), f"one of {arm.processes} has ended"
        assert time.perf_counter() - began < DEADLINE_S, f"{client.dbsize()} rows came"
        time.sleep(LOOK_S)
    took_s, there = time.perf_counter() - began, used_us(arm)
    wait_until(has_ended, DEADLINE_S, "the end")
    ended_s, after = time.perf_counter() - began, used_us(arm)
    check(client, stage.rows)
    each = {f"cpu_us_per_row, {name}": round((there[name] - before[name]) / stage.rows, 1) for name in there}
    return {
        "rows_per_s": round(stage.rows / took_s),
        "cpu_us_per_row": round((sum(there.values()) - sum(before.values())) / stage.rows, 1),
        **each,
        "cpu_us_per_row_until_ended": round((sum(after.values()) - sum(before.values())) / stage.rows, 1),
        "asked_s": round(asked_s, 2),
        "ended_s": round(ended_s, 2),
    }


def used_us(arm: Arm) -> dict[str, float]:
    """Return the CPU time of each that takes part, so far."""
    return {name: 1e6 * used_s(pid) for name, pid in arm.processes.items()} | {"command": 1e6 * commands_s()}


def check(client: Any, rows: int) -> None:
    """Look whether documents are those of the rows."""
    numbers = range(1, rows + 1, max(1, rows // SAMPLE))
    for number, text in zip(numbers, client.mget([f"narrow:{number}" for number in numbers]), strict=True):
        document = json.loads(text)
        assert document["title"] == f"movie {number}", document
        assert document["year"] == 1900 + number % 120, document


ARMS: Mapping[str, Callable[[Stage], contextlib.AbstractContextManager[Arm]]] = {
    DEBEZIUM: debezium,
    WITH_KAFKA: with_kafka,
    TWO_WORKERS: lambda stage: with_kafka(stage, 2),
    EMBEDDED: embedded,
}


def run(stage: Stage, rounds: int, only: str) -> dict[str, list[dict[str, float]]]:
    """Measure all, in turn, in each round."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for label, start in ARMS.items():
            if only not in label:
                continue
            with start(stage) as arm:
                bring(stage, arm)  # what follows is measured warm
                figures = bring(stage, arm)
            found.setdefault(label, []).append(figures)
            print(label, figures, f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return found


def ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return how many times better dumps are; of two workers, also what a row costs as a multiple of one's."""
    peer = medians.get(DEBEZIUM)
    found: dict[str, float] = {}
    if WITH_KAFKA in medians and TWO_WORKERS in medians:
        for name in ("cpu_us_per_row", "cpu_us_per_row_until_ended"):
            found[f"{TWO_WORKERS}: {name} to one's"] = round(medians[TWO_WORKERS][name] / medians[WITH_KAFKA][name], 2)
    for label in (WITH_KAFKA, TWO_WORKERS, EMBEDDED):
        if peer and label in medians:
            own = medians[label]
            found[f"{label}: rows per second"] = round(own["rows_per_s"] / peer["rows_per_s"], 2)
            for name in ("cpu_us_per_row", "cpu_us_per_row_until_ended"):
                found[f"{label}: {name}"] = round(peer[name] / own[name], 2)
    return found


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--as-worker"]:
        run_as_worker(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--client", default="kafka-python", choices=["kafka-python", "confluent-kafka"])
    parser.add_argument("--only", default="", help="those with this in their names")
    arguments = parser.parse_args()
    with servers() as (source, cache), Kafka() as kafka, Apicurio() as registry, scratch() as place:
        with psycopg.connect(source.url, autocommit=True) as connection:
            connection.execute(SCHEMA)
            connection.execute(FILL % arguments.rows)
            connection.execute("VACUUM ANALYZE narrow")
            connection.execute("CHECKPOINT")
        stage = Stage(source, cache, kafka, registry, Path(place), arguments.rows, arguments.client)
        found = run(stage, arguments.rounds, arguments.only)
    medians = {
        label: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for label, rounds in found.items()
    }
    report(
        "dump_beside_debezium",
        {"rows": arguments.rows, "client": arguments.client, **medians, "ratios": ratios(medians)},
    )


if __name__ == "__main__":
    main()
