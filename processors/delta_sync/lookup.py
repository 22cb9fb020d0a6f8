"""Look-ups that are ready-made: in a service over HTTP, in an SQL database, in Redis.

    from delta_sync import Pipeline, lookup

    movies = Pipeline("movies")
    ratings = movies.lookup(ttl="10m")(lookup.http("ratings", "http://ratings/bulk", key="movie_id"))

Each is a function from keys to answers, as one would write it by hand: what is said about batches, caches, retries is
said to `Pipeline.lookup`. They connect when they are first called (and import their clients when they are declared:
every processor imports this module), and may be called from several threads. URLs and
headers hold secrets as references, `${env:NAME}` or `${file:/path}`.

What the other side says that it cannot be asked now is LookupBusy; everything else that it says is lasting.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from urllib.parse import quote

from delta_sync.errors import LookupBusy, ProcessorError, UsageError
from delta_sync.secrets import redact, resolve, resolve_url
from delta_sync.values import from_json, scalar_text, to_json

if TYPE_CHECKING:
    import requests
    import sqlalchemy as sa

Function = Callable[[list[Any]], Mapping[Any, Any]]
Form = Literal["json", "text", "hash"]

CONNECTIONS_MOST = 64  # to one service: as many as a look-up may well have calls at once
SECONDS = 5.0  # for an answer of a database: below the look-up's own `timeout` of 10 s


def _named(name: str, function: Function) -> Function:
    if not name.isidentifier():
        raise UsageError(f"A look-up's name is one as in Python, such as ratings, and not {name!r}.")
    function.__name__ = function.__qualname__ = name
    return function


def http(
    name: str,
    url: str,
    *,
    key: str,
    items: str | None = None,
    send: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = SECONDS,
) -> Function:
    """Return a look-up that posts the keys to `url` as a JSON list and takes a list of objects as the answer.

    `key` is the field of such an object that says for which key it is; an object that is not about any is left out,
    and so a key without an object has no answer. `send` is the field of a JSON object in which the keys are sent, and
    `items` the one in which the list comes, where these are not bare. With `{keys}` in `url` it is a GET, the keys
    joined by commas: then take a small `batch`.

    An answer of another form is LookupBusy, like a 503: it is about no key, so nothing becomes a dead letter by it.
    """
    import requests
    from requests.adapters import HTTPAdapter

    local = threading.local()

    def session() -> requests.Session:
        if not hasattr(local, "session"):
            made = requests.Session()
            for scheme in ("http://", "https://"):
                made.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS_MOST))
            made.headers.update({of: resolve(value) for of, value in (headers or {}).items()})
            local.session = made
        return cast("requests.Session", local.session)

    target = functools.cache(lambda: resolve_url(url))

    def ask(keys: list[Any]) -> Mapping[Any, Any]:
        by_text = {scalar_text(one): one for one in keys}
        if "{keys}" in url:
            joined = ",".join(quote(text, safe="") for text in by_text)
            reply = session().get(target().replace("{keys}", joined), timeout=timeout_s)
        else:
            body = to_json(keys if send is None else {send: keys})
            reply = session().post(target(), data=body, headers={"Content-Type": "application/json"}, timeout=timeout_s)
        reply.raise_for_status()
        return _by_key(reply.content, by_text)

    def _by_key(content: bytes, by_text: Mapping[str, Any]) -> Mapping[Any, Any]:
        try:
            answer = from_json(content)
            listed = cast("Sequence[Mapping[str, Any]]", answer if items is None else answer[items])
            if not isinstance(listed, list):
                raise TypeError("it has no list")
            found = {by_text.get(scalar_text(one[key])): one for one in listed}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise LookupBusy(f"the answer has not the form that it should have ({type(error).__name__})") from error
        found.pop(None, None)
        return found

    return _named(name, ask)


def sql(name: str, url: str, query: str, *, key: str, many: bool = False) -> Function:
    """Return a look-up in a database that SQLAlchemy can talk to: one query for a batch.

    `query` has `:keys` where the list of keys is to stand, as in `SELECT id, stars FROM rating WHERE id IN :keys`;
    `key` is the column of the result that says for which key a row is. The answer is the row as a dict, or with `many`
    the list of all rows for the key.
    """
    import sqlalchemy as sa
    from sqlalchemy import exc

    if ":keys" not in query:
        raise UsageError(f"Look-up {name}: the query has no :keys; write it like … WHERE id IN :keys.")
    if "${" not in url:  # a reference is resolved when the look-up is asked for the first time
        try:
            sa.make_url(url)
        except (exc.ArgumentError, ValueError):
            raise UsageError(
                f"Look-up {name}: its URL is none; write it like postgresql://user@host/database."
            ) from None
    statement = sa.text(query).bindparams(sa.bindparam("keys", expanding=True))

    @functools.cache
    def engine() -> sa.Engine:
        parsed = sa.make_url(resolve_url(url))
        driver = {
            **dict.fromkeys(("postgresql", "postgres"), "postgresql+psycopg"),
            **{kind: f"{kind}+pymysql" for kind in ("mariadb", "mysql")},
        }
        made = parsed.set(drivername=driver.get(parsed.drivername, parsed.drivername))
        pool: dict[str, Any] = {} if made.drivername == "sqlite" else {"pool_size": CONNECTIONS_MOST}
        return sa.create_engine(made, pool_pre_ping=True, **pool)

    opening = threading.Lock()

    def ask(keys: list[Any]) -> Mapping[Any, Any]:
        with opening:
            opened = engine()
        try:
            with opened.connect() as connection:
                rows = [dict(row) for row in connection.execute(statement, {"keys": keys}).mappings()]
        except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
            raise LookupBusy(f"the database does not answer: {redact(str(getattr(error, 'orig', error)))}") from error
        if rows and key not in rows[0]:
            raise ProcessorError(f"Look-up {name}: the result has no column {key}; it has {', '.join(rows[0])}.")
        if not many:
            return {row[key]: row for row in rows}
        found: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(row[key], []).append(row)
        return found

    return _named(name, ask)


def redis(
    name: str,
    url: str,
    template: str,
    *,
    form: Form = "json",
    cluster: bool = False,
) -> Function:
    """Return a look-up in Redis: the values of `template`, such as `rating:{key}`, for a batch in one round trip.

    `form` says what they are: JSON, as Delta's own documents are by default; text; or hashes, whose answer is a dict of
    texts. A key that is not there has no answer.
    """
    import redis as redis_client
    from redis import exceptions as redis_errors

    busy = (
        redis_errors.ConnectionError,  # of which BusyLoadingError is one
        redis_errors.TimeoutError,
        redis_errors.TryAgainError,
        redis_errors.ClusterDownError,
        redis_errors.MasterDownError,
        redis_errors.ReadOnlyError,
    )
    if "{key}" not in template:
        raise UsageError(f"Look-up {name}: the template has no {{key}}; write it like rating:{{key}}.")
    if form not in get_args(Form):
        raise UsageError(f"Look-up {name}: form is one of {', '.join(get_args(Form))}, not {form!r}.")

    @functools.cache
    def client() -> Any:
        cls: Any = redis_client.RedisCluster if cluster else redis_client.Redis
        options: dict[str, Any] = {} if cluster else {"max_connections": CONNECTIONS_MOST}
        timeouts = {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
        return cls.from_url(resolve_url(url), decode_responses=form != "json", **timeouts, **options)

    opening = threading.Lock()

    def ask(keys: list[Any]) -> Mapping[Any, Any]:
        try:
            with opening:
                pipeline = client().pipeline(**({} if cluster else {"transaction": False}))
            for one in keys:
                place = template.replace("{key}", scalar_text(one))
                (pipeline.hgetall if form == "hash" else pipeline.get)(place)
            values = pipeline.execute()
        except busy as error:
            raise LookupBusy(f"Redis does not answer: {redact(str(error))}") from error
        there = ((one, value) for one, value in zip(keys, values, strict=True) if value not in (None, {}))
        return {one: from_json(value) if form == "json" else value for one, value in there}

    return _named(name, ask)
