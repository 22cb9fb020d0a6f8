"""A pipeline with the embedded transport, packaged by `deltactl` with --build: one container, PostgreSQL and Redis."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from containers.docker import HARDENED, Copy, docker, inspected, is_healthy, logs
from delta_sync.testing.containers import IMAGES
from delta_sync.testing.processes import wait_until
from deltactl.manifests import grace_s

DEV = Path(__file__).parents[2] / "compose" / "dev"
IMAGE = "delta-contained-run:test"
START_S = 120.0  # on a machine that does a lot else
EMBEDDED = {
    "name": "shop",
    "source": {"url": "postgresql://delta@postgres/studio", "password": "${env:SHOP_PASSWORD}"},
    "tables": {"public.movie": {}},
    "sinks": {"cache": {"url": "redis://redis/0"}},
}


@pytest.fixture
def names() -> Iterator[str]:
    """What containers, the network and the volume begin with; all of them end with the test."""
    prefix = f"delta-test-{uuid.uuid4().hex[:8]}"
    yield prefix
    for name in ("run", "postgres", "redis"):
        docker("rm", "--force", "--volumes", f"{prefix}-{name}", check=False)
    docker("volume", "rm", f"{prefix}-work", check=False)
    docker("network", "rm", prefix, check=False)


def test_one_container_copies_and_goes_on_where_it_was(names: str, tmp_path: Path) -> None:
    folder = tmp_path / "pipelines" / "shop"
    folder.mkdir(parents=True)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(EMBEDDED))
    (folder / "processor.py").write_text((DEV / "pipelines" / "shop" / "processor.py").read_text())
    command = [sys.executable, "-m", "deltactl.main", "pipeline", "package", "shop", "--dir", str(folder.parent)]
    command += ["--output", str(tmp_path / "out"), "--build", "--image", IMAGE]
    packaged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert packaged.returncode == 0, packaged.stderr[-4000:]

    docker("network", "create", names)
    common = ["--detach", "--network", names]
    password = ["--env", "POSTGRES_PASSWORD=demo", "--env", "POSTGRES_USER=delta", "--env", "POSTGRES_DB=studio"]
    tables = ["--volume", f"{DEV / 'studio.sql'}:/docker-entrypoint-initdb.d/studio.sql:ro"]
    source = ["--name", f"{names}-postgres", "--network-alias", "postgres", *password, *tables, IMAGES["postgresql"]]
    docker("run", *common, *source, "postgres", "-c", "wal_level=logical")
    docker("run", *common, "--name", f"{names}-redis", "--network-alias", "redis", IMAGES["redis"])
    container = f"{names}-run"
    options = ["--name", container, *HARDENED, "--volume", f"{names}-work:/work", "--env", "SHOP_PASSWORD=demo"]
    docker("run", *common, *options, "--stop-timeout", str(grace_s("run")), IMAGE)  # it waits for the source
    try:
        wait_until(partial(is_healthy, container), START_S, "a pipeline that is healthy")
        copy = Copy(f"{names}-postgres", f"{names}-redis")
        copy.wait_until_in_step()  # the rows that were there before
        copy.change(10_000)
        copy.wait_until_in_step()
        docker("stop", container)
        ended = inspected(container)["State"]
        assert (ended["ExitCode"], ended["OOMKilled"]) == (0, False)
        docker("exec", copy.cache, "redis-cli", "DEL", "public.movie:3")
        copy.change(20_001)
        docker("start", container)
        unloaded = {key: document for key, document in copy.wanted().items() if key != "public.movie:3"}
        assert "public.movie:3" in copy.wanted()
        wait_until(lambda: copy.stored() == unloaded, START_S, "what was written meanwhile")
        wait_until(partial(is_healthy, container), START_S, "being healthy again")
        assert copy.stored() == unloaded, "what was loaded is not loaded again"
    except BaseException:
        print(logs(container))
        raise
