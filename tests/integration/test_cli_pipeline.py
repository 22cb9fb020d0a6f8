"""`deltactl pipeline …` with a real PostgreSQL and a real Redis: what it writes, and what every mistake ends as."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis as redis_client
import yaml
from click.testing import CliRunner, Result
from filelock import FileLock

from delta_sync.changes import Write
from delta_sync.sinks import AnySink, open_sinks, target_for
from delta_sync.sinks.base import Target
from delta_sync.spec import PipelineSpec, load_spec
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.servers import PostgreSQL, Redis
from deltactl.main import main

DATABASE = "cli_pipeline"
PASSWORD = "s3cr3t-PASS"
SETUP = """
CREATE TABLE movie (id int PRIMARY KEY, title text NOT NULL, "Odd name" numeric(10,2));
CREATE TABLE genre (id int PRIMARY KEY, name text);
CREATE TABLE "Mixed" (id int PRIMARY KEY);
CREATE TABLE no_key (id int, title text);
CREATE TABLE no_identity (id int PRIMARY KEY);
ALTER TABLE no_identity REPLICA IDENTITY NOTHING;
CREATE TABLE hidden (id int PRIMARY KEY);
ALTER TABLE hidden ENABLE ROW LEVEL SECURITY;
CREATE TABLE granted (id int PRIMARY KEY);
CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child () INHERITS (parent);
CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE VIEW all_movies AS SELECT * FROM movie;
CREATE SCHEMA film;
CREATE TABLE film.actor (id int PRIMARY KEY);
CREATE PUBLICATION half FOR TABLE movie WITH (publish = 'insert');
CREATE PUBLICATION filtered FOR TABLE movie WHERE (id > 5);
GRANT SELECT ON hidden, granted TO cli_reader, cli_plain;
"""


@pytest.fixture(scope="module")
def database(postgresql: PostgreSQL) -> Iterator[str]:
    """`host:port/database` with the tables above; the roles differ in what they may."""
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {DATABASE}")
        connection.execute(f"CREATE ROLE cli_plain LOGIN PASSWORD '{PASSWORD}'")
        connection.execute(f"CREATE ROLE cli_reader LOGIN REPLICATION PASSWORD '{PASSWORD}'")
        connection.execute(f"CREATE ROLE cli_owner LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
        connection.execute("SELECT pg_create_physical_replication_slot('delta_physical')")
    with psycopg.connect(postgresql.url_of(DATABASE), autocommit=True) as connection:
        connection.execute(SETUP)
    yield f"127.0.0.1:{postgresql.port}/{DATABASE}"
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")
        connection.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")
        connection.execute("DROP ROLE cli_plain, cli_reader, cli_owner")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all pipelines, which is not there yet, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DELTA_PIPELINES", raising=False)
    return tmp_path / "pipelines"


def deltactl(*arguments: str) -> Result:
    """Run it here, and make sure that it neither shows a trace nor a secret."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    assert PASSWORD not in result.output
    return result


