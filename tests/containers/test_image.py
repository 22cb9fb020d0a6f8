"""A worker's image, built and run as its manifests and stacks do: read-only, without root, without privileges.

See docker.py.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from containers.docker import HARDENED, docker, inspected, logs
from delta_sync.testing.processes import wait_until
from deltactl.main import main
from deltactl.manifests import UID, grace_s

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


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of a worker, from what `deltactl pipeline package` writes."""
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


HARDENED_ALONE = (*HARDENED, "--network", "none")


def test_it_is_the_packaged_delta_without_java(image: str) -> None:
    assert docker("run", "--rm", *HARDENED_ALONE, image, "--version").stdout.startswith("deltactl, version ")
    look = "id -u; touch /app/x /opt/delta/x 2>&1; command -v java mvn pip; find / -name '*.jar' 2>/dev/null; true"
    seen = docker("run", "--rm", *HARDENED_ALONE, "--entrypoint", "sh", image, "-c", look).stdout.splitlines()
    assert seen[0] == str(UID)
    assert [line.rpartition(": ")[2] for line in seen[1:3]] == ["Read-only file system"] * 2
    assert seen[3:] in ([], ["/usr/local/bin/pip"], ["/usr/bin/pip"]), "of the base at most"
    configuration = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]
    assert (configuration["User"], configuration["StopSignal"]) == (f"{UID}:{UID}", "SIGTERM")
    assert not [variable for variable in configuration["Env"] if re.search("PASSWORD|SECRET|TOKEN", variable)]


def test_a_worker_that_reaches_nobody_is_unhealthy_and_ends_when_told(image: str, container: str) -> None:
    # 0s would be the image's own, in which nothing counts.
    quick = ("--health-interval", "1s", "--health-start-period", "1ms", "--health-retries", "2")
    docker("run", "--detach", "--name", container, *HARDENED_ALONE, *quick, "--env", "SOURCE_PASSWORD=hunter2", image)

    def state() -> Any:
        found = inspected(container)["State"]
        assert found["Running"], logs(container)
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
    ended = inspected(container)["State"]
    assert (ended["ExitCode"], ended["OOMKilled"]) == (0, False), logs(container)
    assert "hunter2" not in logs(container)
