"""Repair: keys that differ are read once more and written, with versions that a change on its way still beats.

A row that is missing or different is read with a claim L above everything that the sink has applied, and written with
the version just below L: it beats what is there, and every change at or after L beats it. A key without a row is
deleted with that version. So the pipeline may run meanwhile, and a repair may be killed or run twice.

What no write could ever beat (a version beyond the end of the log) is forgotten first, and only if it still has that
very version. Changes that came until then were stale, and are lost to the sink: so the row is read afterwards, with a
claim above the end of the log as it was after the forgetting. Until it is written, readers see no document.

A row that was read with the table's old columns may not stand against a new load of it. So after reading, and before
writing, it is asked whether the load is still the same: then a new one takes the position from which it is covered only
later, above all claims that were made before the question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from delta_sync.applied_log import AppliedLog
from delta_sync.changes import Key, Write
from delta_sync.logs import logger
from delta_sync.sinks import AnySink
from delta_sync.values import Document
from delta_sync.verification import Damage, KeyReader, Makers, Subject

log = logger(__name__)


class DirectRepair:
    """Writes to the sinks from this process, by the same rules as the worker. `makers` asks all look-ups.

    `check_load` raises when a table (by its id) is no longer what it was loaded as when all of this was opened.
    """

    def __init__(
        self,
        *,
        epoch: int,
        keys: KeyReader,
        makers: Makers,
        sinks: Mapping[str, AnySink],
        applied: AppliedLog,
        check_load: Callable[[str], None],
    ) -> None:
        self._epoch = epoch
        self._keys = keys
        self._makers = makers
        self._sinks = sinks
        self._applied = applied
        self._check_load = check_load

    def __call__(self, subject: Subject, damages: Sequence[Damage]) -> None:
        """Mend these keys in these sinks. What it could not write shows when the keys are looked at again."""
        for name, target in subject.targets.items():
            beyond_all = [(one.key, one.version or 0) for one in damages if one.sink == name and one.outlawed]
            if beyond_all:
                self._sinks[name].discard(target, beyond_all)
        at_least = max(self._applied.mark(), subject.covered_from)
        by_key: dict[Key, list[str]] = {}
        for one in damages:
            by_key.setdefault(one.key, []).append(one.sink)
        for rows, claim, chunk in self._keys.parts(subject.table, by_key, at_least):
            version = chunk.version(self._epoch, claim)
            writes = {name: list[Write]() for name in subject.targets}
            present = [(key, row) for key, row in rows.items() if row is not None]
            for names, made, failed in self._makers.documents(subject.table, present, subject.targets):
                documents: dict[Key, Document | None] = dict(made)
                for key in rows.keys() - {key for key, _ in failed}:
                    for name in by_key[key]:
                        if name in names:
                            writes[name].append(Write(key, version, documents.get(key)))
            # Then no reader sees a row go back: what this reading holds is in the sinks already.
            self._applied.pass_now()
            self._check_load(subject.table.id)
            for name, some in writes.items():
                if some:
                    outcomes = self._sinks[name].apply(subject.targets[name], some)
                    kinds = {
                        kind: sum(one.kind == kind for one in outcomes) for kind in ("applied", "stale", "rejected")
                    }
                    log.info("repaired", table=subject.table.id, sink=name, **kinds)
