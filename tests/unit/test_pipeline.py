"""Declarations: every mistake is found at import, and the message says what and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from delta_sync.errors import UsageError
from delta_sync.pipeline import Pipeline, check_columns, check_complete, load_processor
from delta_sync.spec import PipelineSpec, load_spec
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Document, Row

SPEC = """
name: movies
source: {url: "postgresql://delta@db/studio"}
tables: {public.movie: {}, public.genre: {}}
sinks: {cache: {url: "redis://cache/0"}, search: {url: "http://search:9200/movies"}}
"""
PROCESSOR = """from delta_sync import Pipeline
movies = Pipeline("movies")
@movies.lookup(batch=500, ttl="10m")
def ratings(ids):
    return {}
@movies.table("public.movie", to=["cache"], enrich={"rating": ratings.by("id")})
def movie(row, rating):
    return row
@movies.table("public.genre")
def genre(row):
    return row
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "movies"
    made.mkdir()
    (made / "pipeline.yaml").write_text(SPEC)
    return made


def load(folder: Path, text: str) -> Pipeline:
    (folder / "processor.py").write_text(text)
    return load_processor(folder, load_spec(folder))


def test_declarations(folder: Path) -> None:
    pipeline = load(folder, PROCESSOR)
    movie, genre = pipeline.tables["public.movie"], pipeline.tables["public.genre"]
    assert (movie.to, genre.to) == (("cache",), ())
    assert movie.function({"id": 1}, rating=5) == {"id": 1}  # as a test of it would call it
    (lookup,) = pipeline.lookups.values()
    assert movie.enrich == {"rating": lookup.by("id")}
    assert (lookup.name, lookup.batch, lookup.ttl_s, lookup.timeout_s, lookup.concurrency) == (
        "ratings",
        500,
        600,
        10,
        4,
    )
    assert lookup([1]) == {}


GENRE = "line 9 (genre): "
MOVIE = "line 6 (movie): "
RATINGS = "line 3 (ratings): "
LIMITS = RATINGS + "batch, cache_size, concurrency, trip_after and timeout must be above 0"
PIPELINE = 'movies = Pipeline("movies")'

