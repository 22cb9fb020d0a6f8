"""What the checks of a PostgreSQL source decide, each finding by itself: facts in, problems out."""

from __future__ import annotations

import pytest

from delta_sync.errors import Problem
from delta_sync.sources.postgresql.checks import (
    Facts,
    IndexFacts,
    PublicationFacts,
    SlotFacts,
    TableFacts,
    column_notes,
    problems,
)
from delta_sync.sources.postgresql.connection import Server, explain
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.tables import Column, Kind, Table

MOVIE = TableFacts(
    id="public.movie",
    sql_name="public.movie",
    sql_schema="public",
    kind="r",
    persistence="p",
    replica_identity="d",
    primary_key=("id",),
    identity_index=(),
    unique_indexes=(),
    columns=("id", "title"),
    owned=True,
    schema_usage=True,
    may_select=True,
    row_security=False,
)
SOUND = Facts(
    version=180004,
    version_text="18.4",
    role="delta",
    publication_name="delta_movies",
    database="studio",
    database_name="studio",
    in_recovery=False,
    wal_level="logical",
    superuser=False,
    replication_attribute=True,
    replication_refused=None,
    may_create=True,
    max_slots=10,
    used_slots=0,
    max_senders=10,
    used_senders=0,
    slot_wal_keep_mb=51200,
    sender_timeout_ms=60000,
    idle_slot_timeout_s=0,
    tables=(MOVIE,),
)
SLOT = SlotFacts("pgoutput", "logical", "studio", active=False, active_pid=None, wal_status="reserved")
PUBLICATION = PublicationFacts(
    owned=True,
    all_tables=False,
    insert=True,
    update=True,
    delete=True,
    truncate=True,
    via_root=True,
    tables=frozenset({"public.movie"}),
)


def spec_of(*tables: str) -> PipelineSpec:
    return spec_from(
        {
            "name": "movies",
            "source": {"url": "postgresql://delta@db/studio"},
            "tables": {table: {} for table in tables or ("public.movie",)},
            "sinks": {"cache": {"url": "redis://cache/0"}},
        },
        "test",
    )


def table_problems(**changes: object) -> list[Problem]:
    return problems(SOUND._replace(tables=(MOVIE._replace(**changes),)), spec_of())  # type: ignore[arg-type]  # names of fields


def one(found: list[Problem]) -> Problem:
    assert len(found) == 1, found
    return found[0]


def test_a_sound_source_has_no_problems() -> None:
    assert problems(SOUND, spec_of()) == []
    assert problems(SOUND._replace(slot=SLOT, publication=PUBLICATION), spec_of()) == []


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"wal_level": "replica"}, "wal_level is replica", "ALTER SYSTEM SET wal_level = 'logical'"),
        ({"in_recovery": True}, "standby", "primary's host"),
        (
            {"replication_attribute": False, "replication_refused": "permission denied to start WAL sender"},
            "may not read the log",
            "ALTER ROLE delta REPLICATION",
        ),
        ({"replication_refused": 'no pg_hba.conf entry for host "1.2.3.4"'}, "pg_hba.conf", "add a line"),
        ({"replication_refused": "number of requested … max_wal_senders"}, "WAL senders", "max_wal_senders = 4"),
        ({"replication_refused": "unsupported startup parameter"}, "unsupported startup", "pooler"),
        ({"max_slots": 3, "used_slots": 3}, "all 3 replication slots", "max_replication_slots = 7"),
        ({"slot": SLOT._replace(plugin="test_decoding")}, "plugin test_decoding", "source.slot"),
        ({"slot": SLOT._replace(plugin=None, slot_type="physical")}, "a physical one", "source.slot"),
        ({"slot": SLOT._replace(database="other")}, "belongs to database other", "source.slot"),
        ({"slot": SLOT._replace(active=True, active_pid=7)}, "pid 7", "one reader"),
        ({"may_create": False}, "lacks CREATE on database studio", "CREATE PUBLICATION delta_movies FOR TABLE"),
        ({"tables": (MOVIE._replace(owned=False),)}, "does not own public.movie", "CREATE PUBLICATION"),
        ({"publication": PUBLICATION._replace(truncate=False)}, "does not publish truncate", "SET (publish ="),
        ({"publication": PUBLICATION._replace(restricted=frozenset({"public.movie"}))}, "row filter", "DROP TABLE"),
        (
            {"publication": PUBLICATION._replace(owned=False, tables=frozenset[str]())},
            "lacks public.movie",
            "ALTER PUBLICATION delta_movies ADD TABLE public.movie",
        ),
        (
            {"publication": PUBLICATION._replace(via_root=False), "tables": (MOVIE._replace(kind="p"),)},
            "names of its partitions",
            "publish_via_partition_root = true",
        ),
    ],
)
def test_a_server_that_is_not_ready(changes: dict[str, object], what: str, fix: str) -> None:
    problem = one(problems(SOUND._replace(**changes), spec_of()))  # type: ignore[arg-type]  # names of fields
    assert problem.fatal
    assert what in problem.what
    assert fix in problem.fix


