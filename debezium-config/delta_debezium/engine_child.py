"""The child process: the JVM with the Debezium Engine. See `frames` for what crosses the pipes.

Run as `python -m delta_debezium.engine_child FRAMES_FD HEAP_MB`. The main thread starts the JVM (a JVM that another
thread started hangs at exit) and then waits for confirmations; the engine runs in a thread of Java's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections import deque
from typing import Any, BinaryIO, NamedTuple

import jpype

from delta_debezium import engine_start
from delta_debezium.frames import BATCH, CONFIRMATION, FAILURE, FRAME, LENGTH

MAX_IN_FLIGHT = 8  # unconfirmed batches: enough for the worker to decode one, apply some and have the next at hand
MAX_IN_FLIGHT_BYTES = (
    32 << 20
)  # and no more than this, beside the first: what the worker may have to hold several times
PR_SET_PDEATHSIG = 1


class Unconfirmed(NamedTuple):
    """A batch that was handed over: what marks it as processed."""

    sequence: int
    size_bytes: int
    last_record: Any
    committer: Any


class Bridge:
    """The engine's consumer: joins each batch on the Java side, hands it over, and marks what the worker confirms."""

    def __init__(self, frames: BinaryIO, places: Places | None = None) -> None:
        self._frames = frames
        self._places = places
        self._lock = threading.Condition()
        self._unconfirmed: deque[Unconfirmed] = deque()
        self._sequence = 0
        self._values, self._joining, self._utf8 = _java_helpers()

    def handle_batch(self, records: Any, committer: Any) -> None:
        """Called by the engine with a `List<ChangeEvent>`. One crossing for all: a call per record costs 15 µs."""
        joined = records.stream().map(self._values).collect(self._joining)
        payload = memoryview(joined.getBytes(self._utf8))
        with self._lock:
            self._sequence += 1
            last_record = records.get(records.size() - 1)
            self._unconfirmed.append(Unconfirmed(self._sequence, len(payload), last_record, committer))
            place = b"" if self._places is None else self._places.behind(last_record)
            self._send(BATCH, self._sequence, records.size(), payload, place)
            self._lock.wait_for(self._has_room)

    def _has_room(self) -> bool:
        size_bytes = sum(batch.size_bytes for batch in self._unconfirmed)
        return len(self._unconfirmed) < MAX_IN_FLIGHT and size_bytes < MAX_IN_FLIGHT_BYTES

    def confirm(self, sequence: int) -> None:
        """Mark everything up to a batch as processed. The last record's mark includes those before it."""
        with self._lock:
            newest = None
            while self._unconfirmed and self._unconfirmed[0].sequence <= sequence:
                newest = self._unconfirmed.popleft()
            if newest is not None:
                newest.committer.markProcessed(newest.last_record)
                newest.committer.markBatchFinished()
            self._lock.notify_all()

    def completed(self, success: Any, message: Any, error: Any) -> None:
        """Called by the engine when it ends, by itself or by a failure: without it this process has nothing to do."""
        if not success:
            self._send(FAILURE, 0, 0, str(error or message or "no reason given").encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if success else 1)

    def _send(self, kind: bytes, sequence: int, count: int, payload: bytes | memoryview, place: bytes = b"") -> None:
        try:
            self._frames.write(FRAME.pack(kind, sequence, count, len(payload), len(place)))
            self._frames.write(payload)
            self._frames.write(place)
            self._frames.flush()
        except BrokenPipeError:
            os._exit(0)  # the worker is gone: whoever reads next starts behind what was confirmed


