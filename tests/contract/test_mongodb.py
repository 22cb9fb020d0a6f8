"""The MongoDB sink keeps the contract; and what is MongoDB's own."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
from bson import ObjectId
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from pymongo import MongoClient
from pymongo.database import Database

from delta_sync.changes import APPLIED, STALE, Write
from delta_sync.errors import SinkBusy, SinkRefused, UsageError
from delta_sync.sinks import mongodb_link
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.mongodb import MongoOptions, MongoSink, MongoTargetOptions
from delta_sync.sinks.mongodb_collections import TOMBSTONES
from delta_sync.sinks.mongodb_documents import CODEC, FLOOR_ID
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.contract import (
    MOVIE,
    AnySink,
    Died,
    SecondStep,
    SinkContract,
    apply,
    dying,
    scanned,
    storm,
)
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import MongoStandIn
from delta_sync.values import Document, Interval

TTL_S = 3600
DATABASE = "delta_contract"
# The driver asks every server now and then whether it is there, and cancels what runs when that takes longer. The
# stand-in does not answer while it is busy, for seconds on a busy machine.
PATIENT = "connectTimeoutMS=60000"
SECOND_STEP = SecondStep("_outranked", frozenset({"tombstone", "floor"}), looks_first=True)


def open_sink(url: str, cls: Callable[..., MongoSink] = MongoSink, query: str = PATIENT) -> MongoSink:
    return cls("docs", f"{url}{DATABASE}?{query}", MongoOptions(), TTL_S)


@pytest.fixture
def sink(mongodb: MongoStandIn) -> Iterator[MongoSink]:
    sink = open_sink(mongodb.url)
    yield sink
    sink.close()


@pytest.fixture
def target(sink: MongoSink) -> Iterator[Target]:
    target = sink.target(MOVIE, MongoTargetOptions())
    sink.drop(target)
    sink.prepare(target)
    yield target
    sink.drop(target)


@pytest.fixture
def database(mongodb: MongoStandIn) -> Iterator[Database[dict[str, Any]]]:
    with MongoClient[dict[str, Any]](mongodb.url) as client:
        yield client[DATABASE].with_options(CODEC)


class _NotANumber:
    """Equal to every NaN, which is equal to nothing."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isnan(other)

    def __hash__(self) -> int:
        return 0


def as_bson(value: object) -> Any:
    """Return what MongoDB gives back for a value, as the module's table says."""
    match value:
        case float() if math.isnan(value):
            return _NotANumber()
        case decimal.Decimal():
            return Decimal128(value)
        case Interval():
            return str(value)
        case dt.datetime():
            return value if value.tzinfo else value.replace(tzinfo=dt.UTC)
        case dt.date():
            return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)
        case dt.time():
            return value.isoformat()
        case dict():
            return {name: as_bson(part) for name, part in cast("dict[str, object]", value).items()}
        case list():
            return [as_bson(part) for part in cast("list[object]", value)]
        case _:
            return value


class TestMongo(SinkContract):
    second_step = SECOND_STEP
    reads_never_go_back = False
    large_batch = 1500  # five seconds of the stand-in's time, and it takes the square of more
    storm_seeds = range(4)

    @pytest.fixture
    def sink(self, mongodb: MongoStandIn) -> Iterator[AnySink]:
        sink = open_sink(mongodb.url)
        yield sink
        sink.close()

    @pytest.fixture
    def unreachable(self) -> Iterator[AnySink]:
        sink = open_sink("mongodb://127.0.0.1:1/", query="serverSelectionTimeoutMS=100")
        yield sink
        sink.close()

    def stored_form(self, document: Document) -> dict[str, Any]:
        form: dict[str, Any] = as_bson(document)
        return form

    def test_keys_of_several_columns(self, sink: AnySink) -> None:
        """On a server of its own: the stand-in loses documents whose `_id` is one once they leave its 16 MB cache."""
        with MongoStandIn() as server:
            own = open_sink(server.url)
            super().test_keys_of_several_columns(own)
            own.close()


# ── the contract notices when the rules are broken ───────────────────────────────────────────────────────────────────


class VersionsOff(MongoSink):
    """The last write to arrive wins."""

    def _not_newer(self, id_: object, version: int) -> dict[str, Any]:
        return {"_id": id_}


