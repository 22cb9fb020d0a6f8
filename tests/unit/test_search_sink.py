"""What the search sink decides without a server."""

from __future__ import annotations

import decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from delta_sync.changes import STALE, Outcome, Write
from delta_sync.errors import SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.search import SearchOptions, SearchSink, SearchTargetOptions
from delta_sync.sinks.search_bulk import parts_of, verdict
from delta_sync.sinks.search_documents import bulk_entry, content_of
from delta_sync.sinks.search_indices import index_name, is_own_index
from delta_sync.sinks.search_link import brief, parse_url, reason_of, retry_after_s
from delta_sync.sinks.search_mapping import field_of
from delta_sync.tables import Column, Kind, Table

MOVIE = Table("public", "Movie", (Column("id", "int", Kind.INTEGER),), ("id",))

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)
FIELD_NAMES = st.text().filter(lambda name: not name.startswith("_"))


def sink(url: str = "http://search:9200", **options: object) -> SearchSink:
    return SearchSink("search", url, SearchOptions.model_validate(options), 3600)


@given(st.text(min_size=1, max_size=100), st.integers(0, 2**63 - 1), st.dictionaries(FIELD_NAMES, JSON_VALUES))
def test_an_upsert_is_an_action_and_the_document_with_its_version(id_: str, version: int, document: Any) -> None:
    entry = bulk_entry(Write((id_,), version, document), 0)
    assert isinstance(entry, bytes)
    assert entry.count(b"\n") == 2
    action, source = (orjson.loads(line) for line in entry.splitlines())
    assert action == {"index": {"_id": id_, "version": version, "version_type": "external_gte"}}
    assert source == {"_delta_version": version, **document}
    assert content_of(source) == document


def test_a_delete_is_a_tombstone_without_any_field_of_the_row() -> None:
    entry = bulk_entry(Write((1,), 5, None), 1700)
    assert isinstance(entry, bytes)
    source = orjson.loads(entry.splitlines()[1])
    assert source == {"_delta_version": 5, "_delta_deleted": True, "_delta_deleted_at": 1700}
    assert content_of(source) is None


def test_numbers_keep_their_digits() -> None:
    entry = bulk_entry(Write((1,), 5, {"n": decimal.Decimal("12345678901234567890.10")}), 0)
    assert isinstance(entry, bytes)
    assert b'"n":12345678901234567890.10' in entry


@pytest.mark.parametrize(
    "write",
    [
        Write(("",), 5, None),
        Write(("x" * 513,), 5, {}),
        Write(("ü" * 257,), 5, {}),
        Write(("\ud800",), 5, {}),
        Write((1,), -1, {}),
        Write((1,), 2**63, {}),
        Write((1,), 5, {"_version": 1}),
        Write((1,), 5, {"_source": 1}),
        Write((1,), 5, {"_delta_anything": 1}),
        Write((1,), 5, {"n": {1, object()}}),
    ],
)
def test_what_would_fail_a_whole_bulk_is_rejected(write: Write) -> None:
    entry = bulk_entry(write, 0)
    assert isinstance(entry, Outcome)
    assert entry.kind == "rejected"
    assert entry.reason


def test_a_text_or_an_inner_field_may_look_like_deltas_own() -> None:
    assert isinstance(bulk_entry(Write((1,), 5, {"text": '"_delta_x', "inner": {"_delta_x": 1}}), 0), bytes)


@given(st.lists(st.integers(1, 50)), st.integers(1, 100))
def test_parts_hold_everything_in_order_and_not_too_much(sizes: list[int], limit: int) -> None:
    entries = {number: b"x" * size for number, size in enumerate(sizes)}
    parts = list(parts_of(entries, limit))
    assert [item for part in parts for item in part.items()] == list(entries.items())
    assert all(len(part) == 1 or sum(map(len, part.values())) <= limit for part in parts)


URLS: list[tuple[str, dict[str, str], tuple[str, str | None, dict[str, str]]]] = [
    ("http://search:9200", {}, ("http://search:9200", None, {})),
    ("http://search:9200/", {}, ("http://search:9200", None, {})),
    ("https://search/movies", {}, ("https://search", "movies", {})),
    ("opensearch+https://[::1]:9200/movies", {}, ("https://[::1]:9200", "movies", {})),
    ("http://u:p%40@search", {}, ("http://search", None, {"Authorization": "Basic dTpwQA=="})),
    ("http://u@search", {"password": "p@"}, ("http://search", None, {"Authorization": "Basic dTpwQA=="})),
    ("http://search", {"api_key": "k"}, ("http://search", None, {"Authorization": "ApiKey k"})),
]


@pytest.mark.parametrize(("url", "options", "expected"), URLS)
def test_urls(url: str, options: dict[str, str], expected: tuple[str, str | None, dict[str, str]]) -> None:
    assert parse_url("search", url, SearchOptions(**options)) == expected  # type: ignore[arg-type]  # parametrised


@pytest.mark.parametrize(
    "url",
    [
        "http:///movies",
        "http://u:secret@search/a/b",
        "http://u:secret@search/a?b=c",
        "http://u:secret@search:port",
        "http://[",
    ],
)
def test_urls_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(UsageError, match="sink search: ") as caught:
        sink(url)
    assert "secret" not in str(caught.value)


def test_either_a_key_or_a_password() -> None:
    with pytest.raises(UsageError, match="either api_key"):
        sink("http://u:secret@search", api_key="k")


@pytest.mark.parametrize(
    ("url", "option", "expected"),
    [
        ("http://search", None, "public.movie"),
        ("http://search/films", None, "films"),
        ("http://search/films", "reels", "reels"),
    ],
)
def test_the_index_is_the_options_or_the_urls_or_the_tables(url: str, option: str | None, expected: str) -> None:
    assert sink(url).target(MOVIE, SearchTargetOptions(index=option)).place == expected


