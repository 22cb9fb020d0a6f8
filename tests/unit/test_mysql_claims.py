"""Claims on MariaDB, decided by positions and a clock: what a snapshot may say of the log."""

from __future__ import annotations

import itertools

import pytest

from delta_sync.errors import PipelineStopped
from delta_sync.sources.mysql.claims import (
    LISTED_S,
    MAX_FILE,
    STOOD_S,
    Sample,
    Samples,
    Snapshot,
    event_position,
    format_position,
    position_of,
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


@pytest.mark.parametrize(
    ("place", "prepared", "shows"),
    [
        (("binlog.000007", 899), frozenset[str](), True),
        (("binlog.000007", 900), frozenset[str](), False),  # it begins where the snapshot ends
        (("binlog.000006", 899), frozenset[str](), False),  # the end of the file before may not be visible yet
        (("binlog.000007", 899), XA, False),  # it may be the prepared one's
    ],
)
def test_which_changes_a_snapshot_surely_shows(place: tuple[str, int], prepared: frozenset[str], shows: bool) -> None:
    snapshot = Snapshot(position_of("binlog.000007", 900), 0.0, prepared)
    assert snapshot.shows(position_of(*place), 0) is shows
    assert snapshot.horizon == snapshot.position
