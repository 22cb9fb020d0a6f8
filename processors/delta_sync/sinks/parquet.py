"""The Parquet sink: files of rows with versions, on a local disk or an object store; the newest of each key is true.

A target is a folder. A batch becomes one file in `changes/day=YYYY-MM-DD/`, in one step that nothing can see half
done. Nothing is compared when it is written: whoever reads takes, for each `_delta_id`, the row with the highest
`_version` (of equal ones the highest `_delta_written_ns`), and leaves it out if its `_delta_deleted` is true or the
version is below the floor. So writes commute, whatever their order, however often, from however many processes.

`sweep` compacts: it merges all files into one for each bucket of keys (`bucket=3of16/`), and removes the merged ones
after that. A process that dies in between leaves rows twice, which changes nothing. With `keep: history` it does not,
and every version that was ever written stays.

A field's type is that of its first value, of all processes: `fields/<name>` is created by one of them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import functools
import io
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast
from urllib.parse import quote, unquote

from pydantic import Field

from delta_sync.changes import APPLIED, Key, Outcome, Write, rejected
from delta_sync.errors import DeltaError, Problem, SinkBusy, Unstorable, UsageError
from delta_sync.sinks.base import VERSION_FIELD, Options, Sink, Stored, Target, TargetOptions
from delta_sync.sinks.columns import (
    ID_COLUMN,
    Kind,
    checked_text,
    fields_of,
    fitted,
    name_conflict,
    number,
    numbers,
    plain,
    wider,
)
from delta_sync.sinks.parquet_files import FileSystem, Library
from delta_sync.tables import Table, key_text
from delta_sync.urls import parts_of
from delta_sync.values import Document, decimal_text, from_json, to_json

pa: Any = Library("pyarrow")
pc: Any = Library("pyarrow.compute")
pq: Any = Library("pyarrow.parquet")

DELETED_COLUMN = "_delta_deleted"
WRITTEN_COLUMN = "_delta_written_ns"
OWN_COLUMNS = (ID_COLUMN, VERSION_FIELD, DELETED_COLUMN, WRITTEN_COLUMN)
CHANGES, BUCKETS, FIELDS, FLOORS = "changes", "bucket=", "fields", "floors"

SCAN_BATCH = 5000  # ids and versions are some 60 bytes each
READ_ATTEMPTS = 10  # at a listing whose files a compaction removes meanwhile: each is a new one, seconds later
COMPACT_FILES = 8  # fewer files of changes than that are not worth writing every bucket again


@functools.cache
def _types() -> Mapping[Kind, Any]:
    return {
        "boolean": pa.bool_(),
        "integer": pa.int64(),
        "float": pa.float64(),
        "decimal": pa.string(),  # Parquet's decimals have one scale for all
        "text": pa.string(),
        "bytes": pa.binary(),
        "date": pa.date32(),
        "time": pa.time64("us"),
        "timestamp": pa.timestamp("us"),
        "timestamptz": pa.timestamp("us", "UTC"),
        "uuid": pa.string(),
        "json": pa.string(),
    }


@functools.cache
def _own_fields() -> Sequence[Any]:
    types = (pa.string(), pa.int64(), pa.bool_(), pa.int64())
    return [pa.field(name, type_, nullable=False) for name, type_ in zip(OWN_COLUMNS, types, strict=True)]


class ParquetOptions(Options):
    """What a Parquet sink may say beside its URL."""

    keep: Literal["latest", "history"] = Field(
        default="latest", description="latest: files are merged, the newest row of each key stays; history: all stay."
    )
    buckets: int = Field(
        default=16, ge=1, le=4096, description="Files of merged rows; one at a time is in memory when they are merged."
    )
    storage: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of fsspec's file system, such as {endpoint_url: …}; secrets are references, or left to "
        "its environment variables and roles.",
    )


class ParquetTargetOptions(TargetOptions):
    """What one table may say about its place in a Parquet sink."""

    folder: str | None = Field(default=None, min_length=1, description="The folder; default: schema.table.")
    columns: dict[str, Kind] = Field(
        default_factory=dict, description="Types of fields, where the first value must not decide."
    )


class Place(NamedTuple):
    """Where a target's files are, and the fields whose types the user chose."""

    folder: str
    columns: Mapping[str, Kind]


