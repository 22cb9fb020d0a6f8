"""Which columns the tables of a run have, as far as it knows: what changes there changes documents, and loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from delta_sync import documents
from delta_sync.logs import logger
from delta_sync.pipeline import Pipeline
from delta_sync.sources.reader import SourceReader
from delta_sync.state import StateStore, TableLoad
from delta_sync.tables import Table

log = logger(__name__)

_GONE = ""  # in place of a table's columns: it is not there


class KnownColumns:
    """Fingerprints of the tables' columns. `in_use` are the tables as the worker has them.

    `made_for` tells what a load of a table would be made for, given its fingerprint. `publish` makes the changes of
    exactly the given tables arrive. Used by the worker's thread; others only read.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        state: StateStore,
        reader: SourceReader,
        epoch: int,
        columns: Mapping[str, str],
        in_use: Callable[[], Mapping[str, Table]],
        made_for: Callable[[Table, str], str],
        publish: Callable[[Sequence[Table]], None],
    ) -> None:
        self._pipeline = pipeline
        self._state = state
        self._reader = reader
        self._epoch = epoch
        self._columns = dict(columns)
        self._in_use = in_use
        self._made_for = made_for
        self._publish = publish

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """The columns of every table, as text; nothing of one that is gone."""
        return self._columns

    def is_gone(self, name: str) -> bool:
        """Tell whether a table was not there when it was looked for last."""
        return self._columns[name] == _GONE

    def there(self) -> dict[str, Table]:
        """Return the tables in use that are there."""
        return {name: table for name, table in self._in_use().items() if not self.is_gone(name)}

    def loadable(self) -> dict[str, Table]:
        """Return the tables with documents of their own, of which everything that these are made of is there."""
        return {
            name: table
            for name, table in self._in_use().items()
            if name in self._pipeline.tables and not any(map(self.is_gone, documents.names_of(table)))
        }

    def fingerprint_of_load(self, name: str) -> str:
        """Return what a load of a table that is in use would be made for."""
        table = self._in_use()[name]
        return self._made_for(table, documents.fingerprint(table, self._columns))

    def refresh(self, wanted: Collection[str]) -> dict[str, Table]:
        """Look at the tables again; return those that changed, of `wanted`, with the roots of documents made of them.

        They are to be loaded again, because old documents have old columns. What happens to a table while it is not
        there by this name is not seen, so it counts as changed when it is back, in this run or a later one.
        Raises SourceBusy, StateBusy, and may be called again then.
        """
        current = self._reader.fingerprints(list(self._columns))
        gone = self._columns.keys() - current.keys()
        self._columns.update(dict.fromkeys(gone, _GONE))
        for name in self._pipeline.affected(gone):
            made_for = self.fingerprint_of_load(name)
            load = TableLoad(name, fingerprint=made_for, reason="it was gone", epoch=self._epoch)
            self._state.begin_load(self._pipeline.name, load)
        changed = [name for name in wanted if current.get(name, _GONE) not in (_GONE, self._columns[name])]
        changed += [name for name in self._pipeline.affected(changed) if name not in changed]
        tables = self._reader.tables(changed) if changed else {}
        if not tables:
            return {}
        # A table that was dropped and made again is another one to the publication.
        in_use = self._in_use().items()
        self._publish([tables.get(n, table) for n, table in in_use if n in tables or not self.is_gone(n)])
        for name in tables:
            self._columns[name] = current[name]
            log.warning("schema_changed", table=name)
        return tables
