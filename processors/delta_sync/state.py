"""The state store: what Delta keeps in an SQL database, because it must survive the process.

It holds how far each table's load is, the source's identity and epoch, dead letters and the last status, and, for
processes that share a pipeline, who leads (leases) and who is there (members). Losing it loses no data of any sink: a
load can always be started again. The same code serves SQLite (one machine), PostgreSQL and MariaDB; what differs
between them is in `state_database.py`, and the tables are in `state_tables.py`.

Every call is one short transaction, so a process may be killed at any instruction: a call has happened or it has not.
Every call may be made again after StateBusy. Free text (errors, traces, reasons, key texts, statuses) is stored as
`secrets.redact` leaves it; names and events are stored as they are.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, overload

import orjson
import sqlalchemy as sa
from sqlalchemy import exc

from delta_sync.changes import Key
from delta_sync.delta_event import decode_key, encode_key
from delta_sync.errors import LeaseLost, LoadOverruled, StaleStateStore
from delta_sync.secrets import redact
from delta_sync.state_database import (
    BUSY_TIMEOUT_S,
    create_engine,
    create_file,
    database_clock,
    migration_lock,
    parse_url,
    translated,
    upsert,
)
from delta_sync.state_tables import (
    CHUNKS,
    CONNECTOR_HISTORY,
    CONNECTORS,
    DEAD_LETTERS,
    DUMPS,
    GENERATIONS,
    KEEPINGS,
    LEASES,
    LOADS,
    MEMBERS,
    NOTICES,
    PIPELINES,
    REVISION,
    STATUSES,
    TOPICS,
    VERIFIED,
    VERSION_TABLE,
)
from delta_sync.values import to_json

MAX_TEXT_CHARS = 1 << 16  # of one error or trace: a recursion's trace, yes; a message that quotes a document, no
IDS_PER_STATEMENT = 500  # below every database's limit of parameters (SQLite before 3.32: 999)


# ── what goes in and comes out ───────────────────────────────────────────────────────────────────────────────────


class PipelineState(NamedTuple):
    """The source as the pipeline last saw it.

    `system_identifier` and `timeline` tell another database from a failover; `slot_lsn` is where the slot was at the
    last start, or a connector that makes its position itself was at first (None: there was none yet). `confirmed_most`
    is a position beyond which this pipeline never confirmed anything (None: not known); see `confirming`. `lost` says
    why changes of this epoch may have been lost, where that was noted (`note_loss`, which alone saves it).
    """

    name: str
    epoch: int
    system_identifier: str
    timeline: int
    slot_lsn: int | None = None
    confirmed_most: int | None = None
    lost: str | None = None


class TableLoad(NamedTuple):
    """How far the load of a table is. `after_key` is the last key whose chunk every sink has (None: none yet).

    `rows` have been written so far. `covered_from` is the position from which the log surely delivers the table's
    changes. `fingerprint` is that of the table's columns when the load began, `reason` why it is loaded. `revision` is
    the store's: it counts how often the table was to be loaded from the start.
    """

    table: str
    state: Literal["pending", "running", "done"] = "pending"
    after_key: Key | None = None
    rows: int = 0
    covered_from: int | None = None
    fingerprint: str = ""
    reason: str = ""
    epoch: int = 1
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None
    revision: int = 0


class Lease(NamedTuple):
    """What `StateStore.take_lease` gave: `owner` may do what `name` stands for.

    It says who was the holder when it was given, not who is now: a `LeaseKeeper` knows whether to go on, and what is
    written with the lease is refused once another has it. `token` rises with every change of hands.
    """

    pipeline: str
    name: str
    owner: str
    token: int
    ttl_s: float


class LeaseHolder(NamedTuple):
    """Who has a lease, for those who look. `left_s` is how long by the database's clock; below 0: it has expired."""

    owner: str
    token: int
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A change that could not be processed. `sink` is the one that rejected it; None: it never came to a sink.

    `event` is what `delta_event.encode_event` wrote. `id` and `attempts` are the store's: leave them when adding one.
    `created_at` (aware) is when it first failed.
    """

    id: int = 0
    table: str
    key_text: str
    version: int
    sink: str | None = None
    stage: Literal["decode", "process", "lookup", "apply", "handle"]
    error: str
    trace: str = ""
    event: bytes
    created_at: dt.datetime
    attempts: int = 1


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────


Clock = Callable[[], dt.datetime]  # aware


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class StateStore:
    """An open state store. Safe to use from any number of threads and processes at once.

    Every method may raise StateBusy (transient) or StateRefused (systematic).
    """

    def __init__(self, engine: sa.Engine, where: str, now: Clock) -> None:
        """Use `StateStore.open`."""
        self._engine = engine
        self._where = where
        self._now = now
        self._closed = False

    @classmethod
    @overload
    def open(cls, url: str, folder: Path, *, now: Clock = ..., busy_timeout_s: float = ...) -> StateStore: ...

    @classmethod
    @overload
    def open(
        cls, url: str, folder: Path, *, create: bool, now: Clock = ..., busy_timeout_s: float = ...
    ) -> StateStore | None: ...

    @classmethod
    def open(
        cls,
        url: str,
        folder: Path,
        *,
        create: bool = True,
        now: Clock = _utc_now,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> StateStore | None:
        """Open the store at an SQLAlchemy URL, create it where there is none, and bring its tables up to date.

        A relative SQLite path is relative to `folder`. With `create=False` (for commands that only look), nothing is
        created, and None returned where there is no store. `busy_timeout_s` is how long a call waits for another
        process's lock, and how long a server lets a process keep its own that does nothing: it may be frozen. Raises
        UsageError when the URL cannot be used, StaleStateStore when a newer Delta wrote the store.
        """
        parsed = parse_url(url, folder)
        where = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite":
            path = Path(parsed.database or "")
            if not create and not path.exists():
                return None
            if create:
                create_file(path)
        store = cls(create_engine(parsed, busy_timeout_s), where, now)
        try:
            if not store._migrate(create=create):
                store.close()
                return None
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Release the connections. Idempotent; the store cannot be used afterwards."""
        self._closed = True
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # ── pipelines ──

    def pipeline(self, name: str) -> PipelineState | None:
        """Return what was last saved of the pipeline's source; None: nothing."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(PIPELINES).where(PIPELINES.c.name == name)).one_or_none()
        if row is None:
            return None
        return PipelineState(
            name=row.name,
            epoch=row.epoch,
            system_identifier=row.system_identifier,
            timeline=row.timeline,
            slot_lsn=row.slot_lsn,
            confirmed_most=row.confirmed_most,
            lost=row.lost if row.lost_epoch == row.epoch else None,
        )

    def save_pipeline(self, state: PipelineState, lease: Lease | None = None) -> None:
        """Save it, in place of what was saved before. With a lease: only if nobody else has it now, else LeaseLost.

        Of two epochs the newer one stays: another process may have found out that one has to begin.
        """
        values = state._asdict()
        del values["lost"]
        query = sa.select(PIPELINES.c.epoch).where(PIPELINES.c.name == state.name).with_for_update()
        with self._transaction(write=True) as connection:
            fence(connection, state.name, lease)
            values["epoch"] = max(state.epoch, connection.execute(query).scalar_one_or_none() or 0)
            upsert(connection, PIPELINES, {"name": values.pop("name")}, values)

    def raise_confirmed_most(self, name: str, lsn: int) -> None:
        """Save, before it is done, that the slot may be confirmed up to a position. It never falls.

        Nothing happens to a pipeline that is not there, or has been further.
        """
        lower = sa.or_(PIPELINES.c.confirmed_most.is_(None), PIPELINES.c.confirmed_most < lsn)
        with self._transaction(write=True) as connection:
            connection.execute(sa.update(PIPELINES).where(PIPELINES.c.name == name, lower).values(confirmed_most=lsn))

    def raise_epoch(self, name: str, epoch: int) -> None:
        """Save that a new epoch has to begin, this one unless a newer one has; whoever decides about it goes by it.

        Nothing happens to a pipeline that is not there. Any process may call it.
        """
        lower = (PIPELINES.c.name == name, PIPELINES.c.epoch < epoch)
        with self._transaction(write=True) as connection:
            connection.execute(sa.update(PIPELINES).where(*lower).values(epoch=epoch))

    def note_loss(self, name: str, epoch: int, why: str) -> None:
        """Save that changes of this epoch may have been lost, for as long as it is the pipeline's; the first reason."""
        first = sa.or_(PIPELINES.c.lost_epoch.is_(None), PIPELINES.c.lost_epoch != epoch)
        noted = sa.update(PIPELINES).where(PIPELINES.c.name == name, first).values(lost_epoch=epoch, lost=clean(why))
        with self._transaction(write=True) as connection:
            connection.execute(noted)

    def forget(self, name: str) -> None:
        """Delete all that is stored of a pipeline; but which keys its rows used is left to `UsedKeyStore.sweep`."""
        with self._transaction(write=True) as connection:
            # Leases first, as in a write with a lease: in another order the two could wait for each other.
            others = (DEAD_LETTERS, STATUSES, MEMBERS, GENERATIONS, NOTICES, VERIFIED, TOPICS, KEEPINGS)
            for table in (LEASES, DUMPS, CHUNKS, LOADS, CONNECTORS, CONNECTOR_HISTORY, *others):
                connection.execute(sa.delete(table).where(table.c.pipeline == name))
            connection.execute(sa.delete(PIPELINES).where(PIPELINES.c.name == name))

    # ── loads ──

    def loads(self, name: str) -> dict[str, TableLoad]:
        """Return how far each table's load is, by table."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(LOADS).where(LOADS.c.pipeline == name).order_by(LOADS.c.table_name))
            same = sa.and_(
                DUMPS.c.pipeline == LOADS.c.pipeline,
                DUMPS.c.table_name == LOADS.c.table_name,
                DUMPS.c.epoch == LOADS.c.epoch,
                DUMPS.c.covered_from == LOADS.c.covered_from,
            )
            under_way = (
                sa.select(DUMPS.c.table_name, DUMPS.c.row_count)
                .join(LOADS, same)
                .where(DUMPS.c.pipeline == name, DUMPS.c.kind == "load", DUMPS.c.state.in_(UNFINISHED))
            )
            counted = {row.table_name: row.row_count for row in connection.execute(under_way)}
            return {
                row.table_name: TableLoad(
                    table=row.table_name,
                    state=row.state,
                    after_key=None if row.after_key is None else decode_key(row.after_key),
                    rows=counted.get(row.table_name, row.row_count),
                    covered_from=row.covered_from,
                    fingerprint=row.fingerprint,
                    reason=row.reason,
                    epoch=row.epoch,
                    started_at=row.started_at,
                    finished_at=row.finished_at,
                    revision=row.revision,
                )
                for row in rows
            }

    def save_load(self, name: str, load: TableLoad, lease: Lease | None = None) -> None:
        """Save how far a table's load is, in place of what was saved before.

        Raises LoadOverruled when the table is to be loaded from the start since: what this load has read may lack what
        the next is to bring. With a lease: only if nobody else has it now, else LeaseLost.
        """
        with self._transaction(write=True) as connection:
            fence(connection, name, lease)
            revision = _revision_of_load(connection, name, load.table)
            if revision is not None and revision != load.revision:
                raise LoadOverruled(
                    f"Table {load.table} is to be loaded from the start: another process has found why."
                )
            upsert(connection, LOADS, *_load_values(name, load))

    def begin_load(self, name: str, load: TableLoad, lease: Lease | None = None) -> TableLoad:
        """Save that a table is to be loaded from the start, whatever was saved before; return it with its revision.

        A load of it that is under way is overruled. With a lease: only if nobody else has it now, else LeaseLost.
        """
        with self._transaction(write=True) as connection:
            fence(connection, name, lease)
            revision = _revision_of_load(connection, name, load.table)
            load = load._replace(revision=0 if revision is None else revision + 1)
            upsert(connection, LOADS, *_load_values(name, load))
        return load

    def load_again(self, name: str, tables: Collection[str], reason: str) -> None:
        """Save that tables are to be loaded from the start, as they were last; all of them or none.

        Loads of them that are under way are overruled. Nothing happens to a table of which nothing is saved. Any
        process may call it: whoever loads goes by it.
        """
        anew: dict[str, Any] = {"state": "pending", "after_key": None, "row_count": 0, "covered_from": None}
        anew |= {"started_at": None, "finished_at": None, "reason": clean(reason), "revision": LOADS.c.revision + 1}
        these = sa.and_(LOADS.c.pipeline == name, LOADS.c.table_name.in_(tables))
        with self._transaction(write=True) as connection:
            connection.execute(sa.update(LOADS).where(these).values(anew))

    def fill_fingerprint(self, name: str, table: str, fingerprint: str) -> None:
        """Save what a table's load is for that was begun before that was known; its fingerprint is empty till then."""
        with self._transaction(write=True) as connection:
            for each in (LOADS, DUMPS):
                mine = (each.c.pipeline == name, each.c.table_name == table, each.c.fingerprint == "")
                connection.execute(sa.update(each).where(*mine).values(fingerprint=fingerprint))

    def forget_load(self, name: str, table: str, lease: Lease | None = None) -> None:
        """Delete what is stored of a table's load, and end its dumps; nothing stored is fine.

        With a lease: only if nobody else has it now, else LeaseLost.
        """
        with self._transaction(write=True) as connection:
            fence(connection, name, lease)
            for each in (LOADS, KEEPINGS):
                connection.execute(sa.delete(each).where(each.c.pipeline == name, each.c.table_name == table))
            end_dumps(connection, name, table, "the table was taken out of the pipeline, or its load forgotten")

    # ── dead letters ──

    def add_dead_letters(self, name: str, letters: Sequence[DeadLetter]) -> None:
        """Add all of them or none.

        One that is there (same table, key, sink and version) is brought up to date and counts one attempt more. It
        keeps its `created_at`: from then on, not from the last attempt, a delete's tombstone protects the key.
        """
        with self._transaction(write=True) as connection:
            for letter in letters:
                changing = {
                    "key_text": clean(letter.key_text),
                    "stage": letter.stage,
                    "error": clean(letter.error),
                    "trace": clean(letter.trace),
                    "event": letter.event,
                }
                fixed = {
                    "table_name": letter.table,
                    "version": letter.version,
                    "sink": letter.sink,
                    "created_at": letter.created_at,
                    "attempts": 1,
                }
                again = {"attempts": DEAD_LETTERS.c.attempts + 1}
                key = {"pipeline": name, "identity": identity_of(letter)}
                upsert(connection, DEAD_LETTERS, key, changing | again, changing | fixed)

    def dead_letters(
        self, name: str, *, table: str | None = None, limit: int = 100, before_id: int | None = None
    ) -> list[DeadLetter]:
        """Return at most `limit` dead letters, the latest added first. The next page is `before_id` the last one's."""
        query = sa.select(DEAD_LETTERS).where(DEAD_LETTERS.c.pipeline == name)
        if table is not None:
            query = query.where(DEAD_LETTERS.c.table_name == table)
        if before_id is not None:
            query = query.where(DEAD_LETTERS.c.id < before_id)
        with self._transaction() as connection:
            return [
                _dead_letter(row) for row in connection.execute(query.order_by(DEAD_LETTERS.c.id.desc()).limit(limit))
            ]

    def dead_letter(self, name: str, id_: int) -> DeadLetter | None:
        """Return one dead letter; None when there is none of that id."""
        query = sa.select(DEAD_LETTERS).where(DEAD_LETTERS.c.pipeline == name, DEAD_LETTERS.c.id == id_)
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _dead_letter(row)

    def discard(self, name: str, ids: Sequence[int]) -> int:
        """Delete dead letters; return how many there were."""
        gone = 0
        with self._transaction(write=True) as connection:
            for start in range(0, len(ids), IDS_PER_STATEMENT):
                some = ids[start : start + IDS_PER_STATEMENT]
                statement = sa.delete(DEAD_LETTERS).where(DEAD_LETTERS.c.pipeline == name, DEAD_LETTERS.c.id.in_(some))
                gone += connection.execute(statement).rowcount
        return gone

    def count_dead_letters(self, name: str) -> int:
        """Return how many dead letters the pipeline has."""
        query = sa.select(sa.func.count()).select_from(DEAD_LETTERS).where(DEAD_LETTERS.c.pipeline == name)
        with self._transaction() as connection:
            return connection.execute(query).scalar_one()

    def count_failed_since(self, name: str, table: str, version: int) -> int:
        """Return how many dead letters there are of changes to a table at or above a version."""
        since = sa.and_(
            DEAD_LETTERS.c.pipeline == name, DEAD_LETTERS.c.table_name == table, DEAD_LETTERS.c.version >= version
        )
        with self._transaction() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(DEAD_LETTERS).where(since)).scalar_one()

    def failed_keys(self, name: str, table: str, key_texts: Sequence[str]) -> set[tuple[str, str | None]]:
        """Return which of these keys of a table have a dead letter, each with the sink that it is of (None: of all)."""
        stored = {clean(text): text for text in key_texts}
        found: set[tuple[str, str | None]] = set()
        columns = (DEAD_LETTERS.c.key_text, DEAD_LETTERS.c.sink)
        of_table = sa.and_(DEAD_LETTERS.c.pipeline == name, DEAD_LETTERS.c.table_name == table)
        texts = list(stored)
        with self._transaction() as connection:
            if connection.execute(sa.select(columns[0]).where(of_table).limit(1)).one_or_none() is None:
                return found
            for start in range(0, len(texts), IDS_PER_STATEMENT):
                among = DEAD_LETTERS.c.key_text.in_(texts[start : start + IDS_PER_STATEMENT])
                rows = connection.execute(sa.select(*columns).where(of_table, among))
                found |= {(stored[row.key_text], row.sink) for row in rows if row.key_text in stored}
        return found

    def dead_letters_since(self, name: str, since: dt.datetime) -> list[tuple[dt.datetime, str]]:
        """Return when each dead letter first failed that did so after `since` (aware), with its `identity_of`.

        The oldest first.
        """
        columns = (DEAD_LETTERS.c.created_at, DEAD_LETTERS.c.identity)
        recent = sa.and_(DEAD_LETTERS.c.pipeline == name, DEAD_LETTERS.c.created_at > since)
        with self._transaction() as connection:
            rows = connection.execute(sa.select(*columns).where(recent).order_by(DEAD_LETTERS.c.created_at))
            return [(row.created_at, row.identity) for row in rows]

    def prune(self, name: str, older_than: dt.datetime) -> int:
        """Delete the dead letters that first failed before `older_than` (aware); return how many there were."""
        old = sa.and_(DEAD_LETTERS.c.pipeline == name, DEAD_LETTERS.c.created_at < older_than)
        with self._transaction(write=True) as connection:
            return connection.execute(sa.delete(DEAD_LETTERS).where(old)).rowcount

    # ── status ──

    def save_status(self, name: str, status: Mapping[str, Any]) -> None:
        """Save what the pipeline says of itself; it comes back as JSON has it (a datetime as text)."""
        text = to_json(_redacted(dict(status))).decode()
        with self._transaction(write=True) as connection:
            upsert(connection, STATUSES, {"pipeline": name}, {"status": text, "saved_at": self._now()})

    def status(self, name: str) -> tuple[dict[str, Any], dt.datetime] | None:
        """Return the last saved status, and when that was; None: never."""
        query = sa.select(STATUSES.c.status, STATUSES.c.saved_at).where(STATUSES.c.pipeline == name)
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (orjson.loads(row.status), row.saved_at)

    # ── leases ──

    def take_lease(self, pipeline: str, name: str, owner: str, ttl_s: float) -> Lease | None:
        """Take a lease, or renew one's own, for `ttl_s` from now; None: another has it.

        `owner` must be another one in every process, also after a restart: one that comes back under the same name
        would be taken for the one that died, and renew its lease. The token rises whenever the lease changes hands,
        also when it comes back to an owner who had let it expire or released it: another may have had it in between.

        At most one has it at any moment, as long as the database's clock (its machine's, for SQLite) does not jump.
        If it does, what is written with the token is still safe.
        """
        assert owner, "nobody's lease is the one without an owner"
        assert ttl_s > 0, "a lease that has expired before it is taken"
        mine = (LEASES.c.pipeline == pipeline, LEASES.c.name == name)
        query = sa.select(LEASES.c.owner, LEASES.c.token, LEASES.c.expires_at).where(*mine).with_for_update()
        with self._transaction(write=True) as connection:
            row = connection.execute(query).one_or_none()
            if row is None:  # nobody ever had it: whoever is first inserts the row, and all wait for their turn at it
                free = {"owner": "", "token": 0, "expires_at": LONG_AGO}
                upsert(connection, LEASES, {"pipeline": pipeline, "name": name}, {"token": LEASES.c.token}, free)
                row = connection.execute(query).one()
            now = now_of(connection)  # asked after the row is locked: waiting for it may have taken seconds
            held = row.owner != "" and now < row.expires_at
            if held and row.owner != owner:
                return None
            token = row.token if held else row.token + 1
            values = {"owner": owner, "token": token, "expires_at": now + dt.timedelta(seconds=ttl_s)}
            connection.execute(sa.update(LEASES).where(*mine).values(values))
        return Lease(pipeline, name, owner, token, ttl_s)

    def release_lease(self, lease: Lease) -> None:
        """Give a lease back before it expires, so that another need not wait. One that is lost already is fine.

        What is written with it afterwards is refused.
        """
        with self._transaction(write=True) as connection:
            connection.execute(sa.update(LEASES).where(*_current(lease)).values(owner="", expires_at=LONG_AGO))

    def lease(self, pipeline: str, name: str) -> LeaseHolder | None:
        """Return who has a lease, or had it when it expired; None: nobody ever took it, or it was released."""
        with self._transaction() as connection:
            query = sa.select(LEASES.c.owner, LEASES.c.token, LEASES.c.expires_at, database_clock(connection))
            row = connection.execute(
                query.where(LEASES.c.pipeline == pipeline, LEASES.c.name == name, LEASES.c.owner != "")
            ).one_or_none()
        return None if row is None else LeaseHolder(row.owner, row.token, (row.expires_at - row[3]).total_seconds())

    def database_now(self) -> dt.datetime:
        """Return the time by the database's clock, which leases and members go by: machines' clocks differ."""
        with self._transaction() as connection:
            return now_of(connection)

    # ── members ──

    def save_member(self, pipeline: str, member: str, status: Mapping[str, Any]) -> None:
        """Save what one of a pipeline's processes says of itself; it comes back as JSON has it."""
        text = to_json(_redacted(dict(status))).decode()
        with self._transaction(write=True) as connection:
            values = {"status": text, "saved_at": database_clock(connection)}
            upsert(connection, MEMBERS, {"pipeline": pipeline, "member": member}, values)

    def members(self, pipeline: str) -> list[tuple[str, dict[str, Any], dt.datetime]]:
        """Return each member, its last status and when it was saved by `database_now`, in the order of their names."""
        query = sa.select(MEMBERS.c.member, MEMBERS.c.status, MEMBERS.c.saved_at)
        with self._transaction() as connection:
            rows = connection.execute(query.where(MEMBERS.c.pipeline == pipeline).order_by(MEMBERS.c.member)).all()
        return [(row.member, orjson.loads(row.status), row.saved_at) for row in rows]

    def forget_members(self, pipeline: str, older_than: dt.datetime) -> int:
        """Delete the members that last said something before `older_than`; return how many there were.

        `older_than` is to be reckoned from `database_now`, not from this machine's clock.
        """
        silent = sa.and_(MEMBERS.c.pipeline == pipeline, MEMBERS.c.saved_at < older_than)
        with self._transaction(write=True) as connection:
            return connection.execute(sa.delete(MEMBERS).where(silent)).rowcount

    # ── inside ──

    def transaction(self, *, write: bool = False) -> contextlib.AbstractContextManager[sa.Connection]:
        """Return one transaction, for those parts of the store that have a module of their own (`state_dumps`)."""
        return self._transaction(write=write)

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Generator[sa.Connection]:
        assert not self._closed, "the state store is closed"
        try:
            with self._engine.execution_options(delta_write=write).begin() as connection:
                yield connection
        except (exc.DBAPIError, exc.TimeoutError) as error:
            raise translated(error, self._where) from error

    def _migrate(self, *, create: bool) -> bool:
        """Bring the tables up to date; return False when there are none and `create` is False."""
        with self._transaction() as connection:
            found = _revision(connection)
        if found == REVISION:
            return True
        if found is None and not create:
            return False
        from delta_sync import migrations  # a third of the time that a command takes to start

        if found is not None and found not in migrations.known():
            raise StaleStateStore(
                f"The state store {self._where} was written by a newer Delta (its tables are at {found}); use that "
                "version, or give `state` another URL, which loads every table anew."
            )
        with self._transaction(write=True) as connection, migration_lock(connection):
            migrations.upgrade(connection)  # which looks again: another process may have been faster
        return True


