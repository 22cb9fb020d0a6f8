"""Masks: what stands in place of a column's value, from the moment at which the value is read.

A mask belongs to a column of the catalogue's table (`tables.Column.mask`), so whoever decodes an event or reads a row
by that table has the masked value and never the other: look-ups, processors, dead letters, dumps, re-reads and
verification alike. Pure, but that a hash's secret is resolved once. Applying a mask to its own result changes nothing,
so a change that was kept can be masked again when it is replayed.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import orjson

from delta_sync.errors import UsageError
from delta_sync.secrets import resolve
from delta_sync.values import JSON_OPTIONS, json_default, scalar_text

REDACTED = "***"
HASH_PREFIX = "hmac:"  # tells a hash from a value, so that it is not hashed again
SECRET_LEAST = 16  # characters: what is hashed can be guessed, unless the secret cannot
_HASHED = re.compile(HASH_PREFIX + r"[0-9a-f]{64}")


class Mask(NamedTuple):
    """How a column is masked. `argument`: the secret's reference; the text that stands there; how many characters."""

    how: Literal["hash", "redact", "truncate"]
    argument: str | int

    def function(self) -> Callable[[Any], Any]:
        """Return what makes the masked value of one that is not NULL. Raises UsageError: no secret, or a short one."""
        argument = self.argument
        match self.how:
            case "hash":
                return hasher(str(argument))
            case "redact":
                return lambda _value: argument
            case "truncate":
                return lambda value: _text(value)[: int(argument)]


def hasher(reference: str) -> Callable[[Any], str]:
    """Return the HMAC-SHA256 with the secret behind a reference, of a value's text: `hmac:` and 64 digits.

    Equal values have equal hashes, from the log and from a dump, so they can still be joined and counted.
    """
    secret = resolve(reference)
    if len(secret) < SECRET_LEAST:
        raise UsageError(
            f"{reference} has fewer than {SECRET_LEAST} characters, so the hashed values could be guessed; take a"
            " longer secret, such as that of `openssl rand -hex 32`."
        )
    key = secret.encode()

    def hashed(value: Any) -> str:
        text = _text(value)
        if _HASHED.fullmatch(text):
            return text
        return HASH_PREFIX + hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256").hex()

    return hashed


def _text(value: Any) -> str:
    """Return a value as text; equal values, equal text."""
    if isinstance(value, list | dict):
        return orjson.dumps(value, json_default, JSON_OPTIONS | orjson.OPT_SORT_KEYS).decode()
    return scalar_text(value)
