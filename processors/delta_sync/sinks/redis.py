"""Redis, Valkey and Redis Cluster: one key per document, a JSON string or a hash, each write one atomic script call.

What is in the store, for the key `movie:5` of the target `movie:{id}`:

    movie:5                 {"_version":"0004503599650000384","title":"Casablanca"}, or a hash with those fields
    delta:t:{movie:5}       the version of its delete, which expires after `tombstone_ttl` (with a `ttl`: of any write)
    delta:f:movie:{id}      the version of the target's last truncate

A value of the format's type without a version, such as one that a cache-aside application left, is taken as older than
every write: it is overwritten, and deleted with its row. A key of another type is left alone: its writes are rejected.

In a cluster a script can touch one slot only. There each write is a call of its own, pipelined, and the floor is read
before and after them: what slipped in below a floor that was raised meanwhile is deleted in a second step. A process
that dies before it leaves such a document behind. `delta:r:movie:{id}`, the time at which the floor was raised, tells
`sweep` to look for it.

What Redis acknowledges it can lose: by default a crash takes the last second or two of its append-only file with it,
and a failover what the replica had not received. Nobody sends those writes again; a dump repairs what they changed.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha1
from typing import Any, Literal, NamedTuple

import orjson
import redis
from pydantic import Field
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write, rejected
from delta_sync.errors import Problem, SinkBusy, SinkRefused, Unstorable, UsageError
from delta_sync.sinks.base import VERSION_FIELD, Options, Sink, Stored, Target, TargetOptions
from delta_sync.sinks.redis_keys import (
    TOMBSTONES,
    KeyTemplate,
    default_template,
    floor_key,
    generation_prefix,
    key_of_tombstone,
    parse_template,
    pointer_key,
    raised_key,
    slot_of,
    tombstone_key,
)
from delta_sync.sinks.redis_scripts import ABOVE_ALL, FORGET, HASH, JSON, PROBE, RAISE_FLOOR, VALUES, ZERO
from delta_sync.spec import Duration
from delta_sync.tables import Table, key_of_parts
from delta_sync.urls import split_url
from delta_sync.values import JSON_OPTIONS, Document, from_json, json_default
from delta_sync.versions import VERSION_DIGITS

CALL_KEYS = 100  # writes in one script call: half a millisecond, in which Redis serves nobody else; 500 are no cheaper
CALL_BYTES = 1 << 20  # and bytes: a document above it is alone in its call
READ_KEYS = 100  # documents in one script's reply, which Lua holds in memory as a whole
SCAN_COUNT = 1000  # keys that Redis looks at in one step: about a millisecond
MAX_DOCUMENT_BYTES = 512 * 1000 * 1000  # below Redis's proto-max-bulk-len (512 MiB), above which it hangs up
CONNECT_TIMEOUT_S = 5.0  # a handshake takes a round trip or three, so beyond this nobody is there
REPLY_TIMEOUT_S = 15.0  # a call takes milliseconds, an fsync or a fork on a slow disk may take seconds
SCRIPT_ATTEMPTS = 3  # a restart or failover empties the script cache; three in one batch are no coincidence
READONLY_GRACE_S = 120.0  # after a failover a name may lead to the old primary for as long as DNS keeps it
FLOOR_SETTLES_S = 86_400  # no writer stands still for so long between reading the floor and writing
FULL_RETRY_S = 10.0  # memory comes back when keys expire or somebody acts, not within milliseconds
OLDEST = (6, 2)  # of Redis, that this is tested with


class RedisOptions(Options):
    """What a Redis sink may say beside its URL."""

    format: Literal["json", "hash"] = Field(
        default="json",
        description="json: a string that holds the document; hash: a hash with a field for each of the document's, "
        "text as it is, other scalars as text, lists and objects as JSON, without those that are null.",
    )
    prefix: str = Field(default="", description="Text before every document's key.")
    ttl: Duration | None = Field(
        default=None, gt=0, description="Documents expire so long after their last write; default: never."
    )
    cluster: bool | None = Field(default=None, description="Whether it is a Redis Cluster; default: ask it.")
    ca_file: str | None = Field(default=None, description="For rediss://: file of the certificates to trust.")
    cert_file: str | None = Field(default=None, description="For rediss://: file of the client's certificate.")
    key_file: str | None = Field(default=None, description="For rediss://: file of the client certificate's key.")


class RedisTargetOptions(TargetOptions):
    """What a table may say for a Redis sink."""

    key: str | None = Field(
        default=None,
        description="A document's key, with every key column in braces, such as movie:{id}; default: "
        "<schema>.<table>:{first}:{second}. Two tables' keys must begin or end differently.",
    )
    ttl: Duration | None = Field(default=None, gt=0, description="Instead of the sink's ttl.")


class _Place(NamedTuple):
    """A target's settings."""

    template: KeyTemplate
    ttl_ms: int  # 0: documents do not expire


