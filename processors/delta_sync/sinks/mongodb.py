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

What BSON makes of a document's values:

| Python | BSON |
| --- | --- |
| `str`, `bool`, `float` (NaN too), `None`, `dict`, `list`, `bytes` | as they are |
| `int` | 32 or 64 bits; beyond, the write is rejected |
| `Decimal` | Decimal128 (NaN and infinity too); with more than 34 digits: its text |
| `datetime` | date, in UTC (a naive one is taken as UTC), **cut to milliseconds**, which is all that BSON has |
| `date` | date at 00:00 UTC, so that ranges, `$dateTrunc` and TTL indexes work on it |
| `time`, `Interval` | ISO 8601 text (an interval that a processor made up and put inside a list or dict: an array) |
| `UUID` | Binary of subtype 4 |
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import itertools
import re
import threading
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast
from urllib.parse import parse_qsl, unquote

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, TypeRegistry
from bson.decimal128 import Decimal128
from bson.errors import BSONError
from pydantic import Field
from pymongo import DeleteOne, MongoClient, ReplaceOne, UpdateOne
from pymongo.collection import Collection as MongoCollection
from pymongo.cursor import Cursor
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DocumentTooLarge,
    DuplicateKeyError,
    OperationFailure,
    WaitQueueTimeoutError,
)
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write, rejected
from delta_sync.errors import DeltaError, Problem, SinkBusy, SinkRefused, Unstorable, UsageError
from delta_sync.sinks.base import VERSION_FIELD, LoginOptions, Options, Sink, Stored, Target, TargetOptions
from delta_sync.tables import Kind, Table, key_text
from delta_sync.urls import parts_of, split_url
from delta_sync.values import Document, Interval, decimal_text, scalar_text

TOMBSTONES = ".delta_tombstones"  # what a target's companion collection is called, after the target's own name
SERVING = "delta_serving"  # the collection by which readers find a generation
FLOOR_ID = bson.ObjectId("0" * 24)  # no key's id is of that type (see `bson_id`)

MAX_DOCUMENT_BYTES = 16 << 20  # MongoDB's limit
MAX_NAMESPACE_BYTES = 255  # MongoDB's limit for `database.collection` since 4.4 (120 before)
SCAN_BATCH = 5000  # ids and versions are some 60 bytes each: far below a reply's 16 MB
FLOOR_SETTLES = dt.timedelta(days=1)  # no writer stands still for so long between reading the floor and writing

SERVER_SELECTION_TIMEOUT_MS = 5_000  # an election takes 2–12 s; the worker asks again, and says meanwhile why it waits
CONNECT_TIMEOUT_MS = 5_000  # two lost SYNs
WRITE_CONCERN_TIMEOUT_MS = 30_000  # a majority that has not confirmed by now lags; the same batch is sent again
SOCKET_TIMEOUT_MS = 60_000  # above the write concern's, so that the server's own answer comes first


OPERATION_BYTES = 1024  # room for what surrounds a document in an operation
MAX_DATABASE_BYTES = 63

_Operation = ReplaceOne[dict[str, Any]] | UpdateOne | DeleteOne
_Collection = MongoCollection[dict[str, Any]]


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


