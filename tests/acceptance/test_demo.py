"""`make demo`'s program, run as a process: what it says, how it ends, and that nothing is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from delta_sync.testing.processes import wait_until

REPOSITORY = Path(__file__).parents[2]
DEMO_TIMEOUT_S = 280.0  # it takes half a minute; no test may depend on speed
MARK = "DELTA_DEMO_MARK"  # an environment variable by which all processes of one demo are found


class Place(NamedTuple):
    """Where a demo runs: its environment, and the folder for all temporary files."""

    environment: dict[str, str]
    temporary: Path

    def processes(self) -> list[psutil.Process]:
        """Return the processes that descend from this demo, wherever they belong now."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if self._is_of(process):
                    found.append(process)
            except psutil.Error:
                continue  # it ended, or is not ours to look at
        return found

    def _is_of(self, process: psutil.Process) -> bool:
        # Servers that write their state where `ps` shows it overwrite their environment: they work below the folder.
        return process.environ().get(MARK) == self.environment[MARK] or process.cwd().startswith(str(self.temporary))

    def assert_nothing_is_left(self) -> None:
        """Whatever the end was."""
        assert self.processes() == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="delta-test-"))  # not below tmp_path, which PostgreSQL's user cannot enter
    folder.chmod(0o711)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "DELTA"))}
    yield Place({**environment, MARK: uuid.uuid4().hex, "TMPDIR": str(folder)}, folder)
    shutil.rmtree(folder)


def demo(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=REPOSITORY,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )


def test_it_proves_that_source_and_cache_are_equal(place: Place) -> None:
    result = demo(place, "--rows", "1000")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout, "colours are for terminals"
    assert "kill -9 " in result.stdout
    figures = {
        label: int(number.replace(",", ""))
        for label, _, number in (line.rpartition(" ") for line in result.stdout.splitlines())
        if number.replace(",", "").isdigit()
    }
    by_label = {label.strip(): number for label, number in figures.items()}
    assert by_label["rows in PostgreSQL"] > 1000
    assert by_label["rows in PostgreSQL"] == by_label["documents in Redis"] == by_label["equal, column by column"]
    assert 0 < by_label["with stars from the service"] < by_label["documents in Redis"]
    assert by_label["different, missing or left over"] == 0
    assert result.stdout.splitlines()[-1].startswith("Next, type make playground")
    place.assert_nothing_is_left()


@pytest.mark.long
def test_its_comparison_can_fail(place: Place) -> None:
    result = demo(place, "--tamper", "--rows", "500")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Source and cache differ" in result.stdout
    assert "Tampered With" in result.stdout
    assert "Next, type" not in result.stdout
    place.assert_nothing_is_left()


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_it_cleans_up_when_it_is_interrupted(place: Place, signum: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "examples.demo", "--rows", "500"],
        cwd=REPOSITORY,
        env=place.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if "rows loaded" in line:  # all there is to start has been started
                break
        else:
            pytest.fail("it ended before it came so far:\n" + "".join(said))
        names = {running.name() for running in place.processes()}
        assert {"postgres", "redis-server", "deltactl"} <= names
        process.send_signal(signum)
        said.append(process.stdout.read())
        assert process.wait(DEMO_TIMEOUT_S) == 130, "".join(said)
    assert "Interrupted" in said[-1]
    place.assert_nothing_is_left()


@pytest.mark.long
def test_nothing_of_it_runs_on_when_it_is_killed(place: Place) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "examples.demo", "--rows", "500"],
        cwd=REPOSITORY,
        env=place.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "rows loaded" in line:
                break
        names = {running.name() for running in place.processes()}
        assert {"postgres", "redis-server", "deltactl"} <= names
        process.kill()
    wait_until(lambda: not place.processes(), DEMO_TIMEOUT_S, "the end of the killed demo's processes")
