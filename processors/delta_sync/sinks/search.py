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

import base64
import gzip
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, ClassVar, Literal, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

import orjson
import requests
import requests.adapters
from pydantic import Field
from requests.utils import get_environ_proxies

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write, rejected
from delta_sync.errors import DeltaError, Problem, SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import VERSION_FIELD, LoginOptions, Options, Sink, Stored, Target, TargetOptions
from delta_sync.sinks.search_mapping import DELETED, DELETED_AT, OWN_PREFIX, VERSION, index_body, read_mapping
from delta_sync.tables import Table, key_text
from delta_sync.urls import split_url
from delta_sync.values import from_json, to_json

FLOORS = "-delta"  # what the index of a target's floor is called, after the target's own name
FLOOR_ID = "floor"

MAX_ID_BYTES = 512  # the stores' limit; one longer id fails a whole bulk
MAX_INDEX_BYTES = 255 - len(FLOORS) - 8  # the stores' limit for a name; and room for a generation's number
MAX_VERSION = (1 << 63) - 1  # the stores' limit
BULK_BYTES = 8 << 20  # more gains nothing, and a node may have several in memory at once
PAGE = 2_000  # documents of one search or get: below the stores' limit of 10,000
READ_PAGE = 500  # documents with their content in one reply

CONNECT_TIMEOUT_S = 5.0  # two lost SYNs
READ_TIMEOUT_S = 60.0  # above BULK_TIMEOUT, so that the store's own answer comes first
BULK_TIMEOUT = "30s"  # how long the store waits for a primary shard that is not there
CONNECTIONS = 32  # kept open; more threads than that apply to one sink nowhere
RETRIES = 3  # of the items of a bulk that the store was too busy for, before all of it is tried again from outside
RETRY_PAUSE_S = 0.2  # before the first of these, doubled each time: the store's queues drain in fractions of a second

FORGETTING_ATTEMPTS = 40  # of a refresh that lets the store forget what was deleted
FORGETTING_PAUSE_S = 0.25  # the store's clock for it ticks five times a second

MIN_ELASTICSEARCH = (7, 10)  # `require_alias`


class SearchOptions(LoginOptions):
    """What a search sink may say beside its URL."""

    api_key: str | None = Field(
        default=None, description="API key, encoded, instead of user and password: a reference."
    )
    verify_tls: bool = Field(default=True, description="Whether the server's certificate is verified.")
    ca_file: str | None = Field(default=None, description="Certificates of the authorities to trust, in PEM.")
    refresh: Literal["false", "wait_for", "true"] | bool = Field(
        default=False,
        description="When a write can be found: false: at the index's next refresh, within a second by default; "
        "wait_for: writes wait for that refresh; true: each batch refreshes, which costs the store much.",
    )
    max_bulk_bytes: int = Field(
        default=BULK_BYTES, ge=1024, description="A request ends early when it has this many bytes, before compression."
    )
    compress: bool = Field(default=False, description="Whether requests are compressed: for slow networks.")


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


class Place(NamedTuple):
    """Where a target's documents are, and how its index is created if it is not there."""

    alias: str
    mappings: dict[str, Any]
    settings: dict[str, Any]
    readers: str | None = None  # the alias that users search, where it is another: that of all generations
    number: int = 1

    @property
    def name(self) -> str:
        """What all of the target's names begin with."""
        return self.readers or self.alias

    @property
    def first_index(self) -> str:
        return f"{self.name}-{self.number}"

    @property
    def floors(self) -> str:
        return (self.name if self.number == 1 else self.alias) + FLOORS


class Product(NamedTuple):
    """What answers: `elasticsearch` or `opensearch`, and its version."""

    name: str
    version: tuple[int, ...]


