"""The file system under Parquet files: a local disk or an object store, through fsspec, and what its errors mean."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import uuid
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_sync.errors import DeltaError, SinkBusy, SinkRefused, UsageError
from delta_sync.secrets import redact


class Library:
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


fsspec: Any = Library("fsspec")

ANSWER_S = 300  # for one file to be listed, read or written: some are large, and lines slow
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}  # what fsspec needs beside it
# What Azure's answers mean, by status.
ERRORS: Mapping[int, type[OSError]] = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
# s3fs tries five times, and botocore five times each: of a store that hangs nobody would hear for six minutes.
STORAGE = {"s3": {"config_kwargs": {"retries": {"max_attempts": 0}}}}


class FileSystem:
    """Files below `root`, of fsspec's `protocol`, opened with the options `storage`.

    Raises UsageError when a package is not installed. What its methods raise is to be within `typed_errors`: OSError,
    or SinkRefused when `storage` has what the file system does not take.
    """

    def __init__(self, protocol: str, root: str, storage: Mapping[str, Any]) -> None:
        self.protocol = protocol
        self.root = root
        self._storage = storage
        self._opening = threading.Lock()
        self._fs: Any = None
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            needed = PACKAGES.get(protocol, protocol)
            raise UsageError(f"{protocol}:// needs more; type: pip install {needed}.") from error

    def find(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder: none, if it is not there."""
        try:
            found: list[str] = self._ask("find", folder)
            if not found and self.protocol == "abfs":  # adlfs finds nothing where there is no container, either
                self._ask("info", self.root.partition("/")[0])
        except FileNotFoundError as error:  # folders are nothing to an object store, buckets are
            raise self._no_bucket() from error
        return found

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder."""
        return [path.rpartition("/")[2] for path in self.find(folder)]

    def read(self, path: str) -> bytes:
        """Return what a file holds. Raises FileNotFoundError."""
        data: bytes = self._ask("cat_file", path)
        return data

    def create(self, path: str, data: bytes) -> None:
        """Create a file that is whole from the moment it is there. Raises FileExistsError when there is one."""
        if self.protocol != "file":  # an object is there when it is whole
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
        part = Path(self.root) / ".parts" / uuid.uuid4().hex  # where no listing meets it
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

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files. One that is gone is no error."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._ask("rm_file", path)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it. One that is gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm", folder, recursive=True)

    @contextlib.contextmanager
    def typed_errors(self) -> Generator[None]:
        """Raise SinkRefused or SinkBusy in the place of OSError."""
        try:
            yield
        except (PermissionError, NotADirectoryError) as error:
            raise SinkRefused(f"{self.root} refuses: {redact(str(error))}") from error
        except OSError as error:
            if error.errno in (28, 30, 122):  # no space left, a read-only file system, over quota
                raise SinkRefused(f"{self.root} refuses: {redact(str(error))}") from error
            raise SinkBusy(f"{self.root} cannot be reached: {redact(str(error))}") from error

    def _ask(self, method: str, *args: object, **options: object) -> Any:
        try:
            with self._opening:
                if self._fs is None:
                    storage = {"use_listings_cache": False, **STORAGE.get(self.protocol, {}), **self._storage}
                    self._fs = fsspec.filesystem(self.protocol, **storage)
            if self._fs.async_impl:  # fsspec's own limit: botocore's and aiohttp's begin once a body has been sent
                options["timeout"] = ANSWER_S
            return getattr(self._fs, method)(*args, **options)
        except TimeoutError as error:  # fsspec's has no text
            raise TimeoutError(f"no answer in time ({method})") from error
        except (OSError, DeltaError):
            raise
        except (TypeError, ValueError, KeyError) as error:
            raise SinkRefused(f"{self.root}: the file system does not take this: {redact(str(error))}") from error
        except Exception as error:
            # botocore's, aiohttp's and other libraries' errors of connections and logins have no base in common
            kind = ERRORS.get(getattr(error, "status_code", 0), ConnectionError)
            raise kind(f"{type(error).__name__}: {error}") from error

    def _no_bucket(self) -> SinkRefused:
        return SinkRefused(f"There is no bucket {self.root.partition('/')[0]}: create it, or correct the URL.")


def _is_taken(error: OSError) -> bool:
    """Tell whether an object is not created because there is one. Amazon says which condition failed, others do not."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "PreconditionFailed")
