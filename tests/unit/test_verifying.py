"""What a difference is worth, which documents are the same, and which ids only one side has."""

from __future__ import annotations

import copy
import datetime as dt
import math
import uuid
from typing import Any

import pytest
from bson.decimal128 import Decimal128
from bson.int64 import Int64

from delta_sync.sinks.base import Stored
from delta_sync.verifying import (
    ABSENT,
    Ages,
    Buckets,
    Expected,
    IdSums,
    Sighting,
    Tally,
    compare,
    differing,
    digest_of,
    judge,
    pause_s,
    same,
)

BEYOND = 1000
OLD, NEW = Expected({"n": 1}), Expected({"n": 2})
FAILED = Expected(None, "ValueError: no")


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"a": None},
        {"nan": math.nan, "list": [math.nan, {"deep": math.nan}]},
        {"inf": math.inf, "zero": 0.0, "large": 2**64 - 1, "beyond": 2**70},
        {"decimal": Decimal128("1.50"), "uuid": uuid.UUID(int=7), "bytes": b"\x00\xff", "long": Int64(5)},
        {"at": dt.datetime(2024, 2, 29, tzinfo=dt.UTC)},
        {"text": "a\x00b", "half": "\ud800"},
    ],
    ids=repr,
)
def test_a_document_is_the_same_as_itself(document: dict[str, Any]) -> None:
    other = copy.deepcopy(dict(reversed(document.items())))
    assert same(document, other)
    assert differing(document, other) == []
    assert digest_of(document) == digest_of(other) != digest_of(None)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, True),
        (0, False),
        (1, 1.0),
        (1, "1"),
        (None, "null"),
        (0.0, -0.0),
        (math.nan, math.inf),
        (math.nan, None),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 1, "b": None}),
        (Decimal128("1.5"), Decimal128("1.50")),
        (b"a", "a"),
        (2**70, 2**70 + 1),
        ({"a": [True]}, {"a": [1]}),
    ],
    ids=repr,
)
def test_what_python_takes_for_equal_a_store_may_not(one: object, two: object) -> None:
    for first, second in ((one, two), (two, one)):
        assert not same({"v": first, "w": 1}, {"v": second, "w": 1})
        assert differing({"v": first, "w": 1}, {"v": second, "w": 1}) == ["v"]
    assert not same({"v": one}, {})
    assert differing({"v": one}, {"x": 1}) == ["v", "x"]


def test_skipped_fields_do_not_count() -> None:
    skipped = frozenset({"score", "more"})
    assert same({"id": 1, "score": 2}, {"id": 1, "score": 3, "more": 4}, skipped)
    assert not same({"id": 1, "score": 2}, {"id": 2, "score": 2}, skipped)
    assert not same({"a": {"score": 1}}, {"a": {"score": 2}}, skipped)  # of the top level only
    assert differing({"id": 1, "score": 2}, {"id": 2, "score": 3}, skipped) == ["id"]


# ── at one moment ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("expected", "stored", "verdict"),
    [
        (OLD, Stored(5, {"n": 1}), "equal"),
        (OLD, Stored(5, {"n": 2}), "different"),
        (OLD, None, "missing"),
        (OLD, Stored(5, None), "missing"),
        (ABSENT, None, "equal"),
        (ABSENT, Stored(5, None), "equal"),
        (ABSENT, Stored(5, {"n": 1}), "extra"),
        (ABSENT, Stored(5, {}), "extra"),
        (Expected({}), Stored(5, {}), "equal"),
        (FAILED, Stored(5, {"n": 1}), "failed"),
        (FAILED, None, "failed"),
        (OLD, Stored(0, {"n": 1}), "version"),
        (OLD, Stored(BEYOND, {"n": 1}), "version"),
        (OLD, Stored(BEYOND - 1, {"n": 1}), "equal"),
        (ABSENT, Stored(BEYOND, None), "version"),
        (OLD, Stored(BEYOND, {"n": 2}), "different"),
    ],
)
def test_compare(expected: Expected, stored: Stored | None, verdict: str) -> None:
    assert compare(expected, stored, BEYOND) == verdict


# ── for certain ──────────────────────────────────────────────────────────────────────────────────────────────────


def judged(
    stored: Stored | None,
    *,
    before: Expected = OLD,
    after: Expected = OLD,
    earlier: Sighting | None = None,
    passed: bool = True,
    claimed: int = 100,
    expires: bool = False,
    skipped: frozenset[str] = frozenset(),
) -> str:
    """Judge what a sink has of a row that did not change meanwhile, nor did the sink, unless told otherwise."""
    seen = Sighting.of(stored) if earlier is None else earlier
    return judge(
        before.digest,
        after,
        stored,
        seen,
        passed=passed,
        claimed=claimed,
        beyond=BEYOND,
        expires=expires,
        skipped=skipped,
    )


@pytest.mark.parametrize(
    ("expected", "stored", "kind"),
    [
        (OLD, None, "missing"),
        (OLD, Stored(99, None), "missing"),
        (OLD, Stored(99, {"n": 2}), "different"),
        (ABSENT, Stored(99, {"n": 2}), "extra"),
    ],
)
def test_nothing_in_flight_explains_it(expected: Expected, stored: Stored | None, kind: str) -> None:
    assert judged(stored, before=expected, after=expected) == kind
    assert judged(stored, before=expected, after=expected, passed=False) == "again"  # the change may be on its way
    assert judged(stored, before=NEW, after=expected) == "again"  # the row has changed meanwhile
    assert judged(stored, before=expected, after=expected, earlier=Sighting(3, b"")) == "again"  # the sink has
    assert judged(stored, before=expected, after=expected, earlier=Sighting(-2, b"")) == "again"


