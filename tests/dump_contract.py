"""What every state store must do with dumps: `class TestX(StateContract, DumpContract)`, whose fixtures these are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from delta_sync.dumps import ChunkCounts, ChunkLease, Dump
from delta_sync.errors import LeaseLost, UsageError
from delta_sync.state import StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.testing.processes import wait_until
from state_contract import AT_ONCE_S, FOR_EVER_S, NOW, PROCESS_TIMEOUT_S


class DumpContract:
    @staticmethod
    def begun(store: StateStore, **wish: Any) -> tuple[DumpStore, Dump]:
        """Return the dumps of a pipeline, with one of a table that has begun and is not planned."""
        dumps = DumpStore(store, "movies")
        id_ = dumps.add(Dump(table="a.b", kind="table", **wish))
        found = dumps.get(id_)
        assert found is not None
        assert dumps.begin(dataclasses.replace(found, epoch=1, fingerprint="f", covered_from=9, estimate=40))
        begun = dumps.get(id_)
        assert begun is not None
        return dumps, begun

    @staticmethod
    def taken(dumps: DumpStore, owner: str, ttl_s: float = FOR_EVER_S, rows: int = 10_000) -> ChunkLease | None:
        return dumps.lease(owner, ttl_s, rows, lambda _: True)

    def test_a_dump_comes_back_as_it_was_asked_for(self, store: StateStore) -> None:
        wish = Dump(
            table="a.b",
            kind="where",
            where="n > 1 -- %",
            sinks=("cache",),
            rows_per_s=7,
            parallel=2,
            timeout_s=1.5,
            reason="asked",
        )
        dumps = DumpStore(store, "movies")
        found = dumps.get(dumps.add(wish))
        assert found is not None
        assert found.created_at is not None
        assert found == dataclasses.replace(wish, id=found.id, created_at=found.created_at)
        assert dumps.all(unfinished=True) == [found]
        assert DumpStore(store, "other").all() == []

    def test_chunks_are_read_once_each_and_then_the_dump_is_done(self, store: StateStore) -> None:
        dumps, dump = self.begun(store)
        dumps.plan(dump.id, [(None, (Decimal("1.50"), "é")), ((Decimal("1.50"), "é"), None)])
        assert dumps.counts() == {dump.id: ChunkCounts(2, 0)}
        first, second = self.taken(dumps, "me"), self.taken(dumps, "you")
        assert first is not None
        assert second is not None
        assert self.taken(dumps, "me") is None
        assert (first.after, first.to, second.to) == (None, (Decimal("1.50"), "é"), None)
        assert second.after == first.to
        assert dumps.counts() == {dump.id: ChunkCounts(0, 2)}
        dumps.finish_chunk(second, 3)
        dumps.finish_chunk(first, 4)
        found = dumps.get(dump.id)
        assert found is not None
        assert (found.rows, found.planned, dumps.counts()) == (7, True, {})
        done = dumps.finish(dump)
        assert done is not None
        assert (done.state, done.rows) == ("done", 7), "not what was known before the chunks were recorded"
        assert dumps.finish(found) is None, "it is done only once"

    @pytest.mark.parametrize("who", ["another", "late"], ids=["another", "the same one, later"])
    def test_a_chunk_whose_lease_expired_is_anothers_and_the_late_one_records_nothing(
        self, store: StateStore, who: str
    ) -> None:
        dumps, dump = self.begun(store)
        dumps.plan(dump.id, [(None, None)])
        late = self.taken(dumps, "late", AT_ONCE_S)
        assert late is not None
        expired = {dump.id: ChunkCounts(1, 0)}
        wait_until(lambda: dumps.counts() == expired, PROCESS_TIMEOUT_S, "the end of a chunk's lease")
        heir = self.taken(dumps, who)
        assert heir is not None
        assert (heir.number, heir.token) == (late.number, late.token + 1)
        for record in (
            lambda: dumps.finish_chunk(late, 1),
            lambda: dumps.split(late, (5,)),
            lambda: dumps.standing(late),
        ):
            with pytest.raises(LeaseLost):
                record()
        dumps.release_chunk(late)  # which changes nothing
        assert dumps.standing(heir) == "running"
        dumps.finish_chunk(heir, 2)
        found = dumps.get(dump.id)
        assert found is not None
        assert (found.rows, dumps.counts()) == (2, {})

    def test_the_rest_of_a_chunk_is_left_to_others(self, store: StateStore) -> None:
        dumps, dump = self.begun(store)
        dumps.plan(dump.id, [(None, (9,))])
        whole = self.taken(dumps, "me")
        assert whole is not None
        part = dumps.split(whole, (4,))
        rest = self.taken(dumps, "you")
        assert rest is not None
        assert (part.after, part.to, rest.after, rest.to) == (None, (4,), (4,), (9,))
        dumps.release("you")
        again = self.taken(dumps, "me")
        assert again is not None
        assert (again.number, again.after, again.to) == (rest.number, (4,), (9,))

    def test_keys_are_read_once_in_chunks_that_can_be_split(self, store: StateStore) -> None:
        dumps = DumpStore(store, "movies")
        id_ = dumps.add(Dump(table="a.b", kind="keys"), [("a", 1), ("b", 2), ("a", 1)])
        dump = dumps.get(id_)
        assert dump is not None
        assert dump.estimate == 2
        assert self.taken(dumps, "me") is None, "it has not begun"
        assert dumps.begin(dataclasses.replace(dump, epoch=1, fingerprint="f", covered_from=9))
        chunk = self.taken(dumps, "me")
        assert chunk is not None
        assert chunk.keys == (("a", 1), ("b", 2))
        assert dumps.split(chunk, keys=([("b", 2)], [("a", 1)])).keys == (("b", 2),)
        rest = self.taken(dumps, "me")
        assert rest is not None
        assert rest.keys == (("a", 1),)

    def test_orders_hold_from_the_next_chunk_on(self, store: StateStore) -> None:
        dumps, dump = self.begun(store)
        dumps.plan(dump.id, [(None, (1,)), ((1,), (2,)), ((2,), None)])
        chunk = self.taken(dumps, "me")
        assert chunk is not None
        assert dumps.order(dump.id, "throttle", parallel=1).parallel == 1
        assert self.taken(dumps, "you") is None
        dumps.order(dump.id, "throttle", parallel=None)
        assert self.taken(dumps, "you") is not None
        dumps.order(dump.id, "pause")
        assert self.taken(dumps, "you") is None
        dumps.finish_chunk(chunk, 1)  # what was under way is finished
        assert dumps.order(dump.id, "resume").state == "running"
        last = self.taken(dumps, "you")
        assert last is not None
        dumps.order(dump.id, "cancel")
        with pytest.raises(LeaseLost):
            dumps.finish_chunk(last, 1)
        with pytest.raises(UsageError, match="is cancelled"):
            dumps.order(dump.id, "resume")
        with pytest.raises(UsageError, match="has no dump"):
            DumpStore(store, "other").order(dump.id, "pause")

    def test_a_limited_rate_makes_a_dump_rest_after_each_chunk(self, store: StateStore) -> None:
        dumps = DumpStore(store, "movies")
        keys = tuple((number,) for number in range(5))
        id_ = dumps.add(Dump(table="a.b", kind="keys", rows_per_s=2), keys)
        dump = dumps.get(id_)
        assert dump is not None
        assert dumps.begin(dataclasses.replace(dump, epoch=1, fingerprint="f", covered_from=9))
        began_s = time.monotonic()
        taken = [self.taken(dumps, "me"), self.taken(dumps, "me")]
        assert taken[1] is None or time.monotonic() - began_s > 1, "it rests for a second"
        dumps.order(id_, "throttle", rows_per_s=None)
        taken.append(self.taken(dumps, "me"))
        chunks = [chunk.keys for chunk in taken if chunk is not None]
        assert chunks in ([keys[:2], keys[2:]], [keys[:2], keys[2:4], keys[4:]])
        assert [self.taken(dumps, "me"), dumps.counts()] == [None, {id_: ChunkCounts(0, len(chunks))}]

    def test_a_chunk_of_more_keys_than_may_be_read_at_once_is_parted(self, store: StateStore) -> None:
        dumps = DumpStore(store, "movies")
        keys = tuple((number,) for number in range(7))
        id_ = dumps.add(Dump(table="a.b", kind="keys"), keys)
        dump = dumps.get(id_)
        assert dump is not None
        assert dumps.begin(dataclasses.replace(dump, epoch=1, fingerprint="f", covered_from=9))
        found: list[Any] = []
        while chunk := self.taken(dumps, "me", rows=3):
            found.append(chunk.keys)
            dumps.finish_chunk(chunk, 3)
        assert found == [keys[:3], keys[3:6], keys[6:]]
        assert dumps.counts() == {}

    def test_a_load_that_is_to_begin_anew_cannot_be_done(self, store: StateStore) -> None:
        dumps = DumpStore(store, "movies")
        load = store.begin_load("movies", TableLoad("a.b", fingerprint="f"))
        wish = Dump(table="a.b", kind="load", epoch=1, fingerprint="f", covered_from=9)
        started = load._replace(covered_from=9, started_at=NOW)
        assert dumps.begin_load(started, wish)
        assert not dumps.begin_load(started, wish), "it has begun"
        (dump,) = dumps.all()
        dumps.plan(dump.id, [(None, None)])
        chunk = self.taken(dumps, "me")
        assert chunk is not None
        dumps.finish_chunk(chunk, 5)
        assert store.loads("movies")["a.b"].rows == 5
        store.load_again("movies", ["a.b"], "positions expired")
        assert dumps.finish(dump) is None
        assert not dumps.begin_load(started, wish), "it is another one"
        assert (store.loads("movies")["a.b"].state, store.loads("movies")["a.b"].rows) == ("pending", 0)
        dumps.supersede("a.b", "it is loaded")
        found = dumps.get(dump.id)
        assert found is not None
        assert (found.state, found.waits) == ("cancelled", "it is loaded")

    def test_a_dump_is_planned_under_the_lease(self, store: StateStore) -> None:
        dumps, dump = self.begun(store)
        old = store.take_lease("movies", "load", "old", FOR_EVER_S)
        assert old is not None
        store.release_lease(old)
        writes: list[Callable[[], object]] = [
            lambda: dumps.plan(dump.id, [(None, None)], old),
            lambda: dumps.finish(dump, old),
            lambda: dumps.supersede("a.b", "why", old),
        ]
        for write in writes:
            with pytest.raises(LeaseLost):
                write()
        assert dumps.get(dump.id) == dump
