"""One fault at a time, with what it must lead to: `deltactl` as a process, real servers."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from acceptance.harness import SHAPES, Run, Scene, Stage
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import Redis

ACCOUNT = SHAPES[0]
WAIT_S = 300.0  # far above what anything here takes
STATUS_REPLIES = 2  # of the connector to the source, every 5 s: so much time for a wrong confirmation to get there


def change(it: Scene, number: int, text: str) -> int:
    """Update an account; return its new `rev`."""
    with it.shop.connect() as connection:
        assert it.shop.update(connection, ACCOUNT, number, text, whole=True)
    return int(it.shop.rows(ACCOUNT)[(number,)]["rev"])


def wait_for_revision(it: Scene, sink: str, number: int, rev: int, run: Run) -> None:
    wait_until(
        lambda: it.stores.revision(sink, ACCOUNT, number) == rev,
        WAIT_S,
        f"rev {rev} of {number} in {sink}",
    )


def wait_for_event(run: Run, name: str) -> None:
    wait_until(lambda: bool(run.events(name)), WAIT_S, f"the event {name}")


def in_step(it: Scene, run: Run) -> None:
    """Wait until all is confirmed; then every store must be right, and nothing may have been set aside."""
    it.pipeline.wait_until_confirmed(it.shop.insert_lsn(), run)
    assert it.stores.differences() == []
    assert it.pipeline.dead_letters() == []


def test_every_kind_of_change_arrives_and_sigterm_ends_it_well(scene: Callable[..., Scene]) -> None:
    it = scene(50, ("cache", "docs"))
    run = it.run()
    with it.shop.connect() as connection:
        for shape in SHAPES:
            with connection.transaction():
                it.shop.update(connection, shape, 1, "changed", whole=True)
                it.shop.update(connection, shape, 2, "changed", whole=False)
                it.shop.delete(connection, shape, 3)
                it.shop.change_key(connection, shape, 4, 1004)
                it.shop.insert(connection, shape, 3, "again")
    in_step(it, run)
    second = it.pipeline.deltactl("run", it.pipeline.name)
    assert second.returncode == 1
    assert "is running already" in second.stderr
    assert run.running, "a refused run ended the other"
    with it.shop.connect() as connection:
        connection.execute("TRUNCATE note")
    in_step(it, run)
    assert run.stop() == 0
    status = it.pipeline.deltactl("status", it.pipeline.name)
    assert "it was asked to stop" in status.stdout


def test_sigterm_drains_what_is_in_flight(scene: Callable[..., Scene], redis_server: Redis) -> None:
    it = scene(5)
    run = it.run()
    in_step(it, run)
    redis_server.freeze()
    rev = change(it, 1, "in flight")
    end = it.shop.insert_lsn()
    wait_for_event(run, "sink_busy")
    with it.shop.connect() as connection:
        query = "SELECT max(reply_time) FROM pg_stat_replication"
        before = connection.execute(query).fetchone()
        os.kill(run.pid, signal.SIGTERM)
        # Now the capture must stay, or it could not confirm what follows.
        wait_until(lambda: connection.execute(query).fetchone() != before, WAIT_S, "the connector's next reply, or end")
    redis_server.thaw()
    assert run.stop() == 0
    if not run.events("not_drained"):  # the machine is so slow that the budget for it was not enough
        assert it.stores.revision("cache", ACCOUNT, 1) == rev
        assert it.shop.confirmed_lsn(it.pipeline.slot) >= end, "what was drained is not confirmed, so it comes again"


def test_a_load_goes_on_where_its_killed_worker_left_it(scene: Callable[..., Scene], redis_server: Redis) -> None:
    rows = 400
    it = scene(rows, load={"chunk_rows": 10})
    run = it.run()

    def under_way() -> list[str]:
        return [name for name, load in it.pipeline.loads().items() if load.state == "running" and load.rows > 0]

    wait_until(lambda: bool(under_way()), WAIT_S, "a load that is under way")
    redis_server.freeze()  # so that it goes no further
    run.kill()
    tables = under_way()
    before = it.pipeline.loads()
    assert any(0 < before[table].rows < rows for table in tables)
    redis_server.thaw()
    again = it.run()
    in_step(it, again)
    after = it.pipeline.loads()
    started = [event["table"] for event in again.events("load_started")]
    for table in tables:
        assert after[table].started_at == before[table].started_at
        assert after[table].covered_from == before[table].covered_from
        assert after[table].rows == rows, "rows are counted as they are read: none twice, none left out"
        assert table not in started


def declare_handler(it: Scene, handled: Path, gate: Path) -> None:
    """Let the processor note each change of an account in a file; none above the number in `gate`, while that is."""
    processor = it.pipeline.home / "processor.py"
    text = processor.read_text()
    name = re.search(r"^(\w+) = Pipeline\(", text, re.MULTILINE)
    assert name is not None
    handler = f"""

import json
from pathlib import Path

from delta_sync import Transient


@{name[1]}.on("{it.shop.schema}.{ACCOUNT.name}", when=lambda event: event.op != "delete")
def note(event):
    gate = Path({str(gate)!r})
    if gate.exists() and event.after["rev"] > int(gate.read_text()):
        raise Transient("the gate is closed")
    with open({str(handled)!r}, "a") as file:
        print(json.dumps([event.id, event.after["rev"]]), file=file)