class Place(NamedTuple):
    """Where a target's documents are; `intervals`: whether its table has columns of them (see `_with_texts`).

    `name` is what readers know, the collection of the first generation.
    """

    database: str
    collection: str
    intervals: bool
    name: str


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
        self._write_concern = WriteConcern(options.write_concern, WRITE_CONCERN_TIMEOUT_MS, options.journal)
        self._hosts = parts_of(url).netloc.rpartition("@")[2]  # for messages: without user and password
        self._connecting = threading.Lock()
        self._client: MongoClient[dict[str, Any]] | None = None

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
            with self._typed_errors():
                self._connected().admin.command("ping")
                return [problem for target in targets for problem in self._problems_of(where, target)]
        except DeltaError as error:
            fix = "check its user and roles" if isinstance(error, SinkRefused) else "check its address and that it runs"
            return [Problem(where, str(error), fix)]

    def _problems_of(self, where: str, target: Target) -> list[Problem]:
        problems: list[Problem] = []
        place: Place = target.settings
        for found in self._connected()[place.database].list_collections(filter={"name": place.collection}):
            options = found.get("options", {})
            if found.get("type", "collection") != "collection" or options.get("capped"):
                what = f"{target.place} is a {'capped collection' if options.get('capped') else found['type']}"
                problems.append(Problem(where, what, "set `collection` to a plain or a new collection"))
            if options.get("collation"):
                what = f"{target.place} has a default collation, under which different keys may be equal"
                problems.append(Problem(where, what, "set `collection` to one without a collation, or to a new one"))
        sample = self._documents(target).find_one({}, {VERSION_FIELD: 1})
        if sample is not None and not isinstance(sample.get(VERSION_FIELD), int):
            what = f"{target.place} holds documents that Delta did not write (without {VERSION_FIELD})"
            problems.append(Problem(where, what, "set `collection` to an empty or a new collection"))
        missing = self._missing_actions(place)
        if missing:
            what = f"the user may not {', '.join(missing)} on {target.place} and {target.place}{TOMBSTONES}"
            problems.append(Problem(where, what, f"grant the role readWrite on {place.database}"))
        return problems

    def _missing_actions(self, place: Place) -> list[str]:
        try:
            status = self._connected()[place.database].command("connectionStatus", showPrivileges=True)
        except OperationFailure:
            return []  # not every MongoDB-compatible store has it; what is missing shows when it is needed
        auth: Mapping[str, Any] = status.get("authInfo", {})
        if not auth.get("authenticatedUsers"):
            return []  # access control is off
        privileges: list[Mapping[str, Any]] = auth.get("authenticatedUserPrivileges", [])
        names = [place.collection, place.collection + TOMBSTONES, *([SERVING] if self.number is not None else [])]
        return missing_actions(privileges, place.database, names)

    def prepare(self, target: Target) -> None:
        with self._typed_errors():
            tombstones = self._tombstones(target)
            try:
                tombstones.create_index("at", expireAfterSeconds=self.tombstone_ttl_s)
            except OperationFailure as error:
                if error.code != _INDEX_OPTIONS_CONFLICT:
                    raise
                index = {"keyPattern": {"at": 1}, "expireAfterSeconds": self.tombstone_ttl_s}
                tombstones.database.command("collMod", tombstones.name, index=index)
            if self.number is None:
                self._refuse_unread(target)
            else:
                self._copy_indexes(target)

    def _refuse_unread(self, target: Target) -> None:
        """Raise SinkRefused when readers look elsewhere."""
        place: Place = target.settings
        led = self._serving(place).find_one({"_id": place.name})
        if led is not None and led.get("collection") != place.collection:
            raise SinkRefused(
                f"{place.database}.{SERVING} leads readers from {place.name} to {led.get('collection')}, and the state"
                " store knows nothing of it; give the pipeline its state back, or delete that document and --reload"
            )

    def _copy_indexes(self, target: Target) -> None:
        """Give a collection that is not there yet the indexes that readers have, in one command, while it is empty."""
        place: Place = target.settings
        database = self._connected()[place.database]
        if place.collection in database.list_collection_names(filter={"name": place.collection}):
            return
        led = self._serving(place).find_one({"_id": place.name}) or {}
        serving = database[str(led.get("collection", place.name))]
        indexes = [
            {name: value for name, value in index.items() if name not in ("v", "ns")}
            for index in serving.list_indexes()
            if index["name"] != "_id_"
        ]
        if indexes:
            concern = self._write_concern.document
            database.command("createIndexes", place.collection, indexes=indexes, writeConcern=concern)

    def lead_readers(self, targets: Sequence[Target]) -> None:
        """Say in each target's document of `delta_serving` where its readers find it; one after the other."""
        with self._typed_errors():
            for target in targets:
                place: Place = target.settings
                now = {"$set": {"collection": place.collection}}
                self._serving(place).update_one({"_id": place.name}, now, upsert=True)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Apply the writes: three round trips for upserts, up to four more when there are deletes or stale ones."""
        table, place = target.table, cast("Place", target.settings)
        ids = [bson_id(table, write.key) for write in writes]
        tombstones: dict[int, _Operation] = {}
        operations: dict[int, _Operation] = {}
        outcomes: dict[int, Outcome] = {}  # all but the applied ones
        at = self._now()
        for index, (id_, write) in enumerate(zip(ids, writes, strict=True)):
            not_newer = self._not_newer(id_, write.version)
            if write.document is None:
                newest = {"$max": {"version": write.version, "at": at}}
                tombstones[index] = UpdateOne({"_id": id_}, newest, upsert=True)
                operations[index] = DeleteOne(not_newer)
            elif reason := _conflict(table, write.key, write.document):
                outcomes[index] = rejected(reason)
            else:
                operations[index] = ReplaceOne(not_newer, _whole(place, id_, write), upsert=True)

        def content(index: int) -> Document:
            return _whole(place, ids[index], writes[index])

        with self._typed_errors():
            # The rules in the module's text ask for this order.
            upserts = [index for index in operations if index not in tombstones]
            outcomes |= self._obey_tombstones(target, upserts, ids, writes)
            outcomes |= self._send(self._tombstones(target), tombstones, content)
            operations = {index: one for index, one in operations.items() if index not in outcomes}
            outcomes |= self._send(self._documents(target), operations, content)
            written = [index for index in operations if index not in outcomes]
            outcomes |= self._obey_tombstones(target, written, ids, writes)
            deleted = [index for index in tombstones if index not in outcomes]
            outcomes |= self._find_survivors(target, deleted, ids, writes)
        return [outcomes.get(index, APPLIED) for index in range(len(writes))]

    def _not_newer(self, id_: object, version: int) -> dict[str, Any]:
        """Return the filter that finds the document unless a newer one is there."""
        return {"_id": id_, VERSION_FIELD: {"$lte": version}}

    def _send(
        self, collection: _Collection, operations: Mapping[int, _Operation], content: Callable[[int], Document]
    ) -> dict[int, Outcome]:
        """Send operations, by their write's index, and return the outcome of each that was not applied.

        `content` gives an index's document again, to find out why it cannot be encoded.
        """
        outcomes: dict[int, Outcome] = {}
        pending = dict(operations)
        for attempt in range(2):
            duplicates: dict[int, _Operation] = {}
            for index, error in self._bulk_write(collection, pending, content, outcomes):
                if error.get("code") != _DUPLICATE_KEY:
                    outcomes[index] = self._outcome_of(error)
                elif not _is_about_id(error):
                    outcomes[index] = rejected(f"a unique index forbids it: {error.get('errmsg')}")
                elif attempt == 0:
                    # Either a newer document is there, or another upsert of this key came in between: ask again.
                    duplicates[index] = pending[index]
                elif isinstance(pending[index], UpdateOne):
                    raise SinkBusy(f"MongoDB at {self._hosts}: two writers of one tombstone met twice")
                else:
                    outcomes[index] = STALE
            pending = duplicates
        return outcomes

    def _bulk_write(
        self,
        collection: _Collection,
        operations: dict[int, _Operation],
        content: Callable[[int], Document],
        outcomes: dict[int, Outcome],
    ) -> list[tuple[int, Mapping[str, Any]]]:
        """Send operations in any order; return the server's error for each that failed.

        What cannot be encoded or is too large is looked for only when something went wrong, so that the good case
        costs nothing: it gets its outcome, leaves `operations`, and the rest is sent again. The driver does not
        compare updates with MongoDB's limit; servers fail the whole command or close the connection.
        """
        if not operations:
            return []
        try:
            collection.bulk_write(list(operations.values()), ordered=False)
        except BulkWriteError as error:
            details: Mapping[str, Any] = error.details
            for concern in details.get("writeConcernErrors", ()):
                raise SinkBusy(f"MongoDB at {self._hosts} cannot confirm writes: {concern.get('errmsg')}") from error
            indexes = list(operations)
            return [(indexes[one["index"]], one) for one in details["writeErrors"]]
        except (*_UNENCODABLE, ConnectionFailure, OperationFailure):
            unfit = {index: reason for index in operations if (reason := _unfit(content(index)))}
            if not unfit:
                raise
            for index, reason in unfit.items():
                outcomes[index] = rejected(reason)
                del operations[index]
            return self._bulk_write(collection, operations, content, outcomes)
        return []

    def _outcome_of(self, error: Mapping[str, Any]) -> Outcome:
        """Return the outcome of a write that the server refused, or raise if it would refuse every other one, too."""
        code, text = error.get("code"), str(error.get("errmsg"))
        if code in _BUSY or code in _REFUSED:
            raise self._typed(code, text)
        return rejected(text)

    def _outranked(
        self, target: Target, written: Sequence[int], ids: Sequence[object], writes: Sequence[Write]
    ) -> dict[int, int]:
        """Return which of the writes a tombstone or the floor outranks, and its version."""
        if not written:
            return {}
        among = {"_id": {"$in": [*(ids[index] for index in written), FLOOR_ID]}}
        try:
            floor, deleted = _versions(target.table, self._tombstones(target).find(among, {"version": 1}))
        except _UNENCODABLE:
            fit = [index for index in written if _unfit({"_id": ids[index]}) is None]
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
        _, there = _versions(target.table, self._documents(target).find(among, {VERSION_FIELD: 1}))
        return {index: STALE for index in deleted if there.get(key_text(writes[index].key), 0) > writes[index].version}

    def truncate(self, target: Target, version: int) -> int:
        with self._typed_errors():
            newest = {"$max": {"version": version, "raised_at": self._now()}}
            raised = {0: UpdateOne({"_id": FLOOR_ID}, newest, upsert=True)}
            self._send(self._tombstones(target), raised, lambda _: {"_id": FLOOR_ID})
            return self._remove_older(target, version)

    def _remove_older(self, target: Target, version: int) -> int:
        """Delete all documents below a floor; return how many went. One pass, because what comes later obeys the floor.

        All versions are read: a server that was to find the older ones by itself, without an index, could look for
        longer than a command may take when there are few.
        """
        gone = 0
        for batch in _batches(self._documents(target).find({}, {VERSION_FIELD: 1})):
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
        with self._typed_errors():
            return self._sweep_deleted(target, since) + self._sweep_floor(target, since, now)

    def _sweep_deleted(self, target: Target, since: dt.datetime | None) -> int:
        gone = 0
        wanted = {} if since is None else {"at": {"$gte": since}}
        for batch in _batches(self._tombstones(target).find(wanted, {"version": 1})):
            _, deleted = _versions(target.table, batch)
            among = {"_id": {"$in": [one["_id"] for one in batch]}}
            found = list(self._documents(target).find(among, {VERSION_FIELD: 1}))
            pairs = [(one, deleted[_text_of(target.table, one["_id"])]) for one in found]
            gone += self._remove(
                target, [(one["_id"], least) for one, least in pairs if int(one.get(VERSION_FIELD, least)) < least]
            )
        return gone

    def _sweep_floor(self, target: Target, since: dt.datetime | None, now: dt.datetime) -> int:
        floor = self._tombstones(target).find_one({"_id": FLOOR_ID})
        if floor is None or not _is_unsettled(floor, since):
            return 0
        gone = self._remove_older(target, int(floor["version"]))
        self._tombstones(target).update_one({"_id": FLOOR_ID}, {"$max": {"swept_at": now}})
        return gone

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        table = target.table
        documents = [DeleteOne({"_id": bson_id(table, key), VERSION_FIELD: _exactly(v)}) for key, v in items]
        tombstones = [DeleteOne({"_id": bson_id(table, key), "version": _exactly(v)}) for key, v in items]
        with self._typed_errors():
            if items:
                self._documents(target).bulk_write(documents, ordered=False)
                self._tombstones(target).bulk_write(tombstones, ordered=False)

    def drop(self, target: Target) -> int:
        with self._typed_errors():
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
        with self._typed_errors():
            documents = list(self._documents(target).find(among))
            _, deleted = _versions(table, self._tombstones(target).find(among, {"version": 1}))
        stored = {text: Stored(version, None) for text, version in deleted.items()}
        for document in documents:
            text, version = _text_of(table, document.pop("_id")), int(document.pop(VERSION_FIELD, 0))
            if version >= deleted.get(text, 0):
                stored[text] = Stored(version, document)
        return [stored.get(key_text(key)) for key in keys]

    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        with self._typed_errors():
            for batch in _batches(self._documents(target).find({}, {VERSION_FIELD: 1})):
                yield [(_text_of(target.table, one["_id"]), int(one.get(VERSION_FIELD, 0))) for one in batch]

    def newest_version(self, target: Target) -> int:
        """Read all versions: a server that was to sort them, without an index, could take longer than a command may."""
        newest = 0
        with self._typed_errors():
            for collection, field in ((self._documents(target), VERSION_FIELD), (self._tombstones(target), "version")):
                for batch in _batches(collection.find({}, {field: 1})):
                    newest = max([newest, *(int(one.get(field, 0)) for one in batch)])
        return newest

    def stored_form(self, target: Target, document: Document) -> dict[str, Any]:
        place: Place = target.settings
        whole = _whole(place, None, Write((), 0, document))
        try:
            form = bson.BSON(bson.encode(whole, codec_options=CODEC)).decode(CODEC)
        except _UNENCODABLE as error:
            raise Unstorable(f"The document cannot be written as BSON: {_brief(error)}.") from error
        del form["_id"], form[VERSION_FIELD]
        return form

    # ── the connection ───────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        with self._connecting:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _connected(self) -> MongoClient[dict[str, Any]]:
        """Return the client, which keeps its own pool of connections and is safe for threads."""
        with self._connecting:
            if self._client is None:
                self._client = MongoClient(self.url, **client_options(self.url, self.options))
            return self._client

    def _collection_of(self, place: Place, name: str) -> _Collection:
        return self._connected()[place.database].get_collection(
            name,
            codec_options=CODEC,
            read_preference=ReadPreference.PRIMARY,  # a secondary may not have the tombstone yet
            write_concern=self._write_concern,
        )

    def _documents(self, target: Target) -> _Collection:
        place: Place = target.settings
        return self._collection_of(place, place.collection)

    def _tombstones(self, target: Target) -> _Collection:
        place: Place = target.settings
        return self._collection_of(place, place.collection + TOMBSTONES)

    def _serving(self, place: Place) -> _Collection:
        return self._collection_of(place, SERVING)

    @contextlib.contextmanager
    def _typed_errors(self) -> Generator[None]:
        """Raise the driver's errors as `SinkBusy` or `SinkRefused`. Their texts hold no credentials."""
        try:
            yield
        except (ConnectionFailure, WaitQueueTimeoutError) as error:
            raise SinkBusy(f"MongoDB at {self._hosts} cannot be reached: {_brief(error)}") from error
        except BulkWriteError as error:  # of removals, the one bulk whose errors are not looked at one by one
            raise SinkBusy(f"MongoDB at {self._hosts} could not delete: {_brief(error)}") from error
        except DuplicateKeyError as error:  # of two who lead readers at once, for the first time
            raise SinkBusy(f"MongoDB at {self._hosts}: somebody else leads readers: {_brief(error)}") from error
        except OperationFailure as error:
            raise self._typed(error.code, _brief(error)) from error
        except ConfigurationError as error:
            if "DNS" in str(error) or "resolution" in str(error):  # of mongodb+srv://; it has no type of its own
                raise SinkBusy(f"MongoDB at {self._hosts} cannot be found: {_brief(error)}") from error
            raise SinkRefused(f"MongoDB at {self._hosts}: {_brief(error)}") from error

    def _typed(self, code: object, text: str) -> SinkBusy | SinkRefused:
        """Return the error that a server's error code stands for. An unknown one is no reason to drop anything."""
        if code in _BUSY:
            return SinkBusy(f"MongoDB at {self._hosts} is busy: {text}")
        return SinkRefused(f"MongoDB at {self._hosts} refuses: {text}")


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────

