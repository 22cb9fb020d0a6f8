"""The search sink: Elasticsearch (7.10 or later) and OpenSearch, one index per table.

For a target called `movies` there are

* the index `movies-1`. A document is what the processor returned, and `_delta_version`; its `_version` is the same
  number, given with `version_type=external_gte`, by which the store itself compares writes;
* the alias `movies`, which users search. A delete leaves a *tombstone* in the index (`_delta_deleted`, without any
  field of the row), and the alias filters these out. A hard delete would not do: its version is forgotten after
  `index.gc_deletes`, or when a shard moves. (Only searches are filtered: who gets a document by its id through the
  alias meets tombstones.) Because users know only the alias, another index can be built beside this one, and swapped;
* the index `movies-delta`, with one document: its `_version` is the target's floor (`truncate`). What is below the
  floor needs no tombstone, so it is deleted for good. Because no request concerns both indices, an upsert looks at the
  floor when its document is written, and `sweep` removes what a process that died in between left there.

Once a sink is rebuilt, each generation has an alias of its own to write through: `movies.g1` for `movies-1`, and the
second `movies.g2` for `movies-2`, with `movies.g2-delta`. `movies` is led from one index to another.

Documents are JSON, as `delta_sync.values.to_json` writes it: numbers keep all their digits in `_source`, whatever the
index makes of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write
from delta_sync.errors import DeltaError, Problem, SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import Options, Sink, Stored, Target, TargetOptions
from delta_sync.sinks.search_bulk import BULK_BYTES, Bulks
from delta_sync.sinks.search_documents import bulk_entry, content_of, delete_entry, id_problem
from delta_sync.sinks.search_indices import (
    IS_DELETED,
    MAX_INDEX_BYTES,
    Place,
    create_indices,
    existing_index,
    index_name,
    indices_of,
    is_own_index,
    lead_readers,
    problems_of,
)
from delta_sync.sinks.search_link import Link, LinkOptions, reason_of
from delta_sync.sinks.search_mapping import DELETED_AT, VERSION, index_body, read_mapping
from delta_sync.tables import Table, key_text

FLOOR_ID = "floor"  # of the one document in the index of a target's floor

PAGE = 2_000  # documents of one search or get: below the stores' limit of 10,000
READ_PAGE = 500  # documents with their content in one reply

FORGETTING_ATTEMPTS = 40  # of a refresh that lets the store forget what was deleted
FORGETTING_PAUSE_S = 0.25  # the store's clock for it ticks five times a second

MIN_ELASTICSEARCH = (7, 10)  # `require_alias`


class SearchOptions(LinkOptions):
    """What a search sink may say beside its URL."""

    refresh: Literal["false", "wait_for", "true"] | bool = Field(
        default=False,
        description="When a write can be found: false: at the index's next refresh, within a second by default; "
        "wait_for: writes wait for that refresh; true: each batch refreshes, which costs the store much.",
    )
    max_bulk_bytes: int = Field(
        default=BULK_BYTES, ge=1024, description="A request ends early when it has this many bytes, before compression."
    )


class SearchTargetOptions(TargetOptions):
    """What one table may say about its place in a search sink."""

    index: str | None = Field(
        default=None, min_length=1, description="The name to search by; default: the URL's, or else schema.table."
    )
    mapping: str | None = Field(
        default=None,
        description="A JSON file with the mapping to create the index with, instead of the one made from the table's "
        'columns: {"properties": …}, or {"mappings": …, "settings": …}. A path is relative to the directory in which '
        "`deltactl` runs, not to `pipeline.yaml`.",
    )
    shards: int | None = Field(default=None, ge=1, le=1024, description="Primary shards of a new index.")
    replicas: int | None = Field(default=None, ge=0, le=100, description="Replicas of a new index.")


class SearchSink(Sink[SearchOptions, SearchTargetOptions]):
    """`http[s]://host[:port][/name]`; see the module's text for what is stored."""

    schemes: ClassVar[tuple[str, ...]] = (
        "http",
        "https",
        "elasticsearch+http",
        "elasticsearch+https",
        "opensearch+http",
        "opensearch+https",
    )
    options_model: ClassVar[type[Options]] = SearchOptions
    target_model: ClassVar[type[TargetOptions]] = SearchTargetOptions
    generations: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        url: str,
        options: SearchOptions,
        tombstone_ttl_s: int,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Raise UsageError for a URL that cannot be meant. `now` dates tombstones, in seconds since 1970."""
        super().__init__(name, url, options, tombstone_ttl_s)
        self._now = now
        self._sleep = sleep
        self._link = Link(name, url, options)
        self._bulks = Bulks(self._link, options.refresh, options.max_bulk_bytes, sleep)

    # ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────

    def target(self, table: Table, options: SearchTargetOptions) -> Target:
        """Return where the table's documents go. Reads the mapping's file, if there is one."""
        alias = options.index or self._link.index or index_name(table.id)
        if alias != index_name(alias) or len(alias.encode()) > MAX_INDEX_BYTES:
            raise UsageError(
                f"sink {self.name}: no index can be called {alias!r}; set `index` to a name of lower-case letters, "
                f"digits, '.', '-' and '_', such as {index_name(alias)[:50]}."
            )
        own = read_mapping(self.name, options.mapping) if options.mapping else {}
        mappings, settings = index_body(table, own)
        if options.shards is not None:
            settings["index.number_of_shards"] = options.shards
        if options.replicas is not None:
            settings["index.number_of_replicas"] = options.replicas
        if self.number is None:
            return Target(table, alias, Place(alias, mappings, settings))
        own_alias = f"{alias}.g{self.number}"
        return Target(table, own_alias, Place(own_alias, mappings, settings, alias, self.number))

    def check(self, targets: Sequence[Target]) -> list[Problem]:
        where = f"sink {self.name}"
        try:
            product = self._link.product()
            if product.name == "elasticsearch" and product.version < MIN_ELASTICSEARCH:
                version = ".".join(map(str, product.version))
                return [
                    Problem(where, f"{self._link.who} is Elasticsearch {version}", "use 7.10 or later, or OpenSearch")
                ]
            return [problem for target in targets for problem in problems_of(self._link, where, target.settings)]
        except DeltaError as error:
            fix = "check its user and password" if isinstance(error, SinkRefused) else "check its address"
            return [Problem(where, str(error), fix)]

    def prepare(self, target: Target) -> None:
        create_indices(self._link, f"sink {self.name}", target.settings)

    def lead_readers(self, targets: Sequence[Target]) -> None:
        """Move the readers' aliases of all targets in one request, which the store carries out in one step."""
        lead_readers(self._link, f"sink {self.name}", [target.settings for target in targets])

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Apply the writes: one bulk and one get of the floor; another bulk if some were below it."""
        place: Place = target.settings
        now_ms = int(self._now() * 1000)
        entries: dict[int, bytes] = {}
        outcomes: dict[int, Outcome] = {}  # all but the applied ones
        for index, write in enumerate(writes):
            entry = self._entry(write, now_ms)
            if isinstance(entry, Outcome):
                outcomes[index] = entry
            else:
                entries[index] = entry
        if not entries:
            return [outcomes[index] for index in range(len(writes))]
        outcomes |= self._bulks.send(place.alias, entries, require_alias=True)
        outcomes |= self._obey_floor(place, [index for index in entries if index not in outcomes], writes)
        return [outcomes.get(index, APPLIED) for index in range(len(writes))]

    def _entry(self, write: Write, now_ms: int) -> bytes | Outcome:
        return bulk_entry(write, now_ms)

    def _obey_floor(self, place: Place, written: Sequence[int], writes: Sequence[Write]) -> dict[int, Outcome]:
        """Return which of the writes are below the floor, their documents deleted.

        The floor is read after the writes are acknowledged, each time: `truncate` records it before it looks for
        documents, so either the one is seen or the other. A floor kept in memory could be older than a write.
        """
        floor = self._floor(place)
        late = [index for index in written if writes[index].version < floor]
        upserts = [index for index in late if writes[index].document is not None]
        if upserts:
            self._bulks.send(
                place.alias, {index: delete_entry(key_text(writes[index].key), floor - 1) for index in upserts}
            )
        return dict.fromkeys(late, STALE)

    def _floor(self, place: Place) -> int:
        reply = self._link.request("GET", f"/{place.floors}/_doc/{FLOOR_ID}", params={"_source": "false"})
        if reply.status == 404 and "error" not in reply.body:
            return 0
        return int(self._link.expect(reply)["_version"])

    def truncate(self, target: Target, version: int) -> int:
        place: Place = target.settings
        params = {"version": str(version), "version_type": "external_gte"}
        reply = self._link.request("PUT", f"/{place.floors}/_doc/{FLOOR_ID}", {}, params)
        if reply.status != 409:  # a higher one is there
            self._link.expect(reply)
        return self._delete_older(existing_index(self._link, place), version)

    def _delete_older(self, index: str, version: int) -> int:
        """Delete the documents below a floor, but no newer ones that come in their place; return how many went."""
        older = {"bool": {"must_not": [IS_DELETED], "filter": [{"range": {VERSION: {"lt": version}}}]}}
        # Each page's documents are below the version; afterwards they are gone, or a newer write was faster.
        return sum(
            self._delete(index, [(id_, version - 1) for id_, _ in page]) for page in self._until_none(index, older)
        )

    def sweep(self, target: Target, recent_s: float | None = None) -> int:
        """Delete documents below the floor, and tombstones older than the TTL, unless a newer write comes first.

        Both are found by fields that are indexed, so all are looked for every time: `recent_s` would save nothing.
        One thread or process at a time should do this, for the sake of the store's peace.
        """
        del recent_s
        place: Place = target.settings
        index = existing_index(self._link, place)
        floor = self._floor(place)
        return (self._delete_older(index, floor) if floor else 0) + self._delete_expired(index)

    def _delete_expired(self, index: str) -> int:
        expired_ms = int((self._now() - self.tombstone_ttl_s) * 1000)
        expired = {"bool": {"filter": [IS_DELETED, {"range": {DELETED_AT: {"lt": expired_ms}}}]}}
        return sum(self._delete(index, page) for page in self._until_none(index, expired))

    def _until_none(self, index: str, query: Mapping[str, Any]) -> Iterator[list[tuple[str, int]]]:
        """Yield pages of ids and versions until none matches. The caller must make a page's documents not match."""
        while True:
            self._link.ask("POST", f"/{index}/_refresh")
            hits = self._search(index, {"query": query, "sort": ["_doc"]})
            if not hits:
                return
            yield [(hit["_id"], hit["_version"]) for hit in hits]

    def _delete(self, index: str, items: Sequence[tuple[str, int]]) -> int:
        """Delete documents unless they are newer; return how many were deleted."""
        entries = {number: delete_entry(id_, version) for number, (id_, version) in enumerate(items)}
        return len(entries) - len(self._bulks.send(index, entries))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        place: Place = target.settings
        ids = [key_text(key) for key in keys]
        wanted = sorted({id_ for id_ in ids if id_problem(id_) is None})
        stored: dict[str, Stored] = {}
        for start in range(0, len(wanted), READ_PAGE):
            body = {"ids": wanted[start : start + READ_PAGE]}
            for document in self._link.ask("POST", f"/{place.alias}/_mget", body)["docs"]:
                if error := document.get("error"):
                    raise SinkRefused(f"{self._link.who} cannot read {place.alias}: {reason_of(error)}")
                if document["found"]:
                    source = document["_source"]
                    version = document["_version"] if VERSION in source else 0
                    stored[document["_id"]] = Stored(version, content_of(source))
        return [stored.get(id_) for id_ in ids]

    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        """Yield what is there, shard by shard in the order of `_seq_no`: exact without a snapshot held in the store.

        A sequence number is unique in its shard, and a document that is written meanwhile gets a higher one, so it is
        met again and never missed.
        """
        index = existing_index(self._link, target.settings)
        self._link.ask("POST", f"/{index}/_refresh")
        shards = self._link.ask("GET", f"/{index}/_settings", params={"flat_settings": "true"})
        for shard in range(int(shards[index]["settings"]["index.number_of_shards"])):
            after: list[int] | None = None
            while True:
                body: dict[str, Any] = {"query": {"bool": {"must_not": [IS_DELETED]}}, "sort": [{"_seq_no": "asc"}]}
                if after is not None:
                    body["search_after"] = after
                hits = self._search(index, body, shard)
                if not hits:
                    break
                yield [(hit["_id"], hit["_version"]) for hit in hits]
                after = hits[-1]["sort"]

    def _search(self, index: str, body: Mapping[str, Any], shard: int | None = None) -> list[dict[str, Any]]:
        """Return a page of hits with their ids and versions, of all shards or one. Complete, or SinkBusy."""
        # A replica of OpenSearch may lag behind its primary (segment replication). Elasticsearch knows neither.
        preferences = [] if shard is None else [f"_shards:{shard}"]
        if self._link.product().name == "opensearch":
            preferences.append("_primary")
        params = {
            "allow_partial_search_results": "false",
            "filter_path": "hits.hits._id,hits.hits._version,hits.hits.sort",
        }
        if preferences:
            params["preference"] = "|".join(preferences)
        page = {"size": PAGE, "_source": False, "version": True, "track_total_hits": False, **body}
        found = self._link.ask("POST", f"/{index}/_search", page, params)
        hits: list[dict[str, Any]] = found.get("hits", {}).get("hits", [])
        return hits

    def newest_version(self, target: Target) -> int:
        """Sort, which is exact; the stores' `max` aggregation computes in doubles."""
        place: Place = target.settings
        index = existing_index(self._link, place)
        self._link.ask("POST", f"/{index}/_refresh")
        hits = self._search(index, {"size": 1, "sort": [{VERSION: "desc"}]})  # tombstones among them
        return max([self._floor(place), *(int(hit["_version"]) for hit in hits)])

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        """Delete for good. The store would refuse lower versions for `index.gc_deletes`, so that is 0 meanwhile.

        Nothing of Delta's rests on it. A process that dies in here leaves it at 0.
        """
        ids = [(key_text(key), version) for key, version in items if version and id_problem(key_text(key)) is None]
        if not ids:
            return
        index = existing_index(self._link, target.settings)
        name = "index.gc_deletes"
        found = self._link.ask("GET", f"/{index}/_settings/{name}", params={"flat_settings": "true"})
        before = found.get(index, {}).get("settings", {}).get(name)
        there = self._versions_of(index, [id_ for id_, _ in ids])
        exact = [(id_, version) for id_, version in ids if there.get(id_) == version]  # a delete takes older ones, too
        self._link.ask("PUT", f"/{index}/_settings", {name: "0ms"})
        try:
            entries = {number: delete_entry(id_, version) for number, (id_, version) in enumerate(exact)}
            self._bulks.send(index, entries)
            self._wait_until_forgotten(index, [id_ for id_, _ in exact])
        finally:
            self._link.ask("PUT", f"/{index}/_settings", {name: before})

    def _wait_until_forgotten(self, index: str, ids: Sequence[str]) -> None:
        """Wait until the store no longer knows the versions of what was deleted: a refresh drops them, in its own time.

        It is asked by deletes of version 0, which it refuses as long as it knows a higher one.
        """
        left = list(ids)
        for _ in range(FORGETTING_ATTEMPTS):
            self._link.ask("POST", f"/{index}/_refresh")
            refused = self._bulks.send(index, {number: delete_entry(id_, 0) for number, id_ in enumerate(left)})
            left = [left[number] for number in refused]
            if left:
                there = self._versions_of(index, left)  # a write has come in between: that is fine
                left = [id_ for id_ in left if id_ not in there]
            if not left:
                return
            self._sleep(FORGETTING_PAUSE_S)
        raise SinkBusy(f"{self._link.who} does not forget the versions of {len(left)} deleted documents")

    def _versions_of(self, index: str, ids: Sequence[str]) -> dict[str, int]:
        """Return the version of each document, tombstones among them, that is there."""
        params = {"_source": "false"}
        documents = self._link.ask("POST", f"/{index}/_mget", {"ids": list(ids)}, params)["docs"]
        return {document["_id"]: document["_version"] for document in documents if document.get("found")}

    def drop(self, target: Target) -> int:
        place: Place = target.settings
        own = [index for index in indices_of(self._link, place.alias) if is_own_index(place.name, index)]
        found = 0
        if own:
            self._link.ask("POST", f"/{place.alias}/_refresh")
            found = int(self._link.ask("GET", f"/{place.alias}/_count")["count"])
        for index in {*own, place.first_index, place.floors}:
            reply = self._link.request("DELETE", f"/{index}")
            if reply.status != 404:
                self._link.expect(reply)
        return found

    def close(self) -> None:
        self._link.close()