@pytest.mark.parametrize("index", ["Movies", "_movies", "a b", "a*", "-a", "x" * 251, ".."])
def test_names_that_no_index_can_have(index: str) -> None:
    with pytest.raises(UsageError, match="set `index`"):
        sink().target(MOVIE, SearchTargetOptions(index=index))


@given(st.text(max_size=50))
def test_every_table_has_an_index_name_that_stays_as_it_is(text: str) -> None:
    assert index_name(index_name(text)) == index_name(text)


def test_only_numbered_indices_are_ours() -> None:
    assert is_own_index("a.b", "a.b-1")
    assert not any(is_own_index("a.b", index) for index in ("axb-1", "a.b", "a.b-delta", "a.b-1-old", "other-1"))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (Column("c", "text", Kind.TEXT), "text"),
        (Column("c", "character varying(20)", Kind.TEXT), "text"),
        (Column("c", "varchar(20)[]", Kind.TEXT, dimensions=1), "text"),
        (Column("c", "inet", Kind.TEXT), "keyword"),
        (Column("c", "mood", Kind.TEXT), "keyword"),
        (Column("c", "int4range", Kind.TEXT), "keyword"),
        (Column("c", "smallint", Kind.INTEGER), "long"),
        (Column("c", "numeric", Kind.DECIMAL), "double"),
        (Column("c", "numeric(18,0)", Kind.DECIMAL, precision=18, scale=0), "long"),
        (Column("c", "numeric(19,0)", Kind.DECIMAL, precision=19, scale=0), "double"),
        (Column("c", "numeric(15,-4)", Kind.DECIMAL, precision=15, scale=-4), "double"),
        (Column("c", "numeric(15,2)", Kind.DECIMAL, precision=15, scale=2), "scaled_float"),
        (Column("c", "numeric(16,2)", Kind.DECIMAL, precision=16, scale=2), "double"),
        (Column("c", "jsonb", Kind.JSON), "object"),
        (Column("c", "uuid", Kind.UUID), "keyword"),
    ],
)
def test_fields(column: Column, expected: str) -> None:
    assert field_of(column)["type"] == expected


def test_every_kind_has_a_field() -> None:
    assert all(field_of(Column("c", "t", kind))["type"] for kind in Kind)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "must hold an object")]
)
def test_mappings_that_cannot_be_read(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "mapping.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        sink().target(MOVIE, SearchTargetOptions(mapping=str(file)))


def test_a_bare_mapping_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "mapping.json"
    file.write_text('{"properties": {"a": {"type": "ip"}}}')
    place = sink().target(MOVIE, SearchTargetOptions(mapping=str(file))).settings
    assert place.mappings["properties"]["a"] == {"type": "ip"}
    assert place.mappings["properties"]["_delta_version"] == {"type": "long"}


BLOCK = {"type": "cluster_block_exception", "reason": "index [movies-1] blocked by: [FORBIDDEN/12/index read-only]"}


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (200, None, None),
        (201, None, None),
        (404, None, None),
        (409, {"type": "version_conflict_engine_exception"}, STALE),
        (
            400,
            {"type": "mapper_parsing_exception", "reason": "no"},
            Outcome("rejected", "mapper_parsing_exception: no"),
        ),
        (429, {"type": "es_rejected_execution_exception"}, SinkBusy),
        (503, {"type": "unavailable_shards_exception"}, SinkBusy),
        (403, BLOCK, SinkBusy),
        (403, {"type": "security_exception"}, SinkRefused),
        (404, {"type": "index_not_found_exception"}, SinkRefused),
    ],
)
def test_verdicts(status: int, error: object, expected: object) -> None:
    found = verdict(status, error)
    if isinstance(expected, type):
        assert isinstance(found, expected)
    else:
        assert found == expected


def test_reasons_name_their_causes() -> None:
    error = {"type": "a", "reason": "b", "caused_by": {"type": "c", "caused_by": {"reason": "d"}}}
    assert reason_of(error) == "a: b; c; d"
    assert reason_of("text") == "text"


def test_retry_after() -> None:
    assert [retry_after_s(header) for header in ("7", None, "Wed, 21 Oct 2015 07:28:00 GMT")] == [7.0, None, None]


def test_brief_sentences() -> None:
    refused = "HTTPConnectionPool(…): Max retries (Caused by …: [Errno 111] Connection refused'))"
    assert brief(requests.ConnectionError(refused)) == "Connection refused"
    assert brief(requests.ReadTimeout("…")) == "no answer within 60.0 s"
    assert brief(requests.ConnectTimeout("…")) == "no connection within 5.0 s"
    closed = "('…', RemoteDisconnected('Remote end closed connection without response'))"
    assert brief(requests.ConnectionError(closed)) == "Remote end closed connection without response"
    assert brief(requests.ConnectionError("?")) == "ConnectionError"


@pytest.mark.parametrize(
    ("url", "options", "what"),
    [
        ("https://127.0.0.1:1", {"ca_file": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ("http://a..b:1", {}, "HTTP does not take"),
        ("http://*:1", {}, "HTTP does not take"),
        ("http://127.0.0.1:1", {"api_key": "ключ"}, "HTTP does not take"),
        ("http://127.0.0.1:1", {"api_key": "key\n"}, "HTTP does not take"),
    ],
)
def test_what_can_never_be_sent_is_a_problem(url: str, options: dict[str, str], what: str) -> None:
    """Not a traceback, and nothing to wait for."""
    (problem,) = sink(url, **options).check([])
    assert what in problem.what
    assert "key" not in problem.what
    with pytest.raises(SinkRefused):
        sink(url, **options)._link.product()
