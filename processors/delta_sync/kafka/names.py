"""Names in Kafka: of topics, as Debezium makes them, and of the consumer group."""

from __future__ import annotations

import re

LONGEST_NAME = 249  # Kafka's limit, at which Debezium cuts
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]")


def topic_name(pipeline: str, table: str) -> str:
    """Return the topic of a table (`schema.name`), as Debezium makes it: a UTF-16 unit that Kafka forbids is `_`.

    Two tables may come out alike; `topics.wanted_topics` refuses them.
    """
    name = f"delta_{pipeline}.{table}"
    return _NOT_ALLOWED.sub(lambda match: "_" * (len(match.group().encode("utf-16-le")) // 2), name)[:LONGEST_NAME]


def message_topic(pipeline: str) -> str:
    """Return the topic of the heartbeats, to which nobody listens: that Kafka has them is what counts."""
    return topic_name(pipeline, "message")


def heartbeat_topic(pipeline: str) -> str:
    """Return the topic of Debezium's own heartbeats, for sources whose log takes none. Nobody listens to it, either."""
    return f"__debezium-heartbeat.delta_{pipeline}"


def offsets_topic(pipeline: str) -> str:
    """Return the topic of the connector's position, for sources that keep none for it. No table has it: one dot."""
    return f"delta_{pipeline}.offsets"


def history_topic(pipeline: str) -> str:
    """Return the topic of the schema's history, which the connector needs to read its source's log."""
    return f"delta_{pipeline}.schema-history"


def signals_topic(pipeline: str) -> str:
    """Return the topic by which a connector is told to take an incremental snapshot."""
    return f"delta_{pipeline}.signals"


def signals_group_id(pipeline: str) -> str:
    """Return the consumer group under which the connector keeps how far it has read that topic."""
    return signals_topic(pipeline)


def notifications_topic(pipeline: str) -> str:
    """Return the topic in which a connector says how far its incremental snapshot is."""
    return f"delta_{pipeline}.notifications"


def notices_group_id(pipeline: str) -> str:
    """Return the consumer group by which a pipeline's workers share the notices of a topic."""
    return f"delta_{pipeline}.notices"


def group_id(pipeline: str) -> str:
    """Return the consumer group of a pipeline's workers."""
    return f"delta_{pipeline}"
