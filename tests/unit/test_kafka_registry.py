"""What a registry may answer, and what Delta makes of it; the registry is a small real HTTP server."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from delta_sync.errors import CheckFailed, RegistryBusy, SchemaUnfit, SchemaUnknown, Transient, UsageError
from delta_sync.kafka.registry import SchemaRegistry
from delta_sync.spec import RegistrySpec

SCHEMA = {"type": "record", "name": "R", "fields": [{"name": "id", "type": "int"}]}


class Answers(ThreadingHTTPServer):
    """Answers every request with what was set, and keeps what was asked."""

    daemon_threads = True
    delay: threading.Event | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.answer(200, {"schema": json.dumps(SCHEMA)})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/apis/ccompat/v7"

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        self.status: int = status
        self.headers: dict[str, str] = headers
        self.body: bytes = body if isinstance(body, bytes) else json.dumps(body).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Answers
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.delay is not None:
            self.server.delay.wait()
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- its name there
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Answers]:
    answers = Answers()
    thread = threading.Thread(target=answers.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield answers
    answers.shutdown()
    answers.server_close()
    thread.join()


@pytest.fixture
def registry(server: Answers) -> Iterator[SchemaRegistry]:
    made = SchemaRegistry(RegistrySpec(url=server.url + "/"))
    yield made
    made.close()


def test_a_schema_is_fetched_once_and_kept_when_the_registry_goes(server: Answers, registry: SchemaRegistry) -> None:
    assert registry.schema(7) == SCHEMA
    server.answer(503)
    assert registry.schema(7) == SCHEMA
    assert server.asked == [("/apis/ccompat/v7/schemas/ids/7", None)]
    with pytest.raises(RegistryBusy):
        registry.schema(8)
    server.answer(200, {"schema": json.dumps(SCHEMA), "schemaType": "AVRO", "references": []})
    assert registry.schema(8) == SCHEMA, "what failed is asked for again"


def test_basic_authentication(server: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("pä:ss\n", encoding="utf-8")
    spec = RegistrySpec(url=server.url, username="delta", password=f"${{file:{tmp_path}/password}}")
    SchemaRegistry(spec).schema(1)
    assert server.asked[0][1] == "Basic " + base64.b64encode("delta:pä:ss".encode()).decode()


def test_a_token_is_sent_whatever_netrc_says(server: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("REGISTRY_TOKEN", "t0ken")
    SchemaRegistry(RegistrySpec(url=server.url, token="${env:REGISTRY_TOKEN}")).schema(1)
    assert server.asked == [("/apis/ccompat/v7/schemas/ids/1", "Bearer t0ken")]


def test_a_secret_that_is_not_set_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY_TOKEN", raising=False)
    with pytest.raises(UsageError, match="REGISTRY_TOKEN is not set"):
        SchemaRegistry(RegistrySpec(url="http://localhost", token="${env:REGISTRY_TOKEN}"))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_registry_is_asked_again(server: Answers, registry: SchemaRegistry, status: int) -> None:
    server.answer(status, b"<html>busy</html>", Retry_After="7")
    with pytest.raises(RegistryBusy, match=str(status)) as raised:
        registry.schema(1)
    assert isinstance(raised.value, Transient)
    assert raised.value.retry_after_s == 7.0
    server.answer(200, {"schema": json.dumps(SCHEMA)})
    assert registry.schema(1) == SCHEMA


def test_a_registry_that_is_away_is_asked_again(server: Answers) -> None:
    gone = SchemaRegistry(RegistrySpec(url="http://127.0.0.1:1"))
    with pytest.raises(RegistryBusy, match=r"registry at 127\.0\.0\.1:1 cannot be reached"):
        gone.schema(1)
    assert "cannot be reached" in str(gone.check()[0])


def test_a_registry_that_does_not_answer_is_asked_again(server: Answers) -> None:
    server.delay = threading.Event()
    slow = SchemaRegistry(RegistrySpec(url=server.url), timeout_s=0.05)
    try:
        with pytest.raises(RegistryBusy, match="timed out"):
            slow.schema(1)
    finally:
        server.delay.set()
    assert slow.schema(1) == SCHEMA


@pytest.mark.parametrize(("status", "fix"), [(401, "username and password"), (403, "read schemas")])
def test_refused_credentials_are_the_users_to_change(
    server: Answers, monkeypatch: pytest.MonkeyPatch, status: int, fix: str
) -> None:
    monkeypatch.setenv("REGISTRY_PASSWORD", "s3cret")
    spec = RegistrySpec(url=server.url, username="delta", password="${env:REGISTRY_PASSWORD}")
    server.answer(status, b"no: s3cret")
    registry = SchemaRegistry(spec)
    with pytest.raises(CheckFailed) as raised:
        registry.schema(1)
    assert fix in raised.value.problems[0].fix
    assert "s3cret" not in str(raised.value)
    assert registry.check() == list(raised.value.problems)


def test_an_unknown_id_waits(server: Answers, registry: SchemaRegistry) -> None:
    server.answer(404, {"error_code": 40403, "message": "Schema 9 not found"})
    with pytest.raises(SchemaUnknown, match="no schema 9") as raised:
        registry.schema(9)
    assert raised.value.schema_id == 9
    assert isinstance(raised.value, Transient)
    server.answer(200, {"schema": json.dumps(SCHEMA)})
    assert registry.schema(9) == SCHEMA


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"schema": json.dumps(SCHEMA), "references": [{"name": "a.B", "subject": "a-value", "version": 1}]},
            r"refers to other schemas \(a-value\).*dereference-schema=true",
        ),
        ({"schema": 'syntax = "proto3";', "schemaType": "PROTOBUF"}, "PROTOBUF, not Avro"),
        ({"schema": '"string"'}, "not one of a record"),
        ({"schema": "{"}, "not JSON"),
        ({"schema": None}, "not JSON"),
    ],
)
def test_a_schema_that_cannot_be_used_says_why(
    server: Answers, registry: SchemaRegistry, body: dict[str, Any], message: str
) -> None:
    server.answer(200, body)
    with pytest.raises(SchemaUnfit, match=message):
        registry.schema(1)


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, ["AVRO"]), (400, b""), (405, b"")])
def test_what_is_no_registry_is_said(server: Answers, registry: SchemaRegistry, status: int, body: Any) -> None:
    server.answer(status, body)
    with pytest.raises(CheckFailed, match="apis/ccompat/v7"):
        registry.schema(1)


def test_check_tells_a_wrong_address_from_a_right_one(server: Answers, registry: SchemaRegistry) -> None:
    server.answer(200, ["JSON", "PROTOBUF", "AVRO"])
    assert registry.check() == []
    server.answer(404, b"<html>")
    (problem,) = registry.check()
    assert "404" in problem.what
    assert "ccompat" in problem.fix
