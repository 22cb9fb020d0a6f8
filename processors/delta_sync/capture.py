"""Capture: where the worker gets the log from, whatever the transport.

A capture hands over batches in the order of the log and confirms to the source, in that order, only what it is told to.
After a failure it starts again behind what was confirmed last, so that everything unconfirmed arrives once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from delta_sync.errors import Transient


class Batch(NamedTuple):
    """Some of the log's changes. `payload` holds so many `events`, in the transport's own form.

    `generation` counts the starts of the capture; `sequence` counts batches within one, from 1. `place` is where the
    connector goes on behind the batch, as it says it; empty where the source, or Kafka, keeps that.
    """

    generation: int
    sequence: int
    events: int
    payload: Any
    place: bytes = b""


class CaptureDied(Transient):
    """The connector ended; the message is its last word. Start it again."""


class Capture(Protocol):
    """One connector. Used by one thread, but for `confirm` and `stop`, which any thread may call."""

    @property
    def generation(self) -> int:
        """How often it was started."""
        ...

    @property
    def pid(self) -> int | None:
        """The process that runs the connector, while it runs."""
        ...

    def start(self) -> None:
        """Start the connector behind the last confirmed position. Raises CaptureDied."""
        ...

    def poll(self, timeout_s: float) -> Batch | None:
        """Return the next batch, or None when none came in time. Raises CaptureDied as soon as the connector ends."""
        ...

    def confirm(self, batch: Batch) -> None:
        """Confirm this batch and all before it: every sink has acknowledged them. Of an older generation: ignored."""
        ...

    def reconfigure(self) -> None:
        """Make the connector end, to be started again, if the tables as they are now need another configuration."""
        ...

    def stop(self) -> None:
        """End the connector; what was confirmed stays so. Idempotent."""
        ...
