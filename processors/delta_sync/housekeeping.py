"""What goes away by itself: documents whose rows went unseen, dead letters and tombstones that have expired."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Mapping
from typing import Protocol

from delta_sync.dumping import FIRST_LOAD
from delta_sync.dumps import Dump
from delta_sync.errors import Transient
from delta_sync.generations import meant
from delta_sync.leases import LeaseKeeper
from delta_sync.logs import logger
from delta_sync.sinks import AnySink, base_name
from delta_sync.sinks.base import Target
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.tables import Table
from delta_sync.used_keys import UsedKeyStore
from delta_sync.versions import dump_version

log = logger(__name__)

HOUSEKEEPING_S = 600.0  # what expires after days may stay for minutes more


class Places(Protocol):
    """Knows where documents are: the worker."""

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables as they are now, by name."""
        ...

    def targets(self, table: str) -> Mapping[str, Target]:
        """Where a table's documents go, by sink."""
        ...


class Housekeeper(threading.Thread):
    """Removes, as a thread, what has expired, now and then. Of several processes the one with `keeper`'s lease does."""

    def __init__(
        self,
        *,
        spec: PipelineSpec,
        state: StateStore,
        sinks: Mapping[str, AnySink],
        places: Places,
        used_keys: UsedKeyStore,
        keeper: LeaseKeeper | None,
        stopping: threading.Event,
    ) -> None:
        super().__init__(name="housekeeping", daemon=True)
        self._spec = spec
        self._state = state
        self._sinks = sinks
        self._places = places
        self._used_keys = used_keys
        self._keeper = keeper
        self._stopping = stopping

    def remove_unmet(self, dump: Dump) -> None:
        """Remove documents that a dump did not meet: their rows went without a change event.

        That happens in an epoch that is over, to a table that was replaced by another, and to a store that somebody
        else wrote to. Every row that is there has been written with a version at or above the dump's beginning, or has
        a newer one; but for those that became dead letters. Nobody can tell their documents from those of rows that are
        gone, so then nothing is removed.
        """
        if dump.kind == "load" and dump.reason == FIRST_LOAD and dump.epoch == 1:
            return  # nothing was there before
        assert dump.epoch is not None, "it has begun"
        assert dump.covered_from is not None, "it has begun"
        beginning = dump_version(dump.epoch, dump.covered_from) if dump.floor is None else dump.floor
        # What is below the beginning in a generation that is built anew came before, while it was empty; it must not
        # have what a tombstone outranks in another one, such as a dead letter's change that is replayed.
        new = dump.sinks is not None and all(base_name(name) != name for name in dump.sinks)
        failed = 0 if new else self._state.count_failed_since(self._spec.name, dump.table, beginning)
        if failed:
            fix = "correct the cause, replay them, then run it with --reload"
            log.warning("unmet_kept", table=dump.table, dead_letters=failed, fix=fix)
            return
        for sink, target in self._places.targets(dump.table).items():
            if meant(dump.sinks, sink):
                removed = self._sinks[sink].truncate(target, beginning)
                log.info("unmet_removed", table=dump.table, sink=sink, documents=removed)
        if dump.sinks is None:
            self._used_keys.remove(dump.table, beginning)

    def run(self) -> None:
        """Look and remove until Delta stops."""
        while not self._stopping.wait(HOUSEKEEPING_S):
            if self._keeper is not None and not self._keeper.held:
                continue
            try:
                self._tidy_up()
            except Transient as error:
                log.warning("housekeeping_waits", reason=str(error))
            except Exception as error:  # a defect in what only tidies up must not stop the stream
                log.error("housekeeping_failed", reason=str(error), exc_info=True)

    def _tidy_up(self) -> None:
        oldest = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=self._spec.dead_letter_ttl)
        self._used_keys.sweep()
        pruned = self._state.prune(self._spec.name, oldest)
        if pruned:
            log.warning("dead_letters_expired", letters=pruned)
        for table in self._places.tables:
            for sink, target in self._places.targets(table).items():
                self._sinks[sink].sweep(target, recent_s=2 * HOUSEKEEPING_S)