class TombstonesOff(MongoSink):
    """An upsert does not look whether its row was deleted."""

    def _outranked(
        self, target: Target, written: Sequence[int], ids: Sequence[object], writes: Sequence[Write]
    ) -> dict[int, int]:
        return {}


@pytest.mark.parametrize(("broken", "truncate"), [(VersionsOff, False), (TombstonesOff, False), (TombstonesOff, True)])
def test_storms_find_a_sink_that_breaks_the_rule(
    mongodb: MongoStandIn, broken: type[MongoSink], truncate: bool
) -> None:
    sink = open_sink(mongodb.url, broken)
    target = sink.target(MOVIE, MongoTargetOptions())

    def storms() -> None:
        for seed in range(10):
            storm(TestMongo(), sink, target, seed, truncate=truncate)

    with pytest.raises(AssertionError, match=r"seed \d+"):
        storms()
    sink.drop(target)
    sink.close()


class Interrupted(MongoSink):
    """Something happens between the first and the second step of an upsert."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)
    looks = 0

    def _outranked(
        self, target: Target, written: Sequence[int], ids: Sequence[object], writes: Sequence[Write]
    ) -> dict[int, int]:
        self.looks += 1
        if self.looks == 2:  # the first was before it wrote
            self.meanwhile()
        return super()._outranked(target, written, ids, writes)


def test_a_delete_between_the_steps_of_an_older_upsert(mongodb: MongoStandIn, sink: MongoSink, target: Target) -> None:
    slow = cast("Interrupted", open_sink(mongodb.url, Interrupted))
    slow.meanwhile = lambda: apply(sink, target, (1,), 6, None)
    assert apply(slow, target, (1,), 5, {"n": 5}) == STALE
    assert sink.read(target, [(1,)]) == [Stored(6, None)]
    slow.close()


def test_a_newer_upsert_between_the_steps_of_an_older_one_stays(
    mongodb: MongoStandIn, sink: MongoSink, target: Target
) -> None:
    slow = cast("Interrupted", open_sink(mongodb.url, Interrupted))

    def meanwhile() -> None:
        apply(sink, target, (1,), 6, None)
        apply(sink, target, (1,), 7, {"n": 7})

    slow.meanwhile = meanwhile
    assert apply(slow, target, (1,), 5, {"n": 5}) == STALE
    assert sink.read(target, [(1,)]) == [Stored(7, {"n": 7})]
    slow.close()


# ── sweeping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = dt.datetime(2024, 2, 29, tzinfo=dt.UTC)

    def __call__(self) -> dt.datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def clocked(mongodb: MongoStandIn, target: Target, clock: Clock) -> Iterator[MongoSink]:
    """A sink by that clock, on the empty `target`."""
    sink = MongoSink("docs", f"{mongodb.url}{DATABASE}?{PATIENT}", MongoOptions(), TTL_S, now=clock)
    yield sink
    sink.close()


def leave_behind(sink: MongoSink, target: Target, key: int, overtake: Callable[[], object]) -> None:
    with dying(sink, SECOND_STEP, overtake), pytest.raises(Died):
        apply(sink, target, (key,), 5, {"n": 5})


def test_a_sweep_of_recent_tombstones_leaves_the_others(clocked: MongoSink, target: Target, clock: Clock) -> None:
    leave_behind(clocked, target, 1, lambda: apply(clocked, target, (1,), 6, None))
    clock.pass_s(100)
    leave_behind(clocked, target, 2, lambda: apply(clocked, target, (2,), 6, None))
    assert clocked.sweep(target, recent_s=99) == 1
    assert scanned(clocked, target) == {"1": 5}
    assert clocked.sweep(target) == 1
    assert scanned(clocked, target) == {}


def test_a_sweep_looks_below_a_floor_while_it_is_recent(clocked: MongoSink, target: Target, clock: Clock) -> None:
    leave_behind(clocked, target, 1, lambda: clocked.truncate(target, 6))
    clock.pass_s(100)
    assert clocked.sweep(target, recent_s=99) == 0
    assert clocked.sweep(target, recent_s=101) == 1


def test_all_documents_are_looked_at_until_a_floor_has_settled(
    clocked: MongoSink, target: Target, clock: Clock, database: Database[dict[str, Any]]
) -> None:
    """A start must not cost a look at the whole collection for ever, because it was truncated once."""

    def late() -> None:
        """Write below the floor, as a process that stood still for long would."""
        database["movie"].insert_one({"_id": 1, "_version": 5})

    clocked.truncate(target, 6)
    late()
    assert clocked.sweep(target) == 1
    late()
    assert clocked.sweep(target) == 1  # too soon after it was raised for the sweep before to be the last one
    clock.pass_s(86_400)
    late()
    assert clocked.sweep(target) == 1
    late()
    assert clocked.sweep(target) == 0
    clocked.truncate(target, 4)  # does not lower it
    assert clocked.sweep(target) == 1


def test_a_sweep_looks_at_everything_in_parts(
    clocked: MongoSink, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongodb_link, "SCAN_BATCH", 40)
    count = 50
    writes = [Write((n,), 5, {"n": n}) for n in range(count)]

    def overtake() -> None:
        clocked.apply(target, [Write((n,), 6, None) for n in range(0, count, 2)])

    with dying(clocked, SECOND_STEP, overtake), pytest.raises(Died):
        clocked.apply(target, writes)
    assert clocked.sweep(target) == count // 2
    assert scanned(clocked, target) == {str(n): 5 for n in range(1, count, 2)}


@pytest.mark.parametrize("by", ["tombstone", "floor"])
def test_a_newer_write_wins_against_a_sweep(mongodb: MongoStandIn, sink: MongoSink, target: Target, by: str) -> None:
    class Slow(MongoSink):
        """A row comes back when a sweep has found its old document, and is about to delete it."""

        def _remove(self, target: Target, outranked: Iterable[tuple[object, int]]) -> int:
            if found := list(outranked):
                assert apply(sink, target, (1,), 7, {"n": 7}) == APPLIED
            return super()._remove(target, found)

        def _remove_below(self, target: Target, ids: Sequence[object], version: int) -> int:
            assert apply(sink, target, (1,), 7, {"n": 7}) == APPLIED
            return super()._remove_below(target, ids, version)

    if by == "tombstone":
        leave_behind(sink, target, 1, lambda: apply(sink, target, (1,), 6, None))
    else:
        leave_behind(sink, target, 1, lambda: sink.truncate(target, 6))
    slow = open_sink(mongodb.url, Slow)
    assert slow.sweep(target) == 0
    assert sink.read(target, [(1,)]) == [Stored(7, {"n": 7})]
    slow.close()


def test_a_row_that_is_deleted_already_does_not_come_back_for_a_moment(sink: MongoSink, target: Target) -> None:
    """A late upsert that dies before its second step has not even written, unless it was overtaken while it ran."""
    apply(sink, target, (1,), 6, None)
    with dying(sink, SECOND_STEP, lambda: None), pytest.raises(Died):
        sink.apply(target, [Write((1,), 5, {"n": 5}), Write((2,), 5, {"n": 5})])
    assert scanned(sink, target) == {"2": 5}


# ── what is stored ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_document_is_stored_between_its_id_and_its_version(
    sink: MongoSink, target: Target, database: Database[dict[str, Any]]
) -> None:
    apply(sink, target, (1,), 5, {"title": "Casablanca", "_id": 1})
    assert [list(document.items()) for document in database["movie"].find()] == [
        [("_id", 1), ("title", "Casablanca"), ("_version", 5)]
    ]


def test_values_are_bson(sink: MongoSink, target: Target, database: Database[dict[str, Any]]) -> None:
    too_long = "1234567890123456789012345678901234.5678"
    document = {
        "naive": dt.datetime(2024, 2, 29, 1, 2, 3, 456789),  # noqa: DTZ001 -- a timestamp without time zone
        "offset": dt.datetime(2024, 2, 29, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))),
        "day": dt.date(2024, 2, 29),
        "uuid": uuid.UUID(int=7),
        "nan": decimal.Decimal("NaN"),
        "inf": decimal.Decimal("-Infinity"),
        "money": decimal.Decimal("10.50"),
        "too_long": decimal.Decimal(too_long),
        "large": 2**40,
        "periods": (Interval(1, 2, 0), Interval(0, 0, 0)),
        "set": {1},
    }
    assert apply(sink, target, (1,), 5, document) == APPLIED
    # Decoded as a UUID, it was of subtype 4: CODEC gives other subtypes as Binary.
    stored = database["movie"].find_one({}, {"_id": 0, "_version": 0})
    assert stored is not None
    assert stored.pop("nan").to_decimal().is_nan()
    # The table has no column of intervals, so a list of them is not looked into: the documented limit.
    assert stored == {
        "naive": dt.datetime(2024, 2, 29, 1, 2, 3, 456000, tzinfo=dt.UTC),
        "offset": dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
        "day": dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
        "uuid": uuid.UUID(int=7),
        "inf": Decimal128("-Infinity"),
        "money": Decimal128("10.50"),
        "too_long": too_long,
        "large": Int64(2**40),
        "periods": [[1, 2, 0], [0, 0, 0]],
        "set": [1],
    }


def test_intervals_of_a_column_are_text_at_any_depth(sink: MongoSink, database: Database[dict[str, Any]]) -> None:
    columns = (Column("id", "integer", Kind.INTEGER), Column("period", "interval[]", Kind.INTERVAL, dimensions=1))
    target = sink.target(Table(DATABASE, "lease", columns, ("id",)), MongoTargetOptions())
    apply(sink, target, (1,), 5, {"a": [Interval(1, 2, 0)], "b": {"c": Interval(0, 0, 0)}, "d": Interval(0, 1, 0)})
    assert database["lease"].find_one({}, {"_id": 0, "_version": 0}) == {
        "a": ["P1M2D"],
        "b": {"c": "PT0S"},
        "d": "P1D",
    }
    sink.drop(target)


def test_tombstones_expire_by_a_ttl_index_and_floors_do_not(
    mongodb: MongoStandIn, target: Target, database: Database[dict[str, Any]]
) -> None:
    now = dt.datetime(2024, 2, 29, tzinfo=dt.UTC)
    sink = MongoSink("docs", f"{mongodb.url}{DATABASE}?{PATIENT}", MongoOptions(), TTL_S, now=lambda: now)
    apply(sink, target, (1,), 5, None)
    sink.truncate(target, 3)
    tombstones = database[f"movie{TOMBSTONES}"]
    indexes: Mapping[str, Mapping[str, Any]] = tombstones.index_information()
    assert indexes["at_1"]["expireAfterSeconds"] == TTL_S
    assert sorted(tombstones.find(), key=lambda one: one["version"]) == [
        {"_id": FLOOR_ID, "version": 3, "raised_at": now},
        {"_id": 1, "version": 5, "at": now},
    ]
    now += dt.timedelta(seconds=7)
    apply(sink, target, (1,), 4, None)  # stale, and may prolong the tombstone, but never lower it
    assert tombstones.find_one({"_id": 1}) == {"_id": 1, "version": 5, "at": now}
    sink.close()


# ── what is rejected ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"text": "x" * (16 << 20)}, "MongoDB's limit is 16777216"),
        ({"n": 2**63}, "the number 9223372036854775808 needs more"),
        ({"$set": {"n": 1}}, "cannot start with \\$"),
        ({"_id": 8}, "_id is not the row's key"),
        ({"a\0b": 1}, "null|NULL"),
    ],
    ids=["large", "int", "operator", "id", "zero"],
)
def test_rejected(sink: MongoSink, target: Target, document: Document, reason: str) -> None:
    writes = [Write((1,), 5, {"n": 1}), Write((2,), 5, document), Write((3,), 5, None), Write((4,), 5, {"n": 4})]
    outcomes = sink.apply(target, writes)
    assert [outcome.kind for outcome in outcomes] == ["applied", "rejected", "applied", "applied"]
    assert_matches(outcomes[1].reason, reason)
    assert [found and found.version for found in sink.read(target, [(1,), (2,), (3,), (4,)])] == [5, None, 5, 5]


def test_a_unique_index_of_the_users_rejects(
    sink: MongoSink, target: Target, database: Database[dict[str, Any]]
) -> None:
    database["movie"].create_index("title", unique=True)
    writes = [Write((1,), 5, {"title": "Notorious"}), Write((2,), 5, {"title": "Notorious"})]
    outcomes = sink.apply(target, writes)
    assert sorted(outcome.kind for outcome in outcomes) == ["applied", "rejected"]
    assert_matches(next(outcome.reason for outcome in outcomes if outcome.reason), "unique index.*title")


def test_a_key_that_cannot_be_encoded_is_rejected(sink: MongoSink) -> None:
    columns = (Column("name", "text", Kind.TEXT),)
    target = sink.target(Table(DATABASE, "by_name", columns, ("name",)), MongoTargetOptions())
    writes = [Write(("\ud800",), 5, None), Write(("\udfff",), 5, {}), Write(("ok",), 5, None)]
    assert [outcome.kind for outcome in sink.apply(target, writes)] == ["rejected", "rejected", "applied"]
    sink.drop(target)


# ── generations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def generation(url: str, number: int) -> tuple[MongoSink, Target]:
    sink = open_sink(url)
    sink.number = number
    return sink, sink.target(MOVIE, MongoTargetOptions())


def test_a_new_generation_is_built_beside_the_old_one_and_readers_are_led_to_it(
    mongodb: MongoStandIn, sink: MongoSink, target: Target, database: Database[dict[str, Any]]
) -> None:
    apply(sink, target, (1,), 5, {"n": "old"})
    apply(sink, target, (3,), 5, {"n": "old"})
    theirs = database["movie"].create_index("n", unique=False, sparse=True, name="by_n")
    (first, old), (second, new) = generation(mongodb.url, 1), generation(mongodb.url, 2)

    def read() -> dict[int, str]:
        """Read as the how-to page says."""
        led = database["delta_serving"].find_one({"_id": "movie"}) or {"collection": "movie"}
        return {one["_id"]: one["n"] for one in database[led["collection"]].find()}

    try:
        assert old[1:] == target[1:], "the first is where it always was"
        for one, of in ((first, old), (second, new)):
            one.prepare(of)
            one.prepare(of)  # a run begins anew
        index = database["movie.g2"].index_information()[theirs]
        assert (index["key"], index["sparse"]) == ([("n", 1)], True), "readers find as fast as before"
        first.truncate(old, 4)
        assert [stored and stored.version for stored in first.read(old, [(1,), (2,)])] == [5, None]
        assert second.newest_version(new) == 0, "the floor is its own, too"
        for number in (1, 2, 3):
            apply(second, new, (number,), 6, {"n": "new"})
        apply(second, new, (3,), 7, None)
        assert second.apply(new, [Write((3,), 6, {"n": "late"})]) == [STALE]
        apply(first, old, (3,), 7, None)
        assert read() == {1: "old"}
        second.lead_readers([new])
        second.lead_readers([new])  # again, by whoever was killed
        assert read() == {1: "new", 2: "new"}
        with pytest.raises(SinkRefused, match=r"leads readers from movie to movie\.g2"):
            sink.prepare(target)  # it lost its state, and would write where nobody looks
        apply(first, old, (4,), 8, {"n": "old"})
        first.lead_readers([old])
        assert read() == {1: "old", 4: "old"}, "the way back"
        sink.prepare(target)
        second.lead_readers([new])
        assert first.drop(old) == 2
        assert read() == {1: "new", 2: "new"}, "the pointer is not the first one's any more"
        assert second.drop(new) == 2
        assert database["delta_serving"].find_one() is None
        assert [name for name in database.list_collection_names() if name.startswith("movie")] == []
    finally:
        for one, of in ((first, old), (second, new)):
            one.drop(of)
            one.close()


def test_a_generation_has_indexes_of_its_own_once_it_is_there(
    mongodb: MongoStandIn, sink: MongoSink, target: Target, database: Database[dict[str, Any]]
) -> None:
    apply(sink, target, (1,), 5, {"n": 1})
    second, new = generation(mongodb.url, 2)
    try:
        second.prepare(new)
        apply(second, new, (1,), 5, {"n": 1})
        database["movie"].create_index("n", name="later")
        second.prepare(new)
        assert "later" not in database["movie.g2"].index_information(), "what is built is not changed behind one's back"
    finally:
        second.drop(new)
        second.close()


def test_no_table_is_written_to_where_readers_are_led(sink: MongoSink) -> None:
    with pytest.raises(UsageError, match="delta_serving is Delta's own"):
        sink.target(MOVIE, MongoTargetOptions(collection="delta_serving"))


# ── trouble ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tombstones_and_floors_survive_a_power_cut(mongodb: MongoStandIn, sink: MongoSink, target: Target) -> None:
    apply(sink, target, (1,), 7, None)
    apply(sink, target, (2,), 9, {"n": 9})
    sink.truncate(target, 5)
    mongodb.kill()
    mongodb.start()
    again = open_sink(mongodb.url)
    writes = [Write((1,), 6, {"n": 6}), Write((2,), 8, {"n": 8}), Write((3,), 4, {"n": 4})]
    assert again.apply(target, writes) == [STALE] * 3
    assert again.read(target, [(1,), (2,), (3,)]) == [Stored(7, None), Stored(9, {"n": 9}), None]
    again.close()


def test_a_server_that_is_gone_or_hangs_is_busy(mongodb: MongoStandIn, target: Target) -> None:
    sink = open_sink(mongodb.url, query="serverSelectionTimeoutMS=500&socketTimeoutMS=500&connectTimeoutMS=500")
    assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
    mongodb.freeze()
    with pytest.raises(SinkBusy, match=f"MongoDB at 127.0.0.1:{mongodb.port} cannot be reached"):
        apply(sink, target, (1,), 6, {"n": 6})
    mongodb.kill()
    for call in (
        lambda: apply(sink, target, (1,), 6, {"n": 6}),
        lambda: sink.read(target, [(1,)]),
        lambda: list(sink.scan(target)),
        lambda: sink.newest_version(target),
        lambda: sink.truncate(target, 3),
        lambda: sink.sweep(target),
        lambda: sink.prepare(target),
        lambda: sink.drop(target),
    ):
        with pytest.raises(SinkBusy):
            call()
    mongodb.start()

    def applied() -> bool:
        with contextlib.suppress(SinkBusy):  # the driver may not have looked again yet
            return apply(sink, target, (1,), 6, {"n": 6}) == APPLIED
        return False

    wait_until(applied, 60.0, "the server")
    sink.close()


def test_documents_of_others_are_a_problem(sink: MongoSink, target: Target, database: Database[dict[str, Any]]) -> None:
    database["movie"].insert_one({"_id": 1, "title": "Casablanca"})
    (problem,) = sink.check([target])
    assert problem.fatal
    assert_matches(str(problem), "sink docs: .*delta_contract.movie holds documents that Delta did not write")


def test_ids_that_others_made_are_no_key(sink: MongoSink, database: Database[dict[str, Any]]) -> None:
    """Somebody has put documents beside Delta's, after it had been checked that there were none."""
    columns = (Column("b", "text", Kind.TEXT), Column("a", "integer", Kind.INTEGER))
    target = sink.target(Table(DATABASE, "pair", columns, ("b", "a")), MongoTargetOptions())
    sink.drop(target)
    sink.prepare(target)
    apply(sink, target, ("x", 1), 5, {"n": 1})
    database["pair"].insert_many([{"_id": ObjectId()}, {"_id": 7}, {"_id": "text"}, {"_id": {"b": "x"}}])
    keys = [sink.key_of(target, id_) for batch in sink.scan_ids(target) for id_ in batch]
    assert sorted(keys, key=str) == [("x", 1), None, None, None, None]
    assert sink.newest_version(target) == 5
    assert sink.truncate(target, 6) == 1
    sink.drop(target)


def test_a_sweep_meets_an_id_of_another_number_type(
    sink: MongoSink, target: Target, database: Database[dict[str, Any]]
) -> None:
    """To MongoDB 1 and 1.0 are one `_id`: a column may have been an integer when the tombstone was written."""
    apply(sink, target, (1,), 6, None)
    database["movie"].insert_one({"_id": 1.0, "_version": 7})
    apply(sink, target, (2,), 6, None)
    database["movie"].insert_one({"_id": 2, "_version": 5})
    assert sink.sweep(target) == 1
    assert [one["_version"] for one in database["movie"].find()] == [7]


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text
