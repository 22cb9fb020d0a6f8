"""What a running pipeline shows over HTTP (`/metrics`, `/healthz`, `/readyz`, `/status`) and takes (`/notices`)."""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from delta_sync.errors import Transient, UsageError
from delta_sync.notices import BYTES_MOST, NoticeIntake
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
            (
                "delta_processor_timeouts",
                "Changes on which processor.py took too long, and was ended.",
                progress.processor_timeouts(),
            ),
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
        notices = CounterMetricFamily(
            "delta_notices",
            "Notices that a look-up's answers have changed, by origin (http, kafka) and what became of them.",
            labels=["pipeline", "origin", "outcome"],
        )
        for (origin, outcome), count in dict(self._progress.notices).items():
            notices.add_metric([self._pipeline, origin, outcome], count)
        yield notices
        ages = GaugeMetricFamily(
            "delta_enrichment_age_seconds",
            "How long ago a table's oldest enrichment was made, at most, of look-ups with refresh_after.",
            labels=["pipeline", "table"],
        )
        for table, age_s in self._progress.enrichment_ages_s.items():
            ages.add_metric([self._pipeline, table], age_s)
        yield ages

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


NOTICES = "/notices"
CLIENT_S = 30.0  # without a byte: a client that stops in the midst of a notice does not keep its thread
AT_ONCE = 2  # notices that are read and parsed: each may take some ten times its bytes
DISCARDED_MOST = 64 << 20
BUSY_S = 2  # then a state store that was locked, or a pipeline that was starting, may do


class Answered(NamedTuple):
    """The answer to a request: `said` is its JSON."""

    status: HTTPStatus
    said: Mapping[str, Any]
    headers: Mapping[str, str] = MappingProxyType({})
    body_read: bool = True


class NoticeDoor:
    """`POST /notices`: who may send notices, and what each is told. `token` is the secret itself."""

    def __init__(self, token: str, intake: NoticeIntake) -> None:
        self._token = token.encode()
        self._intake = intake
        self._room = threading.BoundedSemaphore(AT_ONCE)

    def take(self, authorization: str | None, length: str | None, read: Callable[[int], bytes]) -> Answered:
        """Take the notice that `read` returns. 202 means that it is in the state store, and nothing else does."""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            told = {"WWW_Authenticate": "Bearer"}
            said = "Send `Authorization: Bearer …` with the token that notices.token of pipeline.yaml names."
            return _refused(HTTPStatus.UNAUTHORIZED, said, told, body_read=False)
        if length is None or not length.isdigit():
            return _refused(HTTPStatus.LENGTH_REQUIRED, "Send Content-Length: chunks are not taken.", body_read=False)
        if int(length) > BYTES_MOST:
            said = f"A notice has {BYTES_MOST >> 20} MiB at most; send several."
            return _refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, said, body_read=False)
        if not self._room.acquire(timeout=BUSY_S):
            return _busy("Other notices are being taken.", body_read=False)
        try:
            body = read(int(length))
            if len(body) < int(length):
                return _refused(HTTPStatus.BAD_REQUEST, "The notice ends before its Content-Length.")
            ids, refused = self._intake.take("http", [body])
        except Transient as error:
            return _busy(redact(str(error)))
        finally:
            self._room.release()
        if refused:
            return _refused(HTTPStatus.BAD_REQUEST, redact(refused[0].reason))
        return Answered(HTTPStatus.ACCEPTED, {"notice": ids[0]})


def _refused(
    status: HTTPStatus, said: str, headers: Mapping[str, str] = MappingProxyType({}), *, body_read: bool = True
) -> Answered:
    return Answered(status, {"error": said}, headers, body_read)


def _busy(said: str, *, body_read: bool = True) -> Answered:
    return _refused(HTTPStatus.SERVICE_UNAVAILABLE, said, {"Retry_After": str(BUSY_S)}, body_read=body_read)


def serve(
    pipeline: str, progress: Progress, host: str, port: int, door: NoticeDoor | None = None
) -> ThreadingHTTPServer:
    """Serve until `shutdown` is called on what is returned. Port 0: any free one. Raises UsageError: port taken.

    `/healthz` is 200 as long as the process lives and has not failed; `/readyz` when changes flow. `door` is what
    `POST /notices` leads to.
    """
    registry = CollectorRegistry()
    registry.register(ProgressCollector(pipeline, progress))

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_S

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
            elif path == NOTICES:
                self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"Notices are sent by POST.\n", Allow="POST")
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /healthz, /readyz, /status, /notices\n")

        def do_POST(self) -> None:
            """Take a notice: 202 once it is in the state store."""
            if door is None or self.path.partition("?")[0] != NOTICES:
                self._discard()
                text = b"There is nothing to POST here; notices.token in pipeline.yaml opens /notices.\n"
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", text)
                return
            answer = door.take(self.headers.get("Authorization"), self.headers.get("Content-Length"), self.rfile.read)
            if not answer.body_read:
                self._discard()
            self._answer(answer.status, "application/json", json.dumps(answer.said).encode() + b"\n", **answer.headers)

        def _discard(self) -> None:
            """Read what is not wanted, up to a bound: a client that is still sending sees no answer."""
            length = self.headers.get("Content-Length", "")
            rest = min(int(length), DISCARDED_MOST) if length.isdigit() else 0
            while rest > 0 and (some := self.rfile.read(min(rest, 1 << 16))):
                rest -= len(some)

        def _answer(self, status: HTTPStatus, content_type: str, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
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
