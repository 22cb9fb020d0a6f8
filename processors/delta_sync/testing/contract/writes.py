"""Upserts, deletes and truncates, one after the other and in batches: what is applied, and what is stale."""

from __future__ import annotations

import pytest

from delta_sync.changes import APPLIED, Write
from delta_sync.sinks.base import Stored, Target
from delta_sync.testing.contract.samples import LARGEST_VERSION, UNSTORABLE
from delta_sync.testing.contract.scene import AnySink, Scene, apply, scanned
from delta_sync.versions import version_of


class Writes(Scene):
    """Which writes are applied."""

    # ── one write after the other ────────────────────────────────────────────────────────────────────────────────

    def test_an_unknown_key_is_nothing(self, sink: AnySink, target: Target) -> None:
        assert sink.read(target, [(1,)]) == [None]

    def test_upsert(self, sink: AnySink, target: Target) -> None:
        assert apply(sink, target, (1,), 5, {"title": "Casablanca"}) == APPLIED
        assert sink.read(target, [(1,)]) == [Stored(5, self.stored_form({"title": "Casablanca"}))]

    def test_a_newer_upsert_replaces_the_whole_document(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"title": "Casablanca", "year": 1942})
        assert apply(sink, target, (1,), 6, {"title": "Notorious"}) == APPLIED
        assert sink.read(target, [(1,)]) == [Stored(6, self.stored_form({"title": "Notorious"}))]

    def test_an_older_upsert_is_stale(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 5})
        assert apply(sink, target, (1,), 4, {"n": 4}) == self.stale
        assert sink.read(target, [(1,)]) == [Stored(5, self.stored_form({"n": 5}))]

    def test_an_equal_version_is_applied(self, sink: AnySink, target: Target) -> None:
        """A dump row has the version just below its claim; what is sent twice is applied twice."""
        apply(sink, target, (1,), 5, {"n": 1})
        assert apply(sink, target, (1,), 5, {"n": 2}) == APPLIED
        assert sink.read(target, [(1,)]) == [Stored(5, self.stored_form({"n": 2}))]

    def test_the_same_write_twice_is_the_same_as_once(self, sink: AnySink, target: Target) -> None:
        for write in (Write((1,), 5, {"n": 1}), Write((2,), 5, None)):
            assert sink.apply(target, [write]) == [APPLIED]
            once = sink.read(target, [write.key])
            assert sink.apply(target, [write]) == [APPLIED]
            assert sink.read(target, [write.key]) == once

    def test_delete_leaves_a_tombstone(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 5})
        assert apply(sink, target, (1,), 6, None) == APPLIED
        assert sink.read(target, [(1,)]) == [Stored(6, None)]

    def test_a_tombstone_keeps_older_writes_out(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 5})
        apply(sink, target, (1,), 7, None)
        assert apply(sink, target, (1,), 6, {"n": 6}) == self.stale
        assert apply(sink, target, (1,), 6, None) == self.stale
        assert sink.read(target, [(1,)]) == [Stored(7, None)]

    def test_an_older_delete_is_stale(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 5})
        assert apply(sink, target, (1,), 4, None) == self.stale
        assert sink.read(target, [(1,)]) == [Stored(5, self.stored_form({"n": 5}))]

    def test_a_delete_of_a_missing_key_leaves_a_tombstone(self, sink: AnySink, target: Target) -> None:
        assert apply(sink, target, (1,), 6, None) == APPLIED
        assert apply(sink, target, (1,), 5, {"n": 5}) == self.stale
        assert sink.read(target, [(1,)]) == [Stored(6, None)]

    def test_a_newer_delete_raises_the_tombstone(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, None)
        assert apply(sink, target, (1,), 7, None) == APPLIED
        assert apply(sink, target, (1,), 6, {"n": 6}) == self.stale

    @pytest.mark.parametrize("version", [6, 7])
    def test_a_deleted_key_comes_back(self, sink: AnySink, target: Target, version: int) -> None:
        apply(sink, target, (1,), 6, None)
        assert apply(sink, target, (1,), version, {"n": 1}) == APPLIED
        assert sink.read(target, [(1,)]) == [Stored(version, self.stored_form({"n": 1}))]
        assert apply(sink, target, (1,), 5, {"n": 5}) == self.stale

    def test_deleted_again_after_it_came_back(self, sink: AnySink, target: Target) -> None:
        for version, document in ((5, {"n": 5}), (6, None), (7, {"n": 7}), (8, None)):
            assert apply(sink, target, (1,), version, document) == APPLIED
        assert apply(sink, target, (1,), 7, {"n": 7}) == self.stale
        assert sink.read(target, [(1,)]) == [Stored(8, None)]

    @pytest.mark.parametrize(
        "versions",
        [
            (1, 2),
            (9, 10),
            (99, 100),
            (2**53, 2**53 + 1),
            (version_of(1, 2**52 - 1), version_of(2, 0)),
            (version_of(3, 7), version_of(3, 8)),
            (LARGEST_VERSION - 1, LARGEST_VERSION),
        ],
    )
    def test_versions_are_compared_as_64_bit_integers(
        self, sink: AnySink, target: Target, versions: tuple[int, int]
    ) -> None:
        older, newer = versions
        apply(sink, target, (1,), newer, {"n": 1})
        assert apply(sink, target, (1,), older, {"n": 0}) == self.stale
        apply(sink, target, (2,), newer, None)
        assert apply(sink, target, (2,), older, {"n": 0}) == self.stale
        assert apply(sink, target, (3,), older, {"n": 0}) == APPLIED
        assert apply(sink, target, (3,), newer, {"n": 1}) == APPLIED
        stored = sink.read(target, [(1,), (2,), (3,)])
        assert stored == [
            Stored(newer, self.stored_form({"n": 1})),
            Stored(newer, None),
            Stored(newer, self.stored_form({"n": 1})),
        ]

    # ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────

    def test_an_empty_batch(self, sink: AnySink, target: Target) -> None:
        assert sink.apply(target, []) == []
        assert sink.read(target, []) == []

    def test_one_outcome_for_each_write_in_their_order(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (2,), 9, {"n": 9})
        apply(sink, target, (4,), 9, None)
        writes = [
            Write((1,), 5, {"n": 5}),
            Write((2,), 5, {"n": 5}),
            Write((3,), 5, None),
            Write((4,), 5, {"n": 5}),
            Write((5,), 5, {"n": 5}),
        ]
        assert sink.apply(target, writes) == [APPLIED, self.stale, APPLIED, self.stale, APPLIED]

    def test_a_large_batch(self, sink: AnySink, target: Target) -> None:
        writes = [Write((n,), 10, {"n": n} if n % 7 else None) for n in range(self.large_batch)]
        apply(sink, target, (1234,), 11, {"n": -1})
        assert sink.apply(target, writes) == [self.stale if n == 1234 else APPLIED for n in range(self.large_batch)]
        stored = sink.read(target, [write.key for write in writes])
        for write, found in zip(writes, stored, strict=True):
            expected = {"n": -1} if write.key == (1234,) else write.document
            version = 11 if write.key == (1234,) else 10
            assert found == Stored(version, None if expected is None else self.stored_form(expected))
        assert len(scanned(sink, target)) == sum(n % 7 != 0 for n in range(self.large_batch))

    def test_read_answers_in_the_order_of_the_keys(self, sink: AnySink, target: Target) -> None:
        sink.apply(target, [Write((n,), n, {"n": n}) for n in range(1, 6)])
        keys = [(4,), (9,), (1,), (4,)]
        stored = sink.read(target, keys)
        assert [found and found.version for found in stored] == [4, None, 1, 4]

    @pytest.mark.parametrize("name", UNSTORABLE)
    def test_a_rejected_write_does_not_hold_up_the_others(self, sink: AnySink, target: Target, name: str) -> None:
        writes = [Write((1,), 5, {"n": 1}), Write((2,), 5, UNSTORABLE[name]), Write((3,), 5, {"n": 3})]
        first, second, third = sink.apply(target, writes)
        assert (first, third) == (APPLIED, APPLIED)
        assert second.kind == "rejected"
        assert second.reason
        assert [found and found.version for found in sink.read(target, [(1,), (2,), (3,)])] == [5, None, 5]

    # ── truncate ─────────────────────────────────────────────────────────────────────────────────────────────────

    def test_truncate_deletes_what_is_older(self, sink: AnySink, target: Target) -> None:
        sink.apply(target, [Write((n,), n, {"n": n}) for n in range(1, 11)])
        assert sink.truncate(target, 6) == 5
        assert scanned(sink, target) == {sink.id_of(target, (n,)): n for n in range(6, 11)}

    def test_truncate_keeps_out_older_writes_that_come_later(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 3, {"n": 3})
        sink.truncate(target, 6)
        assert apply(sink, target, (1,), 5, {"n": 5}) == self.stale
        assert apply(sink, target, (2,), 5, {"n": 5}) == self.stale
        assert apply(sink, target, (3,), 5, None) == self.stale
        assert scanned(sink, target) == {}

    @pytest.mark.parametrize("version", [6, 7])
    def test_truncate_lets_in_what_is_at_or_above_its_version(
        self, sink: AnySink, target: Target, version: int
    ) -> None:
        apply(sink, target, (1,), 3, {"n": 3})
        sink.truncate(target, 6)
        assert apply(sink, target, (1,), version, {"n": 1}) == APPLIED
        assert apply(sink, target, (2,), version, {"n": 2}) == APPLIED
        assert apply(sink, target, (3,), version, None) == APPLIED
        assert scanned(sink, target) == {sink.id_of(target, (n,)): version for n in (1, 2)}

    def test_the_floor_is_the_highest_one(self, sink: AnySink, target: Target) -> None:
        sink.truncate(target, 9)
        assert apply(sink, target, (1,), 9, {"n": 9}) == APPLIED
        assert sink.truncate(target, 6) == 0
        assert apply(sink, target, (2,), 8, {"n": 8}) == self.stale
        assert scanned(sink, target) == {sink.id_of(target, (1,)): 9}

    def test_truncate_does_not_touch_newer_tombstones(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 8, None)
        assert sink.truncate(target, 6) == 0
        assert apply(sink, target, (1,), 7, {"n": 7}) == self.stale

    def test_a_batch_on_both_sides_of_the_floor(self, sink: AnySink, target: Target) -> None:
        sink.truncate(target, 6)
        writes = [Write((n,), n, {"n": n}) for n in (4, 5, 6, 7)]
        assert sink.apply(target, writes) == [self.stale, self.stale, APPLIED, APPLIED]
        assert [found and found.version for found in sink.read(target, [(4,), (5,), (6,), (7,)])] == [None, None, 6, 7]

    def test_truncate_of_many(self, sink: AnySink, target: Target) -> None:
        sink.apply(target, [Write((n,), 5 + n % 2, {"n": n}) for n in range(3000)])
        assert sink.truncate(target, 6) == 1500
        assert set(scanned(sink, target).values()) == {6}
