"""`deltactl pipeline package`: what images of a pipeline are built from, and how Kubernetes runs them."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click

from delta_sync.errors import CheckFailed, DeltaError, Problem, UsageError
from delta_sync.secrets import references
from delta_sync.spec import SPEC_FILE, PipelineSpec
from deltactl.app import (
    App,
    dry_run_option,
    json_of,
    name_argument,
    pass_app,
    print_json,
    print_table,
    say,
    shared_options,
    warn,
)
from deltactl.manifests import Secret, command, manifests, object_name, secret_name, secrets_of
from deltactl.wheel import DISTRIBUTION, own_wheel, sources

MARKER = ".delta-package.json"  # a folder with it was written by this command, and may be replaced
REQUIREMENTS_FILE = "requirements.txt"  # in the pipeline's folder: what processor.py needs beside Delta
MAX_FILE_BYTES = 16 << 20  # an image is no place for data; a processor's table of codes is far below
ENGINE_TIMEOUT_S = 30.0  # for an engine that is there to say so

# What a pipeline's folder has of a machine, and what may be a secret. The rest may be the processor's own.
LEFT_OUT = (
    *(".*", "*.log", "*.log.*", "*.dat", "*.lock", "*.db", "*.db-*", "*.sqlite*", "*.pyc", "*~", "__pycache__"),
    *("*.env", "*.key", "*.pem", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.truststore", "*secret*", "*password*"),
    *("*credential*", "debezium-server"),
)
# What fetches Debezium Server into a sidecar's image, which is kept for as long as these stay as they are.
FETCHING = ("delta_debezium.distribution", "delta_debezium.quick_start", "delta_sync.maven", "delta_sync.errors")
_IMAGE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._/:-]*):(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})")


class Plan(NamedTuple):
    """What is written (by path in the folder), what of the pipeline's is not, and what is built from it."""

    files: Mapping[str, bytes]
    left_out: Sequence[str]
    images: Mapping[str, str]
    secrets: Sequence[Secret]


@click.command(short_help="Write what images of a pipeline are built from.")
@name_argument
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Where to (default: build/NAME).")
@click.option("--build", is_flag=True, help="Build the images with docker, too.")
@click.option("--kubernetes", is_flag=True, help="Write manifests for Kubernetes, too.")
@click.option(
    "--image", metavar="NAME:TAG", help="What the images are called; on Kafka they are NAME-worker and NAME-sidecar."
)
@dry_run_option
@shared_options
@pass_app
def package(
    app: App, name: str, output: Path | None, build: bool, kubernetes: bool, image: str | None, dry_run: bool
) -> None:
    """Write a folder with all that images of a pipeline are built from: its files, Delta, locks, Dockerfiles.

    No secret gets into it: the containers are given them when they run. The same pipeline and options give the same
    bytes. A requirements.txt in the pipeline's folder, with hashes, is installed for processor.py.

    \b
    Example:
      deltactl pipeline package movies --build --kubernetes --image registry.example/movies:1.4.0
    """
    spec = app.load(name)
    folder = app.home(name)
    target = (output or Path("build") / name).absolute()
    _check_target(target, folder)
    plan = plan_of(folder, spec, images_of(spec, image), kubernetes=kubernetes)
    if build and not dry_run:
        _check_docker()
    if not dry_run:
        _write(target, plan.files)
    if not app.json:
        _show(spec, target, plan, dry_run=dry_run)
    if build and not dry_run:
        for role, tag in plan.images.items():
            _build(target, role, tag)
    result: dict[str, Any] = {
        "pipeline": name,
        "folder": str(target),
        "files": {path: len(content) for path, content in plan.files.items()},
        "left_out": list(plan.left_out),
        "images": dict(plan.images),
        "secret": secret_name(spec) if plan.secrets else None,
        "secrets": [secret._asdict() for secret in plan.secrets],
        "written": not dry_run,
        "built": build and not dry_run,
    }
    if app.json:
        print_json(result, has_secrets=False)  # it has the names of secrets only


