"""Verification as it runs: the source in chunks, the processor, the sinks; what differs is looked at until it is sure.

`verifying.py` decides what a difference is worth, `repairing.py` mends it. Everything here may be repeated or killed at
any time: only a repair writes anything, and what it writes has versions.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

from delta_sync.applied_log import AppliedLog, State
from delta_sync.changes import Change, Key
from delta_sync.dumps import Dump
from delta_sync.errors import Transient, Unstorable
from delta_sync.logs import logger
from delta_sync.lookups import LookupCaller
from delta_sync.pipeline import Pipeline, TableProcessor
from delta_sync.processing import process
from delta_sync.sinks import AnySink
from delta_sync.sinks.base import Stored, Target
from delta_sync.sources.reader import Chunk, SourceReader
from delta_sync.spec import LoadSpec
from delta_sync.tables import Table, key_text, keys_alone
from delta_sync.values import Document, Row
from delta_sync.verifying import (
    ABSENT,
    Buckets,
    Expected,
    Finding,
    IdSums,
    Sighting,
    Tally,
    Verdict,
    compare,
    differing,
    in_batches,
    judge,
    outlawed,
)
from delta_sync.versions import version_of

log = logger(__name__)

SUSPECTS_MOST = 20_000  # keys that look different, some MB; then these come first, before more of the table is read
PAUSES_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # between looks at a key that changes: most rest within a second
RETRY_S = 1.0  # after source, sink or state store did not answer
CANDIDATES = 1000  # ids that the source is asked for at once
SAMPLED_CHUNKS = 20  # so many chunks make a sample of a table, so that it is not of one place in it

REACHED_S = 60.0  # between notes of how far it is: each waits until all suspects are settled, a second or two
CLAIM_POLL_S = 0.05  # a transaction usually ends within milliseconds

T = TypeVar("T")


class Stopped(Exception):
    """Somebody asked for the end."""


class Unverified(NamedTuple):
    """A key of which nothing can be said, and why. `sink` is None when that is so for all."""

    table: str
    sink: str | None
    key: str
    why: str


class Damage(NamedTuple):
    """What is to be mended: a key, and the version that the sink has; `outlawed`: no write could ever beat it."""

    key: Key
    sink: str
    version: int | None
    outlawed: bool


class Subject(NamedTuple):
    """A table that is verified, and where its documents are."""

    table: Table
    targets: Mapping[str, Target]
    covered_from: int


class Listener(Protocol):
    """Whom a verification tells what it finds. Called by its own thread."""

    def begin(self, table: str, estimate: int | None) -> None: ...
    def looked(self, table: str, tally: Tally) -> None: ...
    def found(self, finding: Finding) -> None: ...
    def unverified(self, one: Unverified) -> None: ...
    def waits(self, reason: str | None) -> None: ...


class Repair(Protocol):
    """Mends what differs. Nothing is to be written that could make a sink older."""

    def __call__(self, subject: Subject, damages: Sequence[Damage]) -> None: ...


class Made(NamedTuple):
    """What is made of rows for some sinks: the document of each row, and of the rows whose processing fails, why."""

    sinks: Sequence[str]
    documents: Sequence[tuple[Key, Document | None]]
    failed: Sequence[tuple[Key, str]]


class Makers:
    """Makes documents of rows: the pipeline's processors and look-ups. `skipped` look-ups are not asked: None."""

    def __init__(self, pipeline: Pipeline, lookups: Mapping[str, LookupCaller], skipped: frozenset[str]) -> None:
        self._pipeline = pipeline
        self._skipped = skipped
        self._lookups = lookups

    def documents(self, table: Table, rows: Iterable[tuple[Key, Row]], sinks: Iterable[str]) -> list[Made]:
        """Return what is made of rows for these sinks. Raises LookupBusy."""
        changes = [Change(table.id, key, 1, row) for key, row in rows]
        found: list[Made] = []
        for processor, some in self._pipeline.made_by(table.id, sinks):
            made = process(table, _without(processor, self._skipped), changes, self._lookups)
            failed = [(failure.change.key, failure.error) for failure in made.failures]
            found.append(Made(some, [(write.key, write.document) for write in made.writes], failed))
        return found


def _without(processor: TableProcessor, skipped: frozenset[str]) -> TableProcessor:
    left_out = skipped & processor.enrich.keys()
    if not left_out:
        return processor
    function = functools.partial(processor.function, **dict.fromkeys(left_out))
    enrich = {name: one for name, one in processor.enrich.items() if name not in left_out}
    return processor._replace(function=function, enrich=enrich)


