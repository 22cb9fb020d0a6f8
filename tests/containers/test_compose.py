"""compose/dev as a user starts it: broker, registry, PostgreSQL, Redis, sidecar and worker, each in its container."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from containers.docker import docker, inspected, logs
from delta_sync.testing.processes import wait_until
from deltactl.main import main
from deltactl.manifests import UID

ROOT = Path(__file__).parents[2]
HOME = ROOT / "compose" / "dev"
UP_TIMEOUT_S = 300.0  # seven containers on a machine that does a lot else; a minute by itself
IN_STEP_TIMEOUT_S = 120.0
KILL_OTHERS = (
    "import os; [os.kill(int(p), 9) for p in os.listdir('/proc') if p.isdigit() and int(p) not in (1, os.getpid())]"
)


class Compose:
    """A stack under a name of its own, so that one that a user runs from this clone is left alone."""

    def __init__(self) -> None:
        self.project = f"delta-test-{uuid.uuid4().hex[:8]}"
        plugin = docker("compose", "version", check=False).returncode == 0
        self._program = ["docker", "compose"] if plugin else ["docker-compose"]

    def __call__(self, *arguments: str, check: bool = True) -> str:
        command = [*self._program, "--project-name", self.project, "--file", "compose.yaml", *arguments]
        done = subprocess.run(command, cwd=HOME, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def container(self, service: str) -> str:
        """Return the id of a service's one container; it may have ended."""
        labels = {"project": self.project, "service": service}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        (found,) = docker("ps", "--all", "--quiet", *filters).stdout.split()
        return found


@pytest.fixture(scope="module")
def stack() -> Iterator[Compose]:
    """The stack, running."""
    command = ["pipeline", "package", "shop", "--dir", str(HOME / "pipelines"), "--output", str(HOME / "image")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    compose = Compose()
    try:
        compose("build")
        compose("up", "--detach")
        wait_until(partial(is_healthy, compose, "worker"), UP_TIMEOUT_S, "a worker that is healthy")
        yield compose
    except BaseException:
        print(compose("ps", check=False), *(logs(compose.container(name)) for name in ("create", "sidecar", "worker")))
        raise
    finally:
        compose("down", "--volumes", check=False)


def is_healthy(compose: Compose, service: str) -> bool:
    """Tell what Docker has found out by the image's health check."""
    return bool(inspected(compose.container(service))["State"]["Health"]["Status"] == "healthy")


def sql(compose: Compose, text: str) -> str:
    arguments = ["--user", "postgres", compose.container("postgres"), "psql", "--username", "delta", "--dbname"]
    return docker(
        "exec", "--interactive", *arguments, "studio", "--csv", "--tuples-only", "--set", "ON_ERROR_STOP=1", stdin=text
    ).stdout


def wanted(compose: Compose) -> dict[str, object]:
    """Return what is to be in Redis, by key: of compose/dev's processor, made of the rows by hand."""
    rows = csv.reader(sql(compose, "SELECT id, title, extract(year FROM released) FROM movie").splitlines())
    return {
        f"public.movie:{row}": {"id": int(row), "title": title, "year": int(year) if year else None}
        for row, title, year in rows
    }


def stored(compose: Compose) -> dict[str, object]:
    """Return the documents that are in Redis, by key."""
    script = "local found = {} for _, key in ipairs(redis.call('KEYS', 'public.movie:*')) do"
    script += " found[#found + 1] = key found[#found + 1] = redis.call('GET', key) end return found"
    lines = docker("exec", compose.container("redis"), "redis-cli", "--raw", "EVAL", script, "0").stdout.splitlines()
    found: dict[str, object] = {}
    for key, text in zip(lines[::2], lines[1::2], strict=True) if len(lines) > 1 else ():
        document = json.loads(text)
        assert document.pop("_version"), key
        found[key] = document
    return found


def wait_until_in_step(compose: Compose) -> None:
    """Wait until every row has its document in Redis, and nothing else has."""
    target = wanted(compose)
    try:
        wait_until(lambda: stored(compose) == target, IN_STEP_TIMEOUT_S, "the documents of what was written")
    except BaseException:
        now = stored(compose)
        print({key: (now.get(key), target.get(key)) for key in now | target if now.get(key) != target.get(key)})
        raise


def change(compose: Compose, first: int) -> None:
    """Insert, update and delete rows, a few hundred of each."""
    sql(
        compose,
        f"""
        INSERT INTO movie SELECT id, 'New ' || id, NULL FROM generate_series({first}, {first} + 299) AS id;
        UPDATE movie SET title = title || ' again', released = '1999-09-09' WHERE id % 5 = {first % 5};
        DELETE FROM movie WHERE id % 7 = {first % 7};
        """,
    )


def test_what_is_written_is_in_redis_though_the_worker_is_killed(stack: Compose) -> None:
    wait_until_in_step(stack)  # the thousand rows that were there before
    change(stack, 10_000)
    worker = stack.container("worker")
    docker("exec", worker, "python", "-c", KILL_OTHERS)  # SIGKILL; Docker starts it again
    change(stack, 20_001)
    wait_until_in_step(stack)
    assert inspected(worker)["RestartCount"] == 1
    wait_until(partial(is_healthy, stack, "worker"), UP_TIMEOUT_S, "being healthy again")


def test_a_worker_that_is_stopped_drains(stack: Compose) -> None:
    change(stack, 30_002)
    worker = stack.container("worker")
    docker("stop", worker)  # SIGTERM, and what the stack allows until SIGKILL
    ended = inspected(worker)["State"]
    assert (ended["Running"], ended["ExitCode"], ended["OOMKilled"]) == (False, 0, False), logs(worker)
    assert "not_drained" not in logs(worker)
    before = set(logs(worker).splitlines())
    docker("start", worker)
    change(stack, 40_003)
    wait_until_in_step(stack)
    after = [line for line in logs(worker).splitlines() if line not in before]
    assert not [line for line in after if "Traceback" in line]


def test_sidecar_and_worker_are_healthy_and_may_do_nothing_that_they_need_not(stack: Compose) -> None:
    ended = inspected(stack.container("create"))["State"]
    assert (ended["Running"], ended["ExitCode"]) == (False, 0), "it has made the topics"
    for service in ("sidecar", "worker"):
        container = stack.container(service)
        wait_until(partial(is_healthy, stack, service), UP_TIMEOUT_S, f"a healthy {service}")
        found = inspected(container)
        assert found["HostConfig"]["ReadonlyRootfs"] is True
        assert found["HostConfig"]["CapDrop"] == ["ALL"]
        look = "id -u; touch /app/x /opt/delta/x /x 2>&1; true"
        user, *refusals = docker("exec", container, "sh", "-c", look).stdout.splitlines()
        assert user == str(UID)
        assert [line.rpartition(": ")[2] for line in refusals] == ["Read-only file system"] * 3
        assert "demo" not in logs(container).replace("delta-demo", ""), "the password"
