"""The search sink keeps the contract; and what is the search stores' own."""

from __future__ import annotations

import decimal
import http.server
import math
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import requests

from delta_sync.changes import APPLIED, STALE, Outcome, Write
from delta_sync.errors import SinkBusy, SinkRefused
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.search import SearchOptions, SearchSink, SearchTargetOptions
from delta_sync.sinks.search_bulk import BULK_BYTES, Bulks
from delta_sync.sinks.search_documents import bulk_entry, delete_entry
from delta_sync.sinks.search_indices import Place
from delta_sync.tables import Column, Kind, Table, key_text
from delta_sync.testing.contract import (
    MOVIE,
    PAGE,
    AnySink,
    Died,
    SecondStep,
    SinkContract,
    apply,
    dying,
    scanned,
    storm,
)
from delta_sync.testing.servers import OpenSearch
from delta_sync.values import Interval

TTL_S = 3600
INDEX = "delta_contract.movie"
SECOND_STEP = SecondStep("_floor", frozenset({"floor"}), looks_first=False)  # the index compares the rest by itself


def open_sink(url: str, cls: Callable[..., SearchSink] = SearchSink, **options: object) -> SearchSink:
    return cls("search", url, SearchOptions.model_validate(options), TTL_S)


@contextmanager
def place(sink: SearchSink, table: Table = MOVIE, **options: object) -> Generator[Target]:
    target = sink.target(table, SearchTargetOptions.model_validate(options))
    sink.drop(target)
    sink.prepare(target)
    yield target
    sink.drop(target)


@pytest.fixture
def sink(opensearch: OpenSearch) -> Iterator[SearchSink]:
    sink = open_sink(opensearch.url)
    yield sink
    sink.close()


@pytest.fixture
def target(sink: SearchSink) -> Iterator[Target]:
    with place(sink) as target:
        yield target


