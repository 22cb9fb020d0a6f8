"""Reading rows by key, for changes whose events lack a value (unchanged TOAST, generated columns, a changed schema).

The row is read in one snapshot S with a claim L above the change, so S sees the change, and the row is written with a
version just below L: what comes between from the log is older and stale. A claim has to wait for the transactions that
are running now. They usually end within milliseconds; when one does not, the row is written with the change's own
version, which is safe too, as long as S sees the change's transaction.

Either way the row may hold later changes than its version says, and their events, which the log brings next, would show
it as it was before them. So a row that was read ahead of the log is read by its key again for each of these changes,
until the log has come past S (`AheadOfLog`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from delta_sync.changes import Key
from delta_sync.decoding import Lacking, ReadAhead
from delta_sync.errors import SchemaChanged, SourceBusy
from delta_sync.logs import logger
from delta_sync.samples import SharedSamples
from delta_sync.sources.reader import Snapshot, SourceReader
from delta_sync.tables import Table
from delta_sync.values import Row
from delta_sync.versions import position_of, reread_version, version_of

log = logger(__name__)

POLL_S = 0.003
RETRY_S = 1.0
AHEAD_MOST = 100_000  # keys of a table, some 20 MB; a connector that is hours behind may meet any number of them


class Ahead(NamedTuple):
    """Versions of changes: from the first that a row's own version leaves to the log, to what the row may hold."""

    start: int
    end: int

    def joined(self, other: Ahead) -> Ahead:
        """Return the stretch that holds both."""
        return Ahead(min(self.start, other.start), max(self.end, other.end))


class AheadOfLog:
    """Which rows were read by key ahead of the log, and so hold changes that the log has yet to bring.

    Bounded: beyond `limit` keys of a table it is as if all of its rows had been read, which only costs reads.
    """

    def __init__(self, limit: int = AHEAD_MOST) -> None:
        self._limit = limit
        self._keys: dict[str, dict[Key, Ahead]] = {}
        self._tables: dict[str, Ahead] = {}

    def note(self, table: str, key: Key, ahead: Ahead) -> None:
        """Note that this key's row was read. What was noted of it before stays: the new row may be on its way yet."""
        of_table = self._keys.setdefault(table, {})
        of_table[key] = ahead.joined(of_table.get(key, ahead))
        if len(of_table) > self._limit:
            everything = self._tables.get(table, ahead)
            for one in of_table.values():
                everything = everything.joined(one)
            self._tables[table] = everything
            of_table.clear()

    def passed(self, version: int) -> None:
        """Forget the rows that were read before everything below this version had come through the log."""
        for table, of_table in list(self._keys.items()):
            left = {key: ahead for key, ahead in of_table.items() if ahead.end > version}
            if left:
                self._keys[table] = left
            else:
                del self._keys[table]
        self._tables = {table: ahead for table, ahead in self._tables.items() if ahead.end > version}

    def by_table(self) -> dict[str, ReadAhead]:
        """Return, for each table with rows that are ahead, which of its changes are to be read by key."""
        return {table: self._of(table) for table in self._keys.keys() | self._tables.keys()}

    def _of(self, table: str) -> ReadAhead:
        of_table = self._keys.get(table, {})
        everything = self._tables.get(table)

        def ahead(key: Key, version: int) -> bool:
            found = of_table.get(key)
            if found is not None and found.start <= version < found.end:
                return True
            return everything is not None and everything.start <= version < everything.end

        return ahead


class Rereader:
    """Reads rows by key with a version, and notes in `ahead` which. Used by one thread."""

    def __init__(
        self,
        reader: SourceReader,
        samples: SharedSamples,
        epoch: int,
        table: Callable[[str], Table],
        stopping: threading.Event,
    ) -> None:
        self._reader = reader
        self._samples = samples
        self._epoch = epoch
        self._table = table
        self._stopping = stopping
        self.ahead = AheadOfLog()
        self._blocked_at: int | None = None  # horizon of a snapshot for which waiting was in vain

    def __call__(self, table: str, lacking: Sequence[Lacking]) -> list[tuple[Lacking, Row | None, int]]:
        """Return changes with their rows (None: it is gone) and the version to write each with.

        Of large rows it returns some, at least one: ask again for the others, when these are no longer in memory.
        Raises SchemaChanged, and SourceBusy only when Delta stops before the source answers.
        """
        while True:
            try:
                return self._read(self._table(table), lacking)
            except SchemaChanged:
                raise
            except SourceBusy as error:
                log.warning("reread_waits", table=table, reason=str(error))
                if self._stopping.wait(RETRY_S):
                    raise

    def _read(self, table: Table, lacking: Sequence[Lacking]) -> list[tuple[Lacking, Row | None, int]]:
        self._samples.add(self._reader.sample())  # after the events came, so above all of them
        keys = [item.key for item in lacking]
        newest = max(position_of(item.version) for item in lacking)
        waited_s = 0.0
        claim = 0
        while True:
            patient = waited_s < self._reader.claim_wait_s

            def usable(snapshot: Snapshot, patient: bool = patient) -> bool:
                # Made here, once: the samples that allow a claim may be forgotten while rows are read, and without a
                # claim the version rests on another condition.
                nonlocal claim
                claim = self._samples.claim(snapshot, 0) or 0
                if claim > newest:
                    self._blocked_at = None
                    return True
                if snapshot.horizon == self._blocked_at:
                    patient = False  # the same transaction as last time: it will not end now, either
                if patient:
                    return False
                self._blocked_at = snapshot.horizon
                changes = {(position_of(item.version), item.xid) for item in lacking}
                return all(snapshot.shows(position, xid) for position, xid in changes if position >= claim)

            chunk = self._reader.read_keys(table, keys, usable)
            if chunk is not None:
                break
            if self._stopping.wait(POLL_S):
                raise SourceBusy("Delta stops before the rows could be read.")
            waited_s += POLL_S
        rows = dict(chunk.rows)
        if chunk.last_key is not None:  # a row that is not there may be one that was left out
            lacking = [item for item in lacking if item.key in rows]
            assert lacking, "rows were read by these keys"
        found: list[tuple[Lacking, Row | None, int]] = []
        for item in lacking:
            version = max(item.version, reread_version(self._epoch, claim)) if claim else item.version
            self.ahead.note(table.id, item.key, Ahead(version + 1, version_of(self._epoch, chunk.seen_to)))
            found.append((item, rows.get(item.key), version))
        return found
