"""What every sink must do, as tests. Run them on yours:

    class TestMySink(SinkContract):
        @pytest.fixture
        def sink(self):
            sink = MySink("mine", "mystore://localhost", MyOptions(), tombstone_ttl_s=3600)
            yield sink
            sink.close()

The store must be there and is written to, in places for the tables of the schema `delta_contract` only; each test drops
what it made. Class attributes and methods without `test_` in their name say where a store may differ: override them.
"""

from __future__ import annotations

import datetime as dt
import decimal
import itertools
import math
import random
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import orjson
import pytest

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write
from delta_sync.errors import Unstorable
from delta_sync.sinks.base import VERSION_FIELD, Sink, Stored, Target
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Document, Interval, to_json
from delta_sync.versions import version_of

AnySink = Sink[Any, Any]

UTC = dt.UTC
LARGEST_VERSION = (1 << 63) - 1


def table_of(name: str, **key: Kind) -> Table:
    """Return a table of the contract whose key has these columns."""
    columns = tuple(Column(column, kind.value, kind, nullable=False) for column, kind in key.items())
    return Table("delta_contract", name, (*columns, Column("body", "jsonb", Kind.JSON)), tuple(key))


MOVIE = table_of("movie", id=Kind.INTEGER)
ACTOR = table_of("actor", id=Kind.INTEGER)
PAGE = table_of("page", path=Kind.TEXT)
PART = table_of("part", film=Kind.TEXT, reel=Kind.TEXT)
SEAT = table_of("seat", hall=Kind.INTEGER, row=Kind.TEXT, day=Kind.DATE)

# Whatever these mean to some store, in a key they are text.
AWKWARD_TEXTS = (
    "a b",
    " leading and trailing ",
    "a:b",
    "a%3Ab",
    "a%b",
    "{a}",
    "}a{",
    "{}",
    "a{}b",
    "a{b}c",
    "a}b",
    "{{a}}",
    "a/b",
    "a\\b",
    "a*b?[c]",
    "a.b$c",
    "a\nb\tc",
    "a'b\"c",
    "_a",
    "A",
    "a",
    "0",
    "Ünïcödé",
    "u\u0308",  # the same letter in two ways: two texts
    "\u00fc",
    "映画",
    "🎬",
    "x" * 300,
)

KEYS_BY_KIND: dict[Kind, tuple[object, ...]] = {
    Kind.INTEGER: (0, 1, -1, 10, 2**63 - 1, -(2**63)),
    Kind.TEXT: AWKWARD_TEXTS,
    Kind.BOOLEAN: (True, False),
    Kind.FLOAT: (0.5, -0.5, 1e300, 5e-324, math.inf),
    Kind.DECIMAL: (
        decimal.Decimal("0.1"),
        decimal.Decimal("-0.1"),
        decimal.Decimal(100),
        decimal.Decimal("1e-20"),
        decimal.Decimal(12345678901234567890123456789012345678),  # more digits than decimal's default context
        decimal.Decimal(12345678901234567890123456789012345679),
    ),
    Kind.BYTES: (b"\x00", b"\x00\x00", b"\xff", b"text"),
    Kind.DATE: (dt.date(2024, 2, 29), dt.date(1, 1, 1), dt.date(9999, 12, 31)),
    Kind.TIME: (dt.time(0, 0), dt.time(23, 59, 59, 999999)),
    Kind.TIMESTAMP: (dt.datetime(2024, 2, 29, 1, 2, 3), dt.datetime(2024, 2, 29, 1, 2, 3, 4)),  # noqa: DTZ001 -- a timestamp without time zone
    Kind.TIMESTAMP_TZ: (dt.datetime(2024, 2, 29, tzinfo=UTC), dt.datetime(2024, 2, 29, 0, 0, 0, 1, tzinfo=UTC)),
    Kind.UUID: (uuid.UUID(int=0), uuid.UUID(int=1 << 127)),
}

