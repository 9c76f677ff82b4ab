"""What every test shares: the pool of ranks ends with the session."""

from __future__ import annotations

import pytest

from tests.ranks import stop_pool


def pytest_sessionfinish(session: pytest.Session) -> None:
    """No process of the pool outlives the tests."""
    stop_pool()
