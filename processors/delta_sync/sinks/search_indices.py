"""A target's indices and aliases: what they are called, what is there, how they are made, and where readers are led."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from delta_sync.errors import Problem, SinkRefused
from delta_sync.sinks.search_link import Link
from delta_sync.sinks.search_mapping import DELETED

FLOORS = "-delta"  # what the index of a target's floor is called, after the target's own name
MAX_INDEX_BYTES = 255 - len(FLOORS) - 8  # the stores' limit for a name; and room for a generation's number

IS_DELETED: Mapping[str, Any] = {"term": {DELETED: True}}
_ALIAS: Mapping[str, Any] = {"filter": {"bool": {"must_not": [IS_DELETED]}}, "is_write_index": True}


class Place(NamedTuple):
    """Where a target's documents are, and how its index is created if it is not there."""

    alias: str
    mappings: dict[str, Any]
    settings: dict[str, Any]
    readers: str | None = None  # the alias that users search, where it is another: that of all generations
    number: int = 1

    @property
    def name(self) -> str:
        """What all of the target's names begin with."""
        return self.readers or self.alias

    @property
    def first_index(self) -> str:
        """The index of this generation, as it is created."""
        return f"{self.name}-{self.number}"

    @property
    def floors(self) -> str:
        """The index of this generation's floor."""
        return (self.name if self.number == 1 else self.alias) + FLOORS


def index_name(text: str) -> str:
    """Return a text as the name of an index: lower case, `_` for what is not allowed. A legal name stays as it is."""
    name = re.sub(r'[\\/*?"<>|\s,#:\x00-\x1f]', "_", text.lower())
    return re.sub(r"^[-_+.]+", "", name) or "index"


def is_own_index(alias: str, index: str) -> bool:
    """Tell whether an index is one that Delta made for this alias."""
    return re.fullmatch(re.escape(alias) + r"-\d+", index) is not None


def problems_of(link: Link, where: str, place: Place) -> list[Problem]:
    """Return why the target's alias cannot be one of Delta's."""
    indices = indices_of(link, place.alias)
    if not indices and link.request("GET", f"/{place.alias}/_settings").status == 200:
        what = f"{place.alias} is an index, where Delta needs the name for an alias"
        return [Problem(where, what, "set `index` to another name, or delete that index")]
    foreign = [index for index in indices if not is_own_index(place.name, index)]
    if foreign:
        what = f"{place.alias} is an alias of {', '.join(foreign)}, which Delta did not create"
        return [Problem(where, what, "set `index` to another name")]
    return []


def create_indices(link: Link, where: str, place: Place) -> None:
    """Create what is not there: the index behind its alias, with fields for new columns, and the floor's index."""
    problems = problems_of(link, where, place)
    if problems:
        raise SinkRefused(str(problems[0]))
    one_shard = {"index.number_of_shards": 1, "index.auto_expand_replicas": "0-1"}
    _create(link, place.floors, {"settings": one_shard, "mappings": {"dynamic": False}})
    index = _write_index(link, place.alias)
    if index is not None:
        _add_fields(link, index, place.mappings)
        return
    settings = dict(place.settings)
    product = link.product()
    if product.name == "elasticsearch" and product.version >= (8, 14):
        # Beyond the limit of fields a document is kept, and its further fields are not searched.
        settings.setdefault("index.mapping.total_fields.ignore_dynamic_beyond_limit", True)
    body = {"settings": settings, "mappings": place.mappings, "aliases": {place.alias: _ALIAS}}
    if not _create(link, place.first_index, body):
        # It was there without the alias, or another worker has just created both.
        action = {"add": {"index": place.first_index, "alias": place.alias, **_ALIAS}}
        link.ask("POST", "/_aliases", {"actions": [action]})


def _create(link: Link, index: str, body: Mapping[str, Any]) -> bool:
    """Create an index unless it is there; return whether it was created."""
    reply = link.request("PUT", f"/{index}", body)
    if reply.status == 400 and "already_exists" in reply.reason:
        return False
    link.expect(reply)
    return True


def _add_fields(link: Link, index: str, mappings: Mapping[str, Any]) -> None:
    """Map the columns that the table has got since; what is mapped stays as it is, for it could not be changed."""
    found = link.ask("GET", f"/{index}/_mapping")
    mapped: Mapping[str, Any] = found[index]["mappings"].get("properties", {})
    new = {name: field for name, field in mappings.get("properties", {}).items() if name not in mapped}
    if new:
        link.ask("PUT", f"/{index}/_mapping", {"properties": new})


def lead_readers(link: Link, where: str, places: Sequence[Place]) -> None:
    """Move the readers' aliases of all targets in one request, which the store carries out in one step."""
    actions: list[dict[str, Any]] = []
    for place in places:
        assert place.readers is not None, "it is of a generation"
        index = existing_index(link, place)
        there = indices_of(link, place.readers)
        if list(there) == [index]:
            continue
        problems = problems_of(link, where, place._replace(alias=place.readers))
        if problems:
            raise SinkRefused(str(problems[0]))
        actions += [{"remove": {"index": old, "alias": place.readers}} for old in there if old != index]
        actions.append({"add": {"index": index, "alias": place.readers, **_ALIAS}})
    if actions:
        link.ask("POST", "/_aliases", {"actions": actions})


def indices_of(link: Link, alias: str) -> dict[str, dict[str, Any]]:
    """Return the indices behind an alias, with what the alias says of each; none if there is no such alias."""
    reply = link.request("GET", f"/_alias/{alias}")
    if reply.status == 404:
        return {}
    found: dict[str, dict[str, Any]] = link.expect(reply)
    return {index: about["aliases"][alias] for index, about in found.items()}


def _write_index(link: Link, alias: str) -> str | None:
    """Return the index that writes through the alias go to."""
    indices = indices_of(link, alias)
    written = [index for index, about in indices.items() if about.get("is_write_index")]
    return next(iter(written or indices), None)


def existing_index(link: Link, place: Place) -> str:
    """Return the index that writes go to. Raises SinkRefused when there is none."""
    index = _write_index(link, place.alias)
    if index is None:
        raise SinkRefused(f"{link.who} has no alias {place.alias}; it was deleted, or never prepared")
    return index
