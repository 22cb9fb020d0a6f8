"""Sources: reading them beside their log, and what they must be like. `open_reader` knows which kinds there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from delta_sync.documents import DocumentSpec
from delta_sync.errors import UsageError
from delta_sync.sources.mysql.claims import format_position
from delta_sync.spec import PipelineSpec
from delta_sync.versions import MAX_OFFSET, OFFSET_BITS, format_lsn

if TYPE_CHECKING:  # what a command does not need at its start is imported where it is used
    from delta_sync.sources.inspection import Inspector
    from delta_sync.sources.reader import SourceReader


def open_reader(
    spec: PipelineSpec,
    application_name: str,
    answer_s: float | None = None,
    documents: Mapping[str, DocumentSpec] = MappingProxyType({}),
) -> SourceReader:
    """Return a reader of a pipeline's source; it connects when it is first used. Raises UsageError.

    It takes the whole specification, so that nobody reads a masked column in the clear: its tables have the masks. The
    roots of `documents` have their parts.

    With `answer_s` its calls raise SourceBusy when the source has said nothing for so long; without it long queries
    take as long as they need.
    """
    reader: SourceReader
    match spec.source.kind:
        case "postgresql":
            from delta_sync.sources.postgresql.reader import PostgresReader

            reader = PostgresReader(spec.source, application_name, answer_s)
        case "mariadb":
            need_package()
            from delta_sync.sources.mysql.reader import MariaReader

            reader = MariaReader(spec.source, application_name, answer_s)
        case "mysql":
            need_package()
            from delta_sync.sources.mysql.gtid_reader import MySQLReader

            if documents:
                raise UsageError(
                    f"Documents of several tables ({', '.join(documents)}) cannot be built from MySQL: no number there"
                    " rises exactly with what snapshots show. Pipelines of rows run on it."
                )
            reader = MySQLReader(spec.source, application_name, answer_s)
        case "debezium":
            from delta_sync.sources.debezium.reader import TopicReader

            if documents:
                raise UsageError(
                    f"Documents of several tables ({', '.join(documents)}) cannot be built from a source that Delta has"
                    " no client of (source.url is debezium://…): it cannot read rows. Pipelines of rows run on it."
                )
            reader = TopicReader(spec)
        case kind:
            raise UsageError(unknown(kind))
    reader.shapes, reader.documents = spec.shapes, documents
    return reader


def open_inspector(spec: PipelineSpec) -> Inspector:
    """Connect to a pipeline's source, to look at it. Raises SourceBusy, CheckFailed or UsageError."""
    source = spec.source
    match source.kind:
        case "postgresql":
            from delta_sync.sources.postgresql.inspection import PostgresInspector

            return PostgresInspector(source)
        case "mariadb" | "mysql":
            need_package()
            from delta_sync.sources.mysql.inspection import MariaInspector

            return MariaInspector(source)
        case "debezium":
            from delta_sync.sources.debezium.inspection import TopicInspector

            return TopicInspector(spec)
        case kind:
            raise UsageError(unknown(kind))


def position_text(kind: str, position: int) -> str:
    """Return a position of a kind of source for people."""
    if kind == "debezium":
        return f"record {position & MAX_OFFSET}, term {position >> OFFSET_BITS}"
    return format_position(position) if kind in ("mariadb", "mysql") else format_lsn(position)


def check_supported(spec: PipelineSpec) -> None:
    """Raise UsageError for a source on which no pipeline can run, or not with its transport; and say why."""
    match spec.source.kind:
        case "postgresql":
            return
        case "mariadb" | "mysql" as kind:
            need_package()
            if kind == "mariadb" and spec.transport != "kafka":
                raise UsageError(
                    "source.url begins with mariadb://, and the embedded engine has no connector for MariaDB (only"
                    " Debezium Server has): use transport: kafka (`deltactl pipeline create` with --kafka and"
                    " --registry)."
                )
        case "debezium":
            if spec.transport != "kafka":
                raise UsageError(
                    "source.url begins with debezium://, and such a pipeline needs Kafka: a change's version is its"
                    " place in a topic. Use transport: kafka (`deltactl pipeline create` with --kafka and --registry)."
                )
        case kind:
            raise UsageError(unknown(kind))


def unknown(kind: str) -> str:
    """Return why no pipeline runs on a kind of source."""
    if not kind:
        return "source.url has no scheme; write it as postgresql://user@host:port/database, mariadb://… or mysql://…."
    return (
        f"source.url: {kind}:// is not a source that Delta knows; it can be postgresql://, mariadb:// or mysql://, or"
        " debezium://CLASS of another connector."
    )


def need_package() -> None:
    """Raise UsageError unless the client of MariaDB and MySQL is installed."""
    if importlib.util.find_spec("pymysql") is None:
        raise UsageError("A source of this kind needs a package; type: pip install 'delta-sync[mariadb]'.")
