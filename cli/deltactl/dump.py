"""`deltactl dump …`: rows that are in the source already are brought to the sinks once more, while changes stream."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import click

from delta_sync.changes import Key
from delta_sync.dumps import Dump, Kind, key_from_text, rate_and_left
from delta_sync.errors import DeltaError, UsageError
from delta_sync.pipeline import load_processor
from delta_sync.secrets import redact
from delta_sync.sources import open_reader
from delta_sync.sources.debezium.limits import DUMP_LIMITS
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.watch import ANSWER_S
from deltactl.app import (
    App,
    DeltaGroup,
    key_texts,
    name_argument,
    pass_app,
    print_json,
    print_limits,
    print_table,
    say,
    shared_options,
    warn,
)

LOOK_S = 1.0  # as often as it looks how far a dump is
BAR_WIDTH = 24
ASKED = "it was asked for"


class DumpEnded(DeltaError):
    """A dump that was waited for ended without being done."""


class _Seconds(click.FloatRange):
    """Seconds, which `nan` and `inf` are not, though Python takes them for floats."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        return seconds


@click.group(cls=DeltaGroup, short_help="Read rows from the source again, at any time.")
def dump() -> None:
    """Read rows of the source again, at any time and as many dumps at once as wanted, while changes stream.

    The pipeline does it, in chunks: a dump survives the end of any process, and goes on where it was. Changes of the
    log go first. A first load is a dump, too, and can be paused and throttled like any other.
    """


table_option = click.option("--table", "tables", multiple=True, help="A table, as public.movie; may be repeated.")
rate_option = click.option(
    "--rows-per-second", type=click.IntRange(min=1), help="Read no more than so many, for the source's sake."
)
parallel_option = click.option(
    "--parallel", type=click.IntRange(min=1), help="So many chunks at once, in all processes."
)
id_argument = click.argument("id_", metavar="ID", type=int)


@dump.command()
@name_argument
@table_option
@click.option("--keys", help="Only the rows with these keys, with commas between them.")
@click.option(
    "--keys-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Only the rows with the keys in this file, one a line.",
)
@click.option("--where", help="Only the rows that meet this condition, in the source's SQL.")
@click.option("--sink", "sinks", multiple=True, help="Only into this sink; may be repeated.")
@rate_option
@parallel_option
@click.option(
    "--timeout",
    type=_Seconds(min=0),
    help="Fail when old transactions hold it up for so many seconds.",
)
@click.option("--wait", is_flag=True, help="Show how far it is until it has ended; exit status 1 unless it is done.")
@shared_options
@pass_app
def start(
    app: App,
    name: str,
    tables: tuple[str, ...],
    keys: str | None,
    keys_file: Path | None,
    where: str | None,
    sinks: tuple[str, ...],
    rows_per_second: int | None,
    parallel: int | None,
    timeout: float | None,
    wait: bool,
) -> None:
    """Start a dump of each table, of all of them without --table. Rows come as they are in the source now.

    A dump of whole tables removes documents whose row is not there; one by keys removes those of its keys that are not
    there; one with a condition removes nothing. Keys of several columns are written with colons: north:17.

    \b
    Examples:
      deltactl dump start movies --table public.movie --wait
      deltactl dump start movies --table public.movie --keys 17,21
      deltactl dump start movies --table public.movie --where "year > 1990" --rows-per-second 500
    """
    spec = app.load(name)
    pipeline = load_processor(app.home(name), spec)
    for table in tables:
        pipeline.check_has_documents(table, "--table")
    unknown = [sink for sink in sinks if sink not in spec.sinks]
    if unknown:
        raise UsageError(f"--sink: pipeline {name} has no {unknown[0]!r}; it has {', '.join(spec.sinks)}.")
    chosen = pipeline.going_to(sinks, tables)
    parts = [
        option
        for option, given in (("--keys", keys), ("--keys-file", keys_file), ("--where", where))
        if given is not None
    ]
    if len(parts) > 1:
        raise UsageError(f"Give one of {' and '.join(parts)}; a dump has one way to choose rows.")
    if parts and len(tables) != 1:
        raise UsageError(f"{parts[0]} is about the rows of one table: name it with --table.")
    by_signal = spec.source.kind == "debezium"
    if by_signal:
        given = {"--sink": sinks, "--rows-per-second": rows_per_second, "--parallel": parallel, "--timeout": timeout}
        _refuse_what_debezium_cannot(next((option for option, value in given.items() if value), None))
    kind: Kind = "table" if not parts else "where" if where is not None else "keys"
    if where is not None and not where.strip():
        raise UsageError("--where has no condition.")
    texts = key_texts(keys, keys_file) if kind == "keys" else []
    wanted = _checked(spec, tables[0], texts, where) if parts else []
    with _dumps(app, name) as (_, store):
        ids = [
            store.add(
                Dump(
                    table=table,
                    kind=kind,
                    reason=ASKED,
                    where=where,
                    sinks=tuple(dict.fromkeys(sinks)) or None,
                    rows_per_s=rows_per_second,
                    parallel=parallel,
                    timeout_s=timeout,
                ),
                wanted,
            )
            for table in chosen
        ]
        runs = spec.transport == "kafka" or app.is_running(name)
        if not runs:
            warn(f"Pipeline {name} is not running; the dump begins when it is.")
        if by_signal and not app.json:
            print_limits(DUMP_LIMITS)
        found = follow(store, ids, as_json=app.json) if wait else _found(store, ids)
    if app.json:
        print_json([as_json(one) for one in found])
    elif not wait:
        for one in found:
            say(f"Dump {one.id} of {one.table}.")
    bad = [one for one in found if wait and one.state != "done"]
    if bad:
        raise DumpEnded(f"Dump {bad[0].id} of {bad[0].table} is {bad[0].state}: {bad[0].waits}")


