"""The connections to Redis, what its servers say of themselves, and what its errors mean."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha1
from typing import Any, NamedTuple

import hiredis
import redis
from pydantic import Field
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from delta_sync.errors import Problem, SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import Options
from delta_sync.sinks.redis_keys import slot_of
from delta_sync.urls import split_url

SCAN_COUNT = 1000  # keys that Redis looks at in one step: about a millisecond
CONNECT_TIMEOUT_S = 5.0  # a handshake takes a round trip or three, so beyond this nobody is there
REPLY_TIMEOUT_S = 15.0  # a call takes milliseconds, an fsync or a fork on a slow disk may take seconds
SCRIPT_ATTEMPTS = 3  # a restart or failover empties the script cache; three in one batch are no coincidence
READONLY_GRACE_S = 120.0  # after a failover a name may lead to the old primary for as long as DNS keeps it
FULL_RETRY_S = 10.0  # memory comes back when keys expire or somebody acts, not within milliseconds
OLDEST = (6, 2)  # of Redis, that this is tested with
PIECE_BYTES = 1 << 20  # sent at once: each piece more lets another thread of Python in, for 5 ms where it is busy


class LinkOptions(Options):
    """What a Redis sink may say about its connections."""

    cluster: bool | None = Field(default=None, description="Whether it is a Redis Cluster; default: ask it.")
    ca_file: str | None = Field(default=None, description="For rediss://: file of the certificates to trust.")
    cert_file: str | None = Field(default=None, description="For rediss://: file of the client's certificate.")
    key_file: str | None = Field(default=None, description="For rediss://: file of the client certificate's key.")


class Call(NamedTuple):
    """One call of a script."""

    keys: list[bytes]
    args: list[bytes]


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


_pack: Any = hiredis.pack_command  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] -- untyped


class _InLargePieces:
    """A connection that sends commands of a pipeline together, where redis-py sends each that has 6,000 bytes alone."""

    def pack_commands(self, commands: Iterable[tuple[Any, ...]]) -> list[bytes]:
        """Return commands as Redis takes them, in pieces of which each is sent at once."""
        pieces: list[list[bytes]] = []
        room = 0
        for command in commands:
            part: bytes = _pack(command)
            if len(part) > room:
                pieces.append([])
                room = PIECE_BYTES
            pieces[-1].append(part)
            room -= len(part)
        return [b"".join(piece) if len(piece) > 1 else piece[0] for piece in pieces]


class _Connection(_InLargePieces, redis.Connection):
    pass


class _TLSConnection(_InLargePieces, redis.SSLConnection):
    pass


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


class Link:
    """The connections to one Redis or cluster. Every method raises SinkBusy or SinkRefused, and nothing else."""

    def __init__(self, name: str, url: str, options: LinkOptions, now: Callable[[], float]) -> None:
        self._name, self._url, self._now = name, url, now
        parts = split_url(url, f"sink {name}: the URL")
        self._settings: dict[str, Any] = {
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_timeout": REPLY_TIMEOUT_S,
            "socket_keepalive": True,
            "protocol": 2,  # nothing here needs RESP3, and every server and proxy has RESP2
            "connection_class": _TLSConnection if parts.scheme == "rediss" else _Connection,
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
                        # Over TLS it has redis-py's own connections, which send smaller pieces.
                        self._cluster = _RedisCluster.from_url(self._url, dynamic_startup_nodes=False, **self._settings)
                    self._known = True
        return self._cluster or self._single

    def run(self, script: str, calls: Sequence[Call]) -> list[Any]:
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
