"""What an embedded connector is given and what is saved of it: its files are nobody's truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delta_sync.capture import Batch, CaptureDied
from delta_sync.errors import PipelineStopped, UndecodableChange
from delta_sync.sources.mysql.claims import events_of_binlog
from delta_sync.state import StateStore
from delta_sync.state_connector import ConnectorRun, ConnectorState


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ConnectorState]:
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        yield ConnectorState(state, "movies")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "schema_history.dat"


def batch(offset: int) -> Batch:
    value = json.dumps({"file": "binlog.000012", "pos": offset})
    return Batch(1, 1, 1, b"[]", json.dumps(['["movies",{}]', value]).encode())


def add(file: Path, text: str) -> None:
    with file.open("a") as history:
        history.write(text)


def position(store: ConnectorState) -> int | None:
    found = store.newest()
    return None if found is None else found.offset["pos"]


def test_a_first_connector_begins_with_nothing_whatever_files_there_are(store: ConnectorState, file: Path) -> None:
    file.write_text("of another server\n")
    assert ConnectorRun(store, file).begin() is None
    assert file.read_bytes() == b""
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_position_is_saved_with_the_history_that_was_written_before_it(store: ConnectorState, file: Path) -> None:
    run = ConnectorRun(store, file)
    run.begin()
    add(file, "one\ntwo\n")
    assert run.save(batch(100)) == {"file": "binlog.000012", "pos": 100}
    assert store.begin("look").history == b"one\ntwo\n"


def test_a_line_that_is_being_written_is_of_what_comes_later(store: ConnectorState, file: Path) -> None:
    run = ConnectorRun(store, file)
    run.begin()
    add(file, "one\ntw")
    run.save(batch(100))
    add(file, "o\n")
    run.save(batch(200))
    add(file, "thr")
    run.save(batch(300))
    assert run.begin() == batch(300).place
    assert file.read_bytes() == b"one\ntwo\n"


def test_what_was_not_saved_is_not_in_the_next_ones_history(store: ConnectorState, file: Path) -> None:
    """The log has it behind the position, and the connector reads it again."""
    run = ConnectorRun(store, file)
    run.begin()
    add(file, "one\n")
    run.save(batch(100))
    add(file, "two\nthr")  # killed
    assert run.begin() == batch(100).place
    assert file.read_bytes() == b"one\n"
    add(file, "two\n")
    run.save(batch(200))
    assert run.begin() == batch(200).place
    assert file.read_bytes() == b"one\ntwo\n"


def test_an_old_connector_that_still_writes_spoils_nothing(store: ConnectorState, file: Path) -> None:
    run = ConnectorRun(store, file)
    run.begin()
    with file.open("a") as old:
        run.begin()
        old.write("late\n")
    assert file.read_bytes() == b""


@pytest.mark.parametrize("gone", [True, False])
def test_a_history_that_somebody_changed_makes_the_connector_start_anew(
    store: ConnectorState, file: Path, gone: bool
) -> None:
    run = ConnectorRun(store, file)
    run.begin()
    add(file, "one\n")
    run.save(batch(100))
    file.unlink()
    if not gone:
        file.write_text("on")
    with pytest.raises(CaptureDied, match="the connector"):
        run.save(batch(200))
    assert position(store) == 100
    assert run.begin() == batch(100).place
    assert file.read_bytes() == b"one\n"


def test_of_two_runs_the_later_one_goes_on(store: ConnectorState, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = (ConnectorRun(store, tmp_path / place / "schema_history.dat") for place in ("here", "there"))
    here.begin()
    add(tmp_path / "here" / "schema_history.dat", "one\n")
    here.save(batch(100))
    assert there.begin() == batch(100).place
    assert (tmp_path / "there" / "schema_history.dat").read_bytes() == b"one\n"
    with pytest.raises(PipelineStopped, match="started by another process"):
        here.save(batch(200))
    there.save(batch(150))
    assert position(store) == 150


def test_heartbeats_are_no_events_and_others_have_their_place_as_a_position() -> None:
    source = {"db": "studio", "table": "movie", "file": "binlog.000012", "pos": 345, "row": 2, "ts_ms": 7, "gtid": "g"}
    records: list[dict[str, Any]] = [
        {"ts_ms": 1},
        {"before": None, "after": {"id": 1}, "op": "c", "source": source},
        {"before": None, "after": None, "op": "t", "source": source},  # its row is that of the change before
    ]
    inserted, emptied = events_of_binlog(records)
    assert inserted["source"] == {"schema": "studio", "table": "movie", "lsn": 12 << 32 | 347, "txId": 0, "ts_ms": 7}
    assert emptied["source"]["lsn"] == 12 << 32 | 345
    with pytest.raises(UndecodableChange, match="place in the log"):
        events_of_binlog([{"op": "c", "source": {**source, "file": "nonsense"}}])