class _Call(NamedTuple):
    """One call of a script."""

    keys: list[bytes]
    args: list[bytes]


class RedisSink(Sink[RedisOptions, RedisTargetOptions]):
    """Documents in Redis. One instance serves several threads, each with a connection of its own."""

    schemes = ("redis", "rediss")
    options_model = RedisOptions
    target_model = RedisTargetOptions
    generations = True

    def __init__(
        self,
        name: str,
        url: str,
        options: RedisOptions,
        tombstone_ttl_s: int,
        *,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Clocks are in seconds, `wall_clock` since 1970. Raises UsageError when the URL cannot be meant."""
        super().__init__(name, url, options, tombstone_ttl_s)
        self._wall_clock = wall_clock
        self._link = _Link(name, url, options, now)
        self._scripts = HASH if options.format == "hash" else JSON
        self._encode = _hash_args if options.format == "hash" else _json_args
        self._tombstone_ms = tombstone_ttl_s * 1000

    def target(self, table: Table, options: RedisTargetOptions) -> Target:
        """Return the table's keys. `overlapping` tells whether those of two targets could be the same."""
        prefix = generation_prefix(self.number) + self.options.prefix
        if options.key is None:
            template = default_template(table, prefix)
        else:
            template = parse_template(options.key, table, prefix)
        ttl_s = options.ttl or self.options.ttl
        ttl_ms = 0 if ttl_s is None else max(1, round(ttl_s * 1000))
        return Target(table, template.text(table), _Place(template, ttl_ms))

    @staticmethod
    def overlapping(targets: Sequence[Target]) -> list[tuple[Target, Target]]:
        """Return the pairs of targets that could have a document under the same key. Pure."""
        pairs = ((one, two) for place, one in enumerate(targets) for two in targets[place + 1 :])
        return [(one, two) for one, two in pairs if _template(one).overlaps(_template(two))]

    def check(self, targets: Sequence[Target]) -> list[Problem]:
        """Ask the server about itself, and try every command in a way that leaves no trace."""
        where = f"sink {self.name}"
        problems = [
            Problem(
                where,
                f"the keys {one.place} of {one.table.id} and {two.place} of {two.table.id} could be the same",
                "let them begin differently",
            )
            for one, two in self.overlapping(targets)
        ]
        try:
            facts = self._link.facts()
            problems += judge(where, facts)
            if not any(problem.fatal for problem in problems):
                self._probe(targets)
        except (SinkBusy, SinkRefused) as error:
            problems.append(Problem(where, str(error).removeprefix(f"{where}: "), ""))
        return problems

    def _probe(self, targets: Sequence[Target]) -> None:
        nobody = uuid.uuid4().hex  # a key that is not there, so that `SET … XX` and `UNLINK` do nothing
        for target in targets:
            key = _template(target).literals[0].encode() + nobody.encode()
            self._link.run(PROBE, [_Call([key, tombstone_key(key)], []), _Call([floor_key(nobody)] * 2, [])])
            for _ in self._link.scan(b"delta:" + nobody.encode(), b"string"):
                break

    def prepare(self, target: Target) -> None:
        """Create nothing: keys need no preparation. Refuse to write what readers would not see."""
        if self.number is not None:
            return
        led = self._link.ask("GET", self._pointer(target))
        if led:
            raise SinkRefused(
                f"{self._pointer(target).decode()} leads readers to keys that begin with {led.decode()!r}, and the"
                " state store knows nothing of it; give the pipeline its state back, or delete that key and --reload"
            )

    def _pointer(self, target: Target) -> bytes:
        return pointer_key(target.place.removeprefix(generation_prefix(self.number)))

    def lead_readers(self, targets: Sequence[Target]) -> None:
        """Set the pointers, by which readers know what their keys begin with; all at once, in a cluster one by one."""
        prefix = generation_prefix(self.number).encode()
        pairs = [(self._pointer(target), prefix) for target in targets]
        for some in [[pair] for pair in pairs] if self._link.is_cluster else [pairs]:
            if some:
                self._link.ask("MSET", *(part for pair in some for part in pair))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Apply the writes in one round trip, in a cluster three."""
        if not writes:
            return []
        if not self._link.is_cluster:
            outcomes, sent, calls = self._calls(target, writes, ZERO)
            self._settle(outcomes, sent, self._link.run(self._scripts.write, calls))
            return outcomes
        outcomes, sent, calls = self._calls(target, writes, self._floor(target))
        self._settle(outcomes, sent, self._link.run(self._scripts.write, calls))
        floor = self._floor(target)
        late = [place for place in sent if writes[place].version < int(floor)]
        # What is stale may have been written by a process that died right here, and is now repeated.
        self._remove([_template(target).render(writes[place].key).encode() for place in late], floor)
        for place in late:
            if outcomes[place] is APPLIED:
                outcomes[place] = STALE
        return outcomes

    def _calls(
        self, target: Target, writes: Sequence[Write], floor: bytes
    ) -> tuple[list[Outcome], list[int], list[_Call]]:
        """Return outcomes (of what is sent: applied), the places of what is sent, and the calls that send it. Pure."""
        place: _Place = target.settings
        render, encode = place.template.render, self._encode
        keep = 0 < place.ttl_ms < self._tombstone_ms  # a document that lives longer keeps its version itself
        header = [b"%d" % self._tombstone_ms, b"%d" % place.ttl_ms, b"%d" % keep, floor]
        cluster = self._link.is_cluster
        call_keys, call_bytes = (1, 0) if cluster else (CALL_KEYS, CALL_BYTES)
        first_key = [] if cluster else [floor_key(target.place)]
        outcomes, sent, calls = [APPLIED] * len(writes), list[int](), list[_Call]()
        call, room, free_bytes = None, 0, 0
        for number, (row_key, version, document) in enumerate(writes):
            try:
                key = render(row_key).encode()
                args = encode(version, document)
            except _Unstorable as error:
                outcomes[number] = rejected(str(error))
                continue
            except UnicodeEncodeError:
                outcomes[number] = rejected("the key is text that is not valid Unicode")
                continue
            size = len(args[-1]) if len(args) == 1 else sum(map(len, args))
            if call is None or not room or size > free_bytes:
                call = _Call(first_key.copy(), header.copy())
                calls.append(call)
                room, free_bytes = call_keys, call_bytes
            room -= 1
            free_bytes -= size
            call.keys.append(key)
            call.keys.append(b"delta:t:{%b}" % key if b"}" not in key else tombstone_key(key))
            call.args.extend(args)
            sent.append(number)
        return outcomes, sent, calls

    def _settle(self, outcomes: list[Outcome], sent: Sequence[int], replies: Iterable[bytes]) -> None:
        """Enter what the scripts answered: a byte for each write that was sent."""
        codes = b"".join(replies)
        assert len(codes) == len(sent), f"{len(codes)} outcomes for {len(sent)} writes"
        if codes.count(b"a") == len(codes):
            return
        for place, code in zip(sent, codes, strict=True):
            if code == ord("s"):
                outcomes[place] = STALE
            elif code == ord("w"):
                outcomes[place] = rejected(
                    f"the key holds another type than {'a hash' if self._scripts is HASH else 'a string'}; "
                    "delete it, or give the target other keys"
                )

    def _floor(self, target: Target) -> bytes:
        return self._link.ask("GET", floor_key(target.place)) or ZERO

    def truncate(self, target: Target, version: int) -> int:
        """Raise the floor, then scan and delete. In a cluster, do not move slots meanwhile: SCAN could miss keys."""
        text = b"%019d" % version
        call = _Call([floor_key(target.place)], [text])
        if self._link.is_cluster:
            call = _Call([*call.keys, raised_key(target.place)], [text, b"%d" % self._wall_clock()])
        self._link.run(RAISE_FLOOR, [call])
        return sum(self._remove(keys, text) for keys in self._scan_keys(target))

    def sweep(self, target: Target, recent_s: float | None = None) -> int:
        """In a cluster, delete what is below the floor while it has not settled; return how much was.

        Because a write reads the floor first, what is left below one was written about when it was raised. A look at
        everything that begins long after is the last one, for it takes a cluster some seconds per million keys.
        """
        if not self._link.is_cluster:
            return 0
        raised: bytes | None = self._link.ask("GET", raised_key(target.place))
        if raised is None:
            return 0
        age_s = self._wall_clock() - int(raised)
        if recent_s is not None and age_s > recent_s:
            return 0
        floor = self._floor(target)
        removed = sum(self._remove(keys, floor) for keys in self._scan_keys(target))
        if age_s >= FLOOR_SETTLES_S:
            self._link.run(FORGET, [_Call([raised_key(target.place)], [raised])])  # unless it is raised again by now
        return removed

    def _remove(self, keys: Sequence[bytes], below: bytes) -> int:
        return sum(self._link.run(self._scripts.remove, self._calls_for(keys, [below])))

    def _calls_for(self, keys: Sequence[bytes], args: list[bytes], size: int = CALL_KEYS) -> list[_Call]:
        step = 1 if self._link.is_cluster else size
        return [_Call(list(keys[start : start + step]), args) for start in range(0, len(keys), step)]

    def drop(self, target: Target) -> int:
        """Delete the target's documents, tombstones and floor."""
        documents = sum(self._remove(keys, ABOVE_ALL) for keys in self._scan_keys(target))
        for tombstones in self._scan_tombstones(target):
            self._link.delete(tombstones)
        self._link.delete([floor_key(target.place), raised_key(target.place)])
        pointer = self._pointer(target)
        if self.number is not None and self._link.ask("GET", pointer) == generation_prefix(self.number).encode():
            self._link.delete([pointer])
        return documents

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        """Return each key as it was at one instant (not all of them at the same one)."""
        decode = _from_hash if self._scripts is HASH else _from_json
        found: list[Stored | None] = []
        for content, tombstone in self._contents(target, keys):
            stored = decode(content) if content else None
            found.append(stored or (Stored(int(tombstone), None) if tombstone else None))
        return found

    def read_beside(
        self, target: Target, keys: Sequence[Key], documents: Sequence[Document | None]
    ) -> Sequence[Stored | int | None]:
        """Compare strings byte by byte; a document that is not written as Delta would write it now is decoded."""
        if self._scripts is HASH:
            return self.read(target, keys)
        found: list[Stored | int | None] = []
        for document, (content, tombstone) in zip(documents, self._contents(target, keys), strict=True):
            if content and document is not None and _is_written_so(content, document):
                found.append(int(content[VERSION_PLACE]))
            else:
                stored = _from_json(content) if content else None
                found.append(stored or (Stored(int(tombstone), None) if tombstone else None))
        return found

    def _contents(self, target: Target, keys: Sequence[Key]) -> Iterator[tuple[Any, bytes | None]]:
        """Yield what is stored for each key, and its tombstone."""
        names = [_template(target).render(key).encode() for key in keys]
        step = 1 if self._link.is_cluster else READ_KEYS
        calls = [
            _Call([name for key in names[start : start + step] for name in (key, tombstone_key(key))], [])
            for start in range(0, len(names), step)
        ]
        for reply in self._link.run(self._scripts.read, calls):
            yield from zip(reply[::2], reply[1::2], strict=True)

    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        """Yield keys as text, with their versions; keys that Delta did not write are passed over."""
        for keys in self._scan_keys(target):
            replies: list[list[bytes | None]] = self._link.run(self._scripts.versions, self._calls_for(keys, []))
            versions = [version for reply in replies for version in reply]
            yield [(key.decode(), int(version)) for key, version in zip(keys, versions, strict=True) if version]

    def scan_ids(self, target: Target) -> Iterator[list[str]]:
        """Yield keys without asking for what they hold."""
        for keys in self._scan_keys(target):
            yield [key.decode() for key in keys]

    def _scan_keys(self, target: Target) -> Iterator[list[bytes]]:
        template = _template(target)
        kind = b"hash" if self._scripts is HASH else b"string"
        for keys in self._link.scan(template.glob(), kind):
            own = template.own(keys)
            if own:
                yield own

    def _scan_tombstones(self, target: Target) -> Iterator[list[bytes]]:
        template = _template(target)
        for keys in self._link.scan(TOMBSTONES + b"*", b"string"):
            of = {key_of_tombstone(key): key for key in keys}
            own = [of[key] for key in template.own(of)]
            if own:
                yield own

    def newest_version(self, target: Target) -> int:
        """Scan the store's keys twice, for documents and for tombstones."""
        newest = int(self._floor(target))
        for batch in self.scan(target):
            newest = max([newest, *(version for _, version in batch)])
        for keys in self._scan_tombstones(target):
            replies: list[list[bytes | None]] = self._link.run(VALUES, self._calls_for(keys, []))
            versions = [int(version) for reply in replies for version in reply if version]  # it may just have expired
            newest = max([newest, *versions])
        return newest

    def id_of(self, target: Target, key: Key) -> str:
        """Return the document's Redis key."""
        return _template(target).render(key)

    def key_of(self, target: Target, id_: str) -> Key | None:
        """Take the template apart."""
        template = _template(target)
        parts = template.parse(id_)
        if parts is None:
            return None
        try:
            key = key_of_parts(target.table, parts)
        except ValueError:
            return None
        return key if template.render(key) == id_ else None

    def stored_form(self, target: Target, document: Document) -> dict[str, Any]:
        """Return what a string holds, or the texts that a hash does."""
        del target
        try:
            args = self._encode(1, document)
        except _Unstorable as error:
            raise Unstorable(f"{error}.") from error
        if self._scripts is JSON:
            stored = _from_json(args[0])
        else:
            stored = _from_hash([VERSION_FIELD.encode(), args[0], *args[2:]])
        assert stored is not None, "it has a version"
        assert stored.document is not None
        return stored.document

    def expires(self, target: Target) -> bool:
        """Whether it has a `ttl`."""
        place: _Place = target.settings
        return place.ttl_ms > 0

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        """Forget the keys that have these versions, each in one step."""
        names = [(_template(target).render(key).encode(), b"%019d" % version) for key, version in items]
        calls = [_Call([name, tombstone_key(name)], [version]) for name, version in names]
        self._link.run(self._scripts.discard, calls)

    def close(self) -> None:
        """Close the connections."""
        self._link.close()


def _template(target: Target) -> KeyTemplate:
    place: _Place = target.settings
    return place.template


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Unstorable(Exception):
    """Why a document cannot be stored."""


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value, json_default, JSON_OPTIONS)  # `to_json`, whose call costs as much as itself
    except TypeError as error:  # orjson's own error is one
        raise _Unstorable(f"the document cannot be written as JSON: {error.__cause__ or error}") from error


