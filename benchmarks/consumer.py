"""What a record costs on its way out of Kafka: `ConsumerGroup` by each client, beside a bare loop of the same client.

    python benchmarks/consumer.py [--records 200000]

The measure is CPU time of this process per record, and its ratio to the bare loop, which takes the same records with
the same options and looks at nothing. Peak memory is that of a process that reads a backlog and does nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import confluent_kafka

from delta_sync.kafka import settings
from delta_sync.kafka.clients import open_group
from delta_sync.spec import KafkaSpec, RegistrySpec
from delta_sync.testing.kafka import Kafka, admin_client

TOPIC, PARTITIONS = "records", 6
KEY_BYTES, VALUE_BYTES = 20, 200  # a small change as Avro
CLIENTS: tuple[Literal["kafka-python", "confluent-kafka"], ...] = ("kafka-python", "confluent-kafka")


def fill(url: str, records: int, value_bytes: int) -> None:
    """Write the records, as the connector would: with lz4, and the epoch as a header."""
    with admin_client(url) as admin:
        admin.create_topics(
            {TOPIC: {"num_partitions": PARTITIONS, "configs": {"max.message.bytes": str(16 << 20)}}},
            wait_for_metadata=True,
        )
    options = {"bootstrap.servers": url, "compression.type": "lz4", "linger.ms": 5, "message.max.bytes": 16 << 20}
    producer = confluent_kafka.Producer(options)
    filler = os.urandom(value_bytes // 4) * 4  # half of a record compresses, about
    for number in range(records):
        key = b"%0*d" % (KEY_BYTES, number)
        while True:
            try:
                producer.produce(TOPIC, filler, key, number % PARTITIONS, headers=[("delta.epoch", b"1")])
            except BufferError:
                producer.poll(1)
            else:
                break
    producer.flush()


def spec_of(url: str, client: Literal["kafka-python", "confluent-kafka"]) -> KafkaSpec:
    return KafkaSpec(bootstrap_servers=url, registry=RegistrySpec(url="http://127.0.0.1:1"), client=client)


def ours(spec: KafkaSpec, records: int) -> None:
    group = open_group(spec, f"ours-{spec.client}-{time.monotonic_ns()}")
    group.subscribe([TOPIC], lambda partitions: None, lambda partitions: None)
    left = records
    while left:
        for found in group.poll(1):
            left -= len(found.keys)
    group.close()


def bare(spec: KafkaSpec, records: int) -> None:
    group_id = f"bare-{spec.client}-{time.monotonic_ns()}"
    left = records
    if spec.client == "kafka-python":
        options = {**settings.kafka_python_consumer(spec, group_id), "auto_offset_reset": "earliest"}
        slow: Any = import_module("kafka").KafkaConsumer(TOPIC, **options)
        while left:
            left -= sum(len(found) for found in slow.poll(1000).values())
        slow.close()
        return
    fast = confluent_kafka.Consumer({**settings.confluent_consumer(spec, group_id), "auto.offset.reset": "earliest"})
    fast.subscribe([TOPIC])
    while left:
        left -= len(fast.consume(1, 1) + fast.consume(settings.RECORDS_PER_POLL, 0))
    fast.close()


def cpu_us(run: Callable[[KafkaSpec, int], None], spec: KafkaSpec, records: int) -> float:
    before = time.process_time()
    run(spec, records)
    return 1e6 * (time.process_time() - before) / records


def peak_mb(spec: KafkaSpec, records: int) -> float:
    """Return the peak of a process of its own that reads everything."""
    command = [sys.executable, __file__, "--read", spec.client, spec.bootstrap_servers, str(records)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        client, url, records = arguments.read
        ours(spec_of(url, client), int(records))
        # Not `getrusage`, whose figure has that of the process that started this one in it.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 1024)
        return
    with Kafka() as server:
        fill(server.url, arguments.records, VALUE_BYTES)
        for client in CLIENTS:
            spec = spec_of(server.url, client)
            bare(spec, arguments.records)  # warms the broker's caches
            rounds = [(cpu_us(bare, spec, arguments.records), cpu_us(ours, spec, arguments.records)) for _ in range(3)]
            alone, group = (min(figures) for figures in zip(*rounds, strict=True))
            print(
                f"{client:16} {group:6.2f} µs of CPU per record, bare {alone:6.2f}: ×{group / alone:.2f};"
                f" peak {peak_mb(spec, arguments.records):.0f} MB"
            )
    for value_bytes, records in ((100_000, 4000), (4 << 20, 100)):
        with Kafka(message_max_bytes=16 << 20) as server:
            fill(server.url, records, value_bytes)
            for client in CLIENTS:
                peak = peak_mb(spec_of(server.url, client), records)
                print(f"{client:16} peak {peak:.0f} MB with a backlog of {records} records of {value_bytes:,} bytes")


if __name__ == "__main__":
    main()
