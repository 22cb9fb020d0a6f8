"""What an embedded connector keeps when its source keeps nothing for it: its position, and the history of the schema.

Both are in the state store, as one: whoever goes on from a position has the history that belongs to it, on whichever
machine. The connector itself knows files alone. They are made anew from the store at each of its starts, and what it
adds to its history is saved with the next position, so nothing depends on them: they may be torn, old, or gone.

1. A batch was delivered. What the log says of the schema before its last event is in the connector's file by then: it
   writes that before it goes on in the log.
2. Every sink has acknowledged the batch. Only then what is new in the file, and the batch's position, are saved, in one
   transaction. The history may be ahead of the position, which does no harm: what is beyond is read again.

Of two runs at once (on two machines, say) the one whose connector was started last goes on: the other's saves nothing.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import sqlalchemy as sa

from delta_sync.capture import Batch, CaptureDied
from delta_sync.errors import PipelineStopped
from delta_sync.sources.mysql.position import StoredOffset, position_in
from delta_sync.state import StateStore
from delta_sync.state_database import upsert
from delta_sync.state_tables import CONNECTOR_HISTORY, CONNECTORS, PIPELINES


class Begun(NamedTuple):
    """What a connector begins with: its place, None: at the log's end; and the history that belongs to it."""

    place: bytes | None
    history: bytes


class ConnectorState:
    """What is kept of a pipeline's connector. Safe to use from any number of threads and processes at once.

    A place is what the connector says of it: JSON of two texts, the key and the value by which Debezium stores it.
    """

    where = "the state store"

    def __init__(self, state: StateStore, pipeline: str) -> None:
        self._state = state
        self._pipeline = pipeline

    def close(self) -> None:
        """Nothing: the state store is its owner's."""

    def newest(self) -> StoredOffset | None:
        """Return the connector's position; None when it has none."""
        query = sa.select(CONNECTORS.c.place).where(CONNECTORS.c.pipeline == self._pipeline)
        with self._state.transaction() as connection:
            place = connection.execute(query).scalar_one_or_none()
        return None if place is None else StoredOffset(offset_of(place))

    def has_history(self) -> bool:
        """Tell whether the history of the schema holds anything."""
        query = sa.select(CONNECTOR_HISTORY.c.number).where(CONNECTOR_HISTORY.c.pipeline == self._pipeline).limit(1)
        with self._state.transaction() as connection:
            return connection.execute(query).first() is not None

    def clear(self) -> None:
        """Remove position and history, so that the next connector begins at the log's end."""
        with self._state.transaction(write=True) as connection:
            for table in (CONNECTORS, CONNECTOR_HISTORY):
                connection.execute(sa.delete(table).where(table.c.pipeline == self._pipeline))

    def begin(self, run: str) -> Begun:
        """Note that the connector is this run's from now on, and return what it begins with."""
        pieces = sa.select(CONNECTOR_HISTORY.c.piece).where(CONNECTOR_HISTORY.c.pipeline == self._pipeline)
        place = sa.select(CONNECTORS.c.place).where(CONNECTORS.c.pipeline == self._pipeline)
        with self._state.transaction(write=True) as connection:
            upsert(connection, CONNECTORS, {"pipeline": self._pipeline}, {"run": run})
            found = connection.execute(place).scalar_one()
            history = connection.execute(pieces.order_by(CONNECTOR_HISTORY.c.number)).scalars().all()
        return Begun(None if found is None else found.encode(), b"".join(history))

    def save(self, run: str, place: bytes, piece: bytes) -> None:
        """Save a position, and what has come to the history.

        From the first one on it is a loss that there is none: the pipeline's state has where that was. Raises
        PipelineStopped: the connector is another run's by now; CaptureDied: it was removed, and has to start anew.
        """
        mine = CONNECTORS.c.pipeline == self._pipeline
        newest = sa.select(sa.func.max(CONNECTOR_HISTORY.c.number)).where(
            CONNECTOR_HISTORY.c.pipeline == self._pipeline
        )
        with self._state.transaction(write=True) as connection:
            # The row stays locked to the end, so of two runs none adds to the other's history.
            whose = connection.execute(sa.select(CONNECTORS.c.run).where(mine).with_for_update()).scalar_one_or_none()
            if whose is None:
                raise CaptureDied(f"The connector's position was removed from {self.where}.")
            if whose != run:
                raise PipelineStopped(
                    f"Pipeline {self._pipeline} was started by another process meanwhile, on another machine perhaps,"
                    " and goes on there; let one of them run it. Nothing is lost."
                )
            connection.execute(sa.update(CONNECTORS).where(mine).values(place=place.decode()))
            first = sa.update(PIPELINES).where(PIPELINES.c.name == self._pipeline, PIPELINES.c.slot_lsn.is_(None))
            connection.execute(first.values(slot_lsn=position_in(offset_of(place))))
            if piece:
                number = (connection.execute(newest).scalar() or 0) + 1
                values = {"pipeline": self._pipeline, "number": number, "piece": piece}
                connection.execute(sa.insert(CONNECTOR_HISTORY).values(**values))


def offset_of(place: str | bytes) -> Mapping[str, Any]:
    """Return the offset, by Debezium's names, that a place holds."""
    _, value = orjson.loads(place)
    offset: Mapping[str, Any] = orjson.loads(value)
    return offset


class ConnectorRun:
    """The connector of one run of a pipeline: what it is given at each of its starts, and what is saved of it.

    `history_file` is where it keeps the history of the schema, line by line. Used by one thread.
    """

    def __init__(self, store: ConnectorState, history_file: Path) -> None:
        self._store = store
        self._file = history_file
        self._run = ""
        self._saved_bytes = 0  # of the file

    def begin(self) -> bytes | None:
        """Write the history for a connector that is about to start; return its place. Raises StateBusy, CaptureDied."""
        self._run = uuid.uuid4().hex
        place, history = self._store.begin(self._run)
        scratch = self._file.with_name(f"{self._file.name}.new")
        try:
            scratch.unlink(missing_ok=True)
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(history)
            scratch.replace(self._file)  # another file: whatever still writes into the old one writes into nothing
        except OSError as error:
            raise CaptureDied(f"The history of the schema cannot be written: {error}.") from error
        self._saved_bytes = len(history)
        return place

    def save(self, batch: Batch) -> Mapping[str, Any]:
        """Save that every sink has a batch, and all before it; return the offset behind it, by Debezium's names.

        Raises StateBusy, and CaptureDied when the connector's history is gone: start it again.
        """
        piece = self._new_lines()
        self._store.save(self._run, batch.place, piece)
        self._saved_bytes += len(piece)
        return offset_of(batch.place)

    def _new_lines(self) -> bytes:
        """Return the whole lines that were added; the one that is being written is of what is yet to be delivered."""
        try:
            with self._file.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._saved_bytes:
                    raise CaptureDied(f"Somebody has changed {self._file}, which is the connector's: it starts anew.")
                file.seek(self._saved_bytes)
                added = file.read()
        except OSError as error:
            raise CaptureDied(
                f"The history of the schema cannot be read ({error}): the connector starts anew."
            ) from error
        return added[: added.rfind(b"\n") + 1]
