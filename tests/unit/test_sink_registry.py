"""Sinks are chosen by their URL's scheme, and two tables never share a place."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from delta_sync.errors import UsageError
from delta_sync.secrets import redact
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


def test_options_within_options_hold_references_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DELTA_TEST_ID", "AKIATEST")
    (tmp_path / "secret").write_text("p@ss:w/ord\n")
    storage = {
        "key": "${env:DELTA_TEST_ID}",
        "secret": f"${{file:{tmp_path}/secret}}",
        "client_kwargs": {"verify": ["${env:DELTA_TEST_ID}", 1]},
    }
    spec = spec_of({"lake": {"url": "parquet+memory://lake", "storage": storage}})
    assert open_sink("lake", spec.sinks["lake"], 60).options.storage == {
        "key": "AKIATEST",
        "secret": "p@ss:w/ord",
        "client_kwargs": {"verify": ["AKIATEST", 1]},
    }
    assert redact("AKIATEST with p@ss:w/ord") == "*** with ***"


@pytest.mark.parametrize(
    ("storage", "name"),
    [
        ({"secret": "Hunter2"}, "storage.secret"),
        ({"connection_string": "AccountKey=Hunter2"}, "storage.connection_string"),
        ({"client_kwargs": {"aws_secret_access_key": "Hunter2"}}, "storage.client_kwargs.aws_secret_access_key"),
        ({"token": {"private_key": "Hunter2"}}, "storage.token"),
    ],
)
def test_a_secret_within_an_option_is_a_reference(storage: dict[str, object], name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(name) + " must be a reference") as refused:
        spec_of({"lake": {"url": "parquet+s3://lake", "storage": storage}})
    assert "Hunter2" not in str(refused.value)


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
