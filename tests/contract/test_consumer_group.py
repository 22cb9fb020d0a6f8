"""What ConsumerGroup promises, of both its implementations, on a real broker."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import confluent_kafka
import pytest
from kafka import TopicPartition
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ConfigResource,
    ConfigResourceType,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
)
from kafka.structs import OffsetAndMetadata

from delta_sync.errors import CheckFailed, StateBusy
from delta_sync.kafka.clients import open_group
from delta_sync.kafka.consumer import ConsumerGroup, KafkaBusy, Partition, PositionsExpired, Records
from delta_sync.kafka.notices import KafkaNotices
from delta_sync.kafka.settings import Timeouts
from delta_sync.notices import NoticeIntake
from delta_sync.pipeline import Pipeline
from delta_sync.refreshing import NoticeStore
from delta_sync.spec import KafkaSpec, RegistrySpec, SecuritySpec
from delta_sync.state import StateStore
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.kafka import USERS, Kafka, admin_client
from delta_sync.testing.processes import wait_until

Client = Literal["kafka-python", "confluent-kafka"]
CLIENTS: tuple[Client, ...] = ("kafka-python", "confluent-kafka")

WAIT_S = 240.0  # for what takes a second or two; longer only on an overloaded machine
TURN_S = 0.05  # of one member, where several take turns in one thread
PATIENT = Timeouts(session_s=10, heartbeat_s=0.2, poll_interval_s=60, metadata_s=0.5)
HASTY = Timeouts(session_s=1, heartbeat_s=0.2, poll_interval_s=1.5, metadata_s=0.5)  # declared dead, and soon

names = (f"{number:06d}" for number in itertools.count(random.SystemRandom().randrange(900_000)))


class Member:
    """A member that remembers everything that it got."""

    def __init__(self, group: ConsumerGroup, topic: str) -> None:
        self.group = group
        self.partitions: set[int] = set()
        self.records: list[Records] = []
        self.gone: list[int] = []  # partitions that were revoked, in order
        self.on_revoked: Callable[[Collection[Partition]], None] = lambda partitions: None
        self._topic = topic
        self._subscribed = False

    def poll(self, timeout_s: float = TURN_S) -> list[Records]:
        if not self._subscribed:
            self.group.subscribe([self._topic], self._assigned, self._revoked)
            self._subscribed = True
        found = self.group.poll(timeout_s)
        self.records += found
        return found

    def _assigned(self, partitions: Collection[Partition]) -> None:
        self.partitions |= {partition.number for partition in partitions}

    def _revoked(self, partitions: Collection[Partition]) -> None:
        self.on_revoked(partitions)
        self.partitions -= {partition.number for partition in partitions}
        self.gone += [partition.number for partition in partitions]

    def seen(self, number: int) -> list[int]:
        """What it got of one partition, in the order in which it came."""
        values = [records.values for records in self.records if records.partition.number == number]
        return [int(value) for value in itertools.chain.from_iterable(values) if value is not None]

    def positions(self) -> dict[Partition, int]:
        return {records.partition: records.next_offset for records in self.records}


class World:
    """One broker, one topic, one group."""

    def __init__(self, server: Kafka, client: Client, exits: ExitStack, partitions: int = 3) -> None:
        self.server = server
        self.client = client
        self.topic = f"topic_{next(names)}"
        self.group_id = f"group_{next(names)}"
        self._exits = exits
        with admin_client(server.url) as admin:
            admin.create_topics({self.topic: {"num_partitions": partitions}}, wait_for_metadata=True)

    def spec(self, **changes: Any) -> KafkaSpec:
        settings: dict[str, Any] = {
            "bootstrap_servers": self.server.url,
            "registry": RegistrySpec(url="http://127.0.0.1:1"),
            "client": self.client,
        }
        return KafkaSpec(**{**settings, **changes})

    def member(self, timeouts: Timeouts = PATIENT, **changes: Any) -> Member:
        group = open_group(self.spec(**changes), self.group_id, timeouts)
        self._exits.callback(group.close)
        return Member(group, changes.pop("topic", self.topic))

    def send(self, values: range, partition: int = 0, size: int = 0) -> None:
        options = {"bootstrap.servers": self.server.url, "compression.type": "lz4", "enable.idempotence": True}
        producer = confluent_kafka.Producer(options)  # idempotent: so records that are sent again come in order
        for value in values:
            producer.produce(
                self.topic,
                str(value).encode().zfill(size),
                key=f"key {value}".encode(),
                partition=partition,
                headers={"other": b"1", "delta.epoch": b"7"},
            )
        assert producer.flush(WAIT_S) == 0

    def committed(self) -> dict[int, int]:
        with admin_client(self.server.url) as admin:
            groups = admin.list_group_offsets({self.group_id: None})
            return {partition.partition: found.offset for partition, found in groups[self.group_id].items()}

    def partition(self, number: int) -> Partition:
        return Partition(self.topic, number)


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    found: Client = request.param
    return found


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def world(kafka: Kafka, client: Client, exits: ExitStack) -> World:
    return World(kafka, client, exits)


def turns(*members: Member, until: Callable[[], bool], turn_s: float = TURN_S) -> None:
    """Let members poll in turns until something has happened."""
    deadline = time.monotonic() + WAIT_S
    while not until():
        assert time.monotonic() < deadline, [(member.partitions, member.positions()) for member in members]
        for member in members:
            member.poll(turn_s)


def retried(call: Callable[[], object]) -> None:
    """Call as the contract has it: again, while Kafka is busy."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            call()
        except KafkaBusy:
            assert time.monotonic() < deadline
        else:
            return


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_records_come_in_order_and_whole(world: World) -> None:
    for partition in range(3):
        world.send(range(100 * partition, 100 * partition + 100), partition)
    member = world.member()
    turns(member, until=lambda: sum(len(records.keys) for records in member.records) == 300)
    assert member.partitions == {0, 1, 2}
    for partition in range(3):
        assert member.seen(partition) == list(range(100 * partition, 100 * partition + 100))
    reached = dict.fromkeys(range(3), 0)
    for records in member.records:
        count = len(records.keys)
        reached[records.partition.number] += count
        assert records.partition.topic == world.topic
        assert records.next_offset == reached[records.partition.number]
        assert records.keys == [f"key {int(value or 0)}".encode() for value in records.values]
        assert records.epochs == [b"7"] * count
        assert all(abs(time.time() - timestamp / 1000) < 600 for timestamp in records.timestamps_ms)
        assert len(records.timestamps_ms) == count


