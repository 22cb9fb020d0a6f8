"""Looking at a PostgreSQL source before a pipeline runs on it."""

from __future__ import annotations

from collections.abc import Sequence

from delta_sync.sources.inspection import Inspection, Inspector
from delta_sync.sources.postgresql.catalogue import obstacles, read_catalogue, read_tables
from delta_sync.sources.postgresql.checks import column_notes, problems, read_facts, resolve_bare
from delta_sync.sources.postgresql.connection import connect
from delta_sync.spec import PipelineSpec, SourceSpec
from delta_sync.tables import Table


class PostgresInspector(Inspector):
    """One connection. Raises SourceBusy, CheckFailed or UsageError when there is none to be had."""

    def __init__(self, source: SourceSpec) -> None:
        self._connection = connect(source, "deltactl")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def resolve_bare(self, names: Sequence[str]) -> dict[str, str]:
        """Return `schema.table` for names without a schema, by the role's search_path."""
        return resolve_bare(self._connection, names)

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables that exist, by `schema.table`."""
        return read_tables(self._connection, names)

    def inspect(self, spec: PipelineSpec, *, running: bool = False, fresh: bool = False) -> Inspection:
        """Look at the server, slot and publication, and the tables."""
        facts = read_facts(self._connection, spec)
        found = list(problems(facts, spec, running=running, fresh=fresh))
        bad = {problem.where for problem in found if problem.fatal}
        sound = [name for name in spec.tables if f"table {name}" not in bad] if facts.tables else []
        catalogue = read_catalogue(self._connection, sound)
        found += obstacles(self._connection, list(catalogue.values()))
        tables = {name: catalogue[name].table for name in sound if name in catalogue}
        return Inspection((*found, *column_notes(tables.values())), tables)
