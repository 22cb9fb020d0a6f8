"""The supervision of Debezium Server, as a decision."""

from __future__ import annotations

import pytest

from delta_debezium.supervision import (
    HANGS_AFTER_S,
    MAX_BACKOFF_S,
    MAX_PATIENCE_S,
    Kill,
    Run,
    Situation,
    StandBy,
    Start,
    Wait,
    backoff_s,
    decide,
    patience_s,
)

LEADING = Situation(now=1000, lease_held_until=1010, alive_since=None, ended_at=None, confirmed_at=None, failures=0)
RUNNING = LEADING._replace(alive_since=900, confirmed_at=999)


def test_the_first_server_starts_at_once_and_only_where_the_lease_is() -> None:
    assert decide(LEADING) == Start()
    assert decide(LEADING._replace(lease_held_until=None)) == StandBy()
    assert decide(LEADING._replace(now=1010)) == StandBy()


def test_a_server_whose_sidecar_lost_the_lease_ends() -> None:
    assert isinstance(decide(RUNNING), Run)
    for until in (None, 1000, 990):
        action = decide(RUNNING._replace(lease_held_until=until))
        assert isinstance(action, Kill)
        assert "lease" in action.why


def test_one_that_had_worked_is_replaced_at_once_and_one_that_had_not_after_a_while() -> None:
    ended = LEADING._replace(ended_at=1000, confirmed_at=990)
    assert decide(ended) == Start()
    assert decide(ended._replace(failures=1)) == Wait(1001)
    assert decide(ended._replace(failures=1, now=1001)) == Start()
    assert decide(ended._replace(failures=3)) == Wait(1004)
    assert decide(ended._replace(failures=3, lease_held_until=None)) == StandBy()


def test_it_hangs_when_no_heartbeat_was_confirmed_since_its_start_or_the_last_one() -> None:
    assert decide(RUNNING) == Run(999 + HANGS_AFTER_S)
    fresh = RUNNING._replace(alive_since=1000, confirmed_at=None)
    assert decide(fresh) == Run(1000 + HANGS_AFTER_S)
    # The one before it was confirmed long ago: that is not this one's fault.
    assert decide(fresh._replace(confirmed_at=10)) == Run(1000 + HANGS_AFTER_S)
    later = fresh._replace(now=1000 + HANGS_AFTER_S, lease_held_until=2000)
    action = decide(later)
    assert isinstance(action, Kill)
    assert "60 s" in action.why
    assert decide(later._replace(failures=1)) == Run(1000 + 2 * HANGS_AFTER_S)


@pytest.mark.parametrize("failures", [0, 1, 2, 10, 1000, 10**9])
def test_patience_and_backoff_grow_to_a_limit(failures: int) -> None:
    assert backoff_s(failures) <= backoff_s(failures + 1) <= MAX_BACKOFF_S
    assert patience_s(failures) <= patience_s(failures + 1) <= MAX_PATIENCE_S
