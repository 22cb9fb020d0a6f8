"""Claims: what a snapshot may say about the binary log, decided without I/O.

Positions are integers, `file << 32 | offset`. A snapshot that was taken WITH CONSISTENT SNAPSHOT knows a position P,
the end of the last commit that it sees, or nearly so: when the server begins a new file, P is that file's beginning a
moment before the old file's last transaction is visible. Commits become visible in the order of the log, so a snapshot
at P sees every transaction before any position P' < P that another snapshot had: its last one was visible when the log
went on. So a row may claim **the newest sampled position strictly below P**; changes at or after it come from the log.

On a server that rests, nothing lies between: there P itself is claimed, once it has stood for STOOD_S, by when whatever
made it is visible. Commits that wait for a replica (`AFTER_SYNC`) may take longer, while the log goes on to new files;
so while somebody waits, positions count only where it is sure what they show (`shown_to`).

XA transactions are the exception: XA PREPARE writes their changes to the log, and XA COMMIT makes them visible, however
much later. So one that was prepared when the snapshot was taken bounds the claim: by the samples from before it was
listed as prepared (XA RECOVER).

MySQL tells no P. There a sample is the log's end L, and then which transactions own their GTID (`gtid_owned`): each
takes it before it is written to the log, and gives it up when the engine has committed it, and so shows it. So all
transactions below L are visible, but for some of these owners; and when a later sample lacks all of them, a snapshot
that begins after that one sees everything below L. So a row may claim **the newest L whose owners were gone** by the
newest sample from before its snapshot (`OwnedSamples`). No clock is asked, but where XA transactions are used: XA
PREPARE gives its GTID up a moment before it is listed, so samples have to be older than any such moment there.

Documents of several tables need more: a number that rises exactly with what snapshots show. That is P itself, of
snapshots of which it is sure what they show (`shown_to`); `docs/design/documents.md` says why.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from delta_sync.errors import PipelineStopped, UndecodableChange
from delta_sync.versions import MAX_POSITION

OFFSET_BITS = 32  # of an event's position in its file: the header has no more
MAX_OFFSET = (1 << OFFSET_BITS) - 1
MAX_FILE = MAX_POSITION >> OFFSET_BITS  # 1,048,575 files: at one an hour, 119 years

# Between the two steps lie microseconds, a process switch at most. A server that is frozen between them wakes up to
# the second one, and its clock has nothing to do with ours: so this is far above what a stall of its disk lasts.
STOOD_S = 5.0


# XA PREPARE writes to the log a moment before XA RECOVER lists it: some milliseconds, if it waits for the disk. A
# listing says nothing of what was written within that time before it.
LISTED_S = 0.25

# On MySQL it does so for as long as a busy machine keeps a process from going on: 0.25 s were seen to be too little.
XA_LISTED_S = 10.0


class Snapshot(NamedTuple):
    """What a snapshot knows: its position, and from before it was taken our clock (s), and what was prepared."""

    position: int
    taken_s: float  # monotonic
    prepared: frozenset[str] = frozenset()  # XA transactions
    shown: int = 0  # every change before this position is surely visible in it; 0: not known

    @property
    def horizon(self) -> int:
        """What stays the same as long as nothing is committed."""
        return self.position

    def shows(self, position: int, xid: int) -> bool:
        """Tell whether it surely sees a change at a position."""
        del xid
        return position < self.shown

    @property
    def clock(self) -> int:
        """A number that rises with what snapshots of one log show; of one that shows nothing for sure there is none."""
        assert self.shown, "it is known what it shows"
        return self.shown - 1


class Sample(NamedTuple):
    """A position that a snapshot had, and from after that was known what was prepared, and then our clock (s).

    `waits`: a commit waited for a replica (`AFTER_SYNC`); so it is in the log, and nobody sees it. Then only what is
    before `shown` was surely visible.

    Of MySQL it is the log's end, and `owned` what was known next: the GTIDs of transactions that were being committed.
    """

    position: int
    taken_s: float  # monotonic
    prepared: frozenset[str] = frozenset()  # XA transactions
    waits: bool = False
    shown: int = 0
    owned: frozenset[str] = frozenset()
    uses_xa: bool = True  # there may be XA transactions before the position


class Head(NamedTuple):
    """What is known of the beginning of a file of the log, whose events were read up to an offset.

    `first` is where its first transaction begins. `settled` is the end of the event by which the server notes that it
    needs no older file any more (Binlog_checkpoint with this file's own name): all transactions of older files are
    visible then, and from then on nothing but commits moves the position of snapshots within this file.
    """

    file: int  # its number
    read_to: int = 0
    first: int | None = None
    settled: int | None = None

    def joined(self, name: str, events: Iterable[tuple[str, int, int, str]]) -> Head:
        """Return it with the events that follow: each its type, where it begins and ends, and what it says."""
        head = self
        for kind, start, end, info in events:
            head = head._replace(read_to=end)
            if kind == CHECKPOINT and info == name:
                return head._replace(settled=end)
            if kind not in HEADERS and head.first is None:
                head = head._replace(first=start)
        return head


CHECKPOINT = "Binlog_checkpoint"
HEADERS = frozenset({"Format_desc", "Gtid_list", CHECKPOINT, "Start_encryption"})


def shown_to(position: int, head: Head | None, *, stands: bool = False) -> int:
    """Return up to where a snapshot at a position surely shows every change; 0: not known. Pure.

    `head` is what was known of the position's file before the snapshot was taken; `stands`: the position has not moved
    for STOOD_S, and nobody waits for a replica. XA transactions are another matter.
    """
    if head is None or head.settled is None or position >> OFFSET_BITS != head.file:
        return 0
    settled = head.file << OFFSET_BITS | head.settled
    if position != settled or stands or head.first is None:
        return position
    return head.file << OFFSET_BITS | head.first  # one that was in the log before the note may not be visible yet


_FILE_NUMBER = re.compile(r"\.(\d+)$")


def position_of(file: str, offset: int) -> int:
    """Return a place in the log as an integer: `binlog.000012` and 345 give `12 << 32 | 345`.

    Raises PipelineStopped when the numbers of the files, or a transaction, have become too large to be compared.
    """
    match = _FILE_NUMBER.search(file)
    if match is None:
        raise ValueError(file)
    number = int(match[1])
    if number > MAX_FILE:
        raise PipelineStopped(
            f"The log's file {file} has a number above {MAX_FILE}, and versions have no room for it. Type RESET"
            " MASTER at the source, which begins with 1 again, and load the tables anew."
        )
    if not 0 <= offset <= MAX_OFFSET:
        raise PipelineStopped(
            f"Position {offset} of the log's file {file} is beyond 4 GiB: a transaction is too large."
        )
    return number << OFFSET_BITS | offset


def event_position(file: str, offset: int, row: int) -> int:
    """Return a row change's position: where its event starts, and its place in the event.

    Strictly rising for each key, because each row takes at least a byte of the event.
    """
    return position_of(file, offset + row)


def binlog_source(source: Mapping[str, Any], op: str) -> dict[str, Any]:
    """Return an event's `source` as one of PostgreSQL has it: `lsn` is the change's position. Raises UndecodableChange.

    The row's number says nothing of a TRUNCATE: it is that of the change before.
    """
    try:
        lsn = event_position(source["file"], source["pos"], 0 if op == "t" else source["row"])
    except (ValueError, TypeError) as error:
        place = f"{source['file']!r}:{source['pos']!r}, row {source['row']!r}"
        raise UndecodableChange(f"The event's place in the log is {place}.") from error
    return {"schema": source["db"], "table": source["table"], "lsn": lsn, "txId": 0, "ts_ms": source["ts_ms"]}


def events_of_binlog(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events among a connector's records, with a `source` as PostgreSQL's. Others are its heartbeats."""
    events = [record for record in records if "source" in record]
    for event in events:
        event["source"] = binlog_source(event["source"], event["op"])
    return events


def format_position(position: int) -> str:
    """Return a position for people: `000012:345`."""
    return f"{position >> OFFSET_BITS:06}:{position & MAX_OFFSET}"


class Samples:
    """The positions sampled so far, oldest first, of which a snapshot can claim the newest that is below its own.

    Bounded: beyond `limit` every other one of the older half goes, which only makes a claim a little older.
    """

    def __init__(self, limit: int = 4096, listed_s: float = LISTED_S) -> None:
        self._limit = limit
        self._listing_takes_s = listed_s
        self._positions: list[int] = []  # strictly rising
        self._times_s: list[float] = []  # when each was first known
        self._listed_s = float("-inf")  # when it was last known what is prepared
        self._unlisted_s: dict[str, float] = {}  # prepared transaction → when it was last known not to be one

    def add(self, sample: Sample) -> None:
        """Keep a sample that was taken after all those before it."""
        self._list(sample)
        position = sample.shown if sample.waits else sample.position
        if self._positions and position < sample.position == self._positions[-1]:
            del self._positions[-1], self._times_s[-1]  # a new file's beginning, a moment before it was known who waits
        if not position or (self._positions and position <= self._positions[-1]):
            return  # it says nothing new: positions do not go back
        self._positions.append(position)
        self._times_s.append(sample.taken_s)
        if len(self._positions) > self._limit:
            half = self._limit // 2
            self._positions[:half] = self._positions[:half:2]
            self._times_s[:half] = self._times_s[:half:2]

    def claim(self, snapshot: Snapshot, covered_from: int) -> int | None:
        """Return the claim of rows read in `snapshot`: a position at or above `covered_from`, or None for not yet.

        `covered_from` is the position from which the log is known to deliver the table's changes.
        """
        usable = bisect.bisect_right(self._times_s, self._usable_to_s(snapshot))
        place = bisect.bisect_left(self._positions, snapshot.position, 0, usable)
        claim = self._positions[place - 1] if place else None
        stands = place < usable and self._positions[place] == snapshot.position
        if stands and snapshot.taken_s - self._times_s[place] >= STOOD_S:
            claim = snapshot.position
        return claim if claim is not None and claim >= covered_from else None

    def _list(self, sample: Sample) -> None:
        """Note what is prepared."""
        self._unlisted_s = {xid: self._unlisted_s.get(xid, self._listed_s) for xid in sample.prepared}
        self._listed_s = sample.taken_s

    def _usable_to_s(self, snapshot: Snapshot) -> float:
        """Return until when samples were taken of which it is known that nothing prepared is below them."""
        known_s = min(
            (self._unlisted_s.get(xid, self._listed_s) for xid in snapshot.prepared), default=snapshot.taken_s
        )
        return min(known_s, snapshot.taken_s) - self._listing_takes_s


class OwnedSamples(Samples):
    """MySQL's: ends of the log, each with who owned a GTID then, oldest first. Bounded in the same way."""

    def __init__(self, limit: int = 4096, listed_s: float = XA_LISTED_S) -> None:
        super().__init__(limit, listed_s)
        self._xa_listed_s = listed_s
        self._samples: list[Sample] = []  # positions strictly rising

    def add(self, sample: Sample) -> None:
        """Keep a sample that was taken after all those before it."""
        self._list(sample)
        self._listing_takes_s = self._xa_listed_s if sample.uses_xa else 0.0
        last = self._samples[-1] if self._samples else None
        if last is not None and sample.position <= last.position:
            if sample.position == last.position and sample.owned < last.owned:
                self._samples[-1] = sample  # the log rests, and some have ended
            return
        self._samples.append(sample)
        if len(self._samples) > self._limit:
            half = self._limit // 2
            self._samples[:half] = self._samples[:half:2]

    def claim(self, snapshot: Snapshot, covered_from: int) -> int | None:
        """Return the claim of rows read in `snapshot`: a position at or above `covered_from`, or None for not yet."""
        usable = bisect.bisect_right(self._samples, self._usable_to_s(snapshot), key=lambda sample: sample.taken_s)
        if not usable:
            return None
        owned = self._samples[usable - 1].owned
        for sample in reversed(self._samples[:usable]):
            if sample.position < covered_from:
                return None
            if sample.owned.isdisjoint(owned):
                return sample.position
        return None


def owned_gtids(text: str) -> frozenset[str]:
    """Return the GTIDs of `gtid_owned`, as `uuid:number`, or `uuid:tag:number`.

    The server writes `uuid:5#12:6#13,\n…`: each number with the thread that owns it, tags among them.
    """
    found: set[str] = set()
    for of_server in filter(None, (part.strip() for part in text.split(","))):
        source, *parts = of_server.split(":")
        prefix = source
        for part in parts:
            number, is_owned, _ = part.partition("#")
            if is_owned:
                found.add(f"{prefix}:{number}")
            else:
                prefix = f"{source}:{part}"
    return frozenset(found)
