"""Settings of all tests: examples have no deadline, and the pool of ranks ends with the session."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.ranks import stop_pool

# The time of an example depends more on the load of the machine than on the code. The examples are
# the same every time, so that a failure in CI repeats; --hypothesis-profile search draws new ones.
settings.register_profile("project", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("project")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the processes of the pool."""
    stop_pool()