def test_what_a_record_lacks_is_none(world: World) -> None:
    producer = confluent_kafka.Producer({"bootstrap.servers": world.server.url})
    producer.produce(world.topic, key=b"deleted", partition=0)
    producer.produce(world.topic, b"", partition=0, headers=[("other", b"1")])
    assert producer.flush(WAIT_S) == 0
    member = world.member()
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 2)
    keys = [key for records in member.records for key in records.keys]
    values = [value for records in member.records for value in records.values]
    epochs = [epoch for records in member.records for epoch in records.epochs]
    assert (keys, values, epochs) == ([b"deleted", None], [None, b""], [None, None])


def test_a_poll_returns_when_its_time_is_over(world: World) -> None:
    member = world.member()
    turns(member, until=lambda: bool(member.partitions))
    begun = time.monotonic()
    assert member.poll(1.0) == []
    assert time.monotonic() - begun > 0.9


def test_large_records_come_too(world: World) -> None:
    size = 3 << 20  # above what one fetch asks for
    with admin_client(world.server.url) as admin:
        topic = ConfigResource(ConfigResourceType.TOPIC, world.topic, {"max.message.bytes": str(2 * size)})
        admin.alter_configs([topic])
    producer = confluent_kafka.Producer({"bootstrap.servers": world.server.url, "message.max.bytes": 2 * size})
    for number in range(3):
        producer.produce(world.topic, random.Random(number).randbytes(size), partition=0)
    assert producer.flush(WAIT_S) == 0
    member = world.member()
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 3)
    values = [value for records in member.records for value in records.values]
    assert values == [random.Random(number).randbytes(size) for number in range(3)]


