"""Where MariaDB's connector goes on, and when that is a loss. Kafka and the log are fakes."""

from __future__ import annotations

from typing import Any

import pytest

from delta_sync.documents import DocumentSpec
from delta_sync.errors import UsageError
from delta_sync.sources import check_supported, open_reader, position_text
from delta_sync.sources.mysql.gtid_reader import MySQLReader
from delta_sync.sources.mysql.position import BinlogPosition, StoredOffset
from delta_sync.sources.mysql.reader import behind
from delta_sync.spec import PipelineSpec, spec_from


class FakeStore:
    where = "Kafka (topic delta_movies.offsets)"

    def __init__(self, **offset: Any) -> None:
        self.found = StoredOffset(offset, 41, b"key") if offset else None
        self.history = True
        self.cleared = False

    def newest(self) -> StoredOffset | None:
        return self.found

    def has_history(self) -> bool:
        return self.history

    def clear(self) -> None:
        self.cleared = True

    def close(self) -> None:
        pass


class FakeLog:
    def __init__(self, lost: str | None = None) -> None:
        self.lost = lost
        self.asked: list[tuple[int, str | None]] = []

    def why_lost(self, position: int, gtids: str | None = None) -> str | None:
        self.asked.append((position, gtids))
        return self.lost


def place_of(store: FakeStore, log: FakeLog) -> BinlogPosition:
    return BinlogPosition(log, store)


def spec(url: str = "mariadb://delta@db/studio", *, kafka: bool = True) -> PipelineSpec:
    data: dict[str, Any] = {"name": "movies", "source": {"url": url}, "tables": {"studio.movie": {}}}
    data |= {"sinks": {"cache": {"url": "redis://cache"}}}
    if kafka:
        data |= {
            "transport": "kafka",
            "kafka": {"bootstrap_servers": "k:9092", "registry": {"url": "http://registry"}},
        }
    return spec_from(data, "test")


def test_there_is_no_position_before_the_connectors_first_record() -> None:
    place = place_of(FakeStore(), FakeLog())
    assert place.look() is None
    assert place.confirmed() is None


def test_a_position_is_the_beginning_of_what_is_not_delivered_as_a_whole() -> None:
    log = FakeLog()
    place = place_of(FakeStore(file="binlog.000012", pos=345, gtids="0-1-27", event=3, row=1), log)
    found = place.look()
    assert found is not None
    assert (found.position, found.lost, found.beat) == (12 << 32 | 345, None, 42)
    assert log.asked == [(12 << 32 | 345, "0-1-27")]
    assert place.confirmed() == found.position
    assert place.text(12 << 32 | 345) == "000012:345"


def test_a_log_or_a_history_that_is_gone_is_a_loss() -> None:
    store = FakeStore(file="binlog.000012", pos=345)
    found = place_of(store, FakeLog("the source's log begins anew")).look()
    assert found is not None
    assert found.lost == "the source's log begins anew"
    store.history = False
    found = place_of(store, FakeLog()).look()
    assert found is not None
    assert found.lost == "the history of the schema is gone from Kafka (topic delta_movies.offsets)"


@pytest.mark.parametrize(
    ("here", "gtids", "expected"),
    [
        ("0-1-27", "0-1-27", False),
        ("0-1-28", "0-1-27", False),
        ("0-1-3", "0-1-27", True),  # RESET MASTER, and three transactions
        ("", "0-1-27", True),
        ("0-1-27,1-2-5", "0-1-20,1-2-6", True),
        ("0-2-5,0-1-27", "0-1-27", False),
    ],
)
def test_a_log_that_lacks_transactions_has_begun_anew(here: str, gtids: str, expected: bool) -> None:
    assert behind(here, gtids) is expected


def test_what_no_pipeline_runs_on_is_refused_with_its_reason() -> None:
    check_supported(spec())
    with pytest.raises(UsageError, match=r"embedded engine has no connector for MariaDB .* use transport: kafka"):
        check_supported(spec(kafka=False))
    check_supported(spec("mysql://delta@db/studio", kafka=False))
    documents = {"studio.movie": DocumentSpec("studio.movie", {})}
    with pytest.raises(UsageError, match=r"several tables \(studio.movie\) cannot be built from MySQL"):
        open_reader(spec("mysql://delta@db/studio"), "test", documents=documents)
    check_supported(spec("mysql://delta@db/studio"))
    assert isinstance(open_reader(spec("mysql://delta@db/studio"), "test"), MySQLReader)


def test_how_much_log_lies_between_is_told_within_a_file_only() -> None:
    reader = open_reader(spec(), "test")
    assert reader.bytes_between(12 << 32 | 345, 12 << 32 | 400) == 55
    assert reader.bytes_between(12 << 32 | 400, 12 << 32 | 345) == 0
    assert reader.bytes_between(12 << 32 | 345, 13 << 32 | 4) is None
    assert position_text("mariadb", 12 << 32 | 345) == "000012:345"
    assert position_text("mysql", 12 << 32 | 345) == "000012:345"
    assert position_text("postgresql", 0x16_0000_0010) == "16/10"