def _refuse_reserved(document: Document) -> None:
    if VERSION_FIELD in document:
        raise _Unstorable(f"the field {VERSION_FIELD} is Delta's own; give the document's field another name")


def _refuse_large(size_bytes: int) -> None:
    if size_bytes > MAX_DOCUMENT_BYTES:
        raise _Unstorable(f"the document has {size_bytes:,} bytes, and Redis takes {MAX_DOCUMENT_BYTES:,} at most")


def _json_args(version: int, document: Document | None) -> list[bytes]:
    """Return a write as the JSON scripts take it."""
    if document is None:
        return [b"%019d" % version]
    if VERSION_FIELD in document:
        _refuse_reserved(document)
    body = _json(document)
    if len(body) > MAX_DOCUMENT_BYTES:
        _refuse_large(len(body))
    return [_head(version) + body[1:]] if len(body) > 2 else [b'{"_version":"%019d"}' % version]


@lru_cache(maxsize=8)  # of a dump's chunks under way: all of a chunk's rows have one version
def _head(version: int) -> bytes:
    return b'{"_version":"%019d",' % version


def _hash_args(version: int, document: Document | None) -> list[bytes]:
    """Return a write as the hash scripts take it."""
    if document is None:
        return [b"%019d" % version, b"-1"]
    _refuse_reserved(document)
    pairs: list[bytes] = []
    for name, value in document.items():
        if type(value) is str:
            pairs += (_utf8(name), _utf8(value))
            continue
        text = _json(value)
        if text[:1] == b'"':  # dates and the like
            text = orjson.loads(text).encode()
        if text != b"null":
            pairs += (_utf8(name), text)
    _refuse_large(max(map(len, pairs), default=0))
    return [b"%019d" % version, b"%d" % len(pairs), *pairs]


