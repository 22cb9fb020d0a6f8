"""`deltactl sidecar`: what runs the connector of a pipeline on Kafka; two or more, and one leads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from delta_sync import logs, observe
from deltactl.app import App, name_argument, pass_app, shared_options
from deltactl.processes import member_name, need_kafka, on_signal


@click.command(short_help="Run the connector of a pipeline on Kafka.")
@name_argument
@click.option("--new-slot", is_flag=True, help="Accept that the slot is gone: begin a new epoch and load again.")
@click.option("--reload", is_flag=True, help="Load every table again: the processor changed, or a sink lost data.")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), help="Where Debezium Server runs (default: in NAME's folder)."
)
@click.option("--port", type=click.IntRange(0, 65535), help="Serve /metrics, /healthz, /readyz and /status here.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address for --port.")
@click.option("--log-format", type=click.Choice(["auto", "console", "json"]), default="auto", show_default=True)
@shared_options
@pass_app
def sidecar(
    app: App,
    name: str,
    new_slot: bool,
    reload: bool,
    work_dir: Path | None,
    port: int | None,
    host: str,
    log_format: Literal["auto", "console", "json"],
) -> None:
    """Capture a pipeline's source into Kafka with Debezium Server, until Ctrl-C or SIGTERM.

    Run two or more, on different machines: one leads, and another follows when it is gone. The leader prepares the
    source, decides the epoch, runs the connector and starts it again when it ends.

    \b
    Example:
      deltactl sidecar movies --port 9465
    """
    from delta_debezium import quick_start
    from delta_debezium.distribution import distribution as find_distribution
    from delta_debezium.sidecar import FOLDER, Sidecar

    spec = app.load(name)
    need_kafka(spec, "sidecar")
    logs.configure(log_format)
    folder = app.home(name)
    member = member_name()
    distribution = find_distribution(click.echo)
    quick_start.record(distribution, click.echo)
    running = Sidecar(
        folder=folder,
        work_dir=(work_dir or folder / FOLDER / member).absolute(),
        spec=spec,
        member=member,
        distribution=distribution,
        new_slot=new_slot,
        reload=reload,
    )
    server = observe.serve(name, running.progress, host, port) if port is not None else None
    on_signal(running.stop)
    try:
        running.run()
    finally:
        if server is not None:
            server.shutdown()
