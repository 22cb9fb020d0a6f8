"""What commands that run for long share: names of members, signals, a run for each epoch, several processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from types import FrameType

from delta_sync import child_exec, observe
from delta_sync.errors import EpochRose, Outgrown, PipelineStopped, UsageError
from delta_sync.running import Running
from delta_sync.sources import check_supported
from delta_sync.spec import PipelineSpec
from deltactl.checking import need_kafka_packages

ONCE = ("--new-slot", "--reload")  # what a person has accepted, or asked for, once
LOOK_S = 0.2  # at each of several children in turn


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
    outgrown = False
    while not stopping.is_set():
        running = make()
        current[:] = [running]
        server = observe.serve(name, running.progress, host, port, running.notice_door()) if port is not None else None
        try:
            if not stopping.is_set():
                running.run()
        except EpochRose:
            continue
        except Outgrown:
            outgrown = True
        finally:
            if server is not None:
                server.shutdown()
                server.server_close()  # or the next run would find the port taken
        if outgrown and not stopping.is_set():
            become_anew()
        break


def become_anew() -> None:
    """Begin this command again in this process's place, with fresh memory: whoever supervises it sees no end.

    Options that are meant for one start alone are left out. What is open is closed: none of it is inheritable.
    """
    arguments = [one for one in sys.orig_argv[1:] if one not in ONCE]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 -- our own command


def run_together(commands: Sequence[Sequence[str]]) -> None:
    """Run commands side by side until all have ended; one that fails ends the others, and so do SIGTERM and SIGINT.

    They are told to end by SIGTERM, also when this process is killed: nobody would look after them then. Call it from
    the main thread, which lives as long as they. Raises PipelineStopped when one failed.
    """
    children: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        for child in children:
            child.send_signal(signal.SIGTERM)

    on_signal(stop)
    tie = [sys.executable, "-I", "-S", child_exec.__file__, str(os.getpid()), str(int(signal.SIGTERM)), "-"]
    for command in commands:
        if not stopping.is_set():
            # In sessions of their own: a terminal's Ctrl-C comes to them once, through us.
            children.append(subprocess.Popen([*tie, *command], start_new_session=True))  # noqa: PERF401, S603 -- a signal may come in between; our caller's command
    if stopping.is_set():
        stop()  # of a signal that came while one was being started
    status = 0
    while any(child.poll() is None for child in children):
        for child in children:
            try:
                child.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                continue
            if child.returncode and not stopping.is_set():
                status = child.returncode
                stop()
    if status:
        raise PipelineStopped(f"A worker ended with status {status}; what it said is above.")


def need_kafka(spec: PipelineSpec, command: str) -> None:
    """Raise UsageError unless the pipeline's transport is Kafka, and its packages are installed."""
    if spec.transport != "kafka":
        raise UsageError(
            f"Pipeline {spec.name} has transport: {spec.transport}; `deltactl {command}` is for kafka; use"
            " `deltactl run` for it."
        )
    check_supported(spec)
    need_kafka_packages()
