"""Writes become calls of the write script: encoded, and cut by number and by bytes. All of it is pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from delta_sync.changes import APPLIED, Outcome, Write, rejected
from delta_sync.sinks.redis_documents import NotStorable
from delta_sync.sinks.redis_keys import KeyTemplate, with_tombstones
from delta_sync.sinks.redis_link import Call
from delta_sync.values import Document

CALL_KEYS = 100  # writes in one script call: half a millisecond, in which Redis serves nobody else; 500 are no cheaper
CALL_BYTES = 1 << 20  # and bytes: a document above it is alone in its call

Encode = Callable[[int, Document | None], list[bytes]]


class Encoded(NamedTuple):
    """Writes as the script takes them: `keys[i]` and `args[i]` are of the write in place `places[i]`.

    `outcomes` has one for each write: rejected for those that cannot be stored, applied for those to be sent.
    """

    outcomes: list[Outcome]
    places: Sequence[int]
    keys: list[bytes]
    args: list[list[bytes]]


def encoded(template: KeyTemplate, encode: Encode, writes: Sequence[Write]) -> Encoded:
    """Return writes as the script takes them."""
    outcomes: list[Outcome] = [APPLIED] * len(writes)
    try:
        keys = template.render_all([key for key, _, _ in writes])
        return Encoded(outcomes, range(len(writes)), keys, [encode(version, row) for _, version, row in writes])
    except (NotStorable, UnicodeEncodeError):
        pass  # some of them: each by itself
    found = Encoded(outcomes, places := [], [], [])
    for place, (row_key, version, document) in enumerate(writes):
        try:
            (key,), args = template.render_all([row_key]), encode(version, document)
        except NotStorable as error:
            outcomes[place] = rejected(str(error))
        except UnicodeEncodeError:
            outcomes[place] = rejected("the key is text that is not valid Unicode")
        else:
            places.append(place)
            found.keys.append(key)
            found.args.append(args)
    return found


def calls_of(some: Encoded, first_keys: list[bytes], first_args: list[bytes], *, each_alone: bool) -> list[Call]:
    """Return the calls that send all of them in their order, each with these first keys and arguments.

    No call has a key twice, for the script compares with what was there before it. Keys that hold NaN may come twice:
    it is no other NaN's equal, and they have the same text.
    """
    if len(set(some.keys)) < len(some.keys):
        each_alone = True
    return [
        Call(
            first_keys + with_tombstones(some.keys[start:end]),
            first_args + list(chain.from_iterable(some.args[start:end])),
        )
        for start, end in _cut(some.args, 1 if each_alone else CALL_KEYS)
    ]


def _cut(args: Sequence[Sequence[bytes]], most: int) -> Iterator[tuple[int, int]]:
    """Yield where each call starts and ends."""
    for first in range(0, len(args), most):
        start, last = first, min(first + most, len(args))
        if sum(map(len, chain.from_iterable(args[first:last]))) > CALL_BYTES:
            size = 0
            for place in range(first, last):
                own = sum(map(len, args[place]))
                if place > start and size + own > CALL_BYTES:
                    yield start, place
                    start, size = place, 0
                size += own
        yield start, last
