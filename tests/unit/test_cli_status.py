"""`deltactl status` and `deltactl dead`, with a state store and no worker."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

from delta_sync.changes import Change
from delta_sync.delta_event import DeltaEvent, encode_event
from delta_sync.state import DeadLetter, StateStore
from delta_sync.versions import version_of
from deltactl.main import main
from deltactl.status import as_text, current

NOW = dt.datetime(2026, 3, 1, 12, 0, 0, tzinfo=dt.UTC)
STATUS: dict[str, Any] = {
    "state": "streaming",
    "since": "2026-03-01T11:00:00Z",
    "reason": None,
    "lag_bytes": 2048,
    "lag_s": 0.25,
    "rates": {"changes_per_s": 12.5},
    "totals": {"changes": 12345, "writes": 12000, "dead_letters": 3},
    "sinks": {
        "cache": {
            "state": "ok",
            "applied": 12000,
            "stale": 5,
            "rejected": 3,
            "reason": None,
            "writes_per_s": 12.0,
        }
    },
    "loads": {"public.movie": {"state": "running", "rows": 500, "estimate": 1000}},
    "pid": 4711,
    "at": "2026-03-01T12:00:00Z",
}
SPEC = """
name: movies
source: {url: postgresql://delta@db/studio}
tables: {public.movie: {}}
sinks: {cache: {url: redis://cache/0}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of pipeline `movies`, in the default place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DELTA_PIPELINES", raising=False)
    home = tmp_path / "pipelines" / "movies"
    home.mkdir(parents=True)
    (home / "pipeline.yaml").write_text(SPEC)
    return home


def deltactl(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def now_of(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"running": True, "now": NOW, "saved_at": NOW, "document": STATUS, **changes}
    document, saved_at = arguments.pop("document"), arguments.pop("saved_at")
    return current("movies", document, saved_at, 3, **arguments)


def test_a_running_pipeline_is_shown_as_it_says() -> None:
    found = now_of()
    assert {key: found[key] for key in STATUS} == STATUS
    assert found["age_s"] == 0
    lines = as_text(found).splitlines()
    for expected in (
        "state              streaming",
        "lag                2.0 KiB, 0.2 s",
        "changes            12,345 (12/s)",
        "dead letters       3 (see: deltactl dead list movies)",
        "sink cache         ok, 12,000 applied, 5 stale, 3 rejected, 12/s",
        "load public.movie  running, 500 rows of about 1,000 (50 %)",
    ):
        assert expected in lines


def test_a_killed_worker_is_not_taken_for_a_running_one() -> None:
    found = now_of(running=False)
    assert found["state"] == "stopped"
    assert "while it was streaming" in found["reason"]
    assert found["lag_s"] is None
    assert "4711" not in as_text(found)


def test_a_worker_that_stopped_keeps_its_reason() -> None:
    failed = {**STATUS, "state": "failed", "reason": "replication slot gone"}
    found = now_of(running=False, document=failed)
    assert (found["state"], found["reason"]) == ("failed", "replication slot gone")


def test_a_worker_that_is_stuck_is_said_to_be() -> None:
    found = now_of(now=NOW + dt.timedelta(minutes=1))
    assert found["state"] == "streaming"
    assert found["reason"] == "the process runs, but has said nothing for 60 s"


def test_a_pipeline_that_never_ran() -> None:
    assert now_of(document=None, saved_at=None, running=False)["reason"] == "it never ran"
    assert now_of(document=None, saved_at=None)["state"] == "starting"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "public.actor"], "--table: pipeline movies has no 'public.actor'; it has public.movie."),
        (["--sink", "docs"], "--sink: pipeline movies has no 'docs'; it has cache."),
        (["--sample", "0"], "'0' is no share; write it like 0.1 or 10%."),
        (["--sample", "101%"], "'101%' is no share"),
        (["--patience", "soon"], "'soon' is not a duration"),
        ([], "Pipeline movies never ran here, so there is nothing to verify."),
    ],
)
def test_what_cannot_be_verified(folder: Path, arguments: list[str], words: str) -> None:
    (folder / "processor.py").write_text(
        "from delta_sync import Pipeline\n\np = Pipeline('movies')\n\n\n"
        "@p.table('public.movie')\ndef movie(row):\n    return row\n"
    )
    done = deltactl("verify", "movies", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lookup", "stars", "--keys", "1"], "pipeline movies has no look-up 'stars'; it has ratings, unused."),
        (["--lookup", "unused", "--keys", "1"], "No table is enriched by look-up unused"),
        (["--lookup", "ratings"], "Give --keys or --keys-file"),
        (["--lookup", "ratings", "--keys", "1", "--keys-file", "keys.txt"], "Give --keys or --keys-file"),
        (["--lookup", "ratings", "--keys", " , "], "--keys names no key."),
        (["--lookup", "ratings", "--keys", ",".join(["1"] * 100_001)], "100,001 keys are more than 100,000"),
        (["--lookup", "ratings", "--keys", "1"], "Pipeline movies never ran"),
    ],
)
def test_what_cannot_be_refreshed(folder: Path, arguments: list[str], words: str) -> None:
    (folder / "processor.py").write_text(
        "from delta_sync import Pipeline\n\np = Pipeline('movies')\n\n\n"
        "@p.lookup()\ndef ratings(keys):\n    return {}\n\n\n"
        "@p.lookup()\ndef unused(keys):\n    return {}\n\n\n"
        "@p.table('public.movie', enrich={'rating': ratings.by('id')})\ndef movie(row, rating):\n    return row\n"
    )
    done = deltactl("refresh", "movies", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.usefixtures("folder")
def test_a_repair_asks_first() -> None:
    done = deltactl("verify", "movies", "--repair")
    assert done.exit_code == 1
    assert "add --yes to do it" in done.stderr


def test_a_load_may_find_more_rows_than_was_estimated() -> None:
    loads = {"public.movie": {"state": "running", "rows": 5000, "estimate": 1000}}
    assert "(99 %)" in as_text(now_of(document={**STATUS, "loads": loads}))


def test_status_tells_what_readers_of_a_rebuilt_sink_see() -> None:
    rows = {
        "cache": {"sink": "cache", "serving": 1, "other": 2, "state": "building", "newest": 2},
        "search": {"sink": "search", "serving": 3, "other": None, "state": "", "newest": 3},
    }
    lines = as_text({**now_of(), "generations": rows}).splitlines()
    assert [" ".join(line.split()) for line in lines if line.startswith("readers")] == [
        "readers of cache see generation 1; 2 is being built",
        "readers of search see generation 3",
    ]


def test_dumps_are_shown_with_what_they_wait_for() -> None:
    dump = {
        "dump": 3, "table": "public.movie", "kind": "table", "state": "running", "rows": 500, "estimate": 1000,
        "rows_per_s": 99.6, "waits": "pid 7 (xid 9, open for 5 s): UPDATE movie",
    }  # fmt: skip
    text = as_text(now_of(document={**STATUS, "dumps": [dump]}))
    assert "public.movie, running, 500 rows of about 1,000 (50 %), 100/s; waits: pid 7 (xid 9, open" in text


def test_status_creates_nothing(folder: Path) -> None:
    result = deltactl("status", "movies")
    assert result.exit_code == 0
    assert "it never ran" in result.stdout
    assert [path.name for path in folder.iterdir()] == ["pipeline.yaml"]


def test_status_reads_what_was_saved(folder: Path) -> None:
    with StateStore.open("sqlite:///state.db", folder) as store:
        store.save_status("movies", STATUS)
    assert json.loads(deltactl("status", "movies", "--json").stdout)["state"] == "stopped"
    with FileLock(folder / "run.lock"):
        found = json.loads(deltactl("status", "movies", "--json").stdout)
    assert found["running"]
    assert found["state"] == "streaming"
    assert found["sinks"] == STATUS["sinks"]


def letter_of(number: int, table: str = "public.movie", sink: str | None = "cache", row: Any = None) -> DeadLetter:
    change = Change(table, (number,), version_of(1, 256 + number), {"id": number, "title": "A"} if row is None else row)
    return DeadLetter(
        table=table,
        key_text=str(number),
        version=change.version,
        sink=sink,
        stage="apply" if sink else "process",
        error=f"too big ({number})\nsecond line",
        trace="Traceback (most recent call last): …",
        event=encode_event(DeltaEvent.of("movies", change, NOW, "log")),
        created_at=NOW,
    )


@pytest.fixture
def letters(folder: Path) -> list[int]:
    """Five dead letters; return their ids."""
    with StateStore.open("sqlite:///state.db", folder) as store:
        store.add_dead_letters("movies", [letter_of(n) for n in (1, 2, 3)])
        store.add_dead_letters("movies", [letter_of(4, "public.genre"), letter_of(5, sink=None)])
        return sorted(letter.id for letter in store.dead_letters("movies"))


def ids_of(*arguments: str) -> list[int]:
    return sorted(found["id"] for found in json.loads(deltactl("dead", "list", "movies", "--json", *arguments).stdout))


def test_dead_letters_are_listed_and_filtered(letters: list[int]) -> None:
    assert ids_of() == letters
    assert ids_of("--table", "public.genre") == letters[3:4]
    assert ids_of("--stage", "process") == letters[4:]
    assert ids_of("--sink", "cache", "--table", "public.movie") == letters[:3]
    assert ids_of("--limit", "2") == letters[3:]
    text = deltactl("dead", "list", "movies", "--limit", "1")
    assert text.stdout.splitlines()[0].startswith("ID\tTABLE")
    assert "second line" not in text.stdout
    assert "1 of 5 dead letters; --limit shows more" in text.stderr
    assert deltactl("dead", "list", "movies", "--table", "public.genre").stderr == ""
    filtered = deltactl("dead", "list", "movies", "--sink", "cache", "--limit", "1")
    assert "1 of 4 dead letters like that; --limit shows more" in filtered.stderr


@pytest.mark.parametrize("command", [["list"], ["discard", "--all", "--yes"], ["replay", "--all"]])
@pytest.mark.parametrize("kept", [True, False])
def test_a_filter_that_can_leave_nothing_is_refused(
    folder: Path, request: pytest.FixtureRequest, command: list[str], kept: bool
) -> None:
    letters = request.getfixturevalue("letters") if kept else []
    for option, known in (("--table", "public.movie"), ("--sink", "cache")):
        refused = deltactl("dead", command[0], "movies", *command[1:], option, "nope")
        assert refused.exit_code == 2
        assert "'nope'" in refused.stderr
        assert known in refused.stderr
    assert ids_of() == letters
    assert folder.exists()


def test_filters_look_at_every_page(letters: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltactl.dead.PAGE", 2)
    assert ids_of() == letters
    assert ids_of("--table", "public.movie", "--limit", "4") == [*letters[:3], letters[4]]


def test_a_dead_letter_is_shown_whole(letters: list[int]) -> None:
    found = json.loads(deltactl("dead", "show", "movies", str(letters[0]), "--json").stdout)
    assert found["event"]["row"] == {"id": 1, "title": "A"}
    assert found["trace"].startswith("Traceback")
    text = deltactl("dead", "show", "movies", str(letters[0])).stdout
    assert "epoch 1, 0/101" in text
    assert "second line" in text
    missing = deltactl("dead", "show", "movies", "999")
    assert missing.exit_code == 2
    assert "no dead letter 999" in missing.stderr


def test_dead_letters_are_discarded_as_asked(letters: list[int]) -> None:
    refused = deltactl("dead", "discard", "movies", str(letters[0]))
    assert refused.exit_code == 1
    assert "--yes" in refused.stderr
    assert deltactl("dead", "discard", "movies").exit_code == 2
    assert deltactl("dead", "discard", "movies", "1", "--all").exit_code == 2
    assert deltactl("dead", "discard", "movies", "1", "--table", "public.movie").exit_code == 2
    some_unknown = deltactl("dead", "discard", "movies", str(letters[0]), "999", "--yes")
    assert some_unknown.exit_code == 2
    assert "nothing was changed" in some_unknown.stderr
    assert deltactl("dead", "discard", "movies", "--all", "--dry-run").exit_code == 0
    assert ids_of() == letters
    assert deltactl("dead", "discard", "movies", "1", "--dry-run").stdout == "Would discard 1 dead letter.\n"
    assert deltactl("dead", "discard", "movies", str(letters[0]), "--yes").stdout == "Discarded 1 dead letter.\n"
    assert ids_of() == letters[1:]
    assert deltactl("dead", "discard", "movies", "--all", "--table", "public.movie", "--yes").exit_code == 0
    assert ids_of() == letters[3:4]


def test_no_dead_letters(folder: Path) -> None:
    assert json.loads(deltactl("dead", "list", "movies", "--json").stdout) == []
    assert deltactl("dead", "discard", "movies", "--all", "--yes").stdout == "Discarded 0 dead letters.\n"
    assert deltactl("dead", "discard", "movies", "1", "--yes").exit_code == 2
    assert not (folder / "state.db").exists()
