"""Documents are enriched again: those that notices are about, and all of them before their answers are too old.

`Refresher` looks for the rows of pending notices (`refreshing`), and has them dumped by their keys. And it begins
rounds: dumps of whole tables, at a rate that holds what their look-ups' `refresh_after` promises. When the last round
of a table began is known by its dump, so a restart changes nothing.

*The promise.* Let W be `refresh_after` without the time that an answer may have been in the cache. A round begins 3/4 W
after the one before it has, and ends within 1/4 W. A row is enriched once in each, so at most W apart.
"""

from __future__ import annotations

import datetime as dt
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from delta_sync.changes import Key
from delta_sync.dumps import Dump
from delta_sync.errors import Transient, UsageError
from delta_sync.leases import LeaseKeeper
from delta_sync.logs import logger
from delta_sync.pipeline import Pipeline
from delta_sync.refreshing import ROWS_MOST, Notice, NoticeStore, RowFinder, dump_of, wanted_of
from delta_sync.sources.reader import SourceReader
from delta_sync.state import StateStore, TableLoad, now_of
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Table
from delta_sync.used_keys import UsedKeyStore, kept_of
from delta_sync.values import scalar_text

log = logger(__name__)

LOOK_S = 1.0  # between looks for notices that are due, and for rounds
LASTS = 0.25  # of W: a round. Shorter rounds are begun later, so the service is asked less; longer ones ask it calmly
PACED = 0.5  # of that: by then a round would end if its rate was right; then it goes on as fast as it can


class Round(NamedTuple):
    """How a table is enriched again: the look-up whose answers age soonest, and its W in seconds."""

    lookup: str
    within_s: float


class Standing(NamedTuple):
    """How far a table's rounds are: when the last one began, and that which is under way."""

    began: dt.datetime
    under_way: Dump | None
    oldest: dt.datetime  # since then, every document has been enriched


Step = Literal["begin", "hurry", "late"]


def rounds_of(pipeline: Pipeline) -> dict[str, Round]:
    """Return which tables are to be enriched again by themselves. Pure."""
    found: dict[str, Round] = {}
    for table, processor in pipeline.tables.items():
        aging = [
            Round(lookup.name, lookup.rounds_s)
            for lookup, _ in processor.enrich.values()
            if lookup.rounds_s is not None
        ]
        if aging:
            found[table] = min(aging, key=lambda one: one.within_s)
    return found


def standing_of(table: str, load: TableLoad | None, dumps: Iterable[Dump]) -> Standing | None:
    """Return how far a table's rounds are; None before its load is done, which enriches every row. Pure.

    A round that somebody cancelled counts as one: it is not begun again behind their back.
    """
    if load is None or load.state != "done" or load.started_at is None:
        return None
    rounds = [dump for dump in dumps if dump.kind == "refresh" and dump.table == table and dump.created_at is not None]
    begun = [dump.created_at for dump in rounds if dump.created_at is not None]
    done = [dump.created_at for dump in rounds if dump.created_at is not None and dump.state == "done"]
    under_way = next((dump for dump in rounds if dump.unfinished), None)
    return Standing(max([load.started_at, *begun]), under_way, max([load.started_at, *done]))


def step_of(of: Round, at: Standing, now: dt.datetime) -> Step | None:
    """Return what is to be done about a table's rounds at this moment. Pure."""
    since_s = (now - at.began).total_seconds()
    lasts_s = LASTS * of.within_s
    if at.under_way is None:
        return "begin" if since_s >= of.within_s - lasts_s else None
    if at.under_way.state == "paused":
        return None  # by a person
    if since_s > lasts_s:
        return "late"
    return "hurry" if at.under_way.rows_per_s is not None and since_s > PACED * lasts_s else None


def rate_of(of: Round, rows: int) -> int:
    """Return how many rows of a table a round reads in a second. Pure."""
    return max(1, math.ceil(rows / (PACED * LASTS * of.within_s)))


