"""`deltactl pipeline test`: a pipeline run dry, on rows of the source or on recorded changes."""

from __future__ import annotations

from pathlib import Path

import click

from delta_sync.changes import Change
from delta_sync.dumps import key_from_text
from delta_sync.errors import UsageError
from delta_sync.generations import known_generations
from delta_sync.pipeline import load_processor
from delta_sync.sources import open_reader
from delta_sync.starting import read_tables
from delta_sync.trial import as_json, lines_of, recorded_changes, rows_of_keys, try_changes
from delta_sync.watch import ANSWER_S
from deltactl.app import App, key_texts, name_argument, pass_app, print_json, say, shared_options, warn


@click.command(short_help="Show what would be written, for some rows; write nothing.")
@name_argument
@click.option("--table", help="The table of the keys, as public.movie; needed where there are several.")
@click.option("--keys", help="The rows with these keys, as they are now, with commas between them.")
@click.option(
    "--events",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Changes of a file: Delta events as `deltactl dead show --json` has them, one a line.",
)
@shared_options
@pass_app
def test(app: App, name: str, table: str | None, keys: str | None, events: Path | None) -> None:
    """Show the documents that would be written to each sink, and how they differ from what is there.

    Source, look-ups and sinks are asked, and nothing is written: the pipeline may run meanwhile, or never have run.
    Exit status 1 when a row fails, or a sink could not take its document. A key that is not there is a delete.

    \b
    Examples:
      deltactl pipeline test movies --keys 1,2,3
      deltactl pipeline test movies --table public.movie --keys 17 --json
      deltactl dead show movies 5 --json | jq -c .event > changes; deltactl pipeline test movies --events changes
    """
    spec = app.load(name)
    if (keys is None) == (events is None):
        raise UsageError("Give --keys or --events: the rows of which you want to see the documents.")
    pipeline = load_processor(app.home(name), spec)
    if table is not None:
        pipeline.check_has_documents(table, "--table")
    if keys is not None and table is None and len(pipeline.tables) > 1:
        raise UsageError(f"--keys are of one table: name it with --table. There are {', '.join(pipeline.tables)}.")
    reader = open_reader(spec, f"delta {name} test", ANSWER_S, pipeline.documents)
    try:
        tables = read_tables(spec, reader)
        changes: dict[str, list[Change]]
        if keys is not None:
            chosen = tables[table or next(iter(pipeline.tables))]
            wanted = [key_from_text(chosen, text) for text in key_texts(keys, None)]
            changes = {chosen.id: rows_of_keys(reader, chosen, wanted)}
        else:
            assert events is not None
            changes = recorded_changes(events.read_bytes(), tables, str(events))
            changes = {one: some for one, some in changes.items() if table in (None, one)}
            made_of_several = next((one for one in changes if one in pipeline.documents), None)
            if made_of_several is not None:
                raise UsageError(
                    f"--events: documents of {made_of_several} are made of several tables, and no recorded change has"
                    " all of that; try them as they are now, with --keys."
                )
            for recorded in changes:
                pipeline.check_has_documents(recorded, "--events")
    finally:
        reader.close()
    generations = known_generations(spec, app.home(name))
    tried = try_changes(pipeline, spec, tables, changes, generations, recorded=events is not None)
    if app.json:
        print_json([as_json(one) for one in tried])
    else:
        for one in tried:
            say("\n".join(lines_of(one)))
        if not tried:
            warn("There is no change to try.")
    if any(one.effect in ("failed", "rejected") for one in tried):
        raise click.exceptions.Exit(1)
