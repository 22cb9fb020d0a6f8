"""Which client a consumer group is read with: kafka-python, or confluent-kafka where that is installed."""

from __future__ import annotations

import importlib.util

from delta_sync.errors import UsageError
from delta_sync.kafka.certificates import check_files
from delta_sync.kafka.consumer import ConsumerGroup
from delta_sync.kafka.settings import DEFAULT_TIMEOUTS, Timeouts
from delta_sync.spec import KafkaSpec


def open_group(spec: KafkaSpec, group_id: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> ConsumerGroup:
    """Return a member-to-be of a group, by the client that the specification asks for. `subscribe` is what connects.

    Raises UsageError when that client is not installed, or a secret cannot be resolved; CheckFailed when a file of
    certificates cannot be used.
    """
    check_files(spec)
    if spec.client == "confluent-kafka" or (spec.client == "auto" and _installed("confluent_kafka")):
        if not _installed("confluent_kafka"):
            raise UsageError(
                "kafka.client is confluent-kafka, which is not installed; type: pip install 'delta-sync[fast]'"
            )
        from delta_sync.kafka.confluent import ConfluentGroup

        return ConfluentGroup(spec, group_id, timeouts)
    if not _installed("kafka"):
        raise UsageError("The Kafka transport needs a client; type: pip install 'delta-sync[kafka]'")
    from delta_sync.kafka.kafka_python import KafkaPythonGroup

    return KafkaPythonGroup(spec, group_id, timeouts)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
