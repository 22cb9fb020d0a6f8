"""Building documents anew: which ones the log's changes are about, when, and reading them in one snapshot each time.

Their versions are the snapshots' clocks, which rise with what snapshots see, so they may be written in any order. A
snapshot is of use only when it shows every change that led to it; once one does, all later ones do.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from delta_sync.changes import Change, Key
from delta_sync.decoding import TableCodec, Touched, Watching
from delta_sync.documents import DocumentSpec, watches
from delta_sync.dumps import Dump
from delta_sync.errors import SourceBusy
from delta_sync.logs import logger
from delta_sync.progress import Progress
from delta_sync.sources.reader import Snapshot, SourceReader
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Table
from delta_sync.versions import epoch_of, position_of

log = logger(__name__)

KEYS_MOST = 10_000  # documents that one batch's changes of a table build at once; more are left to a dump
DUMPS_MOST = 8  # of one table that wait to begin; with more, everything is dumped once
WITHHELD_MOST = 10_000  # documents that wait for their time; more are built at once
KEPT_S = 10.0  # that a document was built; what comes of one transaction, or of a backlog, is about the same ones
BUILT_MOST = 100_000  # documents of which it is known when they were built; of others it is as if it were long ago
POLL_S = 0.003  # a transaction is visible some microseconds after its commit is in the log
RETRY_S = 1.0
NOTICE_S = 2.0  # then one wants to know for whom a snapshot waits

T = TypeVar("T")


def _shows(snapshot: Snapshot, transactions: Mapping[int, int]) -> bool:
    return all(snapshot.shows(position_of(version), xid) for xid, version in transactions.items())


def may_be_left_to(dump: Dump, root: str) -> bool:
    """Tell whether changes of a root's documents may have been left to a dump, also to one that somebody asked for."""
    return dump.table == root and dump.kind in ("table", "where") and dump.sinks is None


def _begins_later(dump: Dump, root: str) -> bool:
    return may_be_left_to(dump, root) and dump.state == "pending" and dump.covered_from is None


class Built(NamedTuple):
    """When a document was built last, and in which snapshot (None: it is about to be)."""

    at: float
    snapshot: Snapshot | None = None


class Debounce:
    """Decides when a document is built: at once, or `wait_s` after it was built last. Pure but for what it remembers.

    Not at all, if the last building showed the changes already. Times are seconds of one clock. What is withheld is
    asked for by `ripe`; `built` is told in which snapshot documents were built.
    """

    def __init__(self, wait_s: float, most: int = WITHHELD_MOST, built_most: int = BUILT_MOST) -> None:
        self._wait_s = wait_s
        self._most = most
        self._built_most = built_most
        self._built: dict[Key, Built] = {}  # the oldest first
        self._withheld: set[Key] = set()
        self._times: list[tuple[float, int, Key]] = []  # a heap
        self._count = 0

    def split(
        self, keys: Iterable[Key], now: float, shows: Callable[[Snapshot], bool] = lambda _: False
    ) -> tuple[list[Key], list[Key]]:
        """Return which of these documents are to be built now, and which are withheld.

        `shows` tells whether a snapshot shows all changes that these documents are to be built for.
        """
        self._forget(now)
        due: list[Key] = []
        later: list[Key] = []
        for key in keys:
            built = self._built.get(key)
            if key in self._withheld:
                later.append(key)
            elif built is not None and built.snapshot is not None and shows(built.snapshot):
                pass
            elif built is None or now - built.at >= self._wait_s or len(self._withheld) >= self._most:
                due.append(key)
            else:
                self._withheld.add(key)
                self._count += 1
                heapq.heappush(self._times, (built.at + self._wait_s, self._count, key))
                later.append(key)
        self._note(due, now)
        return due, later

    def ripe(self, now: float | None) -> list[Key]:
        """Return the documents that were withheld, and are to be built now; None: all of them."""
        found: list[Key] = []
        while self._times and (now is None or self._times[0][0] <= now):
            found.append(heapq.heappop(self._times)[2])
        self._withheld.difference_update(found)
        if now is not None:
            self._note(found, now)
        return found

    @property
    def next_time(self) -> float | None:
        """When `ripe` is to be asked next."""
        return self._times[0][0] if self._times else None

    def built(self, keys: Iterable[Key], snapshot: Snapshot) -> None:
        """Note in which snapshot documents were built of which `split` or `ripe` said that they were to be."""
        for key in keys:
            noted = self._built.get(key)
            if noted is not None:
                self._built[key] = noted._replace(snapshot=snapshot)

    def _note(self, keys: Iterable[Key], now: float) -> None:
        for key in keys:
            self._built.pop(key, None)
            self._built[key] = Built(now)

    def _forget(self, now: float) -> None:
        kept_s = max(self._wait_s, KEPT_S)
        while self._built:
            key, built = next(iter(self._built.items()))
            if now - built.at < kept_s and len(self._built) <= self._built_most:
                break
            del self._built[key]


