"""The files that `pipeline create` writes, without any server."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest

from delta_sync.errors import UsageError
from delta_sync.spec import dump_spec, parse_spec, spec_from
from delta_sync.tables import Column, Kind, Table
from deltactl.generate import (
    processor_source,
    source_from_url,
    spec_from_options,
    split_sinks,
    without_secrets,
)

MOVIE = Table(
    "public",
    "movie",
    (
        Column("id", "integer", Kind.INTEGER, nullable=False),
        Column("title", "text", Kind.TEXT),
        Column("tags", "text[]", Kind.TEXT, dimensions=1),
        Column("price", "numeric(10,2)", Kind.DECIMAL),
    ),
    ("id",),
)
NASTY_NAMES = (
    "class",
    "row",
    "two words",
    'quo"te',
    "back\\slash",
    "new\nline",
    "größe",
    "}",
    "{id}",
    "1st",
    "tab\t",
    "'",
)
NASTY = Table("Film Club", "Order", tuple(Column(name, 'odd "type"\n', Kind.MAP) for name in NASTY_NAMES), ("class",))


def rows_of(source: str, name: str) -> dict[str, object]:
    """Run a generated file and call its function with a row that holds each column's own name."""
    space: dict[str, object] = {}
    exec(compile(source, "processor.py", "exec"), space)
    function = space[name]
    assert callable(function)
    row = {column: column for column in NASTY_NAMES}
    document = function(row)
    assert isinstance(document, dict)
    return document


def test_every_column_is_written_whatever_its_name() -> None:
    source = processor_source("movies", [NASTY], ["cache"])
    assert rows_of(source, "order") == {name: name for name in NASTY_NAMES}


def test_it_declares_tables_and_sinks() -> None:
    space: dict[str, object] = {}
    exec(processor_source("movies", [MOVIE, NASTY], ["cache", "search"]), space)
    declared = getattr(space["movies"], "tables")  # noqa: B009 -- of the Pipeline, which an untyped namespace holds
    assert set(declared) == {"public.movie", "Film Club.Order"}
    assert declared["public.movie"].to == ("cache", "search")