"""
    processor.write_text(text + handler)


def test_a_capture_that_dies_is_started_again(scene: Callable[..., Scene]) -> None:
    it = scene(5)
    handled, gate = it.pipeline.home / "handled.jsonl", it.pipeline.home / "closed"
    declare_handler(it, handled, gate)
    run = it.run()
    in_step(it, run)
    assert not handled.exists(), "a load calls no handler"
    first = run.capture_pid()
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for_event(run, "capture_died")
    rev = change(it, 1, "meanwhile")
    wait_for_revision(it, "cache", 1, rev, run)
    assert run.capture_pid() not in (None, first)
    in_step(it, run)
    handlers_have_each_change_in_order_though_the_worker_is_killed(it, run, handled, gate, rev)


def handlers_have_each_change_in_order_though_the_worker_is_killed(
    it: Scene, run: Run, handled: Path, gate: Path, rev: int
) -> None:
    """Killed while a handler stands still: some changes it has had, some are behind, and the sink has them all."""

    def noted() -> list[tuple[str, int]]:
        return [(id_, rev) for id_, rev in map(json.loads, handled.read_text().splitlines())]

    assert {rev for _, rev in noted()} == {rev}
    gate.write_text(str(rev + 2))
    with it.shop.connect() as connection, connection.transaction():  # not in more batches than the worker has in hand
        for number in range(6):
            assert it.shop.update(connection, ACCOUNT, 1, f"change {number}", whole=True)
    revs = list(range(rev + 1, rev + 7))
    wait_for_revision(it, "cache", 1, revs[-1], run)  # the sinks do not wait for handlers
    wait_for_event(run, "handler_busy")
    stays_unconfirmed(it, it.shop.insert_lsn())
    run.kill()
    before = [one for one in noted() if one[1] != rev]
    assert [number for _, number in before] == revs[:2]
    gate.unlink()
    again = it.run()
    in_step(it, again)
    after = [one for one in noted() if one[1] != rev][len(before) :]
    assert [number for _, number in after] == revs[-len(after) :], "in order again, from an earlier change"
    assert len(after) >= 4
    assert sorted(dict(before + after).values()) == revs, "each change at least once, under one id"


def test_a_sink_that_is_down_loses_nothing(scene: Callable[..., Scene], redis_server: Redis) -> None:
    it = scene(100, ("cache", "docs"))
    run = it.run()
    in_step(it, run)
    redis_server.kill()
    with it.shop.connect() as connection:
        for number in range(100):
            with connection.transaction():
                for shape in SHAPES:
                    if number % 3:
                        it.shop.update(connection, shape, number, "while it is down", whole=bool(number % 2))
                    else:
                        it.shop.delete(connection, shape, number)
    wait_for_event(run, "sink_busy")
    redis_server.start()
    wait_for_event(run, "sink_recovered")
    in_step(it, run)


def test_nothing_is_confirmed_before_every_sink_has_it(scene: Callable[..., Scene], redis_server: Redis) -> None:
    it = scene(5, ("cache", "docs"))
    run = it.run()
    in_step(it, run)
    redis_server.freeze()
    rev = change(it, 1, "not everywhere")
    end = it.shop.insert_lsn()  # behind the commit: who confirms this is not sent the change again
    wait_for_revision(it, "docs", 1, rev, run)
    stays_unconfirmed(it, end)
    run.kill()
    assert it.shop.confirmed_lsn(it.pipeline.slot) < end
    redis_server.thaw()
    again = it.run()
    in_step(it, again)
    assert it.stores.revision("cache", ACCOUNT, 1) == rev


def stays_unconfirmed(it: Scene, end: int) -> None:
    """Let the connector tell the source some times how far it is: never to the end of what is not done."""
    replies = set[object]()

    def enough_replies() -> bool:
        assert it.shop.confirmed_lsn(it.pipeline.slot) < end, "confirmed, though it is not done"
        with it.shop.connect() as connection:
            replies.update(connection.execute("SELECT reply_time FROM pg_stat_replication").fetchall())
        return len(replies) > STATUS_REPLIES

    wait_until(enough_replies, WAIT_S, "replies of the connector")


@pytest.mark.parametrize("deleted", ["while it runs", pytest.param("while it is stopped", marks=pytest.mark.long)])
def test_a_lost_state_store_when_no_document_is_left(stage: Callable[..., Stage], deleted: str) -> None:
    """What is left then are tombstones and the load's floor, or the floor alone, and both are of a higher epoch."""
    it = stage("CREATE TABLE movie (id int PRIMARY KEY, title text)", ["movie"])

    def forget() -> None:
        forgotten = it.pipeline.deltactl("pipeline", "delete", it.pipeline.name, "--yes")
        assert forgotten.returncode == 0, forgotten.stderr

    it.source.execute("INSERT INTO movie VALUES (1, 'Casablanca'), (2, 'Notorious')")
    run = it.run()
    it.in_step(run)
    assert run.stop() == 0
    forget()
    if deleted == "while it is stopped":
        it.source.execute("DELETE FROM movie")
    run = it.run()
    it.in_step(run)  # in epoch 2, above that of the documents
    it.source.execute("DELETE FROM movie")
    it.in_step(run)
    assert run.stop() == 0
    forget()
    it.source.execute("INSERT INTO movie VALUES (1, 'Casablanca')")
    run = it.run()
    it.in_step(run)
    it.source.execute("INSERT INTO movie VALUES (2, 'Notorious')", "UPDATE movie SET title = 'Gilda' WHERE id = 1")
    it.in_step(run)
