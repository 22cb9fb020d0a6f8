"""What the cluster says of a group and of the topics that it reads, through kafka-python's admin client."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any, TypeVar
from uuid import UUID

from kafka.errors import KafkaError, UnknownTopicOrPartitionError

from delta_sync.kafka.consumer import KafkaBusy, Partition
from delta_sync.kafka.topic_ids import Ids
from delta_sync.secrets import redact

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_kafka: Any = import_module("kafka")
_admin: Any = import_module("kafka.admin")
T = TypeVar("T")

NO_ID = UUID(int=0)  # what an older broker says


class GroupOffsets:
    """Ends and committed positions of some topics. Used by one thread; connects when it is asked first."""

    def __init__(self, options: Callable[[], Mapping[str, Any]], group_id: str, topics: Collection[str]) -> None:
        """`options` are kafka-python's, secrets resolved."""
        self._options = options
        self._group_id = group_id
        self._topics = sorted(topics)
        self._client: Any = None

    def ends(self) -> dict[Partition, int]:
        """Return the end of each partition that holds any record."""
        return self._asked(self._ends)

    def committed(self) -> dict[Partition, int]:
        """Return the group's committed positions; a partition without one is missing."""
        return self._asked(self._committed)

    def topic_ids(self) -> Ids:
        """Return the id of each partition's topic; none where a topic is not there, or the broker is older than 2.8."""
        return self._asked(self._topic_ids)

    def close(self) -> None:
        """Release connections. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _asked(self, question: Callable[[Any], T]) -> T:
        try:
            if self._client is None:
                self._client = _admin.KafkaAdminClient(**self._options())
            return question(self._client)
        except KafkaError as error:
            self.close()  # the next time with a new connection
            raise KafkaBusy(f"Kafka does not answer: {redact(str(error) or type(error).__name__)}.") from error

    def _ends(self, client: Any) -> dict[Partition, int]:
        try:
            described = client.describe_topics(self._topics)
        except UnknownTopicOrPartitionError:
            raise KafkaBusy(f"Kafka lacks one of the topics {', '.join(self._topics)}.") from None
        partitions: list[Any] = [
            _kafka.TopicPartition(topic["name"], partition["partition_index"])
            for topic in described
            for partition in topic["partitions"]
        ]
        beginnings = client.list_partition_offsets(dict.fromkeys(partitions, _admin.OffsetSpec.EARLIEST))
        ends = client.list_partition_offsets(dict.fromkeys(partitions, _admin.OffsetSpec.LATEST))
        return {
            Partition(at.topic, at.partition): ends[at].offset
            for at in partitions
            if ends[at].offset > beginnings[at].offset
        }

    def _topic_ids(self, client: Any) -> dict[Partition, str]:
        return {
            Partition(topic["name"], partition["partition_index"]): str(topic["topic_id"])
            for topic in client.describe_topics(self._topics)
            if topic.get("topic_id") not in (None, NO_ID)
            for partition in topic["partitions"]
        }

    def _committed(self, client: Any) -> dict[Partition, int]:
        found = client.list_group_offsets({self._group_id: None})[self._group_id]
        return {Partition(at.topic, at.partition): position.offset for at, position in found.items()}