class ReadRows(NamedTuple):
    """Rows that were read by key (None: it is gone), with their claim, 0 where there is none; and how they came."""

    rows: dict[Key, Row | None]
    claim: int
    chunk: Chunk

    @property
    def above(self) -> int:
        """A position above those of which versions are made that this reading surely has, in the table's own scale."""
        return self.claim if self.chunk.clock is None else self.chunk.clock + 1


class KeyReader:
    """Reads rows by key, for as long as it takes to read all of them, each part with what it may claim."""

    def __init__(self, reader: SourceReader, stopping: threading.Event) -> None:
        self._reader = reader
        self._samples = reader.new_samples()
        self._stopping = stopping

    def sample(self) -> int:
        """Take a sample for claims; return how far the log was."""
        sample = self._reader.sample()
        self._samples.add(sample)
        return sample.position

    def parts(self, table: Table, keys: Collection[Key], at_least: int = 0) -> Iterator[ReadRows]:
        """Yield rows in parts that memory has room for.

        With `at_least` a part's claim is no lower: it waits for transactions, for as long as they take.
        """
        left = dict.fromkeys(keys)
        while left:
            claim = 0

            def usable(snapshot: Any) -> bool:
                nonlocal claim
                claim = self._samples.claim(snapshot, at_least) or 0
                return claim >= at_least

            chunk = self._reader.read_keys(table, list(left), usable)
            if chunk is None:
                if self._stopping.wait(CLAIM_POLL_S):
                    raise Stopped
                self.sample()
                continue
            rows: dict[Key, Row | None] = dict(chunk.rows)
            if chunk.last_key is None:  # what is not there is gone; else it may have been left out
                rows = {key: rows.get(key) for key in left}
            for key in rows:
                left.pop(key, None)
            yield ReadRows(rows, claim, chunk)


