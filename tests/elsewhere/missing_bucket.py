"""What a Parquet sink says of a bucket that is not there, on every store of objects."""

from __future__ import annotations

import pytest

from delta_sync.changes import Write
from delta_sync.errors import SinkRefused
from delta_sync.sinks.parquet import ParquetSink, ParquetTargetOptions
from delta_sync.testing.contract import MOVIE


def assert_there_is_no_bucket(sink: ParquetSink) -> None:
    """Call everything of a sink whose bucket is called no-such-bucket; each call refuses with the same sentence."""
    target = sink.target(MOVIE, ParquetTargetOptions())
    sentence = "There is no bucket no-such-bucket: create it, or correct the URL."
    (problem,) = sink.check([target])
    assert (problem.where, problem.what, problem.fatal) == ("sink lake", sentence, True)
    for call in (
        lambda: sink.apply(target, [Write((1,), 5, {"n": 5})]),
        lambda: sink.apply(target, [Write((1,), 5, None)]),  # no field: the file comes first
        lambda: sink.read(target, [(1,)]),
        lambda: sink.sweep(target),
    ):
        with pytest.raises(SinkRefused) as refused:
            call()
        assert str(refused.value) == sentence
