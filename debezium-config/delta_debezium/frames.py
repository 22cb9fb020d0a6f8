"""What crosses the pipes between the worker (`engine`) and its capture (`engine_child`).

Frames are a fixed header and a payload, so that a batch of thousands of events crosses at once:

    child → worker   kind (1 byte) · sequence (8) · count (4) · length (8) · length (4) · payload · place
                     B: a batch, a JSON array of events    F: the engine failed, UTF-8 text
    worker → child   first the configuration: length (8) · JSON; then, for each confirmation, a sequence number (8)
                     end of file: stop

The configuration is an object: `properties`, by Debezium's names; and `place`, if the source keeps none, from which the
engine is to go on, null: the log's end. Then each batch has the place behind it. A place is JSON of two texts, the key
and the value by which Debezium stores it.

Nothing else of Delta is imported by the child, whose start is what a restart waits for.
"""

from __future__ import annotations

import struct

FRAME = struct.Struct(">cQIQI")
CONFIRMATION = struct.Struct(">Q")
LENGTH = struct.Struct(">Q")
BATCH, FAILURE = b"B", b"F"
