"""Counts what a rank sends: every collective and message, as it reaches the process group.

Collectives count as the ring algorithms send them on n ranks: all-reduce 2 (n-1)/n of the tensor,
all-gather n-1 times the rank's part, reduce-scatter (n-1)/n of the whole tensor.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """A context in which ``sent`` counts bytes by kind of message."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__.strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        ranks = next((_size(x) for x in args if isinstance(x, torch.ScriptObject)), 1)
        given = [_bytes(x) for x in args if isinstance(x, Tensor | list)]
        if name == "send":
            self.sent["send"] += given[0]
        elif name.startswith("allreduce"):
            self.sent["all_reduce"] += 2 * (ranks - 1) * given[0] // ranks
        elif name.startswith("allgather"):
            self.sent["all_gather"] += (ranks - 1) * given[1]
        elif name.startswith("reduce_scatter"):
            self.sent["reduce_scatter"] += (ranks - 1) * given[1] // ranks
        elif name.startswith("alltoall"):
            self.sent["all_to_all"] += (ranks - 1) * given[1] // ranks
        elif name not in ("recv", "barrier", "monitored_barrier"):
            raise AssertionError(f"c10d.{name} is not counted yet")


def _size(group: torch.ScriptObject) -> int:
    try:
        return dist.ProcessGroup.unbox(group).size()
    except RuntimeError:  # the operator of a reduction, say
        return 1


def _bytes(x: Tensor | list[Any]) -> int:
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    return sum(_bytes(part) for part in x if isinstance(part, Tensor | list))
