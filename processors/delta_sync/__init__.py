"""Delta keeps caches, read models and search indexes in step with the database that is the source of truth.

What a `processor.py` needs is here; the rest is for `deltactl` and for authors of sinks (`delta_sync.sinks.base`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delta_sync import lookup
    from delta_sync.documents import many, one
    from delta_sync.errors import DeltaError, LookupBusy, Transient
    from delta_sync.events import RowEvent
    from delta_sync.pipeline import Enrichment, Lookup, Pipeline
    from delta_sync.values import Document, Interval, Row

__all__ = [
    "DeltaError",
    "Document",
    "Enrichment",
    "Interval",
    "Lookup",
    "LookupBusy",
    "Pipeline",
    "Row",
    "RowEvent",
    "Transient",
    "lookup",
    "many",
    "one",
]

# Imported when they are asked for: every module of ours comes through here, and most commands need none of these.
_MODULES = {
    "DeltaError": "errors",
    "Document": "values",
    "Enrichment": "pipeline",
    "Interval": "values",
    "Lookup": "pipeline",
    "LookupBusy": "errors",
    "Pipeline": "pipeline",
    "Row": "values",
    "RowEvent": "events",
    "Transient": "errors",
    "many": "documents",
    "one": "documents",
}


def __getattr__(name: str) -> object:
    if name == "lookup":
        return importlib.import_module("delta_sync.lookup")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"delta_sync.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
