"""A database in MariaDB or MySQL, its pipeline, on Kafka or embedded, and what must hold at the end."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from acceptance.harness import PATIENCE_S, Key, Pipeline, Run, Source
from acceptance.kafka_harness import KafkaPipeline
from delta_sync.errors import SinkBusy, Transient
from delta_sync.kafka.connector import ConnectorStore
from delta_sync.sinks import AnySink, open_sinks, target_for
from delta_sync.sources.mysql.claims import Snapshot
from delta_sync.sources.mysql.connection import Session, connect
from delta_sync.sources.mysql.position import position_in
from delta_sync.sources.mysql.reader import MariaReader
from delta_sync.spec import PipelineSpec, SourceSpec, load_spec
from delta_sync.state import StateStore
from delta_sync.state_connector import ConnectorState
from delta_sync.state_dumps import DumpStore
from delta_sync.tables import Table
from delta_sync.testing.mariadb import PASSWORD, USER, MariaDB
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import Redis, Server
from delta_sync.values import to_json

T = TypeVar("T", bound="MariaPipeline")

ROWS_MOST, BYTES_MOST = 100_000, 1 << 30  # of a table: all that there are


class MariaSource(Source):
    """A database of its own within a server, and a user for the pipeline with as few privileges as will do."""

    reader_class: ClassVar[type[MariaReader]] = MariaReader
    privileges: ClassVar[str] = "REPLICATION SLAVE, BINLOG MONITOR"

    def __init__(self, server: MariaDB, name: str, folder: Path) -> None:
        scheme, password = server.name, folder / "mariadb-password"
        password.write_text(PASSWORD + "\n")
        where = f"127.0.0.1:{server.port}"
        self._source = SourceSpec(url=f"{scheme}://{USER}@{where}/{name}", password=f"${{file:{password}}}")
        super().__init__(f"{scheme}://{name}:${{file:{password}}}@{where}/{name}", name)
        self.reader = self.reader_class(self._source, "the test")
        with closing(connect(self._source.model_copy(update={"url": f"{scheme}://{USER}@{where}/"}))) as session:
            execute(
                session,
                f"CREATE DATABASE {name}",
                f"CREATE USER {name}@'%' IDENTIFIED BY '{PASSWORD}'",
                f"GRANT SELECT ON {name}.* TO {name}@'%'",
                f"GRANT {self.privileges} ON *.* TO {name}@'%'",
            )

    def session(self) -> Session:
        """Connect as a writer does."""
        return connect(self._source)

    def execute(self, *statements: str) -> None:
        """Execute statements, each in a transaction of its own."""
        with closing(self.session()) as session:
            execute(session, *statements)

    def rows(self, table: Table) -> dict[Key, dict[str, Any]]:
        """Return all rows of a table by key, as a load reads them."""
        chunk = self.reader.read_chunk(table, None, ROWS_MOST, BYTES_MOST, anything)
        assert chunk is not None
        return dict(chunk.rows)

    def insert_lsn(self) -> int:
        """Return the position at which the log ends now."""
        return self.reader.log_end()


def anything(_: Snapshot) -> bool:
    """Any snapshot will do: nobody claims anything."""
    return True


def execute(session: Session, *statements: str) -> None:
    """Execute statements."""
    with session.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


class BinlogPipeline(Pipeline):
    """A pipeline of tables in a database with a binary log, each to the sink `cache`."""

    source: MariaSource
    spec: PipelineSpec
    sinks: dict[str, AnySink]
    keep_alive_ms: ClassVar[int] = 1500

    def begin(self, source: MariaSource, **options: Mapping[str, Any]) -> None:
        """Add to what `create` wrote (`options` to its parts), and take it over."""
        self.write_processor("return row")  # with columns that come later
        file = self.home / "pipeline.yaml"
        written = yaml.safe_load(file.read_text())
        for part, more in options.items():
            written[part] |= more
        written["source"]["heartbeat"] = "300ms"
        # While nothing is written, positions come so often.
        written["connector"] = {"connect.keep.alive.interval.ms": self.keep_alive_ms}
        file.write_text(yaml.safe_dump(written, sort_keys=False))
        self.source = source
        self.spec = load_spec(self.home)
        self.sinks = open_sinks(self.spec)

    def confirmed(self) -> int:
        """Return where the connector goes on; 0: it has not begun."""
        raise NotImplementedError

    def epoch(self) -> int:
        """Return the epoch that was decided last; 0 before."""
        store = StateStore.open("sqlite:///state.db", self.home, create=False)
        if store is None:
            return 0
        with store:
            known = store.pipeline(self.name)
        return 0 if known is None else known.epoch

    def dumped(self) -> bool:
        """Whether every dump is over."""
        store = StateStore.open("sqlite:///state.db", self.home, create=False)
        assert store is not None, "a dump was started"
        with store:
            return not DumpStore(store, self.name).all(unfinished=True)

    def document(self, table: Table, key: Key) -> dict[str, Any] | None:
        """Return a key's document."""
        (stored,) = self.sinks["cache"].read(target_for(self.sinks["cache"], table, self.spec), [key])
        return None if stored is None else stored.document

    def expected(self, table: Table) -> dict[Key, dict[str, Any]]:
        """Return what there is to be of a table's rows, by key: the rows themselves."""
        return self.source.rows(table)

    def differences(self) -> list[str]:
        """Compare every row with its document, and return a line for each that is not as it must be."""
        sink = self.sinks["cache"]
        found: list[str] = []
        for table in self.source.reader.tables([name for name in self.tables if name not in self.parts]).values():
            target = target_for(sink, table, self.spec)
            rows = self.expected(table)
            ids = {sink.id_of(target, key): key for key in rows}
            there = {id_: version for batch in sink.scan(target) for id_, version in batch}
            found += [f"{table.id} {id_}: no such row, version {there[id_]:#x}" for id_ in there.keys() - ids.keys()]
            found += [f"{table.id} {id_}: missing: {rows[ids[id_]]}" for id_ in ids.keys() - there.keys()]
            for key, stored in zip(rows, sink.read(target, list(rows)), strict=True):
                expected = json.loads(to_json(rows[key]))
                if stored is not None and stored.document is not None and stored.document != expected:
                    found.append(f"{table.id} {key}: {stored.document}, version {stored.version:#x}, not {expected}")
        return found

    def in_step(self, *runs: Run) -> None:
        """Wait until everything that was written has been confirmed, every table is loaded, and every row is right.

        What stays wrong is reported: the log is passed, so nothing more is to come but what is read again.
        """
        end = self.source.insert_lsn()
        last: list[str] = []

        def right() -> bool:
            nonlocal last
            for run in runs:
                assert run.running, f"a process ended with status {run.exit_status}; {run.tail()}"
            try:
                if self.confirmed() < end or not self.loaded():
                    last = [f"confirmed {self.confirmed():#x} of {end:#x}, loads {self.loads()}"]
                    return False
                last = self.differences()
            except (SinkBusy, Transient) as error:
                last = [str(error)]
            return not last

        try:
            wait_until(right, PATIENCE_S, "everything in its place")
        except Exception as error:
            tails = "; ".join(run.tail() for run in runs)
            raise AssertionError(f"{len(last)} differences: {last[:5]}; {tails}") from error

    def close(self) -> None:
        """Release connections."""
        self.source.reader.close()
        for sink in self.sinks.values():
            sink.close()


