"""Claims on a real MariaDB, held against its log: a row that outranks a change in the log must not be older than it.

The server begins a new file of its log every few transactions. Claims are taken in several ways at the same time; the
wrong ones must be seen to be wrong, or the test shows nothing: they are tried a bounded number of times.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pymysql
import pytest

from delta_sync.errors import SchemaChanged, SourceBusy
from delta_sync.sources.mysql import reader as module
from delta_sync.sources.mysql.claims import STOOD_S, Samples, Snapshot
from delta_sync.sources.mysql.connection import Session, connect
from delta_sync.sources.mysql.reader import MariaReader
from delta_sync.testing.mariadb import PASSWORD, MariaDB
from delta_sync.testing.processes import wait_until
from integration.binlog_history import IDS, Clock, Read, Source, execute, rows_of

WRITERS = 4
READERS = 2
MONITORS = 2
MONITOR = """BEGIN NOT ATOMIC
  DECLARE asked INT DEFAULT 0;
  WHILE asked < 100000000 DO
    SELECT COUNT(*) INTO @count FROM information_schema.session_status WHERE variable_name LIKE 'binlog_snapshot%';
    SET asked = asked + 1;
  END WHILE;
END"""
BYTES_MOST = 1 << 30
SURE_AT_ONCE = 150
BURST, REST_S = 40, 0.1  # transactions, and then a rest: or no file of 4 KiB lasts long enough to be settled
BARE_EACH = 8  # snapshots for each sure one
DUMPS_AT_ONCE = 500
ROUNDS_AT_MOST = 20  # by when the wrong way has been seen to be wrong
WAIT_S = 60.0
ANSWERS_AT_MOST = 100_000  # by when one has been another session's: it is one of fifty


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDB]:
    with MariaDB(max_binlog_size=4096) as server:
        yield server


@pytest.fixture
def source(server: MariaDB, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setenv("DELTA_TEST_P", PASSWORD)
    with ExitStack() as exits:
        yield Source(server, exits)


# ── at once: writers, samples, readers, and monitors ─────────────────────────────────────────────────────────────


def number_of(session: Session) -> int:
    with session.cursor() as cursor:
        cursor.execute("SELECT CONNECTION_ID()")
        ((number,),) = cursor.fetchall()
        return int(number)


@contextmanager
def monitors(source: Source) -> Generator[None]:
    """Sessions that ask for the server's status without a pause, on the server itself."""
    sessions = [source.connect() for _ in range(MONITORS)]
    numbers = {session: number_of(session) for session in sessions}

    def ask(session: Session) -> None:
        with contextlib.suppress(pymysql.Error):
            execute(session, MONITOR)

    with ThreadPoolExecutor(MONITORS) as pool:
        for session in sessions:
            pool.submit(ask, session)
        try:
            yield
        finally:
            for session in sessions:  # the server would go on for one that is only closed
                execute(source.admin, f"KILL {numbers[session]}")


class Contest:
    """Writers that never rest, one who samples, and readers, each of whose dumps claims in every way."""

    def __init__(self, source: Source, seed: str) -> None:
        self.source = source
        self.seed = seed
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.ours = Samples()
        self.eager = Samples(limit=1 << 20, listed_s=0.0)  # claims what was sampled just now
        self.reads: list[Read] = []

    def write(self, number: int) -> None:
        rng = random.Random(f"{self.seed} writer {number}")
        session = connect(self.source.spec)
        execute(session, "SET SESSION tx_isolation = 'READ-COMMITTED'")  # without locks on gaps,
        own = range(number, IDS, WRITERS)  # so that nobody waits for a lock
        while not self.stopping.is_set():
            count = rng.choice([1, 1, 1, 3])
            session.begin()
            for _ in range(count):
                id_ = rng.choice(own)
                if rng.random() < 0.2:
                    execute(session, f"DELETE /* id={id_} rev=0 */ FROM item WHERE id = {id_}")
                else:
                    self.source.put(session, id_)
            session.commit() if rng.random() < 0.9 else session.rollback()
        session.shut()

    def sample(self) -> None:
        reader = MariaReader(self.source.spec, "samples")
        while not self.stopping.is_set():
            sample = reader.sample()
            with self.lock:
                self.ours.add(sample)
                self.eager.add(sample)
        reader.close()

    def dump(self) -> None:
        """As Delta does; the claims of two ways are of the same rows."""
        reader = MariaReader(self.source.spec, "dumps")
        while not self.stopping.is_set():
            claims: dict[str, int | None] = {}

            def usable(snapshot: Snapshot, claims: dict[str, int | None] = claims) -> bool:
                with self.lock:
                    claims["ours"] = self.ours.claim(snapshot, 0)
                    claims["eager"] = self.eager.claim(snapshot, 0)
                claims["position itself"] = snapshot.position
                return True

            chunk = reader.read_chunk(self.source.table, None, 1000, BYTES_MOST, usable)
            assert chunk is not None
            with self.lock:
                self.reads.append(Read(rows_of(chunk.rows), claims))
                if len(self.reads) >= DUMPS_AT_ONCE:
                    self.stopping.set()
        reader.close()

    def run(self) -> Counter[str]:
        """Return how many dumps of each way were wrong, and how many claimed."""
        tasks = [*(lambda n=n: self.write(n) for n in range(WRITERS)), self.sample, *[self.dump] * READERS]
        with monitors(self.source), ThreadPoolExecutor(len(tasks)) as pool:
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


