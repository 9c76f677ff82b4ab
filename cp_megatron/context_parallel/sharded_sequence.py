"""Which tokens of a row this rank holds.

Shapes: S = tokens of the whole row, N = ranks.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, SequenceLayout


class ShardedSequence:
    """The rows of a batch, shared by the ranks of a group. The base of ``ContextParallel``.

    Args:
        group: the ranks that share each row, in order; None is one rank without messages.
        mask: the mask of every row of the batch.
        layout: as in ``ContextParallel``.

    Raises:
        ConfigError: the layout does not divide the sequence or is for other ranks.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, mask: Mask, layout: str | SequenceLayout
    ) -> None:
        self.group = group
        self.mask = mask
        self.rank = dist.get_rank(group) if group is not None else 0
        if self.rank < 0:
            raise ConfigError("group", "this process", "must be one of its ranks")
        self.cp_size = dist.get_world_size(group) if group is not None else 1
        self.layout = self._make_layout(layout)

    def _make_layout(self, layout: str | SequenceLayout) -> SequenceLayout:
        if isinstance(layout, str):
            return SequenceLayout.make(self.mask, self.cp_size, layout)
        if layout.cp_size != self.cp_size:
            rule = f"must be for the group's {self.cp_size} ranks"
            raise ConfigError("layout", f"for {layout.cp_size} ranks", rule)
        layout.check(self.mask.seq_len)
        return layout

    @cached_property
    def positions(self) -> Tensor:
        """int64 [S / N]: this rank's positions in the row, never restarting."""
        return torch.from_numpy(self.layout.positions(self.rank))

    @cached_property
    def document_positions(self) -> Tensor:
        """int64 [S / N]: positions counted from the start of each document, as RoPE reads them."""
        return torch.from_numpy(self.mask.document_positions())[self.positions]

    @cached_property
    def _global_order(self) -> Tensor:
        """int64 [S]: the place of each position among the ranks' shards, one after the other."""
        held = [torch.from_numpy(self.layout.positions(rank)) for rank in range(self.cp_size)]
        return torch.cat(held).argsort()

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's part of a whole tensor without a message.

        Args:
            x: dim ``dim`` has length S.
            dim: the sequence dim.

        Returns:
            Dim ``dim`` has length S / N, in local order. The gradient is zero elsewhere.
        """
        self._check_length(x, dim, self.mask.seq_len)
        return x.index_select(dim, self.positions.to(x.device))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Returns the whole tensor, in global order, on every rank.

        Args:
            x: dim ``dim`` has length S / N.
            dim: the sequence dim.

        Returns:
            Dim ``dim`` has length S. The gradient is summed over ranks; each keeps its part.
        """
        self._check_length(x, dim, self.layout.shard_len)
        gathered = all_gather_dim(x, dim, self.group)
        return gathered.index_select(dim, self._global_order.to(x.device))

    def _check_length(self, x: Tensor, dim: int, length: int) -> None:
        if x.shape[dim] != length:
            raise ConfigError("dim", dim, f"has length {x.shape[dim]}, the layout has {length}")