class MariaPipeline(BinlogPipeline, KafkaPipeline):
    """One on Kafka."""

    def __init__(
        self, source: MariaSource, folder: Path, cache: Redis, kafka: Server, registry: Server, tables: list[str]
    ) -> None:
        KafkaPipeline.__init__(
            self,
            source,
            folder,
            {"cache": cache.url},
            source.schema,
            tables,
            bootstrap_servers=kafka.url,
            registry=registry.url,
            load={"chunk_rows": 100},
        )
        self.begin(source, kafka={"session_timeout": "6s"})  # or the partitions of a killed worker rest for 45 s
        self.connector = ConnectorStore(self.spec)

    def confirmed(self) -> int:
        """Return where the connector goes on; 0: it has not begun."""
        found = self.connector.newest()
        return 0 if found is None else position_in(found.offset)

    def close(self) -> None:
        """Release connections."""
        self.connector.close()
        super().close()


class EmbeddedPipeline(BinlogPipeline):
    """One that runs in a process, with the connector's position in its state store."""

    keep_alive_ms = 3000  # the engine shares its machine with the test; it connects anew when it is silent for longer

    def __init__(self, source: MariaSource, folder: Path, cache_url: str, tables: list[str]) -> None:
        super().__init__(source, folder, {"cache": cache_url}, source.schema, tables, load={"chunk_rows": 100})
        self.begin(source)

    def confirmed(self) -> int:
        """Return where the connector goes on; 0: it has not begun."""
        store = StateStore.open("sqlite:///state.db", self.home, create=False)
        if store is None:
            return 0
        with store:
            found = ConnectorState(store, self.name).newest()
        return 0 if found is None else position_in(found.offset)


@contextlib.contextmanager
def maria_pipeline(
    server: MariaDB,
    cache: Redis,
    kafka: Server,
    registry: Server,
    folder: Path,
    tables: dict[str, str],
    kind: type[T],
    source_class: type[MariaSource] = MariaSource,
) -> Iterator[T]:
    """Make a database with tables, by the statement that makes each, and a pipeline of all of them on Kafka."""
    with binlog_source(server, folder, tables, source_class) as source:
        pipeline = kind(source, folder, cache, kafka, registry, list(tables))
        with contextlib.closing(pipeline):
            yield pipeline


@contextlib.contextmanager
def binlog_source(
    server: MariaDB, folder: Path, tables: dict[str, str], kind: type[MariaSource]
) -> Iterator[MariaSource]:
    """Make a database with tables, by the statement that makes each."""
    source = kind(server, f"maria_{uuid.uuid4().hex[:8]}", folder)
    source.execute(*tables.values())
    try:
        yield source
    finally:
        source.execute(f"DROP DATABASE {source.schema}", f"DROP USER {source.schema}@'%'")
