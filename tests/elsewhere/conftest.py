"""What acceptance tests share, here too; and a MySQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from acceptance.conftest import pytest_runtest_makereport
from delta_sync.testing.mysql import MySQL

__all__ = ["mysql", "pytest_runtest_makereport"]


@pytest.fixture(scope="session")
def mysql() -> Iterator[MySQL]:
    with MySQL() as server:
        yield server
