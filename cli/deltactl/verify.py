"""`deltactl verify`: proof that the sinks are equal to the source, and repair where they are not."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from delta_sync import logs
from delta_sync.running import settle_memory
from delta_sync.sources.debezium.limits import need_client
from delta_sync.spec import format_duration, parse_duration_s
from delta_sync.values import to_json
from delta_sync.verification import Stopped, Subject, Unverified
from delta_sync.verification_setup import Opened, Wanted, open_verification
from delta_sync.verifying import Ages, Finding, Tally, excerpt, pause_s
from deltactl.app import (
    INTERRUPTED,
    App,
    confirm,
    dry_run_option,
    name_argument,
    pass_app,
    print_table,
    say,
    shared_options,
    warn,
    yes_option,
)

SHOWN = 20  # findings of a table that a person is shown; programs get all
VALUE_WIDTH = 60


class _Share(click.ParamType[float]):
    """A share, as 0.1 or 10%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return a number above 0 and at most 1."""
        text = str(value)
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            self.fail(f"{text!r} is no share; write it like 0.1 or 10%.", param, ctx)
        return share


class _Duration(click.ParamType[float]):
    """A duration, as `pipeline.yaml` writes them."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        try:
            return parse_duration_s(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


@click.command(short_help="Prove that the sinks are equal to the source; repair.")
@name_argument
@click.option("--table", "tables", multiple=True, help="Only this table, as public.movie; may be given again.")
@click.option("--sink", "sinks", multiple=True, help="Only this sink; may be given again.")
@click.option("--sample", type=_Share(), default=1.0, help="Only such a share of the rows, chosen at random: 0.1, 10%.")
@click.option(
    "--skip-enrichment",
    "skipped",
    multiple=True,
    metavar="FIELD",
    help="Leave a field of the documents out, because a look-up fills it; a look-up by that name is not asked.",
)
@click.option("--repair", is_flag=True, help="Write what is missing or different, and remove what is extra.")
@click.option("--continuous", is_flag=True, help="Begin again after the last table, until Ctrl-C.")
@click.option("--load-share", type=_Share(), default=None, help="How much of the time the source may be busy with it.")
@click.option(
    "--patience", type=_Duration(), default=60.0, help="How long to look at a key that keeps changing (default: 1m)."
)
@dry_run_option
@yes_option
@shared_options
@pass_app
def verify(
    app: App,
    name: str,
    tables: tuple[str, ...],
    sinks: tuple[str, ...],
    sample: float,
    skipped: tuple[str, ...],
    repair: bool,
    continuous: bool,
    load_share: float | None,
    patience: float,
    dry_run: bool,
    yes: bool,
) -> None:
    """Compare every row of the source, put through processor.py, with what the sinks hold.

    The pipeline may run meanwhile: changes on their way are told apart by their versions, looked at again, and never
    reported. Without --repair nothing is written but a heartbeat in the source's log.

    Exit status: 0 when no difference was found, or all were repaired; 1 when there is one, or it could not be told; 2
    for wrong usage. With --json each finding is a line, and the last line has the numbers.

    \b
    Examples:
      deltactl verify movies
      deltactl verify movies --table public.movie --sink cache --sample 1%
      deltactl verify movies --repair --yes
    """
    spec = app.load(name)
    need_client(spec, "`deltactl verify`")
    logs.configure("auto", "warning")
    settle_memory()
    if repair and not dry_run:
        confirm(f"Write to the sinks of pipeline {name} where they differ from the source?", yes=yes)
    stopping = threading.Event()
    share = load_share or (0.1 if continuous else 1.0)

    def pace(busy_s: float) -> None:
        stopping.wait(pause_s(busy_s, share))

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    wanted = Wanted(tables, sinks, frozenset(skipped), sample, repair and not dry_run, patience)
    shown = _Shown(app.json, sample)
    with shown, open_verification(app.home(name), spec, wanted, shown, stopping, pace) as opened:
        try:
            shown.ages = Ages(subject.table.id for subject in opened.subjects)
            total = _verify_all(opened, shown, resume=continuous)
            while continuous:
                shown.round(name, total, opened)
                total = _verify_all(opened, shown, resume=True)
        except Stopped:
            shown.stop()
            warn("It was stopped; what was found until then stands above.")
            raise click.exceptions.Exit(INTERRUPTED) from None
    left = total.differences - total.repaired
    shown.end(name, total, log_rests=opened.verifier.log_rests)
    if left or total.failed or total.unsettled:
        raise click.exceptions.Exit(1)


def _verify_all(opened: Opened, shown: _Shown, *, resume: bool) -> Tally:
    total, rounds = Tally(), opened.rounds
    for subject in rounds.in_turn(opened.subjects) if rounds is not None and resume else opened.subjects:
        tally = opened.verifier.verify(subject) if rounds is None else rounds.verify(subject, resume=resume)
        shown.table(subject, tally)
        total = total.plus(tally)
    return total


class _Shown:
    """What a verification tells: lines of JSON for a program; findings, and a bar with rate and time, for a person."""

    def __init__(self, as_json: bool, sample: float) -> None:
        self._json = as_json
        self._sample = sample
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = time.monotonic()
        self._told = 0
        self._tables: dict[str, Tally] = {}
        self.ages: Ages | None = None
        self._chunks = self._rows = 0  # of the table
        self._waiting: str | None = None

    def __enter__(self) -> _Shown:
        if self._console.is_terminal and not self._json:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            rate = TextColumn("{task.fields[rate]} rows/s")
            self._bar = Progress(*columns, rate, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # ── a verification's listener ────────────────────────────────────────────────────────────────────────────────

    def begin(self, table: str, estimate: int | None) -> None:
        """Begin a table."""
        self._told = self._chunks = self._rows = 0
        self._table_began = time.monotonic()
        rows = None if estimate is None else max(1, round(estimate * self._sample))
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(table, total=rows, rate="-")
        elif self._json:
            self._line({"table": table, "state": "begun", "estimate": rows})

    def looked(self, table: str, tally: Tally) -> None:
        """Move the bar."""
        if tally.rows > self._rows and self.ages is not None:
            self.ages.looked(table, self._chunks, time.monotonic())
            self._chunks, self._rows = self._chunks + 1, tally.rows
        if self._bar is not None and self._task is not None:
            elapsed_s = max(time.monotonic() - self._table_began, 1e-3)
            self._bar.update(self._task, completed=tally.rows, rate=f"{tally.rows / elapsed_s:,.0f}")

    def found(self, finding: Finding) -> None:
        """Tell of a difference."""
        if self._json:
            self._line({"finding": finding._asdict()})
            return
        self._told += 1
        if self._told > SHOWN:
            return
        version = "" if finding.version is None else f", version {finding.version}"
        self._say(f"{finding.table} {finding.key}: {finding.kind} in {finding.sink}{version}. {_explained(finding)}")
        if self._told == SHOWN:
            self._say("Further ones of this table are only counted; --json prints all.")

    def unverified(self, one: Unverified) -> None:
        """Tell of a key of which nothing can be said."""
        if self._json:
            self._line({"unverified": one._asdict()})
            return
        self._told += 1
        if self._told <= SHOWN:
            where = "" if one.sink is None else f" in {one.sink}"
            self._say(f"{one.table} {one.key}: not verified{where}: {one.why}")

    def waits(self, reason: str | None) -> None:
        """Tell for what it waits, once."""
        if reason is not None and reason != self._waiting:
            self._say(f"Waiting: {reason}", err=True)
        self._waiting = reason

    # ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def table(self, subject: Subject, tally: Tally) -> None:
        """Note what became of a table."""
        self._tables[subject.table.id] = tally
        if self.ages is not None:
            self.ages.ended(subject.table.id, self._chunks)
        if self._json:
            self._line({"table": subject.table.id, "state": "verified", **_numbers(tally)})

    def round(self, name: str, total: Tally, opened: Opened) -> None:
        """Print what became of everything, when it begins again."""
        log_rests = opened.verifier.log_rests
        oldest_s = self.ages.oldest_s(time.monotonic()) if self.ages is not None else None
        if oldest_s is None and opened.rounds is not None:  # it went on where an earlier process was
            oldest_s = opened.rounds.oldest_s(subject.table.id for subject in opened.subjects)
        if self._json:
            self._line({"pipeline": name, **_numbers(total), "oldest_s": oldest_s, "pipeline_runs": not log_rests})
        else:
            left = total.differences - total.repaired
            age = "-" if oldest_s is None else format_duration(round(oldest_s))
            self._say(f"{total.rows:,} rows verified, {left} differ; the oldest was looked at {age} ago.")

    def end(self, name: str, total: Tally, *, log_rests: bool) -> None:
        """Print what became of everything."""
        self.stop()
        elapsed_s = time.monotonic() - self._started
        rate = round(total.rows / max(elapsed_s, 1e-3))
        told = not total.failed and not total.unsettled
        equal = told and total.differences == total.repaired
        if self._json:
            self._line(
                {
                    "pipeline": name,
                    "equal": equal,
                    **_numbers(total),
                    "seconds": round(elapsed_s, 3),
                    "rows_per_s": rate,
                    "pipeline_runs": not log_rests,
                }
            )
            return
        columns = [
            "TABLE",
            "ROWS",
            "MISSING",
            "DIFFERENT",
            "EXTRA",
            "VERSION",
            "REPAIRED",
            "DEAD LETTERS",
            "NOT VERIFIED",
        ]
        print_table(
            columns,
            [
                [table, tally.rows, *tally.found.values(), tally.repaired, tally.dead, tally.failed + tally.unsettled]
                for table, tally in self._tables.items()
            ],
        )
        say(f"{total.rows:,} rows in {format_duration(round(elapsed_s) or 1)}, {rate:,} rows/s.")
        if log_rests:
            warn(
                "The pipeline does not run, so changes since its end show as differences; run it, and verify it again."
            )
        if equal:
            say("Equal." if not total.repaired else "Everything that differed was repaired.")
        elif total.differences > total.repaired:
            say(f"{total.differences - total.repaired} differences.")
        if not told:
            say(f"{total.failed + total.unsettled} keys could not be verified: they failed, or changed at every look.")

    def _line(self, value: dict[str, Any]) -> None:
        say(to_json_text(value))
        sys.stdout.flush()

    def _say(self, text: str, *, err: bool = False) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text, err=err or self._json)


def _explained(finding: Finding) -> str:
    parts = [finding.note[:1].upper() + finding.note[1:] + "." if finding.note else ""]
    if finding.kind == "different" and finding.expected is not None and finding.stored is not None:
        names = [n for n in finding.expected | finding.stored if finding.expected.get(n) != finding.stored.get(n)][:5]
        parts.append(f"Source: {excerpt(finding.expected, names, VALUE_WIDTH)}.")
        parts.append(f"Sink: {excerpt(finding.stored, names, VALUE_WIDTH)}.")
    return " ".join(part for part in parts if part)


def _numbers(tally: Tally) -> dict[str, Any]:
    return {
        "rows": tally.rows,
        "documents": tally.documents,
        **tally.found,
        "repaired": tally.repaired,
        "expired": tally.expired,
        "dead_letters": tally.dead,
        "failed": tally.failed,
        "unsettled": tally.unsettled,
    }


def to_json_text(value: dict[str, Any]) -> str:
    """Return JSON on one line; what only BSON knows, as its text."""
    try:
        return to_json(value).decode()
    except TypeError:
        return json.dumps(value, ensure_ascii=False, default=str)
