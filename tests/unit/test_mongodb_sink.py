"""What the MongoDB sink decides without a server."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from contextlib import AbstractContextManager
from typing import Any

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo import ReplaceOne, UpdateOne
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    OperationFailure,
    ServerSelectionTimeoutError,
)

from delta_sync.changes import STALE
from delta_sync.errors import SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.mongodb import MongoOptions, MongoSink, MongoTargetOptions
from delta_sync.sinks.mongodb_bulk import Operation, send
from delta_sync.sinks.mongodb_collections import missing_actions
from delta_sync.sinks.mongodb_documents import CODEC, bson_decimal, bson_id, key_of
from delta_sync.sinks.mongodb_link import client_options, parse_path
from delta_sync.tables import Column, Kind, Table, key_text

NUMBER = Table("public", "by_number", (Column("n", "numeric", Kind.DECIMAL),), ("n",))
PAIR = Table("public", "pair", (Column("b", "text", Kind.TEXT), Column("a", "text", Kind.TEXT)), ("b", "a"))


def sink(url: str = "mongodb://delta:secret@docs/studio") -> MongoSink:
    return MongoSink("docs", url, MongoOptions(), 3600)


KEY_PARTS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.text(),
    st.booleans(),
    st.floats(allow_nan=False),
    st.binary(),
    st.decimals(allow_nan=False, places=20),
    st.dates(),
    st.datetimes(timezones=st.just(dt.UTC)),
    st.uuids(),
)


def through_bson(id_: object) -> Any:
    encoded = bson.encode({"_id": id_}, codec_options=CODEC)
    return bson.BSON(encoded).decode(CODEC)["_id"]


@given(KEY_PARTS)
def test_an_id_comes_back_from_bson_as_a_key_of_the_same_text(value: object) -> None:
    assert key_text(key_of(NUMBER, through_bson(bson_id(NUMBER, (value,))))) == key_text((value,))


def test_a_key_of_several_columns_is_a_document_in_the_keys_order() -> None:
    assert list(dict(bson_id(PAIR, ("x", 1))).items()) == [("b", "x"), ("a", 1)]  # type: ignore[call-overload]  # an embedded id
    assert key_of(PAIR, {"b": "x", "a": 1}) == ("x", 1)


def test_equal_decimals_have_equal_ids() -> None:
    one, other = (bson_id(NUMBER, (decimal.Decimal(text),)) for text in ("1.0", "1.00"))
    assert bson.encode({"_id": one}) == bson.encode({"_id": other})


def test_keys_that_differ_by_microseconds_have_different_ids() -> None:
    first = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    assert bson_id(NUMBER, (first,)) != bson_id(NUMBER, (first + dt.timedelta(microseconds=1),))


def test_decimals_beyond_decimal128_are_text() -> None:
    assert bson_decimal(decimal.Decimal("9" * 34)) == bson.Decimal128("9" * 34)
    assert bson_decimal(decimal.Decimal("9" * 35)) == "9" * 35
    assert bson_decimal(decimal.Decimal("1e-6177")) == "0." + "0" * 6176 + "1"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mongodb://docs/studio", ("studio", None)),
        ("mongodb://docs/studio.movies", ("studio", "movies")),
        ("mongodb://u:p@a:1,b:2/studio.old.movies?replicaSet=rs0", ("studio", "old.movies")),
        ("mongodb+srv://docs.example.com/studio", ("studio", None)),
    ],
)
def test_the_path_names_database_and_collection(url: str, expected: tuple[str, str | None]) -> None:
    assert parse_path("docs", url) == expected


@pytest.mark.parametrize("url", ["mongodb://u:secret@docs", "mongodb://u:secret@docs/", "mongodb://u:secret@docs/a b"])
def test_a_url_without_database_is_refused_without_quoting_the_password(url: str) -> None:
    with pytest.raises(UsageError, match="must name a database, such as mongodb://docs/shop") as caught:
        parse_path("docs", url)
    assert "secret" not in str(caught.value)


def test_the_write_concern_is_not_taken_from_the_url() -> None:
    with pytest.raises(UsageError, match="say `write_concern`"):
        parse_path("docs", "mongodb://docs/studio?w=1")


@pytest.mark.parametrize(
    ("url", "option", "expected"),
    [
        ("mongodb://docs/studio", None, "studio.by_number"),
        ("mongodb://docs/studio.movies", None, "studio.movies"),
        ("mongodb://docs/studio.movies", "films", "studio.films"),
    ],
)
def test_the_collection_is_the_options_or_the_urls_or_the_tables(url: str, option: str | None, expected: str) -> None:
    assert sink(url).target(NUMBER, MongoTargetOptions(collection=option)).place == expected


@pytest.mark.parametrize("collection", ["a$b", "system.users", ".a", "a..b", "a.", "x" * 250])
def test_names_that_mongodb_does_not_allow(collection: str) -> None:
    with pytest.raises(UsageError, match="set `collection`"):
        sink().target(NUMBER, MongoTargetOptions(collection=collection))


def test_the_url_has_the_last_word_on_the_drivers_options() -> None:
    options = client_options("mongodb://docs/studio?SocketTimeoutMS=7", MongoOptions(password="p"))
    assert options["password"] == "p"
    assert options["serverSelectionTimeoutMS"] == 5000
    assert "socketTimeoutMS" not in options


def test_privileges_are_needed_on_both_collections() -> None:
    actions = ["find", "insert", "update", "remove", "createIndex", "dropIndex"]
    everywhere = [{"resource": {"db": "studio", "collection": ""}, "actions": actions}]
    names = ("movies", "movies.delta_tombstones")
    assert missing_actions(everywhere, "studio", names) == []
    assert missing_actions(everywhere, "other", names) == ["createIndex", "find", "insert", "remove", "update"]
    one = [{"resource": {"db": "studio", "collection": "movies"}, "actions": actions}]
    rest = [{"resource": {"db": "", "collection": ""}, "actions": ["find"]}]
    assert missing_actions([*one, *rest], "studio", names) == ["createIndex", "insert", "remove", "update"]
    assert missing_actions([{"resource": {"anyResource": True}, "actions": actions}], "studio", names) == []


def typed_errors() -> AbstractContextManager[None]:
    return sink()._link.typed_errors()  # pyright: ignore[reportPrivateUsage] -- every call to the server goes through it


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (AutoReconnect("connection closed"), SinkBusy),
        (ServerSelectionTimeoutError("no primary, Timeout: 5s, Topology Description: <…>"), SinkBusy),
        (OperationFailure("not primary", 10107), SinkBusy),
        (OperationFailure("operation exceeded time limit", 50), SinkBusy),
        (OperationFailure("Authentication failed.", 18), SinkRefused),
        (OperationFailure("not authorized on studio", 13), SinkRefused),
        (OperationFailure("something new", 99999), SinkRefused),
        (ConfigurationError("The resolution lifetime expired"), SinkBusy),
        (ConfigurationError("this server is too old"), SinkRefused),
    ],
)
def test_errors_are_busy_or_refused(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected, match=r"^MongoDB at docs[ :]") as caught, typed_errors():
        raise raised
    assert "secret" not in str(caught.value)
    assert "Topology" not in str(caught.value)


def test_uuids_are_of_subtype_4() -> None:
    assert through_bson(bson_id(NUMBER, (uuid.UUID(int=7),))) == uuid.UUID(int=7)  # others come back as Binary


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("tls=true&tlsCAFile=/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("authMechanism=MONGODB-X509&authSource=studio", "authentication source must be"),
    ],
)
def test_options_of_the_url_that_the_driver_does_not_take_are_a_problem(query: str, what: str) -> None:
    (problem,) = sink(f"mongodb://docs/studio?{query}").check([])
    assert what in problem.what
    assert not problem.fix  # it says itself what is to be done; user and roles are not at fault


class Racing:
    """A collection in which some upserts of each bulk meet another one: what a stand-in cannot be brought to say."""

    def __init__(self, *losers: set[int]) -> None:
        self.losers = list(losers)  # places in the first bulk, in the second, …
        self.sent: list[int] = []

    def bulk_write(self, operations: list[Operation], ordered: bool) -> None:
        assert not ordered
        self.sent.append(len(operations))
        errors = [{"index": n, "code": 11000, "keyPattern": {"_id": 1}} for n in sorted(self.losers.pop(0))]
        if errors:
            raise BulkWriteError({"writeErrors": errors})


def sent(collection: Any, operation: Operation) -> Any:
    return send(sink()._link, collection, dict.fromkeys((4, 5, 6), operation), lambda _: {})


def test_an_upsert_that_another_one_met_is_sent_once_more() -> None:
    """It may be the newer one of the two. Met again, there is a document that its filter does not find: a newer one."""
    upsert = ReplaceOne({"_id": 1}, {"n": 1}, upsert=True)
    once, twice = Racing({1, 2}, set()), Racing({0, 2}, {1})
    assert (sent(once, upsert), once.sent) == ({}, [3, 2])
    assert (sent(twice, upsert), twice.sent) == ({6: STALE}, [3, 2])


def test_a_tombstone_that_others_met_twice_is_busy() -> None:
    """Its filter has no version, so it is there, and was not raised."""
    with pytest.raises(SinkBusy, match="MongoDB at docs: two writers of one tombstone met twice"):
        sent(Racing({0}, {0}), UpdateOne({"_id": 1}, {"$max": {"version": 5}}, upsert=True))