# ── positions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_member_goes_on_where_positions_were_committed(world: World) -> None:
    for partition in range(3):
        world.send(range(20), partition)
    first = world.member()
    turns(first, until=lambda: sum(first.positions().values()) == 60)
    first.group.commit({world.partition(0): 20, world.partition(1): 7})
    assert world.committed() == {0: 20, 1: 7}
    first.group.close()
    world.send(range(20, 25), 0)
    second = world.member()
    turns(second, until=lambda: sum(second.positions().values()) == 65)
    assert second.seen(0) == list(range(20, 25))
    assert second.seen(1) == list(range(7, 20))
    assert second.seen(2) == list(range(20))  # never committed: from its beginning


def test_nothing_is_committed_unasked(world: World) -> None:
    world.send(range(20))
    first = world.member()
    turns(first, until=lambda: first.positions().get(world.partition(0)) == 20)
    second = world.member()
    turns(first, second, until=lambda: bool(second.partitions))
    first.group.close()
    second.group.close()
    assert world.committed() == {}


def test_positions_that_have_expired_are_an_error(world: World) -> None:
    world.send(range(100))
    first = world.member()
    turns(first, until=lambda: first.positions().get(world.partition(0)) == 100)
    first.group.commit({world.partition(0): 10})
    first.group.close()
    with admin_client(world.server.url) as admin:
        admin.delete_records({TopicPartition(world.topic, 0): 50})
    second = world.member()
    for _ in range(2):  # until it is mended
        with pytest.raises(PositionsExpired, match=f"partition 0 of topic {world.topic} at 10") as expired:
            turns(second, until=lambda: False)
        assert expired.value.positions == {world.partition(0): 10}
    assert second.seen(0) == []
    assert second.group.rewind([world.partition(0), world.partition(9)]) == {world.partition(0): 50}
    assert world.committed() == {0: 10}  # by whoever rewinds, when it is safe to
    second.group.commit({world.partition(0): 50})
    assert world.committed() == {0: 50}
    turns(second, until=lambda: second.positions().get(world.partition(0)) == 100)
    assert second.seen(0) == list(range(50, 100))


def test_positions_of_several_partitions_expire_and_the_others_go_on(world: World) -> None:
    """Each is told of, sooner or later, and none stands still for ever."""
    for partition in range(3):
        world.send(range(100), partition)
    with admin_client(world.server.url) as admin:
        positions = {TopicPartition(world.topic, number): OffsetAndMetadata(10, "", -1) for number in range(3)}
        admin.alter_group_offsets(world.group_id, positions)
        admin.delete_records({TopicPartition(world.topic, number): 50 for number in (0, 2)})
    member = world.member()
    told: set[Partition] = set()
    deadline = time.monotonic() + WAIT_S
    while sum(member.positions().values()) < 300:
        assert time.monotonic() < deadline, (told, member.positions())
        try:
            member.poll()
        except PositionsExpired as expired:
            told |= expired.positions.keys()
            member.group.commit(member.group.rewind(expired.positions))
    assert told == {world.partition(0), world.partition(2)}
    assert [member.seen(number) for number in range(3)] == [
        list(range(50, 100)),
        list(range(10, 100)),
        list(range(50, 100)),
    ]
    assert {number: world.committed()[number] for number in (0, 2)} == {0: 50, 2: 50}


def test_a_paused_member_that_is_rewound_stays_paused(world: World) -> None:
    world.send(range(100))
    with admin_client(world.server.url) as admin:
        admin.delete_records({TopicPartition(world.topic, 0): 50})
    member = world.member()
    with pytest.raises(PositionsExpired):
        turns(member, until=lambda: False)
    member.group.pause()
    member.group.rewind([world.partition(0)])
    for _ in range(10):
        member.poll()
    assert member.records == []
    member.group.resume()
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 100)


