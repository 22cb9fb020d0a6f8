"""Child processes that are servers: they die with us, and can be killed or frozen with all their own children.

Process groups are not enough: every backend of PostgreSQL makes itself the leader of a group of its own. So the family
of a process is looked up in `/proc`, while the process itself is stopped and can have no more children. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from delta_sync import child_exec
from delta_sync.errors import DeltaError

POLL_LEAST_S, POLL_MOST_S = 0.01, 0.25  # between two looks at /proc, or at a server that starts
SIGNAL_TIMEOUT_S = 30.0  # for SIGKILL and SIGSTOP to take effect: at once, unless the machine is overloaded
LOWEST_PORT = 10_240  # below are the well-known servers of the machine
CLUSTER_BUS_OFFSET = 10_000  # Redis 6 has its cluster bus there; no other way to choose it

_EXEC = str(Path(child_exec.__file__))


class ServerError(DeltaError):
    """A server of the test kit did not start or stop, or something that it needs is missing."""


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll `condition`. Raises ServerError, saying that `what` did not happen, after `timeout_s`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + timeout_s:
            raise ServerError(f"{what} took more than {timeout_s:.0f} s")
        pause(began)


def pause(began: float) -> None:
    """Sleep before the next look: a tenth of what one has waited since `began`, by `time.monotonic`.

    So a look comes at most a tenth too late, and those that wait leave the processor to what they wait for.
    """
    time.sleep(min(max((time.monotonic() - began) / 10, POLL_LEAST_S), POLL_MOST_S))


# ── ports ────────────────────────────────────────────────────────────────────────────────────────────────────────


def free_port(*offsets: int) -> int:
    """Return a port of 127.0.0.1 that is free now, and so are those at `offsets` from it.

    All lie below the range from which the kernel gives ports to outgoing connections: so none of those can take the
    port of a server while it is down, and it can be kept over restarts.
    """
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    highest = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 32_768
    span = highest - max(offsets, default=0)
    if span <= LOWEST_PORT:  # a machine set up otherwise: any port will do
        span = 65_536 - max(offsets, default=0)
    rng = random.SystemRandom()  # not the seeded one, or test runs side by side would all choose the same ports
    for _ in range(1000):
        port = rng.randrange(LOWEST_PORT, span)
        if all(_is_free(port + offset) for offset in (0, *offsets)):
            return port
    raise ServerError("no free port was found on 127.0.0.1")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


# ── starting ─────────────────────────────────────────────────────────────────────────────────────────────────────

_Job = tuple[Callable[[], "subprocess.Popen[bytes]"], "Future[subprocess.Popen[bytes]]"]


class _Spawner:
    """One thread that starts all servers and lives as long as this program.

    The signal of a parent's death comes when the *thread* that started the child ends, so a server that a passing
    thread started would die with it.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="server-spawner", daemon=True).start()

    def _run(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 -- raised again in the caller
                future.set_exception(error)

    def popen(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self._jobs.put((job, future))
        return future.result()


_spawner: _Spawner | None = None
_spawner_lock = threading.Lock()


def _forget_spawner() -> None:
    """Run in a forked child: threads do not survive a fork."""
    global _spawner, _spawner_lock
    _spawner, _spawner_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_spawner)


def _the_spawner() -> _Spawner:
    global _spawner
    with _spawner_lock:
        if _spawner is None:
            _spawner = _Spawner()
        return _spawner


# ── the process and its family ───────────────────────────────────────────────────────────────────────────────────


class _Member(NamedTuple):
    """A process, told from a later one with the same id by its start (in clock ticks since boot)."""

    pid: int
    start_ticks: int


class _Stat(NamedTuple):
    member: _Member
    state: str
    parent: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return _Stat(_Member(pid, int(fields[19])), fields[0], int(fields[1]))


def _descendants(pid: int) -> list[_Member]:
    children: dict[int, list[_Member]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 -- twice as fast as iterdir, and this is polled
        if entry.isdigit() and (stat := _stat(int(entry))) is not None:
            children.setdefault(stat.parent, []).append(stat.member)
    found: list[_Member] = []
    parents = [pid]
    while parents:
        offspring = children.get(parents.pop(), [])
        found += offspring
        parents += [member.pid for member in offspring]
    return found


def _state(member: _Member) -> str:
    """Return the state letter of /proc, `X` when the process is gone (a zombie is: nothing of it runs)."""
    stat = _stat(member.pid)
    return "X" if stat is None or stat.member != member or stat.state == "Z" else stat.state


def _gone(member: _Member) -> bool:
    return _state(member) == "X"


def _idle(member: _Member) -> bool:
    """Whether it executes nothing: stopped, traced or gone."""
    return _state(member) in "TtX"


def _send(member: _Member, signum: int) -> None:
    if _state(member) != "X":
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signum)


class Started(Protocol):
    """A child process, with what of `subprocess.Popen` is needed here."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int, /) -> None: ...


class ServerProcess:
    """A running server: one process that we started, and all that it started."""

    def __init__(self, started: Started) -> None:
        """Look after a process that was started in a session of its own."""
        self._popen = started
        stat = _stat(started.pid)
        # A child that nobody waits for stays in /proc; one of another process may have been and gone.
        self._root = _Member(started.pid, 0) if stat is None else stat.member
        self._guard: subprocess.Popen[bytes] | None = None  # while frozen

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        death_signal: int = signal.SIGKILL,
    ) -> Self:
        """Start `command` as `user`, in a session of its own, with its output appended to `log`.

        `death_signal` is what the server gets when this program ends, however it ends.
        """
        wrapper = [sys.executable, "-I", "-S", _EXEC, str(os.getpid()), str(int(death_signal)), user or "-"]
        with log.open("ab") as output:
            started = _the_spawner().popen(
                lambda: subprocess.Popen(  # noqa: S603 -- the command is ours
                    [*wrapper, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=env,
                    start_new_session=True,  # Ctrl-C in a terminal is for us, not for the servers
                )
            )
        return cls(started)

    @property
    def pid(self) -> int:
        return self._root.pid

    @property
    def running(self) -> bool:
        """Whether the process exists; a frozen one does."""
        return self._popen.poll() is None

    @property
    def frozen(self) -> bool:
        return self._guard is not None

    @property
    def exit_status(self) -> int | None:
        """As in `subprocess`: below 0, the signal that ended it; None while it runs."""
        return self._popen.poll()

    def terminate(self, signum: int, timeout_s: float) -> bool:
        """Send `signum` and wait; return whether it ended in time."""
        if self.running:
            self._popen.send_signal(signum)
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def freeze(self) -> None:
        """Stop (SIGSTOP) the process and its family. When it returns, none of them executes another instruction."""
        if self.frozen or not self.running:
            return
        family = self._stop_family()
        # A stopped process cannot act on its parent's death, so something else must if we die meanwhile.
        self._guard = subprocess.Popen(  # noqa: S603 -- the command is ours
            ["/bin/sh", "-c", 'read -r line || kill -KILL "$@"', "guard", *(str(member.pid) for member in family)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def thaw(self) -> None:
        """Let the family go on (SIGCONT), children first, so that their parent finds them running."""
        if not self.frozen:
            return
        for member in reversed([self._root, *_descendants(self.pid)]):
            _send(member, signal.SIGCONT)
        self._dismiss_guard()

    def kill(self) -> None:
        """Kill (SIGKILL) the family. When it returns, none of them is there."""
        if self.running:
            family = self._stop_family()  # first, so that nobody restarts or reaps what is killed
            for member in family:
                _send(member, signal.SIGKILL)
            self._popen.wait(SIGNAL_TIMEOUT_S)
            for member in family:
                wait_until(partial(_gone, member), SIGNAL_TIMEOUT_S, f"SIGKILL of process {member.pid}")
        self._dismiss_guard()

    def _stop_family(self) -> list[_Member]:
        """Stop the root, then whoever descends from it, until all that are found are stopped; return them."""
        family = [self._root]
        while True:
            for member in family:
                _send(member, signal.SIGSTOP)
                wait_until(partial(_idle, member), SIGNAL_TIMEOUT_S, f"SIGSTOP of process {member.pid}")
            found = [self._root, *_descendants(self.pid)]
            if set(found) <= set(family):
                return family
            family = found

    def _dismiss_guard(self) -> None:
        if self._guard is not None:
            self._guard.communicate(b"thawed\n")
            self._guard = None
