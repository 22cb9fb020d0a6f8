"""What a person at a terminal meets: questions, tables, and a status that is shown again and again."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from delta_sync.changes import Change
from delta_sync.delta_event import DeltaEvent, encode_event
from delta_sync.state import DeadLetter, StateStore
from delta_sync.versions import version_of

BINARY = str(Path(sys.executable).parent / "deltactl")
PATIENCE_S = 60.0  # for a process to print something: a second, unless the machine is overloaded
NOW = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
SPEC = """
name: movies
source: {url: postgresql://delta@db/studio}
tables: {public.movie: {}}
sinks: {cache: {url: redis://cache/0}}
"""


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        ours, theirs = pty.openpty()
        self._fd = ours
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [BINARY, *arguments],
            cwd=cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.output = ""

    def read_until(self, text: str) -> None:
        """Read until the command has printed `text`."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            if not self._read():
                raise AssertionError(f"it ended with: {self.output}")

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        """Read the rest and return the exit status."""
        while self._read():
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._fd], [], [], PATIENCE_S)
        assert ready, self.output
        with contextlib.suppress(OSError):  # EIO: the other side has closed
            data = os.read(self._fd, 65536)
            self.output += data.decode(errors="replace")
            return bool(data)
        return False

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with pipeline `movies`, which has one dead letter and a status."""
    home = tmp_path / "pipelines" / "movies"
    home.mkdir(parents=True)
    (home / "pipeline.yaml").write_text(SPEC)
    change = Change("public.movie", (1,), version_of(1, 256), {"id": 1, "title": "[bold]not markup"})
    letter = DeadLetter(
        table="public.movie",
        key_text="1",
        version=change.version,
        stage="process",
        error="KeyError: '[red]title'",
        event=encode_event(DeltaEvent.of("movies", change, NOW, "log")),
        created_at=NOW,
    )
    with StateStore.open("sqlite:///state.db", home) as store:
        store.add_dead_letters("movies", [letter])
        store.save_status("movies", {"state": "failed", "reason": "the slot is gone"})
    return tmp_path


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    """Terminals to be closed after the test."""
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def letters(folder: Path) -> int:
    with StateStore.open("sqlite:///state.db", folder / "pipelines" / "movies") as store:
        return store.count_dead_letters("movies")


@pytest.mark.parametrize(("answer", "status", "left"), [("y\n", 0, 0), ("n\n", 1, 1), ("\n", 1, 1), ("\x04", 130, 1)])
def test_a_question_is_asked_and_the_answer_obeyed(
    folder: Path, terminals: list[Terminal], answer: str, status: int, left: int
) -> None:
    terminals.append(Terminal("dead", "discard", "movies", "--all", cwd=folder))
    terminals[0].read_until("Discard 1 dead letter of pipeline movies? [y/N]")
    terminals[0].type(answer)
    assert terminals[0].end() == status, terminals[0].output
    assert letters(folder) == left
    assert "Traceback" not in terminals[0].output


def test_tables_are_drawn_and_texts_are_no_markup(folder: Path, terminals: list[Terminal]) -> None:
    terminals.append(Terminal("dead", "list", "movies", cwd=folder))
    assert terminals[0].end() == 0
    assert "━" in terminals[0].output
    assert "[red]" in terminals[0].output


def test_ctrl_c_ends_a_watch_quietly(folder: Path, terminals: list[Terminal]) -> None:
    terminals.append(Terminal("status", "movies", "--watch", cwd=folder))
    terminals[0].read_until("the slot is gone")
    os.kill(terminals[0].process.pid, signal.SIGINT)
    assert terminals[0].end() == 130, terminals[0].output
    assert "Traceback" not in terminals[0].output


def test_a_watch_for_programs_prints_a_line_each_time(folder: Path) -> None:
    process = subprocess.Popen(
        [BINARY, "status", "movies", "--watch", "--json"], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for _ in range(2):
            assert json.loads(process.stdout.readline())["reason"] == "the slot is gone"
    finally:
        process.kill()
        process.communicate()


def test_without_a_terminal_nothing_is_asked(folder: Path) -> None:
    done = subprocess.run(
        [BINARY, "dead", "discard", "movies", "--all"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "--yes" in done.stderr
    assert letters(folder) == 1
