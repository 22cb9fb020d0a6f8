"""Secrets are references: no file, log or error has one that was given in plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from delta_sync.errors import UsageError
from delta_sync.secrets import hidden, literal_password, redact
from delta_sync.sinks import store_of
from delta_sync.spec import spec_from
from delta_sync.urls import check_url, split_url
from deltactl.generate import without_secrets
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


def test_a_password_before_several_hosts_is_found() -> None:
    """Whatever Python's own parser says of an IPv6 address among them: patch releases differ."""
    url = "mongodb://me:Top%2FPart@one:27017,[::1]:27017/shop?replicaSet=rs"
    assert literal_password(url) == "Top/Part"
    assert store_of(url) == "mongodb://one:27017,[::1]:27017/shop"
    assert without_secrets(url, "M") == (url.replace("Top%2FPart", "${env:M_PASSWORD}"), {"M_PASSWORD": "Top/Part"})


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


# ── what is given in plain text ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "expected", "secrets"),
    [
        (
            "mongodb://h/db?tls=true&tlsCertificateKeyFilePassword=Top%2FPart",
            "mongodb://h/db?tls=true&tlsCertificateKeyFilePassword=${env:M_TLSCERTIFICATEKEYFILEPASSWORD}",
            {"M_TLSCERTIFICATEKEYFILEPASSWORD": "Top/Part"},
        ),
        ("x://h/?apiKey=Part", "x://h/?apiKey=${env:M_APIKEY}", {"M_APIKEY": "Part"}),
        ("x://h/?auth-token=Part", "x://h/?auth-token=${env:M_AUTH_TOKEN}", {"M_AUTH_TOKEN": "Part"}),
        ("x://h/?key=Part&CLIENT_SECRET=Q", "x://h/?key=${env:M_KEY}&CLIENT_SECRET=${env:M_CLIENT_SECRET}", None),
        ("postgresql://u@h/db?sslkey=/k.pem&passfile=/p", None, {}),
        ("mongodb://h/db?tlsCertificateKeyFile=/k.pem&key=/k.pem&tokenFile=t", None, {}),
        ("x://h/?password=${env:A}${file:/b}&passwordCharacterEncoding=utf8&tokens=3", None, {}),
    ],
)
def test_create_keeps_every_parameter_that_is_a_secret_by_its_name(
    url: str, expected: str | None, secrets: dict[str, str] | None
) -> None:
    found = without_secrets(url, "M")
    assert found[0] == (expected or url)
    assert secrets is None or found[1] == secrets


@pytest.mark.parametrize("url", ["redis://:a${env:B}@h/0", "redis://h/0?password=a${env:B}"])
def test_create_takes_no_mixture_of_a_secret_and_a_reference(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--sink a: a secret is either .+ or .+, not both\.$"):
        without_secrets(url, "M", "--sink a")


PLAIN = [
    ("source", "url: 'postgresql://delta:TopPart@db/studio'", "source.url spells out a password"),
    ("source", "url: 'postgresql://delta@db/studio?password=TopPart'", "source.url spells out password"),
    ("source", "url: 'postgresql://delta@db/studio?sslpassword=TopPart'", "source.url spells out sslpassword"),
    ("source", "url: 'postgresql://delta@db/studio?ssl${env:A}password=TopPart'", "source.url spells out"),
    ("source", "password: TopPart", "source.password must be a reference"),
    ("source", "password: 'Top${env:PW}'", "source.password must be a reference"),
    ("source", "url: 'postgresql://delta:TopPart/x@db/studio'", "percent-encoded"),
    ("sinks.cache", "url: 'redis://:TopPart@cache/0'", "the sink's url spells out a password"),
    ("sinks.cache", "url: 'redis://:Top${env:PW}@cache/0'", "the sink's url spells out a password"),
    ("sinks.cache", "url: 'redis://cache/0?password=TopPart'", "the sink's url spells out password"),
    ("sinks.cache", "password: TopPart", "password must be a reference"),
    ("sinks.cache", "keyPassword: 12345", "keyPassword must be a reference"),
    ("connector", "database.sslpassword: TopPart", "connector.database.sslpassword must be a reference"),
    ("connector", "database.sslpassword: 'Top${env:PW}'", "connector.database.sslpassword must be a reference"),
    ("", "state: 'postgresql://u:TopPart@db/state'", "state spells out a password"),
    ("", "state: 'postgresql://u@db/state?password=TopPart'", "state spells out password"),
    ("", "state: 'postgresql://u:TopPart/x@db/state'", "percent-encoded"),
]


@pytest.mark.parametrize(("section", "line", "words"), PLAIN, ids=[line for _, line, _ in PLAIN])
def test_a_specification_with_a_secret_in_plain_text_is_refused(
    tmp_path: Path, section: str, line: str, words: str
) -> None:
    data: dict[str, Any] = {
        "name": "x",
        "source": {"url": "postgresql://delta@db/studio"},
        "tables": {"public.movie": {}},
        "sinks": {"cache": {"url": "redis://cache/0"}},
    }
    place = data
    for part in filter(None, section.split(".")):
        place = place.setdefault(part, {})
    place.update(yaml.safe_load(line))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "pipeline.yaml").write_text(yaml.safe_dump(data))
    for command in (["show", "x"], ["list"], ["check", "x"]):
        for more in ([], ["--json"], ["--debug"]):
            result = CliRunner().invoke(main, ["pipeline", *command, "--dir", str(tmp_path), *more])
            assert "Part" not in result.output
            assert "12345" not in result.output
            assert words in result.output


@pytest.mark.parametrize("value", ["!TopPart", "*TopPart", "'TopPart", '"TopPart\\q"', "%TopPart", "TopPart: x"])
def test_what_is_no_yaml_is_not_quoted(tmp_path: Path, value: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "pipeline.yaml").write_text(f"name: x\nsource: {{}}\npassword: {value}\n")
    result = CliRunner().invoke(main, ["pipeline", "show", "x", "--dir", str(tmp_path), "--debug"])
    assert "TopPart" not in result.output
    assert "pipeline.yaml line " in result.output
    assert "is not YAML" in result.output


def test_references_are_let_through() -> None:
    spec = spec_from(
        {
            "name": "x",
            "source": {"url": "postgresql://delta@db/x?sslkey=/k&sslpassword=${env:A}", "password": "${file:/a}"},
            "tables": {"public.movie": {}},
            "sinks": {"cache": {"url": "redis://:${env:A}@cache/0?password=${env:A}", "password": "${env:A}${env:B}"}},
            "connector": {"database.sslpassword": "${env:A}", "database.sslkey": "/k", "poll.interval.ms": 5},
            "state": "postgresql://u:${env:A}@db/state",
        },
        "it",
    )
    assert hidden(spec.model_dump(mode="json")) == spec.model_dump(mode="json")


def test_show_hides_what_is_a_secret_by_its_name() -> None:
    data = {"a": {"keyPassword": "x", "url": "y"}, "b": [{"api_key": 5, "token": "${env:T}"}], "password": None}
    expected = {"a": {"keyPassword": "***", "url": "y"}, "b": [{"api_key": "***", "token": "${env:T}"}]}
    assert hidden(data) == {**expected, "password": None}


def test_a_secret_in_a_urls_parameters_is_redacted() -> None:
    text = "postgresql://u@h/db?password=Top/Part&sslmode=require&sslPassword=${env:A}&key_file=/k 'x?token=Top'"
    assert redact(text) == text.replace("Top/Part", "***").replace("token=Top", "token=***")
