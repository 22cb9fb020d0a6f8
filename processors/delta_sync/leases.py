"""Keeping a lease of the state store: renewing it in time, and knowing at any moment whether to believe in it.

The state store decides who has a lease, by its database's clock. The holder cannot see that clock all the time, so it
goes by its own, and stops believing before anybody else can get the lease: it counts from before it asked, and a part
of the time is left as a margin. No message has to arrive for that, so it holds for a process that was frozen and for
one that is cut off from the state store.

Work that is under way when a lease is lost goes on for a moment, whatever one does. So what must not be done by two is
written with the lease (`save_load(…, lease)`), which the state store refuses when another has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Self

from delta_sync.errors import DeltaError, LeaseLost
from delta_sync.logs import logger
from delta_sync.state import Lease, StateStore

log = logger(__name__)

RENEWALS_PER_TTL = 3  # one may fail, and the next still comes in time
# Of the ttl. It is for clocks that run at different rates (0.05 % when one is being set right), for a database's clock
# that is set by some seconds, and for what the holder does between its last look at `held` and the end of that.
MARGIN = 0.2
LOOK_S = 1.0  # how late `on_lost` can be on a machine that was suspended: its timers do not count that time
STOP_BUDGET_S = 5.0  # for a renewal that is under way, and for giving back: longer is longer than an answer takes


def local_clock() -> float:
    """Return the seconds since this machine was started, including those in which it was suspended (Linux)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Holding(NamedTuple):
    lease: Lease
    until: float  # by the local clock


class LeaseKeeper:
    """Takes a lease as soon as it is free, and keeps it until `stop`.

    `start` has a thread do it; without one, `renew` is a single step. `held`, `lease` and `holds` may be asked at any
    time by any thread, and wait for nobody.

    `on_lost` is called with a lease that is believed in no longer, once, by one of the keeper's threads, and not for
    one that `stop` gives back. It is called at the moment the time is over, even while a renewal hangs. The keeper
    does not believe in a lease again before it has returned: so it should stop the work that needs the lease, or see
    to it that this work looks at `holds`, but never wait for somebody who waits for `stop`.

    The trap: `held` says that there is a lease, perhaps another one than a moment ago. Work that was begun under a
    lease asks `holds(lease)`.
    """

    def __init__(
        self,
        store: StateStore,
        pipeline: str,
        name: str,
        owner: str,
        ttl_s: float,
        *,
        on_lost: Callable[[Lease], object] = lambda _lease: None,
        clock: Callable[[], float] = local_clock,
    ) -> None:
        """`owner` must be another one in every process, see `StateStore.take_lease`."""
        self._store = store
        self._asked = (pipeline, name, owner, ttl_s)
        self._ttl_s = ttl_s
        self._on_lost = on_lost
        self._clock = clock
        self._holding: _Holding | None = None  # read without a lock: it is replaced, never changed
        self._changing = threading.RLock()  # held while `_holding` is replaced and while `on_lost` runs
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failures = 0

    # ── looking ──

    @property
    def lease(self) -> Lease | None:
        """The lease, if it is surely still ours."""
        holding = self._holding
        return holding.lease if holding is not None and self._clock() < holding.until else None

    @property
    def held(self) -> bool:
        """Whether a lease is surely ours: less than its time without the margin has passed since we last asked."""
        return self.lease is not None

    def require(self) -> Lease:
        """Return the lease; raises LeaseLost if it is not held. For writes: there, None would mean without a lease."""
        lease = self.lease
        if lease is None:
            pipeline, name, owner, _ = self._asked
            raise LeaseLost(f"{owner!r} does not have the lease {name!r} of pipeline {pipeline!r}; wait for it.")
        return lease

    def holds(self, lease: Lease) -> bool:
        """Return whether this very lease is surely still ours."""
        return self.lease == lease

    def wait(self, timeout_s: float | None = None) -> Lease | None:
        """Return the lease as soon as it is held; None after `timeout_s`, or when the keeper is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self.held or self._stopping.is_set(), timeout_s)
        return self.lease

    # ── steps ──

    def renew(self) -> bool:
        """Take or renew the lease; return whether it is held. A state store that cannot be reached changes nothing."""
        asked_at = self._clock()  # before: the answer may take any time, and the lease's time has begun by then
        try:
            lease = self._store.take_lease(*self._asked)
        except DeltaError as error:
            self._failures += 1
            if self._failures == 1:  # said once; `lease_lost` says if it matters
                log.warning("lease_not_renewed", lease=self._asked[1], error=str(error))
            return self.held
        self._failures = 0
        with self._changing:
            self.check()  # if the time was over meanwhile, that is a loss, though nobody else had it
            before = self._holding
            if before is not None and before.lease != lease:
                self._lose(before.lease)
            if self._stopping.is_set():
                if lease is not None:
                    self._give_back(lease)
                return False
            until = asked_at + self._ttl_s * (1 - MARGIN)
            if lease is not None and self._clock() < until:  # an answer that came too late says nothing about now
                self._replace(_Holding(lease, until))
                if before is None or before.lease != lease:
                    log.info("lease_taken", lease=lease.name, token=lease.token)
        return self.held

    def check(self) -> None:
        """Call `on_lost` if the time of the lease is over; nothing depends on how soon but that call."""
        with self._changing:
            holding = self._holding
            if holding is not None and self._clock() >= holding.until:
                self._lose(holding.lease)

    # ── the threads ──

    def start(self) -> Self:
        """Begin to renew the lease, or to wait for it, in the background."""
        assert not self._threads, "it is started once"
        # Two, because a renewal can hang for as long as a network does, and the end of the lease must not wait for it.
        for name, work in (("renew", self._renew_all_the_time), ("watch", self._watch)):
            self._threads.append(threading.Thread(target=work, name=f"lease {self._asked[1]} {name}", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End the threads and give the lease back, so that another need not wait for it. Idempotent.

        Takes some seconds at most: if the state store does not answer, the lease expires by itself.
        """
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(STOP_BUDGET_S)
        with self._changing:
            holding = self._holding
            self._replace(None)
        # In a thread of its own, because a server that hangs would keep us from ending.
        if holding is not None:
            giving = threading.Thread(target=self._give_back, args=(holding.lease,), name="lease release", daemon=True)
            giving.start()
            giving.join(STOP_BUDGET_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _renew_all_the_time(self) -> None:
        while not self._stopping.is_set():
            self.renew()
            self._stopping.wait(self._ttl_s / RENEWALS_PER_TTL)

    def _watch(self) -> None:
        while not self._stopping.is_set():
            self.check()
            with self._changed:
                holding = self._holding
                rest_s = LOOK_S if holding is None else min(LOOK_S, holding.until - self._clock())
                if rest_s > 0 and not self._stopping.is_set():
                    self._changed.wait(rest_s)

    # ── inside ──

    def _replace(self, holding: _Holding | None) -> None:
        self._holding = holding
        with self._changed:
            self._changed.notify_all()

    def _lose(self, lease: Lease) -> None:
        self._replace(None)
        log.warning("lease_lost", lease=lease.name, token=lease.token)
        self._on_lost(lease)

    def _give_back(self, lease: Lease) -> None:
        try:
            self._store.release_lease(lease)
        except DeltaError as error:
            log.info("lease_not_released", lease=lease.name, error=str(error))  # it expires by itself
