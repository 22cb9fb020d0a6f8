"""Tables, keys and documents that a sink meets in the contract, and what no store takes."""

from __future__ import annotations

import datetime as dt
import decimal
import math
import uuid

from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Document, Interval

UTC = dt.UTC
LARGEST_VERSION = (1 << 63) - 1


def table_of(name: str, **key: Kind) -> Table:
    """Return a table of the contract whose key has these columns."""
    columns = tuple(Column(column, kind.value, kind, nullable=False) for column, kind in key.items())
    return Table("delta_contract", name, (*columns, Column("body", "jsonb", Kind.JSON)), tuple(key))


MOVIE = table_of("movie", id=Kind.INTEGER)
ACTOR = table_of("actor", id=Kind.INTEGER)
PAGE = table_of("page", path=Kind.TEXT)
PART = table_of("part", film=Kind.TEXT, reel=Kind.TEXT)
SEAT = table_of("seat", hall=Kind.INTEGER, row=Kind.TEXT, day=Kind.DATE)

# Whatever these mean to some store, in a key they are text.
AWKWARD_TEXTS = (
    "a b",
    " leading and trailing ",
    "a:b",
    "a%3Ab",
    "a%b",
    "{a}",
    "}a{",
    "{}",
    "a{}b",
    "a{b}c",
    "a}b",
    "{{a}}",
    "a/b",
    "a\\b",
    "a*b?[c]",
    "a.b$c",
    "a\nb\tc",
    "a'b\"c",
    "_a",
    "A",
    "a",
    "0",
    "Ünïcödé",
    "u\u0308",  # the same letter in two ways: two texts
    "\u00fc",
    "映画",
    "🎬",
    "x" * 300,
)

KEYS_BY_KIND: dict[Kind, tuple[object, ...]] = {
    Kind.INTEGER: (0, 1, -1, 10, 2**63 - 1, -(2**63)),
    Kind.TEXT: AWKWARD_TEXTS,
    Kind.BOOLEAN: (True, False),
    Kind.FLOAT: (0.5, -0.5, 1e300, 5e-324, math.inf),
    Kind.DECIMAL: (
        decimal.Decimal("0.1"),
        decimal.Decimal("-0.1"),
        decimal.Decimal(100),
        decimal.Decimal("1e-20"),
        decimal.Decimal(12345678901234567890123456789012345678),  # more digits than decimal's default context
        decimal.Decimal(12345678901234567890123456789012345679),
    ),
    Kind.BYTES: (b"\x00", b"\x00\x00", b"\xff", b"text"),
    Kind.DATE: (dt.date(2024, 2, 29), dt.date(1, 1, 1), dt.date(9999, 12, 31)),
    Kind.TIME: (dt.time(0, 0), dt.time(23, 59, 59, 999999)),
    Kind.TIMESTAMP: (dt.datetime(2024, 2, 29, 1, 2, 3), dt.datetime(2024, 2, 29, 1, 2, 3, 4)),  # noqa: DTZ001 -- a timestamp without time zone
    Kind.TIMESTAMP_TZ: (dt.datetime(2024, 2, 29, tzinfo=UTC), dt.datetime(2024, 2, 29, 0, 0, 0, 1, tzinfo=UTC)),
    Kind.UUID: (uuid.UUID(int=0), uuid.UUID(int=1 << 127)),
}

DOCUMENTS: dict[str, Document] = {
    "empty": {},
    "texts": {"empty": "", "plain": "Casablanca", "quoted": 'a"b\\c\n\x01', "unicode": "Amélie 映画 🎬"},
    "integers": {"zero": 0, "small": -1, "beyond_double": 2**53 + 1, "largest": 2**63 - 1, "smallest": -(2**63)},
    "floats": {"half": 0.5, "tiny": 5e-324, "huge": 1.7976931348623157e308, "negative": -1.25},
    "not_finite": {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf},
    "booleans": {"yes": True, "no": False},
    "decimals": {
        "money": decimal.Decimal("10.50"),
        "large": decimal.Decimal("1e3"),
        "small": decimal.Decimal("0.000001"),
    },
    "times": {
        "date": dt.date(2024, 2, 29),
        "time": dt.time(1, 2, 3, 4),
        "timestamp": dt.datetime(2024, 2, 29, 1, 2, 3, 456000),  # noqa: DTZ001 -- a timestamp without time zone
        "timestamp_tz": dt.datetime(2024, 2, 29, 1, 2, 3, tzinfo=UTC),
        "interval": Interval(14, 3, 4_500_000),
    },
    "identifiers": {"uuid": uuid.UUID(int=7), "bytes": b"\x00\xff", "no_bytes": b""},
    "nothing": {"none": None, "list": [None], "object": {"none": None}},
    "nested": {"cast": [{"name": "Bogart", "as": ["Rick"]}, {"name": "Bergman", "as": []}], "a": {"b": {"c": 1}}},
    "empty_parts": {"list": [], "object": {}},
    "many_fields": {f"field_{n}": n for n in range(300)},
    "field_names": {"with space": 1, "Ünïcödé": 2, "a-b": 3, "a:b": 4, "version": 5, "__v": 6},
    "zero_bytes": {"text": "a\x00b"},
}

UNSTORABLE: dict[str, Document] = {
    "reserved": {VERSION_FIELD: 1, "title": "Casablanca"},
    "foreign_type": {"title": object()},
    "foreign_key": {"titles": {1: "Casablanca"}},
    "broken_text": {"title": "\ud800"},  # half of a surrogate pair: no UTF-8
}

LARGE_BYTES = 5 * 1000 * 1000
