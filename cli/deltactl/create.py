"""`deltactl pipeline create`: check everything, then write a pipeline's files, all of them or none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from delta_debezium.connection import connection as connection_parts
from delta_debezium.render import connector_json, connector_options
from delta_sync.errors import UsageError
from delta_sync.generations import known_generations
from delta_sync.sinks import installed, kind_of, open_sinks, targets_of
from delta_sync.sources import check_supported, open_inspector
from delta_sync.sources.debezium.limits import LIMITS
from delta_sync.sources.inspection import Inspector
from delta_sync.sources.postgresql.connection import DEFAULT_PORT
from delta_sync.spec import CONNECTOR_FILE, PROCESSOR_FILE, SPEC_FILE, PipelineSpec, dump_spec, spec_from
from delta_sync.tables import Table
from deltactl.app import (
    App,
    confirm,
    describe,
    dir_option,
    dry_run_option,
    json_of,
    pass_app,
    print_json,
    print_limits,
    print_problems,
    say,
    shared_options,
    warn,
    yes_option,
)
from deltactl.checking import (
    Findings,
    check_sinks,
    check_source,
    check_transport,
    environment,
    merge,
    need_kafka_packages,
    resolvable,
)
from deltactl.files import diff, read_all, write_all
from deltactl.generate import (
    function_source,
    names_in_processor,
    processor_source,
    source_from_connector,
    source_from_url,
    spec_from_options,
    split_sinks,
)
from deltactl.schema import SCHEMA_FILE, schema

IGNORE_FILE = ".gitignore"
IGNORED = (
    "# What a running pipeline keeps here is this machine's own.\nstate.db*\nrun.lock\n*.dat\n*.log\n__pycache__/\n"
)
UNKNOWN_SCHEMA = "public"  # of a table that was given without one, until the source is asked
SCHEMA_LINE = f"# yaml-language-server: $schema=../{SCHEMA_FILE}\n"


class _Plan(NamedTuple):
    """What `create` is about to do. `files` have what is to be written, by name; `unwritten` functions are missing."""

    spec: PipelineSpec
    secrets: Mapping[str, str]
    findings: Findings
    files: Mapping[str, str]
    missing_functions: tuple[str, ...] = ()


@click.command()
@click.argument("name")
@click.option(
    "--source",
    "source_url",
    metavar="URL",
    help="postgresql://, mariadb:// or mysql://user@host:port/database",
)
@click.option(
    "--source-connector",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Instead of --source: the options of another of Debezium's connectors, in YAML, JSON or properties.",
)
@click.option(
    "--table",
    "tables",
    required=True,
    multiple=True,
    metavar="T",
    help="schema.table (MariaDB, MySQL: database.table); repeat it for several.",
)
@click.option(
    "--sink", "sinks", required=True, multiple=True, metavar="[NAME=]URL", help="A store; repeat it for several."
)
@click.option("--kafka", "bootstrap", metavar="HOST:PORT,…", help="Use Kafka as the transport, with these brokers.")
@click.option("--registry", metavar="URL", help="The schema registry; goes with --kafka.")
@click.option("--allow-unsafe", is_flag=True, help="Accept topics that lose changes when a broker is lost.")
@click.option("--no-check", is_flag=True, help="Write the files whatever the checks would find.")
@dry_run_option
@yes_option
@shared_options
@pass_app
def create(
    app: App,
    name: str,
    source_url: str | None,
    source_connector: Path | None,
    tables: tuple[str, ...],
    sinks: tuple[str, ...],
    bootstrap: str | None,
    registry: str | None,
    allow_unsafe: bool,
    no_check: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Check the source and the sinks, then write pipelines/NAME.

    A password in a URL is used for the checks and never written: the files refer to an environment variable. With
    --no-check only the tables' columns are read. On a pipeline that exists this shows what would change, and asks; a
    processor.py that was edited stays as it is.

    \b
    Example:
      deltactl pipeline create movies --source postgresql://delta@db/studio \\
          --table public.movie --sink cache=redis://cache/0

    With --kafka and --registry the pipeline runs on Debezium Server, Kafka and any number of workers; its topics are
    made at the end.

    A source that Delta does not know itself is given by its connector's options. Its rows are then read by Debezium,
    and what such a pipeline cannot do is printed.

    \b
    Example:
      deltactl pipeline create orders --source-connector sqlserver.yaml --table shop.dbo.orders \\
          --sink cache=redis://cache/0 --kafka kafka:9092 --registry http://registry:8080/apis/ccompat/v7
    """
    if (source_url is None) == (source_connector is None):
        raise UsageError("Give --source or --source-connector: a URL, or a file with the options of a connector.")
    folder = app.home(name)
    existing = app.load(name) if (folder / SPEC_FILE).exists() else None
    urls = split_sinks(sinks, installed().schemes)
    for sink, url in urls.items():
        kind_of(sink, url)
    for table in tables:
        if not all(table.split(".")):
            raise UsageError(f"--table: {table!r} is no table's name; write it as public.movie.")
    connector: dict[str, str | int | bool] = {}
    secrets: dict[str, str] = {}
    if source_connector is not None:
        source, connector = source_from_connector(source_connector)
        bare = [table for table in tables if "." not in table]
        if bare:
            raise UsageError(f"--table: write {bare[0]} as the connector names it, with its schema.")
    else:
        assert source_url is not None, "one of the two is given"
        source, secrets = source_from_url(source_url, f"{name}_SOURCE".upper())
    # Everything that can be wrong without asking anybody is wrong before anybody is asked.
    placeholder = [table if "." in table else f"{UNKNOWN_SCHEMA}.{table}" for table in tables]
    kafka = _kafka_options(bootstrap, registry, allow_unsafe=allow_unsafe, existing=existing)
    draft = spec_from_options(name, source, placeholder, urls, existing, kafka, connector)
    secrets |= draft.secrets
    check_supported(draft.spec)
    with environment(secrets):
        resolvable(draft.spec)
        open_sinks(draft.spec)
        if draft.spec.source.kind == "debezium":
            connector_options(draft.spec, {})  # its tables are not known before their first record
        if draft.spec.source.kind == "postgresql":
            connection_parts(draft.spec.source, DEFAULT_PORT)  # what the connector cannot be told, whoever answers
        plan = _plan(folder, draft.spec, tables, existing, check=not no_check, running=app.is_running(name))._replace(
            secrets=secrets
        )
    _carry_out(app, folder, plan, dry_run=dry_run, yes=yes)


