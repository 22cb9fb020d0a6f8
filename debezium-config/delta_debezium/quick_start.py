"""Quick starts of Debezium Server: what a start makes of its classes is recorded once (an AOT cache, JEP 514).

A takeover waits for a start, and half of one is classes that are read and linked. They belong to one Java and one class
path; a JVM ignores a cache that does not fit, so nothing depends on it.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from delta_debezium.distribution import HEAP_MB, Distribution
from delta_sync.maven import Report

TIMEOUT_S = 300.0  # some ten seconds of CPU time, on a machine that may have other things to do

# A start that goes as far as it can without anything to connect to: the connector, the producer and the converter are
# made, the connector finds no database, and the server ends.
_NOTHING = "127.0.0.1:1"
_PROPERTIES = f"""\
quarkus.http.host-enabled=false
quarkus.log.console.json.enabled=false
debezium.sink.type=kafka
debezium.sink.kafka.producer.bootstrap.servers={_NOTHING}
debezium.sink.kafka.producer.key.serializer=org.apache.kafka.common.serialization.ByteArraySerializer
debezium.sink.kafka.producer.value.serializer=org.apache.kafka.common.serialization.ByteArraySerializer
debezium.sink.kafka.producer.compression.type=lz4
debezium.format.key=avro
debezium.format.value=avro
debezium.format.header=json
debezium.format.apicurio.registry.url=http://{_NOTHING}/apis/registry/v3
debezium.format.apicurio.registry.auto-register=true
debezium.format.apicurio.registry.headers.enabled=false
debezium.transforms=epoch
debezium.transforms.epoch.type=org.apache.kafka.connect.transforms.InsertHeader
debezium.transforms.epoch.header=delta.epoch
debezium.transforms.epoch.value.literal=1
debezium.source.connector.class=io.debezium.connector.postgresql.PostgresConnector
debezium.source.topic.prefix=recording
debezium.source.plugin.name=pgoutput
debezium.source.snapshot.mode=no_data
debezium.source.offset.storage=org.apache.kafka.connect.storage.FileOffsetBackingStore
debezium.source.offset.storage.file.filename=offsets.dat
debezium.source.database.hostname=127.0.0.1
debezium.source.database.port=1
debezium.source.database.user=nobody
debezium.source.database.password=none
debezium.source.database.dbname=none
"""


def record(distribution: Distribution, report: Report) -> None:
    """Record a start, unless that is done already or cannot be done here: then starts take as long as they do."""
    cache = distribution.start_cache
    if cache is None or cache.exists() or not os.access(cache.parent, os.W_OK):
        return
    report("recording a start of Debezium Server, once: later ones take half the time")
    with tempfile.TemporaryDirectory(prefix=".recording-", dir=cache.parent) as scratch:
        folder, recorded = Path(scratch), Path(scratch) / cache.name
        (folder / "config").mkdir()
        (folder / "config" / "application.properties").write_text(_PROPERTIES, encoding="ascii")
        with (folder / "log").open("wb") as log:
            try:
                subprocess.run(  # noqa: S603 -- the command is ours
                    distribution.command(HEAP_MB, f"-XX:AOTCacheOutput={recorded}"),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    timeout=TIMEOUT_S,
                    check=False,  # Debezium Server ends with 0 whatever happened
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                report(f"starts stay as they are: {error}")
        if recorded.exists():
            recorded.replace(cache)