def test_a_slot_that_is_invalidated_is_mended_by_the_next_start_unless_that_is_not_wanted() -> None:
    lost, spec = SOUND._replace(slot=SLOT._replace(wal_status="lost")), spec_of()
    problem = one(problems(lost, spec))
    assert not problem.fatal
    assert "invalidated" in problem.what
    assert "the next start makes a new one" in problem.fix
    stops = spec.model_copy(update={"source": spec.source.model_copy(update={"on_lost_log": "stop"})})
    for refused in (one(problems(lost, stops)), one(problems(lost, spec, fresh=True))):
        assert refused.fatal
        assert "deltactl run movies --new-slot" in refused.fix


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"slot_wal_keep_mb": -1}, "max_slot_wal_keep_size is not set"),
        ({"slot_wal_keep_mb": 64}, "max_slot_wal_keep_size is 64 MB"),
        ({"sender_timeout_ms": 5000}, "wal_sender_timeout is 5000 ms"),
        ({"idle_slot_timeout_s": 3600}, "idle_replication_slot_timeout is 1h"),
    ],
)
def test_a_warning_is_not_fatal(changes: dict[str, object], what: str) -> None:
    problem = one(problems(SOUND._replace(**changes), spec_of()))  # type: ignore[arg-type]  # names of fields
    assert not problem.fatal
    assert what in problem.what


def test_an_old_server_is_told_so_and_nothing_else() -> None:
    old = SOUND._replace(version=130016, version_text="13.16", wal_level="replica", tables=())
    assert "13.16" in one(problems(old, spec_of())).what


def test_what_covers_for_a_right_that_is_lacking() -> None:
    foreign = SOUND._replace(may_create=False, tables=(MOVIE._replace(owned=False),))
    assert problems(foreign, spec_of()) != []
    assert problems(foreign._replace(publication=PUBLICATION._replace(owned=False)), spec_of()) == []
    everything = PUBLICATION._replace(owned=False, all_tables=True, tables=frozenset[str]())
    assert problems(foreign._replace(publication=everything), spec_of()) == []
    lacking = PUBLICATION._replace(tables=frozenset[str]())
    assert problems(SOUND._replace(publication=lacking), spec_of()) == [], "Delta adds the table itself"


def test_a_slot_may_be_active_while_its_pipeline_runs() -> None:
    active = SOUND._replace(slot=SLOT._replace(active=True, active_pid=7))
    assert problems(active, spec_of(), running=True) == []
    assert problems(active, spec_of()) != []


def test_a_slot_that_is_there_before_the_pipeline_is_pointed_out() -> None:
    problem = one(problems(SOUND._replace(slot=SLOT), spec_of(), fresh=True))
    assert not problem.fatal
    assert "another pipeline may be of that name" in problem.what


