"""Places of targets: apart from each other, scanned, checked, prepared, dropped."""

from __future__ import annotations

import pytest

from delta_sync.changes import APPLIED, Write
from delta_sync.sinks.base import Stored, Target
from delta_sync.tables import Kind
from delta_sync.testing.contract.samples import ACTOR, LARGEST_VERSION, MOVIE, PAGE, PART, SEAT, table_of
from delta_sync.testing.contract.scene import AnySink, Scene, apply, scanned
from delta_sync.values import Document
from delta_sync.versions import version_of


class Places(Scene):
    """What concerns a target as a whole."""

    # ── places ───────────────────────────────────────────────────────────────────────────────────────────────────

    def test_two_tables_do_not_see_each_other(self, sink: AnySink, target: Target, other: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 1})
        apply(sink, target, (2,), 5, None)
        assert sink.read(other, [(1,), (2,)]) == [None, None]
        assert apply(sink, other, (1,), 4, {"n": 4}) == APPLIED
        assert apply(sink, other, (2,), 4, {"n": 4}) == APPLIED
        assert sink.truncate(other, 5) == 2
        assert sink.read(target, [(1,), (2,)]) == [Stored(5, self.stored_form({"n": 1})), Stored(5, None)]
        assert apply(sink, target, (3,), 3, {"n": 3}) == APPLIED
        assert scanned(sink, other) == {}
        assert len(scanned(sink, target)) == 2

    def test_two_tables_have_two_places(self, sink: AnySink) -> None:
        places = {self.target_of(sink, table).place for table in (MOVIE, ACTOR, PAGE, PART, SEAT)}
        assert len(places) == 5

    def test_a_target_is_pure(self, sink: AnySink) -> None:
        assert self.target_of(sink, SEAT) == self.target_of(sink, SEAT)

    def test_scan_meets_every_document_and_no_tombstone(self, sink: AnySink, target: Target) -> None:
        assert scanned(sink, target) == {}
        sink.apply(target, [Write((n,), 100 + n, {"n": n}) for n in range(2500)])
        sink.apply(target, [Write((n,), 9000, None) for n in range(0, 2500, 5)])
        expected = {sink.id_of(target, (n,)): 100 + n for n in range(2500) if n % 5}
        assert scanned(sink, target) == expected
        assert {id_ for batch in sink.scan_ids(target) for id_ in batch} == expected.keys()

    @pytest.mark.parametrize("version", [3000, version_of(2, 2**52 - 1), LARGEST_VERSION])
    @pytest.mark.parametrize("of", ["document", "tombstone", "floor"])
    def test_the_newest_version_is_the_highest_of_anything(
        self, sink: AnySink, target: Target, other: Target, of: str, version: int
    ) -> None:
        assert sink.newest_version(target) == 0
        half = 1234 if version == 3000 else 10  # many once: a sink may ask for them in parts
        writes = [Write((n,), 100 + n, {"n": n} if n % 2 else None) for n in range(2 * half)]
        if of != "floor":
            newest = half if of == "tombstone" else half + 1
            writes[newest] = writes[newest]._replace(version=version)
        sink.apply(target, writes)
        sink.truncate(target, version if of == "floor" else 99)
        assert sink.newest_version(target) == version
        assert sink.newest_version(other) == 0
        sink.drop(target)
        sink.prepare(target)
        assert sink.newest_version(target) == 0

    def test_the_newest_version_when_no_document_is_left(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 1})
        apply(sink, target, (1,), 7, None)
        assert sink.newest_version(target) == 7
        apply(sink, target, (1,), 8, {"n": 8})
        sink.truncate(target, 9)
        assert scanned(sink, target) == {}
        assert sink.newest_version(target) == 9

    @pytest.mark.parametrize("document", [{"n": 9}, None], ids=["document", "tombstone"])
    def test_what_is_discarded_leaves_no_version(
        self, sink: AnySink, target: Target, document: Document | None
    ) -> None:
        """However high it was; and nothing else goes, nor what has got another version meanwhile."""
        sink.apply(target, [Write((n,), LARGEST_VERSION, document) for n in (1, 2, 3)])
        sink.discard(target, [((1,), LARGEST_VERSION), ((2,), LARGEST_VERSION - 1), ((4,), 7)])
        assert sink.read(target, [(1,)]) == [None]
        assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
        assert apply(sink, target, (1,), 4, {"n": 4}) == self.stale
        assert [apply(sink, target, (n,), 5, {"n": 5}) for n in (2, 3)] == [self.stale, self.stale]
        assert apply(sink, target, (4,), 5, {"n": 5}) == APPLIED
        sink.discard(target, [])

    def test_drop_removes_everything(self, sink: AnySink, target: Target, other: Target) -> None:
        apply(sink, other, (1,), 5, {"n": 1})
        sink.apply(target, [Write((n,), 100, {"n": n}) for n in range(50)])
        sink.apply(target, [Write((n,), 100, None) for n in range(10)])
        sink.truncate(target, 90)
        assert sink.drop(target) == 40
        sink.prepare(target)
        assert sink.read(target, [(1,), (20,)]) == [None, None]
        assert scanned(sink, target) == {}
        assert sink.apply(target, [Write((n,), 1, {"n": n}) for n in range(50)]) == [APPLIED] * 50
        assert sink.read(other, [(1,)]) == [Stored(5, self.stored_form({"n": 1}))]

    def test_drop_of_nothing(self, sink: AnySink) -> None:
        assert sink.drop(self.target_of(sink, table_of("never_written", id=Kind.INTEGER))) == 0

    # ── check, prepare, close ────────────────────────────────────────────────────────────────────────────────────

    def test_check_finds_nothing_fatal_and_writes_nothing(self, sink: AnySink) -> None:
        target = self.target_of(sink, MOVIE)
        sink.drop(target)
        assert [problem for problem in sink.check([target]) if problem.fatal] == []
        sink.prepare(target)
        assert [problem for problem in sink.check([target]) if problem.fatal] == []
        assert scanned(sink, target) == {}
        sink.drop(target)

    def test_an_unreachable_store_is_a_problem(self, unreachable: AnySink) -> None:
        problems = unreachable.check([self.target_of(unreachable, MOVIE)])
        assert [problem for problem in problems if problem.fatal]
        assert all(unreachable.name in problem.where for problem in problems)

    def test_prepare_leaves_what_is_there(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 1})
        apply(sink, target, (2,), 5, None)
        sink.prepare(target)
        assert sink.read(target, [(1,), (2,)]) == [Stored(5, self.stored_form({"n": 1})), Stored(5, None)]

    def test_close_twice(self, sink: AnySink, target: Target) -> None:
        apply(sink, target, (1,), 5, {"n": 1})
        sink.drop(target)
        sink.close()
        sink.close()
