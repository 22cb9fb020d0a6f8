"""The status of a pipeline that is run by several processes, put together from what each says of itself. Pure."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from delta_sync.state import TableLoad

FRESH_S = 15.0  # a process saves its status every second; one that has said nothing for so long is gone or stuck
FORGOTTEN_S = 3600.0  # of one that is gone, for how long it is still shown
# The worst state of any worker is the pipeline's.
_WORST_FIRST = ("failed", "waiting", "starting", "loading", "streaming")


class Member(NamedTuple):
    """One process: its name, what it last said, and how long ago."""

    name: str
    status: Mapping[str, Any]
    age_s: float

    @property
    def there(self) -> bool:
        """Whether it surely runs."""
        return self.age_s <= FRESH_S and self.status.get("state") not in ("stopped", "failed")


def members_of(found: Sequence[tuple[str, Mapping[str, Any], dt.datetime]], now: dt.datetime) -> list[Member]:
    """Return the members that are worth showing, the sidecars first."""
    members = [Member(name, status, (now - saved_at).total_seconds()) for name, status, saved_at in found]
    return sorted(
        (member for member in members if member.age_s < FORGOTTEN_S),
        key=lambda member: (member.status.get("role", ""), not member.there, member.name),
    )


def combined(
    pipeline: str, members: Sequence[Member], loads: Mapping[str, TableLoad], dead_letters: int
) -> dict[str, Any]:
    """Return the status in the form of one process's, with `members` beside it."""
    workers = [member for member in members if member.status.get("role") == "worker" and member.there]
    leads = [m for m in members if m.status.get("role") == "sidecar" and m.there and m.status["sidecar"] == "leading"]
    state, reason = _state(members, workers, leads, loads)
    totals: Counter[str] = Counter()
    sinks: dict[str, dict[str, Any]] = {}
    lookups: dict[str, dict[str, Any]] = {}
    for worker in workers:
        totals.update(worker.status.get("totals", {}))
        for name, numbers in worker.status.get("sinks", {}).items():
            _add(sinks.setdefault(name, {}), numbers)
        for name, numbers in worker.status.get("lookups", {}).items():
            _add(lookups.setdefault(name, {}), numbers)
    statuses = [worker.status for worker in workers]
    partitions = _partitions(workers)
    return {
        "pipeline": pipeline,
        "running": bool(workers or leads),
        "state": state,
        "reason": reason,
        "age_s": None,
        "dead_letters": dead_letters,
        "lag_bytes": _most(status.get("lag_bytes") for status in statuses),
        # Into Kafka, as the connector's heartbeats tell, and from there into the sinks.
        "lag_s": _sum(_most(m.status.get("lag_s") for m in group) for group in (leads, workers)),
        "lag_records": _sum(partition["records"] for partition in partitions),
        "rates": {"changes_per_s": sum(status.get("rates", {}).get("changes_per_s", 0.0) for status in statuses)},
        "totals": dict(totals),
        "sinks": sinks,
        "lookups": lookups,
        "loads": {
            name: {"state": load.state, "rows": load.rows, "reason": load.reason} for name, load in loads.items()
        },
        "dumps": [dump for status in statuses for dump in status.get("dumps", ())],  # of the one that plans them
        "members": [
            {
                "member": member.name,
                "role": member.status.get("role"),
                "state": _state_of(member),
                "leads": member in leads,
                "reason": member.status.get("reason"),
                "partitions": member.status.get("partitions", []),
                "age_s": round(member.age_s, 1),
            }
            for member in members
        ],
        "partitions": partitions,
    }


def _partitions(workers: Sequence[Member]) -> list[dict[str, Any]]:
    """Return how far behind each partition is, and who has it: of two who say so, the one who said it last."""
    found: dict[str, dict[str, Any]] = {}
    for worker in sorted(workers, key=lambda worker: -worker.age_s):
        lags = worker.status.get("partition_lags", {})
        for name in worker.status.get("partitions", []):
            lag = lags.get(name, {})
            records, seconds = lag.get("records"), lag.get("seconds")
            found[name] = {"partition": name, "member": worker.name, "records": records, "seconds": seconds}
    return [found[name] for name in sorted(found)]


def _state(
    members: Sequence[Member], workers: Sequence[Member], leads: Sequence[Member], loads: Mapping[str, TableLoad]
) -> tuple[str, str | None]:
    if not workers and not any(member.there for member in members):
        return "stopped", "no process has said anything lately" if members else "it never ran"
    if not leads:
        return "waiting", "no sidecar leads"
    if not workers:
        return "waiting", "no worker runs"
    waits = [str(member.status["reason"]) for member in leads if member.status.get("state") == "waiting"]
    if waits:
        return "waiting", f"sidecar: {waits[0]}"
    worst = min(workers, key=lambda worker: _WORST_FIRST.index(str(worker.status["state"])))
    state, reason = str(worst.status["state"]), worst.status.get("reason")
    loading = [name for name, load in loads.items() if load.state != "done"]
    if state in ("loading", "streaming"):  # only one of them loads, and says so
        return ("loading", ", ".join(loading)) if loading else ("streaming", None)
    return state, f"{worst.name}: {reason}" if reason else None


def _state_of(member: Member) -> str:
    state = str(member.status.get("state"))
    if not member.there:
        return state if state in ("stopped", "failed") else "gone"
    return state


def _add(total: dict[str, Any], numbers: Mapping[str, Any]) -> None:
    for name, value in numbers.items():
        if isinstance(value, int | float):
            total[name] = total.get(name, 0) + value
        elif isinstance(value, Mapping):
            _add(total.setdefault(name, {}), cast("Mapping[str, Any]", value))
        elif name == "breaker":
            total[name] = value if total.get(name, "closed") == "closed" else total[name]
        elif name == "state":
            total[name] = "busy" if "busy" in (value, total.get(name)) else value
        else:
            total[name] = total.get(name) or value


def _most(values: Iterable[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if known else None
