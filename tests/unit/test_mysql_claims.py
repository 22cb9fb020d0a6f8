"""Claims on MariaDB, decided by positions and a clock: what a snapshot may say of the log."""

from __future__ import annotations

import itertools

import pytest

from delta_sync.errors import PipelineStopped
from delta_sync.sources.mysql.claims import (
    LISTED_S,
    MAX_FILE,
    STOOD_S,
    XA_LISTED_S,
    Head,
    OwnedSamples,
    Sample,
    Samples,
    Snapshot,
    event_position,
    format_position,
    owned_gtids,
    position_of,
    shown_to,
)

XA = frozenset({"1 1 0 a"})


def samples_of(*samples: Sample, limit: int = 4096) -> Samples:
    samples_ = Samples(limit)
    for sample in samples:
        samples_.add(sample)
    return samples_


def test_positions_are_in_the_order_of_the_log() -> None:
    places = [("binlog.000001", 4), ("binlog.000001", 2**32 - 1), ("binlog.000002", 4), ("mysql-bin.1000000", 4)]
    positions = [position_of(*place) for place in places]
    assert all(one < other for one, other in itertools.pairwise(positions))
    assert event_position("binlog.000001", 100, 3) == position_of("binlog.000001", 103)
    assert format_position(positions[2]) == "000002:4"


@pytest.mark.parametrize(("file", "offset"), [(f"binlog.{MAX_FILE + 1}", 4), ("binlog.000001", 2**32)])
def test_positions_that_no_version_can_hold(file: str, offset: int) -> None:
    with pytest.raises(PipelineStopped):
        position_of(file, offset)


def test_the_newest_sample_below_the_snapshot_is_claimed() -> None:
    samples = samples_of(Sample(10, 0.0), Sample(20, 1.0), Sample(30, 2.0))
    assert samples.claim(Snapshot(31, 3.0), 0) == 30
    assert samples.claim(Snapshot(30, 3.0), 0) == 20  # strictly below
    assert samples.claim(Snapshot(10, 3.0), 0) is None
    assert samples.claim(Snapshot(31, 3.0), 31) is None  # the log may not deliver what is before 31
    assert samples.claim(Snapshot(31, 3.0), 30) == 30
    assert Samples().claim(Snapshot(31, 3.0), 0) is None


def test_a_position_that_stands_is_claimed_itself() -> None:
    samples = samples_of(Sample(10, 0.0), Sample(20, 1.0), Sample(20, 4.0))
    assert samples.claim(Snapshot(20, 1.0 + STOOD_S - 0.1), 0) == 10
    assert samples.claim(Snapshot(20, 1.0 + STOOD_S), 0) == 20
    assert samples.claim(Snapshot(20, 1.0 + STOOD_S), 20) == 20
    alone = samples_of(Sample(10, 0.0))
    assert alone.claim(Snapshot(10, STOOD_S), 10) == 10


def test_what_was_prepared_bounds_the_claim() -> None:
    samples = samples_of(Sample(10, 0.0), Sample(20, 1.0), Sample(30, 2.0, XA), Sample(40, 3.0, XA))
    assert samples.claim(Snapshot(41, 4.0, XA), 0) == 10  # at 1.0 it was not listed yet, but may have been in the log
    assert samples.claim(Snapshot(41, 4.0), 0) == 40  # it has ended
    assert samples.claim(Snapshot(41, 4.0, frozenset({"b"})), 0) == 30  # prepared since the last sample
    samples.add(Sample(50, 4.0))
    samples.add(Sample(60, 5.0, XA))  # another of the same name
    assert samples.claim(Snapshot(61, 6.0, XA), 0) == 40
    assert samples_of(Sample(10, 0.0, XA)).claim(Snapshot(11, 9.0, XA), 0) is None


def test_samples_from_within_the_time_that_a_listing_may_miss_are_not_claimed() -> None:
    samples = samples_of(Sample(10, 0.0), Sample(20, 1.0))
    assert samples.claim(Snapshot(21, 1.0 + LISTED_S / 2), 0) == 10
    assert samples.claim(Snapshot(21, 1.0 + LISTED_S), 0) == 20


def test_old_samples_are_thinned_out() -> None:
    samples = samples_of(*(Sample(number, float(number)) for number in range(1000)), limit=16)
    claims = {samples.claim(Snapshot(position, 2000.0), 0) for position in range(1, 1001)}
    assert len(claims) <= 18
    assert samples.claim(Snapshot(1000, 2000.0), 0) == 999


NAME = "binlog.000007"
HEADER = [("Format_desc", 4, 256, ""), ("Gtid_list", 256, 299, "[]"), ("Binlog_checkpoint", 299, 339, "binlog.000006")]
COMMIT = [("Gtid", 339, 381, "BEGIN GTID 0-1-7"), ("Update_rows_v1", 381, 420, "table_id: 20"), ("Xid", 420, 451, "")]
SETTLED = ("Binlog_checkpoint", 451, 491, NAME)


def at(offset: int, file: str = NAME) -> int:
    return position_of(file, offset)


def test_what_a_snapshot_shows_is_known_in_a_file_that_is_settled() -> None:
    """Before, its position may be the file's beginning, though the file before has a commit that is not visible yet."""
    unsettled = Head(7).joined(NAME, [*HEADER, *COMMIT])
    assert unsettled == Head(7, read_to=451, first=339)
    assert [shown_to(at(offset), head) for offset in (339, 451) for head in (None, unsettled)] == [0, 0, 0, 0]
    head = unsettled.joined(NAME, [SETTLED, ("Gtid", 491, 533, "")])
    assert head == Head(7, read_to=491, first=339, settled=491)
    assert shown_to(at(600), head) == at(600)
    assert shown_to(at(451), head) == at(451), "set by its commit, after the note had moved it: so it is visible"
    assert shown_to(at(600, "binlog.000008"), head) == 0
    assert shown_to(at(600, "binlog.000006"), head) == 0


