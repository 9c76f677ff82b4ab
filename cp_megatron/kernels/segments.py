"""The lengths of tiles that a kernel computes in one call, on the host and on the device.

Shapes: B = batch, N = tiles. Such kernels take tokens of all rows of the batch one after the other,
and where each tile begins and the last one ends, int32 [B * N + 1] on the device. For two rows of
the batch and tiles of 1 and 3 rows:

    0 1 4 5 8
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from cp_megatron.plan.joining import TileRun

T = TypeVar("T")


class Lengths(NamedTuple):
    """Edges of the tiles' rows and columns, int32 [B * N + 1], and upper bounds of their sizes."""

    q_edges: Tensor
    k_edges: Tensor
    max_q: int
    max_k: int


class Segments:
    """The tiles of a run, and what kernels make of them.

    Layers and passes that run the same plan share it, so it is made once for each plan.

    Attributes:
        run: the tiles.
        longest: the most rows and the most columns of a tile.
    """

    def __init__(self, run: TileRun) -> None:
        self._q_sizes = [tile.q1 - tile.q0 for tile in run.tiles]
        self._k_sizes = [tile.k1 - tile.k0 for tile in run.tiles]
        self.run = run
        self.longest = max(self._q_sizes), max(self._k_sizes)
        self._made: dict[object, Any] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Returns what ``make`` returned when it was first called with this key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def lengths(self, batch: int, device: torch.device) -> Lengths:
        """The edges on ``device`` for ``batch`` rows; copying them does not wait for the device."""

        def make() -> Lengths:
            q_edges, k_edges = (
                _edges(sizes * batch, device) for sizes in (self._q_sizes, self._k_sizes)
            )
            # If no tile had two rows, FlashAttention 2 would let query heads take the place of
            # rows, and the lse would have another layout.
            return Lengths(q_edges, k_edges, max(self.longest[0], 2), self.longest[1])

        return self.once((batch, device), make)


def _edges(sizes: Sequence[int], device: torch.device) -> Tensor:
    edges = torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32)
    if device.type == "cuda":
        edges = edges.pin_memory()
    return edges.to(device, non_blocking=True)
