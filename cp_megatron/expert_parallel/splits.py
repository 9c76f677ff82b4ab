"""How many rows every rank sends to every other one, known on the host before they are sent.

Shapes: n tokens of this rank, E experts of the layer, K chosen experts of a token, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.collectives import exchange_rows


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The numbers of rows of one layer and one micro batch.

    Attributes:
        sent: rows for each rank, R numbers whose sum is n * K.
        received: rows from each rank for each expert of this rank, R x (E / R).
    """

    sent: tuple[int, ...]
    received: tuple[tuple[int, ...], ...]

    @property
    def from_ranks(self) -> tuple[int, ...]:
        """Rows from each rank."""
        return tuple(map(sum, self.received))

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each expert of this rank."""
        return tuple(map(sum, zip(*self.received, strict=True)))


def count_rows(experts: Tensor, num_experts: int, group: ProcessGroup | None) -> Splits:
    """Tells the other ranks how many rows this rank has for each of their experts.

    It sends 8 bytes per expert, and the host waits for the device once.

    Args:
        experts: int64 [n, K], the experts of this rank's tokens.
        num_experts: E; each rank holds E / R of them, in the order of ranks.
        group: the ranks that share the experts; None is one rank.
    """
    ranks = 1 if group is None else group.size()
    assert num_experts % ranks == 0, f"{num_experts} experts on {ranks} ranks"
    chosen = experts.flatten()
    mine = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    mine.scatter_add_(0, chosen, torch.ones_like(chosen))
    own = [num_experts // ranks] * ranks
    both = torch.stack([mine, exchange_rows(mine, own, own, group)])
    sent, received = both.view(2, ranks, -1).tolist()  # [2, E] -> [2, R, E / R]
    return Splits(sent=tuple(map(sum, sent)), received=tuple(map(tuple, received)))
