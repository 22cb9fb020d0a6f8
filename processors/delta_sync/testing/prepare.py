"""Fetches and compiles the Java servers for tests ahead (`make jars`), and records each one's start (`aot.py`).

python -m delta_sync.testing.prepare
"""

from __future__ import annotations

import sys

from delta_sync.testing import aot, jars
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.processes import ServerError
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import MongoStandIn, OpenSearch

RECORDING_TIMEOUT_S = 300.0  # it takes some five seconds of CPU time, on a machine that may have other things to do


def main() -> None:
    """Fetch and compile what is missing, and record the starts that are not recorded yet."""
    for kind in (Kafka, Apicurio, OpenSearch, MongoStandIn):
        place = jars.archive(kind.name) if kind.name in jars.ARCHIVES else jars.place_of(kind.name)
        if not aot.cache_of(place).exists():
            with aot.recorded(place), kind() as server:
                server.stop(RECORDING_TIMEOUT_S)


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:
        sys.exit(str(error))
