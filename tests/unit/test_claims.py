"""Claims, on a model of PostgreSQL: a transaction's records, its lock, its commit, and when it becomes visible."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from delta_sync.sources.postgresql.claims import Sample, Samples, Snapshot, parse_snapshot, sample_of, widen


def test_parse_snapshot() -> None:
    assert parse_snapshot("725:730:725,728") == Snapshot(725, 730, frozenset({725, 728}))
    assert parse_snapshot("725:725:") == Snapshot(725, 725, frozenset())


def test_a_snapshot_sees_what_had_ended() -> None:
    snapshot = parse_snapshot("10:14:10,12")
    assert [xid for xid in range(8, 16) if snapshot.sees(xid)] == [8, 9, 11, 13]


@pytest.mark.parametrize(
    ("xid", "near", "wide"),
    [
        (5, 7, 5),
        (7, 5, 7),
        (3, (1 << 32) - 1, (1 << 32) + 3),  # the counter has just wrapped
        ((1 << 32) - 1, 1 << 32, (1 << 32) - 1),  # it wrapped after this one began
        (100, (5 << 32) + 90, (5 << 32) + 100),
    ],
)
def test_widen(xid: int, near: int, wide: int) -> None:
    assert widen(xid, near) == wide


def test_the_running_transaction_that_a_snapshot_does_not_list() -> None:
    """725 is running and has written, but nothing later has completed, so xmax is 725: only its lock shows it."""
    assert sample_of(0x1524EF8, [725], 725) == Sample(0x1524EF8, 726)
    samples = Samples()
    samples.add(sample_of(0x1524EF8, [725], 725))
    assert samples.claim(parse_snapshot("725:725:"), 0) is None
    assert samples.claim(parse_snapshot("726:726:"), 0) == 0x1524EF8


def test_the_newest_usable_sample_counts() -> None:
    samples = Samples()
    for sample in (Sample(100, 10), Sample(200, 12), Sample(300, 20)):
        samples.add(sample)
    assert samples.claim(Snapshot(15, 18, frozenset({15})), 0) == 200
    assert samples.claim(Snapshot(15, 18, frozenset({15})), 200) == 200
    assert samples.claim(Snapshot(15, 18, frozenset({15})), 201) is None  # before the log covers the table
    assert samples.claim(Snapshot(9, 9, frozenset()), 0) is None


def test_samples_are_bounded_and_keep_the_newest() -> None:
    samples = Samples(limit=8)
    for number in range(1000):
        samples.add(Sample(number, number))
    assert samples.claim(Snapshot(5000, 5000, frozenset()), 0) == 999
    assert len(samples._samples) <= 8


@dataclass
class Server:
    """A model: one row; transactions write records, commit in the WAL, and become visible some steps later."""

    lsn: int = 1000
    next_xid: int = 700
    latest_completed: int = 699
    running: set[int] = field(default_factory=set)  # holds its transaction-id lock, in every snapshot's xip or ≥ xmax
    records: dict[int, list[int]] = field(default_factory=dict)  # xid → lsns of its changes
    visible: set[int] = field(default_factory=set)

    def begin(self) -> int:
        xid = self.next_xid
        self.next_xid += 1
        self.running.add(xid)
        self.records[xid] = []
        return xid

    def write(self, xid: int) -> None:
        self.records[xid].append(self.lsn)
        self.lsn += random.Random(self.lsn).randint(1, 50)

    def end(self, xid: int) -> None:
        """Its commit record is in the WAL long before this: only now others see it."""
        self.running.discard(xid)
        self.visible.add(xid)
        self.latest_completed = max(self.latest_completed, xid)

    def snapshot(self) -> Snapshot:
        xmax = self.latest_completed + 1
        xip = frozenset(xid for xid in self.running if xid < xmax)
        return Snapshot(min([*xip, xmax]), xmax, xip)


def _violations(seed: int, *, with_locks: bool) -> int:
    """Count claims that a random run would make although a change below the claim is not in the snapshot."""
    rng = random.Random(seed)
    server, samples, wrong = Server(), Samples(), 0
    stage, lsn, running = 0, 0, set[int]()
    for _ in range(400):
        choice = rng.random()
        if choice < 0.2:
            server.begin()
        elif choice < 0.6 and server.running:
            server.write(rng.choice(sorted(server.running)))
        elif choice < 0.75 and server.running:
            server.end(rng.choice(sorted(server.running)))
        elif choice < 0.9:
            # A sample's three readings, with anything in between.
            if stage == 0:
                lsn = server.lsn
            elif stage == 1:
                running = set(server.running)
            else:
                samples.add(sample_of(lsn, running if with_locks else (), server.latest_completed + 1))
            stage = (stage + 1) % 3
        else:
            snapshot = server.snapshot()
            claim = samples.claim(snapshot, 0)
            if claim is not None:
                wrong += any(
                    record < claim
                    for xid, records in server.records.items()
                    if not snapshot.sees(xid)
                    for record in records
                )
    return wrong


def test_no_interleaving_makes_a_claim_too_high() -> None:
    assert sum(_violations(seed, with_locks=True) for seed in range(500)) == 0


def test_without_the_locks_claims_are_too_high() -> None:
    """The model can fail: this is the variant that reads only the insert position and xmax."""
    assert sum(_violations(seed, with_locks=False) for seed in range(500)) > 0
