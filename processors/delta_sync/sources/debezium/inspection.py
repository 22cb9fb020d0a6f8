"""Looking at a source that Delta has no client of: at its connector's options, and at its tables' topics."""

from __future__ import annotations

from collections.abc import Sequence

from delta_sync.errors import Problem, UsageError
from delta_sync.sources.debezium.limits import problems
from delta_sync.sources.debezium.reader import TopicReader
from delta_sync.sources.inspection import Inspection, Inspector
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Table


class TopicInspector(Inspector):
    """Asks Kafka alone."""

    def __init__(self, spec: PipelineSpec) -> None:
        self._reader = TopicReader(spec)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def resolve_bare(self, names: Sequence[str]) -> dict[str, str]:
        """Refuse."""
        raise UsageError(
            f"--table: write {names[0]} as the connector names it, with its schema (of SQL Server, with its database)."
        )

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables of which a record has come."""
        return self._reader.tables(names)

    def inspect(self, spec: PipelineSpec, *, running: bool = False, fresh: bool = False) -> Inspection:
        """Look at the options, and at the tables of which a record has come."""
        del running, fresh
        found = problems(spec)
        tables = self._reader.tables(list(spec.tables))
        for name, columns in self._reader.ambiguous(list(spec.tables)).items():
            found.append(
                Problem(
                    f"table {name}",
                    f"a NULL in {', '.join(columns)} arrives as the column's default: the converter writes it so",
                    "take the default away from the column in the database, or do without NULL there",
                    fatal=False,
                )
            )
        return Inspection(tuple(found), tables)
