"""What the SQL sink decides without a server."""

from __future__ import annotations

import pytest

from delta_sync.changes import Write
from delta_sync.sinks.sql_tables import MAX_COLUMNS, Place, Shape
from delta_sync.sinks.sql_upsert import rows_of, values_of


@pytest.mark.parametrize("is_sqlite", [False, True])
def test_a_column_too_many_is_rejected_and_says_why(is_sqlite: bool) -> None:
    """SQLite takes names that differ in case alone for the same, whether there is room or not; PostgreSQL does not."""
    place = Place(None, "movie", "movie", {}, is_sqlite)
    kinds = dict.fromkeys(["title", *(f"f{n}" for n in range(1, MAX_COLUMNS))], "text")
    shape = Shape(place.rows(kinds), kinds, 0)  # type: ignore[arg-type]  # "text" is a kind
    rows, _, outcomes = rows_of(place, [Write((1,), 5, {"Title": "a"}), Write((2,), 5, {"more": "b"})])
    assert outcomes == {}
    fit, outcomes = values_of("movie", place, shape, rows, 0)
    assert fit == []
    assert "would be one column too many" in outcomes[1].reason
    assert ("which SQLite takes for the same" if is_sqlite else "one column too many") in outcomes[0].reason
