"""The shop's pipeline on Kafka: sidecars and workers as processes, and what it means that all is in step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acceptance.harness import IN_STEP_TIMEOUT_S, Pipeline, Run, Source
from delta_sync.errors import Transient
from delta_sync.kafka import settings
from delta_sync.kafka.names import group_id, topic_name
from delta_sync.kafka.offsets import GroupOffsets
from delta_sync.kafka.progress import Barrier
from delta_sync.spec import load_spec
from delta_sync.testing.processes import wait_until


class KafkaPipeline(Pipeline):
    """A pipeline with `transport: kafka`, as `Pipeline` makes one and an editor changes it."""

    def __init__(
        self,
        shop: Source,
        folder: Path,
        sinks: Mapping[str, str],
        name: str,
        tables: Sequence[str] = (),
        *,
        bootstrap_servers: str,
        registry: str,
        **options: Any,
    ) -> None:
        create = ["--kafka", bootstrap_servers, "--registry", registry, "--allow-unsafe"]
        super().__init__(shop, folder, sinks, name, tables, create=create, **options)
        kafka = load_spec(self.home).kafka
        assert kafka is not None
        self.kafka = kafka
        topics = [topic_name(name, table) for table in self.tables]
        self.offsets = GroupOffsets(lambda: settings.kafka_python(self.kafka), group_id(name), topics)

    def process(self, command: str, *options: str) -> Run:
        """Start `deltactl sidecar` or `deltactl worker`, with a log of its own."""
        self._started = getattr(self, "_started", 0) + 1
        log = self.folder / f"{self.name}-{command}-{self._started}.log"
        return Run(self._command(command, self.name, "--log-format", "json", *options), log, self.folder)

    def wait_until_applied(self, lsn: int, runs: Sequence[Run]) -> None:
        """Wait until everything before a position is applied and committed, and every table is loaded."""
        barrier: Barrier | None = None

        def applied() -> bool:
            nonlocal barrier
            for run in runs:
                assert run.running, f"a process ended with status {run.exit_status}; {run.tail()}"
            try:
                if barrier is None:
                    if self.shop.confirmed_lsn(self.slot) < lsn:
                        return False
                    barrier = Barrier(lsn, self.offsets.ends())
                return barrier.is_passed(self.offsets.committed()) and self.loaded()
            except Transient:
                return False

        tails = "; ".join(run.tail() for run in runs)
        wait_until(applied, IN_STEP_TIMEOUT_S, f"applying what was written; {tails}")