_DUPLICATE_KEY = 11000
_INDEX_OPTIONS_CONFLICT = 85

# Codes of MongoDB's error_codes.yml. What passes by itself: elections, shutdowns, timeouts, overload.
_BUSY = frozenset(
    {
        6,  # HostUnreachable
        7,  # HostNotFound
        24,  # LockTimeout
        43,  # CursorNotFound: it timed out, or its server restarted
        46,  # LockBusy
        50,  # MaxTimeMSExpired
        64,  # WriteConcernTimeout
        89,  # NetworkTimeout
        91,  # ShutdownInProgress
        112,  # WriteConflict
        133,  # FailedToSatisfyReadPreference
        134,  # ReadConcernMajorityNotAvailableYet
        175,  # QueryPlanKilled: the collection was dropped or an index built meanwhile
        189,  # PrimarySteppedDown
        202,  # NetworkInterfaceExceededTimeLimit
        262,  # ExceededTimeLimit
        462,  # IngressRequestRateLimitExceeded
        9001,  # SocketException
        10058,  # NotPrimaryNoSecondaryOk, in its oldest form
        10107,  # NotWritablePrimary
        11600,  # InterruptedAtShutdown
        11602,  # InterruptedDueToReplStateChange
        13388,  # StaleConfig: a chunk moved to another shard
        13435,  # NotPrimaryNoSecondaryOk
        13436,  # NotPrimaryOrSecondary
        16500,  # RequestRateTooLarge, of stores that speak MongoDB's protocol
    }
)
_REFUSED = frozenset(
    {
        13,  # Unauthorized
        18,  # AuthenticationFailed
        8000,  # AtlasError: authentication, or what the tier does not allow
        14031,  # OutOfDiskSpace
        20,  # IllegalOperation, such as writing to a view
        166,  # CommandNotSupportedOnView
    }
)

