"""Verification, decided without I/O: what a sink should hold for a key, and whether a difference is one.

A source that changes and a sink that follows it differ at every moment in what is on its way. A difference counts when
none of that can explain it (`judge`; the proof is in `docs/guarantees.md`, "Verification"):

    the row is read, with a claim ──► the log has come past that ──► the sink is read ──► the row is read again

- the sink's version is below the claim: it is that of a change which the first reading saw, and of the newest
  one, because the log has brought all of these, and so have the dumps to which it left some;
- the sink holds what it already held at an earlier look, before the first reading: so the document was not read from
  the table later, ahead of the log;
- both readings make the same document: the one that is compared is that of the first.

Whatever is not so is looked at again, later. Two things count at once: a document whose version was taken away, and one
whose version lies beyond the end of the log, which no change can have had.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import orjson

from delta_sync.sinks.base import Stored

Kind = Literal["missing", "different", "extra", "version"]
Verdict = Kind | Literal["equal", "expired", "failed", "again"]

BUCKETS = 1 << 16  # of ids: one that is extra leads to a look at a 65536th of the others
ID_BITS = (1 << 64) - 1
NOTHING = b""


# ── what is compared ─────────────────────────────────────────────────────────────────────────────────────────────


class Expected(NamedTuple):
    """What a sink should hold for a key: a document in its stored form, or nothing (None).

    `failed` says why that cannot be known: the processor raises, or the sink cannot hold the document.
    """

    document: dict[str, Any] | None
    failed: str | None = None

    @property
    def digest(self) -> bytes:
        """What is equal for equal expectations, as good as surely."""
        return b"failed" if self.failed is not None else digest_of(self.document)


ABSENT = Expected(None)


class Sighting(NamedTuple):
    """What a sink was seen to hold for a key. Version -1: neither a document nor a tombstone."""

    version: int
    digest: bytes

    @classmethod
    def of(cls, stored: Stored | None) -> Sighting:
        """Return what is remembered of it."""
        return cls(-1, NOTHING) if stored is None else cls(stored.version, digest_of(stored.document))


def digest_of(document: dict[str, Any] | None) -> bytes:
    """Return some bytes for a document, instead of the megabytes that it may have; none for None."""
    if document is None:
        return NOTHING
    return hashlib.blake2b(_encoded(document), digest_size=16).digest()


def same(expected: dict[str, Any], found: dict[str, Any], skipped: frozenset[str] = frozenset()) -> bool:
    """Tell whether two documents are the same, apart from some of their fields (of the top level).

    As stores tell values apart, not as Python does: NaN is itself, and 1, 1.0 and true are three.
    """
    if skipped:
        expected, found = _without(expected, skipped), _without(found, skipped)
    if expected == found:
        return _encoded(expected) == _encoded(found)
    return _told_apart(expected) == _told_apart(found)


def differing(expected: dict[str, Any], found: dict[str, Any], skipped: frozenset[str] = frozenset()) -> list[str]:
    """Return the fields (of the top level) that are not the same, in the order of the documents."""
    names = dict.fromkeys([*expected, *found])
    return [
        name
        for name in names
        if name not in skipped
        and (name not in expected or name not in found or not same({"": expected[name]}, {"": found[name]}))
    ]


def _without(document: dict[str, Any], skipped: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in skipped}


_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_SUBCLASS


def _encoded(document: object) -> bytes:
    """Return bytes that are the same for the same document, whatever the order of its fields."""
    try:
        return orjson.dumps(document, repr, _OPTIONS)
    except TypeError:  # nested deeper, or a number larger, than orjson takes
        return repr(_told_apart(document)).encode(errors="backslashreplace")


def _told_apart(value: object) -> object:
    """Return a value so that equality is sameness: with types, and NaN as text."""
    match value:
        case dict():
            named = cast("dict[object, object]", value)
            return {name: _told_apart(named[name]) for name in sorted(named, key=str)}
        case list() | tuple():
            return [_told_apart(part) for part in cast("list[object]", value)]
        case float() if math.isnan(value):
            return ("float", "nan")
        case bool() | int() | float():
            return ("bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float", value)
        case _:
            return value


# ── what a difference is worth ───────────────────────────────────────────────────────────────────────────────────


def compare(expected: Expected, stored: Stored | None, beyond: int, skipped: frozenset[str] = frozenset()) -> Verdict:
    """Return in what a sink differs from what it should hold, as it looks at one moment.

    `beyond` is the version of the log's end: what lies at or above it is no change's.
    """
    if expected.failed is not None:
        return "failed"
    document = None if stored is None else stored.document
    if expected.document is None:
        if document is not None:
            return "extra"
    elif document is None:
        return "missing"
    elif not same(expected.document, document, skipped):
        return "different"
    return "version" if outlawed(stored, beyond) else "equal"


def outlawed(stored: Stored | None, beyond: int) -> bool:
    """Tell whether a version is one that no change can have had: none at all, or one beyond the log's end."""
    if stored is None:
        return False
    return stored.version >= beyond or (stored.version == 0 and stored.document is not None)


def judge(
    before: bytes,
    after: Expected,
    stored: Stored | None,
    earlier: Sighting,
    *,
    passed: bool,
    claimed: int,
    beyond: int,
    expires: bool = False,
    skipped: frozenset[str] = frozenset(),
) -> Verdict:
    """Return what is so for certain of a key that looked different, or `again`.

    `before` is the digest of what the row made before the sink was read, `after` what it makes now; `earlier` is what
    the sink held at a look before the first of these two readings. `passed`: the log, and the dumps to which
    it left something, had come past the first reading when the sink was read. `claimed` is the version below which the
    first reading sees every change, `beyond` that of the log's end, taken after the sink was read.
    """
    verdict = compare(after, stored, beyond, skipped)
    if verdict in ("equal", "failed"):
        return verdict
    if verdict == "missing" and expires:
        return "expired"
    if outlawed(stored, beyond):
        return verdict
    if after.digest != before or Sighting.of(stored) != earlier or not passed:
        return "again"
    return verdict if stored is None or stored.version < claimed else "again"


