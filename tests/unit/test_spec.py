"""`pipeline.yaml`: each mistake is one sentence with the line, the place, and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from delta_sync.errors import UsageError
from delta_sync.secrets import resolve
from delta_sync.sinks import open_sinks
from delta_sync.spec import load_spec, parse_spec
from deltactl.files import read_all

SPEC = """# line 1
name: movies
source:
  url: postgresql://delta@db/studio
tables:
  public.movie:
    sinks:
      cache: {key: 'movie:{id}'}
sinks:
  cache:
    url: redis://cache/0
errors:
  max_dead_letters_per_minute: 5
"""


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        open_sinks(parse_spec(text, "it"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("errors:\n", "source:\n", "it line 12: source is there twice, before in line 3."),
        (
            "  max_dead",
            "  max_dead_letters_per_minute: 1\n  max_dead",
            "it line 14: max_dead_letters_per_minute is there",
        ),
        ("{key: 'movie:{id}'}", "{key: a, key: b}", "it line 8: key is there twice"),
        ("  max_dead_letters_per", "  most_per", "it line 13: errors.most_per_minute: there is no such option here;"),
        ("  max_dead_letters_per", "  most_per", "options are max_dead_letters_per_minute."),
        ("errors:\n", "error:\n", "it line 12: error: there is no such option here; the options are name, source, ta"),
        ("  url: postg", "  ulr: postg", "it line 3: source.url: it is missing."),
        (
            "minute: 5",
            "minute: much",
            "it line 13: errors.max_dead_letters_per_minute: Input should be a valid integer",
        ),
        ("source:\n", "source: x\nload:\n", "it line 3: source: it must hold options, each as `name: value` in a line"),
        ("  url: postg", "  password: x\n  url: postg", "it line 4: source.password must be a reference"),
        ("  public.movie:\n", "  movie:\n", "it: table 'movie' must be given with its schema"),
        (
            "    url: redis://cache/0",
            "    url: redis://cache/0\n    clutser: true",
            "sinks.cache: clutser: there is no",
        ),
        ("    url: redis://cache/0", "    url: redis://cache/0\n    clutser: true", "the options are cluster, "),
        ("name: movies", "name: &a [*a]", "it line 2: name: "),
        ("  public.movie:\n", "  public.movie:\n    shap: {}\n", "no such option here; the options are shape, sinks."),
        (
            "  public.movie:\n",
            "  public.movie:\n    shape: {exlude: [a]}\n",
            "tables.public.movie.shape.exlude: there is no such option here; the options are where, include,",
        ),
        (
            "  public.movie:\n",
            "  public.movie:\n    shape: {mask: {a: {redakt: true}}}\n",
            "there is no such option here; the options are hash, ",
        ),
    ],
)
def test_a_mistake_has_its_line(old: str, new: str, words: str) -> None:
    assert old in SPEC
    message = refusal(SPEC.replace(old, new, 1))
    assert words in message
    assert "Extra inputs" not in message


def test_nothing_is_said_twice() -> None:
    assert refusal(SPEC.replace("  url: postg", "  password: x\n  url: postg")).count("source.password") == 1


def test_what_is_right_is_let_through() -> None:
    assert parse_spec(SPEC, "it").errors.max_dead_letters_per_minute == 5


def test_files_that_are_no_text_are_told_of(tmp_path: Path) -> None:
    """Also by `deltactl pipeline list`, which shows the others all the same."""
    for name in ("movies", "music"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pipeline.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"pipeline\.yaml is no text in UTF-8"):
        load_spec(tmp_path / "movies")
    with pytest.raises(UsageError, match=r"pipeline\.yaml\} is no text in UTF-8"):
        resolve(f"${{file:{tmp_path / 'movies' / 'pipeline.yaml'}}}")
    assert read_all(tmp_path / "movies", ["pipeline.yaml"]) == {"pipeline.yaml": "\ufffd\ufffd"}
