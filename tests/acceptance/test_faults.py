"""One fault at a time, with what it must lead to: `deltactl` as a process, real servers."""

from __future__ import annotations

from collections.abc import Callable

from acceptance.harness import SHAPES, Scene

ACCOUNT = SHAPES[0]


def test_everything_arrives(scene: Callable[..., Scene]) -> None:
    it = scene(50, ("cache", "docs"))
    run = it.run()
    with it.shop.connect() as connection:
        for shape in SHAPES:
            with connection.transaction():
                it.shop.update(connection, shape, 1, "changed", whole=True)
                it.shop.update(connection, shape, 2, "changed", whole=False)
                it.shop.delete(connection, shape, 3)
                it.shop.change_key(connection, shape, 4, 1004)
                it.shop.insert(connection, shape, 3, "again")
    it.pipeline.wait_until_confirmed(it.shop.insert_lsn(), run)
    assert it.stores.differences() == []
    assert it.pipeline.dead_letters() == []
    assert run.stop() == 0
