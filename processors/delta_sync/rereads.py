"""Reading rows by key, for changes whose events lack a value (unchanged TOAST, generated columns, a changed schema).

The row is read in one snapshot S with a claim L above the change, so S sees the change, and the row is written with a
version just below L: what comes between from the log is older and stale. A claim has to wait for the transactions that
are running now. They usually end within milliseconds; when one does not, the row is written with the change's own
version, which is safe too, as long as S sees the change's transaction: the row then holds that change and perhaps later
ones, which the log brings again (until then a reader may see the row go back by those).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

from delta_sync.decoding import Lacking
from delta_sync.errors import SchemaChanged, SourceBusy
from delta_sync.load import SharedSamples
from delta_sync.sources.postgresql.claims import Snapshot, widen
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.tables import Table
from delta_sync.values import Row
from delta_sync.versions import dump_version, position_of

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

CLAIM_WAIT_S = 0.25  # for the transactions that are running now: far above a short one's length, still near real time
POLL_S = 0.003
RETRY_S = 1.0


class Rereader:
    """Reads rows by key with a version. Used by one thread."""

    def __init__(
        self,
        reader: PostgresReader,
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
        self._blocked_at: int | None = None  # xmin of a snapshot for which waiting was in vain

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
        sample = self._reader.sample()  # after the events came, so above all of them
        self._samples.add(sample)
        keys = [item.key for item in lacking]
        newest_lsn = max(position_of(item.version) for item in lacking)
        xids = {item.xid for item in lacking}  # 32-bit, as in the log
        assert sample.lsn > newest_lsn, "an event is in the log before its successor's position"
        waited_s = 0.0
        claim: int | None = None
        while True:
            patient = waited_s < CLAIM_WAIT_S

            def usable(snapshot: Snapshot, patient: bool = patient) -> bool:
                # Made here, once: the samples that allow a claim may be forgotten while rows are read, and without a
                # claim the version rests on another condition.
                nonlocal claim
                claim = self._samples.claim(snapshot, newest_lsn + 1)
                if claim is not None:
                    self._blocked_at = None
                    return True
                if snapshot.xmin == self._blocked_at:
                    patient = False  # the same transaction as last time: it will not end now, either
                if patient:
                    return False
                self._blocked_at = snapshot.xmin
                return all(snapshot.sees(widen(xid, snapshot.xmax)) for xid in xids)

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
        if claim is not None:
            version = dump_version(self._epoch, claim)
            return [(item, rows.get(item.key), version) for item in lacking]
        return [(item, rows.get(item.key), item.version) for item in lacking]
