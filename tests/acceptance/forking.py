"""`deltactl` without waiting for its imports: forked from a process that has done them, once for all tests of a worker.

An interpreter takes a second and a half of CPU time until it has imported what `deltactl run` needs, and the scenes
start hundreds. `multiprocessing`'s fork server has no threads and has opened nothing, so what is forked from it runs
the same `main` on the same modules in the same state as a new interpreter would. `DELTA_TEST_FORK=0` starts new
interpreters all the same, as do the demo's tests, the tutorial's and those of the commands by themselves.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NoReturn

from delta_sync.child_exec import PR_SET_PDEATHSIG
from delta_sync.testing.processes import ServerProcess

COMMAND = (sys.executable, "-m", "deltactl.main")
FORKS = os.environ.get("DELTA_TEST_FORK", "1") != "0"
# The commands of which the scenes start most, and what these import when they need it.
IMPORTED = (
    *(f"deltactl.{name}" for name in ("pipeline", "run", "worker", "sidecar", "status", "dump", "dead", "verify")),
    *("deltactl.create", "deltactl.rebuild", "deltactl.refresh", "deltactl.delete", "deltactl.trial"),
    *("delta_sync.sinks.redis", "delta_sync.sinks.mongodb", "delta_sync.sinks.search", "kafka"),
    *("delta_sync.sources.postgresql.reader", "delta_sync.sources.mysql.reader", "sqlalchemy.dialects.sqlite"),
)

_context: ForkServerContext | None = None
_starting = threading.Lock()


class Forked:
    """What of `subprocess.Popen` a server's process needs: a command that was forked."""

    def __init__(self, arguments: Sequence[str], output: str, errors: str, cwd: Path, env: Mapping[str, str]) -> None:
        """Start `deltactl` with these arguments, in a session of its own, its output added to two files."""
        for name in (output, errors):
            Path(name).touch()  # somebody may look at it before the process is there
        self._lock = threading.Lock()  # whoever asks second would find that the exit status has been read
        self._process = _server().Process(
            target=_deltactl, args=(tuple(arguments), output, errors, str(cwd), dict(env)), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, as in `subprocess`; None while it runs."""
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        connection.wait([self._process.sentinel], timeout)
        status = self.poll()
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(COMMAND, timeout)
        return status

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def start(arguments: Sequence[str], log: Path, cwd: Path, env: Mapping[str, str]) -> ServerProcess:
    """Start `deltactl` in the background, with its output added to `log`."""
    if not FORKS:
        return ServerProcess.start([*COMMAND, *arguments], log=log, cwd=cwd, env=env)
    return ServerProcess(Forked(arguments, str(log), str(log), cwd, env))


def run(arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `deltactl` to its end, as `subprocess.run` does with its output captured. Raises TimeoutExpired."""
    command = [*COMMAND, *arguments]
    if not FORKS:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = Forked(arguments, str(output), str(errors), Path.cwd(), os.environ)
        try:
            status = process.wait(timeout_s)
        finally:
            process.send_signal(signal.SIGKILL)
        return subprocess.CompletedProcess(command, status, output.read_text(), errors.read_text())


def _server() -> ForkServerContext:
    global _context
    with _starting:
        if _context is None:
            _context = multiprocessing.get_context("forkserver")
            _context.set_forkserver_preload([*IMPORTED])
        return _context


def _deltactl(arguments: tuple[str, ...], output: str, errors: str, cwd: str, env: dict[str, str]) -> NoReturn:
    """Be the command, in a process that was just forked."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:  # the fork server ends with the tests
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    _become(0, os.open(os.devnull, os.O_RDONLY))
    for number, name in ((1, output), (2, errors)):
        _become(number, os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", line_buffering=True)
    sys.argv = ["deltactl", *arguments]
    sys.orig_argv = [*COMMAND, *arguments]
    from deltactl.main import main

    main(prog_name="deltactl")
    raise AssertionError("the command ends by SystemExit, which multiprocessing makes the exit status")


def _become(number: int, descriptor: int) -> None:
    os.dup2(descriptor, number)
    os.close(descriptor)
