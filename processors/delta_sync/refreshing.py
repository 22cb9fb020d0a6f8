"""What a look-up returned has changed: caches drop it, and the documents that used it are written anew.

Whoever says so (`deltactl refresh`, or a notice that `notices` has taken) leaves a notice in the state store, with the
keys. Every process that asks look-ups sees it within
LOOK_S and drops these keys from its cache; one that has not been able to look for TRUSTED_S uses no cached answer. So,
NOTICED_S after a notice is there, no process answers with what was cached before it, however many there are. Only then
the rows with these keys are looked for, in the source or among the keys that are kept (`used_keys`), and read anew by a
dump of their keys:

- a row that had such a key by then is in the dump, whose versions beat all that was written with an older answer;
- one that gets such a key later comes through the log later, and is enriched with an answer that was asked for later.
"""

from __future__ import annotations

import datetime as dt
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from delta_sync.changes import Key
from delta_sync.delta_event import decode_key, encode_key
from delta_sync.dumps import Dump, value_from_text
from delta_sync.errors import NoticesWait, Transient, UsageError
from delta_sync.logs import logger
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import KeyFunction, Pipeline
from delta_sync.sources.reader import SourceReader
from delta_sync.state import StateStore, now_of
from delta_sync.state_dumps import DumpStore
from delta_sync.state_tables import NOTICES
from delta_sync.tables import Kind, Table
from delta_sync.used_keys import UsedKeyStore

log = logger(__name__)

LOOK_S = 1.0  # between looks for notices: one small query of each process
TRUSTED_S = 3.0  # since a look began: some may take long, or fail, before caches are of no use
NOTICED_S = TRUSTED_S + 0.5  # clocks of two machines do not run equally fast
KEPT_S = 3600.0  # a notice; a process that did not look for half of that drops all that it has
KEYS_MOST = 100_000  # in one notice, which every process reads as a whole; as many as a cache has by default
ROWS_MOST = 100_000  # found for one notice: above, their keys cost more than reading the whole table does
_NUMBER = re.compile(r"0|-?[1-9]\d{0,30}")  # as Python writes it: another spelling is a text
PENDING_MOST = 1000  # notices whose rows were not looked for yet: then whoever sends them has to wait

Wanted = Mapping[tuple[str, "str | KeyFunction"], Sequence[Any]]  # values, by table and by the column or function


class Notice(NamedTuple):
    """What was said to have changed: a look-up's answers for these keys."""

    id: int
    lookup: str
    keys: tuple[Any, ...]


class NoticeStore:
    """A pipeline's notices in the state store. Safe to use from any number of threads and processes at once."""

    def __init__(self, state: StateStore, pipeline: str) -> None:
        self._state = state
        self._pipeline = pipeline

    def add(self, lookup: str, keys: Sequence[Any], *, pending: bool = False) -> int:
        """Leave a notice; return its id. Those that every process has seen long since are forgotten.

        `pending`: the pipeline is to look for the rows; else whoever leaves it does. Raises NoticesWait when too many
        are pending.
        """
        with self._state.transaction(write=True) as connection:
            now = now_of(connection)
            own = NOTICES.c.pipeline == self._pipeline
            old = NOTICES.c.created_at < now - dt.timedelta(seconds=KEPT_S)
            connection.execute(sa.delete(NOTICES).where(own, old, NOTICES.c.pending == 0))
            waiting = sa.select(sa.func.count()).select_from(NOTICES).where(own, NOTICES.c.pending == 1)
            if pending and (connection.scalar(waiting) or 0) >= PENDING_MOST:
                raise NoticesWait(f"{PENDING_MOST:,} notices wait for their rows to be looked for.")
            result = connection.execute(
                sa.insert(NOTICES).values(
                    pipeline=self._pipeline,
                    lookup=lookup,
                    notice_keys=encode_key(tuple(keys)),  # as one key: ten times as fast as each by itself
                    created_at=now,
                    pending=int(pending),
                )
            )
            (id_,) = result.inserted_primary_key or (0,)
        return int(id_)

    def ids(self) -> frozenset[int]:
        """Return the ids of those that are there. They need not become visible in their order."""
        with self._state.transaction() as connection:
            query = sa.select(NOTICES.c.id).where(NOTICES.c.pipeline == self._pipeline)
            return frozenset(connection.execute(query).scalars())

    def due(self) -> list[Notice]:
        """Return pending notices of which no process answers from its cache any more, the oldest first.

        Some of them, with KEYS_MOST keys in all, about.
        """
        with self._state.transaction() as connection:
            heeded = NOTICES.c.created_at <= now_of(connection) - dt.timedelta(seconds=NOTICED_S)
            query = sa.select(NOTICES.c.id).where(NOTICES.c.pipeline == self._pipeline, NOTICES.c.pending == 1, heeded)
            ids = connection.execute(query.order_by(NOTICES.c.id)).scalars().all()
        found: list[Notice] = []
        for id_ in ids:
            found += self.get([id_])
            if sum(len(notice.keys) for notice in found) >= KEYS_MOST:
                break
        return found

    def settle(self, ids: Collection[int]) -> None:
        """Record that the rows of these notices are in dumps, or that there are none."""
        with self._state.transaction(write=True) as connection:
            mine = (NOTICES.c.pipeline == self._pipeline, NOTICES.c.id.in_(ids))
            connection.execute(sa.update(NOTICES).where(*mine).values(pending=0))

    def get(self, ids: Collection[int]) -> list[Notice]:
        """Return notices; one that is gone is left out."""
        found: list[Notice] = []
        for id_ in sorted(ids):
            query = sa.select(NOTICES).where(NOTICES.c.pipeline == self._pipeline, NOTICES.c.id == id_)
            with self._state.transaction() as connection:
                row = connection.execute(query).one_or_none()
            if row is not None:
                found.append(Notice(row.id, row.lookup, decode_key(row.notice_keys)))
        return found


