"""The program `docker`, as the tests here use it. Without an engine they fail: `make test-containers` brings one."""

from __future__ import annotations

import json
import subprocess
from typing import Any

HARDENED = (
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
)


def docker(*arguments: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run docker; a failure is one of the test unless `check` is false."""
    done = subprocess.run(["docker", *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.stderr}{done.stdout[-2000:]}"
    return done


def inspected(container: str) -> dict[str, Any]:
    """Return what `docker inspect` says of it."""
    found: list[dict[str, Any]] = json.loads(docker("inspect", container).stdout)
    return found[0]


def logs(container: str) -> str:
    """Return all that it printed."""
    said = docker("logs", container)
    return said.stdout + said.stderr