def _revision(connection: sa.Connection) -> str | None:
    """Return the revision of the tables that are there; None: there are none."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    versions = sa.table(VERSION_TABLE, sa.column("version_num", sa.String))
    return connection.execute(sa.select(versions.c.version_num)).scalar_one_or_none()


UNFINISHED = ("pending", "running", "paused")  # states of a dump
LONG_AGO = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def now_of(connection: sa.Connection) -> dt.datetime:
    """Return the time by the database's clock."""
    return connection.execute(sa.select(database_clock(connection))).scalar_one()


def _revision_of_load(connection: sa.Connection, name: str, table: str) -> int | None:
    """Return the revision of a table's load, which nobody changes before this transaction has ended; None: no load."""
    mine = sa.and_(LOADS.c.pipeline == name, LOADS.c.table_name == table)
    return connection.execute(sa.select(LOADS.c.revision).where(mine).with_for_update()).scalar_one_or_none()


def _load_values(name: str, load: TableLoad) -> tuple[dict[str, Any], dict[str, Any]]:
    values = load._asdict()
    key = {"pipeline": name, "table_name": values.pop("table")}
    values["row_count"] = values.pop("rows")
    values["after_key"] = None if load.after_key is None else encode_key(load.after_key)
    values["reason"] = clean(load.reason)
    return key, values


