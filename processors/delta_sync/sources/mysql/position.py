"""Where a connector for MariaDB or MySQL goes on: the server keeps no position for it, so it is in Kafka, or in the
state store where there is none, beside the schema's history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from delta_sync.sources.mysql.claims import format_position, position_of
from delta_sync.sources.reader import CapturePosition, Confirmed
from delta_sync.tables import Table

PURGED = "the source has removed the file of its log that holds it"


class StoredOffset(NamedTuple):
    """Where a connector goes on: its offset by Debezium's names; in Kafka, the record's number, key and time."""

    offset: Mapping[str, Any]
    number: int = 0
    key: bytes = b""
    timestamp_ms: int = 0


class Log(Protocol):
    """What is asked of the source: `MariaReader`."""

    def why_lost(self, position: int, gtids: str | None = None) -> str | None:
        """Return why the log does not go on from a position that it once had, as a clause; None when it does."""
        ...


class Store(Protocol):
    """Where offsets and history are: `ConnectorStore` (Kafka), `ConnectorState`. Methods raise Transient."""

    @property
    def where(self) -> str:
        """The place, for messages: `Kafka (topic …)`."""
        ...

    def newest(self) -> StoredOffset | None:
        """Return the connector's position; None when it has none."""
        ...

    def has_history(self) -> bool:
        """Tell whether the history of the schema holds anything."""
        ...

    def clear(self) -> None:
        """Remove position and history, so that the connector begins at the log's end. It must not run."""
        ...

    def close(self) -> None:
        """Release connections. Idempotent."""
        ...


class BinlogPosition(CapturePosition):
    """The newest offset that was stored. The connector makes the position; it begins at the log's end.

    In a log that has begun anew it may go on from a position that it finds there, and overwrite the one that showed it;
    and the log may grow beyond that.
    """

    evidence_lasts = False
    ways_back = "it was reset (RESET MASTER), restored from a copy of its files"

    def __init__(self, log: Log, store: Store) -> None:
        self._log = log
        self._store = store
        self.name = f"the connector's position in {store.where}"

    def close(self) -> None:
        """Release the connection to the store. Idempotent."""
        self._store.close()

    def look(self) -> Confirmed | None:
        """Return where the connector goes on, and whether the log and the history of the schema do."""
        found = self._store.newest()
        if found is None:
            return None
        position = position_in(found.offset)
        lost = self._log.why_lost(position, found.offset.get("gtids"))
        if lost is None and not self._store.has_history():
            lost = f"the history of the schema is gone from {self._store.where}"
        return Confirmed(position, lost, found.number + 1, overtaken=lost == PURGED)

    def confirmed(self) -> int | None:
        """Return the position alone."""
        found = self._store.newest()
        return None if found is None else position_in(found.offset)

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


def position_in(offset: Mapping[str, Any]) -> int:
    """Return the beginning of the transaction that is not delivered as a whole."""
    return position_of(str(offset["file"]), int(offset["pos"]))