SEEDS = [int(os.environ["DELTA_TEST_SEED"])] if "DELTA_TEST_SEED" in os.environ else [1]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_outranks_what_it_lacks(source: Source, seed: int) -> None:
    result: Counter[str] = Counter()
    for round_ in range(ROUNDS_AT_MOST):
        result += Contest(source, f"{seed} {round_}").run()
        print(f"seed {seed}: {dict(result)}")
        assert (result["ours"], result["eager"]) == (0, 0), result
        if result["position itself"]:
            break
    else:
        pytest.fail(f"the wrong way was never wrong, so this shows nothing: {result}")
    assert min(result["ours: claims"], result["eager: claims"]) > DUMPS_AT_ONCE / 2, result


# ── clocks: numbers that rise with what snapshots show ──────────────────────────────────────────────────────────────


class Seen(NamedTuple):
    """A snapshot's clock, and how many transactions it shows."""

    clock: int
    commits: int


def misleading(seen: Sequence[Seen]) -> int:
    """Return how many clocks belong to snapshots that show different things, or less than a lower one's."""
    by_clock: dict[int, set[int]] = {}
    for one in seen:
        by_clock.setdefault(one.clock, set()).add(one.commits)
    wrong, most = 0, 0
    for _, commits in sorted(by_clock.items()):
        wrong += len(commits) > 1 or min(commits) < most
        most = max(most, *commits)
    return wrong


