"""The exit status and the last words of `deltactl verify`, by what a verification counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import deltactl.verify
from delta_sync.verifying import KINDS, Tally
from deltactl.main import main

SPEC = """
name: movies
source: {url: postgresql://delta@db/studio}
tables: {public.movie: {}}
sinks: {cache: {url: redis://cache/0}}
"""
MISSING: dict[str, int] = {kind: int(kind == "missing") for kind in KINDS}


@pytest.mark.parametrize(
    ("tally", "exit_code", "words"),
    [
        (Tally(rows=5), 0, "Equal."),
        (Tally(rows=5, dead=1, expired=1), 0, "Equal."),
        (Tally(rows=5, found=MISSING, repaired=1), 0, "Everything that differed was repaired."),
        (Tally(rows=5, found=MISSING), 1, "1 differences."),
        (Tally(rows=5, failed=2), 1, "2 keys could not be verified"),
        (Tally(rows=5, unsettled=1), 1, "1 keys could not be verified"),
        (Tally(rows=5, found=MISSING, repaired=1, unsettled=1), 1, "1 keys could not be verified"),
    ],
)
def test_only_what_was_found_equal_ends_well(
    tally: Tally, exit_code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "pipelines" / "movies"
    home.mkdir(parents=True)
    (home / "pipeline.yaml").write_text(SPEC)
    subject = SimpleNamespace(table=SimpleNamespace(id="public.movie"))
    verifier = SimpleNamespace(verify=lambda _subject: tally, log_rests=False)

    @contextmanager
    def opened(*_arguments: Any) -> Iterator[Any]:
        yield SimpleNamespace(verifier=verifier, subjects=[subject], rounds=None)

    monkeypatch.setattr(deltactl.verify, "open_verification", opened)
    result = CliRunner().invoke(main, ["verify", "movies"])
    assert (result.exit_code, words in result.output) == (exit_code, True), result.output
    if exit_code:
        assert "Equal." not in result.output
    last = CliRunner().invoke(main, ["verify", "movies", "--json"]).stdout.splitlines()[-1]
    assert json.loads(last)["equal"] == (exit_code == 0)
