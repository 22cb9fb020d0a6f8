"""A handler that posts events to a URL, signed by the rules of Standard Webhooks (https://www.standardwebhooks.com).

The body is JSON: one event, or `{"events": […]}` when the handler was declared with a `batch` above 1. The headers are
`webhook-id` (the same whenever the same events are sent: the receiver's idempotency key), `webhook-timestamp` (seconds
since 1970, of the attempt) and `webhook-signature`: `v1,` and the base64 of HMAC-SHA256 of `id.timestamp.body`.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import email.utils
import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import requests

from delta_sync.errors import EventRefused, Transient, UsageError
from delta_sync.events import RowEvent
from delta_sync.secrets import redact, remember, resolve, resolve_url
from delta_sync.urls import split_url
from delta_sync.values import to_json

TIMEOUT_S = 30.0  # to connect, and for the answer: a receiver should note the event and answer at once
LONGEST_WAIT_S = 300.0  # that a receiver may ask for: then it is asked again, and says so once more
_BUSY = frozenset({408, 425, 429})  # of 4xx; every 5xx is, too
_PREFIX = "whsec_"  # of a secret in base64, as Standard Webhooks has it


class Webhook:
    """Posts events; what is answered with 2xx is handled. 408, 425, 429, 5xx and a broken connection are tried again,
    for ever, after `Retry-After` where there is one. Anything else, redirects too, makes the change a dead letter.
    """

    ends_by_itself = True  # by `timeout_s`, after which it is called again

    def __init__(
        self,
        url: str,
        *,
        secret: str,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`secret` and the values of `headers` may be references: `${env:NAME}`, `${file:/path}`.

        Raises UsageError: a reference that cannot be resolved, no http URL, an empty secret.
        """
        self._url = resolve_url(url)
        parts = split_url(self._url, "the webhook's URL")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("A webhook's URL must begin with https:// or http:// and name a host.")
        self._who = f"the webhook at {parts.netloc.rpartition('@')[2]}"
        self._key = signing_key(resolve(secret))
        self._headers = {name: resolve(value) for name, value in (headers or {}).items()}
        self._timeout_s = timeout_s
        self._now = now
        self._local = threading.local()  # a session for each lane

    def __call__(self, events: RowEvent | Sequence[RowEvent]) -> None:
        """Post one event, or several at once. Raises Transient, or EventRefused."""
        if isinstance(events, RowEvent):
            id_, body = events.id, to_json(as_json(events))
        else:
            id_, body = id_of(events), to_json({"events": [as_json(event) for event in events]})
        timestamp = int(self._now())
        headers = {
            **self._headers,
            "Content-Type": "application/json",
            "webhook-id": id_,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._key, id_, timestamp, body),
        }
        try:
            reply = self._session().post(
                self._url, data=body, headers=headers, timeout=self._timeout_s, allow_redirects=False
            )
        except requests.exceptions.RequestException as error:
            raise Transient(f"{self._who} cannot be reached: {redact(str(error))}") from error
        status = reply.status_code
        if 200 <= status < 300:
            return
        if status >= 500 or status in _BUSY:
            wait_s = retry_after_s(reply.headers.get("Retry-After"), self._now())
            raise Transient(f"{self._who} answers {status}", wait_s)
        raise EventRefused(f"{self._who} answers {status}: {redact(reply.text[:500])}")

    def close(self) -> None:
        """Close this thread's connections; those of the lanes end with their threads."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is not None:
            session.close()

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
        return session


def as_json(event: RowEvent) -> dict[str, Any]:
    """Return an event as the body has it. The version is text: JavaScript's numbers have 53 bits."""
    return {
        "id": event.id,
        "table": event.table,
        "key": list(event.key),
        "version": str(event.version),
        "op": event.op,
        "at": event.at,
        "before": event.before,
        "after": event.after,
        "missing": event.missing,
    }


def id_of(events: Sequence[RowEvent]) -> str:
    """Return the id of a batch: the same for the same events."""
    digest = hashlib.sha256("\n".join(event.id for event in events).encode(errors="surrogatepass"))
    return f"batch_{digest.hexdigest()}"


def signing_key(secret: str) -> bytes:
    """Return the bytes to sign with. Raises UsageError."""
    if not secret:
        raise UsageError("A webhook's secret is empty, so anybody could have signed its events; give it one.")
    remember(secret)
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        raise UsageError(f"A webhook's secret that begins with {_PREFIX} must be base64 after it.") from None


def signature(key: bytes, id_: str, timestamp: int, body: bytes) -> str:
    """Return the header that the receiver compares with its own."""
    signed = b".".join([id_.encode(errors="surrogatepass"), str(timestamp).encode(), body])
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Return the seconds for which a receiver asks to be left alone: given as such, or as a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = until.replace(tzinfo=until.tzinfo or dt.UTC).timestamp() - now_s
    return min(max(0.0, seconds), LONGEST_WAIT_S)
