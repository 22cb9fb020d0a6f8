"""What fails is kept and can be replayed, and what fails too often stops the pipeline: with real stores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_client

from acceptance.harness import PATIENCE_S, Run, Stage
from delta_sync.state import StateStore
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import Redis

SETUP = """
CREATE TABLE movie (id int PRIMARY KEY, title text, extra jsonb);
INSERT INTO movie SELECT i, 'title ' || i, '{}' FROM generate_series(1, 20) i;
"""
# Rows whose title begins with "bad" are more than the first processor can take.
FAILS = "return {'id': row['id'], 'title': row['title'], 'rest': 1 // (not row['title'].startswith('bad'))}"
CORRECTED = "return {'id': row['id'], 'title': row['title'], 'rest': 'corrected'}"
TIMEOUT_S = 300.0


def started(it: Stage) -> Run:
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    return run


def confirmed(it: Stage, run: Run) -> None:
    it.pipeline.wait_until_confirmed(it.source.insert_lsn(), run)


def deltactl(it: Stage, *arguments: str, status: int = 0) -> str:
    done = it.pipeline.deltactl("dead", arguments[0], it.pipeline.name, *arguments[1:])
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def titles(it: Stage, *ids: int, sink: str = "cache") -> list[str | None]:
    documents = [it.stores.document(sink, "movie", (id_,)) for id_ in ids]
    return [None if document is None else document["title"] for document in documents]


def test_the_rest_of_the_batch_goes_on_and_what_failed_can_be_replayed(stage: Callable[..., Stage]) -> None:
    it = stage(SETUP, ["movie"], processor=FAILS)
    it.source.execute("UPDATE movie SET title = 'bad from the start' WHERE id = 3")
    run = started(it)
    it.source.execute(
        "UPDATE movie SET title = CASE id % 5 WHEN 0 THEN 'bad ' ELSE 'good ' END || id WHERE id > 3",
        "INSERT INTO movie VALUES (21, 'bad 21', NULL), (22, 'good 22', NULL)",
    )
    confirmed(it, run)
    letters = {letter["key"]: letter for letter in it.pipeline.dead_letters()}
    assert set(letters) == {"3", "5", "10", "15", "20", "21"}
    assert {(letter["stage"], letter["sink"], letter["attempts"]) for letter in letters.values()} == {
        ("process", None, 1)
    }
    assert all(letter["error"].startswith("ZeroDivisionError") for letter in letters.values())
    assert titles(it, 2, 3, 4, 5, 21, 22) == ["title 2", None, "good 4", "title 5", None, "good 22"]

    listed = deltactl(it, "list")
    assert "ZeroDivisionError" in listed
    shown = deltactl(it, "show", str(letters["5"]["id"]))
    assert '"title": "bad 5"' in shown
    assert "processor.py" in shown  # of the trace
    event: Any = json.loads(deltactl(it, "show", str(letters["21"]["id"]), "--json"))["event"]
    assert event["row"] == {"id": 21, "title": "bad 21", "extra": None}

    again = deltactl(it, "replay", str(letters["5"]["id"]), status=1)  # nothing was corrected
    assert "fails again" in again
    assert next(letter for letter in it.pipeline.dead_letters() if letter["key"] == "5")["attempts"] == 2

    it.pipeline.write_processor("raise KeyError('another error')")
    deltactl(it, "replay", str(letters["5"]["id"]), status=1)
    newest = json.loads(deltactl(it, "show", str(letters["5"]["id"]), "--json"))
    assert newest["attempts"] == 3
    assert newest["error"].startswith("KeyError")
    assert "another error" in newest["trace"]
    assert "ZeroDivision" not in newest["trace"]
    assert newest["created_at"] == letters["5"]["created_at"]

    it.pipeline.write_processor(CORRECTED)
    it.source.execute(  # while the old processor still runs
        "UPDATE movie SET title = 'good again' WHERE id = 10",
        "DELETE FROM movie WHERE id = 15",
    )
    confirmed(it, run)
    deltactl(it, "discard", str(letters["20"]["id"]), "--yes")
    deltactl(it, "replay", "--all", "--stage", "process")
    assert it.pipeline.dead_letters() == []
    # 10 and 15 have newer changes, which stay; 20 was discarded, so its document is the one from before.
    assert titles(it, 3, 5, 10, 15, 20, 21) == [
        "bad from the start",
        "bad 5",
        "good again",
        None,
        "title 20",
        "bad 21",
    ]
    assert deltactl(it, "list") == ""
    assert run.stop() == 0


# Values that are masked: short ones, and such as stand out of line, so that their rows are read by key.
PLANTED = "planted-7f3a"
MASKED = f"""
{SETUP}
ALTER TABLE movie ADD owner text, ADD contract text, ADD pay numeric;
ALTER TABLE movie ALTER contract SET STORAGE EXTERNAL;
UPDATE movie SET owner = '{PLANTED}-o', pay = 7310317, contract = repeat('{PLANTED} ', 500);
"""
SHAPE = {
    "mask": {"owner": {"hash": "${env:MASK_SECRET}"}, "contract": {"redact": "(kept)"}, "pay": "redact"},
    "rename": {"pay": "salary"},
}
MASK_SECRET = "a secret of some length"


def anywhere(it: Stage, run: Run) -> str:
    """Return all that Delta has written and says, as text: stores, state store, log, dead letters, status, metrics."""
    said = [it.pipeline.log.read_bytes(), *(file.read_bytes() for file in it.pipeline.home.glob("state.db*"))]
    said += [
        repr(it.stores.document(sink, "movie", (id_,))).encode() for sink in it.stores.sinks for id_ in range(1, 21)
    ]
    for letter in it.pipeline.dead_letters():
        said.append(deltactl(it, "show", str(letter["id"]), "--json").encode())
    for command in (
        ["status", it.pipeline.name, "--json"],
        ["dead", "list", it.pipeline.name],
        ["verify", it.pipeline.name],
    ):
        done = it.pipeline.deltactl(*command)
        said.append((done.stdout + done.stderr).encode())
    assert run.running
    return b"\n".join(said).decode(errors="replace")


def test_what_one_store_rejects_is_a_dead_letter_of_that_store_alone(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is masked is nowhere in the clear, whatever happens to its row."""
    monkeypatch.setenv("MASK_SECRET", MASK_SECRET)
    # The index makes an object of what it first sees in `tag`, and then takes nothing else there.
    tag = "{'year': 1942} if row['id'] == 1 else 'text' if row['title'].startswith('conflict') else None"
    it = stage(
        MASKED,
        ["movie"],
        ("cache", "docs", "search"),
        schema="studio",
        tables_options={"studio.movie": {"shape": SHAPE}},
        processor=f"return dict(row, tag={tag}, fails=int(repr(row)) if row['title'].startswith('spoilt') else 0)",
    )
    run = started(it)
    it.source.execute(
        "UPDATE movie SET title = 'conflict ' || id WHERE id IN (2, 3)",
        "UPDATE movie SET title = 'spoilt' WHERE id = 5",
        f"UPDATE movie SET owner = '{PLANTED}-again', pay = pay + 1 WHERE id = 6",
    )
    confirmed(it, run)
    letters = it.pipeline.dead_letters()
    assert {(letter["key"], letter["stage"], letter["sink"]) for letter in letters} == {
        ("2", "apply", "search"),
        ("3", "apply", "search"),
        ("5", "process", None),
    }
    assert any("tag" in letter["error"] for letter in letters)
    documents = [it.stores.document("cache", "movie", (id_,)) or {} for id_ in (4, 6)]
    assert [(one["contract"], one["salary"], one["owner"][:5]) for one in documents] == [("(kept)", "***", "hmac:")] * 2
    assert documents[0]["owner"] != documents[1]["owner"]
    everything = anywhere(it, run)
    assert documents[0]["owner"] in everything
    assert not [value for value in (PLANTED, "731031", MASK_SECRET) if value in everything]
    for sink in ("cache", "docs"):
        assert titles(it, 2, 3, 4, sink=sink) == ["conflict 2", "conflict 3", "title 4"]
    assert titles(it, 2, 3, 4, sink="search") == ["title 2", "title 3", "title 4"]
    it.source.execute("UPDATE movie SET title = 'newer' WHERE id = 3")
    confirmed(it, run)
    it.pipeline.write_processor("return {'id': row['id'], 'title': row['title']}")
    deltactl(it, "replay", "--all", "--sink", "search")
    assert titles(it, 2, 3, 4, sink="search") == ["conflict 2", "newer", "title 4"]
    found = it.stores.document("cache", "movie", (2,)) or {}
    assert found["tag"] == "text", "the replay was for one sink"
    deltactl(it, "discard", "--all", "--yes")
    assert it.pipeline.dead_letters() == []
    assert run.stop() == 0


