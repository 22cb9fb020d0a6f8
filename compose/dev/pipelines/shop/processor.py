"""The example: movies from PostgreSQL, as documents."""

from __future__ import annotations

from typing import Any

from delta_sync import Pipeline

shop = Pipeline("shop")


@shop.table("public.movie", to=["cache"])
def movie(row: dict[str, Any]) -> dict[str, Any]:
    """One row in, one document out."""
    return {"id": row["id"], "title": row["title"], "year": row["released"].year if row["released"] else None}
