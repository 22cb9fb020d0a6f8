"""What a run decides before it streams, where a change's position is its place in a topic: the epoch, and the loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import sqlalchemy as sa

from debezium_avro import MOVIE, envelope
from delta_sync.changes import Write
from delta_sync.errors import SlotMissing, SourceBusy, TablesChanged
from delta_sync.kafka.capture import POSITIONS_EXPIRED, TOPIC_MADE_ANEW
from delta_sync.kafka.connector import ConnectorStore
from delta_sync.kafka.consumer import Partition
from delta_sync.kafka.names import topic_name
from delta_sync.kafka.transport import KafkaTransport
from delta_sync.pipeline import Pipeline
from delta_sync.progress import LogPosition, Progress
from delta_sync.sinks import AnySink, target_for
from delta_sync.sinks.memory import MemorySink
from delta_sync.sources.debezium.catalogue import TopicCatalogue, table_of
from delta_sync.sources.debezium.reader import ConnectorPosition, TopicReader
from delta_sync.sources.mysql.position import StoredOffset
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.starting import Source, fill_fingerprints, prepare_signalled
from delta_sync.state import StateStore
from delta_sync.state_tables import LEASES
from delta_sync.tables import Table
from delta_sync.values import Row
from delta_sync.versions import version_of

TABLE = "shop.dbo.movie"
WIDE = [*MOVIE, {"name": "seen", "type": ["null", "boolean"], "default": None}]
TTL_S = 3600.0


class Topics:
    """In the place of Kafka: the tables of which a record has come, and the connector's newest position."""

    where = "Kafka (topic delta_orders.offsets)"

    def __init__(self) -> None:
        self.known: dict[str, Table] = {}
        self.number: int | None = None
        self.cleared = 0

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        return {name: self.known[name] for name in names if name in self.known}

    def newest(self) -> StoredOffset | None:
        return None if self.number is None else StoredOffset({}, self.number)

    def clear(self) -> None:
        self.number = None
        self.cleared += 1

    def close(self) -> None:
        pass


class Start:
    def __init__(self, folder: Path, on_lost_log: str = "new_epoch") -> None:
        source = {"url": "debezium://io.debezium.connector.sqlserver.SqlServerConnector", "on_lost_log": on_lost_log}
        self.spec: PipelineSpec = spec_from(
            {
                "name": "orders",
                "source": source,
                "tables": {TABLE: {}},
                "sinks": {"cache": {"url": "memory://cache"}},
                "transport": "kafka",
                "kafka": {"bootstrap_servers": "kafka:9092", "registry": {"url": "http://registry/apis/ccompat/v7"}},
            },
            "test",
        )
        self.pipeline = Pipeline("orders")

        @self.pipeline.table(TABLE)
        def movie(row: Row) -> Row:
            return row

        self.sink = MemorySink("cache")
        self.sinks: dict[str, AnySink] = {"cache": self.sink}
        self.state = StateStore.open(self.spec.state, folder)
        self.topics = Topics()
        self.reader = TopicReader(self.spec, cast("TopicCatalogue", self.topics))
        self.reader._place = ConnectorPosition(self.spec, cast("ConnectorStore", self.topics))

    def __call__(self, *, new_slot: bool = False, reload: bool = False) -> Source:
        """Have a sidecar take over, and prepare."""
        lease = self.state.take_lease("orders", "sidecar", "it", TTL_S)
        assert lease is not None
        found = prepare_signalled(
            self.spec, self.pipeline, self.reader, self.state, self.sinks, new_slot=new_slot, reload=reload, lease=lease
        )
        self.state.release_lease(lease)
        return found

    def delivered(self, number: int) -> None:
        """Have the connector write its position, and the sidecar see it."""
        self.topics.number = number
        known = self.state.pipeline("orders")
        assert known is not None
        self.state.save_pipeline(known._replace(slot_lsn=number + 1))

    def records_come(self, columns: object = MOVIE) -> Table:
        found = table_of(TABLE, ["id"], envelope(columns))
        assert found is not None
        self.topics.known[TABLE] = found
        return found

    def fill(self) -> None:
        names = list(self.spec.tables)
        tables, columns = self.reader.tables(names), self.reader.fingerprints(names)
        fill_fingerprints(self.spec, self.pipeline, self.state, self.sinks, tables, columns)

    @property
    def load(self) -> tuple[str, str, int]:
        load = self.state.loads("orders")[TABLE]
        return load.state, load.reason, load.epoch


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made = Start(tmp_path)
    yield made
    made.state.close()


