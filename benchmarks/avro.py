"""Decoding of Debezium's Avro records: `AvroDecoder` beside plain fastavro, in one process, by turns.

    python benchmarks/avro.py [--events 20000] [--rounds 9]

Prints µs of CPU per event, the best round of each: of records that all have different keys, and of records of which
nine in ten are of a key that a later one has, too; of PostgreSQL and of MariaDB.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from io import BytesIO

from fastavro import parse_schema, schemaless_reader

from debezium_avro import BINLOG_SOURCE, MOVIE, Writer, binlog_event, envelope, event, key_of, movie, records
from delta_sync.kafka.avro import HEADER_BYTES, AvroDecoder

BATCH = 2000  # records of a poll


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    events: int = arguments.events
    writer = Writer({5: envelope(MOVIE), 6: envelope(MOVIE, source=BINLOG_SOURCE)})
    # Each row in a transaction of its own: the worst case.
    values: list[bytes | None] = [
        writer.value(5, event("u", None, movie(number), lsn=24_023_400 + 200 * number, xid=7000 + number))
        for number in range(events)
    ]
    of_mariadb: list[bytes | None] = [
        writer.value(6, binlog_event("u", None, movie(number), 4 + 200 * number, gtid=f"0-1-{7000 + number}"))
        for number in range(events)
    ]
    bodies = [value for value in values if value is not None]
    whole = parse_schema(envelope(MOVIE))

    def plain() -> None:
        for body in bodies:
            stream = BytesIO(body)
            stream.seek(HEADER_BYTES)
            schemaless_reader(stream, whole, None)

    decoder = AvroDecoder(writer)

    def ours(keys: list[bytes | None], values: list[bytes | None] = values) -> Callable[[], None]:
        polled = [
            records(values[start : start + BATCH], keys[start : start + BATCH]) for start in range(0, events, BATCH)
        ]

        def run() -> None:
            for batch in polled:
                decoded = decoder.decode([batch])
                assert not decoded.undecodable

        return run

    rng = random.Random(1)
    subjects = {
        "fastavro.schemaless_reader": plain,
        "AvroDecoder, all keys different": ours([key_of(number) for number in range(events)]),
        "AvroDecoder, 200 keys": ours([key_of(rng.randrange(200)) for _ in range(events)]),
        "MariaDB, all keys different": ours([key_of(number) for number in range(events)], of_mariadb),
        "MariaDB, 200 keys": ours([key_of(rng.randrange(200)) for _ in range(events)], of_mariadb),
    }
    best = dict.fromkeys(subjects, float("inf"))
    for _ in range(arguments.rounds):
        for name, run in subjects.items():
            before = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - before)
    print(f"{len(bodies[0])} bytes per record, {events} records in batches of {BATCH}")
    for name, seconds in best.items():
        print(f"{name:34} {seconds / events * 1e6:6.2f} µs per event")


if __name__ == "__main__":
    main()
