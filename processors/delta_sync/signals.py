"""Signals to a connector that Delta does not know itself, and what its notifications say. Decided without I/O.

Debezium takes one incremental snapshot at a time, in windows between which the log goes on; its rows come through the
topics of their tables, like changes. What it was told is in the topic of signals, and what it says in the topic of
notifications, so whoever plans reads both from the beginning and needs no memory of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import orjson

from delta_sync.changes import Key
from delta_sync.dumps import Dump
from delta_sync.errors import UsageError
from delta_sync.tables import Kind, Table

SignalType = Literal["execute-snapshot", "pause-snapshot", "resume-snapshot", "stop-snapshot"]
Wanted = Literal["run", "pause", "stop"]

AGGREGATE = "Incremental Snapshot"
PREFIX = "delta dump "  # of the ids of our signals; others may send their own
RETRY_MS = 30_000  # after a scan that failed and must succeed in the end
RESEND_MS = 20_000  # without a sign of what was signalled, while the connector beats: it missed the signal
KEYS_MOST = 500  # in one signal: Oracle takes 1,000 values in a list, and a condition of some kilobytes is enough

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUOTED: frozenset[Kind] = frozenset({Kind.TEXT, Kind.UUID})
_BARE: frozenset[Kind] = frozenset({Kind.INTEGER, Kind.DECIMAL})


class Signal(NamedTuple):
    """What a connector is told. `id` is that of the chunk of a dump which it is about."""

    id: str
    type: SignalType
    data: Mapping[str, Any]

    def encoded(self) -> bytes:
        """Return the value of the record; its key is the connector's `topic.prefix`."""
        return orjson.dumps({"id": self.id, "type": self.type, "data": self.data})


class Notification(NamedTuple):
    """What a connector said of an incremental snapshot; `timestamp_ms` is when the record was sent to Kafka."""

    id: str
    type: str
    data: Mapping[str, str]
    timestamp_ms: int


class Heard(NamedTuple):
    """What the notifications about one signal come to.

    `at_ms` is when the last one was sent; `status` is how the scan of the table ended, None: it has not. `over`: the
    snapshot has ended, or was stopped. `place` says how far it is, for people.
    """

    at_ms: int = 0
    status: str | None = None
    rows: int = 0
    over: bool = False
    stopped: bool = False
    paused: bool = False
    place: str | None = None

    def with_(self, said: Notification) -> Heard:
        """Return what it comes to with one more notification, a later one."""
        new = self._replace(at_ms=said.timestamp_ms)
        match said.type:
            case "STARTED":
                return Heard(said.timestamp_ms)
            case "RESUMED":
                return new._replace(paused=False)
            case "IN_PROGRESS":
                last, most = said.data.get("last_processed_key", "?"), said.data.get("maximum_key", "?")
                return new._replace(paused=False, over=False, place=f"read up to key {last} of {most}")
            case "PAUSED":
                return new._replace(paused=True)
            case "TABLE_SCAN_COMPLETED":
                status, rows = said.data.get("status", "UNKNOWN"), int(said.data.get("total_rows_scanned", "0"))
                worst = status if self.status in (None, *_GOOD) else self.status
                return new._replace(status=worst, rows=max(rows, 0))
            case "COMPLETED":
                return new._replace(over=True)
            case "ABORTED":
                return new._replace(over=True, stopped=True)
            case _:
                return new


_GOOD = ("SUCCEEDED", "EMPTY")


class Connector(NamedTuple):
    """The connector's newest position: the number of its record, when that was sent, and the snapshot under way.

    Debezium writes it when Kafka has acknowledged everything before.
    """

    number: int
    timestamp_ms: int
    snapshot: str | None  # the id of the signal, "" for one without; None: of none


class Seen(NamedTuple):
    """All that counts for what to do about one chunk. `sent_ms` is when each signal about it was sent last.

    `for_good`: it must be read in the end, whatever keeps Debezium from it.
    """

    wanted: Wanted
    heard: Heard
    sent_ms: Mapping[str, int]
    connector: Connector | None
    for_good: bool = False


class Send(NamedTuple):
    """Send these signals."""

    types: tuple[SignalType, ...]


class Wait(NamedTuple):
    """Nothing is to be done now; `why`, for people."""

    why: str | None


class Read(NamedTuple):
    """Debezium has read everything, and all of it is in Kafka before the connector's record of this number."""

    number: int
    rows: int


class Failed(NamedTuple):
    """It has ended without having read everything."""

    why: str


class Ended(NamedTuple):
    """It was to be stopped, and has ended."""


Action = Send | Wait | Read | Failed | Ended


def decide(seen: Seen) -> Action:
    """Return what to do about a chunk. Pure: the only times are those of Kafka's records."""
    heard, connector, sent = seen.heard, seen.connector, seen.sent_ms
    if connector is None:
        return Ended() if seen.wanted == "stop" else Wait("no connector has delivered anything yet")
    begun_ms = sent.get("execute-snapshot", 0)
    if heard.over and heard.at_ms >= begun_ms:
        return _at_its_end(seen, connector)
    # The connector has written a position since, and that is in the midst of no snapshot: nothing is under way.
    beats = connector.timestamp_ms > max(heard.at_ms, *sent.values(), 0) + RESEND_MS
    rests = beats and connector.snapshot is None
    if seen.wanted == "stop":
        if not (begun_ms or heard.at_ms) or rests:
            return Ended()
        # Debezium looks for a stop when it reads, which it does not while it is paused.
        return Send(("stop-snapshot", "resume-snapshot")) if "stop-snapshot" not in sent or beats else Wait(None)
    if rests or not (begun_ms or heard.at_ms):
        return Send(("execute-snapshot",)) if seen.wanted == "run" else Wait(None)
    if seen.wanted == "pause" and not heard.paused and heard.at_ms:
        again = sent.get("pause-snapshot", 0) < max(heard.at_ms, sent.get("resume-snapshot", 0)) or beats
        return Send(("pause-snapshot",)) if again else Wait(None)
    if seen.wanted == "run" and heard.paused:
        again = sent.get("resume-snapshot", 0) < heard.at_ms or beats
        return Send(("resume-snapshot",)) if again else Wait(None)
    return Wait(heard.place if heard.at_ms else "the connector has been told, and has not begun")


