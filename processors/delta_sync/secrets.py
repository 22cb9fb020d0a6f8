"""Secrets are references, `${env:NAME}` or `${file:/path}`, in every file; they are resolved when something connects.

What a reference resolved to is remembered for the life of the process, so that `redact` can take it out of any text
that is about to be logged, printed or stored: a driver's error message may quote the URL it was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from delta_sync.errors import UsageError

_REFERENCE = re.compile(r"\$\{(env|file):([^}]*)\}")
_resolved: set[str] = set()


def has_reference(text: str) -> bool:
    """Tell whether the text holds a reference."""
    return _REFERENCE.search(text) is not None


def references(text: str) -> list[tuple[str, str]]:
    """Return what a text refers to, `("env", NAME)` or `("file", PATH)`, in the order in which it stands there."""
    return [(match[1], match[2]) for match in _REFERENCE.finditer(text)]


def resolve(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Return the text with every reference replaced by its value (a file's without the newline at its end).

    Raises UsageError naming the reference, never a value.
    """
    env = os.environ if environ is None else environ

    def value(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind == "env":
            if name not in env:
                raise UsageError(f"The environment variable {name} is not set, and ${{env:{name}}} refers to it.")
            found = env[name]
        else:
            try:
                found = Path(name).read_text(encoding="utf-8").rstrip("\r\n")
            except OSError as error:
                raise UsageError(f"${{file:{name}}} cannot be read: {error.strerror}.") from error
        remember(found)
        return found

    return _REFERENCE.sub(value, text)


def resolve_url(url: str, environ: Mapping[str, str] | None = None) -> str:
    """Return the URL with its references resolved and percent-encoded, so that a secret may hold any character."""
    return _REFERENCE.sub(lambda match: quote(resolve(match.group(), environ), safe=""), url)


def remember(secret: str) -> None:
    """Let `redact` know of a secret. Empty ones and single characters would redact everything, so they are ignored."""
    if len(secret) > 1:
        _resolved.add(secret)
        _resolved.add(quote(secret, safe=""))


def redact(text: str) -> str:
    """Return the text with every secret that was resolved in this process, and every URL's password, as `***`."""
    for secret in sorted(_resolved, key=len, reverse=True):
        if secret in text:
            # As a whole word: a password may be a word like any other, or a part of one (`postgres`).
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", "***", text)
    return _URL_PASSWORD.sub(r"\1***@", text)


_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/@:]*:)(?!\$\{)[^\s/@]+@")


def literal_password(url: str) -> str | None:
    """Return the password that a URL spells out, percent-decoded; None if it has none or only a reference."""
    masked = _REFERENCE.sub("", url)
    try:
        password = urlsplit(masked).password
    except ValueError:
        return None
    return unquote(password) if password else None
