"""The connection to MongoDB: what the URL says, timeouts, and what errors mean."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote

from pymongo import MongoClient
from pymongo.collection import Collection as MongoCollection
from pymongo.cursor import Cursor
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    OperationFailure,
    WaitQueueTimeoutError,
)
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from delta_sync.errors import SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import LoginOptions
from delta_sync.sinks.mongodb_documents import CODEC, brief
from delta_sync.urls import parts_of, split_url

SERVER_SELECTION_TIMEOUT_MS = 5_000  # an election takes 2–12 s; the worker asks again, and says meanwhile why it waits
CONNECT_TIMEOUT_MS = 5_000  # two lost SYNs
WRITE_CONCERN_TIMEOUT_MS = 30_000  # a majority that has not confirmed by now lags; the same batch is sent again
SOCKET_TIMEOUT_MS = 60_000  # above the write concern's, so that the server's own answer comes first

SCAN_BATCH = 5000  # ids and versions are some 60 bytes each: far below a reply's 16 MB
MAX_DATABASE_BYTES = 63

Collection = MongoCollection[dict[str, Any]]

# Codes of MongoDB's error_codes.yml. What passes by itself: elections, shutdowns, timeouts, overload.
BUSY_CODES = frozenset(
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
REFUSED_CODES = frozenset(
    {
        13,  # Unauthorized
        18,  # AuthenticationFailed
        8000,  # AtlasError: authentication, or what the tier does not allow
        14031,  # OutOfDiskSpace
        20,  # IllegalOperation, such as writing to a view
        166,  # CommandNotSupportedOnView
    }
)


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


def client_options(url: str, login: LoginOptions) -> dict[str, Any]:
    """Return what the driver is told beside the URL, which has the last word."""
    wanted: dict[str, Any] = {
        "appname": "delta",
        "serverSelectionTimeoutMS": SERVER_SELECTION_TIMEOUT_MS,
        "connectTimeoutMS": CONNECT_TIMEOUT_MS,
        "socketTimeoutMS": SOCKET_TIMEOUT_MS,
        "username": login.username,
        "password": login.password,
    }
    given = {option.lower() for option, _ in parse_qsl(parts_of(url).query, keep_blank_values=True)}
    return {name: value for name, value in wanted.items() if value is not None and name.lower() not in given}


class Link:
    """The connections to one MongoDB. Constructing it connects to nothing."""

    def __init__(self, url: str, login: LoginOptions, write_concern: int | str, journal: bool) -> None:
        self._url, self._login = url, login
        self.write_concern = WriteConcern(write_concern, WRITE_CONCERN_TIMEOUT_MS, journal)
        self.hosts = parts_of(url).netloc.rpartition("@")[2]  # for messages: without user and password
        self._connecting = threading.Lock()
        self._client: MongoClient[dict[str, Any]] | None = None

    def close(self) -> None:
        """Close the connections. Idempotent."""
        with self._connecting:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _connected(self) -> MongoClient[dict[str, Any]]:
        """Return the client, which keeps its own pool of connections and is safe for threads."""
        with self._connecting:
            if self._client is None:
                try:
                    self._client = MongoClient(self._url, **client_options(self._url, self._login))
                except (ValueError, TypeError, OSError) as error:  # OSError: of a file that is not there
                    raise SinkRefused(f"MongoDB at {self.hosts}: an option of the URL is wrong: {error}") from error
            return self._client

    def ping(self) -> None:
        """Ask the server for nothing."""
        self._connected().admin.command("ping")

    def database(self, name: str) -> Database[dict[str, Any]]:
        """Return a database, for commands."""
        return self._connected()[name]

    def collection(self, database: str, name: str) -> Collection:
        """Return a collection, as all documents and tombstones are read and written."""
        return self._connected()[database].get_collection(
            name,
            codec_options=CODEC,
            read_preference=ReadPreference.PRIMARY,  # a secondary may not have the tombstone yet
            write_concern=self.write_concern,
        )

    @contextlib.contextmanager
    def typed_errors(self) -> Generator[None]:
        """Raise the driver's errors as `SinkBusy` or `SinkRefused`. Their texts hold no credentials."""
        try:
            yield
        except (ConnectionFailure, WaitQueueTimeoutError) as error:
            raise SinkBusy(f"MongoDB at {self.hosts} cannot be reached: {brief(error)}") from error
        except BulkWriteError as error:  # of removals, the one bulk whose errors are not looked at one by one
            raise SinkBusy(f"MongoDB at {self.hosts} could not delete: {brief(error)}") from error
        except DuplicateKeyError as error:  # of two who lead readers at once, for the first time
            raise SinkBusy(f"MongoDB at {self.hosts}: somebody else leads readers: {brief(error)}") from error
        except OperationFailure as error:
            raise self.typed(error.code, brief(error)) from error
        except ConfigurationError as error:
            if "DNS" in str(error) or "resolution" in str(error):  # of mongodb+srv://; it has no type of its own
                raise SinkBusy(f"MongoDB at {self.hosts} cannot be found: {brief(error)}") from error
            raise SinkRefused(f"MongoDB at {self.hosts}: {brief(error)}") from error

    def typed(self, code: object, text: str) -> SinkBusy | SinkRefused:
        """Return the error that a server's error code stands for. An unknown one is no reason to drop anything."""
        if code in BUSY_CODES:
            return SinkBusy(f"MongoDB at {self.hosts} is busy: {text}")
        return SinkRefused(f"MongoDB at {self.hosts} refuses: {text}")


def batches(cursor: Cursor[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield what a cursor finds, as many at once as one command brings, and close it in the end."""
    with contextlib.closing(cursor.batch_size(SCAN_BATCH)):
        while batch := list(itertools.islice(cursor, SCAN_BATCH)):
            yield batch
