"""What is measured once per batch, never per record: histograms, and how far behind a partition is."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

# What a batch goes through. `poll`: until the next one is there, also while too much is in flight for one to be taken;
# `lookup`: for the services' answers; `reread`: for rows that are read by key; `apply`: until a sink acknowledged its
# part, with repetitions; `commit`: until the source or Kafka was told.
Stage = Literal["poll", "decode", "reread", "note", "lookup", "process", "apply", "commit"]
STAGES: tuple[Stage, ...] = get_args(Stage)

# From what takes no time worth mentioning to what is stuck; two or three per power of ten, as Prometheus' own.
STAGE_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Below 50 ms nobody looks; a backlog after a weekend is still told from one of an hour.
LATENCY_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, 86400.0)
# To what the worker joins at most, in steps of four.
BATCH_BOUNDS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 8192.0)


class Histogram:
    """How many of the values that were added are at or below each of some bounds. Any thread may add and read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, once or more often."""
        place = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[place] += times
            self._sum += value * times

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Return how many are at or below each bound, as Prometheus wants it (`+Inf` last), and the sum of all."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found: list[tuple[str, float]] = []
        reached = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            reached += count
            found.append((bound, reached))
        return found, total


class LookupNumbers:
    """What became of a look-up's calls and keys. Any thread may count and read.

    `hits` were remembered answers, `asked` are keys that the service was asked for, `left` those of documents that were
    written without. Of calls, `answered` ended well, `busy` may be repeated, `failed` is lasting. `breaker` is
    `closed`, `open` or `half-open`.
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = {"answered": 0, "busy": 0, "failed": 0}
        self.hits = 0
        self.asked = 0
        self.left = 0
        self.batch_keys = Histogram(BATCH_BOUNDS)
        self.seconds = Histogram(STAGE_BOUNDS_S)
        self.breaker = "closed"
        self._lock = threading.Lock()

    def called(self, outcome: str) -> None:
        """Count a call that has ended."""
        with self._lock:
            self.calls[outcome] += 1


class PartitionLag(NamedTuple):
    """How far behind the end of a partition the sinks are.

    `records` are not in every sink yet; `seconds` is since when the oldest of these has been in Kafka, or somewhat more
    than that where it has not been read yet. 0 when there is none; None while it is not known.
    """

    records: int
    seconds: float | None