class ParquetSink(Sink[ParquetOptions, ParquetTargetOptions]):
    """`parquet+file:///folder`, `parquet+s3://bucket/prefix`, …; see the module's text for what is stored."""

    schemes: ClassVar[tuple[str, ...]] = tuple(f"parquet+{one}" for one in ("file", "s3", "gs", "abfs", "memory"))
    options_model: ClassVar[type[Options]] = ParquetOptions
    target_model: ClassVar[type[TargetOptions]] = ParquetTargetOptions

    def __init__(
        self,
        name: str,
        url: str,
        options: ParquetOptions,
        tombstone_ttl_s: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Raise UsageError when the URL names no folder. `now` is in seconds since 1970."""
        super().__init__(name, url, options, tombstone_ttl_s)
        self._now = now
        parts = parts_of(url)
        root = f"{parts.netloc}{unquote(parts.path)}".rstrip("/")
        if not root:
            raise UsageError(f"sink {name}: the URL must name a folder, such as parquet+s3://bucket/prefix.")
        _ = pq.read_table  # or say now what is not installed
        try:
            self._fs = FileSystem(parts.scheme.removeprefix("parquet+"), root, options.storage)
        except UsageError as error:
            raise UsageError(f"sink {name}: {error}") from error
        self._counting = threading.Lock()
        self._kinds: dict[str, dict[str, Kind]] = {}
        self._last_ns = 0

    # ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────

    def target(self, table: Table, options: ParquetTargetOptions) -> Target:
        folder = (options.folder or table.id).strip("/")
        if not folder or ".." in folder.split("/"):
            raise UsageError(f"sink {self.name}: {options.folder!r} is no folder within {self._fs.root}; set `folder`.")
        if any(one in f"{self._fs.root}/{folder}" for one in "*?["):  # a file system may take it for a pattern, in `rm`
            raise UsageError(
                f"sink {self.name}: no folder may have * ? or [ in its name, as {folder} has; set `folder`."
            )
        for column in options.columns:
            if (reason := name_conflict(column)) is not None:
                raise UsageError(f"sink {self.name}: columns: {reason}.")
        return Target(table, folder, Place(f"{self._fs.root}/{folder}", dict(options.columns)))

    def check(self, targets: Sequence[Target]) -> list[Problem]:
        where = f"sink {self.name}"
        if self._fs.protocol == "file" and not Path(self._fs.root).parent.is_dir():
            return [Problem(where, f"there is no folder {Path(self._fs.root).parent}", "create it, or correct the URL")]
        try:
            with self._fs.typed_errors():
                for target in targets:
                    self._files(target)
        except DeltaError as error:
            return [Problem(where, str(error), "check its address and who may read and write there")]
        return []

    def prepare(self, target: Target) -> None:
        """Do nothing: a folder comes into being with its first file."""

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, target: Target, writes: Sequence[Write]) -> list[Outcome]:
        """Write one file of them all. A write that is too old counts as applied, and is never what is read."""
        place: Place = target.settings
        outcomes: dict[int, Outcome] = {}
        found: list[tuple[int, Write, str, dict[str, tuple[Kind, Any]]]] = []
        wanted: dict[str, Kind] = {}
        for index, write in enumerate(writes):
            try:
                found.append(
                    (index, write, checked_text(key_text(write.key), True), fields_of(write.document or {}, True))
                )
            except Unstorable as error:
                outcomes[index] = rejected(str(error).rstrip("."))
                continue
            for name, (kind, _) in found[-1][3].items():
                wanted[name] = wider(wanted.get(name, kind), kind)
        wanted |= {name: kind for name, kind in place.columns.items() if name in wanted}
        with self._fs.typed_errors():
            kinds = self._kinds_for(target, wanted)
            written_ns = self._written_ns()
            rows: list[dict[str, Any]] = []
            for index, write, id_, fields in found:
                row: dict[str, Any] = {
                    ID_COLUMN: id_,
                    VERSION_FIELD: write.version,
                    DELETED_COLUMN: write.document is None,
                    WRITTEN_COLUMN: written_ns,
                }
                try:
                    for name, (kind, value) in fields.items():
                        row[name] = _raw(*fitted(target.place, name, kinds[name], kind, value))
                except Unstorable as error:
                    outcomes[index] = rejected(str(error).rstrip("."))
                else:
                    rows.append(row)
            if rows:
                used: dict[str, Kind] = {name: kinds[name] for name in wanted}
                schema = pa.schema([*_own_fields(), *(pa.field(name, _types()[kind]) for name, kind in used.items())])
                day = dt.datetime.fromtimestamp(written_ns / 1e9, dt.UTC).date().isoformat()
                self._write(f"{place.folder}/{CHANGES}/day={day}", pa.Table.from_pylist(rows, schema=schema))
        return [outcomes.get(index, APPLIED) for index in range(len(writes))]

    def _kinds_for(self, target: Target, wanted: Mapping[str, Kind]) -> dict[str, Kind]:
        """Return each field's type. A new one is created by the process that comes first; the others take over its."""
        place: Place = target.settings
        known = self._kinds.setdefault(target.place, {})
        for name in [name for name in wanted if name not in known]:
            path = f"{place.folder}/{FIELDS}/{quote(name, safe='')}"
            try:
                found = self._fs.read(path)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    self._fs.create(path, wanted[name].encode())
                found = self._fs.read(path)
            known[name] = cast("Kind", found.decode())
        return known

    def _written_ns(self) -> int:
        """Return the time, later than this process has seen it: of equal versions the last one wins."""
        with self._counting:
            self._last_ns = max(self._last_ns + 1, round(self._now() * 1e9))
            return self._last_ns

    def truncate(self, target: Target, version: int) -> int:
        """Record the floor; count what it hides. It is gone from the files when they are merged next."""
        place: Place = target.settings
        with self._fs.typed_errors():
            below = sum(old < version for batch in self._documents(target) for _, old in batch)
            path = f"{place.folder}/{FLOORS}/{version}"
            with contextlib.suppress(FileExistsError):
                self._fs.create(path, b"")
        return below

    def sweep(self, target: Target, recent_s: float | None = None) -> int:
        """Merge the files, unless all versions are kept. Return how many tombstones have expired."""
        if self.options.keep == "history":
            return 0
        place: Place = target.settings
        with self._fs.typed_errors(), contextlib.suppress(FileNotFoundError):  # another process is about it, too
            files = self._files(target)
            if len([path for path in files if f"/{CHANGES}/" in path]) < (1 if recent_s is None else COMPACT_FILES):
                return 0
            expired_ns = round((self._now() - self.tombstone_ttl_s) * 1e9)
            floor, gone = self._floor(target), 0
            for bucket in range(self.options.buckets):
                rows = self._latest(files, bucket)
                keep = pc.if_else(
                    rows[DELETED_COLUMN],
                    pc.greater_equal(rows[WRITTEN_COLUMN], expired_ns),
                    pc.greater_equal(rows[VERSION_FIELD], floor),
                )
                kept = rows.filter(keep)
                gone += pc.sum(rows[DELETED_COLUMN]).as_py() or 0
                gone -= pc.sum(kept[DELETED_COLUMN]).as_py() or 0
                if len(kept):
                    self._write(f"{place.folder}/{BUCKETS}{bucket}of{self.options.buckets}", kept)
            self._fs.remove(files)
            return gone
        return 0

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        """Write the files again that hold them, without them."""
        versions = pa.table(
            {ID_COLUMN: [key_text(key) for key, _ in items], VERSION_FIELD: [version for _, version in items]},
            schema=pa.schema(_own_fields()[:2]),
        )
        with self._fs.typed_errors():
            for path in self._files(target) if items else []:
                table = self._load(path)
                kept = table.join(versions, [ID_COLUMN, VERSION_FIELD], join_type="left anti")
                if len(kept) < len(table):
                    if len(kept):
                        self._write(path.rpartition("/")[0], kept)
                    self._fs.remove([path])

    def drop(self, target: Target) -> int:
        place: Place = target.settings
        self._kinds.pop(target.place, None)
        with self._fs.typed_errors():
            count = sum(len(batch) for batch in self._documents(target))
            self._fs.remove_folder(place.folder)
        return count

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        """Look through all files but the buckets of other keys: it is for verifying and repairing, not for serving."""
        ids = [key_text(key) for key in keys]
        found: dict[str, Stored] = {}
        with self._fs.typed_errors():
            floor = self._floor(target)
            rows: list[dict[str, Any]] = self._newest(target, None, ids=set(ids)).to_pylist() if ids else []
            kinds = self._all_kinds(target)  # after the files: others add fields, each before its file
            for row in rows:
                version, deleted = row[VERSION_FIELD], row[DELETED_COLUMN]
                if deleted:
                    found[row[ID_COLUMN]] = Stored(version, None)
                elif version >= floor:
                    values = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
                    document = {name: _read(kinds[name], value) for name, value in values.items() if value is not None}
                    found[row[ID_COLUMN]] = Stored(version, document)
        return [found.get(id_) for id_ in ids]

    def scan(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        """Yield ids and versions, of one bucket of keys after the other."""
        with self._fs.typed_errors():
            yield from self._documents(target)

    def _documents(self, target: Target) -> Iterator[list[tuple[str, int]]]:
        floor = self._floor(target)
        for bucket in range(self.options.buckets):
            rows = self._newest(target, bucket, columns=OWN_COLUMNS)
            alive = rows.filter(pc.and_(pc.invert(rows[DELETED_COLUMN]), pc.greater_equal(rows[VERSION_FIELD], floor)))
            for batch in alive.to_batches(SCAN_BATCH):
                pairs = zip(batch[ID_COLUMN].to_pylist(), batch[VERSION_FIELD].to_pylist(), strict=True)
                yield [(str(id_), int(version)) for id_, version in pairs]

    def newest_version(self, target: Target) -> int:
        with self._fs.typed_errors():
            newest = self._floor(target)
            for path in self._files(target):
                found = pc.max(self._load(path, columns=[VERSION_FIELD])[VERSION_FIELD]).as_py()
                newest = max(newest, found or 0)
        return newest

    def stored_form(self, target: Target, document: Document) -> dict[str, Any]:
        """Return the fields that have a value, as JSON values; numbers in one form, whatever their column's type."""
        del target
        fields = fields_of(document, True)
        return {name: plain(kind, value) for name, (kind, value) in fields.items()}

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _files(self, target: Target) -> list[str]:
        """Return the paths of all files with rows."""
        place: Place = target.settings
        return sorted(path for path in self._fs.find(place.folder) if path.endswith(".parquet"))

    def _floor(self, target: Target) -> int:
        place: Place = target.settings
        return max((int(name) for name in self._fs.names(f"{place.folder}/{FLOORS}") if name.isdigit()), default=0)

    def _all_kinds(self, target: Target) -> dict[str, Kind]:
        place: Place = target.settings
        names = [unquote(name) for name in self._fs.names(f"{place.folder}/{FIELDS}")]
        return self._kinds_for(target, dict.fromkeys(names, "text"))  # they are there: nothing is created

    def _newest(
        self,
        target: Target,
        bucket: int | None,
        columns: Sequence[str] | None = None,
        ids: Collection[str] | None = None,
    ) -> Any:
        """Return the newest row of each key, of one bucket or of all. Files may be merged by others meanwhile."""
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return self._latest(self._files(target), bucket, columns, ids)
        raise SinkBusy(f"The files in {target.place} are merged again and again while they are read.")

    def _latest(
        self,
        files: Sequence[str],
        bucket: int | None,
        columns: Sequence[str] | None = None,
        ids: Collection[str] | None = None,
    ) -> Any:
        """Return the newest row of each key in these files. Raises FileNotFoundError when one is not there any more."""
        own = f"of{self.options.buckets}"
        tables: list[Any] = [pa.schema(_own_fields()).empty_table()]
        for path in files:
            name = path.split("/")[-2]
            other = name.startswith(BUCKETS) and name.endswith(own) and name != f"{BUCKETS}{bucket}{own}"
            if bucket is not None and other:
                continue
            table = self._load(path, columns=columns, ids=ids)
            if bucket is not None:
                found = [_bucket(id_, self.options.buckets) == bucket for id_ in table[ID_COLUMN].to_pylist()]
                table = table.filter(pa.array(found, pa.bool_()))
            tables.append(table)
        rows = pa.concat_tables(tables, promote_options="default")
        newest_first = [(ID_COLUMN, "ascending"), (VERSION_FIELD, "descending"), (WRITTEN_COLUMN, "descending")]
        rows = rows.take(pc.sort_indices(rows, newest_first)).combine_chunks()
        if len(rows) < 2:
            return rows
        id_ = rows[ID_COLUMN].combine_chunks()
        first = pc.not_equal(id_[1:], id_[:-1])
        return rows.filter(pa.chunked_array([pa.array([True]), first]))

    def _load(self, path: str, columns: Sequence[str] | None = None, ids: Collection[str] | None = None) -> Any:
        wanted = None if ids is None else pc.field(ID_COLUMN).isin(list(ids))
        chosen = None if columns is None else list(columns)
        data = self._fs.read(path)
        # partitioning=None: what the folders' names say is in no row
        return pq.read_table(io.BytesIO(data), columns=chosen, filters=wanted, partitioning=None)

    def _write(self, folder: str, table: Any) -> None:
        """Write a file in one step."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self._fs.create(f"{folder}/{self._written_ns()}-{uuid.uuid4().hex}.parquet", buffer.getvalue())


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _bucket(id_: str, buckets: int) -> int:
    return zlib.crc32(id_.encode()) % buckets


def _raw(kind: Kind, value: Any) -> Any:
    """Return a value as its column's type takes it."""
    match kind:
        case "json":
            return to_json(value).decode()
        case "decimal":
            return decimal_text(value)
        case "uuid":
            return str(value)
        case _:
            return value


def _read(kind: Kind, value: Any) -> Any:
    """Return a stored value as `stored_form` has it."""
    match kind:
        case "json":
            return numbers(from_json(value.encode()))
        case "decimal":
            return number(decimal.Decimal(value))
        case "uuid":
            return value
        case _:
            return plain(kind, value)
