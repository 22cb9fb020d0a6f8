"""A service that rates movies and behaves as it is told: `python moody_service.py PORT SEED`.

    POST /stars, /stock  [1, 2]   →  [{"id": 1, "value": 17}, …]: for every id, as the mood allows
    POST /label          [1, 2]   →  the same, whatever the mood; the values are as far from those as it is told
    PUT  /label          1000     →  how far that is from now on
    PUT  /mood           "slow"   →  how often it was asked since the last change of its mood
    GET  /mood                    →  the same, without a change

Needs nothing but Python.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_S = 0.2
MOODS = ("well", "slow", "random", "part", "wrong", "garbage", "busy", "down", "half")


def value_of(id_: int) -> int:
    """Return what the service says of an id, whenever it does."""
    return id_ * 7919 % 1000


class Handler(BaseHTTPRequestHandler):
    """Answers one request; the mood is the whole server's."""

    protocol_version = "HTTP/1.1"
    mood = "well"
    asked = 0
    shift = 0
    rng = random.Random(0)
    lock = threading.Lock()

    def do_POST(self) -> None:
        """Rate what is asked for, as the mood allows."""
        ids: list[int] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/label":
            self._answer(200, [{"id": id_, "value": value_of(id_) + Handler.shift} for id_ in ids])
            return
        with Handler.lock:
            Handler.asked += 1
            mood, chance = Handler.mood, Handler.rng.random()
        answers = [{"id": id_, "value": value_of(id_)} for id_ in ids]
        match mood:
            case "slow":
                threading.Event().wait(SLOW_S)
            case "random" if chance < 0.5:
                self._answer(500 if chance < 0.25 else 503, {"error": "by chance"})
                return
            case "part" if chance < 0.7:
                answers = answers[: len(answers) // 2]
            case "wrong" if chance < 0.7:
                self._answer(200, {"error": "in another form"})
                return
            case "garbage" if chance < 0.7:
                self._answer(200, b"<html>not what was asked for")
                return
            case "busy" if chance < 0.7:
                self._answer(429, {"error": "too many"}, {"Retry-After": "0"})
                return
            case "half" if self.path == "/stars":
                pass
            case "down" | "half":
                self.close_connection = True
                return  # without an answer
            case _:
                pass
        self._answer(200, answers)

    def do_PUT(self) -> None:
        """Change the mood, or the labels."""
        mood = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/label":
            Handler.shift = mood
            self._answer(200, mood)
            return
        assert mood in MOODS
        with Handler.lock:
            asked, Handler.asked, Handler.mood = Handler.asked, 0, mood
        self._answer(200, asked)

    def do_GET(self) -> None:
        """Say how often it was asked in this mood."""
        self._answer(200, Handler.asked)

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's signature
        """A call is no event."""


if __name__ == "__main__":
    Handler.rng.seed(int(sys.argv[2]))
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()
