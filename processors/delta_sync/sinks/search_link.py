"""The connection to Elasticsearch or OpenSearch: what the URL says, requests, and what answers mean."""

from __future__ import annotations

import base64
import gzip
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

import orjson
import requests
import requests.adapters
from pydantic import Field
from requests.utils import get_environ_proxies

from delta_sync.errors import SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import LoginOptions
from delta_sync.urls import split_url
from delta_sync.values import from_json

CONNECT_TIMEOUT_S = 5.0  # two lost SYNs
READ_TIMEOUT_S = 60.0  # above `BULK_TIMEOUT`, so that the store's own answer comes first
CONNECTIONS = 32  # kept open; more threads than that apply to one sink nowhere


class LinkOptions(LoginOptions):
    """What a search sink may say about its connection."""

    api_key: str | None = Field(
        default=None, description="API key, encoded, instead of user and password: a reference."
    )
    verify_tls: bool = Field(default=True, description="Whether the server's certificate is verified.")
    ca_file: str | None = Field(default=None, description="Certificates of the authorities to trust, in PEM.")
    compress: bool = Field(default=False, description="Whether requests are compressed: for slow networks.")


class Product(NamedTuple):
    """What answers: `elasticsearch` or `opensearch`, and its version."""

    name: str
    version: tuple[int, ...]


class Reply(NamedTuple):
    """What the store has answered."""

    status: int
    body: Any  # JSON; None if it is none

    @property
    def reason(self) -> str:
        """What the store says is wrong, in one sentence."""
        body: object = self.body
        error = cast("dict[str, Any]", body).get("error") if isinstance(body, dict) else None
        return f"status {self.status}" if error is None else reason_of(error)


