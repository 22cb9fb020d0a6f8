"""A source that keeps its connections open and says nothing: what a broken network path looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from acceptance.harness import PATIENCE_S, Scene
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import PostgreSQL


def has_unread_bytes(port: int) -> bool:
    """Whether a connection to a server of this machine holds something that the server has not read."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, queues = (line.split()[place] for place in (1, 4))
        if int(local.partition(":")[2], 16) == port and int(queues.partition(":")[2], 16) > 0:
            return True
    return False


def test_sigterm_ends_a_run_whose_source_does_not_answer(scene: Callable[..., Scene], postgresql: PostgreSQL) -> None:
    it = scene(5)
    run = it.run()
    it.in_step(run)
    postgresql.freeze()
    try:
        wait_until(lambda: has_unread_bytes(postgresql.port), PATIENCE_S, "a question to the source")
        assert run.stop() == 0
    finally:
        postgresql.thaw()
    again = it.run()
    it.in_step(again)
