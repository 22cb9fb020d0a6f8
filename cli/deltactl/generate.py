"""What `pipeline create` writes: the specification from the command's options, and a first `processor.py`. Pure."""

from __future__ import annotations

import builtins
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import yaml

from delta_sync.errors import UsageError
from delta_sync.secrets import has_reference, is_reference, is_secret_parameter
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.tables import Column, Table
from delta_sync.urls import check_url, parts_of

LINE_LENGTH = 88  # what formatters take unless told otherwise: ours must not be the first diff

_REFERENCE = re.compile(r"\$\{(?:env|file):[^}]*\}")
_NAMED = re.compile(r"^([^=/:?]*)=(.*)$", re.DOTALL)


# ── the specification ────────────────────────────────────────────────────────────────────────────────────────────


class Draft(NamedTuple):
    """A specification, and the secrets that the options spelt out, by the environment variable that replaces each."""

    spec: PipelineSpec
    secrets: dict[str, str]


def split_sinks(options: Sequence[str], kind_of: Mapping[str, str]) -> dict[str, str]:
    """Return the URLs of `--sink [NAME=]URL` by name; one without a name is called what its kind is.

    `kind_of` maps schemes to kinds. Raises UsageError when two have the same name.
    """
    sinks: dict[str, str] = {}
    for option in options:
        match = _NAMED.match(option)
        name, url = (match[1], match[2]) if match else ("", option)
        if match and not name:
            raise UsageError("--sink: there is no name before the =; write NAME=URL, or the URL alone.")
        name = name or kind_of.get(url.partition("://")[0].lower(), "sink")
        if name in sinks:
            raise UsageError(f"Two sinks are called {name}; give each its own name: --sink NAME=URL.")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UsageError(f"--sink: {name!r} must be lower-case letters, digits and underscores.")
        sinks[name] = url
    return sinks


def without_secrets(url: str, variable: str, what: str = "The URL") -> tuple[str, dict[str, str]]:
    """Return the URL with the secrets that it spells out as references to environment variables, and their values.

    A password becomes `${env:VARIABLE_PASSWORD}`; parameters that are secrets by their name are replaced, too.
    What is a reference already stays as it is. Raises UsageError, naming `what`, when it is no URL.
    """
    check_url(url, what)
    masked, references = _mask(url)
    parts = parts_of(masked)
    password = parts.password
    secrets: dict[str, str] = {}
    netloc, query = parts.netloc, parts.query
    if password and not is_reference(_unmask(password, references)):
        name = f"{variable}_PASSWORD"
        secrets[name] = _literal(_unmask(password, references), what)
        user, _, host = netloc.rpartition("@")
        netloc = f"{user.partition(':')[0]}:${{env:{name}}}@{host}"
    pairs: list[str] = []
    for pair in query.split("&") if query else []:
        key, _, value = pair.partition("=")
        if is_secret_parameter(unquote(key), _unmask(value, references)):
            name = re.sub(r"\W", "_", f"{variable}_{unquote(key)}".upper())
            secrets[name] = _literal(_unmask(value, references), what)
            pair = f"{key}=${{env:{name}}}"
        pairs.append(pair)
    if not secrets:
        return url, {}
    # Not by urlunsplit: it would drop empty parts, and what the user wrote should be found again.
    rest = masked.partition("://")[2][len(parts.netloc) :].partition("?")[0].partition("#")[0]
    fragment = f"#{parts.fragment}" if parts.fragment else ""
    text = f"{parts.scheme}://{netloc}{rest}{'?' + '&'.join(pairs) if pairs else ''}{fragment}"
    return _unmask(text, references), secrets


