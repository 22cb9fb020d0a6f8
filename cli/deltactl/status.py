"""`deltactl status`: what the worker last said of itself, and whether it still runs."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from delta_sync.generations import GenerationStore
from delta_sync.secrets import redact
from delta_sync.state import StateStore
from deltactl.app import App, name_argument, pass_app, print_json, say, shared_options
from deltactl.members import combined, members_of

WATCH_S = 1.0  # as often as the worker saves it
STALE_S = 15.0  # a worker that has saved nothing for this long is stuck, or its machine is

PARTITIONS_SHOWN = 12  # a screen has room for them; --json has all

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


@click.command(short_help="Show what a pipeline does, once or all the time.")
@name_argument
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C; with --json one line each.")
@shared_options
@pass_app
def status(app: App, name: str, watch: bool) -> None:
    """Show what a pipeline does: state, lag, rates, sinks, loads, dead letters; on Kafka its processes and partitions.

    \b
    Example:
      deltactl status movies --watch
    """
    spec = app.load(name)
    folder = app.home(name)

    def look() -> dict[str, Any]:
        running = app.is_running(name)
        store = StateStore.open(spec.state, folder, create=False)
        if store is None:
            return current(name, None, None, 0, running=running, now=_now())
        with store:
            rows = GenerationStore(store, name).all()
            rebuilt = {"generations": {sink: row._asdict() for sink, row in rows.items()}} if rows else {}
            return {**found_in(store, running=running), **rebuilt}

    def found_in(store: StateStore, *, running: bool) -> dict[str, Any]:
        if spec.transport == "kafka":
            members = members_of(store.members(name), store.database_now())
            return combined(name, members, store.loads(name), store.count_dead_letters(name))
        found = store.status(name)
        document, saved_at = found if found is not None else (None, None)
        return current(name, document, saved_at, store.count_dead_letters(name), running=running, now=_now())

    if not watch:
        if app.json:
            print_json(look())
        else:
            say(as_text(look()))
        return
    if app.json or not sys.stdout.isatty():
        while True:
            found = look()
            say(json.dumps(found, ensure_ascii=False, default=str) if app.json else as_text(found) + "\n")
            sys.stdout.flush()
            time.sleep(WATCH_S)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(Text(redact(as_text(look()))), refresh=True)
            time.sleep(WATCH_S)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def current(
    name: str,
    document: Mapping[str, Any] | None,
    saved_at: dt.datetime | None,
    dead_letters: int,
    *,
    running: bool,
    now: dt.datetime,
) -> dict[str, Any]:
    """Return the status as it is now: what was saved, corrected by what the run lock says. Pure.

    A saved document keeps its fields. `running` is whether the run lock is held; `age_s` is how old the document is;
    `dead_letters` is how many there are now. A worker that was killed could not say so: then `state` is `stopped`.
    """
    fresh: dict[str, Any] = {"pipeline": name, "running": running, "age_s": None, "dead_letters": dead_letters}
    if document is None or saved_at is None:
        return {**fresh, "state": "starting" if running else "stopped", "reason": None if running else "it never ran"}
    found = {**document, **fresh, "age_s": round((now - saved_at).total_seconds(), 1)}
    state = found.get("state")
    if not running and state not in ("stopped", "failed"):
        found |= {"state": "stopped", "reason": f"the process was gone without a word while it was {state}"}
        found |= {"lag_bytes": None, "lag_s": None, "rates": {}}
    elif running and found["age_s"] > STALE_S and not found.get("reason"):
        found["reason"] = f"the process runs, but has said nothing for {found['age_s']:.0f} s"
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """Return a status for people. Pure."""
    totals: Mapping[str, Any] = found.get("totals") or {}
    rates: Mapping[str, Any] = found.get("rates") or {}
    state = f"{found['state']}" + (f": {found['reason']}" if found.get("reason") else "")
    lines = [("pipeline", found["pipeline"]), ("state", state)]
    if found.get("since"):
        lines.append(("since", str(found["since"])))
    if found.get("pid") and found["running"]:
        lines.append(("process", str(found["pid"])))
    if found.get("lag_bytes") is not None or found.get("lag_s") is not None:
        parts = [_bytes(found["lag_bytes"])] if found.get("lag_bytes") is not None else []
        parts += [f"{found['lag_s']:.1f} s"] if found.get("lag_s") is not None else []
        parts += [_records(found["lag_records"])] if found.get("lag_records") is not None else []
        lines.append(("lag", ", ".join(parts)))
    if totals:
        rate = f" ({rates['changes_per_s']:.0f}/s)" if "changes_per_s" in rates else ""
        lines.append(("changes", f"{totals.get('changes', 0):,}{rate}"))
        lines.append(("writes", f"{totals.get('writes', 0):,}"))
    if totals.get("positions_expired"):
        gaps = totals["positions_expired"]
        lines.append(("expired", f"records of {gaps:,} partition{'s' * (gaps != 1)}; their tables are loaded again"))
    hint = f" (see: deltactl dead list {found['pipeline']})" if found["dead_letters"] else ""
    lines.append(("dead letters", f"{found['dead_letters']:,}{hint}"))
    sinks: Mapping[str, Mapping[str, Any]] = found.get("sinks") or {}
    lines += [(f"sink {sink}", _sink(numbers)) for sink, numbers in sinks.items()]
    generations: Mapping[str, Mapping[str, Any]] = found.get("generations") or {}
    lines += [(f"readers of {sink}", _generation(row)) for sink, row in generations.items()]
    lookups: Mapping[str, Mapping[str, Any]] = found.get("lookups") or {}
    lines += [(f"look-up {lookup}", _lookup(numbers)) for lookup, numbers in lookups.items()]
    loads: Mapping[str, Mapping[str, Any]] = found.get("loads") or {}
    lines += [(f"load {table}", _load(load)) for table, load in loads.items()]
    lines += [(f"dump {dump['dump']}", _dump(dump)) for dump in found.get("dumps") or ()]
    lines += [(f"{member['role']}", _member(member)) for member in found.get("members") or ()]
    lines += [("partition", text) for text in _partitions(found.get("partitions") or ())]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def _sink(numbers: Mapping[str, Any]) -> str:
    text = f"{numbers.get('state', '?')}, {numbers.get('applied', 0):,} applied, {numbers.get('stale', 0):,} stale"
    text += f", {numbers.get('rejected', 0):,} rejected"
    if numbers.get("writes_per_s") is not None:
        text += f", {numbers['writes_per_s']:.0f}/s"
    return text + (f": {numbers['reason']}" if numbers.get("reason") else "")


def _generation(row: Mapping[str, Any]) -> str:
    """Return which generation of a sink readers see, and what the other is, as `delta_sync.generations` has it."""
    text = f"see generation {row['serving']}"
    return text + (f"; {row['other']} is {_STATES.get(row['state'], row['state'])}" if row["other"] else "")


_STATES = {"building": "being built", "kept": "kept for a way back", "dropping": "being removed"}


def _lookup(numbers: Mapping[str, Any]) -> str:
    """Return the breaker's state where it is worth a word, calls, and how much was remembered."""
    breaker = numbers.get("breaker", "closed")
    calls: Mapping[str, int] = numbers.get("calls") or {}
    hits, asked, left = (int(numbers.get(what) or 0) for what in ("hits", "asked", "left"))
    text = "ok" if breaker == "closed" else f"breaker {breaker}"
    text += f", {sum(calls.values()):,} calls, {calls.get('busy', 0) + calls.get('failed', 0):,} of them failed"
    text += f", {100 * hits // (hits + asked)} % remembered" if hits + asked else ""
    return text + (f", {left:,} keys left for later" if left else "")


