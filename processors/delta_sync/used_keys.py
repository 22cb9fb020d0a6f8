"""By which keys of look-ups rows were enriched, kept in the state store: for look-ups with `keys="kept"`.

It is noted before a look-up is asked or its cache used, so before any sink has the document. Hence, once nobody
answers any more with what was cached before a notice (`refreshing`), every row whose document has an older answer, or
may get one yet, is found by its key.

Of each row, look-up and argument of the processor there is one note, with the version of the change that used the key:

- a newer one replaces it, with another key or with none, without that anybody reads it;
- an older one, however late it is written, does not: it is not what the document was made with last. Where the newer
  one left no note, because the row is gone or has no key, there is one too many then. It costs a read, at most: a
  refresh of that key finds no such row, and that removes the note.

Rows that were enriched before notes were kept have none. So it is known since when they are (`Keeping`), and whether
every row has been enriched since; until it has, all of them are read for a notice.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from delta_sync.changes import Key
from delta_sync.dumps import Dump
from delta_sync.pipeline import Pipeline
from delta_sync.processing import Asked
from delta_sync.state import IDS_PER_STATEMENT, StateStore, now_of
from delta_sync.state_database import upsert
from delta_sync.state_tables import KEEPINGS, USED_KEYS
from delta_sync.tables import Table, key_of_text, key_text
from delta_sync.values import scalar_text

DELETED_AT_ONCE = 10_000  # rows: a transaction of some tenths of a second, for which others may have to wait
Asking = tuple[str, str]  # a table, and a look-up that its rows ask


class Uses(NamedTuple):
    """Which keys a table's rows use, as an argument of its processor: key and version of each, and the look-up's key.

    None: no key. `gone` are rows that are no more.
    """

    table: str
    lookup: str
    slot: int
    rows: Sequence[tuple[Key, int, Any]]
    gone: Sequence[tuple[Key, int]]


class Keeping(NamedTuple):
    """Since when (by the database's clock) it is kept which keys rows used; `complete`: of every row there is."""

    id: int
    table: str
    lookup: str
    made_of: str
    since: dt.datetime
    complete: bool


def kept_of(pipeline: Pipeline) -> dict[Asking, str]:
    """Return of what it is to be kept which keys are used, with what its versions are. Pure."""
    return {
        (processor.table, lookup.name): "documents" if processor.table in pipeline.documents else "rows"
        for processor in pipeline.functions()
        for lookup, _ in processor.enrich.values()
        if lookup.keys == "kept"
    }


def uses_of(asked: Asked) -> list[Uses]:
    """Return what is to be noted of changes before their look-ups are asked. Pure."""
    found: list[Uses] = []
    processor = asked.processor
    for place, (argument, (lookup, _)) in enumerate(processor.enrich.items()):
        if lookup.keys != "kept":
            continue
        rows: list[tuple[Key, int, Any]] = []
        gone: list[tuple[Key, int]] = []
        for change, keys in zip(asked.changes, asked.keys, strict=True):
            if change.row is None:
                gone.append((change.key, change.version))
            else:
                rows.append((change.key, change.version, keys[place]))
        found.append(Uses(processor.table, lookup.name, slot_of(processor.to, argument), rows, gone))
    return found


def slot_of(to: Iterable[str], argument: str) -> int:
    """Return a number for an argument of the function for these sinks: the same after other ones came or went."""
    return _number(",".join(sorted(to)) + ":" + argument)


def is_read_whole(keeping: Keeping, dump: Dump) -> bool:
    """Tell whether a dump enriches every row since its keys are kept. Pure.

    A load that is under way counts: what it has not come to yet gets answers that are newer than a notice, and nobody
    can cancel it but for another load.
    """
    of_all = dump.table == keeping.table and dump.kind in ("load", "table", "refresh") and dump.sinks is None
    if not of_all or dump.created_at is None or dump.created_at < keeping.since:
        return False
    return dump.state == "done" or (dump.kind == "load" and dump.unfinished)


class UsedKeyStore:
    """A pipeline's notes in the state store. Safe to use from any number of threads and processes at once."""

    def __init__(self, state: StateStore, pipeline: str) -> None:
        self._state = state
        self._pipeline = pipeline

    def begin(self, kept: Mapping[Asking, str]) -> None:
        """Keep notes of these from now on, with what their versions are, and of no others.

        To be called before anything is processed. What was not kept for a time begins anew: it may lack rows.
        """
        with self._state.transaction(write=True) as connection:
            there = self._keepings(connection)
            for asking, keeping in there.items():
                if kept.get(asking) != keeping.made_of:
                    connection.execute(sa.delete(KEEPINGS).where(KEEPINGS.c.id == keeping.id))
            self._add(connection, {a: m for a, m in kept.items() if a not in there or there[a].made_of != m})

    def keepings(self) -> dict[Asking, Keeping]:
        """Return what is kept, and since when."""
        with self._state.transaction() as connection:
            return self._keepings(connection)

    def settle(self, dumps: Iterable[Dump]) -> dict[Asking, Keeping]:
        """Record of what the notes are complete by what became of these dumps; return what is kept.

        Dumps that have ended are forgotten after a while, so it is to be called more often than that.
        """
        keepings = self.keepings()
        dumps = list(dumps)
        for asking, keeping in keepings.items():
            if keeping.complete:
                continue
            whole = [dump for dump in dumps if is_read_whole(keeping, dump)]
            if any(dump.state == "done" for dump in whole):
                with self._state.transaction(write=True) as connection:
                    connection.execute(sa.update(KEEPINGS).where(KEEPINGS.c.id == keeping.id).values(complete=1))
            if whole:
                keepings[asking] = keeping._replace(complete=True)
        return keepings

    def note(self, uses: Sequence[Uses], emptied: Mapping[str, int] | None = None) -> None:
        """Note which keys rows use, all or none, in one transaction; first forget those of tables that were emptied.

        `emptied` has the version of the truncation, by table. Of each row the newest version stays, in whatever order.
        Nothing is noted of what nobody has begun to keep, or somebody has ended: then all rows are read for a notice.
        """
        for table, version in (emptied or {}).items():
            self.remove(table, version)
        if not uses:
            return
        encoded = _Encoded()
        with self._state.transaction(write=True) as connection:
            # Looked up each time: who runs an older processor may have ended it, and another one begun it anew.
            there = self._keepings(connection)
            notes, none, gone = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
            for of in uses:
                if (of.table, of.lookup) not in there:
                    continue
                id_ = there[of.table, of.lookup].id
                for key, version, used in of.rows:
                    row_key, digest = encoded.row(key)
                    values = {"keeping": id_, "row_digest": digest, "slot": of.slot, "version": version}
                    if used is None:
                        none.append({f"_{name}": value for name, value in values.items()})
                    else:
                        notes.append({**values, "key_digest": encoded.key(used), "row_key": row_key})
                gone += [{"_keeping": id_, "_row_digest": encoded.row(k)[1], "_version": v} for k, v in of.gone]
            # In the order of the index: processes that note the same rows at once then wait for each other, no more.
            if notes:
                notes.sort(key=lambda note: (note["keeping"], note["row_digest"], note["slot"]))
                connection.execute(_upsert(connection), notes)
            for some, columns in ((none, ("keeping", "row_digest", "slot")), (gone, ("keeping", "row_digest"))):
                if some:
                    some.sort(key=lambda note: (note["_keeping"], note["_row_digest"]))
                    same = (USED_KEYS.c[name] == sa.bindparam(f"_{name}") for name in columns)
                    older = USED_KEYS.c.version <= sa.bindparam("_version")
                    connection.execute(sa.delete(USED_KEYS).where(*same, older), some)

    def rows(self, table: Table, lookup: str, keys: Iterable[Any], most: int) -> list[Key] | None:
        """Return the keys of the rows that used one of these keys, each once; None: they are more than `most`."""
        found: dict[bytes, None] = {}
        keeping = self.keepings().get((table.id, lookup))
        if keeping is None:
            return []
        digests = sorted({_number(key_text_of(key)) for key in keys})
        for start in range(0, len(digests), IDS_PER_STATEMENT):
            among = USED_KEYS.c.key_digest.in_(digests[start : start + IDS_PER_STATEMENT])
            query = sa.select(USED_KEYS.c.row_key).where(USED_KEYS.c.keeping == keeping.id, among).distinct()
            with self._state.transaction() as connection:
                found.update(dict.fromkeys(connection.execute(query.limit(most + 1)).scalars()))
            if len(found) > most:
                return None
        rows: list[Key] = []
        for text in found:
            with contextlib.suppress(ValueError):  # from before the table's key became another: it is loaded since
                rows.append(key_of_text(table, text.decode("utf-8", "surrogatepass")))
        return rows

    def remove(self, table: str, version: int) -> None:
        """Forget the notes of a table's rows that are older than a version: these rows are gone."""
        for (name, _), keeping in self.keepings().items():
            if name == table:
                self._delete(keeping.id, USED_KEYS.c.version < version)

    def sweep(self) -> None:
        """Delete the notes of what is no longer kept, of any pipeline."""
        for id_ in unkept(self._state):
            self._delete(id_)

    def _keepings(self, connection: sa.Connection) -> dict[Asking, Keeping]:
        query = sa.select(KEEPINGS).where(KEEPINGS.c.pipeline == self._pipeline)
        return {
            (row.table_name, row.lookup): Keeping(
                row.id, row.table_name, row.lookup, row.made_of, row.since, bool(row.complete)
            )
            for row in connection.execute(query)
        }

    def _add(self, connection: sa.Connection, kept: Mapping[Asking, str]) -> None:
        for (table, lookup), made_of in sorted(kept.items()):
            key = {"pipeline": self._pipeline, "table_name": table, "lookup": lookup}
            # One that another process has added at the same moment stays as it is.
            values = {"made_of": made_of, "since": now_of(connection), "complete": 0}
            upsert(connection, KEEPINGS, key, {"complete": KEEPINGS.c.complete}, values)

    def _delete(self, keeping: int, *conditions: sa.ColumnElement[bool]) -> None:
        """Delete notes, some in each transaction: nobody is to wait for millions of them."""
        digest = USED_KEYS.c.row_digest
        after = b""
        while True:
            mine = (USED_KEYS.c.keeping == keeping, digest > after)
            ends = sa.select(digest).where(*mine).order_by(digest).offset(DELETED_AT_ONCE).limit(1)
            with self._state.transaction(write=True) as connection:
                end = connection.execute(ends).scalar_one_or_none()
                upto = () if end is None else (digest <= end,)
                connection.execute(sa.delete(USED_KEYS).where(*mine, *upto, *conditions))
            if end is None:
                return
            after = end


def key_text_of(key: Any) -> str:
    """Return what is the same for equal keys of a look-up, as its cache takes them."""
    return scalar_text(key + 0.0) if isinstance(key, float) else scalar_text(key)  # -0.0 is 0.0


class _Encoded:
    """Keys as they are stored, each worked out once: rows ask several look-ups, and many rows have one key."""

    def __init__(self) -> None:
        self._rows: dict[Key, tuple[bytes, bytes]] = {}
        self._keys: dict[Any, int] = {}

    def row(self, key: Key) -> tuple[bytes, bytes]:
        """Return a row's key and its digest."""
        found = self._rows.get(key)
        if found is None:
            encoded = key_text(key).encode("utf-8", "surrogatepass")  # a hundred times as fast as `encode_key`
            found = self._rows[key] = encoded, hashlib.blake2b(encoded, digest_size=16).digest()
        return found

    def key(self, key: Any) -> int:
        """Return the digest of a look-up's key."""
        found = self._keys.get(key)
        if found is None:
            found = self._keys[key] = _number(key_text_of(key))
        return found


def _number(text: str) -> int:
    """Return a text's digest as a number: two texts with one number cost a read that was not needed, no more."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _upsert(connection: sa.Connection) -> sa.Insert:
    """Return the statement that adds a note, or puts it in the place of one that is no newer."""
    stored = USED_KEYS.c
    if connection.dialect.name in ("mysql", "mariadb"):
        of_mysql = mysql.insert(USED_KEYS)
        newer = of_mysql.inserted.version >= stored.version
        # In this order: each assignment sees those before it.
        return of_mysql.on_duplicate_key_update(
            [
                ("key_digest", sa.func.if_(newer, of_mysql.inserted.key_digest, stored.key_digest)),
                ("version", sa.func.greatest(of_mysql.inserted.version, stored.version)),
            ]
        )
    of_other = postgresql.insert(USED_KEYS) if connection.dialect.name == "postgresql" else sqlite.insert(USED_KEYS)
    values = {"key_digest": of_other.excluded.key_digest, "version": of_other.excluded.version}
    key = ["keeping", "row_digest", "slot"]
    newer = of_other.excluded.version >= stored.version
    return of_other.on_conflict_do_update(index_elements=key, set_=values, where=newer)


def unkept(state: StateStore) -> list[int]:
    """Return the numbers of keepings that are no more, and have notes. A seek in the index for each that has some."""
    found: list[int] = []
    last = 0
    while True:
        query = sa.select(sa.func.min(USED_KEYS.c.keeping)).where(USED_KEYS.c.keeping > last)
        with state.transaction() as connection:
            number = connection.execute(query).scalar_one_or_none()
            if number is None:
                return found
            last = number
            if connection.execute(sa.select(KEEPINGS.c.id).where(KEEPINGS.c.id == last)).one_or_none() is None:
                found.append(last)
