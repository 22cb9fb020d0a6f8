"""What Debezium makes of a MariaDB's log, delivered to a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson

from delta_debezium.distribution import distribution
from delta_debezium.properties import expression_literal, properties_text
from delta_debezium.render import SOURCE_PREFIX, connector_config, engine_options
from delta_debezium.server import DebeziumServer
from delta_sync.secrets import resolve
from delta_sync.sources.mysql.claims import event_position
from delta_sync.sources.mysql.connection import Session
from delta_sync.sources.mysql.reader import MariaReader
from delta_sync.spec import PipelineSpec
from delta_sync.testing.processes import wait_until

ARRIVES_S = 240.0  # a start takes five seconds, on a busy machine minutes
Event = dict[str, Any]


class Log:
    """A Debezium Server that delivers to a list of events, by HTTP."""

    def __init__(self, folder: Path, spec: PipelineSpec, reader: MariaReader) -> None:
        self.events: list[Event] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.server = DebeziumServer(folder / "server", distribution(print))
        tables = reader.tables(list(spec.tables))
        source = connector_config(spec, tables, str(folder))
        source |= {o.name: o.value for o in engine_options(spec, str(folder)) if o.name.startswith("offset.")}
        entries = {f"{SOURCE_PREFIX}{name}": expression_literal(resolve(value)) for name, value in source.items()}
        entries |= {
            "quarkus.http.host-enabled": "false",
            "quarkus.log.console.json.enabled": "false",
            "debezium.sink.type": "http",
            "debezium.sink.http.url": f"http://127.0.0.1:{self._http.server_port}/",
            "debezium.format.value": "json",
            "debezium.format.value.schemas.enable": "false",
        }
        self.server.start(properties_text(entries), {})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        log = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                event = orjson.loads(body)
                if "op" in event:  # or it is a heartbeat
                    log.events.append(event)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        return Handler

    def wait_for(self, id_: int, op: str) -> Event:
        def found() -> list[Event]:
            assert self.server.alive, self.server.last_words()
            return [e for e in self.events if (e["after"] or e["before"])["id"] == id_ and e["op"] == op]

        wait_until(lambda: bool(found()), ARRIVES_S, f"the event {op} of {id_}")
        return found()[0]

    def until(self, is_last: Callable[[Event], bool]) -> list[Event]:
        """Take all events up to one, as the worker has them: with the position, and without a transaction's number."""

        def found() -> bool:
            assert self.server.alive, self.server.last_words()
            return any(map(is_last, self.events))

        wait_until(found, ARRIVES_S, "an event")
        end = next(number for number, event in enumerate(self.events) if is_last(event)) + 1
        taken, self.events[:end] = self.events[:end], []
        return [
            {name: event[name] for name in ("op", "before", "after")} | {"source": _source(event)} for event in taken
        ]

    def close(self) -> None:
        self.server.kill()
        self._http.shutdown()
        self._http.server_close()


def execute(session: Session, *statements: str) -> None:
    with session.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def _source(event: Event) -> dict[str, Any]:
    source = event["source"]
    position = event_position(source["file"], source["pos"], source["row"])
    return {"schema": source["db"], "table": source["table"], "lsn": position, "txId": 0, "ts_ms": source["ts_ms"]}
