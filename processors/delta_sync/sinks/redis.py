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

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from delta_sync.changes import APPLIED, STALE, Key, Outcome, Write, rejected
from delta_sync.errors import Problem, SinkBusy, SinkRefused, Unstorable
from delta_sync.sinks.base import VERSION_FIELD, Sink, Stored, Target, TargetOptions
from delta_sync.sinks.redis_calls import CALL_KEYS, Encoded, calls_of, encoded
from delta_sync.sinks.redis_documents import (
    VERSION_PLACE,
    NotStorable,
    from_hash,
    from_string,
    hash_args,
    is_written_so,
    json_args,
)
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
    tombstone_key,
)
from delta_sync.sinks.redis_link import Call, Link, LinkOptions, judge
from delta_sync.sinks.redis_scripts import ABOVE_ALL, FORGET, HASH, JSON, PROBE, RAISE_FLOOR, VALUES, ZERO
from delta_sync.spec import Duration
from delta_sync.tables import Table, key_of_parts
from delta_sync.values import Document

READ_KEYS = 100  # documents in one script's reply, which Lua holds in memory as a whole
FLOOR_SETTLES_S = 86_400  # no writer stands still for so long between reading the floor and writing


class RedisOptions(LinkOptions):
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
        self._link = Link(name, url, options, now)
        self._scripts = HASH if options.format == "hash" else JSON
        self._encode = hash_args if options.format == "hash" else json_args
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
            self._link.run(PROBE, [Call([key, tombstone_key(key)], []), Call([floor_key(nobody)] * 2, [])])
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
        some = encoded(_template(target), self._encode, writes)
        if not self._link.is_cluster:
            self._settle(some, self._link.run(self._scripts.write, self._calls(target, some, ZERO)))
            return some.outcomes
        self._settle(some, self._link.run(self._scripts.write, self._calls(target, some, self._floor(target))))
        floor = self._floor(target)
        late = [index for index, place in enumerate(some.places) if writes[place].version < int(floor)]
        # What is stale may have been written by a process that died right here, and is now repeated.
        self._remove([some.keys[index] for index in late], floor)
        for place in (some.places[index] for index in late):
            if some.outcomes[place] is APPLIED:
                some.outcomes[place] = STALE
        return some.outcomes

    def _calls(self, target: Target, some: Encoded, floor: bytes) -> list[Call]:
        """Return the calls that send writes. Pure. In a cluster, the floor is an argument."""
        place: _Place = target.settings
        keep = 0 < place.ttl_ms < self._tombstone_ms  # a document that lives longer keeps its version itself
        args = [b"%d" % self._tombstone_ms, b"%d" % place.ttl_ms, b"%d" % keep, floor]
        cluster = self._link.is_cluster
        return calls_of(some, [] if cluster else [floor_key(target.place)], args, each_alone=cluster)

    def _settle(self, some: Encoded, replies: Iterable[bytes]) -> None:
        """Enter what the scripts answered: a byte for each write that was sent."""
        codes = b"".join(replies)
        assert len(codes) == len(some.places), f"{len(codes)} outcomes for {len(some.places)} writes"
        if codes.count(b"a") == len(codes):
            return
        for place, code in zip(some.places, codes, strict=True):
            if code == ord("s"):
                some.outcomes[place] = STALE
            elif code == ord("w"):
                some.outcomes[place] = rejected(
                    f"the key holds another type than {'a hash' if self._scripts is HASH else 'a string'}; "
                    "delete it, or give the target other keys"
                )

    def _floor(self, target: Target) -> bytes:
        return self._link.ask("GET", floor_key(target.place)) or ZERO

    def truncate(self, target: Target, version: int) -> int:
        """Raise the floor, then scan and delete. In a cluster, do not move slots meanwhile: SCAN could miss keys."""
        text = b"%019d" % version
        call = Call([floor_key(target.place)], [text])
        if self._link.is_cluster:
            call = Call([*call.keys, raised_key(target.place)], [text, b"%d" % self._wall_clock()])
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
            self._link.run(FORGET, [Call([raised_key(target.place)], [raised])])  # unless it is raised again by now
        return removed

    def _remove(self, keys: Sequence[bytes], below: bytes) -> int:
        return sum(self._link.run(self._scripts.remove, self._calls_for(keys, [below])))

    def _calls_for(self, keys: Sequence[bytes], args: list[bytes], size: int = CALL_KEYS) -> list[Call]:
        step = 1 if self._link.is_cluster else size
        return [Call(list(keys[start : start + step]), args) for start in range(0, len(keys), step)]

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
        decode = from_hash if self._scripts is HASH else from_string
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
            if content and document is not None and is_written_so(content, document):
                found.append(int(content[VERSION_PLACE]))
            else:
                stored = from_string(content) if content else None
                found.append(stored or (Stored(int(tombstone), None) if tombstone else None))
        return found

    def _contents(self, target: Target, keys: Sequence[Key]) -> Iterator[tuple[Any, bytes | None]]:
        """Yield what is stored for each key, and its tombstone."""
        names = [_template(target).render(key).encode() for key in keys]
        step = 1 if self._link.is_cluster else READ_KEYS
        calls = [
            Call([name for key in names[start : start + step] for name in (key, tombstone_key(key))], [])
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
        except NotStorable as error:
            raise Unstorable(f"{error}.") from error
        if self._scripts is JSON:
            stored = from_string(args[0])
        else:
            stored = from_hash([VERSION_FIELD.encode(), args[0], *args[2:]])
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
        calls = [Call([name, tombstone_key(name)], [version]) for name, version in names]
        self._link.run(self._scripts.discard, calls)

    def close(self) -> None:
        """Close the connections."""
        self._link.close()


def _template(target: Target) -> KeyTemplate:
    place: _Place = target.settings
    return place.template
