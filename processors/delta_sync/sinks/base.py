"""What a sink is. A new one is one file with one class, registered in the entry-point group `delta_sync.sinks`.

A sink stores documents with versions, such that writes commute: whatever the order in which the same writes arrive,
however often, in whatever batches and from however many processes at once, the store ends in the same state
(`docs/guarantees.md`). `delta_sync.testing.contract` tests that; run it on every sink you write.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from delta_sync.changes import Key, Outcome, Write
from delta_sync.errors import Problem, Unstorable
from delta_sync.tables import Table, key_of_text, key_text
from delta_sync.values import Document, from_json, to_json

VERSION_FIELD = "_version"  # where a store without versions of its own keeps it in a document; no document may have it


class Options(BaseModel):
    """Base of a sink's options: what `pipeline.yaml` may say beside `url`. Field descriptions become documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoginOptions(Options):
    """Base of the options of a sink whose store asks who logs in."""

    username: str | None = Field(default=None, description="User name, if it is not in the URL.")
    password: str | None = Field(default=None, description="Password: a reference, ${env:NAME} or ${file:/path}.")


class TargetOptions(Options):
    """Base of what `pipeline.yaml` may say for one table in one sink (`tables: {public.movie: {cache: {…}}}`)."""


class Stored(NamedTuple):
    """What a sink holds for a key: the version and the document, or None for a deleted one's tombstone.

    The document is as the store has it (JSON values, BSON values), without anything that Delta added to it. Version 0:
    a document whose version somebody has taken away.
    """

    version: int
    document: dict[str, Any] | None


class Target(NamedTuple):
    """Where one table's documents go within a sink. Two tables of a pipeline never share one.

    `place` is what the store calls it (a key template, a collection, an index); `settings` is the sink's own.
    """

    table: Table
    place: str
    settings: Any = None


OptionsT = TypeVar("OptionsT", bound=Options)
TargetOptionsT = TypeVar("TargetOptionsT", bound=TargetOptions)


