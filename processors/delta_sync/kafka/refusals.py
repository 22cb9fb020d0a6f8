"""What Kafka refuses for good, in words: the same whichever client was told."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from delta_sync.errors import CheckFailed, Problem
from delta_sync.kafka.consumer import Partition, PositionsExpired
from delta_sync.secrets import redact
from delta_sync.spec import KafkaSpec

WHERE = "kafka"

# OpenSSL's words, as Python has them (`SSLV3_ALERT_CERTIFICATE_UNKNOWN`) and as librdkafka does: of our own check of
# the broker's certificate, and of the broker's of ours.
_CERTIFICATES = re.compile(
    r"certificate[ _]verify[ _]failed|alert[ _](bad[ _]|unsupported[ _])?certificate|alert[ _]unknown[ _]ca",
    re.IGNORECASE,
)


def is_about_certificates(error: str) -> bool:
    """Return whether a client's error says that a certificate is refused, by either side. That does not pass."""
    return _CERTIFICATES.search(error) is not None


def login_refused(spec: KafkaSpec, error: object) -> CheckFailed:
    """Kafka takes neither name nor password, or not by this mechanism."""
    security = spec.security
    who = "a client without a name" if security is None or security.username is None else f"user {security.username}"
    how = "" if security is None or security.mechanism is None else f" by {security.mechanism}"
    return _failed(
        f"{spec.bootstrap_servers} refuses {who}{how} ({redact(str(error))})",
        "correct username, password and mechanism in kafka.security, or make the user in Kafka",
    )


def certificate_refused(spec: KafkaSpec, error: object) -> CheckFailed:
    """The broker's certificate is none that is trusted, or the broker does not take ours."""
    return _failed(
        f"no TLS with {spec.bootstrap_servers} ({redact(str(error))})",
        "correct ca_file, certificate_file and key_file in kafka.security, or the broker's certificate and its name",
    )


def not_allowed(spec: KafkaSpec, group_id: str, topics: Collection[str], error: object) -> CheckFailed:
    """Kafka knows the user, who lacks a privilege on the group, or on these topics."""
    security = spec.security
    who = "ANONYMOUS" if security is None or security.username is None else security.username
    on = f"topic {', '.join(sorted(topics))}" if topics else f"group {group_id}"
    return _failed(
        f"User:{who} may not read {on} ({redact(str(error))})",
        f"allow User:{who} the operations Read and Describe on the pipeline's topics, and Read on group {group_id}",
    )


def topics_missing(topics: Iterable[str]) -> CheckFailed:
    """Topics that are to be read are not there, or the user may not see them."""
    return _failed(
        f"topic {', '.join(sorted(topics))} is not there, or may not be seen",
        "make it by `deltactl pipeline create`, or allow the user Describe on it",
    )


def refused(error: object, fix: str) -> CheckFailed:
    """Anything else that does not pass by itself."""
    return _failed(redact(str(error)), fix)


def positions_expired(positions: Mapping[Partition, int | None]) -> PositionsExpired:
    """Positions are no longer in their partitions; None where the position is not known."""
    places = ", ".join(
        f"partition {partition.number} of topic {partition.topic}" + ("" if offset is None else f" at {offset}")
        for partition, offset in sorted(positions.items(), key=lambda item: item[0])
    )
    return PositionsExpired(
        f"Records were gone from Kafka before they were read ({places}): the workers were away for longer than"
        " kafka.retention, or the topic was made anew.",
        dict(positions),
    )


def _failed(what: str, fix: str) -> CheckFailed:
    return CheckFailed([Problem(WHERE, what, fix)])
