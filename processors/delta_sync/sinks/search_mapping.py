"""What an index of Elasticsearch or OpenSearch is created with: a field for each column, and Delta's own.

All of it is pure, but for reading a mapping that a user has written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import orjson

from delta_sync.errors import UsageError
from delta_sync.tables import Column, Kind, Table

OWN_PREFIX = "_delta_"  # of the fields that are Delta's
VERSION = "_delta_version"  # `_version` again, in a form that can be searched
DELETED = "_delta_deleted"
DELETED_AT = "_delta_deleted_at"  # milliseconds since 1970, by the writer's clock

IGNORE_ABOVE = 8191  # characters: a term has at most 32,766 bytes, and UTF-8 up to 4 for a character
MAX_LONG_DIGITS = 18  # all numbers of 18 digits fit into 64 bits
MAX_DOUBLE_DIGITS = 15  # all numbers of 15 digits survive a double, in which scaled_float computes


def read_mapping(name: str, path: str) -> dict[str, Any]:
    """Return what a mapping's file holds. Raises UsageError."""
    try:
        content: object = orjson.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"sink {name}: the mapping {path} cannot be read: {error.strerror}.") from error
    except orjson.JSONDecodeError as error:
        raise UsageError(f"sink {name}: the mapping {path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"sink {name}: the mapping {path} must hold an object.")
    return cast("dict[str, Any]", content)


def index_body(table: Table, own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return mappings and settings of a new index, from the user's own file if it is not empty, else the columns.

    The aim of the default is that no row is rejected because of the mapping: a value that its field cannot hold (NaN,
    `infinity` as a date, a number as text) is in the document, and merely not found by that field.
    """
    given: Mapping[str, Any] = own.get("mappings", {} if "settings" in own else own)
    mappings: dict[str, Any] = dict(given) or {
        "date_detection": False,  # a text that looks like a date would decide for all the later ones
        "dynamic_templates": [
            {"delta_text": {"match_mapping_type": "string", "mapping": _TEXT}},
            # The first value decides, and 4 may be followed by 4.5; a long would cut that in silence.
            {"delta_number": {"match_mapping_type": "long", "mapping": {"type": "double"}}},
        ],
        "properties": {column.name: field_of(column) for column in table.columns if "." not in column.name},
    }
    mappings["properties"] = {
        **mappings.get("properties", {}),
        VERSION: {"type": "long"},
        DELETED: {"type": "boolean"},
        DELETED_AT: {"type": "date", "format": "epoch_millis"},
    }
    settings: dict[str, Any] = {"index.mapping.ignore_malformed": True, **own.get("settings", {})}
    return mappings, settings


_KEYWORD: Mapping[str, Any] = {"type": "keyword", "ignore_above": IGNORE_ABOVE}
# 256, as the stores' own dynamic mapping has it: the keyword is for sorting, grouping and equality.
_TEXT: Mapping[str, Any] = {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}
# Kept in the document and not looked into: a field per JSON key would exhaust the index's limit of fields, and a key
# with a number here and an object there would reject rows. (`flattened` takes objects only, and by another name in
# each product.) Whoever wants to search in it picks fields in the processor, or maps it.
_OPAQUE: Mapping[str, Any] = {"type": "object", "enabled": False}

_FIELDS: Mapping[Kind, Mapping[str, Any]] = {
    Kind.BOOLEAN: {"type": "boolean"},
    # Also for smaller ones: the stores pack by actual values, and a column that becomes a bigint needs no new index.
    Kind.INTEGER: {"type": "long"},
    Kind.FLOAT: {"type": "double"},
    Kind.BYTES: {"type": "binary"},
    Kind.DATE: {"type": "date"},
    Kind.TIME: _KEYWORD,
    Kind.TIMESTAMP: {"type": "date"},
    Kind.TIMESTAMP_TZ: {"type": "date"},
    Kind.INTERVAL: _KEYWORD,
    Kind.UUID: _KEYWORD,
    Kind.JSON: _OPAQUE,
    Kind.MAP: _OPAQUE,
}

# Types whose values are texts to read; every other type that arrives as text (inet, an enum, a range, bit) is a word.
_PROSE = re.compile(r"text|tinytext|mediumtext|longtext|citext|xml|name|(n?var)?char(acter)?( varying)?|bpchar|string")


def field_of(column: Column) -> dict[str, Any]:
    """Return the mapping of a column. Arrays need none of their own: each field may hold several values."""
    if column.kind is Kind.TEXT:
        prose = _PROSE.fullmatch(re.sub(r"\(.*\)|\[\]", "", column.type.lower()).strip())
        return dict(_TEXT if prose else _KEYWORD)
    if column.kind is Kind.DECIMAL:
        return _decimal_field(column.precision, column.scale)
    return dict(_FIELDS[column.kind])


def _decimal_field(precision: int | None, scale: int | None) -> dict[str, Any]:
    """Exact where 64 bits suffice: whole numbers as they are, others counted in their last digit; else a double."""
    if precision is None or scale is None:
        return {"type": "double"}
    if scale <= 0 and precision - scale <= MAX_LONG_DIGITS:
        return {"type": "long"}
    if scale > 0 and precision <= MAX_DOUBLE_DIGITS:
        return {"type": "scaled_float", "scaling_factor": 10**scale}
    return {"type": "double"}
