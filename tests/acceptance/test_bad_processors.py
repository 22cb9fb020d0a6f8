"""Processors that do not return, and that lose memory: each costs its own changes or a restart, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil

from acceptance.harness import Stage
from delta_sync.testing.processes import wait_until

ROWS = 300
TIMEOUT_S = 300.0
MEMORY_MIB = 256  # of which the worker needs half; each row takes one
CHANGED = 60  # rows, which fit beside it
PROCESSOR = """
import time

from delta_sync import Pipeline

pipeline = Pipeline({name!r})
LOST = []


def hangs(row):
    if row["id"] == 7 and row["rev"] == 0:
        time.sleep(1e6)
    while row["id"] == 8 and row["rev"] == 0:
        pass


@pipeline.table({table!r})
def movie(row):
    LOST.append(b"x" * (1 << 20))
    hangs(row)
    return dict(row)
"""


def documents(it: Stage) -> dict[int, Any]:
    found = it.stores.sinks["cache"].read(it.stores.target("cache", "movie"), [(id_,) for id_ in range(1, ROWS + 1)])
    return {id_: one.document for id_, one in enumerate(found, 1) if one is not None and one.document is not None}


def test_what_hangs_is_a_dead_letter_and_what_leaks_is_started_anew(stage: Callable[..., Stage]) -> None:
    it = stage(
        f"""CREATE TABLE movie (id int PRIMARY KEY, rev int NOT NULL);
        INSERT INTO movie SELECT i, 0 FROM generate_series(1, {ROWS}) i;""",
        ["movie"],
    )
    text = PROCESSOR.format(name=it.pipeline.name, table=it.pipeline.tables[0])
    (it.pipeline.home / "processor.py").write_text(text)
    specification = it.pipeline.home / "pipeline.yaml"
    specification.write_text(specification.read_text() + f"processor: {{timeout: 6s, memory: {MEMORY_MIB}MiB}}\n")
    run = it.run()
    wait_until(it.pipeline.loaded, TIMEOUT_S, "the load")
    wait_until(lambda: len(it.pipeline.dead_letters()) == 2, TIMEOUT_S, "two dead letters")
    letters = {letter["key"]: letter["error"] for letter in it.pipeline.dead_letters()}
    assert letters.keys() == {"7", "8"}
    for error in letters.values():
        assert "ProcessorTimeout: It had not returned after 6 s (processor.timeout), at processor.py line" in error
    assert {event["key"] for event in run.events("processor_slow")} == {"7", "8"}
    assert all("hangs" in event["stack"] for event in run.events("processor_slow"))
    wait_until(lambda: bool(run.events("worker_outgrown")), TIMEOUT_S, "a process that is too large")
    with it.source.connect() as connection:
        connection.execute("UPDATE movie SET rev = 1 WHERE id <= %s", [CHANGED])
    expected = {id_: {"id": id_, "rev": int(id_ <= CHANGED)} for id_ in range(1, ROWS + 1)}
    wait_until(lambda: documents(it) == expected, TIMEOUT_S, "all rows")
    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
    assert all(event["mib"] > MEMORY_MIB for event in run.events("worker_outgrown"))
    assert psutil.Process(run.pid).memory_info().rss >> 20 < MEMORY_MIB, "what it had lost is there again"
    assert run.stop() == 0, "the same process all the time"
