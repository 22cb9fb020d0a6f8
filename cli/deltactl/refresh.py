"""`deltactl refresh`: what a look-up returned has changed, and the documents that used it follow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from delta_sync.changes import Key
from delta_sync.dumps import Dump
from delta_sync.errors import UsageError
from delta_sync.pipeline import check_columns, load_processor
from delta_sync.refreshing import (
    KEYS_MOST,
    NOTICED_S,
    ROWS_MOST,
    NoticeStore,
    RowFinder,
    asked_by,
    dump_of,
    keys_of,
    wanted_of,
)
from delta_sync.sources import open_reader
from delta_sync.sources.debezium.limits import need_client
from delta_sync.starting import read_tables
from delta_sync.state import StateStore
from delta_sync.state_dumps import DumpStore
from deltactl.app import App, dry_run_option, key_texts, name_argument, pass_app, print_json, say, shared_options, warn
from deltactl.dump import DumpEnded, as_json, follow


@click.command(short_help="Enrich documents again: a look-up's answers have changed.")
@name_argument
@click.option("--lookup", required=True, help="The look-up whose answers have changed.")
@click.option("--keys", help="The keys that it was asked with, with commas between them.")
@click.option(
    "--keys-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The keys in this file, one a line.",
)
@click.option("--wait", is_flag=True, help="Show how far it is until it has ended; exit status 1 unless it is done.")
@dry_run_option
@shared_options
@pass_app
def refresh(
    app: App, name: str, lookup: str, keys: str | None, keys_file: Path | None, wait: bool, dry_run: bool
) -> None:
    """Write the documents anew that were enriched with a look-up's answers for these keys.

    Every process of the pipeline drops these answers from its cache first. Then the rows with these keys are looked for
    in the source, which reads each table that asks this look-up unless the column has an index, or, for a look-up with
    keys="kept", in the state store; and dumped by their keys: nothing newer is overwritten. Where the state store does
    not know the keys of every row yet, the whole table is dumped.

    \b
    Examples:
      deltactl refresh movies --lookup ratings --keys 1,2,3 --wait
      deltactl refresh movies --lookup ratings --keys-file changed.txt --dry-run
    """
    if (keys is None) == (keys_file is None):
        raise UsageError("Give --keys or --keys-file: for which keys the answers have changed.")
    texts = key_texts(keys, keys_file)
    if len(texts) > KEYS_MOST:
        raise UsageError(f"{len(texts):,} keys are more than {KEYS_MOST:,}; give fewer at once, or dump the tables.")
    spec = app.load(name)
    need_client(spec, "`deltactl refresh`")
    pipeline = load_processor(app.home(name), spec)
    asked_by(pipeline, lookup)  # or say now that nobody asks it
    state = StateStore.open(spec.state, app.home(name), create=False)
    if state is None:
        raise UsageError(f"Pipeline {name} never ran; its first run asks for everything anyway.")
    reader = open_reader(spec, f"delta {name} refresh")  # waits as long as it takes: a large table may be read
    with state:
        try:
            tables = read_tables(spec, reader)
            check_columns(pipeline, tables)
            wanted = wanted_of(pipeline, tables, lookup, texts)
            finder = RowFinder(reader, state, pipeline)
            found: Mapping[str, list[Key] | None] = {}
            ids: dict[str, int] = {}
            if dry_run:
                found = finder.find(tables, lookup, wanted)
            else:
                NoticeStore(state, name).add(lookup, keys_of(wanted))
                time.sleep(NOTICED_S)  # until no process answers with what it has cached
                found = finder.find(tables, lookup, wanted)
        finally:
            reader.close()
        dumps = DumpStore(state, name)
        if not dry_run:
            ids = {
                table: dumps.add(dump, some or ())
                for table, some in found.items()
                if (dump := dump_of(lookup, table, some)) is not None
            }
            if ids and spec.transport != "kafka" and not app.is_running(name):
                warn(f"Pipeline {name} is not running; the documents are written when it is.")
        ended = follow(dumps, list(ids.values()), as_json=app.json) if wait and ids else []
    _show(app, lookup, found, ids, ended, dry_run=dry_run)
    bad = [one for one in ended if one.state != "done"]
    if bad:
        raise DumpEnded(f"Dump {bad[0].id} of {bad[0].table} is {bad[0].state}: {bad[0].waits}")


def _show(
    app: App,
    lookup: str,
    found: Mapping[str, list[Key] | None],
    ids: dict[str, int],
    ended: Sequence[Dump],
    *,
    dry_run: bool,
) -> None:
    if app.json:
        shown: dict[str, Any] = {
            "lookup": lookup,
            "refreshed": not dry_run,
            "rows": {table: None if some is None else len(some) for table, some in found.items()},
            "dumps": ids,
        }
        print_json(shown | ({"ended": [as_json(one) for one in ended]} if ended else {}))
        return
    for table, some in found.items():
        if some is None:
            what = f"are enriched again, by dump {ids[table]}" if table in ids else "would be enriched again"
            say(
                f"{table}: all rows {what}, because more than {ROWS_MOST:,} used these keys, or not every row has been"
                " enriched since they are kept."
            )
        elif dry_run:
            say(f"{table}: {len(some):,} rows would be enriched again.")
        elif table in ids:
            say(f"{table}: {len(some):,} rows are enriched again, by dump {ids[table]}.")
        else:
            say(f"{table}: no row has one of these keys.")
