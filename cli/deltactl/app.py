"""What every command shares: options, errors as sentences, questions, and output for people and for programs."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from delta_sync.errors import CheckFailed, DeltaError, PipelineRunning, Problem, UsageError
from delta_sync.secrets import redact

# Every command comes through here. What only some need is imported where they need it: rich, psycopg, pydantic and
# filelock are most of what a start costs.
if TYPE_CHECKING:
    from delta_sync.spec import PipelineSpec

DEFAULT_FOLDER = "pipelines"
LOCK_FILE = "run.lock"
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
LOCK_PATIENCE_S = 1.0  # whoever only looks whether the lock is held holds it for an instant

CommandT = TypeVar("CommandT", bound=Callable[..., object])


class Refused(DeltaError):
    """A question that nobody answered, or answered with no. Nothing was changed."""


@dataclass
class App:
    """The options that hold for all commands."""

    folder: Path = field(default_factory=lambda: Path(os.environ.get("DELTA_PIPELINES") or DEFAULT_FOLDER))
    json: bool = False
    debug: bool = False

    def names(self) -> list[str]:
        """Return the names of the pipelines in the folder, in order. Without a folder there are none."""
        if not self.folder.is_dir():
            return []
        from delta_sync.spec import SPEC_FILE

        return sorted(entry.name for entry in self.folder.iterdir() if (entry / SPEC_FILE).is_file())

    def home(self, name: str) -> Path:
        """Return a pipeline's folder, which may not exist yet. Raises UsageError when no pipeline can be called so."""
        from delta_sync.spec import NAME_PATTERN

        if not re.fullmatch(NAME_PATTERN, name):
            raise UsageError(
                f"{name!r} cannot be a pipeline's name: lower-case letters, digits and underscores, a letter first, and"
                " 40 characters at most."
            )
        return self.folder / name

    def load(self, name: str) -> PipelineSpec:
        """Return a pipeline's specification. Raises UsageError, naming the pipelines that exist."""
        from delta_sync.spec import SPEC_FILE, load_spec

        folder = self.home(name)
        if not (folder / SPEC_FILE).is_file():
            others = self.names()
            are = "is" if len(others) == 1 else "are"
            hint = f"there {are} {', '.join(others)}" if others else "`deltactl pipeline create` writes one"
            raise UsageError(f"There is no pipeline {name} in {self.folder}; {hint}.")
        return load_spec(folder)

    def is_running(self, name: str) -> bool:
        """Tell whether a process holds the pipeline's run lock."""
        path = self.home(name) / LOCK_FILE
        if not path.exists():
            return False
        from filelock import FileLock, Timeout

        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False

    @contextmanager
    def stopped(self, name: str) -> Generator[None]:
        """Keep the pipeline from starting meanwhile. Raises PipelineRunning when it runs."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.home(name) / LOCK_FILE, timeout=LOCK_PATIENCE_S):
                yield
        except Timeout:
            raise PipelineRunning(f"Pipeline {name} is running; stop it first (Ctrl-C where it runs).") from None


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────


def dir_option(app: App) -> str:
    """Return what a command that is shown needs besides, for the pipeline to be found: ` --dir FOLDER`, or nothing."""
    return "" if app.folder == App().folder else f" --dir {app.folder}"


def _store(attribute: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        if value not in (None, False):
            setattr(context.ensure_object(App), attribute, value)

    return callback


def shared_options(command: CommandT) -> CommandT:
    """Add the options that every command takes, before or after its name: `--json`, `--dir`, `--debug`."""
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_store("debug"), help="Show the trace of an error."
    )
    folder = click.option(
        "--dir",
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=_store("folder"),
        help="Where the pipelines are (default: $DELTA_PIPELINES, or pipelines).",
    )
    as_json = click.option(
        "--json", is_flag=True, expose_value=False, callback=_store("json"), help="Print JSON, for programs."
    )
    return as_json(folder(debug(command)))


def complete_name(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a pipeline, in the folder that `--dir` names, if it does."""
    app = context.ensure_object(App)
    return [CompletionItem(name) for name in app.names() if name.startswith(incomplete)]


def name_argument(command: CommandT) -> CommandT:
    """Add the argument NAME, a pipeline's."""
    return click.argument("name", shell_complete=complete_name)(command)


yes_option = click.option("--yes", "-y", is_flag=True, help="Do it without asking.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Show what would happen, and change nothing.")


def key_texts(keys: str | None, keys_file: Path | None) -> list[str]:
    """Return the texts of the keys that `--keys` has, with commas between them, or else `--keys-file`, one a line.

    A line is taken as it is, blanks included, because a key may begin with one; empty ones are left out. Raises
    UsageError when there is none, or when no key can be written so.
    """
    if keys_file is None:
        texts = [text.strip() for text in (keys or "").split(",")]
    else:
        try:
            text = keys_file.read_text(encoding="utf-8-sig")  # with what Windows' editors put first
        except OSError as error:
            raise UsageError(f"--keys-file: {keys_file} cannot be read: {error.strerror}.") from None
        except ValueError:
            raise UsageError(f"--keys-file: {keys_file} is no text in UTF-8.") from None
        texts = [line.removesuffix("\r") for line in text.split("\n")]
    option = "--keys" if keys_file is None else "--keys-file"
    found = [text for text in texts if text.strip()]
    if not found:
        raise UsageError(f"{option} names no key.")
    try:
        "".join(found).encode()
    except UnicodeEncodeError:  # of an argument the shell passes on any bytes
        raise UsageError(f"{option} has bytes that are no text in UTF-8.") from None
    return found


