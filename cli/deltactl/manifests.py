"""Kubernetes' manifests of a pipeline's images. Pure: same specification and images, same text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml

from delta_debezium import distribution, engine, sidecar
from delta_sync import running, worker
from delta_sync.errors import UsageError
from delta_sync.secrets import references
from delta_sync.spec import PipelineSpec

PORT = 9464  # as in the Dockerfiles
UID = 10001
REPLICAS = 2  # one goes on when the other's node does not
END_S = 5.0  # from a process's last word to its end, on a busy node
GROUP_S = 5.0  # for the group's coordinator to answer
FIRST_START_S = 120  # for an image to be unpacked and a source that is slow to answer
PROBE_PERIOD_S = 10
JVM_MB = 256  # beside its heap: classes, threads, buffers
PYTHON_MB = 256  # a worker stays under 200 at any backlog
STATE_SIZE = "1Gi"  # dead letters have whole rows; everything else is some hundred kilobytes
WORK_SIZE = "1Gi"  # Debezium Server's logs, of this start and the one before
TMP_SIZE = "256Mi"

Manifest = dict[str, Any]


class Secret(NamedTuple):
    """A value that the specification refers to: under which key of the pipeline's Secret it is looked for.

    `kind` is `env` for the variable, `file` for the path `name`.
    """

    key: str
    kind: str
    name: str


def secrets_of(spec: PipelineSpec) -> list[Secret]:
    """Return what a pipeline's processes need from outside, each once, in order.

    Files that Kafka's clients read themselves (`ca_file`, …) count, too. Raises UsageError for a reference that no pod
    can have.
    """
    found = {reference: None for text in _texts(spec.model_dump(mode="json")) for reference in references(text)}
    if (kafka := spec.kafka) is not None:
        paths = [kafka.registry.ca_file]
        if (security := kafka.security) is not None:
            paths += [security.ca_file, security.certificate_file, security.key_file]
        found |= {("file", path): None for path in paths if path is not None}
    secrets = [Secret(_key(kind, name), kind, name) for kind, name in sorted(found)]
    by_key: dict[str, Secret] = {}
    for secret in secrets:
        other = by_key.setdefault(secret.key, secret)
        if other != secret:
            raise UsageError(
                f"{other.name} and {secret.name} would be the same key of a Secret, {secret.key}; rename one of them."
            )
    return secrets


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for child in value.values():  # pyright: ignore[reportUnknownVariableType] -- of JSON
                yield from _texts(child)  # pyright: ignore[reportUnknownArgumentType] -- YAML's, anything
        case list():
            for child in value:  # pyright: ignore[reportUnknownVariableType] -- of JSON
                yield from _texts(child)  # pyright: ignore[reportUnknownArgumentType] -- YAML's, anything
        case _:
            pass


def _key(kind: str, name: str) -> str:
    if kind == "env":
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"${{env:{name}}} names no environment variable: letters, digits and underscores.")
        return name
    path = PurePosixPath(name)
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 3:
        raise UsageError(f"{name!r} is no path that a secret can be mounted at; write it like /run/secrets/password.")
    # With a dot in it, so that it is no variable's.
    return "file." + re.sub(r"[^A-Za-z0-9._-]", "-", str(path)[1:])


# ── the manifests ────────────────────────────────────────────────────────────────────────────────────────────────


def manifests(spec: PipelineSpec, images: Mapping[str, str]) -> dict[str, str]:
    """Return YAML by file name, for `images` by what runs in them: `worker` and `sidecar`, or `run` (embedded).

    Raises UsageError for a state store that several pods cannot share, and as `secrets_of`.
    """
    is_sqlite = spec.state.startswith("sqlite")
    if spec.transport == "kafka" and is_sqlite:
        raise UsageError(
            f"state: {spec.state} is a file, and the sidecars and workers of pipeline {spec.name} run on several nodes:"
            " they need one store. Write state: postgresql://user:${env:STATE_PASSWORD}@host/database in pipeline.yaml"
            " (MariaDB will do as well), and then package it again."
        )
    secrets = secrets_of(spec)
    if spec.transport == "kafka":
        objects = {role: [_deployment(spec, role, images[role], secrets), _budget(spec, role)] for role in images}
    else:
        objects = {"run": [_deployment(spec, "run", images["run"], secrets)]}
        if is_sqlite:
            objects["run"].insert(0, _claim(spec))
    return {f"{role}.yaml": yaml.safe_dump_all(some, sort_keys=False, width=120) for role, some in objects.items()}


def secret_name(spec: PipelineSpec) -> str:
    """Return the name of the Secret that all of a pipeline's pods take values from. It is made by hand."""
    return object_name(spec.name)


