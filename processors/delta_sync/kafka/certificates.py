"""The files that `kafka.security` names: whether clients can use them, before one tries and says so in its own words.

The clients of Python read more kinds of keys than Debezium Server does; a pipeline needs all of them.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from delta_sync.errors import CheckFailed, Problem
from delta_sync.kafka.refusals import WHERE
from delta_sync.spec import KafkaSpec

_PKCS8 = "-----BEGIN PRIVATE KEY-----"


def check_files(kafka: KafkaSpec) -> None:
    """Raise CheckFailed, with one sentence, when a file of certificates or a key cannot be used."""
    security = kafka.security
    if security is None:
        return
    files = {
        "ca_file": security.ca_file,
        "certificate_file": security.certificate_file,
        "key_file": security.key_file,
    }
    for option, path in files.items():
        if path is not None:
            _read(option, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if security.ca_file is not None:
        try:
            context.load_verify_locations(security.ca_file)
        except ssl.SSLError:
            raise _failed(f"ca_file {security.ca_file} holds no certificate in PEM", "correct ca_file") from None
    if security.certificate_file is None or security.key_file is None:
        return
    if _PKCS8 not in _read("key_file", security.key_file):
        raise _failed(
            f"key_file {security.key_file} holds no key as Kafka's Java clients read it, PKCS #8 without a password",
            f"type: openssl pkcs8 -topk8 -nocrypt -in {security.key_file} -out NEW, and give NEW as key_file",
        )
    try:
        context.load_cert_chain(security.certificate_file, security.key_file)
    except ssl.SSLError:
        raise _failed(
            f"key_file {security.key_file} is not the key of certificate_file {security.certificate_file}",
            "give the two that belong together as certificate_file and key_file",
        ) from None


def _read(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise _failed(f"{option} {path} cannot be read: {error.strerror}", f"correct {option}") from error


def _failed(what: str, fix: str) -> CheckFailed:
    return CheckFailed([Problem(WHERE, what, f"{fix} in kafka.security" if fix.startswith("correct") else fix)])
