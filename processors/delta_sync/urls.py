"""URLs taken apart: the one place that reads what stands before an `@`, and never quotes it."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from delta_sync.errors import UsageError

_REFERENCE = re.compile(r"\$\{(?:env|file):[^}]*\}")
_PARTS = re.compile(  # RFC 3986, appendix B
    r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL
)
_NOT_ENCODED = re.compile(r"%(?![0-9A-Fa-f]{2})|[\[\]]")  # in a user name or a password


def parts_of(url: str) -> SplitResult:
    """Return the parts of any text that may be a URL.

    Not by `urlsplit`, which since some patch releases of 2025 refuses an IPv6 address among several hosts.
    """
    match = _PARTS.fullmatch(url)
    assert match is not None, "every part may be empty"
    scheme, netloc, path, query, fragment = (part or "" for part in match.groups())
    return SplitResult(scheme.lower(), netloc, path, query, fragment)


def check_url(url: str, what: str) -> None:
    """Raise UsageError, naming `what` (`source.url`), for a URL that cannot be taken apart, or not as it was meant.

    References may be in it, resolved or not. An unencoded `/`, `?` or `#` in a password ends the authority early, and
    the rest of the password would pass for a path: that shows in the `@` that is left over, so what follows the
    authority must have its own `@` encoded. Nothing of the URL is quoted, in the message or in the error's context:
    any part of it may be one of a password.
    """
    plain = _REFERENCE.sub("1", url)  # a digit, because it may stand for a port; a path in it would end the authority
    try:
        authority = parts_of(plain).netloc
        user, _, hosts = authority.rpartition("@")
        for host in hosts.split(","):  # some stores take several
            _ = urlsplit(f"//{host}").port
    except ValueError:
        readable = False
    else:
        rest = plain.partition("://")[2].removeprefix(authority)
        readable = not (authority and "@" in rest) and _NOT_ENCODED.search(user) is None
    if not readable:
        raise UsageError(
            f"{what} cannot be read: a port must be a number, and special characters in a user name or a password"
            " (/ ? # [ ] @ %) must be percent-encoded, such as / as %2F."
        )


def split_url(url: str, what: str) -> SplitResult:
    """Return the parts of a URL whose references are resolved. Raises UsageError as `check_url` does.

    The port is known to be a number when the URL names one host; ask for it only then.
    """
    check_url(url, what)
    return parts_of(url)
