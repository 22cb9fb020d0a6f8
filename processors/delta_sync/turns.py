"""Whose turn it is in the worker: the log's or a dump's. What is decided, without I/O."""

from __future__ import annotations

import math
from collections.abc import Callable

SLICES_IN_FLIGHT_MOST = 2  # one in a sink's threads while the next is processed
GIVE_WAY_S = 0.05  # a slice that waits for the log for longer goes all the same: a dump is to come to an end
CHANGES_COME_S = 1.0  # after the last change: so long dumps go on in small slices, for the next may come at any time


class Turns:
    """Changes go first: a slice of a dump begins while the log has nothing in hand, or when it has waited long enough.

    Between two batches of the log there is time for slices, unless there is a backlog: then they take turns.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed_at = self._slice_at = -math.inf

    def changed(self) -> None:
        """Note that the log has brought changes just now."""
        self._changed_at = self._clock()

    @property
    def changes_come(self) -> bool:
        """Whether the log has brought changes within the last CHANGES_COME_S."""
        return self._clock() - self._changed_at < CHANGES_COME_S

    def slice_began(self) -> None:
        """Note that a slice begins now."""
        self._slice_at = self._clock()

    def slice_waits_s(self, *, in_flight: int, log_in_hand: bool) -> float | None:
        """Return for how long the next slice waits; 0: it is its turn; None: until something in flight has ended.

        `in_flight` are slices, `log_in_hand` tells whether a batch of the log waits or is in the sinks.
        """
        if in_flight >= SLICES_IN_FLIGHT_MOST:
            return None
        return max(0.0, self._slice_at + GIVE_WAY_S - self._clock()) if log_in_hand else 0.0
