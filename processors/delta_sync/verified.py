"""What has been verified of each table, in the state store: for the pipeline's metrics, and to go on after a restart.

Only whole verifications count: every row of a table in all of its sinks, with all fields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from delta_sync.changes import Key
from delta_sync.delta_event import decode_key, encode_key
from delta_sync.state import StateStore, now_of
from delta_sync.state_database import upsert
from delta_sync.state_tables import VERIFIED
from delta_sync.verification import Subject, Verifier
from delta_sync.verifying import Tally, Verified


class Numbers(NamedTuple):
    """What is added to a table's numbers."""

    rows: int = 0
    differences: int = 0
    repaired: int = 0

    @classmethod
    def of(cls, tally: Tally) -> Numbers:
        """Return those of a tally."""
        return cls(tally.rows, tally.differences, tally.repaired)

    def since(self, before: Numbers) -> Numbers:
        """Return what has come since."""
        return Numbers(*(now - then for now, then in zip(self, before, strict=True)))


class VerifiedStore:
    """What has been verified of a pipeline. Safe to use from any number of threads and processes at once."""

    def __init__(self, state: StateStore, pipeline: str) -> None:
        self._state = state
        self._pipeline = pipeline

    def all(self) -> dict[str, Verified]:
        """Return what is known, by table; one that was never verified is absent. Ages are by the database's clock."""
        query = sa.select(VERIFIED).where(VERIFIED.c.pipeline == self._pipeline)
        with self._state.transaction() as connection:
            now = now_of(connection)
            rows = connection.execute(query.order_by(VERIFIED.c.table_name)).all()
        return {
            row.table_name: Verified(
                row.table_name,
                None if row.looked_at is None else max(0.0, (now - row.looked_at).total_seconds()),
                row.row_count,
                row.differences,
                row.repaired,
            )
            for row in rows
        }

    def begin(self, table: str, made_for: str, *, resume: bool = False) -> Key | None:
        """Note that a verification begins; with `resume` return the key behind which the last one is to go on.

        None: from the beginning, because that one ended, or was `made_for` something else.
        """
        with self._state.transaction(write=True) as connection:
            row = connection.execute(sa.select(VERIFIED).where(*self._of(table)).with_for_update()).one_or_none()
            if resume and row is not None and row.began_at is not None and row.made_for == made_for:
                return None if row.after_key is None else decode_key(row.after_key)
            begun = {"made_for": made_for, "began_at": now_of(connection), "after_key": None}
            new = {**begun, "row_count": 0, "differences": 0, "repaired": 0}
            upsert(connection, VERIFIED, {"pipeline": self._pipeline, "table_name": table}, begun, new)
        return None

    def reach(self, table: str, after: Key, more: Numbers) -> None:
        """Note that every row up to a key has been verified."""
        self._add(table, more, {"after_key": encode_key(after)})

    def end(self, table: str, more: Numbers) -> None:
        """Note that a table has been verified to its end."""
        self._add(table, more, {"looked_at": VERIFIED.c.began_at, "began_at": None, "after_key": None})

    def _add(self, table: str, more: Numbers, values: Mapping[str, object]) -> None:
        added = {
            "row_count": VERIFIED.c.row_count + more.rows,
            "differences": VERIFIED.c.differences + more.differences,
            "repaired": VERIFIED.c.repaired + more.repaired,
        }
        # Another verification of the same table may have ended meanwhile; this one's beginning is gone then.
        under_way = VERIFIED.c.began_at.is_not(None)
        with self._state.transaction(write=True) as connection:
            connection.execute(sa.update(VERIFIED).where(*self._of(table)).values(added))
            # MariaDB sets one column after the other, so what is read of a row comes first.
            update = sa.update(VERIFIED).where(*self._of(table), under_way)
            connection.execute(update.ordered_values(*values.items()))

    def _of(self, table: str) -> tuple[sa.ColumnElement[bool], ...]:
        return (VERIFIED.c.pipeline == self._pipeline, VERIFIED.c.table_name == table)


class Rounds:
    """Verifies tables, and keeps in the state store how far it is. `made_for` is what each table's documents go by."""

    def __init__(self, store: VerifiedStore, verifier: Verifier, made_for: Mapping[str, str]) -> None:
        self._store = store
        self._verifier = verifier
        self._made_for = made_for

    def in_turn(self, subjects: Sequence[Subject]) -> list[Subject]:
        """Return the tables whose last look is the oldest first, so that one that was interrupted comes first."""
        known = self._verifier.patiently(self._store.all)
        return sorted(subjects, key=lambda subject: -age_of(known.get(subject.table.id)))

    def oldest_s(self, tables: Iterable[str]) -> float | None:
        """Return how old the oldest look at a row of these tables may be; None: some were never looked at."""
        known = self._verifier.patiently(self._store.all)
        oldest = max((age_of(known.get(table)) for table in tables), default=0.0)
        return None if oldest == NEVER_S else oldest

    def verify(self, subject: Subject, *, resume: bool) -> Tally:
        """Verify a table, with `resume` from where its last verification was. Raises what `Verifier.verify` does."""
        table, patiently = subject.table.id, self._verifier.patiently
        saved = Numbers()

        def reached(key: Key, tally: Tally) -> None:
            nonlocal saved
            now = Numbers.of(tally)
            patiently(lambda: self._store.reach(table, key, now.since(saved)))
            saved = now

        after = patiently(lambda: self._store.begin(table, self._made_for[table], resume=resume))
        tally = self._verifier.verify(subject, after, reached)
        patiently(lambda: self._store.end(table, Numbers.of(tally).since(saved)))
        return tally


NEVER_S = float("inf")


def age_of(known: Verified | None) -> float:
    """Return how old the oldest look at a table's rows may be, in seconds."""
    return NEVER_S if known is None or known.age_s is None else known.age_s


def digest(*parts: object) -> str:
    """Return some text that is the same for the same parts."""
    return hashlib.blake2b(repr(parts).encode(errors="backslashreplace"), digest_size=16).hexdigest()