def test_positions_beyond_the_end_are_an_error(world: World) -> None:
    """The topic was made anew, or brokers have lost its end."""
    world.send(range(10))
    with admin_client(world.server.url) as admin:
        admin.alter_group_offsets(world.group_id, {TopicPartition(world.topic, 0): OffsetAndMetadata(11, "", -1)})
    member = world.member()
    with pytest.raises(PositionsExpired, match=f"partition 0 of topic {world.topic} at 11"):
        turns(member, until=lambda: False)
    assert member.group.rewind([world.partition(0)]) == {world.partition(0): 0}
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 10)
    assert member.seen(0) == list(range(10))


def test_a_position_that_expires_while_it_is_read_is_an_error(world: World) -> None:
    """Though it was never committed: what lies between was not read."""
    world.send(range(10))
    member = world.member()
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 10)
    member.group.pause()
    world.send(range(10, 100))
    with admin_client(world.server.url) as admin:
        admin.delete_records({TopicPartition(world.topic, 0): 50})
    member.group.resume()
    # A fetch that was under way when it was paused may have brought the next ones.
    with pytest.raises(PositionsExpired, match=f"partition 0 of topic {world.topic} at 1"):
        turns(member, until=lambda: member.positions()[world.partition(0)] == 100)
    member.group.rewind([world.partition(0)])
    turns(member, until=lambda: member.positions()[world.partition(0)] == 100)
    assert member.seen(0)[-50:] == list(range(50, 100))


def test_records_that_have_expired_before_anything_was_committed_are_an_error(world: World) -> None:
    """The group never had positions, or the broker has forgotten them: records are gone that it has not read."""
    world.send(range(100))
    with admin_client(world.server.url) as admin:
        admin.delete_records({TopicPartition(world.topic, 0): 50})
    member = world.member()
    with pytest.raises(PositionsExpired, match=f"partition 0 of topic {world.topic} at 0"):
        turns(member, until=lambda: False)
    assert member.group.rewind([world.partition(0)]) == {world.partition(0): 50}
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 100)
    assert member.seen(0) == list(range(50, 100))


# ── rebalances ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rebalance_loses_nothing_that_is_not_committed(kafka: Kafka, client: Client, exits: ExitStack) -> None:
    world = World(kafka, client, exits, partitions=6)
    for partition in range(6):
        world.send(range(30), partition)
    first, second = world.member(), world.member()
    turns(first, until=lambda: sum(first.positions().values()) == 180)
    turns(first, second, until=lambda: (len(first.partitions), len(second.partitions)) == (3, 3))
    for partition in range(6):
        world.send(range(30, 40), partition)
    turns(
        first,
        second,
        until=lambda: all(
            member.positions().get(world.partition(number)) == 40
            for member in (first, second)
            for number in member.partitions
        ),
    )
    assert first.partitions | second.partitions == set(range(6))
    assert set(first.gone) == second.partitions
    for partition in second.partitions:
        assert second.seen(partition) == list(range(40))  # again what the first one got: it had not committed it
    for partition in first.partitions:
        assert first.seen(partition) == list(range(40))  # once: what stays is not taken away


def test_revoked_comes_before_the_partitions_go(kafka: Kafka, client: Client, exits: ExitStack) -> None:
    world = World(kafka, client, exits, partitions=6)
    for partition in range(6):
        world.send(range(30), partition)
    first, second = world.member(), world.member()
    held: list[set[int]] = []

    def commit(partitions: Collection[Partition]) -> None:
        held.append(second.partitions | {records.partition.number for records in second.records})
        first.group.commit({partition: first.positions()[partition] for partition in partitions})

    first.on_revoked = commit
    turns(first, until=lambda: sum(first.positions().values()) == 180)
    assert world.committed() == {}
    turns(first, second, until=lambda: (len(first.partitions), len(second.partitions)) == (3, 3))
    assert all(before.isdisjoint(first.gone) for before in held)
    assert world.committed() == dict.fromkeys(second.partitions, 30)
    for partition in range(6):
        world.send(range(30, 40), partition)
    turns(first, second, until=lambda: all(len(second.seen(number)) == 10 for number in second.partitions))
    assert all(second.seen(number) == list(range(30, 40)) for number in second.partitions)