def source_from_url(url: str, variable: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return `source` of a specification for a URL: the password, spelt out or a reference, in a field of its own.

    Returns the secrets that the URL spelt out, too, by environment variable. Raises UsageError.
    """
    clean, secrets = without_secrets(url, variable, "--source")
    masked, references = _mask(clean)
    parts = parts_of(masked)
    authority, password = parts.netloc, parts.password
    source: dict[str, str] = {}
    if password:
        user, _, host = authority.rpartition("@")
        source["password"] = _unmask(password, references)
        masked = masked.replace(authority, f"{user.partition(':')[0]}@{host}", 1)
    head, mark, query = masked.partition("?")
    pairs: list[str] = []
    for pair in query.split("&") if mark else []:
        if pair.partition("=")[0] == "password":  # libpq takes it there as well; the connector does not
            source["password"] = _unmask(pair.partition("=")[2], references)
        else:
            pairs.append(pair)
    return {"url": _unmask(head + ("?" + "&".join(pairs) if pairs else ""), references), **source}, secrets


def source_from_connector(file: Path) -> tuple[dict[str, str], dict[str, str | int | bool]]:
    """Return `source` and `connector` of a specification for a file with a connector's options.

    In YAML, in JSON (Kafka Connect's form, with `config`, or the options alone), or as Java's properties where it is
    called so. Raises UsageError.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--source-connector: {file} cannot be read: {error.strerror}.") from error
    data: Any
    if file.suffix == ".properties":
        lines = (line.strip() for line in text.splitlines())
        pairs = (line.partition("=") for line in lines if line and line[0] not in "#!")
        data = {name.strip(): value.strip() for name, _, value in pairs}
    else:
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--source-connector: {file} is not YAML.") from None  # its own text quotes values
    found = _mapping(_mapping(data).get("config", data))
    if not isinstance(found.get("connector.class"), str):
        raise UsageError(
            f"--source-connector: {file} must hold a connector's options, and among them connector.class, such as"
            " io.debezium.connector.sqlserver.SqlServerConnector."
        )
    options: dict[str, Any] = {str(name): value for name, value in found.items() if name not in _OF_DELTA}
    bad = next((name for name, value in options.items() if not isinstance(value, str | int)), None)
    if bad is not None:
        raise UsageError(f"--source-connector: {bad} in {file} must be a text, a number, or true or false.")
    return {"url": f"debezium://{found['connector.class']}"}, options


def _mapping(data: object) -> dict[str, Any]:
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}


_OF_DELTA = ("connector.class", "name", "tasks.max", "topic.prefix", "snapshot.mode")  # as Delta sets them


def spec_from_options(
    name: str,
    source: Mapping[str, str],
    tables: Sequence[str],
    sinks: Mapping[str, str],
    existing: PipelineSpec | None = None,
    kafka: Mapping[str, Any] | None = None,
    connector: Mapping[str, str | int | bool] | None = None,
) -> Draft:
    """Return the specification that the options of `pipeline create` describe.

    What `existing` says beyond them (limits, options of tables and sinks that stay) is kept. `kafka` has what the
    options say of that transport: without it, the transport stays what it was. `connector` takes the place of the
    connector's options that were there, if it has any. Raises UsageError.
    """
    data: dict[str, Any] = {} if existing is None else existing.model_dump(mode="json", exclude_defaults=True)
    old_source: dict[str, Any] = data.get("source", {})
    if "password" not in source and source["url"] != old_source.get("url"):
        old_source = {key: value for key, value in old_source.items() if key != "password"}
    old_tables: dict[str, Any] = data.get("tables", {})
    old_sinks: dict[str, Any] = data.get("sinks", {})
    secrets: dict[str, str] = {}
    new_sinks: dict[str, Any] = {}
    for sink, url in sinks.items():
        clean, found = without_secrets(url, f"{name}_{sink}".upper(), f"--sink {sink}")
        secrets |= found
        new_sinks[sink] = {**old_sinks.get(sink, {}), "url": clean}
    new_tables: dict[str, Any] = {}
    for table in tables:
        kept = {key: value for key, value in old_tables.get(table, {}).get("sinks", {}).items() if key in sinks}
        new_tables[table] = {"sinks": kept} if kept else {}
    data |= {"name": name, "source": {**old_source, **source}, "tables": new_tables, "sinks": new_sinks}
    if connector:
        data["connector"] = dict(connector)
    if kafka:
        old_kafka: dict[str, Any] = data.get("kafka", {})
        registry: dict[str, Any] = {**old_kafka.get("registry", {}), **kafka.get("registry", {})}
        data |= {"transport": "kafka", "kafka": {**old_kafka, **kafka, "registry": registry}}
    return Draft(spec_from(data, f"Pipeline {name}"), secrets)


def _literal(text: str, what: str) -> str:
    if has_reference(text):
        raise UsageError(f"{what}: a secret is either spelt out or a reference such as ${{env:NAME}}, not both.")
    return unquote(text)


def _mask(url: str) -> tuple[str, list[str]]:
    # A path in ${file:/path} would end the URL's authority, so references stand aside while it is taken apart.
    references: list[str] = _REFERENCE.findall(url)
    numbers = iter(range(len(references)))
    return _REFERENCE.sub(lambda _: f"\x7f{next(numbers)}\x7f", url), references


def _unmask(text: str, references: Sequence[str]) -> str:
    return re.sub("\x7f(\\d+)\x7f", lambda match: references[int(match[1])], text)


# ── processor.py ─────────────────────────────────────────────────────────────────────────────────────────────────


def processor_source(name: str, tables: Sequence[Table], sinks: Sequence[str]) -> str:
    """Return a `processor.py` that writes every column of every table to every sink: a start to edit."""
    variable, functions = _names(name, tables)
    head = [
        f'"""What pipeline {name} writes: one row of the source in, one document out."""',
        "",
        "from delta_sync import Document, Pipeline, Row",
        "",
        f"{variable} = Pipeline({_text(name)})",
        "",
        "",
        "# A function is called with every row that is inserted, updated or loaded; deletes",
        "# need no code. It must depend on the row alone: the same row, the same document.",
        "# What comes from other services is asked for in batches: see Pipeline.lookup.",
    ]
    body = [function_source(variable, functions[table.id], table, sinks) for table in tables]
    return "\n".join(head) + "\n" + "\n\n\n".join(body) + "\n"


def function_source(variable: str, function: str, table: Table, sinks: Sequence[str]) -> str:
    """Return the function for one table, as `processor.py` has it, without a newline at its end."""
    to = ", ".join(_text(sink) for sink in sinks)
    decorator = f"@{variable}.table({_text(table.id)}, to=[{to}])"
    if len(decorator) > LINE_LENGTH:
        decorator = f"@{variable}.table(\n    {_text(table.id)},\n    to=[{to}],\n)"
    lines = [
        decorator,
        f"def {function}(row: Row) -> Document | None:",
        "    # None leaves a row out of the sinks, as if it were deleted:",
        "    #     if row[…] …: return None",
        *(["    return dict(row)"] if not table.columns else _fields(table)),
    ]
    return "\n".join(lines)


def _fields(table: Table) -> list[str]:
    return [
        "    return {",
        *(f"        {_text(column.name)}: row[{_text(column.name)}],  # {_type(column)}" for column in table.columns),
        "    }",
    ]


def names_in_processor(name: str, tables: Sequence[Table]) -> tuple[str, dict[str, str]]:
    """Return what `processor_source` calls the pipeline, and each table's function by the table's id."""
    return _names(name, tables)


def _names(name: str, tables: Sequence[Table]) -> tuple[str, dict[str, str]]:
    functions: dict[str, str] = {}
    taken = {"Document", "Pipeline", "Row"}
    for table in tables:
        candidates = [_identifier(table.name), _identifier(f"{table.schema}_{table.name}")]
        candidates += [f"{candidates[1]}_{number}" for number in range(2, len(tables) + 2)]
        functions[table.id] = next(candidate for candidate in candidates if candidate not in taken)
        taken.add(functions[table.id])
    variables = [_identifier(name), "pipeline", *(f"pipeline_{number}" for number in range(2, len(tables) + 3))]
    return next(variable for variable in variables if variable not in taken), functions


def _identifier(text: str) -> str:
    plain = re.sub(r"\W+", "_", text.lower()).strip("_") or "table"
    plain = plain if plain[0].isalpha() else f"table_{plain}"
    # `row` is the function's argument, and a function called `list` would hide the built-in one.
    reserved = keyword.iskeyword(plain) or keyword.issoftkeyword(plain) or hasattr(builtins, plain) or plain == "row"
    return f"{plain}_" if reserved else plain


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # JSON's strings are Python's, in the quotes that formatters choose


def _type(column: Column) -> str:
    kind = column.kind.value
    for _ in range(column.dimensions):
        kind = f"list[{kind}]"
    if column.nullable and "None" not in kind.rpartition("]")[2]:
        kind += " | None"
    # A type of the source may be called anything, line breaks included.
    return f"{kind}, {' '.join(column.type.split())}"
