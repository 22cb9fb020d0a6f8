"""Events that start work: each change, in order per key, at least once; what fails is a dead letter."""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from delta_sync.calling import LEFT_MOST, Caller
from delta_sync.changes import Change
from delta_sync.dead_letters import letter_of
from delta_sync.decoding import Decoded, Event, Image, Stretch, TableCodec, decode
from delta_sync.delta_event import decode_event, encode_event
from delta_sync.errors import HandlersBusy, PipelineStopped, Transient, UndecodableChange, UsageError
from delta_sync.events import Handler, HandlerRunner, RowEvent, Unhandled, lane_of
from delta_sync.handlers.topic import Topic
from delta_sync.kafka import settings
from delta_sync.pipeline import Pipeline, with_shapes
from delta_sync.processing import Failure
from delta_sync.replaying import _handle_again
from delta_sync.sources.mysql import codec as mysql_codec
from delta_sync.sources.postgresql import codec as postgresql_codec
from delta_sync.spec import spec_from
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.values import Row
from delta_sync.versions import version_of
from delta_sync.worker import Job

EPOCH = 7
AT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
TABLE = Table(
    "public",
    "movie",
    (
        Column("id", "integer", Kind.INTEGER),
        Column("title", "text", Kind.TEXT),
        Column("year", "integer", Kind.INTEGER),
    ),
    ("id",),
)
PLACEHOLDER = "?"
WAIT_S = 120.0  # far above what anything here takes
TIMEOUT_S = 6.0  # of looks, and no time passes between these


def row(image: Image) -> Row:
    if image["title"] == "!":
        raise UndecodableChange("title: it is no title")
    if image["title"] is not None:
        image["title"] = image["title"].upper()
    return image


CODEC = TableCodec(
    TABLE,
    row,
    lambda image: (image["id"],),
    lambda image: bool(image["title"] == PLACEHOLDER),
    lambda image: [name for name in image if image[name] == PLACEHOLDER],
)


def logged(op: str, lsn: int, after: Image | None, before: Image | None = None) -> Event:
    source = {"schema": "public", "table": "movie", "lsn": lsn, "txId": lsn, "ts_ms": int(AT.timestamp() * 1000)}
    return {"op": op, "before": before, "after": after, "source": source}


def image(title: str | None, year: int | None = 1942, id_: int = 1) -> Image:
    return {"id": id_, "title": title, "year": year}


def decoded(*events: Event, each: bool = True) -> Decoded:
    return decode([Stretch(EPOCH, events)], {TABLE.id: CODEC}, "delta.", None, {TABLE.id} if each else ())


# ── what the log gives ───────────────────────────────────────────────────────────────────────────────────────────────


def test_each_change_is_there_though_documents_take_the_newest_alone() -> None:
    found = decoded(
        logged("c", 1, image("a")),
        logged("u", 2, image("b"), image("a")),
        logged("c", 3, image("z", id_=2)),
        logged("d", 4, None, image("b")),
    )
    assert [(event.op, event.key, event.version) for event in found.each] == [
        ("insert", (1,), version_of(EPOCH, 1)),
        ("update", (1,), version_of(EPOCH, 2)),
        ("insert", (2,), version_of(EPOCH, 3)),
        ("delete", (1,), version_of(EPOCH, 4)),
    ]
    assert [(event.before, event.after) for event in found.each][:2] == [(None, image("A")), (image("A"), image("B"))]
    assert found.each[3].after is None
    assert found.each[0].at == AT
    assert [change.version for change in found.changes[TABLE.id]] == [version_of(EPOCH, 4), version_of(EPOCH, 3)]
    assert [change.row for change in found.changes[TABLE.id]] == [None, image("Z", id_=2)], "decoded once, not twice"


def test_tables_without_handlers_cost_nothing() -> None:
    assert decoded(logged("c", 1, image("a")), each=False).each == ()


def test_an_image_with_the_key_alone_is_no_before() -> None:
    (event,) = decoded(logged("d", 1, None, image(None, None))).each
    assert event.before is None
    assert event.key == (1,)


def test_what_the_log_does_not_have_comes_from_before_or_is_named() -> None:
    with_before, without = decoded(
        logged("u", 1, image(PLACEHOLDER, 1943), image("long", 1942)), logged("u", 2, image(PLACEHOLDER, 1944))
    ).each
    assert (with_before.after, with_before.missing) == (image("LONG", 1943), ())
    assert (without.after, without.missing) == ({"id": 1, "year": 1944}, ("title",))


def test_a_change_of_other_columns_names_all_as_missing() -> None:
    events = decoded(logged("u", 1, image("!")), logged("u", 2, {"id": 1, "title": "b"})).each
    assert [(event.after, event.missing) for event in events] == [
        ({}, ("id", "title", "year")),
        ({"id": 1, "title": "B"}, ("year",)),
    ]


