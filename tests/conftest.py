"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis

pytest_plugins = ["delta_sync.testing.stack"]

# Where `make jars` puts them, for those who run pytest by hand.
os.environ.setdefault("DELTA_JARS", str(Path(__file__).parents[1] / ".cache" / "jars"))

# Java's second compiler takes as long as a start does, and pays for itself after minutes, which no test lasts.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")

# A shell that runs tests in the background hands down that SIGINT is ignored, and commands under test would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("delta", deadline=None)  # no test depends on speed
hypothesis.settings.load_profile("delta")
