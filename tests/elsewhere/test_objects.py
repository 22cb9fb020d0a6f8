"""The Parquet sink on a store of objects that speaks S3, through s3fs; killed, cut off, misdirected and refused."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.test_parquet import TTL_S, FilesOfParquet, ParquetContract
from delta_sync.changes import APPLIED, Write
from delta_sync.errors import DeltaError, SinkBusy, SinkRefused
from delta_sync.sinks import open_sinks
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.parquet import ParquetOptions, ParquetSink, ParquetTargetOptions
from delta_sync.spec import spec_from
from delta_sync.testing.contract import MOVIE, AnySink, apply, scanned
from delta_sync.testing.processes import free_port
from elsewhere.missing_bucket import assert_there_is_no_bucket
from elsewhere.objects import ACCESS_KEY, SECRET_KEY, ObjectStore
from elsewhere.parquet_process import BATCHES, KEYS

fsspec: Any = importlib.import_module("fsspec")  # it has no types

CHILD = Path(__file__).with_name("parquet_process.py")
PATIENCE_S = 300.0
IMPATIENT = {"config_kwargs": {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 0}}}


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """A store that botocore finds, with its credentials, as it finds Amazon's."""
    with ObjectStore() as store, pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", store.url)
        patched.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patched.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield store


@pytest.fixture
def url(store: ObjectStore) -> str:
    """A prefix in a new bucket."""
    bucket = f"lake-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"parquet+s3://{bucket}/films"


@pytest.fixture
def sink(url: str) -> Iterator[ParquetSink]:
    sink = ParquetSink("lake", url, ParquetOptions(buckets=3), TTL_S)
    yield sink
    sink.close()


@pytest.fixture
def target(sink: ParquetSink) -> Target:
    return sink.target(MOVIE, ParquetTargetOptions())


class TestContract(ParquetContract):
    @pytest.fixture
    def sink(self, url: str) -> Iterator[AnySink]:
        sink = ParquetSink("lake", url, ParquetOptions(buckets=2), TTL_S)
        yield sink
        sink.close()

    @pytest.fixture
    def unreachable(self, store: ObjectStore) -> AnySink:
        storage = {"endpoint_url": f"http://127.0.0.1:{free_port()}", **IMPATIENT}
        return ParquetSink("lake", "parquet+s3://lake/films", ParquetOptions(storage=storage), TTL_S)