class _Reply(NamedTuple):
    status: int
    body: Any  # JSON; None if it is none

    @property
    def reason(self) -> str:
        body: object = self.body
        error = cast("dict[str, Any]", body).get("error") if isinstance(body, dict) else None
        return f"status {self.status}" if error is None else reason_of(error)


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
        self._base, self._index, self._auth = parse_url(name, url, options)
        self._who = f"the search store at {urlsplit(self._base).netloc}"
        self._lock = threading.Lock()
        self._session: requests.Session | None = None
        self._product: Product | None = None

    # ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────

    def target(self, table: Table, options: SearchTargetOptions) -> Target:
        """Return where the table's documents go. Reads the mapping's file, if there is one."""
        alias = options.index or self._index or index_name(table.id)
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
            product = self._find_product()
            if product.name == "elasticsearch" and product.version < MIN_ELASTICSEARCH:
                version = ".".join(map(str, product.version))
                return [Problem(where, f"{self._who} is Elasticsearch {version}", "use 7.10 or later, or OpenSearch")]
            return [problem for target in targets for problem in self._problems_of(where, target.settings)]
        except DeltaError as error:
            fix = "check its user and password" if isinstance(error, SinkRefused) else "check its address"
            return [Problem(where, str(error), fix)]

    def _problems_of(self, where: str, place: Place) -> list[Problem]:
        indices = self._indices_of(place.alias)
        if not indices and self._request("GET", f"/{place.alias}/_settings").status == 200:
            what = f"{place.alias} is an index, where Delta needs the name for an alias"
            return [Problem(where, what, "set `index` to another name, or delete that index")]
        foreign = [index for index in indices if not is_own_index(place.name, index)]
        if foreign:
            what = f"{place.alias} is an alias of {', '.join(foreign)}, which Delta did not create"
            return [Problem(where, what, "set `index` to another name")]
        return []

    def prepare(self, target: Target) -> None:
        place: Place = target.settings
        problems = self._problems_of(f"sink {self.name}", place)
        if problems:
            raise SinkRefused(str(problems[0]))
        one_shard = {"index.number_of_shards": 1, "index.auto_expand_replicas": "0-1"}
        self._create(place.floors, {"settings": one_shard, "mappings": {"dynamic": False}})
        index = self._write_index(place.alias)
        if index is not None:
            self._add_fields(index, place.mappings)
            return
        settings = dict(place.settings)
        product = self._find_product()
        if product.name == "elasticsearch" and product.version >= (8, 14):
            # Beyond the limit of fields a document is kept, and its further fields are not searched.
            settings.setdefault("index.mapping.total_fields.ignore_dynamic_beyond_limit", True)
        body = {"settings": settings, "mappings": place.mappings, "aliases": {place.alias: _ALIAS}}
        if not self._create(place.first_index, body):
            # It was there without the alias, or another worker has just created both.
            action = {"add": {"index": place.first_index, "alias": place.alias, **_ALIAS}}
            self._expect(self._request("POST", "/_aliases", {"actions": [action]}))

    def lead_readers(self, targets: Sequence[Target]) -> None:
        """Move the readers' aliases of all targets in one request, which the store carries out in one step."""
        actions: list[dict[str, Any]] = []
        for target in targets:
            place: Place = target.settings
            assert place.readers is not None, "it is of a generation"
            index = self._existing_index(place)
            there = self._indices_of(place.readers)
            if list(there) == [index]:
                continue
            problems = self._problems_of(f"sink {self.name}", place._replace(alias=place.readers))
            if problems:
                raise SinkRefused(str(problems[0]))
            actions += [{"remove": {"index": old, "alias": place.readers}} for old in there if old != index]
            actions.append({"add": {"index": index, "alias": place.readers, **_ALIAS}})
        if actions:
            self._expect(self._request("POST", "/_aliases", {"actions": actions}))

    def _create(self, index: str, body: Mapping[str, Any]) -> bool:
        """Create an index unless it is there; return whether it was created."""
        reply = self._request("PUT", f"/{index}", body)
        if reply.status == 400 and "already_exists" in reply.reason:
            return False
        self._expect(reply)
        return True

    def _add_fields(self, index: str, mappings: Mapping[str, Any]) -> None:
        """Map the columns that the table has got since; what is mapped stays as it is, for it could not be changed."""
        found = self._expect(self._request("GET", f"/{index}/_mapping"))
        mapped: Mapping[str, Any] = found[index]["mappings"].get("properties", {})
        new = {name: field for name, field in mappings.get("properties", {}).items() if name not in mapped}
        if new:
            self._expect(self._request("PUT", f"/{index}/_mapping", {"properties": new}))

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
        outcomes |= self._bulk(place.alias, entries, require_alias=True)
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
            self._bulk(place.alias, {index: delete_entry(key_text(writes[index].key), floor - 1) for index in upserts})
        return dict.fromkeys(late, STALE)

    def _floor(self, place: Place) -> int:
        reply = self._request("GET", f"/{place.floors}/_doc/{FLOOR_ID}", params={"_source": "false"})
        if reply.status == 404 and "error" not in reply.body:
            return 0
        return int(self._expect(reply)["_version"])

    def truncate(self, target: Target, version: int) -> int:
        place: Place = target.settings
        params = {"version": str(version), "version_type": "external_gte"}
        reply = self._request("PUT", f"/{place.floors}/_doc/{FLOOR_ID}", {}, params)
        if reply.status != 409:  # a higher one is there
            self._expect(reply)
        return self._delete_older(self._existing_index(place), version)

    def _delete_older(self, index: str, version: int) -> int:
        """Delete the documents below a floor, but no newer ones that come in their place; return how many went."""
        older = {"bool": {"must_not": [_IS_DELETED], "filter": [{"range": {VERSION: {"lt": version}}}]}}
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
        index = self._existing_index(place)
        floor = self._floor(place)
        return (self._delete_older(index, floor) if floor else 0) + self._delete_expired(index)

    def _delete_expired(self, index: str) -> int:
        expired_ms = int((self._now() - self.tombstone_ttl_s) * 1000)
        expired = {"bool": {"filter": [_IS_DELETED, {"range": {DELETED_AT: {"lt": expired_ms}}}]}}
        return sum(self._delete(index, page) for page in self._until_none(index, expired))

    def _until_none(self, index: str, query: Mapping[str, Any]) -> Iterator[list[tuple[str, int]]]:
        """Yield pages of ids and versions until none matches. The caller must make a page's documents not match."""
        while True:
            self._expect(self._request("POST", f"/{index}/_refresh"))
            hits = self._search(index, {"query": query, "sort": ["_doc"]})
            if not hits:
                return
            yield [(hit["_id"], hit["_version"]) for hit in hits]

    def _delete(self, index: str, items: Sequence[tuple[str, int]]) -> int:
        """Delete documents unless they are newer; return how many were deleted."""
        entries = {number: delete_entry(id_, version) for number, (id_, version) in enumerate(items)}
        return len(entries) - len(self._bulk(index, entries))

    # ── bulks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _bulk(self, index: str, entries: Mapping[int, bytes], *, require_alias: bool = False) -> dict[int, Outcome]:
        """Send entries of a bulk, by their write's index; return the outcome of each that was not applied."""
        params = {
            "filter_path": "errors,items.*.status,items.*.error",  # most of a reply is of no interest
            "timeout": BULK_TIMEOUT,
        }
        if require_alias:
            # Without it, a store whose index was deleted would make a new one, without mapping and filter.
            params["require_alias"] = "true"
        if self.options.refresh not in (False, "false"):
            params["refresh"] = "wait_for" if self.options.refresh == "wait_for" else "true"
        outcomes: dict[int, Outcome] = {}
        pending = dict(entries)
        for attempt in count():
            busy: dict[int, str] = {}
            for part in parts_of(pending, self.options.max_bulk_bytes):
                outcomes |= self._bulk_part(index, params, part, busy)
            if not busy:
                return outcomes
            reason = next(iter(busy.values()))
            if attempt == RETRIES:
                raise SinkBusy(f"{self._who} is too busy for {len(busy)} of {len(entries)} writes: {reason}")
            self._sleep(RETRY_PAUSE_S * 2**attempt)
            pending = {number: pending[number] for number in busy}
        raise AssertionError("unreachable")

    def _bulk_part(
        self, index: str, params: dict[str, str], part: Mapping[int, bytes], busy: dict[int, str]
    ) -> dict[int, Outcome]:
        """Send one request. What the store was too busy for goes into `busy`, with the reason."""
        outcomes: dict[int, Outcome] = {}
        reply = self._request("POST", f"/{index}/_bulk", b"".join(part.values()), params)
        if reply.status in (400, 413):
            # One item spoils a whole bulk, and the reply does not say which: halve until it is alone.
            if len(part) == 1:
                return dict.fromkeys(part, rejected(reply.reason if reply.status == 400 else _TOO_LARGE))
            middle = len(part) // 2
            for half in (islice(part, middle), islice(part, middle, None)):
                outcomes |= self._bulk_part(index, params, {number: part[number] for number in half}, busy)
            return outcomes
        body = self._expect(reply)
        if not body["errors"]:
            return {}
        for number, item in zip(part, body["items"], strict=True):
            ((_, result),) = item.items()
            match verdict(result["status"], result.get("error")):
                case Outcome() as outcome:
                    outcomes[number] = outcome
                case SinkBusy() as error:
                    busy[number] = str(error)
                case SinkRefused() as error:
                    raise SinkRefused(f"{self._who} refuses: {error}")
                case None:
                    pass
        return outcomes

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        place: Place = target.settings
        ids = [key_text(key) for key in keys]
        wanted = sorted({id_ for id_ in ids if id_problem(id_) is None})
        stored: dict[str, Stored] = {}
        for start in range(0, len(wanted), READ_PAGE):
            body = {"ids": wanted[start : start + READ_PAGE]}
            for document in self._expect(self._request("POST", f"/{place.alias}/_mget", body))["docs"]:
                if error := document.get("error"):
                    raise SinkRefused(f"{self._who} cannot read {place.alias}: {reason_of(error)}")
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
        index = self._existing_index(target.settings)
        self._expect(self._request("POST", f"/{index}/_refresh"))
        shards = self._expect(self._request("GET", f"/{index}/_settings", params={"flat_settings": "true"}))
        for shard in range(int(shards[index]["settings"]["index.number_of_shards"])):
            after: list[int] | None = None
            while True:
                body: dict[str, Any] = {"query": {"bool": {"must_not": [_IS_DELETED]}}, "sort": [{"_seq_no": "asc"}]}
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
        if self._find_product().name == "opensearch":
            preferences.append("_primary")
        params = {
            "allow_partial_search_results": "false",
            "filter_path": "hits.hits._id,hits.hits._version,hits.hits.sort",
        }
        if preferences:
            params["preference"] = "|".join(preferences)
        page = {"size": PAGE, "_source": False, "version": True, "track_total_hits": False, **body}
        found = self._expect(self._request("POST", f"/{index}/_search", page, params))
        hits: list[dict[str, Any]] = found.get("hits", {}).get("hits", [])
        return hits

    def newest_version(self, target: Target) -> int:
        """Sort, which is exact; the stores' `max` aggregation computes in doubles."""
        place: Place = target.settings
        index = self._existing_index(place)
        self._expect(self._request("POST", f"/{index}/_refresh"))
        hits = self._search(index, {"size": 1, "sort": [{VERSION: "desc"}]})  # tombstones among them
        return max([self._floor(place), *(int(hit["_version"]) for hit in hits)])

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        """Delete for good. The store would refuse lower versions for `index.gc_deletes`, so that is 0 meanwhile.

        Nothing of Delta's rests on it. A process that dies in here leaves it at 0.
        """
        ids = [(key_text(key), version) for key, version in items if version and id_problem(key_text(key)) is None]
        if not ids:
            return
        index = self._existing_index(target.settings)
        name = "index.gc_deletes"
        found = self._expect(self._request("GET", f"/{index}/_settings/{name}", params={"flat_settings": "true"}))
        before = found.get(index, {}).get("settings", {}).get(name)
        there = self._versions_of(index, [id_ for id_, _ in ids])
        exact = [(id_, version) for id_, version in ids if there.get(id_) == version]  # a delete takes older ones, too
        self._expect(self._request("PUT", f"/{index}/_settings", {name: "0ms"}))
        try:
            entries = {number: delete_entry(id_, version) for number, (id_, version) in enumerate(exact)}
            self._bulk(index, entries)
            self._wait_until_forgotten(index, [id_ for id_, _ in exact])
        finally:
            self._expect(self._request("PUT", f"/{index}/_settings", {name: before}))

    def _wait_until_forgotten(self, index: str, ids: Sequence[str]) -> None:
        """Wait until the store no longer knows the versions of what was deleted: a refresh drops them, in its own time.

        It is asked by deletes of version 0, which it refuses as long as it knows a higher one.
        """
        left = list(ids)
        for _ in range(FORGETTING_ATTEMPTS):
            self._expect(self._request("POST", f"/{index}/_refresh"))
            refused = self._bulk(index, {number: delete_entry(id_, 0) for number, id_ in enumerate(left)})
            left = [left[number] for number in refused]
            if left:
                there = self._versions_of(index, left)  # a write has come in between: that is fine
                left = [id_ for id_ in left if id_ not in there]
            if not left:
                return
            self._sleep(FORGETTING_PAUSE_S)
        raise SinkBusy(f"{self._who} does not forget the versions of {len(left)} deleted documents")

    def _versions_of(self, index: str, ids: Sequence[str]) -> dict[str, int]:
        """Return the version of each document, tombstones among them, that is there."""
        params = {"_source": "false"}
        documents = self._expect(self._request("POST", f"/{index}/_mget", {"ids": list(ids)}, params))["docs"]
        return {document["_id"]: document["_version"] for document in documents if document.get("found")}

    def drop(self, target: Target) -> int:
        place: Place = target.settings
        own = [index for index in self._indices_of(place.alias) if is_own_index(place.name, index)]
        found = 0
        if own:
            self._expect(self._request("POST", f"/{place.alias}/_refresh"))
            found = int(self._expect(self._request("GET", f"/{place.alias}/_count"))["count"])
        for index in {*own, place.first_index, place.floors}:
            reply = self._request("DELETE", f"/{index}")
            if reply.status != 404:
                self._expect(reply)
        return found

    # ── the store's own names ────────────────────────────────────────────────────────────────────────────────────

    def _indices_of(self, alias: str) -> dict[str, dict[str, Any]]:
        """Return the indices behind an alias, with what the alias says of each; none if there is no such alias."""
        reply = self._request("GET", f"/_alias/{alias}")
        if reply.status == 404:
            return {}
        found: dict[str, dict[str, Any]] = self._expect(reply)
        return {index: about["aliases"][alias] for index, about in found.items()}

    def _write_index(self, alias: str) -> str | None:
        """Return the index that writes through the alias go to."""
        indices = self._indices_of(alias)
        written = [index for index, about in indices.items() if about.get("is_write_index")]
        return next(iter(written or indices), None)

    def _existing_index(self, place: Place) -> str:
        index = self._write_index(place.alias)
        if index is None:
            raise SinkRefused(f"{self._who} has no alias {place.alias}; it was deleted, or never prepared")
        return index

    def _find_product(self) -> Product:
        if self._product is None:
            about = self._expect(self._request("GET", "/"))
            number = str(about["version"]["number"])
            version = tuple(int(part) for part in re.findall(r"\d+", number)[:2])
            self._product = Product(about["version"].get("distribution", "elasticsearch"), version)
        return self._product

    # ── the connection ───────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _connected(self) -> requests.Session:
        """Return the session, whose pool keeps connections open and is safe for threads."""
        with self._lock:
            if self._session is None:
                session = requests.Session()
                session.trust_env = False  # else each request looks for proxies and a .netrc, which overrides `auth`
                session.proxies = get_environ_proxies(self._base)
                session.headers.update({"Accept": "application/json", **self._auth})
                session.verify = self.options.ca_file or self.options.verify_tls
                adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=CONNECTIONS)
                session.mount(self._base, adapter)
                self._session = session
            return self._session

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        params: Mapping[str, str] | None = None,
    ) -> _Reply:
        """Send a request (bytes: lines of JSON) and return the reply. Raises SinkBusy and SinkRefused.

        Replies that may concern only this request (400, 404, 409, 413) are returned.
        """
        headers: dict[str, str] = {}
        data = body if isinstance(body, bytes) or body is None else orjson.dumps(body)
        if data is not None:
            headers["Content-Type"] = "application/x-ndjson" if data is body else "application/json"
            if self.options.compress:
                headers["Content-Encoding"] = "gzip"
                data = gzip.compress(data, compresslevel=1)  # the fastest, and JSON shrinks to a fifth all the same
        try:
            response = self._connected().request(
                method,
                self._base + quote(path),
                params=params,
                data=data,
                headers=headers,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                allow_redirects=False,
            )
        except requests.exceptions.SSLError as error:
            raise SinkRefused(f"{self._who}: its certificate does not hold ({brief(error)}); set `ca_file`") from error
        except requests.exceptions.RequestException as error:
            raise SinkBusy(f"{self._who} cannot be reached: {brief(error)}") from error
        try:
            parsed = from_json(response.content) if response.content else None
        except ValueError:
            parsed = None
        reply = _Reply(response.status_code, parsed)
        if reply.status < 300 or reply.status in (400, 404, 409, 413):
            return reply
        if reply.status == 401:
            raise SinkRefused(f"{self._who} refuses user and password, or the API key (401)")
        if reply.status in (408, 429) or reply.status >= 500 or is_block(reply.reason):
            raise SinkBusy(f"{self._who} is busy: {reply.reason}", retry_after_s(response.headers.get("Retry-After")))
        raise SinkRefused(f"{self._who} refuses {method} {path}: {reply.reason}")

    def _expect(self, reply: _Reply) -> Any:
        """Return the body of a reply that must have succeeded."""
        if reply.status < 300:
            return reply.body
        raise SinkRefused(f"{self._who} refuses: {reply.reason}")


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────

