"""Documents of several tables, without a source: what belongs together, which change leads where, and when."""

from __future__ import annotations

import itertools
import random
import threading
from typing import Any, NamedTuple

import pytest

from delta_sync import Pipeline, many, one
from delta_sync.building import Debounce, DocumentBuilder
from delta_sync.changes import Change
from delta_sync.decoding import Event, Stretch, Touched, Watching, decode
from delta_sync.documents import (
    DocumentSpec,
    ForeignKey,
    Hop,
    PartSpec,
    Watch,
    fingerprint,
    resolved,
    searches,
    watches,
    without_index,
)
from delta_sync.errors import ProcessorError, UsageError
from delta_sync.masking import Mask
from delta_sync.pipeline import TableProcessor
from delta_sync.processing import process
from delta_sync.sources.mysql.claims import Snapshot as BinlogSnapshot
from delta_sync.sources.postgresql.codec import table_codec
from delta_sync.tables import Column, Kind, Table
from delta_sync.versions import version_of


def table(name: str, *columns: str, key: tuple[str, ...] = ("id",), full: bool = False) -> Table:
    """Columns are integers; one with a question mark may be NULL."""
    made = tuple(Column(c.rstrip("?"), "integer", Kind.INTEGER, nullable=c.endswith("?")) for c in ("id", *columns))
    if "id" not in key:
        made = made[1:]
    return Table("public", name, made, key, full_images=full)


TABLES = {
    one_table.id: one_table
    for one_table in (
        table("movie", "studio_id?"),
        table("studio", "owner_id?"),
        table("review", "movie_id", "author_id?", full=True),
        table("person"),
        table("genre"),
        table("movie_genre", "movie_id", "genre_id", key=("movie_id", "genre_id")),
        table("detail", "movie_id", full=True),
    )
}
KEYS = [
    ForeignKey("public.movie", ("studio_id",), "public.studio", ("id",)),
    ForeignKey("public.studio", ("owner_id",), "public.person", ("id",)),
    ForeignKey("public.review", ("movie_id",), "public.movie", ("id",)),
    ForeignKey("public.review", ("author_id",), "public.person", ("id",)),
    ForeignKey("public.movie_genre", ("movie_id",), "public.movie", ("id",)),
    ForeignKey("public.movie_genre", ("genre_id",), "public.genre", ("id",)),
    ForeignKey("public.detail", ("movie_id",), "public.movie", ("id",)),
]


def document(**parts: PartSpec) -> Table:
    return resolved(DocumentSpec("public.movie", parts), TABLES, KEYS)


def ways(root: Table) -> list[tuple[str, tuple[str, ...], list[tuple[str, tuple[str, ...], tuple[str, ...]]]]]:
    return [
        (watch.table.name, watch.columns, [(hop.table.name, hop.where, hop.take) for hop in watch.hops])
        for watch in watches(root)
    ]


def test_a_look_up_without_an_index_is_named_once_with_what_to_type() -> None:
    root = document(
        studio=one("public.studio"),
        reviews=many("public.review", parts={"author": one("public.person")}),
        genres=many("public.genre", through="public.movie_genre"),
    )
    wanted = {  # to read parts, and to find the documents that a change of a part is about
        "public.studio": {"id"},
        "public.movie": {"studio_id"},
        "public.review": {"movie_id", "author_id"},
        "public.person": {"id"},
        "public.movie_genre": {"movie_id", "genre_id"},
        "public.genre": {"id"},
    }
    assert {(table.id, columns) for table, columns in searches(root)} == {
        (name, (column,)) for name, columns in wanted.items() for column in columns
    }
    assert without_index(root, wanted) == []
    (problem,) = without_index(root, {**wanted, "public.review": {"id", "author_id"}})
    assert not problem.fatal
    assert problem.where == "document public.movie"
    assert "no index of public.review begins with movie_id" in problem.what
    assert problem.fix == "type: CREATE INDEX ON public.review (movie_id)"


def test_of_a_query_only_the_way_back_is_looked_at() -> None:
    root = resolved(
        DocumentSpec("public.movie", {"reviews": many("public.review")}, "SELECT id FROM movie WHERE id = ANY(%(id)s)"),
        TABLES,
        KEYS,
    )
    assert searches(root) == []  # a review has its movie's key


