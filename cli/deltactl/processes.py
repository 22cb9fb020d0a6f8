"""What the commands of the Kafka transport share: names of members, signals, and several processes of one kind."""

from __future__ import annotations

import os
import signal
import socket
import uuid
from collections.abc import Callable
from types import FrameType

from delta_sync.errors import UsageError
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


def need_kafka(spec: PipelineSpec, command: str) -> None:
    """Raise UsageError unless the pipeline's transport is Kafka, and its packages are installed."""
    if spec.transport != "kafka":
        raise UsageError(
            f"Pipeline {spec.name} has transport: {spec.transport}; `deltactl {command}` is for kafka; use"
            " `deltactl run` for it."
        )
    check_supported(spec)
    need_kafka_packages()