# ── ids that only one side has ───────────────────────────────────────────────────────────────────────────────────


class IdSums:
    """Which ids a side has, in constant memory: so many of them, and their hashes' sum, for each bucket of ids.

    Buckets that differ between two sides hold an id that one of them lacks, or met more often. The hash is Python's,
    which differs between processes: sums are never kept.
    """

    def __init__(self, buckets: int = BUCKETS) -> None:
        assert buckets & (buckets - 1) == 0, "a power of two"
        self._mask = buckets - 1
        self._sums = array("Q", bytes(8 * buckets))

    def add(self, ids: Iterable[str]) -> None:
        """Note ids that this side has."""
        sums, mask = self._sums, self._mask
        for id_ in ids:
            number = hash(id_) & ID_BITS
            bucket = number & mask
            sums[bucket] = (sums[bucket] + (number | 1)) & ID_BITS  # never by 0, which would leave no trace

    def differing(self, other: IdSums) -> Buckets:
        """Return the buckets in which the two sides differ."""
        assert self._mask == other._mask, "as many buckets on both sides"
        pairs = zip(self._sums, other._sums, strict=True)
        return Buckets(self._mask, frozenset(place for place, (one, two) in enumerate(pairs) if one != two))


@dataclass(frozen=True)
class Buckets:
    """Some of the buckets of ids."""

    mask: int
    numbers: frozenset[int]

    def __contains__(self, id_: str) -> bool:
        return hash(id_) & self.mask in self.numbers

    @classmethod
    def share(cls, share: float, buckets: int = BUCKETS) -> Buckets:
        """Return the first of all buckets, so that they hold about such a share of ids."""
        return cls(buckets - 1, frozenset(range(math.ceil(buckets * share))))


# ── what was found ───────────────────────────────────────────────────────────────────────────────────────────────


class Finding(NamedTuple):
    """A difference that nothing in flight explains. `key` is as ids write keys.

    `expected` and `stored` are documents in the sink's form, None where there is none; `version` is what the sink has,
    None for nothing. `note` says what else is to be known of it.
    """

    table: str
    sink: str
    key: str
    kind: Kind
    expected: dict[str, Any] | None
    stored: dict[str, Any] | None
    version: int | None
    note: str = ""


KINDS: tuple[Kind, ...] = ("missing", "different", "extra", "version")


@dataclass
class Tally:
    """The numbers of one table's verification."""

    rows: int = 0  # read from the source
    documents: int = 0  # compared: for each row as many as there are sinks
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    repaired: int = 0
    expired: int = 0  # missing, in a sink whose documents expire
    dead: int = 0  # not as they should be, and a dead letter says why
    failed: int = 0  # the processor raises, and there is no dead letter
    unsettled: int = 0  # changed at every look, or the log never came past

    @property
    def differences(self) -> int:
        """How many differences were found."""
        return sum(self.found.values())

    def plus(self, other: Tally) -> Tally:
        """Return the sums of both."""
        numbers = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("rows", "documents", "repaired", "expired", "dead", "failed", "unsettled")
        }
        return Tally(found={kind: self.found[kind] + other.found[kind] for kind in KINDS}, **numbers)


class Verified(NamedTuple):
    """What is known of a table. `rows`, `differences` and `repaired` are those of all verifications so far.

    `age_s`: so long ago the last complete verification began, so no row's last look is older; None: there was none.
    """

    table: str
    age_s: float | None = None
    rows: int = 0
    differences: int = 0
    repaired: int = 0


# ── pace ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def pause_s(busy_s: float, share: float) -> float:
    """Return for how long to leave the source alone after it was busy with us, so that we take this share of it."""
    assert 0 < share <= 1, "a share of something"
    return busy_s * (1 / share - 1)


class Ages:
    """How old the oldest look at a row is, of tables that are verified again and again in the order of their keys.

    A chunk is told by its number, so where rows come and go the answer is off by some chunks.
    """

    def __init__(self, tables: Iterable[str]) -> None:
        self._looks: dict[str, list[float]] = {table: [] for table in tables}  # when each chunk was read last
        self._complete: set[str] = set()

    def looked(self, table: str, chunk: int, now_s: float) -> None:
        """Note that a chunk, counted from 0, was read now."""
        self._looks[table][chunk : chunk + 1] = [now_s]

    def ended(self, table: str, chunks: int) -> None:
        """Note that a table was read to its end, in so many chunks."""
        del self._looks[table][chunks:]
        self._complete.add(table)

    def oldest_s(self, now_s: float) -> float | None:
        """Return the age of the oldest look, in seconds; None while a table was never read to its end."""
        if len(self._complete) < len(self._looks):
            return None
        return max((now_s - look for looks in self._looks.values() for look in looks), default=0.0)


def in_batches(items: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Yield lists of at most so many items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == most:
            yield batch
            batch = []
    if batch:
        yield batch


def excerpt(mapping: Mapping[str, Any], names: Iterable[str], width: int) -> str:
    """Return some fields for people, each value cut to a width."""
    return ", ".join(f"{name}: {_cut(mapping[name], width) if name in mapping else 'absent'}" for name in names)


def _cut(value: object, width: int) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}…"
