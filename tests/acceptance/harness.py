"""A shop's database, a pipeline made by the real command, runs of it as processes, and what must hold at the end.

Everything here is seen from outside: files, processes and their exit statuses, log lines, the source's own views, and
the stores. `Stores` alone uses Delta's sinks, to read what they wrote; the contract suite vouches for that.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import decimal
import json
import os
import re
import signal
import subprocess
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import bson
import psutil
import psycopg
import requests
import yaml
from bson.decimal128 import Decimal128
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql
from psycopg.rows import dict_row

from acceptance import forking
from delta_sync.errors import SinkBusy
from delta_sync.sinks import AnySink, installed, open_sinks, target_for
from delta_sync.sinks.base import Stored, Target
from delta_sync.sources.postgresql.catalogue import read_tables
from delta_sync.spec import load_spec
from delta_sync.state import StateStore, TableLoad
from delta_sync.tables import Table
from delta_sync.testing.processes import wait_until
from delta_sync.versions import parse_lsn

CREATE_TIMEOUT_S = 300.0  # a command that takes seconds, on an overloaded machine
PATIENCE_S = 300.0  # far above what a restart of everything takes: no test may depend on speed
STOP_TIMEOUT_S = 300.0  # a drain has 10 s, the capture's end another 10
LIFE = 1_000_000  # `rev` begins at a multiple of it with each insert, above all that the key had before

Key = tuple[Any, ...]
Row = dict[str, Any]


class Actor(threading.Thread):
    """Acts in the background until it is stopped; `stop` raises what went wrong. `with` starts and stops it."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def act(self) -> None:
        """Do it, until `stopping` is set."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            self.act()
        except BaseException as error:  # noqa: BLE001 -- `stop` raises it
            self.failure = error

    def stop(self) -> None:
        self.stopping.set()
        self.join()
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


# ── the source ───────────────────────────────────────────────────────────────────────────────────────────────────

# `rev` rises with every change of a key, over deletes and inserts, too: see `Shop.next_life`.
SETUP = """
CREATE SEQUENCE life;
CREATE TABLE account (
    id int PRIMARY KEY, rev bigint NOT NULL, name text, balance numeric(12,2), changed timestamptz DEFAULT now());
CREATE TABLE item (
    region text, number int, rev bigint NOT NULL, tags text[], data jsonb, uid uuid DEFAULT gen_random_uuid(),
    PRIMARY KEY (region, number));
CREATE TABLE page (  -- every event of it lacks a value, so its rows are read by key
    id int PRIMARY KEY, rev bigint NOT NULL, title text, body text,
    title_length int GENERATED ALWAYS AS (length(title)) STORED);
CREATE TABLE note (  -- events of it lack a value when an update leaves the body alone
    id int PRIMARY KEY, rev bigint NOT NULL, label text, body text, raw bytea);
