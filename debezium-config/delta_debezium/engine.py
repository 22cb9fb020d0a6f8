"""The embedded transport: a child process that runs the Debezium Engine, and the pipe between it and the worker.

What crosses it is in `frames`. The child holds back the engine when MAX_IN_FLIGHT batches, or as many bytes as
MAX_IN_FLIGHT_BYTES, are unconfirmed, so nothing piles up on either side.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from delta_debezium.frames import CONFIRMATION, FAILURE, FRAME, LENGTH
from delta_sync.capture import Batch, CaptureDied
from delta_sync.secrets import redact

HEAP_MB = 256  # does for rows of some kilobytes
STOP_BUDGET_S = 10.0  # the engine ends its replication connection in well under a second; then it is killed
LAST_WORDS_BYTES = 4000  # of the log, when the child ended without a failure frame: enough for a Java stack's top


class EmbeddedCapture:
    """Runs the Debezium Engine in a child process, which ends when this process does, however it ends.

    `properties` renders its configuration (Debezium's names, secrets resolved) at each start. `log_file` receives what
    the JVM prints. `begin` returns the place from which it is to go on (`Batch.place`; None: the log's end), if the
    source keeps none: then every batch has its place.
    """

    def __init__(
        self,
        properties: Callable[[], Mapping[str, str]],
        log_file: Path,
        heap_mb: int = HEAP_MB,
        begin: Callable[[], bytes | None] | None = None,
    ) -> None:
        self._properties = properties
        self._configuration: Mapping[str, str] = {}
        self._log_file = log_file
        self._heap_mb = heap_mb
        self._begin = begin
        self._generation = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._frames: io.FileIO | None = None
        self._ended_for: str | None = None  # why we ended it ourselves
        self._confirm_lock = threading.Lock()
        self._confirmed = 0

    @property
    def generation(self) -> int:
        """How often it was started."""
        return self._generation

    @property
    def pid(self) -> int | None:
        """The child, while it runs."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> None:
        """Start the child. It begins to deliver some seconds later."""
        self.stop()
        self._generation += 1
        self._confirmed = 0
        self._ended_for = None
        self._configuration = dict(self._properties())
        begin = self._begin
        # JSON in JSON: what the place looks like is the child's to know.
        place = {} if begin is None else {"place": None if (known := begin()) is None else known.decode()}
        read_end, write_end = os.pipe()
        try:
            with self._log_file.open("wb") as log:
                self._child = subprocess.Popen(  # noqa: S603 -- our own module, with this interpreter
                    [sys.executable, "-m", "delta_debezium.engine_child", str(write_end), str(self._heap_mb)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[write_end],
                    start_new_session=True,  # Ctrl-C is for the worker, which drains first
                )
        except OSError as error:
            os.close(read_end)
            raise CaptureDied(f"The capture process cannot be started: {error}.") from error
        finally:
            os.close(write_end)
        self._frames = io.FileIO(read_end, "rb")
        configuration = json.dumps({"properties": self._configuration, **place}).encode()
        self._send(LENGTH.pack(len(configuration)) + configuration)

    def poll(self, timeout_s: float) -> Batch | None:
        """Return the next batch, or None when none came in time. Raises CaptureDied."""
        if self._frames is None:
            raise CaptureDied("The capture process is not running.")
        ready, _, _ = select.select([self._frames], [], [], timeout_s)
        if not ready:
            return None
        kind, sequence, count, length, place_length = FRAME.unpack(self._read(FRAME.size))
        payload = self._read(length)
        place = self._read(place_length)
        if kind == FAILURE:
            raise self._died(payload.decode(errors="replace"))
        return Batch(self._generation, sequence, count, payload, place)

    def confirm(self, batch: Batch) -> None:
        """Confirm the batch and all before it."""
        with self._confirm_lock:
            if batch.generation != self._generation or batch.sequence <= self._confirmed:
                return
            self._confirmed = batch.sequence
            self._send(CONFIRMATION.pack(batch.sequence))

    def reconfigure(self) -> None:
        """End the child if its configuration would be another one now; `poll` then raises CaptureDied."""
        child = self._child
        if child is not None and dict(self._properties()) != self._configuration:
            self._ended_for = "The tables have other columns now, so the connector is configured anew."
            child.kill()  # nothing is lost: what was not confirmed is delivered again

    def stop(self) -> None:
        """End the child, by force if it does not end within STOP_BUDGET_S."""
        child = self._child
        if child is None:
            return
        if child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it is gone already
                child.stdin.close()
        try:
            child.wait(STOP_BUDGET_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if self._frames is not None:
            self._frames.close()
        self._child = self._frames = None

    def _send(self, data: bytes) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has just ended: the next poll says why
            self._child.stdin.write(data)
            self._child.stdin.flush()

    def _read(self, length: int) -> bytes:
        assert self._frames is not None
        buffer = bytearray(length)
        view = memoryview(buffer)
        filled = 0
        while filled < length:
            count = self._frames.readinto(view[filled:])
            if not count:
                raise self._died(self._last_words())
            filled += count
        view.release()
        return bytes(buffer)

    def _died(self, reason: str) -> CaptureDied:
        child = self._child
        status = child.wait() if child is not None else None
        if self._ended_for is not None:
            return CaptureDied(self._ended_for)
        return CaptureDied(redact(f"The capture process ended (status {status}): {reason.strip()}"))

    def _last_words(self) -> str:
        try:
            text = self._log_file.read_bytes()[-LAST_WORDS_BYTES:].decode(errors="replace")
        except OSError:
            return "it left no log"
        return text or "it said nothing"