def test_each_kind_of_part_belongs_by_its_foreign_key_and_leads_back_by_it() -> None:
    root = document(
        studio=one("public.studio", parts={"owner": one("public.person")}),
        reviews=many("public.review", order_by="author_id", parts={"author": one("public.person")}),
        genres=many("public.genre", through="public.movie_genre"),
        detail=one("public.detail"),
    )
    studio, reviews, genres, detail = root.parts
    assert (studio.columns, studio.of, studio.many) == (("id",), ("studio_id",), False)
    assert (reviews.columns, reviews.of, reviews.many) == (("movie_id",), ("id",), True)
    assert reviews.order_by == ("author_id", "id")
    assert genres.through is not None
    assert (genres.columns, genres.of) == (("id",), ("id",))
    assert (genres.through.columns, genres.through.to) == (("movie_id",), ("genre_id",))
    assert (detail.columns, detail.of, detail.many) == (("movie_id",), ("id",), False)
    to_movie = ("movie", ("studio_id",), ("id",))
    over_link = ("movie_genre", ("genre_id",), ("movie_id",))
    assert ways(root) == [
        ("movie", ("id",), []),
        ("studio", ("id",), [to_movie]),
        ("person", ("id",), [("studio", ("owner_id",), ("id",)), to_movie]),
        ("review", ("movie_id",), []),
        ("person", ("id",), [("review", ("author_id",), ("movie_id",))]),
        ("movie_genre", ("movie_id",), []),
        ("genre", ("id",), [over_link]),
        ("detail", ("movie_id",), []),
    ]


def test_columns_that_are_given_need_no_foreign_key() -> None:
    root = document(twins=many("public.detail", on={"movie_id": "studio_id"}))
    assert (root.parts[0].columns, root.parts[0].of) == (("movie_id",), ("studio_id",))
    assert ways(root)[1] == ("detail", ("movie_id",), [("movie", ("studio_id",), ("id",))])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"people": many("public.person")},
            r"part people: there is no foreign key from public.person to public.movie;",
        ),
        ({"people": one("public.person")}, "or back; say which columns are equal, with on="),
        ({"id": one("public.studio")}, "has a column of that name"),
        ({"r": many("public.review", order_by="stars")}, "order_by names stars, and public.review has no such column"),
        ({"r": many("public.review", on={"film": "id"})}, "`on` names film, and public.review has no such column"),
        ({"r": many("public.review", on={"movie_id": "film"})}, "`on` names film, and public.movie has no such column"),
        ({"g": many("public.genre", through="public.review")}, "no foreign key from public.review to public.genre"),
    ],
)
def test_parts_that_do_not_belong_are_refused(parts: dict[str, PartSpec], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        document(**parts)


def test_two_foreign_keys_between_two_tables_need_a_choice() -> None:
    keys = [*KEYS, ForeignKey("public.review", ("id",), "public.movie", ("id",))]
    with pytest.raises(UsageError, match=r"in 2 ways \(movie_id = id; id = id\); say which, with on="):
        resolved(DocumentSpec("public.movie", {"reviews": many("public.review")}), TABLES, keys)


def test_columns_that_lead_to_documents_must_be_in_the_log_and_in_the_clear() -> None:
    review = TABLES["public.review"]
    spec = DocumentSpec("public.movie", {"reviews": many("public.review")})
    with pytest.raises(UsageError, match=r"it lacks the old movie_id\. Type: ALTER TABLE public\.review REPLICA"):
        resolved(spec, {**TABLES, review.id: review._replace(full_images=False)}, KEYS)
    by_index = review._replace(full_images=False, key=("movie_id", "id"))
    assert resolved(spec, {**TABLES, review.id: by_index}, KEYS).parts
    masked = tuple(column._replace(mask=Mask("redact", "x")) for column in review.columns)
    with pytest.raises(UsageError, match=r"public\.review\.movie_id is masked"):
        resolved(spec, {**TABLES, review.id: review._replace(columns=masked)}, KEYS)
    generated = tuple(column._replace(in_log=column.name != "movie_id") for column in review.columns)
    with pytest.raises(UsageError, match="which the log does not carry"):
        resolved(spec, {**TABLES, review.id: review._replace(columns=generated)}, KEYS)


def test_a_fingerprint_changes_with_each_part_and_not_with_the_order_of_tables() -> None:
    columns = dict.fromkeys(TABLES, "a")
    plain, with_reviews = TABLES["public.movie"], document(reviews=many("public.review"))
    assert fingerprint(plain, columns) == "a"
    before = fingerprint(with_reviews, columns)
    assert before == fingerprint(with_reviews, dict(reversed(columns.items())))
    assert before == fingerprint(with_reviews, {**columns, "public.person": "b"})
    others = [
        fingerprint(with_reviews, {**columns, "public.review": "b"}),
        fingerprint(document(reviews=many("public.review", order_by="author_id")), columns),
        fingerprint(document(comments=many("public.review")), columns),
        fingerprint(with_reviews._replace(query="SELECT 1"), columns),
    ]
    assert len({before, *others}) == 5


# ── declarations ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_document_is_a_table_s_processor_with_parts() -> None:
    movies = Pipeline("movies")

    @movies.document("public.movie", parts={"reviews": many("public.review")}, to=["search"], debounce="1s")
    def movie(row: dict[str, Any]) -> dict[str, Any]:
        return row

    assert movies.tables["public.movie"].to == ("search",)
    assert movies.documents["public.movie"].debounce_s == 1
    assert movies.documents["public.movie"].tables == ("public.movie", "public.review")
    assert movies.affected(["public.review"]) == movies.affected(["public.movie"]) == ["public.movie"]
    assert movies.affected(["public.other"]) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "a document has parts, or a query"),
        ({"parts": {"reviews": "public.review"}}, r'takes one\("schema.name"\) or many'),
        ({"parts": {"reviews": many("public.review", most=0)}}, "most must be above 0"),
        ({"parts": {"reviews": many("public.review", to={"a": "b"})}}, "`to` is of the table that is named by"),
        ({"parts": {"reviews": many("public.review")}, "to": ["search.1"]}, r"declare its function with @….table"),
        ({"parts": {"reviews": many("public.review")}, "debounce": "soon"}, "soon"),
        ({"parts": {"reviews": many("public.review")}, "debounce": -1}, "debounce cannot be below 0|-1"),
    ],
)
def test_mistakes_are_found_where_they_are_declared(options: dict[str, Any], words: str) -> None:
    def movie(row: dict[str, Any]) -> dict[str, Any]:
        return row

    with pytest.raises(UsageError, match=words) as caught:
        Pipeline("movies").document("public.movie", **options)(movie)
    assert "test_documents.py line" in str(caught.value)


