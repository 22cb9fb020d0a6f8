"""Connecting to MariaDB and MySQL, and one sentence for each way in which that fails."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pymysql
from pymysql import converters
from pymysql.connections import Connection

from delta_sync.errors import CheckFailed, Problem, SourceBusy, UsageError
from delta_sync.secrets import redact, resolve, resolve_url
from delta_sync.spec import SourceSpec

CONNECT_TIMEOUT_S = 10.0  # a firewall that drops packets must not look like a hung command
DEFAULT_PORT = 3306

# A host that is gone without a word is noticed within a minute; the kernel's defaults would take two hours.
KEEP_ALIVE: Final[tuple[tuple[int, int, int], ...]] = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
)

SESSION: Final[Mapping[str, str]] = {
    # Of any other level START TRANSACTION WITH CONSISTENT SNAPSHOT takes no snapshot, with a mere warning.
    "tx_isolation": "'REPEATABLE-READ'",
    "time_zone": "'+00:00'",
    "sql_mode": "''",  # PAD_CHAR_TO_FULL_LENGTH changes values, ANSI_QUOTES the language
    "sql_select_limit": "18446744073709551615",  # a smaller default of the server's would cut a read short
    "lock_wait_timeout": "30",  # s, for a table that is being altered; the default is a day
    "net_write_timeout": "600",  # s, for a reader that is busy between two rows; the default is 60
}
"""What each session is told, because a server may have other defaults. MySQL calls the first transaction_isolation."""

TLS_MODES: Final[Mapping[str, str]] = {
    "disable": "off",
    "disabled": "off",
    "preferred": "if offered",
    "trust": "unverified",
    "required": "unverified",
    "verify-ca": "authority",
    "verify_ca": "authority",
    "verify-full": "host",
    "verify_identity": "host",
}
"""Values of `ssl-mode` in the URL, MariaDB's and MySQL's names; the connector is told the same one."""


class Server(NamedTuple):
    """Whom an error message is about."""

    user: str
    host: str
    port: int
    database: str


class Session(Connection):
    """A connection of which another thread can end whatever waits for an answer. Values arrive as str or bytes.

    It is closed when the server ends it and when a command fails for lack of an answer: then `open` is false.
    """

    def __init__(self, end: socket.socket, **options: Any) -> None:
        super().__init__(defer_connect=True, **options)
        self._end = end  # a second handle on the socket: TLS takes the first one away

    def abort(self) -> None:
        """End, from another thread, whatever is waiting for an answer: it raises OperationalError."""
        with contextlib.suppress(OSError):  # it has just ended by itself
            self._end.shutdown(socket.SHUT_RDWR)

    def shut(self) -> None:
        """Close the connection; where a result is left unread, its rows are not waited for. Idempotent."""
        if (result := getattr(self, "_result", None)) is not None:
            result.unbuffered_active = False  # or PyMySQL reads on from the closed connection when it is collected
        with contextlib.suppress(pymysql.Error, OSError):
            self.close()
        self._end.close()


def server_of(source: SourceSpec) -> Server:
    """Return what a source's URL names. Raises UsageError when its port is no number."""
    parts = urlsplit(source.url)
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:
        raise UsageError("source.url: the port must be a number between 1 and 65535.") from None
    return Server(unquote(parts.username or ""), parts.hostname or "localhost", port, unquote(parts.path.lstrip("/")))


def connect(source: SourceSpec, application_name: str = "delta") -> Session:
    """Return an autocommit connection to a source, told `SESSION`.

    Raises SourceBusy when it will pass by itself (refused, starting, too many connections), CheckFailed when somebody
    has to change something (password, database, TLS), and UsageError when the URL or a reference is wrong.
    """
    if source.kind not in ("mariadb", "mysql"):
        raise UsageError("source.url: write it as mariadb://user@host:port/database, or mysql://….")
    server = server_of(source)
    parts = urlsplit(resolve_url(source.url))
    password = resolve(source.password) if source.password is not None else unquote(parts.password or "")
    if not parts.username:
        raise UsageError(f"source.url names no user; write it as {source.kind}://user@host:port/database.")
    options: dict[str, Any] = {
        "user": unquote(parts.username),
        "password": password.encode(),
        "host": server.host,
        "port": server.port,
        "database": unquote(parts.path.lstrip("/")) or None,
        "program_name": application_name,
        "charset": "utf8mb4",
        "autocommit": True,
        "conv": dict(converters.encoders),  # and no decoders: the codec turns text into values
        **tls_options(parts.query),
    }
    try:
        return _open(server, options)
    except (pymysql.Error, OSError, RuntimeError) as error:
        problem, passing = explain(error, server)
        if passing:
            raise SourceBusy(str(problem)) from error
        raise CheckFailed([problem]) from error


