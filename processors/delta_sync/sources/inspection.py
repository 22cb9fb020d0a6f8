"""Looking at a source before a pipeline runs on it: what commands ask, whatever kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Self

from delta_sync.errors import Problem
from delta_sync.spec import PipelineSpec
from delta_sync.tables import Table


class Inspection(NamedTuple):
    """What was found: problems, and the tables that could be read, by the names that the specification has."""

    problems: tuple[Problem, ...]
    tables: dict[str, Table]


class Inspector(ABC):
    """A connection to a source, open until the end of a `with`."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @abstractmethod
    def resolve_bare(self, names: Sequence[str]) -> dict[str, str]:
        """Return names with their schema, as SQL would find it; those that it does not find are left out."""

    @abstractmethod
    def tables(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the tables that exist, by name."""

    @abstractmethod
    def inspect(self, spec: PipelineSpec, *, running: bool = False, fresh: bool = False) -> Inspection:
        """Look at the source and the pipeline's tables.

        `running`: the pipeline runs at the moment. `fresh`: it is about to be created, so that what is there by its
        name is somebody else's, or left over.
        """
