"""`deltactl dead …`: changes that could not be processed, kept for replay."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import click
import orjson

from delta_sync.delta_event import decode_event
from delta_sync.errors import UndecodableChange, UsageError
from delta_sync.sources import position_text
from delta_sync.spec import PipelineSpec
from delta_sync.state import DeadLetter, StateStore
from delta_sync.values import to_json
from delta_sync.versions import epoch_of, position_of
from deltactl.app import (
    App,
    CommandT,
    DeltaGroup,
    confirm,
    dry_run_option,
    name_argument,
    pass_app,
    print_json,
    print_table,
    say,
    shared_options,
    warn,
    yes_option,
)

if TYPE_CHECKING:
    from delta_sync.replaying import Replayed

PAGE = 500  # dead letters read at once: each may hold a whole row
ERROR_WIDTH = 80  # of a list's column; `dead show` has the whole of it
STAGES = ("decode", "process", "lookup", "apply", "handle")


@click.group(cls=DeltaGroup, short_help="Look at changes that could not be processed.")
def dead() -> None:
    """Look at changes that could not be processed; replay or discard them."""


table_option = click.option("--table", help="Only those of this table, as public.movie.")
sink_option = click.option("--sink", help="Only those that this sink rejected.")
stage_option = click.option("--stage", type=click.Choice(STAGES), help="Only those that failed at this stage.")


@dead.command("list")
@name_argument
@table_option
@sink_option
@stage_option
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many, latest first.")
@shared_options
@pass_app
def list_(app: App, name: str, table: str | None, sink: str | None, stage: str | None, limit: int) -> None:
    """List dead letters, the latest first.

    \b
    Example:
      deltactl dead list movies --table public.movie
    """
    with _store(app, name) as store:
        _refuse_unknown(app.load(name), store, table, sink)
        letters: list[DeadLetter] = []
        total = kept = 0
        if store is not None:
            kept = store.count_dead_letters(name)
            for letter in _matching(store, name, table, sink, stage):
                total += 1
                if total <= limit:
                    letters.append(letter)
    if app.json:
        print_json([_summary(letter) for letter in letters])
        return
    if not letters:
        warn(f"Pipeline {name} has no dead letters{' like that' if kept else ''}.")
        return
    print_table(
        ["ID", "TABLE", "KEY", "STAGE", "SINK", "TRIES", "FIRST FAILED", "ERROR"],
        [
            [
                letter.id,
                letter.table,
                letter.key_text,
                letter.stage,
                letter.sink or "",
                letter.attempts,
                letter.created_at.isoformat(timespec="seconds"),
                _first_line(letter.error),
            ]
            for letter in letters
        ],
    )
    if len(letters) < total:
        like = " like that" if total < kept else ""
        warn(f"{len(letters)} of {_count(total)}{like}; --limit shows more.")


@dead.command()
@name_argument
@click.argument("id_", metavar="ID", type=int)
@shared_options
@pass_app
def show(app: App, name: str, id_: int) -> None:
    """Show a dead letter: the change, the error and its trace.

    \b
    Example:
      deltactl dead show movies 17
    """
    with _store(app, name) as store:
        letter = None if store is None else store.dead_letter(name, id_)
    if letter is None:
        raise UsageError(f"Pipeline {name} has no dead letter {id_}; `deltactl dead list {name}` shows those it has.")
    event = _event(letter)
    if app.json:
        print_json({**_summary(letter), "event": event, "trace": letter.trace})
        return
    kind = app.load(name).source.kind
    position = f"epoch {epoch_of(letter.version)}, {position_text(kind, position_of(letter.version))}"
    for label, value in (
        ("dead letter", letter.id),
        ("table", letter.table),
        ("key", letter.key_text),
        ("version", f"{letter.version} ({position})"),
        ("stage", letter.stage + (f", sink {letter.sink}" if letter.sink else "")),
        ("tries", letter.attempts),
        ("first failed", letter.created_at.isoformat(timespec="seconds")),
        ("error", letter.error),
    ):
        say(f"{label:<12}  {value}")
    say("\nevent:\n" + orjson.dumps(event, option=orjson.OPT_INDENT_2).decode())
    if letter.trace:
        say(f"\ntrace:\n{letter.trace.rstrip()}")


def choosing_options(command: CommandT) -> CommandT:
    """Add what chooses dead letters, by their ids or by `--all` and filters, and `--dry-run`."""
    options = table_option(sink_option(stage_option(dry_run_option(command))))
    everything = click.option("--all", "all_", is_flag=True, help="All that the filters leave.")
    return click.argument("ids", metavar="[ID]...", type=int, nargs=-1)(everything(options))


@dead.command()
@name_argument
@choosing_options
@yes_option
@shared_options
@pass_app
def discard(
    app: App,
    name: str,
    ids: tuple[int, ...],
    all_: bool,
    table: str | None,
    sink: str | None,
    stage: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Discard dead letters: their changes will never reach the sinks.

    \b
    Examples:
      deltactl dead discard movies 17 18
      deltactl dead discard movies --all --table public.movie
    """
    _one_way_to_choose(ids, all_, table, sink, stage)
    with _store(app, name) as store:
        _refuse_unknown(app.load(name), store, table, sink)
        chosen = [letter.id for letter in _chosen(store, name, ids, table, sink, stage)]
        gone = 0
        if chosen and store is not None and not dry_run:
            confirm(f"Discard {_count(len(chosen))} of pipeline {name}?", yes=yes)
            gone = store.discard(name, chosen)
    if app.json:
        print_json({"pipeline": name, "chosen": chosen, "discarded": gone})
    elif dry_run:
        say(f"Would discard {_count(len(chosen))}.")
    else:
        say(f"Discarded {_count(gone)}.")


