"""The slot is gone, invalidated, made anew or moved: a run says so, `check` says the same, and a kill is none of it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from acceptance.harness import PATIENCE_S, Run, Stage
from delta_sync.testing.processes import wait_until

SETUP = "CREATE TABLE movie (id int PRIMARY KEY, title text); INSERT INTO movie VALUES (1, 'one'), (2, 'two');"
LOSSES = {
    "dropped": ("SELECT pg_drop_replication_slot('{slot}')", "is gone"),
    "made anew": (
        "SELECT pg_drop_replication_slot('{slot}'); SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')",
        "made anew",
    ),
    "advanced": ("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_flush_lsn())", "advanced by hand"),
}


def _in_step(it: Stage) -> Run:
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    it.in_step(run)
    return run


def _check(it: Stage) -> tuple[int, str]:
    done = it.pipeline.deltactl("pipeline", "check", it.pipeline.name)
    return done.returncode, done.stdout + done.stderr


def _stop_when_changes_are_lost(it: Stage) -> None:
    file = it.pipeline.home / "pipeline.yaml"
    text = file.read_text()
    assert "source:\n" in text
    file.write_text(text.replace("source:\n", "source:\n  on_lost_log: stop\n", 1))


@pytest.mark.parametrize("loss", ["dropped", "advanced"])
def test_changes_that_may_be_lost_stop_it_and_check_says_what_the_run_says(
    stage: Callable[..., Stage], loss: str
) -> None:
    it = stage(SETUP, ["movie"])
    _stop_when_changes_are_lost(it)
    _in_step(it).stop()
    status, said = _check(it)
    assert status == 0
    assert f"Next: deltactl run {it.pipeline.name}" in said
    statement, expected = LOSSES[loss]
    it.source.execute(
        "UPDATE movie SET title = 'lost' WHERE id = 1", *statement.format(slot=it.pipeline.slot).split(";")
    )
    run = it.run()
    wait_until(lambda: not run.running, PATIENCE_S, "its refusal")
    status, said = _check(it)
    for text in (run.tail(), said):
        assert expected in text
        assert f"deltactl run {it.pipeline.name} --new-slot" in text
    assert status == 1
    assert "Next:" not in said


def test_a_new_epoch_begins_by_itself_unless_that_is_not_wanted(stage: Callable[..., Stage]) -> None:
    it = stage(SETUP, ["movie"])
    _in_step(it).stop()
    statement, expected = LOSSES["made anew"]
    it.source.execute("DELETE FROM movie WHERE id = 1", *statement.format(slot=it.pipeline.slot).split(";"))
    status, said = _check(it)
    assert (status, expected in said, "begins a new epoch by itself" in said) == (0, True, True)
    run = it.run()
    wait_until(lambda: bool(run.events("slot_created")), PATIENCE_S, "its notice")  # till then all looks done
    it.in_step(run)
    (rise,) = run.events("epoch_rises")
    assert expected in rise["reason"]
    assert it.stores.document("cache", "movie", (1,)) is None
    assert run.stop() == 0


@pytest.mark.long
def test_no_kill_makes_it_believe_that_the_slot_was_moved(stage: Callable[..., Stage]) -> None:
    it = stage(SETUP, ["movie"])
    _in_step(it).stop()
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moment = random.Random(seed)
    for number in range(3, 7):
        run = it.run()
        for _ in range(moment.randrange(1, 5)):
            it.source.execute(f"INSERT INTO movie VALUES ({number}, 'x') ON CONFLICT (id) DO UPDATE SET title = 'y'")
            it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)
        it.source.execute("UPDATE movie SET title = title || '.'")
        run.kill()
        assert run.events("epoch_rises") == []
    run = it.run()
    it.in_step(run)
    assert run.events("epoch_rises") == []
