"""The source's URL taken apart, as psycopg and libpq read it, into what a JDBC driver wants to know."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from delta_sync.errors import UsageError
from delta_sync.secrets import has_reference
from delta_sync.spec import SourceSpec
from delta_sync.urls import check_url

_REFERENCE = re.compile(r"\$\{(?:env|file):[^}]*\}")
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # Debezium's own rule (`database.hostname`)


class Connection(NamedTuple):
    """Parts of the URL, percent-decoded; each may hold references. `parameters` is its query."""

    host: str
    port: int
    user: str
    password: str | None
    database: str
    parameters: dict[str, str]


def connection(source: SourceSpec, default_port: int) -> Connection:
    """Return the parts of the source's URL. Raises UsageError for what Debezium cannot be told."""
    masked, references = _mask(source.url)

    def plain(text: str) -> str:
        return _unmask(unquote(text), references)

    check_url(source.url, "source.url")
    parts = urlsplit(masked)
    if "," in parts.netloc.rpartition("@")[2]:
        raise UsageError("source.url names several hosts; the replication slot is on one of them: name that one.")
    try:
        port = parts.port or default_port
    except ValueError:
        raise UsageError("source.url: the port cannot be a reference; write the number.") from None
    host = _host(plain(parts.hostname or ""))
    if not parts.username:
        raise UsageError("source.url names no user; write it as postgresql://user@host/database.")
    user = plain(parts.username)
    return Connection(
        host, port, user, _password(source, parts, references), plain(parts.path.lstrip("/")), _query(parts, references)
    )


def _mask(url: str) -> tuple[str, list[str]]:
    # A path in ${file:/path} would end the URL's authority, so references stand aside while it is taken apart.
    references = _REFERENCE.findall(url)
    stem = "zref"  # lower case: urlsplit lowers the host
    while stem in url:
        stem += "z"
    for index, reference in enumerate(references):
        url = url.replace(reference, f"{stem}{index}x", 1)
    return url, [stem, *references]


def _unmask(text: str, references: list[str]) -> str:
    stem, *values = references
    return re.sub(rf"{stem}(\d+)x", lambda match: values[int(match[1])], text)


def _host(host: str) -> str:
    if not host or host.startswith("/"):
        raise UsageError("source.url names no host; Debezium connects by TCP only, so name one, such as localhost.")
    if has_reference(host):
        return host
    if ":" in host:
        raise UsageError(f"source.url has the address {host}; Debezium takes host names and IPv4 addresses only.")
    if not _HOST_NAME.fullmatch(host):
        raise UsageError(f"source.url has the host {host!r}; Debezium takes ASCII letters, digits and `.-_` only.")
    return host


def _password(source: SourceSpec, parts: SplitResult, references: list[str]) -> str | None:
    in_url = _unmask(unquote(parts.password), references) if parts.password else None
    if in_url and source.password:
        raise UsageError("source.url and source.password both hold a password; remove one of them.")
    return source.password or in_url


def _query(parts: SplitResult, references: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in filter(None, parts.query.split("&")):
        name, _, value = pair.partition("=")
        found[unquote(name)] = _unmask(unquote(value), references)  # libpq's `+` is a plus
    return found
