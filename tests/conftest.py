"""Settings of all tests: examples have no deadline, and the pool of ranks ends with the session."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from tests.ranks import stop_pool

# Without a GPU, Triton interprets kernels. Its own functions are made for that when it is imported,
# which torch.compile may do before any test of a kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The time of an example depends more on the load of the machine than on the code. The examples are
# the same every time, so that a failure in CI repeats; --hypothesis-profile search draws new ones.
settings.register_profile("project", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("project")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the processes of the pool."""
    stop_pool()