@pytest.mark.parametrize(
    "while_loading",
    [pytest.param(False, id="from the log"), pytest.param(True, id="in the first load", marks=pytest.mark.long)],
)
def test_too_many_failures_stop_the_pipeline(while_loading: bool, stage: Callable[..., Stage]) -> None:
    it = stage(SETUP, ["movie"], processor=FAILS, errors={"max_dead_letters_per_minute": 5})
    spoil = "UPDATE movie SET title = 'bad ' || id WHERE id > 10"
    if while_loading:
        it.source.execute(spoil)
        run = it.run()
    else:
        run = started(it)
        it.source.execute(spoil)
    wait_until(lambda: not run.running, TIMEOUT_S, "stopping")
    assert run.exit_status == 1
    said = [line for line in run.tail().splitlines() if "errors.max_dead_letters_per_minute is 5" in line]
    assert len(said) == 1, run.tail()
    assert "ZeroDivisionError" in said[0]
    assert "Traceback" not in run.tail()
    # Of a batch before the one that was too much, if the rows came in several.
    assert len(it.pipeline.dead_letters()) <= 5
    position = it.source.confirmed_lsn(it.pipeline.slot)
    assert position > 0, "the slot stays"
    again = it.run()  # the same once more, for nothing was corrected
    wait_until(lambda: not again.running, TIMEOUT_S, "stopping")
    assert again.exit_status == 1
    it.pipeline.write_processor(CORRECTED)
    run = it.run()
    confirmed(it, run)
    assert titles(it, 11, 20) == ["bad 11", "bad 20"]
    assert len(it.pipeline.dead_letters()) <= 5
    assert run.stop() == 0


