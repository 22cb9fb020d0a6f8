"""Options of a connector: what each is set to and why, names as regular expressions, and what may be overridden.

Debezium ignores options that it does not know, and applies its lists of tables and columns as regular expressions that
ignore case. Both fail silently, so names are escaped here, and a test holds every option against Debezium's own
definitions (`tests/integration/test_connector_options.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from delta_sync.errors import UsageError
from delta_sync.secrets import has_reference
from delta_sync.tables import Table


class Option(NamedTuple):
    """One option by Debezium's name. `fixed`: correctness rests on it, so `connector:` may not say otherwise."""

    name: str
    value: str
    reason: str
    fixed: bool = False


# ── both kinds of connector ──────────────────────────────────────────────────────────────────────────────────────

POLL_INTERVAL_MS = 20  # p50 25 ms from commit to worker and 6 % of a core at rest; 10: 12 ms, 10 %; 50: 41 ms, 2 %
MAX_BATCH_SIZE = 2048  # events; a batch that is full does not wait for the interval
MAX_QUEUE_SIZE = 8192  # events; four batches, so that the reader does not wait for the worker
MAX_QUEUE_BYTES = 16 << 20  # a batch exists about six times while it is converted and joined, and the heap is 256 MB


def common_options(name: str, kafka: bool) -> list[Option]:
    """Return what every connector of a pipeline of that name gets."""
    return [
        Option(
            "topic.prefix",
            topic_prefix(name),
            "Names the source in topics and events; workers look for it.",
            fixed=True,
        ),
        Option(
            "snapshot.mode",
            "no_data",
            "Rows of Debezium's snapshots have no position that is safe to compare; dumps read what is there already.",
            fixed=True,
        ),
        Option(
            "skipped.operations", "none", "The default leaves out TRUNCATE, and rows would stay for ever.", fixed=True
        ),
        Option(
            "tombstones.on.delete",
            str(kafka).lower(),
            "A second record per delete is for compacted topics only, so it is written for Kafka alone.",
        ),
        Option("provide.transaction.metadata", "false", "Two more events per transaction that nobody reads."),
        Option("extended.headers.enabled", "false", "Headers on every record that nobody reads."),
        Option(
            "event.processing.failure.handling.mode",
            "fail",
            "An event that cannot be decoded must stop the pipeline: to skip it would lose a change.",
            fixed=True,
        ),
        Option(
            "errors.max.retries",
            "0",
            "The connector fails at once and is started anew, which checks whether positions start again (a failover); "
            "by reconnecting it could reach another server unnoticed.",
            fixed=True,
        ),
        Option(
            "poll.interval.ms",
            str(POLL_INTERVAL_MS),
            "An event waits up to this long twice; the default of 500 means half a second of delay.",
        ),
        Option("max.batch.size", str(MAX_BATCH_SIZE), "Events in a batch at most; a full one does not wait."),
        Option("max.queue.size", str(MAX_QUEUE_SIZE), "Events read ahead at most; must be above the batch."),
        Option(
            "max.queue.size.in.bytes",
            str(MAX_QUEUE_BYTES),
            "Bounds memory when rows have megabytes: a batch exists about six times while it is converted.",
        ),
        Option(
            "statistics.metrics.enabled", "false", "Quantiles that nobody reads, and a warning when its queue is full."
        ),
    ]


def topic_prefix(name: str) -> str:
    """Return the prefix of the topics of a pipeline."""
    return f"delta_{name}"


# ── names as regular expressions ─────────────────────────────────────────────────────────────────────────────────

_PLAIN = re.compile(r"[A-Za-z0-9_]")


def quoted(name: str) -> str:
    """Return a regular expression of Java's that matches the name alone.

    Everything but ASCII letters, digits and `_` is escaped by its code point: Debezium splits its lists at commas,
    semicolons and colons, and trims them, before it compiles the parts.
    """
    return "".join(c if _PLAIN.match(c) else "\\." if c == "." else f"\\x{{{ord(c):x}}}" for c in name)


def exactly(name: str) -> str:
    """Return `quoted(name)` for a list that Debezium matches without regard to case: with regard to it."""
    return f"(?-i){quoted(name)}"


def table_include_list(tables: Iterable[Table]) -> str:
    """Return `table.include.list`."""
    return ",".join(exactly(table.id) for table in tables)


