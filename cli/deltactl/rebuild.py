"""`deltactl pipeline rebuild`: a new generation of a sink is built beside the old one, verified, and takes over."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from delta_sync import logs
from delta_sync.applied_log import pipeline_runs
from delta_sync.dumps import Dump
from delta_sync.errors import CheckFailed, DeltaError, SinkRefused, UsageError
from delta_sync.generations import Generations, GenerationStore, follow, next_step
from delta_sync.pipeline import load_processor
from delta_sync.running import settle_memory
from delta_sync.sinks import AnySink, open_sink, sink_class
from delta_sync.sinks.base import Target
from delta_sync.sources import open_reader
from delta_sync.sources.debezium.limits import need_client
from delta_sync.spec import PipelineSpec
from delta_sync.starting import read_tables, targets_of_sink
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from delta_sync.verification import Unverified
from delta_sync.verification_setup import Wanted, open_verification
from delta_sync.verifying import Finding, Tally
from delta_sync.watch import ANSWER_S
from deltactl.app import (
    App,
    confirm,
    dry_run_option,
    name_argument,
    pass_app,
    print_json,
    say,
    shared_options,
    warn,
    yes_option,
)

LOOK_S = 1.0  # as often as the pipeline itself looks for dumps
SHOWN = 5  # differences: enough to see what is wrong; `deltactl verify` has them all


class NotSwitched(DeltaError):
    """The new generation is not as it has to be; readers see the old one."""


class Site(NamedTuple):
    """The sink of a pipeline that is rebuilt, and where things are kept."""

    spec: PipelineSpec
    folder: Path
    sink: str
    state: StateStore
    rows: GenerationStore
    dumps: DumpStore

    def row(self) -> Generations:
        """Return the sink's generations as they are now."""
        return self.rows.all().get(self.sink, Generations(self.sink))

    def tables(self) -> list[str]:
        """Return the tables whose documents go to the sink."""
        processors = load_processor(self.folder, self.spec).tables
        return [name for name, one in processors.items() if not one.to or self.sink in one.to]


@click.command(short_help="Build a sink anew beside the old one, verify it, and let it take over.")
@name_argument
@click.option("--sink", required=True, help="The sink.")
@click.option("--back", is_flag=True, help="Lead readers back to the generation before; once more: forth again.")
@click.option("--drop-old", is_flag=True, help="Remove the generation that readers no longer see.")
@click.option("--cancel", is_flag=True, help="Give up a rebuild that is under way, and remove what is there of it.")
@dry_run_option
@yes_option
@shared_options
@pass_app
def rebuild(app: App, name: str, sink: str, back: bool, drop_old: bool, cancel: bool, dry_run: bool, yes: bool) -> None:
    """Build a new generation of a sink beside the one that readers see, verify it, and lead readers to it in one step.

    The pipeline builds it, while changes go to both. It may be interrupted anywhere: type it again and it goes on. The
    old generation is kept, and written, until --drop-old. For all kinds of sinks but Parquet.

    \b
    Examples:
      deltactl pipeline rebuild movies --sink search
      deltactl pipeline rebuild movies --sink search --back
      deltactl pipeline rebuild movies --sink search --drop-old
    """
    asked = [option for option, given in (("--back", back), ("--drop-old", drop_old), ("--cancel", cancel)) if given]
    if len(asked) > 1:
        raise UsageError(f"Give one of {' and '.join(asked)}.")
    spec = app.load(name)
    need_client(spec, "`deltactl pipeline rebuild`")
    _refuse_unsupported(spec, sink)
    logs.configure("auto", "warning")
    settle_memory()
    with _site(spec, app.home(name), sink) as site:
        row = site.row()
        after = (
            row.back() if back else row.dropped("kept") if drop_old else row.dropped("building") if cancel
            else row if row.state == "building" else row.begun()
        )  # fmt: skip
        if dry_run:
            _tell(app, site, row, after, _plan(row, after))
            return
        if not pipeline_runs(site.state, name, members=spec.transport == "kafka"):
            warn(f"Pipeline {name} is not running; what it has to do begins when it is.")
        if back:
            _switch(site, row, after)
        elif drop_old or cancel:
            confirm(f"{_plan(row, after)} Do it?", yes=yes)
            site.rows.change(row, after)
        else:
            if after != row:
                _begin(site, row, after)
            _fill(site, after)
            _verify(site, after)
            row, after = after, after.switched()
            _switch(site, row, after)
        _tell(app, site, row, after, _outcome(after))