def test_a_reload_keeps_the_documents_of_rows_that_became_dead_letters(stage: Callable[..., Stage]) -> None:
    """They look like those of rows that are gone: nothing wrote them since the reload began."""
    it = stage(SETUP, ["movie"], processor=FAILS)
    run = started(it)
    assert run.stop() == 0
    it.pipeline.write_processor("return {'id': row['id'], 'title': row['title'], 'rest': 1 // (row['id'] != 3)}")
    run = it.run("--reload")
    wait_until(lambda: bool(run.events("load_finished")), TIMEOUT_S, "the end of the load")
    assert [event["dead_letters"] for event in run.events("unmet_kept")] == [1]
    assert titles(it, 2, 3, 4) == ["title 2", "title 3", "title 4"]
    wait_until(lambda: bool(run.events("streaming")), TIMEOUT_S, "its line in the log")
    assert run.stop() == 0
    assert [len(run.events(name)) for name in ("loading", "streaming", "stopped")] == [1, 1, 1]
    (stopped,) = run.events("stopped")
    assert (stopped["state"], stopped["dead_letters"]) == ("stopped", 1)


@pytest.mark.long
def test_a_restart_does_not_make_room_for_more_of_them(stage: Callable[..., Stage]) -> None:
    """Else a service manager that starts it again and again turns everything into dead letters."""
    it = stage(SETUP, ["movie"], processor=FAILS, errors={"max_dead_letters_per_minute": 5})
    run = started(it)
    it.source.execute("UPDATE movie SET title = 'bad ' || id WHERE id <= 4")
    confirmed(it, run)
    assert run.stop() == 0
    it.source.execute("UPDATE movie SET title = 'bad ' || id WHERE id = 5")
    run = it.run()
    confirmed(it, run)
    assert run.stop() == 0
    assert len(it.pipeline.dead_letters()) == 5, "as many as are allowed"
    it.source.execute("UPDATE movie SET title = 'bad ' || id WHERE id = 6")
    run = it.run()
    wait_until(lambda: not run.running, TIMEOUT_S, "stopping")
    assert run.exit_status == 1
    assert "6 changes failed within a minute" in run.tail()
    assert len(it.pipeline.dead_letters()) == 5
    it.pipeline.write_processor(CORRECTED)
    run = it.run()
    confirmed(it, run)
    assert titles(it, 6) == ["bad 6"]