def test_an_error_in_a_call_loses_no_records(kafka: Kafka, client: Client, exits: ExitStack) -> None:
    world = World(kafka, client, exits, partitions=6)
    first, second = world.member(), world.member()
    turns(first, until=lambda: len(first.partitions) == 6)

    def fail(partitions: Collection[Partition]) -> None:
        first.on_revoked = lambda partitions: None
        raise KafkaBusy("later")

    first.on_revoked = fail
    sent = 0
    deadline = time.monotonic() + WAIT_S
    failures = 0
    while not failures:
        assert time.monotonic() < deadline
        for partition in range(6):
            world.send(range(sent, sent + 5), partition)
        sent += 5
        second.poll()
        try:
            first.poll()
        except KafkaBusy:
            failures += 1
    turns(
        first,
        second,
        until=lambda: all(
            sent in (first.positions().get(world.partition(number)), second.positions().get(world.partition(number)))
            for number in range(6)
        ),
    )
    for number in set(range(6)) - set(second.positions()):
        assert first.seen(number) == list(range(sent)) or second.seen(number) == list(range(sent))


def test_a_commit_after_the_partitions_were_lost_is_ignored(world: World) -> None:
    world.send(range(10))
    lost, other = world.member(HASTY), world.member()
    turns(lost, until=lambda: lost.positions().get(world.partition(0)) == 10)
    turns(other, until=lambda: other.partitions == {0, 1, 2})  # the first one no longer polls
    assert other.group.commit({world.partition(0): 10})
    assert not lost.group.commit({world.partition(0): 4}), "and it says so"
    assert world.committed() == {0: 10}
    late: list[int] = []

    def commit(partitions: Collection[Partition]) -> None:
        late.extend(partition.number for partition in partitions)
        lost.group.commit(dict.fromkeys(partitions, 3))

    lost.on_revoked = commit
    turns(lost, other, until=lambda: len(lost.gone) == 3 and bool(lost.partitions))  # told, and a member again
    assert sorted(late[:3]) == [0, 1, 2]
    lost.group.commit({world.partition(number): 2 for number in range(3) if number not in lost.partitions})
    assert world.committed() == {0: 10}


def test_those_who_leave_do_so_at_once(world: World) -> None:
    first, second = world.member(), world.member()
    turns(first, second, until=lambda: bool(first.partitions and second.partitions))
    begun = time.monotonic()
    first.group.close()
    first.group.close()
    turns(second, until=lambda: second.partitions == {0, 1, 2})
    assert time.monotonic() - begun < PATIENT.session_s


def test_a_rebalance_ends_though_its_members_seldom_poll(world: World) -> None:
    """Each step of it then comes between two polls, as when every poll is followed by a flush."""
    first, second = world.member(), world.member()
    turns(first, until=lambda: len(first.partitions) == 3)
    deadline = time.monotonic() + WAIT_S
    while not (first.partitions and second.partitions):
        assert time.monotonic() < deadline
        for member in (first, second):
            member.poll(0)
            world.committed()  # a connection and three requests, in which the group can answer


@pytest.mark.parametrize("clients", [CLIENTS, CLIENTS[::-1]])
def test_both_clients_share_a_group(kafka: Kafka, exits: ExitStack, clients: tuple[Client, Client]) -> None:
    """So that one can take the other's place, a worker at a time."""
    world = World(kafka, clients[0], exits, partitions=4)
    for partition in range(4):
        world.send(range(10), partition)
    first, second = world.member(), world.member(client=clients[1])
    turns(first, until=lambda: sum(first.positions().values()) == 40)
    first.group.commit(first.positions())
    turns(first, second, until=lambda: (len(first.partitions), len(second.partitions)) == (2, 2))
    first.group.close()
    turns(second, until=lambda: len(second.partitions) == 4)
    assert second.records == []