def parse_url(name: str, url: str, options: LinkOptions) -> tuple[str, str | None, dict[str, str]]:
    """Return the address without credentials, the name in its path if any, and the headers of authentication.

    Raises UsageError, which quotes no credentials.
    """
    parts = split_url(url, f"sink {name}: the URL")
    if "," in parts.netloc.rpartition("@")[2]:
        raise UsageError(f"sink {name}: the URL names several hosts; name one, such as a load balancer.")
    port = parts.port
    if not parts.hostname:
        raise UsageError(f"sink {name}: the URL must name a host, such as http://search:9200/movies.")
    if parts.query or parts.fragment:
        raise UsageError(f"sink {name}: the URL must end with the index's name; options go beside it.")
    index = unquote(parts.path).strip("/")
    if "/" in index:
        raise UsageError(f"sink {name}: the URL's path is the index's name, so it cannot be {index!r}.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    base = f"{parts.scheme.rpartition('+')[2]}://{host}" + (f":{port}" if port else "")
    username = options.username or unquote(parts.username or "")
    password = options.password or unquote(parts.password or "")
    if options.api_key:
        if username or password:
            raise UsageError(f"sink {name}: give either api_key, or user and password.")
        return base, index or None, {"Authorization": f"ApiKey {options.api_key}"}
    if username:
        credentials = base64.b64encode(f"{username}:{password}".encode()).decode()
        return base, index or None, {"Authorization": f"Basic {credentials}"}
    return base, index or None, {}


class Link:
    """The connections to one store. Constructing it connects to nothing."""

    def __init__(self, name: str, url: str, options: LinkOptions) -> None:
        """Raise UsageError for a URL that cannot be meant."""
        self._options = options
        self._base, self.index, self._auth = parse_url(name, url, options)
        self.who = f"the search store at {urlsplit(self._base).netloc}"  # for messages
        self._lock = threading.Lock()
        self._session: requests.Session | None = None
        self._product: Product | None = None

    def close(self) -> None:
        """Close the connections. Idempotent."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _connected(self) -> requests.Session:
        """Return the session, whose pool keeps connections open and is safe for threads."""
        with self._lock:
            if self._session is None:
                session = requests.Session()
                session.trust_env = False  # else each request looks for proxies and a .netrc, which overrides `auth`
                session.proxies = get_environ_proxies(self._base)
                session.headers.update({"Accept": "application/json", **self._auth})
                session.verify = self._options.ca_file or self._options.verify_tls
                adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=CONNECTIONS)
                session.mount(self._base, adapter)
                self._session = session
            return self._session

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a request (bytes: lines of JSON) and return the reply. Raises SinkBusy and SinkRefused.

        Replies that may concern only this request (400, 404, 409, 413) are returned.
        """
        headers: dict[str, str] = {}
        data = body if isinstance(body, bytes) or body is None else orjson.dumps(body)
        if data is not None:
            headers["Content-Type"] = "application/x-ndjson" if data is body else "application/json"
            if self._options.compress:
                headers["Content-Encoding"] = "gzip"
                data = gzip.compress(data, compresslevel=1)  # the fastest, and JSON shrinks to a fifth all the same
        try:
            response = self._connected().request(
                method,
                self._base + quote(path),
                params=params,
                data=data,
                headers=headers,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                allow_redirects=False,
            )
        except ValueError:  # from None: its text may quote what somebody logs in with
            raise SinkRefused(f"{self.who}: its address or the credentials hold what HTTP does not take") from None
        except requests.exceptions.SSLError as error:
            raise SinkRefused(f"{self.who}: its certificate does not hold ({brief(error)}); set `ca_file`") from error
        except requests.exceptions.RequestException as error:
            raise SinkBusy(f"{self.who} cannot be reached: {brief(error)}") from error
        except OSError as error:  # requests' own look whether it is there
            raise SinkRefused(f"{self.who}: the file {self._options.ca_file} (`ca_file`) cannot be read") from error
        try:
            parsed = from_json(response.content) if response.content else None
        except ValueError:
            parsed = None
        reply = Reply(response.status_code, parsed)
        if (reply.status < 300 or reply.status == 404) and not isinstance(parsed, dict):
            # A load balancer, say, without a store behind it.
            raise SinkBusy(
                f"{self.who} cannot be reached: what answers there sends no JSON object (status {reply.status})"
            )
        if reply.status < 300 or reply.status in (400, 404, 409, 413):
            return reply
        if reply.status == 401:
            raise SinkRefused(f"{self.who} refuses user and password, or the API key (401)")
        if reply.status in (408, 429) or reply.status >= 500 or is_block(reply.reason):
            raise SinkBusy(f"{self.who} is busy: {reply.reason}", retry_after_s(response.headers.get("Retry-After")))
        raise SinkRefused(f"{self.who} refuses {method} {path}: {reply.reason}")

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Any:
        """Send a request that must succeed, and return the body of its reply."""
        return self.expect(self.request(method, path, body, params))

    def expect(self, reply: Reply) -> Any:
        """Return the body of a reply that must have succeeded."""
        if reply.status < 300:
            return reply.body
        raise SinkRefused(f"{self.who} refuses: {reply.reason}")

    def product(self) -> Product:
        """Return what answers, which is asked once."""
        if self._product is None:
            about: object = self.ask("GET", "/").get("version")
            if not isinstance(about, dict) or "number" not in about:
                raise SinkRefused(f"{self.who} is neither Elasticsearch nor OpenSearch; correct its URL")
            said = cast("dict[str, Any]", about)
            version = tuple(int(part) for part in re.findall(r"\d+", str(said["number"]))[:2])
            self._product = Product(said.get("distribution", "elasticsearch"), version)
        return self._product


def is_block(reason: str) -> bool:
    """Tell whether writes are blocked: by a full disk (flood stage), by an operator, or while the cluster forms."""
    return "cluster_block_exception" in reason


def reason_of(error: Any) -> str:
    """Return a store's error as one sentence: its type, its reason and the causes beneath."""
    parts: list[str] = []
    while isinstance(error, dict):
        about = cast("dict[str, Any]", error)
        parts.append(": ".join(str(about[key]) for key in ("type", "reason") if about.get(key)))
        error = about.get("caused_by")
    return "; ".join(parts) if parts else str(error)


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header; a date in it is ignored."""
    return float(header) if header and header.isdigit() else None


def brief(error: requests.exceptions.RequestException) -> str:
    """Return what went wrong, without the URL and the chain of classes around it."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S} s"
    if isinstance(error, requests.exceptions.Timeout):
        return f"no answer within {READ_TIMEOUT_S} s"
    patterns = r"\[Errno -?\d+\] ([^'\")]+)|(certificate verify failed: [^(]+)|([A-Z][a-z ]+closed connection[a-z ]*)"
    found = re.search(patterns, str(error))
    return next((group.strip() for group in found.groups() if group), "") if found else type(error).__name__