def test_a_password_that_is_wrong_from_now_on(stage: Callable[..., Stage], redis_server: Redis) -> None:
    """Retrying cannot help: the pipeline stops and says which sink refuses, and goes on when it is put right."""
    it = stage(SETUP, ["movie"])
    run = started(it)
    admin = redis_client.Redis.from_url(redis_server.url)
    admin.config_set("requirepass", "changed")
    try:
        admin.client_kill_filter(_type="normal", skipme=True)
        it.source.execute("UPDATE movie SET title = 'after the change'")
        wait_until(lambda: not run.running, TIMEOUT_S, "stopping")
        assert run.exit_status == 1
        (said,) = (line for line in run.tail().splitlines() if line.startswith("Error"))
        assert "cache" in said
        assert "NOAUTH" in said or "password" in said.lower()
        assert "changed" not in said
        refused = it.run()
        wait_until(lambda: not refused.running, TIMEOUT_S, "refusing to start")
        assert refused.exit_status == 1
    finally:
        admin.config_set("requirepass", "")
        admin.close()
    assert it.pipeline.dead_letters() == []
    run = it.run()
    it.in_step(run)
    assert titles(it, 1, 20) == ["after the change", "after the change"]
    assert run.stop() == 0


def test_a_replay_that_a_sink_ends_says_how_far_it_came(stage: Callable[..., Stage], redis_server: Redis) -> None:
    """One letter is for MongoDB, which answers; the other for both, and Redis is down."""
    it = stage(SETUP, ["movie"], ("cache", "docs"), processor=FAILS)
    run = started(it)
    it.source.execute("UPDATE movie SET title = 'bad ' || id WHERE id = 3")
    confirmed(it, run)
    assert run.stop() == 0
    with StateStore.open("sqlite:///state.db", it.pipeline.home) as state:
        (letter,) = state.dead_letters(it.pipeline.name)
        state.discard(it.pipeline.name, [letter.id])
        state.add_dead_letters(it.pipeline.name, [dataclasses.replace(letter, sink="docs"), letter])
    it.pipeline.write_processor(CORRECTED)
    redis_server.kill()
    done = it.pipeline.deltactl("dead", "replay", it.pipeline.name, "--all")
    assert done.returncode == 1
    assert "Replayed 1 dead letter; 0 failed again" in done.stdout
    assert "1 were not tried and stay" in done.stderr
    assert "Redis" in done.stderr
    (left,) = it.pipeline.dead_letters()
    assert (left["sink"], left["attempts"]) == (None, 1)
    redis_server.start()
    deltactl(it, "replay", "--all")
    assert titles(it, 3) == ["bad 3"]