class Sink(ABC, Generic[OptionsT, TargetOptionsT]):
    """One derived store. Constructing it connects to nothing.

    Every method may raise `SinkBusy` (transient: the worker calls it again with the same arguments, for ever) or
    `SinkRefused` (systematic: the pipeline stops). Whatever else it raises is a defect and stops the pipeline, too.
    Methods are called from several threads at once.
    """

    schemes: ClassVar[tuple[str, ...]]  # of the URLs it is for: ("redis", "rediss")
    options_model: ClassVar[type[Options]] = Options
    target_model: ClassVar[type[TargetOptions]] = TargetOptions
    generations: ClassVar[bool] = (
        False  # whether `deltactl pipeline rebuild` is for it: see `number` and `lead_readers`
    )

    number: int | None = None
    """The generation that this sink is of; None: it was never rebuilt.

    Set before `target` is called, which then gives that generation's place. 1 is the place that None has, to which
    readers may no longer be led; the others have places of their own. Generations share nothing but the readers' name.
    """

    def __init__(self, name: str, url: str, options: OptionsT, tombstone_ttl_s: int) -> None:
        """`url` has its secrets resolved. A delete's version is kept for `tombstone_ttl_s` seconds."""
        self.name = name
        self.url = url
        self.options = options
        self.tombstone_ttl_s = tombstone_ttl_s

    @abstractmethod
    def target(self, table: Table, options: TargetOptionsT) -> Target:
        """Return where the table's documents go. Pure: same arguments, same target, nothing is created.

        Raises UsageError when the options do not fit the table, such as a key template that names no key column.
        """

    @abstractmethod
    def check(self, targets: Sequence[Target]) -> list[Problem]:
        """Return what has to change before documents can be written: reachable, version, privileges, what is there.

        Writes nothing. An unreachable store is a problem, not an exception.
        """

    @abstractmethod
    def prepare(self, target: Target) -> None:
        """Create what the target needs (index, mapping, alias, TTL index). Idempotent; harmless to what exists."""

    @abstractmethod
    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Apply the writes, at most one per key, in as few round trips as the store allows; one outcome for each.

        A write is applied when its version is at or above both the stored one (a document's or a tombstone's) and
        the target's floor (`truncate`), else it is stale. When it returns, the store has acknowledged every write as
        durably as it is configured to. When it raises, or the process dies in it, any of them may have been applied,
        and a document that is too old may be there: the same call again or `sweep` removes it.
        """

    @abstractmethod
    def truncate(self, target: Target, version: int) -> int:
        """Delete everything older than `version` and keep out what comes later and is older; return how many went.

        First the floor is recorded (max of the recorded one and `version`), then what is there is deleted, so that a
        concurrent older write is either seen by the scan or sees the floor. Floors do not expire.
        """

    @abstractmethod
    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        """Return what the store holds for each key; None when it holds neither a document nor a tombstone."""

    def read_beside(
        self, target: Target, keys: Sequence[Key], documents: Sequence[Document | None]
    ) -> Sequence[Stored | int | None]:
        """Return what `read` does, or for a key the version alone where the store holds exactly this document.

        For verification, of which nearly all documents are equal: a store that is compared as it was written need not
        be decoded. Whoever is in doubt returns what is stored, as this does.
        """
        del documents
        return self.read(target, keys)

    @abstractmethod
    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        """Yield, in batches, the id and version of every document (no tombstones) of the target.

        Ids are as `id_of` writes them. What is written meanwhile may be missed or met twice.
        """

    def scan_ids(self, target: Target) -> Iterator[list[str]]:
        """Yield ids as `scan` does, where that is cheaper; among them may be those of documents without a version."""
        for batch in self.scan(target):
            yield [id_ for id_, _ in batch]

    @abstractmethod
    def newest_version(self, target: Target) -> int:
        """Return the highest version of all that could outrank a write: documents, tombstones, the floor; 0 for none.

        Called after `prepare`, when a run starts that knows no epoch: it writes above all of this. Nothing may be left
        out, or every write of that run would be stale, in silence; what is written meanwhile may be missed. It may look
        at everything.
        """

    def id_of(self, target: Target, key: Key) -> str:
        """Return the id under which a key's document is stored, as text: the key's, unless the store has others.

        Pure, and injective.
        """
        del target
        return key_text(key)

    def key_of(self, target: Target, id_: str) -> Key | None:
        """Return a key that has this id, or None when no key can: somebody else put that document there.

        The inverse of `id_of`, by which `deltactl verify` asks the source whether a document's row is there.
        """
        try:
            key = key_of_text(target.table, id_)
        except ValueError:
            return None
        return key if self.id_of(target, key) == id_ else None

    def stored_form(self, target: Target, document: Document) -> dict[str, Any]:
        """Return a document as `read` gives it once it was written: with JSON values, unless the store has others.

        Pure. Raises Unstorable for one that cannot be written in the store's format; `apply` may reject more.
        """
        del target
        try:
            form: dict[str, Any] = from_json(to_json(document))
        except (TypeError, RecursionError) as error:
            raise Unstorable(f"The document cannot be written as JSON: {error}.") from error
        return form

    def expires(self, target: Target) -> bool:
        """Tell whether the store removes documents of this target by itself, so that one that is missing is no loss."""
        del target
        return False

    @abstractmethod
    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        """Forget keys: remove document and tombstone where the version is exactly the one that is given with the key.

        For repair alone, of versions that no change can have had: nothing of this pipeline could ever beat them. No
        version is left behind, so whoever calls it reads the row afterwards, and writes what it has read.
        """

    def lead_readers(self, targets: Sequence[Target]) -> None:
        """Lead readers to these targets, which are all of this sink's generation, in one step. Idempotent.

        Called after `prepare`, for a sink with a `number`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no generations, of the targets {targets!r:.100}")

    @abstractmethod
    def drop(self, target: Target) -> int:
        """Delete all that Delta put there, what `prepare` created included. Return how many documents there were."""

    def sweep(self, target: Target, recent_s: float | None = None) -> int:
        """Finish what killed processes left half done, and remove expired tombstones; return how much was removed.

        Where a document and what outranks it (its tombstone, the floor) cannot be written and compared in one step, an
        upsert writes the document first and then looks whether it may stay. A process that dies between the two may
        leave a document that is older than its tombstone or the floor. Repeating the very same write would remove it,
        but perhaps nobody will: a row that is read again has changed or is gone by then. This removes it.

        Called without `recent_s` when a run starts, before it writes anything: look at everything. Then now and then
        with it, for processes that die beside this one: what was deleted or truncated more than so many seconds ago
        may be left out. Harmless at any time, and a write at or above the tombstone or floor that races it must win.
        A sink that writes in one step, and whose store removes tombstones itself, has nothing to do.
        """
        del target, recent_s
        return 0

    def close(self) -> None:
        """Release connections. Idempotent."""
