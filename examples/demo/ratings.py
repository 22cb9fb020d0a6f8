"""A service that knows how movies are rated, as somebody else's team might run one: `python ratings.py PORT`.

    POST /ratings   [1, 2, 7]  →  [{"movie_id": 1, "stars": 4.6}, {"movie_id": 2, "stars": 1.3}]
    GET /calls      {"calls": 1, "movies": 3}

Every seventh movie has no rating yet. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

UNRATED_EVERY = 7


def stars_of(movie_id: int) -> float | None:
    """Return the rating of a movie, from 1.0 to 5.0: the same one whenever it is asked."""
    if movie_id % UNRATED_EVERY == 0:
        return None
    return 1 + movie_id * 7919 % 41 / 10  # a prime, so that neighbours differ


class Handler(BaseHTTPRequestHandler):
    """Answers one request. Counts are of the whole server."""

    calls = movies = 0

    def do_POST(self) -> None:
        """Rate the movies whose ids are in the body; those without a rating are not in the answer."""
        ids: list[int] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.calls += 1
        Handler.movies += len(ids)
        rated = [(movie_id, stars_of(movie_id)) for movie_id in ids]
        self._answer([{"movie_id": movie_id, "stars": stars} for movie_id, stars in rated if stars is not None])

    def do_GET(self) -> None:
        """Say how often ratings were asked for."""
        self._answer({"calls": Handler.calls, "movies": Handler.movies})

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's signature
        """A call is no event."""


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()
