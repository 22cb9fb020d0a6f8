"""What a pipeline cannot do on a source that Delta has no client of: said when it is made, checked and dumped."""

from __future__ import annotations

from delta_sync.errors import Problem, UsageError
from delta_sync.spec import PipelineSpec

LIMITS = (
    "After a crash Debezium delivers its last changes once more, so a store may show an older value of a row for a"
    " moment, until the later change has come again.",
    "Rows are read by Debezium's incremental snapshots: one table after the other, one chunk at a time, at the"
    " connector's own rate, into every sink.",
    "A snapshot is as exact as Debezium's windows are: a database that delivers a change before reads see it can leave"
    " an older value until the row's next change.",
    "Delta cannot read rows itself: no verify, no rebuild, no refreshing of look-ups, no documents of several tables.",
    "The changes of a table are in one partition, so one worker at a time has them.",
    "Values that an event leaves out (unchanged long ones, where the connector omits them) become dead letters.",
)
DUMP_LIMITS = (
    "Debezium reads one table after the other, one chunk at a time, into every sink; it writes two rows per chunk into"
    " the signal table, unless the connector has read.only.",
    "A dump by keys or with a condition removes nothing.",
)

_KNOWN = {
    "io.debezium.connector.postgresql.PostgresConnector": "postgresql://",
    "io.debezium.connector.mariadb.MariaDbConnector": "mariadb://",
    "io.debezium.connector.mysql.MySqlConnector": "mysql://",
}


def need_client(spec: PipelineSpec, what: str) -> None:
    """Raise UsageError for what needs rows to be read, on a source that Delta has no client of."""
    if spec.source.kind == "debezium":
        raise UsageError(
            f"{what} is not possible for pipeline {spec.name}: Delta has no client of its database (source.url is"
            " debezium://…), so it cannot read rows; `deltactl dump start` has Debezium read them."
        )


def problems(spec: PipelineSpec) -> list[Problem]:
    """Return what is wrong with a connector's options, as far as Delta can tell without its database. Pure."""
    found: list[Problem] = []
    known = _KNOWN.get(spec.source.connector_class)
    if known is not None:
        what = "Delta knows this source itself, with exact dumps, verification and repair"
        found.append(Problem("source", what, f"give its URL, {known}…, unless you know why not", fatal=False))
    read_only = str(spec.connector.get("read.only", "")).lower() == "true"
    if not spec.connector.get("signal.data.collection") and not read_only:
        found.append(
            Problem(
                "connector",
                "without a signal table Debezium cannot read the rows that are there already",
                "create a table with the columns id varchar(64), type varchar(32) and data varchar(2048), and name it"
                " in connector: signal.data.collection (as the connector names tables); or set read.only: true"
                " where the connector has that",
            )
        )
    return found
