"""What Delta needs of a source beside its log, whatever kind it is: `open_reader` of this package opens one.

Positions are integers that rise with the log; what they are made of is each source's own matter, as are its samples and
snapshots (`claims` of each kind): they go from a reader to the samples of the same kind, and nobody looks into them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from delta_sync.changes import Key
from delta_sync.decoding import TableCodec
from delta_sync.documents import DocumentSpec, ForeignKey, Watch, resolved
from delta_sync.errors import UsageError
from delta_sync.shaping import fingerprint, masked
from delta_sync.spec import PipelineSpec, ShapeSpec
from delta_sync.tables import Table
from delta_sync.values import Row
from delta_sync.versions import dump_version, version_of

if TYPE_CHECKING:
    from delta_sync.state import StateStore


class Chunk(NamedTuple):
    """Rows read in one snapshot, in the order of the key. The next chunk begins behind `last_key`; None: the end.

    Of rows read by their keys, `last_key` tells only whether some were left out: then it is not None. `seen_to` is a
    position above every change that the snapshot sees. Rows with their parts have a `clock`, which rises with what
    snapshots see; their versions are made of it, and `seen_to` is a number above it.
    """

    seen_to: int
    rows: list[tuple[Key, Row]]
    last_key: Key | None
    clock: int | None = None

    def version(self, epoch: int, claim: int) -> int:
        """Return the version of its rows: below what the claim leaves to the log, or by the clock."""
        return dump_version(epoch, claim) if self.clock is None else version_of(epoch, self.clock)


class SourceIdentity(NamedTuple):
    """What tells one history of positions from another: they start again when one of the two changes."""

    system_identifier: str
    timeline: int


class Sample(Protocol):
    """What was seen of the log at one moment."""

    @property
    def position(self) -> int:
        """How far the log was."""
        ...


class Snapshot(Protocol):
    """In what rows are read."""

    @property
    def horizon(self) -> int:
        """What stays the same as long as the same transaction keeps a claim from being made."""
        ...

    def shows(self, position: int, xid: int) -> bool:
        """Tell whether it surely sees a change: one at this position, by this transaction, that the log delivered."""
        ...


class Samples(Protocol):
    """The samples taken so far. A source's own are given to it, so their types are not said here."""

    def add(self, sample: Any, /) -> None:
        """Keep a sample that was taken after all those before it."""
        ...

    def claim(self, snapshot: Any, covered_from: int, /) -> int | None:
        """Return the claim of rows read in `snapshot`: a position at or above `covered_from`, or None for not yet.

        Changes at or above the claim come from the log; the snapshot sees all others.
        """
        ...


class Confirmed(NamedTuple):
    """Where the connector goes on. Everything before `position` was delivered and acknowledged; None: not known.

    `lost` says, as a clause, why the source can no longer deliver from there. `beat` is another number each time that
    the connector has shown that it works, also while nothing is written to the log. `overtaken`: it is lost because the
    source removed log that was still needed, by a limit that it may reach again.
    """

    position: int | None
    lost: str | None = None
    beat: int = 0
    overtaken: bool = False


class CapturePosition(ABC):
    """The place where it is kept from where the connector goes on: in the source (a slot), or beside it.

    Methods raise SourceBusy, or another Transient, when the place cannot be reached.
    """

    name: str  # for messages: `replication slot delta_movies`
    evidence_lasts: ClassVar[bool] = True  # whether a loss that is seen can still be seen when somebody acts upon it
    ways_back: ClassVar[str] = "it was restored from a copy of its files"  # how the source's log can end before it did

    @abstractmethod
    def look(self) -> Confirmed | None:
        """Return where the connector goes on; None when there is no such place, or nothing in it yet."""

    def confirmed(self) -> int | None:
        """Return the position alone, as `look` does: for those who ask often."""
        found = self.look()
        return None if found is None else found.position

    @abstractmethod
    def create(self) -> int | None:
        """Make it; return the position from which the log is delivered, or None when only the connector knows."""

    @abstractmethod
    def drop(self) -> None:
        """Remove it, whoever uses it. Nothing happens when there is none."""

    @abstractmethod
    def free(self) -> None:
        """End whatever other connector goes on from there, and wait for its end."""

    @abstractmethod
    def publish(self, tables: Sequence[Table]) -> None:
        """Make the changes of exactly these tables arrive."""

    @abstractmethod
    def text(self, position: int) -> str:
        """Return a position for people."""


