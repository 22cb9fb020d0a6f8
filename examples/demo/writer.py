"""A writer, as an application is one: inserts, updates, deletes and changes of keys, some in larger transactions."""

from __future__ import annotations

import random
import threading
from collections import Counter

import psycopg

from delta_sync.testing.processes import wait_until

PAUSE_S = 0.002  # between transactions: the machine's cores are for the pipeline, too
WRITE_TIMEOUT_S = 60.0
STATEMENTS_MOST = 20  # in one transaction
KINDS = {
    "insert": "INSERT INTO movie (title, year) VALUES (%(title)s, %(year)s)",
    "update": "UPDATE movie SET title = %(title)s WHERE id = %(id)s",
    "delete": "DELETE FROM movie WHERE id = %(id)s",
    # The new key is one that no sequence gives: it comes back when the row changes its key again.
    "change of key": "UPDATE movie SET id = 10000000 - id WHERE id = %(id)s",
}
WEIGHTS = (30, 60, 7, 3)


class Writer(threading.Thread):
    """Writes until `stop`. `done` counts the rows that it changed, by kind, once they are committed."""

    def __init__(self, connection: psycopg.Connection, seed: int = 7) -> None:
        super().__init__(name="writer", daemon=True)
        self._connection = connection
        self._rng = random.Random(seed)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self.done: Counter[str] = Counter()

    @property
    def changes(self) -> int:
        """How many rows it has changed. Raises what ended it, if something did."""
        if self._error is not None:
            raise self._error
        return self.done.total()

    def wait_for(self, more: int) -> None:
        """Wait until it has changed so many rows more."""
        goal = self.changes + more
        wait_until(lambda: self.changes >= goal, WRITE_TIMEOUT_S, f"writing {more} changes")

    def stop(self) -> None:
        """Finish the transaction that it is in. Idempotent."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Write."""
        try:
            while not self._stopping.wait(PAUSE_S):
                self.done += self._transaction()
        except BaseException as error:  # noqa: BLE001 -- raised again where somebody looks
            self._error = error

    def _transaction(self) -> Counter[str]:
        """Run one transaction; return what it changed."""
        rng = self._rng
        done: Counter[str] = Counter()
        with self._connection.transaction():
            highest = self._connection.execute("SELECT last_value FROM movie_id_seq").fetchone()
            assert highest is not None
            for kind in rng.choices(tuple(KINDS), WEIGHTS, k=rng.randint(1, STATEMENTS_MOST)):
                number = rng.randint(1, highest[0])
                values = {
                    "id": number if rng.random() < 0.9 else 10_000_000 - number,
                    "title": f"Working Title {rng.randint(1, 999_999)}",
                    "year": rng.randint(1930, 2030),
                }
                done[kind] += self._connection.execute(KINDS[kind].encode(), values).rowcount
        return done
