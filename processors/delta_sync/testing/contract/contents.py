"""What is stored: keys of every kind, and documents."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Sequence

import pytest

from delta_sync.changes import APPLIED, Key, Write
from delta_sync.errors import Unstorable
from delta_sync.sinks.base import Stored, Target
from delta_sync.tables import Kind, Table
from delta_sync.testing.contract.samples import (
    AWKWARD_TEXTS,
    DOCUMENTS,
    KEYS_BY_KIND,
    LARGE_BYTES,
    MOVIE,
    PAGE,
    PART,
    SEAT,
    UNSTORABLE,
    table_of,
)
from delta_sync.testing.contract.scene import AnySink, Scene, apply, scanned
from delta_sync.values import Document


class Contents(Scene):
    """Keys and documents come back as they went in."""

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @pytest.mark.parametrize("kind", KEYS_BY_KIND, ids=lambda kind: kind.name.lower())
    def test_keys_of_every_kind(self, sink: AnySink, kind: Kind) -> None:
        with self.place(sink, table_of(f"by_{kind.name.lower()}", id=kind)) as target:
            self.check_keys_are_kept_apart(sink, target, [(value,) for value in KEYS_BY_KIND[kind]])

    def test_keys_of_several_columns(self, sink: AnySink) -> None:
        day = dt.date(2024, 2, 29)
        with self.place(sink, SEAT) as target:
            keys: list[Key] = [(n, text, day) for n in (1, -1, 11) for text in (*AWKWARD_TEXTS, "")]
            self.check_keys_are_kept_apart(sink, target, keys)

    def check_keys_are_kept_apart(self, sink: AnySink, target: Target, keys: Sequence[Key]) -> None:
        """Write each key, delete every other one, and meet each as it was left."""
        writes = [Write(key, 5 + n, {"n": n}) for n, key in enumerate(keys)]
        assert sink.apply(target, writes) == [APPLIED] * len(keys)
        deletes = [Write(write.key, write.version, None) for write in writes[::2]]
        assert sink.apply(target, deletes) == [APPLIED] * len(deletes)
        expected = [Stored(5 + n, None if n % 2 == 0 else self.stored_form({"n": n})) for n in range(len(keys))]
        assert sink.read(target, keys) == expected
        ids = {sink.id_of(target, key): 5 + n for n, key in enumerate(keys) if n % 2}
        assert scanned(sink, target) == ids
        for key in keys:
            found = sink.key_of(target, sink.id_of(target, key))
            assert found is not None, key
            assert sink.id_of(target, found) == sink.id_of(target, key)
            assert [type(part) for part in found] == [type(part) for part in key]
        assert sink.apply(target, [Write(write.key, write.version - 1, {"n": -1}) for write in writes]) == (
            [self.stale] * len(keys)
        )

    def test_a_key_that_the_store_cannot_hold_is_nothing(self, sink: AnySink) -> None:
        """It may be asked for all the same, for a source may have a row of that key."""
        with self.place(sink, PAGE) as target:
            for text in ("a\0b", "", "x" * 1000):
                outcome = apply(sink, target, (text,), 5, {"n": 1})
                applied = Stored(5, self.stored_form({"n": 1})) if outcome == APPLIED else None
                assert outcome == APPLIED or outcome.kind == "rejected"
                assert sink.read(target, [(text,), ("other",)]) == [applied, None]
                sink.discard(target, [((text,), 5)])
                assert sink.read(target, [(text,)]) == [None]

    def test_ids_are_injective(self, sink: AnySink) -> None:
        """All pairs of short texts of the characters that an encoding could trip over."""
        texts = ["".join(text) for size in range(3) for text in itertools.product(":%{}a2/", repeat=size)]
        texts += ["%3A", "%25", "%253A", "a:2", "%2", "5"]
        target = self.target_of(sink, PART)
        ids = {sink.id_of(target, (first, second)) for first in texts for second in texts}
        assert len(ids) == len(set(texts)) ** 2
        target = self.target_of(sink, PAGE)
        assert len({sink.id_of(target, (text,)) for text in (*texts, *AWKWARD_TEXTS)}) == len({*texts, *AWKWARD_TEXTS})

    @pytest.mark.parametrize("table", [MOVIE, SEAT], ids=["one column", "several"])
    def test_an_id_that_no_key_has(self, sink: AnySink, table: Table) -> None:
        target = self.target_of(sink, table)
        id_ = sink.id_of(target, (17,) if table is MOVIE else (17, "A", dt.date(2024, 2, 29)))
        assert sink.key_of(target, id_) is not None
        for wrong in ("", "x", f"{id_}x", f"x{id_}", id_.replace("17", "017"), id_.replace("17", "")):
            assert sink.key_of(target, wrong) is None, wrong

    # ── documents ────────────────────────────────────────────────────────────────────────────────────────────────

    @pytest.mark.parametrize("name", DOCUMENTS)
    def test_documents(self, sink: AnySink, target: Target, name: str) -> None:
        outcome = apply(sink, target, (1,), 5, DOCUMENTS[name])
        if name in self.rejects:
            assert outcome.kind == "rejected"
            assert outcome.reason
            assert sink.read(target, [(1,)]) == [None]
        else:
            assert outcome == APPLIED
            stored = Stored(5, self.stored_form(DOCUMENTS[name]))
            assert sink.read(target, [(1,)]) == [stored]
            assert Stored(5, sink.stored_form(target, DOCUMENTS[name])) == stored
            assert sink.read_beside(target, [(1,)], [DOCUMENTS[name]]) in ([5], [stored])
            others: list[Document | None] = [{"another": 1}, {"n": 1}, None]
            assert sink.read_beside(target, [(1,), (2,), (1,)], others) == [stored, None, stored]
            assert scanned(sink, target) == {sink.id_of(target, (1,)): 5}
            assert apply(sink, target, (1,), 4, {}) == self.stale

    def test_a_large_document_between_small_ones(self, sink: AnySink, target: Target) -> None:
        large = {"text": "0123456789" * (LARGE_BYTES // 10)}
        writes = [Write((1,), 5, {"n": 1}), Write((2,), 5, large), Write((3,), 5, {"n": 3})]
        assert sink.apply(target, writes) == [APPLIED] * 3
        assert sink.read(target, [(2,)]) == [Stored(5, self.stored_form(large))]
        assert apply(sink, target, (2,), 4, {"n": 2}) == self.stale

    @pytest.mark.parametrize("name", ["foreign_type", "broken_text"])
    def test_what_cannot_be_written_has_no_stored_form(self, sink: AnySink, target: Target, name: str) -> None:
        with pytest.raises(Unstorable):
            sink.stored_form(target, UNSTORABLE[name])

    def test_the_caller_keeps_its_document(self, sink: AnySink, target: Target) -> None:
        document: Document = {"tags": ["a"]}
        apply(sink, target, (1,), 5, document)
        assert document == {"tags": ["a"]}
        document["tags"].append("b")
        assert sink.read(target, [(1,)]) == [Stored(5, self.stored_form({"tags": ["a"]}))]
