"""Secrets are references, `${env:NAME}` or `${file:/path}`, in every file; they are resolved when something connects.

What a reference resolved to is remembered for the life of the process, so that `redact` can take it out of any text
that is about to be logged, printed or stored: a driver's error message may quote the URL it was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote

from delta_sync.errors import UsageError
from delta_sync.urls import parts_of

_REFERENCE = re.compile(r"\$\{(env|file):([^}]*)\}")
REFERENCE_PATTERN = r"^(\$\{(env|file):[^}]*\})+$"  # of references alone, as JSON Schema's editors understand it
_resolved: set[str] = set()


def has_reference(text: str) -> bool:
    """Tell whether the text holds a reference."""
    return _REFERENCE.search(text) is not None


def is_reference(text: str) -> bool:
    """Tell whether the text is made of references alone: literal text around one would be a part of the secret."""
    return text != "" and _REFERENCE.sub("", text) == ""


def is_secret_name(name: str) -> bool:
    """Tell whether an option or a parameter holds a secret, by its name: `sslpassword`, `apiKey`, `auth.token`.

    Those that say where one is (`key_file`, `token.endpoint.url`) hold none.
    """
    return _SECRET_NAME.search(name) is not None and _ABOUT_A_SECRET.search(name) is None


_SECRET_NAME = re.compile(
    r"pass(?:word|wd|phrase)|pwd|secret|token(?!s|iz)|credential|(?:api|access|account|private)[-_.]?key"
    r"|connection[-_.]?string",
    re.IGNORECASE,
)
_ABOUT_A_SECRET = re.compile(r"(?:file|path|dir|location|url|uri|class|type|name|encoding)$", re.IGNORECASE)


def is_secret_parameter(name: str, value: str) -> bool:
    """Tell whether a URL's parameter spells out a secret. `key` may be one, or the path of a file with one."""
    is_key = re.search(r"(?:^|[-_.])key$", name, re.IGNORECASE) is not None and not value.startswith(("/", ".", "~"))
    return value != "" and not is_reference(value) and (is_key or is_secret_name(name))


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
            except UnicodeDecodeError:  # whose own text has some of the bytes
                raise UsageError(f"${{file:{name}}} is no text in UTF-8.") from None
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
    text = _PARAMETER.sub(
        lambda match: match[1] + (f"{match[2]}=***" if is_secret_parameter(match[2], match[3]) else match[0][1:]), text
    )
    return _URL_PASSWORD.sub(r"\1***@", text)


def hidden(data: Any) -> Any:
    """Return data as JSON has it with `***` for what is a secret by its name, unless it is a reference."""
    if isinstance(data, Mapping):
        items = cast("Mapping[str, Any]", data).items()
        return {name: "***" if _is_plain_secret(name, value) else hidden(value) for name, value in items}
    return [hidden(value) for value in cast("Sequence[Any]", data)] if isinstance(data, list) else data


def _is_plain_secret(name: str, value: object) -> bool:
    return is_secret_name(name) and isinstance(value, str | int) and not is_reference(str(value))


_PARAMETER = re.compile(r"""([?&])([\w.-]+)=([^&\s"']+)""")
# Up to the last @ of the word, because one in plain text may have any character; a quotation mark ends the word first.
_URL_PASSWORD = re.compile(r"""(\b[a-z][a-z0-9+.-]*://[^\s/@:]*:)(?!\$\{)(?:[^\s"']+|[^\s/@]+)@""")


def literal_password(url: str) -> str | None:
    """Return the password that a URL spells out, percent-decoded; None if it has none or only a reference."""
    password = parts_of(_REFERENCE.sub("", url)).password
    return unquote(password) if password else None


def spelt_out(url: str) -> str | None:
    """Return what secret a URL spells out: `a password`, or the name of a parameter; None if it has none."""
    if literal_password(url):
        return "a password"
    for pair in url.partition("?")[2].partition("#")[0].split("&"):
        name, _, value = pair.partition("=")
        if is_secret_parameter(unquote(name), value):
            return unquote(name)
    return None