def _kafka_options(
    bootstrap: str | None, registry: str | None, *, allow_unsafe: bool, existing: PipelineSpec | None
) -> dict[str, Any]:
    """Return what the options say of the Kafka transport; nothing when it is not asked for. Raises UsageError."""
    is_kafka = existing is not None and existing.kafka is not None
    if not is_kafka and bool(bootstrap) != bool(registry):
        raise UsageError("--kafka and --registry go together: brokers, and the registry of what is in their records.")
    if not is_kafka and not bootstrap:
        if allow_unsafe:
            raise UsageError("--allow-unsafe is for topics; it goes with --kafka and --registry.")
        return {}
    options: dict[str, Any] = {"bootstrap_servers": bootstrap} if bootstrap else {}
    options |= {"registry": {"url": registry}} if registry else {}
    return options | ({"allow_unsafe": True} if allow_unsafe else {})


def _plan(
    folder: Path,
    draft: PipelineSpec,
    given: Sequence[str],
    existing: PipelineSpec | None,
    *,
    check: bool,
    running: bool,
) -> _Plan:
    if draft.source.kind == "debezium":
        need_kafka_packages()
    with open_inspector(draft) as inspector:
        spec = _fitting_the_cluster(_with_schemas(inspector, draft, given))
        by_connector = spec.source.kind == "debezium"
        parts: list[Findings] = []
        if check:
            parts.append(check_source(inspector, spec, running=running, fresh=existing is None))
            tables = parts[0].tables
            generations = known_generations(spec, folder) if existing is not None else {}
            parts += [check_sinks(spec, tables.values(), generations), check_transport(spec)]
            merge(parts).refuse_fatal()
        else:
            tables = inspector.tables(list(spec.tables))
            if (not by_connector) and (unknown := [table for table in spec.tables if table not in tables]):
                raise UsageError(f"The source has no table {', '.join(unknown)}.")
        old_tables = {} if existing is None else inspector.tables(list(existing.tables))
    findings = merge(parts)
    targets_of(open_sinks(spec).values(), tables.values(), spec)
    # Of a source that Delta has no client of, columns are not known, or not for long.
    ordered = [_nameless(table) if by_connector else tables[table] for table in spec.tables]
    files = {
        SPEC_FILE: SCHEMA_LINE + dump_spec(spec),
        CONNECTOR_FILE: connector_json(spec, tables),
        IGNORE_FILE: IGNORED,
        f"../{SCHEMA_FILE}": json_of(schema(installed())),
    }
    processor = processor_source(spec.name, ordered, list(spec.sinks))
    present = read_all(folder, [PROCESSOR_FILE]).get(PROCESSOR_FILE)
    if present is None and spec.shapes.keys() == spec.tables.keys():
        return _Plan(spec, {}, findings, files)  # shaping alone makes the documents
    if by_connector and existing is not None:
        old_tables = {name: _nameless(name) for name in existing.tables}
    untouched = existing is not None and present == _generated_for(existing, old_tables)
    if present is None or untouched:
        return _Plan(spec, {}, findings, {**files, PROCESSOR_FILE: processor})
    variable, functions = names_in_processor(spec.name, ordered)
    missing = tuple(
        function_source(variable, functions[table.id], table, list(spec.sinks))
        for table in ordered
        if table.id not in spec.shapes and f'"{table.id}"' not in present and f"'{table.id}'" not in present
    )
    return _Plan(spec, {}, findings, files, missing)


