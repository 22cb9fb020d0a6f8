"""What acceptance tests share, here too."""

from acceptance.conftest import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]
