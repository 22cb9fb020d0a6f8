"""`deltactl pipeline delete` that ends half-way: nothing of it may be taken for a pipeline in step."""

from __future__ import annotations

from collections.abc import Callable

from acceptance.harness import PATIENCE_S, Run, Stage
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import MongoStandIn

SETUP = "CREATE TABLE movie (id int PRIMARY KEY, title text); INSERT INTO movie VALUES (1, 'one'), (2, 'two');"


def _loaded(it: Stage) -> Run:
    run = it.run()
    wait_until(it.pipeline.loaded, PATIENCE_S, "the first load")
    it.in_step(run)
    return run


def _documents(it: Stage, sink: str) -> int:
    return sum(len(batch) for batch in it.stores.sinks[sink].scan(it.stores.target(sink, "movie")))


def _delete(it: Stage) -> tuple[int, str]:
    done = it.pipeline.deltactl("pipeline", "delete", it.pipeline.name, "--documents", "--yes")
    return done.returncode, done.stderr


def _slots(it: Stage) -> int:
    with it.source.connect() as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [it.pipeline.slot]
        ).fetchone()
        assert row is not None
        return int(row[0])


def test_a_sink_that_is_dead_keeps_all_from_being_deleted(stage: Callable[..., Stage], mongodb: MongoStandIn) -> None:
    it = stage(SETUP, ["movie"], ("cache", "docs"))
    _loaded(it).stop()
    mongodb.kill()
    status, said = _delete(it)
    assert status == 1
    assert _documents(it, "cache") == 2, "the first sink's documents went, although the second is dead"
    assert "sink docs" in said
    assert "nothing was deleted" in said
    assert it.pipeline.loaded()
    mongodb.start()
    assert _delete(it) == (0, "")
    assert (_documents(it, "cache"), _documents(it, "docs"), _slots(it)) == (0, 0, 0)


def test_a_delete_that_ends_half_way_is_loaded_again_or_deleted_again(stage: Callable[..., Stage]) -> None:
    """The server refuses to drop the publication's slot while somebody reads it: by then the documents are gone."""
    it = stage(SETUP, ["movie"], ("cache", "docs"))
    _loaded(it).stop()
    with it.source.connect() as connection:
        connection.execute(f"CREATE ROLE {it.pipeline.name} LOGIN REPLICATION PASSWORD 'postgres'")
        connection.execute(f"GRANT ALL ON SCHEMA {it.source.schema} TO {it.pipeline.name}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {it.source.schema} TO {it.pipeline.name}")
    file = it.pipeline.home / "pipeline.yaml"
    text = file.read_text()
    # A role that may read and may not drop the publication, which is postgres' own: refused after the documents went.
    file.write_text(text.replace("postgres:$", f"{it.pipeline.name}:$").replace("postgres@", f"{it.pipeline.name}@"))
    assert file.read_text() != text, text
    try:
        status, said = _delete(it)
        assert status == 1
        assert "refuses" in said
        assert _documents(it, "cache") == 0
        assert not it.pipeline.loaded(), "it would go on with a sink that is empty"
        file.write_text(text)
        _loaded(it).stop()  # the slot is gone: a new epoch
        assert (_documents(it, "cache"), _documents(it, "docs")) == (2, 2)
        assert _delete(it) == (0, "")
        _loaded(it)
    finally:
        it.source.execute(f"DROP OWNED BY {it.pipeline.name}; DROP ROLE {it.pipeline.name}")