def test_a_document_that_could_not_be_read_fails_alone() -> None:
    root = document(reviews=many("public.review"))
    changes = [
        Change(root.id, (1,), 5, {"id": 1, "reviews": [{"id": 2}]}),
        Change(root.id, (2,), 5, {"id": 2, "reviews": ProcessorError("It has more than 3 rows in reviews.")}),
    ]
    made = process(root, TableProcessor(root.id, dict, (), {}, shape=lambda row: {"id": row["id"]}), changes, {})
    assert [write.document for write in made.writes] == [{"id": 1, "reviews": [{"id": 2}]}], "a shape keeps the parts"
    assert [(one.change.key, one.stage, one.error) for one in made.failures] == [
        ((2,), "process", "ProcessorError: It has more than 3 rows in reviews.")
    ]


def test_a_query_s_row_is_what_the_function_is_given() -> None:
    root = document(reviews=many("public.review"))._replace(query="SELECT …")
    change = Change(root.id, (1,), 5, {"id": 1, "stars": 4})
    made = process(root, TableProcessor(root.id, dict, (), {}), [change], {})
    assert [write.document for write in made.writes] == [{"id": 1, "stars": 4}], made.failures


def test_a_part_has_no_documents_of_its_own() -> None:
    movies = Pipeline("movies")
    movies.document("public.movie", parts={"reviews": many("public.review")})(lambda row: row)
    movies.check_has_documents("public.movie", "--table")
    with pytest.raises(UsageError, match=r"rows of public\.review are parts of documents of public\.movie; name that"):
        movies.check_has_documents("public.review", "--table")
    with pytest.raises(UsageError, match=r"has no 'public\.other'; it has public\.movie"):
        movies.check_has_documents("public.other", "--table")