class TestFiles(FilesOfParquet):
    """Merged, kept, typed by the first."""


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(CHILD), *arguments], stdout=subprocess.PIPE, text=True)


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_processes_write_while_a_third_merges(sink: ParquetSink, target: Target) -> None:
    """Each of 20 new fields is written with two types at once: one of them is its type, and no file has the other."""
    writers = [child("write", sink.url, "odd", "integer"), child("write", sink.url, "even", "text")]
    try:
        while any(writer.poll() is None for writer in writers):
            sink.sweep(target)
            for found in sink.read(target, [(0,)]):
                assert found is None or found.document is not None
        said = [[json.loads(line) for line in writer.stdout or ()] for writer in writers]
        assert [writer.wait() for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    sink.sweep(target)
    applied: dict[int, int] = {}  # batch → version of the one whose type the field has
    for n, (odd, even) in enumerate(zip(*said, strict=True)):
        assert sorted((odd["outcomes"], even["outcomes"])) == [["applied"], ["rejected"]], n
        applied[n] = next(one["version"] for one in (odd, even) if one["outcomes"] == ["applied"])
    assert len(applied) == BATCHES
    newest = max(applied.values())
    fresh = ParquetSink("lake", sink.url, ParquetOptions(buckets=3), TTL_S)
    stored = fresh.read(target, [(key,) for key in range(KEYS)])
    assert [one and one.version for one in stored] == [newest] * KEYS
    assert scanned(fresh, target) == dict.fromkeys((str(key) for key in range(KEYS)), newest)


@pytest.mark.parametrize("method", ["_write", "remove"])
def test_a_process_that_is_killed_between_two_steps_changes_nothing(
    sink: ParquetSink, target: Target, method: str
) -> None:
    """After a field's type is there and before the file is; after files are merged and before the old ones go."""
    keys = [(n,) for n in range(20)]
    sink.apply(target, [Write(key, 5, {"n": n}) for n, key in enumerate(keys)])
    sink.apply(target, [Write((2,), 6, None), Write((3,), 6, {"n": -3})])
    before: list[Stored | None] = sink.read(target, keys)
    if method == "remove":  # it comes there with its own write done
        before[1] = Stored(7, {"n": 7, "late": "a text"})
    killed = child("hang", sink.url, method)
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "there\n"
    finally:
        killed.kill()
        killed.wait()
    assert sink.read(target, keys) == before
    assert len(scanned(sink, target)) == 19
    assert apply(sink, target, (4,), 6, {"late": 4}).kind == "rejected", "the killed process had said: a text"
    assert sink.sweep(target) == 0
    assert sink.read(target, keys) == before
    assert len(scanned(sink, target)) == 19
    assert len([path for path in sink._files(target) if "/changes/" in path]) == 0


# ── a store that is not there ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("outage", ["killed", "frozen"])
def test_a_store_that_does_not_answer_is_waited_for(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch, outage: str
) -> None:
    sink = ParquetSink("lake", url, ParquetOptions(storage=IMPATIENT), TTL_S)
    target = sink.target(MOVIE, ParquetTargetOptions())
    assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
    if outage == "frozen":
        monkeypatch.setattr("delta_sync.sinks.parquet_files.ANSWER_S", 5)  # a write would wait for ever, not knowing it
    store.kill() if outage == "killed" else store.freeze()
    try:
        for call in (
            lambda: sink.apply(target, [Write((2,), 5, {"n": 5})]),
            lambda: sink.read(target, [(1,)]),
            lambda: sink.truncate(target, 3),
            lambda: sink.sweep(target),
        ):
            with pytest.raises(SinkBusy, match=f"{url.partition('://')[2]} cannot be reached: ") as busy:
                call()
            assert SECRET_KEY not in str(busy.value)
    finally:
        store.start()
    assert apply(sink, target, (2,), 5, {"n": 5}) == APPLIED
    assert sink.read(target, [(1,), (2,)]) == [Stored(5, {"n": 5}), Stored(5, {"n": 5})]


def test_a_bucket_that_is_missing(store: ObjectStore) -> None:
    sink = ParquetSink("lake", "parquet+s3://no-such-bucket/films", ParquetOptions(), TTL_S)
    assert_there_is_no_bucket(sink)


# ── credentials ──────────────────────────────────────────────────────────────────────────────────────────────────────


def opened(url: str, **storage: object) -> tuple[AnySink, Target]:
    """Return the sink of a specification, as a pipeline has it."""
    spec = spec_from(
        {
            "name": "films",
            "source": {"url": "postgresql://delta@db/studio"},
            "tables": {"delta_contract.movie": {}},
            "sinks": {"lake": {"url": url, "storage": storage}},
        },
        "test",
    )
    sink = open_sinks(spec)["lake"]
    return sink, sink.target(MOVIE, ParquetTargetOptions())


def test_credentials_are_references(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("LAKE_KEY", ACCESS_KEY)
    (tmp_path / "secret").write_text(f"{SECRET_KEY}\n")
    secret = f"${{file:{tmp_path / 'secret'}}}"
    sink, target = opened(url, endpoint_url=store.url, key="${env:LAKE_KEY}", secret=secret)
    assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
    assert sink.check([target]) == []
    assert sink.read(target, [(1,)]) == [Stored(5, {"n": 5})]


@pytest.mark.parametrize(
    ("key", "secret", "words", "kind"),
    [
        (ACCESS_KEY, "Hunter2Hunter2", "signature", SinkRefused),
        (
            "AKIANOBODY",
            "Hunter2Hunter2",
            "access key",
            SinkBusy,
        ),  # Amazon's code for it refuses, this gateway has its own
        (None, None, "Unable to locate credentials", SinkBusy),  # a role's may come yet
    ],
)
def test_wrong_credentials_are_said_without_them(
    store: ObjectStore,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key: str | None,
    secret: str | None,
    words: str,
    kind: type[DeltaError],
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # or it asks a machine of Amazon's network
    monkeypatch.setenv("LAKE_SECRET", secret or "")
    storage = {} if key is None else {"key": key, "secret": "${env:LAKE_SECRET}"}
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # another test's has credentials
    caplog.set_level(logging.INFO)
    sink, target = opened(url, **storage)
    (problem,) = sink.check([target])
    with pytest.raises(DeltaError) as refused:
        sink.apply(target, [Write((1,), 5, {"n": 5})])
    assert words.lower() in problem.what.lower()
    assert words.lower() in str(refused.value).lower() or str(refused.value).endswith(" refuses: Forbidden")
    assert isinstance(refused.value, kind)
    shown = [str(problem), caplog.text, "".join(traceback.format_exception(refused.value))]
    assert secret is None or not [text for text in shown if secret in text]


def test_an_option_that_s3fs_does_not_have(store: ObjectStore, url: str) -> None:
    sink, target = opened(url, endpont_url=store.url)
    (problem,) = sink.check([target])
    assert "endpont_url" in problem.what
    with pytest.raises(SinkRefused, match="endpont_url"):
        sink.apply(target, [Write((1,), 5, {"n": 5})])
