"""The status of several processes, as one."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from delta_sync.state import TableLoad
from deltactl.members import FORGOTTEN_S, FRESH_S, Member, combined, members_of
from deltactl.status import PARTITIONS_SHOWN, as_text

NOW = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
DONE = {"public.movie": TableLoad("public.movie", "done", rows=7)}


def worker(name: str = "w1", age_s: float = 0.5, **fields: Any) -> Member:
    numbers = {"state": "ok", "applied": 3, "stale": 1, "rejected": 0, "retries": 0, "reason": None}
    status = {
        "role": "worker",
        "state": "streaming",
        "reason": None,
        "lag_s": 0.1,
        "lag_bytes": 10,
        "rates": {"changes_per_s": 5.0},
        "totals": {"changes": 4, "writes": 3},
        "sinks": {"cache": numbers},
        "partitions": ["t[0]"],
    }
    return Member(name, {**status, **fields}, age_s)


def sidecar(name: str = "s1", role: str = "leading", age_s: float = 0.5, **fields: Any) -> Member:
    state = "streaming" if role == "leading" else "standby"
    return Member(name, {"role": "sidecar", "sidecar": role, "state": state, "reason": None, **fields}, age_s)


def state_of(*members: Member, loads: dict[str, TableLoad] = DONE) -> tuple[str, str | None]:
    found = combined("movies", members, loads, 0)
    return found["state"], found["reason"]


def test_all_is_well() -> None:
    found = combined("movies", [sidecar(), sidecar("s2", "standby"), worker(), worker("w2", lag_s=0.4)], DONE, 2)
    assert (found["state"], found["running"], found["dead_letters"]) == ("streaming", True, 2)
    assert (found["lag_s"], found["rates"]["changes_per_s"], found["totals"]["changes"]) == (0.4, 10.0, 8)
    assert found["sinks"]["cache"]["applied"] == 6
    assert [member["state"] for member in found["members"]] == ["streaming", "standby", "streaming", "streaming"]
    assert [member["leads"] for member in found["members"]] == [True, False, False, False]
    assert "s1: leads, streaming" in as_text(found)
    assert "s2: standby" in as_text(found)
    assert "w2: streaming, 1 partition" in as_text(found)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([], ("stopped", "it never ran")),
        ([worker(age_s=FRESH_S + 1)], ("stopped", "no process has said anything lately")),
        ([worker()], ("waiting", "no sidecar leads")),
        ([sidecar(role="standby"), worker()], ("waiting", "no sidecar leads")),
        ([sidecar(age_s=FRESH_S + 1), worker()], ("waiting", "no sidecar leads")),
        ([sidecar()], ("waiting", "no worker runs")),
        ([sidecar(), worker(state="stopped")], ("waiting", "no worker runs")),
        ([sidecar(), worker(), worker("w2", state="waiting", reason="Redis")], ("waiting", "w2: Redis")),
        ([sidecar(state="waiting", reason="the source"), worker()], ("waiting", "sidecar: the source")),
        ([sidecar(), worker(state="loading"), worker("w2")], ("streaming", None)),
    ],
)
def test_the_worst_is_said(members: list[Member], expected: tuple[str, str | None]) -> None:
    assert state_of(*members) == expected


def test_a_load_is_everybodys() -> None:
    loads = {"public.movie": TableLoad("public.movie", "running", rows=7)}
    assert state_of(sidecar(), worker(), loads=loads) == ("loading", "public.movie")


def test_a_busy_sink_of_one_is_busy() -> None:
    busy = {"cache": {"state": "busy", "applied": 1, "reason": "refused"}}
    for pair in ([worker(), worker("w2", sinks=busy)], [worker("w2", sinks=busy), worker()]):
        found = combined("movies", [sidecar(), *pair], DONE, 0)
        assert (found["sinks"]["cache"]["state"], found["sinks"]["cache"]["reason"]) == ("busy", "refused")


def test_look_ups_are_added_up_and_the_worst_breaker_is_shown() -> None:
    well = {"stars": {"breaker": "closed", "calls": {"answered": 3, "busy": 1}, "hits": 6, "asked": 2, "left": 0}}
    badly = {"stars": {"breaker": "open", "calls": {"answered": 1, "busy": 4}, "hits": 0, "asked": 2, "left": 5}}
    for pair in (
        [worker(lookups=well), worker("w2", lookups=badly)],
        [worker(lookups=badly), worker("w2", lookups=well)],
    ):
        found = combined("movies", pair, DONE, 0)
        assert found["lookups"]["stars"]["calls"] == {"answered": 4, "busy": 5}
        text = "breaker open, 9 calls, 5 of them failed, 60 % remembered, 5 keys left for later"
        assert text in as_text(found)


def test_members_that_went_long_ago_are_not_shown() -> None:
    said = [
        (name, worker().status, NOW - dt.timedelta(seconds=age_s))
        for name, age_s in (("old", FORGOTTEN_S + 1), ("gone", FRESH_S + 1), ("new", 0.0))
    ]
    assert [member.name for member in members_of(said, NOW)] == ["new", "gone"]


def test_a_sidecar_that_is_gone_does_not_lead() -> None:
    gone = combined("movies", [sidecar(age_s=FRESH_S + 1), worker()], DONE, 0)["members"][0]
    assert (gone["state"], gone["leads"]) == ("gone", False)


def behind(**lags: tuple[int, float | None]) -> dict[str, Any]:
    return {
        "partitions": [f"t[{name[1:]}]" for name in lags],
        "partition_lags": {f"t[{name[1:]}]": {"records": lag[0], "seconds": lag[1]} for name, lag in lags.items()},
    }


def test_partitions_of_all_members_are_shown_the_worst_first() -> None:
    one = worker("w1", **behind(p0=(5, 0.5), p1=(0, 0.0)))
    two = worker("w2", **behind(p2=(1234, None), p3=(1, 60.0)))
    new = worker("w3", partitions=["t[4]"])  # of which nothing has been fetched yet
    found = combined("movies", [sidecar(), one, two, new], DONE, 0)
    assert found["lag_records"] == 1240
    assert [(some["partition"], some["member"], some["records"]) for some in found["partitions"]] == [
        ("t[0]", "w1", 5),
        ("t[1]", "w1", 0),
        ("t[2]", "w2", 1234),
        ("t[3]", "w2", 1),
        ("t[4]", "w3", None),
    ]
    lines = [line.split("  ")[-1] for line in as_text(found).splitlines() if line.startswith("partition ")]
    assert lines == [
        "t[2]: 1,234 records, at w2",
        "t[0]: 5 records, 0.5 s, at w1",
        "t[3]: 1 record, 60.0 s, at w2",
    ]
    assert "1,240 records" in as_text(found)


def test_of_many_partitions_that_are_behind_some_are_shown() -> None:
    many = worker(**behind(**{f"p{number}": (number + 1, 1.0) for number in range(PARTITIONS_SHOWN + 5)}))
    shown = as_text(combined("movies", [sidecar(), many], DONE, 0))
    assert sum(line.startswith("partition ") for line in shown.splitlines()) == PARTITIONS_SHOWN + 1
    assert "5 more are behind" in shown


def test_a_partition_that_two_claim_is_the_ones_who_spoke_last() -> None:
    old, new = worker("w1", 3.0, **behind(p0=(9, 9.0))), worker("w2", 0.1, **behind(p0=(1, 1.0)))
    for pair in ([old, new], [new, old]):
        assert [some["member"] for some in combined("movies", pair, DONE, 0)["partitions"]] == ["w2"]


def test_the_way_into_kafka_counts_too() -> None:
    """A connector that hangs is a lag, though the workers have nothing to do."""
    found = combined("movies", [sidecar(lag_s=30.0), worker(lag_s=0.5), worker("w2", lag_s=0.0)], DONE, 0)
    assert found["lag_s"] == 30.5


def test_why_a_table_is_loaded_again_is_shown() -> None:
    loads = {"public.movie": TableLoad("public.movie", "running", rows=7, reason="positions expired")}
    gap = worker(totals={"changes": 4, "positions_expired": 2})
    shown = as_text(combined("movies", [sidecar(), gap], loads, 0))
    assert "running, 7 rows: positions expired" in shown
    assert "records of 2 partitions; their tables are loaded again" in shown
