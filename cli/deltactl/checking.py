"""Looking at everything a pipeline needs, before it runs: the source, its tables, the sinks, the processor."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from delta_sync.errors import CheckFailed, Problem, Transient, UsageError
from delta_sync.generations import Generations, open_generations
from delta_sync.secrets import redact, remember, resolve
from delta_sync.sinks import targets_of
from delta_sync.sources import open_reader
from delta_sync.sources.inspection import Inspector
from delta_sync.sources.postgresql.checks import new_slot_command
from delta_sync.spec import PipelineSpec
from delta_sync.starting import Loss, find_loss, look, why_not_by_itself
from delta_sync.state import StateStore
from delta_sync.tables import Table
from delta_sync.watch import ANSWER_S


class Findings(NamedTuple):
    """What was looked at (`source`, `table public.movie`, `sink cache`), tables that could be read, and problems."""

    looked_at: tuple[str, ...]
    tables: dict[str, Table]
    problems: tuple[Problem, ...]

    def refuse_fatal(self) -> None:
        """Raise CheckFailed with all problems when one of them is fatal."""
        if any(problem.fatal for problem in self.problems):
            raise CheckFailed(self.problems)


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Generator[None]:
    """Set environment variables meanwhile, and keep their values out of everything that is printed from now on."""
    before = {name: os.environ.get(name) for name in values}
    for value in values.values():
        remember(value)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def check_source(inspector: Inspector, spec: PipelineSpec, *, running: bool = False, fresh: bool = False) -> Findings:
    """Look at the source and its tables; `running` and `fresh` are as in `Inspector.inspect`."""
    found, tables = inspector.inspect(spec, running=running, fresh=fresh)
    return Findings(("source", *(f"table {name}" for name in spec.tables)), tables, found)


def check_history(spec: PipelineSpec, folder: Path) -> Findings:
    """Look at whether slot and topics go on where the pipeline's state was, as a run does before it streams.

    What a run would stop with is fatal. Raises Transient when source, state store or Kafka do not answer.
    """
    store = StateStore.open(spec.state, folder, create=False)
    if store is None:
        return Findings((), {}, ())
    found: list[Problem] = []
    delivered = None
    if spec.kafka is not None:
        need_kafka_packages()
        from delta_sync.kafka.delivered import delivered_of

        delivered = delivered_of(spec)
    reader = open_reader(spec, "deltactl", ANSWER_S)
    try:
        with store:
            found += _topics_made_anew(spec, store)
            seen = look(spec, reader, store, delivered)
            loss = None if seen.known is None else find_loss(seen)
            why_not = None if loss is None else why_not_by_itself(spec, loss, store.loads(spec.name))
    finally:
        reader.close()
    if loss is None or _says_the_source(spec, loss, why_not):
        return Findings((), {}, tuple(found))
    if why_not is None:
        fix = "the next start begins a new epoch by itself: every table is loaded again"
    else:
        fix = f"type: {new_slot_command(spec)}, which begins a new epoch: every table is loaded again"
    found.append(Problem("source", f"changes may have been lost: {loss.why}", fix, fatal=why_not is not None))
    return Findings((), {}, tuple(found))


def _says_the_source(spec: PipelineSpec, loss: Loss, why_not: str | None) -> bool:
    """Tell whether the check of the source says it, too: that a slot is invalidated."""
    is_slot = loss.overtaken and spec.source.kind == "postgresql"
    return is_slot and (why_not is None or spec.source.on_lost_log == "stop")


def _topics_made_anew(spec: PipelineSpec, store: StateStore) -> list[Problem]:
    """Return a problem for each topic that is another than the one that workers have read; embedded, there are none."""
    if spec.kafka is None:
        return []
    from delta_sync.kafka import settings
    from delta_sync.kafka.names import group_id, topic_name
    from delta_sync.kafka.offsets import GroupOffsets
    from delta_sync.kafka.topic_ids import SeenTopics, TopicStore, made_anew

    kafka, topics = spec.kafka, [topic_name(spec.name, table) for table in spec.tables]
    offsets = GroupOffsets(lambda: settings.resolved(settings.kafka_python(kafka)), group_id(spec.name), topics)
    with contextlib.closing(offsets):
        saved = TopicStore(store, spec.name).saved()
        now = offsets.topic_ids()
    what = "it was deleted and made again: changes that were in it, and not read yet, are lost"
    fix = "nothing is to be done: a worker finds it, too, and has the table loaded again"
    names = sorted({partition.topic for partition in made_anew(SeenTopics(saved, now), now)})
    return [Problem(f"topic {name}", what, fix, fatal=False) for name in names]


def check_sinks(spec: PipelineSpec, tables: Iterable[Table], generations: Mapping[str, Generations]) -> Findings:
    """Look at the sinks, each of the `generations` of one that was rebuilt.

    Raises UsageError when their options are wrong or two tables would share a place.
    """
    found: list[Problem] = []
    opened = open_generations(spec, generations)
    try:
        for sink, targets in targets_of(opened.values(), tables, spec):
            try:
                found += sink.check(targets)
            except Transient as error:
                found.append(Problem(f"sink {sink.name}", str(error).rstrip("."), "start it, or correct its url"))
    finally:
        for sink in opened.values():
            sink.close()
    return Findings(tuple(f"sink {name}" for name in spec.sinks), {}, tuple(found))


def check_transport(spec: PipelineSpec) -> Findings:
    """Look at Kafka and the schema registry; at nothing when the transport is the embedded one."""
    if spec.kafka is None:
        return Findings((), {}, ())
    need_kafka_packages()
    from delta_sync.kafka.registry import SchemaRegistry
    from delta_sync.kafka.topics import differences, read_cluster, wanted_topics

    wanted = wanted_topics(spec)
    registry = SchemaRegistry(spec.kafka.registry)
    try:
        found = differences(spec, read_cluster(spec.kafka, [topic.name for topic in wanted]))
    except Transient as error:
        found = [Problem("kafka", str(error).rstrip("."), "start it, or correct kafka.bootstrap_servers")]
    except CheckFailed as error:
        found = list(error.problems)
    try:
        found += registry.check()
    finally:
        registry.close()
    return Findings(("kafka", *(f"topic {topic.name}" for topic in wanted), "registry"), {}, tuple(found))


def need_kafka_packages() -> None:
    """Raise UsageError unless the packages of the Kafka transport are installed."""
    if importlib.util.find_spec("kafka") is None:
        raise UsageError("The Kafka transport needs packages; type: pip install 'delta-sync[kafka]'.")


def resolvable(spec: PipelineSpec) -> None:
    """Raise UsageError unless every reference of the specification can be resolved here."""
    texts = [spec.source.url, spec.source.password or ""]
    if spec.kafka is not None:
        registry, security = spec.kafka.registry, spec.kafka.security
        texts += [registry.url, registry.password or "", registry.token or ""]
        texts.append(security.password or "" if security is not None else "")
    for sink in spec.sinks.values():
        texts += [sink.url, *(value for value in sink.options.values() if isinstance(value, str))]
    for shape in spec.shapes.values():
        texts += [mask.hash for mask in shape.mask.values() if mask.hash is not None]
    if spec.source.kind == "debezium":
        texts += [value for value in spec.connector.values() if isinstance(value, str)]
    for text in texts:
        resolve(text)


def merge(parts: Sequence[Findings]) -> Findings:
    """Return several findings as one."""
    return Findings(
        tuple(where for part in parts for where in part.looked_at),
        {name: table for part in parts for name, table in part.tables.items()},
        tuple(Problem(p.where, redact(p.what), redact(p.fix), p.fatal) for part in parts for p in part.problems),
    )
