"""What PostgreSQL's rows cost as text and in its binary format, read by psycopg as a dump reads them.

    python benchmarks/formats.py [--rows 100000]

CPU time of this process and of the server's, in microseconds per row: for the comparisons' table, and for single
columns. Binary rows are given out by psycopg's own loaders, which is less than exactness needs: they end a query at
`infinity`, and a `real` is another number.
"""

from __future__ import annotations

import argparse
import time

import psutil
import psycopg
from common import FILL, SCHEMA, report

from delta_sync.sources.postgresql import codec
from delta_sync.testing.servers import PostgreSQL

ROUNDS = 5  # of which the best counts: what else runs on the machine only adds

COLUMNS = {
    "bigint": "i",
    "text": "'Movie title number ' || i",
    "numeric": "round((i % 90) / 10.0, 1)",
    "timestamptz": "now() + i * interval '1.000001 s'",
    "date": "date '2000-01-01' + i % 9999",
    "time": "time '01:00' + i * interval '1 ms'",
    "interval": "i * interval '1.0001 s'",
    "jsonb": "jsonb_build_object('tagline', md5(i::text), 'budget', i * 13)",
    "uuid": "md5(i::text)::uuid",
    "bytea": "decode(md5(i::text), 'hex')",
    "float8": "i * 1.1",
    "int[]": "ARRAY[i, 2, 3]",
}


def cost(connection: psycopg.Connection, table: str, rows: int, *, binary: bool) -> dict[str, float]:
    """Return the CPU time of client and server for a row of a table."""
    backend = psutil.Process(connection.info.backend_pid)
    clients: list[float] = []
    servers_before = sum(backend.cpu_times()[:2])
    for _ in range(ROUNDS):
        before = time.process_time()
        for _row in connection.execute(f"SELECT * FROM {table}".encode(), binary=binary):
            pass
        clients.append(time.process_time() - before)
    server = (sum(backend.cpu_times()[:2]) - servers_before) / ROUNDS
    return {"client": round(1e6 * min(clients) / rows, 2), "server": round(1e6 * server / rows, 2)}


def main() -> None:
    """Run it and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows: int = parser.parse_args().rows
    with PostgreSQL() as source, psycopg.connect(source.url, autocommit=True) as connection:
        codec.configure(connection)
        connection.execute(SCHEMA.format(table="movie"))
        connection.execute(FILL.format(table="movie", first=1, last=rows))
        tables = {"movie": "movie"}
        for number, (type_name, value) in enumerate(COLUMNS.items()):
            tables[type_name] = f"one_{number}"
            query = f"CREATE TABLE one_{number} AS SELECT ({value})::{type_name} FROM generate_series(1, {rows}) AS i"
            connection.execute(query.encode())
        connection.execute("VACUUM ANALYZE")
        figures = {
            name: {way: cost(connection, table, rows, binary=way == "binary") for way in ("text", "binary")}
            for name, table in tables.items()
        }
    report("formats", {"rows": rows, "us_per_row": figures})


if __name__ == "__main__":
    main()
