"""Numbers that the hosts of all ranks tell each other; no device takes part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cp_megatron.comm.nonblocking import start_all_gather


def gather_numbers(mine: Sequence[float], group: dist.ProcessGroup) -> list[list[float]]:
    """Returns the numbers of every rank, by rank. Integers are exact below 2**53.

    Args:
        mine: as many on every rank.
        group: a group of all ranks for CPU tensors. A single rank sends nothing.
    """
    row = torch.tensor([mine], dtype=torch.float64)
    return start_all_gather(row, group).wait().tolist()


def largest(value: int, group: dist.ProcessGroup) -> int:
    """The largest value of all ranks; for the arguments see ``gather_numbers``."""
    return int(max(value for (value,) in gather_numbers([value], group)))