def files_below(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def create(database: str, redis_server: Redis) -> Callable[..., Result]:
    """Run `pipeline create movies` with options in place of good ones. `{db}`, `{host}` and `{redis}` are filled in."""
    host, _, _ = database.partition("/")

    def run(
        *extra: str,
        source: str = "postgresql://cli_owner:{pw}@{db}",
        tables: tuple[str, ...] = ("public.movie",),
        sinks: tuple[str, ...] = ("cache={redis}",),
        name: str = "movies",
    ) -> Result:
        def filled(text: str) -> str:
            for mark, value in (("db", database), ("host", host), ("redis", redis_server.url), ("pw", PASSWORD)):
                text = text.replace(f"{{{mark}}}", value)
            return text

        options = ["--source", filled(source)]
        options += [option for table in tables for option in ("--table", table)]
        options += [option for sink in sinks for option in ("--sink", filled(sink))]
        return deltactl("pipeline", "create", name, *options, *map(filled, extra))

    return run


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    # the name
    ("capitals", {"name": "Movies"}, 2, "cannot be a pipeline's name"),
    ("path", {"name": "../movies"}, 2, "cannot be a pipeline's name"),
    ("long name", {"name": "m" * 41}, 2, "40 characters"),
    ("empty name", {"name": ""}, 2, "cannot be a pipeline's name"),
    # the source's URL
    ("no scheme", {"source": "db/studio"}, 2, "has no scheme"),
    ("empty source", {"source": ""}, 2, "has no scheme"),
    ("other database", {"source": "oracle://u@h/db"}, 2, "oracle:// is not a source"),
    ("mariadb without Kafka", {"source": "mariadb://u@h/db"}, 2, "use transport: kafka"),
    ("port no number", {"source": "postgresql://u@h:port/db"}, 2, "port"),
    ("two hosts", {"source": "postgresql://u@a,b/db"}, 2, "several hosts"),
    ("no host", {"source": "postgresql:///db"}, 2, "names no host"),
    ("a reference alone", {"source": "${env:HOME}"}, 2, "has no scheme"),
    ("no user", {"source": "postgresql://127.0.0.1:1/db"}, 2, "names no user"),
    ("unknown parameter", {"source": "postgresql://cli_owner:{pw}@{db}?colour=red"}, 2, "colour"),
    ("unset variable", {"source": "postgresql://u:${env:DELTA_NOT_SET}@{db}"}, 2, "DELTA_NOT_SET is not set"),
    ("unreadable file", {"source": "postgresql://u:${file:/nonexistent/pw}@{db}"}, 2, "/nonexistent/pw"),
    # connecting
    ("wrong password", {"source": "postgresql://cli_owner:not-it@{db}"}, 1, "password of role cli_owner is wrong"),
    ("no password", {"source": "postgresql://cli_owner@{db}"}, 1, "none is given"),
    ("unknown role", {"source": "postgresql://nobody:x@{db}"}, 1, "or there is no such role"),
    ("unknown database", {"source": "postgresql://cli_owner:{pw}@{host}/nope"}, 1, "no database nope"),
    ("unknown host", {"source": "postgresql://u:x@nowhere.invalid/db"}, 1, "no host nowhere.invalid"),
    ("refused", {"source": "postgresql://u:x@127.0.0.1:1/db"}, 1, "nothing listens on 127.0.0.1:1"),
    ("TLS", {"source": "postgresql://cli_owner:{pw}@{db}?sslmode=require"}, 1, "does not offer TLS"),
    ("not PostgreSQL", {"source": "postgresql://u:x@{redishost}/db"}, 1, "source:"),
    # tables
    ("misspelt", {"tables": ("public.mvoie",)}, 1, "did you mean public.movie?"),
    ("misspelt, bare", {"tables": ("mvoie",)}, 1, "did you mean public.movie?"),
    ("case", {"tables": ("public.mixed",)}, 1, "write it as public.Mixed"),
    ("other schema", {"tables": ("actor",)}, 1, "did you mean film.actor?"),
    ("one of two missing", {"tables": ("movie", "nothing_like_it")}, 1, "no such table"),
    ("view", {"tables": ("all_movies",)}, 1, "a view"),
    ("unlogged", {"tables": ("unlogged",)}, 1, "SET LOGGED"),
    ("no key", {"tables": ("no_key",)}, 1, "ALTER TABLE public.no_key ADD PRIMARY KEY"),
    ("identity nothing", {"tables": ("no_identity",)}, 1, "REPLICA IDENTITY DEFAULT"),
    ("inheritance", {"tables": ("parent",)}, 1, "inherit"),
    ("catalogue", {"tables": ("pg_catalog.pg_class",)}, 1, "not in the log"),
    ("empty table", {"tables": ("",)}, 2, "no table's name"),
    ("dots only", {"tables": ("..",)}, 2, "no table's name"),
    # rights
    ("no replication", {"source": "postgresql://cli_plain:{pw}@{db}"}, 1, "ALTER ROLE cli_plain REPLICATION"),
    ("no select", {"source": "postgresql://cli_reader:{pw}@{db}"}, 1, "GRANT SELECT ON public.movie TO cli_reader"),
    (
        "no schema",
        {"source": "postgresql://cli_reader:{pw}@{db}", "tables": ("film.actor",)},
        1,
        "GRANT USAGE ON SCHEMA film TO cli_reader",
    ),
    (
        "row security",
        {"source": "postgresql://cli_reader:{pw}@{db}", "tables": ("hidden",)},
        1,
        "ALTER ROLE cli_reader BYPASSRLS",
    ),
    (
        "no publication",
        {"source": "postgresql://cli_reader:{pw}@{db}", "tables": ("granted",)},
        1,
        "CREATE PUBLICATION delta_movies FOR TABLE public.granted",
    ),
    ("physical slot", {"name": "physical"}, 1, "delta_physical exists already and is a physical one"),
    # sinks
    ("unknown scheme", {"sinks": ("cache=memcached://h",)}, 2, "there are"),
    ("sink without scheme", {"sinks": ("cache=localhost",)}, 2, "has no scheme"),
    ("sink name", {"sinks": ("Cache={redis}",)}, 2, "lower-case"),
    ("two of a name", {"sinks": ("{redis}", "{redis}")}, 2, "Two sinks are called redis"),
    ("one store twice", {"sinks": ("a={redis}", "b={redis}")}, 2, "same store"),
    ("sink refused", {"sinks": ("cache=redis://127.0.0.1:1/0",)}, 1, "sink cache"),
    ("sink unknown host", {"sinks": ("cache=redis://nowhere.invalid/0",)}, 1, "sink cache"),
    ("sink password", {"sinks": ("cache=redis://:{pw}@{redishost}/0",)}, 1, "sink cache"),
    ("sink port", {"sinks": ("cache=redis://h:port/0",)}, 2, "cache"),
    ("sink variable", {"sinks": ("cache=redis://:${env:DELTA_NOT_SET}@h/0",)}, 2, "DELTA_NOT_SET is not set"),
]