def grace_s(role: str) -> int:
    """Return how long a pod may take to end: what its process gives itself, and a bit. After that it is killed."""
    budgets = {
        # What is in flight, the threads that read; then its consumer leaves the group.
        "worker": worker.DRAIN_BUDGET_S + running.STOP_BUDGET_S + GROUP_S,
        # The server and the threads, one after the other; then the lease is given back.
        "sidecar": 2 * sidecar.STOP_BUDGET_S + sidecar.LEASE_S,
        # What is in flight, the threads that read, the engine.
        "run": worker.DRAIN_BUDGET_S + running.STOP_BUDGET_S + engine.STOP_BUDGET_S,
    }
    return math.ceil(budgets[role] + END_S)


def _deployment(spec: PipelineSpec, role: str, image: str, secrets: Sequence[Secret]) -> Manifest:
    several = role != "run"
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": grace_s(role),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, role, image, secrets)],
        "volumes": _volumes(spec, role, secrets),
    }
    if several:
        pod["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": _labels(spec, role)},
            }
        ]
    # Embedded: two at once would take the slot from each other, so the old pod goes first.
    strategy: Manifest = {"type": "Recreate"}
    if several:
        strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 1}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(spec, role),
        "spec": {
            "replicas": REPLICAS if several else 1,
            "strategy": strategy,
            "selector": {"matchLabels": _labels(spec, role)},
            "template": {"metadata": {"labels": _labels(spec, role)}, "spec": pod},
        },
    }


def _container(spec: PipelineSpec, role: str, image: str, secrets: Sequence[Secret]) -> Manifest:
    mounts: list[Manifest] = [{"name": "work", "mountPath": "/work"}, {"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 -- the pod's own
    # One by one: a whole folder would hide what the image has beside them.
    mounts += [
        {"name": "secrets", "mountPath": secret.name, "subPath": secret.key, "readOnly": True}
        for secret in secrets
        if secret.kind == "file"
    ]
    container: Manifest = {
        "name": role,
        "image": image,
        "args": command(spec, role),
        "env": [
            {"name": secret.name, "valueFrom": {"secretKeyRef": {"name": secret_name(spec), "key": secret.key}}}
            for secret in secrets
            if secret.kind == "env"
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": _probe("/healthz", FIRST_START_S // PROBE_PERIOD_S),
        "livenessProbe": _probe("/healthz", 3),
        "readinessProbe": _probe("/readyz", 3),  # a sidecar that stands by is ready: it could take over
        "resources": _resources(role),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    if not container["env"]:
        del container["env"]
    return container


def command(spec: PipelineSpec, role: str) -> list[str]:
    """Return the arguments of `deltactl` in a container."""
    return [role, spec.name, "--host", "0.0.0.0", "--port", str(PORT), "--log-format", "json"]  # noqa: S104 -- in a container, probes come from outside


def _probe(path: str, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": PROBE_PERIOD_S,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _resources(role: str) -> Manifest:
    """No limit of CPU: it would slow a load down while the node has nothing else to do."""
    heap_mb = {"worker": 0, "sidecar": distribution.HEAP_MB + JVM_MB, "run": engine.HEAP_MB + JVM_MB}[role]
    memory_mb = heap_mb + PYTHON_MB
    return {
        "requests": {"cpu": "250m", "memory": f"{memory_mb}Mi"},
        # Rows of megabytes need more for a moment: half of it again.
        "limits": {"memory": f"{memory_mb * 3 // 2}Mi"},
    }


def _volumes(spec: PipelineSpec, role: str, secrets: Sequence[Secret]) -> list[Manifest]:
    work: Manifest = {"name": "work", "emptyDir": {"sizeLimit": WORK_SIZE}}
    if role == "run" and spec.state.startswith("sqlite"):
        work = {"name": "work", "persistentVolumeClaim": {"claimName": object_name(spec.name, role)}}
    volumes = [work, {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE}}]
    keys = [secret.key for secret in secrets if secret.kind == "file"]
    if keys:
        items = [{"key": key, "path": key} for key in keys]
        # Readable by the group, which is ours, and by nobody else.
        volumes.append(
            {"name": "secrets", "secret": {"secretName": secret_name(spec), "defaultMode": 0o440, "items": items}}
        )
    return volumes


def _budget(spec: PipelineSpec, role: str) -> Manifest:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(spec, role),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(spec, role)}},
    }


def _claim(spec: PipelineSpec) -> Manifest:
    """The state store's: without it every start would load all tables again."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(spec, "run"),
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": STATE_SIZE}}},
    }


def _metadata(spec: PipelineSpec, role: str) -> Manifest:
    return {"name": object_name(spec.name, role), "labels": _labels(spec, role)}


def _labels(spec: PipelineSpec, role: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "delta",
        "app.kubernetes.io/instance": object_name(spec.name),
        "app.kubernetes.io/component": role,
    }


def object_name(pipeline: str, role: str | None = None) -> str:
    """Return what a pipeline's objects and images are called.

    Names of objects have no underscores, and pipelines' names no hyphens: no two pipelines have the same. Raises
    UsageError for the one kind of name that cannot be rewritten.
    """
    if pipeline.endswith("_"):
        raise UsageError(f"Pipeline {pipeline} ends with an underscore, and names of images and objects cannot.")
    return "-".join(["delta", pipeline.replace("_", "-"), *([role] if role else [])])
