"""The consumer group by confluent-kafka (librdkafka, in C): some ten times the records per second."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from delta_sync.kafka import refusals, settings
from delta_sync.kafka.consumer import EPOCH_HEADER, KafkaBusy, Partition, PartitionsCall, Records
from delta_sync.kafka.settings import Timeouts
from delta_sync.secrets import redact
from delta_sync.spec import KafkaSpec

SLICE_S = 0.1  # a poll looks so often whether it was woken: the client has nothing to wake it by
ATTEMPT_S = 1.0  # of the first connection, between two looks at what the client has to tell
POLL_BYTES = 4 << 20  # a poll takes no more once it has so much: with large records, 2000 of them would not fit
RECORDS_PER_TAKE = 250  # between two looks at the bytes: 4 MB of 16 KB each

# The position of a partition that has none committed: not its beginning, which is elsewhere once records have expired.
_FIRST = 0

_LOST = {KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID}
_REBALANCING = {KafkaError.REBALANCE_IN_PROGRESS}
_LOGIN = {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError.UNSUPPORTED_SASL_MECHANISM}
_PRIVILEGES = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
_NO_TOPIC = {KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART}
_FOR_GOOD = {
    KafkaError.INVALID_SESSION_TIMEOUT,
    KafkaError.INCONSISTENT_GROUP_PROTOCOL,
    KafkaError.GROUP_MAX_SIZE_REACHED,
    KafkaError.INVALID_GROUP_ID,
}

_TO_TELL = {*_LOGIN, *_PRIVILEGES, *_NO_TOPIC, *_FOR_GOOD, KafkaError._ALL_BROKERS_DOWN, KafkaError._SSL}

_log = logging.getLogger("delta_sync.kafka.confluent")


class ConfluentGroup:
    """One member of a consumer group; see ConsumerGroup. Rebalances are cooperative."""

    def __init__(self, spec: KafkaSpec, group_id: str, timeouts: Timeouts) -> None:
        self._spec = spec
        self._group_id = group_id
        self._options = settings.resolved(settings.confluent_consumer(spec, group_id, timeouts))
        self._consumer: Consumer | None = None
        self._next: dict[Partition, int] = {}  # of every partition of ours, the position that `poll` returns next
        self._unplaced: set[Partition] = set()  # those of which it could not be found out where they start
        self._taken: dict[Partition, list[Message]] = {}  # of the client, and not returned yet
        self._expired: dict[Partition, int | None] = {}  # positions of which the client told, once, that they are gone
        self._uncommitted: dict[Partition, int] = {}
        self._deferred = False  # a rebalance takes no commits, so they wait for its end
        self._paused = False
        self._woken = threading.Event()
        self._assigned: PartitionsCall = _ignore
        self._revoked: PartitionsCall = _ignore
        self._failure: BaseException | None = None  # of such a call, to be raised by the next poll
        self._errors: list[KafkaError] = []  # what the client told beside the records

    def subscribe(self, topics: Collection[str], assigned: PartitionsCall, revoked: PartitionsCall) -> None:
        self._assigned, self._revoked = assigned, revoked
        if self._consumer is None:
            self._consumer = Consumer({**self._options, "error_cb": self._errors.append}, logger=_log)
        with self._translated():
            missing = [topic for topic in topics if not self._is_there(topic)]
            if missing:
                raise refusals.topics_missing(missing)
            self._consumer.subscribe(
                sorted(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

    def _is_there(self, topic: str) -> bool:
        consumer = self._connected()
        deadline = time.monotonic() + settings.REQUEST_TIMEOUT_S
        while True:
            try:
                found = consumer.list_topics(topic, timeout=ATTEMPT_S).topics[topic]
            except KafkaException:
                consumer.poll(0)  # lets the client tell why: a refused login counts as a timeout
                self._raise_errors()
                if time.monotonic() > deadline:
                    raise
            else:
                if found.error is not None and found.error.code() not in _NO_TOPIC:
                    raise KafkaException(found.error)
                return found.error is None

    # ── rebalances: the client calls these during consume, on our own thread ─────────────────────────────────────

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if not partitions:  # none new
            consumer.incremental_assign(partitions)
            return
        names = _names(partitions)
        self._next |= dict.fromkeys(names, _FIRST)
        try:
            partitions = self._starts(consumer, partitions)
        except KafkaException:
            # The client has to be told now. It starts somewhere, and `_place` moves it before anything is returned.
            self._unplaced.update(names)
        consumer.incremental_assign(partitions)
        if self._paused:
            consumer.pause(partitions)
        self._call(self._assigned, names)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        names = _names(partitions)
        self._call(self._revoked, names)
        self._drop(names)
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        names = _names(partitions)
        self._drop(names)  # first: what is another's must not be committed
        self._call(self._revoked, names)
        consumer.incremental_unassign(partitions)

    def _call(self, call: PartitionsCall, partitions: Collection[Partition]) -> None:
        try:
            call(partitions)
        except BaseException as error:  # noqa: BLE001 -- raised by the next poll; now, records of this one would be lost
            self._failure = error

    def _drop(self, partitions: Collection[Partition]) -> None:
        for partition in partitions:
            self._next.pop(partition, None)
            self._uncommitted.pop(partition, None)
            self._taken.pop(partition, None)
            self._expired.pop(partition, None)
        self._unplaced.difference_update(partitions)

    def _starts(self, consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """Return where these partitions start: at what was committed, or at position 0."""
        starts: list[TopicPartition] = []
        for found in consumer.committed(partitions, timeout=settings.REQUEST_TIMEOUT_S):
            if found.error is not None:
                raise KafkaException(found.error)
            offset = found.offset if found.offset >= 0 else _FIRST
            starts.append(TopicPartition(found.topic, found.partition, offset))
            self._next[Partition(found.topic, found.partition)] = offset
        return starts

    def _place(self) -> None:
        """Find out where partitions start of which that could not be found out when they came."""
        if not self._unplaced:
            return
        consumer = self._connected()
        partitions = [TopicPartition(*partition) for partition in self._unplaced]
        starts = self._starts(consumer, partitions)
        consumer.incremental_unassign(partitions)  # a seek is refused to a partition that could not start
        consumer.incremental_assign(starts)
        if self._paused:
            consumer.pause(starts)
        self._unplaced.clear()

    # ── records ──────────────────────────────────────────────────────────────────────────────────────────────────

    def poll(self, timeout_s: float) -> list[Records]:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            with self._translated():
                if self._deferred:
                    self._commit()
                self._place()
                self._take(min(SLICE_S, max(0.0, deadline - time.monotonic())))
                if self._expired:
                    raise refusals.positions_expired(self._expired)
                if self._taken and not self._paused:
                    taken, self._taken = self._taken, {}
                    return [self._columns(partition, messages) for partition, messages in taken.items()]
                self._raise_errors()
            if self._woken.is_set():
                self._woken.clear()
                return []
            if time.monotonic() >= deadline and self._failure is None:
                return []

    def _take(self, timeout_s: float) -> None:
        """Take what has come; if that is nothing, wait for the first record."""
        consumer = self._connected()
        records = size = 0
        # `consume` waits until there are as many as it was asked for, or the time is over.
        messages = consumer.consume(RECORDS_PER_TAKE, 0) or consumer.consume(1, timeout_s)
        while messages:
            last: tuple[str | None, int | None] | None = None  # anew each time: `consume` may take partitions away
            mine: list[Message] = []
            for message in messages:
                if message.error() is not None:
                    self._message_error(message)
                    continue
                place = (message.topic(), message.partition())  # equal to a Partition, at a third of its price
                if place != last:
                    last, mine = place, self._ours(Partition(*place))  # type: ignore[arg-type]  # None only with errors
                mine.append(message)
            size += sum(map(len, messages))
            records += len(messages)
            if records >= settings.RECORDS_PER_POLL or size >= POLL_BYTES:
                return
            messages = consumer.consume(RECORDS_PER_TAKE, 0)

    def _ours(self, partition: Partition) -> list[Message]:
        """Return where to put records of a partition; if it is not ours, or may start elsewhere, to be forgotten."""
        if partition not in self._next or partition in self._unplaced:
            return []
        return self._taken.setdefault(partition, [])

    def _columns(self, partition: Partition, messages: Sequence[Message]) -> Records:
        next_offset = int(messages[-1].offset() or 0) + 1  # every record has one; an error would not
        self._next[partition] = next_offset
        return Records(
            partition,
            [message.key() for message in messages],
            [message.value() for message in messages],
            [_epoch(message) for message in messages],
            [message.timestamp()[1] for message in messages],
            next_offset,
        )

    def rewind(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        consumer = self._connected()
        found: dict[Partition, int] = {}
        with self._translated():
            for partition in partitions:
                if partition in self._next:
                    place = TopicPartition(*partition)
                    found[partition], _ = consumer.get_watermark_offsets(place, timeout=settings.REQUEST_TIMEOUT_S)
            if not found:
                return found
            starts = [TopicPartition(*partition, offset) for partition, offset in found.items()]
            consumer.incremental_unassign(starts)  # a seek is refused to a partition that has stopped
            consumer.incremental_assign(starts)
            if self._paused:
                consumer.pause(starts)
        self._drop(found)
        self._next |= found
        return found

    def pause(self) -> None:
        self._paused = True
        consumer = self._connected()
        consumer.pause(consumer.assignment())

    def resume(self) -> None:
        self._paused = False
        consumer = self._connected()
        consumer.resume(consumer.assignment())

    # ── positions ────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, positions: Mapping[Partition, int]) -> bool:
        self._uncommitted |= {partition: offset for partition, offset in positions.items() if partition in self._next}
        with self._translated():
            return self._commit()

    def _commit(self) -> bool:
        if not self._uncommitted:
            return True
        offsets = [TopicPartition(*partition, offset) for partition, offset in self._uncommitted.items()]
        try:
            done = self._connected().commit(offsets=offsets, asynchronous=False)
            failed = [partition.error for partition in done if partition.error is not None]
        except KafkaException as error:
            failed = [error.args[0]]
        self._deferred = any(error.code() in _REBALANCING for error in failed)
        if self._deferred:
            return False
        if left := [error for error in failed if error.code() not in _LOST]:
            raise KafkaException(left[0])
        # Lost or not: of a lost membership the next poll will tell, and the positions are another's.
        self._uncommitted.clear()
        return not failed

    def lags(self) -> dict[Partition, int]:
        consumer = self._connected()
        found: dict[Partition, int] = {}
        for partition, position in self._next.items():
            low, high = consumer.get_watermark_offsets(TopicPartition(*partition), cached=True)
            if high >= 0:  # else nothing has been fetched yet
                found[partition] = max(0, high - max(low, position))
        return found

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            self._revoked = _ignore
            consumer.close()

    # ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _connected(self) -> Consumer:
        assert self._consumer is not None, "subscribe first"
        return self._consumer

    def _message_error(self, message: Message) -> None:
        error = message.error()
        assert error is not None
        if error.code() not in (KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION):
            self._errors.append(error)
            return
        partition = Partition(str(message.topic()), int(message.partition() or 0))
        if partition in self._next and partition not in self._unplaced:
            self._expired[partition] = self._next[partition]

    def _raise_errors(self) -> None:
        errors, self._errors[:] = list(self._errors), []
        for error in errors:
            if error.code() in _TO_TELL or refusals.is_about_certificates(error.str()):
                raise KafkaException(error)
            _log.info("%s", redact(error.str()))  # of one broker or connection, which the client mends by itself

    @contextmanager
    def _translated(self) -> Generator[None]:
        """Raise what the client raises as one of our own."""
        try:
            yield
        except KafkaException as raised:
            error: KafkaError = raised.args[0]
            if error.code() in _LOGIN:
                raise refusals.login_refused(self._spec, error.str()) from raised
            if error.code() in _PRIVILEGES:
                raise refusals.not_allowed(self._spec, self._group_id, (), error.str()) from raised
            if error.code() in _NO_TOPIC:
                raise refusals.refused(
                    error.str(), "make the topic again, or take its table out of the pipeline"
                ) from raised
            if error.code() in _FOR_GOOD:
                raise refusals.refused(
                    error.str(), f"change the group {self._group_id} or the broker's limits"
                ) from raised
            if error.code() == KafkaError._SSL or refusals.is_about_certificates(error.str()):
                raise refusals.certificate_refused(self._spec, error.str()) from raised
            raise KafkaBusy(f"Kafka ({self._spec.bootstrap_servers}): {redact(error.str())}") from raised


def _epoch(message: Message) -> bytes | None:
    headers: Any = message.headers()  # its types have those of a producer, too
    name: str
    value: bytes | None
    for name, value in headers or ():
        if name == EPOCH_HEADER:
            return value
    return None


def _names(partitions: Sequence[TopicPartition]) -> list[Partition]:
    return [Partition(partition.topic, partition.partition) for partition in partitions]


def _ignore(partitions: Collection[Partition]) -> None:
    pass
