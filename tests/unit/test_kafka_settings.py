"""From the specification to the clients' options."""

from __future__ import annotations

from typing import Any

import confluent_kafka
import pytest
from kafka import KafkaConsumer

from delta_sync.errors import UsageError
from delta_sync.kafka import settings
from delta_sync.kafka.settings import Timeouts
from delta_sync.spec import KafkaSpec, RegistrySpec, SecuritySpec

REGISTRY = RegistrySpec(url="http://registry:8080")
PLAIN = KafkaSpec(bootstrap_servers="one:9092, two:9092", registry=REGISTRY)
SECURED = PLAIN.model_copy(
    update={
        "security": SecuritySpec(
            protocol="SASL_SSL",
            mechanism="SCRAM-SHA-512",
            username='del"ta',
            password="${env:KAFKA_PASSWORD}",
            ca_file="/etc/ca.pem",
            certificate_file="/etc/delta.pem",
            key_file="/etc/delta.key",
        )
    }
)


def test_nobody_but_us_commits_or_moves_positions() -> None:
    slow, fast = settings.kafka_python_consumer(PLAIN, "group"), settings.confluent_consumer(PLAIN, "group")
    assert slow["group_id"] == fast["group.id"] == "group"
    assert (slow["enable_auto_commit"], fast["enable.auto.commit"], fast["enable.auto.offset.store"]) == (False,) * 3
    assert (slow["auto_offset_reset"], fast["auto.offset.reset"]) == ("none", "error")
    assert slow["isolation_level"] == fast["isolation.level"] == "read_committed"
    assert (slow["allow_auto_create_topics"], fast["allow.auto.create.topics"]) == (False, False)


def test_the_clients_know_every_option() -> None:
    known: dict[str, Any] = KafkaConsumer.DEFAULT_CONFIG
    assert settings.kafka_python_consumer(SECURED, "group").keys() <= known.keys()
    confluent_kafka.Consumer(settings.confluent_consumer(PLAIN, "group")).close()  # it refuses those it does not know


@pytest.mark.parametrize("large", [1 << 20, 16 << 20, 900 << 20])
def test_the_largest_record_fits_through(large: int) -> None:
    spec = PLAIN.model_copy(update={"max_message_bytes": large})
    assert settings.kafka_python_consumer(spec, "group")["receive_message_max_bytes"] > large
    assert settings.confluent_consumer(spec, "group")["receive.message.max.bytes"] > large
    confluent_kafka.Consumer(settings.confluent_consumer(spec, "group")).close()


def test_what_is_fetched_ahead_does_not_grow_with_the_largest_record() -> None:
    small, large = PLAIN, PLAIN.model_copy(update={"max_message_bytes": 512 << 20})
    for name in ("fetch_max_bytes", "max_partition_fetch_bytes", "max_poll_records"):
        assert settings.kafka_python_consumer(small, "g")[name] == settings.kafka_python_consumer(large, "g")[name]
    for name in ("fetch.max.bytes", "max.partition.fetch.bytes", "queued.max.messages.kbytes"):
        assert settings.confluent_consumer(small, "g")[name] == settings.confluent_consumer(large, "g")[name]


def test_timeouts_are_in_milliseconds() -> None:
    timeouts = Timeouts(session_s=1.5, heartbeat_s=0.2, poll_interval_s=2, metadata_s=0.5)
    slow = settings.kafka_python_consumer(PLAIN, "g", timeouts)
    assert [slow[f"{name}_ms"] for name in ("session_timeout", "heartbeat_interval", "max_poll_interval")] == [
        1500,
        200,
        2000,
    ]
    fast = settings.confluent_consumer(PLAIN, "g", timeouts)
    assert [fast[name] for name in ("session.timeout.ms", "heartbeat.interval.ms", "max.poll.interval.ms")] == [
        1500,
        200,
        2000,
    ]


def test_no_option_holds_a_secret_until_it_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", 'pa"ss\\word')
    slow, fast = settings.kafka_python(SECURED), settings.confluent(SECURED)
    assert not any('pa"ss' in str(options) for options in (slow, fast))
    assert settings.resolved(slow)["sasl_plain_password"] == 'pa"ss\\word'
    assert settings.resolved(fast)["sasl.password"] == 'pa"ss\\word'


def test_a_reference_that_cannot_be_resolved_is_a_mistake_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_PASSWORD", raising=False)
    with pytest.raises(UsageError, match="KAFKA_PASSWORD"):
        settings.resolved(settings.kafka_python(SECURED))
