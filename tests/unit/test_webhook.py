"""The webhook: what is sent, that a receiver can check the signature, and what its answers lead to."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from delta_sync.errors import EventRefused, Transient, UsageError
from delta_sync.events import Handler, HandlerRunner, RowEvent
from delta_sync.handlers.webhook import Webhook, retry_after_s, signature, signing_key
from delta_sync.testing.processes import free_port

AT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
NOW_S = 1_700_000_000.5
WAIT_S = 30.0  # far above what anything here takes


def event_of(version: int, key: int = 1) -> RowEvent:
    after = {"id": key, "v": version, "price": 2**60}
    return RowEvent("public.movie", (key,), version, "update", None, after, AT)


class Request(NamedTuple):
    headers: dict[str, str]
    body: bytes


class Receiver:
    """A server that answers with the statuses in `answers`, then 204; and keeps what it has taken."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.requests: list[Request] = []
        self.taken: list[Any] = []
        receiver = self

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append(Request({k.lower(): v for k, v in self.headers.items()}, body))
                status, headers = receiver.answers.pop(0) if receiver.answers else (204, {})
                if status == 204:
                    receiver.taken.append(json.loads(body))
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002 -- the base class's name

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()


@pytest.fixture(scope="module")
def server() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.thread.join()
    receiver.server.server_close()


@pytest.fixture
def receiver(server: Receiver) -> Receiver:
    server.answers.clear()
    server.requests.clear()
    server.taken.clear()
    return server


def hook(receiver: Receiver, secret: str = "s3cret") -> Webhook:
    return Webhook(receiver.url, secret=secret, headers={"X-Shop": "7"}, now=lambda: NOW_S)


def test_an_event_is_json_and_signed(receiver: Receiver) -> None:
    hook(receiver)(event_of(5))
    assert receiver.taken == [
        {
            "id": "public.movie/5/1",
            "table": "public.movie",
            "key": [1],
            "version": "5",
            "op": "update",
            "at": "2026-01-02T03:04:05Z",
            "before": None,
            "after": {"id": 1, "v": 5, "price": 2**60},
            "missing": [],
        }
    ]
    (request,) = receiver.requests
    assert request.headers["x-shop"] == "7"
    assert request.headers["webhook-id"] == "public.movie/5/1"
    assert request.headers["webhook-timestamp"] == "1700000000"
    signed = b"public.movie/5/1.1700000000." + request.body
    expected = base64.b64encode(hmac.new(b"s3cret", signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{expected}"


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The example of its specification."""
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_batch_has_one_id_whenever_it_is_sent(receiver: Receiver) -> None:
    events = [event_of(5), event_of(6), event_of(7, key=2)]
    hook(receiver)(events)
    hook(receiver)(events)
    hook(receiver)(events[:2])
    assert [[event["version"] for event in body["events"]] for body in receiver.taken] == [
        ["5", "6", "7"],
        ["5", "6", "7"],
        ["5", "6"],
    ]
    first, again, other = [request.headers["webhook-id"] for request in receiver.requests]
    assert first == again != other


@pytest.mark.parametrize(("status", "header", "wait_s"), [(429, "7", 7.0), (503, None, None), (500, "soon", None)])
def test_what_passes_by_itself_is_transient(
    receiver: Receiver, status: int, header: str | None, wait_s: float | None
) -> None:
    receiver.answers = [(status, {} if header is None else {"Retry-After": header})]
    with pytest.raises(Transient, match=str(status)) as raised:
        hook(receiver)(event_of(5))
    assert raised.value.retry_after_s == wait_s


@pytest.mark.parametrize("status", [301, 400, 401, 410])
def test_anything_else_is_refused(receiver: Receiver, status: int) -> None:
    receiver.answers = [(status, {"Location": receiver.url})]
    with pytest.raises(EventRefused, match=str(status)):
        hook(receiver)(event_of(5))
    assert len(receiver.requests) == 1


def test_nobody_there_is_transient() -> None:
    with pytest.raises(Transient, match="cannot be reached"):
        Webhook(f"http://127.0.0.1:{free_port()}/", secret="s3cret")(event_of(5))


def test_a_receiver_that_fails_now_and_then_gets_each_change_in_order(receiver: Receiver) -> None:
    """With a change that it refuses: that one is a dead letter, and tried once."""
    receiver.answers = [(503, {"Retry-After": "0"}), (204, {}), (429, {"Retry-After": "0"}), (204, {}), (400, {})]
    stopping = threading.Event()
    runner = HandlerRunner(Handler("public.movie", "shop", hook(receiver), None, 1, 3, 1), stopping, 60.0)
    (result,) = runner.submit([event_of(version) for version in range(1, 6)])
    (left,) = result.result(WAIT_S)
    assert left.event.version == 3
    assert "answers 400" in left.error
    assert [event["version"] for event in receiver.taken] == ["1", "2", "4", "5"]
    assert len(receiver.requests) == 7
    runner.close()


def test_a_wait_is_told_in_seconds_or_as_a_date_and_bounded() -> None:
    assert retry_after_s("Wed, 15 Nov 2023 00:00:00 GMT", 1_700_006_390.0) == 10.0
    assert retry_after_s("-5", 0) == 0
    assert retry_after_s("1000000", 0) == 300


def test_what_cannot_be_meant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTA_TEST_SECRET", raising=False)
    for url, secret, why in (
        ("ftp://h/", "s", "must begin with https://"),
        ("https://h/", "", "is empty"),
        ("https://h/", "whsec_!", "must be base64"),
        ("https://h/", "${env:DELTA_TEST_SECRET}", "DELTA_TEST_SECRET is not set"),
    ):
        with pytest.raises(UsageError, match=why):
            Webhook(url, secret=secret)
