"""Secrets are references: no file, log or error has one that was given in plain text."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from delta_sync.errors import UsageError
from delta_sync.secrets import redact
from delta_sync.urls import check_url, split_url
from deltactl.main import main

# As people copy them out of a password manager; each part of one would show which it was.
UNENCODED = ["TopPart/restPart", "TopPart#restPart", "TopPart?restPart", "Top[Part]rest", "Top]Part", "12/restPart"]
UNENCODED += ["Top@12/restPart", "TopPart%zz"]
PARTS = ("Top", "rest", "Part")


@pytest.mark.parametrize("password", UNENCODED)
@pytest.mark.parametrize(
    "options",
    [
        ["--source", "postgresql://delta:{}@db/studio", "--sink", "redis://cache/0"],
        *(
            ["--source", "postgresql://delta@db/studio", "--sink", sink]
            for sink in (
                "a=redis://:{}@cache/0",
                "a=rediss://u:{}@cache/0",
                "a=http://u:{}@search:9200/movies",
                "a=mongodb://u:{}@docs/shop",
                "a=mongodb://u:{}@one:27017,two:27017/shop",
            )
        ),
        [
            *("--source", "postgresql://delta@db/studio", "--sink", "redis://cache/0"),
            *("--kafka", "b:9092", "--registry", "http://u:{}@registry:8081"),
        ],
    ],
    ids=lambda options: next(option for option in options if "{}" in option),
)
@pytest.mark.parametrize("more", [[], ["--debug"], ["--json"]], ids=["plain", "debug", "json"])
def test_no_error_quotes_a_password_that_is_not_encoded(
    tmp_path: Path, password: str, options: list[str], more: list[str]
) -> None:
    arguments = [option.format(password) if "://" in option else option for option in options]
    command = ["pipeline", "create", "x", "--table", "public.movie", "--dir", str(tmp_path), *arguments, *more]
    result = CliRunner().invoke(main, command)
    assert [part for part in PARTS if part in result.output] == [], result.output
    assert "percent-encoded" in result.stderr
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://delta:Top%2FPart@db:5432/studio?sslmode=require",
        "postgresql://delta:${file:/run/pw}@db/studio",
        "postgresql://${env:USER}@${env:HOST}:${env:PORT}/${env:NAME}",
        "mongodb://u:p%40w@one:27017,[::1]:27017/shop?replicaSet=rs",
        "redis://:p:w@cache:6379/0",
        "http://[::1]:9200/movies",
        "file:///home/me@work/x",
    ],
)
def test_what_can_be_read_is_let_through(url: str) -> None:
    check_url(url, "it")


def test_the_cause_of_an_unreadable_url_is_in_no_trace() -> None:
    with pytest.raises(UsageError) as caught:
        split_url("http://u:TopPart/x@h", "it")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no postgresql://u:pw@h/db there", "no postgresql://u:***@h/db there"),
        ("no postgresql://u:a/b?c#d@h/db there", "no postgresql://u:***@h/db there"),
        ("no 'redis://:a@b@h/0' there", "no 'redis://:***@h/0' there"),
        ("http://h:9200/x and u@h", "http://h:9200/x and u@h"),
        ('{"a":"http://h:9200/x","b":"redis://u@h/0"}', '{"a":"http://h:9200/x","b":"redis://u@h/0"}'),
        ("redis://:${env:PW}@h/0", "redis://:${env:PW}@h/0"),
    ],
)
def test_a_password_in_a_url_is_redacted(text: str, expected: str) -> None:
    assert redact(text) == expected
