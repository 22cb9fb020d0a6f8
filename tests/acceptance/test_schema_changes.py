"""A table's columns change while `deltactl run` runs and a writer writes: documents are the rows as they are now."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import psycopg
import pytest

from acceptance.harness import PATIENCE_S, Actor, Run, Source, Stage
from delta_sync.testing.processes import wait_until

HOT, ALL = 40, 400  # rows with an id below HOT are written all the time; the others never again after the first load
NOTICED_S = 300.0  # far above the five seconds in which a change of columns is noticed without any event
EXIT_TIMEOUT_S = 300.0
PAUSE_S = 0.05  # the machine has other things to do

# `thing` is decoded from its events; of `keyed` every row is read by its key, because of the generated column.
SETUP = f"""
CREATE TABLE thing (id int PRIMARY KEY, rev int NOT NULL, name text, n int, price numeric(10,2), unused text,
    doomed text);
CREATE TABLE keyed (id int PRIMARY KEY, rev int NOT NULL, name text, n int, price numeric(10,2), unused text,
    doomed text, twice int GENERATED ALWAYS AS (rev * 2) STORED);
INSERT INTO thing SELECT i, 0, 'name ' || i, i, i / 4.0, 'unused', 'doomed' FROM generate_series(0, {ALL - 1}) i;
INSERT INTO keyed SELECT i, 0, 'name ' || i, i, i / 4.0, 'unused', 'doomed' FROM generate_series(0, {ALL - 1}) i;
"""
TABLES = ("thing", "keyed")

STEPS = {
    "add a column": "ADD COLUMN added int",
    "add a column with a default": "ADD COLUMN given text DEFAULT 'given'",
    "add a column with a volatile default": "ADD COLUMN chance double precision DEFAULT random()",
    "drop a column": "DROP COLUMN doomed",
    "rename a column": "RENAME COLUMN name TO title",
    "rename a column that nobody uses": "RENAME COLUMN unused TO still_unused",
    "int becomes text": "ALTER COLUMN n TYPE text USING 'no. ' || n",
    "numeric becomes double precision": "ALTER COLUMN price TYPE double precision",
    "a column is dropped and added again with another type": "DROP COLUMN added, ADD COLUMN added text DEFAULT 'again'",
}


class Writing(Actor):
    """Updates, deletes and inserts the hot rows, through whatever happens to the columns."""

    def __init__(self, source: Source) -> None:
        super().__init__("writer")
        self.written = 0
        self._source = source
        self._random = random.Random(7)

    def act(self) -> None:
        with suppress(psycopg.errors.UndefinedTable), self._source.connect() as connection:  # the test dropped it
            while not self.stopping.wait(PAUSE_S):
                table, id_ = self._random.choice(TABLES), self._random.randrange(HOT)
                choose = self._random.random()
                if choose < 0.1:
                    connection.execute(f"DELETE FROM {table} WHERE id = {id_}".encode())
                elif choose < 0.3:
                    connection.execute(
                        f"INSERT INTO {table} (id, rev) VALUES ({id_}, 1) ON CONFLICT DO NOTHING".encode()
                    )
                else:
                    connection.execute(f"UPDATE {table} SET rev = rev + 1 WHERE id = {id_}".encode())
                self.written += 1

    def stop(self) -> None:
        super().stop()
        assert self.written > 0


def in_step_but_for_hot_rows(it: Stage, run: Run, what: str) -> None:
    """Wait until every row that nobody writes is in the stores as it is now."""

    def there() -> bool:
        assert run.running, f"{what}: the run ended with status {run.exit_status}; {run.tail()}"
        return not [line for line in it.stores.differences() if ": version " in line and not _hot(line)]

    wait_until(there, NOTICED_S, f"{what}: {it.stores.differences()[:3]}")


def _hot(line: str) -> bool:
    key = line.partition("(")[2].partition(",")[0]
    return key.isdigit() and int(key) < HOT


@pytest.mark.timeout(900)
def test_columns_change_under_a_running_pipeline(stage: Callable[..., Stage]) -> None:
    it = stage(SETUP, TABLES, ("cache", "docs", "search"))
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    with Writing(it.source):
        for what, alter in STEPS.items():
            it.source.execute(*(f"ALTER TABLE {table} {alter}" for table in TABLES))
            in_step_but_for_hot_rows(it, run, what)
    it.in_step(run)
    assert it.pipeline.dead_letters() == []
    assert run.stop() == 0


@pytest.mark.timeout(600)
@pytest.mark.long
def test_columns_change_while_delta_is_stopped(stage: Callable[..., Stage]) -> None:
    """The log then has events of the table as it was, and as it was in between."""
    it = stage(SETUP, TABLES, ("cache", "docs"))
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    assert run.stop() == 0
    with Writing(it.source) as writer:
        for alter in STEPS.values():
            before = writer.written
            wait_until(lambda before=before: writer.written > before + 20, PATIENCE_S, "writing")  # type: ignore[misc]  # mypy: lambda with a default
            it.source.execute(*(f"ALTER TABLE {table} {alter}" for table in TABLES))
        run = it.run()
        in_step_but_for_hot_rows(it, run, "started again")
    it.in_step(run)
    assert it.pipeline.dead_letters() == []
    assert run.stop() == 0


@pytest.mark.timeout(600)
@pytest.mark.long
def test_columns_change_while_a_table_is_loaded(stage: Callable[..., Stage]) -> None:
    """Chunks and rows by key are read with the columns that Delta knows, and those may be gone when it asks."""
    it = stage(SETUP, TABLES, load={"chunk_rows": 5})
    with Writing(it.source):
        run = it.run()
        wait_until(lambda: bool(run.events("load_started")), PATIENCE_S, "the first load")
        for alter in STEPS.values():
            it.source.execute(*(f"ALTER TABLE {table} {alter}" for table in TABLES))
        in_step_but_for_hot_rows(it, run, "changed while it was loaded")
    it.in_step(run)
    assert it.pipeline.dead_letters() == []
    assert run.stop() == 0


@pytest.mark.parametrize(
    ("most", "stops"),
    [pytest.param(1000, False, id="dead letters"), pytest.param(100, True, id="too many", marks=pytest.mark.long)],
)
def test_a_column_that_the_processor_uses_is_dropped(most: int, stops: bool, stage: Callable[..., Stage]) -> None:
    it = stage(
        SETUP,
        ["thing"],
        processor="return {'id': row['id'], 'name': row['name'], 'was': row['doomed']}",
        errors={"max_dead_letters_per_minute": most},
    )
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    it.source.execute("ALTER TABLE thing DROP COLUMN doomed", "UPDATE thing SET rev = rev + 1 WHERE id < 3")
    if stops:
        wait_until(lambda: not run.running, EXIT_TIMEOUT_S, "stopping")
        assert run.exit_status == 1
        assert "KeyError: 'doomed'" in run.tail()
        assert "max_dead_letters_per_minute" in run.tail()
        assert it.source.confirmed_lsn(it.pipeline.slot) > 0
    else:

        def all_failed() -> bool:
            return len({letter["key"] for letter in it.pipeline.dead_letters("--limit", "1000")}) == ALL

        wait_until(all_failed, NOTICED_S, "a dead letter for each row")
        assert {letter["error"] for letter in it.pipeline.dead_letters()} == {"KeyError: 'doomed'"}
        assert run.running
    assert it.stores.document("cache", "thing", (5,)) == {"id": 5, "name": "name 5", "was": "doomed"}
    it.pipeline.write_processor("return dict(row)")
    if not stops:
        assert run.stop() == 0
    run = it.run()
    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    if not stops:
        replayed = it.pipeline.deltactl("dead", "replay", it.pipeline.name, "--all")
        assert replayed.returncode == 0, replayed.stderr
    it.in_step(run)
    assert run.stop() == 0


@pytest.mark.parametrize(
    ("dropped", "other"), [("thing", "keyed"), pytest.param("keyed", "thing", marks=pytest.mark.long)]
)
def test_a_table_is_dropped(dropped: str, other: str, stage: Callable[..., Stage]) -> None:
    """The others go on, also when rows of it were still to be read. At the next start it is the user's to decide."""
    it = stage(SETUP, TABLES)
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    it.source.execute(f"UPDATE {dropped} SET rev = rev + 1; DROP TABLE {dropped}")
    wait_until(lambda: bool(run.events("table_missing")), NOTICED_S, "the warning")
    it.source.execute(f"UPDATE {other} SET rev = rev + 1", f"ALTER TABLE {other} DROP COLUMN doomed")

    def in_step() -> bool:
        assert run.running, run.tail()
        return it.stores.differences() == []

    wait_until(in_step, NOTICED_S, "the other table in step")
    assert run.stop() == 0
    run = it.run()
    wait_until(lambda: not run.running, EXIT_TIMEOUT_S, "the refusal")
    assert run.exit_status == 2
    assert f"has no table {it.source.schema}.{dropped}" in run.tail()
    it.source.execute(
        f"CREATE TABLE {dropped} (id int PRIMARY KEY, new text)", f"INSERT INTO {dropped} VALUES (1, 'x')"
    )
    run = it.run()
    it.in_step(run)  # documents of rows that went with the table are gone, too
    assert it.pipeline.dead_letters() == []
    assert run.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("restarted", [False, True], ids=["in one run", "over a restart"])
def test_a_table_that_is_away_for_a_while_is_loaded_again(restarted: bool, stage: Callable[..., Stage]) -> None:
    """What happens to it under another name is in the log under that name, and so it is not seen."""
    it = stage(SETUP, TABLES)
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    it.source.execute(*(f"ALTER TABLE {table} RENAME TO {table}_away" for table in TABLES))
    wait_until(lambda: len(run.events("table_missing")) == len(TABLES), NOTICED_S, "the warnings")
    for table in TABLES:
        it.source.execute(
            f"UPDATE {table}_away SET rev = 9 WHERE id < 5",
            f"DELETE FROM {table}_away WHERE id = 7",
            f"INSERT INTO {table}_away (id, rev) VALUES (1000, 1)",
        )
    if restarted:
        assert run.stop() == 0
    it.source.execute(*(f"ALTER TABLE {table}_away RENAME TO {table}" for table in TABLES))
    if restarted:
        run = it.run()

    def in_step() -> bool:
        assert run.running, run.tail()
        return it.stores.differences() == []

    wait_until(in_step, NOTICED_S, "both tables in step")
    assert run.stop() == 0
