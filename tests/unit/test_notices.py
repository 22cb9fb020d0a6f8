"""Notices that others send: what is one, who may send them, and that 202 means that it is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from delta_sync import observe
from delta_sync.errors import NoticesWait, UsageError
from delta_sync.kafka.consumer import Partition, PositionsExpired, Records
from delta_sync.kafka.notices import KafkaNotices
from delta_sync.notices import BYTES_MOST, NoticeIntake, Sent, read_notice
from delta_sync.observe import NoticeDoor
from delta_sync.pipeline import Pipeline
from delta_sync.progress import LogPosition, Progress
from delta_sync.refreshing import KEYS_MOST, NOTICED_S, PENDING_MOST, NoticeStore
from delta_sync.state import StateStore
from delta_sync.state_tables import NOTICES
from delta_sync.tables import Column, Kind, Table

MOVIE = Table(
    "public", "movie", (Column("id", "bigint", Kind.INTEGER), Column("price", "numeric", Kind.DECIMAL)), ("id",)
)
TOKEN = "s3cret"


def pipeline() -> Pipeline:
    made = Pipeline("movies")

    @made.lookup()
    def ratings(keys: list[Any]) -> Mapping[Any, Any]:
        return {key: key for key in keys}

    @made.table("public.movie", enrich={"rating": ratings.by("id")})
    def movie(row: dict[str, Any], rating: Any) -> dict[str, Any]:
        return {**row, "rating": rating}

    return made


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateStore]:
    with StateStore.open("sqlite:///state.db", tmp_path) as store:
        yield store


@pytest.fixture
def intake(state: StateStore) -> NoticeIntake:
    made = NoticeIntake()
    made.open(pipeline(), lambda: {"public.movie": MOVIE}, NoticeStore(state, "movies"))
    return made


@pytest.fixture
def url(intake: NoticeIntake) -> Iterator[str]:
    progress = Progress(LogPosition(lambda: 0.0), lambda: 0.0)
    progress.notices = intake.counts
    server = observe.serve("movies", progress, "127.0.0.1", 0, NoticeDoor(TOKEN, intake))
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def body(*keys: Any, lookup: str = "ratings") -> bytes:
    return json.dumps({"lookup": lookup, "keys": keys}).encode()


def kept(state: StateStore) -> list[tuple[Any, ...]]:
    store = NoticeStore(state, "movies")
    return [notice.keys for notice in store.get(store.ids())]


def due_now(state: StateStore) -> None:
    """Let all notices be as old as it takes for every process to have heeded them."""
    with state.transaction(write=True) as connection:
        long_ago_us = int(2 * NOTICED_S * 1e6)
        connection.exec_driver_sql(f"UPDATE delta_notice SET created_at = created_at - {long_ago_us}")


# ── what a notice is ─────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_texts_numbers_or_booleans() -> None:
    assert read_notice(body(1, "a", True)) == Sent("ratings", ("1", "a", "true"))
    text = b'{"lookup": "ratings", "keys": [1.50, 12345678901234567890.123456789]}'
    assert read_notice(text).keys == ("1.50", "12345678901234567890.123456789"), "digits as they were sent"


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "is JSON"),
        (b"{", "is JSON"),
        (b"[" * 100_000, "is JSON"),
        (b"\xff", "is JSON"),
        (b"[]", "an object with lookup and keys"),
        (b'{"lookup": "ratings"}', "an object with lookup and keys"),
        (b'{"lookup": "ratings", "keys": [1], "more": 1}', "and nothing else"),
        (b'{"lookup": 1, "keys": [1]}', "lookup is a text"),
        (b'{"lookup": "ratings", "keys": "1"}', "keys are a list"),
        (body(), "from one to"),
        (body(*range(KEYS_MOST + 1)), "from one to"),
        (body(None), "texts, numbers or booleans"),
        (body([1]), "texts, numbers or booleans"),
        (b'{"lookup": "ratings", "keys": ["\\ud800"]}', "half a character"),
        (b" " * (BYTES_MOST + 1), "MiB at most"),
    ],
)
def test_what_is_no_notice_is_told_why(sent: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        read_notice(sent)


def test_several_for_one_look_up_become_one_and_bad_ones_do_not_block(state: StateStore, intake: NoticeIntake) -> None:
    ids, refused = intake.take("kafka", [body(1, 2), body("x"), body(2, 3), body(1, lookup="stars")])
    assert len(ids) == 1
    assert kept(state) == [(1, 2, 3)]
    assert [one.place for one in refused] == [1, 3]
    assert "'x' is no value of public.movie.id" in refused[0].reason
    assert "has no look-up 'stars'" in refused[1].reason
    assert intake.counts == {("kafka", "accepted"): 2, ("kafka", "refused"): 2}


def test_before_the_tables_are_known_nothing_is_taken() -> None:
    with pytest.raises(NoticesWait):
        NoticeIntake().take("http", [body(1)])


def test_a_pending_notice_outlives_everything_until_it_is_settled(state: StateStore) -> None:
    store = NoticeStore(state, "movies")
    told, pending = store.add("ratings", [1]), store.add("ratings", [2], pending=True)
    assert store.due() == [], "some process may still answer from its cache"
    due_now(state)
    assert [notice.id for notice in store.due()] == [pending], "whoever told the other looks for its rows"
    for _ in range(1000):
        due_now(state)
    latest = store.add("ratings", [3])
    assert store.ids() == {pending, latest}, "the other one is forgotten"
    store.settle([pending])
    assert store.due() == []
    assert told not in store.ids()


def test_whoever_sends_too_many_has_to_wait(state: StateStore, intake: NoticeIntake) -> None:
    with state.transaction(write=True) as connection:
        row = {"pipeline": "movies", "lookup": "ratings", "notice_keys": b"", "pending": 1}
        for number in range(PENDING_MOST):
            connection.execute(NOTICES.insert().values(**row, id=number + 1, created_at=_now(connection)))
    with pytest.raises(NoticesWait, match="1,000 notices wait"):
        intake.take("http", [body(1)])
    NoticeStore(state, "movies").settle([1])
    assert intake.take("http", [body(1)])[1] == []


def _now(connection: Any) -> Any:
    from delta_sync.state import now_of

    return now_of(connection)


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────


def post(url: str, data: bytes, token: str | None = TOKEN) -> requests.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.post(f"{url}/notices", data=data, headers=headers, timeout=30)


def test_202_means_that_it_is_in_the_state_store(url: str, state: StateStore) -> None:
    answer = post(url, body(1, "2"))
    assert (answer.status_code, kept(state)) == (202, [(1, 2)])
    due_now(state)
    assert [notice.id for notice in NoticeStore(state, "movies").due()] == [answer.json()["notice"]]
    metrics = requests.get(f"{url}/metrics", timeout=30).text
    assert 'delta_notices_total{origin="http",outcome="accepted",pipeline="movies"} 1.0' in metrics


def test_only_who_has_the_token_is_listened_to(url: str, state: StateStore) -> None:
    for token in (None, "", "s3cre", "s3cret2"):
        answer = post(url, body(1), token)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), token
        assert TOKEN not in answer.text
    assert requests.post(f"{url}/notices", data=body(1), auth=("Bearer", TOKEN), timeout=30).status_code == 401
    assert kept(state) == []


def test_what_cannot_be_taken_is_told_in_a_sentence(url: str, state: StateStore) -> None:
    assert "is JSON" in post(url, b"lookup=ratings").json()["error"]
    assert post(url, body("x")).status_code == 400
    large = post(url, b"x" * (BYTES_MOST + 1))
    assert (large.status_code, large.json()["error"]) == (413, "A notice has 8 MiB at most; send several.")
    chunks = requests.post(
        f"{url}/notices", data=iter([body(1)]), headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30
    )
    assert chunks.status_code == 411
    asked = requests.get(f"{url}/notices", timeout=30)
    assert (asked.status_code, asked.headers["Allow"]) == (405, "POST")
    assert requests.post(f"{url}/metrics", data=b"", timeout=30).status_code == 404
    assert kept(state) == []


def test_a_state_store_that_does_not_answer_is_503(url: str, state: StateStore, intake: NoticeIntake) -> None:
    waits = NoticesWait("1,000 notices wait for their rows to be looked for.")

    class Full(NoticeStore):
        def add(self, lookup: str, keys: Any, *, pending: bool = False) -> int:
            raise waits

    intake.open(pipeline(), lambda: {"public.movie": MOVIE}, Full(state, "movies"))
    answer = post(url, body(1))
    assert (answer.status_code, answer.json()["error"], answer.headers["Retry-After"]) == (503, str(waits), "2")


def test_without_a_token_in_the_specification_there_is_no_door() -> None:
    server = observe.serve("movies", Progress(LogPosition(lambda: 0.0), lambda: 0.0), "127.0.0.1", 0)
    answer = post(f"http://127.0.0.1:{server.server_address[1]}", body(1))
    server.shutdown()
    server.server_close()
    assert answer.status_code == 404
    assert "notices.token" in answer.text


# ── from Kafka: the order of keeping and committing ──────────────────────────────────────────────────────────────


class Group:
    """A member of a group that has one answer, and notes what it is told."""

    def __init__(self, answer: list[Records] | PositionsExpired, state: StateStore) -> None:
        self._answer = answer
        self._state = state
        self.committed: list[tuple[dict[Partition, int], int]] = []

    def poll(self, timeout_s: float) -> list[Records]:
        del timeout_s
        if isinstance(self._answer, PositionsExpired):
            raise self._answer
        return self._answer

    def rewind(self, partitions: Any) -> dict[Partition, int]:
        return dict.fromkeys(partitions, 7)

    def commit(self, positions: Mapping[Partition, int]) -> None:
        self.committed.append((dict(positions), len(kept(self._state))))


P0 = Partition("ratings-changed", 0)


def records(*values: bytes | None) -> Records:
    return Records(P0, [None] * len(values), values, [None] * len(values), [0] * len(values), 40 + len(values))


def reader_of(intake: NoticeIntake) -> KafkaNotices:
    def no_group() -> Any:
        raise AssertionError("it is given one")

    return KafkaNotices(no_group, "ratings-changed", intake, threading.Event())


def test_positions_are_committed_once_the_notices_are_kept(state: StateStore, intake: NoticeIntake) -> None:
    group = Group([records(body(1), None, b"{}", body(2))], state)
    reader_of(intake).read(group)  # type: ignore[arg-type]  # what it needs of one
    assert kept(state) == [(1, 2)]
    assert group.committed == [({P0: 44}, 1)]
    assert intake.counts["kafka", "refused"] == 2


def test_nothing_is_committed_when_the_state_store_takes_nothing(state: StateStore) -> None:
    group = Group([records(body(1))], state)
    with pytest.raises(NoticesWait):
        reader_of(NoticeIntake()).read(group)  # type: ignore[arg-type]  # what it needs of one
    assert group.committed == []


def test_expired_positions_do_not_stand_still(state: StateStore, intake: NoticeIntake) -> None:
    group = Group(PositionsExpired("gone", {P0: 3}), state)
    reader_of(intake).read(group)  # type: ignore[arg-type]  # what it needs of one
    assert group.committed == [({P0: 7}, 0)]