def images_of(spec: PipelineSpec, image: str | None) -> dict[str, str]:
    """Return the images' names by what runs in them. Raises UsageError for a name without a tag, or with `latest`."""
    roles = ("worker", "sidecar") if spec.transport == "kafka" else ("run",)
    given = image or f"{object_name(spec.name)}:{version(DISTRIBUTION).replace('+', '-')}"
    found = _IMAGE.fullmatch(given)
    if found is None or found["tag"] == "latest":
        raise UsageError(f"--image: {given!r} must be NAME:TAG with a tag of this very version, as movies:1.4.0.")
    if len(roles) == 1:
        return {roles[0]: given}
    return {role: f"{found['name']}-{role}:{found['tag']}" for role in roles}


# ── what is in the folder ────────────────────────────────────────────────────────────────────────────────────────


def plan_of(folder: Path, spec: PipelineSpec, images: Mapping[str, str], *, kubernetes: bool) -> Plan:
    """Return what `package` writes. Reads the pipeline's folder and Delta's own files, and nothing else."""
    own, left_out = pipeline_files(folder, spec)
    wheel_name, wheel = own_wheel()
    shared = resources.files("deltactl") / "images"
    files: dict[str, bytes] = {
        MARKER: json_of({"pipeline": spec.name, "delta": version(DISTRIBUTION)}).encode(),
        ".dockerignore": f"{MARKER}\nDockerfile.*\nkubernetes/\n".encode(),
        "entrypoint.sh": (shared / "entrypoint.sh").read_bytes(),
        "requirements/pipeline.txt": own.pop(REQUIREMENTS_FILE, b""),
        f"wheels/{wheel_name}": wheel,
    }
    for role in images:
        dockerfile = (shared / f"Dockerfile.{role}").read_text(encoding="utf-8")
        arguments = ", ".join(f'"{argument}"' for argument in command(spec, role))
        files[f"Dockerfile.{role}"] = f"{dockerfile}CMD [{arguments}]\n".encode()
        files[f"requirements/{role}.txt"] = (shared / f"{role}.txt").read_bytes()
    if "sidecar" in images:
        files |= {f"debezium/{path}": content for path, content in sources(FETCHING).items()}
    files |= {f"pipelines/{spec.name}/{path}": content for path, content in own.items()}
    if kubernetes:
        files |= {f"kubernetes/{path}": text.encode() for path, text in manifests(spec, images).items()}
    return Plan(dict(sorted(files.items())), left_out, images, secrets_of(spec))


def pipeline_files(folder: Path, spec: PipelineSpec) -> tuple[dict[str, bytes], list[str]]:
    """Return the files of a pipeline that belong into an image, by path, and the paths of those that do not.

    State, locks, logs and whatever may be a secret stay out; a folder that does is one path. Raises UsageError for a
    file that is too large.
    """
    secret = {Path(name).absolute() for name in _referred_files(spec)}
    state = spec.state.partition(":///")[2] if spec.state.startswith("sqlite") else ""
    state_file = (folder / state).absolute() if state else None
    files: dict[str, bytes] = {}
    left_out: list[str] = []

    def look(place: Path) -> None:
        for path in sorted(place.iterdir()):
            relative = path.relative_to(folder).as_posix()
            if is_left_out(path.name) or path.absolute() in secret or _is_of(path, state_file):
                left_out.append(relative)
            elif path.is_dir():
                look(path)
            elif path.is_file():
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise UsageError(
                        f"{path} has {path.stat().st_size >> 20} MB; keep data out of a pipeline's folder."
                    )
                files[relative] = path.read_bytes()
            else:
                left_out.append(relative)

    look(folder)
    assert SPEC_FILE in files, "it was read from there"
    return files, left_out