NEEDED_ACTIONS = frozenset({"find", "insert", "update", "remove", "createIndex"})  # all in the role readWrite

_UNENCODABLE = (BSONError, DocumentTooLarge, OverflowError, TypeError, ValueError, RecursionError)


def parse_path(name: str, url: str) -> tuple[str, str | None]:
    """Return the database and, if the URL names one, the collection. Raises UsageError."""
    parts = split_url(url, f"sink {name}: the URL")
    database, _, collection = unquote(parts.path).removeprefix("/").partition(".")
    if not database or len(database.encode()) > MAX_DATABASE_BYTES or set(database) & set('/\\ "$*<>:|?\0'):
        example = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/shop"
        raise UsageError(f"sink {name}: the URL must name a database, such as {example} or {example}.movies.")
    for option, _ in parse_qsl(parts.query, keep_blank_values=True):
        if option.lower() in {"w", "journal", "j"}:
            raise UsageError(f"sink {name}: say `write_concern` and `journal` beside the URL, not {option}= in it.")
    return database, collection or None


def client_options(url: str, options: MongoOptions) -> dict[str, Any]:
    """Return what the driver is told beside the URL, which has the last word."""
    wanted: dict[str, Any] = {
        "appname": "delta",
        "serverSelectionTimeoutMS": SERVER_SELECTION_TIMEOUT_MS,
        "connectTimeoutMS": CONNECT_TIMEOUT_MS,
        "socketTimeoutMS": SOCKET_TIMEOUT_MS,
        "username": options.username,
        "password": options.password,
    }
    given = {option.lower() for option, _ in parse_qsl(parts_of(url).query, keep_blank_values=True)}
    return {name: value for name, value in wanted.items() if value is not None and name.lower() not in given}


