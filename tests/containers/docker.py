"""The program `docker`, as the tests here use it. Without an engine they fail: `make test-containers` brings one."""

from __future__ import annotations

import csv
import json
import subprocess
from typing import Any

from delta_sync.testing.processes import wait_until

IN_STEP_TIMEOUT_S = 120.0  # on a machine that does a lot else
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


def is_healthy(container: str) -> bool:
    """Tell what Docker has found out by the image's health check."""
    return bool(inspected(container)["State"]["Health"]["Status"] == "healthy")


def logs(container: str) -> str:
    """Return all that it printed."""
    said = docker("logs", container)
    return said.stdout + said.stderr


class Copy:
    """PostgreSQL with a table of movies, and Redis with what a pipeline makes of it, by their containers."""

    def __init__(self, source: str, cache: str) -> None:
        self.source = source
        self.cache = cache

    def sql(self, text: str) -> str:
        psql = ["psql", "--username", "delta", "--dbname", "studio", "--csv", "--tuples-only"]
        options = ["--set", "ON_ERROR_STOP=1"]
        return docker("exec", "--interactive", "--user", "postgres", self.source, *psql, *options, stdin=text).stdout

    def change(self, first: int) -> None:
        """Insert, update and delete rows, a few hundred of each."""
        self.sql(
            f"""
            INSERT INTO movie SELECT id, 'New ' || id, NULL FROM generate_series({first}, {first} + 299) AS id;
            UPDATE movie SET title = title || ' again', released = '1999-09-09' WHERE id % 5 = {first % 5};
            DELETE FROM movie WHERE id % 7 = {first % 7};
            """
        )

    def wanted(self) -> dict[str, object]:
        """Return what is to be in Redis, by key: what compose/dev's processor makes, by hand."""
        rows = csv.reader(self.sql("SELECT id, title, extract(year FROM released) FROM movie").splitlines())
        return {
            f"public.movie:{row}": {"id": int(row), "title": title, "year": int(year) if year else None}
            for row, title, year in rows
        }

    def stored(self) -> dict[str, object]:
        """Return the documents that are in Redis, by key."""
        script = "local found = {} for _, key in ipairs(redis.call('KEYS', 'public.movie:*')) do"
        script += " found[#found + 1] = key found[#found + 1] = redis.call('GET', key) end return found"
        lines = docker("exec", self.cache, "redis-cli", "--raw", "EVAL", script, "0").stdout.splitlines()
        found: dict[str, object] = {}
        for key, text in zip(lines[::2], lines[1::2], strict=True) if len(lines) > 1 else ():
            document = json.loads(text)
            assert document.pop("_version"), key
            found[key] = document
        return found

    def wait_until_in_step(self) -> None:
        """Wait until every row has its document in Redis, and nothing else has."""
        target = self.wanted()
        try:
            wait_until(lambda: self.stored() == target, IN_STEP_TIMEOUT_S, "the documents of what was written")
        except BaseException:
            now = self.stored()
            print({key: (now.get(key), target.get(key)) for key in now | target if now.get(key) != target.get(key)})
            raise