def _current(lease: Lease) -> tuple[sa.ColumnElement[bool], ...]:
    """Return the condition that the lease's row is still this very lease's.

    The owner is compared, too: tokens start again when the pipeline is forgotten.
    """
    return (
        LEASES.c.pipeline == lease.pipeline,
        LEASES.c.name == lease.name,
        LEASES.c.owner == lease.owner,
        LEASES.c.token == lease.token,
    )


def end_dumps(connection: sa.Connection, pipeline: str, table: str, why: str) -> None:
    """Cancel a table's dumps, with their chunks."""
    mine = (DUMPS.c.pipeline == pipeline, DUMPS.c.table_name == table, DUMPS.c.state.in_(UNFINISHED))
    ids = connection.execute(sa.select(DUMPS.c.id).where(*mine).order_by(DUMPS.c.id).with_for_update()).scalars().all()
    for id_ in ids:
        values = {"state": "cancelled", "waits": clean(why), "finished_at": now_of(connection)}
        connection.execute(sa.update(DUMPS).where(DUMPS.c.id == id_).values(values))
        connection.execute(sa.delete(CHUNKS).where(CHUNKS.c.dump == id_))


def fence(connection: sa.Connection, pipeline: str, lease: Lease | None) -> None:
    """Raise LeaseLost if the lease is another's; if not, nobody gets it before this transaction has ended.

    One that has expired is good enough as long as nobody else took it: then nobody else has acted.
    """
    if lease is None:
        return
    assert lease.pipeline == pipeline, "a lease of another pipeline"
    if connection.execute(sa.select(LEASES.c.token).where(*_current(lease)).with_for_update()).one_or_none() is None:
        raise LeaseLost(
            f"{lease.owner!r} no longer has the lease {lease.name!r} of pipeline {pipeline!r} (token {lease.token}), "
            "so nothing was written; stop what needs it, and take it again."
        )


def identity_of(letter: DeadLetter) -> str:
    """Return what is the same for the same failure of a change: delivered once more, it is no further dead letter."""
    # ascii(), because it is injective and takes any text, and repr() changes with Unicode's version
    return hashlib.sha256(ascii((letter.table, letter.key_text, letter.sink, letter.version)).encode()).hexdigest()


def _dead_letter(row: sa.Row[Any]) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        table=row.table_name,
        key_text=row.key_text,
        version=row.version,
        sink=row.sink,
        stage=row.stage,
        error=row.error,
        trace=row.trace,
        event=row.event,
        created_at=row.created_at,
        attempts=row.attempts,
    )


def clean(text: str) -> str:
    """Return the text without secrets, in characters that every database takes, its middle left out if too long."""
    text = redact(text).encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    if len(text) <= MAX_TEXT_CHARS:
        return text
    half = MAX_TEXT_CHARS // 2
    return f"{text[:half]}\n… ({len(text) - 2 * half} characters left out) …\n{text[-half:]}"


def _redacted(value: Any) -> Any:
    """Return a JSON value with every text in it redacted."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {_redacted(name): _redacted(part) for name, part in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_redacted(part) for part in cast(Sequence[Any], value)]
    return value