@pytest.mark.parametrize("document", [{"n": 2}, None], ids=["document", "tombstone"])
def test_a_version_at_or_above_the_claim_may_be_a_change_that_is_not_visible_yet(
    document: dict[str, Any] | None,
) -> None:
    assert judged(Stored(100, document)) == "again"
    assert judged(Stored(999, document)) == "again"
    assert judged(Stored(99, document)) != "again"
    assert judged(Stored(7, document), claimed=0) == "again"  # a transaction that is older than all samples


def test_what_is_equal_by_now_is_equal_whatever_it_was() -> None:
    assert judged(Stored(500, {"n": 2}), before=OLD, after=NEW, passed=False, earlier=Sighting(-1, b"")) == "equal"
    assert judged(Stored(500, None), before=OLD, after=ABSENT, passed=False) == "equal"


@pytest.mark.parametrize(
    ("expected", "stored", "kind"),
    [
        (OLD, Stored(BEYOND, {"n": 1}), "version"),
        (OLD, Stored(BEYOND + 1, {"n": 2}), "different"),
        (OLD, Stored(BEYOND, None), "missing"),
        (ABSENT, Stored(BEYOND, {"n": 1}), "extra"),
        (OLD, Stored(0, {"n": 1}), "version"),
    ],
)
def test_a_version_that_no_change_can_have_counts_at_once(expected: Expected, stored: Stored, kind: str) -> None:
    assert judged(stored, before=NEW, after=expected, passed=False, claimed=0, earlier=Sighting(-1, b"")) == kind


def test_a_document_that_may_have_expired_is_not_missing() -> None:
    assert judged(None, expires=True) == "expired"
    assert judged(Stored(5, None), expires=True, passed=False) == "expired"
    assert judged(Stored(5, {"n": 2}), expires=True) == "different"
    assert judged(Stored(5, {"n": 2}), before=ABSENT, after=ABSENT, expires=True) == "extra"


def test_a_row_that_cannot_be_processed_is_neither() -> None:
    assert judged(Stored(5, {"n": 2}), after=FAILED) == "failed"
    assert judged(Stored(BEYOND, {"n": 2}), after=FAILED) == "failed"
    assert judged(Stored(5, {"n": 2}), before=FAILED, after=OLD) == "again"


def test_skipped_fields_are_not_judged() -> None:
    assert judged(Stored(5, {"n": 1, "score": 9}), skipped=frozenset({"score"})) == "equal"


def test_a_change_of_the_version_alone_is_one() -> None:
    """A row that was deleted and inserted again, the same, between two readings: the sink shows it by its version."""
    before, after = Stored(40, {"n": 1}), Stored(50, None)
    assert judged(after, earlier=Sighting.of(before)) == "again"


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_equal_sets_of_ids_leave_no_bucket_whatever_their_order() -> None:
    ids = [f"movie:{number}" for number in range(10_000)]
    one, two = IdSums(), IdSums()
    one.add(ids)
    for id_ in reversed(ids):
        two.add([id_])
    assert one.differing(two).numbers == frozenset()
    assert "movie:1" not in one.differing(two)


@pytest.mark.parametrize("buckets", [1, 2, 64, 1 << 16])
def test_an_id_that_one_side_lacks_is_in_a_bucket_that_differs(buckets: int) -> None:
    ids = [f"movie:{number}" for number in range(2000)]
    one, two = IdSums(buckets), IdSums(buckets)
    one.add(ids)
    two.add([id_ for id_ in ids if id_ != "movie:17"])
    two.add(["extra", "", "movie:3"])  # the last one twice
    found = one.differing(two)
    assert all(id_ in found for id_ in ("movie:17", "extra", "", "movie:3"))
    assert len(found.numbers) <= 4


def test_a_share_of_the_buckets_is_a_share_of_the_ids() -> None:
    among = Buckets.share(0.1)
    found = sum(f"movie:{number}" in among for number in range(20_000))
    assert 1600 < found < 2400  # 2,000 with a standard deviation of 42
    everything = Buckets.share(1.0)
    assert all(f"{number}" in everything for number in range(1000))
    assert len(Buckets.share(1e-9).numbers) == 1


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tallies_add_up() -> None:
    one, two = Tally(rows=1, dead=2), Tally(rows=3, repaired=1)
    one.found["missing"] = 4
    two.found["extra"] = 1
    total = one.plus(two)
    assert (total.rows, total.dead, total.repaired, total.differences) == (4, 2, 1, 5)
    assert total.found == {"missing": 4, "different": 0, "extra": 1, "version": 0}
    assert one.found["extra"] == 0


@pytest.mark.parametrize(("share", "pause"), [(1.0, 0.0), (0.5, 2.0), (0.1, 18.0)])
def test_the_source_rests_for_the_rest_of_the_time(share: float, pause: float) -> None:
    assert pause_s(2.0, share) == pytest.approx(pause)


def test_the_oldest_look() -> None:
    ages = Ages(["a", "b"])
    assert ages.oldest_s(0.0) is None
    for chunk, now_s in enumerate((1.0, 2.0, 3.0)):
        ages.looked("a", chunk, now_s)
    ages.ended("a", 3)
    assert ages.oldest_s(4.0) is None  # b was never read
    ages.looked("b", 0, 5.0)
    ages.ended("b", 1)
    assert ages.oldest_s(6.0) == 5.0
    ages.looked("a", 0, 7.0)
    assert ages.oldest_s(8.0) == 6.0  # the second chunk's
    ages.looked("a", 1, 9.0)
    ages.ended("a", 2)  # the table has become shorter
    assert ages.oldest_s(10.0) == 5.0
