"""Ready-made look-ups with a real HTTP server, a real PostgreSQL and a real Redis."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import psycopg
import pytest
import redis as redis_client

from delta_sync import LookupBusy, Pipeline, lookup
from delta_sync.errors import ProcessorError, UsageError
from delta_sync.lookups import is_transient
from delta_sync.testing.processes import free_port
from delta_sync.testing.servers import PostgreSQL, Redis


class Service(BaseHTTPRequestHandler):
    """Answers with what a test has put there; remembers what it was asked."""

    reply: ClassVar[tuple[int, bytes]] = (200, b"[]")
    asked: ClassVar[list[tuple[str, bytes, str | None]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        Service.asked.append((self.path, body, self.headers.get("Authorization")))
        status, answer = Service.reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST  # noqa: N815 -- http.server's name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's signature
        """A call is no event."""


@pytest.fixture
def service() -> Iterator[str]:
    Service.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def answers(value: object, status: int = 200) -> None:
    Service.reply = status, json.dumps(value).encode()


def test_http_asks_once_and_finds_the_keys_in_the_answer(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "open-sesame")
    ratings = lookup.http("ratings", f"{service}/bulk", key="id", headers={"Authorization": "Bearer ${env:TOKEN}"})
    assert ratings.__name__ == "ratings"
    answers([{"id": 2, "stars": 4}, {"id": 99, "stars": 0}, {"id": 1, "stars": 3}])
    assert ratings([1, 2, 3]) == {1: {"id": 1, "stars": 3}, 2: {"id": 2, "stars": 4}}
    assert Service.asked == [("/bulk", b"[1,2,3]", "Bearer open-sesame")]
    declared = Pipeline("movies").lookup(batch=5)(ratings)
    assert (declared.name, declared.batch) == ("ratings", 5)

    one, other = uuid.uuid4(), uuid.uuid4()
    nested = lookup.http("ratings", service, key="of", send="ids", items="found")
    answers({"found": [{"of": str(other)}]})
    assert nested([one, other]) == {other: {"of": str(other)}}
    assert json.loads(Service.asked[-1][1]) == {"ids": [str(one), str(other)]}

    got = lookup.http("ratings", f"{service}/m%20x?ids={{keys}}", key="id")
    answers([{"id": "a,b"}])
    assert got(["a,b", "c"]) == {"a,b": {"id": "a,b"}}
    assert Service.asked[-1][0] == "/m%20x?ids=a%2Cb,c"


@pytest.mark.parametrize("wrong", [b"", b"<html>", b'{"a": 1}', b'[{"other": 1}]', b"[1]", b"null"])
def test_an_answer_of_another_form_is_no_keys_fault(service: str, wrong: bytes) -> None:
    Service.reply = 200, wrong
    with pytest.raises(LookupBusy, match="form"):
        lookup.http("ratings", service, key="id")([1])


def test_statuses_and_nobody_there(service: str) -> None:
    for status, passes in ((503, True), (429, True), (404, False)):
        answers([], status)
        with pytest.raises(Exception, match=str(status)) as caught:
            lookup.http("ratings", service, key="id")([1])
        assert is_transient(caught.value) is passes
    with pytest.raises(Exception, match="refused") as caught:
        lookup.http("ratings", f"http://127.0.0.1:{free_port()}", key="id")([1])
    assert is_transient(caught.value)


def test_sql_makes_one_query(postgresql: PostgreSQL) -> None:
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE rating (movie int, stars int)")
        connection.execute("INSERT INTO rating VALUES (1, 3), (2, 4), (2, 5)")
        try:
            query = "SELECT movie, stars FROM rating WHERE movie IN :keys ORDER BY stars"
            single = lookup.sql("ratings", postgresql.url, query, key="movie")
            assert single([1, 3]) == {1: {"movie": 1, "stars": 3}}
            several = lookup.sql("ratings", postgresql.url, query, key="movie", many=True)
            assert {key: [row["stars"] for row in rows] for key, rows in several([1, 2]).items()} == {1: [3], 2: [4, 5]}
            with pytest.raises(ProcessorError, match="no column id; it has movie, stars"):
                lookup.sql("ratings", postgresql.url, query, key="id")([1])
            with pytest.raises(Exception, match="nonsense") as caught:
                lookup.sql("ratings", postgresql.url, "SELECT nonsense FROM rating WHERE movie IN :keys", key="x")([1])
            assert not is_transient(caught.value)
        finally:
            connection.execute("DROP TABLE rating")
    gone = postgresql.url.replace(f":{postgresql.port}", f":{free_port()}")
    with pytest.raises(LookupBusy, match="does not answer"):
        lookup.sql("ratings", gone, query, key="movie")([1])


def test_redis_asks_for_all_at_once(redis_server: Redis) -> None:
    with redis_client.Redis.from_url(redis_server.url) as client:
        client.mset({"r:1": '{"stars": 3}', "r:a": "text", "r:e": ""})
        client.hset("r:2", mapping={"stars": "4"})
        try:
            assert lookup.redis("ratings", redis_server.url, "r:{key}")([1, 5]) == {1: {"stars": 3}}
            assert lookup.redis("ratings", redis_server.url, "r:{key}", form="text")(["a", "e", "x"]) == {
                "a": "text",
                "e": "",
            }
            assert lookup.redis("ratings", redis_server.url, "r:{key}", form="hash")([2, 5]) == {2: {"stars": "4"}}
            with pytest.raises(redis_client.ResponseError) as caught:
                lookup.redis("ratings", redis_server.url, "r:{key}")([2])
            assert not is_transient(caught.value)
        finally:
            client.delete("r:1", "r:a", "r:e", "r:2")
    with pytest.raises(LookupBusy, match="does not answer"):
        lookup.redis("ratings", f"redis://127.0.0.1:{free_port()}", "r:{key}")([1])


def test_mistakes_are_said_at_import() -> None:
    makes: list[Any] = [
        lambda: lookup.http("my ratings", "http://x", key="id"),
        lambda: lookup.sql("ratings", "sqlite://", "SELECT 1", key="id"),
        lambda: lookup.redis("ratings", "redis://x", "rating"),
        lambda: lookup.redis("ratings", "redis://x", "{key}", form="yaml"),  # type: ignore[arg-type]  # that is the mistake
        lambda: lookup.sql("ratings", "database", "SELECT … WHERE id IN :keys", key="id"),
    ]
    for make in makes:
        with pytest.raises(UsageError):
            make()
