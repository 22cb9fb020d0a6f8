"""How far the log is in the sinks, asked from outside the pipeline, as `deltactl verify` does.

Embedded, a slot is confirmed only up to what every sink has acknowledged. With Kafka it is confirmed up to what Kafka
has acknowledged, so the group's committed positions count, too (`kafka/progress.py`).
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from typing import Literal

from delta_sync.state import StateStore

POLL_S = 0.1  # the slot is confirmed several times a second
STANDS_S = 30.0  # a pipeline that runs and applies nothing for so long waits for something, as its status says
RESTS_S = 2.0  # that of one that does not run may still move, if its end has just been saved
SILENT_S = 10.0  # a pipeline that runs says so every second

State = Literal["passed", "rests", "stands"]


class AppliedLog:
    """`mark` writes a heartbeat and returns its position, `applied_to` tells what is in every sink (None: unknown).

    `alive` tells whether the pipeline runs. `clock` counts seconds.
    """

    def __init__(
        self,
        *,
        mark: Callable[[], int],
        applied_to: Callable[[], int | None],
        alive: Callable[[], bool],
        stopping: threading.Event,
        clock: Callable[[], float],
    ) -> None:
        self.mark = mark
        self._applied_to = applied_to
        self._alive = alive
        self._stopping = stopping
        self._clock = clock

    def pass_now(self) -> State:
        """Wait until everything that is visible now is in every sink.

        `rests`: the pipeline does not run, so nothing comes. `stands`: it runs, and yet nothing comes; or Delta stops.
        """
        mark = self.mark()
        best = -1
        moved_at = self._clock()
        while True:
            applied = self._applied_to() or 0
            if applied >= mark:
                return "passed"
            now = self._clock()
            if applied > best:
                best, moved_at = applied, now
            still_s = now - moved_at
            if still_s >= STANDS_S:
                return "stands"
            if still_s >= RESTS_S and not self._alive():
                return "rests"
            if self._stopping.wait(POLL_S):
                return "stands"


def pipeline_runs(state: StateStore, name: str, *, members: bool) -> bool:
    """Tell whether a pipeline has said of late that it runs: by its status, or by that of one of its workers."""
    if not members:
        saved = state.status(name)
        return saved is not None and says_it_runs(saved[0], dt.datetime.now(dt.UTC) - saved[1])
    now = state.database_now()
    return any(
        status.get("role") == "worker" and says_it_runs(status, now - saved_at)
        for _, status, saved_at in state.members(name)
    )


def says_it_runs(status: dict[str, object], age: dt.timedelta) -> bool:
    """Tell whether a status means that the process runs."""
    return status.get("state") not in ("stopped", "failed") and age.total_seconds() < SILENT_S