def _open(server: Server, options: dict[str, Any]) -> Session:
    sock = socket.create_connection((server.host, server.port), CONNECT_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in KEEP_ALIVE:
        sock.setsockopt(*option)
    session = Session(sock.dup(), **options)
    try:
        # The socket's own timeout would end every long query later.
        with patience(CONNECT_TIMEOUT_S, session.abort) as has_ended:
            try:
                session.connect(sock)
                configure(session)
            except (pymysql.Error, OSError) as error:
                if has_ended():
                    raise TimeoutError("no answer") from error
                raise
    except BaseException:
        session.shut()
        raise
    return session


def configure(session: Session) -> None:
    """Tell the session `SESSION`, and that no query is too long."""
    names = dict(SESSION)
    if is_mariadb(session):
        names["max_statement_time"] = "0"
    else:
        names["transaction_isolation"] = names.pop("tx_isolation")
        names["max_execution_time"] = "0"
    with session.cursor() as cursor:
        cursor.execute("SET " + ", ".join(f"SESSION {name} = {value}" for name, value in names.items()))


def is_mariadb(session: Session) -> bool:
    """Tell MariaDB from MySQL."""
    with session.cursor() as cursor:
        cursor.execute("SELECT @@version")
        return "mariadb" in str(cursor.fetchone()).lower()


@contextmanager
def patience(answer_s: float | None, abort: Callable[[], None]) -> Generator[Callable[[], bool]]:
    """Call `abort` when the block takes longer; the function tells whether that has happened. None: for ever."""
    ended = threading.Event()
    if answer_s is None:
        yield ended.is_set
        return

    def end() -> None:
        ended.set()
        abort()

    timer = threading.Timer(answer_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield ended.is_set
    finally:
        timer.cancel()


def tls_options(query: str) -> dict[str, Any]:
    """Return PyMySQL's options for the URL's query. Pure but for the system's certificates. Raises UsageError."""
    mode = "if offered"
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in ("ssl-mode", "ssl_mode", "sslmode"):
            raise UsageError(f"source.url has the parameter {name}, and only ssl-mode is known; leave it out.")
        if value.lower() not in TLS_MODES:
            raise UsageError(f"source.url: {name} must be one of {', '.join(TLS_MODES)}.")
        mode = TLS_MODES[value.lower()]
    if mode == "off":
        return {"ssl_disabled": True}
    if mode == "if offered":
        return {}
    context = ssl.create_default_context()
    # Authorities that the servers make for themselves lack an extension that newer Pythons ask for.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.check_hostname = mode == "host"
    context.verify_mode = ssl.CERT_NONE if mode == "unverified" else ssl.CERT_REQUIRED
    return {"ssl": context}


# ── what errors mean ─────────────────────────────────────────────────────────────────────────────────────────────


def code_of(error: BaseException) -> int | None:
    """Return the server's or the client's number of an error."""
    code = error.args[0] if isinstance(error, pymysql.Error) and error.args else None
    return code if isinstance(code, int) else None


def explain(error: BaseException, server: Server) -> tuple[Problem, bool]:
    """Return what a failed attempt to connect means and what to change, and whether it will pass by itself.

    Pure. What is not known is handed on as it is, and counts as passing: a pipeline that waits, and says for what, is
    better than one that gave up because a server was restarting.
    """
    what, fix, passing = _meaning(error)
    names = server._asdict()
    said = redact(_text(error))
    return Problem("source", what.format(**names, said=said), fix.format(**names)), passing


def _meaning(error: BaseException) -> tuple[str, str, bool]:
    cause = getattr(error, "original_exception", error)
    match cause:
        case ssl.SSLError():
            return _CERTIFICATE
        case socket.gaierror():
            return _NO_HOST
        case ConnectionRefusedError():
            return _REFUSED
        case TimeoutError():
            return _SILENT
        case ConnectionResetError() | BrokenPipeError():
            return _CLOSES
        case pymysql.Error():
            return _BY_CODE.get(code_of(cause) or 0, _UNKNOWN)
        case OSError():
            return _SILENT
        case RuntimeError():
            return _NO_RSA if "cryptography" in str(cause) else _PLUGIN  # PyMySQL lacks a package for it
        case _:
            return _UNKNOWN


def _text(error: BaseException) -> str:
    if isinstance(error, pymysql.Error) and len(error.args) > 1:
        return str(error.args[1]).strip().rstrip(".")
    return str(error).strip().rstrip(".") or type(error).__name__


_Meaning = tuple[str, str, bool]  # what, fix, will it pass by itself?

_NO_HOST: _Meaning = (
    "there is no host {host}",
    "correct the host in source.url, unless its name is only away for a moment",
    True,
)
_REFUSED: _Meaning = (
    "nothing listens on {host}:{port}",
    "start the server there, or correct host and port in source.url",
    True,
)
_SILENT: _Meaning = (
    "{host}:{port} does not answer ({said})",
    "look whether the host is up, is MariaDB or MySQL, and whether a firewall lets this machine through",
    True,
)
_CLOSES: _Meaning = (
    "{host}:{port} closes connections at once: the server is ending or starting there, or something else answers",
    "wait until it accepts connections; if it stays so, correct host and port in source.url",
    True,
)
_CERTIFICATE: _Meaning = (
    "TLS with {host}:{port} fails: {said}",
    "add the server's authority to the certificates that this machine trusts (or name its file in the environment"
    " variable SSL_CERT_FILE), or correct ssl-mode in source.url",
    False,
)
_PLUGIN: _Meaning = (
    "user {user} logs in by a method that this client does not have ({said})",
    "give the user a password: ALTER USER {user} IDENTIFIED BY '…'",
    False,
)
_NO_RSA: _Meaning = (
    "user {user} logs in by MySQL's method caching_sha2_password, and the connection has no TLS to carry a password",
    "switch TLS on there, and take ssl-mode=disabled out of source.url; or type here: pip install cryptography",
    False,
)
_UNKNOWN: _Meaning = ("cannot connect to {host}:{port}: {said}", "correct source.url if it stays so", True)

_BY_CODE: Mapping[int, _Meaning] = {
    1040: (
        "the server on {host}:{port} has no connection left",
        "raise max_connections, or end connections that nobody needs",
        True,
    ),
    1203: ("user {user} has no connection left", "raise max_user_connections", True),
    1226: ("user {user} has used up a limit of its account ({said})", "raise the limit with ALTER USER", True),
    1129: (
        "the server on {host}:{port} has blocked this machine after too many failed connections",
        "type there: FLUSH HOSTS",
        True,
    ),
    1130: (
        "the server on {host}:{port} lets nobody in from this machine",
        "create the user for this machine's address, or for '%'",
        False,
    ),
    1045: (
        "the password of user {user} is wrong, or there is no such user for connections from this machine",
        "correct the password, or type: ALTER USER {user} IDENTIFIED BY '…'",
        False,
    ),
    1698: (
        "user {user} logs in without a password, from the server's own machine only",
        "create a user with a password: CREATE USER delta IDENTIFIED BY '…'",
        False,
    ),
    1044: (
        "user {user} may not use database {database}",
        "type: GRANT SELECT ON `{database}`.* TO {user}",
        False,
    ),
    1049: ("there is no database {database} on {host}:{port}", "correct the database in source.url", False),
    1820: ("the password of user {user} has expired", "type: ALTER USER {user} IDENTIFIED BY '…'", False),
    1862: ("the password of user {user} has expired", "type: ALTER USER {user} IDENTIFIED BY '…'", False),
    4151: ("the account of user {user} is locked", "type: ALTER USER {user} ACCOUNT UNLOCK", False),
    3118: ("the account of user {user} is locked", "type: ALTER USER {user} ACCOUNT UNLOCK", False),
    3159: (
        "{host}:{port} lets nobody in without TLS",
        "put ?ssl-mode=… into source.url (MariaDB: trust or verify-full; MySQL: required or verify_identity)",
        False,
    ),
    1053: ("the server on {host}:{port} is shutting down", "wait until it accepts connections", True),
    1524: _PLUGIN,
    2059: _PLUGIN,
    1251: _PLUGIN,
    2026: (
        "{host}:{port} does not offer TLS, but ssl-mode in source.url demands it",
        "switch TLS on there, or take ssl-mode out of the URL",
        False,
    ),
    1184: ("the server on {host}:{port} ends new sessions ({said})", "see there: SELECT @@init_connect", False),
    2013: _CLOSES,
    2006: _CLOSES,
}