DOCUMENTS: dict[str, Document] = {
    "empty": {},
    "texts": {"empty": "", "plain": "Casablanca", "quoted": 'a"b\\c\n\x01', "unicode": "Amélie 映画 🎬"},
    "integers": {"zero": 0, "small": -1, "beyond_double": 2**53 + 1, "largest": 2**63 - 1, "smallest": -(2**63)},
    "floats": {"half": 0.5, "tiny": 5e-324, "huge": 1.7976931348623157e308, "negative": -1.25},
    "not_finite": {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf},
    "booleans": {"yes": True, "no": False},
    "decimals": {
        "money": decimal.Decimal("10.50"),
        "large": decimal.Decimal("1e3"),
        "small": decimal.Decimal("0.000001"),
    },
    "times": {
        "date": dt.date(2024, 2, 29),
        "time": dt.time(1, 2, 3, 4),
        "timestamp": dt.datetime(2024, 2, 29, 1, 2, 3, 456000),  # noqa: DTZ001 -- a timestamp without time zone
        "timestamp_tz": dt.datetime(2024, 2, 29, 1, 2, 3, tzinfo=UTC),
        "interval": Interval(14, 3, 4_500_000),
    },
    "identifiers": {"uuid": uuid.UUID(int=7), "bytes": b"\x00\xff", "no_bytes": b""},
    "nothing": {"none": None, "list": [None], "object": {"none": None}},
    "nested": {"cast": [{"name": "Bogart", "as": ["Rick"]}, {"name": "Bergman", "as": []}], "a": {"b": {"c": 1}}},
    "empty_parts": {"list": [], "object": {}},
    "many_fields": {f"field_{n}": n for n in range(300)},
    "field_names": {"with space": 1, "Ünïcödé": 2, "a-b": 3, "a:b": 4, "version": 5, "__v": 6},
    "zero_bytes": {"text": "a\x00b"},
}

UNSTORABLE: dict[str, Document] = {
    "reserved": {VERSION_FIELD: 1, "title": "Casablanca"},
    "foreign_type": {"title": object()},
    "foreign_key": {"titles": {1: "Casablanca"}},
    "broken_text": {"title": "\ud800"},  # half of a surrogate pair: no UTF-8
}

LARGE_BYTES = 5 * 1000 * 1000

OUTRANKED_BY: tuple[Literal["tombstone", "floor"], ...] = ("tombstone", "floor")


class SecondStep(NamedTuple):
    """How a sink's `apply` looks, once its documents are written, whether a tombstone or the floor outranks them."""

    method: str  # of the sink: what does look, and is called by `apply` for nothing else
    outranked_by: frozenset[Literal["tombstone", "floor"]]  # by the other of the two, if any, nothing old is written
    looks_first: bool  # whether `apply` calls the method before it writes, too


class Died(BaseException):
    """Ends `apply` where a killed process would: no sink catches it."""