class Store:
    """The store, asked directly."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, path: str, body: object = None) -> Any:
        reply = requests.request(method, self.url + path, json=body, timeout=60)
        assert reply.ok, reply.text
        return reply.json()

    def found(self, index: str, query: Mapping[str, object]) -> set[str]:
        """Return the ids that a search finds."""
        self.ask("POST", f"/{index}/_refresh")
        found = self.ask("POST", f"/{index}/_search", {"query": query, "size": 100})
        return {hit["_id"] for hit in found["hits"]["hits"]}


EVERYTHING: Mapping[str, object] = {"match_all": {}}


@pytest.fixture
def store(opensearch: OpenSearch) -> Store:
    return Store(opensearch.url)


class TestOpenSearch(SinkContract):
    second_step = SECOND_STEP
    storm_seeds = range(4)

    @pytest.fixture
    def sink(self, opensearch: OpenSearch) -> Iterator[AnySink]:
        sink = open_sink(opensearch.url)
        yield sink
        sink.close()

    @pytest.fixture
    def unreachable(self) -> Iterator[AnySink]:
        sink = open_sink("http://127.0.0.1:1")
        yield sink
        sink.close()


# ── the contract notices when the rules are broken ───────────────────────────────────────────────────────────────────


class VersionsOff(SearchSink):
    """The last write to arrive wins. (The version is in the document all the same.)"""

    def _entry(self, write: Write, now_ms: int) -> bytes | Outcome:
        entry = super()._entry(write, now_ms)
        assert isinstance(entry, bytes)
        return re.sub(rb',"version":\d+,"version_type":"external_gte"', b"", entry, count=1)


class HardDeletes(SearchSink):
    """Deletes leave no tombstone, and the store forgets their versions at once instead of after a minute."""

    def prepare(self, target: Target) -> None:
        settings = {**target.settings.settings, "index.gc_deletes": "0ms"}
        super().prepare(target._replace(settings=target.settings._replace(settings=settings)))

    def _entry(self, write: Write, now_ms: int) -> bytes | Outcome:
        return bulk_entry(write, now_ms) if write.document else delete_entry(key_text(write.key), write.version)


class FloorOff(SearchSink):
    """An upsert does not look whether a truncate came meanwhile."""

    def _obey_floor(self, place: Place, written: Sequence[int], writes: Sequence[Write]) -> dict[int, Outcome]:
        return {}


class EndStateOnly(SinkContract):
    """Reads that go back would be noticed earlier, and hide whether a wrong end is."""

    __test__ = False
    reads_never_go_back = False


@pytest.mark.parametrize(("broken", "truncate"), [(VersionsOff, False), (HardDeletes, False), (FloorOff, True)])
def test_storms_find_a_sink_that_breaks_the_rule(
    opensearch: OpenSearch, broken: type[SearchSink], truncate: bool
) -> None:
    sink = open_sink(opensearch.url, broken)
    contract = EndStateOnly()

    def storms(target: Target) -> None:
        for seed in range(10):
            storm(contract, sink, target, seed, truncate=truncate)

    with place(sink) as target, pytest.raises(AssertionError, match=r"seed \d+: \d+ keys are wrong"):
        storms(target)
    sink.close()


# ── what users see ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_searches_do_not_find_deleted_rows(sink: SearchSink, target: Target, store: Store) -> None:
    sink.apply(target, [Write((n,), 5, {"title": "Casablanca"}) for n in range(3)])
    apply(sink, target, (1,), 6, None)
    assert store.found(INDEX, {"match": {"title": "casablanca"}}) == {"0", "2"}
    assert store.found(INDEX, EVERYTHING) == {"0", "2"}
    assert store.found(f"{INDEX}-1", EVERYTHING) == {"0", "1", "2"}


def test_what_a_truncate_removes_is_gone_for_good(sink: SearchSink, target: Target, store: Store) -> None:
    sink.apply(target, [Write((n,), 5, {"n": n}) for n in range(3)])
    sink.truncate(target, 6)
    apply(sink, target, (1,), 4, {"n": 1})
    assert store.found(f"{INDEX}-1", EVERYTHING) == set()


@pytest.mark.parametrize("refresh", ["wait_for", "true", True])
def test_refresh_makes_writes_findable(opensearch: OpenSearch, target: Target, refresh: object) -> None:
    sink = open_sink(opensearch.url, refresh=refresh)
    apply(sink, target, (1,), 5, {"n": 1})
    found = requests.get(f"{opensearch.url}/{INDEX}/_count", timeout=10).json()
    assert found["count"] == 1
    sink.close()


def test_compressed_requests(opensearch: OpenSearch, target: Target) -> None:
    sink = open_sink(opensearch.url, compress=True)
    assert apply(sink, target, (1,), 5, {"title": "Casablanca"}) == APPLIED
    assert sink.read(target, [(1,)]) == [Stored(5, {"title": "Casablanca"})]
    sink.close()


def test_a_bulk_is_cut_where_it_gets_too_large(opensearch: OpenSearch, target: Target) -> None:
    sink = open_sink(opensearch.url, max_bulk_bytes=2000)
    apply(sink, target, (7,), 6, {"n": 7})
    outcomes = sink.apply(target, [Write((n,), 5, {"text": "x" * n * 40}) for n in range(60)])
    assert outcomes == [STALE if n == 7 else APPLIED for n in range(60)]
    sink.close()


# ── the mapping ──────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = Table(
    "delta_contract",
    "wide",
    (
        Column("id", "bigint", Kind.INTEGER),
        Column("title", "text", Kind.TEXT),
        Column("address", "inet", Kind.TEXT),
        Column("day", "date", Kind.DATE),
        Column("at", "timestamptz", Kind.TIMESTAMP_TZ),
        Column("price", "numeric(10,2)", Kind.DECIMAL, precision=10, scale=2),
        Column("any_number", "numeric", Kind.DECIMAL),
        Column("ratio", "double precision", Kind.FLOAT),
        Column("extra", "jsonb", Kind.JSON),
        Column("labels", "hstore", Kind.MAP),
        Column("tags", "text[]", Kind.TEXT, dimensions=1),
        Column("image", "bytea", Kind.BYTES),
        Column("period", "interval", Kind.INTERVAL),
    ),
    ("id",),
)


def test_no_row_is_rejected_because_of_the_mapping_of_its_columns(sink: SearchSink, store: Store) -> None:
    rows: list[dict[str, object]] = [
        {
            "title": "The Third Man",
            "address": "10.0.0.0/8",
            "day": "2024-02-29",
            "price": decimal.Decimal("19.99"),
            "extra": {"a": 1},
            "labels": {"a": "b"},
            "tags": ["noir"],
            "image": b"\x00",
            "period": Interval(1, 2, 3),
        },
        {"title": "x" * 100_000, "address": "y" * 40_000, "day": "infinity", "at": "-infinity", "extra": [1, "a"]},
        {"any_number": decimal.Decimal("1e400"), "ratio": math.nan, "price": decimal.Decimal("NaN"), "extra": 7},
        {"any_number": decimal.Decimal("12345678901234567890.123456789"), "extra": {"a": {"b": [None]}}},
        {
            "extra": {str(n): n for n in range(2000)},
            "labels": {str(n): None for n in range(2000)},
            "day": "0044-03-15 BC",
        },
        {"price": "about ten", "day": 17, "ratio": "much"},
    ]
    with place(sink, WIDE) as target:
        outcomes = sink.apply(target, [Write((n,), 5, row) for n, row in enumerate(rows)])
        assert outcomes == [APPLIED] * len(rows)
        index = target.place
        assert store.found(index, {"match": {"title": "third"}}) == {"0"}
        assert store.found(index, {"term": {"title.keyword": "The Third Man"}}) == {"0"}
        assert store.found(index, {"term": {"address": "10.0.0.0/8"}}) == {"0"}
        assert store.found(index, {"range": {"day": {"gte": "2024-02-01", "lt": "2024-03-01"}}}) == {"0"}
        assert store.found(index, {"range": {"price": {"gte": 19.99, "lt": 20}}}) == {"0"}
        assert store.found(index, {"range": {"any_number": {"gte": 1e19}}}) == {"3"}
        source = requests.get(f"{store.url}/{index}/_doc/3", timeout=10).text
        assert '"any_number":12345678901234567890.123456789' in source


def test_a_fraction_is_found_although_the_first_value_was_whole(sink: SearchSink, target: Target, store: Store) -> None:
    apply(sink, target, (1,), 5, {"score": 4})
    apply(sink, target, (2,), 5, {"score": 4.5})
    assert store.found(INDEX, {"range": {"score": {"gt": 4}}}) == {"2"}


def test_a_column_that_the_table_got_later_is_mapped(sink: SearchSink, store: Store) -> None:
    narrow = Table("delta_contract", "wide", WIDE.columns[:1], ("id",))
    with place(sink, narrow):
        sink.prepare(sink.target(WIDE, SearchTargetOptions()))
        mapping = store.ask("GET", "/delta_contract.wide/_mapping")["delta_contract.wide-1"]["mappings"]
        assert mapping["properties"]["price"] == {"type": "scaled_float", "scaling_factor": 100.0}


def test_a_mapping_of_ones_own(sink: SearchSink, store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mapping.json"
    mapping = {"dynamic": False, "properties": {"title": {"type": "keyword"}}}
    file.write_bytes(orjson.dumps({"mappings": mapping, "settings": {"index.refresh_interval": "7s"}}))
    with place(sink, index="mine", mapping=str(file), shards=2, replicas=0) as target:
        assert target.place == "mine"
        about = store.ask("GET", "/mine?flat_settings=true")["mine-1"]
        assert about["mappings"]["properties"].keys() == {
            "title",
            "_delta_version",
            "_delta_deleted",
            "_delta_deleted_at",
        }
        assert about["mappings"]["dynamic"] == "false"
        assert about["settings"]["index.refresh_interval"] == "7s"
        assert about["settings"]["index.number_of_shards"] == "2"
        writes = [Write((n,), 5 + n % 3, {"title": "t", "other": {"n": n}}) for n in range(5000)]
        assert sink.apply(target, writes) == [APPLIED] * 5000
        assert scanned(sink, target) == {str(n): 5 + n % 3 for n in range(5000)}  # from both shards


# ── tombstones ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tombstones_and_floors_survive_a_restart(opensearch: OpenSearch, sink: SearchSink, store: Store) -> None:
    with place(sink) as target:
        apply(sink, target, (1,), 7, None)
        apply(sink, target, (2,), 9, {"n": 9})
        sink.truncate(target, 5)
        store.ask("POST", f"/{INDEX}-1/_flush")
        opensearch.restart()
        again = open_sink(opensearch.url)
        writes = [Write((1,), 6, {"n": 6}), Write((2,), 8, {"n": 8}), Write((3,), 4, {"n": 4})]
        assert again.apply(target, writes) == [STALE] * 3
        assert again.read(target, [(1,), (2,), (3,)]) == [Stored(7, None), Stored(9, {"n": 9}), None]
        again.close()


def test_expired_tombstones_are_swept(opensearch: OpenSearch, store: Store) -> None:
    now_s = 1_700_000_000.0
    sink = SearchSink("search", opensearch.url, SearchOptions(), TTL_S, now=lambda: now_s)
    with place(sink) as target:
        apply(sink, target, (1,), 5, None)
        apply(sink, target, (2,), 5, {"n": 2})
        now_s += 100
        apply(sink, target, (3,), 5, None)
        now_s += TTL_S - 50
        assert sink.sweep(target) == 1
        assert sink.sweep(target) == 0
        assert store.found(f"{INDEX}-1", EVERYTHING) == {"2", "3"}
        assert apply(sink, target, (3,), 4, {"n": 3}) == STALE
    sink.close()


def test_a_sweep_spares_a_row_that_came_back(opensearch: OpenSearch) -> None:
    now_s = 1_700_000_000.0

    class Slow(SearchSink):
        """A row comes back while a sweep is about to delete its tombstone."""

        def _delete(self, index: str, items: Sequence[tuple[str, int]]) -> int:
            if items[0][1] == 5:
                apply(other, target, (1,), 6, {"n": 6})
            return super()._delete(index, items)

    sink = Slow("search", opensearch.url, SearchOptions(), TTL_S, now=lambda: now_s)
    other = open_sink(opensearch.url)
    with place(sink) as target:
        apply(sink, target, (1,), 5, None)
        now_s += TTL_S + 1
        assert sink.sweep(target) == 0
        assert sink.read(target, [(1,)]) == [Stored(6, {"n": 6})]
    sink.close()
    other.close()


@pytest.mark.parametrize("recent_s", [None, 600.0])
def test_a_row_that_comes_back_wins_against_a_sweep_below_the_floor(
    opensearch: OpenSearch, sink: SearchSink, target: Target, recent_s: float | None
) -> None:
    class Slow(SearchSink):
        """A row comes back when a sweep has found its old document, and is about to delete it."""

        def _delete(self, index: str, items: Sequence[tuple[str, int]]) -> int:
            assert [id_ for id_, _ in items] == ["1"]
            assert apply(sink, target, (1,), 6, {"n": 6}) == APPLIED
            return super()._delete(index, items)

    with dying(sink, SECOND_STEP, lambda: sink.truncate(target, 6)), pytest.raises(Died):
        apply(sink, target, (1,), 5, {"n": 5})
    slow = open_sink(opensearch.url, Slow)
    assert slow.sweep(target, recent_s) == 0
    assert sink.read(target, [(1,)]) == [Stored(6, {"n": 6})]
    slow.close()


# ── what is rejected ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"n": 2**64}, "cannot be written as JSON"),
        ({"_id": 8}, "the field _id is the store's own"),
        ({"_delta_version": 8}, "_delta_version does"),
        ({"title": "a", "cast": "nobody"}, "mapper_parsing_exception.*cast"),
        ({"": 1}, "field name cannot be an empty string"),
    ],
    ids=["int", "id", "own", "conflict", "name"],
)
def test_rejected(sink: SearchSink, target: Target, document: dict[str, object], reason: str) -> None:
    apply(sink, target, (1,), 4, {"cast": {"Rick": "Bogart"}})
    writes = [Write((1,), 5, {"n": 1}), Write((2,), 5, document), Write((3,), 5, None), Write((4,), 5, {"n": 4})]
    outcomes = sink.apply(target, writes)
    assert [outcome.kind for outcome in outcomes] == ["applied", "rejected", "applied", "applied"]
    assert re.search(reason, outcomes[1].reason), outcomes[1].reason
    assert [found and found.version for found in sink.read(target, [(1,), (2,), (3,), (4,)])] == [5, None, 5, 5]


def test_ids_that_are_too_long_or_empty_are_rejected(sink: SearchSink) -> None:
    keys = ["a", "", "x" * 512, "ü" * 257, "b"]
    with place(sink, PAGE) as target:
        outcomes = sink.apply(target, [Write((key,), 5, {"n": 1}) for key in keys])
        assert [outcome.kind for outcome in outcomes] == ["applied", "rejected", "applied", "rejected", "applied"]
        assert [found is not None for found in sink.read(target, [(key,) for key in keys])] == [
            outcome == APPLIED for outcome in outcomes
        ]


def test_one_item_that_spoils_a_whole_bulk_is_found(opensearch: OpenSearch) -> None:
    class Spoiled(SearchSink):
        def _entry(self, write: Write, now_ms: int) -> bytes | Outcome:
            if write.key[0] in spoiled:
                # A longer id than allowed fails the request, and the reply names no item.
                return b'{"index":{"_id":"%b"}}\n{}\n' % (b"x" * 600)
            return super()._entry(write, now_ms)

    spoiled = {3, 17, 18}
    sink = open_sink(opensearch.url, Spoiled)
    with place(sink) as target:
        outcomes = sink.apply(target, [Write((n,), 5, {"n": n}) for n in range(40)])
        assert [n for n, outcome in enumerate(outcomes) if outcome.kind == "rejected"] == sorted(spoiled)
        assert len(scanned(sink, target)) == 37
    sink.close()


# ── trouble ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_store_that_is_gone_or_hangs_is_busy(opensearch: OpenSearch, sink: SearchSink, target: Target) -> None:
    assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
    opensearch.kill()
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
        with pytest.raises(SinkBusy, match=f"at 127.0.0.1:{opensearch.port} cannot be reached: Connection refused"):
            call()
    opensearch.start()
    assert apply(sink, target, (1,), 6, {"n": 6}) == APPLIED


def test_an_index_that_is_gone_is_not_made_anew_by_a_write(sink: SearchSink, store: Store) -> None:
    with place(sink) as target:
        store.ask("DELETE", f"/{INDEX}-1")
        for call in (
            lambda: apply(sink, target, (1,), 6, {"n": 6}),
            lambda: sink.read(target, [(1,)]),
            lambda: list(sink.scan(target)),
        ):
            with pytest.raises(SinkRefused, match=INDEX):
                call()
        assert requests.get(f"{store.url}/{INDEX}", timeout=10).status_code == 404


def test_a_full_disk_is_busy(opensearch: OpenSearch, target: Target, store: Store) -> None:
    pauses_s: list[float] = []
    sink = SearchSink("search", opensearch.url, SearchOptions(), TTL_S, sleep=pauses_s.append)
    block = "index.blocks.read_only_allow_delete"  # what the store itself sets at the flood stage
    store.ask("PUT", f"/{INDEX}-1/_settings", {block: True})
    try:
        with pytest.raises(SinkBusy, match="too busy for 1 of 1 writes: cluster_block_exception"):
            apply(sink, target, (1,), 6, {"n": 6})
    finally:
        store.ask("PUT", f"/{INDEX}-1/_settings", {block: None})
    assert pauses_s == [0.2, 0.4, 0.8]
    assert apply(sink, target, (1,), 6, {"n": 6}) == APPLIED
    sink.close()


def test_an_index_of_that_name_is_a_problem(sink: SearchSink, store: Store) -> None:
    target = sink.target(MOVIE, SearchTargetOptions(index="taken"))
    store.ask("PUT", "/taken")
    (problem,) = sink.check([target])
    assert problem.fatal
    assert "taken is an index, where Delta needs the name for an alias" in str(problem)
    with pytest.raises(SinkRefused, match="taken is an index"):
        sink.prepare(target)
    assert sink.drop(target) == 0
    store.ask("DELETE", "/taken")  # `drop` left it alone


def test_an_alias_of_others_is_a_problem(sink: SearchSink, store: Store) -> None:
    target = sink.target(MOVIE, SearchTargetOptions(index="taken"))
    store.ask("PUT", "/others", {"aliases": {"taken": {}}})
    (problem,) = sink.check([target])
    assert "taken is an alias of others, which Delta did not create" in str(problem)
    assert sink.drop(target) == 0
    store.ask("DELETE", "/others")


# ── generations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def generation(url: str, number: int) -> tuple[SearchSink, Target]:
    sink = open_sink(url)
    sink.number = number
    return sink, sink.target(MOVIE, SearchTargetOptions())


def test_a_new_generation_is_built_beside_the_old_one_and_takes_over_in_one_step(
    opensearch: OpenSearch, sink: SearchSink, target: Target, store: Store
) -> None:
    apply(sink, target, (1,), 5, {"n": "old"})
    apply(sink, target, (3,), 5, {"n": "old"})
    (first, old), (second, new) = generation(opensearch.url, 1), generation(opensearch.url, 2)
    try:
        for one, of in ((first, old), (second, new)):
            one.prepare(of)
            one.prepare(of)  # a run begins anew
        first.truncate(old, 4)
        assert [stored and stored.version for stored in first.read(old, [(1,), (2,)])] == [5, None]
        assert second.newest_version(new) == 0, "the floor is its own, too"
        # Both are written to; readers see the one alone.
        for number in (1, 2, 3):
            apply(second, new, (number,), 6, {"n": "new"})
        apply(second, new, (3,), 7, None)
        apply(first, old, (3,), 7, None)
        assert store.found(INDEX, EVERYTHING) == {"1"}
        second.lead_readers([new])
        second.lead_readers([new])  # again, by whoever was killed
        assert store.found(INDEX, EVERYTHING) == {"1", "2"}, "and no tombstone"
        assert list(store.ask("GET", f"/_alias/{INDEX}")) == [f"{INDEX}-2"]
        apply(first, old, (4,), 8, {"n": "old"})
        assert store.found(INDEX, EVERYTHING) == {"1", "2"}
        first.lead_readers([old])
        assert store.found(INDEX, EVERYTHING) == {"1", "4"}
        second.lead_readers([new])
        assert first.drop(old) == 2
        assert store.found(INDEX, EVERYTHING) == {"1", "2"}
        assert apply(second, new, (2,), 6, {"n": "newer"}) == APPLIED
        # Without its state the pipeline writes where readers look.
        assert sink.check([target]) == []
        sink.prepare(target)
        assert apply(sink, target, (1,), 9, {"n": "newest"}) == APPLIED
    finally:
        for one, of in ((first, old), (second, new)):
            one.drop(of)
            one.close()


def test_readers_are_not_led_away_from_what_others_made(opensearch: OpenSearch, store: Store) -> None:
    second, new = generation(opensearch.url, 2)
    second.prepare(new)
    store.ask("PUT", "/theirs", {"aliases": {INDEX: {}}})
    try:
        with pytest.raises(SinkRefused, match="did not create"):
            second.lead_readers([new])
        assert list(store.ask("GET", f"/_alias/{INDEX}")) == ["theirs"]
    finally:
        store.ask("DELETE", "/theirs")
        second.drop(new)
        second.close()


class Canned(http.server.BaseHTTPRequestHandler):
    """Answers every request alike: for what a store of ours cannot be brought to say."""

    status = 200
    headers_given: Mapping[str, str] = {}
    body: object = None
    seen: list[str | None]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.seen.append(self.headers.get("Authorization"))
        body = self.body if isinstance(self.body, bytes) else orjson.dumps(self.body)
        self.send_response(self.status)
        for name, value in {**self.headers_given, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815 -- its base class's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its base class's name
        pass


@contextmanager
def canned(
    status: int, body: object = None, headers: Mapping[str, str] | None = None
) -> Generator[tuple[str, list[str]]]:
    seen: list[str] = []
    handler = type("Handler", (Canned,), {"status": status, "body": body, "headers_given": headers or {}, "seen": seen})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), cast("type[Canned]", handler))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_busy_answers(status: int) -> None:
    with canned(status, {"error": {"type": "es_rejected_execution_exception"}}, {"Retry-After": "7"}) as (host, _):
        sink = open_sink(f"http://{host}")
        with pytest.raises(SinkBusy, match="es_rejected") as caught:
            sink.read(sink.target(MOVIE, SearchTargetOptions()), [(1,)])
        assert caught.value.retry_after_s == 7
        sink.close()


@pytest.mark.parametrize("status", [401, 403])
def test_refusing_answers_quote_no_secret(status: int) -> None:
    with canned(status, {"error": "security_exception"}) as (host, seen):
        sink = open_sink(f"http://delta:s%40cret@{host}")
        with pytest.raises(SinkRefused) as caught:
            sink.read(sink.target(MOVIE, SearchTargetOptions()), [(1,)])
        assert seen == ["Basic ZGVsdGE6c0BjcmV0"]  # delta:s@cret
        assert "cret" not in str(caught.value)
        sink.close()


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("body", [b"<html>", b"", b'{"errors":', b"[]"], ids=["page", "nothing", "half", "list"])
def test_what_answers_in_the_stores_place_is_busy(status: int, body: bytes) -> None:
    """Such as a load balancer with a page of its own, for as long as there is no store behind it."""
    with canned(status, body) as (host, _):
        sink = open_sink(f"http://{host}")
        target = sink.target(MOVIE, SearchTargetOptions())
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
            with pytest.raises(SinkBusy, match=f"no JSON object \\(status {status}\\)"):
                call()
        (problem,) = sink.check([target])
        assert problem.fix == "check its address"
        sink.close()


def test_another_api_is_no_search_store() -> None:
    with canned(200, {"hello": "world"}) as (host, _):
        sink = open_sink(f"http://{host}")
        (problem,) = sink.check([])
        assert "is neither Elasticsearch nor OpenSearch" in problem.what
        sink.close()


def test_items_that_the_store_was_too_busy_for_are_sent_again_alone() -> None:
    sent: list[int] = []

    class Counting(Bulks):
        def _send_part(
            self, index: str, params: dict[str, str], part: Mapping[int, bytes], busy: dict[int, str]
        ) -> dict[int, Outcome]:
            sent.append(len(part))
            reply["items"] = [{"index": item} for item in (items if len(part) == 3 else items[1:2])]
            return super()._send_part(index, params, part, busy)

    items = [{"status": 201}, {"status": 429, "error": {"type": "rejected"}}, {"status": 409, "error": {"type": "x"}}]
    reply: dict[str, object] = {"errors": True}
    with canned(200, reply) as (host, _):
        sink = open_sink(f"http://{host}")
        sink._bulks = Counting(sink._link, False, BULK_BYTES, sleep=lambda _: None)
        with pytest.raises(SinkBusy, match="too busy for 1 of 3 writes: rejected"):
            sink.apply(sink.target(MOVIE, SearchTargetOptions()), [Write((n,), 5, {}) for n in range(3)])
        assert sent == [3, 1, 1, 1]
        sink.close()
