"""`deltactl pipeline delete`: drop what a pipeline has made, after saying what that is."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import click
import psycopg
from psycopg import sql

from delta_debezium.mysql import SCHEMA_HISTORY_FILE
from delta_debezium.render import OFFSETS_FILE
from delta_sync.errors import CheckFailed, PipelineRunning, Problem, SinkRefused, SourceBusy, Transient, UsageError
from delta_sync.generations import GenerationStore, open_generations
from delta_sync.sinks import AnySink, targets_of
from delta_sync.sinks.base import Target
from delta_sync.sources import open_inspector
from delta_sync.sources.postgresql.connection import connect
from delta_sync.spec import PipelineSpec
from delta_sync.state import StateStore
from delta_sync.used_keys import UsedKeyStore
from deltactl.app import (
    App,
    confirm,
    dry_run_option,
    name_argument,
    pass_app,
    print_json,
    print_table,
    say,
    shared_options,
    yes_option,
)
from deltactl.checking import need_kafka_packages


@click.command(short_help="Delete what a pipeline has made.")
@name_argument
@click.option("--documents", is_flag=True, help="Delete its documents in the sinks, too.")
@click.option("--files", is_flag=True, help="Delete its folder, too, processor.py included.")
@click.option("--keep-source", is_flag=True, help="Leave slot and publication, as when the source is gone for good.")
@dry_run_option
@yes_option
@shared_options
@pass_app
def delete(app: App, name: str, documents: bool, files: bool, keep_source: bool, dry_run: bool, yes: bool) -> None:
    """Delete what a pipeline has made: its slot and publication in the source, its topics in Kafka, and its state.

    Its documents stay in the sinks without --documents, its files without --files. A publication that pipeline.yaml
    names stays: somebody else made it. The pipeline must not be running.

    Source, sinks and Kafka must answer before anything is deleted. If it ends half-way all the same, type it again: it
    deletes what is left. A run instead of that loads every table whose documents may be gone.

    \b
    Example:
      deltactl pipeline delete movies --dry-run
    """
    spec = app.load(name)
    if spec.kafka is not None:
        need_kafka_packages()
    folder = app.home(name)
    if app.is_running(name):
        raise PipelineRunning(f"Pipeline {name} is running; stop it first (Ctrl-C where it runs).")
    with contextlib.nullcontext() if dry_run else app.stopped(name):
        has_slot = spec.source.kind == "postgresql"  # in other sources nothing was made
        connection = _connect_for_delete(spec) if has_slot and not keep_source else None
        try:
            store = StateStore.open(spec.state, folder, create=False)
            targets = _targets_for_delete(spec, store, keep_source=keep_source) if documents else []
            slot, publication = (None, None) if connection is None else _source_objects(connection, spec)
            topics = _topics_of(spec)
            doomed = {
                "documents": [f"{sink.name}: {target.place}" for sink, some in targets for target in some],
                "slot": slot,
                "publication": publication,
                "topics": topics,
                "state": None if store is None else spec.state,
                "files": str(folder) if files else None,
            }
            if not app.json:
                print_table(
                    ["TO DELETE", ""],
                    [
                        *(["documents", place] for place in doomed["documents"] or ()),
                        *([["replication slot", slot or "-"], ["publication", publication or "-"]] if has_slot else []),
                        *(["topic", topic] for topic in topics),
                        ["state", doomed["state"] or "-"],
                        *([["files", folder]] if files else []),
                    ],
                )
            if dry_run:
                if app.json:
                    print_json({"pipeline": name, "deleted": False, **doomed})
                return
            confirm(f"Delete this of pipeline {name}?", yes=yes)
            _refuse_unreachable(targets)
            if documents and store is not None:
                _forget_loads(spec, store)
            dropped = sum(sink.drop(target) for sink, some in targets for target in some)
            if connection is not None:
                _drop_source_objects(connection, slot, publication)
            _delete_topics(spec, topics)
            _forget(spec, folder, store)
        finally:
            if connection is not None:
                connection.close()
        if files:
            shutil.rmtree(folder)
    if app.json:
        print_json({"pipeline": name, "deleted": True, **doomed, "documents_deleted": dropped})
    else:
        count = f" and {dropped} documents" if documents else ""
        say(f"Deleted what pipeline {name} had made{count}.{'' if files else f' Its files are in {folder}.'}")


def _connect_for_delete(spec: PipelineSpec) -> psycopg.Connection:
    hint = "or leave its slot and publication alone with --keep-source"
    try:
        return connect(spec.source, "deltactl")
    except CheckFailed as error:
        raise CheckFailed([problem._replace(fix=f"{problem.fix}, {hint}") for problem in error.problems]) from error
    except SourceBusy as error:
        raise SourceBusy(f"{error}, {hint}") from error


def _targets_for_delete(
    spec: PipelineSpec, store: StateStore | None, *, keep_source: bool
) -> list[tuple[AnySink, list[Target]]]:
    if keep_source:
        raise UsageError("--documents needs the source, which says what the tables' keys are; leave out --keep-source.")
    with open_inspector(spec) as inspector:
        tables = inspector.tables(list(spec.tables))
    rows = {} if store is None else GenerationStore(store, spec.name).all()
    # One that is about to be dropped, too
    rows = {name: row._replace(state="kept") if row.other else row for name, row in rows.items()}
    return targets_of(open_generations(spec, rows).values(), tables.values(), spec)


def _refuse_unreachable(targets: Sequence[tuple[AnySink, Sequence[Target]]]) -> None:
    """Raise CheckFailed, before anything is dropped, unless every sink lets its documents be looked at."""
    found: list[Problem] = []
    for sink, some in targets:
        try:
            for target in some:
                next(iter(sink.scan(target)), None)
        except Transient as error:
            found.append(Problem(f"sink {sink.name}", str(error).removeprefix(f"sink {sink.name}: ").rstrip("."), ""))
        except SinkRefused:  # perhaps only because a first delete has dropped an index
            found += [problem for problem in sink.check(some) if problem.fatal]
    found = [
        problem._replace(fix=problem.fix or "nothing was deleted; mend that, and type it again") for problem in found
    ]
    if found:
        raise CheckFailed(found)


def _forget_loads(spec: PipelineSpec, store: StateStore) -> None:
    """Forget that tables were loaded, before the first document goes.

    If this ends half-way (a sink dies, Ctrl-C, the source refuses to drop the slot), slot and state are still there,
    and a run would go on with a store that is empty. Without loads it loads every table again.
    """
    for table in store.loads(spec.name):
        store.forget_load(spec.name, table)


def _source_objects(connection: psycopg.Connection, spec: PipelineSpec) -> tuple[str | None, str | None]:
    """Return the names of those that exist. A publication that the specification names is somebody else's."""
    slot = connection.execute(
        "SELECT active, active_pid FROM pg_replication_slots WHERE slot_name = %s AND database = current_database()",
        [spec.slot],
    ).fetchone()
    if slot is not None and slot[0]:
        raise CheckFailed(
            [
                Problem(
                    "source",
                    f"slot {spec.slot} is being read by another process (pid {slot[1]} on the server)",
                    "stop it first",
                )
            ]
        )
    publication = (
        spec.source.publication is None
        and connection.execute("SELECT 1 FROM pg_publication WHERE pubname = %s", [spec.publication]).fetchone()
    )
    return (spec.slot if slot else None), (spec.publication if publication else None)