class SinkContract:
    """Subclass it, name the subclass `Test…`, and give the fixture `sink`: an open sink on an empty store.

    It has to say what its `second_step` is: None if each write is compared and written in one step of the store's own.
    """

    second_step: ClassVar[SecondStep | None]
    rejects: ClassVar[frozenset[str]] = frozenset()  # names in DOCUMENTS that this store cannot hold
    reads_never_go_back: ClassVar[bool] = True  # False: a write that is too old may be seen until its second step
    tells_stale: ClassVar[bool] = True  # False: a write that is too old counts as applied, and is never what is read
    large_batch: ClassVar[int] = 5000  # writes
    storm_seeds: ClassVar[Sequence[int]] = range(8)  # a failure names its seed, which plans the same storm again
    storm_writes: ClassVar[int] = 400  # per storm; each is delivered about twice

    # ── what a subclass gives, and may override ──────────────────────────────────────────────────────────────────

    @pytest.fixture
    def sink(self) -> Iterator[AnySink]:
        """Yield an open sink on a store that is there."""
        raise NotImplementedError

    @pytest.fixture
    def unreachable(self) -> Iterator[AnySink]:
        """Yield a sink of the same class whose store is not there."""
        pytest.skip("no unreachable sink is given")

    @property
    def stale(self) -> Outcome:
        """The outcome of a write that is too old."""
        return STALE if self.tells_stale else APPLIED

    def target_of(self, sink: AnySink, table: Table) -> Target:
        """Return the target of a table with options that suit this store."""
        return sink.target(table, sink.target_model())

    def stored_form(self, document: Document) -> dict[str, Any]:
        """Return what `read` gives for a document that was written: its JSON values, unless the store has others."""
        form: dict[str, Any] = orjson.loads(to_json(document))
        return form

    # ── places, ready and cleaned up ─────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def place(self, sink: AnySink, table: Table) -> Generator[Target, None, None]:
        """Give an empty target of the table, and drop it in the end."""
        target = self.target_of(sink, table)
        sink.drop(target)  # what a killed run left
        sink.prepare(target)
        yield target
        sink.drop(target)

    @pytest.fixture
    def target(self, sink: AnySink) -> Iterator[Target]:
        """Yield the empty target of `MOVIE`, whose key is one integer."""
        with self.place(sink, MOVIE) as target:
            yield target

    @pytest.fixture
    def other(self, sink: AnySink) -> Iterator[Target]:
        """Yield the empty target of `ACTOR`, whose keys are those of `MOVIE`, too."""
        with self.place(sink, ACTOR) as target:
            yield target

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

    # ── processes that die between two steps ─────────────────────────────────────────────────────────────────────

    def die_in_a_late_upsert(self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"]) -> None:
        """Die in an upsert of row 1 at version 5, deleted (or truncated) at 6 after the upsert has begun.

        The process has written the document, and not looked yet whether it may stay. Nobody knows of it any more.
        """
        step = self.second_step
        if step is None:
            pytest.skip("this sink's `apply` has no second step to die before")
        if by not in step.outranked_by:
            pytest.skip(f"this sink's store does not even write what a {by} outranks")

        def overtake() -> None:
            if by == "tombstone":
                assert apply(sink, target, (1,), 6, None) == APPLIED
            else:
                sink.truncate(target, 6)

        with dying(sink, step, overtake), pytest.raises(Died):
            apply(sink, target, (1,), 5, {"n": 5})

    @pytest.mark.parametrize("by", OUTRANKED_BY)
    def test_a_process_that_dies_in_a_late_upsert_leaves_a_deleted_row_behind(
        self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"]
    ) -> None:
        """The flaw of two places without a transaction, for which `sweep` is there. Other writes do not remove it."""
        self.die_in_a_late_upsert(sink, target, by)
        apply(sink, target, (2,), 7, {"n": 7})
        apply(sink, target, (3,), 7, None)
        assert scanned(sink, target) == {sink.id_of(target, (1,)): 5, sink.id_of(target, (2,)): 7}

    @pytest.mark.parametrize("recent_s", [None, 3600.0])
    @pytest.mark.parametrize("by", OUTRANKED_BY)
    def test_sweep_removes_what_a_process_that_died_left_behind(
        self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"], recent_s: float | None
    ) -> None:
        self.die_in_a_late_upsert(sink, target, by)
        apply(sink, target, (2,), 7, {"n": 7})
        assert sink.sweep(target, recent_s) == 1
        assert scanned(sink, target) == {sink.id_of(target, (2,)): 7}
        assert sink.sweep(target, recent_s) == 0
        assert apply(sink, target, (1,), 5, {"n": 5}) == self.stale

    @pytest.mark.parametrize("by", OUTRANKED_BY)
    def test_the_same_write_again_removes_what_a_process_that_died_left_behind(
        self, sink: AnySink, target: Target, by: Literal["tombstone", "floor"]
    ) -> None:
        self.die_in_a_late_upsert(sink, target, by)
        assert apply(sink, target, (1,), 5, {"n": 5}) == self.stale
        assert scanned(sink, target) == {}

    @pytest.mark.parametrize("recent_s", [None, 3600.0])
    def test_sweep_spares_whatever_is_not_older(self, sink: AnySink, target: Target, recent_s: float | None) -> None:
        """Rows that came back at the tombstone's version or later, are at the floor or above it, or are deleted."""
        sink.apply(target, [Write((n,), 6, None) for n in (1, 2, 3)])
        sink.truncate(target, 5)
        sink.apply(target, [Write((1,), 6, {"n": 1}), Write((2,), 7, {"n": 2}), Write((4,), 5, {"n": 4})])
        before = [sink.read(target, [(n,)]) for n in range(1, 5)]
        assert sink.sweep(target, recent_s) == 0
        assert [sink.read(target, [(n,)]) for n in range(1, 5)] == before
        assert scanned(sink, target) == {sink.id_of(target, (n,)): version for n, version in ((1, 6), (2, 7), (4, 5))}
        assert apply(sink, target, (3,), 5, {"n": 3}) == self.stale

    def test_sweep_of_nothing(self, sink: AnySink, target: Target) -> None:
        assert sink.sweep(target) == 0
        assert sink.sweep(target, 60.0) == 0

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

    # ── all at once ──────────────────────────────────────────────────────────────────────────────────────────────

    def test_any_order_any_batches_any_duplicates(self, sink: AnySink, target: Target) -> None:
        for seed in self.storm_seeds:
            storm(self, sink, target, seed)

    def test_any_order_with_a_truncate_between(self, sink: AnySink, target: Target) -> None:
        for seed in self.storm_seeds:
            storm(self, sink, target, seed, truncate=True)


@contextmanager
def dying(sink: AnySink, step: SecondStep, overtake: Callable[[], object]) -> Generator[None, None, None]:
    """Let one `apply` of the sink raise Died in place of its second step.

    `overtake`, which may use the sink, is called just before documents are written: after the first look, if there is.
    """
    look = getattr(sink, step.method)
    looks: list[Any] = []

    def replacement(*args: Any) -> Any:
        if len(looks) == step.looks_first:
            raise Died
        looks.append(look(*args))
        delattr(sink, step.method)
        overtake()
        setattr(sink, step.method, replacement)
        return looks[0]

    if not step.looks_first:
        overtake()
    setattr(sink, step.method, replacement)  # hides the class's
    try:
        yield
    finally:
        delattr(sink, step.method)


def apply(sink: AnySink, target: Target, key: Key, version: int, document: Document | None) -> Outcome:
    """Apply one write and return its outcome."""
    (outcome,) = sink.apply(target, [Write(key, version, document)])
    return outcome


def scanned(sink: AnySink, target: Target) -> dict[str, int]:
    """Return all that a scan of a resting store gives. An id that it meets twice must have one version."""
    found: dict[str, int] = {}
    for batch in sink.scan(target):
        for id_, version in batch:
            assert found.setdefault(id_, version) == version
    assert found.keys() <= {id_ for batch in sink.scan_ids(target) for id_ in batch}
    return found


# ── storms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Storm(NamedTuple):
    """Writes of some keys, and how several threads deliver them: all of them, out of order, some more than once."""

    writes: list[Write]
    deliveries: list[list[list[Write]]]  # thread → batches
    floor: int  # 0: no truncate
    truncate_before: int  # which batch of the first thread

    def ends_with(self) -> dict[Key, Write]:
        """Return the newest write of each key that the floor lets in: what must be there when all is delivered."""
        newest: dict[Key, Write] = {}
        for write in sorted(self.writes, key=lambda write: write.version):
            if write.version >= self.floor:
                newest[write.key] = write
        return newest


def plan_storm(seed: int, size: int, *, threads: int = 4, keys: int = 25, truncate: bool = False) -> Storm:
    """Plan a storm. Same arguments, same storm."""
    rng = random.Random(seed)  # noqa: S311 -- reproducible, not secret
    versions = rng.sample(range(1, size * 3), size)
    writes = [
        Write((rng.randrange(keys),), version, None if rng.random() < 0.3 else {"v": version, "seed": seed})
        for version in versions
    ]
    deliveries: list[list[list[Write]]] = [[] for _ in range(threads)]
    floor = rng.choice(versions) if truncate else 0
    for write in writes:
        for thread in rng.sample(range(threads), min(threads, rng.choice((1, 2, 2, 3)))):
            deliveries[thread].append([write])
    batches = [_batched(rng, [write for batch in own for write in batch]) for own in deliveries]
    return Storm(writes, batches, floor, rng.randrange(len(batches[0]) // 2 + 1))


def _batched(rng: random.Random, writes: list[Write]) -> list[list[Write]]:
    """Shuffle the writes and cut them into batches of different sizes with at most one write per key."""
    rng.shuffle(writes)
    batches: list[list[Write]] = [[]]
    limit = rng.randrange(1, 30)
    for write in writes:
        if len(batches[-1]) >= limit or any(write.key == other.key for other in batches[-1]):
            batches.append([])
            limit = rng.randrange(1, 30)
        batches[-1].append(write)
    return batches


def storm(contract: SinkContract, sink: AnySink, target: Target, seed: int, *, truncate: bool = False) -> None:
    """Deliver a storm by several threads at once, watched by a reader, and compare what it ends in."""
    __tracebackhide__ = True
    sink.drop(target)
    sink.prepare(target)
    plan = plan_storm(seed, contract.storm_writes, truncate=truncate)
    keys = sorted({write.key for write in plan.writes})
    done = threading.Event()
    started = threading.Barrier(len(plan.deliveries) + 1)
    errors: list[BaseException] = []

    def thread(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                started.wait()
                work()
            except BaseException as error:  # noqa: BLE001 -- it is raised again below, on the test's own thread
                errors.append(error)

        return threading.Thread(target=run)

    def deliver(batches: list[list[Write]], truncate_before: int | None = None) -> None:
        for number, batch in enumerate(batches):
            if number == truncate_before:
                sink.truncate(target, plan.floor)
            outcomes = sink.apply(target, batch)
            assert {outcome.kind for outcome in outcomes} <= {"applied", "stale"}
            assert len(outcomes) == len(batch)

    def watch() -> None:
        seen: dict[Key, int] = {}
        while not done.is_set():
            for key, found in zip(keys, sink.read(target, keys), strict=True):
                version = 0 if found is None else found.version
                assert version >= seen.get(key, 0), f"seed {seed}: {key} went back from {seen[key]} to {version}"
                assert found is None or found.document is None or found.document["v"] in (version, str(version))
                seen[key] = version

    # One of the threads truncates, with half of its writes still to come: left to a thread of its own, it could always
    # be the last, and then a sink without a floor would pass.
    first, *others = plan.deliveries
    writers = [thread(partial(deliver, first, plan.truncate_before if truncate else None))]
    writers += [thread(partial(deliver, batches)) for batches in others]
    watches = contract.reads_never_go_back and not truncate
    reader = thread(watch if watches else lambda: None)
    for each in (*writers, reader):
        each.start()
    for each in writers:
        each.join()
    done.set()
    reader.join()
    if errors:
        raise AssertionError(f"seed {seed}: {errors[0]}") from errors[0]
    check_end(contract, sink, target, plan, f"seed {seed}")


def check_end(contract: SinkContract, sink: AnySink, target: Target, plan: Storm, where: str) -> None:
    """Compare a store at rest with what a storm must end in, through `read` and through `scan`."""
    keys = sorted({write.key for write in plan.writes})
    newest = plan.ends_with()
    wrong: list[str] = []
    for key, found in zip(keys, sink.read(target, keys), strict=True):
        write = newest.get(key)
        if write is None:
            right = found is None or found.document is None
        else:
            document = None if write.document is None else contract.stored_form(write.document)
            right = found == Stored(write.version, document)
        if not right:
            wrong.append(f"{key} should be {write} and is {found}")
    assert not wrong, f"{where}: {len(wrong)} keys are wrong: {'; '.join(wrong[:3])}"
    expected = {sink.id_of(target, key): write.version for key, write in newest.items() if write.document is not None}
    assert scanned(sink, target) == expected, where
