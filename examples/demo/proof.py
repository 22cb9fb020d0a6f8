"""The proof: every row of the source against its document in Redis, and nothing in Redis beside them.

Nothing of Delta is asked here: the rows come from PostgreSQL, the stars from the service, the documents from Redis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import orjson
import psycopg
import redis
import requests

PREFIX = "public.movie:"  # of the documents' keys; Delta's own begin with `delta:`
BATCH = 1000
SERVICE_TIMEOUT_S = 10.0


class Cache:
    """Redis, as far as the demo looks into it."""

    def __init__(self, port: int) -> None:
        client = redis.Redis(port=port, decode_responses=True)
        self.close = client.close
        self._ask: Callable[..., Any] = client.execute_command  # pyright: ignore[reportUnknownMemberType] -- redis-py leaves it untyped

    def version(self) -> str:
        """Return the server's version."""
        return str(self._ask("INFO", "server")["redis_version"])

    def get(self, key: str) -> str:
        """Return what is at a key, as text."""
        return str(self._ask("GET", key))

    def get_all(self, keys: list[str]) -> list[str | None]:
        """Return what is at each key."""
        found: list[str | None] = self._ask("MGET", *keys)
        return found

    def put(self, key: str, text: str) -> None:
        """Store a text."""
        self._ask("SET", key, text)

    def keys(self) -> list[str]:
        """Return the keys of all documents, in order."""
        found: set[str] = set()  # a scan may give a key twice
        cursor = 0
        while True:
            reply = self._ask("SCAN", cursor, "MATCH", f"{PREFIX}*", "COUNT", BATCH)
            cursor = int(reply[0])
            found.update(reply[1])
            if cursor == 0:
                return sorted(found)


class Proof(NamedTuple):
    """What the comparison found. `different` has a line for each row that is not as it must be."""

    rows: int
    documents: int
    rated: int
    equal: int
    different: list[str]

    @property
    def holds(self) -> bool:
        """Whether there are rows at all, and each has its document, and there is no other."""
        return self.rows > 0 and self.rows == self.documents == self.equal and not self.different


def compare(source: psycopg.Connection, cache: Cache, ratings_url: str) -> Proof:
    """Compare every row, its stars included, with its document."""
    expected = expected_documents(source, ratings_url)
    found = dict(documents(cache))
    different = [
        f"{PREFIX}{id_}: expected {_short(expected.get(id_))}, found {_short(found.get(id_))}"
        for id_ in sorted(expected.keys() | found.keys())
        if expected.get(id_) != found.get(id_)
    ]
    rated = sum(document["stars"] is not None for document in found.values())
    equal = sum(expected[id_] == document for id_, document in found.items() if id_ in expected)
    return Proof(len(expected), len(found), rated, equal, different)


def expected_documents(source: psycopg.Connection, ratings_url: str) -> dict[int, dict[str, Any]]:
    """Return what must be in the cache, by id."""
    rows = source.execute("SELECT id, title, year FROM movie").fetchall()
    stars: dict[int, float] = {}
    for ids in _batches([row[0] for row in rows]):
        reply = requests.post(f"{ratings_url}/ratings", json=ids, timeout=SERVICE_TIMEOUT_S)
        reply.raise_for_status()
        stars |= {rated["movie_id"]: rated["stars"] for rated in reply.json()}
    return {id_: {"id": id_, "title": title, "year": year, "stars": stars.get(id_)} for id_, title, year in rows}


def documents(cache: Cache) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield every document in the cache by its id, without the version that Delta adds."""
    for keys in _batches(cache.keys()):
        for key, text in zip(keys, cache.get_all(keys), strict=True):
            if text is not None:
                document = orjson.loads(text)
                del document["_version"]
                yield int(key.removeprefix(PREFIX)), document


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _short(document: Mapping[str, Any] | None) -> str:
    return "nothing" if document is None else orjson.dumps(document).decode()