class NoticeReader(threading.Thread):
    """Drops from this process's caches what notices are about. The callers use them only while it can look."""

    def __init__(
        self,
        store: NoticeStore,
        lookups: Mapping[str, LookupCaller],
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="notices", daemon=True)
        self._store = store
        self._lookups = lookups
        self._stopping = stopping
        self._clock = clock
        self._seen: frozenset[int] = frozenset()
        self._looked_s: float | None = None  # when the last look that succeeded began
        for caller in lookups.values():
            caller.heed(self.trusted)

    def trusted(self) -> bool:
        """Tell whether a cached answer may be used: no notice that was there TRUSTED_S ago is unheeded."""
        return self._looked_s is not None and self._clock() - self._looked_s < TRUSTED_S

    def run(self) -> None:
        """Look every so often, until Delta stops."""
        said = False
        while self._lookups:
            try:
                self.look()
                said = False
            except Transient as error:
                if not said:
                    log.warning("notices_wait", reason=str(error))
                said = True
            except Exception as error:  # a defect here must not stop the stream: caches are not used, which is right
                log.error("notices_failed", reason=str(error), exc_info=True)
            if self._stopping.wait(LOOK_S):
                return

    def look(self) -> None:
        """Heed the notices that are new. One step of `run`. Raises StateBusy."""
        began_s = self._clock()
        ids = self._store.ids()
        if self._looked_s is not None and began_s - self._looked_s > KEPT_S / 2:
            for caller in self._lookups.values():
                caller.forget(None)
        for notice in self._store.get(ids - self._seen):
            if notice.lookup in self._lookups:
                self._lookups[notice.lookup].forget(notice.keys)
                log.info("lookup_forgets", lookup=notice.lookup, keys=len(notice.keys))
        self._seen, self._looked_s = ids, began_s


# ── whose documents they are ─────────────────────────────────────────────────────────────────────────────────────


def asked_by(pipeline: Pipeline, lookup: str) -> dict[str, list[str | KeyFunction]]:
    """Return by which columns, and functions of their rows, tables ask a look-up.

    Raises UsageError: it is not there, nobody asks it, or rows cannot be found by its keys.
    """
    if lookup not in pipeline.lookups:
        are = f"it has {', '.join(pipeline.lookups)}" if pipeline.lookups else "it has none"
        raise UsageError(f"--lookup: pipeline {pipeline.name} has no look-up {lookup!r}; {are}.")
    found: dict[str, list[str | KeyFunction]] = {}
    for processor in pipeline.functions():
        ways = [way for asked, way in processor.enrich.values() if asked.name == lookup]
        if ways:
            found[processor.table] = list(dict.fromkeys(ways))
    if not found:
        raise UsageError(f"No table is enriched by look-up {lookup}, so there is nothing to refresh.")
    for table, ways in found.items():
        if pipeline.lookups[lookup].keys == "derived" and not all(isinstance(way, str) for way in ways):
            raise UsageError(
                f"{table} asks look-up {lookup} by a function of its rows, so the source cannot find them by its keys;"
                f' declare it with keys="kept", or use `deltactl dump`.'
            )
    return found