_IS_DELETED: Mapping[str, Any] = {"term": {DELETED: True}}
_ALIAS: Mapping[str, Any] = {"filter": {"bool": {"must_not": [_IS_DELETED]}}, "is_write_index": True}
_TOO_LARGE = "the document is larger than the store takes (http.max_content_length, 100 MB by default)"

# Fields of the stores' own: some of them refuse a document that has one, others take it and cannot search it.
_METADATA = frozenset(
    {"_id", "_index", "_type", "_source", "_size", "_doc_count", "_field_names", "_ignored", "_routing", "_meta",
     "_tier", "_nested_path", "_seq_no", "_primary_term", "_feature", "_tsid", VERSION_FIELD}
)  # fmt: skip


def parse_url(name: str, url: str, options: SearchOptions) -> tuple[str, str | None, dict[str, str]]:
    """Return the address without credentials, the name in its path if any, and the headers of authentication.

    Raises UsageError, which quotes no credentials.
    """
    parts = split_url(url, f"sink {name}: the URL")
    if "," in parts.netloc.rpartition("@")[2]:
        raise UsageError(f"sink {name}: the URL names several hosts; name one, such as a load balancer.")
    port = parts.port
    if not parts.hostname:
        raise UsageError(f"sink {name}: the URL must name a host, such as http://search:9200/movies.")
    if parts.query or parts.fragment:
        raise UsageError(f"sink {name}: the URL must end with the index's name; options go beside it.")
    index = unquote(parts.path).strip("/")
    if "/" in index:
        raise UsageError(f"sink {name}: the URL's path is the index's name, so it cannot be {index!r}.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    base = f"{parts.scheme.rpartition('+')[2]}://{host}" + (f":{port}" if port else "")
    username = options.username or unquote(parts.username or "")
    password = options.password or unquote(parts.password or "")
    if options.api_key:
        if username or password:
            raise UsageError(f"sink {name}: give either api_key, or user and password.")
        return base, index or None, {"Authorization": f"ApiKey {options.api_key}"}
    if username:
        credentials = base64.b64encode(f"{username}:{password}".encode()).decode()
        return base, index or None, {"Authorization": f"Basic {credentials}"}
    return base, index or None, {}


def index_name(text: str) -> str:
    """Return a text as the name of an index: lower case, `_` for what is not allowed. A legal name stays as it is."""
    name = re.sub(r'[\\/*?"<>|\s,#:\x00-\x1f]', "_", text.lower())
    return re.sub(r"^[-_+.]+", "", name) or "index"


def is_own_index(alias: str, index: str) -> bool:
    """Tell whether an index is one that Delta made for this alias."""
    return re.fullmatch(re.escape(alias) + r"-\d+", index) is not None


def id_problem(id_: str) -> str | None:
    """Return why a text cannot be an id, if so."""
    if not id_:
        return "the key is empty, and an id cannot be"
    try:
        size = len(id_.encode())
    except UnicodeEncodeError:
        return "the key is no valid UTF-8"
    if size > MAX_ID_BYTES:
        return f"the key has {size} bytes as text; an id has at most {MAX_ID_BYTES}"
    return None


def bulk_entry(write: Write, now_ms: int) -> bytes | Outcome:
    """Return the two lines of a bulk that a write is, or its outcome if no store would take it."""
    id_ = key_text(write.key)
    if problem := id_problem(id_):
        return rejected(problem)
    if not 0 <= write.version <= MAX_VERSION:  # like a long id, it would fail its whole bulk
        return rejected(f"version {write.version} is not a positive number of 63 bits")
    if write.document is None:
        own = b'"_delta_deleted":true,"_delta_deleted_at":%d' % now_ms
        return _index_lines(id_, write.version, b"{}", own)
    if not _METADATA.isdisjoint(write.document):
        name = next(name for name in write.document if name in _METADATA)
        return rejected(f"the field {name} is the store's own; give the document's field another name")
    try:
        body = to_json(write.document)
    except (TypeError, RecursionError) as error:
        return rejected(f"the document cannot be written as JSON: {error}")
    if _OWN_PREFIX_JSON in body:  # no document at all, as a rule, so that its fields need not be looked at
        for name in write.document:
            if name.startswith(OWN_PREFIX):
                return rejected(f"fields whose names begin with {OWN_PREFIX} are Delta's own, and {name} does")
    return _index_lines(id_, write.version, body)


_OWN_PREFIX_JSON = f'"{OWN_PREFIX}'.encode()


def _index_lines(id_: str, version: int, body: bytes, own: bytes = b"") -> bytes:
    fields = b'"_delta_version":%d' % version
    if own:
        fields += b"," + own
    rest = body[1:] if body == b"{}" else b"," + body[1:]
    return b'{"index":{"_id":%b,"version":%d,"version_type":"external_gte"}}\n{%b%b\n' % (
        orjson.dumps(id_),
        version,
        fields,
        rest,
    )


def delete_entry(id_: str, version: int) -> bytes:
    """Return the line of a bulk that deletes a document for good, unless it is newer than `version`."""
    return b'{"delete":{"_id":%b,"version":%d,"version_type":"external_gte"}}\n' % (orjson.dumps(id_), version)


def parts_of(entries: Mapping[int, bytes], max_bytes: int) -> Iterator[dict[int, bytes]]:
    """Cut entries into parts of at most `max_bytes`; one that is larger is a part by itself."""
    part: dict[int, bytes] = {}
    size = 0
    for number, entry in entries.items():
        if part and size + len(entry) > max_bytes:
            yield part
            part, size = {}, 0
        part[number] = entry
        size += len(entry)
    if part:
        yield part


def verdict(status: int, error: Any) -> Outcome | SinkBusy | SinkRefused | None:
    """Return what an item of a bulk's reply means (None: applied), or the error that concerns the whole store."""
    if status < 300 or (status == 404 and not error):  # 404: a delete of what is not there, whose version counts
        return None
    if status == 409:
        return STALE
    reason = reason_of(error)
    if status in (408, 429) or status >= 500 or is_block(reason):
        return SinkBusy(reason)
    if status in (401, 403, 404):
        return SinkRefused(reason)
    return rejected(reason)


def is_block(reason: str) -> bool:
    """Tell whether writes are blocked: by a full disk (flood stage), by an operator, or while the cluster forms."""
    return "cluster_block_exception" in reason


def reason_of(error: Any) -> str:
    """Return a store's error as one sentence: its type, its reason and the causes beneath."""
    parts: list[str] = []
    while isinstance(error, dict):
        about = cast("dict[str, Any]", error)
        parts.append(": ".join(str(about[key]) for key in ("type", "reason") if about.get(key)))
        error = about.get("caused_by")
    return "; ".join(parts) if parts else str(error)


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header; a date in it is ignored."""
    return float(header) if header and header.isdigit() else None


def content_of(source: dict[str, Any]) -> dict[str, Any] | None:
    """Return a document without Delta's fields; None for a tombstone."""
    if source.get(DELETED):
        return None
    return {name: value for name, value in source.items() if not name.startswith(OWN_PREFIX)}


def brief(error: requests.exceptions.RequestException) -> str:
    """Return what went wrong, without the URL and the chain of classes around it."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S} s"
    if isinstance(error, requests.exceptions.Timeout):
        return f"no answer within {READ_TIMEOUT_S} s"
    patterns = r"\[Errno -?\d+\] ([^'\")]+)|(certificate verify failed: [^(]+)|([A-Z][a-z ]+closed connection[a-z ]*)"
    found = re.search(patterns, str(error))
    return next((group.strip() for group in found.groups() if group), "") if found else type(error).__name__
