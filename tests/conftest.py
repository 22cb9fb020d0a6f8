"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]  # it has no types

pytest_plugins = ["delta_sync.testing.stack"]

SCENES_WITH_KAFKA = tuple(f"tests/acceptance/test_{name}" for name in ("kafka", "mariadb", "failover", "other"))

# Where `make jars` puts them, for those who run pytest by hand.
os.environ.setdefault("DELTA_JARS", str(Path(__file__).parents[1] / ".cache" / "jars"))

# Java's second compiler takes as long as a start does, and pays for itself after minutes, which no test lasts.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")

# A shell that runs tests in the background hands down that SIGINT is ignored, and commands under test would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("delta", deadline=None)  # no test depends on speed
hypothesis.settings.load_profile("delta")


def _has_kafka(nodeid: str) -> bool:
    return nodeid.startswith(SCENES_WITH_KAFKA)


class _Scheduling(LoadFileScheduling):  # type: ignore[misc]  # likewise
    """Keep a file's tests together, and all scenes with Kafka: one of them takes more than a core.

    Side by side they starve each other: leases are lost, connectors start anew, and it all takes longer.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "kafka" if _has_kafka(nodeid) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    """Let `--numprocesses` distribute tests so."""
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: not _has_kafka(item.nodeid))


class _AtOnce:
    """Print what failed when it fails: a run that is cut short has said so far, too."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test has ended."""
        if report.failed:
            self._terminal.write_line("")
            self._terminal.write_sep("_", f"{report.nodeid} ({report.when}, {report.duration:.0f} s)")
            self._terminal.write_line(report.longreprtext)


@pytest.hookimpl(trylast=True)  # pytest's own makes the terminal's reporter
def pytest_configure(config: pytest.Config) -> None:
    """Have the one process that prints do so."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AtOnce(terminal))


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """A command that a test calls in this process configures logging, and loggers keep what they see first.

    Without the fixture `monkeypatch`, which would then outlive all fixtures of the tests that use it.
    """

    def configure(**options: object) -> None:
        structlog_configure(**{**options, "cache_logger_on_first_use": False})  # type: ignore[arg-type]  # as given

    structlog_configure = structlog.configure
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(structlog, "configure", configure)
        yield
    structlog.reset_defaults()