def _refuse_unsupported(spec: PipelineSpec, sink: str) -> None:
    if sink not in spec.sinks:
        raise UsageError(f"--sink: pipeline {spec.name} has no {sink!r}; it has {', '.join(spec.sinks)}.")
    if not sink_class(sink, spec.sinks[sink].url).generations:
        raise UsageError(
            f"Sink {sink} cannot be rebuilt beside itself: its store has no name that could be led elsewhere in one"
            f" step. Add a second sink to {spec.name}, verify it, and let its readers change over."
        )


@contextlib.contextmanager
def _site(spec: PipelineSpec, folder: Path, sink: str) -> Generator[Site]:
    state = StateStore.open(spec.state, folder, create=False)
    if state is None:
        raise UsageError(f"Pipeline {spec.name} never ran, so there is nothing to rebuild.")
    with state:
        yield Site(spec, folder, sink, state, GenerationStore(state, spec.name), DumpStore(state, spec.name))


@contextlib.contextmanager
def _opened(site: Site, number: int) -> Generator[tuple[AnySink, list[Target]]]:
    """Yield a generation of the sink, and where all its tables' documents go."""
    spec, pipeline = site.spec, load_processor(site.folder, site.spec)
    reader = open_reader(spec, f"delta {spec.name} rebuild", ANSWER_S)
    try:
        tables = read_tables(spec, reader)
    finally:
        reader.close()
    sink = open_sink(site.sink, spec.sinks[site.sink], spec.tombstone_ttl, number)
    try:
        yield sink, targets_of_sink(pipeline, sink, tables.values(), spec)
    finally:
        sink.close()


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _begin(site: Site, row: Generations, after: Generations) -> None:
    """Begin a rebuild, in a place where nothing is, of a sink that is complete."""
    loads = site.state.loads(site.spec.name)
    undone = [name for name in site.tables() if name not in loads or loads[name].state != "done"]
    if undone:
        raise UsageError(f"Table {undone[0]} is not loaded yet; rebuild the sink when `deltactl status` says it is.")
    assert after.other is not None, "it is the new one"
    with _opened(site, after.other) as (sink, targets):
        problems = sink.check(targets)
        if any(problem.fatal for problem in problems):
            raise CheckFailed(problems)
        for target in targets:
            sink.prepare(target)
            if sink.newest_version(target):
                raise UsageError(f"There is something at {target.place} already, which Delta does not know; remove it.")
    site.rows.change(row, after)


def _fill(site: Site, row: Generations) -> None:
    """Have the new generation filled, and wait for it. Where a dump is cancelled or fails, another follows."""
    assert row.other is not None, "it is the new one"
    name = row.name(row.other)
    told: set[int] = set()
    while True:
        _still(site, row)
        dumps = site.dumps.all()
        steps = {table: next_step(table, dumps, name) for table in site.tables()}
        for table, step in steps.items():
            if step == "dump":
                id_ = site.dumps.add(
                    Dump(table=table, kind="table", reason=f"sink {site.sink} is rebuilt", sinks=(name,))
                )
                if id_ not in told:
                    told.add(id_)
                    warn(f"Dump {id_} fills {name} with {table}; `deltactl dump show {site.spec.name} {id_}` shows it.")
        if all(step == "verify" for step in steps.values()):
            return
        time.sleep(LOOK_S)


def _still(site: Site, row: Generations) -> None:
    if site.row() != row:
        raise NotSwitched("Somebody else has changed the sink's generations meanwhile; look at them, and begin again.")