def _fitting_the_cluster(spec: PipelineSpec) -> PipelineSpec:
    """Return the specification with as many copies of each record as there are brokers, where that is accepted."""
    kafka = spec.kafka
    if kafka is None or not kafka.allow_unsafe:
        return spec
    need_kafka_packages()
    from delta_sync.kafka.topics import read_cluster

    brokers = read_cluster(kafka, []).brokers
    copies = min(kafka.replication_factor, brokers)
    data = spec.model_dump(mode="json", exclude_defaults=True)
    data["kafka"] |= {"replication_factor": copies, "min_insync_replicas": min(kafka.min_insync_replicas, copies)}
    return spec_from(data, f"Pipeline {spec.name}")


def _with_schemas(inspector: Inspector, draft: PipelineSpec, given: Sequence[str]) -> PipelineSpec:
    """Return the specification with the schema of each table that was given without one, as SQL would find it."""
    bare = [table for table in given if "." not in table]
    if not bare:
        return draft
    found = inspector.resolve_bare(bare)
    data = draft.model_dump(mode="json", exclude_defaults=True)
    renamed = {f"{UNKNOWN_SCHEMA}.{table}": found.get(table, f"{UNKNOWN_SCHEMA}.{table}") for table in bare}
    data["tables"] = {renamed.get(table, table): options for table, options in data["tables"].items()}
    return spec_from(data, f"Pipeline {draft.name}")


def _nameless(table: str) -> Table:
    schema, _, name = table.rpartition(".")
    return Table(schema, name, (), ())


def _generated_for(spec: PipelineSpec, tables: Mapping[str, Table]) -> str | None:
    if not all(name in tables for name in spec.tables):
        return None  # a table of before is gone: what was generated for it cannot be known any more
    return processor_source(spec.name, [tables[name] for name in spec.tables], list(spec.sinks))


def _carry_out(app: App, folder: Path, plan: _Plan, *, dry_run: bool, yes: bool) -> None:
    name = plan.spec.name
    old = read_all(folder, list(plan.files))
    exists = (folder / SPEC_FILE).exists()
    changes = diff(folder, old, {file: text for file, text in plan.files.items() if not file.startswith("../")})
    # What is written has references in place of secrets, so it is shown as it is: redacting a password such as
    # `postgres` would spoil every other place where that word is meant.
    exports = [variable for variable, value in plan.secrets.items() if os.environ.get(variable) != value]
    limits = LIMITS if plan.spec.source.kind == "debezium" else ()
    result: dict[str, Any] = {
        "pipeline": name,
        "limits": list(limits),
        "folder": str(folder),
        "files": {file: text for file, text in plan.files.items() if not file.startswith("../")},
        "changed": sorted(file for file in plan.files if old.get(file) != plan.files[file]),
        "export": exports,
        "problems": [describe(problem) for problem in plan.findings.problems],
        "next": f"deltactl {'sidecar' if plan.spec.transport == 'kafka' else 'run'} {name}",
    }
    if not app.json:
        print_problems(plan.findings.problems)
        print_limits(limits)
    if dry_run:
        if app.json:
            print_json({**result, "written": False}, has_secrets=False)
        elif exists:
            say(changes or "Nothing would change.", has_secrets=False)
        else:
            for file, text in result["files"].items():
                say(f"── {folder / file}\n{text}", has_secrets=False)
        return
    if exists and changes:
        if not app.json:
            warn(changes, has_secrets=False)
        confirm(f"Change pipeline {name}?", yes=yes)
    write_all(folder, plan.files)
    result["topics"] = _create_topics(plan.spec)
    if app.json:
        print_json({**result, "written": True}, has_secrets=False)
        return
    if not exists:
        say(f"Wrote {folder}: {', '.join(file for file in plan.files if not file.startswith('../'))}.")
    else:
        say(f"Changed {folder}." if changes else f"{folder} is as it should be; nothing changed.")
    if result["topics"]:
        say(f"Made the topics {', '.join(result['topics'])}.")
    _advise(app, plan, exports)


def _create_topics(spec: PipelineSpec) -> list[str]:
    """Create the topics that are missing, and return their names."""
    if spec.kafka is None:
        return []
    from delta_sync.kafka.topics import create_topics, wanted_topics

    return create_topics(spec.kafka, wanted_topics(spec))


def _advise(app: App, plan: _Plan, exports: Sequence[str]) -> None:
    name = plan.spec.name
    if plan.missing_functions:
        warn(f"{PROCESSOR_FILE} is yours and stays as it is; it needs a function for each new table:\n")
        warn("\n\n\n".join(plan.missing_functions) + "\n")
    for variable in exports:
        say(f"No file holds the secret that you gave. Before you run it, type: export {variable}='…'")
    if app.is_running(name):
        say(f"Pipeline {name} is running; it takes the changes up when you start it again.")
    folder = dir_option(app)
    if plan.spec.transport == "kafka":
        say(f"Next: deltactl sidecar {name}{folder}, and deltactl worker {name}{folder}: two or more of each")
    else:
        say(f"Next: deltactl run {name}{folder}")
