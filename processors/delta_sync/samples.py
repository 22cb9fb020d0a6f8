"""Samples of the source's positions, as the threads of one process share them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from delta_sync.sources.reader import Sample, Samples, Snapshot


class SharedSamples:
    """The samples that the watch takes and that loads and re-reads claim from. `new` makes an empty collection."""

    def __init__(self, new: Callable[[], Samples]) -> None:
        self._lock = threading.Lock()
        self._new = new
        self._samples = new()

    def add(self, sample: Sample) -> None:
        """Keep a sample, the newest so far."""
        with self._lock:
            self._samples.add(sample)

    def claim(self, snapshot: Snapshot, covered_from: int) -> int | None:
        """Return what rows read in this snapshot may claim, or None when it is too early."""
        with self._lock:
            return self._samples.claim(snapshot, covered_from)

    def forget(self) -> None:
        """Drop all samples: the source may be another one now."""
        with self._lock:
            self._samples = self._new()
