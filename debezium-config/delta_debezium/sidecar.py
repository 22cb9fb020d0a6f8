"""The sidecar of the Kafka transport: of several one leads, prepares the source and runs Debezium Server.

The lease says who leads; the replication slot, which has one reader at a time, makes sure that two connectors never
write at once. A leader that was killed is followed when its lease has expired. One that is frozen or cut off stops
believing in its lease before that; whatever of it goes on holds the slot at most until the next leader, who ends the
connection that reads it, and starts a connector of its own behind what was confirmed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from delta_debezium import supervision
from delta_debezium.distribution import Distribution
from delta_debezium.render import server_environment, server_properties
from delta_debezium.server import DebeziumServer
from delta_sync.capture import CaptureDied
from delta_sync.errors import EpochRose, LeaseLost, Transient
from delta_sync.kafka.delivered import delivered_of
from delta_sync.leases import LeaseKeeper
from delta_sync.logs import logger
from delta_sync.pipeline import Pipeline, load_processor
from delta_sync.progress import LogPosition, Progress
from delta_sync.samples import SharedSamples
from delta_sync.secrets import redact, resolve
from delta_sync.sinks import AnySink, open_sinks
from delta_sync.sources import open_reader
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.starting import Source, check_slot, prepare_signalled, prepare_source
from delta_sync.state import Lease, StateStore
from delta_sync.tables import Table
from delta_sync.watch import ANSWER_S, Watch

log = logger(__name__)

LEASE = "sidecar"
LEASE_S = 5.0  # with the time that a connector takes to start, the next leader's first event comes within 15 s
LOOK_S = 0.5  # between looks at the server, the slot and the lease
RETRY_S = 1.0
STOP_BUDGET_S = 10.0  # for a server to end by itself, and for threads
FOLDER = "debezium-server"  # in the pipeline's folder, or where `--work-dir` says
T = TypeVar("T")


class Sidecar:
    """One sidecar. `run` blocks until `stop` is called, or raises why the pipeline had to stop.

    `new_slot` accepts that changes may have been lost, `reload` has every table loaded again: once, when it leads.
    """

    def __init__(
        self,
        *,
        folder: Path,
        work_dir: Path,
        spec: PipelineSpec,
        member: str,
        distribution: Distribution,
        new_slot: bool = False,
        reload: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._member = member
        self._new_slot = new_slot
        self._reload = reload
        self._clock = clock
        self._stopping = threading.Event()
        self._server = DebeziumServer(work_dir, distribution)
        self._properties = ""  # of the server that was started last
        self._delivered = delivered_of(spec)
        self.position = LogPosition(clock)
        self.progress = Progress(self.position, clock)

    def stop(self) -> None:
        """End the server and return from `run`."""
        self._stopping.set()

    def run(self) -> None:
        """Stand by until the lease is free, then lead. Raises PipelineStopped, UsageError or CheckFailed."""
        spec = self._spec
        pipeline = load_processor(self._folder, spec)
        sinks = open_sinks(spec)
        opened = self._until_done(lambda: StateStore.open(spec.state, self._folder), lambda: True)
        if opened is None:
            return
        with opened as state:
            keeper = LeaseKeeper(state, spec.name, LEASE, self._member, LEASE_S, on_lost=self._lost)
            try:
                with keeper:
                    while not self._stopping.is_set():
                        lease = keeper.wait(LOOK_S)
                        self.progress.standby = lease is None
                        self._save_status(state, "leading" if lease else "standby")
                        if lease is None:
                            continue
                        log.info("leading", member=self._member, token=lease.token)
                        try:
                            self._lead(keeper, lease, pipeline, sinks, state)
                        except LeaseLost as error:
                            log.warning("not_leading", reason=str(error))
                        except EpochRose as error:
                            log.warning("leading_begins_anew", reason=str(error))
                            self._server.kill()  # what it reads now belongs to no epoch
                        finally:
                            self._server.stop(STOP_BUDGET_S if keeper.holds(lease) else 0.0)
                self.progress.end("stopped", "it was asked to stop")
            except BaseException as error:
                self.progress.end("failed", redact(str(error)) or type(error).__name__)
                raise
            finally:
                self._server.kill()
                self._save_status(state, "stopped")
                for sink in sinks.values():
                    sink.close()

    def _lost(self, _lease: Lease) -> None:
        """End the server before another may lead. Our own thread may be waiting for the state store, or the source."""
        if self._server.alive:
            log.warning("connector_killed", reason="The lease is no longer this sidecar's.")
            self._server.kill()

    def _lead(
        self, keeper: LeaseKeeper, lease: Lease, pipeline: Pipeline, sinks: Mapping[str, AnySink], state: StateStore
    ) -> None:
        """Prepare the source and run the server, until Delta stops or the lease is lost.

        Raises EpochRose when a new epoch has to begin: lead anew.
        """
        spec = self._spec
        reader, watch_reader, check_reader = (
            open_reader(spec, f"delta {spec.name} {use}", ANSWER_S, pipeline.documents)
            for use in ("sidecar", "watch", "check")
        )
        self.position.forget()  # what it passed when it led before says nothing of the connector that it starts now
        self.progress.bytes_between = watch_reader.bytes_between

        def prepare() -> Source:
            anew = {"new_slot": self._new_slot, "reload": self._reload}
            if spec.source.kind == "debezium":
                found = prepare_signalled(spec, pipeline, reader, state, sinks, **anew, lease=lease)
            else:
                found = prepare_source(
                    spec, pipeline, reader, state, sinks, **anew, lease=lease, delivered=self._delivered
                )
            self._new_slot = self._reload = False
            return found

        def check() -> None:
            known = check_slot(spec, check_reader, state).known
            if known is not None and known.epoch > source_epoch:
                raise EpochRose("A worker has found out that a new epoch has to begin.")

        source = self._until_done(prepare, lambda: keeper.holds(lease))
        if source is None:
            return
        source_epoch = source.epoch
        leading = threading.Event()  # set when it is over
        tables = dict(source.tables)
        columns = dict(source.columns)
        changed = threading.Event()
        failures: list[BaseException] = []

        def schema_changed(names: Iterable[str]) -> None:
            log.warning("schema_changed", tables=sorted(names))
            changed.set()

        watch = Watch(
            reader=watch_reader,
            samples=SharedSamples(watch_reader.new_samples),
            position=self.position,
            progress=self.progress,
            heartbeat_prefix=self._spec.heartbeat_prefix,
            heartbeat_s=self._spec.source.heartbeat,
            loading=lambda: False,
            fingerprints=lambda: columns,
            schema_changed=schema_changed,
            stopping=leading,
            check=check,
            failed=failures.append,
        )
        watch.start()
        try:
            self._supervise(keeper, lease, source.epoch, tables, columns, changed, failures, reader, state)
        finally:
            leading.set()
            for one in (watch_reader, check_reader):
                one.abort()
            watch.join(STOP_BUDGET_S)
            for one in (watch_reader, check_reader, reader):
                one.close()

    def _supervise(
        self,
        keeper: LeaseKeeper,
        lease: Lease,
        epoch: int,
        tables: dict[str, Table],
        columns: dict[str, str],
        changed: threading.Event,
        failed: list[BaseException],
        reader: SourceReader,
        state: StateStore,
    ) -> None:
        """Do what `supervision.decide` says, until Delta stops or the lease is lost."""
        alive_since = ended_at = confirmed_at = None
        failures = beat = 0
        while not self._stopping.is_set():
            if failed:
                raise failed[0]
            now = self._clock()
            if alive_since is not None and not self._server.alive:
                why = self._server.last_words()
                log.warning("connector_died", reason=why)
                self.progress.waits("connector", redact(why))
                self.progress.capture_restarts += 1
                failures = 0 if confirmed_at is not None and confirmed_at > alive_since else failures + 1
                alive_since, ended_at = None, now
            try:
                if changed.is_set():
                    changed.clear()
                    self._take_over_columns(epoch, lease.token, reader, tables, columns, state)
                found = reader.capture_position(self._spec, state).look()
                if found is not None and found.position is not None and found.beat > beat:
                    if beat == 0:
                        self._note_position(state, found.position, lease)
                    beat, confirmed_at = found.beat, now
                    if alive_since is not None:  # else it was another's doing
                        self.position.advance(found.position)
            except Transient as error:
                self.progress.waits("source", redact(str(error)))
            held = keeper.holds(lease)
            action = supervision.decide(
                supervision.Situation(
                    now, now + LOOK_S if held else None, alive_since, ended_at, confirmed_at, failures
                )
            )
            match action:
                case supervision.StandBy():
                    return
                case supervision.Start():
                    try:
                        if not self._start(lease, lambda: keeper.holds(lease), epoch, tables, reader, state):
                            return
                        alive_since = self._clock()
                    except (Transient, CaptureDied) as error:
                        self.progress.waits("connector", redact(str(error)))
                        failures, ended_at = failures + 1, self._clock()
                case supervision.Kill(why):
                    log.warning("connector_killed", reason=why)
                    self._server.kill()
                case supervision.Wait():
                    pass
                case supervision.Run():
                    self.progress.waits("connector", None)
            self._server.bound_log()
            self._save_status(state, "leading")
            self._stopping.wait(LOOK_S)

    def _start(
        self,
        lease: Lease,
        leads: Callable[[], bool],
        epoch: int,
        tables: Mapping[str, Table],
        reader: SourceReader,
        state: StateStore,
    ) -> bool:
        """Start the server behind what is confirmed, in place of whoever reads the slot; return whether that was done.

        Not if it `leads` no longer: the state store or the source may have taken any time to answer.
        """
        spec = self._spec
        reader.close()  # the source's name may lead to another server by now
        if not leads():
            return False
        reader.capture_position(spec, state).free()  # first, so that the slot does not move while it is looked at
        seen = check_slot(spec, reader, state, self._delivered)
        assert seen.known is not None, "it was saved when this sidecar began to lead"
        if seen.there is not None:  # until this server has delivered something, Kafka does not tell how far it may be
            state.save_pipeline(seen.known._replace(slot_lsn=seen.there.position), lease)
        if not leads():
            return False
        self._properties = server_properties(spec, tables, epoch, lease.token)
        self._server.start(self._properties, server_environment(spec, tables, epoch, resolve))
        if not leads():  # `_lost` may have come before there was anything to end
            self._server.kill()
            return False
        log.info("connector_started", pid=self._server.pid)
        return True

    def _note_position(self, state: StateStore, position: int, lease: Lease) -> None:
        """Save that there is a position: from now on its absence is a loss. Where Delta makes it, that is saved."""
        known = state.pipeline(self._spec.name)
        if known is not None and known.slot_lsn is None:
            state.save_pipeline(known._replace(slot_lsn=position), lease)

    def _take_over_columns(
        self,
        epoch: int,
        term: int,
        reader: SourceReader,
        tables: dict[str, Table],
        columns: dict[str, str],
        state: StateStore,
    ) -> None:
        """Publish the tables as they are now; a connector that has to be configured anew ends."""
        current = reader.fingerprints(list(self._spec.tables))
        found = reader.tables([name for name in current if current[name] != columns.get(name)])
        for name, table in found.items():
            tables[name] = table
            columns[name] = current[name]
        place = reader.capture_position(self._spec, state)
        place.publish([tables[name] for name in self._spec.tables if name in current])
        if found and server_properties(self._spec, tables, epoch, term) != self._properties:
            self._server.kill()

    def _until_done(self, call: Callable[[], T], goes_on: Callable[[], bool]) -> T | None:
        while goes_on() and not self._stopping.is_set():
            try:
                found = call()
            except Transient as error:
                self.progress.waits("start", redact(str(error)))
                log.warning("start_waits", reason=redact(str(error)))
                self._stopping.wait(RETRY_S)
            else:
                self.progress.waits("start", None)
                return found
        return None

    def _save_status(self, state: StateStore, role: str) -> None:
        document: dict[str, Any] = {**self.progress.document(), "role": "sidecar", "sidecar": role}
        try:
            state.save_member(self._spec.name, self._member, document)
            self.progress.waits("state store", None)
        except Transient as error:
            self.progress.waits("state store", redact(str(error)))  # without it nobody takes over
            log.warning("status_not_saved", reason=redact(str(error)))
