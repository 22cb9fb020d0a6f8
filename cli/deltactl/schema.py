"""The JSON Schema of `pipeline.yaml`, with the options of every sink that is installed, so that editors know them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from delta_sync.secrets import REFERENCE_PATTERN, is_secret_name
from delta_sync.sinks import AnySink, Installed
from delta_sync.sinks.base import Options
from delta_sync.spec import PipelineSpec

SCHEMA_FILE = "pipeline.schema.json"  # in the folder of all pipelines: one file for all of them
DIALECT = "http://json-schema.org/draft-07/schema#"  # what editors' YAML support knows best


def schema(known: Installed) -> dict[str, Any]:
    """Return the schema. Which options a sink has follows from its URL's scheme. Pure: same sinks, same schema."""
    root = PipelineSpec.model_json_schema(ref_template="#/definitions/{model}")
    definitions: dict[str, Any] = root.pop("$defs")
    sink = definitions["SinkSpec"]
    sink.pop("additionalProperties", None)
    schemes = "|".join(re.escape(scheme) for scheme in sorted(known.schemes))
    sink["properties"]["url"] |= {"pattern": rf"^({schemes})://"}
    sink["allOf"] = [_options_of(kind, known.classes[kind], sink, definitions) for kind in sorted(known.classes)]
    per_table = [
        _embed(f"{kind}.table", known.classes[kind].target_model, definitions) for kind in sorted(known.classes)
    ]
    table_sinks = definitions["TableSpec"]["properties"]["sinks"]
    table_sinks["additionalProperties"] = {"anyOf": per_table} if per_table else {"type": "object"}
    # `public.movie:` with nothing behind it is a table without options.
    root["properties"]["tables"]["additionalProperties"] = {
        "anyOf": [{"$ref": "#/definitions/TableSpec"}, {"type": "null"}]
    }
    root["title"] = "A pipeline of Delta"
    _refuse_plain_secrets(root)
    _refuse_plain_secrets(definitions)
    return {"$schema": DIALECT, **root, "definitions": definitions}


def _refuse_plain_secrets(part: Any) -> None:
    """Give every property that is a secret by its name the pattern of a reference, as the specification wants it."""
    if isinstance(part, list):
        for item in cast("Sequence[Any]", part):
            _refuse_plain_secrets(item)
    elif isinstance(part, dict):
        inside = cast("dict[str, Any]", part)
        properties: dict[str, Any] = inside.get("properties", {})
        for name, property_ in properties.items():
            if is_secret_name(name):
                property_["pattern"] = REFERENCE_PATTERN
        for item in inside.values():
            _refuse_plain_secrets(item)


def _options_of(kind: str, cls: type[AnySink], sink: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    schemes = "|".join(re.escape(scheme) for scheme in cls.schemes)
    embedded = _embed(kind, cls.options_model, definitions)
    model = definitions.pop(embedded["$ref"].removeprefix("#/definitions/"))
    return {
        "if": {"properties": {"url": {"pattern": rf"^({schemes})://"}}, "required": ["url"]},
        "then": {
            "title": f"Sink {kind}",
            "properties": {"url": {"description": sink["properties"]["url"]["description"]}, **model["properties"]},
            "required": ["url", *model.get("required", [])],
            "additionalProperties": False,
        },
    }


def _embed(prefix: str, model: type[Options], definitions: dict[str, Any]) -> dict[str, str]:
    """Add a model and what it refers to, under names that no other sink's models can have; return a reference."""
    found = model.model_json_schema(ref_template=f"#/definitions/{prefix}.{{model}}")
    found.setdefault("properties", {})
    for name, definition in found.pop("$defs", {}).items():
        definitions[f"{prefix}.{name}"] = definition
    definitions[prefix] = found
    return {"$ref": f"#/definitions/{prefix}"}
