"""The search sink keeps the contract; and what is the search stores' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from delta_sync.sinks.search import SearchOptions, SearchSink
from delta_sync.testing.contract import AnySink, SinkContract
from delta_sync.testing.servers import OpenSearch

TTL_S = 3600


def open_sink(url: str, **options: object) -> SearchSink:
    return SearchSink("search", url, SearchOptions.model_validate(options), TTL_S)


class TestOpenSearch(SinkContract):
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
