"""A dry run: recorded changes are read without loss, and what a write would do is told."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from decimal import Decimal
from typing import Any

import pytest

from delta_sync.changes import Change
from delta_sync.delta_event import DeltaEvent, encode_event
from delta_sync.errors import UsageError
from delta_sync.masking import Mask
from delta_sync.sinks.base import Stored
from delta_sync.tables import Column, Kind, Table
from delta_sync.trial import effect_of, recorded_changes
from delta_sync.values import Interval, to_json

NOW = dt.datetime(2024, 2, 3, 4, 5, 6, 789, tzinfo=dt.UTC)
VALUES: dict[str, tuple[Kind, Any]] = {
    "id": (Kind.INTEGER, 7),
    "yes": (Kind.BOOLEAN, True),
    "f": (Kind.FLOAT, 0.5),
    "n": (Kind.DECIMAL, Decimal("12345678901234567890.50")),
    "t": (Kind.TEXT, "text"),
    "b": (Kind.BYTES, b"\x00\xff"),
    "d": (Kind.DATE, NOW.date()),
    "c": (Kind.TIME, dt.time(4, 5, 6)),
    "at": (Kind.TIMESTAMP, NOW.replace(tzinfo=None)),
    "z": (Kind.TIMESTAMP_TZ, NOW),
    "i": (Kind.INTERVAL, Interval(14, -3, 3_723_500_000)),
    "u": (Kind.UUID, uuid.UUID(int=5)),
    "j": (Kind.JSON, {"a": [1, None]}),
    "none": (Kind.TEXT, None),
}
MOVIE = Table("public", "movie", tuple(Column(name, "x", kind) for name, (kind, _) in VALUES.items()), ("id",))
ROW = {name: value for name, (_, value) in VALUES.items()}
CHANGE = Change("public.movie", (7,), 9, ROW)
EVENT = DeltaEvent.of("movies", CHANGE, NOW, "log")


def read(data: bytes, table: Table = MOVIE) -> list[Change]:
    return recorded_changes(data, {table.id: table}, "it")[table.id]


def test_a_change_survives_both_forms_of_an_event() -> None:
    assert read(encode_event(EVENT)) == [CHANGE]
    line = to_json(EVENT._asdict())
    assert read(line + b"\n\n" + line) == [CHANGE, CHANGE]
    assert read(
        json.dumps({"id": 3, "event": json.loads(to_json(EVENT._replace(row=None, op="delete")._asdict()))}).encode()
    ) == [CHANGE._replace(row=None)]


def test_lists_of_values() -> None:
    table = MOVIE._replace(columns=(*MOVIE.columns[:1], Column("n", "numeric[]", Kind.DECIMAL, dimensions=1)))
    row = {"id": 7, "n": [Decimal("1.5"), None]}
    assert read(to_json(DeltaEvent.of("movies", CHANGE._replace(row=row), NOW, "log")._asdict()), table)[0].row == row


def test_what_was_recorded_before_there_was_a_mask_is_masked() -> None:
    table = MOVIE._replace(
        columns=tuple(c._replace(mask=Mask("redact", "***")) if c.name == "n" else c for c in MOVIE.columns)
    )
    for data in (encode_event(EVENT), to_json(EVENT._asdict())):
        assert read(data, table) == [CHANGE._replace(row={**ROW, "n": "***"})]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xc3\x01damaged", "it: "),
        (b"{}\n", "it line 1 is no Delta event"),
        (b"\n[]", "it line 2 is no Delta event"),
        (b'{"table": "public.other", "key": [1]}', "the pipeline has no such table"),
        (b'{"table": "public.movie", "key": [1]}', "it is an upsert without a row"),
        (b'{"table": "public.movie", "key": [1], "row": {"x": 1}}', "the table has no column x"),
        (b'{"table": "public.movie", "key": [1], "row": {"d": "yesterday"}}', "no Delta event"),
        (b'{"table": "public.movie", "key": [1], "row": {"i": "1 day"}}', "is no interval"),
        (encode_event(EVENT._replace(row=None)), "could not be decoded"),
    ],
)
def test_what_is_no_event_is_a_sentence(data: bytes, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(data)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("document", "stored", "version", "wanted"),
    [
        ({"a": 1}, None, None, "created"),
        ({"a": 1}, Stored(5, None), None, "created"),
        ({"a": 1}, Stored(5, {"a": 1.0}), None, "changed"),
        ({"a": 1}, Stored(5, {"a": 1}), 5, "same"),
        ({"a": 1}, Stored(5, {"a": 1}), 4, "stale"),
        (None, Stored(5, {"a": 1}), None, "removed"),
        (None, Stored(5, None), None, "absent"),
        (None, None, None, "absent"),
    ],
)
def test_what_a_write_would_do(
    document: dict[str, Any] | None, stored: Stored | None, version: int | None, wanted: str
) -> None:
    assert effect_of(document, stored, version) == wanted
