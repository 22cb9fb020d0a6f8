"""Processing: rows become writes, and what fails becomes a failure of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pytest

from delta_sync.changes import Change, Write
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import Pipeline
from delta_sync.processing import Processed, process
from delta_sync.tables import Column, Kind, Table

MOVIE = "public.movie"


def table(kind: Kind = Kind.INTEGER) -> Table:
    return Table("public", "movie", (Column("id", "x", kind), Column("title", "text", Kind.TEXT)), ("id",))


def changes(*rows: dict[str, Any] | None) -> list[Change]:
    return [Change(MOVIE, (number,), 100 + number, row) for number, row in enumerate(rows)]


def processed(function: Callable[[dict[str, Any]], Any], given: list[Change], of: Table | None = None) -> Processed:
    pipeline = Pipeline("movies")
    pipeline.table(MOVIE)(function)
    return process(of or table(), pipeline.tables[MOVIE], given, {})


def test_a_row_becomes_a_document_with_its_key_and_version() -> None:
    given = changes({"id": 0, "title": "a"}, {"id": 1, "title": "b"})
    found = processed(lambda row: {"name": row["title"]}, given)
    assert found == Processed(given, [Write((0,), 100, {"name": "a"}), Write((1,), 101, {"name": "b"})], [])


def test_none_is_a_delete() -> None:
    assert processed(lambda row: None, changes({"id": 0})).writes == [Write((0,), 100, None)]


def test_a_row_that_is_gone_is_a_delete_without_a_question() -> None:
    def function(row: dict[str, Any]) -> None:
        raise AssertionError("it is called with rows only")

    assert processed(function, changes(None)).writes == [Write((0,), 100, None)]


def test_an_exception_is_the_failure_of_its_own_change() -> None:
    def function(row: dict[str, Any]) -> dict[str, Any]:
        return {"share": 1 // row["title"]}

    given = changes({"title": 1}, {"title": 0}, {"title": 1})
    found = processed(function, given)
    assert found.changes == [given[0], given[2]]
    assert [write.key for write in found.writes] == [(0,), (2,)]
    (failure,) = found.failures
    assert (failure.change, failure.stage, failure.sink) == (given[1], "process", None)
    assert failure.error.startswith("ZeroDivisionError: ")
    assert "in function" in failure.trace


@pytest.mark.parametrize("returned", ["text", 5, ["a"], True, (("id", 1),)])
def test_what_is_no_document_is_a_failure(returned: object) -> None:
    found = processed(lambda row: returned, changes({"id": 0}))
    assert found.writes == []
    (failure,) = found.failures
    assert type(returned).__name__ in failure.error
    assert "a document is a dict, or None" in failure.error


def test_a_kind_of_dict_becomes_a_dict() -> None:
    class Ordered(dict[str, Any]):
        pass

    (write,) = processed(lambda row: Ordered(id=1), changes({"id": 0})).writes
    assert type(write.document) is dict
    assert write.document == {"id": 1}


def test_a_mapping_that_is_no_dict_is_a_failure() -> None:
    assert processed(lambda row: MappingProxyType(row), changes({"id": 0})).failures


def test_a_processor_may_keep_and_change_its_row() -> None:
    def function(row: dict[str, Any]) -> dict[str, Any]:
        title = row.pop("title")
        row["name"] = title.upper()  # fails for the second row
        return row

    given = changes({"id": 0, "title": "a"}, {"id": 1, "title": None})
    found = processed(function, given)
    assert found.writes == [Write((0,), 100, {"id": 0, "name": "A"})]
    assert found.failures[0].change.row == {"id": 1, "title": None}
    assert found.changes[0].row == {"id": 0, "title": "a"}


def test_one_key_in_two_spellings_is_written_once() -> None:
    """1.0 and 1.00 are one numeric key: their events differ, and a sink takes at most one write per key."""
    given = [
        Change(MOVIE, (Decimal("1.0"),), 20, {"title": "new"}),
        Change(MOVIE, (Decimal(2),), 15, None),
        Change(MOVIE, (Decimal("1.00"),), 10, {"title": "old"}),
    ]
    found = processed(lambda row: row, given, table(Kind.DECIMAL))
    assert [write.version for write in found.writes] == [20, 15]
    assert found.changes == given[:2]


# ── look-ups ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Ratings:
    """A pipeline that enriches with two look-ups; `asked` has the keys of each call."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[Any]]] = []
        self.pipeline = Pipeline("movies")

        @self.pipeline.lookup()
        def ratings(keys: list[Any]) -> Mapping[Any, Any]:
            self.asked.append(("ratings", keys))
            if "poison" in keys:
                raise ValueError("poison")
            return {key: f"rated {key}" for key in keys if key != "unknown"}

        @self.pipeline.lookup()
        def prices(keys: list[Any]) -> Mapping[Any, Any]:
            self.asked.append(("prices", keys))
            return dict.fromkeys(keys, 5)

        @self.pipeline.table(MOVIE, enrich={"rating": ratings.by("title"), "price": prices.by("id")})
        def movie(row: dict[str, Any], rating: str | None, price: int | None) -> dict[str, Any]:
            return {"rating": rating, "price": price}

    def process(self, given: list[Change]) -> Processed:
        stopping = threading.Event()
        callers = {name: LookupCaller(lookup, stopping, lambda: 0.0) for name, lookup in self.pipeline.lookups.items()}
        try:
            return process(table(), self.pipeline.tables[MOVIE], given, callers)
        finally:
            for caller in callers.values():
                caller.close()


def test_arguments_come_from_look_ups_one_call_for_all_rows() -> None:
    ratings = Ratings()
    given = changes({"id": 0, "title": "a"}, {"id": 1, "title": "unknown"}, {"id": 2, "title": "a"})
    found = ratings.process(given)
    assert [write.document for write in found.writes] == [
        {"rating": "rated a", "price": 5},
        {"rating": None, "price": 5},
        {"rating": "rated a", "price": 5},
    ]
    assert sorted(ratings.asked) == [("prices", [0, 1, 2]), ("ratings", ["a", "unknown"])]


def test_nothing_is_asked_for_null_or_for_a_row_that_is_gone() -> None:
    ratings = Ratings()
    found = ratings.process(changes({"id": 0, "title": None}, None))
    assert found.writes == [Write((0,), 100, {"rating": None, "price": 5}), Write((1,), 101, None)]
    assert ratings.asked == [("prices", [0])]


def test_a_failed_key_fails_the_changes_that_need_it_and_no_other() -> None:
    given = changes({"id": 0, "title": "a"}, {"id": 1, "title": "poison"}, None, {"id": 3, "title": "poison"})
    found = Ratings().process(given)
    assert found.changes == [given[0], given[2]]
    assert [(failure.change, failure.stage) for failure in found.failures] == [
        (given[1], "lookup"),
        (given[3], "lookup"),
    ]
    assert found.failures[0].error == "ValueError: poison"
