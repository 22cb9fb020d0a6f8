"""Notices that a look-up's answers have changed, as others send them: `{"lookup": "ratings", "keys": [1, 2]}`.

They come over HTTP (`observe`) and from Kafka (`kafka.notices`). One is taken when it is in the state store, where
`refreshing` says what happens to it: whoever is told so may forget it.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from delta_sync.errors import NoticesWait, UsageError
from delta_sync.pipeline import Pipeline
from delta_sync.refreshing import KEYS_MOST, NoticeStore, keys_of, wanted_of
from delta_sync.tables import Table

BYTES_MOST = 8 << 20  # of one notice: 100,000 keys of 80 bytes


class Sent(NamedTuple):
    """What somebody sent: a look-up, and the keys of which it answers otherwise, as texts."""

    lookup: str
    keys: tuple[str, ...]


class Refusal(NamedTuple):
    """Why one of several notices cannot be taken; `place` is its place among them, from 0."""

    place: int
    reason: str


class NoticeIntake:
    """Takes notices for one run of a pipeline, once `open` has told what there is. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: tuple[Pipeline, Callable[[], Mapping[str, Table]], NoticeStore] | None = None
        self.counts: Counter[tuple[str, str]] = Counter()  # by where they come from, and `accepted` or `refused`

    def open(self, pipeline: Pipeline, tables: Callable[[], Mapping[str, Table]], store: NoticeStore) -> None:
        """Take notices from now on. `tables` returns those of the source, as they are by then."""
        self._open = pipeline, tables, store

    def take(self, origin: str, bodies: Sequence[bytes]) -> tuple[list[int], list[Refusal]]:
        """Store what can be taken of these, durably; return the notices' ids, and why others cannot be taken.

        Several for one look-up become one notice. Raises NoticesWait, or StateBusy: then all of them may be given
        again, and some may be there already, which does no harm.
        """
        if self._open is None:
            raise NoticesWait("The pipeline is just starting; send it again.")
        pipeline, tables, store = self._open
        refused: list[Refusal] = []
        keys: dict[str, dict[Any, None]] = {}
        for place, body in enumerate(bodies):
            try:
                sent = read_notice(body)
                wanted = wanted_of(pipeline, tables(), sent.lookup, sent.keys)
            except UsageError as error:
                refused.append(Refusal(place, str(error)))
            else:
                keys.setdefault(sent.lookup, {}).update(dict.fromkeys(keys_of(wanted)))
        ids = [store.add(lookup, part, pending=True) for lookup, some in keys.items() for part in _parts(list(some))]
        with self._lock:
            self.counts[origin, "accepted"] += len(bodies) - len(refused)
            self.counts[origin, "refused"] += len(refused)
        return ids, refused


def read_notice(body: bytes) -> Sent:
    """Return what a notice says. Raises UsageError: what is wrong with it, in one sentence."""
    if len(body) > BYTES_MOST:
        raise UsageError(f"A notice has {BYTES_MOST >> 20} MiB at most; send several.")
    try:
        data: object = json.loads(body, parse_float=str)  # a number's digits are the key's, whatever a float holds
    except (ValueError, RecursionError):
        raise UsageError('A notice is JSON, such as {"lookup": "ratings", "keys": [1, 2]}; this is none.') from None
    if not isinstance(data, dict) or data.keys() != {"lookup", "keys"}:  # pyright: ignore[reportUnknownMemberType] -- from JSON
        raise UsageError("A notice is an object with lookup and keys, and nothing else.")
    lookup, keys = (cast("dict[str, object]", data)[name] for name in ("lookup", "keys"))
    if not isinstance(lookup, str) or not isinstance(keys, list):
        raise UsageError("A notice's lookup is a text, and keys are a list.")
    some = cast("list[object]", keys)
    if not 1 <= len(some) <= KEYS_MOST:
        raise UsageError(f"A notice has from one to {KEYS_MOST:,} keys, not {len(some):,}.")
    return Sent(lookup, tuple(map(_text, some)))


def _parts(keys: list[Any]) -> list[list[Any]]:
    return [keys[start : start + KEYS_MOST] for start in range(0, len(keys), KEYS_MOST)]


def _text(key: object) -> str:
    """Return a key as `--keys` would have it. Raises UsageError."""
    match key:
        case str():
            try:
                key.encode()
            except UnicodeEncodeError:  # JSON can write it
                raise UsageError("A notice's keys are texts, and one of them has half a character.") from None
            return key
        case bool():
            return "true" if key else "false"
        case int():
            return str(key)
        case _:
            raise UsageError("A notice's keys are texts, numbers or booleans.")