@pytest.mark.parametrize(
    ("codec_of", "kind", "unknown", "known"),
    [
        (postgresql_codec.table_codec, Kind.TEXT, postgresql_codec.PLACEHOLDER, "a"),
        (mysql_codec.table_codec, Kind.TIMESTAMP_TZ, "1970-01-01T00:00:00Z", "2024-01-02T03:04:05Z"),
    ],
)
def test_the_sources_codecs_name_what_the_log_does_not_have(
    codec_of: Callable[[Table], TableCodec], kind: Kind, unknown: str, known: str
) -> None:
    """Whole columns, and values of others: a long text that did not change, a date that MariaDB writes as zero."""
    columns = (
        Column("id", "integer", Kind.INTEGER),
        Column("size", "integer", Kind.INTEGER, in_log=False),
        Column("value", "…", kind, nullable=False, may_be_absent=True),
    )
    codec = codec_of(TABLE._replace(columns=columns))
    events = decode(
        [Stretch(EPOCH, [logged("u", n, {"id": 1, "value": value}) for n, value in enumerate((unknown, known))])],
        {TABLE.id: codec},
        "delta.",
        None,
        {TABLE.id},
    ).each
    assert [event.missing for event in events] == [("size", "value"), ("size",)]
    assert [set(event.after or ()) for event in events] == [{"id"}, {"id", "value"}]


def test_a_truncate_keeps_the_changes_before_it() -> None:
    truncate = {**logged("t", 2, None), "after": None}
    assert [event.version for event in decoded(logged("c", 1, image("a")), truncate).each] == [version_of(EPOCH, 1)]


def test_the_id_is_that_of_the_change() -> None:
    first, second = decoded(logged("c", 1, image("a")), logged("u", 2, image("b"))).each
    again = decoded(logged("c", 1, image("a"))).each[0]
    assert first.id == again.id != second.id
    assert first.id == f"public.movie/{version_of(EPOCH, 1)}/1"


def test_it_is_kept_in_the_common_form() -> None:
    event = event_of(5, before={"id": 1, "title": "A"}, op="update")
    kept = decode_event(encode_event(event.delta_event("movies")))
    assert RowEvent.of(kept) == event


# ── calling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def event_of(version: int, key: int = 1, **more: Any) -> RowEvent:
    fields: dict[str, Any] = {"op": "insert", "before": None, "after": {"id": key, "title": "A"}, "at": AT} | more
    return RowEvent("public.movie", (key,), version, **fields)


class Scene:
    """A handler that notes what it is called with, and runs what a test wants before."""

    def __init__(self) -> None:
        self.calls: list[RowEvent | Sequence[RowEvent]] = []
        self.before: Any = lambda _: None
        self.stopping = threading.Event()
        self.runner: HandlerRunner | None = None

    def handle(self, event: Any) -> None:
        self.before(event)
        self.calls.append(event)

    def start(self, when: Any = None, concurrency: int = 1, attempts: int = 1, batch: int = 1) -> HandlerRunner:
        handler = Handler("public.movie", "notify", self.handle, when, concurrency, attempts, batch)
        self.runner = HandlerRunner(handler, self.stopping, TIMEOUT_S)
        return self.runner


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.stopping.set()
    if scene.runner is not None:
        scene.runner.close()


def settled(results: list[Future[list[Unhandled]]]) -> list[Unhandled]:
    return [one for result in results for one in result.result(WAIT_S)]


def test_in_order_per_key_whatever_the_lanes(scene: Scene) -> None:
    runner = scene.start(concurrency=4)
    batches = [[event_of(10 * version + key, key) for key in range(20)] for version in range(5)]
    results = [result for batch in batches for result in runner.submit(batch)]
    assert settled(results) == []
    for key in range(20):
        versions = [event.version for event in scene.calls if isinstance(event, RowEvent) and event.key == (key,)]
        assert versions == [10 * version + key for version in range(5)]
    assert len({lane_of((key,), 4) for key in range(20)}) == 4


def test_a_transient_error_holds_up_the_lane_and_loses_nothing(scene: Scene) -> None:
    failures = [Transient("it is down", 0.0), Transient("it is down", 0.0)]

    def before(event: RowEvent) -> None:
        if event.version == 2 and failures:
            raise failures.pop()

    scene.before = before
    runner = scene.start()
    assert settled([*runner.submit([event_of(1), event_of(2), event_of(3)]), *runner.submit([event_of(4)])]) == []
    assert [event.version for event in scene.calls if isinstance(event, RowEvent)] == [1, 2, 3, 4]
    assert runner.numbers.retries == 2
    assert runner.numbers.busy is None


