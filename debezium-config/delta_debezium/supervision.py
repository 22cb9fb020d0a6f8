"""What the sidecar does with its Debezium Server: start it, wait, let it run, end it. Pure, with the clock as argument.

A process that runs may hang all the same (on a lock, on a broker that takes records and never answers). What counts is
that heartbeats come through: written to the log, read by the connector, acknowledged by Kafka, confirmed to the slot.
"""

from __future__ import annotations

from typing import NamedTuple

HANGS_AFTER_S = 60.0  # a start takes some 10 s, a busy machine thrice that, and heartbeats come every second
MAX_PATIENCE_S = 6 * 3600.0  # one transaction is confirmed as a whole; of what a day's would take, half
FIRST_BACKOFF_S = 1.0  # a server that ended once: somebody killed it, or the source was restarted
MAX_BACKOFF_S = 60.0  # so that it is running within a minute of the moment when it can


class Situation(NamedTuple):
    """What the sidecar sees. Times are of one monotonic clock, in seconds; None: there is no such moment.

    `failures` counts the servers in a row that ended, or were ended, before a heartbeat was confirmed.
    """

    now: float
    lease_held_until: float | None  # None: another sidecar's
    alive_since: float | None  # None: no server runs
    ended_at: float | None  # the last one
    confirmed_at: float | None  # when the slot was last seen to be confirmed beyond a heartbeat
    failures: int


class StandBy(NamedTuple):
    """Another sidecar leads, or none does: try to get the lease."""


class Start(NamedTuple):
    """Start the server."""


class Wait(NamedTuple):
    """Start no server before that moment."""

    until: float


class Run(NamedTuple):
    """Let it run. If no heartbeat is confirmed before that moment, it hangs."""

    hangs_at: float


class Kill(NamedTuple):
    """End the server, at once: what it has not confirmed comes again."""

    why: str


Action = StandBy | Start | Wait | Run | Kill


def decide(seen: Situation) -> Action:
    """Return what to do now. Ask again soon: after a second, or when something has happened."""
    leads = seen.lease_held_until is not None and seen.now < seen.lease_held_until
    if seen.alive_since is None:
        if not leads:
            return StandBy()
        earliest = seen.now if seen.ended_at is None else seen.ended_at + backoff_s(seen.failures)
        return Start() if seen.now >= earliest else Wait(earliest)
    if not leads:
        # It would go on to hold the slot, which the one that leads now needs.
        return Kill("The lease is no longer this sidecar's, so its Debezium Server ends.")
    hangs_at = max(seen.alive_since, seen.confirmed_at or seen.alive_since) + patience_s(seen.failures)
    if seen.now < hangs_at:
        return Run(hangs_at)
    return Kill(
        f"No heartbeat was confirmed for {patience_s(seen.failures):.0f} s, so Debezium Server is started anew."
    )


def backoff_s(failures: int) -> float:
    """Return how long to wait after an end: nothing after one that had worked, then twice as long each time."""
    return 0.0 if failures == 0 else min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30), MAX_BACKOFF_S)


def patience_s(failures: int) -> float:
    """Return how long it may run without a heartbeat: twice as long each time.

    A transaction is confirmed as a whole, so one that takes longer than HANGS_AFTER_S would else never get through.
    """
    return min(HANGS_AFTER_S * 2.0 ** min(failures, 30), MAX_PATIENCE_S)
