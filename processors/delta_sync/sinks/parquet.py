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
import importlib
import io
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast
from urllib.parse import quote, unquote

from pydantic import Field

from delta_sync.changes import APPLIED, Key, Outcome, Write, rejected
from delta_sync.errors import DeltaError, Problem, SinkBusy, SinkRefused, Unstorable, UsageError
from delta_sync.secrets import redact
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
from delta_sync.tables import Table, key_text
from delta_sync.urls import parts_of
from delta_sync.values import Document, decimal_text, from_json, to_json


class _Library:
    """A module of the extra, which has no types, imported when it is first used: it takes 50 MB, and most pipelines
    have no such sink, though the class is looked at. Raises UsageError with what to install.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        try:
            module = importlib.import_module(self._name)
        except ImportError as error:
            raise UsageError(
                f"The Parquet sink needs more ({error}); type: pip install 'delta-sync[parquet]'."
            ) from error
        return getattr(module, attribute)


fsspec: Any = _Library("fsspec")
pa: Any = _Library("pyarrow")
pc: Any = _Library("pyarrow.compute")
pq: Any = _Library("pyarrow.parquet")

DELETED_COLUMN = "_delta_deleted"
WRITTEN_COLUMN = "_delta_written_ns"
OWN_COLUMNS = (ID_COLUMN, VERSION_FIELD, DELETED_COLUMN, WRITTEN_COLUMN)
CHANGES, BUCKETS, FIELDS, FLOORS = "changes", "bucket=", "fields", "floors"

SCAN_BATCH = 5000  # ids and versions are some 60 bytes each
READ_ATTEMPTS = 10  # at a listing whose files a compaction removes meanwhile: each is a new one, seconds later
COMPACT_FILES = 8  # fewer files of changes than that are not worth writing every bucket again
ANSWER_S = 300  # for one file to be listed, read or written: some are large, and lines slow
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}  # what fsspec needs beside it
# What Azure's answers mean, by status.
ERRORS: Mapping[int, type[OSError]] = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
# s3fs tries five times, and botocore five times each: of a store that hangs nobody would hear for six minutes.
STORAGE = {"s3": {"config_kwargs": {"retries": {"max_attempts": 0}}}}


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
        self._protocol = parts.scheme.removeprefix("parquet+")
        self._root = f"{parts.netloc}{unquote(parts.path)}".rstrip("/")
        if not self._root:
            raise UsageError(f"sink {name}: the URL must name a folder, such as parquet+s3://bucket/prefix.")
        self._opening = threading.Lock()
        self._fs: Any = None
        _ = pq.read_table  # or say now what is not installed
        try:
            fsspec.get_filesystem_class(self._protocol)
        except ImportError as error:
            needed = PACKAGES.get(self._protocol, self._protocol)
            raise UsageError(f"sink {name}: {self._protocol}:// needs more; type: pip install {needed}.") from error
        self._kinds: dict[str, dict[str, Kind]] = {}
        self._last_ns = 0

    # ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────

    def target(self, table: Table, options: ParquetTargetOptions) -> Target:
        folder = (options.folder or table.id).strip("/")
        if not folder or ".." in folder.split("/"):
            raise UsageError(f"sink {self.name}: {options.folder!r} is no folder within {self._root}; set `folder`.")
        if any(one in f"{self._root}/{folder}" for one in "*?["):  # a file system may take it for a pattern, in `rm`
            raise UsageError(
                f"sink {self.name}: no folder may have * ? or [ in its name, as {folder} has; set `folder`."
            )
        for column in options.columns:
            if (reason := name_conflict(column)) is not None:
                raise UsageError(f"sink {self.name}: columns: {reason}.")
        return Target(table, folder, Place(f"{self._root}/{folder}", dict(options.columns)))

    def check(self, targets: Sequence[Target]) -> list[Problem]:
        where = f"sink {self.name}"
        if self._protocol == "file" and not Path(self._root).parent.is_dir():
            return [Problem(where, f"there is no folder {Path(self._root).parent}", "create it, or correct the URL")]
        try:
            with self._typed_errors():
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
        with self._typed_errors():
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
                found = self._ask("cat_file", path)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    self._create(path, wanted[name].encode())
                found = self._ask("cat_file", path)
            known[name] = cast("Kind", found.decode())
        return known

    def _written_ns(self) -> int:
        """Return the time, later than this process has seen it: of equal versions the last one wins."""
        with self._opening:
            self._last_ns = max(self._last_ns + 1, round(self._now() * 1e9))
            return self._last_ns

    def truncate(self, target: Target, version: int) -> int:
        """Record the floor; count what it hides. It is gone from the files when they are merged next."""
        place: Place = target.settings
        with self._typed_errors():
            below = sum(old < version for batch in self._documents(target) for _, old in batch)
            path = f"{place.folder}/{FLOORS}/{version}"
            with contextlib.suppress(FileExistsError):
                self._create(path, b"")
        return below

    def sweep(self, target: Target, recent_s: float | None = None) -> int:
        """Merge the files, unless all versions are kept. Return how many tombstones have expired."""
        if self.options.keep == "history":
            return 0
        place: Place = target.settings
        with self._typed_errors(), contextlib.suppress(FileNotFoundError):  # another process is about it, too
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
            self._remove(files)
            return gone
        return 0

    def discard(self, target: Target, items: Sequence[tuple[Key, int]]) -> None:
        """Write the files again that hold them, without them."""
        versions = pa.table(
            {ID_COLUMN: [key_text(key) for key, _ in items], VERSION_FIELD: [version for _, version in items]},
            schema=pa.schema(_own_fields()[:2]),
        )
        with self._typed_errors():
            for path in self._files(target) if items else []:
                table = self._load(path)
                kept = table.join(versions, [ID_COLUMN, VERSION_FIELD], join_type="left anti")
                if len(kept) < len(table):
                    if len(kept):
                        self._write(path.rpartition("/")[0], kept)
                    self._remove([path])

    def drop(self, target: Target) -> int:
        place: Place = target.settings
        self._kinds.pop(target.place, None)
        with self._typed_errors():
            count = sum(len(batch) for batch in self._documents(target))
            with contextlib.suppress(FileNotFoundError):
                self._ask("rm", place.folder, recursive=True)
        return count

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, target: Target, keys: Sequence[Key]) -> list[Stored | None]:
        """Look through all files but the buckets of other keys: it is for verifying and repairing, not for serving."""
        ids = [key_text(key) for key in keys]
        found: dict[str, Stored] = {}
        with self._typed_errors():
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
        with self._typed_errors():
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
        with self._typed_errors():
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

    def _ask(self, method: str, *args: object, **options: object) -> Any:
        """Call the file system. Raises OSError, or SinkRefused when `storage` has what it does not take."""
        try:
            with self._opening:
                if self._fs is None:
                    storage = {"use_listings_cache": False, **STORAGE.get(self._protocol, {}), **self.options.storage}
                    self._fs = fsspec.filesystem(self._protocol, **storage)
            if self._fs.async_impl:  # fsspec's own limit: botocore's and aiohttp's begin once a body has been sent
                options["timeout"] = ANSWER_S
            return getattr(self._fs, method)(*args, **options)
        except TimeoutError as error:  # fsspec's has no text
            raise TimeoutError(f"no answer in time ({method})") from error
        except (OSError, DeltaError):
            raise
        except (TypeError, ValueError, KeyError) as error:
            raise SinkRefused(f"{self._root}: the file system does not take this: {redact(str(error))}") from error
        except Exception as error:
            # botocore's, aiohttp's and other libraries' errors of connections and logins have no base in common
            kind = ERRORS.get(getattr(error, "status_code", 0), ConnectionError)
            raise kind(f"{type(error).__name__}: {error}") from error

    def _files(self, target: Target) -> list[str]:
        """Return the paths of all files with rows."""
        place: Place = target.settings
        return sorted(path for path in self._find(place.folder) if path.endswith(".parquet"))

    def _names(self, folder: str) -> list[str]:
        return [path.rpartition("/")[2] for path in self._find(folder)]

    def _find(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder: none, if it is not there."""
        try:
            found: list[str] = self._ask("find", folder)
            if not found and self._protocol == "abfs":  # adlfs finds nothing where there is no container, either
                self._ask("info", self._root.partition("/")[0])
        except FileNotFoundError as error:  # folders are nothing to an object store, buckets are
            raise self._no_bucket() from error
        return found

    def _no_bucket(self) -> SinkRefused:
        return SinkRefused(f"There is no bucket {self._root.partition('/')[0]}: create it, or correct the URL.")

    def _floor(self, target: Target) -> int:
        place: Place = target.settings
        return max((int(name) for name in self._names(f"{place.folder}/{FLOORS}") if name.isdigit()), default=0)

    def _all_kinds(self, target: Target) -> dict[str, Kind]:
        place: Place = target.settings
        names = [unquote(name) for name in self._names(f"{place.folder}/{FIELDS}")]
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
        data = self._ask("cat_file", path)
        # partitioning=None: what the folders' names say is in no row
        return pq.read_table(io.BytesIO(data), columns=chosen, filters=wanted, partitioning=None)

    def _write(self, folder: str, table: Any) -> None:
        """Write a file in one step."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self._create(f"{folder}/{self._written_ns()}-{uuid.uuid4().hex}.parquet", buffer.getvalue())

    def _create(self, path: str, data: bytes) -> None:
        """Create a file that is whole from the moment it is there. Raises FileExistsError when there is one."""
        if self._protocol != "file":  # an object is there when it is whole
            try:
                self._ask("pipe_file", path, data, mode="create")
            except FileNotFoundError as error:
                raise self._no_bucket() from error
            except OSError as error:
                if _is_taken(error):
                    raise FileExistsError(path) from error
                raise
            return
        whole = Path(path)
        whole.parent.mkdir(parents=True, exist_ok=True)
        part = Path(self._root) / ".parts" / uuid.uuid4().hex  # where no listing meets it
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, whole)  # unlike a rename, it does not replace
        finally:
            part.unlink()
        folder = os.open(whole.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._ask("rm_file", path)

    @contextlib.contextmanager
    def _typed_errors(self) -> Generator[None]:
        try:
            yield
        except (PermissionError, NotADirectoryError) as error:
            raise SinkRefused(f"{self._root} refuses: {redact(str(error))}") from error
        except OSError as error:
            if error.errno in (28, 30, 122):  # no space left, a read-only file system, over quota
                raise SinkRefused(f"{self._root} refuses: {redact(str(error))}") from error
            raise SinkBusy(f"{self._root} cannot be reached: {redact(str(error))}") from error


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_taken(error: OSError) -> bool:
    """Tell whether an object is not created because there is one. Amazon says which condition failed, others do not."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "PreconditionFailed")


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
