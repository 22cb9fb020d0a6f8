"""Generations of a sink: what may follow what, what is written, and that readers end where they are meant to be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from delta_sync.dumps import Dump, State
from delta_sync.errors import SinkRefused, UsageError
from delta_sync.generations import Generations, GenerationStore, follow, meant, next_step, open_generations, written
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.verifying import Tally
from deltactl import rebuild
from deltactl.rebuild import Site, why_not_switch

ALONE = Generations("search")
BUILDING = ALONE.begun()
KEPT = BUILDING.switched()
DROPPING = KEPT.dropped("kept")


def test_a_rebuild_from_its_beginning_to_its_end() -> None:
    assert Generations("search", 1, 2, "building", 2) == BUILDING
    assert Generations("search", 2, 1, "kept", 2) == KEPT
    assert KEPT.back() == Generations("search", 1, 2, "kept", 2)
    assert KEPT.back().back() == KEPT
    assert DROPPING.gone() == Generations("search", 2, None, "", 2)
    assert BUILDING.dropped("building").gone() == Generations("search", 1, None, "", 2)
    assert DROPPING.gone().begun() == Generations("search", 2, 3, "building", 3), "a number is never given twice"
    assert BUILDING.dropped("building").gone().begun().other == 3


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (BUILDING.begun, "--cancel"),
        (KEPT.begun, "--drop-old"),
        (DROPPING.begun, "being removed"),
        (ALONE.back, "no older generation"),
        (BUILDING.back, "no older generation"),  # it is not complete
        (DROPPING.back, "no older generation"),
        (lambda: BUILDING.dropped("kept"), "no older generation"),
        (lambda: KEPT.dropped("building"), "no rebuild"),
        (lambda: ALONE.dropped("building"), "no rebuild"),
    ],
)
def test_what_cannot_be_is_refused(ask: Callable[[], Generations], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ask()


def test_the_log_goes_to_both_until_one_is_dropped() -> None:
    assert [row.written for row in (ALONE, BUILDING, KEPT, DROPPING)] == [(1,), (1, 2), (2, 1), (2,)]
    # A switch is no reason for a new run; a rebuild's beginning and a drop are.
    assert written({"search": BUILDING}) == written({"search": KEPT}) == written({"search": KEPT.back()})
    assert len({str(written(rows)) for rows in ({}, {"search": BUILDING}, {"search": DROPPING})}) == 3


def test_each_generation_is_a_sink_of_its_own_and_the_others_are_as_they_were() -> None:
    spec = spec_from(
        {
            "name": "movies",
            "source": {"url": "postgresql://delta@db/studio"},
            "tables": {"public.movie": {}},
            "sinks": {"cache": {"url": "redis://cache/0"}, "search": {"url": "http://search"}},
        },
        "it",
    )
    sinks = open_generations(spec, {"search": KEPT})
    assert {name: (sink.name, sink.number) for name, sink in sinks.items()} == {
        "cache": ("cache", None),
        "search.2": ("search.2", 2),
        "search.1": ("search.1", 1),
    }
    assert set(open_generations(spec, {"search": DROPPING})) == {"cache", "search.2"}


def test_a_name_without_a_number_means_every_generation() -> None:
    sinks = ("cache", "search.1", "search.2")
    assert [sink for sink in sinks if meant(None, sink)] == list(sinks)
    assert [sink for sink in sinks if meant(["search"], sink)] == ["search.1", "search.2"]
    assert [sink for sink in sinks if meant(["search.2"], sink)] == ["search.2"]
    assert not meant([], "cache")


def test_readers_end_where_they_are_meant_to_be_although_two_lead_them_at_once() -> None:
    meant_now, led = [2], list[int]()

    def lead(number: int) -> None:
        led.append(number)
        if len(led) == 1:  # the other changes its mind, and is the faster one
            meant_now[0] = 1
            led.insert(0, 1)

    assert follow(lambda: meant_now[0], lead) == 1
    assert led == [1, 2, 1]


def dump(state: State, sink: str = "search.2", table: str = "public.movie") -> Dump:
    return Dump(table=table, kind="table", state=state, sinks=(sink,))


@pytest.mark.parametrize(
    ("dumps", "step"),
    [
        ([], "dump"),
        ([dump("pending")], "wait"),
        ([dump("paused")], "wait"),
        ([dump("cancelled"), dump("failed")], "dump"),
        ([dump("cancelled"), dump("running")], "wait"),
        ([dump("done"), dump("failed")], "verify"),
        ([dump("done", "search.1"), dump("done", table="public.genre")], "dump"),
        ([Dump(table="public.movie", kind="table", state="done")], "dump"),  # perhaps before there was a new one
        ([Dump(table="public.movie", kind="where", state="done", where="true", sinks=("search.2",))], "dump"),
    ],
)
def test_a_new_generation_is_filled_by_a_dump_of_its_own(dumps: list[Dump], step: str) -> None:
    assert next_step("public.movie", dumps, "search.2") == step


def test_only_a_verification_that_found_nothing_allows_the_switch() -> None:
    assert why_not_switch(Tally(rows=5, documents=5), [], 0) is None
    assert why_not_switch(Tally(), ["public.movie"], 0) == "table public.movie was not verified"
    missing = Tally()
    missing.found["missing"] = 1
    assert why_not_switch(missing, [], 0) == "there are differences from the source: 1"
    assert why_not_switch(Tally(dead=1), [], 0) is not None, "the old one may have what this one lacks"
    assert why_not_switch(Tally(failed=2), [], 0) is not None
    assert why_not_switch(Tally(unsettled=1), [], 0) is not None
    assert why_not_switch(Tally(), [], 3) is not None


def test_of_two_who_change_it_at_once_one_is_refused(tmp_path: Path) -> None:
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        store = GenerationStore(state, "movies")
        store.change(ALONE, BUILDING)
        with pytest.raises(UsageError, match="Somebody else"):
            store.change(ALONE, BUILDING)
        store.change(BUILDING, KEPT)
        assert store.all() == {"search": KEPT}
        assert GenerationStore(state, "other").all() == {}


def test_where_readers_cannot_be_led_what_was_meant_before_is_meant_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each start of the pipeline would try it again, and stop."""
    led: list[int] = []

    class Sink:
        def __init__(self, number: int) -> None:
            self.number = number

        def lead_readers(self, _targets: object) -> None:
            if self.number == 2:
                raise SinkRefused("other objects depend on the view")
            led.append(self.number)

    @contextlib.contextmanager
    def opened(_site: Site, number: int) -> Iterator[tuple[Sink, list[object]]]:
        yield Sink(number), []

    monkeypatch.setattr(rebuild, "_opened", opened)
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        rows = GenerationStore(state, "movies")
        site = Site(cast("PipelineSpec", None), tmp_path, "search", state, rows, DumpStore(state, "movies"))
        rows.change(ALONE, BUILDING)
        with pytest.raises(SinkRefused):
            rebuild._switch(site, BUILDING, KEPT)
        assert (site.row(), led) == (BUILDING, [1]), "type it again, and it goes on"
