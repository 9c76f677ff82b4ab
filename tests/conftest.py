"""Settings of all tests: examples have no deadline, and the pool of ranks ends with the session."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import settings

from tests.ranks import stop_pool

# Without a GPU, Triton interprets kernels. Its own functions are made for that when it is imported,
# which torch.compile may do before any test of a kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Ranks and programs that tests start read what was compiled once. Without the cache each of them
# compiles the package again, which takes longer than its import.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The time of an example depends more on the load of the machine than on the code. The examples are
# the same every time, so that a failure in CI repeats; --hypothesis-profile search draws new ones.
settings.register_profile("project", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("project")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the processes of the pool."""
    stop_pool()
