"""What was written without an optional look-up's answer is remembered, once, and resumed when the service is back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from delta_sync import mending
from delta_sync.changes import Change
from delta_sync.dumps import Dump
from delta_sync.lookups import LookupCaller
from delta_sync.mending import Left, Mender, lookup_of, reason_of
from delta_sync.pipeline import Pipeline
from delta_sync.processing import process
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Column, Kind, Table

MOVIE = Table("public", "movie", (Column("id", "int", Kind.INTEGER), Column("by", "int", Kind.INTEGER)), ("id",))


class Bench:
    """A pipeline with an optional look-up whose service is down or not, and a mender over a real state store."""

    def __init__(self, state: StateStore) -> None:
        self.down = True
        pipeline = Pipeline("movies")

        @pipeline.lookup(required=False, deadline=60, trip_after=1, pause="1h", ttl=0)
        def ratings(keys: list[Any]) -> Mapping[Any, Any]:
            if self.down:
                raise requests.ConnectionError("refused")
            return {key: key * 10 for key in keys}

        @pipeline.table("public.movie", enrich={"rating": ratings.by("by")})
        def movie(row: dict[str, Any], rating: int | None) -> dict[str, Any]:
            return {"rating": rating}

        del movie
        self.pipeline = pipeline
        self.store = DumpStore(state, "movies")
        self.caller = LookupCaller(ratings, threading.Event(), lambda: 0.0)
        self.mender = self.new_mender()

    def new_mender(self) -> Mender:
        return Mender(self.store, {"ratings": self.caller}, threading.Event())

    def write(self, *ids: int) -> list[Any]:
        """Process rows as the worker does; return the ratings in their documents."""
        changes = [Change("public.movie", (id_,), 1, {"id": id_, "by": id_ + 1}) for id_ in ids]
        done = process(MOVIE, self.pipeline.tables["public.movie"], changes, {"ratings": self.caller})
        self.mender.remember([Left(lookup, "public.movie", keys) for lookup, keys in done.left.items()])
        return [(write.document or {})["rating"] for write in done.writes]

    def dumps(self) -> list[tuple[int | None, str]]:
        return [(dump.estimate, dump.state) for dump in self.store.all()]


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Bench]:
    state = StateStore.open("sqlite:///state.db", tmp_path)
    assert state is not None
    with state:
        bench = Bench(state)
        yield bench
        bench.caller.close()


def test_what_was_left_is_a_paused_dump_until_the_service_is_back(it: Bench) -> None:
    assert it.write(1, 2) == [None, None]
    assert it.write(2, 3) == [None, None]
    assert it.dumps() == [(2, "paused"), (1, "paused")], "2 is remembered once"
    assert it.mender.mend() == []
    it.down = False
    assert it.mender.mend() == [1, 2]
    assert it.dumps() == [(2, "pending"), (1, "pending")]
    assert it.write(2) == [30], "the breaker is closed"
    it.down = True
    assert it.write(2) == [None]
    assert it.dumps()[2:] == [(1, "paused")], "what is left anew is remembered anew"


def test_another_process_finds_what_was_left(it: Bench) -> None:
    it.write(1)
    it.down = False
    assert it.new_mender().mend() == [1]


def test_what_nobody_can_answer_any_more_is_resumed(it: Bench) -> None:
    it.write(1)
    assert Mender(it.store, {}, threading.Event()).mend() == [1], "there is no such look-up: nothing to wait for"


def test_what_a_person_paused_stays_so(it: Bench) -> None:
    it.down = False
    own = it.store.add(Dump(table="public.movie", kind="keys", reason="it was asked for"), [(1,)], paused=True)
    assert it.mender.mend() == []
    found = it.store.get(own)
    assert found is not None
    assert lookup_of(found) is None


def test_too_many_keys_are_the_whole_table(it: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mending, "KEYS_MOST", 3)
    it.write(1, 2)
    it.write(3, 4)
    it.write(5, 6)
    it.write(7)
    assert [(dump.kind, dump.state, dump.reason) for dump in it.store.all()] == [
        ("keys", "cancelled", reason_of("ratings")),
        ("table", "paused", reason_of("ratings")),
    ]


def test_too_many_dumps_are_the_whole_table(it: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mending, "PARTS_MOST", 2)
    for id_ in (1, 2, 3, 4):
        it.write(id_)
    assert [(dump.kind, dump.state) for dump in it.store.all()] == [
        ("keys", "cancelled"),
        ("keys", "cancelled"),
        ("table", "paused"),
    ]
