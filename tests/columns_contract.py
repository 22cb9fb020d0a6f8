"""What the contract of sinks expects of those that have a column for each field."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import uuid
from typing import Any

import pytest

from delta_sync.changes import APPLIED, Write
from delta_sync.errors import Unstorable
from delta_sync.sinks.base import Target
from delta_sync.testing.contract import AnySink, SinkContract
from delta_sync.values import Document, Interval


def as_plain(value: object) -> Any:
    """Return what the sink reads for a value, as the module's table says; written apart from the sink's own code."""
    match value:
        case bool() | str() | None:
            return value
        case float() | decimal.Decimal() if value == value and value == value // 1:
            return int(value)
        case decimal.Decimal():
            return float(value)  # those of the contract are exact
        case bytes():
            return base64.b64encode(value).decode()
        case uuid.UUID() | Interval():
            return str(value)
        case dt.datetime() | dt.date() | dt.time():
            return value.isoformat().replace("+00:00", "Z")
        case dict():
            return {name: as_plain(part) for name, part in value.items()}
        case list():
            return [as_plain(part) for part in value]
        case _:
            return value


class ColumnsContract(SinkContract):
    """The contract; a field without a value is not there."""

    second_step = None  # one statement compares and writes

    def stored_form(self, document: Document) -> dict[str, Any]:
        return {name: as_plain(value) for name, value in document.items() if value is not None and value == value}

    def test_a_moment_that_is_none_in_utc_is_rejected(self, sink: AnySink, target: Target) -> None:
        """Columns hold moments in UTC, and an hour before the first one Python has none."""
        ahead = dt.timezone(dt.timedelta(hours=1))
        document = {"at": dt.datetime(1, 1, 1, tzinfo=ahead)}
        writes = [Write((1,), 5, {"n": 1}), Write((2,), 5, document), Write((3,), 5, {"n": 3})]
        first, second, third = sink.apply(target, writes)
        assert (first, third) == (APPLIED, APPLIED)
        assert second.kind == "rejected"
        assert "the field at is 0001-01-01T00:00:00+01:00" in second.reason
        with pytest.raises(Unstorable):
            sink.stored_form(target, document)