def is_left_out(name: str) -> bool:
    """Tell whether a file or folder of this name stays out of images. Pure."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in LEFT_OUT)


def _is_of(path: Path, state_file: Path | None) -> bool:
    """Tell whether it is the state store's: SQLite keeps files of the same name, and more, beside it."""
    return (
        state_file is not None and path.absolute().parent == state_file.parent and path.name.startswith(state_file.name)
    )


def _referred_files(spec: PipelineSpec) -> set[str]:
    found = {name for kind, name in references(spec.model_dump_json()) if kind == "file"}
    security = spec.kafka.security if spec.kafka is not None else None
    if security is not None and security.key_file is not None:
        found.add(security.key_file)
    return found


# ── writing and building ─────────────────────────────────────────────────────────────────────────────────────────


def _check_target(target: Path, folder: Path) -> None:
    if target == folder.absolute() or folder.absolute() in target.parents or target in folder.absolute().parents:
        raise UsageError(f"--output: {target} and the pipeline's folder {folder} must not be in each other.")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--output: {target} is no folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / MARKER).is_file():
        raise UsageError(f"--output: {target} has files that this command did not write; name another folder.")


def _write(target: Path, files: Mapping[str, bytes]) -> None:
    """Write the folder beside its place, then put it there: what an older one had more would get into images."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        new = scratch / "new"
        for path, content in files.items():
            file = new / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        if target.exists():
            target.rename(scratch / "old")
        new.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_docker() -> None:
    """Raise CheckFailed unless there is an engine that answers."""
    if shutil.which("docker") is None:
        fix = "install Docker, or leave out --build and build the folder where Docker is"
        raise CheckFailed([Problem("docker", "there is no program `docker`", fix)])
    try:
        asked = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],  # noqa: S607 -- the user's own docker
            capture_output=True,
            text=True,
            timeout=ENGINE_TIMEOUT_S,
            check=False,
        )
        words = asked.stderr.strip().splitlines()[-1:] if asked.returncode else []
        refused = asked.returncode != 0
    except subprocess.TimeoutExpired:
        words, refused = [f"no answer within {ENGINE_TIMEOUT_S:.0f} s"], True
    if refused:
        fix = "start it (systemctl start docker), and see that you may use it (group docker)"
        raise CheckFailed([Problem("docker", f"its engine cannot be used: {' '.join(words).rstrip('.')}", fix)])


def _build(target: Path, role: str, tag: str) -> None:
    """Build an image; what docker says goes to standard error. Raises BuildFailed."""
    warn(f"building {tag}")
    # The folder's path may be anything, so docker is not given it as an argument that could be an option.
    arguments = ["docker", "build", "--file", f"Dockerfile.{role}", "--tag", tag, "."]
    status = subprocess.run(arguments, cwd=target, stdout=sys.stderr, check=False).returncode  # noqa: S603 -- ditto
    if status != 0:
        raise BuildFailed(
            f"docker build of {tag} ended with status {status}; what it said is above. Once that is mended, type:"
            f" docker build --file {target}/Dockerfile.{role} --tag {tag} {target}."
        )


class BuildFailed(DeltaError):
    """`docker build` failed. The folder is written; images that were built before stay."""


def _show(spec: PipelineSpec, target: Path, plan: Plan, *, dry_run: bool) -> None:
    if dry_run:
        print_table(["FILE", "BYTES"], [[path, len(content)] for path, content in plan.files.items()])
    else:
        say(f"Wrote {os.path.relpath(target)}: {len(plan.files)} files.")
    if plan.left_out:
        warn(f"Left out of {spec.name}'s folder: {', '.join(plan.left_out)}.")
    for role, tag in plan.images.items():
        say(f"Image of the {role}: {tag}" if role != "run" else f"Image: {tag}")
    if any(path.startswith("kubernetes/") for path in plan.files) and plan.secrets:
        keys = " ".join(
            f"--from-{'literal' if secret.kind == 'env' else 'file'}={secret.key}=…" for secret in plan.secrets
        )
        say(f"Its Secret: kubectl create secret generic {secret_name(spec)} {keys}", has_secrets=False)
