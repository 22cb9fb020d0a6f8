"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog

pytest_plugins = ["delta_sync.testing.stack"]

# Where `make jars` puts them, for those who run pytest by hand.
os.environ.setdefault("DELTA_JARS", str(Path(__file__).parents[1] / ".cache" / "jars"))

# Java's second compiler takes as long as a start does, and pays for itself after minutes, which no test lasts.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")

# A shell that runs tests in the background hands down that SIGINT is ignored, and commands under test would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("delta", deadline=None)  # no test depends on speed
hypothesis.settings.load_profile("delta")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests together, and all scenes with Kafka: one of them takes more than a core, and they come first.

    Side by side they starve each other: leases are lost, connectors start anew, and it all takes longer.
    """
    scenes = {
        item.path
        for item in items
        if "acceptance" in item.path.parts
        and ("kafka" in item.path.name or "kafka" in getattr(item, "fixturenames", ()))
    }
    for item in items:
        item.add_marker(pytest.mark.xdist_group("kafka" if item.path in scenes else str(item.path)))
    items.sort(key=lambda item: item.path not in scenes)


@pytest.fixture(autouse=True)
def _logs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that a test calls in this process configures logging, and loggers keep what they see first."""

    def configure(**options: object) -> None:
        structlog_configure(**{**options, "cache_logger_on_first_use": False})  # type: ignore[arg-type]  # as given

    structlog_configure = structlog.configure
    monkeypatch.setattr(structlog, "configure", configure)
    yield
    structlog.reset_defaults()