def test_the_note_itself_moves_the_position_beyond_a_commit_that_may_not_be_visible_yet() -> None:
    head = Head(7).joined(NAME, [*HEADER, *COMMIT, SETTLED])
    assert shown_to(at(491), head) == at(339)
    assert shown_to(at(491), head, stands=True) == at(491)
    quiet = Head(7).joined(NAME, [*HEADER, SETTLED])
    assert shown_to(at(491), quiet) == at(491), "nothing was in the file before the note"


def test_a_snapshot_shows_what_lies_before() -> None:
    snapshot = Snapshot(at(900), 0.0, shown=at(700))
    assert [snapshot.shows(position, 0) for position in (at(699), at(700), at(800))] == [True, False, False]
    assert snapshot.clock == at(699)
    assert not Snapshot(at(900), 0.0).shows(at(4), 0)
    assert snapshot.horizon == snapshot.position


# ── MySQL: who owns a GTID ───────────────────────────────────────────────────────────────────────────────────────────

A, B = frozenset({"a"}), frozenset({"a", "b"})
NOBODY: frozenset[str] = frozenset()


def owned_samples(
    *samples: tuple[int, float, frozenset[str]], uses_xa: bool = False, limit: int = 4096
) -> OwnedSamples:
    found = OwnedSamples(limit)
    for position, taken_s, owned in samples:
        found.add(Sample(position, taken_s, owned=owned, uses_xa=uses_xa))
    return found


@pytest.mark.parametrize(
    ("samples", "taken_s", "expected"),
    [
        ([(10, 0.0, NOBODY)], 0.0, 10),  # on a server that rests, too
        ([(10, 0.0, NOBODY)], -1.0, None),  # it was taken later
        ([(10, 0.0, A)], 9.0, None),  # a may be below 10, and nobody saw its end
        ([(10, 0.0, NOBODY), (20, 1.0, A)], 9.0, 10),
        ([(10, 0.0, NOBODY), (20, 1.0, A), (30, 2.0, A)], 9.0, 10),
        ([(10, 0.0, NOBODY), (20, 1.0, A), (30, 2.0, frozenset({"b"}))], 9.0, 20),  # a has ended
        ([(10, 0.0, NOBODY), (20, 1.0, A), (30, 2.0, frozenset({"b"}))], 1.5, 10),  # not before this snapshot
        ([(10, 0.0, B), (10, 1.0, A)], 9.0, None),
        ([(10, 0.0, B), (10, 1.0, A), (10, 2.0, NOBODY)], 9.0, 10),  # the log rests, and they end
        ([(10, 0.0, NOBODY), (10, 1.0, A)], 9.0, 10),  # a is not in the log yet
        ([(20, 0.0, NOBODY), (10, 1.0, A)], 9.0, 20),  # positions do not go back
    ],
)
def test_an_end_of_the_log_is_claimed_when_its_owners_are_gone(
    samples: list[tuple[int, float, frozenset[str]]], taken_s: float, expected: int | None
) -> None:
    found = owned_samples(*samples)
    assert found.claim(Snapshot(99, taken_s), 0) == expected
    assert found.claim(Snapshot(99, taken_s), 21) is None  # the log may not deliver what is before 21


def test_where_xa_is_used_samples_have_to_be_old() -> None:
    samples = owned_samples((10, 0.0, NOBODY), (20, 1.0, NOBODY), uses_xa=True)
    assert samples.claim(Snapshot(99, XA_LISTED_S - 0.1), 0) is None
    assert samples.claim(Snapshot(99, XA_LISTED_S), 0) == 10
    assert samples.claim(Snapshot(99, XA_LISTED_S + 1.0), 0) == 20
    samples.add(Sample(30, 2.0, XA))
    assert samples.claim(Snapshot(99, 20.0, XA), 0) is None  # unlisted a second after it was, and nothing is older
    old = OwnedSamples(listed_s=0.5)
    for sample in (Sample(10, 0.0), Sample(20, 1.0), Sample(30, 2.0, XA)):
        old.add(sample)
    assert old.claim(Snapshot(99, 20.0, XA), 0) == 10
    assert old.claim(Snapshot(99, 20.0), 0) == 30


def test_many_samples_are_thinned_out() -> None:
    samples = owned_samples(*((number, float(number), NOBODY) for number in range(1, 1000)), limit=10)
    assert samples.claim(Snapshot(2000, 1000.0), 0) == 999
    assert samples.claim(Snapshot(2000, 996.5), 0) in range(980, 997)


def test_owned_gtids_are_read() -> None:
    text = "3e11fa47-71ca-11e1-9e33-c80aa9429562:5#12:6#13:odd_tag:7#14,\n4e11fa47-71ca-11e1-9e33-c80aa9429562:5#9"
    one, other = "3e11fa47-71ca-11e1-9e33-c80aa9429562", "4e11fa47-71ca-11e1-9e33-c80aa9429562"
    assert owned_gtids(text) == {f"{one}:5", f"{one}:6", f"{one}:odd_tag:7", f"{other}:5"}
    assert owned_gtids("") == frozenset()
