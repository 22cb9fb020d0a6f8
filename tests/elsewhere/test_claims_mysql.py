"""Claims on a real MySQL, held against its log: a row that outranks a change in the log must not be older than it.

A commit is in the log before it is visible, for as long as the log waits for the disk, or for a replica; one test has
it wait for one that never comes, the others take what comes. The wrong way must be seen to be wrong, or the test shows
nothing: it is tried a bounded number of times.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from delta_sync.errors import CheckFailed
from delta_sync.sources.mysql import gtid_reader as module
from delta_sync.sources.mysql.claims import XA_LISTED_S, OwnedSamples, Snapshot
from delta_sync.sources.mysql.connection import Session
from delta_sync.sources.mysql.gtid_reader import MySQLReader
from delta_sync.sources.mysql.reader import MariaReader, end_of_log, prepared_in
from delta_sync.testing.mariadb import PASSWORD
from delta_sync.testing.mysql import MySQL
from delta_sync.testing.processes import wait_until
from integration.binlog_history import IDS, Clock, Read, Source, execute, rows_of

WRITERS = 4
READERS = 2
BYTES_MOST = 1 << 30
DUMPS_AT_ONCE = 300
ROUNDS_AT_MOST = 20  # by when the wrong way has been seen to be wrong
XA_EVERY = 10  # transactions of one of the writers
PREPARED_S = 0.5
PATIENCE_S = 120.0


class MySQLSource(Source):
    """Of MySQL: making its table is not in the log."""

    reader_class = MySQLReader

    def create(self) -> None:
        execute(self.admin, "SET SESSION sql_log_bin = 0")
        execute(self.admin, "DROP TABLE IF EXISTS item")
        execute(self.admin, "CREATE TABLE item (id int PRIMARY KEY, rev bigint NOT NULL)")
        execute(self.admin, "SET SESSION sql_log_bin = 1")


@pytest.fixture(scope="module")
def server() -> Iterator[MySQL]:
    with MySQL(max_binlog_size=4096, binlog_rows_query_log_events="ON") as server:
        yield server


@pytest.fixture
def source(server: MySQL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setenv("DELTA_TEST_P", PASSWORD)
    with ExitStack() as exits:
        yield MySQLSource(server, exits)


@contextlib.contextmanager
def setting(source: Source, **variables: object) -> Iterator[None]:
    """Have the server work with other values for a while."""
    try:
        for name, value in variables.items():
            execute(source.admin, f"SET GLOBAL {name} = {value}")
        yield
    finally:
        for name in variables:
            execute(source.admin, f"SET GLOBAL {name} = DEFAULT")


# ── at once: writers, samples, readers ───────────────────────────────────────────────────────────────────────────────


class Contest:
    """Writers that never rest, one who samples, readers who claim as Delta does, and one with a bare snapshot.

    The last claims by the samples, by the same without who owned a GTID, and the log's end.
    """

    def __init__(self, source: Source, seed: str, *, xa: bool) -> None:
        self.source = source
        self.seed = seed
        self.xa = xa
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.ours, self.careless = OwnedSamples(), OwnedSamples()
        self.reads: list[Read] = []

    def write(self, number: int) -> None:
        rng = random.Random(f"{self.seed} writer {number}")
        session = self.source.connect()
        execute(session, "SET SESSION transaction_isolation = 'READ-COMMITTED'")  # without locks on gaps,
        own = range(number, IDS, WRITERS)  # so that nobody waits for a lock
        for turn in itertools.count(1):
            if self.stopping.is_set():
                return
            if self.xa and number == 0 and turn % XA_EVERY == 0:
                self._write_prepared(session, rng.choice(own), f"{self.seed} {turn}")
                continue
            session.begin()
            for _ in range(rng.choice([1, 1, 1, 3])):
                id_ = rng.choice(own)
                if rng.random() < 0.2:
                    execute(session, f"DELETE /* id={id_} rev=0 */ FROM item WHERE id = {id_}")
                else:
                    self.source.put(session, id_)
            session.commit() if rng.random() < 0.9 else session.rollback()

    def _write_prepared(self, session: Session, id_: int, xid: str) -> None:
        """Write a row that is in the log for some time before it is visible."""
        execute(session, f"XA START '{xid}'")
        self.source.put(session, id_)
        execute(session, f"XA END '{xid}'")
        execute(session, f"XA PREPARE '{xid}'")
        self.stopping.wait(PREPARED_S)
        execute(session, f"XA COMMIT '{xid}'")

    def sample(self) -> None:
        reader = MySQLReader(self.source.spec, "samples")
        while not self.stopping.is_set():
            sample = reader.sample()
            with self.lock:
                self.ours.add(sample)
                self.careless.add(sample._replace(owned=frozenset()))
        reader.close()

    def dump(self) -> None:
        reader = MySQLReader(self.source.spec, "dumps")
        while not self.stopping.is_set():
            claims: dict[str, int | None] = {}

            def usable(snapshot: Snapshot, claims: dict[str, int | None] = claims) -> bool:
                with self.lock:
                    claims["ours"] = self.ours.claim(snapshot, 0)
                claims["shown"] = snapshot.shown or None
                return True

            chunk = reader.read_chunk(self.source.table, None, 1000, BYTES_MOST, usable)
            assert chunk is not None
            self._keep(Read(rows_of(chunk.rows), claims))
        reader.close()

    def dump_bare(self) -> None:
        reader, session = MySQLReader(self.source.spec, "bare"), self.source.connect()
        while not self.stopping.is_set():
            snapshot = Snapshot(0, time.monotonic(), prepared_in(session))
            end = reader.log_end()
            execute(session, "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
            rows: dict[int, int | None] = dict.fromkeys(range(IDS))
            with session.cursor() as cursor:
                cursor.execute("SELECT id, rev FROM item")
                rows |= {int(id_): int(rev) for id_, rev in cursor.fetchall()}
            session.rollback()
            with self.lock:
                bare, careless = self.ours.claim(snapshot, 0), self.careless.claim(snapshot, 0)
            self._keep(Read(rows, {"bare": bare, "careless": careless, "end": end}))
        reader.close()

    def _keep(self, read: Read) -> None:
        with self.lock:
            self.reads.append(read)
            if sum(one.claims.get("ours") is not None for one in self.reads) >= DUMPS_AT_ONCE:
                self.stopping.set()

    def run(self) -> Counter[str]:
        """Return how many dumps of each way were wrong, and how many claimed."""
        writers = [lambda n=n: self.write(n) for n in range(WRITERS)]
        tasks = [*writers, self.sample, self.dump_bare, *[self.dump] * READERS]
        with ThreadPoolExecutor(len(tasks)) as pool:
            futures = [pool.submit(self._unless_stopped, task) for task in tasks]
        for future in futures:
            future.result()
        history = self.source.history()
        result: Counter[str] = Counter()
        for read in self.reads:
            for way, claim in read.claims.items():
                if claim is not None:
                    result[f"{way}: claims"] += 1
                    result[way] += any(history.is_outdated(id_, rev, claim) for id_, rev in read.rows.items())
        return result

    def _unless_stopped(self, task: Callable[[], None]) -> None:
        try:
            task()
        finally:
            self.stopping.set()


@pytest.mark.parametrize(("ordered", "xa"), [("ON", False), ("OFF", False), ("ON", True)])
def test_no_row_outranks_what_it_lacks(source: Source, ordered: str, xa: bool) -> None:
    """The last with XA: from then on the server is one that uses it."""
    assert source.reader.sample().uses_xa is False
    result: Counter[str] = Counter()
    with setting(source, binlog_order_commits=ordered):
        for round_ in range(ROUNDS_AT_MOST):
            result += Contest(source, f"{ordered} {round_}", xa=xa).run()
            print(f"binlog_order_commits {ordered}, XA {xa}: {dict(result)}")
            assert (result["ours"], result["shown"], result["bare"]) == (0, 0, 0), result
            if result["end"]:
                break
        else:
            pytest.fail(f"the wrong way was never wrong, so this shows nothing: {result}")


# ── one step after the other ─────────────────────────────────────────────────────────────────────────────────────────


def read_all(source: Source, samples: OwnedSamples, reader: MariaReader) -> tuple[dict[int, int | None], int | None]:
    """Read the table; return its rows and what they may claim."""
    claim: int | None = None

    def usable(snapshot: Snapshot) -> bool:
        nonlocal claim
        claim = samples.claim(snapshot, 0)
        return True

    chunk = reader.read_chunk(source.table, None, 1000, BYTES_MOST, usable)
    assert chunk is not None
    return rows_of(chunk.rows), claim


@contextlib.contextmanager
def a_replica_that_never_answers(source: Source) -> Iterator[None]:
    """Have commits wait between the log and the engine, until the plugin is switched off."""
    execute(source.admin, "INSTALL PLUGIN rpl_semi_sync_source SONAME 'semisync_source.so'")
    try:
        for name, value in (("timeout", 1_000_000_000), ("enabled", "ON")):
            execute(source.admin, f"SET GLOBAL rpl_semi_sync_source_{name} = {value}")
        yield
    finally:
        execute(source.admin, "UNINSTALL PLUGIN rpl_semi_sync_source")


def test_a_commit_that_is_in_the_log_and_not_visible_yet(source: Source) -> None:
    clock, samples, careless = Clock(), OwnedSamples(), OwnedSamples()

    def sample() -> None:
        clock.now_s += XA_LISTED_S
        taken = reader.sample()
        samples.add(taken)
        careless.add(taken._replace(owned=frozenset()))
        clock.now_s += XA_LISTED_S

    reader = source.new_reader(clock)
    source.put(source.admin, 1)
    sample()
    before = reader.log_end()
    writer = source.connect()
    with a_replica_that_never_answers(source), ThreadPoolExecutor(1) as pool:
        commit = pool.submit(source.put, writer, 1)
        try:
            wait_until(lambda: reader.log_end() > before, PATIENCE_S, "the change in the log")
            sample()
            rows, claim = read_all(source, samples, reader)
            wrong = careless.claim(Snapshot(0, clock.now_s), 0)
            assert not commit.done()
            assert "SELECT @@GLOBAL.gtid_owned" in str(reader.blockers()[0])
        finally:
            execute(source.admin, "SET GLOBAL rpl_semi_sync_source_enabled = OFF")
        commit.result()
    assert wrong is not None
    assert claim == before
    history = source.history()
    assert history.is_outdated(1, rows[1], wrong)
    assert not history.is_outdated(1, rows[1], claim)
    sample()
    rows, claim = read_all(source, samples, reader)
    assert claim == reader.log_end()  # at once, though the server rests
    assert not source.history().is_outdated(1, rows[1], claim)


def test_who_owns_a_gtid_is_asked_after_where_the_log_ends(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one that comes to the log between the two is below the end, and in no list."""
    reader, samples = source.new_reader(clock := Clock()), OwnedSamples()
    source.put(source.admin, 1)
    before, writer, real = reader.log_end(), source.connect(), module._owned
    with a_replica_that_never_answers(source), ThreadPoolExecutor(1) as pool:
        commits: list[Future[int]] = []

        def owned(session: Session) -> frozenset[str]:
            found = real(session)
            if not commits:
                commits.append(pool.submit(source.put, writer, 1))
                wait_until(lambda: end_of_log(session, reader.log_status) > before, PATIENCE_S, "the change")
            return found

        monkeypatch.setattr(module, "_owned", owned)
        try:
            samples.add(reader.sample())
            clock.now_s += XA_LISTED_S
            rows, claim = read_all(source, samples, reader)
        finally:
            execute(source.admin, "SET GLOBAL rpl_semi_sync_source_enabled = OFF")
        commits[0].result()
    assert claim is not None
    assert not source.history().is_outdated(1, rows[1], claim)