ALTER TABLE page ALTER body SET STORAGE EXTERNAL;
ALTER TABLE note ALTER body SET STORAGE EXTERNAL;
"""


class Shape(NamedTuple):
    """A table of the shop: how a key is made from a number, and what a change sets beside `rev` ({0} is a text)."""

    name: str
    key_columns: tuple[str, ...]
    key: Callable[[int], Key]
    columns: tuple[str, ...]
    values: Callable[[str], tuple[Any, ...]]
    updated: str  # the one column that an update sets

    @property
    def where(self) -> str:
        """Return the condition for one key, as parameters."""
        return " AND ".join(f"{column} = %s" for column in self.key_columns)


SHAPES = (
    Shape(
        "account",
        ("id",),
        lambda number: (number,),
        ("name", "balance"),
        lambda text: (text, decimal.Decimal(len(text)) / 4),
        "name",
    ),
    Shape(
        "item",
        ("region", "number"),
        lambda number: (("north", "s:outh %")[number % 2], number),
        ("tags", "data"),
        lambda text: ([text, "x"], json.dumps({"text": text, "deep": [1, {"a": None}]})),
        "tags",
    ),
    Shape("page", ("id",), lambda number: (number,), ("title", "body"), lambda text: (text, text * 900), "title"),
    Shape(
        "note",
        ("id",),
        lambda number: (number,),
        ("label", "body", "raw"),
        lambda text: (text, text * 900, text.encode()),
        "label",
    ),
)


class Source:
    """A database of its own within a server, which may be killed and started again meanwhile."""

    def __init__(self, url: str, schema: str) -> None:
        self.url = url
        self.schema = schema

    def connect(self) -> psycopg.Connection:
        """Connect as a writer does: autocommit, the source's schema."""
        options = f"-c search_path={self.schema} -c deadlock_timeout=50ms -c lock_timeout=10s -c timezone=UTC"
        return psycopg.connect(self.url, autocommit=True, options=options, connect_timeout=5)

    def execute(self, *statements: str) -> None:
        """Execute statements (each may be several), each in a transaction of its own."""
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def rows_of(self, table: Table) -> dict[Key, Row]:
        """Return all rows of a table by key."""
        with self.connect() as connection, connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table.schema, table.name)))
            return {tuple(row[column] for column in table.key): row for row in cursor}

    def insert_lsn(self) -> int:
        """Return the position at which the log ends now."""
        with self.connect() as connection:
            return parse_lsn(_one(connection.execute("SELECT pg_current_wal_insert_lsn()::text"))[0])

    def confirmed_lsn(self, slot: str) -> int:
        """Return what a slot has confirmed; 0 while it, or the server, is not there."""
        try:
            with self.connect() as connection:
                query = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
                row = connection.execute(query, [slot]).fetchone()
        except psycopg.OperationalError:
            return 0
        return parse_lsn(row[0]) if row is not None and row[0] is not None else 0


class Shop(Source):
    """The source of most tests: tables of several shapes, whose rows have a `rev` that tells old from new."""

    def create(self, rows: int) -> None:
        """Create the schema and its tables, each with so many rows."""
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self.schema)))
            connection.execute(SETUP)
            for shape in SHAPES:
                first = [(*shape.key(number), *shape.values(f"first {number} ")) for number in range(rows)]
                values = sql.SQL("nextval('life') * {}").format(LIFE)
                with connection.cursor() as cursor:
                    cursor.executemany(_insertion(shape, values), first)

    def next_life(self, connection: psycopg.Connection, shape: Shape, key: Key) -> int:
        """Return the `rev` with which a key begins, above all that it had. Needs a transaction.

        The lock is held until its end, so that of two who insert the same key, the later one has the higher number.
        """
        connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [f"{shape.name} {key}"])
        (life,) = _one(connection.execute("SELECT nextval('life')"))
        return int(life) * LIFE

    def insert(self, connection: psycopg.Connection, shape: Shape, number: int, text: str) -> None:
        """Insert a row. Needs a transaction."""
        key = shape.key(number)
        rev = sql.Literal(self.next_life(connection, shape, key))
        connection.execute(_insertion(shape, rev), [*key, *shape.values(text)])

    def update(self, connection: psycopg.Connection, shape: Shape, number: int, text: str, *, whole: bool) -> bool:
        """Update a row, all columns or one; return whether it was there."""
        values = dict(zip(shape.columns, shape.values(text), strict=True))
        names = list(shape.columns) if whole else [shape.updated]
        settings = ", ".join(["rev = rev + 1", *(f"{name} = %s" for name in names)])
        statement = f"UPDATE {shape.name} SET {settings} WHERE {shape.where}"
        return bool(_run(connection, statement, [*(values[name] for name in names), *shape.key(number)]).rowcount)

    def change_key(self, connection: psycopg.Connection, shape: Shape, number: int, to: int) -> bool:
        """Give a row another key. Needs a transaction."""
        new = shape.key(to)
        settings = ", ".join(f"{column} = %s" for column in ("rev", *shape.key_columns))
        values = [self.next_life(connection, shape, new), *new, *shape.key(number)]
        return bool(_run(connection, f"UPDATE {shape.name} SET {settings} WHERE {shape.where}", values).rowcount)

    def delete(self, connection: psycopg.Connection, shape: Shape, number: int) -> bool:
        """Delete a row; return whether it was there."""
        return bool(_run(connection, f"DELETE FROM {shape.name} WHERE {shape.where}", [*shape.key(number)]).rowcount)

    def rows(self, shape: Shape) -> dict[Key, Row]:
        """Return all rows by key."""
        with self.connect() as connection, connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(shape.name)))
            return {tuple(row[column] for column in shape.key_columns): row for row in cursor}


