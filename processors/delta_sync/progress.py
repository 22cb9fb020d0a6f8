"""What a running pipeline knows about itself: the numbers behind `deltactl status`, metrics and health checks."""

from __future__ import annotations

import datetime as dt
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from delta_sync.applying import SinkNumbers
from delta_sync.dumps import Dump, rate_and_left
from delta_sync.events import HandlerNumbers
from delta_sync.measures import (
    BATCH_BOUNDS,
    LATENCY_BOUNDS_S,
    STAGE_BOUNDS_S,
    STAGES,
    Histogram,
    LookupNumbers,
    PartitionLag,
    Stage,
)
from delta_sync.verifying import Verified

State = Literal["starting", "standby", "loading", "streaming", "waiting", "stopped", "failed"]
READY: frozenset[str] = frozenset({"standby", "loading", "streaming"})  # it does, or could at once, what it is for
RATE_WINDOW_S = 5.0  # long enough to be calm, short enough to show what happens now


class LogPosition:
    """How far the log has been applied to every sink, as heartbeats tell, and how long it takes them to come back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._outstanding: deque[tuple[int, float]] = deque()
        self._passed_lsn = 0
        self._round_trip_s: float | None = None
        self._waiting = 0

    @property
    def passed_lsn(self) -> int:
        """Everything that was committed before this position is in the sinks; 0 until the first heartbeat is back."""
        return self._passed_lsn

    def sent(self, lsn: int) -> None:
        """Note that a heartbeat was written at this position just now."""
        with self._changed:
            if lsn > self._passed_lsn:
                self._outstanding.append((lsn, self._clock()))

    def advance(self, lsn: int) -> None:
        """Note that the log is applied up to the heartbeat at this position."""
        with self._changed:
            self._passed_lsn = max(lsn, self._passed_lsn)
            while self._outstanding and self._outstanding[0][0] <= lsn:
                self._round_trip_s = self._clock() - self._outstanding.popleft()[1]
            self._changed.notify_all()

    def forget(self) -> None:
        """Note that positions have started again: nothing has come through the log of the new ones."""
        with self._changed:
            self._outstanding.clear()
            self._passed_lsn = 0
            self._round_trip_s = None

    def wait(self, lsn: int, timeout_s: float) -> bool:
        """Wait until the log is applied up to a heartbeat; return whether it is."""
        with self._changed:
            self._waiting += 1
            try:
                return self._changed.wait_for(lambda: self._passed_lsn >= lsn, timeout_s)
            finally:
                self._waiting -= 1

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for it to advance."""
        return self._waiting > 0

    def lag_s(self) -> float | None:
        """How long a change takes into the sinks: the last round trip, or the age of a heartbeat still out."""
        with self._changed:
            oldest_s = self._clock() - self._outstanding[0][1] if self._outstanding else None
            known = [value for value in (self._round_trip_s, oldest_s) if value is not None]
            return max(known) if known else None


