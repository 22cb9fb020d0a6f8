"""Schemas by their id, from a registry with Confluent's API (Apicurio has it under `/apis/ccompat/v7`).

An id never changes its meaning, so what was read once is kept for the life of the process: records whose ids are known
go on being decoded while the registry is away.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, cast
from urllib.parse import quote, urlsplit

import requests
from requests.auth import AuthBase, HTTPBasicAuth

from delta_sync.errors import CheckFailed, Problem, RegistryBusy, SchemaUnfit, SchemaUnknown
from delta_sync.kafka.refusals import is_about_certificates
from delta_sync.secrets import redact, resolve, resolve_url
from delta_sync.spec import RegistrySpec

Schema = dict[str, Any]  # an Avro schema of a record, as JSON has it

TIMEOUT_S = 10.0  # to connect, and between two pieces of a reply: a schema is some kilobytes, so this is not load
WHERE = "schema registry"

_CA_FILE = "correct kafka.registry.ca_file, which is to name the authority of its certificate"
_BUSY = frozenset({408, 425, 429})  # of 4xx; every 5xx is, too


class SchemaRegistry:
    """A client of one registry, with one session. Used by one thread.

    Secrets are resolved when it is made: raises UsageError for one that cannot be.
    """

    def __init__(self, spec: RegistrySpec, timeout_s: float = TIMEOUT_S) -> None:
        self._url = resolve_url(spec.url).rstrip("/")
        self._who = f"the schema registry at {urlsplit(self._url).netloc.rpartition('@')[2]}"
        self._timeout_s = timeout_s
        self._ca_file = spec.ca_file
        self._session = requests.Session()
        self._session.headers["Accept"] = "application/vnd.schemaregistry.v1+json, application/json"
        if spec.token is not None:
            self._session.auth = _Bearer(resolve(spec.token))
        elif spec.username is not None and spec.password is not None:
            # As bytes: requests would encode them as Latin-1.
            self._session.auth = HTTPBasicAuth(spec.username.encode(), resolve(spec.password).encode())
        self._known: dict[int, Schema] = {}

    def schema(self, schema_id: int) -> Schema:
        """Return the Avro schema of an id, parsed as JSON. It is the registry's own copy: do not change it.

        Raises RegistryBusy and SchemaUnknown, after which the same call may be made again; SchemaUnfit for one that
        cannot be read by itself, or is no Avro; CheckFailed when the registry refuses this client.
        """
        known = self._known.get(schema_id)
        if known is None:
            known = self._known[schema_id] = self._fetch(schema_id)
        return known

    def register(self, subject: str, schema: str) -> int:
        """Register an Avro schema under a subject, and return its id: the same for the same schema.

        Raises RegistryBusy; CheckFailed when the registry refuses it: another, incompatible schema has the subject.
        """
        content = {"Content-Type": "application/vnd.schemaregistry.v1+json"}
        path = f"/subjects/{quote(subject, safe='')}/versions"
        reply = self._request("POST", path, json.dumps({"schema": schema}), content, (200, 409, 422))
        if reply.status_code != 200:
            what = f"{self._who} refuses the schema of {subject}: {redact(reply.text[:500])}"
            raise CheckFailed([Problem(WHERE, what, "give the topic another name, or remove that subject")])
        body = self._body(reply)
        if not isinstance(body, dict) or "id" not in body:
            raise CheckFailed([self._not_a_registry("its reply has no id")])
        return int(cast("dict[str, Any]", body)["id"])

    def check(self) -> list[Problem]:
        """Return what keeps this client from reading schemas: wrong address, credentials, no registry there."""
        try:
            reply = self._get("/schemas/types")
            if reply.status_code == 404:
                return [self._not_a_registry("it answers 404 for /schemas/types")]
            self._body(reply)
        except CheckFailed as error:
            return list(error.problems)
        except RegistryBusy as error:
            return [Problem(WHERE, str(error), "check kafka.registry.url, and that the registry is running")]
        return []

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def _fetch(self, schema_id: int) -> Schema:
        reply = self._get(f"/schemas/ids/{schema_id}")
        if reply.status_code == 404:
            raise SchemaUnknown(
                f"{self._who} has no schema {schema_id}, which records refer to: if it is being restored this passes; "
                "otherwise restore it from a backup, or check that kafka.registry.url is the API that Debezium "
                "Server's registry has for clients of Confluent's (Apicurio: …/apis/ccompat/v7).",
                schema_id,
            )
        body = self._body(reply)
        if not isinstance(body, dict) or "schema" not in body:
            raise CheckFailed([self._not_a_registry("its reply has no schema")])
        return _avro(schema_id, cast("dict[str, Any]", body))

    def _get(self, path: str) -> requests.Response:
        """Return a reply with status 200 or 404."""
        return self._request("GET", path, None, None, (200, 404))

    def _request(
        self, method: str, path: str, data: str | None, headers: Mapping[str, str] | None, expected: Collection[int]
    ) -> requests.Response:
        """Return a reply with one of the statuses that are expected."""
        try:
            url = f"{self._url}{path}"
            reply = self._session.request(
                method, url, data=data, headers=headers, timeout=self._timeout_s, verify=self._ca_file
            )
        except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
            raise CheckFailed([self._not_a_registry(redact(str(error)))]) from error
        except requests.exceptions.SSLError as error:
            if not is_about_certificates(str(error)):
                raise RegistryBusy(f"{self._who} cannot be reached: {redact(str(error))}") from error
            reason: object = getattr(error.args[0], "reason", error)  # without what was asked
            what = f"the certificate of {self._who} does not hold: {redact(str(reason))}"
            raise CheckFailed([Problem(WHERE, what, _CA_FILE)]) from error
        except OSError as error:
            if not isinstance(error, requests.RequestException):  # requests' own, for a file that is not there
                raise CheckFailed([Problem(WHERE, f"{self._ca_file} cannot be read as ca_file", _CA_FILE)]) from error
            raise RegistryBusy(f"{self._who} cannot be reached: {redact(str(error))}") from error
        status = reply.status_code
        if status in (401, 403):
            what = f"{self._who} answers {status}"
            fix = "check kafka.registry.username and password, or token"
            if status == 403:
                fix = "let the client of kafka.registry.username or token read schemas"
            raise CheckFailed([Problem(WHERE, what, fix)])
        if status >= 500 or status in _BUSY:
            raise RegistryBusy(f"{self._who} is not available: status {status}", _retry_after_s(reply))
        if status not in expected:
            raise CheckFailed([self._not_a_registry(f"it answers {status} for {path}")])
        return reply

    def _body(self, reply: requests.Response) -> object:
        try:
            return cast("object", reply.json())
        except ValueError as error:
            raise CheckFailed([self._not_a_registry("its reply is not JSON")]) from error

    def _not_a_registry(self, why: str) -> Problem:
        fix = "set kafka.registry.url to the API for clients of Confluent's registry (Apicurio: …/apis/ccompat/v7)"
        return Problem(WHERE, f"what answers as {self._who} is none: {why}", fix)


class _Bearer(AuthBase):
    """As an `auth`, because a `.netrc` would replace a header."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        r.headers["Authorization"] = f"Bearer {self._token}"
        return r


