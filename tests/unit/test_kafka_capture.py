"""The capture over a consumer group: what is committed, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping

import pytest

from delta_sync.capture import Batch
from delta_sync.errors import GenerationsChanged, StateBusy
from delta_sync.kafka import capture as module
from delta_sync.kafka.capture import KafkaCapture, lag_of
from delta_sync.kafka.consumer import KafkaBusy, Partition, PositionsExpired, Records
from delta_sync.kafka.topic_ids import SeenTopics, made_anew
from delta_sync.measures import PartitionLag
from delta_sync.progress import LogPosition, Progress
from delta_sync.testing.processes import wait_until

TOPIC = "delta_movies.public.movie"
EPOCH_S = 1_700_000_000.0  # when the clock of a bench was at 0
BEGINNING = 50  # of every partition, once a group is rewound
P0, P1 = Partition(TOPIC, 0), Partition(TOPIC, 1)


class Group:
    """Hands out what a test puts into `coming`; commits of partitions that are not assigned are left out."""

    def __init__(self) -> None:
        self.coming: list[list[Records] | Exception | Callable[[], None]] = []
        self.committed: dict[Partition, int] = {}
        self.commits: list[dict[Partition, int]] = []
        self.mine: set[Partition] = set()
        self.paused = self.closed = self.rebalancing = False
        self.woken = self.polls = 0
        self.unread: dict[Partition, int] = {}
        self.rewound: list[dict[Partition, int]] = []

    def subscribe(
        self,
        topics: Collection[str],
        assigned: Callable[[Collection[Partition]], None],
        revoked: Callable[[Collection[Partition]], None],
    ) -> None:
        assert list(topics) == [TOPIC]
        self._assigned, self._revoked = assigned, revoked

    def give(self, *partitions: Partition) -> Callable[[], None]:
        def happens() -> None:
            self.mine.update(partitions)
            self._assigned(partitions)

        return happens

    def take(self, *partitions: Partition) -> Callable[[], None]:
        def happens() -> None:
            self._revoked(partitions)
            self.mine.difference_update(partitions)

        return happens

    def poll(self, timeout_s: float) -> list[Records]:
        self.polls += 1
        while self.coming and not self.paused:
            what = self.coming.pop(0)
            if isinstance(what, list):
                return what
            if isinstance(what, Exception):
                raise what
            what()
        return []

    def commit(self, positions: Mapping[Partition, int]) -> bool:
        self.commits.append({partition: at for partition, at in positions.items() if partition in self.mine})
        if self.rebalancing:
            return False
        self.committed.update(self.commits[-1])
        return True

    def rewind(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        self.rewound.append(dict.fromkeys((at for at in partitions if at in self.mine), BEGINNING))
        return self.rewound[-1]

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def lags(self) -> dict[Partition, int]:
        return self.unread

    def wake(self) -> None:
        self.woken += 1

    def close(self) -> None:
        self.closed = True


class Bench:
    def __init__(self) -> None:
        self.now = 100.0
        self.groups: list[Group] = []
        self.progress = Progress(LogPosition(lambda: self.now), lambda: self.now)
        self.lost: list[tuple[list[Partition], str, dict[Partition, int]]] = []  # and what was committed at that moment
        self.failing: Exception | None = None
        self.unchanged: Callable[[], None] = lambda: None
        self.saved, self.topic_ids = {P0: "old", P1: "old"}, {P0: "old", P1: "old"}
        self.looks: list[tuple[int, int]] = []  # how many groups there were, and polls of the last
        self.capture = KafkaCapture(
            self._open,
            [TOPIC],
            self.progress,
            self._note_lost,
            self.look,
            self.saved.update,
            lambda: self.unchanged(),
            lambda: self.now,
            lambda: EPOCH_S + self.now,
        )
        self.capture.start()

    def _open(self) -> Group:
        self.groups.append(Group())
        return self.groups[-1]

    def _note_lost(self, partitions: Collection[Partition], why: str) -> None:
        if self.failing is not None:
            raise self.failing
        self.lost.append((sorted(partitions), why, dict(self.group.committed)))

    def look(self) -> SeenTopics:
        self.looks.append((len(self.groups), self.group.polls))
        return SeenTopics(dict(self.saved), dict(self.topic_ids))

    @property
    def group(self) -> Group:
        return self.groups[-1]

    def poll(self, *coming: list[Records] | Exception | Callable[[], None]) -> Batch | None:
        self.group.coming += coming
        self.now += 1.0
        return self.capture.poll(0.1)

    def batch(self, *coming: list[Records] | Exception | Callable[[], None]) -> Batch:
        batch = self.poll(*coming)
        assert batch is not None
        return batch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(module, "ASKED_S", 60.0)  # the state store's answer is there before a poll returns
    made = Bench()
    made.poll(made.group.give(P0, P1))
    return made


def records(
    partition: Partition, next_offset: int, count: int = 1, size_bytes: int = 10, sent_at: float = 0.0
) -> Records:
    sent_ms = [round(1000 * (EPOCH_S + sent_at)) + number for number in range(count)]
    return Records(partition, [b"k"] * count, [b"v" * size_bytes] * count, [b"1"] * count, sent_ms, next_offset)


def test_a_position_is_committed_when_its_batch_is_confirmed(bench: Bench) -> None:
    batch = bench.batch([records(P0, 5, count=5), records(P1, 3, count=3)])
    assert batch.events == 8
    bench.poll()
    assert bench.group.commits == []
    bench.capture.confirm(batch)
    bench.poll()
    assert bench.group.committed == {P0: 5, P1: 3}
    bench.poll()
    assert len(bench.group.commits) == 1  # nothing new


def test_a_commit_that_was_not_done_is_repeated(bench: Bench) -> None:
    """A rebalance may refuse it, and the partition stay here: then no record comes that would commit it later."""
    bench.group.rebalancing = True
    bench.capture.confirm(bench.batch([records(P0, 5)]))
    bench.poll()
    assert (bench.group.commits, bench.group.committed) == ([{P0: 5}], {})
    bench.group.rebalancing = False
    bench.now += 3.0
    bench.poll()
    assert bench.group.committed == {P0: 5}
    bench.now += 3.0
    bench.poll()
    assert len(bench.group.commits) == 2


def test_confirming_a_batch_confirms_all_before_it(bench: Bench) -> None:
    bench.batch([records(P0, 5)])
    second = bench.batch([records(P1, 3)])
    bench.batch([records(P0, 9)])
    bench.capture.confirm(second)
    bench.poll()
    assert bench.group.committed == {P0: 5, P1: 3}


def test_what_is_confirmed_of_a_partition_is_committed_before_it_goes(bench: Bench) -> None:
    bench.capture.confirm(bench.batch([records(P0, 2)]))
    bench.poll()
    confirmed = bench.batch([records(P0, 5), records(P1, 5)])
    bench.batch([records(P0, 9)])
    bench.capture.confirm(confirmed)
    bench.now -= 3.0  # no commit is due
    bench.poll(bench.group.take(P0))
    assert bench.group.commits == [{P0: 2}, {P0: 5}]
    bench.now += 3.0
    bench.poll()
    assert bench.group.committed == {P0: 5, P1: 5}


def test_a_partition_that_went_and_came_back_is_not_committed_for_batches_of_before(bench: Bench) -> None:
    """Another member was further, perhaps: to commit an old position would deliver it all again."""
    before = bench.batch([records(P0, 5), records(P1, 5)])
    bench.poll(bench.group.take(P0), bench.group.give(P0))
    after = bench.batch([records(P0, 90)])
    bench.capture.confirm(before)
    bench.poll()
    assert bench.group.committed == {P1: 5}
    bench.capture.confirm(after)
    bench.poll()
    assert bench.group.committed == {P0: 90, P1: 5}


def test_records_after_a_loss_are_of_another_generation(bench: Bench) -> None:
    """The worker must not take what is delivered again for what follows."""
    before = bench.batch([records(P0, 5)])
    after = bench.batch(bench.group.take(P1), [records(P0, 9)])
    assert after.generation > before.generation


def test_commits_are_not_made_all_the_time(bench: Bench) -> None:
    for offset in range(1, 5):
        bench.now -= 1.0 - module.COMMIT_S / 4
        bench.capture.confirm(bench.batch([records(P0, offset)]))
    bench.poll()
    assert bench.group.committed == {P0: 4}
    assert len(bench.group.commits) <= 2


def test_it_waits_while_too_much_is_unconfirmed(bench: Bench) -> None:
    batches = [bench.batch([records(P0, offset)]) for offset in range(module.IN_FLIGHT_BATCHES)]
    assert bench.poll([records(P0, 100)]) is None
    assert not bench.group.paused  # clients throw away what they fetched ahead
    bench.capture.confirm(batches[0])
    assert bench.poll() is not None


def test_it_pauses_when_that_lasts_and_goes_on_then(bench: Bench) -> None:
    batches = [bench.batch([records(P0, offset)]) for offset in range(module.IN_FLIGHT_BATCHES)]
    bench.poll([records(P0, 100)])
    bench.now += module.PAUSE_AFTER_S
    bench.poll()
    assert bench.group.paused  # from now on it polls, which keeps the membership
    bench.capture.confirm(batches[0])
    assert bench.group.woken == 1  # it need not wait for the end of its poll
    assert bench.poll() is not None
    assert not bench.group.paused


def test_large_records_count_by_their_bytes(bench: Bench) -> None:
    large = module.IN_FLIGHT_BYTES
    first = bench.batch([records(P0, 1, size_bytes=large)])  # one is let through, however large
    bench.batch([records(P0, 2, size_bytes=large)])
    assert bench.poll([records(P0, 3)]) is None
    bench.capture.confirm(first)
    assert bench.poll() is not None


def test_brokers_that_are_away_are_waited_for(bench: Bench) -> None:
    assert bench.poll(KafkaBusy("no broker answers")) is None
    assert bench.progress.state() == ("waiting", "kafka: no broker answers")
    assert bench.poll([records(P0, 1)]) is not None
    assert bench.progress.state()[0] != "waiting"
    assert len(bench.groups) == 1


def test_stopping_commits_what_is_confirmed_and_leaves(bench: Bench) -> None:
    confirmed = bench.batch([records(P0, 5)])
    bench.batch([records(P1, 5)])
    bench.capture.confirm(confirmed)
    group = bench.group
    bench.capture.stop()
    assert group.committed == {P0: 5}
    assert group.closed
    bench.capture.stop()


def test_a_new_start_begins_behind_what_was_committed(bench: Bench) -> None:
    old = bench.batch([records(P0, 5)])
    bench.capture.start()
    bench.poll(bench.group.give(P0))
    new = bench.batch([records(P0, 5)])
    assert new.generation > old.generation
    bench.capture.confirm(old)  # of a worker that was slow
    bench.poll()
    assert bench.group.committed == {}
    bench.capture.confirm(new)
    bench.poll()
    assert bench.group.committed == {P0: 5}


# ── sinks that are others meanwhile ──────────────────────────────────────────────────────────────────────────────────


def raising(error: Exception) -> Callable[[], None]:
    def ask() -> None:
        raise error

    return ask


def test_nothing_is_committed_once_a_sink_has_got_another_generation(bench: Bench) -> None:
    bench.capture.confirm(bench.batch([records(P0, 5)]))
    bench.unchanged = raising(GenerationsChanged("another"))
    with pytest.raises(GenerationsChanged):
        bench.poll()
    bench.group.take(P0)()
    bench.capture.stop()
    assert bench.groups[0].commits == []
    assert bench.groups[0].closed


def test_without_the_state_store_the_stream_goes_on_and_nothing_is_committed_until_it_is_back(bench: Bench) -> None:
    bench.capture.confirm(bench.batch([records(P0, 5)]))
    bench.unchanged = raising(StateBusy("it restarts"))
    for number in range(6, 30):  # more than may be unconfirmed
        bench.capture.confirm(bench.batch([records(P0, number)]))
    assert bench.group.commits == []
    assert bench.progress.state() == ("waiting", "commit: it restarts")
    bench.unchanged = lambda: None
    bench.poll()
    assert bench.group.committed == {P0: 29}
    assert bench.progress.state()[0] != "waiting"


def test_an_answer_says_nothing_of_what_was_read_after_the_question(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASKED_S", 0.0)
    monkeypatch.setattr(module, "ASKED_LAST_S", 0.0)
    asked, answer = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        assert answer.wait(60.0)

    bench.unchanged = hang
    bench.capture.confirm(bench.batch([records(P0, 5), records(P1, 5)]))
    bench.poll()
    assert asked.wait(60.0)
    bench.capture.confirm(bench.batch([records(P0, 6), records(P1, 6)]))
    bench.poll(bench.group.take(P1), bench.group.give(P1))  # another may have been further meanwhile
    assert bench.group.commits == []
    bench.unchanged = raising(GenerationsChanged("another"))
    answer.set()

    def told() -> bool:
        try:
            bench.poll()
        except GenerationsChanged:
            return True
        return False

    wait_until(told, 60.0, "the answer to the second question")
    assert bench.group.committed == {P0: 5}


# ── positions that have expired ──────────────────────────────────────────────────────────────────────────────────


def expired(*positions: tuple[Partition, int | None]) -> PositionsExpired:
    return PositionsExpired("records were gone", dict(positions))


def test_a_gap_is_recorded_before_the_position_behind_it_is_committed(bench: Bench) -> None:
    assert bench.poll(expired((P0, 10))) is None
    assert bench.lost == [([P0], "positions expired", {})]
    assert bench.group.committed == {P0: BEGINNING}
    bench.capture.confirm(bench.batch([records(P0, 60)]))
    bench.poll()
    assert bench.group.committed == {P0: 60}


def test_what_cannot_be_recorded_is_not_committed(bench: Bench) -> None:
    bench.failing = StateBusy("the state store does not answer")
    with pytest.raises(StateBusy):
        bench.poll(expired((P0, 10)))
    assert bench.group.committed == {}
    assert bench.group.rewound == []


def test_what_lies_before_the_gap_is_not_committed_any_more(bench: Bench) -> None:
    """In a topic that was made anew, it could lie beyond records that were never read."""
    bench.capture.confirm(bench.batch([records(P1, 6)]))
    bench.poll()
    confirmed = bench.batch([records(P0, 100), records(P1, 7)])
    flying = bench.batch([records(P0, 200), records(P1, 8)])
    bench.capture.confirm(confirmed)
    bench.now -= 3.0  # no commit is due
    bench.poll(expired((P0, 200)))
    bench.now += 3.0
    bench.capture.confirm(flying)
    bench.poll()
    assert bench.group.committed == {P0: BEGINNING, P1: 8}
    assert all(commit.get(P0) in (None, BEGINNING) for commit in bench.group.commits)


def test_records_behind_a_gap_are_of_another_generation(bench: Bench) -> None:
    """They may be delivered once more."""
    before = bench.batch([records(P0, 5)])
    bench.poll(expired((P0, 5)))
    assert bench.batch([records(P0, 60)]).generation > before.generation


def test_a_gap_in_a_partition_that_is_anothers_by_now(bench: Bench) -> None:
    bench.group.mine.discard(P0)
    bench.poll(expired((P0, 10), (P1, None)))
    assert bench.group.committed == {P1: BEGINNING}
    assert bench.lost == [([P0, P1], "positions expired", {})]


# ── topics that were made anew ───────────────────────────────────────────────────────────────────────────────────


def test_topics_are_looked_at_before_anything_is_read(bench: Bench) -> None:
    assert bench.looks == [(1, 0)]
    bench.capture.start()
    assert bench.looks == [(1, 0), (2, 0)]


def test_a_topic_that_was_made_anew_is_read_from_its_beginning(bench: Bench) -> None:
    flying = bench.batch([records(P0, 100), records(P1, 7)])
    before = flying.generation
    bench.topic_ids[P0] = "new"
    bench.capture.topics_seen(bench.look())
    bench.capture.confirm(flying)
    bench.poll()
    assert bench.lost == [([P0], "its topic was made anew", {})]
    assert bench.saved == {P0: "new", P1: "old"}
    assert bench.group.committed == {P0: BEGINNING, P1: 7}
    bench.capture.confirm(bench.batch([records(P0, 60)]))
    bench.poll()
    assert bench.group.committed == {P0: 60, P1: 7}
    assert bench.batch([records(P0, 61)]).generation > before
    bench.capture.topics_seen(bench.look())
    bench.poll()
    assert len(bench.lost) == 1


def test_a_topic_that_cannot_be_mended_is_found_again(bench: Bench) -> None:
    """The state store does not answer; then the group rebalances, and another may have the partitions after that."""
    bench.topic_ids = {P0: "new", P1: "new"}
    bench.failing = StateBusy("the state store does not answer")
    bench.capture.topics_seen(bench.look())
    with pytest.raises(StateBusy):
        bench.poll()
    assert (bench.group.rewound, bench.saved) == ([], {P0: "old", P1: "old"})
    bench.failing = None
    bench.group.rebalancing = True
    bench.capture.topics_seen(bench.look())
    bench.poll()
    assert (bench.group.committed, bench.saved) == ({}, {P0: "old", P1: "old"})
    bench.group.rebalancing = False
    bench.capture.topics_seen(bench.look())
    bench.poll()
    assert (bench.group.committed, bench.saved) == ({P0: BEGINNING, P1: BEGINNING}, {P0: "new", P1: "new"})
    assert [partitions for partitions, _, _ in bench.lost] == [[P0, P1], [P0, P1]]


def test_a_look_that_began_before_a_topic_was_mended_has_nothing_mended_again(bench: Bench) -> None:
    bench.topic_ids[P0] = "new"
    late = bench.look()
    bench.capture.topics_seen(bench.look())
    bench.poll()
    bench.capture.topics_seen(late)
    bench.poll()
    assert len(bench.lost) == 1
    bench.topic_ids[P0] = "newest"
    bench.capture.topics_seen(bench.look())
    bench.poll()
    assert len(bench.lost) == 2


def test_what_was_seen_before_a_partition_came_is_of_no_use(bench: Bench) -> None:
    """Another member may have mended it by then."""
    bench.poll(bench.group.take(P0))
    bench.topic_ids[P0] = "new"
    bench.capture.topics_seen(bench.look())
    bench.poll(bench.group.give(P0))
    bench.poll()
    assert bench.lost == []
    bench.capture.topics_seen(bench.look())
    bench.poll()
    assert [partitions for partitions, _, _ in bench.lost] == [[P0]]


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        ({}, {P0: "a", P1: "a"}, {}),
        ({P0: "a", P1: "a"}, {P0: "a", P1: "a"}, {}),
        ({P0: "a", P1: "a"}, {P0: "b", P1: "b"}, {P0: "b", P1: "b"}),
        ({P0: "b", P1: "a"}, {P0: "b", P1: "b"}, {P1: "b"}),  # somebody else has mended the first
        ({P0: "a"}, {P0: "b", P1: "b"}, {P0: "b", P1: "b"}),  # made anew, with more partitions
        ({P0: "a"}, {P0: "a", P1: "a"}, {}),  # it got one more
        ({P0: "b", P1: "a"}, {P0: "b"}, {}),  # made anew with fewer, and mended
        ({P0: "a"}, {}, {}),  # it is not there
    ],
)
def test_which_partitions_are_of_a_topic_that_was_made_anew(
    saved: dict[Partition, str], now: dict[Partition, str], expected: dict[Partition, str]
) -> None:
    assert made_anew(SeenTopics(saved, now), [P0, P1]) == expected


# ── lags ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("unread", "flying", "reached_ms", "expected"),
    [
        (0, None, None, PartitionLag(0, 0.0)),
        (0, None, 4000, PartitionLag(0, 0.0)),  # however long ago its last record came
        (7, None, None, PartitionLag(7, None)),
        (7, None, 4000, PartitionLag(7, 6.0)),  # at most: what has not been read is newer than what has
        (7, (3, 2000), 4000, PartitionLag(10, 8.0)),
        (0, (3, 2000), 4000, PartitionLag(3, 8.0)),
        (0, (3, 99_000), 99_000, PartitionLag(3, 0.0)),  # a broker's clock is ahead of ours
    ],
)
def test_the_lag_of_a_partition(
    unread: int, flying: tuple[int, int] | None, reached_ms: int | None, expected: PartitionLag
) -> None:
    assert lag_of(unread, flying, reached_ms, 10_000) == expected


def test_a_partition_is_behind_until_its_records_are_in_the_sinks(bench: Bench) -> None:
    bench.group.unread = {P0: 4, P1: 0}
    first = bench.batch([records(P0, 2, count=2, sent_at=bench.now)])
    second = bench.batch([records(P0, 5, count=3, sent_at=bench.now)])
    bench.poll()
    assert bench.progress.partition_lags == {P0: PartitionLag(9, 3.0), P1: PartitionLag(0, 0.0)}
    assert bench.progress.lag_s() == 3.0
    bench.capture.confirm(first)
    bench.poll()
    assert bench.progress.partition_lags[P0] == PartitionLag(7, 3.0)
    bench.capture.confirm(second)
    bench.group.unread = {P0: 0, P1: 0}
    bench.poll()
    assert bench.progress.partition_lags == {P0: PartitionLag(0, 0.0), P1: PartitionLag(0, 0.0)}
    bench.poll(bench.group.take(P0))
    bench.poll()
    assert bench.progress.partition_lags.keys() == {P1}  # another's, who tells of it
    bench.capture.stop()
    assert bench.progress.partition_lags == {}
