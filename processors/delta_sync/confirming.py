"""Confirming in a way that leaves a trace, which is saved before: `RecordingCapture`.

Where the source keeps no position (MySQL), the trace is the position (`state_connector`). Where it does (PostgreSQL),
the trace is a bound, by which a slot that somebody else moved can be told from one that Delta moved:

A slot that was dropped and made anew, or advanced by hand (`pg_replication_slot_advance`), looks like any other; the
changes that it left out are lost in silence. What gives it away is its `confirmed_flush_lsn`: it is beyond all that
this pipeline ever confirmed. So a bound of that is kept in the state store, and compared before each start.

The bound must never be too low, or a pipeline that was killed would be told that its changes are lost. Therefore:

1. A batch is to be confirmed. It was delivered, so the source's log is on disk beyond all that is in it, and beyond the
   end of its last transaction: the connector confirms the end of a transaction that it was sent, and nothing else
   (with `lsn.flush.mode=connector` no keep-alive moves the slot), and what is not on disk yet is sent to nobody.
2. After that, the end of the log that is on disk is asked for, and saved as the bound.
3. Only after that, the batch is confirmed.

Whatever is killed between two of these steps, and however late the server acts on the last confirmation of a process
that is dead by now: it lies below a bound that was saved before. A crash of the source does not take the log back below
the bound; where it does end below, the source's files were put back from a copy.

The bound need not be tight to be of use: it is the end of the log when something was last confirmed, which is a moment
before the pipeline ended. A slot that is made anew later begins behind it, because creating one writes to the log. Not
noticed is an advance by hand to a position below the bound, over changes that this pipeline had been sent or had still
to be sent when it ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from delta_sync.capture import Batch, Capture, CaptureDied
from delta_sync.errors import Transient
from delta_sync.logs import logger

log = logger(__name__)

PAUSE_S = 0.2  # between confirmations: each costs a query and a write of the state store; the capture keeps 8 batches
SLICE_S = 0.05  # how long a poll may keep a confirmation waiting: while 8 batches wait for it, nothing comes


class RecordingCapture:
    """A capture whose confirmations are made by `poll`, each after `record` has saved what must be saved before.

    It asks the source and the state store. When one of them does not answer, the confirmation waits: what is not
    confirmed is only delivered again. `spent` is told how many seconds a confirmation took. Used like the capture
    inside it.
    """

    def __init__(
        self,
        capture: Capture,
        record: Callable[[Batch], None],
        close: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._capture = capture
        self._record = record
        self._close = close
        self._clock = clock
        self._spent = spent
        self._lock = (
            threading.Lock()
        )  # of _pending: `confirm` is called by the worker's thread, the rest by the capture's
        self._pending: Batch | None = None  # the newest to be confirmed
        self._delivered = self._confirmed = 0  # sequence numbers of this generation
        self._due_at = clock()

    @property
    def generation(self) -> int:
        """How often it was started."""
        return self._capture.generation

    @property
    def pid(self) -> int | None:
        """The process that runs the connector, while it runs."""
        return self._capture.pid

    def start(self) -> None:
        """Start the connector behind the last confirmed position. Raises CaptureDied."""
        self._delivered = self._confirmed = 0
        self._capture.start()

    def poll(self, timeout_s: float) -> Batch | None:
        """Confirm what is due, and return the next batch, or None when none came in time. Raises CaptureDied."""
        deadline = self._clock() + timeout_s
        while True:
            if self._clock() >= self._due_at:
                self._confirm_pending()
            left_s = max(0.0, deadline - self._clock())
            in_flight = self._delivered > self._confirmed
            batch = self._capture.poll(min(left_s, SLICE_S) if in_flight else left_s)
            if batch is not None:
                self._delivered = batch.sequence
                return batch
            if self._clock() >= deadline:
                return None

    def confirm(self, batch: Batch) -> None:
        """Have this batch and all before it confirmed, by one of the next calls of `poll`, or by `stop`."""
        with self._lock:
            self._pending = batch

    def reconfigure(self) -> None:
        """Make the connector end, to be started again, if the tables as they are now need another configuration."""
        self._capture.reconfigure()

    def stop(self) -> None:
        """Confirm what is left, and end the connector. Idempotent."""
        try:
            self._confirm_pending()
        except CaptureDied as error:
            log.warning("not_confirmed", reason=str(error))  # it is delivered again
        finally:
            self._capture.stop()
            self._close()

    def _confirm_pending(self) -> None:
        with self._lock:
            batch, self._pending = self._pending, None
        if batch is None or batch.generation != self._capture.generation:
            return
        began = self._clock()
        self._due_at = began + PAUSE_S
        try:
            self._record(batch)
        except CaptureDied:
            raise
        except Transient as error:
            log.warning("confirmation_waits", reason=str(error))
            with self._lock:
                self._pending = self._pending or batch  # a newer one may have come meanwhile
            return
        self._capture.confirm(batch)
        self._confirmed = batch.sequence
        self._spent(self._clock() - began)
