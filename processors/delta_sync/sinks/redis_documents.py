"""Documents as Redis holds them: strings of JSON that begin with the version, and hashes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import orjson

from delta_sync.sinks.base import VERSION_FIELD, Stored
from delta_sync.values import JSON_OPTIONS, Document, from_json, json_default
from delta_sync.versions import VERSION_DIGITS

MAX_DOCUMENT_BYTES = 512 * 1000 * 1000  # below Redis's proto-max-bulk-len (512 MiB), above which it hangs up


class NotStorable(Exception):
    """Why a document cannot be stored."""


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value, json_default, JSON_OPTIONS)  # `to_json`, whose call costs as much as itself
    except TypeError as error:  # orjson's own error is one
        raise NotStorable(f"the document cannot be written as JSON: {error.__cause__ or error}") from error


def _refuse_reserved(document: Document) -> None:
    if VERSION_FIELD in document:
        raise NotStorable(f"the field {VERSION_FIELD} is Delta's own; give the document's field another name")


def _refuse_large(size_bytes: int) -> None:
    if size_bytes > MAX_DOCUMENT_BYTES:
        raise NotStorable(f"the document has {size_bytes:,} bytes, and Redis takes {MAX_DOCUMENT_BYTES:,} at most")


def json_args(version: int, document: Document | None) -> list[bytes]:
    """Return a write as the JSON scripts take it."""
    if document is None:
        return [b"%019d" % version]
    if VERSION_FIELD in document:
        _refuse_reserved(document)
    body = _json(document)
    if len(body) > MAX_DOCUMENT_BYTES:
        _refuse_large(len(body))
    return [_head(version) + body[1:]] if len(body) > 2 else [b'{"_version":"%019d"}' % version]


@lru_cache(maxsize=8)  # of a dump's chunks under way: all of a chunk's rows have one version
def _head(version: int) -> bytes:
    return b'{"_version":"%019d",' % version


def hash_args(version: int, document: Document | None) -> list[bytes]:
    """Return a write as the hash scripts take it."""
    if document is None:
        return [b"%019d" % version, b"-1"]
    _refuse_reserved(document)
    pairs: list[bytes] = []
    for name, value in document.items():
        if type(value) is str:
            pairs += (_utf8(name), _utf8(value))
            continue
        text = _json(value)
        if text[:1] == b'"':  # dates and the like
            text = orjson.loads(text).encode()
        if text != b"null":
            pairs += (_utf8(name), text)
    _refuse_large(max(map(len, pairs), default=0))
    return [b"%019d" % version, b"%d" % len(pairs), *pairs]


def _utf8(text: object) -> bytes:
    if not isinstance(text, str):
        raise NotStorable(f"a document's field names are text, and {text!r} is a {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise NotStorable("the document holds text that is not valid Unicode") from error


VERSION_PLACE = slice(13, 32)  # in a string, behind {"_version":"
_VERSION_END = 33  # behind the quotation mark


def is_written_so(body: bytes, document: Document) -> bool:
    """Tell whether a string is what Delta would write for a document, whatever its version."""
    try:
        (written,) = json_args(1, document)
    except NotStorable:
        return False
    return (
        body[_VERSION_END:] == written[_VERSION_END:]
        and body.startswith(b'{"_version":"')
        and body[VERSION_PLACE].isdigit()
        and body[32:33] == b'"'
    )


def from_string(body: bytes) -> Stored | None:
    """Return what a string holds; None if Delta did not write it."""
    version = body[VERSION_PLACE]
    if not body.startswith(b'{"_version":"') or len(version) != VERSION_DIGITS or not version.isdigit():
        return None
    try:
        document: dict[str, Any] = from_json(body)
    except ValueError:
        return None
    del document[VERSION_FIELD]
    return Stored(int(version), document)


def from_hash(flat: Sequence[bytes]) -> Stored | None:
    """Return what a hash holds; None if Delta did not write it."""
    # What Delta wrote is text; somebody may have added a field that is not.
    texts = [text.decode(errors="backslashreplace") for text in flat]
    fields: dict[str, Any] = dict(zip(texts[::2], texts[1::2], strict=True))
    version = fields.pop(VERSION_FIELD, "")
    if len(version) != VERSION_DIGITS or not version.isdecimal():
        return None
    return Stored(int(version), fields)
