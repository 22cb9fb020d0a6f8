"""The watch: what is done every so often beside the stream: samples for claims, heartbeats, a look at the tables."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from delta_sync.errors import DeltaError, EpochRose, PipelineStopped, SourceBusy
from delta_sync.logs import logger
from delta_sync.progress import LogPosition, Progress
from delta_sync.samples import SharedSamples
from delta_sync.sources.reader import SourceReader

log = logger(__name__)

SAMPLE_LOADING_S = 0.1  # a load's claims are at most this old, so few rows are read in vain
SAMPLE_RESTING_S = 1.0  # so that a load can start at once even beside a transaction that runs for hours
TABLES_S = 5.0  # how soon a change of a table's columns is noticed when no change event shows it
RETRY_S = 1.0
CHECK_S = 5.0  # how soon it is noticed that the source's name leads to another server, though the old one goes on
ANSWER_S = 30.0  # what the watch asks takes milliseconds; a source that is silent for longer is not there


class Watch(threading.Thread):
    """Takes samples and sends heartbeats until `stopping` is set. `heartbeat_s` is how often; None: others do.

    `schema_changed` is called with the tables whose columns are no longer those of `fingerprints()`. `check` is called
    every so often, to see whether the log still is the one that it was; `failed` with what it raises, once: EpochRose
    or PipelineStopped.
    """

    def __init__(
        self,
        *,
        reader: SourceReader,
        samples: SharedSamples,
        position: LogPosition,
        progress: Progress,
        heartbeat_prefix: str,
        heartbeat_s: float | None,
        loading: Callable[[], bool],
        fingerprints: Callable[[], Mapping[str, str]],
        schema_changed: Callable[[list[str]], None],
        stopping: threading.Event,
        check: Callable[[], object] = lambda: None,
        failed: Callable[[BaseException], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._reader = reader
        self._samples = samples
        self._position = position
        self._progress = progress
        self._heartbeat_prefix = heartbeat_prefix
        self._heartbeat_s = heartbeat_s
        self._loading = loading
        self._fingerprints = fingerprints
        self._schema_changed = schema_changed
        self._stopping = stopping
        self._check = check
        self._failed = failed
        self._clock = clock
        self._missing: set[str] = set()

    def run(self) -> None:
        """Run until Delta stops; a source that does not answer is asked again."""
        due_heartbeat = due_tables = self._clock()
        due_check = due_tables + CHECK_S  # whoever started the watch has just looked
        while not self._stopping.is_set():
            resting_s = SAMPLE_RESTING_S if self._heartbeat_s is None else min(SAMPLE_RESTING_S, self._heartbeat_s)
            pause_s = SAMPLE_LOADING_S if self._loading() else resting_s
            try:
                sample = self._reader.sample()
                self._samples.add(sample)
                now = self._clock()
                if sample.position < (self._progress.insert_lsn or 0):
                    due_check = now  # the log may have begun anew, and what shows it may soon be gone
                self._progress.insert_lsn = sample.position
                if self._heartbeat_s is not None and now >= due_heartbeat:
                    due_heartbeat = now + self._heartbeat_s
                    self._position.sent(self._reader.heartbeat(self._heartbeat_prefix))
                if now >= due_check:
                    due_check = now + CHECK_S
                    self._check()
                if now >= due_tables:
                    due_tables = now + TABLES_S
                    self._look_at_tables()
                self._progress.waits("source", None)
            except SourceBusy as error:
                self._progress.waits("source", str(error))
                log.warning("source_busy", reason=str(error))
                self._samples.forget()  # what answers next may be another server
                pause_s = RETRY_S
            except (EpochRose, PipelineStopped) as error:
                self._failed(error)
                return
            except DeltaError as error:
                log.warning("source_refuses", reason=str(error))
                pause_s = RETRY_S
            self._stopping.wait(pause_s)

    def _look_at_tables(self) -> None:
        known = self._fingerprints()
        current = self._reader.fingerprints(list(known))
        changed = [table for table, fingerprint in current.items() if known[table] != fingerprint]
        missing = known.keys() - current.keys()
        gone = missing - self._missing
        if changed or gone:
            self._schema_changed([*changed, *gone])
        for table in gone:
            log.warning("table_missing", table=table, fix="take it out of pipeline.yaml, or create it again")
        self._missing = missing
