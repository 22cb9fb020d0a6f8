"""`deltactl pipeline …`: create, list, show, check, package and delete pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from delta_debezium.render import connector_json
from delta_sync.documents import without_index
from delta_sync.errors import DeltaError, Problem, Transient, UsageError
from delta_sync.generations import known_generations
from delta_sync.pipeline import check_columns, load_processor
from delta_sync.secrets import hidden
from delta_sync.shaping import mask_functions, masked
from delta_sync.sinks import installed
from delta_sync.sources import check_supported, open_inspector, open_reader
from delta_sync.sources.debezium.limits import LIMITS
from delta_sync.spec import CONNECTOR_FILE, PROCESSOR_FILE, SPEC_FILE, PipelineSpec
from delta_sync.tables import Table
from delta_sync.watch import ANSWER_S
from deltactl.app import (
    App,
    DeltaGroup,
    Later,
    describe,
    dir_option,
    json_of,
    name_argument,
    pass_app,
    print_json,
    print_limits,
    print_problems,
    print_table,
    say,
    shared_options,
    warn,
)
from deltactl.checking import Findings, check_history, check_sinks, check_source, check_transport, merge, resolvable
from deltactl.files import read_all
from deltactl.schema import schema


@click.group(
    cls=DeltaGroup,
    later={
        "create": Later("deltactl.create:create", "Check the source and the sinks, then write pipelines/NAME."),
        "delete": Later("deltactl.delete:delete", "Delete what a pipeline has made."),
        "package": Later("deltactl.package:package", "Write what images of a pipeline are built from."),
        "rebuild": Later(
            "deltactl.rebuild:rebuild", "Build a sink anew beside the old one, verify it, and let it take over."
        ),
        "test": Later("deltactl.trial:test", "Show what would be written, for some rows; write nothing."),
    },
)
def pipeline() -> None:
    """Create, look at, try, package, rebuild and delete pipelines."""


@pipeline.command("list")
@shared_options
@pass_app
def list_(app: App) -> None:
    """List the pipelines.

    \b
    Example:
      deltactl pipeline list
    """
    rows: list[dict[str, Any]] = []
    for name in app.names():
        row: dict[str, Any] = {"name": name, "running": app.is_running(name)}
        try:
            spec = app.load(name)
            row |= {"source": spec.source.url, "tables": list(spec.tables), "sinks": list(spec.sinks), "error": None}
        except DeltaError as error:
            row |= {"source": None, "tables": [], "sinks": [], "error": str(error)}
        rows.append(row)
    if app.json:
        print_json(rows)
    elif not rows:
        warn(f"There are no pipelines in {app.folder}; `deltactl pipeline create` writes one.")
    else:
        print_table(
            ["PIPELINE", "RUNNING", "SOURCE", "TABLES", "SINKS"],
            [
                [
                    row["name"],
                    "yes" if row["running"] else "no",
                    row["error"] or row["source"],
                    ", ".join(row["tables"]),
                    ", ".join(row["sinks"]),
                ]
                for row in rows
            ],
        )


@pipeline.command()
@name_argument
@shared_options
@pass_app
def show(app: App, name: str) -> None:
    """Show a pipeline's specification, with all defaults.

    \b
    Example:
      deltactl pipeline show movies
    """
    spec = app.load(name)
    data: dict[str, Any] = hidden(spec.model_dump(mode="json"))
    has_slot = spec.source.kind == "postgresql"
    data |= {"slot": spec.slot, "publication": spec.publication} if has_slot else {}
    kafka: dict[str, Any] = data["kafka"] or {}
    if app.json:
        print_json(data)
        return
    print_table(
        ["WHAT", "VALUE"],
        [
            ["pipeline", name],
            ["folder", app.home(name)],
            ["source", spec.source.url],
            *([["slot", spec.slot], ["publication", spec.publication]] if has_slot else []),
            *(["table", table] for table in spec.tables),
            *([f"sink {sink}", options.url] for sink, options in spec.sinks.items()),
            ["transport", spec.transport],
            ["state", spec.state],
            *([key, data[key]] for key in ("tombstone_ttl", "dead_letter_ttl")),
            *([f"{group}.{key}", value] for group in ("errors", "load") for key, value in data[group].items()),
            *([f"kafka.{key}", value] for key, value in kafka.items() if value is not None),
            *([f"connector.{key}", value] for key, value in data["connector"].items()),
        ],
    )


@pipeline.command(short_help="Check source, tables, sinks and files of a pipeline.")
@name_argument
@shared_options
@pass_app
def check(app: App, name: str) -> None:
    """Check the source, its tables, the sinks and the files of a pipeline. Exit status 1 when something has to change.

    \b
    Example:
      deltactl pipeline check movies
    """
    spec = app.load(name)
    check_supported(spec)
    resolvable(spec)
    with open_inspector(spec) as inspector:
        parts = [check_source(inspector, spec, running=app.is_running(name))]
    transport = check_transport(spec)
    try:
        parts.append(check_history(spec, app.home(name)))
    except Transient:
        if not transport.problems:  # or it has said already, and in better words, why Kafka does not answer
            raise
    parts += [check_sinks(spec, parts[0].tables.values(), known_generations(spec, app.home(name))), transport]
    limits = LIMITS if spec.source.kind == "debezium" else ()
    if limits or all(table in parts[0].tables for table in spec.tables):
        parts.append(_check_files(app.home(name), spec, parts[0].tables))
    findings = merge(parts)
    fatal = any(problem.fatal for problem in findings.problems)
    if app.json:
        print_json(
            {"ok": not fatal, "problems": [describe(problem) for problem in findings.problems], "limits": list(limits)}
        )
    else:
        mentioned = {problem.where for problem in findings.problems}
        for where in findings.looked_at:
            if where not in mentioned:
                say(f"{click.style('✓', fg='green')} {where}")
        print_problems(findings.problems)
        print_limits(limits)
        if not fatal and not app.is_running(name):
            say(f"Next: deltactl {'run' if spec.kafka is None else 'sidecar'} {name}{dir_option(app)}")
    if fatal:
        raise click.exceptions.Exit(1)


def _check_files(folder: Path, spec: PipelineSpec, tables: Mapping[str, Table]) -> Findings:
    found = _check_processor(folder, spec, tables)
    files = read_all(folder, [CONNECTOR_FILE])
    if files.get(CONNECTOR_FILE) != connector_json(spec, tables):
        found.append(
            Problem(
                CONNECTOR_FILE,
                f"it does not say what follows from {SPEC_FILE}",
                "type the `deltactl pipeline create` of it again (the embedded transport does not read it)",
                fatal=False,
            )
        )
    return Findings((PROCESSOR_FILE, CONNECTOR_FILE), {}, tuple(found))


def _check_processor(folder: Path, spec: PipelineSpec, tables: Mapping[str, Table]) -> list[Problem]:
    found: list[Problem] = []
    try:
        pipeline = load_processor(folder, spec)
        check_columns(pipeline, tables)
        if pipeline.documents:
            reader = open_reader(spec, "deltactl", ANSWER_S, pipeline.documents)
            try:
                tables = reader.tables(list(spec.tables))
                first_columns = reader.first_columns(list(spec.tables))
                for root in pipeline.documents:
                    reader.check_query(tables[root])
                    found += without_index(tables[root], first_columns)
            finally:
                reader.close()
    except DeltaError as error:
        found.append(Problem(PROCESSOR_FILE, str(error).rstrip("."), ""))
    for name, shape in spec.shapes.items():
        if name not in tables:
            continue  # no record of it has come yet
        try:
            mask_functions(masked(tables[name], shape))
        except UsageError as error:
            found.append(Problem(SPEC_FILE, str(error).rstrip("."), ""))
    return found


@pipeline.command("schema", short_help="Print the JSON Schema of pipeline.yaml.")
@shared_options
@pass_app
def schema_(app: App) -> None:  # noqa: ARG001 -- the schema is the same for every folder
    """Print the JSON Schema of pipeline.yaml, with the options of every sink that is installed.

    `create` writes it beside the pipelines' folders, where editors find it.

    \b
    Example:
      deltactl pipeline schema > pipelines/pipeline.schema.json
    """
    say(json_of(schema(installed())).rstrip("\n"), has_secrets=False)