def test_tables_are_chosen_by_where_their_documents_go() -> None:
    movies = Pipeline("movies")

    @movies.table("public.movie", to=["cache", "search"])
    def movie(row: dict[str, Any]) -> dict[str, Any]:
        return row

    @movies.table("public.studio", to=["cache"])
    def studio(row: dict[str, Any]) -> dict[str, Any]:
        return row

    del movie, studio
    assert movies.going_to([], []) == ["public.movie", "public.studio"]
    assert movies.going_to(["search.2"], []) == ["public.movie"]
    assert movies.going_to([], ["public.studio", "public.studio"]) == ["public.studio"]
    for sinks, tables in ((["search"], ["public.movie", "public.studio"]), (["lake"], ["public.studio"])):
        with pytest.raises(UsageError, match=r"--sink: no document of public\.studio goes to (search|lake); .* cache"):
            movies.going_to(sinks, tables)
    with pytest.raises(UsageError, match=r"no document of public\.movie goes to lake"):
        movies.going_to(["lake"], [])


# ── what the log says ────────────────────────────────────────────────────────────────────────────────────────────

REVIEWS = Watch(TABLES["public.review"], ("movie_id",), ())
AUTHORS = Watch(TABLES["public.person"], ("id",), (Hop(TABLES["public.review"], ("author_id",), ("movie_id",)),))
ROOT = Watch(TABLES["public.movie"], ("id",), ())


def touched(*events: Event) -> Touched | None:
    watched = {
        watch.table.id: [Watching("public.movie", watch, table_codec(watch.table._replace(key=watch.columns)).key)]
        for watch in (REVIEWS, AUTHORS, ROOT)
    }
    codecs = {name: table_codec(one_table) for name, one_table in TABLES.items()}
    others = codecs.keys() - watched.keys()
    done = decode([Stretch(1, events)], codecs, "beat", None, (), watched, watched.keys())
    assert done.changes.keys() <= others
    assert done.lacking == {}
    return done.touched


def event(name: str, op: str, before: Any = None, after: Any = None, lsn: int = 8, xid: int = 700) -> Event:
    source = {"schema": "public", "table": name, "lsn": lsn, "txId": xid, "ts_ms": 1}
    return {"op": op, "before": before, "after": after, "source": source}


def values(found: Touched | None) -> dict[str, set[tuple[Any, ...]]]:
    assert found is not None
    return {one.watch.table.name: known for one, known in found.by_watch.items()}


def test_both_sides_of_a_moved_row_are_noted_and_every_transaction() -> None:
    found = touched(
        event("review", "u", {"id": 1, "movie_id": 5}, {"id": 1, "movie_id": 6}, 8, 700),
        event("review", "d", {"id": 2, "movie_id": 7}, None, 16, 700),
        event("review", "c", None, {"id": 3, "movie_id": 8}, 24, 701),
        event("person", "u", None, {"id": 4}, 32, 702),
        event("movie", "d", {"id": 9}, None, 40, 703),
        event("genre", "u", None, {"id": 1}, 48, 704),
    )
    assert values(found) == {"review": {(5,), (6,), (7,), (8,)}, "person": {(4,)}, "movie": {(9,)}}
    assert found is not None
    assert found.seen == {xid: version_of(1, lsn) for xid, lsn in ((700, 16), (701, 24), (702, 32), (703, 40))}
    assert (found.emptied, found.blind) == (set(), set())


def test_nothing_is_noted_of_tables_that_are_not_watched() -> None:
    assert touched(event("genre", "u", None, {"id": 1})) is None


def test_an_event_that_hides_what_a_row_was_is_noticed() -> None:
    for blind in (
        event("review", "u", None, {"id": 1, "movie_id": 6}),
        event("review", "d", {"id": 2, "movie_id": None}),
    ):
        found = touched(blind)
        assert found is not None
        assert found.blind == {"public.review"}
    emptied = touched(event("review", "t"))
    assert emptied is not None
    assert emptied.emptied == {"public.review"}