def test_what_it_does_not_take_is_a_dead_letter_and_the_next_one_follows(scene: Scene) -> None:
    def before(event: RowEvent) -> None:
        if event.version == 2:
            raise KeyError("title")

    scene.before = before
    runner = scene.start()
    (left,) = settled(runner.submit([event_of(1), event_of(2), event_of(3)]))
    assert (left.event.version, left.error) == (2, "KeyError: 'title'")
    assert "in before" in left.trace
    assert left.handler.place == "on:notify"
    assert [event.version for event in scene.calls if isinstance(event, RowEvent)] == [1, 3]


def test_only_what_is_wanted(scene: Scene) -> None:
    runner = scene.start(when=lambda event: 1 / (event.version - 2) > 0)
    (left,) = settled(runner.submit([event_of(1), event_of(2), event_of(3)]))
    assert (left.event.version, left.error) == (2, "ZeroDivisionError: division by zero")
    assert [event.version for event in scene.calls if isinstance(event, RowEvent)] == [3]


def test_of_a_batch_that_fails_each_is_tried_alone(scene: Scene) -> None:
    def before(events: Sequence[RowEvent]) -> None:
        if any(event.version == 2 for event in events):
            raise ValueError("not that one")

    scene.before = before
    runner = scene.start(batch=3)
    (left,) = settled(runner.submit([event_of(version) for version in range(1, 6)]))
    assert left.event.version == 2
    assert [[event.version for event in call] for call in scene.calls if not isinstance(call, RowEvent)] == [
        [1],
        [3],
        [4, 5],
    ]


class Hanging:
    """Events of version 2 hang until the test ends; no other call is ever looked at, however slow the machine is."""

    def __init__(self, scene: Scene, monkeypatch: pytest.MonkeyPatch, how: Callable[[threading.Event], None]) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.hung: threading.Event | None = None
        self.came_back: list[int] = []
        self._how = how
        scene.before = self
        monkeypatch.setattr(Caller.__init__, "__kwdefaults__", {"wait": self.wait})

    def __call__(self, given: Any) -> None:
        events = [given] if isinstance(given, RowEvent) else given
        if any(event.version == 2 for event in events):
            self.entered.set()
            self._how(self.released)
            self.came_back.append(2)

    def wait(self, done: threading.Event, _seconds: float) -> bool:
        """Say that a look's time is over when it is at the call that hangs."""
        while not done.wait(0.01):
            if self.entered.is_set():
                self.entered.clear()
                self.hung = done
            if done is self.hung:
                return done.wait(0.01)
        return True


def spins(released: threading.Event) -> None:
    while not released.is_set():
        pass


def spins_and_catches(released: threading.Event) -> None:
    while not released.is_set():
        with contextlib.suppress(Exception):  # what users write
            spins(released)


def waits(released: threading.Event) -> None:
    released.wait(WAIT_S)


@pytest.mark.parametrize("how", [spins, spins_and_catches, waits])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_call_that_does_not_return_costs_its_own_event(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, how: Callable[[threading.Event], None], batch: int
) -> None:
    hanging = Hanging(scene, monkeypatch, how)
    runner = scene.start(attempts=3, batch=batch)
    (left,) = settled(runner.submit([event_of(1), event_of(2), event_of(3)]))
    assert left.event.version == 2
    assert left.error.startswith("HandlerTimeout: It had not returned after 6 s, at ")
    assert how is not waits or "may still be done" in left.error
    assert f"in {how.__name__}" in left.trace, "where it was"
    assert runner.numbers.busy is None
    assert settled(runner.submit([event_of(4)])) == []
    calls = [event.version for call in scene.calls for event in ([call] if isinstance(call, RowEvent) else call)]
    assert calls == [1, 3, 4]
    hanging.released.set()
    wait_until(lambda: not any(thread.name == "on-notify-call" for thread in left_behind(runner)), WAIT_S, "its end")
    assert hanging.came_back == [], "nothing behind the line that hung is done"


def left_behind(runner: HandlerRunner) -> list[threading.Thread]:
    return [thread for caller in runner._callers for thread in caller._left if thread.is_alive()]


def test_it_is_named_while_it_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(scene, monkeypatch, waits)
    said: list[str | None] = []
    runner = scene.start()
    monkeypatch.setattr(runner._callers[0], "_note", said.append)
    settled(runner.submit([event_of(2)]))
    assert said[0] is not None
    assert said[0].startswith(f"{event_of(2).id} has been in the handler for 5 s, at threading.py line")
    assert said[-1] is None
    hanging.released.set()


