"""`make demo`: a pipeline from nothing to a proof, in half a minute. Exit status 0 only if source and cache are equal.

python -m examples.demo [--rows 5000] [--tamper]
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import psycopg
import requests
from examples.demo.proof import PREFIX, Cache, Proof, compare
from examples.demo.stage import PASSWORD, CommandFailed, Stage
from examples.demo.writer import KINDS, Writer
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from delta_sync.errors import DeltaError
from delta_sync.testing.processes import ServerProcess, free_port, wait_until
from delta_sync.versions import parse_lsn

PHASE_TIMEOUT_S = 180.0  # each takes seconds; an overloaded machine is no failure of the proof
BEFORE_KILL, WHILE_DEAD, AFTER_RESTART = 2000, 1500, 1500  # changes that the writer makes meanwhile
SHOWN_DIFFERENCES = 5
KINDS_PLURAL = {kind: f"{kind}s" for kind in KINDS} | {"change of key": "changes of keys"}
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended

out = Console(highlight=False, soft_wrap=True)


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────


def heading(text: str) -> None:
    """Begin a part of the story."""
    out.print()
    out.print(Rule(Text(text, "bold"), align="left") if out.is_terminal else f"== {text}")


def tell(text: str) -> None:
    """Print a sentence."""
    out.print(Text(text))


def typed(command: Sequence[str] | str) -> None:
    """Print a command as one would type it, a long one over several lines."""
    text = command if isinstance(command, str) else shlex.join(command)
    if len(text) > 80:
        text = text.replace(" --", " \\\n      --")
    out.print(Text("  $ ", "dim") + Text(text, "bold cyan"))


def output(text: str) -> None:
    """Print what a command printed."""
    for line in text.splitlines():
        out.print(Text(f"    {line}", "dim" if out.is_terminal else ""))


@contextlib.contextmanager
def meanwhile(text: str) -> Generator[None]:
    """Show that something takes a moment, where a person looks."""
    if out.is_terminal:
        with out.status(text):
            yield
    else:
        yield


# ── the pipeline, seen from outside ──────────────────────────────────────────────────────────────────────────────


class Worker:
    """`deltactl run movies`, in the background."""

    def __init__(self, stage: Stage) -> None:
        port = free_port()
        self._log = stage.folder / "run.log"
        self._url = f"http://127.0.0.1:{port}/status"
        command = ["deltactl", "run", "movies", "--port", str(port)]
        typed(f"{shlex.join(command)} 2>>run.log &")
        self.process: ServerProcess = stage.start(command, "run.log")

    def status(self) -> dict[str, Any]:
        """Return what it says of itself; nothing while it does not listen yet. Raises CommandFailed if it ended."""
        if not self.process.running:
            end = self._log.read_text(errors="replace")[-2000:]
            raise CommandFailed(f"`deltactl run` ended with status {self.process.exit_status}; its log ends:\n{end}")
        try:
            found: dict[str, Any] = requests.get(self._url, timeout=2).json()
        except requests.RequestException:
            return {}
        return found

    def wait_until_streaming(self) -> dict[str, Any]:
        """Wait until every row that was there has been loaded, and return the status then."""
        last: dict[str, Any] = {}

        def streaming() -> bool:
            last.update(self.status())
            return last.get("state") == "streaming"

        with meanwhile("the worker starts …"):
            wait_until(streaming, PHASE_TIMEOUT_S, "loading and streaming")
        return last

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed or said."""
        self.process.terminate(signal.SIGKILL, PHASE_TIMEOUT_S)


def wait_until_confirmed(source: psycopg.Connection, worker: Worker) -> str:
    """Wait until the pipeline has confirmed to PostgreSQL all that is in its log by now; return that position."""
    end = _one(source, "SELECT pg_current_wal_insert_lsn()::text")

    def confirmed() -> bool:
        worker.status()
        query = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = 'delta_movies'"
        return parse_lsn(_one(source, query)) >= parse_lsn(end)

    with meanwhile("the rest of the log is applied …"):
        wait_until(confirmed, PHASE_TIMEOUT_S, "confirming what was written")
    return end


def _one(source: psycopg.Connection, query: str) -> str:
    row = source.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


# ── the story ────────────────────────────────────────────────────────────────────────────────────────────────────