def missing_actions(privileges: Sequence[Mapping[str, Any]], database: str, collections: Collection[str]) -> list[str]:
    """Return the actions that Delta needs on these collections and the privileges do not hold on all of them."""
    missing: set[str] = set()
    for collection in collections:
        held: set[str] = set()
        for privilege in privileges:
            resource: Mapping[str, Any] = privilege.get("resource", {})
            everything = bool(resource.get("anyResource"))
            here = resource.get("db") in ("", database) and resource.get("collection") in ("", collection)
            if everything or here:
                held.update(privilege.get("actions", ()))
        missing |= NEEDED_ACTIONS - held
    return sorted(missing)


def bson_id(table: Table, key: Key) -> object:
    """Return the `_id` of a key: its value if it is one column, else a document of the columns in the key's order.

    Values are those of documents, except where these would make different keys equal (BSON cuts datetimes to
    milliseconds) or cannot be an `_id` (arrays): those, and dates with them, are text.
    """
    if len(key) == 1:
        return _id_part(key[0])
    return {name: _id_part(part) for name, part in zip(table.key, key, strict=True)}


def _id_part(value: object) -> object:
    match value:
        case bool() | str() | float() | bytes() | uuid.UUID():
            return value
        case int():
            return value if -(1 << 63) <= value < 1 << 63 else bson_decimal(decimal.Decimal(value))
        case decimal.Decimal():
            # Equal keys, such as 1.0 and 1.00, get equal bytes: there are stores that compare those.
            return bson_decimal(decimal.Decimal(scalar_text(value)))
        case _:
            return scalar_text(value)


