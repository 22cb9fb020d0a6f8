"""Dumps, whoever reads the rows: Delta itself (`load.Loader`), or Debezium (`signalled.SignalledLoader`).

Here is what both have in common: what others ask of them, which tables are to be loaded again and why, and how a dump
ends. One process of a pipeline plans, the one that has the lease; the others see for themselves what is under way.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from delta_sync.dumps import Dump
from delta_sync.errors import EpochRose
from delta_sync.leases import LeaseKeeper
from delta_sync.logs import logger
from delta_sync.progress import LogPosition, Progress
from delta_sync.state import Lease, StateStore, TableLoad
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Table

log = logger(__name__)

FIRST_LOAD = "first load"
LOOK_S = 1.0  # between looks whether there is something to do: anybody may ask for a dump, or pause one
RETRY_S = 1.0  # after the source or the state store did not answer
LEASE_S = 30.0  # a chunk of a process that died is read by another after that
KEPT = 100  # dumps that have ended, for `deltactl dump list`
END_BUDGET_S = 5.0  # for threads that end, each: they only wait for a source that was told to be silent


class Reload(NamedTuple):
    """A table is to be loaded from the start, whatever was loaded before."""

    table: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DumperContext:
    """What a run gives whoever carries out its dumps.

    `tables` are the pipeline's as the worker sees them. `finished` is called when a dump that removes what it did not
    meet has met everything, `failed` with what nobody can mend. Where several processes carry out dumps, `keeper` has
    the lease of the one that plans; `owner` is another one in each. `unchanged` raises GenerationsChanged when the
    sinks are others by now; then no chunk is recorded that some of them lack.
    """

    pipeline: str
    owner: str
    epoch: int
    position: LogPosition
    progress: Progress
    state: StateStore
    tables: Callable[[], Mapping[str, Table]]
    fingerprint: Callable[[str], str]
    finished: Callable[[Dump], None]
    failed: Callable[[BaseException], None]
    stopping: threading.Event
    keeper: LeaseKeeper | None = None
    unchanged: Callable[[], None] = lambda: None


class Dumper(threading.Thread):
    """Carries out a pipeline's dumps, and begins those of tables that are not loaded."""

    def __init__(self, context: DumperContext) -> None:
        super().__init__(name="load", daemon=True)
        self._pipeline = context.pipeline
        self._owner = context.owner
        self._epoch = context.epoch
        self._position = context.position
        self._progress = context.progress
        self._state = context.state
        self._dumps = DumpStore(context.state, context.pipeline)
        self._tables = context.tables
        self._fingerprint = context.fingerprint
        self._finished = context.finished
        self._failed = context.failed
        self._stopping = context.stopping
        self._keeper = context.keeper
        self._unchanged = context.unchanged
        self._news = threading.Condition()
        self._reloads: dict[str, Reload] = {}
        self._looks: int = 0  # rises whenever there may be something to plan
        self._last = 0  # the dump of which a chunk was read last
        self._under_way = False
        self.recorded: int = 0  # chunks that every sink has, by this process

    # ── what other threads call ──

    def reload(self, table: str, reason: str) -> None:
        """Load a table from the start."""
        with self._news:
            self._reloads[table] = Reload(table, reason)
            self._looks += 1
            self._news.notify_all()

    def wake(self) -> None:
        """Look for something to do, or stop."""
        with self._news:
            self._looks += 1
            self._news.notify_all()

    @property
    def busy(self) -> bool:
        """Whether there is a dump under way."""
        return bool(self._reloads) or self._under_way

    # ── planning ──

    def _rest(self, looks: int, seconds: float) -> None:
        """Wait until somebody asks for something after `looks` had been seen, or Delta stops; at most so long."""
        with self._news:
            self._news.wait_for(lambda: self._looks != looks or self._stopping.is_set(), seconds)

    def _plans_here(self) -> bool:
        """Whether this process plans. Raises EpochRose when its epoch is over."""
        if self._keeper is not None and self._keeper.lease is None:
            self._reloads.clear()  # whoever plans sees for itself that a table's columns are others
            self._progress.loads = {}  # and shows how far they are
            self._progress.dumps = ()
            self._under_way = any(dump.state == "running" for dump in self._dumps.all(unfinished=True))
            return False
        known = self._state.pipeline(self._pipeline)
        if known is not None and known.epoch > self._epoch:
            raise EpochRose("Another process has begun a new epoch, so this one's dumps are over.")
        return True

    def _lease(self) -> Lease | None:
        """Return what allows this process to plan; None where it is the only one. Raises LeaseLost."""
        return None if self._keeper is None else self._keeper.require()

    def _loads(self, names: Sequence[str]) -> tuple[list[TableLoad], set[str]]:
        """Return these tables' loads, begun again where they have to be, and the tables of which a load is a dump."""
        stored = self._state.loads(self._pipeline)
        with_dump = {dump.table: dump for dump in self._dumps.all(unfinished=True) if dump.kind == "load"}
        found: list[TableLoad] = []
        for name in names:
            load = stored.get(name)
            reload = self._reloads.get(name)
            again = reload.reason if reload else self._why_again(load, name)
            if load is None or again is not None:
                load = TableLoad(
                    name, reason=again or FIRST_LOAD, epoch=self._epoch, fingerprint=self._fingerprint_of(name)
                )
                load = self._state.begin_load(self._pipeline, load, self._lease())
                with self._news:
                    if self._reloads.get(name) is reload:
                        self._reloads.pop(name, None)
            self._show(load, with_dump.get(name))
            found.append(load)
        return found, set(with_dump)

    def _why_again(self, load: TableLoad | None, name: str) -> str | None:
        if load is None:
            return None
        if load.epoch > self._epoch:
            raise EpochRose("Another process has begun a new epoch, and asks for its loads.")
        if load.epoch < self._epoch:
            return "the epoch rose"
        now = self._fingerprint_of(name)
        return None if not now or now == load.fingerprint else "its columns changed, or where its documents go"

    def _fingerprint_of(self, name: str) -> str:
        """Return what a table is loaded for; nothing while its columns are not known."""
        return self._fingerprint(name) if name in self._tables() else ""

    def _show(self, load: TableLoad, dump: Dump | None) -> None:
        shown: dict[str, Any] = self._progress.loads.setdefault(load.table, {"estimate": None})
        shown.update(state=load.state, rows=load.rows, reason=load.reason)
        if dump is not None:
            shown["estimate"] = dump.estimate

    def _show_dumps(self, dumps: Sequence[Dump]) -> None:
        self._under_way = any(dump.state == "running" for dump in dumps)
        self._progress.dumps = [dump for dump in dumps if dump.kind != "load"]  # these have rows of their own

    # ── ending ──

    def _end(self, dump: Dump) -> None:
        """End a dump whose chunks are all in every sink."""
        done = self._dumps.finish(dump, self._lease())
        if done is None:
            return
        self._dumps.prune(KEPT)
        if done.kind == "load":
            self._progress.loads[done.table] |= {"state": "done", "rows": done.rows}
        log.info("load_finished", dump=done.id, table=done.table, kind=done.kind, rows=done.rows)


def running(load: TableLoad, covered_from: int | None) -> TableLoad:
    """Return a load that begins now; its rows have versions of `covered_from` at least."""
    return load._replace(covered_from=covered_from, state="running", started_at=dt.datetime.now(dt.UTC))