class SourceReader(ABC):
    """One connection to the source, opened when needed and again after it broke. Used by one thread at a time.

    Every method raises SourceBusy when the source cannot be reached; CheckFailed when it refuses.
    """

    claim_wait_s: ClassVar[float]  # how long a claim of rows read by key is worth waiting for, where it is not needed
    shapes: Mapping[str, ShapeSpec] = MappingProxyType({})  # by table, as `open_reader` sets them
    documents: Mapping[str, DocumentSpec] = MappingProxyType({})  # by root, as `open_reader` sets them

    @property
    def documented(self) -> frozenset[str]:
        """The tables of which documents are made."""
        return frozenset(name for document in self.documents.values() for name in document.tables)

    def assembled(
        self,
        names: Sequence[str],
        read: Callable[[Sequence[str]], Mapping[str, Table]],
        read_keys: Callable[[Sequence[str]], Sequence[ForeignKey]],
    ) -> dict[str, Table]:
        """Return tables with the masks that the specification has for them, roots with parts: what `tables` returns.

        Raises UsageError for parts that do not fit.
        """
        wanted = [document for root, document in self.documents.items() if root in names]
        everything = tuple(dict.fromkeys([*names, *(name for document in wanted for name in document.tables)]))
        found = {name: masked(table, self.shapes.get(name)) for name, table in read(everything).items()}
        keys = read_keys(everything) if wanted else ()
        made = {name: found[name] for name in names if name in found}
        for document in wanted:
            missing = next((name for name in document.tables if name not in found), None)
            if missing is not None and document.root in found:
                raise UsageError(
                    f"The source has no table {missing}, and documents of {document.root} have a part of it; create it,"
                    " or change the document."
                )
            if document.root in found:
                made[document.root] = resolved(document, found, keys)
        return made

    def fingerprinted(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Return fingerprints that change with the tables' shapes, too: what `fingerprints` has to return."""
        shapes = {name: fingerprint(self.shapes.get(name)) for name in columns}
        return {name: f"{text} {shapes[name]}" if shapes[name] else text for name, text in columns.items()}

    @abstractmethod
    def close(self) -> None:
        """Close the connection. Idempotent."""

    @abstractmethod
    def abort(self) -> None:
        """End, from another thread, whatever is waiting for an answer: it raises SourceBusy."""

    @abstractmethod
    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables that exist, by the name that the specification has for them."""

    @abstractmethod
    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """Return, for each table that exists, a text that changes whenever its columns or its key do."""

    @abstractmethod
    def first_columns(self, names: Sequence[str]) -> dict[str, set[str]]:
        """Return, for tables, the columns with which their usable indexes begin."""

    @abstractmethod
    def estimated_rows(self, table: Table) -> int | None:
        """Return an estimate of a table's rows; None where there is none."""

    @abstractmethod
    def table_codec(self, table: Table) -> TableCodec:
        """Return how the events of a table are read. Asks nobody."""

    @abstractmethod
    def log_end(self) -> int:
        """Return the position at which the next record of the log will be written."""

    def durable_end(self) -> int:
        """Return a position that the log has reached, and that no crash takes back: no connector is beyond it."""
        return self.log_end()

    def bytes_between(self, start: int, end: int) -> int | None:
        """Return how much log lies between two positions; None when that cannot be told. Asks nobody."""
        return max(0, end - start)

    @abstractmethod
    def heartbeat(self, prefix: str) -> int:
        """Return a position that will be passed even if nothing else is written, above all that is visible now."""

    @abstractmethod
    def new_samples(self) -> Samples:
        """Return an empty collection of this source's samples."""

    @abstractmethod
    def sample(self) -> Sample:
        """Take a sample for claims."""

    @abstractmethod
    def identity(self) -> SourceIdentity:
        """Return which history of positions the source is in."""

    @abstractmethod
    def blockers(self) -> Sequence[object]:
        """Return the transactions, as text (`str`), for whose end claims wait, oldest first."""

    @abstractmethod
    def capture_position(self, spec: PipelineSpec, state: StateStore) -> CapturePosition:
        """Return where a pipeline's connector keeps its position: in the source, in Kafka, or in the state store.

        It uses this reader, and ends with it.
        """

    @abstractmethod
    def check_condition(self, table: Table, where: str) -> None:
        """Raise UsageError when the source does not understand a condition (an SQL expression) on a table's rows."""

    @abstractmethod
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
        """Read the rows behind `after`, up to and with `to`, in the order of the key, at most `rows_most`.

        In one snapshot; None if that is not `usable`. It ends early when the values have `bytes_most` bytes. `where`
        is a condition that the rows meet, as SQL. Raises SchemaChanged, and UsageError when the condition fails.
        """

    @abstractmethod
    def key_behind(self, table: Table, after: Key | None, rows: int) -> Key | None:
        """Return the key of the row that is so many rows behind `after` (1: the next one); None beyond the last.

        Only the index is walked, so it is cheap for thousands of rows.
        """

    @abstractmethod
    def keys_having(self, table: Table, column: str, values: Sequence[Any], most: int | None = None) -> list[Key]:
        """Return the keys of the rows whose column has one of these values, as rows have them.

        If there are more than `most`, some more than that. The whole table is read unless the column has an index.
        Raises UsageError for a value beyond the column's type.
        """

    @abstractmethod
    def clock(self) -> int:
        """Return the clock of a snapshot that is taken now; see `Chunk`."""

    @abstractmethod
    def check_query(self, table: Table) -> None:
        """Raise UsageError when a document cannot be read: its query fails or lacks the key, parts cannot be found."""

    @abstractmethod
    def root_keys(
        self, watch: Watch, values: Sequence[Key], most: int, usable: Callable[[Any], bool]
    ) -> list[Key] | None:
        """Return the keys of a document's root to which values of a watch lead, at most so many, in one snapshot.

        None if that is not `usable`. Raises SchemaChanged.
        """

    @abstractmethod
    def root_condition(self, root: Table, watch: Watch, values: Sequence[Key]) -> str:
        """Return the condition, as SQL, that is true of the root's rows to which values of a watch lead."""

    @abstractmethod
    def read_keys(self, table: Table, keys: Sequence[Key], usable: Callable[[Any], bool]) -> Chunk | None:
        """Read the rows of these keys in one snapshot, or return None if that is not `usable`.

        A row that is gone is absent. Of large rows some may be left out: then `last_key` is set. Raises SchemaChanged.
        """