def _utf8(text: object) -> bytes:
    if not isinstance(text, str):
        raise _Unstorable(f"a document's field names are text, and {text!r} is a {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _Unstorable("the document holds text that is not valid Unicode") from error


VERSION_PLACE = slice(13, 32)  # in a string, behind {"_version":"
_VERSION_END = 33  # behind the quotation mark


def _is_written_so(body: bytes, document: Document) -> bool:
    """Tell whether a string is what Delta would write for a document, whatever its version."""
    try:
        (written,) = _json_args(1, document)
    except _Unstorable:
        return False
    return (
        body[_VERSION_END:] == written[_VERSION_END:]
        and body.startswith(b'{"_version":"')
        and body[VERSION_PLACE].isdigit()
        and body[32:33] == b'"'
    )


def _from_json(body: bytes) -> Stored | None:
    """Return what a string holds; None if Delta did not write it."""
    version = body[VERSION_PLACE]
    if not body.startswith(b'{"_version":"') or len(version) != VERSION_DIGITS or not version.isdigit():
        return None
    try:
        document: dict[str, Any] = from_json(body)
    except ValueError:
        return None
    del document[VERSION_FIELD]
    return Stored(int(version), document)


def _from_hash(flat: Sequence[bytes]) -> Stored | None:
    """Return what a hash holds; None if Delta did not write it."""
    # What Delta wrote is text; somebody may have added a field that is not.
    texts = [text.decode(errors="backslashreplace") for text in flat]
    fields: dict[str, Any] = dict(zip(texts[::2], texts[1::2], strict=True))
    version = fields.pop(VERSION_FIELD, "")
    if len(version) != VERSION_DIGITS or not version.isdecimal():
        return None
    return Stored(int(version), fields)


# ── what the server says of itself ───────────────────────────────────────────────────────────────────────────────────


class Facts(NamedTuple):
    """What `check` learns from one server. `save` is None where CONFIG may not be asked."""

    server: str
    version: tuple[int, ...]
    role: str
    maxmemory: int
    policy: str
    aof: bool
    save: str | None


def judge(where: str, facts: Sequence[Facts]) -> list[Problem]:
    """Return what is wrong with servers. Pure."""
    problems: list[Problem] = []
    for fact in facts:
        if fact.version[:2] < OLDEST:
            problems.append(
                Problem(
                    where,
                    f"Redis at {fact.server} is {'.'.join(map(str, fact.version))}",
                    f"use {'.'.join(map(str, OLDEST))} or newer",
                )
            )
        if fact.role not in ("master", "primary"):
            problems.append(
                Problem(
                    where, f"Redis at {fact.server} is a {fact.role}", "give the URL of the primary, which takes writes"
                )
            )
        if fact.maxmemory and fact.policy != "noeviction":
            problems.append(
                Problem(
                    where,
                    f"Redis at {fact.server} evicts keys when it has {fact.maxmemory:,} bytes (maxmemory-policy "
                    f"{fact.policy}), the versions of deletes among them",
                    "set maxmemory-policy to noeviction, or an older write that comes late could undo a delete",
                    fatal=False,
                )
            )
        if not fact.aof and fact.save == "":
            problems.append(
                Problem(
                    where,
                    f'Redis at {fact.server} keeps nothing on disk (appendonly no, save "")',
                    "after it restarts, fill it again with `deltactl run NAME --reload`",
                    fatal=False,
                )
            )
    return problems


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Trouble(NamedTuple):
    """What an error means: whether it may pass, what is wrong, and what to do."""

    passes: bool
    what: str
    retry_after_s: float | None = None


_CODE = re.compile(r"\b(OOM|MISCONF|NOREPLICAS|READONLY|NOPERM|NOAUTH|WRONGPASS|LOADING|BUSY|MASTERDOWN|UNKILLABLE|"
                   r"CLUSTERDOWN|TRYAGAIN|MOVED|ASK)\b")  # fmt: skip
_DENIED = re.compile(r"can't run this command|ACL failure|has no permissions|can't access at least one of the keys")
_BY_CODE = {
    "OOM": _Trouble(True, "is full (maxmemory); raise maxmemory, or make room", FULL_RETRY_S),
    "MISCONF": _Trouble(True, "takes no writes because it cannot save to disk; make room there", FULL_RETRY_S),
    "NOREPLICAS": _Trouble(True, "takes no writes because it has too few replicas (min-replicas-to-write)"),
    "LOADING": _Trouble(True, "is loading its data"),
    "BUSY": _Trouble(True, "is busy running somebody's script or function"),
    "UNKILLABLE": _Trouble(True, "is busy running somebody's script or function"),
    "MASTERDOWN": _Trouble(True, "has lost its primary"),
    "CLUSTERDOWN": _Trouble(True, "is down: not all slots of the cluster are served"),
    "TRYAGAIN": _Trouble(True, "is moving slots"),
    "MOVED": _Trouble(True, "is moving slots"),
    "ASK": _Trouble(True, "is moving slots"),
    "READONLY": _Trouble(False, "is a read-only replica; give the URL of the primary"),
    "NOPERM": _Trouble(False, "denies this user a command or a key; see ACL LOG, and grant it with ACL SETUSER"),
    "NOAUTH": _Trouble(False, "wants a user name or password; put them into the URL as a reference"),
    "WRONGPASS": _Trouble(False, "does not accept the user name or password"),
}
_BY_TYPE: tuple[tuple[type[Exception], str], ...] = (
    (errors.BusyLoadingError, "LOADING"),
    (errors.OutOfMemoryError, "OOM"),
    (errors.ReadOnlyError, "READONLY"),
    (errors.NoPermissionError, "NOPERM"),
    (errors.AuthorizationError, "NOPERM"),
    (errors.MasterDownError, "MASTERDOWN"),
    (errors.ClusterDownError, "CLUSTERDOWN"),
    (errors.TryAgainError, "TRYAGAIN"),
    (errors.MovedError, "MOVED"),
    (errors.AskError, "ASK"),
)
NO_SELECT = "SELECT is not allowed in cluster mode"
QUOTED_CHARS = 200  # of a server's own words: enough to search for, too little to hold a document


def explain(error: Exception) -> _Trouble:
    """Return what an error of redis-py means. Pure. Its text is quoted only where it can hold no secret."""
    text = str(error)
    for kind, code in _BY_TYPE:
        if isinstance(error, kind):
            return _BY_CODE[code]
    if isinstance(error, errors.AuthenticationError | errors.AuthenticationWrongNumberOfArgsError):
        return _BY_CODE["NOAUTH" if "required" in text else "WRONGPASS"]
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ssl.SSLCertVerificationError):
            return _Trouble(
                False, f"has a certificate that is not trusted ({chain.verify_message}); see the option ca_file"
            )
        if isinstance(chain, FileNotFoundError | PermissionError):
            return _Trouble(False, "cannot be asked: a file that ca_file, cert_file or key_file names cannot be read")
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, errors.TimeoutError):
        return _Trouble(True, "did not answer in time")
    if NO_SELECT in text:
        return _Trouble(False, "is a Redis Cluster, which has database 0 only; end the URL with /0, or nothing")
    if "luster mode is not enabled" in text or "luster support disabled" in text:
        return _Trouble(False, "is no cluster; leave out the option cluster")
    if isinstance(error, errors.ConnectionError | errors.RedisClusterException | OSError):
        return _Trouble(True, f"cannot be reached ({_quoted(text)})")
    found = _CODE.search(text)
    if found is not None:
        return _BY_CODE[found.group()]
    if _DENIED.search(text):
        return _BY_CODE["NOPERM"]
    return _Trouble(False, f"answered: {_quoted(text)}")


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= QUOTED_CHARS else f"{line[:QUOTED_CHARS]}…"


