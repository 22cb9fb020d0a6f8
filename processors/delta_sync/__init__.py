"""Delta keeps caches, read models and search indexes in step with the database that is the source of truth.

What a `processor.py` needs is here; the rest is for `deltactl` and for authors of sinks (`delta_sync.sinks.base`).
"""

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