def test_it_is_formatted_and_typed(tmp_path: Path) -> None:
    path = tmp_path / "processor.py"
    sinks = ["a_sink_with_a_long_name", "another_sink_with_a_long_name", "a_third_one"]
    path.write_text(processor_source("movies", [MOVIE], sinks))
    for command in (["ruff", "format", "--isolated", "--check"], ["mypy", "--strict"]):
        done = subprocess.run([sys.executable, "-m", *command, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("pipeline", "tables"),
    [
        ("movie", [("public", "movie")]),
        ("pipeline", [("public", "pipeline")]),
        ("class", [("public", "class"), ("public", "import")]),
        ("print", [("public", "list"), ("public", "dict"), ("public", "row"), ("public", "match")]),
        ("m", [("a", "movie"), ("b", "movie"), ("b", "Movie"), ("b", "mo vie"), ("b", "mo_vie")]),
        ("m", [("public", "Row"), ("public", "Document"), ("public", "1"), ("public", "§")]),
    ],
)
def test_names_never_collide(pipeline: str, tables: list[tuple[str, str]]) -> None:
    made = [Table(schema, name, MOVIE.columns, ("id",)) for schema, name in tables]
    source = processor_source(pipeline, made, ["cache"])
    tree = ast.parse(source)
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    names += [
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    assert len(names) == len(set(names)) == len(tables) + 1
    assert not set(names) & (set(dir(builtins)) | {"Row", "Document", "Pipeline", "row"})
    exec(source, {})


@pytest.mark.parametrize(
    ("url", "expected", "secrets"),
    [
        ("postgresql://u@h/db", {"url": "postgresql://u@h/db"}, {}),
        (
            "postgresql://u:p%40ss@h:1/db?sslmode=require",
            {"url": "postgresql://u@h:1/db?sslmode=require", "password": "${env:M_SOURCE_PASSWORD}"},
            {"M_SOURCE_PASSWORD": "p@ss"},
        ),
        (
            "postgresql://u:p@ss@h/db",
            {"url": "postgresql://u@h/db", "password": "${env:M_SOURCE_PASSWORD}"},
            {"M_SOURCE_PASSWORD": "p@ss"},
        ),
        ("postgresql://u:${env:PW}@h/db", {"url": "postgresql://u@h/db", "password": "${env:PW}"}, {}),
        ("postgresql://u:${file:/run/pw}@h/db", {"url": "postgresql://u@h/db", "password": "${file:/run/pw}"}, {}),
        ("postgresql://u@${env:HOST}/db", {"url": "postgresql://u@${env:HOST}/db"}, {}),
        (
            "postgresql://u@h/db?password=x&sslmode=require",
            {"url": "postgresql://u@h/db?sslmode=require", "password": "${env:M_SOURCE_PASSWORD}"},
            {"M_SOURCE_PASSWORD": "x"},
        ),
    ],
)
def test_a_password_never_stays_in_the_source(url: str, expected: dict[str, str], secrets: dict[str, str]) -> None:
    assert source_from_url(url, "M_SOURCE") == (expected, secrets)


@pytest.mark.parametrize(
    ("url", "expected", "secrets"),
    [
        ("redis://h/0", "redis://h/0", {}),
        ("redis://:pw@h:6379/0", "redis://:${env:M_PASSWORD}@h:6379/0", {"M_PASSWORD": "pw"}),
        ("https://u:pw@h:9200/i?timeout=5", "https://u:${env:M_PASSWORD}@h:9200/i?timeout=5", {"M_PASSWORD": "pw"}),
        ("redis://h/0?password=pw", "redis://h/0?password=${env:M_PASSWORD}", {"M_PASSWORD": "pw"}),
        ("mongodb://u:${env:X}@a,b:1/db", "mongodb://u:${env:X}@a,b:1/db", {}),
        ("mongodb://u:pw@a:1,b:2/db.c", "mongodb://u:${env:M_PASSWORD}@a:1,b:2/db.c", {"M_PASSWORD": "pw"}),
    ],
)
def test_a_password_never_stays_in_a_sink(url: str, expected: str, secrets: dict[str, str]) -> None:
    assert without_secrets(url, "M") == (expected, secrets)


def test_the_specification_reads_back() -> None:
    draft = spec_from_options("m", {"url": "postgresql://u@h/db"}, ["public.movie"], {"cache": "redis://:pw@h/0"})
    assert draft.secrets == {"M_CACHE_PASSWORD": "pw"}
    assert parse_spec(dump_spec(draft.spec), "text") == draft.spec
    assert "pw" not in dump_spec(draft.spec).replace("${env:M_CACHE_PASSWORD}", "")


def test_what_the_options_do_not_speak_of_is_kept() -> None:
    existing = spec_from(
        {
            "name": "m",
            "source": {"url": "postgresql://u@h/db", "password": "${env:OLD}", "slot": "mine"},
            "tables": {"public.movie": {"sinks": {"cache": {"key": "k"}, "gone": {"key": "k"}}}, "public.old": {}},
            "sinks": {"cache": {"url": "redis://a/0", "prefix": "p"}, "gone": {"url": "redis://b/0"}},
            "load": {"chunk_rows": 7},
        },
        "test",
    )
    tables, sinks = ["public.movie", "public.new"], {"cache": "redis://new/0"}
    spec = spec_from_options("m", {"url": "postgresql://u@h/db"}, tables, sinks, existing).spec
    assert spec.source.slot == "mine"
    assert spec.source.password == "${env:OLD}"
    assert spec.load.chunk_rows == 7
    assert list(spec.tables) == tables
    assert spec.tables["public.movie"].sinks == {"cache": {"key": "k"}}
    assert spec.sinks["cache"].url == "redis://new/0"
    assert spec.sinks["cache"].options == {"prefix": "p"}
    moved = spec_from_options("m", {"url": "postgresql://u@other/db"}, tables, sinks, existing).spec
    assert moved.source.password is None, "another server has another password"


def test_sinks_are_named_by_option_or_kind() -> None:
    kinds = {"redis": "redis", "http": "search"}
    assert split_sinks(["cache=redis://h/0?a=b", "http://h/i?x=y"], kinds) == {
        "cache": "redis://h/0?a=b",
        "search": "http://h/i?x=y",
    }
    with pytest.raises(UsageError, match="Two sinks are called redis"):
        split_sinks(["redis://a", "redis://b"], kinds)
    with pytest.raises(UsageError, match="lower-case"):
        split_sinks(["Cache=redis://a"], kinds)
    with pytest.raises(UsageError, match="no name before the ="):
        split_sinks(["=redis://a"], kinds)