def test_changes_that_are_prepared_are_left_to_the_log(source: Source) -> None:
    """XA PREPARE writes them to the log at once; that they are visible comes later."""
    clock, samples, careless = Clock(), OwnedSamples(), OwnedSamples()

    def sample() -> None:
        clock.now_s += XA_LISTED_S
        taken = reader.sample()
        samples.add(taken)
        careless.add(taken._replace(prepared=frozenset()))
        clock.now_s += XA_LISTED_S

    reader = source.new_reader(clock)
    source.put(source.admin, 1)
    sample()
    before = reader.log_end()
    source.put(source.admin, 3)
    sample()  # that nothing was prepared then is known of changes before the sample before
    session = source.connect()
    for statement in ("XA START 'one'", None, "XA END 'one'", "XA PREPARE 'one'"):
        execute(session, statement) if statement else source.put(session, 1)
    sample()
    rows, claim = read_all(source, samples, reader)
    assert claim == before
    wrong = careless.claim(Snapshot(0, clock.now_s), 0)
    assert wrong is not None
    history = source.history()
    assert history.is_outdated(1, rows[1], wrong)  # so the log has the change, and the row lacks it
    assert not history.is_outdated(1, rows[1], claim)
    assert "XA transaction" in str(reader.blockers()[0])
    execute(session, "XA COMMIT 'one'")
    sample()
    rows, claim = read_all(source, samples, reader)
    assert claim is not None
    assert claim > before
    assert not source.history().is_outdated(1, rows[1], claim)


