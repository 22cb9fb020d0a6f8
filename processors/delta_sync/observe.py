"""What a running pipeline shows over HTTP: `/metrics` for Prometheus, `/healthz`, `/readyz`, `/status`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from delta_sync.errors import UsageError
from delta_sync.progress import READY, Progress
from delta_sync.secrets import redact


class ProgressCollector(Collector):
    """Prometheus' view of a pipeline's progress: read when it is scraped, so nothing is counted twice."""

    def __init__(self, pipeline: str, progress: Progress) -> None:
        self._pipeline = pipeline
        self._progress = progress

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics, labelled with the pipeline."""
        progress, pipeline = self._progress, self._pipeline
        state, _ = progress.state()
        up = GaugeMetricFamily("delta_state", "1 for the state that the pipeline is in.", labels=["pipeline", "state"])
        up.add_metric([pipeline, state], 1)
        yield up
        for name, help_text, value in (
            ("delta_changes", "Change events taken from the log and applied to every sink.", progress.events),
            ("delta_writes", "Documents written or deleted, whatever the number of sinks.", progress.writes),
            ("delta_dead_letters", "Changes kept as dead letters.", progress.dead_letters),
            ("delta_reread_rows", "Rows read by key because an event lacked a value.", progress.reread_rows),
            ("delta_capture_restarts", "Starts of the capture after it ended.", progress.capture_restarts),
            (
                "delta_positions_expired",
                "Partitions of which records were gone before they were read; their tables are loaded again.",
                progress.positions_expired,
            ),
        ):
            counter = CounterMetricFamily(name, help_text, labels=["pipeline"])
            counter.add_metric([pipeline], value)
            yield counter
        lags: tuple[tuple[str, str, float | None], ...] = (
            ("delta_lag_bytes", "Log between its end and what is in every sink.", progress.lag_bytes()),
            ("delta_lag_seconds", "How long a change takes into every sink.", progress.lag_s()),
        )
        for name, help_text, lag in lags:
            gauge = GaugeMetricFamily(name, help_text, labels=["pipeline"])
            if lag is not None:
                gauge.add_metric([pipeline], lag)
            yield gauge
        outcomes = CounterMetricFamily(
            "delta_sink_writes", "Outcomes of writes.", labels=["pipeline", "sink", "outcome"]
        )
        busy = GaugeMetricFamily("delta_sink_busy", "1 while a sink does not acknowledge.", labels=["pipeline", "sink"])
        for sink, numbers in progress.sinks.items():
            for outcome in ("applied", "stale", "rejected"):
                outcomes.add_metric([pipeline, sink, outcome], getattr(numbers, outcome))
            busy.add_metric([pipeline, sink], 1 if numbers.busy else 0)
        yield outcomes
        yield busy
        handled = CounterMetricFamily(
            "delta_handled_events", "Events that a handler has had.", labels=["pipeline", "handler", "outcome"]
        )
        for handler, had in progress.handlers.items():
            handled.add_metric([pipeline, handler, "handled"], had.handled - had.failed)
            handled.add_metric([pipeline, handler, "failed"], had.failed)
        yield handled
        yield from self._measures()
        yield from self._lookups()
        loaded = GaugeMetricFamily("delta_loaded_rows", "Rows read by a table's load.", labels=["pipeline", "table"])
        for table, load in dict(progress.loads).items():
            loaded.add_metric([pipeline, table], load.get("rows", 0))
        yield loaded
        yield from self._dumps()
        yield from self._verified()

    def _verified(self) -> Iterable[Metric]:
        """Yield what `deltactl verify` has found, by whichever process."""
        labels = ["pipeline", "table"]
        age = GaugeMetricFamily(
            "delta_verified_age_seconds", "No row's last verification is older; absent: there was none.", labels=labels
        )
        rows = CounterMetricFamily("delta_verified_rows", "Rows verified.", labels=labels)
        differences = CounterMetricFamily("delta_verified_differences", "Differences found.", labels=labels)
        repaired = CounterMetricFamily("delta_verified_repaired", "Differences repaired.", labels=labels)
        for one in self._progress.verified_now():
            if one.age_s is not None:
                age.add_metric([self._pipeline, one.table], one.age_s)
            rows.add_metric([self._pipeline, one.table], one.rows)
            differences.add_metric([self._pipeline, one.table], one.differences)
            repaired.add_metric([self._pipeline, one.table], one.repaired)
        yield from (age, rows, differences, repaired)

    def _dumps(self) -> Iterable[Metric]:
        """Yield what is known of dumps under way, in the process that plans them."""
        labels = ["pipeline", "dump", "table", "kind"]
        rows = GaugeMetricFamily("delta_dump_rows", "Rows of a dump that are in every sink.", labels=labels)
        states = GaugeMetricFamily(
            "delta_dump_state",
            "1 for the state that a dump is in; waiting: for a transaction.",
            labels=[*labels, "state"],
        )
        for dump in self._progress.dumps:
            values = [self._pipeline, str(dump.id), dump.table, dump.kind]
            rows.add_metric(values, dump.rows)
            waiting = dump.state == "running" and dump.waits is not None
            states.add_metric([*values, "waiting" if waiting else dump.state], 1)
        yield rows
        yield states

    def _lookups(self) -> Iterable[Metric]:
        """Yield what look-ups do."""
        labels = ["pipeline", "lookup"]
        calls = CounterMetricFamily(
            "delta_lookup_calls", "Calls of a look-up by how they ended.", labels=[*labels, "outcome"]
        )
        keys = CounterMetricFamily(
            "delta_lookup_keys",
            "Keys of which the answer was remembered (hit), asked for, or left out of a document (optional look-ups).",
            labels=[*labels, "result"],
        )
        batches = HistogramMetricFamily("delta_lookup_batch_keys", "Keys in a call.", labels=labels)
        seconds = HistogramMetricFamily("delta_lookup_seconds", "Time that a call took.", labels=labels)
        breaker = GaugeMetricFamily(
            "delta_lookup_breaker", "1 for the state of a look-up's circuit breaker.", labels=[*labels, "state"]
        )
        for name, numbers in self._progress.lookups.items():
            of = [self._pipeline, name]
            for outcome, count in numbers.calls.items():
                calls.add_metric([*of, outcome], count)
            for result, count in (("hit", numbers.hits), ("asked", numbers.asked), ("left", numbers.left)):
                keys.add_metric([*of, result], count)
            batches.add_metric(of, *numbers.batch_keys.read())
            seconds.add_metric(of, *numbers.seconds.read())
            breaker.add_metric([*of, numbers.breaker], 1)
        yield from (calls, keys, batches, seconds, breaker)

    def _measures(self) -> Iterable[Metric]:
        """Yield what is measured per batch, and per partition."""
        progress, pipeline = self._progress, self._pipeline
        stages = HistogramMetricFamily(
            "delta_stage_seconds",
            "Time that a batch spent in a stage; stage apply by sink.",
            labels=["pipeline", "stage", "sink"],
        )
        for stage, measured in progress.stages.items():
            if stage != "apply":
                stages.add_metric([pipeline, stage, ""], *measured.read())
        for sink, numbers in progress.sinks.items():
            stages.add_metric([pipeline, "apply", sink], *numbers.seconds.read())
        yield stages
        for name, help_text, histogram in (
            ("delta_batch_changes", "Change events of the log in a batch.", progress.batch_changes),
            (
                "delta_latency_seconds",
                "From a change's commit in the source until every sink has it; a batch counts by its oldest change.",
                progress.latency,
            ),
        ):
            family = HistogramMetricFamily(name, help_text, labels=["pipeline"])
            family.add_metric([pipeline], *histogram.read())
            yield family
        labels = ["pipeline", "topic", "partition"]
        behind = GaugeMetricFamily(
            "delta_partition_lag_records", "Records of a partition that are not in every sink yet.", labels=labels
        )
        since = GaugeMetricFamily(
            "delta_partition_lag_seconds", "How long the oldest of these has been in Kafka, at most.", labels=labels
        )
        for (topic, number), lag in progress.partition_lags.items():
            behind.add_metric([pipeline, topic, str(number)], lag.records)
            if lag.seconds is not None:
                since.add_metric([pipeline, topic, str(number)], lag.seconds)
        yield behind
        yield since


def serve(pipeline: str, progress: Progress, host: str, port: int) -> ThreadingHTTPServer:
    """Serve until `shutdown` is called on what is returned. Port 0: any free one. Raises UsageError: port taken.

    `/healthz` is 200 as long as the process lives and has not failed; `/readyz` when changes flow.
    """
    registry = CollectorRegistry()
    registry.register(ProgressCollector(pipeline, progress))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state, reason = progress.state()
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif path in ("/healthz", "/readyz"):
                good = state in READY if path == "/readyz" else state not in ("failed", "stopped")
                status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
                text = state if reason is None else f"{state}: {redact(reason)}"
                self._answer(status, "text/plain; charset=utf-8", f"{text}\n".encode())
            elif path == "/status":
                self._answer(HTTPStatus.OK, "application/json", json.dumps(progress.document()).encode())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /healthz, /readyz, /status\n")

        def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's signature
            """A scrape every few seconds is no event."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UsageError(f"Port {port} on {host} cannot be used: {error.strerror}.") from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
