"""What counts as a loss of changes, and when Delta begins a new epoch by itself: decisions without any source."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest

from delta_sync import watch
from delta_sync.errors import EpochRose, SlotMissing, SourceBusy
from delta_sync.kafka.delivered import confirmable
from delta_sync.progress import LogPosition, Progress
from delta_sync.samples import SharedSamples
from delta_sync.sources.mysql.position import BinlogPosition
from delta_sync.sources.postgresql.claims import Sample, Samples
from delta_sync.sources.postgresql.reader import PostgresReader, Slot
from delta_sync.sources.reader import Confirmed, SourceIdentity
from delta_sync.spec import PipelineSpec, spec_from
from delta_sync.starting import Seen, check_slot, find_loss, why_not_by_itself
from delta_sync.state import PipelineState, StateStore, TableLoad
from delta_sync.watch import Watch

LOADED = {"public.movie": TableLoad("public.movie", state="done")}


def spec_of(on_lost_log: str = "new_epoch") -> PipelineSpec:
    return spec_from(
        {
            "name": "movies",
            "source": {"url": "postgresql://delta@db/studio", "on_lost_log": on_lost_log},
            "tables": {"public.movie": None},
            "sinks": {"cache": {"url": "redis://cache/0"}},
        },
        "test",
    )


KNOWN = PipelineState("movies", 3, "7", timeline=2, slot_lsn=100)
PLACE = Slot(PostgresReader(spec_of().source, "nobody connects"), spec_of())
SOUND = Seen(SourceIdentity("7", 2), PLACE, Confirmed(150), KNOWN, most=200, end=300)


@pytest.mark.parametrize(
    "seen",
    [
        SOUND,
        SOUND._replace(most=150, end=150),
        SOUND._replace(most=None),
        SOUND._replace(there=None, known=KNOWN._replace(slot_lsn=None)),  # killed before it was made
        SOUND._replace(there=None, known=None),
        SOUND._replace(known=None, most=None),  # the state store is new
        SOUND._replace(there=Confirmed(None)),
    ],
)
def test_no_loss(seen: Seen) -> None:
    assert find_loss(seen) is None


@pytest.mark.parametrize(
    ("seen", "why", "by_itself"),
    [
        (SOUND._replace(identity=SourceIdentity("7", 3)), "on timeline 3, and was on 2", True),
        (SOUND._replace(identity=SourceIdentity("7", 3), there=None), "on timeline 3, and was on 2", True),
        (SOUND._replace(identity=SourceIdentity("7", 1)), "left behind is back", False),
        (SOUND._replace(identity=SourceIdentity("8", 3)), "another server", False),
        (
            SOUND._replace(known=KNOWN._replace(lost="it was reset")),
            "it was reset",
            True,
        ),  # which cannot be seen any more
        (SOUND._replace(there=None), "is gone", True),
        (SOUND._replace(there=Confirmed(150, "the source removed log", overtaken=True)), "removed log", True),
        (
            SOUND._replace(there=Confirmed(150, "the source removed log", overtaken=True), known=None, most=None),
            "removed log",
            True,
        ),
        (SOUND._replace(there=Confirmed(201)), "advanced by hand", True),
        (SOUND._replace(end=199), "copy of its files", True),
        (SOUND._replace(most=None, end=99), "copy of its files", True),
    ],
)
def test_losses(seen: Seen, why: str, by_itself: bool) -> None:
    loss = find_loss(seen)
    assert loss is not None
    assert why in loss.why
    assert (why_not_by_itself(spec_of(), loss, LOADED) is None) is by_itself
    assert why_not_by_itself(spec_of("stop"), loss, LOADED) == "source.on_lost_log is stop"


def test_a_load_that_is_overtaken_again_and_again_is_ended() -> None:
    loss = find_loss(SOUND._replace(there=Confirmed(150, "the source removed log", overtaken=True)))
    assert loss is not None
    loading = {**LOADED, "public.genre": TableLoad("public.genre", state="running")}
    assert "max_slot_wal_keep_size" in (why_not_by_itself(spec_of(), loss, loading) or "")


@pytest.mark.parametrize(
    ("sequence", "confirmed"), [('["90","120"]', 90), ('["120","110"]', 120), ('[null,"120"]', 120), (None, 120)]
)
def test_what_debezium_confirms_after_a_record(sequence: str | None, confirmed: int) -> None:
    assert confirmable({"sequence": sequence, "lsn": 120}) == confirmed


class Reader:
    """A source that has samples and nothing else."""

    def sample(self) -> Sample:
        return Sample(1, 1)

    def fingerprints(self, names: list[str]) -> dict[str, str]:
        return dict.fromkeys(names, "")


@pytest.mark.parametrize("error", [EpochRose("It rose."), SlotMissing("It is gone.")])
def test_the_watch_tells_of_a_loss_once_and_ends(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY_S", 0.0)
    stopping = threading.Event()
    position = LogPosition(lambda: 0.0)
    answers: list[Exception | None] = [None, SourceBusy("It restarts."), error]
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 1.0
        return now_s

    def check() -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    told: list[BaseException] = []
    watching = Watch(
        reader=cast("PostgresReader", Reader()),
        samples=SharedSamples(Samples),
        position=position,
        progress=Progress(position, clock),
        heartbeat_prefix="beat",
        heartbeat_s=None,
        loading=lambda: True,
        fingerprints=dict,
        schema_changed=lambda _: None,
        stopping=stopping,
        check=check,
        failed=told.append,
        clock=clock,
    )
    watching.run()
    assert told == [error]
    assert answers == []


def test_a_log_that_goes_back_is_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows that it began anew may be gone by the next look."""
    monkeypatch.setattr(watch, "SAMPLE_RESTING_S", 0.0)
    stopping = threading.Event()
    position = LogPosition(lambda: 0.0)
    ends = [100, 120, 90]
    told: list[BaseException] = []

    class Restarted(Reader):
        def sample(self) -> Sample:
            return Sample(ends.pop(0), 1)

    def check() -> None:
        raise EpochRose("It was reset.")

    Watch(
        reader=cast("PostgresReader", Restarted()),
        samples=SharedSamples(Samples),
        position=position,
        progress=Progress(position, lambda: 0.0),
        heartbeat_prefix="beat",
        heartbeat_s=None,
        loading=lambda: False,
        fingerprints=dict,
        schema_changed=lambda _: None,
        stopping=stopping,
        check=check,
        failed=told.append,
        clock=lambda: 0.0,  # it is never time to look
    ).run()
    assert [str(error) for error in told] == ["It was reset."]
    assert ends == []