@pytest.mark.parametrize(("options", "status", "expected"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_mistake_is_a_sentence_and_leaves_nothing(
    create: Callable[..., Result],
    folder: Path,
    redis_server: Redis,
    options: dict[str, Any],
    status: int,
    expected: str,
) -> None:
    host = redis_server.url.partition("://")[2].partition("/")[0]
    filled = {
        key: tuple(part.replace("{redishost}", host) for part in value)
        if isinstance(value, tuple)
        else value.replace("{redishost}", host)
        for key, value in options.items()
    }
    result = create(**filled)
    assert expected in result.stderr
    assert "defect" not in result.stderr
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert not any(folder.parent.iterdir()), "something was left behind"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pipeline", "create", "movies"], "--table"),
        (["pipeline", "create", "movies", "--table", "a", "--sink", "redis://h"], "--source or --source-connector"),
        (["pipeline", "create"], "NAME"),
        (["pipeline", "create", "movies", "--source"], "--source"),
        (["pipeline", "show", "nope"], "no pipeline nope"),
        (["pipeline", "check", "nope"], "no pipeline nope"),
        (["pipeline", "delete", "nope"], "no pipeline nope"),
        (["status", "nope"], "no pipeline nope"),
        (["dead", "list", "nope"], "no pipeline nope"),
        (["dead", "list", "../nope"], "cannot be a pipeline's name"),
        (["pipelines"], "pipeline"),
        (["completion", "tcsh"], "bash"),
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str], expected: str) -> None:
    result = deltactl(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert not folder.exists()


def test_all_problems_are_reported_at_once(create: Callable[..., Result], folder: Path) -> None:
    result = create(tables=("no_key", "all_movies", "nothing_like_it"), sinks=("cache=redis://127.0.0.1:1/0",))
    for expected in ("ADD PRIMARY KEY", "a view", "no such table", "sink cache"):
        assert expected in result.stderr
    assert not folder.exists()


def test_problems_as_json(create: Callable[..., Result]) -> None:
    result = create("--json", tables=("no_key",))
    found = json.loads(result.stderr)
    assert [problem["where"] for problem in found["problems"] if problem["fatal"]] == ["table public.no_key"]


def test_it_writes_a_pipeline_that_reads_back(create: Callable[..., Result], folder: Path) -> None:
    result = create(tables=("movie", "film.actor", "public.parts"))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "Next: deltactl run movies"
    assert "export MOVIES_SOURCE_PASSWORD=" in result.stdout
    files = files_below(folder)
    assert sorted(files) == [
        "movies/.gitignore",
        "movies/connector.json",
        "movies/pipeline.yaml",
        "movies/processor.py",
        "pipeline.schema.json",
    ]
    assert not any(PASSWORD in text for text in files.values())
    spec = load_spec(folder / "movies")
    assert list(spec.tables) == ["public.movie", "film.actor", "public.parts"]
    assert spec.source.password == "${env:MOVIES_SOURCE_PASSWORD}"
    assert json.loads(files["movies/connector.json"])["config"]["slot.name"] == "delta_movies"
    first = files["movies/pipeline.yaml"].splitlines()[0]
    assert first == "# yaml-language-server: $schema=../pipeline.schema.json"
    assert (folder / "movies").stat().st_mode & 0o777 == 0o755


def test_what_it_writes_passes_the_check(
    create: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create()
    unset = deltactl("pipeline", "check", "movies")
    assert unset.exit_code == 2
    assert "MOVIES_SOURCE_PASSWORD is not set" in unset.stderr
    monkeypatch.setenv("MOVIES_SOURCE_PASSWORD", PASSWORD)
    assert deltactl("pipeline", "check", "movies").exit_code == 0
    (folder / "movies" / "processor.py").write_text("from delta_sync import Pipeline\nmovies = Pipeline('movies')\n")
    wrong = deltactl("pipeline", "check", "movies")
    assert wrong.exit_code == 1
    assert "no function for" in wrong.stderr
    file = folder / "movies" / "pipeline.yaml"
    written = file.read_text()
    for shape, said in (("{mask: {id: redact}}", "id is of the key"), ("{mask: {titel: redact}}", "no column titel")):
        data = yaml.safe_load(written)
        data["tables"]["public.movie"] = {"shape": yaml.safe_load(shape)}
        file.write_text(yaml.safe_dump(data))
        refused = deltactl("pipeline", "check", "movies")
        assert refused.exit_code == 1, refused.output
        assert said in refused.stderr
    file.write_text(written)
    (folder / "movies" / "processor.py").write_text("def broken(:\n")
    assert "line 1" in deltactl("pipeline", "check", "movies").stderr


def test_given_references_are_kept(
    create: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_PASSWORD", PASSWORD)
    result = create(source="postgresql://cli_owner:${env:STUDIO_PASSWORD}@{db}")
    assert result.exit_code == 0, result.output
    assert "export" not in result.stdout
    assert load_spec(folder / "movies").source.password == "${env:STUDIO_PASSWORD}"


def test_a_dry_run_shows_the_files_and_writes_none(create: Callable[..., Result], folder: Path) -> None:
    result = create("--dry-run")
    assert result.exit_code == 0
    assert '"slot.name": "delta_movies"' in result.stdout
    assert "def movie(row: Row)" in result.stdout
    assert not folder.exists()
    assert set(json.loads(create("--dry-run", "--json").stdout)["files"]) >= {"pipeline.yaml", "processor.py"}


def test_again_with_the_same_options_changes_nothing(create: Callable[..., Result], folder: Path) -> None:
    create()
    before = files_below(folder)
    result = create()
    assert result.exit_code == 0
    assert "nothing changed" in result.stdout
    assert files_below(folder) == before


def test_again_with_other_options_shows_a_diff_and_asks(create: Callable[..., Result], folder: Path) -> None:
    create()
    before = files_below(folder)
    refused = create(tables=("movie", "genre"))
    assert refused.exit_code == 1
    assert "+  public.genre: {}" in refused.stderr
    assert "--yes" in refused.stderr
    assert files_below(folder) == before
    assert create("--yes", tables=("movie", "genre")).exit_code == 0
    assert list(load_spec(folder / "movies").tables) == ["public.movie", "public.genre"]
    assert "def genre" in (folder / "movies" / "processor.py").read_text()


def test_a_slot_of_that_name_is_pointed_out_once(create: Callable[..., Result], folder: Path, database: str) -> None:
    create()
    with psycopg.connect(f"postgresql://cli_owner:{PASSWORD}@{database}", autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('delta_movies', 'pgoutput')")
        try:
            again = create("--yes", tables=("movie", "genre"))
            fresh = create("--dry-run", "--dir", str(folder / "elsewhere"))
        finally:
            connection.execute("SELECT pg_drop_replication_slot('delta_movies')")
    assert again.exit_code == 0
    assert "another pipeline" not in again.stderr
    assert fresh.exit_code == 0
    assert "another pipeline" in fresh.stderr


def test_an_edited_processor_is_never_overwritten(create: Callable[..., Result], folder: Path) -> None:
    create()
    path = folder / "movies" / "processor.py"
    edited = path.read_text() + "\n# mine\n"
    path.write_text(edited)
    result = create("--yes", tables=("movie", "genre"))
    assert result.exit_code == 0
    assert path.read_text() == edited
    assert '@movies.table("public.genre", to=["cache"])' in result.stderr, "it shows what to add"
    assert list(load_spec(folder / "movies").tables) == ["public.movie", "public.genre"]


def test_a_processor_that_was_there_first_is_kept(create: Callable[..., Result], folder: Path) -> None:
    (folder / "movies").mkdir(parents=True)
    (folder / "movies" / "processor.py").write_text("# mine\n")
    assert create().exit_code == 0
    assert (folder / "movies" / "processor.py").read_text() == "# mine\n"


def test_what_was_edited_in_the_specification_survives(create: Callable[..., Result], folder: Path) -> None:
    create()
    path = folder / "movies" / "pipeline.yaml"
    path.write_text(path.read_text() + "load:\n  chunk_rows: 77\n")
    assert create("--yes", tables=("movie", "genre")).exit_code == 0
    assert load_spec(folder / "movies").load.chunk_rows == 77


def test_a_folder_that_cannot_be_written_is_a_sentence(create: Callable[..., Result], folder: Path) -> None:
    folder.write_text("a file in the way")
    result = create()
    assert result.exit_code == 1
    assert "pipelines" in result.stderr
    assert "defect" not in result.stderr
    assert folder.read_text() == "a file in the way"


def test_no_check_writes_what_the_checks_would_refuse(create: Callable[..., Result], folder: Path) -> None:
    assert create(sinks=("cache=redis://127.0.0.1:1/0",)).exit_code == 1
    assert create("--no-check", sinks=("cache=redis://127.0.0.1:1/0",)).exit_code == 0
    assert (folder / "movies" / "pipeline.yaml").exists()
    missing = create("--no-check", name="other", tables=("public.nothing_like_it",))
    assert missing.exit_code == 2
    assert not (folder / "other").exists()


def test_checks_of_a_publication_that_somebody_made(
    create: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create()
    monkeypatch.setenv("MOVIES_SOURCE_PASSWORD", PASSWORD)
    path = folder / "movies" / "pipeline.yaml"
    text = path.read_text()
    for publication, expected in (("half", "does not publish update, delete, truncate"), ("filtered", "row filter")):
        path.write_text(text.replace("source:\n", f"source:\n  publication: {publication}\n"))
        result = deltactl("pipeline", "check", "movies")
        assert result.exit_code == 1
        assert expected in result.stderr


def test_list_and_show(create: Callable[..., Result], folder: Path) -> None:
    assert json.loads(deltactl("pipeline", "list", "--json").stdout) == []
    create()
    create(name="others", tables=("genre",))
    (folder / "broken").mkdir()
    (folder / "broken" / "pipeline.yaml").write_text("name: [")
    found = {row["name"]: row for row in json.loads(deltactl("pipeline", "list", "--json").stdout)}
    assert found["movies"]["tables"] == ["public.movie"]
    assert not found["movies"]["running"]
    assert "not YAML" in found["broken"]["error"]
    assert json.loads(deltactl("--json", "pipeline", "show", "movies").stdout)["slot"] == "delta_movies"
    elsewhere = deltactl("pipeline", "list", "--dir", str(folder / "movies"))
    assert elsewhere.exit_code == 0
    assert elsewhere.stdout == ""


def test_a_dry_run_of_the_pipeline_shows_documents_and_writes_nothing(
    create: Callable[..., Result],
    folder: Path,
    database: str,
    redis_server: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create()
    monkeypatch.setenv("MOVIES_SOURCE_PASSWORD", PASSWORD)
    processor = folder / "movies" / "processor.py"
    store = redis_client.Redis.from_url(redis_server.url)
    with psycopg.connect(f"postgresql://cli_owner:{PASSWORD}@{database}", autocommit=True) as connection:
        connection.execute("""INSERT INTO movie VALUES (1, 'Old', 1.50), (2, 'New', 7.10), (3, 'Same', NULL)""")
    try:
        movie = "def movie(row):\n    return {'title': row['title'], 'n': 1 // (row['id'] != 4)}\n"
        head = "from delta_sync import Pipeline\nmovies = Pipeline('movies')\n@movies.table('public.movie')\n"
        processor.write_text(head + movie)
        sink, target = _cache(load_spec(folder / "movies"))
        sink.apply(target, [Write((1,), 5, {"title": "before", "n": 1}), Write((3,), 5, {"title": "Same", "n": 1})])
        sink.apply(target, [Write((9,), 5, {"title": "gone"})])
        before = {key: store.dump(key) for key in store.scan_iter()}

        shown = deltactl("pipeline", "test", "movies", "--keys", "1,2,3,8,9")
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.splitlines() == [
            "public.movie 1 in cache: changed",
            '  - title: "before"',
            '  + title: "Old"',
            "    n: 1",
            "public.movie 2 in cache: created",
            '  + title: "New"',
            "  + n: 1",
            "public.movie 3 in cache: same",
            '    title: "Same"',
            "    n: 1",
            "public.movie 8 in cache: absent",
            "public.movie 9 in cache: removed",
            '  - title: "gone"',
        ]
        event: dict[str, Any] = {
            "table": "public.movie",
            "op": "upsert",
            "version": 4,
            "key": [1],
            "row": {"id": 1, "title": "Older"},
        }
        lines = [event, {**event, "key": [4], "row": {**event["row"], "id": 4}, "version": 9}]
        (tmp_path / "events").write_text("\n".join(json.dumps(line) for line in lines))
        found = deltactl("pipeline", "test", "movies", "--events", str(tmp_path / "events"), "--json")
        assert found.exit_code == 1, "one fails"
        failed, stale = json.loads(found.stdout)
        assert (failed["key"], failed["effect"], failed["sink"]) == ("4", "failed", None)
        assert failed["note"].startswith("at stage process: ZeroDivisionError")
        assert (stale["effect"], stale["fields"], stale["stored"]["title"]) == ("stale", ["title"], "before")
        assert {key: store.dump(key) for key in store.scan_iter()} == before, "something was written"
        for arguments, said in (
            ([], "Give --keys or --events"),
            (["--keys", "x"], "x"),
            (["--keys", "1", "--table", "public.other"], "has no 'public.other'"),
        ):
            refused = deltactl("pipeline", "test", "movies", *arguments)
            assert refused.exit_code == 2
            assert said in refused.stderr
    finally:
        store.flushdb()
        with psycopg.connect(f"postgresql://cli_owner:{PASSWORD}@{database}", autocommit=True) as connection:
            connection.execute("TRUNCATE movie")


def _cache(spec: PipelineSpec) -> tuple[AnySink, Target]:
    table = Table("public", "movie", (Column("id", "integer", Kind.INTEGER),), ("id",))
    sink = open_sinks(spec)["cache"]
    return sink, target_for(sink, table, spec)


def test_delete_drops_what_it_says(
    create: Callable[..., Result], folder: Path, database: str, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    create()
    monkeypatch.setenv("MOVIES_SOURCE_PASSWORD", PASSWORD)
    with psycopg.connect(f"postgresql://cli_owner:{PASSWORD}@{database}", autocommit=True) as connection:
        connection.execute("CREATE PUBLICATION delta_movies FOR TABLE movie")
        connection.execute("SELECT pg_create_logical_replication_slot('delta_movies', 'pgoutput')")

        def there() -> tuple[int, int]:
            row = connection.execute(
                "SELECT (SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'delta_movies'),"
                " (SELECT count(*) FROM pg_publication WHERE pubname = 'delta_movies')"
            ).fetchone()
            assert row is not None
            return row[0], row[1]

        (folder / "movies" / "state.db").touch()
        dry = deltactl("pipeline", "delete", "movies", "--dry-run")
        assert dry.exit_code == 0
        assert dry.stdout.count("delta_movies") == 2
        refused = deltactl("pipeline", "delete", "movies")
        assert refused.exit_code == 1
        assert "--yes" in refused.stderr
        with FileLock(folder / "movies" / "run.lock"):
            running = deltactl("pipeline", "delete", "movies", "--yes")
            assert running.exit_code == 1
            assert "is running" in running.stderr
            assert deltactl("pipeline", "delete", "movies", "--dry-run").exit_code == 1
            assert json.loads(deltactl("pipeline", "list", "--json").stdout)[0]["running"]
        monkeypatch.setenv("MOVIES_SOURCE_PASSWORD", "not-it")
        unreachable = deltactl("pipeline", "delete", "movies", "--yes")
        assert unreachable.exit_code == 1
        assert "--keep-source" in unreachable.stderr
        assert there() == (1, 1)
        assert (folder / "movies" / "state.db").exists()
        monkeypatch.setenv("MOVIES_SOURCE_PASSWORD", PASSWORD)
        assert deltactl("pipeline", "delete", "movies", "--yes").exit_code == 0
        assert there() == (0, 0)
        assert not (folder / "movies" / "state.db").exists()
        assert (folder / "movies" / "processor.py").exists()
        assert deltactl("pipeline", "delete", "movies", "--yes", "--documents", "--files").exit_code == 0
        assert not (folder / "movies").exists()


def test_delete_leaves_a_publication_that_somebody_made(
    create: Callable[..., Result], folder: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create()
    monkeypatch.setenv("MOVIES_SOURCE_PASSWORD", PASSWORD)
    path = folder / "movies" / "pipeline.yaml"
    path.write_text(path.read_text().replace("source:\n", "source:\n  publication: filtered\n"))
    result = deltactl("pipeline", "delete", "movies", "--yes", "--json")
    assert json.loads(result.stdout)["publication"] is None
    with psycopg.connect(f"postgresql://cli_owner:{PASSWORD}@{database}") as connection:
        assert connection.execute("SELECT 1 FROM pg_publication WHERE pubname = 'filtered'").fetchone()


def test_delete_without_the_source(
    create: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create()
    monkeypatch.delenv("MOVIES_SOURCE_PASSWORD", raising=False)
    assert deltactl("pipeline", "delete", "movies", "--yes", "--keep-source", "--files").exit_code == 0
    assert not (folder / "movies").exists()


def test_the_folder_comes_from_the_environment(
    create: Callable[..., Result], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTA_PIPELINES", str(tmp_path / "elsewhere"))
    assert create().exit_code == 0
    assert (tmp_path / "elsewhere" / "movies" / "pipeline.yaml").exists()
    assert not folder.exists()
    assert not [name for name in os.environ if name == "MOVIES_SOURCE_PASSWORD"], "it was set for the checks only"
