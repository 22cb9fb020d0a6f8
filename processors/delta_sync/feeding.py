"""The capture's thread: it keeps the connector running, and hands over what that delivers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from delta_sync.capture import Batch, Capture
from delta_sync.errors import Transient
from delta_sync.logs import logger
from delta_sync.progress import Progress

log = logger(__name__)

RESTART_FIRST_S, RESTART_MOST_S = 0.5, 30.0  # of the capture
POLL_S = 0.5  # then somebody may have said that Delta stops


class CaptureFeed(threading.Thread):
    """Feeds the worker until `stopping` is set, then keeps the capture for the last confirmations.

    The capture starts and ends in this thread: one that is a child process may die with the thread that started it.
    `check_slot` is called before each start, because a connector that finds no slot creates one, and the changes
    between the two are lost. `deliver` gets each batch; `forget` is called when the capture died, for what was
    delivered and not yet begun comes once more, from behind what was confirmed; `failed` gets a defect.
    """

    def __init__(
        self,
        *,
        capture: Capture,
        check_slot: Callable[[], None],
        deliver: Callable[[Batch], None],
        forget: Callable[[], None],
        failed: Callable[[BaseException], None],
        progress: Progress,
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="capture", daemon=True)
        self._capture = capture
        self._check_slot = check_slot
        self._deliver = deliver
        self._forget = forget
        self._failed = failed
        self._progress = progress
        self._stopping = stopping
        self._clock = clock
        self._drained = threading.Event()

    def run(self) -> None:
        """Feed, then stop the capture as soon as `finish` was called."""
        self._feed()
        self._drained.wait()
        self._capture.stop()

    def finish(self) -> None:
        """End the capture: nothing is confirmed any more. `stopping` is set. Waits for the thread's end."""
        self._drained.set()
        self.join()

    def _feed(self) -> None:
        """Keep the capture running and hand over what it delivers."""
        failed = 0
        while not self._stopping.is_set():
            try:
                self._check_slot()
                self._capture.start()
                began = self._clock()
                while not self._stopping.is_set():
                    batch = self._capture.poll(POLL_S)
                    if batch is None:
                        continue
                    now = self._clock()
                    self._progress.stages["poll"].add(now - began)
                    began = now
                    if failed:
                        failed = 0
                        self._progress.waits("capture", None)
                    self._deliver(batch)
            except Transient as error:  # it died, or source or state store could not be asked about the slot
                if self._stopping.is_set():
                    return
                failed += 1
                self._progress.capture_restarts += 1
                delay_s = min(RESTART_MOST_S, RESTART_FIRST_S * 2 ** (failed - 1))
                self._progress.waits("capture", str(error))
                log.warning("capture_died", reason=str(error), restart_in_s=delay_s)
                self._forget()
                self._stopping.wait(delay_s)
            except BaseException as error:  # noqa: BLE001 -- a defect: the worker stops with it
                self._failed(error)
                return
