"""A process as the launcher of a training run sets it up."""

from __future__ import annotations

from cp_megatron.comm.host_heap import keep_freed_memory
from harness.teams import Place


def as_launched(_: Place) -> None:
    """Does to a process on CPUs what the launcher does before it trains."""
    keep_freed_memory()
