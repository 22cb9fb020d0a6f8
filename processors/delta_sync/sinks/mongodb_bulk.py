"""Bulks of operations, and what MongoDB's answers to them mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pymongo import DeleteOne, ReplaceOne, UpdateOne
from pymongo.errors import BulkWriteError, ConnectionFailure, OperationFailure

from delta_sync.changes import STALE, Outcome, rejected
from delta_sync.errors import SinkBusy
from delta_sync.sinks.mongodb_documents import UNENCODABLE, unfit
from delta_sync.sinks.mongodb_link import BUSY_CODES, REFUSED_CODES, Collection, Link
from delta_sync.values import Document

Operation = ReplaceOne[dict[str, Any]] | UpdateOne | DeleteOne

_DUPLICATE_KEY = 11000


def send(
    link: Link, collection: Collection, operations: Mapping[int, Operation], content: Callable[[int], Document]
) -> dict[int, Outcome]:
    """Send operations, by their write's index, and return the outcome of each that was not applied.

    `content` gives an index's document again, to find out why it cannot be encoded.
    """
    outcomes: dict[int, Outcome] = {}
    pending = dict(operations)
    for attempt in range(2):
        duplicates: dict[int, Operation] = {}
        for index, error in _bulk_write(link, collection, pending, content, outcomes):
            if error.get("code") != _DUPLICATE_KEY:
                outcomes[index] = _outcome_of(link, error)
            elif not _is_about_id(error):
                outcomes[index] = rejected(f"a unique index forbids it: {error.get('errmsg')}")
            elif attempt == 0:
                # Either a newer document is there, or another upsert of this key came in between: ask again.
                duplicates[index] = pending[index]
            elif isinstance(pending[index], UpdateOne):
                raise SinkBusy(f"MongoDB at {link.hosts}: two writers of one tombstone met twice")
            else:
                outcomes[index] = STALE
        pending = duplicates
    return outcomes


def _bulk_write(
    link: Link,
    collection: Collection,
    operations: dict[int, Operation],
    content: Callable[[int], Document],
    outcomes: dict[int, Outcome],
) -> list[tuple[int, Mapping[str, Any]]]:
    """Send operations in any order; return the server's error for each that failed.

    What cannot be encoded or is too large is looked for only when something went wrong, so that the good case
    costs nothing: it gets its outcome, leaves `operations`, and the rest is sent again. The driver does not
    compare updates with MongoDB's limit; servers fail the whole command or close the connection.
    """
    if not operations:
        return []
    try:
        collection.bulk_write(list(operations.values()), ordered=False)
    except BulkWriteError as error:
        details: Mapping[str, Any] = error.details
        for concern in details.get("writeConcernErrors", ()):
            raise SinkBusy(f"MongoDB at {link.hosts} cannot confirm writes: {concern.get('errmsg')}") from error
        indexes = list(operations)
        return [(indexes[one["index"]], one) for one in details["writeErrors"]]
    except (*UNENCODABLE, ConnectionFailure, OperationFailure):
        reasons = {index: reason for index in operations if (reason := unfit(content(index)))}
        if not reasons:
            raise
        for index, reason in reasons.items():
            outcomes[index] = rejected(reason)
            del operations[index]
        return _bulk_write(link, collection, operations, content, outcomes)
    return []


def _outcome_of(link: Link, error: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a write that the server refused, or raise if it would refuse every other one, too."""
    code, text = error.get("code"), str(error.get("errmsg"))
    if code in BUSY_CODES or code in REFUSED_CODES:
        raise link.typed(code, text)
    return rejected(text)


def _is_about_id(error: Mapping[str, Any]) -> bool:
    """Tell whether a duplicate key is the `_id`'s, and not one of an index of the user's."""
    pattern = error.get("keyPattern")
    return "index: _id_ " in str(error.get("errmsg")) if pattern is None else list(pattern) == ["_id"]
