"""`deltactl run`: the whole pipeline on this machine, until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import click
from filelock import FileLock, Timeout

from delta_debezium import engine_recording
from delta_debezium.engine import EmbeddedCapture
from delta_debezium.mysql import SCHEMA_HISTORY_FILE
from delta_debezium.render import engine_properties
from delta_sync import logs
from delta_sync.capture import Capture
from delta_sync.errors import PipelineRunning, UsageError
from delta_sync.running import Running
from delta_sync.secrets import resolve
from delta_sync.sources import check_supported
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Table
from delta_sync.transport import Begin, EmbeddedTransport
from deltactl.app import LOCK_FILE, LOCK_PATIENCE_S, App, name_argument, pass_app, shared_options, warn
from deltactl.processes import run_through_epochs

CAPTURE_LOG = "capture.log"


def embedded_capture(
    spec: PipelineSpec, folder: Path, tables: Callable[[], Mapping[str, Table]], begin: Begin | None
) -> Capture:
    """Return the capture of a pipeline that runs on this machine, for the tables as they are at each of its starts."""

    def properties() -> Mapping[str, str]:
        rendered = engine_properties(spec, tables(), str(folder))
        return {name: resolve(value) for name, value in rendered.items()}

    return EmbeddedCapture(properties, folder / CAPTURE_LOG, begin=begin)


@click.command(short_help="Run a pipeline, until Ctrl-C or SIGTERM.")
@name_argument
@click.option("--new-slot", is_flag=True, help="Accept that the slot is gone: begin a new epoch and load again.")
@click.option("--reload", is_flag=True, help="Load every table again: the processor changed, or a sink lost data.")
@click.option("--port", type=click.IntRange(0, 65535), help="Serve /metrics, /healthz, /readyz and /status here.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address for --port.")
@click.option("--log-format", type=click.Choice(["auto", "console", "json"]), default="auto", show_default=True)
@shared_options
@pass_app
def run(
    app: App,
    name: str,
    new_slot: bool,
    reload: bool,
    port: int | None,
    host: str,
    log_format: Literal["auto", "console", "json"],
) -> None:
    """Run a pipeline: load its tables and follow its changes, until Ctrl-C or SIGTERM.

    Nothing is lost however it ends: what was not confirmed is delivered again. Logs go to standard error.

    \b
    Example:
      deltactl run movies --port 9464
    """
    spec = app.load(name)
    if spec.transport != "embedded":
        raise UsageError(
            f"Pipeline {name} has transport: {spec.transport}; `deltactl run` is for embedded; use sidecar and worker."
        )
    check_supported(spec)
    folder = app.home(name)
    logs.configure(log_format)
    engine_recording.record(warn)
    try:
        with FileLock(folder / LOCK_FILE, timeout=LOCK_PATIENCE_S):
            accepted = new_slot, reload  # by the first run: what follows in a newer epoch was not meant

            def running() -> Running:
                nonlocal accepted
                (may_lose, anew), accepted = accepted, (False, False)
                transport = EmbeddedTransport(
                    spec,
                    lambda tables, begin: embedded_capture(spec, folder, tables, begin),
                    folder / SCHEMA_HISTORY_FILE,
                    new_slot=may_lose,
                    reload=anew,
                )
                return Running(folder=folder, spec=spec, transport=transport)

            run_through_epochs(running, name, host, port)
    except Timeout:
        raise PipelineRunning(f"Pipeline {name} is running already; `deltactl status {name}` shows it.") from None