def _drop_source_objects(connection: psycopg.Connection, slot: str | None, publication: str | None) -> None:
    try:
        if slot is not None:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
        if publication is not None:
            connection.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(publication)))
    except psycopg.Error as error:
        said = (error.diag.message_primary or str(error)).strip()
        raise CheckFailed(
            [Problem("source", f"the server refuses: {said}", "give the role what it lacks, or use --keep-source")]
        ) from error


def _topics_of(spec: PipelineSpec) -> list[str]:
    """Return the names of the pipeline's topics that are there."""
    if spec.kafka is None:
        return []
    from delta_sync.kafka.topics import read_cluster, wanted_topics

    return sorted(read_cluster(spec.kafka, [topic.name for topic in wanted_topics(spec)]).topics)


def _delete_topics(spec: PipelineSpec, topics: list[str]) -> None:
    if spec.kafka is not None and topics:
        from delta_sync.kafka.topics import delete_topics

        delete_topics(spec.kafka, topics)


def _forget(spec: PipelineSpec, folder: Path, store: StateStore | None) -> None:
    """Forget the pipeline's state; a state.db that is its own goes as a whole."""
    if store is not None:
        with store:
            store.forget(spec.name)
            UsedKeyStore(store, spec.name).sweep()
    if spec.state == PipelineSpec.model_fields["state"].default:
        for path in folder.glob("state.db*"):
            path.unlink(missing_ok=True)
    for name in (OFFSETS_FILE, SCHEMA_HISTORY_FILE):  # of an embedded connector, where it has files
        (folder / name).unlink(missing_ok=True)
