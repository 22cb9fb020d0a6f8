"""Every error that Delta raises, on one page.

Two questions decide what happens to an error, so they are its type: whose is it, and will it pass by itself?
A message is one sentence (or two) that says what is wrong and what to do next; it never holds a secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class DeltaError(Exception):
    """Base of all of them. `exit_status` is what `deltactl` ends with."""

    exit_status = 1


# ── the user's: one sentence, nothing half-done ──────────────────────────────────────────────────────────────────


class UsageError(DeltaError):
    """A command, an option, `pipeline.yaml` or `processor.py` says something that cannot be meant."""

    exit_status = 2


class Problem(NamedTuple):
    """One finding of a check: what was looked at (`source`, `sink cache`), what is wrong, and what to change."""

    where: str
    what: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}" if self.fix else f"{self.where}: {self.what}"


class CheckFailed(DeltaError):
    """Source, sinks or transport are not as the pipeline needs them; `problems` holds each finding."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


# ── transient: retried for ever, with backoff; nothing is dropped ────────────────────────────────────────────────


class Transient(DeltaError):
    """It will pass: unreachable, timed out, overloaded. The same call may be made again and must then be harmless.

    `retry_after_s` is the other side's own wish, where it said one.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SinkBusy(Transient):
    """A sink is unreachable, timed out, or asked to slow down (429, 503, LOADING, not primary, …)."""


class ColumnsAdded(SinkBusy):
    """Another process has added columns to a sink's table: look at it again, then write."""


class HandlersBusy(SinkBusy):
    """A handler of events did not take them before Delta stopped: they are delivered again."""


class HandlerTimeout(DeltaError):
    """A handler did not return in time: its event is a dead letter."""


class LookupBusy(Transient):
    """A look-up's service is unreachable, timed out, or asked to slow down."""


class SourceBusy(Transient):
    """The source is unreachable, starting up or shutting down."""


class SchemaChanged(SourceBusy):
    """A table no longer has the columns that were asked for, or is gone: read the catalogue again."""


class StateBusy(Transient):
    """The state store is locked by another process for too long, unreachable, or restarting."""


class NoticesWait(Transient):
    """No notice can be taken at the moment: the pipeline is just starting, or too many wait to be heeded."""


class RegistryBusy(Transient):
    """The schema registry is unreachable, timed out, or asked to slow down."""


class SchemaUnknown(RegistryBusy):
    """The schema registry does not have the schema that a record was written with: it is being restored, or lost it."""

    def __init__(self, message: str, schema_id: int) -> None:
        super().__init__(message)
        self.schema_id = schema_id


# ── permanent, one change: a dead letter ─────────────────────────────────────────────────────────────────────────


class ProcessorError(DeltaError):
    """The user's function raised, or returned what is not a document. The cause is chained."""


class Unstorable(DeltaError):
    """A sink will never take this document: it holds what the store cannot."""


class UndecodableChange(DeltaError):
    """A change event does not fit the table's columns, or is none."""


class EventRefused(DeltaError):
    """A webhook or a topic will never take this event."""


class SchemaUnfit(UndecodableChange):
    """The schema that a record was written with is not Avro, or cannot be read by itself."""


# ── permanent, systematic: the pipeline stops, says why, and drops nothing ───────────────────────────────────────


class PipelineStopped(DeltaError):
    """Going on would lose or spoil data; positions stay where they are."""


class SinkRefused(PipelineStopped):
    """A sink rejects everything: wrong credentials, no such database, a read-only replica, a full disk."""


class StateRefused(PipelineStopped):
    """The state store rejects everything: a full disk, a read-only or damaged file, wrong credentials."""


class TooManyDeadLetters(PipelineStopped):
    """Changes become dead letters faster than the specification's limit."""


class SlotMissing(PipelineStopped):
    """Changes may have been lost (a failover, a slot that is gone or moved), and Delta is not to go on by itself."""


class PipelineRunning(DeltaError):
    """Something that needs a stopped pipeline was asked of a running one, or it was started twice."""


class LeaseLost(DeltaError):
    """Something was to be recorded under a lease that another process has, or had since: stop that work."""


class LoadOverruled(DeltaError):
    """How far a load is was to be recorded, and the table is to be loaded from the start since: begin anew."""


class Outgrown(DeltaError):
    """The process has more memory than it may have. Everything is confirmed; another process goes on."""


class EpochRose(DeltaError):
    """A new epoch has begun in another process, or has to begin: what runs in the old one ends, and begins anew."""


class GenerationsChanged(EpochRose):
    """A sink gets another generation, or loses one: what runs ends, and begins anew with those that are to be."""


class TablesChanged(EpochRose):
    """A table is known now, or is another: what runs ends, and begins anew with the tables as they are."""


class StaleStateStore(DeltaError):
    """The state store was written by a newer Delta."""
