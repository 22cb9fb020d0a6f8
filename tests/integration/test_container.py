"""A worker's image, built and run as its manifests and stacks do: read-only, without root, without privileges.

It takes a Docker engine that has the base image already, for nothing is pulled here; elsewhere this is skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from delta_sync.testing.processes import wait_until
from deltactl.main import main
from deltactl.manifests import UID, grace_s

ROOT = Path(__file__).parents[2]
(BASE,) = set(re.findall(r"^FROM (python:\S+)", (ROOT / "compose" / "Dockerfile.worker").read_text(), re.MULTILINE))
TAG = "test"
IMAGE = f"delta-contained-worker:{TAG}"
START_S = 60.0  # on a machine that does a lot else
NOWHERE = {  # nobody resolves these: the container has no network at all
    "name": "contained",
    "source": {"url": "postgresql://delta@source.invalid/studio", "password": "${env:SOURCE_PASSWORD}"},
    "tables": {"public.movie": {}},
    "sinks": {"cache": {"url": "redis://cache.invalid/0"}},
    "transport": "kafka",
    "kafka": {"bootstrap_servers": "kafka.invalid:9092", "registry": {"url": "http://registry.invalid"}},
}
PROCESSOR = """
from delta_sync import Pipeline

contained = Pipeline("contained")


@contained.table("public.movie", to=["cache"])
def movie(row):
    return {"id": row["id"]}
"""


def docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.stderr}{done.stdout[-2000:]}"
    return done


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of a worker, from what `deltactl pipeline package` writes."""
    if shutil.which("docker") is None:
        pytest.skip("there is no program `docker`")
    if docker("version", "--format", "{{.Server.Version}}", check=False).returncode != 0:
        pytest.skip("no Docker engine runs here")
    if docker("image", "inspect", BASE, check=False).returncode != 0:
        pytest.skip(f"the engine has no image {BASE}; type: docker pull {BASE}")
    place = tmp_path_factory.mktemp("package")
    folder = place / "pipelines" / "contained"
    folder.mkdir(parents=True)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(NOWHERE))
    (folder / "processor.py").write_text(PROCESSOR)
    command = ["pipeline", "package", "contained", "--dir", str(place / "pipelines")]
    result = CliRunner().invoke(main, [*command, "--output", str(place / "out"), "--image", f"delta-contained:{TAG}"])
    assert result.exit_code == 0, result.output
    docker("build", "--network", "host", "--file", f"{place}/out/Dockerfile.worker", "--tag", IMAGE, f"{place}/out")
    yield IMAGE
    docker("image", "rm", "--force", IMAGE)


@pytest.fixture
def container() -> Iterator[str]:
    """The name of a container that a test starts."""
    name = f"delta-test-{uuid.uuid4().hex[:8]}"
    yield name
    docker("rm", "--force", "--volumes", name, check=False)


HARDENED = (
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
    "--network",
    "none",
)


def test_it_is_the_packaged_delta_without_java(image: str) -> None:
    assert docker("run", "--rm", *HARDENED, image, "--version").stdout.startswith("deltactl, version ")
    look = "id -u; touch /app/x /opt/delta/x 2>&1; command -v java mvn pip; find / -name '*.jar' 2>/dev/null; true"
    seen = docker("run", "--rm", *HARDENED, "--entrypoint", "sh", image, "-c", look).stdout.splitlines()
    assert seen[0] == str(UID)
    assert [line.rpartition(": ")[2] for line in seen[1:3]] == ["Read-only file system"] * 2
    assert seen[3:] in ([], ["/usr/local/bin/pip"], ["/usr/bin/pip"]), "of the base at most"
    configuration = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]
    assert (configuration["User"], configuration["StopSignal"]) == (f"{UID}:{UID}", "SIGTERM")
    assert not [variable for variable in configuration["Env"] if re.search("PASSWORD|SECRET|TOKEN", variable)]


def test_a_worker_that_reaches_nobody_is_unhealthy_and_ends_when_told(image: str, container: str) -> None:
    # 0s would be the image's own, in which nothing counts.
    quick = ("--health-interval", "1s", "--health-start-period", "1ms", "--health-retries", "2")
    docker("run", "--detach", "--name", container, *HARDENED, *quick, "--env", "SOURCE_PASSWORD=hunter2", image)

    def state() -> Any:
        found = json.loads(docker("inspect", "--format", "{{json .State}}", container).stdout)
        assert found["Running"], docker("logs", container).stderr
        return found

    def answer(path: str) -> tuple[int, str]:
        text = f"import http.client as h; c = h.HTTPConnection('127.0.0.1', 9464); c.request('GET', '{path}');"
        text += " r = c.getresponse(); print(r.status, r.read().decode())"
        said = docker("exec", container, "python", "-c", text, check=False).stdout
        status, _, body = said.partition(" ")
        return int(status or 0), body

    wait_until(lambda: "waiting" in answer("/readyz")[1], START_S, "waiting for the source")
    assert answer("/readyz")[0] == 503
    assert answer("/healthz")[0] == 200, "it lives: another start would change nothing"
    wait_until(lambda: state()["Health"]["Status"] == "unhealthy", START_S, "being unhealthy")
    docker("stop", "--time", str(grace_s("worker")), container)
    ended = json.loads(docker("inspect", "--format", "{{json .State}}", container).stdout)
    assert (ended["ExitCode"], ended["OOMKilled"]) == (0, False), docker("logs", container).stderr
    logs = docker("logs", container)
    assert "hunter2" not in logs.stdout + logs.stderr
