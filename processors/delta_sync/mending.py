"""Documents that were written without the answer of an optional look-up get it when its service is back.

What is remembered is a dump of the rows' keys in the state store, paused, before any sink has the document. When the
service answers again the dump is resumed, and goes the way of all dumps: the rows are read as they are then, with
versions that cannot overwrite anything newer, and the look-up is asked again. If it fails once more, so it begins anew.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from delta_sync.changes import Key
from delta_sync.dumps import Dump, Order
from delta_sync.errors import Transient, UsageError
from delta_sync.logs import logger
from delta_sync.lookups import LookupCaller
from delta_sync.state_dumps import DumpStore

log = logger(__name__)

KEYS_MOST = 100_000  # of a table and a look-up: above, its keys cost more than reading the whole table does
PARTS_MOST = 1000  # dumps that they are in, one for each batch that left some: each is begun, and listed, by itself
TRY_S = 5.0  # how often a service that did not answer is asked, and what is remembered is looked at
_REASON = "written without look-up "


class Left(NamedTuple):
    """Rows of a table whose documents were written without a look-up's answer."""

    lookup: str
    table: str
    keys: Sequence[Key]


class _Known:
    """What this process knows to be remembered of a look-up and a table: keys, in dumps; or the whole table."""

    def __init__(self) -> None:
        self.keys: set[Key] = set()
        self.dumps: list[int] = []
        self.whole = False


def reason_of(lookup: str) -> str:
    """Return by which reason a dump's rows are those that a look-up has not answered for."""
    return _REASON + lookup


def lookup_of(dump: Dump) -> str | None:
    """Return for which look-up a dump waits; None: for none, somebody else paused it, or it is no such dump. Pure."""
    waits = dump.state == "paused" and dump.started_at is None and dump.reason.startswith(_REASON)
    return dump.reason.removeprefix(_REASON) if waits else None


class Mender(threading.Thread):
    """Remembers what was left, and has it made good. `remember` is the worker's; the thread does the rest."""

    def __init__(self, store: DumpStore, lookups: Mapping[str, LookupCaller], stopping: threading.Event) -> None:
        super().__init__(name="mender", daemon=True)
        self._store = store
        self._lookups = lookups
        self._stopping = stopping
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], _Known] = {}  # by look-up and table

    def remember(self, left: Sequence[Left]) -> None:
        """Store the keys durably; those that wait already are left out. Raises StateBusy."""
        with self._lock:
            for lookup, table, keys in left:
                known = self._known.setdefault((lookup, table), _Known())
                new = [key for key in dict.fromkeys(keys) if key not in known.keys]
                if known.whole or not new:
                    continue
                if not known.keys:
                    log.warning("lookup_left", lookup=lookup, table=table, rows=len(new))
                if len(known.keys) + len(new) > KEYS_MOST or len(known.dumps) >= PARTS_MOST:
                    self._store.add(Dump(table=table, kind="table", reason=reason_of(lookup)), paused=True)
                    known.whole = True
                    for id_ in known.dumps:
                        self._order(id_, "cancel")
                else:
                    dump = Dump(table=table, kind="keys", reason=reason_of(lookup))
                    known.dumps.append(self._store.add(dump, new, paused=True))
                    known.keys.update(new)

    def _order(self, id_: int, order: Order) -> bool:
        """Give an order; return whether it could be followed: another process, or a person, may have been first."""
        try:
            self._store.order(id_, order)
        except UsageError:
            return False
        return True

    def run(self) -> None:
        """Look every so often, until Delta stops; only once where every look-up is required, by now."""
        while not self._stopping.wait(TRY_S):
            try:
                self.mend()
            except Transient as error:
                log.warning("mending_waits", reason=str(error))
            except Exception as error:  # a defect in what mends must not stop the stream
                log.error("mending_failed", reason=str(error), exc_info=True)
            else:
                if all(caller.required for caller in self._lookups.values()):
                    return

    def mend(self) -> list[int]:
        """Resume the dumps whose look-ups answer again; return their ids. One step of `run`. Raises StateBusy."""
        waiting = {name for dump in self._store.all(unfinished=True) if (name := lookup_of(dump)) is not None}
        back = {name for name in waiting if name not in self._lookups or self._lookups[name].answers_again()}
        if not back:
            return []
        with self._lock:  # what is left from now on is not among those that are resumed here
            there = [dump.id for dump in self._store.all(unfinished=True) if lookup_of(dump) in back]
            resumed = [id_ for id_ in there if self._order(id_, "resume")]
            for lookup, table in [of for of in self._known if of[0] in back]:
                del self._known[lookup, table]
        log.info("lookup_mends", lookups=sorted(back), dumps=resumed)
        return resumed