def _at_its_end(seen: Seen, connector: Connector) -> Action:
    heard = seen.heard
    if seen.wanted == "stop":
        return Ended()
    if heard.stopped or heard.status not in _GOOD:
        why = _REASONS.get(heard.status or "", heard.status or "it ended without having read anything")
        why = "a signal that is not Delta's stopped it" if heard.stopped else why
        if not seen.for_good:
            return Failed(why)
        again = seen.wanted == "run" and connector.timestamp_ms > heard.at_ms + RETRY_MS
        return Send(("execute-snapshot",)) if again else Wait(f"{why}; it is tried again")
    # A notification and the rows before it go to different topics: they have all come when the connector says so.
    if connector.timestamp_ms <= heard.at_ms:
        return Wait("the rows are on their way to Kafka")
    return Read(connector.number, heard.rows)


_REASONS = {
    "SQL_EXCEPTION": "the database refused what Debezium asked (the log of its server has the error), perhaps the"
    " condition, a missing signal table, or a privilege",
    "NO_PRIMARY_KEY": "the table has no primary key, and Debezium reads chunks by it",
    "UNKNOWN_SCHEMA": "Debezium knows no such table: check its name and table.include.list",
    "SKIPPED": "Debezium skipped the table; the log of its server says why",
}


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────


def signal_id(dump: Dump, chunk: int) -> str:
    """Return the id of the signal for a chunk of a dump: the same whoever plans, and never that of an older dump."""
    assert dump.created_at is not None, "it is stored"
    return f"{PREFIX}{dump.id}.{chunk} of {dump.created_at.isoformat(timespec='milliseconds')}"


def signal(type_: SignalType, id_: str, table: str | None, condition: str | None = None) -> Signal:
    """Return a signal about a table, None: about all of them.

    Names are regular expressions to Debezium, and those of some databases have their own before them.
    """
    data: dict[str, Any] = {"type": "incremental"}
    if table is None:
        return Signal(id_, type_, data)
    name = rf"(?:.*\.)?{''.join(c if c.isalnum() or c == '_' else _escaped(c) for c in table)}"
    if type_ in ("execute-snapshot", "stop-snapshot"):
        data["data-collections"] = [name]
    if condition is not None and type_ == "execute-snapshot":
        data["additional-conditions"] = [{"data-collection": name, "filter": condition}]
    return Signal(id_, type_, data)


def _escaped(character: str) -> str:
    return "\\." if character == "." else f"\\x{{{ord(character):x}}}"


def key_condition(table: Table, keys: Sequence[Key]) -> str:
    """Return the condition that is true of the rows with these keys, as any database understands it.

    Raises UsageError for keys that databases write in different ways.
    """
    for name in table.key:
        kind = table.column(name).kind
        if kind not in _QUOTED | _BARE or not _PLAIN.fullmatch(name):
            raise UsageError(
                f"Keys of {table.id} are not numbers or texts, or its columns have unusual names: choose the rows with"
                " --where, in the database's own SQL."
            )
    if len(table.key) == 1:
        return f"{table.key[0]} IN ({', '.join(_literal(table, 0, key) for key in keys)})"
    return " OR ".join(
        "(" + " AND ".join(f"{name} = {_literal(table, place, key)}" for place, name in enumerate(table.key)) + ")"
        for key in keys
    )


def _literal(table: Table, place: int, key: Key) -> str:
    if table.column(table.key[place]).kind in _BARE:
        return str(key[place])
    text = str(key[place])
    if "\\" in text:
        raise UsageError(f"A key of {table.id} has a backslash, which databases read in different ways: use --where.")
    return "'" + text.replace("'", "''") + "'"


# ── what came ────────────────────────────────────────────────────────────────────────────────────────────────────


def notification_of(record: Mapping[str, Any], timestamp_ms: int) -> Notification | None:
    """Return a notification about an incremental snapshot; None for others. `record` is its value, decoded."""
    if record.get("aggregate_type") != AGGREGATE:
        return None
    data: dict[str, str] = record.get("additional_data") or {}
    return Notification(str(record.get("id")), str(record.get("type")), data, timestamp_ms)


def connector_of(offset: Mapping[str, Any], number: int, timestamp_ms: int) -> Connector:
    """Return what a connector's position says, by Debezium's names."""
    running = offset.get("incremental_snapshot_collections") not in (None, "", "[]")
    snapshot = str(offset.get("incremental_snapshot_correlation_id") or "") if running else None
    return Connector(number, timestamp_ms, snapshot)


def sent_in(records: Iterable[tuple[bytes | None, int]]) -> list[tuple[str, str, int]]:
    """Return id, type and time of each signal among records of the topic; what is none is left out."""
    found: list[tuple[str, str, int]] = []
    for value, timestamp_ms in records:
        try:
            said: object = orjson.loads(value or b"")
        except orjson.JSONDecodeError:
            continue
        one = cast("dict[str, object]", said) if isinstance(said, dict) else {}
        id_, type_ = one.get("id"), one.get("type")
        if isinstance(id_, str) and isinstance(type_, str):
            found.append((id_, type_, timestamp_ms))
    return found