class Verifier:
    """Verifies tables, one after the other. `reader` reads chunks in a thread of its own, `keys` rows by their keys."""

    def __init__(
        self,
        *,
        epoch: int,
        reader: SourceReader,
        keys: KeyReader,
        makers: Makers,
        sinks: Mapping[str, AnySink],
        applied: AppliedLog,
        failed_keys: Callable[[str, Sequence[str]], set[tuple[str, str | None]]],
        check_epoch: Callable[[], None],
        left_to: Callable[[Table], Sequence[Dump]],
        listener: Listener,
        options: LoadSpec,
        skipped: frozenset[str] = frozenset(),
        share: float = 1.0,
        repair: Repair | None = None,
        patience_s: float = 60.0,
        pace: Callable[[float], None] = lambda _busy_s: None,
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        threads: Callable[[int], Executor] = lambda most: ThreadPoolExecutor(most, thread_name_prefix="verify"),
    ) -> None:
        """`failed_keys` says which keys (as text) have a dead letter, and of which sink (None: of all).

        `share` is of the rows that are read. `pace` is called after each chunk, with the seconds that the source was
        busy with it. `check_epoch` raises EpochRose. `left_to` returns the dumps that are still to bring changes which
        the log has come past, and raises CheckFailed when the table is loaded anew, which may bring such, too.
        `patience_s` is how long a key may keep changing, and how long such a dump may stand still.
        """
        self._epoch = epoch
        self._reader = reader
        self._keys = keys
        self._makers = makers
        self._sinks = sinks
        self._applied = applied
        self._failed_keys = failed_keys
        self._check_epoch = check_epoch
        self._left_to = left_to
        self._listener = listener
        self._options = options
        self._skipped = skipped
        self._share = share
        self._repair = repair
        self._patience_s = patience_s
        self._pace = pace
        self._stopping = stopping
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 -- which rows are looked at is no secret
        self._threads = threads
        self.log_rests = False  # whether a difference was judged without the log having come past

    def verify(
        self, subject: Subject, after: Key | None = None, reached: Callable[[Key, Tally], None] | None = None
    ) -> Tally:
        """Verify one table in all of its targets. Raises EpochRose, SinkRefused, and Transient after some patience.

        With `after` the rows up to that key have been verified before, and only their ids are read. `reached` is called
        every so often with a key up to which nothing is left to be looked at again.
        """
        work = _Work(subject, {name: IdSums() for name in subject.targets})
        table = subject.table
        self._listener.begin(table.id, self.patiently(lambda: self._reader.estimated_rows(table)))
        with self._threads(1 + len(subject.targets)) as pool:
            if after is not None:
                self._note_ids(work, after)
            due = self._clock() + REACHED_S
            for rows, seen_to in self._chunks(table, pool, after):
                self._look(work, rows, seen_to, pool)
                self._listener.looked(table.id, work.tally)
                is_due = reached is not None and bool(rows) and self._clock() >= due
                if is_due or len(work.suspects) >= SUSPECTS_MOST:
                    self._settle(work)
                if is_due and reached is not None:
                    reached(rows[-1][0], work.tally)
                    due = self._clock() + REACHED_S
            for name in subject.targets:
                self._find_extra(work, name)
            self._settle(work)
        self._check_epoch()
        self._listener.looked(table.id, work.tally)
        return work.tally

    # ── the source's rows ────────────────────────────────────────────────────────────────────────────────────────

    def _note_ids(self, work: _Work, to: Key) -> None:
        """Note the ids of the rows up to a key, which are not compared: what has other ids has none of these rows."""
        narrow, options = keys_alone(work.subject.table), self._options

        def read(start: Key | None) -> Chunk | None:
            return self._reader.read_chunk(
                narrow, start, options.chunk_rows, options.chunk_bytes, lambda _: True, to=to
            )

        after: Key | None = None
        while after != to:
            began = self._clock()
            chunk = self.patiently(functools.partial(read, after))
            assert chunk is not None, "every snapshot will do"
            for name, target in work.subject.targets.items():
                work.ids[name].add(self._sinks[name].id_of(target, key) for key, _ in chunk.rows)
            if chunk.last_key is None:
                return
            after = chunk.last_key
            self._pace(self._clock() - began)
            if self._stopping.is_set():
                raise Stopped

    def _chunks(self, table: Table, pool: Executor, start: Key | None) -> Iterator[tuple[list[tuple[Key, Row]], int]]:
        """Yield the table's rows, or a sample of them; the next ones are read while the last are compared."""
        rows_most = self._rows_at_once(table)
        after = self._skip(table, None, rows_most, first=True) if start is None else start
        if after is _END:
            return
        upcoming = self._begin(table, after, rows_most, pool)
        while True:
            chunk, busy_s = upcoming.result()
            after = chunk.last_key
            if after is not None:
                after = self._skip(table, after, rows_most)
            ended = after is None or after is _END
            self._pace(busy_s)
            if self._stopping.is_set():
                raise Stopped
            if not ended:
                upcoming = self._begin(table, after, rows_most, pool)
            yield chunk.rows, chunk.seen_to
            if ended:
                return

    def _begin(self, table: Table, after: Any, rows_most: int, pool: Executor) -> Future[tuple[Chunk, float]]:
        def read() -> tuple[Chunk, float]:
            began = self._clock()
            bytes_most = self._options.chunk_bytes
            chunk = self.patiently(lambda: self._reader.read_chunk(table, after, rows_most, bytes_most, lambda _: True))
            assert chunk is not None, "every snapshot will do"
            return chunk, self._clock() - began

        return pool.submit(read)

    def _rows_at_once(self, table: Table) -> int:
        if self._share >= 1:
            return self._options.chunk_rows
        estimate = self.patiently(lambda: self._reader.estimated_rows(table)) or 0
        return max(10, min(self._options.chunk_rows, int(estimate * self._share / SAMPLED_CHUNKS)))

    def _skip(self, table: Table, after: Key | None, rows_most: int, *, first: bool = False) -> Any:
        """Return the key behind which to go on, so that a share of the rows is read; _END when there is nothing."""
        if self._share >= 1:
            return after
        mean = rows_most * (1 / self._share - 1)
        rows = self._rng.randrange(int(mean * (1 if first else 2)) + 1)
        if rows == 0:
            return after
        found = self.patiently(lambda: self._reader.key_behind(table, after, rows))
        return _END if found is None else found

    # ── the first look ───────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, work: _Work, rows: Sequence[tuple[Key, Row]], seen_to: int, pool: Executor) -> None:
        """Compare a chunk; what looks different is suspect. No claim is needed for what is equal."""
        targets = work.subject.targets
        made = self._makers.documents(work.subject.table, rows, targets)
        beyond = version_of(self._epoch, seen_to)
        looks = {
            name: pool.submit(self._compare, work.subject, name, documents, failed, work.ids[name], beyond)
            for names, documents, failed in made
            for name in names
        }
        for name, look in looks.items():
            for key, sighting in look.result():
                work.suspects.setdefault(key, {})[name] = sighting
        work.tally.rows += len(rows)
        work.tally.documents += len(rows) * len(work.subject.targets)
        for names, _, failed in made:
            whole = len(names) == len(targets)
            for one in ([None] if whole else names) if failed else ():
                self._note_failed(work, one, failed)

    def _compare(
        self,
        subject: Subject,
        name: str,
        made: Sequence[tuple[Key, Document | None]],
        failed: Sequence[tuple[Key, str]],
        ids: IdSums,
        beyond: int,
    ) -> list[tuple[Key, Sighting]]:
        sink, target = self._sinks[name], subject.targets[name]
        keys, documents = [key for key, _ in made], [document for _, document in made]
        found = self.patiently(lambda: sink.read_beside(target, keys, documents))
        ids.add(sink.id_of(target, key) for key, document in made if document is not None)
        ids.add(sink.id_of(target, key) for key, _ in failed)
        suspects: list[tuple[Key, Sighting]] = []
        for (key, document), seen in zip(made, found, strict=True):
            if isinstance(seen, int) and 0 < seen < beyond:
                continue
            expected = _expected(sink, target, document)
            stored = Stored(seen, expected.document) if isinstance(seen, int) else seen
            if compare(expected, stored, beyond, self._skipped) != "equal":
                suspects.append((key, Sighting.of(stored)))
        return suspects

    # ── ids that only the sink has ───────────────────────────────────────────────────────────────────────────────

    def _find_extra(self, work: _Work, name: str) -> None:
        """Find documents without a row. The source is asked only about ids whose bucket differs, or a sample of ids."""
        sink, target = self._sinks[name], work.subject.targets[name]

        def scanned() -> IdSums:
            there = IdSums()
            for batch in sink.scan_ids(target):
                there.add(batch)
            return there

        everything = self._share >= 1
        buckets = work.ids[name].differing(self.patiently(scanned)) if everything else Buckets.share(self._share)
        foreign: set[str] = set()

        def ask() -> None:
            candidates = (one for batch in sink.scan(target) for one in batch if one[0] in buckets)
            for some in in_batches(candidates, CANDIDATES):
                self._suspect_extra(work, name, dict(some), foreign)
                if len(work.suspects) >= SUSPECTS_MOST:
                    self._settle(work)

        if buckets.numbers:
            self.patiently(ask)

    def _suspect_extra(self, work: _Work, name: str, versions: Mapping[str, int], foreign: set[str]) -> None:
        """Suspect those of these ids that the source has no row for; `foreign` are those that no key has."""
        sink, target = self._sinks[name], work.subject.targets[name]
        keys: dict[str, Key] = {}
        for id_, version in versions.items():
            key = sink.key_of(target, id_)
            if key is None and id_ not in foreign:
                foreign.add(id_)
                note = "no key of the table has this id, so somebody else wrote it; a repair leaves it"
                self._report(work, Finding(work.subject.table.id, name, id_, "extra", None, None, version, note))
            elif key is not None:
                keys[id_] = key
        narrow = keys_alone(work.subject.table)
        there = {
            sink.id_of(target, key)
            for rows, *_ in self._keys.parts(narrow, list(keys.values()))
            for key, row in rows.items()
            if row is not None
        }
        absent = [key for id_, key in keys.items() if id_ not in there]
        for key, stored in zip(absent, self.patiently(lambda: sink.read(target, absent)), strict=True):
            if stored is not None and stored.document is not None:
                work.suspects.setdefault(key, {})[name] = Sighting.of(stored)

    # ── until it is sure ─────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, work: _Work) -> None:
        """Look at suspects until each is equal, or different for certain, or has kept changing for too long."""
        work.deadline = self._clock() + self._patience_s
        turn = 0
        mended: set[tuple[Key, str]] = set()
        while work.suspects:
            if self._stopping.wait(PAUSES_S[min(turn, len(PAUSES_S) - 1)]):
                raise Stopped
            damages = self.patiently(lambda: self._round(work, mended))
            if damages and self._repair is not None:
                self._check_epoch()
                repair = self._repair
                self.patiently(lambda: repair(work.subject, damages))  # noqa: B023 -- called at once
                for damage in damages:
                    mended.add((damage.key, damage.sink))
                    work.suspects.setdefault(damage.key, {})[damage.sink] = _UNSEEN
                work.deadline = self._clock() + self._patience_s
            self._listener.looked(work.subject.table.id, work.tally)
            if self._clock() > work.deadline:
                break
            turn += 1
        for key, names in work.suspects.items():
            for name in names:
                work.tally.unsettled += 1
                why = "it changed at every look, or the log, or a dump to which it was left, did not come past"
                self._listener.unverified(Unverified(work.subject.table.id, name, key_text(key), why))
        work.suspects.clear()

    def _round(self, work: _Work, mended: Collection[tuple[Key, str]]) -> list[Damage]:
        """Look at every suspect once more; return those that are to be mended."""
        subject, table = work.subject, work.subject.table
        self._keys.sample()
        before: dict[tuple[Key, str], bytes] = {}
        claims: dict[Key, int] = {}
        parts: list[list[Key]] = []
        for some in in_batches(list(work.suspects), self._options.chunk_rows):
            for read in self._keys.parts(table, some):
                parts.append(list(read.rows))
                claims |= dict.fromkeys(read.rows, read.above)
                for key, name, expected in self._expectations(work, read.rows):
                    before[key, name] = expected.digest
        state = self._pass(work)
        damages: list[Damage] = []
        for keys in parts:
            sightings = self._read_sinks(work, keys)
            end = self._keys.sample()
            beyond = version_of(self._epoch, end if not table.is_document else self._reader.clock() + 1)
            for rows, *_ in self._keys.parts(table, keys):
                judged: list[tuple[Key, str, Verdict, Expected, Stored | None]] = []
                for key, name, expected in self._expectations(work, rows):
                    stored = sightings[name][key]
                    verdict = judge(
                        before[key, name],
                        expected,
                        stored,
                        work.suspects[key][name],
                        passed=state != "stands",
                        claimed=version_of(self._epoch, claims[key]),
                        beyond=beyond,
                        expires=self._sinks[name].expires(subject.targets[name]),
                        skipped=self._skipped,
                    )
                    judged.append((key, name, verdict, expected, stored))
                damages += self._take(work, judged, beyond, mended, rests=state == "rests")
        return damages

    def _pass(self, work: _Work) -> State:
        """Wait until everything that is visible now is in every sink, also what the log left to dumps.

        Of a pipeline that does not run neither comes. A dump may take long; `stands`: nothing came of it for too long.
        """
        state = self._applied.pass_now()
        self._listener.waits("the pipeline runs, but its log does not advance" if state == "stands" else None)
        if state != "passed":
            return state
        # Only now: what the log has come past was left to a dump before that, and what a dump brings is in the sinks
        # before it ends. Those that are added from here on are for what comes later.
        left_to = seen = self._left_to(work.subject.table)
        if not left_to:
            return state
        moved_at = self._clock()
        while left_to:
            if self._clock() - moved_at > self._patience_s:
                return "stands"
            named = ", ".join(f"{dump.id} ({dump.state})" for dump in left_to)
            self._listener.waits(f"documents were left to dumps that have not ended: {named}")
            if self._stopping.wait(RETRY_S):
                raise Stopped
            ids = {dump.id for dump in left_to}
            left_to = [dump for dump in self._left_to(work.subject.table) if dump.id in ids]
            if left_to != seen:
                seen, moved_at = left_to, self._clock()
        self._listener.waits(None)
        work.deadline = self._clock() + self._patience_s
        return state

    def _take(
        self,
        work: _Work,
        judged: Sequence[tuple[Key, str, Verdict, Expected, Stored | None]],
        beyond: int,
        mended: Collection[tuple[Key, str]],
        *,
        rests: bool,
    ) -> list[Damage]:
        """Note what was judged; return what is to be mended."""
        table, tally = work.subject.table, work.tally
        wrong = [key_text(key) for key, _, verdict, _, _ in judged if verdict not in ("equal", "again", "expired")]
        dead = self.patiently(lambda: self._failed_keys(table.id, wrong)) if wrong else set[tuple[str, str | None]]()
        if any(outlawed(stored, beyond) for *_, stored in judged):
            self._check_epoch()  # what a newer one writes lies beyond everything of this one
        damages: list[Damage] = []
        for key, name, verdict, expected, stored in judged:
            if verdict == "again":
                work.suspects[key][name] = Sighting.of(stored)
                continue
            names = work.suspects[key]
            del names[name]
            if not names:
                del work.suspects[key]
            again = (key, name) in mended
            text = key_text(key)
            if verdict == "equal":
                tally.repaired += again
            elif verdict == "expired":
                tally.expired += 1
            elif (text, name) in dead or (text, None) in dead:
                tally.dead += 1
            elif verdict == "failed":
                tally.failed += 1
                self._listener.unverified(Unverified(table.id, name, text, expected.failed or ""))
            elif again:
                why = "it was repaired, and differs all the same: is there a truncate's version above the log's end?"
                self._listener.unverified(Unverified(table.id, name, text, why))
            else:
                self.log_rests = self.log_rests or rests
                document, version = (None, None) if stored is None else (stored.document, stored.version)
                bad = outlawed(stored, beyond)
                note = _note(expected.document, document, bad, version, self._skipped)
                self._report(work, Finding(table.id, name, text, verdict, expected.document, document, version, note))
                damages.append(Damage(key, name, version, bad))
        return damages

    def _expectations(self, work: _Work, rows: Mapping[Key, Row | None]) -> Iterator[tuple[Key, str, Expected]]:
        """Yield what the sinks in question should hold for suspects, of which these are the rows."""
        subject = work.subject
        present = [(key, row) for key, row in rows.items() if row is not None]
        for names, made, failed in self._makers.documents(subject.table, present, subject.targets):
            documents, errors = dict(made), dict(failed)
            for key in rows:
                for name in names:
                    if name not in work.suspects.get(key, ()):
                        continue
                    if key in errors:
                        yield key, name, Expected(None, errors[key])
                    else:
                        yield key, name, _expected(self._sinks[name], subject.targets[name], documents.get(key))

    def _read_sinks(self, work: _Work, keys: Sequence[Key]) -> dict[str, dict[Key, Stored | None]]:
        found: dict[str, dict[Key, Stored | None]] = {}
        for name, target in work.subject.targets.items():
            wanted = [key for key in keys if name in work.suspects.get(key, ())]
            if wanted:
                found[name] = dict(zip(wanted, self._sinks[name].read(target, wanted), strict=True))
        return found

    def _note_failed(self, work: _Work, sink: str | None, failed: Sequence[tuple[Key, str]]) -> None:
        """Note rows whose processing fails now: those with a dead letter are known already."""
        table = work.subject.table.id
        texts = [key_text(key) for key, _ in failed]
        dead = {text for text, _ in self.patiently(lambda: self._failed_keys(table, texts))}
        for text, (_, error) in zip(texts, failed, strict=True):
            if text in dead:
                work.tally.dead += 1
            else:
                work.tally.failed += 1
                self._listener.unverified(Unverified(table, sink, text, error))

    def _report(self, work: _Work, finding: Finding) -> None:
        work.tally.found[finding.kind] += 1
        self._listener.found(finding)

    def patiently(self, call: Callable[[], T]) -> T:
        """Repeat a call that something transient keeps from succeeding, for a while; then raise it."""
        deadline = self._clock() + self._patience_s
        waited = False
        while True:
            try:
                found = call()
            except Transient as error:
                if self._clock() > deadline:
                    raise
                waited = True
                self._listener.waits(str(error))
                if self._stopping.wait(error.retry_after_s or RETRY_S):
                    raise Stopped from error
            else:
                if waited:
                    self._listener.waits(None)
                return found


class _Work:
    """What is known so far of the table that is being verified."""

    def __init__(self, subject: Subject, ids: dict[str, IdSums]) -> None:
        self.subject = subject
        self.ids = ids
        self.tally = Tally()
        self.suspects: dict[Key, dict[str, Sighting]] = {}  # by key and sink, with what was seen there last
        self.deadline = 0.0  # until then they are looked at


_END: Any = object()  # in place of a key: there are no rows behind
_UNSEEN = Sighting(-2, b"")  # what no sink holds: so two looks are needed


def _expected(sink: AnySink, target: Target, document: Document | None) -> Expected:
    if document is None:
        return ABSENT
    try:
        return Expected(sink.stored_form(target, document))
    except Unstorable as error:
        return Expected(None, str(error))


def _note(
    expected: dict[str, Any] | None,
    stored: dict[str, Any] | None,
    bad: bool,
    version: int | None,
    skipped: frozenset[str],
) -> str:
    parts: list[str] = []
    if expected is not None and stored is not None:
        names = differing(expected, stored, skipped)
        if names:
            parts.append("in " + ", ".join(names))
    if bad:
        parts.append("its version was taken away" if not version else "its version lies beyond the end of the log")
    return "; ".join(parts)
