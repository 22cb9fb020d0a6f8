"""The status of several processes, as one."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from delta_sync.state import TableLoad
from deltactl.members import FORGOTTEN_S, FRESH_S, Member, combined, members_of
from deltactl.status import as_text

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
    return Member(name, {"role": "sidecar", "sidecar": role, "state": "streaming", "reason": None, **fields}, age_s)


def state_of(*members: Member, loads: dict[str, TableLoad] = DONE) -> tuple[str, str | None]:
    found = combined("movies", members, loads, 0)
    return found["state"], found["reason"]


def test_all_is_well() -> None:
    found = combined("movies", [sidecar(), sidecar("s2", "standing by"), worker(), worker("w2", lag_s=0.4)], DONE, 2)
    assert (found["state"], found["running"], found["dead_letters"]) == ("streaming", True, 2)
    assert (found["lag_s"], found["rates"]["changes_per_s"], found["totals"]["changes"]) == (0.4, 10.0, 8)
    assert found["sinks"]["cache"]["applied"] == 6
    assert [member["state"] for member in found["members"]] == ["leading", "standing by", "streaming", "streaming"]
    assert "w2: streaming, 1 partition" in as_text(found)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([], ("stopped", "it never ran")),
        ([worker(age_s=FRESH_S + 1)], ("stopped", "no process has said anything lately")),
        ([worker()], ("waiting", "no sidecar leads")),
        ([sidecar(role="standing by"), worker()], ("waiting", "no sidecar leads")),
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


def test_members_that_went_long_ago_are_not_shown() -> None:
    said = [
        (name, worker().status, NOW - dt.timedelta(seconds=age_s))
        for name, age_s in (("old", FORGOTTEN_S + 1), ("gone", FRESH_S + 1), ("new", 0.0))
    ]
    assert [member.name for member in members_of(said, NOW)] == ["new", "gone"]
