"""The Kafka transport as a worker's run sees it: the sidecar captures the source, and this run is one of a group."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from delta_sync.applied_log import says_it_runs
from delta_sync.capture import Batch, Capture
from delta_sync.decoding import Stretch, Undecodable
from delta_sync.errors import EpochRose, SourceBusy, TablesChanged
from delta_sync.kafka import settings
from delta_sync.kafka.avro import AvroDecoder, UndecodableRecord
from delta_sync.kafka.by_offset import OffsetDecoder
from delta_sync.kafka.capture import TOPIC_MADE_ANEW, KafkaCapture
from delta_sync.kafka.clients import open_group
from delta_sync.kafka.consumer import Partition
from delta_sync.kafka.names import group_id, notices_group_id, topic_name
from delta_sync.kafka.notices import KafkaNotices
from delta_sync.kafka.offsets import GroupOffsets
from delta_sync.kafka.progress import GroupProgress
from delta_sync.kafka.registry import SchemaRegistry
from delta_sync.kafka.topic_ids import SeenTopics, TopicStore, look_at_topics
from delta_sync.leases import LeaseKeeper
from delta_sync.logs import logger
from delta_sync.notices import NoticeIntake
from delta_sync.pipeline import Pipeline, check_columns
from delta_sync.progress import Progress
from delta_sync.sinks import AnySink
from delta_sync.sources import open_reader
from delta_sync.sources.reader import SourceReader
from delta_sync.spec import KafkaSpec, PipelineSpec
from delta_sync.starting import Source, fill_fingerprints, read_tables
from delta_sync.state import StateStore
from delta_sync.tables import Table
from delta_sync.transport import Tables, Transport
from delta_sync.versions import version_of
from delta_sync.watch import ANSWER_S

ROSE = "The sidecar has begun a new epoch; this worker begins anew with it."
log = logger(__name__)

LOAD_LEASE = "load"
LOAD_LEASE_S = 10.0  # so long a load stands still when its worker was killed; a slow state store must not cost it


class KafkaTransport(Transport):
    """One worker's. `member` is its name among the pipeline's processes."""

    sends_heartbeats = False

    def __init__(self, spec: PipelineSpec, member: str) -> None:
        assert spec.kafka is not None, "the specification has transport: kafka"
        self._spec = spec
        self._kafka: KafkaSpec = spec.kafka
        self._member = member
        self._epoch = 0
        self._topics = {topic_name(spec.name, table): table for table in spec.tables}
        schemas = SchemaRegistry(spec.kafka.registry)
        self._decoder = AvroDecoder(schemas)
        by_offset = spec.source.kind == "debezium"
        self._by_offset = OffsetDecoder(schemas, self._topics) if by_offset else None
        self._old_columns: set[tuple[str, frozenset[str]]] = set()  # of tables' records from before they changed
        self._reader: SourceReader | None = None
        self._columns: frozenset[str] = frozenset()
        self._each_of: frozenset[str] = (
            frozenset()
        )  # topics of which each event counts: for handlers, for documents of parts
        self._tables: Tables = dict
        self._capture: KafkaCapture | None = None
        self._state: StateStore | None = None
        self._pipeline: Pipeline | None = None

    def prepare(
        self, pipeline: Pipeline, reader: SourceReader, state: StateStore, sinks: Mapping[str, AnySink]
    ) -> Source:
        """Wait for the sidecar: it makes sure of publication and slot, and decides the epoch."""
        self._state, self._pipeline = state, pipeline
        each_of = {one.table for one in pipeline.handlers.values()}
        each_of.update(table for document in pipeline.documents.values() for table in document.tables)
        self._each_of = frozenset(topic_name(self._spec.name, table) for table in each_of)
        known = state.pipeline(self._spec.name)
        if known is None or not state.loads(self._spec.name).keys() >= pipeline.tables.keys():
            raise SourceBusy(
                f"No sidecar has prepared these tables yet; start one: `deltactl sidecar {self._spec.name}`."
            )
        self._reader = reader
        if reader.identity() != (known.system_identifier, known.timeline):
            raise SourceBusy("The source is another server now, or was promoted or restored: the sidecar decides.")
        columns = reader.fingerprints(list(self._spec.tables))  # before the tables: a change in between is seen later
        if self._by_offset is not None:
            tables = reader.tables(list(self._spec.tables))
            fill_fingerprints(self._spec, pipeline, state, sinks, tables, columns)
        else:
            tables = read_tables(self._spec, reader)
        check_columns(pipeline, tables)
        return Source(known.epoch, tables, {name: columns.get(name, "") for name in tables})

    def capture(self, source: Source, tables: Tables, progress: Progress, unchanged: Callable[[], None]) -> Capture:
        """Return a member of the consumer group, which commits while the sinks are unchanged."""
        self._epoch = source.epoch
        self._tables = tables
        session_s = self._kafka.session_timeout
        timeouts = settings.DEFAULT_TIMEOUTS._replace(session_s=session_s, heartbeat_s=min(3.0, session_s / 3))
        self._capture = KafkaCapture(
            lambda: open_group(self._kafka, group_id(self._spec.name), timeouts),
            self._topics,
            progress,
            lambda partitions, why: self._load_again(partitions, why, progress),
            self._look_once,
            self._topic_store().replace,
            unchanged,
        )
        return self._capture

    def _topic_store(self) -> TopicStore:
        assert self._state is not None, "it was prepared"
        return TopicStore(self._state, self._spec.name)

    def _look_once(self) -> SeenTopics:
        with contextlib.closing(self._offsets()) as offsets:
            return look_at_topics(self._topic_store(), offsets.topic_ids)

    def _offsets(self) -> GroupOffsets:
        return GroupOffsets(
            lambda: settings.resolved(settings.kafka_python(self._kafka)), group_id(self._spec.name), self._topics
        )

    def _load_again(self, partitions: Collection[Partition], why: str, progress: Progress) -> None:
        """Have the tables of these partitions loaded again, by whichever worker loads. Raises StateBusy."""
        assert self._state is not None, "it was prepared"
        assert self._pipeline is not None, "it was prepared"
        tables = self._pipeline.affected(self._topics[partition.topic] for partition in partitions)
        known = self._state.pipeline(self._spec.name)
        if self._by_offset is not None and why == TOPIC_MADE_ANEW and known is not None:
            self._state.raise_epoch(self._spec.name, known.epoch + 1)  # places are counted from 0 again
        else:
            self._state.load_again(self._spec.name, tables, why)
        progress.positions_expired += len(partitions)
        log.warning("tables_loaded_again", tables=tables, reason=why)

    def stretches(self, batch: Batch) -> Iterable[Stretch]:
        """Return a batch's events. Raises Transient while the registry lacks a schema, EpochRose for a newer epoch."""
        if self._by_offset is not None:
            decoded = self._by_offset.decode(batch.payload, self._table_as_it_is, self._each_of)
        else:
            columns = frozenset(column.name for table in self._tables().values() for column in table.columns)
            if columns != self._columns:
                self._columns = columns
                self._decoder.use(columns)
            decoded = self._decoder.decode(batch.payload, self._each_of)
        if any(stretch.epoch > self._epoch for stretch in decoded.stretches):
            raise EpochRose(ROSE)
        broken = [self._undecodable(record) for record in decoded.undecodable]
        return [*decoded.stretches, Stretch(self._epoch, [], broken)] if broken else decoded.stretches

    def _table_as_it_is(self, name: str, columns: frozenset[str]) -> Table:
        """Return a table, for records with these columns. Raises TablesChanged: it is another, or was not known yet."""
        table = self._tables().get(name)
        if table is None:
            raise TablesChanged(f"The first record of table {name} has come.")
        if (name, columns) not in self._old_columns and not columns <= {column.name for column in table.columns}:
            assert self._reader is not None, "it was prepared"
            now = self._reader.tables([name]).get(name, table)
            if columns <= {column.name for column in now.columns}:
                raise TablesChanged(f"Table {name} has other columns.")
            self._old_columns.add((name, columns))  # of one that was dropped since
        return table

    def _undecodable(self, record: UndecodableRecord) -> Undecodable:
        place = f"{record.partition.topic}[{record.partition.number}]@{record.offset}"
        return Undecodable(
            self._topics[record.partition.topic],
            version_of(self._epoch, record.offset),
            {"record": place, "value": record.value},
            record.error,
            (place,),
        )

    def check(self, reader: SourceReader, state: StateStore) -> None:
        """Raise EpochRose when the sidecar, which looks after the slot, has begun a new epoch.

        A record would tell, too, but none comes while the tables rest.
        """
        del reader
        known = state.pipeline(self._spec.name)
        if known is not None and known.epoch > self._epoch:
            raise EpochRose(ROSE)

    def publish(self, reader: SourceReader, tables: Sequence[Table]) -> None:
        """Nothing: the sidecar does."""

    def background(self, progress: Progress, stopping: threading.Event) -> Sequence[threading.Thread]:
        """Return the thread that finds out how far the group is, and whether topics are still the same."""
        capture, state, store = self._capture, self._state, self._topic_store()
        assert capture is not None, "it is made before"
        assert state is not None, "it was prepared"

        def waits(reason: str | None) -> None:
            progress.waits("kafka", reason)

        reader = open_reader(self._spec, f"delta {self._spec.name} progress", ANSWER_S)
        offsets = self._offsets()
        return [
            GroupProgress(
                reader=reader,
                place=reader.capture_position(self._spec, state),
                offsets=offsets,
                position=progress.position,
                waits=waits,
                stopping=stopping,
                look_at_topics=lambda: capture.topics_seen(look_at_topics(store, offsets.topic_ids)),
            )
        ]

    def notices(self, intake: NoticeIntake, stopping: threading.Event) -> Sequence[threading.Thread]:
        """Return the thread that reads the topic of notices, if there is one."""
        topic = self._spec.notices.topic
        if topic is None:
            return ()
        group = notices_group_id(self._spec.name)
        return [KafkaNotices(lambda: open_group(self._kafka, group), topic, intake, stopping)]

    def load_lease(self, state: StateStore) -> LeaseKeeper:
        """Return who keeps the lease of the one worker that loads."""
        return LeaseKeeper(state, self._spec.name, LOAD_LEASE, self._member, LOAD_LEASE_S)

    def nobody_writes(self, state: StateStore, sink: str) -> bool:
        """Tell whether no worker that has said of late that it is there has this sink.

        One that is frozen is not waited for: what it still writes it cannot commit, nor is it seen by readers.
        """
        now = state.database_now()
        return not any(
            sink in status.get("sinks", {}) and says_it_runs(status, now - saved_at)
            for _, status, saved_at in state.members(self._spec.name)
        )

    def save_status(self, state: StateStore, document: Mapping[str, Any]) -> None:
        """Save it as this member's."""
        held = sorted(self._capture.partitions) if self._capture is not None else []
        partitions = [f"{topic}[{number}]" for topic, number in held]
        state.save_member(self._spec.name, self._member, {**document, "role": "worker", "partitions": partitions})
