"""Documents as a search store takes them: the lines of a bulk, and what is Delta's in a document. All of it is pure."""

from __future__ import annotations

from typing import Any

import orjson

from delta_sync.changes import Outcome, Write, rejected
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.sinks.search_mapping import DELETED, OWN_PREFIX
from delta_sync.tables import key_text
from delta_sync.values import to_json

MAX_ID_BYTES = 512  # the stores' limit; one longer id fails a whole bulk
MAX_VERSION = (1 << 63) - 1  # the stores' limit

# Fields of the stores' own: some of them refuse a document that has one, others take it and cannot search it.
_METADATA = frozenset(
    {"_id", "_index", "_type", "_source", "_size", "_doc_count", "_field_names", "_ignored", "_routing", "_meta",
     "_tier", "_nested_path", "_seq_no", "_primary_term", "_feature", "_tsid", VERSION_FIELD}
)  # fmt: skip


def id_problem(id_: str) -> str | None:
    """Return why a text cannot be an id, if so."""
    if not id_:
        return "the key is empty, and an id cannot be"
    try:
        size = len(id_.encode())
    except UnicodeEncodeError:
        return "the key is no valid UTF-8"
    if size > MAX_ID_BYTES:
        return f"the key has {size} bytes as text; an id has at most {MAX_ID_BYTES}"
    return None


def bulk_entry(write: Write, now_ms: int) -> bytes | Outcome:
    """Return the two lines of a bulk that a write is, or its outcome if no store would take it."""
    id_ = key_text(write.key)
    if problem := id_problem(id_):
        return rejected(problem)
    if not 0 <= write.version <= MAX_VERSION:  # like a long id, it would fail its whole bulk
        return rejected(f"version {write.version} is not a positive number of 63 bits")
    if write.document is None:
        own = b'"_delta_deleted":true,"_delta_deleted_at":%d' % now_ms
        return _index_lines(id_, write.version, b"{}", own)
    if not _METADATA.isdisjoint(write.document):
        name = next(name for name in write.document if name in _METADATA)
        return rejected(f"the field {name} is the store's own; give the document's field another name")
    try:
        body = to_json(write.document)
    except (TypeError, RecursionError) as error:
        return rejected(f"the document cannot be written as JSON: {error}")
    if _OWN_PREFIX_JSON in body:  # no document at all, as a rule, so that its fields need not be looked at
        for name in write.document:
            if name.startswith(OWN_PREFIX):
                return rejected(f"fields whose names begin with {OWN_PREFIX} are Delta's own, and {name} does")
    return _index_lines(id_, write.version, body)


_OWN_PREFIX_JSON = f'"{OWN_PREFIX}'.encode()


def _index_lines(id_: str, version: int, body: bytes, own: bytes = b"") -> bytes:
    fields = b'"_delta_version":%d' % version
    if own:
        fields += b"," + own
    rest = body[1:] if body == b"{}" else b"," + body[1:]
    return b'{"index":{"_id":%b,"version":%d,"version_type":"external_gte"}}\n{%b%b\n' % (
        orjson.dumps(id_),
        version,
        fields,
        rest,
    )


def delete_entry(id_: str, version: int) -> bytes:
    """Return the line of a bulk that deletes a document for good, unless it is newer than `version`."""
    return b'{"delete":{"_id":%b,"version":%d,"version_type":"external_gte"}}\n' % (orjson.dumps(id_), version)


def content_of(source: dict[str, Any]) -> dict[str, Any] | None:
    """Return a document without Delta's fields; None for a tombstone."""
    if source.get(DELETED):
        return None
    return {name: value for name, value in source.items() if not name.startswith(OWN_PREFIX)}
