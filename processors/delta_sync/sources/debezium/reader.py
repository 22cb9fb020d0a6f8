"""What a pipeline can know of a source whose database Delta has no client of: what is in Kafka.

Its tables are those of the topics' schemas. What needs the database itself is refused, in one sentence: Debezium reads
rows, when `deltactl dump start` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

from typing_extensions import override

from delta_sync.changes import Key
from delta_sync.decoding import TableCodec
from delta_sync.documents import Watch
from delta_sync.errors import UsageError
from delta_sync.kafka.connector import ConnectorStore
from delta_sync.sources.debezium.catalogue import TopicCatalogue
from delta_sync.sources.debezium.codec import table_codec
from delta_sync.sources.reader import CapturePosition, Chunk, Confirmed, Samples, SourceIdentity, SourceReader
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.tables import Table


class NothingSeen(NamedTuple):
    """In place of a sample: no claims are made."""

    position: int = 0


class NoClaims:
    """In place of samples."""

    def add(self, sample: NothingSeen, /) -> None:
        """Nothing to keep."""

    def claim(self, snapshot: object, covered_from: int, /) -> None:
        """There are no claims."""


class ConnectorPosition(CapturePosition):
    """The connector's own position, in the topic of offsets. It is Debezium's, so it is counted, and not understood.

    A position is the number of a record there: everything that the connector had delivered before it wrote that record
    is in Kafka.
    """

    def __init__(self, spec: PipelineSpec, store: ConnectorStore | None = None) -> None:
        self._store = store or ConnectorStore(spec)
        self.name = f"the connector's position in {self._store.where}"

    def close(self) -> None:
        """Release the connection to Kafka. Idempotent."""
        self._store.close()

    def look(self) -> Confirmed | None:
        """Return how far the connector is."""
        found = self._store.newest()
        return None if found is None else Confirmed(found.number + 1, beat=found.number + 1)

    def create(self) -> None:
        """Nothing: the connector begins at the log's end."""

    def drop(self) -> None:
        """Remove position and history."""
        self._store.clear()

    def free(self) -> None:
        """Nothing: what another connector still sends is of an older term."""

    def publish(self, tables: Sequence[Table]) -> None:
        """Nothing: the connector knows its tables."""

    def text(self, position: int) -> str:
        """Return a position for people."""
        return f"record {position} in {self._store.where}"


class TopicReader(SourceReader):
    """Reads what is in Kafka of a source. Used by one thread at a time; every method may raise KafkaBusy."""

    claim_wait_s: ClassVar[float] = 0.0

    def __init__(self, spec: PipelineSpec, catalogue: TopicCatalogue | None = None) -> None:
        self._spec = spec
        self._catalogue = catalogue
        self._place: ConnectorPosition | None = None

    def _tables(self, names: Sequence[str]) -> dict[str, Table]:
        if self._catalogue is None:
            self._catalogue = TopicCatalogue(self._spec)
        return self._catalogue.tables(names)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._catalogue is not None:
            self._catalogue.close()
        if self._place is not None:
            self._place.close()

    def abort(self) -> None:
        """Nothing: Kafka is not waited for longer than some seconds."""

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables of which a record has come."""
        return self.assembled(names, self._tables, lambda _: ())

    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """Return a text for each table of which a record has come: its columns and its key."""
        return self.fingerprinted({name: fingerprint(table) for name, table in self._tables(names).items()})

    def ambiguous(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return, by table, the columns in which a NULL arrives as the column's default."""
        tables = self._tables(names)
        assert self._catalogue is not None, "it was asked"
        return {name: found for name in tables if (found := self._catalogue.ambiguous.get(name))}

    def table_codec(self, table: Table) -> TableCodec:
        """Return how the events of a table are read."""
        return table_codec(table)

    def identity(self) -> SourceIdentity:
        """Return the connector's class: nobody tells whether another server answers."""
        return SourceIdentity(self._spec.source.connector_class, 0)

    @override
    def capture_position(self, spec: PipelineSpec, state: StateStore) -> CapturePosition:
        """Return where the connector keeps its position: in Kafka."""
        del state
        return self._position(spec)

    def _position(self, spec: PipelineSpec) -> ConnectorPosition:
        if self._place is None:
            self._place = ConnectorPosition(spec)
        return self._place

    def log_end(self) -> int:
        """Return how far the connector is."""
        found = self._position(self._spec).confirmed()
        return 0 if found is None else found

    @override
    def bytes_between(self, start: int, end: int) -> int | None:
        """Return None: positions are no bytes."""
        return None

    def new_samples(self) -> Samples:
        """Return what keeps none."""
        return NoClaims()

    def sample(self) -> NothingSeen:
        """Return nothing: no claims are made."""
        return NothingSeen()

    @override
    def estimated_rows(self, table: Table) -> int | None:
        """Return None."""
        return None

    def blockers(self) -> Sequence[object]:
        """Return nobody."""
        return ()

    @override
    def first_columns(self, names: Sequence[str]) -> dict[str, set[str]]:
        """Return none: indexes are not known."""
        return {}

    @override
    def heartbeat(self, prefix: str) -> int:
        """Return how far the connector is: it beats by itself."""
        return self.log_end()

    # ── what needs the database ──

    @override
    def check_condition(self, table: Table, where: str) -> None:
        """Nothing: the connector's log says when the database does not understand it."""

    @override
    def read_chunk(
        self,
        table: Table,
        after: Key | None,
        rows_most: int,
        bytes_most: int,
        usable: Callable[[Any], bool],
        *,
        to: Key | None = None,
        where: str | None = None,
    ) -> Chunk | None:
        """Refuse."""
        _refuse("read rows")

    @override
    def key_behind(self, table: Table, after: Key | None, rows: int) -> Key | None:
        """Refuse."""
        _refuse("read rows")

    @override
    def keys_having(self, table: Table, column: str, values: Sequence[Any], most: int | None = None) -> list[Key]:
        """Refuse."""
        _refuse("look for rows by what a column holds")

    def clock(self) -> int:
        """Refuse."""
        _refuse("take a snapshot")

    @override
    def check_query(self, table: Table) -> None:
        """Refuse."""
        _refuse("ask a query")

    @override
    def root_keys(
        self, watch: Watch, values: Sequence[Key], most: int, usable: Callable[[Any], bool]
    ) -> list[Key] | None:
        """Refuse."""
        _refuse("read rows")

    @override
    def root_condition(self, root: Table, watch: Watch, values: Sequence[Key]) -> str:
        """Refuse."""
        _refuse("read rows")

    @override
    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Any], bool]) -> Chunk | None:
        """Refuse."""
        _refuse("read rows by their keys")


def _refuse(what: str) -> NoReturn:
    raise UsageError(
        f"Delta has no client of this source's database (source.url is debezium://…), so it cannot {what};"
        " `deltactl dump start` has Debezium read rows."
    )


def fingerprint(table: Table) -> str:
    """Return a text that changes whenever a table's columns or its key do."""
    columns = (f"{column.name} {column.type}{'' if column.nullable else '!'}" for column in table.columns)
    return f"({', '.join(columns)}) by ({', '.join(table.key)})"