class Place(BinlogPosition):
    """A position of a connector that overwrites it."""

    def __init__(self, there: Confirmed) -> None:
        self.name = "the position"
        self._there = there

    def look(self) -> Confirmed:
        return self._there


class Source:
    """A source of which the connector's position is asked."""

    def __init__(self, there: Confirmed) -> None:
        self.there = there

    def close(self) -> None:
        pass

    def identity(self) -> SourceIdentity:
        return SourceIdentity("7", 2)

    def durable_end(self) -> int:
        return 300

    def capture_position(self, spec: PipelineSpec, state: StateStore) -> BinlogPosition:
        del spec, state
        return Place(self.there)


def test_a_loss_that_can_be_seen_no_more_is_one_all_the_same(tmp_path: Path) -> None:
    """A connector that goes on in a log that began anew overwrites the position that showed it."""
    spec, source = spec_of(), Source(Confirmed(150))
    asked = cast("PostgresReader", source)
    with StateStore.open("sqlite:///state.db", tmp_path) as state:
        state.save_pipeline(KNOWN)
        assert check_slot(spec, asked, state).there == source.there
        source.there = Confirmed(150, "it was reset")
        with pytest.raises(EpochRose, match="it was reset"):
            check_slot(spec, asked, state)
        source.there = Confirmed(150)
        with pytest.raises(EpochRose, match="it was reset"):
            check_slot(spec, asked, state)
        state.save_pipeline(KNOWN._replace(epoch=4))
        assert check_slot(spec, asked, state).there == source.there