def test_a_full_server_that_has_our_slot_already() -> None:
    assert problems(SOUND._replace(slot=SLOT, used_slots=10), spec_of()) == []


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"kind": "v"}, "a view", "tables that it is made from"),
        ({"kind": "m"}, "a materialized view", "tables that it is made from"),
        ({"kind": "f"}, "a foreign table", "tables that it is made from"),
        ({"persistence": "u"}, "unlogged", "ALTER TABLE public.movie SET LOGGED"),
        ({"persistence": "t"}, "temporary", "leave it out"),
        ({"replica_identity": "n"}, "NOTHING", "REPLICA IDENTITY DEFAULT"),
        ({"replica_identity": "i"}, "index of its replica identity is gone", "REPLICA IDENTITY DEFAULT"),
        ({"primary_key": ()}, "no primary key", "ADD PRIMARY KEY (id) (or the columns"),
        (
            {"primary_key": (), "unique_indexes": (IndexFacts("movie_slug", ("slug",)),)},
            "no primary key",
            "REPLICA IDENTITY USING INDEX movie_slug",
        ),
        (
            {"primary_key": (), "unique_indexes": (IndexFacts("movie_slug", ("slug",), ("slug",)),)},
            "no primary key",
            "ALTER COLUMN slug SET NOT NULL; ALTER TABLE public.movie REPLICA IDENTITY USING INDEX movie_slug",
        ),
        ({"may_select": False}, "may not read it", "GRANT SELECT ON public.movie TO delta"),
        ({"schema_usage": False}, "may not use schema public", "GRANT USAGE ON SCHEMA public TO delta"),
        ({"row_security": True}, "row level security", "BYPASSRLS"),
        ({"inherited_by": ("movie_old",)}, "(movie_old)", "partitioned table"),
    ],
)
def test_a_table_that_cannot_be_followed(changes: dict[str, object], what: str, fix: str) -> None:
    problem = one(table_problems(**changes))
    assert problem.where == "table public.movie"
    assert problem.fatal
    assert what in problem.what
    assert fix in problem.fix


@pytest.mark.parametrize(
    "changes",
    [
        {"replica_identity": "f"},
        {"replica_identity": "i", "identity_index": ("slug",), "primary_key": ()},
        {"replica_identity": "f", "primary_key": (), "unique_indexes": (IndexFacts("movie_slug", ("slug",)),)},
    ],
)
def test_a_table_with_another_key(changes: dict[str, object]) -> None:
    assert table_problems(**changes) == []


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("public.mvoie", ("public.movie", "public.genre"), "did you mean public.movie?"),
        ("public.Movie", ("public.movie",), "write it as public.movie"),
        ("public.movie", ("film.movie", "film.genre"), "did you mean film.movie?"),
        ("public.zzz", ("public.movie", "public.genre"), "the database has public.movie, public.genre"),
        ("public.zzz", (), "the database has no tables"),
    ],
)
def test_a_table_that_is_not_there(name: str, candidates: tuple[str, ...], expected: str) -> None:
    problem = one(problems(SOUND._replace(tables=(), candidates=candidates), spec_of(name)))
    assert problem.where == f"table {name}"
    assert problem.fix == expected


def test_columns_that_the_log_lacks_are_a_note() -> None:
    columns = (Column("id", "integer", Kind.INTEGER), Column("len", "integer", Kind.INTEGER, in_log=False))
    problem = one(column_notes([Table("public", "movie", columns, ("id",))]))
    assert not problem.fatal
    assert "len (integer)" in problem.what


SERVER = Server("delta", "db", 5432, "studio")


@pytest.mark.parametrize(
    ("message", "what", "passing"),
    [
        ('FATAL:  password authentication failed for user "delta"', "the password of role delta is wrong", False),
        ("fe_sendauth: no password supplied", "none is given", False),
        ('FATAL:  role "delta" does not exist', "there is no role delta", False),
        ('FATAL:  database "studio" does not exist', "there is no database studio", False),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1"', "pg_hba.conf on db", False),
        ("server does not support SSL, but SSL was required", "does not offer TLS", False),
        ("SSL error: certificate verify failed", "certificate cannot be verified", False),
        ("failed to resolve host 'db': [Errno -2] Name or service not known", "there is no host db", True),
        ("server closed the connection unexpectedly", "PostgreSQL is ending or starting there", True),
        ("SSL SYSCALL error: EOF detected", "PostgreSQL is ending or starting there", True),
        ("SSL error: unexpected eof while reading", "PostgreSQL is ending or starting there", True),
        ("connection refused", "nothing listens on db:5432", True),
        ("connection timeout expired", "db:5432 does not answer", True),
        ("FATAL:  the database system is starting up", "starting up", True),
        ("FATAL:  sorry, too many clients already", "no connection left", True),
        ("received invalid response to SSL negotiation: H", "does not speak PostgreSQL", False),
        ("something new\nHINT: none", "cannot connect to db:5432: something new", True),
        ("bad URL x://delta:hunter2@db/studio", "x://delta:***@db/studio", True),
    ],
)
def test_why_a_connection_fails(message: str, what: str, passing: bool) -> None:
    problem, passes = explain(f'connection to server at "db" (10.0.0.2), port 5432 failed: {message}', SERVER)
    if "cannot connect" in what or "***" in what:
        problem, passes = explain(message, SERVER)
    assert what in problem.what
    assert passes is passing
    assert "hunter2" not in str(problem)