def _insertion(shape: Shape, rev: sql.Composable) -> sql.Composed:
    """Return what inserts a row; its parameters are the key and the shape's values."""
    columns = (*shape.key_columns, *shape.columns)
    return sql.SQL("INSERT INTO {} (rev, {}) VALUES ({}, {})").format(
        sql.Identifier(shape.name),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        rev,
        sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
    )


def _one(cursor: psycopg.Cursor[Any]) -> tuple[Any, ...]:
    row = cursor.fetchone()
    assert row is not None
    return tuple(row)


def _run(connection: psycopg.Connection, statement: str, values: Sequence[object]) -> psycopg.Cursor[Any]:
    return connection.execute(statement.encode(), values)


# ── the pipeline and its runs ────────────────────────────────────────────────────────────────────────────────────


class Run:
    """One process of `deltactl`, `run` unless it is said, which dies with this program."""

    def __init__(
        self, arguments: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `deltactl` with these arguments. `environment` is added to this process's."""
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._process = forking.start(arguments, log, folder, {**os.environ, **(environment or {})})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.running

    @property
    def exit_status(self) -> int | None:
        """As in `subprocess`; None while it runs."""
        return self._process.exit_status

    def capture_pid(self) -> int | None:
        """Return the process that runs the Debezium Engine, or None while there is none."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return None
        for child in children:
            try:
                if "delta_debezium.engine_child" in child.cmdline():
                    return child.pid
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return None

    def kill(self) -> None:
        """SIGKILL the worker alone; its capture must then end by itself, and it is an error when it does not."""
        capture = self.capture_pid()
        self._process.terminate(signal.SIGKILL, STOP_TIMEOUT_S)
        if capture is not None:
            wait_until(lambda: not _executes(capture), STOP_TIMEOUT_S, "the end of the capture after its worker's")

    def stop(self) -> int:
        """SIGTERM; return the exit status."""
        capture = self.capture_pid()
        ended = self._process.terminate(signal.SIGTERM, STOP_TIMEOUT_S)
        assert ended, f"SIGTERM did not end the run; {self.tail()}"
        assert capture is None or not _executes(capture), "the capture outlived its worker"
        assert self.exit_status is not None
        return self.exit_status

    def freeze(self) -> None:
        """Stop worker and capture from executing anything."""
        self._process.freeze()

    def thaw(self) -> None:
        self._process.thaw()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return what this run has logged so far (events of that name)."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        found: list[dict[str, Any]] = []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a warning of the interpreter, or the line that is being written
            if isinstance(event, dict) and (name is None or event.get("event") == name):
                found.append(event)  # pyright: ignore[reportUnknownArgumentType] -- JSON
        return found

    def tail(self) -> str:
        """Return the end of the log, for a failure's message."""
        return "its log ends:\n" + self.log.read_text(errors="replace")[-3000:]


def _executes(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Pipeline:
    """A pipeline, by default over the shop's tables, made by `deltactl pipeline create`."""

    def __init__(
        self,
        shop: Source,
        folder: Path,
        sinks: Mapping[str, str],
        name: str,
        tables: Sequence[str] = (),
        sink_options: Mapping[str, Mapping[str, Any]] | None = None,
        create: Sequence[str] = (),
        tables_options: Mapping[str, Mapping[str, Any]] | None = None,
        source: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Create it, over `tables` (without their schema) if there are any given, with further options of `create`.

        `options` are added to `pipeline.yaml`, as a user would do with an editor, `sink_options` to its sinks and
        `tables_options` to its tables. `source` says where it is, in place of the shop's URL.
        """
        self.shop = shop
        self.tables = [f"{shop.schema}.{table}" for table in tables or [shape.name for shape in SHAPES]]
        self.name = name
        self.folder = folder
        self.home = folder / "pipelines" / name
        self.slot = f"delta_{name}"
        self.log = folder / f"{name}.log"
        self.left_out: set[tuple[str, str]] = set()
        self.parts: set[str] = set()  # tables whose rows are parts of other documents only, and so have no load
        password = folder / "password"
        password.write_text("postgres\n")
        user, referred = "postgres:postgres@", f"postgres:${{file:{password}}}@"
        where = source or ["--source", shop.url.replace(user, referred)]
        listed = [argument for table in self.tables for argument in ("--table", table)]
        urls = {sink: url.replace(user, referred) for sink, url in sinks.items()}
        stores = [argument for sink, url in urls.items() for argument in ("--sink", f"{sink}={url}")]
        created = self.deltactl("pipeline", "create", name, *where, *listed, *stores, *create)
        assert created.returncode == 0, created.stderr
        file = self.home / "pipeline.yaml"
        head, _, text = file.read_text().partition("\n")
        written = yaml.safe_load(text)
        for sink, more in (sink_options or {}).items():
            written["sinks"][sink] |= more
        for table, more in (tables_options or {}).items():
            written["tables"][table] |= more
        file.write_text(head + "\n" + yaml.safe_dump(written | options, sort_keys=False))

    def leave_out(self, sink: str, table: str) -> None:
        """Do not write a table (without its schema) to a sink, by an edit of the processor that `create` wrote."""
        id_ = f"{self.shop.schema}.{table}"
        file = self.home / "processor.py"
        edited = re.sub(rf'("{id_}",\s*to=\[.*)"{sink}"(, )?', r"\1", file.read_text())
        assert edited != file.read_text(), f"{file} does not have {id_} for {sink}"
        file.write_text(edited)
        self.left_out.add((sink, id_))

    def write_processor(self, body: str) -> None:
        """Replace `processor.py`: every table's rows go through a function with this body, whose argument is `row`."""
        functions = [
            f"@pipeline.table({table!r})\ndef table_{number}(row):\n    {body}\n"
            for number, table in enumerate(self.tables)
        ]
        head = f"from delta_sync import Pipeline\n\npipeline = Pipeline({self.name!r})\n"
        (self.home / "processor.py").write_text("\n\n".join([head, *functions]))

    def _arguments(self, *arguments: str) -> list[str]:
        return [*arguments, "--dir", str(self.folder / "pipelines")]

    def deltactl(self, *arguments: str, timeout_s: float = CREATE_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return forking.run(self._arguments(*arguments), timeout_s)

    def background(self, *arguments: str) -> Run:
        """Start another command in the background; what it prints is in the log of its name."""
        return Run(self._arguments(*arguments), self.folder / f"{arguments[0]}.log", self.folder)

    def run(self, *options: str) -> Run:
        """Start `deltactl run` in the background."""
        return Run(self._arguments("run", self.name, "--log-format", "json", *options), self.log, self.folder)

    def loads(self) -> dict[str, TableLoad]:
        """Return how far the first load is, by table, as the state store has it."""
        store = StateStore.open(load_spec(self.home).state, self.home, create=False)
        if store is None:
            return {}
        with store:
            return store.loads(self.name)

    def loaded(self) -> bool:
        """Whether every table is loaded."""
        loads = self.loads()
        return loads.keys() == set(self.tables) - self.parts and all(load.state == "done" for load in loads.values())

    def dead_letters(self, *options: str) -> list[dict[str, Any]]:
        """Return the dead letters, as the command shows them."""
        listed = self.deltactl("dead", "list", self.name, "--json", *options)
        assert listed.returncode == 0, listed.stderr
        found = json.loads(listed.stdout)
        letters = found if isinstance(found, list) else found["dead_letters"]
        return list(letters)

    def wait_until_confirmed(self, lsn: int, run: Run) -> None:
        """Wait until everything before a position is confirmed to the source, and every table is loaded."""

        def confirmed() -> bool:
            assert run.running, f"the run ended with status {run.exit_status}; {run.tail()}"
            return self.shop.confirmed_lsn(self.slot) >= lsn and self.loaded()

        wait_until(confirmed, PATIENCE_S, "confirming what was written")


# ── the stores ───────────────────────────────────────────────────────────────────────────────────────────────────


def as_json(value: Any) -> Any:
    """Return what JSON makes of a value of a row, as a document in Redis or a search index has it."""
    match value:
        case decimal.Decimal():
            return float(value)
        case dt.datetime():
            return value.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")
        case uuid.UUID():
            return str(value)
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {name: as_json(part) for name, part in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] -- JSON
        case list():
            return [as_json(part) for part in value]  # pyright: ignore[reportUnknownVariableType] -- any elements
        case _:
            return value


def as_bson(value: Any) -> Any:
    """Return what BSON makes of a value of a row: of these types only two have no exact counterpart."""
    match value:
        case decimal.Decimal():
            return Decimal128(value)
        case dt.datetime():
            return value.replace(microsecond=value.microsecond // 1000 * 1000)
        case _:
            return value


def _plain_bson(value: Any) -> Any:
    """Return a value that came from BSON so that equal ones compare equal."""
    if isinstance(value, bson.Binary):
        return value.as_uuid() if value.subtype == bson.UUID_SUBTYPE else bytes(value)
    return value


class Stores:
    """All sinks of a pipeline, read from outside. Used by one thread."""

    read_at_once = 500  # documents; fewer where they are large

    def __init__(self, pipeline: Pipeline) -> None:
        self._spec = load_spec(pipeline.home)
        self.sinks: dict[str, AnySink] = open_sinks(self._spec)
        self._shop = pipeline.shop
        self._left_out = pipeline.left_out
        with pipeline.shop.connect() as connection:
            self.tables: dict[str, Table] = read_tables(connection, list(self._spec.tables))

    def target(self, sink: str, shape: Shape | str) -> Target:
        """Return where a table's documents are in a sink. A table is given by its shape or its name."""
        name = shape if isinstance(shape, str) else shape.name
        return target_for(self.sinks[sink], self.tables[f"{self._shop.schema}.{name}"], self._spec)

    def document(self, sink: str, table: str, key: Key) -> dict[str, Any] | None:
        """Return a key's document as a sink has it; None when there is none. Raises SinkBusy."""
        (stored,) = self.sinks[sink].read(self.target(sink, table), [key])
        return None if stored is None else stored.document

    def read(self, sink: str, shape: Shape, keys: Sequence[Key]) -> list[Stored | None]:
        """Return what a sink has for these keys. Raises SinkBusy while it does not answer."""
        return self.sinks[sink].read(self.target(sink, shape), keys)

    def shapes(self, sink: str) -> list[Shape]:
        """Return the tables that a sink is to have."""
        return [shape for shape in SHAPES if (sink, f"{self._shop.schema}.{shape.name}") not in self._left_out]

    def revision(self, sink: str, shape: Shape, number: int) -> int | None:
        """Return the `rev` of a key's document; None when there is none, or the sink does not answer."""
        try:
            (stored,) = self.read(sink, shape, [shape.key(number)])
        except SinkBusy:
            return None
        return int(stored.document["rev"]) if stored is not None and stored.document is not None else None

    def differences(self) -> list[str]:
        """Compare every row with its document in every store, and return a line for each that is not as it must be.

        With the tables as they are now; those that are gone are left out.
        """
        with self._shop.connect() as connection:
            now = read_tables(connection, list(self._spec.tables))
        self.tables |= now
        return [
            line
            for sink in self.sinks
            for table in now.values()
            if (sink, table.id) not in self._left_out
            for line in self._differences(sink, table)
        ]

    def _differences(self, sink: str, table: Table) -> Iterator[str]:
        store, target = self.sinks[sink], self.target(sink, table.name)
        rows = self._shop.rows_of(table)
        where = f"{sink} {table.name}"
        ids = {store.id_of(target, key): key for key in rows}
        found = {id_: version for batch in store.scan(target) for id_, version in batch}
        for id_ in found.keys() - ids.keys():
            yield f"{where} {id_}: the source has no such row, the store has version {found[id_]:#x}"
        for id_ in ids.keys() - found.keys():
            yield f"{where} {id_}: missing, row {str(rows[ids[id_]])[:60]}"
        encode, plain = (as_bson, _plain_bson) if store.schemes[0] == "mongodb" else (as_json, lambda value: value)
        keys = list(rows)
        for start in range(0, len(keys), self.read_at_once):
            batch = keys[start : start + self.read_at_once]
            for key, stored in zip(batch, store.read(target, batch), strict=True):
                if stored is None or stored.document is None:
                    continue  # reported above
                document = {name: plain(value) for name, value in stored.document.items()}
                expected = {name: encode(value) for name, value in rows[key].items()}
                if document != expected:
                    wrong = {
                        name: (str(expected.get(name))[:60], str(document.get(name))[:60])
                        for name in expected.keys() | document.keys()
                        if expected.get(name) != document.get(name)
                    }
                    yield f"{where} {key}: version {stored.version:#x}, (source, store) differ in {wrong}"

    def close(self) -> None:
        for sink in self.sinks.values():
            sink.close()


def all_sinks() -> tuple[str, ...]:
    """Return the names that tests give to a sink of each kind that is installed."""
    kinds = {"redis": "cache", "mongodb": "docs", "search": "search"}
    return tuple(name for kind, name in kinds.items() if kind in installed().classes)


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────


class Stage:
    """A pipeline with its source and stores; runs that a test starts here end with it."""

    def __init__(self, pipeline: Pipeline, exits: contextlib.ExitStack) -> None:
        self.pipeline = pipeline
        self.source = pipeline.shop
        self._exits = exits
        self.stores = self.new_stores()

    def run(self, *options: str) -> Run:
        """Start the pipeline."""
        run = self.pipeline.run(*options)
        self._exits.callback(run.kill)
        return run

    def new_stores(self) -> Stores:
        """Return clients of their own, for another thread."""
        stores = Stores(self.pipeline)
        self._exits.callback(stores.close)
        return stores

    def in_step(self, run: Run) -> None:
        """Wait until everything that was written is in the stores, and compare every row."""
        self.pipeline.wait_until_confirmed(self.source.insert_lsn(), run)
        differences = self.stores.differences()
        assert differences[:10] == [], f"{len(differences)} differ; {run.tail()}"


class Scene(Stage):
    """A stage with the shop on it."""

    def __init__(self, shop: Shop, pipeline: Pipeline, exits: contextlib.ExitStack) -> None:
        super().__init__(pipeline, exits)
        self.shop = shop


def metrics(port: int) -> dict[str, float]:
    """Return a process's metrics, summed over sinks, by name and stage; and of how many partitions it tells the lag."""
    found: dict[str, float] = defaultdict(float)
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[" ".join(filter(None, (sample.name, sample.labels.get("stage"))))] += sample.value
            found["partitions"] += sample.name == "delta_partition_lag_records"
    return found
