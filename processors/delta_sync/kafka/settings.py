"""From `kafka:` in `pipeline.yaml` to the options of each client: pure, so same specification, same options.

Secrets stay references here; whoever connects resolves them (`resolved`). What Kafka's Java clients need stands in
`delta_debezium.kafka_clients`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from delta_sync import secrets
from delta_sync.spec import KafkaSpec

Options = dict[str, Any]  # by the client's own names

CLIENT_ID = "delta"  # what brokers log, and what quotas are for

# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────
# A worker stays under 200 MB resident at any backlog, of which it needs half without Kafka. What is fetched ahead is
# bounded per broker, in compressed bytes, and brokers are asked side by side: three brokers, records that lz4 made ten
# times smaller, and one answer of each in memory make 30 MB. A larger record still arrives, alone.
FETCH_BYTES = 1 << 20  # of one broker's answer; at 1 ms for a round trip, 1 GB/s
PARTITION_FETCH_BYTES = 512 << 10  # so that an answer has two partitions at least, and one full one starves no other
QUEUED_KB = 4 << 10  # confluent-kafka's own queue of decompressed records: 4 MB are some batches of a worker
FETCH_BACKOFF_MS = 20
QUEUED_RECORDS = 4000  # … of each partition, two batches: beside the bytes, each takes some hundred of its own
RECORDS_PER_POLL = 2000  # a batch of the worker; Debezium's own has 2048
FRAME_OVERHEAD_BYTES = 1 << 20  # of an answer: headers, and a line for each partition

# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────
REQUEST_TIMEOUT_S = 10.0  # of one request: a broker that is silent for longer is frozen, and another must be asked
RECONNECT_S = (
    2.0  # between two attempts, at most (defaults: 10 and 30 s): who waits for a broker sees at once it is back
)
FETCH_WAIT_S = 0.5  # how long a broker holds a fetch for which it has nothing; the answer comes with the first record
METADATA_MAX_AGE_S = 30.0  # after so long a new partition is seen (default: 5 min), and its first rows wait no longer


class Timeouts(NamedTuple):
    """When a member of the group counts as gone. Tests have shorter ones."""

    session_s: float = 45.0  # without a heartbeat: Kafka's default; a pause of the machine must not cost the partitions
    heartbeat_s: float = 3.0  # Kafka's default: within so long a rebalance is noticed, and 15 may go missing
    poll_interval_s: float = 300.0  # without `poll`: Kafka's default, twice the time that a slow flush may take
    metadata_s: float = METADATA_MAX_AGE_S


DEFAULT_TIMEOUTS = Timeouts()


def kafka_python(spec: KafkaSpec) -> Options:
    """Return what every client of kafka-python needs to connect: consumer, producer and administrator."""
    security = spec.security
    options: Options = {
        "bootstrap_servers": spec.bootstrap_servers.replace(" ", "").split(","),
        "client_id": CLIENT_ID,
        "request_timeout_ms": _ms(REQUEST_TIMEOUT_S),
        "bootstrap_timeout_ms": _ms(REQUEST_TIMEOUT_S),
        "reconnect_backoff_max_ms": _ms(RECONNECT_S),
        "metadata_max_age_ms": _ms(METADATA_MAX_AGE_S),
    }
    if security is not None:
        options["security_protocol"] = security.protocol
        given = {
            "sasl_mechanism": security.mechanism,
            "sasl_plain_username": security.username,  # of SCRAM, too
            "sasl_plain_password": security.password,
            "ssl_cafile": security.ca_file,
            "ssl_certfile": security.certificate_file,
            "ssl_keyfile": security.key_file,
        }
        options |= {name: value for name, value in given.items() if value is not None}
    return options


def kafka_python_consumer(spec: KafkaSpec, group_id: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> Options:
    """Return the options of a kafka-python consumer, all but the assignor, which is a class."""
    return kafka_python(spec) | {
        "group_id": group_id,
        "enable_auto_commit": False,  # positions are committed after the sinks
        "auto_offset_reset": "none",  # expired positions are an error, not a jump
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        # Without a C library that is not asked for, its sum costs more than all the rest. Brokers check it when
        # they take a record; confluent-kafka does not check it by default, either.
        "check_crcs": False,
        "session_timeout_ms": _ms(timeouts.session_s),
        "heartbeat_interval_ms": _ms(timeouts.heartbeat_s),
        "max_poll_interval_ms": _ms(timeouts.poll_interval_s),
        "metadata_max_age_ms": _ms(timeouts.metadata_s),
        "fetch_max_bytes": FETCH_BYTES,
        "max_partition_fetch_bytes": PARTITION_FETCH_BYTES,
        "fetch_max_wait_ms": _ms(FETCH_WAIT_S),
        "receive_message_max_bytes": _largest_frame(spec),
        "max_poll_records": RECORDS_PER_POLL,
        "metrics_enabled": False,  # a fifth of the time per record, and we have our own
    }


def confluent(spec: KafkaSpec) -> Options:
    """Return what every client of confluent-kafka needs to connect."""
    security = spec.security
    options: Options = {
        "bootstrap.servers": spec.bootstrap_servers,
        "client.id": CLIENT_ID,
        "socket.timeout.ms": _ms(REQUEST_TIMEOUT_S),
        "reconnect.backoff.max.ms": _ms(RECONNECT_S),
        "metadata.recovery.strategy": "none",  # the other, in 2.16, is hundreds of attempts a second
        "topic.metadata.refresh.interval.ms": _ms(METADATA_MAX_AGE_S),
        "enable.metrics.push": False,  # nothing is sent to the cluster that nobody asked for
    }
    if security is not None:
        options["security.protocol"] = security.protocol
        given = {
            "sasl.mechanism": security.mechanism,
            "sasl.username": security.username,
            "sasl.password": security.password,
            "ssl.ca.location": security.ca_file,
            "ssl.certificate.location": security.certificate_file,
            "ssl.key.location": security.key_file,
        }
        options |= {name: value for name, value in given.items() if value is not None}
    return options


def confluent_consumer(spec: KafkaSpec, group_id: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> Options:
    """Return the options of a confluent-kafka consumer."""
    return confluent(spec) | {
        "group.id": group_id,
        "partition.assignment.strategy": "cooperative-sticky",
        "enable.auto.commit": False,  # positions are committed after the sinks
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",  # expired positions are an error, not a jump
        "isolation.level": "read_committed",
        "allow.auto.create.topics": False,
        "session.timeout.ms": _ms(timeouts.session_s),
        "heartbeat.interval.ms": _ms(timeouts.heartbeat_s),
        # It refuses to have these two the other way round.
        "max.poll.interval.ms": max(_ms(timeouts.poll_interval_s), _ms(timeouts.session_s)),
        "topic.metadata.refresh.interval.ms": _ms(timeouts.metadata_s),
        "metadata.max.age.ms": 3 * _ms(timeouts.metadata_s),
        "fetch.max.bytes": FETCH_BYTES,
        "max.partition.fetch.bytes": PARTITION_FETCH_BYTES,
        "message.max.bytes": FETCH_BYTES,  # of what it would send; fetch.max.bytes may not be below it
        "receive.message.max.bytes": _largest_frame(spec),
        "fetch.wait.max.ms": _ms(FETCH_WAIT_S),
        # Default 1 s: when the queue is full, for so long nothing is fetched, though it is empty after a tenth of that.
        "fetch.queue.backoff.ms": FETCH_BACKOFF_MS,
        "queued.max.messages.kbytes": QUEUED_KB,
        "queued.min.messages": QUEUED_RECORDS,
    }


def resolved(options: Options) -> Options:
    """Return the options with the references among them resolved. Raises UsageError."""
    return {name: secrets.resolve(value) if isinstance(value, str) else value for name, value in options.items()}


def _largest_frame(spec: KafkaSpec) -> int:
    """A record that is larger than a fetch comes alone, so an answer may be as large as the largest record."""
    return spec.max_message_bytes + FETCH_BYTES + FRAME_OVERHEAD_BYTES


def _ms(seconds: float) -> int:
    return int(1000 * seconds)
