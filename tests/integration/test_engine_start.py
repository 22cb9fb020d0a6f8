"""Quick starts of Debezium's engine: recorded once, used by a real JVM, and nothing depends on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from delta_debezium import engine_recording, engine_start

CLASS = "io.debezium.connector.postgresql.connection.pgoutput.PgOutputMessageDecoder"  # far behind the connection
LOADS = f"""
import sys
from delta_debezium.engine_child import java
from delta_debezium.engine_start import quick_start_options, start_jvm
start_jvm(256, *quick_start_options(), "-Xlog:class+load:file=" + sys.argv[1])
java({CLASS!r})
"""
WRITES = "import sys; open(sys.argv[1], 'w').close()"


def test_a_start_takes_its_classes_from_what_was_recorded(tmp_path: Path) -> None:
    engine_recording.record(print)
    subprocess.run([sys.executable, "-c", LOADS, str(tmp_path / "loaded")], check=True)
    (line,) = [line for line in (tmp_path / "loaded").read_text().splitlines() if f" {CLASS} " in line]
    assert "shared objects file" in line


def test_it_is_recorded_once_and_again_for_other_jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, reports = tmp_path / "start-1.aot", list[str]()
    monkeypatch.setattr(engine_recording, "start_cache", lambda: cache)
    monkeypatch.setattr(engine_start, "start_cache", lambda: cache)
    monkeypatch.setattr(engine_recording, "_RECORDING", WRITES)
    assert engine_start.quick_start_options() == []
    for _ in range(2):
        engine_recording.record(reports.append)
    assert len(reports) == 1
    assert f"-XX:AOTCache={cache}" in engine_start.quick_start_options()
    cache = tmp_path / "start-2.aot"
    engine_recording.record(reports.append)
    assert list(tmp_path.iterdir()) == [cache]


def test_what_cannot_be_recorded_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = list[str]()
    monkeypatch.setattr(engine_recording, "start_cache", lambda: tmp_path / "start-1.aot")
    monkeypatch.setattr(engine_recording, "_RECORDING", "raise SystemExit('no space')")
    engine_recording.record(reports.append)
    assert "no space" in reports[-1]
    assert list(tmp_path.iterdir()) == []