class Race:
    """Writers of whose transactions each adds one to a sum, and readers, who look at it in two kinds of snapshots."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stopping = threading.Event()
        self.sure: list[Seen] = []
        self.bare: list[Seen] = []

    def write(self, number: int) -> None:
        session = connect(self.source.spec)
        rng = random.Random(number)
        while not self.stopping.wait(REST_S):
            for _ in range(BURST):
                session.begin()
                execute(session, f"UPDATE item SET rev = rev + 1 WHERE id = {rng.randrange(number, IDS, WRITERS)}")
                session.commit()
        session.shut()

    def read(self) -> None:
        reader = MariaReader(self.source.spec, "clocks")
        while not self.stopping.is_set():
            with reader._connected() as session:
                for _ in range(BARE_EACH):
                    with reader._snapshot(session) as snapshot:
                        self.bare.append(Seen(snapshot.position, commits_in(session)))
                with contextlib.suppress(SourceBusy), reader._sure_snapshot(session) as snapshot:
                    self.sure.append(Seen(snapshot.clock, commits_in(session)))
            if len(self.sure) >= SURE_AT_ONCE:
                self.stopping.set()
        reader.close()

    def run(self) -> None:
        tasks = [*(lambda n=n: self.write(n) for n in range(WRITERS)), *[self.read] * READERS]
        with ThreadPoolExecutor(len(tasks)) as pool:
            for future in [pool.submit(task) for task in tasks]:
                future.result()


def commits_in(session: Session) -> int:
    with session.cursor() as cursor:
        cursor.execute("SELECT SUM(rev) FROM item")
        ((found,),) = cursor.fetchall()
        return int(found)


def test_clocks_rise_with_what_snapshots_show(source: Source) -> None:
    """Bare positions mislead in one snapshot of some hundreds to thousands: too seldom to be waited for."""
    # Or no file of 4 KiB is ever settled in time.
    execute(source.admin, "SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    execute(source.admin, "INSERT INTO item VALUES " + ", ".join(f"({id_}, 0)" for id_ in range(IDS)))
    race = Race(source)
    race.run()
    print(f"bare: {misleading(race.bare)} of {len(race.bare)}; sure: {misleading(race.sure)} of {len(race.sure)}")
    assert len({one.clock for one in race.sure}) > SURE_AT_ONCE / 10, "they saw the log advance"
    assert misleading(race.sure) == 0


# ── one step after the other ─────────────────────────────────────────────────────────────────────────────────────


def read_all(
    source: Source, samples: Samples, clock: Clock, reader: MariaReader
) -> tuple[dict[int, int | None], int | None]:
    """Read the table; return its rows and what they may claim."""
    claim: int | None = None

    def usable(snapshot: Snapshot) -> bool:
        nonlocal claim
        claim = samples.claim(snapshot, 0)
        return True

    chunk = reader.read_chunk(source.table, None, 1000, BYTES_MOST, usable)
    assert chunk is not None
    return rows_of(chunk.rows), claim


def test_one_answer_may_be_another_sessions(source: Source) -> None:
    """So all the reads of a snapshot's position have to agree."""
    clock, samples = Clock(), Samples()
    reader = source.new_reader(clock)
    source.put(source.admin, 1)
    session = source.connect()
    position = 0

    def at_the_end() -> bool:
        """The server may still add a note to a new file, and the monitors of the test before still ask."""
        nonlocal position
        execute(session, "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        position = module._snapshot_position(session)
        return position == reader.log_end()

    wait_until(at_the_end, WAIT_S, "a snapshot at the log's end")
    rev = source.put(source.admin, 1)
    samples.add(reader.sample())
    source.put(source.admin, 2)
    agreed: list[int] = []
    with monitors(source):
        for _ in range(ANSWERS_AT_MOST // module.READS):
            answers = [module._snapshot_position(session) for _ in range(module.READS)]
            agreed += answers[:1] if len(set(answers)) == 1 else []
            if wrong := set(answers) - {position}:
                break
        else:
            pytest.fail(f"{ANSWERS_AT_MOST} answers were right, so this shows nothing")
    assert set(agreed) <= {position}
    claim = samples.claim(Snapshot(max(wrong), 1.0), 0)
    assert claim is not None
    with session.cursor() as cursor:
        cursor.execute("SELECT rev FROM item WHERE id = 1")
        seen = [int(row[0]) for row in cursor.fetchall()]
    assert seen != [rev]
    assert source.history().is_outdated(1, seen[0], claim)


def test_a_server_at_rest_is_claimed_after_a_while(source: Source) -> None:
    clock, samples = Clock(), Samples()
    reader = source.new_reader(clock)
    source.put(source.admin, 1)
    for now_s in (0.0, 3.0, STOOD_S - 0.1):
        clock.now_s = now_s
        samples.add(reader.sample())
        assert read_all(source, samples, clock, reader)[1] is None
    clock.now_s = STOOD_S
    rows, claim = read_all(source, samples, clock, reader)
    assert claim == reader.log_end()
    assert not any(source.history().is_outdated(id_, rev, claim) for id_, rev in rows.items())


def test_a_server_that_waits_for_a_replica_is_not_at_rest(source: Source) -> None:
    """Its log has a transaction that nobody sees, and may go on to a new file meanwhile."""
    clock, samples, careless = Clock(), Samples(), Samples()
    reader = source.new_reader(clock)
    source.put(source.admin, 1)
    before = reader.sample()
    samples.add(before)
    for value in ("timeout = 3600000", "wait_point = 'AFTER_SYNC'", "enabled = ON"):
        execute(source.admin, f"SET GLOBAL rpl_semi_sync_master_{value}")
    rev = next(source.revs)
    large = (
        f"UPDATE /* id=1 rev={rev} */ item SET rev = {rev} WHERE id = 1 /* {'x' * 5000} */"  # the log's file is full
    )
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(execute, source.connect(), large)
            wait_until(lambda: reader.sample().waits, WAIT_S, "a commit that waits for a replica")
            for now_s in (1.0, 3.0, 1.0 + STOOD_S, 3 * STOOD_S):
                clock.now_s = now_s
                samples.add(reader.sample())
                careless.add(reader.sample()._replace(waits=False))
            clock.now_s += STOOD_S
            assert read_all(source, samples, clock, reader)[1] == before.position
            rows, claim = read_all(source, careless, clock, reader)
            assert claim is not None
        finally:
            execute(source.admin, "SET GLOBAL rpl_semi_sync_master_enabled = OFF")
        waiting.result()
    assert any(source.history().is_outdated(id_, rev, claim) for id_, rev in rows.items()), "it claims what it lacks"
    samples.add(reader.sample())
    clock.now_s += STOOD_S
    rows, claim = read_all(source, samples, clock, reader)
    assert claim == reader.log_end()
    assert not any(source.history().is_outdated(id_, rev, claim) for id_, rev in rows.items())


def test_changes_that_are_prepared_are_left_to_the_log(source: Source) -> None:
    """XA PREPARE writes them to the log at once; that they are visible comes later."""
    clock, samples, careless = Clock(), Samples(), Samples()

    def sample() -> None:
        clock.now_s += 1.0
        taken = reader.sample()
        samples.add(taken)
        careless.add(taken._replace(prepared=frozenset()))

    reader = source.new_reader(clock)
    source.put(source.admin, 1)
    sample()
    source.put(source.admin, 3)
    sample()
    before = reader.log_end()
    session = source.connect()
    for statement in ("XA START 'one'", None, "XA END 'one'", "XA PREPARE 'one'"):
        execute(session, statement) if statement else source.put(session, 1)
    source.put(source.admin, 2)
    sample()
    source.put(source.admin, 2)
    clock.now_s += 1.0
    rows, claim = read_all(source, samples, clock, reader)
    assert claim is not None
    assert claim < before
    taken = reader.sample()
    wrong = careless.claim(Snapshot(taken.position, clock.now_s), 0)
    assert wrong is not None
    history = source.history()
    assert history.is_outdated(1, rows[1], wrong)  # so the log has the change, and the row lacks it
    assert not any(history.is_outdated(id_, rev, claim) for id_, rev in rows.items())

    execute(session, "XA COMMIT 'one'")
    sample()
    source.put(source.admin, 2)
    clock.now_s += 1.0
    rows, claim = read_all(source, samples, clock, reader)
    assert claim is not None
    assert claim > before
    assert not any(source.history().is_outdated(id_, rev, claim) for id_, rev in rows.items())


def test_a_table_that_was_altered_or_emptied_since_the_snapshot(source: Source) -> None:
    for statement in ("ALTER TABLE item MODIFY rev varchar(30)", "TRUNCATE TABLE item", "DROP TABLE item"):

        def usable(_: Snapshot, statement: str = statement) -> bool:
            execute(source.admin, statement)
            return True

        source.put(source.admin, 1) if statement.startswith("TRUNCATE") else None
        with pytest.raises(SchemaChanged):
            source.reader.read_chunk(source.table, None, 10, BYTES_MOST, usable)
        assert source.reader.sample().position > 0  # the connection is as it was


def test_answers_that_do_not_agree_are_asked_for_again(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._snapshot_position  # as no other program asks at just the right moment
    given = iter([7, None, None, None, 9, None])

    def position(session: Session) -> int:
        return next(given, None) or real(session)

    monkeypatch.setattr(module, "_snapshot_position", position)
    assert source.reader.sample().position == source.reader.log_end()
    assert next(given, "used up") == "used up"


def test_what_a_restart_and_a_reset_do_to_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTA_TEST_P", PASSWORD)
    with MariaDB() as server, ExitStack() as exits:
        source = Source(server, exits)
        identity, end = source.reader.identity(), source.reader.log_end()
        source.put(source.admin, 1)
        assert source.reader.why_lost(end) is None
        server.kill()
        server.start()
        with pytest.raises(SourceBusy):
            source.reader.log_end()
        assert source.reader.identity() == identity
        after = source.reader.log_end()
        assert after > end
        assert source.reader.sample().position == after
        admin = source.connect()
        execute(admin, "FLUSH BINARY LOGS")
        with admin.cursor() as cursor:
            cursor.execute("SHOW BINARY LOGS")
            execute(admin, f"PURGE BINARY LOGS TO '{cursor.fetchall()[-1][0]}'")
        assert "has removed the file" in (source.reader.why_lost(end) or "")
        with admin.cursor() as cursor:
            cursor.execute("SELECT @@global.gtid_binlog_pos")
            gtids = cursor.fetchall()[0][0]
        assert source.reader.why_lost(source.reader.log_end(), gtids) is None
        execute(admin, "RESET MASTER")
        assert "RESET MASTER" in (source.reader.why_lost(after) or "")
        assert source.reader.identity() == identity
        early = source.reader.log_end()
        source.put(admin, 2)
        assert source.reader.why_lost(early) is None  # by the place alone it could be the same log
        assert "begins anew" in (source.reader.why_lost(early, gtids) or "")
