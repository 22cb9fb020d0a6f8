"""The user's function is kept from holding up the stream: what hangs is named and ended, what leaks is started anew.

`process` notes which change the function has at hand (`AtHand`); a thread looks at it every so often. A change that is
at hand for `timeout` is named, and a signal raises `ProcessorTimeout` in the main thread, in the midst of the function:
that change becomes a dead letter, and the next one follows. A signal ends loops, sleeps, waits for locks and for
sockets. A call of C code that lets no other thread run, such as a regular expression that backtracks for ever, stops
this thread, too; so it winds a timer whenever it looks, and the kernel sends the signal in its place when it does not.
What no signal ends is a call of C code that never looks at them: then the process ends, and says where, if it can.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from delta_sync.changes import Change
from delta_sync.logs import logger
from delta_sync.tables import key_text

log = logger(__name__)

LOOK_S = 1.0  # between looks; a frozen process makes none, so that its time does not count
SLOW_S = 5.0  # at hand: then one wants to know which change it is
SIGNAL = signal.SIGRTMAX  # that nobody else uses: SIGALRM is what other people's time-outs are made of
TRIES = 3  # signals, `timeout` apart: the function may catch what it is not meant to


class ProcessorTimeout(BaseException):
    """Raised in the midst of the user's function. No Exception: `except Exception` there must not swallow it."""


class AtHand:
    """The change that the user's function is called with; None: it is not being called."""

    __slots__ = ("change",)

    def __init__(self) -> None:
        self.change: Change | None = None


class Watchdog(threading.Thread):
    """Looks after the function and the process's memory. Make it in the main thread, which is the one that it watches.

    `note` is told for which change the pipeline waits, and None when it no longer does. `give_up` is called with a
    sentence when no signal helps. `outgrown` is told how many bytes the process has when these are more than
    `memory_most`, until it returns that it has been heeded. `rss` returns how many it has.
    """

    def __init__(
        self,
        at_hand: AtHand,
        *,
        timeout_s: float,
        memory_most: int | None,
        note: Callable[[str | None], None],
        give_up: Callable[[str], None],
        outgrown: Callable[[int], bool],
        stopping: threading.Event,
        rss: Callable[[], int] = lambda: resident_bytes(),
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._at_hand = at_hand
        self._timeout_s = timeout_s
        self._memory_most = memory_most
        self._note = note
        self._give_up = give_up
        self._outgrown = outgrown
        self._stopping = stopping
        self._rss = rss
        self._main = threading.main_thread()
        self._seen: Change | None = None
        self._looks = 0
        self._signals = 0
        self._hangs: Change | None = None  # what the next signal is for
        self._named = False
        self._is_outgrown = False
        self.timeouts = 0
        self._in_main = threading.current_thread() is self._main
        if self._in_main:
            signal.signal(SIGNAL, self._interrupt)
            signal.signal(signal.SIGVTALRM, self._starved)

    def run(self) -> None:
        """Look every so often, until Delta stops and nothing is at hand: it may be what stopping waits for."""
        while True:
            self._stopping.wait(LOOK_S)
            if self._stopping.is_set():
                if self._at_hand.change is None:
                    self.wind(0.0)
                    return
                threading.Event().wait(LOOK_S)
            self.look()

    def look(self) -> None:
        """Look once, LOOK_S after the last time."""
        self.wind(self._timeout_s)
        change = self._at_hand.change
        if change is not self._seen or change is None:
            self._seen, self._looks, self._signals, self._hangs = change, 0, 0, None
            if self._named:
                self._named = False
                self._note(None)
        else:
            self._looks += 1
            self._judge(change, self._looks * LOOK_S)
        if self._memory_most is not None and not self._is_outgrown:
            found = self._rss()
            if found > self._memory_most:
                self._is_outgrown = self._outgrown(found)

    def _judge(self, change: Change, for_s: float) -> None:
        if for_s < min(SLOW_S, self._timeout_s):
            return
        frame = sys._current_frames().get(self._main.ident or 0)  # pyright: ignore[reportPrivateUsage] -- CPython's documented one
        where = place_of(frame)
        said = f"{change.table} {key_text(change.key)} has been in processor.py for {for_s:.0f} s, at {where}"
        self._note(said)
        if not self._named:
            self._named = True
            stack = "".join(traceback.format_stack(frame))
            log.warning(
                "processor_slow", table=change.table, key=key_text(change.key), for_s=for_s, at=where, stack=stack
            )
        if for_s < (self._signals + 1) * self._timeout_s:
            return
        if self._signals < TRIES and self._in_main:
            self._signals += 1
            self._hangs = change
            signal.pthread_kill(self._main.ident or 0, SIGNAL)
        else:
            self._give_up(
                f"{said}, and nothing ends it. Nothing was dropped; correct the processor, then run the pipeline again."
            )

    def wind(self, seconds: float) -> None:
        """Let the kernel send a signal after so much CPU time, which a process that is only frozen does not use."""
        if self._in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)

    def _starved(self, _signal: int, frame: FrameType | None) -> None:
        """Run by the main thread, when no other has run for long: it is in what is at hand."""
        if self._at_hand.change is not None:
            self._raise(frame)

    def _interrupt(self, _signal: int, frame: FrameType | None) -> None:
        """Run by the main thread, between two steps of whatever it does."""
        change = self._at_hand.change
        if change is not None and change is self._hangs:
            self._hangs = None
            self._raise(frame)

    def _raise(self, frame: FrameType | None) -> NoReturn:
        self.timeouts += 1
        raise ProcessorTimeout(
            f"It had not returned after {self._timeout_s:g} s (processor.timeout), at {place_of(frame)}."
        )


def place_of(frame: FrameType | None) -> str:
    """Return where a thread is: the innermost line of `processor.py`, or of whatever it is in."""
    own = frame
    while own is not None and Path(own.f_code.co_filename).name != "processor.py":
        own = own.f_back
    found = own or frame
    if found is None:
        return "an unknown place"
    return f"{Path(found.f_code.co_filename).name} line {found.f_lineno} ({found.f_code.co_name})"


def resident_bytes() -> int:
    """Return how much memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