def test_of_changes_without_a_transaction_s_number_the_newest_has_to_be_shown() -> None:
    """Those of MariaDB: places of one log, though not in its order, because partitions are read one after the other."""
    nothing: Any = None
    builder = DocumentBuilder(
        specs={},
        reader=nothing,
        epoch=1,
        tables=dict,
        dumps=nothing,
        load_again=lambda _names, _reason: None,
        progress=nothing,
        stopping=threading.Event(),
    )
    for place in (900, 100):
        found = Touched()
        found.seen[0] = version_of(1, place)
        assert builder.keys(found) == {}
    assert not builder._shows_all(BinlogSnapshot(950, 0.0, shown=500))
    assert builder._shows_all(BinlogSnapshot(950, 0.0, shown=950))
    assert builder._shows_all(BinlogSnapshot(960, 0.0)), "later ones show it, too"


# ── when they are built ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_document_is_built_at_once_and_then_at_most_once_a_while() -> None:
    debounce = Debounce(10)
    assert debounce.split([(1,), (2,)], 100) == ([(1,), (2,)], [])
    assert debounce.split([(1,), (3,)], 104) == ([(3,)], [(1,)])
    assert debounce.split([(1,)], 105) == ([], [(1,)])
    assert debounce.next_time == 110
    assert debounce.ripe(109) == []
    assert debounce.ripe(110) == [(1,)]
    assert debounce.next_time is None
    assert debounce.split([(1,)], 111) == ([], [(1,)])
    assert debounce.split([(2,)], 111) == ([(2,)], [])
    assert debounce.ripe(None) == [(1,)]


class Shown(NamedTuple):
    """A snapshot that shows what came up to a moment."""

    upto: int

    @property
    def horizon(self) -> int:
        return 0

    def shows(self, position: int, xid: int) -> bool:
        return xid <= self.upto


def test_a_document_that_shows_a_change_already_is_not_built_for_it() -> None:
    debounce = Debounce(10)
    assert debounce.split([(1,), (2,)], 100) == ([(1,), (2,)], [])
    debounce.built([(1,)], Shown(5))
    assert debounce.split([(1,), (2,)], 101, lambda snapshot: snapshot.shows(0, 5)) == ([], [(2,)])
    assert debounce.split([(1,)], 102, lambda snapshot: snapshot.shows(0, 6)) == ([], [(1,)])
    assert debounce.split([(1,)], 103, lambda snapshot: snapshot.shows(0, 5)) == ([], [(1,)]), "it waits for another"
    assert sorted(debounce.ripe(110)) == [(1,), (2,)]
    assert debounce.split([(1,)], 111, lambda _: True) == ([], [(1,)]), "it is not known what it shows"


def test_a_million_changes_build_a_document_a_few_times_and_every_change_is_followed_by_a_build() -> None:
    rng = random.Random(1)
    debounce = Debounce(0.2)
    builds: dict[int, list[float]] = {}
    changed: dict[int, float] = {}
    now = 0.0
    for _ in range(50_000):
        now += rng.random() * 1e-4
        key = rng.choice((1, 1, 1, rng.randrange(2, 50)))
        changed[key] = now
        due, later = debounce.split([(key,)], now)
        for built in itertools.chain(due, debounce.ripe(now)):
            builds.setdefault(built[0], []).append(now)
        assert len(due) + len(later) == 1
    for built in debounce.ripe(now + 1):
        builds.setdefault(built[0], []).append(now + 1)
    assert all(builds[key][-1] >= at for key, at in changed.items())
    assert all(b - a >= 0.2 for times in builds.values() for a, b in itertools.pairwise(times))
    assert len(builds[1]) <= now / 0.2 + 2


def test_too_many_that_wait_are_built_at_once() -> None:
    debounce = Debounce(10, most=2)
    keys = [(n,) for n in range(5)]
    assert debounce.split(keys, 1) == (keys, [])
    assert debounce.split(keys, 2) == (keys[2:], keys[:2])
    assert Debounce(0).split(keys, 1) == (keys, [])


def test_what_was_built_is_not_remembered_without_bound() -> None:
    debounce = Debounce(1000, built_most=3)
    for number in range(10):
        assert debounce.split([(number,)], number) == ([(number,)], [])
    assert debounce.split([(0,), (8,)], 10) == ([(0,)], [(8,)])
