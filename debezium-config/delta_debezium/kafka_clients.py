"""How Kafka's Java clients log in, by their own names. Secrets stay references."""

from __future__ import annotations

import re

from delta_sync.spec import SecuritySpec

JAAS = "sasl.jaas.config"  # where a password lies within quotes: what a reference becomes is to be escaped

_REFERENCE = re.compile(r"\$\{(?:env|file):[^}]*\}")
_LOGIN_MODULES = {
    "PLAIN": "org.apache.kafka.common.security.plain.PlainLoginModule",
    "SCRAM-SHA-256": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "SCRAM-SHA-512": "org.apache.kafka.common.security.scram.ScramLoginModule",
}


def security_options(security: SecuritySpec) -> dict[str, str]:
    """Return a client's options for security."""
    options: dict[str, str] = {"security.protocol": security.protocol}
    if security.mechanism is not None:
        assert security.username is not None
        assert security.password is not None
        options["sasl.mechanism"] = security.mechanism
        options[JAAS] = (
            f"{_LOGIN_MODULES[security.mechanism]} required"
            f" username={_jaas_text(security.username)} password={_jaas_text(security.password)};"
        )
    if security.ca_file is not None:
        options |= {"ssl.truststore.type": "PEM", "ssl.truststore.location": security.ca_file}
    if security.certificate_file is not None:
        # Kafka takes both in one file, or their text. They are read when the server starts, like any reference.
        options |= {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.certificate.chain": f"${{file:{security.certificate_file}}}",
            "ssl.keystore.key": f"${{file:{security.key_file}}}",
        }
    return options


def _jaas_text(text: str) -> str:
    """Return a quoted value of a JAAS configuration; what references become is escaped when they are resolved."""
    literals, references = _REFERENCE.split(text), _REFERENCE.findall(text)
    escaped = (jaas_escape(literal) + then for literal, then in zip(literals, [*references, ""], strict=True))
    return f'"{"".join(escaped)}"'


def jaas_escape(text: str) -> str:
    """Return a text as it stands within the quotes of a JAAS configuration."""
    return text.replace("\\", "\\\\").replace('"', '\\"')