def pass_app(function: Callable[..., object]) -> Callable[..., object]:
    """Call the command with the App first."""
    return click.make_pass_decorator(App, ensure=True)(function)


# ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────


def say(text: str = "", *, err: bool = False, has_secrets: bool = True) -> None:
    """Print a line, without the secrets that it may have."""
    click.echo(redact(text) if has_secrets else text, err=err)


def warn(text: str, *, has_secrets: bool = True) -> None:
    """Print a line that is not the result, so that a program reading the result does not meet it."""
    say(text, err=True, has_secrets=has_secrets)


def print_json(value: object, *, has_secrets: bool = True) -> None:
    """Print a value as JSON, without the secrets that it may have."""
    say(json.dumps(value, indent=2, ensure_ascii=False, default=str), has_secrets=has_secrets)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table: ruled where a person looks, columns divided by tabs where a program does."""
    texts = [["" if cell is None else redact(str(cell)) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(columns), *texts]:
            click.echo("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", header_style="bold", border_style="dim")
    for row in texts:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


def describe(problem: Problem) -> dict[str, object]:
    """Return a problem as JSON has it."""
    return {key: redact(value) if isinstance(value, str) else value for key, value in problem._asdict().items()}


def print_limits(limits: Iterable[str]) -> None:
    """Print what a pipeline cannot do, to standard error."""
    for limit in limits:
        warn(f"{click.style('limit', fg='yellow')} {limit}")


def print_problems(problems: Sequence[Problem]) -> None:
    """Print findings on standard error, two lines for each: what is wrong, and what to change."""
    for problem in problems:
        mark = click.style("✗", fg="red") if problem.fatal else click.style("!", fg="yellow")
        warn(f"{mark} {problem.where}: {problem.what}.")
        if problem.fix:
            warn(f"    {problem.fix}{'' if problem.fix.endswith(('?', '.')) else '.'}")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is changed. Raises Refused on no, and without a terminal, where nobody can answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"{question} There is no terminal to answer at, so nothing was changed; add --yes to do it.")
    if not click.confirm(redact(question), err=True):
        raise Refused("Nothing was changed.")


def json_of(data: Mapping[str, Any]) -> str:
    """Return a file's JSON text."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Later(NamedTuple):
    """A command that is imported when it is asked for."""

    place: str  # package.module:attribute
    short_help: str  # what its `get_short_help_str()` returns, a test sees to it


class DeltaGroup(click.Group):
    """A group whose errors end as sentences on standard error and as an exit status, never as a trace.

    The commands of `later` are imported when they are asked for: a shell that completes a word, and a person who
    mistyped one or asks for the group's help, should not wait for the libraries of all of them.
    """

    def __init__(self, *arguments: Any, later: Mapping[str, Later] | None = None, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.later = dict(later or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *self.later})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, imported if it was not yet."""
        if cmd_name in self.later and cmd_name not in self.commands:
            module, _, attribute = self.later[cmd_name].place.partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            self.add_command(command, cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands as click does, without importing them."""
        limit = formatter.width - 6 - max(map(len, self.list_commands(ctx)), default=0)
        rows: list[tuple[str, str]] = []
        for name in self.list_commands(ctx):
            if name in self.later:
                rows.append((name, self.later[name].short_help))
            else:
                rows.append((name, self.commands[name].get_short_help_str(limit)))
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002 -- click's signature; errors are always handled here
        **extra: Any,
    ) -> NoReturn:
        """Run a command and end the process: 0 done, 1 a check failed or something refused, 2 wrong usage."""
        sys.exit(self._run(args, prog_name, complete_var, **extra))

    def _run(self, args: Sequence[str] | None, prog_name: str | None, complete_var: str | None, **extra: Any) -> int:
        arguments = list(sys.argv[1:] if args is None else args)
        app = extra.setdefault("obj", App())
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (click.Abort, KeyboardInterrupt, EOFError):
            click.echo(err=True)
            return INTERRUPTED
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.ClickException as error:
            if "--json" in arguments:
                _print_error_json(error.format_message(), [])
            else:
                error.show()
            return error.exit_code
        except BrokenPipeError:
            # Whoever read our output has left (`deltactl … | head`); Python would complain again when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:  # noqa: BLE001 -- the last resort: a user sees a sentence, and --debug shows the rest
            return _report(error, app)
        return status if isinstance(status, int) else 0


def _report(error: Exception, app: App) -> int:
    if app.debug:
        click.echo(redact("".join(traceback.format_exception(error))), err=True)
    problems = error.problems if isinstance(error, CheckFailed) else ()
    status, message = 1, str(error)
    if isinstance(error, DeltaError):
        status = error.exit_status
    elif (said := _said_by_postgresql(error)) is not None:
        message = f"The source broke off or refused: {said.strip()}."
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    else:
        message = f"deltactl has a defect: {type(error).__name__}: {error}."
        message += "" if app.debug else " Run it again with --debug to see where."
    message += "" if message.endswith((".", "?", "!")) else "."
    if app.json:
        _print_error_json(message, problems)
    elif problems:
        print_problems(problems)
    else:
        warn(f"{click.style('Error:', fg='red')} {message}")
    return status


def _said_by_postgresql(error: Exception) -> str | None:
    """Return what the source said, if the error is one of its client's: then that was imported already."""
    if "psycopg" not in sys.modules:
        return None
    import psycopg

    return error.diag.message_primary or str(error) if isinstance(error, psycopg.Error) else None


def _print_error_json(message: str, problems: Sequence[Problem]) -> None:
    warn(json.dumps({"error": redact(message), "problems": [describe(p) for p in problems]}, ensure_ascii=False))
