"""What every sink must do, as tests. Run them on yours:

    class TestMySink(SinkContract):
        @pytest.fixture
        def sink(self):
            sink = MySink("mine", "mystore://localhost", MyOptions(), tombstone_ttl_s=3600)
            yield sink
            sink.close()

The store must be there and is written to, in places for the tables of the schema `delta_contract` only; each test drops
what it made. Class attributes and methods without `test_` in their name say where a store may differ: override them.
"""

from __future__ import annotations

from delta_sync.testing.contract.contents import Contents
from delta_sync.testing.contract.leftovers import OUTRANKED_BY, Died, Leftovers, dying
from delta_sync.testing.contract.places import Places
from delta_sync.testing.contract.samples import (
    ACTOR,
    AWKWARD_TEXTS,
    DOCUMENTS,
    KEYS_BY_KIND,
    LARGE_BYTES,
    LARGEST_VERSION,
    MOVIE,
    PAGE,
    PART,
    SEAT,
    UNSTORABLE,
    table_of,
)
from delta_sync.testing.contract.scene import AnySink, SecondStep, apply, scanned
from delta_sync.testing.contract.storms import Storm, Storms, check_end, plan_storm, storm
from delta_sync.testing.contract.writes import Writes

__all__ = [
    "ACTOR",
    "AWKWARD_TEXTS",
    "DOCUMENTS",
    "KEYS_BY_KIND",
    "LARGEST_VERSION",
    "LARGE_BYTES",
    "MOVIE",
    "OUTRANKED_BY",
    "PAGE",
    "PART",
    "SEAT",
    "UNSTORABLE",
    "AnySink",
    "Died",
    "SecondStep",
    "SinkContract",
    "Storm",
    "apply",
    "check_end",
    "dying",
    "plan_storm",
    "scanned",
    "storm",
    "table_of",
]


class SinkContract(Storms, Places, Leftovers, Contents, Writes):
    """Subclass it, name the subclass `Test…`, and give the fixture `sink`: an open sink on an empty store.

    It has to say what its `second_step` is: None if each write is compared and written in one step of the store's own.
    """
