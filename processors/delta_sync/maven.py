"""Programs on the JVM that come as one archive by Maven: fetched once, unpacked, kept in a cache.

Maven itself fetches, so its settings (mirrors, proxies, credentials) hold here, too.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from delta_sync.errors import DeltaError

# Later ones want an artifact's parent poms as well, which are not published of everything (Debezium Server 3.6.3).
PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:2.10"
REPORT_EVERY_S = 5.0  # often enough to see that it moves, and a log stays readable
OUTPUT_BYTES = 2000  # of Maven's, in an error: its last lines say what is wrong

Report = Callable[[str], None]


class FetchFailed(DeltaError):
    """Something cannot be fetched; the message says what is missing, or what Maven said."""


def cache_dir() -> Path:
    """Return where jars are kept: `DELTA_JARS`, or Delta's folder in the user's cache."""
    if chosen := os.environ.get("DELTA_JARS"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delta-sync" / "jars"


def unpacked(
    name: str,
    artifacts: tuple[str, ...],
    wanted: Callable[[str], bool] = lambda _: True,
    report: Report = lambda _: None,
) -> Path:
    """Return the folder with what the artifacts hold, fetching them when it is not there yet.

    `artifacts` are Maven's coordinates, `group:artifact:version[:type[:classifier]]`. Of a `tar.gz` the members that
    are `wanted` (by their path, without a folder around everything) are unpacked; a jar stays as it is.
    The folder is complete or absent; it is `name` in the cache, so `name` must change with anything that is asked for.
    Raises FetchFailed.
    """
    place = cache_dir() / name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f"{name}.lock")):
            if not place.exists():
                _make(place, artifacts, wanted, report)
    return place


def _make(place: Path, artifacts: tuple[str, ...], wanted: Callable[[str], bool], report: Report) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        content = scratch / "content"
        content.mkdir()
        for artifact in artifacts:
            _fetch(artifact, scratch, report)
        for file in (scratch / "fetched").iterdir():
            if file.name.endswith(".tar.gz"):
                _unpack(file, content, wanted)
            else:
                file.rename(content / file.name)
        content.rename(place)
    except (OSError, tarfile.TarError) as error:
        raise FetchFailed(f"{place} cannot be made: {error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch(artifact: str, scratch: Path, report: Report) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise FetchFailed(
            f"Maven is needed once to fetch {artifact}; install `mvn` (Debian, Ubuntu: apt install maven)."
        )
    report(f"fetching {artifact}")
    command = [
        *(maven, "-q", "-B", f"{PLUGIN}:copy", f"-Dartifact={artifact}"),
        f"-DoutputDirectory={scratch / 'fetched'}",
        f"-Dmaven.repo.local={scratch / 'repository'}",  # the user's own would keep hundreds of megabytes for nothing
    ]
    with (scratch / "maven.log").open("w+b") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=scratch)  # noqa: S603 -- Maven, and coordinates of ours
        try:
            while True:
                try:
                    status = child.wait(REPORT_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    report(f"fetching {artifact}: {_size_mb(scratch / 'repository')} MB so far")
        finally:
            child.kill()  # when we are interrupted: an archive that nobody waits for
            child.wait()
        if status != 0:
            log.seek(0)
            words = re.sub(r"\x1b\[[0-9;]*m", "", log.read().decode(errors="replace"))
            raise FetchFailed(f"Maven cannot fetch {artifact}: {words[:OUTPUT_BYTES].strip()}")


def _unpack(archive: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    with tarfile.open(archive) as tar:
        paths = {member: PurePosixPath(member.name) for member in tar}  # normalised: without `./`
        inside = [path.parts for path in paths.values() if path.parts]
        top = 1 if len({parts[0] for parts in inside}) == 1 else 0  # a folder around everything says nothing
        members: list[tarfile.TarInfo] = []
        for member, path in paths.items():
            name = "/".join(path.parts[top:])
            if not name or not wanted(name):
                continue
            if ".." in path.parts or path.is_absolute():
                raise FetchFailed(f"{archive.name} holds {member.name}, which would be unpacked elsewhere.")
            moved = copy.copy(member)
            moved.name = name
            members.append(moved)
        # Python before 3.11.4 has no filters; that one also refuses links to elsewhere, and devices.
        options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(target, members, **options)  # noqa: S202 -- looked at above


def _size_mb(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) >> 20