class Progress:
    """The pipeline's numbers, and what it waits for. Each field is written by one thread; anyone may read."""

    def __init__(self, position: LogPosition, clock: Callable[[], float]) -> None:
        self.position = position
        self.sinks: Mapping[str, SinkNumbers] = {}
        self.lookups: Mapping[str, LookupNumbers] = {}
        self.handlers: Mapping[str, HandlerNumbers] = {}
        self.insert_lsn: int | None = None  # newest known end of the source's log
        self.bytes_between: Callable[[int, int], int | None] = lambda start, end: max(
            0, end - start
        )  # of its positions
        self.events = 0  # change events taken from the log
        self.writes = 0  # documents written or deleted, counted once whatever the number of sinks
        self.dead_letters = 0
        self.reread_rows = 0  # rows read by key, because an event lacked a value
        self.capture_restarts = 0
        self.positions_expired = 0  # partitions of which records were gone before they were read
        self.loads: dict[str, dict[str, Any]] = {}
        self.dumps: Sequence[Dump] = ()  # under way, other than loads; of the process that plans them
        self.stages: Mapping[Stage, Histogram] = {stage: Histogram(STAGE_BOUNDS_S) for stage in STAGES}  # apply: sinks'
        self.batch_changes = Histogram(BATCH_BOUNDS)
        self.latency = Histogram(LATENCY_BOUNDS_S)  # each batch counts its changes by its oldest one
        self.partition_lags: Mapping[tuple[str, int], PartitionLag] = {}  # of this process, by topic and number
        self.verified: Mapping[str, Verified] = {}  # by table, as it was at `verified_at` by this clock
        self.verified_at = 0.0
        self.notices: Mapping[tuple[str, str], int] = {}  # by where they come from, and `accepted` or `refused`
        self.enrichment_ages_s: Mapping[str, float] = {}  # by table, of look-ups with `refresh_after`; who plans knows
        self.processor_timeouts: Callable[[], int] = lambda: 0  # changes on which processor.py was ended
        self.standby = False  # another process leads, and this one could take over
        self._waits: dict[str, str] = {}
        self._ended: tuple[State, str] | None = None
        self._seen: State = "starting"
        self._since = _now()
        self._clock = clock
        self._history: deque[tuple[float, int, dict[str, int], dict[int, int]]] = deque()

    def waits(self, who: str, reason: str | None) -> None:
        """Note for what a part of the pipeline waits; None: no longer."""
        if reason is None:
            self._waits.pop(who, None)
        else:
            self._waits[who] = reason

    def ages(self, found: Mapping[str, float]) -> None:
        """Note how long ago the last round of enriching began that has enriched every row, by table."""
        self.enrichment_ages_s = found

    def end(self, state: State, reason: str) -> None:
        """Note that the run has ended, and why."""
        self._ended = (state, reason)

    def state(self) -> tuple[State, str | None]:
        """Return the state that the pipeline is in, and the reason where one helps."""
        if self._ended is not None:
            return self._ended
        waits = {f"sink {name}": numbers.busy for name, numbers in self.sinks.items() if numbers.busy} | self._waits
        waits |= {f"handler {name}": numbers.busy for name, numbers in self.handlers.items() if numbers.busy}
        if waits:
            # An error's message may begin with whose it is.
            parts = (f"{who}: {reason.removeprefix(f'{who}: ')}" for who, reason in waits.items())
            return "waiting", "; ".join(parts)
        if self.standby:
            return "standby", None
        if not self.position.passed_lsn:
            return "starting", None
        loading = [table for table, load in self.loads.items() if load["state"] != "done"]
        return ("loading", f"{', '.join(loading)}") if loading else ("streaming", None)

    def lag_s(self) -> float | None:
        """How long a change takes into the sinks; with Kafka, how long it has been there before it is in the sinks."""
        known = [lag.seconds for lag in self.partition_lags.values() if lag.seconds is not None]
        return max(known) if known else self.position.lag_s()

    def verified_now(self) -> list[Verified]:
        """What `deltactl verify` has verified, with the ages of now."""
        since_s = self._clock() - self.verified_at
        return [one if one.age_s is None else one._replace(age_s=one.age_s + since_s) for one in self.verified.values()]

    def note_verified(self, verified: Mapping[str, Verified]) -> None:
        """Take over what the state store says now."""
        self.verified, self.verified_at = verified, self._clock()

    def lag_bytes(self) -> int | None:
        """How much log lies between its end and what is in the sinks; None: not known."""
        passed = self.position.passed_lsn
        if self.insert_lsn is None or not passed:
            return None
        return self.bytes_between(passed, self.insert_lsn)

    def document(self) -> dict[str, Any]:
        """Return the status as `deltactl status --json` prints it. Call it about once a second, for the rates."""
        now = self._clock()
        applied = {name: numbers.applied for name, numbers in self.sinks.items()}
        dumps = list(self.dumps)
        self._history.append((now, self.events, applied, {dump.id: dump.rows for dump in dumps}))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW_S:
            self._history.popleft()
        then, events_then, applied_then, _ = self._history[0]
        elapsed_s = max(now - then, 1e-9)
        lag_s = self.lag_s()
        state, reason = self.state()
        if state != self._seen:
            self._seen, self._since = state, _now()
        return {
            "state": state,
            "since": self._since,
            "reason": reason,
            "lag_bytes": self.lag_bytes(),
            "lag_s": round(lag_s, 3) if lag_s is not None else None,
            "rates": {"changes_per_s": round((self.events - events_then) / elapsed_s, 1)},
            "totals": {
                "changes": self.events,
                "writes": self.writes,
                "dead_letters": self.dead_letters,
                "processor_timeouts": self.processor_timeouts(),
                "reread_rows": self.reread_rows,
                "capture_restarts": self.capture_restarts,
                "positions_expired": self.positions_expired,
            },
            "sinks": {
                name: {
                    "state": "busy" if numbers.busy else "ok",
                    "applied": numbers.applied,
                    "stale": numbers.stale,
                    "rejected": numbers.rejected,
                    "retries": numbers.retries,
                    "reason": numbers.busy,
                    "writes_per_s": round((applied[name] - applied_then.get(name, 0)) / elapsed_s, 1),
                }
                for name, numbers in self.sinks.items()
            },
            "lookups": {
                name: {
                    "breaker": numbers.breaker,
                    "calls": dict(numbers.calls),
                    "hits": numbers.hits,
                    "asked": numbers.asked,
                    "left": numbers.left,
                }
                for name, numbers in self.lookups.items()
            },
            "notices": {
                outcome: sum(count for (_, of), count in dict(self.notices).items() if of == outcome)
                for outcome in ("accepted", "refused")
            },
            "enrichment_ages_s": {table: round(age_s) for table, age_s in self.enrichment_ages_s.items()},
            "loads": {table: dict(load) for table, load in self.loads.items()},
            "dumps": [self._dump(dump, now) for dump in dumps],
            "partition_lags": {
                f"{topic}[{number}]": {
                    "records": lag.records,
                    "seconds": round(lag.seconds, 3) if lag.seconds is not None else None,
                }
                for (topic, number), lag in sorted(self.partition_lags.items())
            },
            "pid": os.getpid(),
            "at": _now(),
        }

    def _dump(self, dump: Dump, now: float) -> dict[str, Any]:
        before = next((at, rows[dump.id]) for at, _, _, rows in self._history if dump.id in rows)
        rate, left_s = rate_and_left(before, (now, dump.rows), dump.estimate)
        return {
            "dump": dump.id,
            "table": dump.table,
            "kind": dump.kind,
            "state": dump.state,
            "rows": dump.rows,
            "estimate": dump.estimate,
            "rows_per_s": None if rate is None else round(rate, 1),
            "left_s": None if left_s is None else round(left_s),
            "waits": dump.waits,
        }


class News:
    """What of a run's progress is worth a line in its log: each kind once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told: set[str] = set()

    def look(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the events that are new since the last look, with their fields. Pure but for what was told."""
        progress = self._progress
        loading = [table for table, load in progress.loads.items() if load["state"] != "done"]
        ended, _ = progress.state()
        totals = {"changes": progress.events, "writes": progress.writes, "dead_letters": progress.dead_letters}
        happened: list[tuple[str, bool, dict[str, Any]]] = [
            ("loading", bool(loading), {"tables": loading}),
            ("streaming", progress.position.passed_lsn > 0, {"lag_s": progress.lag_s()}),
            ("stopped", ended in ("stopped", "failed"), {"state": ended, **totals}),
        ]
        new = [(name, fields) for name, has, fields in happened if has and name not in self._told]
        self._told.update(name for name, _ in new)
        return new


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
