"""Sinks are chosen by their URL's scheme, and two tables never share a place."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from delta_sync.errors import UsageError
from delta_sync.sinks import GROUP, installed, kind_of, open_sink, open_sinks, targets_of
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.tables import Column, Kind, Table

MOVIE = Table("public", "movie", (Column("id", "integer", Kind.INTEGER),), ("id",))
GENRE = MOVIE._replace(name="genre")


def spec_of(sinks: dict[str, object], tables: dict[str, object] | None = None) -> PipelineSpec:
    return spec_from(
        {
            "name": "movies",
            "source": {"url": "postgresql://delta@db/studio"},
            "tables": tables or {"public.movie": {}, "public.genre": {}},
            "sinks": sinks,
        },
        "test",
    )


def test_every_sink_is_found_by_its_schemes() -> None:
    assert kind_of("cache", "redis://h/0") == kind_of("cache", "REDISS://h/0") == "redis"
    assert kind_of("docs", "mongodb://h/db") == "mongodb"


def test_a_sink_that_cannot_be_imported_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("broken", "delta_sync.no_such_module:Sink", GROUP),
        EntryPoint("redis", "delta_sync.sinks.redis:RedisSink", GROUP),
    ]
    monkeypatch.setattr("delta_sync.sinks.entry_points", lambda group: points if group == GROUP else [])
    known = installed.__wrapped__()
    assert list(known.classes) == ["redis"]
    assert "ModuleNotFoundError" in known.broken["broken"]


@pytest.mark.parametrize("url", ["memcached://h", "localhost:6379", ""])
def test_an_unknown_scheme_lists_those_that_are_installed(url: str) -> None:
    with pytest.raises(UsageError, match=r"Sink cache: .*redis://"):
        kind_of("cache", url)


def test_options_are_the_sinks_own() -> None:
    spec = spec_of({"cache": {"url": "redis://h/0", "no_such_option": 1}})
    with pytest.raises(UsageError, match=r"sinks\.cache: no_such_option"):
        open_sinks(spec)
    spec = spec_of({"cache": {"url": "redis://h/0"}}, {"public.movie": {"sinks": {"cache": {"no_such_option": 1}}}})
    with pytest.raises(UsageError, match=r"tables\.public\.movie\.sinks\.cache: no_such_option"):
        targets_of(open_sinks(spec).values(), [MOVIE], spec)


def test_secrets_are_resolved_and_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTA_TEST_SECRET", "p@ss:w/ord")
    spec = spec_of({"cache": {"url": "redis://:${env:DELTA_TEST_SECRET}@h/0"}})
    assert open_sink("cache", spec.sinks["cache"], 60).url == "redis://:p%40ss%3Aw%2Ford@h/0"


def test_two_tables_in_one_place_are_refused() -> None:
    shared = {"sinks": {"cache": {"key": "row:{id}"}}}
    spec = spec_of({"cache": {"url": "redis://h/0"}}, {"public.movie": shared, "public.genre": shared})
    with pytest.raises(UsageError, match=r"public\.movie and public\.genre would both be written to row:\{id\}"):
        targets_of(open_sinks(spec).values(), [MOVIE, GENRE], spec)
    spec = spec_of({"cache": {"url": "redis://h/0"}})
    assert len(targets_of(open_sinks(spec).values(), [MOVIE, GENRE], spec)[0][1]) == 2


def test_one_store_under_two_names_is_refused_whoever_logs_in() -> None:
    spec = spec_of({"a": {"url": "redis://u@h/0"}, "b": {"url": "redis://v@H/0"}})
    with pytest.raises(UsageError, match="Sinks a and b are the same store"):
        targets_of(open_sinks(spec).values(), [MOVIE], spec)
    other = spec_of({"a": {"url": "redis://h/0"}, "b": {"url": "redis://h/1"}})
    assert len(targets_of(open_sinks(other).values(), [MOVIE], other)) == 2
