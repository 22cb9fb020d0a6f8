"""Claims on real servers, held against the log: a row that outranks a change in the log must not be older than it.

Every test takes claims in three ways, from the same servers at the same moments: as Delta does, and in two plausible
ways that are wrong (`Claims`). The wrong ones must be seen to be wrong, or the test shows nothing.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, LiteralString, NamedTuple

import psycopg
import pytest
from psycopg import sql

from delta_sync.samples import SharedSamples
from delta_sync.sources.postgresql.claims import Sample, Samples, Snapshot, sample_of
from delta_sync.sources.postgresql.reader import PostgresReader
from delta_sync.sources.reader import Chunk
from delta_sync.spec import SourceSpec
from delta_sync.tables import Table
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL
from delta_sync.versions import parse_lsn
from integration.change_history import History, Logged

IDS = 60
CHUNK_ROWS = 20
BYTES_MOST = 1 << 30
STATE_TIMEOUT_S = 60.0  # for a session to reach a state that takes it milliseconds

UPSERT = "INSERT INTO item VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET rev = excluded.rev"
DELETE = "DELETE FROM item WHERE id = %s"
ENDS_PREPARED: tuple[LiteralString, ...] = ("COMMIT PREPARED {}", "ROLLBACK PREPARED {}")
SETUP = """
CREATE TABLE item (id int PRIMARY KEY, rev bigint NOT NULL);
CREATE PUBLICATION items FOR TABLE item;
"""


# ── what the log says ────────────────────────────────────────────────────────────────────────────────────────────


def logged(messages: Iterable[tuple[str, bytes]]) -> Iterator[Logged]:
    """Yield the changes among the messages of pgoutput's protocol, version 1, for a table of two columns."""
    for lsn, message in messages:
        kind = message[:1]
        if kind in (b"I", b"U", b"D"):
            at = 5  # behind the kind and the relation
            if kind == b"U" and message[at : at + 1] in (b"K", b"O"):
                _, at = _tuple(message, at + 1)
            values, _ = _tuple(message, at + 1)
            id_, rev = values
            assert id_ is not None
            yield Logged(parse_lsn(lsn), int(id_), None if kind == b"D" or rev is None else int(rev))


def _tuple(message: bytes, at: int) -> tuple[list[str | None], int]:
    values: list[str | None] = []
    count, at = int.from_bytes(message[at : at + 2], "big"), at + 2
    for _ in range(count):
        kind, at = message[at : at + 1], at + 1
        if kind == b"t":
            length, at = int.from_bytes(message[at : at + 4], "big"), at + 4
            values.append(message[at : at + length].decode())
            at += length
        else:
            values.append(None)
    return values, at


# ── a source, and what is read from it ───────────────────────────────────────────────────────────────────────────