class DocumentBuilder:
    """Finds and reads the documents that changes are about. `specs` are the pipeline's, by root.

    `load_again` has tables loaded anew, durably. `tables` are as the worker sees them now. Used by one thread.
    """

    def __init__(
        self,
        *,
        specs: Mapping[str, DocumentSpec],
        reader: SourceReader,
        epoch: int,
        tables: Callable[[], Mapping[str, Table]],
        dumps: DumpStore,
        load_again: Callable[[Sequence[str], str], None],
        progress: Progress,
        stopping: threading.Event,
    ) -> None:
        self._specs = specs
        self._reader = reader
        self._epoch = epoch
        self._tables = tables
        self._dumps = dumps
        self._load_again = load_again
        self._progress = progress
        self._stopping = stopping
        self._snapshot: Snapshot | None = None  # the last one that was of use
        self._unseen: dict[int, int] = {}  # transactions that no snapshot is known to show, with a version

    def watched(self, codec_of: Callable[[Table], TableCodec]) -> dict[str, list[Watching]]:
        """Return what is to be noted of the changes of each table."""
        tables = self._tables()
        found: dict[str, list[Watching]] = {}
        for root in self._specs:
            for watch in watches(tables[root]):
                values = codec_of(watch.table._replace(key=watch.columns)).key
                found.setdefault(watch.table.id, []).append(Watching(root, watch, values))
        return found

    def keys(self, touched: Touched) -> dict[str, list[Key]]:
        """Return the documents to be built, by root. Raises SchemaChanged, StateBusy, and SourceBusy when Delta stops.

        Those of a change that is about too many are left to a dump, which sees that change, too: it claims a position
        above it.
        """
        for xid, version in self._of_epoch(touched).items():
            self._unseen[xid] = max(version, self._unseen.get(xid, 0))  # of MariaDB they all have one number, 0
        for names, why in ((touched.emptied, "was truncated"), (touched.blind, "its log did not say what rows were")):
            for name in names:
                roots = [root for root, spec in self._specs.items() if name in spec.tables]
                log.warning("documents_loaded_again", tables=roots, reason=f"{name}: {why}")
                self._load_again(roots, f"{name} {why}" if why.startswith("was") else f"{name}: {why}")
        found: dict[str, dict[Key, None]] = {}
        for watching, values in touched.by_watch.items():
            if not values:
                continue
            of_root = found.setdefault(watching.root, {})
            if not watching.watch.hops:
                of_root.update(dict.fromkeys(values))
                continue
            given = list(values)
            keys = self._root_keys(watching, given)
            if len(keys) > KEYS_MOST:
                self._dump(watching, given)
            else:
                of_root.update(dict.fromkeys(keys))
        return {root: list(keys) for root, keys in found.items() if keys}

    def _root_keys(self, watching: Watching, values: Sequence[Key]) -> list[Key]:
        return self._read(lambda usable: self._reader.root_keys(watching.watch, values, KEYS_MOST + 1, usable))

    def shown(self, touched: Touched) -> Callable[[Snapshot], bool]:
        """Return a function that tells whether a snapshot shows all of these changes."""
        wanted = self._of_epoch(touched)
        known: dict[int, bool] = {}  # most documents were built in one of a few snapshots

        def shows(snapshot: Snapshot) -> bool:
            if id(snapshot) not in known:
                known[id(snapshot)] = _shows(snapshot, wanted)
            return known[id(snapshot)]

        return shows

    def _of_epoch(self, touched: Touched) -> dict[int, int]:
        """Return the transactions of this epoch, each with a version.

        Of an older one the source may have lost some; those that it has, every snapshot shows by now.
        """
        return {xid: version for xid, version in touched.seen.items() if epoch_of(version) == self._epoch}

    def read(self, root: str, keys: Sequence[Key]) -> tuple[list[Change], list[Key], Snapshot]:
        """Return documents' rows as changes (None: there is none), the keys that are left, and in what was read.

        Raises as `keys`.
        """
        table = self._tables()[root]
        chunk = self._read(lambda usable: self._reader.read_keys(table, keys, usable))
        snapshot = self._snapshot
        assert snapshot is not None, "it was usable"
        version = chunk.version(self._epoch, 0)
        rows = dict(chunk.rows)
        missing = [key for key in keys if key not in rows]
        changes = [Change(root, key, version, row) for key, row in rows.items()]
        if chunk.last_key is not None:
            assert changes, "of some rows at least one is read"
            return changes, missing, snapshot
        return [*changes, *(Change(root, key, version, None) for key in missing)], [], snapshot

    def _dump(self, watching: Watching, values: Sequence[Key]) -> None:
        """Have the documents dumped to which values lead, unless that is about to be done."""
        table = self._tables()[watching.root]
        where = self._reader.root_condition(table, watching.watch, values)
        waiting = [dump for dump in self._dumps.all(unfinished=True) if _begins_later(dump, watching.root)]
        if any(dump.kind == "table" or dump.where == where for dump in waiting):
            return  # it begins later, and so sees this change
        reason = f"{watching.watch.table.id} changed"
        if len(waiting) >= DUMPS_MOST:
            self._dumps.add(Dump(table=table.id, kind="table", reason=reason))
        else:
            self._dumps.add(Dump(table=table.id, kind="where", where=where, reason=reason))
        log.info("documents_left_to_dump", table=table.id, reason=reason, documents=f"more than {KEYS_MOST}")

    def _read(self, call: Callable[[Callable[[Snapshot], bool]], T | None]) -> T:
        """Read in a snapshot that shows all changes so far, for as long as it takes."""
        waited_s = 0.0
        while True:
            try:
                found = call(self._shows_all)
            except SourceBusy as error:
                log.warning("documents_wait", reason=str(error))
                self._progress.waits("documents", str(error))
                if self._stopping.wait(RETRY_S):
                    raise
                continue
            if found is not None:
                self._progress.waits("documents", None)
                return found
            if waited_s < NOTICE_S <= waited_s + POLL_S:
                self._tell_for_whom()
            waited_s += POLL_S
            if self._stopping.wait(POLL_S):
                raise SourceBusy("Delta stops before documents could be read.")

    def _shows_all(self, snapshot: Snapshot) -> bool:
        if not _shows(snapshot, self._unseen):
            return False
        self._unseen.clear()
        self._snapshot = snapshot
        return True

    def _tell_for_whom(self) -> None:
        blockers = self._reader.blockers()
        whom = str(blockers[0]) if blockers else "a transaction whose commit is in the log and not visible yet"
        log.warning("documents_wait_for_transaction", blockers=[str(blocker) for blocker in blockers[:5]])
        self._progress.waits("documents", f"documents cannot be read before the end of {whom}")
