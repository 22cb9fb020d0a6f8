"""A sample stays true when the source crashes: what was not on disk is gone, and its positions are given again."""

from __future__ import annotations

from pathlib import Path

import psycopg

from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.spec import SourceSpec
from delta_sync.testing.servers import PostgreSQL

UNFLUSHED_BYTES = 300_000  # the WAL writer is woken at 1 MB; what a start after a crash writes is below 1 KB


def test_a_claim_is_not_above_what_a_crash_leaves_of_the_log(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("postgres\n")
    with PostgreSQL(wal_writer_delay="10s") as server:
        url = server.url.replace("postgres:postgres@", "postgres@")
        reader = PostgresReader(SourceSpec(url=url, password=f"${{file:{password}}}"), "test")
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE t (id int PRIMARY KEY, text text)")
            connection.execute("INSERT INTO t VALUES (1, 'first')")
            end = reader.log_end()
            with connection.transaction(force_rollback=True):  # nobody waits for a rollback to be on disk
                connection.execute(
                    "INSERT INTO t SELECT n, repeat('x', 1000) FROM generate_series(2, %s) n", [UNFLUSHED_BYTES // 1000]
                )
            assert reader.log_end() > end + UNFLUSHED_BYTES // 2
            sample = reader.sample()
            reader.close()
            server.kill()
        server.start()
        again = reader.log_end()
        reader.close()
    assert again < end + UNFLUSHED_BYTES // 2, "the log was on disk after all, so this showed nothing"
    # A change that is made now has a position from `again` on, and must outrank every row that claimed the sample.
    assert sample.position <= again