def test_a_partition_that_is_added_is_read_from_its_beginning(world: World) -> None:
    member = world.member()
    turns(member, until=lambda: member.partitions == {0, 1, 2})
    with admin_client(world.server.url) as admin:
        admin.create_partitions({world.topic: 4})
        admin.wait_for_topics([world.topic])
    world.send(range(10), 3)
    # What it joins again for comes while nobody polls, or nearly always.
    turns(member, until=lambda: member.positions().get(world.partition(3)) == 10, turn_s=0.001)
    assert member.seen(3) == list(range(10))


def test_whatever_happens_every_record_arrives_in_order(kafka: Kafka, client: Client, exits: ExitStack) -> None:
    """Members come, go, commit and read at random; then those who are left must have got the rest."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    world = World(kafka, client, exits, partitions=4)
    members: list[Member] = []
    everyone: list[Member] = []
    sent = dict.fromkeys(range(4), 0)
    for _ in range(60):
        step = rng.randrange(10)
        if not members or (step == 0 and len(members) < 3):
            members.append(world.member())
            everyone.append(members[-1])
        elif step == 1 and len(members) > 1:
            members.pop(rng.randrange(len(members))).group.close()
        elif step == 2:
            member = rng.choice(members)
            member.poll()
            positions = {place: offset for place, offset in member.positions().items() if rng.random() < 0.7}
            with contextlib.suppress(KafkaBusy):  # it is committed later, or was for nothing
                member.group.commit(positions)
        elif step == 3:
            number = rng.randrange(4)
            world.send(range(sent[number], sent[number] + 20), number)
            sent[number] += 20
        else:
            rng.choice(members).poll()
    turns(*members, until=lambda: set().union(*(member.partitions for member in members)) == {0, 1, 2, 3})
    for number in range(4):
        world.send(range(sent[number], sent[number] + 1), number)
        sent[number] += 1
    turns(
        *members,
        until=lambda: all(
            any(member.positions().get(world.partition(number)) == sent[number] for member in members)
            for number in range(4)
        ),
    )
    for number in range(4):
        assert set().union(*(member.seen(number) for member in everyone)) == set(range(sent[number])), seed
        for member in everyone:
            for before, after in itertools.pairwise(member.seen(number)):
                assert after <= before + 1, (seed, number, before, after)  # none is skipped while it reads


# ── pause, wake, lags ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_paused_member_stays_one(world: World) -> None:
    for partition in range(3):
        world.send(range(10), partition)
    member = world.member(HASTY)
    member.poll()
    member.group.pause()  # before it has any partitions, or after: as it comes
    member.group.pause()
    member.records.clear()
    until = time.monotonic() + 3 * HASTY.poll_interval_s
    turns(member, until=lambda: time.monotonic() > until and member.partitions == {0, 1, 2})
    assert member.records == []
    assert member.gone == []
    world.send(range(10, 20), 0)
    member.group.resume()
    member.group.resume()
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 20)
    assert member.gone == []
    assert member.seen(0)[-10:] == list(range(10, 20))


def test_a_member_that_pauses_in_the_midst_goes_on_with_the_next_record(world: World) -> None:
    world.send(range(5000), size=200)
    member = world.member()
    turns(member, until=lambda: bool(member.records))
    for _ in range(5):
        member.group.pause()
        before = len(member.records)
        for _ in range(3):
            member.poll()
        assert len(member.records) == before
        member.group.resume()
        turns(member, until=lambda: len(member.records) > before or len(member.seen(0)) == 5000)  # noqa: B023 -- called at once
    turns(member, until=lambda: len(member.seen(0)) >= 5000)
    assert member.seen(0) == list(range(5000))


def test_a_paused_member_takes_partitions_that_come(world: World) -> None:
    for partition in range(3):
        world.send(range(10), partition)
    first, second = world.member(), world.member()
    turns(first, second, until=lambda: bool(first.partitions and second.partitions))
    second.group.pause()
    second.records.clear()
    first.group.close()
    turns(second, until=lambda: second.partitions == {0, 1, 2})
    for _ in range(10):
        assert second.poll() == []
    second.group.resume()
    turns(second, until=lambda: all(second.seen(number)[-1:] == [9] for number in first.partitions))


def test_wake_ends_a_poll(world: World) -> None:
    member = world.member()
    turns(member, until=lambda: bool(member.partitions))
    polling = threading.Event()

    def poll() -> list[Records]:
        polling.set()
        return member.poll(10 * WAIT_S)

    with ThreadPoolExecutor(1) as other:
        polled = other.submit(poll)
        assert polling.wait(WAIT_S)
        member.group.wake()
        assert polled.result(WAIT_S) == []


def test_lags_count_what_is_not_read(world: World) -> None:
    world.send(range(5000), size=300)
    member = world.member()
    lags: list[int] = []
    while len(member.seen(0)) < 5000:
        member.poll()
        if member.seen(0):
            lags.append(member.group.lags()[world.partition(0)])
            assert lags[-1] <= 5000 - len(member.seen(0))  # the broker may have told of fewer when it answered
    assert lags[0] > 0
    assert lags[-1] == 0


# ── Kafka itself ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_broker_may_go_and_come_back(world: World) -> None:
    world.send(range(10))
    member = world.member()
    turns(member, until=lambda: member.positions().get(world.partition(0)) == 10)
    world.server.kill()
    for _ in range(20):
        with suppress(KafkaBusy):
            assert member.poll(0.1) == []
    with pytest.raises(KafkaBusy):
        member.group.commit({world.partition(0): 10})
    world.server.start()
    world.send(range(10, 20))
    deadline = time.monotonic() + WAIT_S
    while member.positions()[world.partition(0)] < 20:
        assert time.monotonic() < deadline
        retried(member.poll)
    deadline = time.monotonic() + WAIT_S
    while world.committed() != {0: 20}:
        assert time.monotonic() < deadline
        # Again each time: on a slow machine the member may have lost its partitions, and the commit was left out.
        retried(lambda: member.group.commit({world.partition(0): 20}))
        retried(member.poll)
    assert sorted(set(member.seen(0))) == list(range(20))


def test_a_broker_that_is_not_there_is_busy(world: World) -> None:
    member = world.member(bootstrap_servers="127.0.0.1:1")
    with pytest.raises(KafkaBusy, match=r"127\.0\.0\.1:1"):
        turns(member, until=lambda: False)
    threads = {thread.name for thread in threading.enumerate()}
    with pytest.raises(KafkaBusy):
        turns(member, until=lambda: False)
    assert {thread.name for thread in threading.enumerate()} == threads  # no attempt leaves anything behind


def test_wrong_credentials_are_a_failed_check(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTA_TEST_PASSWORD", "wrong-password")
    security = SecuritySpec(
        protocol="SASL_PLAINTEXT", mechanism="PLAIN", username="delta", password="${env:DELTA_TEST_PASSWORD}"
    )
    member = world.member(bootstrap_servers=world.server.sasl_url, security=security)
    with pytest.raises(CheckFailed, match=r"user delta by PLAIN .*kafka\.security") as failed:
        turns(member, until=lambda: False)
    assert "wrong-password" not in str(failed.value)

    monkeypatch.setenv("DELTA_TEST_PASSWORD", USERS["delta"])
    world.send(range(10))
    member = world.member(bootstrap_servers=world.server.sasl_url, security=security)
    turns(member, until=lambda: member.seen(0) == list(range(10)))


@pytest.mark.parametrize("kind", [ResourceType.TOPIC, ResourceType.GROUP])
def test_a_lack_of_privileges_is_a_failed_check(
    world: World, monkeypatch: pytest.MonkeyPatch, exits: ExitStack, kind: ResourceType
) -> None:
    monkeypatch.setenv("DELTA_TEST_PASSWORD", USERS["delta"])
    security = SecuritySpec(
        protocol="SASL_PLAINTEXT", mechanism="PLAIN", username="delta", password="${env:DELTA_TEST_PASSWORD}"
    )
    name = world.topic if kind is ResourceType.TOPIC else world.group_id
    acl = ACL("User:delta", "*", ACLOperation.READ, ACLPermissionType.DENY, ResourcePattern(kind, name))
    describe = ACL("User:delta", "*", ACLOperation.DESCRIBE, ACLPermissionType.ALLOW, acl.resource_pattern)
    with admin_client(world.server.url) as admin:
        admin.create_acls([acl, describe])
    member = world.member(bootstrap_servers=world.server.sasl_url, security=security)
    with pytest.raises(CheckFailed, match="may not read"):
        turns(member, until=lambda: False)
    with admin_client(world.server.url) as admin:
        everything = ResourcePatternFilter(kind, name, acl.resource_pattern.pattern_type)
        admin.delete_acls([ACLFilter(None, None, ACLOperation.ANY, ACLPermissionType.ANY, everything)])


def test_a_topic_that_is_not_there_is_a_failed_check(world: World) -> None:
    world.topic = f"missing_{next(names)}"
    member = world.member()
    with pytest.raises(CheckFailed, match=f"topic {world.topic} is not there"):
        member.poll()
    with admin_client(world.server.url) as admin:
        assert world.topic not in admin.list_topics()  # nor has it been made by asking


def test_notices_are_taken_from_a_topic_and_bad_messages_do_not_stand_in_their_way(
    world: World, tmp_path: Path
) -> None:
    """Beside the group's own promises: what `kafka.notices` makes of them, with a state store that fails at first."""
    producer = confluent_kafka.Producer({"bootstrap.servers": world.server.url})
    sent = [b'{"lookup": "ratings", "keys": [%d]}' % number for number in range(20)]
    for number, value in enumerate([b"no notice", *sent, b'{"lookup": "none", "keys": [1]}', None]):
        producer.produce(world.topic, value, partition=number % 3)
    assert producer.flush(WAIT_S) == 0
    stopping, intake, pipeline = threading.Event(), NoticeIntake(), Pipeline("movies")
    lookup = pipeline.lookup()(ratings)
    pipeline.table("public.movie", enrich={"rating": lookup.by("id")})(movie)
    table = Table("public", "movie", (Column("id", "bigint", Kind.INTEGER),), ("id",))
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        store = FailingAtFirst(state, "movies")
        intake.open(pipeline, lambda: {"public.movie": table}, store)
        reader = KafkaNotices(lambda: world.member().group, world.topic, intake, stopping)
        reader.start()
        try:
            wait_until(lambda: sum(intake.counts.values()) >= 23, WAIT_S, "the last message")
            wait_until(lambda: sum(world.committed().values()) == 23, WAIT_S, "the last commit")
        finally:
            stopping.set()
            reader.join(WAIT_S)
        kept = {key for notice in store.get(store.ids()) for key in notice.keys}
    assert store.failed
    assert kept == set(range(20)), "those of the try that failed, too"
    assert intake.counts["kafka", "refused"] >= 3


class FailingAtFirst(NoticeStore):
    """A state store that is locked when it is asked first."""

    failed = False

    def add(self, lookup: str, keys: Sequence[Any], *, pending: bool = False) -> int:
        if not self.failed:
            self.failed = True
            raise StateBusy("It is locked.")
        return super().add(lookup, keys, pending=pending)


def movie(row: dict[str, Any], rating: Any) -> dict[str, Any]:
    return {**row, "rating": rating}


def ratings(keys: list[Any]) -> dict[Any, Any]:
    return dict.fromkeys(keys)
