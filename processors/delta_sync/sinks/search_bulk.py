"""Bulk requests: how they are cut and sent, and what their replies mean, item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from typing import Any

from delta_sync.changes import STALE, Outcome, rejected
from delta_sync.errors import SinkBusy, SinkRefused
from delta_sync.sinks.search_link import Link, is_block, reason_of

BULK_BYTES = 8 << 20  # more gains nothing, and a node may have several in memory at once
BULK_TIMEOUT = "30s"  # how long the store waits for a primary shard that is not there
RETRIES = 3  # of the items of a bulk that the store was too busy for, before all of it is tried again from outside
RETRY_PAUSE_S = 0.2  # before the first of these, doubled each time: the store's queues drain in fractions of a second

_TOO_LARGE = "the document is larger than the store takes (http.max_content_length, 100 MB by default)"


class Bulks:
    """Sends bulk requests to one store."""

    def __init__(self, link: Link, refresh: str | bool, max_bytes: int, sleep: Callable[[float], object]) -> None:
        """`refresh` and `max_bytes` are options of the sink; `sleep` waits for a store that is too busy."""
        self._link, self._refresh, self._max_bytes, self._sleep = link, refresh, max_bytes, sleep

    def send(self, index: str, entries: Mapping[int, bytes], *, require_alias: bool = False) -> dict[int, Outcome]:
        """Send entries of a bulk, by their write's index; return the outcome of each that was not applied."""
        params = {
            "filter_path": "errors,items.*.status,items.*.error",  # most of a reply is of no interest
            "timeout": BULK_TIMEOUT,
        }
        if require_alias:
            # Without it, a store whose index was deleted would make a new one, without mapping and filter.
            params["require_alias"] = "true"
        if self._refresh not in (False, "false"):
            params["refresh"] = "wait_for" if self._refresh == "wait_for" else "true"
        outcomes: dict[int, Outcome] = {}
        pending = dict(entries)
        for attempt in count():
            busy: dict[int, str] = {}
            for part in parts_of(pending, self._max_bytes):
                outcomes |= self._send_part(index, params, part, busy)
            if not busy:
                return outcomes
            reason = next(iter(busy.values()))
            if attempt == RETRIES:
                raise SinkBusy(f"{self._link.who} is too busy for {len(busy)} of {len(entries)} writes: {reason}")
            self._sleep(RETRY_PAUSE_S * 2**attempt)
            pending = {number: pending[number] for number in busy}
        raise AssertionError("unreachable")

    def _send_part(
        self, index: str, params: dict[str, str], part: Mapping[int, bytes], busy: dict[int, str]
    ) -> dict[int, Outcome]:
        """Send one request. What the store was too busy for goes into `busy`, with the reason."""
        outcomes: dict[int, Outcome] = {}
        reply = self._link.request("POST", f"/{index}/_bulk", b"".join(part.values()), params)
        if reply.status in (400, 413):
            # One item spoils a whole bulk, and the reply does not say which: halve until it is alone.
            if len(part) == 1:
                return dict.fromkeys(part, rejected(reply.reason if reply.status == 400 else _TOO_LARGE))
            middle = len(part) // 2
            for half in (islice(part, middle), islice(part, middle, None)):
                outcomes |= self._send_part(index, params, {number: part[number] for number in half}, busy)
            return outcomes
        body = self._link.expect(reply)
        if not body["errors"]:
            return {}
        for number, item in zip(part, body["items"], strict=True):
            ((_, result),) = item.items()
            match verdict(result["status"], result.get("error")):
                case Outcome() as outcome:
                    outcomes[number] = outcome
                case SinkBusy() as error:
                    busy[number] = str(error)
                case SinkRefused() as error:
                    raise SinkRefused(f"{self._link.who} refuses: {error}")
                case None:
                    pass
        return outcomes


def parts_of(entries: Mapping[int, bytes], max_bytes: int) -> Iterator[dict[int, bytes]]:
    """Cut entries into parts of at most `max_bytes`; one that is larger is a part by itself."""
    part: dict[int, bytes] = {}
    size = 0
    for number, entry in entries.items():
        if part and size + len(entry) > max_bytes:
            yield part
            part, size = {}, 0
        part[number] = entry
        size += len(entry)
    if part:
        yield part


def verdict(status: int, error: Any) -> Outcome | SinkBusy | SinkRefused | None:
    """Return what an item of a bulk's reply means (None: applied), or the error that concerns the whole store."""
    if status < 300 or (status == 404 and not error):  # 404: a delete of what is not there, whose version counts
        return None
    if status == 409:
        return STALE
    reason = reason_of(error)
    if status in (408, 429) or status >= 500 or is_block(reason):
        return SinkBusy(reason)
    if status in (401, 403, 404):
        return SinkRefused(reason)
    return rejected(reason)