class Refresher(threading.Thread):
    """Does both for a pipeline, in the process that plans dumps: `keeper` has its lease (None: there is but one)."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        state: StateStore,
        reader: SourceReader,
        tables: Callable[[], Mapping[str, Table]],
        ages: Callable[[Mapping[str, float]], None],
        stopping: threading.Event,
        keeper: LeaseKeeper | None = None,
    ) -> None:
        super().__init__(name="refresher", daemon=True)
        self._pipeline = pipeline
        self._state = state
        self._notices = NoticeStore(state, pipeline.name)
        self._dumps = DumpStore(state, pipeline.name)
        self._reader = reader
        self._tables = tables
        self._ages = ages
        self._stopping = stopping
        self._keeper = keeper
        self._rounds = rounds_of(pipeline)
        self._used = UsedKeyStore(state, pipeline.name)
        self._incomplete = bool(kept_of(pipeline))  # dumps that complete them are forgotten in time
        self._late: set[int] = set()  # rounds of which that was said

    def run(self) -> None:
        """Look every so often, until Delta stops."""
        said = False
        while self._pipeline.lookups and not self._stopping.wait(LOOK_S):
            try:
                self.look()
                said = False
            except Transient as error:
                if not said and not self._stopping.is_set():
                    log.warning("refresh_waits", reason=str(error))
                said = True
            except Exception as error:  # a defect here must not stop the stream
                log.error("refresh_failed", reason=str(error), exc_info=True)

    def look(self) -> None:
        """Have the rows of due notices dumped, and begin the rounds that are due. Raises StateBusy, SourceBusy."""
        if self._keeper is not None and not self._keeper.held:
            self._ages({})
            return
        due = self._notices.due()
        for lookup in dict.fromkeys(notice.lookup for notice in due):
            self._heed(lookup, [notice for notice in due if notice.lookup == lookup])
        if self._rounds:
            self._turn()
        if self._incomplete:
            self._used.settle(self._dumps.all())
            self._incomplete = not all(one.complete for one in self._used.keepings().values())

    def _heed(self, lookup: str, notices: list[Notice]) -> None:
        """Have the rows of one look-up's notices dumped. One that died before it recorded that is done once more."""
        texts = [scalar_text(key) for key in dict.fromkeys(key for notice in notices for key in notice.keys)]
        refused: list[str] = []
        found = self._rows_of(lookup, self._tables(), texts, refused)
        if refused:  # or processor or tables have become others since they were taken
            log.warning("notices_dropped", lookup=lookup, keys=len(refused), reason=refused[-1])
        ids: list[int] = []
        for table, keys in found.items():
            dump = dump_of(lookup, table, keys)
            if dump is not None:
                ids.append(self._dumps.add(dump, keys or ()))
        self._notices.settle([notice.id for notice in notices])
        log.info("notices_heeded", lookup=lookup, notices=len(notices), keys=len(texts), dumps=ids)

    def _rows_of(
        self, lookup: str, tables: Mapping[str, Table], texts: list[str], refused: list[str]
    ) -> dict[str, list[Key] | None]:
        """Return the keys of the rows that used a look-up's keys, by table; None: of too many. `refused` gets reasons.

        A key that a column cannot have (no member of an enumeration, …) must not cost those that came with it, so they
        are halved until it is alone.
        """
        try:
            wanted = wanted_of(self._pipeline, tables, lookup, texts)
            return RowFinder(self._reader, self._state, self._pipeline).find(tables, lookup, wanted, ROWS_MOST)
        except UsageError as error:
            if len(texts) <= 1:
                refused.append(str(error))
                return {}
        middle = len(texts) // 2
        found = self._rows_of(lookup, tables, texts[:middle], refused)
        for table, keys in self._rows_of(lookup, tables, texts[middle:], refused).items():
            before = found.get(table, [])
            both = None if before is None or keys is None else list(dict.fromkeys([*before, *keys]))
            found[table] = None if both is None or len(both) > ROWS_MOST else both
        return found

    def _turn(self) -> None:
        """Begin, hasten or complain about each table's round."""
        with self._state.transaction() as connection:
            now = now_of(connection)
        loads, dumps = self._state.loads(self._pipeline.name), self._dumps.all()
        tables, ages = self._tables(), dict[str, float]()
        for name, of in self._rounds.items():
            at = standing_of(name, loads.get(name), dumps)
            if at is None or name not in tables:
                continue
            ages[name] = max(0.0, (now - at.oldest).total_seconds())
            step = step_of(of, at, now)
            if step == "begin":
                rate = rate_of(of, self._reader.estimated_rows(tables[name]) or 0)
                reason = f"refresh_after of look-up {of.lookup}"
                self._dumps.add(Dump(table=name, kind="refresh", rows_per_s=rate, reason=reason))
            elif step is not None:
                self._hasten(of, at)
                if step == "late":
                    self._complain(name, of, at)
        self._ages(ages)

    def _hasten(self, of: Round, at: Standing) -> None:
        assert at.under_way is not None, "there is one to hasten"
        if at.under_way.rows_per_s is not None:
            log.info("refresh_hurries", dump=at.under_way.id, table=at.under_way.table, lookup=of.lookup)
            try:
                self._dumps.order(at.under_way.id, "throttle", rows_per_s=None)
            except UsageError:
                return  # it has ended meanwhile

    def _complain(self, table: str, of: Round, at: Standing) -> None:
        assert at.under_way is not None, "there is one that is late"
        if at.under_way.id not in self._late:
            self._late.add(at.under_way.id)
            fix = "give the look-up a longer refresh_after, or its service and the sinks more capacity"
            log.warning("refresh_late", table=table, lookup=of.lookup, dump=at.under_way.id, fix=fix)
