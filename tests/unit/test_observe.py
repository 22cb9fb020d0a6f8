"""What a process shows over HTTP: health, and metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from delta_sync import observe
from delta_sync.applying import SinkNumbers
from delta_sync.dumps import Dump
from delta_sync.measures import Histogram, PartitionLag
from delta_sync.progress import LogPosition, Progress
from delta_sync.verifying import Verified

TIMEOUT_S = 60.0


@pytest.fixture
def progress() -> Progress:
    return Progress(LogPosition(lambda: 0.0), lambda: 0.0)


@pytest.fixture
def url(progress: Progress) -> Iterator[str]:
    server = observe.serve("movies", progress, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def answer(url: str, path: str) -> tuple[int, str]:
    reply = requests.get(url + path, timeout=TIMEOUT_S)
    return reply.status_code, reply.text.strip()


def test_health_from_start_to_end(progress: Progress, url: str) -> None:
    assert answer(url, "/healthz") == (200, "starting")
    assert answer(url, "/readyz") == (503, "starting")
    progress.standby = True
    assert answer(url, "/readyz") == (200, "standby")  # it could take over
    progress.waits("state store", "it does not answer")
    assert answer(url, "/readyz") == (503, "waiting: state store: it does not answer")  # then it could not
    assert answer(url, "/healthz")[0] == 200  # another start would not help
    progress.waits("state store", None)
    progress.standby = False
    assert answer(url, "/readyz") == (503, "starting")
    progress.position.advance(1)
    assert answer(url, "/readyz") == (200, "streaming")
    progress.end("failed", "the slot is gone")
    assert answer(url, "/healthz") == (503, "failed: the slot is gone")
    assert answer(url, "/readyz")[0] == 503


def test_metrics_are_what_was_measured(progress: Progress, url: str) -> None:
    cache = SinkNumbers()
    progress.sinks = {"cache": cache}
    cache.seconds.add(0.3)
    progress.stages["decode"].add(0.002)
    progress.batch_changes.add(100)
    progress.latency.add(0.2, 100)
    progress.partition_lags = {("t", 0): PartitionLag(3, 0.5), ("t", 1): PartitionLag(7, None)}
    progress.dumps = [
        Dump(id=3, table="public.movie", kind="table", state="running", rows=50, waits="pid 7"),
        Dump(id=4, table="public.movie", kind="keys", state="paused"),
    ]
    progress.note_verified({"public.movie": Verified("public.movie", 5.0, 100, 3, 2), "public.a": Verified("public.a")})
    samples = {
        (sample.name, *sorted(label for name, label in sample.labels.items() if name != "pipeline")): sample.value
        for family in text_string_to_metric_families(answer(url, "/metrics")[1])
        for sample in family.samples
    }
    assert samples["delta_stage_seconds_count", "", "decode"] == 1
    assert samples["delta_stage_seconds_sum", "apply", "cache"] == 0.3
    assert samples["delta_latency_seconds_bucket", "0.1"] == 0
    assert samples["delta_latency_seconds_bucket", "0.25"] == 100
    assert samples["delta_latency_seconds_bucket", "+Inf"] == 100
    assert samples["delta_latency_seconds_sum",] == pytest.approx(20)
    assert samples["delta_batch_changes_bucket", "64.0"] == 0
    assert samples["delta_batch_changes_bucket", "256.0"] == 1
    assert samples["delta_partition_lag_records", "1", "t"] == 7
    assert ("delta_partition_lag_seconds", "1", "t") not in samples
    assert samples["delta_dump_rows", "3", "public.movie", "table"] == 50
    assert samples["delta_dump_state", "3", "public.movie", "table", "waiting"] == 1
    assert samples["delta_dump_state", "4", "keys", "paused", "public.movie"] == 1
    assert samples["delta_verified_age_seconds", "public.movie"] == 5.0
    assert ("delta_verified_age_seconds", "public.a") not in samples, "it was never verified to its end"
    assert samples["delta_verified_rows_total", "public.movie"] == 100
    assert samples["delta_verified_differences_total", "public.movie"] == 3
    assert samples["delta_verified_repaired_total", "public.movie"] == 2
    assert samples["delta_lag_seconds",] == 0.5  # the worst of those that are known


def test_a_histogram_counts_at_or_below() -> None:
    histogram = Histogram((1.0, 10.0))
    for value in (0.0, 1.0, 1.1, 10.0, 11.0):
        histogram.add(value)
    histogram.add(2.0, times=5)
    counts, total = histogram.read()
    assert counts == [("1.0", 2), ("10.0", 9), ("+Inf", 10)]
    assert total == pytest.approx(33.1)
