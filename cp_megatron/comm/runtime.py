"""Parses the launcher's environment variables, which no other module does; it needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among its peers.

    Attributes:
        rank: the number of this process over all nodes.
        local_rank: the number of this process on its node.
        world_size: the number of processes over all nodes.
        local_world_size: the number of processes on this node.
        under_torchrun: whether a launcher set the variables; otherwise this is plain ``python``.
        restarts: how many times the launcher has restarted the ranks after a failure.
        fault: a fault to inject, for tests; see ``faults/inject.py``.
        master: the host through which the ranks meet, by a name that all of them know.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    under_torchrun: bool = False
    restarts: int = 0
    fault: str = ""
    master: str = "localhost"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Launch:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them.

        Also reads MASTER_ADDR, TORCHELASTIC_RESTART_COUNT, and CPM_FAULT, which tests set. Without
        both RANK and WORLD_SIZE this is a plain ``python`` run of one rank. If a launcher sets only
        these two, all ranks are on one node.

        Raises:
            ConfigError: a variable is not a number, or the numbers contradict each other.
        """
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return cls(fault=environ.get("CPM_FAULT", ""))
        world_size = _number(environ, "WORLD_SIZE", 1)
        rank = _number(environ, "RANK", 0)
        local_world_size = _number(environ, "LOCAL_WORLD_SIZE", 1, world_size)
        local_rank = _number(environ, "LOCAL_RANK", 0, rank % local_world_size)
        if rank >= world_size:
            raise ConfigError("RANK", rank, f"must be below WORLD_SIZE = {world_size}", "torchrun")
        if local_rank >= local_world_size:
            rule = f"must be below LOCAL_WORLD_SIZE = {local_world_size}"
            raise ConfigError("LOCAL_RANK", local_rank, rule, "torchrun")
        return cls(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
            under_torchrun=True,
            restarts=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
            fault=environ.get("CPM_FAULT", ""),
            master=environ.get("MASTER_ADDR", "localhost"),
        )

    @property
    def nodes(self) -> int:
        """The number of nodes, assuming that all have as many processes as this one."""
        return max(1, self.world_size // self.local_world_size)


def set_cublas_workspace() -> None:
    """Makes cuBLAS deterministic, unless the user configured it; torch requires the setting.

    It must be called before the first product on CUDA. The value means 8 buffers of 4 MiB, the
    larger one of the two in NVIDIA's cuBLAS documentation ("Results reproducibility").
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def record_collectives() -> None:
    """Lets torch record the last collectives for ``comm/flight.py``, unless the user set a number.

    It must be called before the first process group. An entry takes some hundred bytes.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "256")


def _number(environ: Mapping[str, str], name: str, least: int, default: int = 0) -> int:
    text = environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ConfigError(name, text, f"must be a whole number >= {least}", "start with torchrun")
    return int(text)
