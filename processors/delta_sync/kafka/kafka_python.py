"""The consumer group by kafka-python: Python alone, nothing to compile. Its cost per record is the client's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from delta_sync.errors import DeltaError
from delta_sync.kafka import refusals, settings
from delta_sync.kafka.consumer import EPOCH_HEADER, KafkaBusy, Partition, PartitionsCall, Records
from delta_sync.kafka.network import LOGIN_ERRORS, network
from delta_sync.kafka.settings import Timeouts
from delta_sync.secrets import redact
from delta_sync.spec import KafkaSpec

COORDINATOR_MS = 1000.0  # to find a group's coordinator takes some milliseconds, on a slow machine some hundred
SLICE_S = 0.1  # a poll looks so often whether it was woken: the client has nothing to wake it by

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_kafka: Any = import_module("kafka")
_errors: Any = import_module("kafka.errors")
_assignors: Any = import_module("kafka.coordinator.assignors.cooperative_sticky")
_coordinators: Any = import_module("kafka.coordinator.consumer")
_structs: Any = import_module("kafka.structs")


class KafkaPythonGroup:
    """One member of a consumer group; see ConsumerGroup.

    Rebalances are cooperative (KIP-429): a partition that stays where it is is not taken away. But a member of this
    client fetches nothing while it joins, as the client itself does both in one.
    """

    def __init__(self, spec: KafkaSpec, group_id: str, timeouts: Timeouts) -> None:
        self._spec = spec
        self._group_id = group_id
        self._options = settings.resolved(settings.kafka_python_consumer(spec, group_id, timeouts))
        self._consumer: Any = None
        self._mine: set[Partition] = set()
        self._uncommitted: dict[Partition, int] = {}
        self._deferred = False  # a rebalance takes no commits, so they wait for its end
        self._woken = threading.Event()
        self._assigned: PartitionsCall = _ignore
        self._revoked: PartitionsCall = _ignore
        self._failure: BaseException | None = None  # of such a call, to be raised by the next poll

    def subscribe(self, topics: Collection[str], assigned: PartitionsCall, revoked: PartitionsCall) -> None:
        self._assigned, self._revoked = assigned, revoked
        with self._translated():
            if self._consumer is None:
                self._consumer = _Consumer(self._happened, {**self._options, "kafka_client": network})
            missing = [topic for topic in topics if not self._consumer.partitions_for_topic(topic)]
            if missing:
                raise refusals.topics_missing(missing)
            self._consumer.listen(topics)

    def poll(self, timeout_s: float) -> list[Records]:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._failure is not None:  # before anything is fetched, or what was fetched would be lost
                failure, self._failure = self._failure, None
                raise failure
            with self._translated():
                if self._deferred:
                    self._commit()
                left_s = min(SLICE_S, max(0.0, deadline - time.monotonic()))
                found: Mapping[Any, Sequence[Any]] = self._consumer.poll(timeout_ms=1000 * left_s)
            if found:
                return [_columns(partition, records) for partition, records in found.items()]
            if self._woken.is_set():
                self._woken.clear()
                return []
            if time.monotonic() >= deadline and self._failure is None:
                return []

    def _happened(self, kind: str, partitions: Collection[Partition]) -> None:
        """Take note of what happened to the membership, between two rounds of the client's poll, on our own thread.

        After a revocation the group goes on only with the next round.
        """
        try:
            if kind == "assigned":
                self._mine.update(partitions)
                self._assigned(partitions)
            else:
                if kind == "lost":
                    self._drop(partitions)  # first: what is another's must not be committed
                self._revoked(partitions)
        except BaseException as error:  # noqa: BLE001 -- raised by the next poll; now, records of this one would be lost
            self._failure = error
        if kind != "assigned":
            self._drop(partitions)

    def _drop(self, partitions: Collection[Partition]) -> None:
        self._mine.difference_update(partitions)
        for partition in partitions:
            self._uncommitted.pop(partition, None)

    def commit(self, positions: Mapping[Partition, int]) -> bool:
        self._uncommitted |= {partition: offset for partition, offset in positions.items() if partition in self._mine}
        with self._translated():
            return self._commit()

    def _commit(self) -> bool:
        self._deferred = self._consumer.group_metadata().state is not _structs.MemberState.STABLE
        if self._deferred or not self._uncommitted:
            return not self._deferred
        lost = False
        offsets = {
            _structs.TopicPartition(*partition): _structs.OffsetAndMetadata(offset, "", -1)
            for partition, offset in self._uncommitted.items()
        }
        try:
            self._consumer.commit(offsets, timeout_ms=1000 * settings.REQUEST_TIMEOUT_S)
        except _errors.RebalanceInProgressError:
            self._deferred = True
            return False
        except _errors.CommitFailedError as error:
            if error.args and isinstance(error.args[0], _errors.RebalanceInProgressError):
                self._deferred = True
                return False
            lost = True  # the membership, which the next poll will tell; the positions are another's now
        self._uncommitted.clear()
        return not lost

    def rewind(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        mine = [_structs.TopicPartition(*partition) for partition in partitions if Partition(*partition) in self._mine]
        if not mine:
            return {}
        with self._translated():
            found: Mapping[Any, int] = self._consumer.beginning_offsets(
                mine, timeout_ms=1000 * settings.REQUEST_TIMEOUT_S
            )
        moved: dict[Partition, int] = {}
        for partition, offset in found.items():
            try:
                self._consumer.seek(partition, offset)
            except ValueError:  # it was taken away meanwhile, of which the next poll will tell
                continue
            moved[Partition(*partition)] = offset
            self._uncommitted.pop(Partition(*partition), None)
        return moved

    def pause(self) -> None:
        self._consumer.hold(True)

    def resume(self) -> None:
        self._consumer.hold(False)

    def lags(self) -> dict[Partition, int]:
        found = {partition: self._consumer.lag(_structs.TopicPartition(*partition)) for partition in self._mine}
        return {partition: lag for partition, lag in found.items() if lag is not None}

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        if self._consumer is not None:
            self._mine.clear()
            self._consumer.close(autocommit=False, timeout_ms=1000 * settings.REQUEST_TIMEOUT_S)

    @contextmanager
    def _translated(self) -> Generator[None]:
        """Raise what the client raises as one of our own."""
        try:
            yield
        except DeltaError:
            raise
        except _errors.OffsetOutOfRangeError as error:
            raise refusals.positions_expired(_positions(error.args[0])) from error
        except _errors.LogTruncationError as error:
            raise refusals.positions_expired(_positions(dict.fromkeys(error.divergent_offsets))) from error
        except LOGIN_ERRORS as error:
            raise refusals.login_refused(self._spec, error) from error
        except _errors.TopicAuthorizationFailedError as error:
            topics: Collection[str] = error.args[0] if error.args else ()
            raise refusals.not_allowed(self._spec, self._group_id, topics, type(error).__name__) from error
        except _errors.AuthorizationError as error:
            raise refusals.not_allowed(self._spec, self._group_id, (), type(error).__name__) from error
        except (
            _errors.InvalidSessionTimeoutError,
            _errors.InconsistentGroupProtocolError,
            _errors.GroupMaxSizeReachedError,
            _errors.InvalidGroupIdError,
            _errors.KafkaConfigurationError,
        ) as error:
            raise refusals.refused(error, f"change the group {self._group_id} or the broker's limits") from error
        except _errors.UnsupportedCodecError as error:
            raise refusals.refused(error, "install what reads this compression; for lz4: pip install lz4") from error
        except _errors.KafkaError as error:
            if refusals.is_about_certificates(str(error)):
                raise refusals.certificate_refused(self._spec, error) from error
            raise KafkaBusy(f"Kafka ({self._spec.bootstrap_servers}): {redact(str(error))}") from error


class _Consumer(_kafka.KafkaConsumer):  # type: ignore[misc]  # it has no types
    """The client, but for some things: it takes a partition without a position from position 0, it ends its
    thread when it cannot connect, it takes up a join that ended between two polls, and it tells of rebalances on the
    thread that polls.

    The client calls its listeners on its own thread, where nothing can be committed without being one of its
    coroutines. Here they only take notes, which are read after each round of `poll`. Nothing is lost by that: after a
    revocation it takes the next round to let the group go on.
    """

    def __init__(self, happened: Callable[[str, Collection[Partition]], None], options: Mapping[str, Any]) -> None:
        self._happened = happened
        self._notes: list[tuple[str, Collection[Partition]]] = []
        self._held = False
        self._client: Any = None
        client: Any = super()
        try:
            client.__init__(partition_assignment_strategy=[_assignors.CooperativeStickyAssignor], **options)
        except BaseException:
            if self._client is not None:
                self._client.close()
            raise
        self._coordinator.__class__ = _Coordinator

    def listen(self, topics: Collection[str]) -> None:
        self.subscribe(sorted(topics), listener=_Listener(self._note))

    def hold(self, held: bool) -> None:
        """Pause or resume all partitions, and those that will come."""
        self._held = held
        (self.pause if held else self.resume)(*self.assignment())

    def lag(self, partition: Any) -> int | None:
        """Return what is not read yet as far as the last answer told. `position` would ask the broker."""
        state = self._subscription.assignment.get(partition)
        if state is None or state.position is None or state.highwater is None:
            return None
        return max(0, int(state.highwater) - int(state.position.offset))

    def _note(self, kind: str, partitions: Collection[Any]) -> None:
        if not partitions:
            return
        if kind == "assigned" and self._held:
            self.pause(*partitions)  # here, before anything is fetched
        self._notes.append((kind, [Partition(*partition) for partition in partitions]))

    def _poll_once(self, *args: Any, **options: Any) -> Mapping[Any, Sequence[Any]]:
        client: Any = super()
        found: Mapping[Any, Sequence[Any]] = {}
        try:
            found = client._poll_once(*args, **options)
        except _errors.NoOffsetForPartitionError as error:
            for partition in error.args[0]:
                self.seek(partition, 0)  # not to its beginning: if that is elsewhere, records have expired
        while self._notes:
            self._happened(*self._notes.pop(0))
        return found


class _Coordinator(_coordinators.ConsumerCoordinator):  # type: ignore[misc]  # it has no types
    """The client's side of the group protocol. A join that has ended while nobody polled is to be taken up by the next
    poll. 3.0.12 begins another one instead, which makes all others join again, and short polls go on with that for
    ever; or, if the join was for other partitions or topics, it forgets that it has to join, and stays as it was."""

    def ensure_coordinator_ready(self, timeout_ms: float | None = None) -> bool:
        """Find the coordinator. An attempt that is cut short begins from the start: short polls would never find it."""
        client: Any = super()
        return bool(client.ensure_coordinator_ready(None if timeout_ms is None else max(timeout_ms, COORDINATOR_MS)))

    def need_rejoin(self) -> bool:
        client: Any = super()
        return self._join_task is not None or bool(client.need_rejoin())

    @property
    def _join_task(self) -> _Join | None:
        return self.__dict__.get("_join_task")

    @_join_task.setter
    def _join_task(self, task: Any) -> None:
        self.__dict__["_join_task"] = None if task is None else _Join(task)


class _Join:
    """A join that does not say that it has ended: who wants to know has to wait for it, which then takes no time."""

    is_done = False

    def __init__(self, task: Any) -> None:
        self._task = task

    def add_callback(self, *args: Any) -> Any:
        return self._task.add_callback(*args)

    def add_errback(self, *args: Any) -> Any:
        return self._task.add_errback(*args)

    def __await__(self) -> Any:
        return self._task.__await__()


class _Listener(_kafka.ConsumerRebalanceListener):  # type: ignore[misc]  # it has no types
    def __init__(self, note: Callable[[str, Collection[Any]], None]) -> None:
        self._note = note

    def on_partitions_assigned(self, assigned: Collection[Any]) -> None:
        self._note("assigned", assigned)

    def on_partitions_revoked(self, revoked: Collection[Any]) -> None:
        self._note("revoked", revoked)

    def on_partitions_lost(self, lost: Collection[Any]) -> None:
        self._note("lost", lost)


def _columns(partition: Any, records: Sequence[Any]) -> Records:
    return Records(
        Partition(*partition),
        [record.key for record in records],
        [record.value for record in records],
        [_epoch(record.headers) for record in records],
        [record.timestamp for record in records],
        records[-1].offset + 1,
    )


def _epoch(headers: Sequence[tuple[str, bytes | None]]) -> bytes | None:
    for name, value in headers:
        if name == EPOCH_HEADER:
            return value
    return None


def _positions(offsets: Mapping[Any, int | None]) -> dict[Partition, int | None]:
    return {Partition(*partition): offset for partition, offset in offsets.items()}


def _ignore(partitions: Collection[Partition]) -> None:
    pass