@dead.command()
@name_argument
@choosing_options
@shared_options
@pass_app
def replay(
    app: App,
    name: str,
    ids: tuple[int, ...],
    all_: bool,
    table: str | None,
    sink: str | None,
    stage: str | None,
    dry_run: bool,
) -> None:
    """Process dead letters again, with processor.py as it is now. Those that succeed are gone; the others stay.

    A store cannot become older by it: where something newer is, that stays. The pipeline may run meanwhile.

    \b
    Examples:
      deltactl dead replay movies 17
      deltactl dead replay movies --all --stage process
    """
    _one_way_to_choose(ids, all_, table, sink, stage)
    spec = app.load(name)
    with _store(app, name) as store:
        _refuse_unknown(spec, store, table, sink)
        letters = list(_chosen(store, name, ids, table, sink, stage))
        letters.reverse()  # the oldest first, as they happened
        done: list[Replayed] = []
        ended_by: str | None = None
        if letters and store is not None and not dry_run:
            from delta_sync.replaying import replay as replay_letters  # much, which the other commands do without

            done, ended_by = replay_letters(app.home(name), spec, store, letters)
    failed = [one for one in done if one.error is not None]
    if app.json:
        print_json(
            {
                "pipeline": name,
                "chosen": [letter.id for letter in letters],
                "replayed": [one.letter.id for one in done if one.error is None],
                "failed": [{"id": one.letter.id, "error": one.error} for one in failed],
                "ended_by": ended_by,
            }
        )
    elif dry_run:
        say(f"Would replay {_count(len(letters))}.")
    else:
        for one in failed:
            warn(f"Dead letter {one.letter.id} ({one.letter.table} {one.letter.key_text}) fails again: {one.error}")
        say(f"Replayed {_count(len(done) - len(failed))}; {len(failed)} failed again and stay.")
        if ended_by is not None:
            warn(f"{len(letters) - len(done)} were not tried and stay: {ended_by}")
    if failed or ended_by is not None:
        click.get_current_context().exit(1)


def _one_way_to_choose(
    ids: tuple[int, ...], all_: bool, table: str | None, sink: str | None, stage: str | None
) -> None:
    filtered = table is not None or sink is not None or stage is not None
    if bool(ids) == all_ or (ids and filtered):
        raise UsageError("Give either the ids of dead letters, or --all (with --table, --sink, --stage if you like).")


def _refuse_unknown(spec: PipelineSpec, store: StateStore | None, table: str | None, sink: str | None) -> None:
    """Raise UsageError for a table or a sink that the pipeline does not have, and that no dead letter is left of."""
    for option, given, known in (("--table", table, [*spec.tables]), ("--sink", sink, [*spec.sinks])):
        if given is None or given in known:
            continue
        of_table, of_sink = (given, None) if option == "--table" else (None, given)
        if store is None or next(_matching(store, spec.name, of_table, of_sink, None), None) is None:
            raise UsageError(f"{option}: pipeline {spec.name} has no {given!r}; it has {', '.join(known)}.")


def _count(number: int) -> str:
    return f"{number} dead letter{'' if number == 1 else 's'}"


def _chosen(
    store: StateStore | None, name: str, ids: tuple[int, ...], table: str | None, sink: str | None, stage: str | None
) -> Iterator[DeadLetter]:
    """Yield the dead letters of these ids, or all that the filters leave. Raises UsageError for an unknown id."""
    if not ids:
        if store is not None:
            yield from _matching(store, name, table, sink, stage)
        return
    found = {id_: store.dead_letter(name, id_) if store is not None else None for id_ in sorted(ids, reverse=True)}
    unknown = [str(id_) for id_ in ids if found[id_] is None]
    if unknown:
        raise UsageError(f"Pipeline {name} has no dead letter {', '.join(unknown)}; nothing was changed.")
    yield from (letter for letter in found.values() if letter is not None)


@contextlib.contextmanager
def _store(app: App, name: str) -> Generator[StateStore | None]:
    """Open the pipeline's state store; None when it never ran."""
    store = StateStore.open(app.load(name).state, app.home(name), create=False)
    if store is None:
        yield None
        return
    with store:
        yield store


def _matching(
    store: StateStore, name: str, table: str | None, sink: str | None, stage: str | None
) -> Iterator[DeadLetter]:
    before: int | None = None
    while page := store.dead_letters(name, table=table, limit=PAGE, before_id=before):
        for letter in page:
            if sink in (None, letter.sink) and stage in (None, letter.stage):
                yield letter
        before = page[-1].id


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "table": letter.table,
        "key": letter.key_text,
        "version": letter.version,
        "stage": letter.stage,
        "sink": letter.sink,
        "attempts": letter.attempts,
        "created_at": letter.created_at.isoformat(),
        "error": letter.error,
    }


def _event(letter: DeadLetter) -> Any:
    """Return the event as JSON has it; one that cannot be read says why."""
    try:
        return orjson.loads(to_json(decode_event(letter.event)._asdict()))
    except (UndecodableChange, TypeError, ValueError) as error:
        return {"unreadable": str(error)}


def _first_line(text: str) -> str:
    line = (text.splitlines() or [""])[0]
    return line if len(line) <= ERROR_WIDTH else line[: ERROR_WIDTH - 1] + "…"
