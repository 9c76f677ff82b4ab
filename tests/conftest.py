"""Settings of all tests: examples have no deadline, and the pool of ranks ends with the session.

The default tests run in two processes if pytest-xdist is installed. Each of them runs whole files
and has a pool of ranks of its own. A test of one process keeps one core busy, so that the other
core would wait during most tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

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

NUM_PROCESSES = 2


def is_default_run(config: pytest.Config) -> bool:
    """Whether the run is of all default tests, without a debugger and without ``-s``.

    The tests of a GPU share it, slow ones start many processes themselves, and a few files take
    less time than a second process needs to start.
    """
    option = config.option
    is_whole = all(Path(word).resolve() == Path(__file__).parent for word in config.args)
    is_default = "not slow" in option.markexpr and "not gpu" in option.markexpr
    return is_whole and is_default and not option.usepdb and option.capture != "no"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distributes the default run; ``-n`` says another number of processes, ``-n 0`` none.

    Files keep their order, because the last ones of it are short.
    """
    is_worker = hasattr(config, "workerinput")
    if not config.pluginmanager.hasplugin("xdist") or is_worker or not is_default_run(config):
        return
    option = config.option
    if option.numprocesses is None and (os.cpu_count() or 1) >= NUM_PROCESSES:
        option.numprocesses = NUM_PROCESSES
    if option.dist == "no":
        option.dist = "loadfile"
        option.loadscopereorder = False


def pytest_configure(config: pytest.Config) -> None:
    """Gives each process of a distributed run one thread, because it has one core."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the processes of the pool."""
    stop_pool()