def test_a_condition_that_does_not_return_costs_its_own_event(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(scene, monkeypatch, waits)

    def when(event: RowEvent) -> bool:
        hanging(event)
        return True

    runner = scene.start(when=when)
    scene.before = lambda _: None
    (left,) = settled(runner.submit([event_of(version) for version in (1, 2, 3)]))
    assert left.event.version == 2
    assert scene.calls == [event_of(1), event_of(3)]
    hanging.released.set()


def test_with_too_many_calls_that_do_not_return_the_pipeline_stops(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(scene, monkeypatch, waits)
    runner = scene.start()
    assert len(settled(runner.submit([event_of(2)] * LEFT_MOST))) == LEFT_MOST
    with pytest.raises(PipelineStopped, match="calls of the handler notify have not returned"):
        settled(runner.submit([event_of(2)]))
    hanging.released.set()


def test_the_end_does_not_wait_for_what_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not confirmed, and so it comes again."""
    hanging = Hanging(scene, monkeypatch, waits)
    runner = scene.start()
    (result,) = runner.submit([event_of(2)])
    scene.stopping.set()
    with pytest.raises(HandlersBusy):
        result.result(WAIT_S)
    hanging.released.set()


def test_nothing_follows_what_was_given_up(scene: Scene) -> None:
    """Else the next change of the key would be handled before this one, which is delivered again."""

    def before(event: RowEvent) -> None:
        if event.version == 1:
            scene.stopping.set()
            raise Transient("it is down")

    scene.before = before
    runner = scene.start()
    first, second = [*runner.submit([event_of(1)]), *runner.submit([event_of(2)])]
    for result in (first, second):
        with pytest.raises(HandlersBusy):
            result.result(WAIT_S)
    assert scene.calls == []


def test_a_batch_is_not_done_before_its_handlers_are() -> None:
    """What is confirmed before may never be handled."""
    sink, handler = Future[Any](), Future[Any]()
    job = Job([sink], [], handled=[handler])
    sink.set_result([])
    assert not job.done()
    handler.set_result([])
    assert job.done()


# ── declaring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_meant_is_refused() -> None:
    movies = Pipeline("movies")

    @movies.on("public.movie")
    def notify(event: RowEvent) -> None: ...

    with pytest.raises(UsageError, match="notify is declared twice"):
        movies.on("public.movie")(notify)
    with pytest.raises(UsageError, match="takes one argument"):
        movies.on("public.movie", name="other")(lambda: None)  # type: ignore[type-var]  # that is the mistake
    with pytest.raises(UsageError, match="above 0"):
        movies.on("public.movie", name="other", concurrency=0)(notify)
    with pytest.raises(UsageError, match="when='insert' is no function"):
        movies.on("public.movie", name="other", when="insert")(notify)  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(UsageError, match="needs the table's name"):
        movies.on(notify)  # type: ignore[arg-type]  # that is the mistake
    assert list(movies.handlers) == ["notify"]


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dead_letter_is_replayed_by_its_handler_with_all_that_it_was(scene: Scene) -> None:
    movies = Pipeline("movies")
    movies.on("public.movie", name="notify")(scene.handle)
    event = event_of(5, before={"id": 1, "title": "A"}, op="update")
    failed = Failure(Change(event.table, event.key, 5, event.after), "handle", "it was down", "", "on:notify", event)
    letter = letter_of("movies", failed, "log", ())
    kept = decode_event(letter.event)
    assert _handle_again(letter, kept, movies) is None
    assert scene.calls == [event]

    def before(_: RowEvent) -> None:
        raise KeyError("title")

    scene.before = before
    again = _handle_again(letter, kept, movies)
    assert again is not None
    assert (again.stage, again.error) == ("handle", "KeyError: 'title'")
    with pytest.raises(UsageError, match="There is no handler on:notify any more"):
        _handle_again(letter, kept, Pipeline("movies"))


def test_a_pipeline_keeps_its_handlers_when_it_gets_its_shapes() -> None:
    movies = Pipeline("movies")
    movies.on("public.movie", name="notify")(lambda event: None)
    spec = spec_from(
        {
            "name": "movies",
            "source": {"url": "postgresql://delta@db/studio"},
            "tables": {"public.movie": {}},
            "sinks": {"cache": {"url": "redis://cache/0"}},
        },
        "test",
    )
    assert with_shapes(movies, spec).handlers == movies.handlers


def test_a_cluster_that_does_not_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of an event: dead letters of all of them would be for nothing."""
    monkeypatch.setattr(settings, "REQUEST_TIMEOUT_S", 0.2)
    bus = Topic("changes", bootstrap_servers=f"127.0.0.1:{free_port()}", pipeline="movies")
    with pytest.raises(Transient, match="The topic changes cannot be written"):
        bus(RowEvent("public.movie", (1,), 5, "insert", None, {"id": 1}, AT))
    bus.close()