def _avro(schema_id: int, body: dict[str, Any]) -> Schema:
    """Return the schema of a reply. Raises SchemaUnfit."""
    kind = body.get("schemaType", "AVRO")
    if kind != "AVRO":
        raise SchemaUnfit(
            f"Schema {schema_id} is {kind}, not Avro: this record is not of Delta's connector, or its "
            "debezium.format.key or .value was changed; they must be avro."
        )
    if body.get("references"):
        names = ", ".join(str(reference.get("subject")) for reference in body["references"])
        raise SchemaUnfit(
            f"Schema {schema_id} refers to other schemas ({names}), so it cannot be read by itself: the connector "
            "must write with debezium.format.apicurio.registry.dereference-schema=true, as Delta configures it."
        )
    try:
        schema: object = json.loads(body["schema"])
    except (TypeError, ValueError) as error:
        raise SchemaUnfit(f"Schema {schema_id} is not JSON: {error}.") from error
    if not isinstance(schema, dict) or cast("Schema", schema).get("type") != "record":
        raise SchemaUnfit(f"Schema {schema_id} is not one of a record: it is not of Debezium's events.")
    return cast("Schema", schema)


def _retry_after_s(reply: requests.Response) -> float | None:
    """Return what the registry wishes; None for the form with a date, which nobody sends here."""
    text = reply.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None