@dump.command("list")
@name_argument
@click.option("--all", "all_", is_flag=True, help="Those that have ended, too.")
@shared_options
@pass_app
def list_(app: App, name: str, all_: bool) -> None:
    """List the dumps, the latest last.

    \b
    Example:
      deltactl dump list movies --all
    """
    with _dumps(app, name) as (_, store):
        found = store.all(unfinished=not all_)
    if app.json:
        print_json([as_json(one) for one in found])
        return
    if not found:
        warn(f"Pipeline {name} has no dumps{'' if all_ else ' under way; --all shows those that have ended'}.")
        return
    print_table(
        ["ID", "TABLE", "KIND", "STATE", "ROWS", "OF ABOUT", "WHY"],
        [[one.id, one.table, one.kind, one.state, one.rows, one.estimate, one.waits or one.reason] for one in found],
    )


@dump.command()
@name_argument
@id_argument
@click.option("--wait", is_flag=True, help="Go on showing it until it has ended; exit status 1 unless it is done.")
@shared_options
@pass_app
def show(app: App, name: str, id_: int, wait: bool) -> None:
    """Show a dump: how far it is, and for what it waits (a transaction's pid, age and query).

    \b
    Example:
      deltactl dump show movies 3
    """
    with _dumps(app, name) as (_, store):
        (found,) = follow(store, [id_], as_json=app.json) if wait else _found(store, [id_])
        counts = store.counts().get(id_)
    if app.json:
        chunks = {"free": counts.free, "under_way": counts.leased} if counts else {"free": 0, "under_way": 0}
        print_json({**as_json(found), "chunks": chunks})
    elif not wait:
        for label, value in as_json(found).items():
            if value not in (None, []):
                say(f"{label:<14}  {value}")
        if counts:
            say(f"{'chunks':<14}  {counts.leased} under way, {counts.free} planned")
    if wait and found.state != "done":
        raise DumpEnded(f"Dump {found.id} of {found.table} is {found.state}: {found.waits}")


@dump.command()
@name_argument
@id_argument
@shared_options
@pass_app
def pause(app: App, name: str, id_: int) -> None:
    """Pause a dump. What is being read is finished; it goes on there when it is resumed.

    \b
    Example:
      deltactl dump pause movies 3
    """
    _order(app, name, id_, "pause")


@dump.command()
@name_argument
@id_argument
@shared_options
@pass_app
def resume(app: App, name: str, id_: int) -> None:
    """Let a paused dump go on.

    \b
    Example:
      deltactl dump resume movies 3
    """
    _order(app, name, id_, "resume")


@dump.command()
@name_argument
@id_argument
@shared_options
@pass_app
def cancel(app: App, name: str, id_: int) -> None:
    """End a dump. What it has brought to the sinks stays, and nothing is removed. A load cannot be cancelled.

    \b
    Example:
      deltactl dump cancel movies 3
    """
    _order(app, name, id_, "cancel")


@dump.command()
@name_argument
@id_argument
@rate_option
@parallel_option
@click.option("--unlimited", is_flag=True, help="Take both limits away.")
@shared_options
@pass_app
def throttle(app: App, name: str, id_: int, rows_per_second: int | None, parallel: int | None, unlimited: bool) -> None:
    """Limit how fast a dump reads, from its next chunk on.

    \b
    Example:
      deltactl dump throttle movies 3 --rows-per-second 1000 --parallel 1
    """
    if unlimited == (rows_per_second is not None or parallel is not None):
        raise UsageError("Give --rows-per-second, --parallel or both; or --unlimited.")
    given = {"rows_per_s": rows_per_second, "parallel": parallel}
    limits = {key: value for key, value in given.items() if unlimited or value is not None}
    if app.load(name).source.kind == "debezium":
        _refuse_what_debezium_cannot("throttle")
    _order(app, name, id_, "throttle", limits)


