"""The MongoDB sink: one document per row, its version beside it, deletes' versions in a companion collection.

A document is `{"_id": key, …, "_version": version}`. `<collection>.delta_tombstones` holds `{"_id": key, "version",
"at"}` for each delete, until a TTL index on `at` removes it, and the target's floor (`truncate`) with `raised_at` and
`swept_at` in place of `at`, so that it stays. There is no transaction across the two, and none is needed
(`docs/guarantees.md`, "Two places, no transaction"): an upsert writes the document and then reads the tombstone; a
delete writes the tombstone and then removes the document. Whichever came second sees the other. An upsert reads the
tombstone before it writes, too, so that a row that is deleted already does not come back for the moment in between.

A process that dies there leaves a document that is older than its tombstone or the floor, if these came while it was
writing. Nothing need ever write that key again, so `sweep` looks for such documents.

Once a sink is rebuilt, the second generation of `movies` is the collection `movies.g2`, with tombstones of its own, and
`delta_serving` has `{"_id": "movies", "collection": "movies.g2"}`, by which readers go. A collection is never renamed:
whoever still writes to a generation that was given up must not reach another one by its name.

What BSON makes of a document's values is in `mongodb_documents.py`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import bson
from pydantic import Field
from pymongo import DeleteOne, ReplaceOne, UpdateOne
from pymongo.errors import OperationFailure

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write, rejected
from delta_sync.errors import DeltaError, Problem, SinkRefused, Unstorable, UsageError
from delta_sync.sinks.base import VERSION_FIELD, LoginOptions, Options, Sink, Stored, Target, TargetOptions
from delta_sync.sinks.mongodb_bulk import Operation, send
from delta_sync.sinks.mongodb_collections import (
    SERVING,
    TOMBSTONES,
    Place,
    copy_indexes,
    create_tombstones,
    problems_of,
    refuse_unread,
)
from delta_sync.sinks.mongodb_documents import (
    CODEC,
    FLOOR_ID,
    UNENCODABLE,
    brief,
    bson_id,
    conflict,
    exactly,
    is_unsettled,
    text_of,
    unfit,
    versions_of,
    whole,
)
from delta_sync.sinks.mongodb_link import Collection, Link, batches, parse_path
from delta_sync.tables import Kind, Table, key_text
from delta_sync.values import Document

MAX_NAMESPACE_BYTES = 255  # MongoDB's limit for `database.collection` since 4.4 (120 before)


class MongoOptions(LoginOptions):
    """What a MongoDB sink may say beside its URL. The URL may have MongoDB's own options, such as `tls=true`."""

    write_concern: Literal["majority"] | Annotated[int, Field(ge=1)] = Field(
        default="majority",
        description="How many members of the replica set must have a write before it counts. Fewer than the majority "
        "is faster, and a failover may then lose what Delta has confirmed to the source.",
    )
    journal: bool = Field(default=True, description="Whether a write must be in the journal on disk before it counts.")


class MongoTargetOptions(TargetOptions):
    """What one table may say about its place in a MongoDB sink."""

    collection: str | None = Field(
        default=None, min_length=1, description="The collection; default: the URL's, or else the table's name."
    )