def check_columns(tables: Iterable[Table]) -> None:
    """Raise UsageError for a table that Debezium cannot hold: it knows columns by their names in lower case."""
    for table in tables:
        seen: dict[str, str] = {}
        for column in table.columns:
            other = seen.setdefault(column.name.lower(), column.name)
            if other != column.name:
                raise UsageError(
                    f"Table {table.id} has the columns {other!r} and {column.name!r}, which Debezium takes for one; "
                    "rename one of them."
                )


def column_exclude_list(tables: Iterable[Table]) -> str:
    """Return `column.exclude.list` for the columns that the log does not carry faithfully; empty when there are none.

    They have to be left out: of some types an unchanged TOAST value ends the connector.
    """
    return ",".join(
        exactly(f"{table.id}.{column.name}") for table in tables for column in table.columns if not column.in_log
    )


def message_key_columns(tables: Iterable[Table]) -> str:
    """Return `message.key.columns` for the tables whose key is not the primary one; empty when there are none."""
    return ";".join(
        f"{exactly(table.id)}:{','.join(quoted(column) for column in table.key)}"
        for table in tables
        if not table.key_is_primary
    )


# ── overrides ────────────────────────────────────────────────────────────────────────────────────────────────────

_NO_SNAPSHOTS = (
    "rows of Debezium's snapshots carry no position that is safe to compare; use `deltactl run NAME --reload`"
)

# Options that Delta does not set, and that would break it. A name stands for all below it, too.
FORBIDDEN: Mapping[str, str] = {
    "transforms": "Delta decodes Debezium's own events, and a transformation changes them",
    "predicates": "they are for transformations, and Delta decodes Debezium's own events",
    "post.processors": "Delta decodes Debezium's own events, and a processor changes them",
    "converters": "dumps read the table itself, so log and dump would no longer have the same values",
    "column": "dumps read the table itself, so log and dump would no longer have the same columns",
    "signal": _NO_SNAPSHOTS,
    "incremental.snapshot": _NO_SNAPSHOTS,
    "snapshot": _NO_SNAPSHOTS,
    "notification": "notifications would arrive among the changes",
    "converter": "Delta decodes the format that it has chosen",
    "key.converter": "Delta decodes the format that it has chosen",
    "value.converter": "Delta decodes the format that it has chosen",
    "header.converter": "Delta decodes the format that it has chosen",
    "message.key.columns": "a table's key is its primary key, or the unique index that the checks found",
    "table.exclude.list": "the tables are those of `tables:`",
    "schema.include.list": "the tables are those of `tables:`",
    "schema.exclude.list": "the tables are those of `tables:`",
    "database.include.list": "the tables are those of `tables:`",
    "database.exclude.list": "the tables are those of `tables:`",
    "message.prefix.exclude.list": "Debezium allows only one of the two lists, and Delta's heartbeats need the other",
    "flush.lsn.source": "it decides what is confirmed to the source, as lsn.flush.mode does",
    "topic.naming.strategy": "workers find their topics by Debezium's own naming",
    "sourceinfo.struct.maker": "positions are read from Debezium's own source block",
    "field.name.adjustment.mode": "columns are found by their own names",
    "offset": "positions live where Delta keeps them",
    "name": "it is the pipeline's",
}  # fmt: skip

# Debezium masks the values of these in its log.
_SECRET = re.compile(r"(secret|password|sasl\.jaas\.config|credentials\.json|connection\.?string)$", re.IGNORECASE)


def overridden(
    options: Iterable[Option],
    overrides: Mapping[str, str | int | bool],
    forbidden: Mapping[str, str] = FORBIDDEN,
) -> list[Option]:
    """Return the options with `connector:` of the specification merged in; what it adds comes last, by name.

    Raises UsageError for an option on which correctness rests, and for a secret that is spelt out.
    """
    merged = {option.name: option for option in options}
    for name in sorted(overrides):
        value = _text(overrides[name])
        if _SECRET.search(name) and not has_reference(value):
            raise UsageError(f"connector.{name} must be a reference, ${{env:NAME}} or ${{file:/path}}.")
        known = merged.get(name)
        if known is not None and known.fixed and value != known.value:
            raise UsageError(f"connector.{name} cannot be changed. {known.reason}")
        if known is None and (why := _forbidden(name, forbidden)) is not None:
            raise UsageError(f"connector.{name} cannot be set: {why}.")
        reason = known.reason if known is not None else ""
        merged[name] = Option(name, value, reason, fixed=known is not None and known.fixed)
    return list(merged.values())


def _forbidden(name: str, forbidden: Mapping[str, str]) -> str | None:
    for stem, why in forbidden.items():
        if name == stem or name.startswith(f"{stem}."):
            return why
    return None


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
