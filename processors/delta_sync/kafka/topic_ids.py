"""Whether a topic is the one that the group's positions are of. One that is deleted and made again looks the same.

What was in it and not read yet is lost then, and a position of the old topic may lie within the new one, so that
records are skipped. But a topic's id never comes again. So it is kept in the state store, for each partition: the id of
the topic that the committed position is of. It is compared with the cluster's every so often. Where they differ, the
table is to be loaded again, then the position moves to the beginning and is committed, and then the new id is saved.
Whoever is killed in between finds them to differ once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import sqlalchemy as sa

from delta_sync.kafka.consumer import Partition
from delta_sync.state import StateStore
from delta_sync.state_database import upsert
from delta_sync.state_tables import TOPICS

Ids = Mapping[Partition, str]  # of each partition, the id of its topic


class SeenTopics(NamedTuple):
    """What was saved of topics' ids, and what the cluster said after that was read."""

    saved: Ids
    now: Ids


class TopicStore:
    """A pipeline's topics' ids in the state store. Safe to use from any number of threads and processes at once."""

    def __init__(self, state: StateStore, pipeline: str) -> None:
        self._state = state
        self._pipeline = pipeline

    def saved(self) -> dict[Partition, str]:
        """Return what is saved."""
        query = sa.select(TOPICS.c.topic, TOPICS.c.number, TOPICS.c.topic_id)
        with self._state.transaction() as connection:
            rows = connection.execute(query.where(TOPICS.c.pipeline == self._pipeline)).all()
        return {Partition(row.topic, row.number): row.topic_id for row in rows}

    def add(self, ids: Ids) -> None:
        """Save ids of partitions of which none is saved; what is saved stays."""
        with self._state.transaction(write=True) as connection:
            for at, topic_id in sorted(ids.items()):
                upsert(connection, TOPICS, self._key(at), {"topic_id": TOPICS.c.topic_id}, {"topic_id": topic_id})

    def replace(self, ids: Ids) -> None:
        """Save ids in place of what was saved: the positions that are committed are of these topics."""
        with self._state.transaction(write=True) as connection:
            for at, topic_id in sorted(ids.items()):
                upsert(connection, TOPICS, self._key(at), {"topic_id": topic_id})

    def _key(self, at: Partition) -> dict[str, str | int]:
        return {"pipeline": self._pipeline, "topic": at.topic, "number": at.number}


def look_at_topics(store: TopicStore, ask: Callable[[], Ids]) -> SeenTopics:
    """Return what is saved, and what the cluster says (`ask`), in this order: it is never the older one.

    What is new is saved: called before anything is read, it is of the topic that is read. Raises StateBusy, KafkaBusy.
    """
    saved = store.saved()
    now = ask()
    new = {at: topic_id for at, topic_id in now.items() if at not in saved}
    if new and not made_anew(SeenTopics(saved, now), new):
        store.add(new)
    return SeenTopics(saved, now)


def made_anew(seen: SeenTopics, partitions: Collection[Partition]) -> dict[Partition, str]:
    """Return those of these partitions whose topic is another than was saved, each with the id that it has now. Pure.

    A partition of which nothing is saved is as old as the others of its topic that are there. One that is not there
    now is left out.
    """
    of_topic: dict[str, set[str]] = {}
    for at, topic_id in seen.saved.items():
        if at in seen.now:
            of_topic.setdefault(at.topic, set()).add(topic_id)
    found: dict[Partition, str] = {}
    for at in partitions:
        known = {seen.saved[at]} if at in seen.saved else of_topic.get(at.topic, set())
        if at in seen.now and known - {seen.now[at]}:
            found[at] = seen.now[at]
    return found