# redis-py's annotations are partial, so its objects are Any here, and what they return gets its type where it is used.
_Redis: Any = redis.Redis
_RedisCluster: Any = RedisCluster


_ELSEWHERE = (
    errors.AskError,  # MOVED is one
    errors.TryAgainError,
    errors.ClusterDownError,
    errors.ConnectionError,
    errors.TimeoutError,
)


def _pipelined(client: Any, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Send commands to one server in one round trip, and return replies and errors."""
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    return replies


class _Link:
    """The connections to one Redis or cluster. Every method raises SinkBusy or SinkRefused, and nothing else."""

    def __init__(self, name: str, url: str, options: RedisOptions, now: Callable[[], float]) -> None:
        self._name, self._url, self._now = name, url, now
        parts = split_url(url, f"sink {name}: the URL")
        self._settings: dict[str, Any] = {
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_timeout": REPLY_TIMEOUT_S,
            "socket_keepalive": True,
            "protocol": 2,  # nothing here needs RESP3, and every server and proxy has RESP2
        }
        if parts.scheme == "rediss":
            files = {
                "ssl_ca_certs": options.ca_file,
                "ssl_certfile": options.cert_file,
                "ssl_keyfile": options.key_file,
            }
            self._settings |= {name: file for name, file in files.items() if file is not None}
        try:
            self._server = f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
            path = parts.path.strip("/")
            if path and not path.isdecimal():
                raise UsageError(f"sink {name}: the path of the URL must be a database number, as in /0.")
            self._database = int(path or 0)
            # One more attempt at once: a connection that idled may have been cut. The worker knows how to wait.
            self._single = _Redis.from_url(url, retry=Retry(NoBackoff(), 1), **self._settings)
        except ValueError:  # from None: its text may quote the URL
            raise UsageError(
                f"sink {name}: the URL must name one host, and options of the driver redis-py with values that fit."
            ) from None
        self._wants_cluster = options.cluster
        self._cluster: Any = None
        self._lock = threading.Lock()
        self._known = False
        self._readonly_since_s: float | None = None

    @property
    def is_cluster(self) -> bool:
        """Whether it is a cluster, which is asked once."""
        return self._client is self._cluster

    @property
    def _client(self) -> Any:
        if not self._known:
            with self._lock, self._typed_errors():
                if not self._known:
                    cluster = self._wants_cluster
                    if cluster is None:
                        cluster = bool(self._single.info("cluster").get("cluster_enabled"))
                    if cluster and self._database:
                        raise errors.RedisClusterException(NO_SELECT)
                    if cluster:
                        # The URL's name stays the way in: the addresses behind it may all change while this runs.
                        self._cluster = _RedisCluster.from_url(self._url, dynamic_startup_nodes=False, **self._settings)
                    self._known = True
        return self._cluster or self._single

    def run(self, script: str, calls: Sequence[_Call]) -> list[Any]:
        """Run a script once for each call, in one round trip (per node), and return the replies."""
        if not calls:
            return []
        client = self._client
        digest = sha1(script.encode(), usedforsecurity=False).hexdigest()  # what EVALSHA names a script by
        replies: list[Any] = [None] * len(calls)
        left = list(range(len(calls)))
        with self._typed_errors():
            for _ in range(SCRIPT_ATTEMPTS):
                commands = [
                    ("EVALSHA", digest, len(call.keys), *call.keys, *call.args)
                    for call in (calls[place] for place in left)
                ]
                for place, reply in zip(left, self._send(commands), strict=True):
                    replies[place] = reply
                left = [place for place in left if isinstance(replies[place], errors.NoScriptError)]
                if not left:
                    break
                client.script_load(script)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies

    def _send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send EVALSHA commands, each for one slot, and return replies and errors."""
        client = self._client
        if client is not self._cluster:
            return _pipelined(client, commands)
        # redis-py's own pipeline for clusters costs some 60 µs for each command, this one 15.
        by_node: dict[Any, list[int]] = {}
        node_of_slot = client.nodes_manager.get_node_from_slot
        for place, command in enumerate(commands):
            by_node.setdefault(node_of_slot(slot_of(command[3])), []).append(place)
        replies: list[Any] = [None] * len(commands)
        for node, places in by_node.items():
            some: list[Any]
            try:
                some = _pipelined(client.get_redis_connection(node), [commands[place] for place in places])
            except (errors.ConnectionError, errors.TimeoutError) as error:
                some = [error] * len(places)
            for place, reply in zip(places, some, strict=True):
                replies[place] = self._follow(commands[place]) if isinstance(reply, _ELSEWHERE) else reply
        return replies

    def _follow(self, command: tuple[Any, ...]) -> Any:
        """Send a command by itself: so the client follows slots that move, and finds new primaries after a failover."""
        try:
            return self._cluster.execute_command(*command)
        except errors.NoScriptError as error:  # a node that was not asked before
            return error

    def ask(self, *command: Any) -> Any:
        """Run one command and return its reply."""
        with self._typed_errors():
            return self._client.execute_command(*command)

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete keys."""
        with self._typed_errors():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.execute_command("UNLINK", key)
            pipeline.execute()

    def _nodes(self) -> list[Any]:
        client = self._client
        if client is self._cluster:
            client.nodes_manager.initialize()  # who is a primary may have changed, and what follows asks them directly
            return [client.get_redis_connection(node) for node in client.get_primaries()]
        return [client]

    def scan(self, pattern: bytes, kind: bytes) -> Iterator[list[bytes]]:
        """Yield the keys of a type that match a pattern, of all primaries."""
        with self._typed_errors():
            nodes = self._nodes()
        for node in nodes:
            cursor = 0
            while True:
                with self._typed_errors():
                    cursor, keys = node.scan(cursor, match=pattern, count=SCAN_COUNT, _type=kind.decode())
                if keys:
                    yield keys
                if cursor == 0:
                    break

    def facts(self) -> list[Facts]:
        """Ask every primary about itself."""
        with self._typed_errors():
            return [self._facts(node) for node in self._nodes()]

    def _facts(self, node: Any) -> Facts:
        info: Mapping[str, Any] = node.info("all")
        try:
            save: str | None = node.config_get("save").get("save", "")
        except errors.ResponseError:  # denied, or renamed away
            save = None
        kwargs: Mapping[str, Any] = node.get_connection_kwargs()
        return Facts(
            server=f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}",
            version=tuple(int(part) for part in re.findall(r"\d+", str(info["redis_version"]))),
            role=str(info.get("role", "master")),  # what a managed service leaves out is as it should be
            maxmemory=int(info.get("maxmemory", 0)),
            policy=str(info.get("maxmemory_policy", "noeviction")),
            aof=bool(info.get("aof_enabled", True)),
            save=save,
        )

    @contextmanager
    def _typed_errors(self) -> Generator[None, None, None]:
        try:
            yield
        except (errors.RedisError, errors.RedisClusterException, OSError) as error:
            trouble = explain(error)
            message = f"sink {self._name}: Redis at {self._server} {trouble.what}"
            if trouble is _BY_CODE["READONLY"] and self._may_fail_over():
                raise SinkBusy(message) from error
            if trouble.passes:
                raise SinkBusy(message, trouble.retry_after_s) from error
            raise SinkRefused(message) from error
        self._readonly_since_s = None

    def _may_fail_over(self) -> bool:
        """Hang up, so that the next attempt asks for the name's address again; tell whether to make one."""
        self._single.connection_pool.disconnect(inuse_connections=False)
        now_s = self._now()
        if self._readonly_since_s is None:
            self._readonly_since_s = now_s
        return now_s - self._readonly_since_s < READONLY_GRACE_S

    def close(self) -> None:
        """Close all connections."""
        self._single.close()
        if self._cluster is not None:
            self._cluster.close()
