"""Calls of a user's handler, made by a thread that can be left alone: one that does not return costs its own event.

No signal reaches a thread that is not the main one, so `watchdog` is of no help here. What can be done is to set an
exception, which Python raises in the thread as soon as it runs a line of Python again: that ends loops. What waits in C
(a sleep, a lock, a socket without a time-out) is not ended. Its thread is left behind, another one takes what follows,
and if the wait ever ends, so does the thread: nothing behind that line is done.
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from delta_sync.errors import HandlersBusy, HandlerTimeout, PipelineStopped
from delta_sync.logs import logger
from delta_sync.watchdog import LOOK_S, SLOW_S, place_of

log = logger(__name__)

ENDING_S = 10.0  # for what is under way when Delta ends; it is not confirmed, so it comes again
LEFT_MOST = 5  # threads that were left behind and have not ended: with more, something is wrong with all calls


class HasId(Protocol):
    """An event."""

    @property
    def id(self) -> str: ...


class CallEnded(BaseException):
    """Raised in the midst of the user's function. No Exception: `except Exception` there must not swallow it."""


class Call:
    """A call: when it is `done` it has `returned`, or raised `error`; or neither, if it was ended while it raised."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self.done = threading.Event()
        self.returned = False
        self.error: BaseException | None = None

    def make(self) -> None:
        """Make it, in the thread that calls this."""
        try:
            self._function()
            self.returned = True
        except BaseException as error:  # noqa: BLE001 -- whoever waits for the call raises it
            self.error = error
        finally:
            self.done.set()


class _Thread(threading.Thread):
    """Makes calls, one after the other; None ends it. A daemon: one that was left behind does not hold up the end."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            while (call := self.calls.get()) is not None:
                call.make()
        except CallEnded:
            pass  # it came late, between two steps of this loop

    def end(self) -> None:
        """Have it end: at its next line of Python, or when it waits for a call."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(CallEnded))
        self.calls.put(None)


class Caller:
    """Makes one call after the other. Used by one thread. `note` is told for what it waits, and None when no longer.

    `ending` is set when Delta ends. `wait` waits for an event for so many seconds at most, and tells whether it is set.
    """

    def __init__(
        self,
        name: str,
        *,
        timeout_s: float,
        note: Callable[[str | None], None],
        ending: threading.Event,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._note = note
        self._ending = ending
        self._wait = wait
        self._thread: _Thread | None = None
        self._left: list[_Thread] = []

    def call(self, function: Callable[[], None], at_hand: Callable[[], HasId | None]) -> None:
        """Call it, and raise what it raises. `at_hand` returns the event, or the first of those, that it has.

        Raises HandlerTimeout when that is the same for `timeout_s`, HandlersBusy when Delta ends before, and
        PipelineStopped when too many calls have not returned.
        """
        if self._thread is None:
            self._thread = _Thread(f"on-{self._name}-call")
            self._thread.start()
        call = Call(function)
        self._thread.calls.put(call)
        looks, ending_looks, seen, named = 0, 0, at_hand(), False
        # Looks are counted, not seconds: a process that is frozen makes none.
        while not self._wait(call.done, LOOK_S):
            now = at_hand()
            looks, seen = (looks + 1 if now is seen else 0), now
            ending_looks += self._ending.is_set()
            if looks * LOOK_S >= min(SLOW_S, self._timeout_s):
                named = self._name_it(self._thread, now, looks * LOOK_S, known=named)
            if looks * LOOK_S >= self._timeout_s or ending_looks * LOOK_S >= ENDING_S:
                self._leave(self._thread, call)
                break
        if named:
            self._note(None)
        if not call.returned:
            assert call.error is not None, "it has raised, or was left"
            raise call.error

    def close(self) -> None:
        """End the thread. None of what is left behind is waited for."""
        if self._thread is not None:
            self._thread.calls.put(None)
            self._thread.join()

    def _name_it(self, thread: _Thread, at_hand: HasId | None, for_s: float, *, known: bool) -> bool:
        frame = _frame(thread)
        where, id_ = place_of(frame), "nothing" if at_hand is None else at_hand.id
        self._note(f"{id_} has been in the handler for {for_s:.0f} s, at {where}")
        if not known:
            stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
            log.warning("handler_slow", handler=self._name, event_id=id_, for_s=for_s, at=where, stack=stack)
        return True

    def _leave(self, thread: _Thread, call: Call) -> None:
        """Leave a thread behind with its call, and say so in the call's place unless it ends at the last moment."""
        frame = _frame(thread)
        where, stack = place_of(frame), "".join(traceback.format_stack(frame)) if frame is not None else ""
        self._thread = None
        thread.end()
        self._left = [one for one in (*self._left, thread) if one.is_alive()]
        ended = self._wait(call.done, LOOK_S)
        if ended and (call.returned or not isinstance(call.error, CallEnded | None)):
            return
        if self._ending.is_set():
            call.error = HandlersBusy(f"Delta stops before {self._name} has returned, at {where}.")
        elif len(self._left) > LEFT_MOST:
            call.error = PipelineStopped(
                f"{len(self._left)} calls of the handler {self._name} have not returned, the last one at {where}; give"
                " what it waits for a time-out, then run the pipeline again. Nothing was dropped."
            )
        else:
            said = f"It had not returned after {self._timeout_s:g} s, at {where}"
            rest = "" if ended else "; what it waits for may still be done"
            call.error = HandlerTimeout(f"{said}{rest}.")
        call.error.add_note(stack)


def _frame(thread: threading.Thread) -> Any:
    return sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage] -- documented
