"""The load: rows that are already in the source are read in chunks with claims, while changes stream.

One table after the other, one chunk at a time. A chunk's rows are written with a version just below everything that its
claim leaves to the log, so they may arrive in any order with the log's changes. They are handed over only after the
log has come past the moment at which the chunk was read: then no reader sees a row go back to an older state, either.
Progress is saved after each chunk that every sink has acknowledged, so a load goes on where it was.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import structlog

from delta_sync.changes import Change, Key
from delta_sync.errors import EpochRose, LeaseLost, LoadOverruled, Transient
from delta_sync.leases import LeaseKeeper
from delta_sync.progress import LogPosition, Progress
from delta_sync.sources.reader import Chunk, Sample, Samples, Snapshot, SourceReader
from delta_sync.spec import LoadSpec
from delta_sync.state import Lease, StateStore, TableLoad
from delta_sync.tables import Table
from delta_sync.values import Row
from delta_sync.versions import dump_version

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

SLICE_ROWS = 2000  # handed to the worker at once, so that changes of the log wait for no more than that
CLAIM_POLL_S = 0.05  # a transaction usually ends within milliseconds
WAIT_NOTICE_S = 2.0  # then one wants to know for whom a load waits
FIRST_LOAD = "first load"
LOOK_S = 1.0  # between looks whether there is something to load, where others may ask for it
RETRY_S = 1.0  # after the source or the state store did not answer


class SharedSamples:
    """The samples that the watch takes and that loads and re-reads claim from. `new` makes an empty collection."""

    def __init__(self, new: Callable[[], Samples]) -> None:
        self._lock = threading.Lock()
        self._new = new
        self._samples = new()

    def add(self, sample: Sample) -> None:
        """Keep a sample, the newest so far."""
        with self._lock:
            self._samples.add(sample)

    def claim(self, snapshot: Snapshot, covered_from: int) -> int | None:
        """Return what rows read in this snapshot may claim, or None when it is too early."""
        with self._lock:
            return self._samples.claim(snapshot, covered_from)

    def forget(self) -> None:
        """Drop all samples: the source may be another one now."""
        with self._lock:
            self._samples = self._new()


class Slice(NamedTuple):
    """Some rows of a chunk as changes, and where the worker reports that every sink has acknowledged them."""

    table: str
    changes: Sequence[Change]
    done: Future[None]


class Reload(NamedTuple):
    """A table is to be loaded from the start, whatever was loaded before."""

    table: str
    reason: str


class Loader(threading.Thread):
    """Loads the tables that are not loaded yet. `hand_over` gives a slice to the worker.

    `finished` is called when a table is complete; it removes documents of rows that went without a change event. Where
    several processes could load, `keeper` has the lease of the one that does.
    """

    def __init__(
        self,
        *,
        pipeline: str,
        epoch: int,
        reader: SourceReader,
        samples: SharedSamples,
        position: LogPosition,
        progress: Progress,
        state: StateStore,
        options: LoadSpec,
        heartbeat_prefix: str,
        tables: Callable[[], Mapping[str, Table]],
        fingerprint: Callable[[str], str],
        hand_over: Callable[[Slice], None],
        finished: Callable[[TableLoad], None],
        failed: Callable[[BaseException], None],
        stopping: threading.Event,
        keeper: LeaseKeeper | None = None,
    ) -> None:
        super().__init__(name="load", daemon=True)
        self._pipeline = pipeline
        self._epoch = epoch
        self._reader = reader
        self._samples = samples
        self._position = position
        self._progress = progress
        self._state = state
        self._options = options
        self._heartbeat_prefix = heartbeat_prefix
        self._tables = tables
        self._fingerprint = fingerprint
        self._hand_over = hand_over
        self._finished = finished
        self._failed = failed
        self._stopping = stopping
        self._keeper = keeper
        self._lease: Lease | None = None
        self._wake = threading.Condition()
        self._reloads: dict[str, Reload] = {}

    def reload(self, table: str, reason: str) -> None:
        """Load a table from the start, after whatever is being read now."""
        with self._wake:
            self._reloads[table] = Reload(table, reason)
            self._wake.notify_all()

    def wake(self) -> None:
        """Look for something to do, or stop."""
        with self._wake:
            self._wake.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a table is not loaded yet."""
        return bool(self._reloads) or any(load.get("state") != "done" for load in self._progress.loads.values())

    def run(self) -> None:
        """Load until Delta stops. What it cannot mend goes to `failed`."""
        try:
            while not self._stopping.is_set():
                try:
                    if not self._may_load():
                        self._reloads.clear()  # whoever loads sees for itself that a table's columns are others
                        self._progress.loads = {}  # and shows how far they are
                        self._stopping.wait(LOOK_S)
                    elif not self._load_next():
                        with self._wake:
                            self._wake.wait_for(
                                lambda: bool(self._reloads) or self._stopping.is_set(),
                                None if self._keeper is None else LOOK_S,  # others may ask for a load, too
                            )
                    self._progress.waits("load", None)
                except LeaseLost as error:
                    log.info("load_left", reason=str(error))  # another goes on where the last chunk was saved
                except LoadOverruled as error:
                    log.info("load_overruled", reason=str(error))
                except Transient as error:
                    log.warning("load_waits", reason=str(error))
                    self._progress.waits("load", str(error))
                    self._stopping.wait(RETRY_S)
        except Stopping:
            pass
        except BaseException as error:  # noqa: BLE001 -- handed to the worker, which stops with it
            self._failed(error)

    def _may_load(self) -> bool:
        """Whether this process is the one that loads; what it saves from now on is saved with that lease."""
        if self._keeper is None:
            return True
        self._lease = self._keeper.lease
        return self._lease is not None

    def _save(self, load: TableLoad) -> None:
        """Save how far a load is. Raises LeaseLost when another process loads by now, LoadOverruled to begin
        anew, EpochRose in a newer epoch."""
        known = self._state.pipeline(self._pipeline)
        if known is not None and known.epoch > self._epoch:
            raise EpochRose("Another process has begun a new epoch, so this one's loads are over.")
        self._state.save_load(self._pipeline, load, self._lease)

    def _load_next(self) -> bool:
        """Load one table to its end; return whether there was one to load."""
        tables = self._tables()
        loads = self._state.loads(self._pipeline)
        for name in tables:
            load = loads.get(name)
            reload = self._reloads.get(name)
            if reload is not None:
                load = None
            again = reload.reason if reload else self._why_again(load, name)
            if load is not None and again is None:
                self._show(load)
                if load.state == "done":
                    continue
            else:
                load = self._begin(name, again or FIRST_LOAD)
                with self._wake:
                    if self._reloads.get(name) is reload:
                        self._reloads.pop(name, None)
            self._load_table(load)
            return True
        return False

    def _why_again(self, load: TableLoad | None, name: str) -> str | None:
        if load is None:
            return None
        if load.epoch > self._epoch:
            raise EpochRose("Another process has begun a new epoch, and asks for its loads.")
        if load.epoch != self._epoch:
            return "the epoch rose"
        return None if load.fingerprint == self._fingerprint(name) else "its columns changed, or where its documents go"

    def _begin(self, name: str, reason: str) -> TableLoad:
        load = TableLoad(
            table=name,
            state="pending",
            reason=reason,
            epoch=self._epoch,
            fingerprint=self._fingerprint(name),
        )
        load = self._state.begin_load(self._pipeline, load, self._lease)
        self._show(load)
        return load

    def _load_table(self, load: TableLoad) -> None:
        if load.covered_from is None:
            self._pass_log()  # now the connector surely delivers this table's changes
            load = load._replace(
                covered_from=self._reader.log_end(), state="running", started_at=dt.datetime.now(dt.UTC)
            )
            self._save(load)
            log.info("load_started", table=load.table, reason=load.reason)
        estimated = False
        while load.table not in self._reloads:
            table = self._tables().get(load.table)
            if table is None:
                return  # it is gone, and will be loaded from the start when it is back
            if not estimated:
                self._show(load, self._reader.estimated_rows(table))
                estimated = True
            assert load.covered_from is not None
            chunk, claim = self._read_chunk(table, load.after_key, load.covered_from)
            self._pass_log()
            self._write(table, chunk.rows, dump_version(self._epoch, claim))
            if load.table not in self._tables():
                return
            load = load._replace(after_key=chunk.last_key or load.after_key, rows=load.rows + len(chunk.rows))
            if chunk.last_key is None:
                self._finished(load)
                load = load._replace(state="done", finished_at=dt.datetime.now(dt.UTC))
            self._save(load)
            self._show(load)
            if load.state == "done":
                log.info("load_finished", table=load.table, rows=load.rows)
                return

    def _read_chunk(self, table: Table, after: Key | None, covered_from: int) -> tuple[Chunk, int]:
        """Read one chunk in a snapshot that can claim something, however long that takes."""
        waited_s = 0.0
        claim: int | None = None

        def usable(snapshot: Snapshot) -> bool:
            """Make the claim, once: the samples that allow it may be forgotten or thinned out while rows are read."""
            nonlocal claim
            claim = self._samples.claim(snapshot, covered_from)
            return claim is not None

        while True:
            chunk = self._reader.read_chunk(table, after, self._options.chunk_rows, self._options.chunk_bytes, usable)
            if chunk is not None:
                assert claim is not None, "a chunk comes only of a snapshot that was usable"
                self._progress.waits("load", None)
                return chunk, claim
            if waited_s <= WAIT_NOTICE_S < waited_s + CLAIM_POLL_S:
                self._tell_whom_it_waits_for(table)
            waited_s += CLAIM_POLL_S
            self._pause(CLAIM_POLL_S)

    def _tell_whom_it_waits_for(self, table: Table) -> None:
        blockers = self._reader.blockers()
        whom = str(blockers[0]) if blockers else "a transaction that is not visible to this role"
        self._progress.waits("load", f"{table.id} cannot be read before the end of {whom}")
        log.warning("load_waits_for_transaction", table=table.id, blockers=[str(blocker) for blocker in blockers[:5]])

    def _pass_log(self) -> None:
        """Wait until every change that is visible now has come through the log and is in the sinks."""
        lsn = self._reader.heartbeat(self._heartbeat_prefix)
        self._position.sent(lsn)
        while not self._position.wait(lsn, timeout_s=0.5):
            if self._stopping.is_set():
                raise Stopping

    def _write(self, table: Table, rows: Sequence[tuple[Key, Row]], version: int) -> None:
        for start in range(0, len(rows), SLICE_ROWS):
            changes = [Change(table.id, key, version, row) for key, row in rows[start : start + SLICE_ROWS]]
            slice_ = Slice(table.id, changes, Future())
            self._hand_over(slice_)
            while not _ended(slice_.done, timeout_s=0.5):
                self._pause(0)
            slice_.done.result()

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise Stopping

    def _show(self, load: TableLoad, estimate: int | None = None) -> None:
        shown: dict[str, Any] = self._progress.loads.setdefault(load.table, {"estimate": None})
        shown.update(state=load.state, rows=load.rows, reason=load.reason)
        if estimate is not None:
            shown["estimate"] = estimate


class Stopping(Exception):
    """Delta stops: how the load's thread leaves whatever it is in."""


def _ended(future: Future[None], timeout_s: float) -> bool:
    """Wait for a future's end; return whether it came in time."""
    return bool(wait([future], timeout_s).done)
