"""Which servers the fixture `stack` starts."""

from __future__ import annotations

import pytest

from delta_sync.testing.stack import SERVICES_VARIABLE, services


def asked() -> bool:
    raise AssertionError("nobody was to ask")


@pytest.mark.parametrize("chosen", ["native", "containers"])
def test_what_was_chosen_is_taken_and_nothing_is_looked_for(chosen: str) -> None:
    assert services({SERVICES_VARIABLE: chosen}, has_wheels=asked, engine_answers=asked) == chosen


def test_nothing_is_pulled_unasked_where_there_are_wheels() -> None:
    assert services({}, has_wheels=lambda: True, engine_answers=asked) == "native"


def test_without_wheels_it_is_the_engine() -> None:
    assert services({SERVICES_VARIABLE: ""}, has_wheels=lambda: False, engine_answers=lambda: True) == "containers"


def test_what_is_missing_is_said() -> None:
    with pytest.raises(pytest.UsageError, match="pip install"):
        services({}, has_wheels=lambda: False, engine_answers=lambda: False)
    with pytest.raises(pytest.UsageError, match="native or containers"):
        services({SERVICES_VARIABLE: "docker"}, has_wheels=asked, engine_answers=asked)
