"""What is decided about dumps: orders, turns, limits, planning, keys as text; and how one is shown. No I/O."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import pytest

from delta_sync.dumps import (
    KEYS_PER_CHUNK,
    PLANNED_AHEAD,
    ChunkCounts,
    Dump,
    Order,
    in_turn,
    is_over,
    key_chunks,
    key_from_text,
    ordered,
    pause_s,
    rate_and_left,
    rows_most,
    to_plan,
)
from delta_sync.errors import UsageError
from delta_sync.tables import Column, Kind, Table, key_text
from deltactl.dump import as_bar


def dump(**fields: Any) -> Dump:
    given: dict[str, Any] = {"id": 1, "table": "a.b", "kind": "table", "state": "running", "covered_from": 9}
    return Dump(**(given | fields))


@pytest.mark.parametrize(
    ("before", "order", "after"),
    [
        ("pending", "pause", "paused"),
        ("running", "pause", "paused"),
        ("paused", "pause", "paused"),
        ("paused", "resume", "running"),
        ("running", "cancel", "cancelled"),
        ("paused", "cancel", "cancelled"),
        ("running", "throttle", "running"),
        ("paused", "throttle", "paused"),
    ],
)
def test_orders(before: str, order: str, after: str) -> None:
    assert ordered(cast(Order, order), dump(state=before)) == after


def test_one_that_was_paused_before_it_began_begins_when_it_is_resumed() -> None:
    assert ordered("resume", dump(state="paused", covered_from=None)) == "pending"


@pytest.mark.parametrize("state", ["done", "cancelled", "failed"])
@pytest.mark.parametrize("order", ["pause", "resume", "cancel", "throttle"])
def test_one_that_has_ended_takes_no_orders(state: str, order: str) -> None:
    with pytest.raises(UsageError, match=f"is {state}; there is nothing to {order}"):
        ordered(cast(Order, order), dump(state=state))


def test_what_cannot_be_ordered() -> None:
    with pytest.raises(UsageError, match="is running, not paused"):
        ordered("resume", dump())
    with pytest.raises(UsageError, match="would lack rows for good"):
        ordered("cancel", dump(kind="load"))


def test_dumps_take_turns() -> None:
    dumps = [dump(id=number) for number in (1, 2, 3, 4)]
    counts = {1: ChunkCounts(5, 1), 2: ChunkCounts(5, 0), 3: ChunkCounts(5, 0), 4: ChunkCounts(0, 0)}
    assert [one.id for one in in_turn(dumps, counts)] == [2, 3, 1]  # the fourth has no chunk that is free
    assert [one.id for one in in_turn(dumps, counts, last=2)] == [3, 2, 1]
    assert in_turn([dump(state="paused")], {1: ChunkCounts(5, 0)}) == []
    assert in_turn([dump(parallel=2)], {1: ChunkCounts(5, 2)}) == []
    assert in_turn([dump(parallel=2)], {1: ChunkCounts(5, 1)}) == [dump(parallel=2)]


def test_a_limited_rate_is_kept_by_chunks_of_a_second() -> None:
    assert (rows_most(dump(), 10_000), pause_s(dump(), 10_000)) == (10_000, 0.0)
    slow = dump(rows_per_s=500)
    assert (rows_most(slow, 10_000), pause_s(slow, 500)) == (500, 1.0)
    assert rows_most(dump(rows_per_s=50_000), 10_000) == 10_000


def test_chunks_are_planned_some_way_ahead() -> None:
    assert to_plan(dump(), ChunkCounts()) == PLANNED_AHEAD
    assert to_plan(dump(), ChunkCounts(PLANNED_AHEAD, 0)) == 0
    assert to_plan(dump(), ChunkCounts(1, 7)) == PLANNED_AHEAD - 1
    assert to_plan(dump(planned=True), ChunkCounts()) == 0
    assert to_plan(dump(state="paused"), ChunkCounts()) == 0


def test_it_is_over_when_all_is_planned_and_no_chunk_is_left() -> None:
    assert is_over(dump(planned=True), ChunkCounts())
    assert not is_over(dump(planned=True), ChunkCounts(0, 1))
    assert not is_over(dump(planned=True), ChunkCounts(1, 0))
    assert not is_over(dump(), ChunkCounts())
    assert not is_over(dump(planned=True, state="paused"), ChunkCounts())


def test_keys_are_read_once() -> None:
    keys = [(number,) for number in range(KEYS_PER_CHUNK + 1)]
    chunks = key_chunks([*keys, *keys])
    assert [len(chunk) for chunk in chunks] == [KEYS_PER_CHUNK, 1]
    assert [key for chunk in chunks for key in chunk] == keys


KEYS: list[tuple[Kind, str, object]] = [
    (Kind.INTEGER, "bigint", -7),
    (Kind.TEXT, "text", "a:b %3A"),
    (Kind.UUID, "uuid", UUID(int=7)),
    (Kind.DECIMAL, "numeric", Decimal("1.5")),
    (Kind.DATE, "date", dt.date(2024, 2, 29)),
    (Kind.TIMESTAMP, "timestamp", dt.datetime(2024, 2, 29, 1, 2, 3, 4)),  # noqa: DTZ001 -- a timestamp without a zone
    (Kind.TIMESTAMP_TZ, "timestamptz", dt.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=dt.UTC)),
    (Kind.BOOLEAN, "boolean", True),
    (Kind.TIMESTAMP_TZ, "timestamptz", "infinity"),
    (Kind.TIMESTAMP, "timestamp", "0044-03-15 00:00:00 BC"),
    (Kind.DATE, "date", "-infinity"),
    (Kind.TIME, "time", "24:00:00"),
    (Kind.TEXT, "text", " blanks "),
]


@pytest.mark.parametrize(("kind", "type_", "value"), KEYS, ids=[f"{kind.name} {value}" for kind, _, value in KEYS])
def test_a_key_is_read_from_the_text_in_which_it_is_shown(kind: Kind, type_: str, value: object) -> None:
    one, two = Column("one", type_, kind), Column("two", "text", Kind.TEXT)
    assert key_from_text(Table("a", "b", (one,), ("one",)), key_text((value,))) == (value,)
    both = (value, "x:y%")
    assert key_from_text(Table("a", "b", (one, two), ("one", "two")), key_text(both)) == both


def test_what_is_no_key() -> None:
    table = Table("a", "b", (Column("n", "int", Kind.INTEGER), Column("s", "text", Kind.TEXT)), ("n", "s"))
    with pytest.raises(UsageError, match="it has the columns n, s"):
        key_from_text(table, "1")
    with pytest.raises(UsageError, match="is no key of"):
        key_from_text(table, "x:y")
    for type_, text in (("bigint", str(1 << 63)), ("integer", "-2147483649"), ("smallint", "32768"), ("int", "1_0")):
        alone = Table("a", "b", (Column("n", type_, Kind.INTEGER),), ("n",))
        with pytest.raises(UsageError, match="is no key of"):
            key_from_text(alone, text)
    assert key_from_text(Table("a", "b", (Column("n", "bigint", Kind.INTEGER),), ("n",)), " -17 ") == (-17,)


def test_rate_and_time_left() -> None:
    assert rate_and_left(None, (5.0, 10), 100) == (None, None)
    assert rate_and_left((0.0, 0), (5.0, 50), 100) == (10.0, 5.0)
    assert rate_and_left((0.0, 0), (5.0, 50), None) == (10.0, None)
    assert rate_and_left((0.0, 0), (5.0, 200), 100) == (40.0, 0.0)
    assert rate_and_left((0.0, 9), (5.0, 9), 100) == (0.0, None)


def test_a_bar() -> None:
    half = as_bar(dump(rows=500, estimate=1000), (0.0, 0), 5.0)
    assert "█" * 12 + "░" * 12 + "  50%  500 rows  100/s  0:05 left" in half
    assert as_bar(dump(rows=2000, estimate=1000), None, 5.0).endswith(" 99%  2,000 rows")
    assert as_bar(dump(rows=2000, state="done"), None, 5.0).endswith("100%  2,000 rows  done")
    assert as_bar(dump(state="failed", waits="why"), None, 5.0).endswith("failed: why")
