"""Looking at a MariaDB source before a pipeline runs on it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import pymysql

from delta_sync.errors import SourceBusy
from delta_sync.secrets import redact
from delta_sync.sources.inspection import Inspection, Inspector
from delta_sync.sources.mysql.catalogue import column_notes, obstacles, read_catalogue, read_tables, unreadable_columns
from delta_sync.sources.mysql.checks import problems, read_facts, resolve_bare
from delta_sync.sources.mysql.connection import connect
from delta_sync.spec import PipelineSpec, SourceSpec
from delta_sync.tables import Table


class MariaInspector(Inspector):
    """One connection. Raises SourceBusy, CheckFailed or UsageError when there is none to be had, or it breaks."""

    def __init__(self, source: SourceSpec) -> None:
        self._session = connect(source, "deltactl")

    def close(self) -> None:
        """Close the connection."""
        self._session.shut()

    def resolve_bare(self, names: Sequence[str]) -> dict[str, str]:
        """Return `database.table` for names without a database, by the URL's."""
        with _answering():
            return resolve_bare(self._session, names)

    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables that exist, by `database.table`."""
        with _answering():
            return read_tables(self._session, names)

    def inspect(self, spec: PipelineSpec, *, running: bool = False, fresh: bool = False) -> Inspection:
        """Look at the server and the tables; a pipeline makes nothing there."""
        del running, fresh
        with _answering():
            facts = read_facts(self._session, spec)
            found = list(problems(facts, spec))
            bad = {problem.where for problem in found if problem.fatal}
            sound = [name for name in spec.tables if f"table {name}" not in bad] if facts.tables else []
            catalogue = read_catalogue(self._session, sound)
            sources = list(catalogue.values())
            found += [*obstacles(sources, unreadable_columns(self._session)), *column_notes(sources)]
        return Inspection(tuple(found), {name: catalogue[name].table for name in sound if name in catalogue})


@contextmanager
def _answering() -> Generator[None]:
    try:
        yield
    except pymysql.OperationalError as error:
        raise SourceBusy(f"The source does not answer: {redact(str(error.args[-1]))}.") from error
