"""A target's collections: what they are called, what is there, how they are made, and where readers are led."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pymongo.errors import OperationFailure

from delta_sync.errors import Problem, SinkRefused
from delta_sync.sinks.base import VERSION_FIELD
from delta_sync.sinks.mongodb_link import Link

TOMBSTONES = ".delta_tombstones"  # what a target's companion collection is called, after the target's own name
SERVING = "delta_serving"  # the collection by which readers find a generation

NEEDED_ACTIONS = frozenset({"find", "insert", "update", "remove", "createIndex"})  # all in the role readWrite

_INDEX_OPTIONS_CONFLICT = 85


class Place(NamedTuple):
    """Where a target's documents are; `intervals`: whether its table has columns of them (see `whole`).

    `name` is what readers know, the collection of the first generation.
    """

    database: str
    collection: str
    intervals: bool
    name: str


def problems_of(link: Link, where: str, place: Place, *, rebuilt: bool) -> list[Problem]:
    """Return why documents cannot be put there. `rebuilt`: readers are led by a document of `delta_serving`."""
    problems: list[Problem] = []
    shown = f"{place.database}.{place.collection}"
    for found in link.database(place.database).list_collections(filter={"name": place.collection}):
        options = found.get("options", {})
        if found.get("type", "collection") != "collection" or options.get("capped"):
            what = f"{shown} is a {'capped collection' if options.get('capped') else found['type']}"
            problems.append(Problem(where, what, "set `collection` to a plain or a new collection"))
        if options.get("collation"):
            what = f"{shown} has a default collation, under which different keys may be equal"
            problems.append(Problem(where, what, "set `collection` to one without a collation, or to a new one"))
    sample = link.collection(place.database, place.collection).find_one({}, {VERSION_FIELD: 1})
    if sample is not None and not isinstance(sample.get(VERSION_FIELD), int):
        what = f"{shown} holds documents that Delta did not write (without {VERSION_FIELD})"
        problems.append(Problem(where, what, "set `collection` to an empty or a new collection"))
    missing = _missing_actions(link, place, rebuilt=rebuilt)
    if missing:
        what = f"the user may not {', '.join(missing)} on {shown} and {shown}{TOMBSTONES}"
        problems.append(Problem(where, what, f"grant the role readWrite on {place.database}"))
    return problems


def _missing_actions(link: Link, place: Place, *, rebuilt: bool) -> list[str]:
    try:
        status = link.database(place.database).command("connectionStatus", showPrivileges=True)
    except OperationFailure:
        return []  # not every MongoDB-compatible store has it; what is missing shows when it is needed
    auth: Mapping[str, Any] = status.get("authInfo", {})
    if not auth.get("authenticatedUsers"):
        return []  # access control is off
    privileges: list[Mapping[str, Any]] = auth.get("authenticatedUserPrivileges", [])
    names = [place.collection, place.collection + TOMBSTONES, *([SERVING] if rebuilt else [])]
    return missing_actions(privileges, place.database, names)


def missing_actions(privileges: Sequence[Mapping[str, Any]], database: str, collections: Collection[str]) -> list[str]:
    """Return the actions that Delta needs on these collections and the privileges do not hold on all of them."""
    missing: set[str] = set()
    for collection in collections:
        held: set[str] = set()
        for privilege in privileges:
            resource: Mapping[str, Any] = privilege.get("resource", {})
            everything = bool(resource.get("anyResource"))
            here = resource.get("db") in ("", database) and resource.get("collection") in ("", collection)
            if everything or here:
                held.update(privilege.get("actions", ()))
        missing |= NEEDED_ACTIONS - held
    return sorted(missing)


def create_tombstones(link: Link, place: Place, ttl_s: int) -> None:
    """Create the collection of tombstones, with the index that removes them after their time, or change its time."""
    tombstones = link.collection(place.database, place.collection + TOMBSTONES)
    try:
        tombstones.create_index("at", expireAfterSeconds=ttl_s)
    except OperationFailure as error:
        if error.code != _INDEX_OPTIONS_CONFLICT:
            raise
        index = {"keyPattern": {"at": 1}, "expireAfterSeconds": ttl_s}
        tombstones.database.command("collMod", tombstones.name, index=index)


def refuse_unread(link: Link, place: Place) -> None:
    """Raise SinkRefused when readers look elsewhere."""
    led = link.collection(place.database, SERVING).find_one({"_id": place.name})
    if led is not None and led.get("collection") != place.collection:
        raise SinkRefused(
            f"{place.database}.{SERVING} leads readers from {place.name} to {led.get('collection')}, and the state"
            " store knows nothing of it; give the pipeline its state back, or delete that document and --reload"
        )


def copy_indexes(link: Link, place: Place) -> None:
    """Give a collection that is not there yet the indexes that readers have, in one command, while it is empty."""
    database = link.database(place.database)
    if place.collection in database.list_collection_names(filter={"name": place.collection}):
        return
    led = link.collection(place.database, SERVING).find_one({"_id": place.name}) or {}
    serving = database[str(led.get("collection", place.name))]
    indexes = [
        {name: value for name, value in index.items() if name not in ("v", "ns")}
        for index in serving.list_indexes()
        if index["name"] != "_id_"
    ]
    if indexes:
        concern = link.write_concern.document
        database.command("createIndexes", place.collection, indexes=indexes, writeConcern=concern)
