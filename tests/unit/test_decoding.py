"""Decoding: what of a batch of events is left to do, and what becomes of events that say too little."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from delta_sync.changes import Change, Key
from delta_sync.decoding import Decoded, Event, Image, Lacking, Stretch, TableCodec, decode
from delta_sync.errors import UndecodableChange
from delta_sync.tables import Column, Kind, Table
from delta_sync.values import Row
from delta_sync.versions import version_of

EPOCH = 7
PLACEHOLDER = "?"
MOVIE = "public.movie"


def table(name: str = "movie", key: tuple[str, ...] = ("id",)) -> Table:
    columns = (
        Column("id", "integer", Kind.INTEGER),
        Column("title", "text", Kind.TEXT),
        Column("length", "integer", Kind.INTEGER, in_log=False),
    )
    return Table("public", name, columns, key)


def codec(of: Table) -> TableCodec:
    """Ids below 0 cannot be read, the title `!` cannot be decoded, and `?` is not there."""

    def row(image: Image) -> Row:
        if image["title"] == "!":
            raise UndecodableChange("title: it is no title")
        return {**image, "title": image["title"].upper()}

    def key(image: Image) -> Key:
        if image["id"] == -1:
            raise UndecodableChange("id: it is below 0")
        return tuple(image[name] for name in of.key)

    def lacks(image: Image) -> bool:
        return bool(image["title"] == PLACEHOLDER)

    return TableCodec(of, row, key, lacks)


CODECS = {MOVIE: codec(table())}


def event(op: str, lsn: int, after: Image | None = None, before: Image | None = None, name: str = "movie") -> Event:
    source = {"schema": "public", "table": name, "lsn": lsn, "txId": 1000 + lsn, "ts_ms": 10 * lsn}
    return {"op": op, "before": before, "after": after, "source": source}


def insert(lsn: int, id_: Any, title: str = "a", **more: Any) -> Event:
    return event("c", lsn, {"id": id_, "title": title, **more})


def delete(lsn: int, id_: Any) -> Event:
    return event("d", lsn, before={"id": id_, "title": ""})


def message(lsn: int, prefix: str = "beat") -> Event:
    return {"op": "m", "source": {"lsn": lsn, "ts_ms": 10 * lsn}, "message": {"prefix": prefix, "content": ""}}


def decoded(*batches: list[Event], codecs: dict[str, TableCodec] = CODECS) -> Decoded:
    return decode([stretch(*batch) for batch in batches], codecs, "beat")


def stretch(*events: Event, epoch: int = EPOCH) -> Stretch:
    return Stretch(epoch, orjson.loads(orjson.dumps(events)))


def change(lsn: int, id_: Any, title: str | None) -> Change:
    row = None if title is None else {"id": id_, "title": title}
    return Change(MOVIE, (id_,), version_of(EPOCH, lsn), row)


def test_nothing() -> None:
    assert decoded() == decoded([]) == Decoded({}, {}, {}, [], None, None, 0, frozenset())


def test_only_the_newest_change_of_a_key_is_left() -> None:
    found = decoded([insert(10, 1, "a"), insert(20, 2, "b")], [insert(30, 1, "c")], [delete(40, 2)])
    assert found.changes == {MOVIE: [change(30, 1, "C"), change(40, 2, None)]}
    assert found.events == 4
    assert found.oldest_ts_ms == 100


def test_what_is_not_the_newest_is_not_decoded() -> None:
    found = decoded([insert(10, 1, "!"), insert(20, 1, "a")])
    assert found.changes == {MOVIE: [change(20, 1, "A")]}
    assert not found.misfits


def test_a_redelivered_change_does_not_replace_a_newer_one() -> None:
    assert decoded([insert(30, 1, "new"), insert(10, 1, "old")]).changes == {MOVIE: [change(30, 1, "NEW")]}


def test_of_two_changes_at_one_position_the_later_counts() -> None:
    """A row that was deleted and inserted under the same key by one statement."""
    assert decoded([delete(10, 1), insert(10, 1, "a")]).changes == {MOVIE: [change(10, 1, "A")]}


def test_a_change_of_the_key_is_a_delete_and_an_insert() -> None:
    found = decoded([delete(10, 1), insert(10, 2, "a")])
    assert found.changes == {MOVIE: [change(10, 1, None), change(10, 2, "A")]}


def test_a_truncate_removes_what_was_before_it_and_keeps_what_follows() -> None:
    found = decoded([insert(10, 1), insert(20, 2), event("t", 30), insert(40, 2, "b")])
    assert found.truncates == {MOVIE: version_of(EPOCH, 30)}
    assert found.changes == {MOVIE: [change(40, 2, "B")]}


def test_a_truncate_alone() -> None:
    found = decoded([insert(10, 1), event("t", 30)])
    assert (found.truncates, found.changes) == ({MOVIE: version_of(EPOCH, 30)}, {})


def test_the_newest_truncate_counts() -> None:
    assert decoded([event("t", 30), event("t", 50)]).truncates == {MOVIE: version_of(EPOCH, 50)}


def test_a_redelivered_truncate_keeps_what_is_newer() -> None:
    found = decoded([event("t", 30), event("t", 35), insert(40, 1, "a"), event("t", 30)])
    assert found.truncates == {MOVIE: version_of(EPOCH, 35)}
    assert found.changes == {MOVIE: [change(40, 1, "A")]}


def test_a_truncate_concerns_its_own_table() -> None:
    codecs = {name: codec(table(name.split(".")[1])) for name in (MOVIE, "public.genre")}
    found = decoded([insert(10, 1), event("t", 20, name="genre")], codecs=codecs)
    assert found.truncates == {"public.genre": version_of(EPOCH, 20)}
    assert found.changes == {MOVIE: [change(10, 1, "A")]}


def test_heartbeats() -> None:
    found = decoded([message(10), message(30), insert(35, 1), message(20), message(90, "of somebody else")])
    assert found.heartbeat_lsn == 30
    assert found.changes == {MOVIE: [change(35, 1, "A")]}
    assert found.events == 1  # messages are none


def test_events_of_tables_that_are_not_in_the_pipeline_any_more_count_but_do_nothing() -> None:
    found = decoded([event("c", 10, {"x": 1}, name="gone"), event("t", 20, name="gone")])
    assert (found.changes, found.truncates, found.events) == ({}, {}, 2)


def test_a_change_that_lacks_a_value_is_read_by_key() -> None:
    found = decoded([insert(10, 1, PLACEHOLDER), insert(20, 2, "b")])
    assert found.lacking == {MOVIE: [Lacking(MOVIE, (1,), version_of(EPOCH, 10), 1010)]}
    assert found.changes == {MOVIE: [change(20, 2, "B")]}
    assert not found.misfits  # the columns are as they should be


def test_a_delete_lacks_nothing() -> None:
    """Its image has made-up values beside the key, with the default replica identity."""
    found = decoded([event("d", 10, before={"id": 1, "title": PLACEHOLDER, "new": 0})])
    assert found.changes == {MOVIE: [change(10, 1, None)]}
    assert not found.misfits


@pytest.mark.parametrize(
    "image",
    [
        {"id": 1, "title": "a", "added": 5},
        {"id": 1},  # dropped
        {"id": 1, "renamed": "a"},
        {"id": 1, "title": "!"},  # of another type
    ],
)
def test_an_event_with_other_columns_is_read_by_key_and_reported(image: Image) -> None:
    found = decoded([event("c", 10, image)])
    assert found.misfits == {MOVIE}
    assert found.lacking == {MOVIE: [Lacking(MOVIE, (1,), version_of(EPOCH, 10), 1010)]}
    assert found.changes == {}


def test_a_column_that_the_log_need_not_carry_may_be_there() -> None:
    found = decoded([insert(10, 1, "a", length=5)])
    assert not found.misfits
    assert found.lacking == {}


def test_a_change_without_a_legible_key_spoils_only_itself() -> None:
    bad = [insert(10, -1), delete(20, -1)]
    for each in bad:
        found = decoded([each, insert(30, 2, "b")])
        assert found.changes == {MOVIE: [change(30, 2, "B")]}
        (item,) = found.undecodable
        assert (item.table, item.version, item.event) == (MOVIE, version_of(EPOCH, each["source"]["lsn"]), each)
        assert "below 0" in str(item.error)


def test_keys_of_several_columns() -> None:
    codecs = {MOVIE: codec(table(key=("id", "title")))}
    found = decoded([insert(10, 1, "a"), insert(20, 1, "b"), insert(30, 1, "a")], codecs=codecs)
    assert [(each.key, each.version) for each in found.changes[MOVIE]] == [
        ((1, "a"), version_of(EPOCH, 30)),
        ((1, "b"), version_of(EPOCH, 20)),
    ]


@pytest.mark.parametrize("key", [("id",), ("id", "title")])
def test_keys_that_are_lists_or_objects_in_the_event(key: tuple[str, ...]) -> None:
    codecs = {MOVIE: codec(table(key=key))}
    point = {"x": 1, "y": 2}
    found = decoded([insert(10, [1]), insert(20, point), insert(30, [1]), insert(40, point)], codecs=codecs)
    assert [each.version for each in found.changes[MOVIE]] == [version_of(EPOCH, 30), version_of(EPOCH, 40)]


def test_a_later_epoch_outranks_every_position_of_an_earlier_one() -> None:
    older, newer = stretch(insert(1 << 51, 1, "old")), stretch(insert(1, 1, "new"), epoch=EPOCH + 1)
    (low,) = decode([newer], CODECS, "beat").changes[MOVIE]
    (high,) = decode([older], CODECS, "beat").changes[MOVIE]
    assert low.version > high.version
    for both in ([older, newer], [newer, older]):
        assert decode(both, CODECS, "beat").changes == {MOVIE: [low]}


def test_a_row_that_was_read_ahead_is_read_again() -> None:
    events = [stretch(insert(10, 1, length=1), insert(11, 2, length=1), delete(12, 3), delete(13, 4))]
    again = {((1,), version_of(EPOCH, 10)), ((3,), version_of(EPOCH, 12))}
    found = decode(events, CODECS, "beat", {MOVIE: lambda key, version: (key, version) in again})
    assert [item.key for item in found.lacking[MOVIE]] == [(1,), (3,)]
    assert [item.xid for item in found.lacking[MOVIE]] == [1010, 1012]
    assert [item.key for item in found.changes[MOVIE]] == [(2,), (4,)]
    assert not decode(events, CODECS, "beat", {"public.other": lambda *_: True}).lacking


def test_batches_that_read_the_same_row_are_told_from_those_that_do_not() -> None:
    again = {MOVIE: lambda key, version: True}
    first, same, other = (
        decode([stretch(*events)], CODECS, "beat", again)
        for events in ([insert(10, 1), insert(11, 2)], [insert(20, 2), insert(21, 3)], [insert(30, 4)])
    )
    plain = decode([stretch(insert(40, 1, length=1))], CODECS, "beat")
    assert same.reads_rows_of(first)
    assert first.reads_rows_of(same)
    assert not other.reads_rows_of(first)
    assert not plain.reads_rows_of(first)
    assert not first.reads_rows_of(plain)
