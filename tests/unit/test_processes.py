"""`deltactl worker --processes`: children that end together, whoever ends first. They are real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from delta_sync.errors import PipelineStopped
from delta_sync.testing.processes import wait_until
from deltactl.processes import run_together

TIMEOUT_S = 60.0

# Notes that it is up, then waits for SIGTERM, and notes that it came.
PATIENT = """
import pathlib, signal, sys
file = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (file.write_text("told"), sys.exit(0)))
file.write_text("up")
while True:
    signal.pause()
"""
# Fails as soon as the other one is up.
FAILING = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
sys.exit(3)
"""
PARENT = "import ast, sys; from deltactl.processes import run_together; run_together(ast.literal_eval(sys.argv[1]))"


def command(program: str, file: Path) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", program, str(file)]


def says(file: Path, text: str) -> None:
    wait_until(lambda: file.exists() and file.read_text() == text, TIMEOUT_S, f"{file.name}: {text}")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[Path]]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield [tmp_path / "first", tmp_path / "second"]
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_that_fails_ends_the_others(files: list[Path]) -> None:
    with pytest.raises(PipelineStopped, match="status 3"):
        run_together([command(PATIENT, files[0]), command(FAILING, files[0])])
    says(files[0], "told")


def test_a_signal_ends_all(files: list[Path]) -> None:
    def told() -> None:
        for file in files:
            says(file, "up")
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=told)
    teller.start()
    run_together([command(PATIENT, file) for file in files])
    teller.join()
    assert [file.read_text() for file in files] == ["told", "told"]


def test_they_end_when_their_parent_is_killed(files: list[Path]) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, repr([command(PATIENT, file) for file in files])])
    for file in files:
        says(file, "up")
    parent.kill()
    parent.wait()
    for file in files:
        says(file, "told")
