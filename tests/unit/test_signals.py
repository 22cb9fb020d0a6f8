"""What to tell a connector about a dump, by what it was told and what it has said."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

import pytest

from delta_sync.dumps import Dump
from delta_sync.errors import UsageError
from delta_sync.signals import (
    RESEND_MS,
    RETRY_MS,
    Connector,
    Ended,
    Failed,
    Heard,
    Notification,
    Read,
    Seen,
    Send,
    SignalType,
    Wait,
    Wanted,
    connector_of,
    decide,
    key_condition,
    notification_of,
    sent_in,
    signal,
    signal_id,
)
from delta_sync.tables import Column, Kind, Table

EXECUTE: SignalType = "execute-snapshot"
PAUSE: SignalType = "pause-snapshot"
RESUME: SignalType = "resume-snapshot"
STOP: SignalType = "stop-snapshot"
MOVIE = Table("public", "movie", (Column("id", "int", Kind.INTEGER), Column("title", "text", Kind.TEXT)), ("id",))
BORN = dt.datetime(2026, 11, 30, 10, 0, 0, 5000, dt.UTC)


def heard(*said: tuple[str, int] | tuple[str, int, dict[str, str]]) -> Heard:
    found = Heard()
    for type_, at_ms, *data in said:
        found = found.with_(Notification("1", type_, data[0] if data else {}, at_ms))
    return found


def seen(
    wanted: Wanted = "run",
    said: Heard = Heard(),  # noqa: B008 -- a tuple
    connector: tuple[int, str | None] | None = (100, None),
    for_good: bool = False,
    **sent: int,
) -> Seen:
    """`sent` is when a signal was sent, by the first word of its type; `connector` its time, and whose snapshot."""
    sent_ms = {f"{name}-snapshot": at for name, at in sent.items()}
    found = None if connector is None else Connector(40, *connector)
    return Seen(wanted, said, sent_ms, found, for_good)


STARTED, SUCCEEDED = ("STARTED", 1000), {"status": "SUCCEEDED", "total_rows_scanned": "7"}
DONE = heard(STARTED, ("TABLE_SCAN_COMPLETED", 2000, SUCCEEDED), ("COMPLETED", 2001))


def test_a_dump_is_signalled_once_there_is_a_connector() -> None:
    assert isinstance(decide(seen(connector=None)), Wait)
    assert decide(seen()) == Send((EXECUTE,))
    assert decide(seen("pause")) == Wait(None)


def test_what_was_signalled_is_waited_for() -> None:
    assert isinstance(decide(seen(execute=100, connector=(100 + RESEND_MS, None))), Wait)
    progress = {"last_processed_key": "40", "maximum_key": "90"}
    under_way = seen(said=heard(STARTED, ("IN_PROGRESS", 1500, progress)), execute=900, connector=(1600, "1"))
    assert decide(under_way) == Wait("read up to key 40 of 90")


def test_a_signal_that_the_connector_missed_is_sent_again() -> None:
    """It beats since, and is in the midst of no snapshot. One that is away does not beat."""
    assert decide(seen(execute=100, connector=(101 + RESEND_MS, None))) == Send((EXECUTE,))
    assert isinstance(decide(seen(execute=100, connector=(101 + RESEND_MS, "1"))), Wait)


def test_a_snapshot_that_a_crash_has_ended_is_begun_again() -> None:
    """Debezium had begun, and died before its position said so."""
    assert decide(seen(said=heard(STARTED), execute=900, connector=(1001 + RESEND_MS, None))) == Send((EXECUTE,))
    assert isinstance(decide(seen(said=heard(STARTED), execute=900, connector=(1001 + RESEND_MS, "1"))), Wait)


def test_whoever_plans_next_does_not_signal_again_though_the_signal_has_expired() -> None:
    assert isinstance(decide(seen(said=heard(STARTED), connector=(1500, "1"))), Wait)


def test_an_end_counts_when_the_rows_before_it_are_in_kafka() -> None:
    """A notification and the rows before it are in different topics, on different brokers."""
    assert isinstance(decide(seen(said=DONE, execute=900, connector=(2001, None))), Wait)
    assert decide(seen(said=DONE, execute=900, connector=(2002, None))) == Read(40, 7)


def test_an_empty_table_is_read() -> None:
    said = heard(STARTED, ("TABLE_SCAN_COMPLETED", 2000, {"status": "EMPTY"}), ("COMPLETED", 2001))
    assert decide(seen(said=said, execute=900, connector=(2002, None))) == Read(40, 0)


@pytest.mark.parametrize("status", ["SQL_EXCEPTION", "NO_PRIMARY_KEY", "UNKNOWN_SCHEMA", "SKIPPED", "NEWS"])
def test_a_scan_that_fails_fails_the_dump_and_is_tried_again_for_a_load(status: str) -> None:
    said = heard(STARTED, ("TABLE_SCAN_COMPLETED", 2000, {"status": status}), ("COMPLETED", 2001))
    assert isinstance(decide(seen(said=said, execute=900, connector=(2002, None))), Failed)
    assert isinstance(decide(seen(said=said, execute=900, connector=(2002, None), for_good=True)), Wait)
    later = (2002 + RETRY_MS, None)
    assert decide(seen(said=said, execute=900, connector=later, for_good=True)) == Send((EXECUTE,))
    assert isinstance(decide(seen(said=said, execute=2002 + RETRY_MS, connector=later, for_good=True)), Wait)


def test_a_snapshot_that_somebody_else_stops_is_not_done() -> None:
    said = heard(STARTED, ("ABORTED", 1500))
    assert isinstance(decide(seen(said=said, execute=900, connector=(9999, None))), Failed)


def test_pausing_and_resuming() -> None:
    under_way = heard(STARTED, ("IN_PROGRESS", 1200))
    assert decide(seen("pause", under_way, (1300, "1"), execute=900)) == Send((PAUSE,))
    assert isinstance(decide(seen("pause", under_way, (1400, "1"), execute=900, pause=1300)), Wait)
    paused = under_way.with_(Notification("1", "PAUSED", {}, 1500))
    assert isinstance(decide(seen("pause", paused, (99_999, "1"), execute=900, pause=1300)), Wait)
    assert decide(seen("run", paused, (1600, "1"), execute=900, pause=1300)) == Send((RESUME,))
    assert isinstance(decide(seen("run", paused, (1700, "1"), execute=900, pause=1300, resume=1650)), Wait)
    resumed = paused.with_(Notification("1", "RESUMED", {}, 1800))
    assert isinstance(decide(seen("run", resumed, (1900, "1"), execute=900, pause=1300, resume=1650)), Wait)


def test_a_connector_that_starts_anew_reads_on_and_is_paused_again() -> None:
    said = heard(STARTED, ("PAUSED", 1500), ("IN_PROGRESS", 3000))
    assert decide(seen("pause", said, (3100, "1"), execute=900, pause=1300)) == Send((PAUSE,))


def test_stopping_also_while_it_is_paused() -> None:
    """Debezium looks for a stop when it reads, and it does not read while it is paused."""
    assert decide(seen("stop", heard(STARTED), (1100, "1"), execute=900)) == Send((STOP, RESUME))
    assert isinstance(decide(seen("stop", heard(STARTED), (1200, "1"), execute=900, stop=1150, resume=1150)), Wait)
    assert decide(seen("stop", heard(STARTED, ("ABORTED", 1300)), (1200, "1"), execute=900, stop=1150)) == Ended()
    assert decide(seen("stop", DONE, (2002, None), execute=900)) == Ended()
    assert decide(seen("stop")) == Ended()
    assert decide(seen("stop", heard(STARTED), (1151 + RESEND_MS, None), execute=900, stop=1150)) == Ended()
    again = decide(seen("stop", heard(STARTED), (1151 + RESEND_MS, "1"), execute=900, stop=1150, resume=1150))
    assert again == Send((STOP, RESUME))


def test_a_signal_as_debezium_takes_it() -> None:
    said = json.loads(signal(EXECUTE, "7", "shop.dbo.my movie", "id < 9").encoded())
    (name,) = said["data"]["data-collections"]
    assert said == {
        "id": "7",
        "type": EXECUTE,
        "data": {
            "type": "incremental",
            "data-collections": [name],
            "additional-conditions": [{"data-collection": name, "filter": "id < 9"}],
        },
    }
    # Java's way to write a code point, in Python's; some connectors have the database before the name, some not.
    pattern = re.compile(name.replace("\\x{20}", "\\x20"))
    assert pattern.fullmatch("shop.dbo.my movie")
    assert pattern.fullmatch("ORCL.shop.dbo.my movie")
    assert not pattern.fullmatch("shop.dboXmy movie")
    assert json.loads(signal(STOP, "7", None).encoded())["data"] == {"type": "incremental"}


def test_the_id_of_a_signal_is_that_of_no_other_dump() -> None:
    dump = Dump(id=3, table="public.movie", kind="load", created_at=BORN)
    assert signal_id(dump, 2) == "delta dump 3.2 of 2026-11-30T10:00:00.005+00:00"


def test_conditions_for_keys() -> None:
    assert key_condition(MOVIE, [(1,), (-2,)]) == "id IN (1, -2)"
    by_both = MOVIE._replace(key=("title", "id"))
    assert key_condition(by_both, [("O'Hara", 1)]) == "(title = 'O''Hara' AND id = 1)"


@pytest.mark.parametrize(
    ("column", "key"),
    [
        (Column("at", "timestamp", Kind.TIMESTAMP), BORN),
        (Column("my key", "int", Kind.INTEGER), 1),
        (Column("key", "text", Kind.TEXT), "a\\'b"),
    ],
)
def test_keys_that_databases_write_in_different_ways_are_refused(column: Column, key: Any) -> None:
    with pytest.raises(UsageError, match="--where"):
        key_condition(Table("public", "movie", (column,), (column.name,)), [(key,)])


def test_what_a_connector_says_is_read() -> None:
    record = {"id": "7", "aggregate_type": "Incremental Snapshot", "type": "STARTED", "additional_data": {"a": "b"}}
    assert notification_of(record, 5) == Notification("7", "STARTED", {"a": "b"}, 5)
    assert notification_of(record | {"additional_data": None}, 5) == Notification("7", "STARTED", {}, 5)
    assert notification_of(record | {"aggregate_type": "Initial Snapshot"}, 5) is None


def test_a_connectors_position_tells_whose_snapshot_it_is_in() -> None:
    collections = '[{"incremental_snapshot_collections_id":"public.movie"}]'
    offset = {"incremental_snapshot_collections": collections, "incremental_snapshot_correlation_id": "7"}
    assert connector_of({"lsn": 5, **offset}, 8, 9) == Connector(8, 9, "7")
    assert connector_of({"lsn": 5}, 8, 9) == Connector(8, 9, None)
    assert connector_of({"incremental_snapshot_collections": collections}, 8, 9) == Connector(8, 9, "")


def test_what_is_no_signal_is_passed_over() -> None:
    said = [(signal(EXECUTE, "7", "a.b").encoded(), 5), (b"{", 6), (None, 7), (b'{"id": 3}', 8), (b"[]", 9)]
    assert sent_in(said) == [("7", EXECUTE, 5)]
