"""Reading a MySQL source beside its log. A snapshot there does not tell its place: GTIDs tell what it shows.

`claims.py` says why that suffices. Nothing is locked for longer than a look at where the log ends.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import pymysql

from delta_sync.errors import CheckFailed, Problem
from delta_sync.sources.mysql.checks import XA_RECOVER_DENIED
from delta_sync.sources.mysql.claims import XA_LISTED_S, OwnedSamples, Sample, Snapshot, owned_gtids
from delta_sync.sources.mysql.connection import Session, code_of
from delta_sync.sources.mysql.reader import SURE_POLL_S, MariaReader, Prepared, end_of_log, prepared_in
from delta_sync.sources.mysql.statements import fetch
from delta_sync.tables import Table

GONE_POLLS = 50  # so often a snapshot looks whether commits have ended: each takes milliseconds, but on a replica

_FOREIGN = "SELECT GTID_SUBTRACT(@@GLOBAL.gtid_executed, CONCAT(@@GLOBAL.server_uuid, ':1-9223372036854775806')) <> ''"


class Owner(NamedTuple):
    """A transaction that is being committed, for whose end a claim waits: more than moments where a replica applies a
    long one, or where a session has set gtid_next and rests."""

    gtid: str

    def __str__(self) -> str:
        return f"the transaction {self.gtid} (SELECT @@GLOBAL.gtid_owned names its thread)"


class Listing(NamedTuple):
    """For what a claim waits when nothing hinders it."""

    def __str__(self) -> str:
        return f"{XA_LISTED_S:g} s, by when XA transactions would be listed (nothing has to be done)"


class MySQLReader(MariaReader):
    """One connection to the source, opened when needed and again after it broke. Used by one thread at a time.

    Every method raises SourceBusy when the source cannot be reached; CheckFailed when it refuses. Documents of several
    tables are not read here: nothing rises exactly with what snapshots show.
    """

    log_status: ClassVar[str] = "SHOW BINARY LOG STATUS"

    def new_samples(self) -> OwnedSamples:
        """Return an empty collection of samples."""
        return OwnedSamples()

    def sample(self) -> Sample:
        """Take a sample for claims: where the log ends, and then whose commits may not be visible yet."""
        with self._connected() as session:
            end = end_of_log(session, self.log_status)
            owned = _owned(session)
            prepared = _prepared(session)
            uses_xa = _uses_xa(session)
            return Sample(end, self._clock(), prepared, owned=owned, uses_xa=uses_xa)

    def blockers(self) -> Sequence[object]:
        """Return for what claims wait: XA transactions, and those that are being committed; else it is time."""
        with self._connected() as session:
            prepared, owned = sorted(_prepared(session)), sorted(_owned(session))
        return [*(Prepared(xid) for xid in prepared), *(Owner(gtid) for gtid in owned)] or [Listing()]

    def clock(self) -> int:
        """Never asked: documents of several tables are refused."""
        raise NotImplementedError

    @contextmanager
    def _snapshot_for(self, session: Session, table: Table) -> Generator[Snapshot]:
        """The snapshot in which rows of a table are read, with what it surely shows."""
        del table
        with self._snapshot(session) as snapshot:
            yield snapshot

    def _begin(self, session: Session) -> Snapshot:
        """Begin a snapshot, which surely shows what the log held by now when nobody was committing it any more."""
        end = end_of_log(session, self.log_status)
        owners = owned = _owned(session)
        for _ in range(GONE_POLLS):
            if not owners & owned:
                break
            time.sleep(SURE_POLL_S)
            owned = _owned(session)
        taken_s = self._clock()
        prepared = _prepared(session)
        shown = 0 if owners & owned or prepared or _uses_xa(session) else end
        fetch(session, "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        return Snapshot(end_of_log(session, self.log_status), taken_s, prepared, shown)

    def _lacks(self, session: Session, gtids: str) -> bool:
        return str(fetch(session, "SELECT GTID_SUBSET(%s, @@GLOBAL.gtid_executed)", (gtids,))[0][0]) != "1"


def _owned(session: Session) -> frozenset[str]:
    """Return the GTIDs of transactions that are being committed. Raises CheckFailed: there are ones without."""
    ((mode, owned),) = fetch(session, "SELECT @@GLOBAL.gtid_mode, @@GLOBAL.gtid_owned")
    if mode != "ON":
        raise CheckFailed([Problem("source", f"gtid_mode is {mode}", "see `deltactl pipeline check`")])
    return owned_gtids(owned)


def _uses_xa(session: Session) -> bool:
    """Tell whether XA PREPARE was ever called, or other servers' transactions applied, which that status leaves out."""
    ((_, prepares),) = fetch(session, "SHOW GLOBAL STATUS LIKE 'Com_xa_prepare'")
    ((foreign,),) = fetch(session, _FOREIGN)
    return str(prepares) != "0" or str(foreign) != "0" or bool(fetch(session, "SHOW REPLICA STATUS"))


def _prepared(session: Session) -> frozenset[str]:
    """Return the XA transactions that are prepared and not yet committed. Raises CheckFailed."""
    try:
        return prepared_in(session)
    except pymysql.Error as error:
        if code_of(error) != XA_RECOVER_DENIED:
            raise
        what = "the source's user may not list XA transactions"
        raise CheckFailed([Problem("source", what, "grant it XA_RECOVER_ADMIN")]) from error
