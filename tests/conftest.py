"""What every test shares: examples have no deadline, the pool of ranks ends with the session."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.ranks import stop_pool

# How long an example takes says more about the machine's other work than about the code. The same
# examples every time: what fails in CI fails here; --hypothesis-profile search draws new ones.
settings.register_profile("project", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("project")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """No process of the pool outlives the tests."""
    stop_pool()