def test_a_first_start_loads_tables_that_nobody_knows_yet(start: Start) -> None:
    found = start()
    assert (found.epoch, found.tables) == (1, {})
    assert start.load == ("pending", "first load", 1)
    start.delivered(5)
    assert start().epoch == 1
    assert start.load == ("pending", "first load", 1)


def test_a_table_that_turns_out_to_be_something_is_not_loaded_again_for_that(start: Start) -> None:
    start()
    start.delivered(5)
    start.records_come()
    start.fill()
    assert start.state.loads("orders")[TABLE].fingerprint
    assert (start().epoch, start.load[1]) == (1, "first load")
    start.records_come(WIDE)
    assert start().epoch == 1
    assert "columns changed" in start.load[1]


def test_a_position_that_is_gone_begins_a_new_epoch(start: Start) -> None:
    start()
    start.delivered(5)
    start.topics.number = None
    assert start().epoch == 2
    assert start.load == ("pending", "the epoch rose", 2)


def test_it_is_not_begun_where_it_is_not_wanted(tmp_path: Path) -> None:
    start = Start(tmp_path, "stop")
    start()
    start.delivered(5)
    start.topics.number = None
    with pytest.raises(SlotMissing, match="--new-slot"):
        start()
    assert start(new_slot=True).epoch == 2


def test_a_new_epoch_is_begun_when_it_is_asked_for_though_nothing_shows_a_loss(start: Start) -> None:
    """Only the database knows that it has no longer what the connector needs."""
    start()
    start.delivered(5)
    assert start(new_slot=True).epoch == 2
    assert start.topics.cleared == 1
    assert start.load == ("pending", "the epoch rose", 2)


def test_terms_that_begin_anew_begin_an_epoch(start: Start) -> None:
    start()
    with start.state.transaction(write=True) as connection:
        connection.execute(sa.update(LEASES).values(token=4094))
    assert start().epoch == 1
    assert start().epoch == 2


def test_what_is_in_a_place_already_is_outranked(start: Start) -> None:
    """Another pipeline's documents, or this one's from before its state was lost."""
    start()
    table = start.records_come()
    target = target_for(start.sink, table, start.spec)
    start.sink.prepare(target)
    start.sink.apply(target, [Write((1,), version_of(4, 9), {"id": 1})])
    with pytest.raises(SourceBusy, match="new epoch"):
        start.fill()
    assert start().epoch == 5
    assert start.load == ("pending", "the epoch rose", 5)
    start.fill()
    start.sink.apply(target, [Write((2,), version_of(5, 9), {"id": 2})])  # its own
    assert start().epoch == 5


# ── a worker ──


def worker_of(start: Start) -> KafkaTransport:
    transport = KafkaTransport(start.spec, "it")
    transport._state, transport._pipeline, transport._reader = start.state, start.pipeline, start.reader
    return transport


def test_a_topic_that_was_made_anew_begins_an_epoch_for_places_begin_anew(start: Start) -> None:
    start()
    progress = Progress(LogPosition(lambda: 0.0), lambda: 0.0)
    partition = Partition(topic_name("orders", TABLE), 0)
    worker_of(start)._load_again([partition], POSITIONS_EXPIRED, progress)
    assert start.load[1] == POSITIONS_EXPIRED
    worker_of(start)._load_again([partition], TOPIC_MADE_ANEW, progress)
    assert start().epoch == 2
    assert start.load == ("pending", "the epoch rose", 2)


def test_records_of_a_table_that_is_not_known_or_is_another_begin_anew(start: Start) -> None:
    transport = worker_of(start)
    table = start.records_come()
    columns = frozenset(column.name for column in table.columns)
    with pytest.raises(TablesChanged, match="first record"):
        transport._table_as_it_is(TABLE, columns)
    transport._tables = lambda: {TABLE: table}
    assert transport._table_as_it_is(TABLE, columns) == table
    assert transport._table_as_it_is(TABLE, columns - {"title"}) == table
    assert transport._table_as_it_is(TABLE, columns | {"dropped"}) == table  # a record from before that was dropped
    start.records_come(WIDE)
    with pytest.raises(TablesChanged, match="other columns"):
        transport._table_as_it_is(TABLE, columns | {"seen"})
