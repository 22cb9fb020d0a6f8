"""What commands that run for long share: names of members, signals, and a run for each epoch."""

from __future__ import annotations

import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable
from types import FrameType

from delta_sync import observe
from delta_sync.errors import EpochRose, UsageError
from delta_sync.running import Running
from delta_sync.sources import check_supported
from delta_sync.spec import PipelineSpec
from deltactl.checking import need_kafka_packages


def member_name() -> str:
    """Return a name that no other process of the pipeline has or had: host, process and some random letters."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def on_signal(stop: Callable[[], None]) -> None:
    """Call `stop` on SIGTERM and SIGINT."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def run_through_epochs(make: Callable[[], Running], name: str, host: str, port: int | None) -> None:
    """Run a pipeline until a signal ends it, with another run whenever an epoch is over; serve its metrics at `port`.

    Raises what a run does.
    """
    stopping = threading.Event()
    current: list[Running] = []

    def stop() -> None:
        stopping.set()
        for running in current:
            running.stop()

    on_signal(stop)
    while not stopping.is_set():
        running = make()
        current[:] = [running]
        server = observe.serve(name, running.progress, host, port) if port is not None else None
        try:
            if not stopping.is_set():
                running.run()
        except EpochRose:
            continue
        finally:
            if server is not None:
                server.shutdown()
                server.server_close()  # or the next run would find the port taken
        break


def need_kafka(spec: PipelineSpec, command: str) -> None:
    """Raise UsageError unless the pipeline's transport is Kafka, and its packages are installed."""
    if spec.transport != "kafka":
        raise UsageError(
            f"Pipeline {spec.name} has transport: {spec.transport}; `deltactl {command}` is for kafka; use"
            " `deltactl run` for it."
        )
    check_supported(spec)
    need_kafka_packages()