class Claims:
    """The three ways. Each takes its samples and judges its snapshots at the same moments as the others."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.ours = SharedSamples(Samples)
        self.without_locks = SharedSamples(Samples)

    def sample(self, reader: PostgresReader) -> None:
        """Take a sample in Delta's way, and one of insert position and xmax alone, as if running ids were in xip."""
        with self._lock:
            self.ours.add(reader.sample())
            self.without_locks.add(self._sample_without_locks())

    def _sample_without_locks(self) -> Sample:
        lsn = one(self._connection, "SELECT pg_current_wal_insert_lsn()::text")
        xmax = one(self._connection, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        return sample_of(parse_lsn(lsn), [], xmax)


class Read(NamedTuple):
    """What one snapshot showed of some keys (None: no row), and what it claims in each of the three ways."""

    rows: dict[int, int | None]
    claims: dict[str, int | None]


class Source:
    """A fresh database with a table of revisions, a slot that has all of its log, and a reader."""

    def __init__(self, server: PostgreSQL, exits: ExitStack) -> None:
        self.server = server
        self._exits = exits
        self._name = f"claims_{uuid.uuid4().hex}"
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self._name)))
        exits.callback(self._drop)
        self.admin = self.connect()
        self.admin.execute(SETUP)
        self.admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self._name])
        with self.admin.cursor() as cursor:
            cursor.executemany("INSERT INTO item VALUES (%s, %s)", [(id_, -id_) for id_ in range(1, IDS + 1)])
        self.reader = self.new_reader()
        self.table: Table = self.reader.tables(["public.item"])["public.item"]
        self.claims = Claims(self.connect())

    def connect(self) -> psycopg.Connection:
        """Return a session that ends with the test."""
        connection = psycopg.connect(self.server.url_of(self._name), autocommit=True)
        self._exits.callback(connection.close)
        return connection

    def new_reader(self) -> PostgresReader:
        url = f"postgresql://postgres@127.0.0.1:{self.server.port}/{self._name}"
        reader = PostgresReader(SourceSpec(url=url, password=f"${{env:{PASSWORD_VARIABLE}}}"), "claims")
        self._exits.callback(reader.close)
        return reader

    def sample(self) -> None:
        self.claims.sample(self.reader)

    def read_chunk(self, after: int | None, reader: PostgresReader | None = None) -> Read:
        """Read a chunk, whatever it may claim."""
        key = None if after is None else (after,)
        return self._read(
            reader or self.reader,
            lambda own, usable: own.read_chunk(self.table, key, CHUNK_ROWS, BYTES_MOST, usable),
            (),
        )

    def read_keys(self, ids: Sequence[int], reader: PostgresReader | None = None) -> Read:
        """Read some rows by key, whatever they may claim."""
        keys = [(id_,) for id_ in ids]
        return self._read(reader or self.reader, lambda own, usable: own.read_keys(self.table, keys, usable), ids)

    def _read(
        self,
        reader: PostgresReader,
        read: Callable[[PostgresReader, Callable[[Snapshot], bool]], Chunk | None],
        ids: Iterable[int],
    ) -> Read:
        claims: dict[str, int | None] = {"position before": reader.log_end()}

        def usable(snapshot: Snapshot) -> bool:
            claims["ours"] = self.claims.ours.claim(snapshot, 0)
            claims["without locks"] = self.claims.without_locks.claim(snapshot, 0)
            return True

        chunk = read(reader, usable)
        assert chunk is not None
        rows: dict[int, int | None] = dict.fromkeys(ids)
        rows.update({row["id"]: row["rev"] for _, row in chunk.rows})
        return Read(rows, claims)

    def history(self) -> History:
        """Return all of the log that is on disk, which every commit is, but for those of an `Interleaving`."""
        messages = self.admin.execute(
            "SELECT lsn::text, data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '1',"
            " 'publication_names', 'items')",
            [self._name],
        ).fetchall()
        return History(sorted(logged(messages)))

    def _drop(self) -> None:
        with psycopg.connect(self.server.url_of(self._name), autocommit=True) as connection:
            for (name,) in connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall():
                connection.execute(named("ROLLBACK PREPARED {}", name))  # of a test that failed
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                [self._name],
            )
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self._name)))


class Verdict(NamedTuple):
    """For each way: how many rows outranked a change of the log, and how many of those were outdated."""

    outranking: Counter[str]
    outdated: Counter[str]


def judge(reads: Iterable[Read], history: History) -> Verdict:
    verdict = Verdict(Counter(), Counter())
    for read in reads:
        for way, claim in read.claims.items():
            if claim is not None:
                for id_, rev in read.rows.items():
                    verdict.outranking[way] += history.newest_below(id_, claim) is not None
                    verdict.outdated[way] += history.is_outdated(id_, rev, claim)
    return Verdict(+verdict.outranking, +verdict.outdated)  # without zeros


def named(statement: LiteralString, name: str) -> sql.Composed:
    """Fill in the name of a prepared transaction, where the statement has a place for one."""
    return sql.SQL(statement).format(sql.Literal(name))


def one(connection: psycopg.Connection, query: LiteralString, parameters: Sequence[object] = ()) -> Any:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


# ── fixtures ─────────────────────────────────────────────────────────────────────────────────────────────────────