def typed(table: Table, way: str | KeyFunction, texts: Iterable[str]) -> list[Any]:
    """Return keys of a look-up as the rows of a table have them, each once. Raises UsageError.

    A function of a row may return a number, or the text itself.
    """
    if not isinstance(way, str):
        numbers = [(text, int(text)) if _NUMBER.fullmatch(text) else (text,) for text in texts]
        return list(dict.fromkeys(key for some in numbers for key in some))
    of = table.column(way)
    if of.mask is not None:
        raise UsageError(
            f"Look-up keys of {table.id}.{way} are masked, so its rows cannot be found by them; use `deltactl dump`."
        )
    if of.kind is Kind.INTERVAL:  # lists and JSON values ask no look-up at all
        raise UsageError(
            f"Rows cannot be found by {table.id}.{way}, of type {of.type}; refresh them with `deltactl dump`."
        )
    found: dict[Any, None] = {}
    for text in texts:
        try:
            found[value_from_text(of, text)] = None
        except (ValueError, ArithmeticError) as error:
            raise UsageError(f"{text!r} is no value of {table.id}.{way} ({of.type}).") from error
    return list(found)


def wanted_of(pipeline: Pipeline, tables: Mapping[str, Table], lookup: str, texts: Sequence[str]) -> Wanted:
    """Return which values a look-up's keys are in a table's rows, by table and by what asks it. Raises UsageError."""
    return {
        (table, way): typed(tables[table], way, texts)
        for table, some in asked_by(pipeline, lookup).items()
        if table in tables
        for way in some
    }


def keys_of(wanted: Wanted) -> list[Any]:
    """Return the keys of a look-up, each once."""
    return list(dict.fromkeys(key for some in wanted.values() for key in some))


class RowFinder(NamedTuple):
    """Finds the rows that used a look-up's keys: in the source, or by what is kept of them."""

    reader: SourceReader
    state: StateStore
    pipeline: Pipeline

    def find(
        self, tables: Mapping[str, Table], lookup: str, wanted: Wanted, most: int | None = None
    ) -> dict[str, list[Key] | None]:
        """Return the keys of these rows, by table, each once; None: more than `most` have, or nobody knows which.

        Of those that are kept there are never more than ROWS_MOST, so that memory is bounded.
        """
        if self.pipeline.lookups[lookup].keys == "derived":
            return self._rows_having(tables, wanted, most)
        used = UsedKeyStore(self.state, self.pipeline.name)
        keepings = used.settle(DumpStore(self.state, self.pipeline.name).all())
        found: dict[str, list[Key] | None] = {}
        for name in dict.fromkeys(name for name, _ in wanted):
            keeping = keepings.get((name, lookup))
            keys = dict.fromkeys(key for (of, _), some in wanted.items() if of == name for key in some)
            known = keeping is not None and keeping.complete
            found[name] = used.rows(tables[name], lookup, keys, most or ROWS_MOST) if known else None
        return found

    def _rows_having(
        self, tables: Mapping[str, Table], wanted: Wanted, most: int | None
    ) -> dict[str, list[Key] | None]:
        found: dict[str, dict[Key, None] | None] = {}
        for (table, column), values in wanted.items():
            before = found.setdefault(table, {})
            if before is None:
                continue
            assert isinstance(column, str), "who asks by a function was refused"
            before.update(dict.fromkeys(self.reader.keys_having(tables[table], column, values, most)))
            if most is not None and len(before) > most:
                found[table] = None
        return {table: None if some is None else list(some) for table, some in found.items()}


def dump_of(lookup: str, table: str, keys: Sequence[Key] | None) -> Dump | None:
    """Return the dump that enriches these rows of a table again (None: all); None when there are none. Pure."""
    reason = f"look-up {lookup} answers otherwise"
    if keys is None:
        return Dump(table=table, kind="refresh", reason=reason)
    return Dump(table=table, kind="keys", reason=reason) if keys else None