def _load(load: Mapping[str, Any]) -> str:
    rows, estimate = load.get("rows", 0), load.get("estimate")
    text = f"{load.get('state', '?')}, {rows:,} rows"
    if estimate and load.get("state") != "done":
        # The estimate is the planner's: a load may well find more rows than that.
        text += f" of about {estimate:,} ({min(99, 100 * rows // estimate)} %)"
    if load.get("reason") and load.get("state") != "done":
        text += f": {load['reason']}"
    return text


def _dump(dump: Mapping[str, Any]) -> str:
    text = f"{dump['table']}, {_load({**dump, 'reason': None})}"
    if dump["rows_per_s"] is not None and dump["state"] == "running":
        text += f", {dump['rows_per_s']:.0f}/s"
    return text + (f"; waits: {dump['waits']}" if dump["waits"] else "")


def _member(member: Mapping[str, Any]) -> str:
    held = len(member["partitions"])
    text = f"{member['member']}: " + ("leads, " if member.get("leads") else "") + str(member["state"])
    text += f", {held} partition{'s' * (held != 1)}" if held else ""
    return text + (f": {member['reason']}" if member.get("reason") else "")


def _partitions(partitions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each partition that is behind, the worst first; of many, only some."""
    behind = sorted((some for some in partitions if some["records"]), key=lambda some: -int(some["records"]))
    texts: list[str] = []
    for some in behind[:PARTITIONS_SHOWN]:
        since = f", {some['seconds']:.1f} s" if some["seconds"] is not None else ""
        texts.append(f"{some['partition']}: {_records(some['records'])}{since}, at {some['member']}")
    left = len(behind) - len(texts)
    return [*texts, f"{left} more are behind: --json"] if left else texts


def _records(count: int) -> str:
    return f"{count:,} record{'s' * (count != 1)}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in _BYTES[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_BYTES[-1]}"