def key_of(table: Table, id_: object) -> Key:
    """Return a key that has the same text as the one of which `bson_id` made this `_id`."""
    parts: Collection[object] = cast("dict[str, object]", id_).values() if len(table.key) > 1 else (id_,)
    return tuple(part.to_decimal() if isinstance(part, Decimal128) else part for part in parts)


def _text_of(table: Table, id_: object) -> str:
    return key_text(key_of(table, id_))


def _versions(table: Table, found: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, int]]:
    """Return the floor, 0 if it is not among what was found, and the others' versions by their key's text."""
    floor, versions = 0, dict[str, int]()
    for one in found:
        version = int(one.get("version", one.get(VERSION_FIELD, 0)))
        if one["_id"] == FLOOR_ID:
            floor = version
        else:
            versions[_text_of(table, one["_id"])] = version
    return floor, versions


def _is_unsettled(floor: Mapping[str, Any], since: dt.datetime | None) -> bool:
    """Tell whether documents below a floor may be there: written while it was raised, by a process that then died.

    Such a process wrote soon after, if ever: a look at all documents long after the floor was raised is the last one.
    """
    raised_at: dt.datetime = floor["raised_at"]
    if since is not None:
        return raised_at >= since
    swept_at: dt.datetime | None = floor.get("swept_at")
    return swept_at is None or swept_at < raised_at + FLOOR_SETTLES