class Places:
    """Where the connector goes on, where the source does not keep it: in the words in which Debezium stores it."""

    def __init__(self, name: str) -> None:
        """`name` is the engine's, under which it stores its offsets."""
        self._name = name
        self._converter = java("org.apache.kafka.connect.json.JsonConverter")()
        self._converter.configure(java("java.util.Map").of("schemas.enable", "false"), False)
        # The client of the binary log says each time it connects what it does; kept, or Java forgets its level.
        self._client_log = java("java.util.logging.Logger").getLogger("com.github.shyiko.mysql.binlog")
        self._client_log.setLevel(java("java.util.logging.Level").WARNING)

    def behind(self, record: Any) -> bytes:
        """Return the place behind a ChangeEvent."""
        source = record.sourceRecord()
        key = java("java.util.ArrayList")(2)
        key.add(self._name)
        key.add(source.sourcePartition())
        return json.dumps([self._text(key), self._text(source.sourceOffset())]).encode()

    def _text(self, value: Any) -> str:
        return bytes(memoryview(self._converter.fromConnectData("", None, value))).decode()

    def store(self, place: str | None, file: str) -> None:
        """Write the file from which the engine reads where to go on. What it writes there itself nobody reads."""
        stored = java("java.util.HashMap")()
        if place is not None:
            key, value = (java("java.lang.String")(text).getBytes("UTF-8") for text in json.loads(place))
            stored.put(key, value)
        output = java("java.io.ObjectOutputStream")(java("java.io.FileOutputStream")(file))
        output.writeObject(stored)
        output.close()


def _java_helpers() -> tuple[Any, Any, Any]:
    """Return Java objects that turn a stream of ChangeEvents into one JSON array, without a compiled class of ours."""
    event_class = java("io.debezium.engine.ChangeEvent").class_
    object_class = java("java.lang.Object").class_
    signature = java("java.lang.invoke.MethodType").methodType(object_class)
    value = java("java.lang.invoke.MethodHandles").publicLookup().findVirtual(event_class, "value", signature)
    function_class = java("java.util.function.Function").class_
    values = java("java.lang.invoke.MethodHandleProxies").asInterfaceInstance(function_class, value)
    joining = java("java.util.stream.Collectors").joining(",", "[", "]")
    return values, joining, java("java.nio.charset.StandardCharsets").UTF_8


def java(name: str) -> Any:
    """Return a Java class."""
    jvm: Any = jpype  # its types do not say what Java's are
    return jvm.JClass(name)


def build_engine(properties: dict[str, str], bridge: Bridge) -> Any:
    """Return an engine, which is Java's Runnable, with this configuration (Debezium's names)."""
    engine_class = java("io.debezium.engine.DebeziumEngine")
    settings = java("java.util.Properties")()
    for name, value in properties.items():
        settings.setProperty(name, value)
    json_format = java("io.debezium.engine.format.Json").class_
    jvm: Any = jpype
    consumer = jvm.JProxy("io.debezium.engine.DebeziumEngine$ChangeConsumer", dict={"handleBatch": bridge.handle_batch})
    completion = jvm.JProxy("io.debezium.engine.DebeziumEngine$CompletionCallback", dict={"handle": bridge.completed})
    at_once = java("io.debezium.engine.spi.OffsetCommitPolicy").always()  # a wall clock set back would stop a timed one
    builder = engine_class.create(json_format).using(settings).using(at_once)
    return builder.notifying(consumer).using(completion).build()


def _read_exactly(stream: BinaryIO, length: int) -> bytes | None:
    data = stream.read(length)
    return data if len(data) == length else None


def main() -> None:
    """Run until the worker closes the pipe, the engine ends, or the worker dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    frames = os.fdopen(int(sys.argv[1]), "wb")
    commands = sys.stdin.buffer
    header = _read_exactly(commands, LENGTH.size)
    configuration = _read_exactly(commands, LENGTH.unpack(header)[0]) if header else None
    if configuration is None:
        return
    engine_start.start_jvm(int(sys.argv[2]), *engine_start.quick_start_options())
    told = json.loads(configuration)
    properties, places = told["properties"], None
    if "place" in told:
        places = Places(properties["name"])
        places.store(told["place"], properties["offset.storage.file.filename"])
    bridge = Bridge(frames, places)
    engine = build_engine(properties, bridge)
    java("java.util.concurrent.Executors").newSingleThreadExecutor().execute(engine)
    while (confirmation := _read_exactly(commands, CONFIRMATION.size)) is not None:
        bridge.confirm(CONFIRMATION.unpack(confirmation)[0])
    engine.close()
    os._exit(0)  # a live Java executor would keep the interpreter from ending


if __name__ == "__main__":
    main()