def _refuse_what_debezium_cannot(what: str | None) -> None:
    if what is not None:
        raise UsageError(
            f"{what} is not possible where Debezium reads the rows (source.url is debezium://…): it reads chunk after"
            " chunk at its own rate, into every sink; pause the dump, or make load.chunk_rows smaller."
        )


def as_json(found: Dump) -> dict[str, Any]:
    """Return a dump as `--json` prints it. Pure."""
    times = {"created": found.created_at, "started": found.started_at, "finished": found.finished_at}
    return {
        "id": found.id,
        "table": found.table,
        "kind": found.kind,
        "state": found.state,
        "rows": found.rows,
        "estimate": found.estimate,
        "reason": found.reason,
        "waits": found.waits,
        "where": found.where,
        "sinks": None if found.sinks is None else list(found.sinks),
        "rows_per_s": found.rows_per_s,
        "parallel": found.parallel,
        "timeout_s": found.timeout_s,
        **{what: None if at is None else at.isoformat(timespec="milliseconds") for what, at in times.items()},
    }


def as_bar(found: Dump, before: tuple[float, int] | None, now: float) -> str:
    """Return a dump as a line with a bar, its rate since an earlier look, and the time left. Pure."""
    rate, left_s = rate_and_left(before, (now, found.rows), found.estimate)
    share = 1.0 if found.state == "done" else min(0.99, found.rows / found.estimate) if found.estimate else 0.0
    full = round(share * BAR_WIDTH)
    text = f"{found.table:<24} {'█' * full}{'░' * (BAR_WIDTH - full)} {share:4.0%}  {found.rows:,} rows"
    if rate is not None and found.state == "running":
        text += f"  {rate:,.0f}/s"
        if left_s is not None:
            text += f"  {int(left_s) // 60}:{int(left_s) % 60:02} left"
    text += f"  {found.state}" if found.state != "running" else ""
    return text + (f": {found.waits}" if found.waits else "")


def follow(store: DumpStore, ids: Sequence[int], *, as_json: bool) -> list[Dump]:
    """Show dumps until all have ended, to people on a terminal; return them."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    first: dict[int, tuple[float, int]] = {}
    shows = sys.stdout.isatty() and not as_json
    with Live(console=Console(), auto_refresh=False) if shows else contextlib.nullcontext() as live:
        while True:
            found, now = _found(store, ids), time.monotonic()
            lines = [as_bar(one, first.get(one.id), now) for one in found]
            for one in found:
                if one.state == "running":
                    first.setdefault(one.id, (now, one.rows))
            if live is not None:
                live.update(Text(redact("\n".join(lines))), refresh=True)
            if not any(one.unfinished for one in found):
                if live is None and not as_json:
                    for line in lines:
                        say(line)
                return found
            time.sleep(LOOK_S)


def _found(store: DumpStore, ids: Sequence[int]) -> list[Dump]:
    found = [store.get(id_) for id_ in ids]
    for id_, one in zip(ids, found, strict=True):
        if one is None:
            raise UsageError(f"There is no dump {id_}; `deltactl dump list --all` shows those that there are.")
    return [one for one in found if one is not None]


def _order(app: App, name: str, id_: int, order: Any, limits: dict[str, int | None] | None = None) -> None:
    with _dumps(app, name) as (_, store):
        found = store.order(id_, order, **(limits or {}))
    if app.json:
        print_json(as_json(found))
    else:
        say(f"Dump {found.id} of {found.table} is {found.state}.")


def _checked(spec: PipelineSpec, table: str, texts: Sequence[str], where: str | None) -> list[Key]:
    """Return keys as the source has them, and have it look at the condition. Raises UsageError, SourceBusy."""
    reader = open_reader(spec, f"delta {spec.name} dump", ANSWER_S)
    try:
        found = reader.tables([table]).get(table)
        if found is None:
            raise UsageError(f"The source has no table {table}.")
        if where is not None:
            reader.check_condition(found, where)
        return [key_from_text(found, text) for text in texts]
    finally:
        reader.close()


@contextlib.contextmanager
def _dumps(app: App, name: str) -> Generator[tuple[PipelineSpec, DumpStore]]:
    """Open the pipeline's dumps. Raises UsageError when it never ran: then its run loads everything anyway."""
    spec = app.load(name)
    state = StateStore.open(spec.state, app.home(name), create=False)
    if state is None:
        raise UsageError(f"Pipeline {name} never ran; its first run loads all of its tables.")
    with state:
        yield spec, DumpStore(state, name)
