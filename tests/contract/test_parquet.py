"""The Parquet sink keeps the contract, but for telling what is stale; on a local disk and on a store of objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from columns_contract import ColumnsContract
from delta_sync.changes import APPLIED, Write
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.parquet import ParquetOptions, ParquetSink, ParquetTargetOptions
from delta_sync.testing.contract import MOVIE, AnySink, apply, scanned

TTL_S = 3600


class ParquetContract(ColumnsContract):
    tells_stale = False  # nothing is compared when it is written
    storm_seeds = range(1)
    storm_writes = 60  # each reading looks through all files


class TestLocal(ParquetContract):
    @pytest.fixture
    def sink(self, tmp_path: Path) -> AnySink:
        return ParquetSink("lake", f"parquet+file://{tmp_path}/lake", ParquetOptions(buckets=2), TTL_S)

    @pytest.fixture
    def unreachable(self, tmp_path: Path) -> AnySink:
        return ParquetSink("lake", f"parquet+file://{tmp_path}/no/lake", ParquetOptions(), TTL_S)


class TestObjects(ParquetContract):
    """fsspec's store in memory, as one of objects: written whole, listed flat."""

    @pytest.fixture
    def sink(self) -> Iterator[AnySink]:
        sink = ParquetSink("lake", "parquet+memory://lake", ParquetOptions(buckets=2), TTL_S)
        yield sink
        sink.close()


@pytest.fixture
def sink(tmp_path: Path) -> ParquetSink:
    return ParquetSink("lake", f"parquet+file://{tmp_path}/lake", ParquetOptions(buckets=3), TTL_S)


@pytest.fixture
def target(sink: ParquetSink) -> Target:
    return sink.target(MOVIE, ParquetTargetOptions())


def reopened(sink: ParquetSink, **options: Any) -> ParquetSink:
    """Return a sink of the same files, in the same store."""
    return ParquetSink("lake", sink.url, ParquetOptions(storage=sink.options.storage, **options), TTL_S)


def files(sink: ParquetSink, target: Target) -> list[str]:
    return [path.partition("/delta_contract.movie/")[2] for path in sink._files(target)]


class FilesOfParquet:
    """Which files there are, and what they have to do with each other; wherever they are."""

    def test_files_are_merged_into_one_for_each_bucket_and_nothing_is_lost(
        self, sink: ParquetSink, target: Target
    ) -> None:
        for version in range(1, 9):
            sink.apply(target, [Write((n,), version, {"n": n, "v": version}) for n in range(50)])
        sink.apply(target, [Write((n,), 9, None) for n in range(10)])
        sink.truncate(target, 5)
        before = sink.read(target, [(n,) for n in range(50)])
        assert len(files(sink, target)) == 9
        assert sink.sweep(target, 60.0) == 0
        assert sorted({path.partition("/")[0] for path in files(sink, target)}) == [f"bucket={n}of3" for n in range(3)]
        assert len(files(sink, target)) == 3
        assert sink.read(target, [(n,) for n in range(50)]) == before
        assert len(scanned(sink, target)) == 40
        sink.apply(target, [Write((11,), 7, {"n": 0})])
        assert sink.sweep(target, 60.0) == 0, "too little to merge"
        assert len(files(sink, target)) == 4
        other = reopened(sink, buckets=5)
        assert other.read(target, [(n,) for n in range(50)]) == before, "with another number of buckets"
        assert len(scanned(other, target)) == 40

    def test_a_process_that_dies_while_it_merges_changes_nothing(self, sink: ParquetSink, target: Target) -> None:
        class Died(BaseException):
            pass

        def die(paths: object) -> None:
            raise Died

        sink.apply(target, [Write((n,), 5, {"n": n}) for n in range(20)])
        sink.apply(target, [Write((1,), 6, None), Write((2,), 6, {"n": -2})])
        before = sink.read(target, [(n,) for n in range(20)])
        sink._fs.remove = die  # type: ignore[method-assign]  # the files are merged, and not removed yet
        with pytest.raises(Died):
            sink.sweep(target)
        assert len(files(sink, target)) == 5
        assert sink.read(target, [(n,) for n in range(20)]) == before
        assert len(scanned(sink, target)) == 19
        del sink._fs.remove
        sink.sweep(target)
        assert sink.read(target, [(n,) for n in range(20)]) == before

    def test_a_file_that_is_there_is_not_replaced(self, sink: ParquetSink, target: Target) -> None:
        """Of two processes that add a field at once, the second takes over the first one's type."""
        path = f"{target.settings.folder}/fields/year"
        sink._fs.create(path, b"integer")
        with pytest.raises(FileExistsError):
            sink._fs.create(path, b"text")
        assert sink._fs.read(path) == b"integer"

    def test_history_keeps_all_that_was_written(self, sink: ParquetSink) -> None:
        history = reopened(sink, keep="history")
        target = history.target(MOVIE, ParquetTargetOptions(folder="movies"))
        for version in range(5, 0, -1):
            assert apply(history, target, (1,), version, {"n": version}) == APPLIED
        history.sweep(target)
        assert history.read(target, [(1,)]) == [Stored(5, {"n": 5})]
        tables = [history._load(path) for path in history._files(target)]
        assert sorted(n for table in tables for n in table["n"].to_pylist()) == [1, 2, 3, 4, 5]
        assert all("/movies/changes/day=" in path for path in history._files(target))

    def test_expired_tombstones_go_when_files_are_merged(self, sink: ParquetSink, target: Target) -> None:
        now_s = 1_000_000.0
        options = ParquetOptions(buckets=1, storage=sink.options.storage)
        clocked = ParquetSink("lake", sink.url, options, 60, now=lambda: now_s)
        apply(clocked, target, (1,), 5, None)
        apply(clocked, target, (2,), 5, {"n": 2})
        now_s += 59
        assert clocked.sweep(target) == 0
        apply(clocked, target, (3,), 5, {"n": 3})
        now_s += 2
        assert clocked.sweep(target) == 1
        assert clocked.read(target, [(1,), (2,)]) == [None, Stored(5, {"n": 2})]

    def test_the_first_process_says_which_type_a_field_has(self, sink: ParquetSink, target: Target) -> None:
        other = reopened(sink)
        assert apply(sink, target, (1,), 5, {"year": 1942}) == APPLIED
        outcome = apply(other, target, (2,), 5, {"year": "soon"})
        assert outcome.kind == "rejected"
        assert "which is of type integer" in outcome.reason
        assert apply(other, target, (2,), 5, {"year": 1943}) == APPLIED


class TestFiles(FilesOfParquet):
    """On a local disk."""
