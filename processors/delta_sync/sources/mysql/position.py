"""Where a connector for MariaDB goes on: the server keeps no position for it, so it is in a topic, beside the schema's
history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from delta_sync.kafka.connector import ConnectorStore, StoredOffset
from delta_sync.sources.mysql.claims import format_position, position_of
from delta_sync.sources.mysql.reader import PURGED
from delta_sync.sources.reader import CapturePosition, Confirmed
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Table


class Log(Protocol):
    """What is asked of the source: `MariaReader`."""

    def why_lost(self, position: int, gtids: str | None = None) -> str | None:
        """Return why the log does not go on from a position that it once had, as a clause; None when it does."""
        ...


class BinlogPosition(CapturePosition):
    """The newest record of the topic of offsets. The connector makes the position; it begins at the log's end."""

    def __init__(self, log: Log, spec: PipelineSpec, store: ConnectorStore | None = None) -> None:
        self._log = log
        self._store = store or ConnectorStore(spec)
        self.name = f"the connector's position in Kafka (topic {self._store.topic})"

    def close(self) -> None:
        """Release the connection to Kafka. Idempotent."""
        self._store.close()

    def look(self) -> Confirmed | None:
        """Return where the connector goes on, and whether the log and the history of the schema do."""
        found = self._store.newest()
        if found is None:
            return None
        position = _position(found)
        lost = self._log.why_lost(position, found.offset.get("gtids"))
        if lost is None and not self._store.has_history():
            lost = "the history of the schema in Kafka is gone"
        return Confirmed(position, lost, found.number + 1, overtaken=lost == PURGED)

    def confirmed(self) -> int | None:
        """Return the position alone."""
        found = self._store.newest()
        return None if found is None else _position(found)

    def create(self) -> None:
        """Nothing: the connector begins at the log's end."""

    def drop(self) -> None:
        """Remove position and history."""
        self._store.clear()

    def free(self) -> None:
        """Nothing: the server ends the connection of another replica of the same id."""

    def publish(self, tables: Sequence[Table]) -> None:
        """Nothing: the log has all tables."""

    def text(self, position: int) -> str:
        """Return a position as file and offset."""
        return format_position(position)


def _position(found: StoredOffset) -> int:
    """Return the beginning of the transaction that is not delivered as a whole."""
    return position_of(str(found.offset["file"]), int(found.offset["pos"]))
