"""What a look-up answered has changed: caches drop it in time, in every process, and nobody caches it again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from delta_sync.errors import StateBusy, UsageError
from delta_sync.lookups import LookupCaller
from delta_sync.masking import Mask
from delta_sync.pipeline import Pipeline
from delta_sync.refreshing import KEPT_S, TRUSTED_S, NoticeReader, NoticeStore, asked_by, typed
from delta_sync.state import StateStore
from delta_sync.tables import Column, Kind, Table


class Process:
    """One process of a pipeline: its cache, and what it sees of the notices. The service's answers are `says`."""

    def __init__(self, state: StateStore, says: dict[int, str]) -> None:
        self.now_s = 1000.0
        self.during: Callable[[], None] = lambda: None
        self.asked = 0

        def ratings(keys: list[Any]) -> Mapping[Any, Any]:
            self.asked += 1
            answers = {key: says[key] for key in keys}
            self.during()
            return answers

        lookup = Pipeline("movies").lookup(ttl="1h")(ratings)
        self.caller = LookupCaller(lookup, threading.Event(), lambda: self.now_s)
        self.store = NoticeStore(state, "movies")
        self.reader = NoticeReader(self.store, {"ratings": self.caller}, threading.Event(), lambda: self.now_s)
        self.reader.look()

    def fetch(self, *keys: int) -> list[str]:
        return [self.caller.fetch(keys).found[key] for key in keys]

    def close(self) -> None:
        self.caller.close()


class Bench:
    def __init__(self, state: StateStore) -> None:
        self.says = {1: "old", 2: "old", 3: "old"}
        self.processes = [Process(state, self.says) for _ in range(2)]
        self.store = NoticeStore(state, "movies")

    def change(self) -> None:
        self.says.update(dict.fromkeys(self.says, "new"))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        made = Bench(state)
        yield made
        for process in made.processes:
            process.close()


def test_each_process_drops_these_keys_and_no_others(bench: Bench) -> None:
    for process in bench.processes:
        assert process.fetch(1, 2, 3) == ["old"] * 3
    bench.change()
    bench.store.add("ratings", [1, 2])
    bench.store.add("another", [3])
    for process in bench.processes:
        assert process.fetch(1, 2, 3) == ["old"] * 3
        process.reader.look()
        assert process.fetch(1, 2, 3) == ["new", "new", "old"]
        process.reader.look()
        assert process.fetch(1, 2, 3) == ["new", "new", "old"]
        assert process.asked == 2, "a notice is heeded once"


def test_who_cannot_look_uses_no_cached_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    process = bench.processes[0]
    assert process.fetch(1) == ["old"]
    bench.change()

    def busy() -> frozenset[int]:
        raise StateBusy("it does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(process.store, "ids", busy)
        process.now_s += TRUSTED_S - 0.1
        with pytest.raises(StateBusy):
            process.reader.look()
        assert process.fetch(1) == ["old"], "nobody waits for less than that before the rows are looked for"
        process.now_s += 0.1
        assert process.fetch(1) == ["new"]
    bench.says[1] = "newest"
    process.reader.look()
    assert process.fetch(1) == ["new"], "it can look again"


def test_trust_counts_from_when_a_look_began(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    process = bench.processes[0]
    ids = process.store.ids

    def slow() -> frozenset[int]:
        found = ids()
        process.now_s += TRUSTED_S
        return found

    monkeypatch.setattr(process.store, "ids", slow)
    process.reader.look()
    assert not process.reader.trusted()


def test_an_answer_that_was_under_way_is_not_cached(bench: Bench) -> None:
    process = bench.processes[0]

    def meanwhile() -> None:
        bench.change()
        bench.store.add("ratings", [1])
        process.reader.look()

    process.during = meanwhile
    assert process.fetch(1) == ["old"]
    process.during = lambda: None
    assert process.fetch(1) == ["new"]


def test_who_did_not_look_for_long_drops_all(bench: Bench) -> None:
    """The notice may be gone by then."""
    process = bench.processes[0]
    assert process.fetch(1, 3) == ["old"] * 2
    bench.change()
    process.now_s += KEPT_S / 2 + 1
    process.reader.look()
    assert process.fetch(1, 3) == ["new"] * 2


def test_before_its_first_look_a_process_trusts_nothing(bench: Bench) -> None:
    process = bench.processes[0]
    NoticeReader(process.store, {"ratings": process.caller}, threading.Event(), lambda: process.now_s)
    process.fetch(1)
    process.fetch(1)
    assert process.asked == 2


# ── whose documents they are ─────────────────────────────────────────────────────────────────────────────────────


def test_tables_that_ask_a_lookup(bench: Bench) -> None:
    del bench
    pipeline = Pipeline("movies")
    ratings = pipeline.lookup()(named("ratings"))
    pipeline.lookup()(named("unused"))
    enrich = {"rating": ratings.by("id"), "other": ratings.by("sequel"), "same": ratings.by("id")}
    pipeline.table("public.movie", enrich=enrich)(lambda row, rating, other, same: row)
    pipeline.table("public.studio")(lambda row: row)
    assert asked_by(pipeline, "ratings") == {"public.movie": ["id", "sequel"]}
    with pytest.raises(UsageError, match="no look-up 'rating'; it has ratings, unused"):
        asked_by(pipeline, "rating")
    with pytest.raises(UsageError, match="No table is enriched by look-up unused"):
        asked_by(pipeline, "unused")


def named(name: str) -> Callable[[list[Any]], Mapping[Any, Any]]:
    def ask(keys: list[Any]) -> Mapping[Any, Any]:
        return dict.fromkeys(keys)

    ask.__name__ = name
    return ask


def test_keys_have_the_type_of_the_column() -> None:
    table = Table(
        "public",
        "movie",
        (
            Column("id", "int4", Kind.INTEGER),
            Column("code", "text", Kind.TEXT),
            Column("secret", "text", Kind.TEXT, mask=Mask("redact", "***")),
            Column("length", "interval", Kind.INTERVAL),
        ),
        ("id",),
    )
    assert typed(table, "id", ["7", "8", "07"]) == [7, 8]
    assert typed(table, "code", ["7", "a'b"]) == ["7", "a'b"]
    with pytest.raises(UsageError, match=r"'seven' is no value of public\.movie\.id \(int4\)"):
        typed(table, "id", ["7", "seven"])
    with pytest.raises(UsageError, match="masked"):
        typed(table, "secret", ["7"])
    with pytest.raises(UsageError, match="cannot be found"):
        typed(table, "length", ["7"])