def _batches(cursor: Cursor[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield what a cursor finds, as many at once as one command brings, and close it in the end."""
    with contextlib.closing(cursor.batch_size(SCAN_BATCH)):
        while batch := list(itertools.islice(cursor, SCAN_BATCH)):
            yield batch


def _exactly(version: int) -> object:
    """Return the condition that a version is this one; 0 is none at all."""
    return version or {"$in": [0, None]}


def _whole(place: Place, id_: object, write: Write) -> Document:
    """Return what is stored: the document between its `_id`, which MongoDB wants first, and its version."""
    document = write.document or {}
    if place.intervals or Interval in map(type, document.values()):
        document = cast("Document", _with_texts(document))
    whole = {"_id": id_, **document, VERSION_FIELD: write.version}
    whole["_id"] = id_
    return whole


def _conflict(table: Table, key: Key, document: Document) -> str | None:
    """Return why a document's own fields cannot be stored, if so. At the top level `$` would be an update operator."""
    if VERSION_FIELD in document:
        return f"the field {VERSION_FIELD} is Delta's own; give the document's field another name"
    if "_id" in document:
        expected = key[0] if len(key) == 1 else dict(zip(table.key, key, strict=True))
        if document["_id"] != expected:
            return "the field _id is not the row's key; give the document's field another name, or leave it out"
    for name in document:
        if str(name)[:1] == "$":
            return f"a field's name cannot start with $, as {name} does"
    return None


def _unfit(document: Document) -> str | None:
    """Return why a document cannot be encoded or is too large, if so."""
    try:
        size_bytes = len(bson.encode(document, codec_options=CODEC)) + len(
            bson.encode({"_id": document["_id"]}, codec_options=CODEC)
        )
    except _UNENCODABLE as error:
        return f"the document cannot be written as BSON: {_brief(error)}"
    if size_bytes + OPERATION_BYTES > MAX_DOCUMENT_BYTES:
        return f"the document has {size_bytes} bytes; MongoDB's limit is {MAX_DOCUMENT_BYTES}"
    return None


def bson_decimal(value: decimal.Decimal) -> Decimal128 | str:
    """Return a decimal as Decimal128, or as text if it has more than 34 digits or its exponent does not fit."""
    try:
        return Decimal128(value)
    except decimal.DecimalException:
        return decimal_text(value)


def _bson_value(value: object) -> object:
    """Return as BSON knows it what the driver does not know by itself. Raises TypeError: no document may hold it."""
    match value:
        case decimal.Decimal():
            return bson_decimal(value)
        case dt.date():
            return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)
        case dt.time():
            return value.isoformat()
        case set() | frozenset():
            return list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] -- any elements
        case bytearray():
            return bytes(value)
        case enum.Enum():
            return value.value
        case int():
            raise OverflowError(f"the number {value} needs more than 64 bits")
        case _:
            raise TypeError(f"a document cannot hold a {type(value).__name__}")


# The driver encodes in C and asks `_bson_value` only about what it does not know: no document is walked in Python.
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True,
    uuid_representation=UuidRepresentation.STANDARD,
    type_registry=TypeRegistry(fallback_encoder=_bson_value),
)


def _with_texts(value: object) -> object:
    """Return a value with its intervals as text, at any depth. The driver would take them for the tuples they are."""
    match value:
        case Interval():
            return str(value)
        case dict():
            return {name: _with_texts(part) for name, part in cast("dict[str, object]", value).items()}
        case list() | tuple():
            return [_with_texts(part) for part in cast("Sequence[object]", value)]
        case _:
            return value


def _is_about_id(error: Mapping[str, Any]) -> bool:
    """Tell whether a duplicate key is the `_id`'s, and not one of an index of the user's."""
    pattern = error.get("keyPattern")
    return "index: _id_ " in str(error.get("errmsg")) if pattern is None else list(pattern) == ["_id"]


def _brief(error: BaseException) -> str:
    """Return a driver's message without the description of the topology and the copy of the reply at its end."""
    return re.split(r", full error: |, Timeout: |, Topology Description: ", str(error))[0].rstrip(". ")
