"""Connecting to PostgreSQL, and one sentence for each way in which that fails."""

from __future__ import annotations

import re
from typing import NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from delta_sync.errors import CheckFailed, Problem, SourceBusy, UsageError
from delta_sync.secrets import redact, resolve, resolve_url
from delta_sync.spec import SourceSpec
from delta_sync.urls import split_url

CONNECT_TIMEOUT_S = 10  # a firewall that drops packets must not look like a hung command
DEFAULT_PORT = 5432
# A host that is gone without a word is noticed within a minute; the kernel's defaults would take two hours.
KEEP_ALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}


class Server(NamedTuple):
    """Whom an error message is about."""

    user: str
    host: str
    port: int
    database: str


def server_of(source: SourceSpec) -> Server:
    """Return what a source's URL names. Raises UsageError when its port is no number."""
    parts = split_url(source.url, "source.url")
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:  # several hosts, or a reference
        raise UsageError("source.url: the port must be a number between 1 and 65535, of one host.") from None
    user = parts.username or ""
    return Server(user, parts.hostname or "localhost", port, parts.path.lstrip("/") or user)


def connect(source: SourceSpec, application_name: str = "delta") -> psycopg.Connection:
    """Return an autocommit connection to a source.

    Raises SourceBusy when it will pass by itself (refused, starting, too many connections), CheckFailed when somebody
    has to change something (password, database, TLS), and UsageError when the URL or a reference is wrong.
    """
    if source.kind != "postgresql":
        what = f"{source.kind}:// is not a source that Delta knows" if source.kind else "it has no scheme"
        raise UsageError(f"source.url: {what}; write it as postgresql://user@host:port/database.")
    server = server_of(source)
    password = None if source.password is None else resolve(source.password)
    try:
        url = resolve_url(source.url)
        given = conninfo_to_dict(url)
        defaults: dict[str, str | int] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": application_name,
            **KEEP_ALIVE,
        }
        more = {name: value for name, value in defaults.items() if name not in given}
        return psycopg.connect(make_conninfo(url, password=password, **more), autocommit=True)
    except psycopg.OperationalError as error:
        problem, passing = explain(str(error), server)
        if passing:
            raise SourceBusy(str(problem)) from error
        raise CheckFailed([problem]) from error
    except psycopg.ProgrammingError as error:
        raise UsageError(f"source.url: {redact(_first_line(str(error)))}.") from None


def explain(message: str, server: Server) -> tuple[Problem, bool]:
    """Return what libpq's message means and what to change, and whether it will pass by itself.

    Pure. libpq gives no error codes for a connection that fails, so its (untranslated) texts are all there is. A text
    that is not known is handed on as it is, and counts as passing: a pipeline that waits, and says for what, is better
    than one that gave up because a server was restarting.
    """
    names = server._asdict()
    for pattern, what, fix, passing in _MEANINGS:
        if re.search(pattern, message, re.IGNORECASE):
            return Problem("source", what.format(**names), fix.format(**names)), passing
    said = redact(_first_line(message))
    what = f"cannot connect to {server.host}:{server.port}: {said}"
    return Problem("source", what, "correct source.url if it stays so"), True


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "no reason given"


# (pattern, what, fix, will it pass by itself?), most specific first.
_MEANINGS: tuple[tuple[str, str, str, bool], ...] = (
    (
        r"closed the connection unexpectedly|Connection reset|Broken pipe|SYSCALL error|unexpected eof",
        "{host}:{port} closes connections at once: PostgreSQL is ending or starting there, or something else answers",
        "wait until it accepts connections; if it stays so, correct host and port in source.url",
        True,
    ),
    (
        r"password authentication failed|SCRAM",
        "the password of role {user} is wrong, or there is no such role",
        "correct the password, or type: ALTER ROLE {user} PASSWORD '…'",
        False,
    ),
    (
        r"no password supplied",
        "{host}:{port} wants a password for role {user}, and none is given",
        "give it in the URL, or as source.password in pipeline.yaml: a reference such as ${{env:SOURCE_PASSWORD}}",
        False,
    ),
    (r'role ".*" does not exist', "there is no role {user} on {host}:{port}", "correct the user in source.url", False),
    (
        r'database ".*" does not exist',
        "there is no database {database} on {host}:{port}",
        "correct the database in source.url",
        False,
    ),
    (
        r"permission denied for database",
        "role {user} may not connect to database {database}",
        "type: GRANT CONNECT ON DATABASE {database} TO {user}",
        False,
    ),
    (
        r"no pg_hba\.conf entry",
        "pg_hba.conf on {host} does not let role {user} connect to database {database} from this machine",
        "add a line for it there (and with sslmode=require in the URL, if the line says hostssl)",
        False,
    ),
    (
        r"server does not support SSL",
        "{host}:{port} does not offer TLS, but sslmode in source.url demands it",
        "switch TLS on there, or take sslmode out of the URL",
        False,
    ),
    (
        r"certificate|SSL error|sslrootcert|sslmode",
        "TLS with {host}:{port} fails, because its certificate cannot be verified",
        "name the authority's file with sslrootcert=… in source.url, or correct sslmode",
        False,
    ),
    (
        r"resolve host|name resolution|could not translate host name|Name or service not known|nodename nor servname",
        "there is no host {host}",
        "correct the host in source.url, unless its name is only away for a moment",
        True,
    ),
    (
        r"Connection refused|No such file or directory",
        "nothing listens on {host}:{port}",
        "start PostgreSQL there, or correct host and port in source.url",
        True,
    ),
    (
        r"timeout expired|timed out|No route to host|Network is unreachable",
        "{host}:{port} does not answer",
        "look whether the host is up, is PostgreSQL, and whether a firewall lets this machine through",
        True,
    ),
    (
        r"starting up|shutting down|in recovery mode|not yet accepting connections",
        "PostgreSQL on {host}:{port} is starting up or shutting down",
        "wait until it accepts connections",
        True,
    ),
    (
        r"too many clients|too many connections|connection slots are reserved",
        "PostgreSQL on {host}:{port} has no connection left",
        "raise max_connections, or end connections that nobody needs",
        True,
    ),
    (
        r"invalid response to SSL|expected authentication request",
        "something answers on {host}:{port}, but it does not speak PostgreSQL's protocol",
        "correct host and port in source.url",
        False,
    ),
)
