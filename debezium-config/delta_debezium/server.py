"""Debezium Server as a child process: the connector of the Kafka transport.

What is confirmed to the source has been acknowledged by Kafka, so it may be killed at any moment: what it had not
confirmed is sent once more by the next one. When to start it again is for its owner to decide (`supervision`).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from delta_debezium.distribution import HEAP_MB, Distribution
from delta_sync import child_exec
from delta_sync.capture import CaptureDied
from delta_sync.logs import logger
from delta_sync.secrets import redact

log = logger(__name__)

LOG_BYTES = 32 << 20  # of the log, and as much of what came before: days of warnings
LAST_LINES_CHARS = 500  # of what is not in the server's format
LAST_WORDS_BYTES = 64 << 10  # of the log: a Java stack with its causes has some thousand

# Of our environment: what a JVM needs of a machine. Not all of it, for DEBEZIUM_… and QUARKUS_… would count as options.
_INHERITED = frozenset({"HOME", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "LANG", "LC_ALL", "PATH", "TMPDIR"})


class DebeziumServer:
    """One Debezium Server in a folder of its own. It ends when this process does, however that ends.

    Linux ties it to the *thread* that called `start`: call it from one that lives as long as the server shall.
    """

    def __init__(self, folder: Path, distribution: Distribution, heap_mb: int = HEAP_MB) -> None:
        """Keep `config/application.properties` and `server.log` in `folder`, which nobody else may read."""
        self._folder = folder
        self._distribution = distribution
        self._heap_mb = heap_mb
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def log_file(self) -> Path:
        """What it prints; what came before, or of the run before, with `.1` behind its name."""
        return self._folder / "server.log"

    @property
    def _older_log(self) -> Path:
        return self.log_file.with_name(f"{self.log_file.name}.1")

    @property
    def alive(self) -> bool:
        """Whether the process runs. It may hang all the same: only heartbeats that come through show that it works."""
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int | None:
        """The process, while it runs."""
        return self._child.pid if self._child is not None and self.alive else None

    def start(self, properties: str, environment: Mapping[str, str]) -> None:
        """Start it with what `render.server_properties` and `render.server_environment` return.

        It begins to deliver some seconds later. `environment` has the secrets; they are in no file. Raises CaptureDied.
        """
        self.kill()
        try:
            self._write_configuration(properties)
            self._child = self._spawn(environment)
        except OSError as error:
            raise CaptureDied(f"Debezium Server cannot be started: {error}.") from error

    def _write_configuration(self, properties: str) -> None:
        config = self._folder / "config"
        config.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        file = config / "application.properties"
        file.touch(mode=0o600)
        file.chmod(0o600)
        file.write_text(properties, encoding="ascii")

    def _spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        if self.log_file.exists():
            self.log_file.replace(self._older_log)
        # A program of its own ties it to us: `preexec_fn` may deadlock where there are threads.
        tie = [sys.executable, "-I", "-S", child_exec.__file__, str(os.getpid()), str(int(signal.SIGKILL)), "-"]
        inherited = {name: value for name, value in os.environ.items() if name in _INHERITED}
        with os.fdopen(
            os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), "wb"
        ) as output:
            return subprocess.Popen(  # noqa: S603 -- the command is ours
                [*tie, *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env={**inherited, **environment},
                start_new_session=True,  # Ctrl-C is for the sidecar, which ends it
            )

    def _command(self) -> list[str]:
        cache = self._distribution.start_cache
        quick = [f"-XX:AOTCache={cache}"] if cache is not None and cache.exists() else []
        return self._distribution.command(self._heap_mb, *quick)

    def bound_log(self) -> None:
        """Begin the log anew when it is large, the old one behind `.1`; call it now and then.

        The server goes on writing into the same file, so what it prints in this very moment may be missing.
        """
        try:
            if self.log_file.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.log_file, self._older_log)
                os.truncate(self.log_file, 0)
        except OSError as error:  # a full disk, perhaps: then there is no place for the old one
            log.warning("connector_log_not_bounded", reason=str(error))

    def last_words(self) -> str:
        """Return why it ended, as far as its log says, in one paragraph without secrets."""
        status = self._child.poll() if self._child is not None else None
        try:
            text = self.log_file.read_bytes()[-LAST_WORDS_BYTES:].decode(errors="replace")
        except OSError:
            text = ""
        # Its own status is 0 whatever happened.
        how = f" by {signal.Signals(-status).name}" if status is not None and status < 0 else ""
        return redact(f"Debezium Server ended{how}: {reason(text) or 'its log names no error'}")

    def stop(self, budget_s: float) -> None:
        """End it, by force when it takes longer than the budget. Idempotent."""
        child = self._child
        if child is None:
            return
        child.terminate()
        try:
            child.wait(budget_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once. Nothing is lost: what was not confirmed comes again. Idempotent."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()


# ── last words ───────────────────────────────────────────────────────────────────────────────────────────────────

_ENTRY = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ (\w+) +\[[^]]*\] (?:\([^)]*\) )?", re.MULTILINE)
_CAUSE = "\nCaused by: "
_JVM_DIES = "Terminating due to "  # what -XX:+ExitOnOutOfMemoryError says
_CLASS = re.compile(r"^(?:[a-z]\w*\.)+[A-Z][\w.$]*(?:: )?")  # of an exception, before its message


def reason(said: str) -> str:
    """Return what a log says about the end: the cause behind its last error; nothing when it holds no more than that.

    What is not in the server's format comes from the JVM, which has said why it could not start.
    """
    if (place := said.rfind(_JVM_DIES)) >= 0:
        return said[place:].splitlines()[0]
    before, *entries = _ENTRY.split(said)  # level and text of each
    errors = [text for level, text in zip(entries[::2], entries[1::2], strict=True) if level in ("ERROR", "FATAL")]
    if not errors:
        return "" if entries else " ".join(before.split())[-LAST_LINES_CHARS:]
    engines = [text for text in errors if text.startswith("Engine has failed")]
    head, *causes = (engines or errors)[-1].split(_CAUSE)
    messages = [_message(text) for text in (head.removeprefix("Engine has failed with : "), *causes)]
    innermost = messages[-1]
    # A socket says only that it was refused; what is around it says which.
    around = [message for message in messages[-2:-1] if innermost in message]
    return around[0] if around else innermost


def _message(text: str) -> str:
    first = text.partition("\n\tat ")[0].strip()
    while (shorter := _CLASS.sub("", first, count=1)) not in ("", first):
        first = shorter
    return " ".join(first.split())
