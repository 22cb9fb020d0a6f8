"""The Avro schemas that Delta itself writes, and the envelope by which a reader knows which of them wrote.

`delta_event.avsc` is what is written now. Before a change to it, its text is kept as `delta_event.1.avsc` (then `.2`,
…), because what was written with it is still stored somewhere.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any, cast

import fastavro
from fastavro.schema import fingerprint as _fingerprint
from fastavro.schema import to_parsing_canonical_form

Schema = dict[str, Any]

SINGLE_OBJECT = b"\xc3\x01"  # Avro's single-object encoding: this marker, 8 bytes of fingerprint, the datum
FINGERPRINT_BYTES = 8


@functools.cache
def load(name: str) -> Schema:
    """Return the parsed schema in `<name>.avsc`; always the same object, so do not change it.

    Raises FileNotFoundError.
    """
    return parse(source(name))


def source(name: str) -> Schema:
    """Return the schema as it stands in `<name>.avsc`: what a registry is to have. Raises FileNotFoundError."""
    return cast(Schema, json.loads(files(__name__).joinpath(f"{name}.avsc").read_text(encoding="utf-8")))


def parse(schema: Schema) -> Schema:
    """Return a schema as fastavro's readers and writers take it. Raises its SchemaParseException."""
    return cast(Schema, fastavro.parse_schema(schema))


@functools.cache
def names(family: str) -> tuple[str, ...]:
    """Return the names of all versions of a schema that `load` has, the current one (`family` itself) first."""
    found = (entry.name.removesuffix(".avsc") for entry in files(__name__).iterdir() if entry.name.endswith(".avsc"))
    older = sorted(name for name in found if name.startswith(f"{family}."))
    return (family, *older)


def fingerprint(schema: Schema) -> bytes:
    """Return the schema's CRC-64-AVRO fingerprint as the single-object encoding has it: 8 bytes, little-endian."""
    return bytes.fromhex(_fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))