class MongoSink(Sink[MongoOptions, MongoTargetOptions]):
    """`mongodb://host[:port][,…]/database[.collection][?options]`; see the module's text for what is stored."""

    schemes: ClassVar[tuple[str, ...]] = ("mongodb", "mongodb+srv")
    options_model: ClassVar[type[Options]] = MongoOptions
    target_model: ClassVar[type[TargetOptions]] = MongoTargetOptions
    generations: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        url: str,
        options: MongoOptions,
        tombstone_ttl_s: int,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        """Raise UsageError when the URL names no database. `now` dates tombstones."""
        super().__init__(name, url, options, tombstone_ttl_s)
        self._now = now
        self._database, self._collection = parse_path(name, url)
        self._link = Link(url, options, options.write_concern, options.journal)

    # ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────

    def target(self, table: Table, options: MongoTargetOptions) -> Target:
        name = options.collection or self._collection or table.name
        if "$" in name or "\0" in name or name.startswith("system.") or ".." in f".{name}.":
            raise UsageError(f"sink {self.name}: MongoDB allows no collection named {name!r}; set `collection`.")
        if name == SERVING:
            raise UsageError(f"sink {self.name}: the collection {name} is Delta's own; set `collection`.")
        collection = name if self.number in (None, 1) else f"{name}.g{self.number}"
        if len(f"{self._database}.{collection}{TOMBSTONES}".encode()) > MAX_NAMESPACE_BYTES:
            raise UsageError(f"sink {self.name}: collection name {collection!r} is too long; set `collection`.")
        intervals = any(column.kind is Kind.INTERVAL for column in table.columns)
        return Target(table, f"{self._database}.{collection}", Place(self._database, collection, intervals, name))

    def check(self, targets: Sequence[Target]) -> list[Problem]:
        where = f"sink {self.name}"
        try:
            with self._link.typed_errors():
                self._link.ping()
                rebuilt = self.number is not None
                return [
                    one
                    for target in targets
                    for one in problems_of(self._link, where, target.settings, rebuilt=rebuilt)
                ]
        except DeltaError as error:
            fix = "" if isinstance(error, SinkRefused) else "check its address and that it runs"
            if isinstance(error.__cause__, OperationFailure):  # any other refusal says what is wrong itself
                fix = "check its user and roles"
            return [Problem(where, str(error), fix)]

    def prepare(self, target: Target) -> None:
        place: Place = target.settings
        with self._link.typed_errors():
            create_tombstones(self._link, place, self.tombstone_ttl_s)
            if self.number is None:
                refuse_unread(self._link, place)
            else:
                copy_indexes(self._link, place)

    def lead_readers(self, targets: Sequence[Target]) -> None:
        """Say in each target's document of `delta_serving` where its readers find it; one after the other."""
        with self._link.typed_errors():
            for target in targets:
                place: Place = target.settings
                now = {"$set": {"collection": place.collection}}
                self._serving(place).update_one({"_id": place.name}, now, upsert=True)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Apply the writes: three round trips for upserts, up to four more when there are deletes or stale ones."""
        table, place = target.table, cast("Place", target.settings)
        ids = [bson_id(table, write.key) for write in writes]
        tombstones: dict[int, Operation] = {}
        operations: dict[int, Operation] = {}
        outcomes: dict[int, Outcome] = {}  # all but the applied ones
        at = self._now()
        for index, (id_, write) in enumerate(zip(ids, writes, strict=True)):
            not_newer = self._not_newer(id_, write.version)
            if write.document is None:
                newest = {"$max": {"version": write.version, "at": at}}
                tombstones[index] = UpdateOne({"_id": id_}, newest, upsert=True)
                operations[index] = DeleteOne(not_newer)
            elif reason := conflict(table, write.key, write.document):
                outcomes[index] = rejected(reason)
            else:
                operations[index] = ReplaceOne(not_newer, whole(id_, write, intervals=place.intervals), upsert=True)

        def content(index: int) -> Document:
            return whole(ids[index], writes[index], intervals=place.intervals)

        with self._link.typed_errors():
            # The rules in the module's text ask for this order.
            upserts = [index for index in operations if index not in tombstones]
            outcomes |= self._obey_tombstones(target, upserts, ids, writes)
            outcomes |= send(self._link, self._tombstones(target), tombstones, content)
            operations = {index: one for index, one in operations.items() if index not in outcomes}
            outcomes |= send(self._link, self._documents(target), operations, content)
            written = [index for index in operations if index not in outcomes]
            outcomes |= self._obey_tombstones(target, written, ids, writes)
            deleted = [index for index in tombstones if index not in outcomes]
            outcomes |= self._find_survivors(target, deleted, ids, writes)
        return [outcomes.get(index, APPLIED) for index in range(len(writes))]

    def _not_newer(self, id_: object, version: int) -> dict[str, Any]:
        """Return the filter that finds the document unless a newer one is there."""
        return {"_id": id_, VERSION_FIELD: {"$lte": version}}

    def _outranked(
        self, target: Target, written: Sequence[int], ids: Sequence[object], writes: Sequence[Write]
    ) -> dict[int, int]:
        """Return which of the writes a tombstone or the floor outranks, and its version."""
        if not written:
            return {}
        among = {"_id": {"$in": [*(ids[index] for index in written), FLOOR_ID]}}
        try:
            floor, deleted = versions_of(target.table, self._tombstones(target).find(among, {"version": 1}))
        except UNENCODABLE:
            fit = [index for index in written if unfit({"_id": ids[index]}) is None]
            if len(fit) == len(written):
                raise
            return self._outranked(target, fit, ids, writes)  # the others are rejected when they are written
        if not floor and not deleted:
            return {}
        least = {index: max(floor, deleted.get(key_text(writes[index].key), 0)) for index in written}
        return {index: version for index, version in least.items() if writes[index].version < version}

    def _obey_tombstones(
        self, target: Target, written: Sequence[int], ids: Sequence[object], writes: Sequence[Write]
    ) -> dict[int, Outcome]:
        """Return as stale the writes that a tombstone or the floor outranks; delete what is that old of their rows."""
        outranked = self._outranked(target, written, ids, writes)
        self._remove(
            target,
            [(ids[index], least) for index, least in outranked.items() if writes[index].document is not None],
        )
        return dict.fromkeys(outranked, STALE)

    def _remove(self, target: Target, outranked: Iterable[tuple[object, int]]) -> int:
        """Delete documents, given by `_id`, that are still older than what outranks them; return how many went."""
        removals = [DeleteOne({"_id": id_, VERSION_FIELD: {"$lt": least}}) for id_, least in outranked]
        return self._documents(target).bulk_write(removals, ordered=False).deleted_count if removals else 0

    def _find_survivors(
        self, target: Target, deleted: Sequence[int], ids: Sequence[object], writes: Sequence[Write]
    ) -> dict[int, Outcome]:
        """Return as stale the deletes whose document is still there, because it is newer."""
        if not deleted:
            return {}
        among = {"_id": {"$in": [ids[index] for index in deleted]}}
        _, there = versions_of(target.table, self._documents(target).find(among, {VERSION_FIELD: 1}))
        return {index: STALE for index in deleted if there.get(key_text(writes[index].key), 0) > writes[index].version}

    def truncate(self, target: Target, version: int) -> int:
        with self._link.typed_errors():
            newest = {"$max": {"version": version, "raised_at": self._now()}}
            raised = {0: UpdateOne({"_id": FLOOR_ID}, newest, upsert=True)}
            send(self._link, self._tombstones(target), raised, lambda _: {"_id": FLOOR_ID})
            return self._remove_older(target, version)

    def _remove_older(self, target: Target, version: int) -> int:
        """Delete all documents below a floor; return how many went. One pass, because what comes later obeys the floor.

        All versions are read: a server that was to find the older ones by itself, without an index, could look for
        longer than a command may take when there are few.
        """
        gone = 0
        for batch in batches(self._documents(target).find({}, {VERSION_FIELD: 1})):
            ids = [one["_id"] for one in batch if int(one.get(VERSION_FIELD, version)) < version]
            gone += self._remove_below(target, ids, version) if ids else 0
        return gone

    def _remove_below(self, target: Target, ids: Sequence[object], version: int) -> int:
        """Delete the documents of these that are still older."""
        older = {"_id": {"$in": ids}, VERSION_FIELD: {"$lt": version}}
        return self._documents(target).delete_many(older).deleted_count

    def sweep(self, target: Target, recent_s: float | None = None) -> int:
        """Delete what is older than its tombstone or the floor; return how many went. Tombstones expire by themselves.

        Because an upsert reads both before it writes, too, these cannot be much older than what is to be found.
        """
        now = self._now()
        since = None if recent_s is None else now - dt.timedelta(seconds=recent_s)
        with self._link.typed_errors():
            return self._sweep_deleted(target, since) + self._sweep_floor(target, since, now)

    def _sweep_deleted(self, target: Target, since: dt.datetime | None) -> int:
        gone = 0
        wanted = {} if since is None else {"at": {"$gte": since}}
        for batch in batches(self._tombstones(target).find(wanted, {"version": 1})):
            _, deleted = versions_of(target.table, batch)
            among = {"_id": {"$in": [one["_id"] for one in batch]}}
            found = list(self._documents(target).find(among, {VERSION_FIELD: 1}))
            # Not all are of these keys: to MongoDB 1 and 1.0 are one `_id`.
            pairs = [(one, deleted.get(text_of(target.table, one["_id"]), 0)) for one in found]
            gone += self._remove(
                target, [(one["_id"], least) for one, least in pairs if int(one.get(VERSION_FIELD, least)) < least]
            )
        return gone

    def _sweep_floor(self, target: Target, since: dt.datetime | None, now: dt.datetime) -> int:
        floor = self._tombstones(target).find_one({"_id": FLOOR_ID})
        if floor is None or not is_unsettled(floor, since):
            return 0
        gone = self._remove_older(target, int(floor["version"]))
        self._tombstones(target).update_one({"_id": FLOOR_ID}, {"$max": {"swept_at": now}})
        return gone

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        table = target.table
        documents = [DeleteOne({"_id": bson_id(table, key), VERSION_FIELD: exactly(v)}) for key, v in items]
        tombstones = [DeleteOne({"_id": bson_id(table, key), "version": exactly(v)}) for key, v in items]
        with self._link.typed_errors():
            if items:
                self._documents(target).bulk_write(documents, ordered=False)
                self._tombstones(target).bulk_write(tombstones, ordered=False)

    def drop(self, target: Target) -> int:
        with self._link.typed_errors():
            count = self._documents(target).count_documents({})
            self._documents(target).drop()
            self._tombstones(target).drop()
            if self.number is not None:
                place: Place = target.settings
                self._serving(place).delete_one({"_id": place.name, "collection": place.collection})
        return count

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        if not keys:
            return []
        table = target.table
        among = {"_id": {"$in": [bson_id(table, key) for key in keys]}}
        with self._link.typed_errors():
            documents = list(self._documents(target).find(among))
            _, deleted = versions_of(table, self._tombstones(target).find(among, {"version": 1}))
        stored = {text: Stored(version, None) for text, version in deleted.items()}
        for document in documents:
            text, version = text_of(table, document.pop("_id")), int(document.pop(VERSION_FIELD, 0))
            if version >= deleted.get(text, 0):
                stored[text] = Stored(version, document)
        return [stored.get(key_text(key)) for key in keys]

    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        with self._link.typed_errors():
            for batch in batches(self._documents(target).find({}, {VERSION_FIELD: 1})):
                yield [(text_of(target.table, one["_id"]), int(one.get(VERSION_FIELD, 0))) for one in batch]

    def newest_version(self, target: Target) -> int:
        """Read all versions: a server that was to sort them, without an index, could take longer than a command may."""
        newest = 0
        with self._link.typed_errors():
            for collection, field in ((self._documents(target), VERSION_FIELD), (self._tombstones(target), "version")):
                for batch in batches(collection.find({}, {field: 1})):
                    newest = max([newest, *(int(one.get(field, 0)) for one in batch)])
        return newest

    def stored_form(self, target: Target, document: Document) -> dict[str, Any]:
        place: Place = target.settings
        stored = whole(None, Write((), 0, document), intervals=place.intervals)
        try:
            form = bson.BSON(bson.encode(stored, codec_options=CODEC)).decode(CODEC)
        except UNENCODABLE as error:
            raise Unstorable(f"The document cannot be written as BSON: {brief(error)}.") from error
        del form["_id"], form[VERSION_FIELD]
        return form

    def close(self) -> None:
        self._link.close()

    def _documents(self, target: Target) -> Collection:
        place: Place = target.settings
        return self._link.collection(place.database, place.collection)

    def _tombstones(self, target: Target) -> Collection:
        place: Place = target.settings
        return self._link.collection(place.database, place.collection + TOMBSTONES)

    def _serving(self, place: Place) -> Collection:
        return self._link.collection(place.database, SERVING)
