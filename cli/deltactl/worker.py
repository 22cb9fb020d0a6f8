"""`deltactl worker`: one or more processes of a pipeline on Kafka, until they are told to stop."""

from __future__ import annotations

import sys
from typing import Literal

import click

from delta_sync import logs
from delta_sync.running import Running
from deltactl.app import App, name_argument, pass_app, shared_options
from deltactl.processes import member_name, need_kafka, run_through_epochs, run_together


@click.command(short_help="Run a worker of a pipeline on Kafka.")
@name_argument
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="So many workers.")
@click.option("--port", type=click.IntRange(0, 65535), help="Serve /metrics, /healthz, /readyz and /status here.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address for --port.")
@click.option("--log-format", type=click.Choice(["auto", "console", "json"]), default="auto", show_default=True)
@shared_options
@pass_app
def worker(
    app: App,
    name: str,
    processes: int,
    port: int | None,
    host: str,
    log_format: Literal["auto", "console", "json"],
) -> None:
    """Apply a pipeline's changes from Kafka to its sinks, until Ctrl-C or SIGTERM.

    As many as wanted, on any machines: together they form a consumer group, and each has some of the partitions. With
    --processes, the first serves --port, the next one --port plus 1, and so on.

    \b
    Example:
      deltactl worker movies --processes 2
    """
    spec = app.load(name)
    need_kafka(spec, "worker")
    logs.configure(log_format)
    if processes > 1:
        _run_several(app, name, processes, port, host, log_format)
        return
    from delta_sync.kafka.transport import KafkaTransport  # the packages of the extra `kafka`

    folder = app.home(name)

    def running() -> Running:
        return Running(folder=folder, spec=spec, transport=KafkaTransport(spec, member_name()))

    run_through_epochs(running, name, host, port)


def _run_several(app: App, name: str, processes: int, port: int | None, host: str, log_format: str) -> None:
    """Run so many workers as child processes. When one of them fails, all end."""
    command = [sys.executable, "-m", "deltactl.main", "worker", name, "--dir", str(app.folder)]
    command += ["--log-format", log_format, "--host", host]
    run_together([[*command, *(["--port", str(port + number)] if port else [])] for number in range(processes)])