MISTAKES = [
    # what of PROCESSOR is replaced, by what, and parts of the message
    ('to=["cache"]', 'to="cache"', [MOVIE + '`to` takes a list of sinks; write to=["cache"]']),
    ('to=["cache"]', 'to=["cash"]', [MOVIE + "there is no sink 'cash' in pipeline.yaml, which has cache, search"]),
    ('"public.movie"', '"public.film"', [MOVIE + "table 'public.film' is not in pipeline.yaml, which has public.m"]),
    ('"public.genre"', '"public.movie"', [GENRE + "table public.movie is declared twice", MOVIE[:-2]]),
    (PIPELINE, 'movies = Pipeline("films")', [MOVIE + "Pipeline('films'), but pipeline.yaml is of 'movies'"]),
    ("movie(row, rating)", "movie(row)", [MOVIE + "it must take (row, rating), as `enrich` says, but", "'rating'"]),
    ("movie(row, rating)", "movie(row, rating, more)", [MOVIE + "it must take (row, rating)", "'more'"]),
    ("def genre(row)", "def genre()", [GENRE + "it must take (row)"]),
    ("def genre(row)", "async def genre(row)", [GENRE + "a processor is a plain function"]),
    ("genre(row):\n    return", "genre(row):\n    yield", [GENRE + "a processor is a plain function"]),
    ('ratings.by("id")', "ratings", [MOVIE + 'enrich={"rating": …} takes `lookup.by("column")`']),
    ('ratings.by("id")', "ratings.by(3)", [MOVIE + "rating is looked up by a column's name or a function, not by 3"]),
    ('ratings.by("id")', 'ratings.by("")', [MOVIE + "rating is looked up by a column's name or a function, not by ''"]),
    (
        'ratings.by("id")',
        "ratings.by(lambda: 1)",
        [MOVIE + "rating is looked up by a plain function that takes one arg"],
    ),
    ("def ratings(ids)", "def ratings()", [RATINGS + "a look-up takes one argument, the list of keys"]),
    ("def ratings(ids)", "def ratings(ids, more)", [RATINGS + "a look-up takes one argument, the list of keys"]),
    ('ttl="10m"', 'ttl="soon"', [RATINGS, "'soon'"]),
    ("batch=500", "batch=0", [LIMITS]),
    ("batch=500", 'batch="500"', [RATINGS + "batch takes a whole number, not '500'"]),
    ("batch=500", "concurrency=True", [RATINGS + "concurrency takes a whole number, not True"]),
    ("batch=500", "cache_size=1e3", [RATINGS + "cache_size takes a whole number, not 1000.0"]),
    ('lookup(batch=500, ttl="10m")', "lookup", [RATINGS + "@….lookup needs parentheses; write @….lookup()"]),
    ('table("public.genre")', "table", [GENRE + '@….table needs the table\'s name; write @….table("schema.name")']),
    ('to=["cache"]', "to=[movies]", [MOVIE + '`to` takes a list of sinks\' names, such as to=["cache"]']),
    ('to=["cache"]', "to=[]", [MOVIE + "to=[] names no sink; leave `to` out for all of them"]),
    ('to=["cache"]', 'to=["cache", "cache"]', [MOVIE + "`to` names 'cache' twice"]),
    ("    return {}", "    yield {}", [RATINGS + "a look-up is no generator; it returns a mapping"]),
    ("batch=500", 'deadline="1s"', [RATINGS + "a look-up that is required has no deadline; write required=False"]),
    ("batch=500", "required=False, deadline=0", [RATINGS + "pause and deadline must be above 0"]),
    ("batch=500", "trip_after=0", [LIMITS]),
    (PIPELINE, PIPELINE + '\nimport sys\nsys.exit("stop")', ["processor.py line 4 does not import: SystemExit: stop"]),
    (PIPELINE, PIPELINE + "\nexit()", ["processor.py line 3 does not import: SystemExit: None"]),
    ('to=["cache"]', "to=5", [MOVIE + '`to` takes a list of sinks\' names, such as to=["cache"]']),
    ('@movies.table("public.genre")', "@movies.table()", ["processor.py line 9 does not import: TypeError"]),
    (PIPELINE, PIPELINE + "\nimport nonsense", ["processor.py line 3 does not import: ModuleNotFoundError"]),
    (PIPELINE, PIPELINE + "\nimport broken", ["processor.py line 3 does not import: SyntaxError", "broken.py, line 2"]),
    ("batch=500", "timeout=0", [LIMITS]),
    ("batch=500", "concurrency=0", [LIMITS]),
    ("batch=500", "cache_size=0", [LIMITS]),
    ('@movies.table("public.genre")', "", ["pipeline.yaml has table public.genre, but processor.py has no function"]),
    ("    return {}", "    return {", ["processor.py line ", " does not import: SyntaxError"]),
    (PIPELINE, PIPELINE + "\n1 / 0", ["processor.py line 3 does not import: ZeroDivisionError"]),
    (PIPELINE, PIPELINE + '\nother = Pipeline("x")', ["processor.py must define one Pipeline, and defines 2"]),
]


@pytest.mark.parametrize(("old", "new", "parts"), MISTAKES, ids=[f"{old!r} to {new!r}" for old, new, _ in MISTAKES])
def test_a_mistake_is_found_at_import(
    folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, parts: list[str]
) -> None:
    assert old in PROCESSOR
    (folder / "broken.py").write_text("#\n(")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder.parent.parent)
    # As the command has it by default; only the processor's own lines are meant, not those of what it imports.
    relative = folder.relative_to(folder.parent.parent)
    with pytest.raises(UsageError) as caught:
        load(relative, PROCESSOR.replace(old, new, 1))
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert caught.value.exit_status == 2