def test_a_session_that_owns_a_gtid_and_rests_is_named(source: Source) -> None:
    session = source.connect()
    execute(session, "SET gtid_next = '00000000-0000-0000-0000-00000000dead:7'")
    assert [str(one) for one in source.reader.blockers()] == [
        "the transaction 00000000-0000-0000-0000-00000000dead:7 (SELECT @@GLOBAL.gtid_owned names its thread)"
    ]
    session.rollback()


def test_transactions_without_gtids_are_noticed(source: Source) -> None:
    try:
        execute(source.admin, "SET GLOBAL gtid_mode = ON_PERMISSIVE")
        with pytest.raises(CheckFailed, match="gtid_mode is ON_PERMISSIVE"):
            source.reader.sample()
    finally:
        execute(source.admin, "SET GLOBAL gtid_mode = ON")


def test_a_log_that_begins_anew(source: Source) -> None:
    source.put(source.admin, 1)
    end = source.reader.log_end()
    with source.admin.cursor() as cursor:
        cursor.execute("SELECT @@GLOBAL.gtid_executed")
        gtids = str(cursor.fetchall()[0][0])
    identity = source.reader.identity()
    assert source.reader.why_lost(end, gtids) is None
    execute(source.admin, "RESET BINARY LOGS AND GTIDS")
    early = source.reader.log_end()
    source.put(source.admin, 2)
    assert "RESET" in (source.reader.why_lost(end, gtids) or "")
    assert source.reader.why_lost(early) is None  # by the place alone it could be the same log
    assert "begins anew" in (source.reader.why_lost(early, gtids) or "")
    assert source.reader.identity() == identity
