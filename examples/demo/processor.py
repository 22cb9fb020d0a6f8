"""What pipeline movies writes: one row of the source in, one document out."""

import os
from typing import Any

import requests

from delta_sync import Document, Pipeline, Row

movies = Pipeline("movies")


@movies.lookup(batch=500, ttl="10m")
def ratings(movie_ids: list[int]) -> dict[int, dict[str, Any]]:
    """Ask the ratings service, once for all rows of a batch."""
    url = os.environ["RATINGS_URL"] + "/ratings"
    reply = requests.post(url, json=movie_ids, timeout=2)
    reply.raise_for_status()
    return {rated["movie_id"]: rated for rated in reply.json()}


@movies.table("public.movie", to=["cache"], enrich={"rating": ratings.by("id")})
def movie(row: Row, rating: dict[str, Any] | None) -> Document | None:
    return {
        "id": row["id"],
        "title": row["title"],
        "year": row["year"],
        "stars": rating["stars"] if rating else None,
    }
