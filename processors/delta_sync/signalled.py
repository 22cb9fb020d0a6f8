"""Dumps of sources that Delta has no client of: Debezium's incremental snapshots, by signal, one after the other.

In the place of `load.Loader`, with the same dumps in the state store: a chunk of a dump is one signal there. Its rows
come through the log, so nothing is read and nothing is claimed here; what is to be known is when all of them are in the
sinks. Whoever plans reads what was signalled and what the connector has said, and so goes on where another one was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection

from delta_sync import signals
from delta_sync.dumping import END_BUDGET_S, LEASE_S, LOOK_S, RETRY_S, Dumper, DumperContext, running
from delta_sync.dumps import ChunkCounts, ChunkLease, Dump, is_over, removes_unmet
from delta_sync.errors import LeaseLost, StateBusy, Transient, UsageError
from delta_sync.kafka.signals import SignalBoard
from delta_sync.logs import logger
from delta_sync.signals import Seen, Wanted
from delta_sync.state import TableLoad
from delta_sync.versions import position_in_topic, version_of

log = logger(__name__)

SIDECAR_LEASE = "sidecar"  # as `delta_debezium.sidecar` calls it; its token is the term
# What a row's last change was sent so short a time before a dump is not removed for not having been met: a database may
# write a change to its log, and so deliver it, some milliseconds before a read sees it.
UNSEEN_MOST_S = 60.0


class SignalledLoader(Dumper):
    """Carries out a pipeline's dumps by signals; what is not said here is Dumper's.

    `names` are the pipeline's tables, and the context's `tables` those of which a record has come; its `position` is
    how far the connector's records have been applied, as its own counts them.
    """

    def __init__(
        self,
        context: DumperContext,
        *,
        names: Collection[str],
        board: SignalBoard,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(context)
        self._names = names
        self._board = board
        self._now = now
        self._current: ChunkLease | None = None

    # ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Carry out dumps until Delta stops. What it cannot mend goes to `failed`."""
        try:
            while not self._stopping.is_set():
                pause_s, looks = LOOK_S, self._looks
                try:
                    self.look()
                    self._progress.waits("load", None)
                except LeaseLost as error:
                    log.info("load_left", reason=str(error))
                    self._current = None
                except Transient as error:
                    log.warning("load_waits", reason=str(error))
                    self._progress.waits("load", str(error))
                    pause_s = RETRY_S
                self._rest(looks, pause_s)
        except BaseException as error:  # noqa: BLE001 -- handed to the worker, which stops with it
            self._failed(error)
        finally:
            self._board.close()
            with contextlib.suppress(StateBusy):  # else its lease expires by itself
                self._dumps.release(self._owner)

    def join(self, timeout: float | None = END_BUDGET_S) -> None:
        """Wait for its end."""
        super().join(timeout)

    def look(self) -> None:
        """Begin, signal and finish dumps, as far as there is something to be done now. Raises Transient, LeaseLost."""
        if not self._plans_here():
            self._current = None
            return
        self._board.read()
        self._begin_loads()
        for dump in self._dumps.all(unfinished=True):
            if dump.state == "pending" and dump.table in self._names:
                self._begin(dump)
        dumps = self._dumps.all(unfinished=True)
        self._show_dumps(dumps)
        if self._current is None:
            busy = self._dump_under_way(dumps)
            self._current = self._dumps.lease(
                self._owner,
                LEASE_S,
                signals.KEYS_MOST,
                lambda dump: self._fits(dump) and (busy is None or dump.id == busy),
                self._last,
            )
        if self._current is not None:
            self._dumps.renew(self._owner, LEASE_S)
            self._go_on(self._current)
        for dump in dumps:
            self._finish(dump)

    # ── beginning ────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_loads(self) -> None:
        loads, with_dump = self._loads(sorted(self._names))
        for load in loads:
            if load.epoch == self._epoch and load.state != "done" and load.table not in with_dump:
                self._begin_load(load)

    def _begin_load(self, load: TableLoad) -> None:
        lease = self._lease()
        if load.covered_from is not None:  # its dump failed: it is begun anew
            load = self._state.begin_load(self._pipeline, load._replace(state="pending", covered_from=None), lease)
        dump = self._as_begun(Dump(table=load.table, kind="load", reason=load.reason), load.fingerprint)
        if dump is None:
            return
        self._dumps.supersede(load.table, f"the table is loaded: {load.reason}", lease)
        load = running(load, dump.covered_from)
        if self._dumps.begin_load(load, dump, lease):
            log.info("load_started", table=load.table, reason=load.reason)

    def _begin(self, dump: Dump) -> None:
        if dump.sinks is not None:
            self._dumps.end(dump.id, "failed", "rows that Debezium reads come to every sink, so one cannot be chosen")
            return
        begun = self._as_begun(dump, self._fingerprint_of(dump.table))
        if begun is not None and self._dumps.begin(begun, self._lease()):
            log.info("dump_started", dump=dump.id, table=dump.table, kind=dump.kind)

    def _as_begun(self, dump: Dump, fingerprint: str) -> Dump | None:
        """Return a dump with what belongs to its beginning; None while no sidecar leads, so that its term is unknown.

        What it meets gets a version above `floor`: of a record that is about to come.
        """
        sidecar = self._state.lease(self._pipeline, SIDECAR_LEASE)
        if sidecar is None:
            return None
        place = self._board.place_at(dump.table, round(1000 * (self._now() - UNSEEN_MOST_S)))
        floor = version_of(self._epoch, position_in_topic(sidecar.token, place))
        covered_from = self._board.end_of(dump.table)
        return dataclasses.replace(
            dump, epoch=self._epoch, fingerprint=fingerprint, covered_from=covered_from, floor=floor
        )

    def _fits(self, dump: Dump) -> bool:
        return dump.epoch == self._epoch and dump.table in self._names

    # ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _go_on(self, chunk: ChunkLease) -> None:
        """Do what is to be done about a chunk now."""
        dump = self._dumps.get(chunk.dump.id)
        running = dump is not None and dump.unfinished
        wanted: Wanted = "stop" if dump is None or not running else "pause" if dump.state == "paused" else "run"
        id_ = signals.signal_id(chunk.dump, chunk.number)
        board = self._board
        heard = board.heard[id_]
        action = signals.decide(Seen(wanted, heard, board.sent_ms[id_], board.connector, chunk.dump.kind == "load"))
        match action:
            case signals.Send(types):
                try:
                    condition = self._condition(chunk)
                except UsageError as error:
                    self._fail(chunk, str(error))
                    return
                board.send(*(signals.signal(one, id_, chunk.dump.table, condition) for one in types))
            case signals.Wait(why):
                if running and (dump is None or dump.waits != why):
                    self._dumps.note(chunk.dump.id, why)
            case signals.Failed(why):
                self._fail(chunk, why)
            case signals.Ended():
                self._current = None
            case signals.Read(number, rows):
                # `number` is of a record; a position is that of the next one.
                if self._position.wait(number + 1, timeout_s=LOOK_S):
                    self._unchanged()
                    self._dumps.note(chunk.dump.id, None)
                    self._dumps.finish_chunk(chunk, rows)
                    self.recorded += 1
                    self._last, self._current = chunk.dump.id, None

    def _condition(self, chunk: ChunkLease) -> str | None:
        if chunk.keys is None:
            return chunk.dump.where
        table = self._tables().get(chunk.dump.table)
        if table is None:
            raise UsageError(f"No record of {chunk.dump.table} has come yet, so its key is not known.")
        return signals.key_condition(table, chunk.keys)

    def _fail(self, chunk: ChunkLease, why: str) -> None:
        """End a dump."""
        log.warning("dump_failed", dump=chunk.dump.id, table=chunk.dump.table, reason=why)
        self._dumps.end(chunk.dump.id, "failed", why)
        self._current = None

    def _dump_under_way(self, dumps: Collection[Dump]) -> int | None:
        """Return the dump in whose snapshot the connector is, begun by whoever planned before; None: in none of ours.

        Nothing else is signalled meanwhile, or what is said of the one would be about the other. A snapshot whose dump
        has ended is stopped: whoever was to do so may have died before.
        """
        connector = self._board.connector
        if connector is None or not (connector.snapshot or "").startswith(signals.PREFIX):
            return None
        id_ = connector.snapshot or ""
        dump = next((one for one in dumps if id_.startswith(f"{signals.PREFIX}{one.id}.")), None)
        if dump is not None:
            return dump.id  # its chunk may be a dead process's yet, until the lease expires
        sent_ms = self._board.sent_ms[id_].get("stop-snapshot", 0)
        if connector.timestamp_ms > sent_ms + signals.RESEND_MS:
            types: tuple[signals.SignalType, ...] = ("stop-snapshot", "resume-snapshot")
            self._board.send(*(signals.signal(one, id_, None) for one in types))
        return None

    def _finish(self, dump: Dump) -> None:
        """Plan the one chunk of a dump, or finish a dump of which nothing is left."""
        if dump.state != "running" or not self._fits(dump):
            return
        if not dump.planned:
            self._dumps.plan(dump.id, [(None, None)], self._lease())
            self.wake()
            return
        now = self._dumps.get(dump.id)
        counts = self._dumps.counts().get(dump.id, ChunkCounts())
        if now is None or not is_over(now, counts):
            return
        if removes_unmet(now) and now.table in self._tables():
            self._finished(now)
        self._end(now)
