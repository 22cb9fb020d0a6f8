"""What a worker needs of a consumer group, and nothing more; one contract suite tests its two implementations.

Positions are *of the next record to read*, as Kafka has them. They are committed by whoever uses the consumer, after
the sinks; there is no automatic commit and no automatic reset.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from delta_sync.errors import DeltaError, Transient

EPOCH_HEADER = "delta.epoch"


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    number: int


class Records(NamedTuple):
    """Some records of one partition, in its order, column by column: `keys[i]` and `values[i]` are of one record.

    `epochs[i]` is the header `delta.epoch` as the connector wrote it, None where there is none. `timestamps_ms[i]` is
    when the producer sent it. `next_offset` is the position to commit once all of them are in the sinks.
    """

    partition: Partition
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    epochs: Sequence[bytes | None]
    timestamps_ms: Sequence[int]
    next_offset: int


PartitionsCall = Callable[[Collection[Partition]], None]


class KafkaBusy(Transient):
    """Brokers are unreachable, electing or overloaded."""


class PositionsExpired(DeltaError):
    """Records were gone before they were read: the group's positions are no longer in their partitions.

    `positions` are those; None where the position is not known. `rewind` goes on.
    """

    def __init__(self, message: str, positions: Mapping[Partition, int | None]) -> None:
        super().__init__(message)
        self.positions = dict(positions)


class ConsumerGroup(Protocol):
    """One member of a consumer group. Used by one thread, but for `wake`.

    Every method may raise KafkaBusy: call it again. What Kafka refuses for good (credentials, privileges, a topic that
    is not there) is a CheckFailed with what to change.
    """

    def subscribe(self, topics: Collection[str], assigned: PartitionsCall, revoked: PartitionsCall) -> None:
        """Join the group for these topics. During `poll`, `assigned` and `revoked` tell which partitions came and went.

        `revoked` is called while the partitions are still this member's, so that it may commit; after a loss (the
        member was away for too long) they are another's already, and a commit is ignored. A partition without a
        committed position is read from position 0: where records have expired by then, that is PositionsExpired, too.
        What they raise is raised by the next `poll`, and no record is lost by it. Call it once; again only after
        KafkaBusy.
        """
        ...

    def poll(self, timeout_s: float) -> list[Records]:
        """Return records that have come, in at most one `Records` per partition; nothing when none came in time.

        It also keeps the membership, so it has to be called often, paused or not. Raises PositionsExpired, again and
        again until `rewind` or until the partitions are another's.
        """
        ...

    def rewind(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        """Go on, in these partitions, with the first record that is still there; return its positions.

        Nothing is committed: whoever calls this first makes sure that what is lost will be mended, then commits them,
        and a crash in between only finds the old positions once more. Positions from before that wait for the end of a
        rebalance are dropped. Partitions that are no longer this member's are left out.
        """
        ...

    def commit(self, positions: Mapping[Partition, int]) -> bool:
        """Commit positions, return whether that was done. Those of partitions that are no longer this member's are
        left out, silently.

        While the group rebalances it takes no commits: then this returns False, and `poll` commits them as soon as it
        can, unless the partitions are another's by then.
        """
        ...

    def pause(self) -> None:
        """Let `poll` return nothing of the partitions that this member has or gets, until `resume`. Idempotent."""
        ...

    def resume(self) -> None:
        """Go on where `pause` stopped. Idempotent."""
        ...

    def lags(self) -> dict[Partition, int]:
        """Return how many records of each assigned partition have not been read yet. Asks nobody.

        It is what the last answer of a broker told, so it stands still while paused, and a partition of which nothing
        has been fetched yet is left out.
        """
        ...

    def wake(self) -> None:
        """Let a `poll` of another thread return soon."""
        ...

    def close(self) -> None:
        """Leave the group, so that others get the partitions at once. Commits nothing. Idempotent."""
        ...
