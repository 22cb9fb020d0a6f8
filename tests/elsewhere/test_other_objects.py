"""The Parquet sink on stores that speak as Google's and Azure's do, through gcsfs and adlfs."""

from __future__ import annotations

import base64
import importlib
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from contract.test_parquet import TTL_S, FilesOfParquet, ParquetContract
from delta_sync.changes import APPLIED, Write
from delta_sync.errors import SinkBusy, SinkRefused
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.parquet import ParquetOptions, ParquetSink, ParquetTargetOptions
from delta_sync.testing.contract import MOVIE, AnySink, apply
from delta_sync.testing.processes import free_port
from elsewhere.missing_bucket import assert_there_is_no_bucket
from elsewhere.objects import AzureStore, GoogleStore

fsspec: Any = importlib.import_module("fsspec")  # it has no types

Store = GoogleStore | AzureStore
PROTOCOLS: dict[type[Store], str] = {GoogleStore: "gs", AzureStore: "abfs"}


@pytest.fixture(scope="module", params=PROTOCOLS, ids=list(PROTOCOLS.values()))
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    with request.param() as store, pytest.MonkeyPatch.context() as patched:
        # gcsfs would ask a server that only Google has what kind of bucket it is.
        patched.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield store


@pytest.fixture
def url(store: Store) -> str:
    """A prefix in a new bucket."""
    protocol, bucket = PROTOCOLS[type(store)], f"lake-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem(protocol, **store.storage).mkdir(bucket)
    return f"parquet+{protocol}://{bucket}/films"


@pytest.fixture
def sink(store: Store, url: str) -> Iterator[ParquetSink]:
    sink = ParquetSink("lake", url, ParquetOptions(buckets=3, storage=store.storage), TTL_S)
    yield sink
    sink.close()


@pytest.fixture
def target(sink: ParquetSink) -> Target:
    return sink.target(MOVIE, ParquetTargetOptions())


class TestContract(ParquetContract):
    @pytest.fixture
    def sink(self, store: Store, url: str) -> Iterator[AnySink]:
        sink = ParquetSink("lake", url, ParquetOptions(buckets=2, storage=store.storage), TTL_S)
        yield sink
        sink.close()

    @pytest.fixture
    def unreachable(self, store: Store, url: str) -> AnySink:
        old = str(store.port)
        storage = {name: value.replace(old, str(free_port())) for name, value in store.storage.items()}
        return ParquetSink("lake", url, ParquetOptions(storage=storage), TTL_S)


class TestFiles(FilesOfParquet):
    """Merged, kept, typed by the first."""


def test_a_store_that_does_not_answer_is_waited_for(
    store: Store, sink: ParquetSink, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
    monkeypatch.setattr("delta_sync.sinks.parquet_files.ANSWER_S", 5)
    store.freeze()
    try:
        for call in (
            lambda: sink.apply(target, [Write((2,), 5, {"n": 5})]),
            lambda: sink.read(target, [(1,)]),
            lambda: sink.truncate(target, 3),
            lambda: sink.sweep(target),
        ):
            with pytest.raises(SinkBusy, match=f"{sink.url.partition('://')[2]} cannot be reached: ") as busy:
                call()
            assert AzureStore.key not in str(busy.value)
    finally:
        store.start()
    assert apply(sink, target, (2,), 5, {"n": 5}) == APPLIED
    assert sink.read(target, [(1,), (2,)]) == [Stored(5, {"n": 5}), Stored(5, {"n": 5})]


def test_a_bucket_that_is_missing(store: Store) -> None:
    protocol = PROTOCOLS[type(store)]
    url = f"parquet+{protocol}://no-such-bucket/films"
    sink = ParquetSink("lake", url, ParquetOptions(storage=store.storage), TTL_S)
    assert_there_is_no_bucket(sink)


@pytest.mark.parametrize("store", [AzureStore], ids=["abfs"], indirect=True)  # that of Google takes any
def test_a_wrong_key_is_said_without_it(store: AzureStore, url: str) -> None:
    wrong = base64.b64encode(b"Hunter2Hunter2").decode()
    storage = {"connection_string": store.storage["connection_string"].replace(store.key, wrong)}
    sink = ParquetSink("lake", url, ParquetOptions(storage=storage), TTL_S)
    target = sink.target(MOVIE, ParquetTargetOptions())
    (problem,) = sink.check([target])
    with pytest.raises(SinkRefused, match="Authorization") as refused:
        sink.apply(target, [Write((1,), 5, {"n": 5})])
    assert "Authorization" in problem.what
    assert wrong not in problem.what + str(refused.value)
