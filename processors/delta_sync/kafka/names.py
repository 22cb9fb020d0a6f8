"""Names in Kafka: of topics, as Debezium makes them, and of the consumer group."""

from __future__ import annotations

import re

_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]")


def topic_name(pipeline: str, table: str) -> str:
    """Return the topic of a table (`schema.name`). What Kafka does not allow in a name is `_`, as Debezium has it."""
    return _NOT_ALLOWED.sub("_", f"delta_{pipeline}.{table}")


def message_topic(pipeline: str) -> str:
    """Return the topic of the heartbeats, to which nobody listens: that Kafka has them is what counts."""
    return topic_name(pipeline, "message")


def group_id(pipeline: str) -> str:
    """Return the consumer group of a pipeline's workers."""
    return f"delta_{pipeline}"
