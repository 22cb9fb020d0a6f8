"""compose/dev as a user starts it: broker, registry, PostgreSQL, Redis, sidecar and worker, each in its container."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from containers.docker import Copy, docker, inspected, is_healthy, logs
from delta_sync.testing.processes import wait_until
from deltactl.main import main
from deltactl.manifests import UID

ROOT = Path(__file__).parents[2]
HOME = ROOT / "compose" / "dev"
UP_TIMEOUT_S = 300.0  # seven containers on a machine that does a lot else; a minute by itself
RETRIES = 6  # of a sink that is down: some seconds, in which a worker that confirmed too early would have done so
STATUS = "import sys, urllib.request as u; sys.stdout.write(u.urlopen('http://127.0.0.1:9464/status').read().decode())"
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
        wait_until(partial(is_healthy, compose.container("worker")), UP_TIMEOUT_S, "a worker that is healthy")
        yield compose
    except BaseException:
        print(compose("ps", check=False), compose("logs", "--tail", "40", check=False))
        raise
    finally:
        compose("down", "--volumes", check=False)


@pytest.fixture(scope="module")
def copy(stack: Compose) -> Copy:
    return Copy(stack.container("postgres"), stack.container("redis"))


def test_what_is_written_is_in_redis_though_the_worker_is_killed(stack: Compose, copy: Copy) -> None:
    copy.wait_until_in_step()  # the thousand rows that were there before
    copy.change(10_000)
    worker = stack.container("worker")
    docker(
        "exec", worker, "python", "-c", KILL_OTHERS, check=False
    )  # it may be killed with them; Docker starts them again
    copy.change(20_001)
    copy.wait_until_in_step()
    assert inspected(worker)["RestartCount"] == 1
    wait_until(partial(is_healthy, worker), UP_TIMEOUT_S, "being healthy again")


def test_what_a_worker_had_in_hand_when_it_was_killed_is_not_lost(stack: Compose, copy: Copy) -> None:
    """It has read changes and cannot write them; if it had confirmed them, nobody would read them again."""
    worker, cache = stack.container("worker"), stack.container("redis")
    before = retries(worker)
    docker("stop", cache)
    copy.change(50_001)
    wait_until(lambda: retries(worker) >= before + RETRIES, UP_TIMEOUT_S, "a worker that cannot write")
    docker("exec", worker, "python", "-c", KILL_OTHERS, check=False)
    docker("start", cache)
    copy.wait_until_in_step()


def retries(worker: str) -> int:
    """Return how often a worker had to write once more to its sink."""
    return int(json.loads(docker("exec", worker, "python", "-c", STATUS).stdout)["sinks"]["cache"]["retries"])


def test_a_worker_that_is_stopped_drains(stack: Compose, copy: Copy) -> None:
    copy.change(30_002)
    worker = stack.container("worker")
    docker("stop", worker)  # SIGTERM, and what the stack allows until SIGKILL
    ended = inspected(worker)["State"]
    assert (ended["Running"], ended["ExitCode"], ended["OOMKilled"]) == (False, 0, False), logs(worker)
    assert "not_drained" not in logs(worker)
    before = set(logs(worker).splitlines())
    docker("start", worker)
    copy.change(40_003)
    copy.wait_until_in_step()
    after = [line for line in logs(worker).splitlines() if line not in before]
    assert not [line for line in after if "Traceback" in line]


def test_sidecar_and_worker_are_healthy_and_may_do_nothing_that_they_need_not(stack: Compose) -> None:
    ended = inspected(stack.container("create"))["State"]
    assert (ended["Running"], ended["ExitCode"]) == (False, 0), "it has made the topics"
    for service in ("sidecar", "worker"):
        container = stack.container(service)
        wait_until(partial(is_healthy, container), UP_TIMEOUT_S, f"a healthy {service}")
        found = inspected(container)
        assert found["HostConfig"]["ReadonlyRootfs"] is True
        assert found["HostConfig"]["CapDrop"] == ["ALL"]
        look = "id -u; touch /app/x /opt/delta/x /x 2>&1; true"
        user, *refusals = docker("exec", container, "sh", "-c", look).stdout.splitlines()
        assert user == str(UID)
        assert [line.rpartition(": ")[2] for line in refusals] == ["Read-only file system"] * 3
        assert "demo" not in logs(container).replace("delta-demo", ""), "the password"