PASSWORD_VARIABLE = "DELTA_TEST_CLAIMS_PASSWORD"


@pytest.fixture(scope="module", params=[16, 18])
def server(request: pytest.FixtureRequest) -> Iterator[PostgreSQL]:
    """A server of these tests' own: they change settings that concern all sessions, and count transaction ids."""
    settings: dict[str, Any] = {
        "autovacuum": False,  # its transactions have ids, too
        "max_prepared_transactions": 20,
        "fsync": True,  # or commit_delay does nothing
        "max_replication_slots": 20,
    }
    with PostgreSQL(version=request.param, **settings) as server:
        yield server


@pytest.fixture
def source(server: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setenv(PASSWORD_VARIABLE, "postgres")
    with ExitStack() as exits:
        yield Source(server, exits)


# ── the two anomalies ────────────────────────────────────────────────────────────────────────────────────────────

STARTS: dict[str, tuple[LiteralString, ...]] = {
    "open": ("BEGIN", "UPDATE item SET rev = 1 WHERE id = 1"),
    "in a subtransaction": ("BEGIN", "SAVEPOINT a", "UPDATE item SET rev = 1 WHERE id = 1"),
    "subtransaction released": ("BEGIN", "SAVEPOINT a", "UPDATE item SET rev = 1 WHERE id = 1", "RELEASE a"),
    "prepared": ("BEGIN", "UPDATE item SET rev = 1 WHERE id = 1", "PREPARE TRANSACTION 'one'"),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_running_transaction_that_is_in_no_list(source: Source, start: str) -> None:
    """No transaction with a later id has ended, so the snapshot's xmax is this one's id: it is not in xip."""
    session = source.connect()
    before = source.reader.log_end()
    for statement in STARTS[start]:
        session.execute(statement)
    source.admin.execute("CHECKPOINT")  # so that the change, which is not committed, is below our sample as well
    source.sample()
    read = source.read_chunk(None)
    assert read.rows[1] == -1
    assert read.claims["ours"] is None
    assert read.claims["without locks"] is not None

    session.execute("COMMIT PREPARED 'one'" if start == "prepared" else "COMMIT")
    after = source.read_chunk(None)
    assert after.rows[1] == 1
    assert after.claims["ours"] is not None  # the same sample: it waited for no more than this transaction

    history = source.history()
    newest = history.newest_below(1, after.claims["ours"])
    assert newest is not None
    assert newest.rev == 1
    assert before <= newest.position  # the log's positions and the insert position are of one kind
    assert judge([after], history).outdated["ours"] == 0
    assert judge([read], history).outdated == {"without locks": 1, "position before": 1}


def test_an_aborted_transaction_is_waited_for_and_then_forgotten(source: Source) -> None:
    session = source.connect()
    session.execute("BEGIN")
    session.execute("UPDATE item SET rev = 1 WHERE id = 1")
    source.sample()
    assert source.read_chunk(None).claims["ours"] is None
    session.execute("ROLLBACK")
    read = source.read_chunk(None)
    assert read.claims["ours"] is not None
    assert judge([read], source.history()).outdated["ours"] == 0


@contextmanager
def absent_standby(source: Source) -> Generator[None]:
    """Commits wait for a standby that is not there."""

    def set_names(names: LiteralString) -> None:
        source.admin.execute("SET synchronous_commit = local")
        source.admin.execute("ALTER SYSTEM SET synchronous_standby_names = " + names)
        source.admin.execute("SELECT pg_reload_conf()")
        other = source.connect()
        wait_until(
            lambda: one(other, "SHOW synchronous_standby_names") == names.strip("'"), STATE_TIMEOUT_S, "the reload"
        )

    set_names("'absent'")
    try:
        yield
    finally:
        set_names("''")


def test_a_transaction_in_the_log_that_is_not_visible_yet(source: Source) -> None:
    source.sample()
    early = source.read_chunk(None)
    session = source.connect()
    with ThreadPoolExecutor(1) as other:
        with absent_standby(source):
            committing = other.submit(session.execute, "UPDATE item SET rev = 1 WHERE id = 1")
            pid = session.info.backend_pid
            wait_until(
                lambda: one(source.admin, "SELECT wait_event FROM pg_stat_activity WHERE pid = %s", [pid]) == "SyncRep",
                STATE_TIMEOUT_S,
                "the commit",
            )
            history = source.history()
            update = history.newest_below(1, source.reader.log_end())
            assert update is not None
            assert update.rev == 1  # the log delivers it

            before_sample = source.read_chunk(None)
            source.sample()
            read = source.read_chunk(None)
            by_key = source.read_keys([1])
            assert read.rows[1] == by_key.rows[1] == -1  # and nobody sees it
        committing.result()
    claim = early.claims["ours"]
    assert claim is not None
    for late in (before_sample, read, by_key):
        assert late.claims["ours"] == claim  # of the sample before: the update is left to the log
    verdict = judge([early, before_sample, read, by_key], history)
    assert verdict.outdated == {"without locks": 2, "position before": 3}
    after = source.read_chunk(None)
    assert after.rows[1] == 1
    assert after.claims["ours"] is not None
    assert after.claims["ours"] > update.position


# ── random interleavings, one statement at a time ────────────────────────────────────────────────────────────────


class Session:
    """A writer whose transaction advances by one statement at a time; `held` are the rows that it may have locked."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection
        self.connection.execute("SET synchronous_commit = off")
        self.open = False
        self.savepoints = 0
        self.held: set[int] = set()

    def end(self, statement: LiteralString | sql.Composed) -> None:
        self.connection.execute(statement)
        self.open = False
        self.savepoints = 0
        self.held = set()


class Interleaving:
    """Writers, samples and reads take turns by a seeded dice. Nothing waits, so time has no part in it."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source = source
        self.rng = random.Random(seed)
        self.sessions = [Session(source.connect()) for _ in range(5)]
        self.prepared: dict[str, set[int]] = {}
        self.revs = itertools.count(1)
        self.reads: list[Read] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            choice = self.rng.random()
            if choice < 0.12:
                self.source.sample()
            elif choice < 0.18:
                self.reads.append(self.source.read_chunk(self.rng.choice([None, 20, 40])))
            elif choice < 0.22:
                self.reads.append(self.source.read_keys(self.rng.sample(range(1, IDS + 1), 10)))
            elif choice < 0.25 and self.prepared:
                self._end_prepared(self.rng.choice(sorted(self.prepared)))
            else:
                self._advance(self.rng.choice(self.sessions))
        for session in self.sessions:
            session.end("COMMIT")
        for name in list(self.prepared):
            self._end_prepared(name)
        self.source.admin.execute(UPSERT, [0, 0])  # its commit takes to disk what the sessions left in memory

    def _advance(self, session: Session) -> None:
        choice = self.rng.random()
        if not session.open:
            if choice < 0.7:
                session.connection.execute("BEGIN")
                session.open = True
            self._write(session)
            if not session.open:
                session.held = set()
        elif choice < 0.55:
            self._write(session)
        elif choice < 0.65:
            session.connection.execute("SAVEPOINT a")
            session.savepoints += 1
        elif choice < 0.75 and session.savepoints:
            session.connection.execute("ROLLBACK TO a")
        elif choice < 0.80:
            session.end("ROLLBACK")
        elif choice < 0.85 and len(self.prepared) < 3 and session.held:
            name = uuid.UUID(int=self.rng.getrandbits(128)).hex
            self.prepared[name] = session.held
            session.end(named("PREPARE TRANSACTION {}", name))
        else:
            session.end("COMMIT")

    def _write(self, session: Session) -> None:
        taken = set[int]().union(*(other.held for other in self.sessions if other is not session))
        free = sorted(set(range(1, IDS + 1)) - taken.union(*self.prepared.values()))
        id_ = self.rng.choice(free)
        session.held.add(id_)
        if self.rng.random() < 0.25:
            session.connection.execute(DELETE, [id_])
        else:
            session.connection.execute(UPSERT, [id_, next(self.revs)])

    def _end_prepared(self, name: str) -> None:
        self.source.admin.execute(named(self.rng.choice(ENDS_PREPARED), name))
        del self.prepared[name]


SEEDS = [int(os.environ["DELTA_TEST_SEED"])] if "DELTA_TEST_SEED" in os.environ else [1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_interleaving_makes_a_row_outrank_what_it_lacks(source: Source, seed: int) -> None:
    interleaving = Interleaving(source, seed)
    interleaving.run(2000)
    verdict = judge(interleaving.reads, source.history())
    assert verdict.outdated["ours"] == 0
    assert verdict.outranking["ours"] > 100  # or the sentence above says little
    assert verdict.outdated["without locks"] > 0
    assert verdict.outdated["position before"] > 0


# ── random interleavings, at once ────────────────────────────────────────────────────────────────────────────────

WRITERS = 6
ENDS: tuple[LiteralString, ...] = ("COMMIT", "COMMIT", "COMMIT", "COMMIT", "ROLLBACK", "PREPARE TRANSACTION {}")
READS = 120  # that can claim something, by each of two readers
ROUNDS_MOST = 5


def write_until(stop: threading.Event, connection: psycopg.Connection, rng: random.Random, revs: Iterator[int]) -> None:
    """Run transactions of all kinds. Rows are taken in the order of their ids, so none waits in a circle."""
    connection.execute("SET commit_siblings = 0")
    connection.execute("SET commit_delay = 5000")  # microseconds between the commit in the log and its visibility
    while not stop.is_set():
        name = uuid.uuid4().hex
        end = rng.choice(ENDS)
        connection.execute("BEGIN")
        for id_ in sorted(rng.sample(range(1, IDS + 1), rng.randint(1, 4))):
            undone = rng.random() < 0.2
            if undone or rng.random() < 0.2:
                connection.execute("SAVEPOINT a")
            if rng.random() < 0.25:
                connection.execute(DELETE, [id_])
            else:
                connection.execute(UPSERT, [id_, next(revs)])
            if undone:
                connection.execute("ROLLBACK TO a")
            if rng.random() < 0.1:
                connection.execute("SELECT pg_sleep(%s)", [rng.uniform(0.001, 0.02)])
        connection.execute(named(end, name))
        if end.startswith("PREPARE"):
            connection.execute(named(rng.choice(ENDS_PREPARED), name))


def sample_until(stop: threading.Event, source: Source) -> None:
    while not stop.wait(0.01):
        source.sample()


def read_some(source: Source, reader: PostgresReader, rng: random.Random) -> list[Read]:
    """Read until READS of them can claim something."""
    reads: list[Read] = []
    claimed = 0
    while claimed < READS:
        if rng.random() < 0.6:
            reads.append(source.read_chunk(rng.choice([None, 20, 40]), reader))
        else:
            reads.append(source.read_keys(rng.sample(range(1, IDS + 1), 10), reader))
        claimed += reads[-1].claims["ours"] is not None
    return reads


def test_writers_and_readers_at_once(source: Source) -> None:
    revs = itertools.count(1)
    verdict = Verdict(Counter(), Counter())
    for round_ in range(ROUNDS_MOST):
        stop = threading.Event()
        with ThreadPoolExecutor(WRITERS + 3) as threads:
            working = [
                threads.submit(write_until, stop, source.connect(), random.Random(100 * round_ + number), revs)
                for number in range(WRITERS)
            ]
            working.append(threads.submit(sample_until, stop, source))
            reading = [
                threads.submit(read_some, source, source.new_reader(), random.Random(number)) for number in range(2)
            ]
            try:
                reads = [read for future in reading for read in future.result()]
            finally:
                stop.set()
            for future in working:
                future.result()
        verdict = judge(reads, source.history())
        assert verdict.outdated["ours"] == 0
        assert verdict.outranking["ours"] > 100
        if verdict.outdated["position before"] > 0:
            break
    assert verdict.outdated["position before"] > 0