def _verify(site: Site, row: Generations) -> None:
    """Raise NotSwitched unless the new generation is equal to the source."""
    assert row.other is not None, "it is the new one"
    name = row.name(row.other)
    shown = _Shown()
    total = Tally()
    with open_verification(site.folder, site.spec, Wanted(sinks=(name,)), shown, threading.Event()) as opened:
        for subject in opened.subjects:
            total = total.plus(opened.verifier.verify(subject))
        loaded = {subject.table.id for subject in opened.subjects}
    reason = why_not_switch(total, [table for table in site.tables() if table not in loaded], shown.left_out)
    if reason is not None:
        raise NotSwitched(
            f"{name} does not take over: {reason}. Readers see what they saw. `deltactl verify {site.spec.name} --sink"
            f" {name}` shows more, --repair mends it; then type this again."
        )


def why_not_switch(total: Tally, unread: Sequence[str], unverified: int) -> str | None:
    """Return why a verification does not allow a new generation to take over; None: it does. Pure."""
    if unread:
        return f"table {unread[0]} was not verified"
    for count, what in (
        (total.differences, "differences from the source"),
        (total.failed, "rows that fail in processor.py"),
        (total.dead, "keys with dead letters (deltactl dead list), which it may lack and the old one have"),
        (total.unsettled, "keys that kept changing, or whose changes never came"),
        (unverified, "places that could not be looked at"),
    ):
        if count:
            return f"there are {what}: {count}"
    return None


def _switch(site: Site, row: Generations, after: Generations) -> None:
    """Save what is meant, then lead readers there; where they cannot be led, what was meant before is meant again."""
    site.rows.change(row, after)

    def lead(number: int) -> None:
        with _opened(site, number) as (sink, targets):
            sink.lead_readers(targets)

    try:
        follow(lambda: site.row().serving, lead)
    except SinkRefused:
        site.rows.change(after, row)
        follow(lambda: site.row().serving, lead)
        raise


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Shown:
    """Shows the first differences of a verification."""

    def __init__(self) -> None:
        self._told = 0
        self.left_out = 0

    def begin(self, table: str, estimate: int | None) -> None:
        """Begin a table."""
        del estimate
        warn(f"Verifying {table} …")

    def looked(self, table: str, tally: Tally) -> None:
        """Say nothing while it goes on."""

    def found(self, finding: Finding) -> None:
        """Show a difference."""
        self._told += 1
        if self._told <= SHOWN:
            warn(f"{finding.sink} {finding.table} {finding.key}: {finding.kind}")

    def unverified(self, one: Unverified) -> None:
        """Count what cannot be told."""
        del one
        self.left_out += 1

    def waits(self, reason: str | None) -> None:
        """Say what it waits for."""
        if reason is not None:
            warn(f"It waits: {reason}")


def _plan(row: Generations, after: Generations) -> str:
    if after.state == "dropping":
        return f"Generation {after.other} of sink {row.sink} is removed, with all its documents."
    if after.serving != row.serving:
        return f"Readers of sink {row.sink} are led from generation {row.serving} to {after.serving}."
    return (
        f"Generation {after.other} of sink {row.sink} is built beside {row.serving}, filled from the source and"
        f" verified; then readers are led to it. Generation {row.serving} is kept."
    )


def _outcome(row: Generations) -> str:
    if row.state == "dropping":
        return f"Generation {row.other} of sink {row.sink} is given up; the pipeline begins a new run, and removes it."
    return (
        f"Readers of sink {row.sink} see generation {row.serving}. Generation {row.other} is kept and written; --back"
        " leads readers to it, --drop-old removes it."
    )


def _tell(app: App, site: Site, row: Generations, after: Generations, text: str) -> None:
    if app.json:
        found: dict[str, Any] = {"pipeline": site.spec.name, **after._asdict(), "before": row._asdict()}
        print_json(found)
    else:
        say(text)
