"""When documents are enriched again by themselves: rounds whose beginnings and rates hold what `refresh_after` says."""

from __future__ import annotations

import datetime as dt
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_sync.dumps import Dump
from delta_sync.errors import UsageError
from delta_sync.pipeline import Pipeline
from delta_sync.refresher import Refresher, Round, Standing, rate_of, rounds_of, standing_of, step_of
from delta_sync.refreshing import NoticeStore
from delta_sync.state import StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Column, Kind, Table

NOW = dt.datetime(2026, 11, 29, tzinfo=dt.UTC)
HOUR = 3600.0


def ago(seconds: float) -> dt.datetime:
    return NOW - dt.timedelta(seconds=seconds)


def a_round(ago_s: float, state: str = "done", **more: Any) -> Dump:
    return Dump(table="public.movie", kind="refresh", state=state, created_at=ago(ago_s), **more)  # type: ignore[arg-type]  # a state


LOAD = TableLoad("public.movie", state="done", started_at=ago(100 * HOUR))


def test_a_table_follows_the_look_up_whose_answers_age_soonest() -> None:
    pipeline = Pipeline("movies")

    def declared(name: str, **options: Any) -> Any:
        def function(keys: list[Any]) -> dict[Any, Any]:
            return dict.fromkeys(keys)

        function.__name__ = name
        return pipeline.lookup(**options)(function)

    daily, hourly = declared("daily", refresh_after="1d"), declared("hourly", refresh_after="1h", missing_ttl="30m")
    never = declared("never")

    @pipeline.table("public.movie", enrich={"a": daily.by("id"), "b": hourly.by("id"), "c": never.by("id")})
    def movie(row: Any, a: Any, b: Any, c: Any) -> Any:
        return row

    @pipeline.table("public.studio", enrich={"c": never.by("id")})
    def studio(row: Any, c: Any) -> Any:
        return row

    assert rounds_of(pipeline) == {"public.movie": Round("hourly", HOUR / 2)}, "what may have been cached is taken off"
    with pytest.raises(UsageError, match="refresh_after must be at least twice ttl"):
        declared("soon", refresh_after="19m")


def test_a_round_begins_three_quarters_after_the_last_one_did() -> None:
    of = Round("ratings", 4 * HOUR)
    for since_h, step in ((2.9, None), (3.0, "begin"), (100, "begin")):
        at = standing_of("public.movie", LOAD, [a_round(since_h * HOUR)])
        assert at is not None
        assert step_of(of, at, NOW) == step, since_h
    assert standing_of("public.movie", LOAD._replace(state="running"), []) is None, "its load enriches every row"
    assert standing_of("public.movie", None, []) is None


def test_one_that_is_not_half_way_in_time_goes_on_as_fast_as_it_can_and_one_that_is_late_is_said() -> None:
    of = Round("ratings", 4 * HOUR)
    steps = {
        since_h: step_of(of, Standing(ago(since_h * HOUR), a_round(since_h * HOUR, "running", rows_per_s=9), NOW), NOW)
        for since_h in (0.4, 0.6, 1.1)
    }
    assert steps == {0.4: None, 0.6: "hurry", 1.1: "late"}
    unlimited = Standing(ago(0.6 * HOUR), a_round(0.6 * HOUR, "running"), NOW)
    assert step_of(of, unlimited, NOW) is None
    paused = Standing(ago(9 * HOUR), a_round(9 * HOUR, "paused"), NOW)
    assert step_of(of, paused, NOW) is None, "somebody wanted that"


def test_a_cancelled_round_is_not_begun_again_at_once_but_does_not_count_as_enriching() -> None:
    rounds = [a_round(50 * HOUR), a_round(1 * HOUR, "cancelled"), Dump(table="public.movie", kind="table")]
    at = standing_of("public.movie", LOAD, rounds)
    assert at == Standing(ago(1 * HOUR), None, ago(50 * HOUR))


@given(
    within_s=st.floats(2, 30 * 86400),
    begun=st.lists(st.floats(0, 0.25), min_size=2, max_size=6),
    share=st.floats(0, 1),
)
def test_no_enrichment_becomes_older_than_is_promised(within_s: float, begun: list[float], share: float) -> None:
    """A row at any place of the table, in rounds that last as long as they may or end at once."""
    of, at_s, enriched_s = Round("ratings", within_s), 0.0, list[float]()
    for lasts in begun:
        enriched_s.append(at_s + share * lasts * within_s)
        due_s = 0.75 * within_s
        assert step_of(of, Standing(ago(due_s * 1.000001 + 1e-5), None, NOW), NOW) == "begin"
        at_s += due_s
    gaps = [later - earlier for earlier, later in itertools.pairwise(enriched_s)]
    assert max(gaps) <= within_s * 1.000001


def test_the_rate_is_spread_over_half_of_the_time() -> None:
    assert rate_of(Round("ratings", 86400.0), 1_000_000) == 93  # in three hours, and six are allowed
    assert rate_of(Round("ratings", 86400.0), 0) == 1


def test_a_key_that_no_column_can_have_does_not_cost_those_that_came_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PostgreSQL refuses a whole list for one that is no member of an enumeration."""
    monkeypatch.setattr("delta_sync.refreshing.NOTICED_S", -1.0)  # every process has dropped them
    table = Table("public", "movie", (Column("id", "int4", Kind.INTEGER), Column("genre", "genre", Kind.TEXT)), ("id",))
    pipeline = Pipeline("movies")

    @pipeline.lookup()
    def genres(keys: list[Any]) -> dict[Any, Any]:
        return dict.fromkeys(keys)

    @pipeline.table("public.movie", enrich={"about": genres.by("genre")})
    def movie(row: dict[str, Any], about: Any) -> dict[str, Any]:
        return row | {"about": about}

    del movie

    class Source:
        def keys_having(self, _of: Table, _column: str, values: Sequence[str], _most: int | None) -> list[tuple[int]]:
            if "none" in values:
                raise UsageError("no member of the enumeration")
            return [(len(value),) for value in values]

    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        notices, dumps = NoticeStore(state, "movies"), DumpStore(state, "movies")
        for keys in (["a", "bb"], ["none"], ["dddd"]):
            notices.add("genres", keys, pending=True)
        Refresher(
            pipeline=pipeline,
            state=state,
            reader=cast("Any", Source()),
            tables=lambda: {"public.movie": table},
            ages=lambda _: None,
            stopping=threading.Event(),
        ).look()
        assert [(dump.table, dump.estimate) for dump in dumps.all()] == [("public.movie", 3)]
        assert not notices.due()
