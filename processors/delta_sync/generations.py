"""Generations of a sink: a new one is built beside the one that readers see, verified, and then takes over.

A sink that was never rebuilt has no row here, and no number. From the first rebuild on each of its generations is a
sink of its own to the pipeline, called `search.1`, `search.2`, and every change of the log goes to all of them: to the
new one while it is built, and to the old one until it is dropped, so that there is a way back. What the row says is
what is meant, and readers are led after it (`follow`): whoever dies in between leaves readers with a generation that is
complete. `docs/design/rebuild.md` has the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import sqlalchemy as sa

from delta_sync.dumps import Dump
from delta_sync.errors import UsageError
from delta_sync.sinks import AnySink, base_name, open_sink, open_sinks
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.state_tables import GENERATIONS

State = Literal["", "building", "kept", "dropping"]


class Generations(NamedTuple):
    """A sink's generations. `state` is that of the `other` one, "" when there is none; `newest` was given last.

    `building`: it is filled, or is verified. `kept`: it served once, and is written all the same. `dropping`: nothing
    is written to it any more, and the pipeline removes it.
    """

    sink: str
    serving: int = 1
    other: int | None = None
    state: State = ""
    newest: int = 1

    @property
    def written(self) -> tuple[int, ...]:
        """The generations to which the pipeline writes."""
        return (self.serving, self.other) if self.other and self.state != "dropping" else (self.serving,)

    def name(self, number: int) -> str:
        """What a generation is called where sinks are named."""
        return f"{self.sink}.{number}"

    # ── what may be asked for; each raises UsageError when it cannot be ──

    def begun(self) -> Generations:
        """Return what is so once a rebuild has begun."""
        if self.other is not None:
            raise UsageError(
                f"Sink {self.sink} has generation {self.other} beside {self.serving}: {_WHAT_NOW[self.state]}"
            )
        return self._replace(other=self.newest + 1, state="building", newest=self.newest + 1)

    def switched(self) -> Generations:
        """Return what is so once the new one has taken over. Only after a verification that found nothing."""
        assert self.other is not None, "there is a new one"
        assert self.state == "building", "it is new"
        return self._replace(serving=self.other, other=self.serving, state="kept")

    def back(self) -> Generations:
        """Return what is so once readers are led back, or forth again."""
        if self.other is None or self.state != "kept":
            raise UsageError(f"Sink {self.sink} has no older generation to go back to.")
        return self._replace(serving=self.other, other=self.serving)

    def dropped(self, state: State) -> Generations:
        """Return what is so once the other generation, which must be in this state, is given up."""
        if self.other is None or self.state != state:
            what = "no older generation to drop" if state == "kept" else "no rebuild to cancel"
            raise UsageError(f"Sink {self.sink} has {what}.")
        return self._replace(state="dropping")

    def gone(self) -> Generations:
        """Return what is so once the pipeline has removed it."""
        assert self.state == "dropping", "nobody writes to it"
        return self._replace(other=None, state="")


_WHAT_NOW: Mapping[State, str] = {
    "building": "a rebuild is under way; go on with it, or give it up with --cancel.",
    "kept": "that is kept for a way back; drop it first, with --drop-old.",
    "dropping": "that is being removed, which the pipeline does; type this again when it has.",
}


class GenerationStore:
    """A pipeline's generations in the state store. Safe to use from any number of threads and processes at once."""

    def __init__(self, state: StateStore, pipeline: str) -> None:
        self._state = state
        self._pipeline = pipeline

    def all(self) -> dict[str, Generations]:
        """Return those of every sink that was ever rebuilt, by the sink's name."""
        query = sa.select(GENERATIONS).where(GENERATIONS.c.pipeline == self._pipeline).order_by(GENERATIONS.c.sink)
        with self._state.transaction() as connection:
            return {row.sink: Generations(*row[1:]) for row in connection.execute(query)}

    def change(self, before: Generations, after: Generations) -> None:
        """Save what is to be instead of `before`. Raises UsageError when something else is there by now."""
        assert before.sink == after.sink, "of one sink"
        mine = (GENERATIONS.c.pipeline == self._pipeline, GENERATIONS.c.sink == before.sink)
        with self._state.transaction(write=True) as connection:
            row = connection.execute(sa.select(GENERATIONS).where(*mine).with_for_update()).one_or_none()
            found = Generations(before.sink) if row is None else Generations(*row[1:])
            if found != before:
                raise UsageError(f"Somebody else has just changed the generations of sink {before.sink}; look again.")
            if row is None:
                connection.execute(sa.insert(GENERATIONS).values(pipeline=self._pipeline, **after._asdict()))
            else:
                connection.execute(sa.update(GENERATIONS).where(*mine).values(after._asdict()))


def written(rows: Mapping[str, Generations]) -> dict[str, tuple[int, ...]]:
    """Return to what the pipeline writes: when this changes, a new run has to begin."""
    return {sink: tuple(sorted(row.written)) for sink, row in rows.items()}


def open_generations(spec: PipelineSpec, rows: Mapping[str, Generations]) -> dict[str, AnySink]:
    """Return every sink of a pipeline, by name; of one that was rebuilt, each generation that is written to.

    Raises UsageError, as `open_sinks` does.
    """
    found: dict[str, AnySink] = {}
    for name, sink in open_sinks(spec).items():
        numbers = rows[name].written if name in rows else ()
        for number in numbers:
            found[f"{name}.{number}"] = open_sink(name, spec.sinks[name], spec.tombstone_ttl, number)
        if not numbers:
            found[name] = sink
    return found


def meant(names: Collection[str] | None, sink: str) -> bool:
    """Tell whether a sink is among those named. Without a number all of its generations are; None means every sink."""
    return names is None or sink in names or base_name(sink) in names


def follow(serving: Callable[[], int], lead: Callable[[int], None]) -> int:
    """Lead readers to what is meant to serve; return which that is.

    It is asked again afterwards. So of two who lead at once, to different generations, the one that comes last does it
    right, or does it once more.
    """
    number = serving()
    while True:
        lead(number)
        now = serving()
        if now == number:
            return number
        number = now


def known_generations(spec: PipelineSpec, folder: Path) -> dict[str, Generations]:
    """Return those of a pipeline in a folder, none when it never ran. Raises StateBusy."""
    state = StateStore.open(spec.state, folder, create=False)
    if state is None:
        return {}
    with state:
        return GenerationStore(state, spec.name).all()


Step = Literal["dump", "wait", "verify"]


def next_step(table: str, dumps: Iterable[Dump], sink: str) -> Step:
    """Return what a table needs next, so that a new generation has its rows. `dumps` are all that are known."""
    own = [dump for dump in dumps if dump.table == table and dump.kind == "table" and dump.sinks == (sink,)]
    if any(dump.state == "done" for dump in own):
        return "verify"
    return "wait" if any(dump.unfinished for dump in own) else "dump"