def test_a_look_up_declared_twice() -> None:
    pipeline = Pipeline("movies")

    def ratings(keys: list[Any]) -> dict[Any, Any]:
        return {}

    pipeline.lookup()(ratings)
    with pytest.raises(UsageError, match=r"test_pipeline.py line \d+ \(ratings\): look-up ratings is declared twice"):
        pipeline.lookup()(ratings)


def test_the_file_is_missing(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no .*processor.py"):
        load_processor(folder, load_spec(folder))


def test_without_a_specification_beside_it_it_is_checked_later(folder: Path) -> None:
    """As in a test of a processor that lies elsewhere."""
    pipeline = Pipeline("movies")

    @pipeline.table("public.movie", to=["nowhere"])
    def movie(row: dict[str, Any]) -> dict[str, Any]:
        return row

    spec: PipelineSpec = load_spec(folder)
    with pytest.raises(UsageError, match="there is no sink 'nowhere'"):
        check_complete(pipeline, spec)


def test_a_lookup_is_asked_by_a_column_that_is_there_and_can_be_compared() -> None:
    pipeline = Pipeline("movies")

    @pipeline.lookup()
    def ratings(keys: list[int]) -> dict[int, int]:
        return dict.fromkeys(keys, 5)

    @pipeline.table("public.movie", enrich={"rating": ratings.by("idd")})
    def movie(row: Row, rating: int | None) -> Document | None:
        return {"rating": rating, **row}

    columns = (Column("id", "bigint", Kind.INTEGER), Column("tags", "text[]", Kind.TEXT, dimensions=1))
    tables = {"public.movie": Table("public", "movie", columns, ("id",))}
    with pytest.raises(UsageError, match=r"\(movie\): rating=ratings.by\('idd'\), but public.movie has no such column"):
        check_columns(pipeline, tables)
    pipeline.tables["public.movie"].enrich["rating"] = ratings.by("tags")  # type: ignore[index]  # a dict, in truth
    with pytest.raises(UsageError, match="tags is text"):
        check_columns(pipeline, tables)
    pipeline.tables["public.movie"].enrich["rating"] = ratings.by("id")  # type: ignore[index]  # a dict, in truth
    check_columns(pipeline, tables)


def test_a_generation_of_a_sink_may_have_a_function_of_its_own() -> None:
    pipeline = Pipeline("movies")

    @pipeline.table("public.movie", to=["search.1", "cache.1"])
    def before(row: Document) -> Document:
        return {"name": row["title"]}

    @pipeline.table("public.movie")
    def movie(row: Document) -> Document:
        return {"title": row["title"]}

    @pipeline.table("public.genre")
    def genre(row: Document) -> Document:
        return row

    def made_by(table: str, *sinks: str) -> list[tuple[object, list[str]]]:
        return [(one.function, names) for one, names in pipeline.made_by(table, sinks)]

    # What was never rebuilt is its first generation, so nothing changes for it before it is.
    assert made_by("public.movie", "docs", "search", "cache") == [(movie, ["docs"]), (before, ["search", "cache"])]
    assert made_by("public.movie", "search.1", "search.2") == [(before, ["search.1"]), (movie, ["search.2"])]
    assert made_by("public.movie", "search.2", "search.10") == [(movie, ["search.2", "search.10"])]
    assert made_by("public.genre", "search.1", "search.2") == [(genre, ["search.1", "search.2"])]
    assert [one.function for one in pipeline.functions()] == [movie, genre, before, before]
    with pytest.raises(UsageError, match=r"public.movie for cache.1 is declared twice, before in .*\(before\)"):
        pipeline.table("public.movie", to=["cache.1"])(genre)
    for to in (["search.1", "cache"], ["search.one"], ["search."]):
        with pytest.raises(UsageError, match="it can name nothing else"):
            pipeline.table("public.movie", to=to)(genre)
