"""The tutorial, typed as it is written, against the servers that it starts."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
END = "__end_of_command__"
OUTPUT_TIMEOUT_S = 300.0  # for a change to arrive: a fraction of a second, unless the machine is overloaded
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOOKING = ("redis-cli", "deltactl status", "deltactl dead list")  # typed again until they show what they should


def steps() -> Iterator[tuple[str, list[str]]]:
    """Yield each command with the lines that are shown below it; a Python block is a command that writes it."""
    for kind, text in BLOCK.findall(TUTORIAL.read_text()):
        if kind == "python":
            yield f"cat > pipelines/movies/processor.py <<'EOF'\n{text}EOF", []
            continue
        command, shown = "", list[str]()
        for line in text.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, shown
                command, shown = line[2:], []
            else:
                shown.append(line)
        yield command, shown


def shows(output: str, expected: list[str]) -> bool:
    """Whether the output has these lines in this order. `…` is anything, blanks at the end are nothing."""
    lines = iter(line.rstrip() for line in output.splitlines())
    wanted = [line.rstrip() for line in expected if line.strip() != "…"]
    patterns = [re.compile(".*".join(map(re.escape, line.split("…")))) for line in wanted]
    return all(any(pattern.fullmatch(line) for line in lines) for pattern in patterns)


class Shell:
    """The playground, with commands typed into its shell."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.type("exec 2>&1")

    def type(self, command: str) -> str:
        """Type a command; return what it printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\necho {END}\n")
        self._process.stdin.flush()
        printed: list[str] = []
        for line in self._process.stdout:
            if line.strip() == END:
                return "".join(printed)
            printed.append(line)
        pytest.fail(f"the shell ended at `{command}`:\n{''.join(printed)}")


def test_every_command_does_what_the_tutorial_says() -> None:
    command = [sys.executable, "-u", "-m", "examples.demo.playground"]
    done = 0
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            shell = Shell(process)
            for typed, expected in steps():
                if typed == "exit":
                    break
                output = shell.type(typed)
                deadline = time.monotonic() + OUTPUT_TIMEOUT_S
                while not shows(output, expected) and typed.startswith(LOOKING) and time.monotonic() < deadline:
                    output = shell.type(typed)
                assert shows(output, expected), f"`{typed}` printed:\n{output}\nand the tutorial has:\n{expected}"
                assert "rror:" not in output or expected, output
                done += 1
        finally:
            assert process.stdin is not None
            process.stdin.close()  # as `exit` does
            process.wait(OUTPUT_TIMEOUT_S)
    assert done >= 20
    assert process.returncode == 0