def demo(stage: Stage, *, rows: int, tamper: bool) -> bool:
    """Tell the story on a stage that is set; return whether the proof holds."""
    with stage.connect() as source, contextlib.closing(Cache(stage.redis.port)) as cache:
        version = _one(source, "SHOW server_version").split()[0]
        tell(f"PostgreSQL {version} on port {stage.postgresql.port}: table public.movie with {rows:,} rows.")
        tell(f"Redis {cache.version()} on port {stage.redis.port}: empty.")
        tell(f"A service that rates movies, in a process of its own: POST {stage.ratings_url}/ratings.")

        heading("2. A pipeline")
        create = ["deltactl", "pipeline", "create", "movies", "--source", stage.source_url]
        create += ["--table", "public.movie", "--sink", f"cache={stage.redis.url}"]
        typed(create)
        output(stage.run(create))
        tell("What was generated copies every column. This processor.py asks the service as well:")
        processor = Path(__file__).with_name("processor.py")
        shutil.copy(processor, stage.folder / "pipelines" / "movies" / "processor.py")
        code = processor.read_text().partition("\n\n\n")[2].rstrip()
        if out.is_terminal:
            out.print(Syntax(code, "python", theme="ansi_dark", background_color="default"))
        else:
            output(code)

        heading("3. Run it")
        typed(f"export MOVIES_SOURCE_PASSWORD={PASSWORD}")
        stage.exported["MOVIES_SOURCE_PASSWORD"] = PASSWORD
        started_s = time.monotonic()
        worker = Worker(stage)
        loaded = worker.wait_until_streaming()["loads"]["public.movie"]["rows"]
        tell(f"{loaded:,} rows loaded {time.monotonic() - started_s:.1f} s after the start; changes stream.")
        _show_a_change(source, cache)

        heading("4. Kill it in mid-stream")
        worker = _kill_and_start_again(stage, source, cache, worker)

        heading("5. The proof")
        tell(f"The writer has stopped, and everything up to {wait_until_confirmed(source, worker)} is confirmed.")
        asked = requests.get(f"{stage.ratings_url}/calls", timeout=10).json()
        tell(f"The service was asked {asked['calls']:,} times, for {asked['movies']:,} movies.")
        if tamper:
            _tamper(cache)
        with meanwhile("comparing …"):
            proof = compare(source, cache, stage.ratings_url)
        _show(proof)
        typed(["deltactl", "status", "movies"])
        output(stage.run(["deltactl", "status", "movies"]))
        return proof.holds


def _show_a_change(source: psycopg.Connection, cache: Cache) -> None:
    title = "Nine Lanterns, Restored"
    key = f"{PREFIX}1"
    look = ["redis-cli", "get", key]
    typed(look)
    output(cache.get(key))
    statement = f"UPDATE movie SET title = '{title}' WHERE id = 1"
    typed(f'psql -c "{statement}"')
    source.execute(statement.encode())
    committed_s = time.monotonic()
    wait_until(lambda: title in cache.get(key), PHASE_TIMEOUT_S, f"the update of {key}")
    took_ms = (time.monotonic() - committed_s) * 1000
    typed(look)
    output(cache.get(key))
    tell(f"It was there {took_ms:.0f} ms after the commit.")


def _kill_and_start_again(stage: Stage, source: psycopg.Connection, cache: Cache, worker: Worker) -> Worker:
    with stage.connect() as connection:
        writer = Writer(connection)
        try:
            writer.start()
            writer.wait_for(BEFORE_KILL)
            tell(f"A writer is at work: {writer.changes:,} rows changed so far.")
            typed(f"kill -9 {worker.process.pid}")
            worker.kill()
            writer.wait_for(WHILE_DEAD)
            behind = compare(source, cache, stage.ratings_url)
            tell(
                f"The worker is dead, the writer goes on: {len(behind.different):,} documents are not as they must be."
            )
            worker = Worker(stage)
            worker.wait_until_streaming()
            writer.wait_for(AFTER_RESTART)
        finally:
            writer.stop()
    counts = ", ".join(f"{writer.done[kind]:,} {plural}" for kind, plural in KINDS_PLURAL.items())
    tell(f"The worker is back. The writer made {writer.changes:,} changes in all: {counts}.")
    return worker


def _tamper(cache: Cache) -> None:
    key = cache.keys()[0]
    cache.put(key, orjson.dumps(orjson.loads(cache.get(key)) | {"title": "Tampered With"}).decode())
    tell(f"{key} was changed behind Delta's back (--tamper), so the comparison must fail now.")


def _show(proof: Proof) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in (
        ("rows in PostgreSQL", proof.rows),
        ("documents in Redis", proof.documents),
        ("  with stars from the service", proof.rated),
        ("equal, column by column", proof.equal),
        ("different, missing or left over", len(proof.different)),
    ):
        table.add_row(label, Text(f"{value:,}", "bold", justify="right"))
    out.print(table)
    for line in proof.different[:SHOWN_DIFFERENCES]:
        out.print(Text(f"  {line}", "red"))
    if proof.holds:
        out.print(Text("✓ Source and cache are equal, row by row.", "bold green"))
    else:
        out.print(Text("✗ Source and cache differ.", "bold red"))


def main() -> int:
    """Run the demo; return its exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description="A pipeline from nothing to a proof.")
    parser.add_argument("--rows", type=int, default=5000, help="rows that are there from the beginning")
    parser.add_argument("--tamper", action="store_true", help="change a document, to show that the comparison can fail")
    options = parser.parse_args()

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    begun_s = time.monotonic()
    try:
        heading("1. Two real servers, and a service")
        with contextlib.ExitStack() as exits:
            with meanwhile("PostgreSQL and Redis start …"):
                stage = exits.enter_context(Stage(options.rows))
            holds = demo(stage, rows=options.rows, tamper=options.tamper)
    except KeyboardInterrupt:
        out.print("\nInterrupted; nothing was left running or behind.")
        return INTERRUPTED
    except DeltaError as error:
        out.print(Text(f"✗ {error}", "bold red"))
        return 1
    tell(f"All of it was stopped and removed. It took {time.monotonic() - begun_s:.0f} s.")
    if not holds:
        return 1
    out.print()
    out.print(Text("Next, type ") + Text("make playground", "bold cyan") + Text(" and follow docs/tutorial.md."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
