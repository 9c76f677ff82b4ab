"""``ContextParallel``: the whole engine as one object, five lines in a model of one's own.

Shapes: B batch, S tokens of the whole row, N ranks, H query heads, G key/value heads, D head dim,
E value head dim.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.context_parallel.attention import ring_attention
from cp_megatron.context_parallel.p2p import Ring
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.load import load_kernel
from cp_megatron.kernels.select import KernelChoice, select_kernel
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.schedule import Round


class ContextParallel:
    """A mask and a group of ranks, and what follows from them.

    A group over NCCL is best made with a ``device_id``: a rank whose plan has no message yet takes
    part in none, which a group that connects at its first message would wait for.

    Making one sends no message and allocates nothing, so a new mask for every batch is cheap.
    The objective is the *sum* of the ranks' losses: gradients of parameters must be summed over
    the group, and a loss computed alike on every rank from ``gather`` is divided by its size.

    Args:
        group: the ranks that share each sequence, in order; None is one rank without messages.
        mask: what attends to what, for every row of the batch.
        layout: ``zigzag``, ``contiguous`` or ``auto`` (zigzag where the mask is causal).
        exchange: ``p2p`` or ``auto``.
        kernel: ``reference``, ``cpu``, ``cuda``, ``flash_attn`` or ``auto``.
        route: ``ring`` (from the neighbour), ``direct`` (from the owner) or ``auto`` (ring).
        hierarchical_sizes: none of the exchanges above has a hierarchy; must be None.

    Raises:
        ConfigError: the layout does not divide the sequence, or a name is unknown.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        mask: Mask,
        layout: str = "auto",
        exchange: str = "auto",
        kernel: str = "auto",
        route: str = "auto",
        hierarchical_sizes: tuple[int, int] | None = None,
    ) -> None:
        self.group = group
        self.mask = mask
        self.rank = dist.get_rank(group) if group is not None else 0
        self.cp_size = dist.get_world_size(group) if group is not None else 1
        self._options = (layout, exchange, kernel, route, hierarchical_sizes)
        self.layout = SequenceLayout.make(mask, self.cp_size, layout)
        self.schedule = Schedule.build(
            mask, self.layout, exchange, route, hierarchical_sizes=hierarchical_sizes
        )

    def with_mask(self, mask: Mask) -> ContextParallel:
        """The same ranks and options for another mask."""
        layout, exchange, kernel, route, sizes = self._options
        return ContextParallel(self.group, mask, layout, exchange, kernel, route, sizes)

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """What this rank does, in order."""
        return self.schedule.rounds(self.rank)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [S / N]: this rank's positions in the row, never restarting."""
        return torch.from_numpy(self.layout.positions(self.rank))

    @cached_property
    def document_positions(self) -> Tensor:
        """int64 [S / N]: positions counted from the start of each document, as RoPE reads them."""
        return torch.from_numpy(self.mask.document_positions())[self.positions]

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor; no message.

        Args:
            x: dim ``dim`` has length S.
            dim: the sequence dim.

        Returns:
            Dim ``dim`` has length S / N, in local order. The gradient is zero elsewhere.
        """
        self._check_length(x, dim, self.mask.seq_len)
        return x.index_select(dim, self.positions.to(x.device))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole tensor, in global order, on every rank.

        Args:
            x: dim ``dim`` has length S / N.
            dim: the sequence dim.

        Returns:
            Dim ``dim`` has length S. The gradient is the sum over ranks, each keeping its part.
        """
        self._check_length(x, dim, self.layout.shard_len)
        gathered = all_gather_dim(x, dim, self.group)
        order = [torch.from_numpy(self.layout.positions(rank)) for rank in range(self.cp_size)]
        return gathered.index_select(dim, torch.cat(order).argsort().to(x.device))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks that the mask allows.

        Args:
            q: [B, S / N, H, D].
            k: [B, S / N, G, D]; H is a multiple of G, query head h reads head h // (H / G).
            v: [B, S / N, G, E].
            scale: multiplies the scores, above 0; by default D ** -0.5.

        Returns:
            [B, S / N, H, E] in q's type.

        Raises:
            ConfigError: shapes or types do not fit each other, the layout or the kernel.
        """
        self._check_attention(q, k, v)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if not 0 < scale < math.inf:  # fused kernels mask before they scale
            raise ConfigError("scale", scale, "must be positive and finite")
        choice = self.kernel_choice(q.device.type, q.dtype, max(q.shape[-1], v.shape[-1]))
        ring = Ring(rounds=self.rounds, group=self.group, kernel=load_kernel(choice.name))
        return ring_attention(ring, q, k, v, scale)

    def kernel_choice(self, device: str, dtype: torch.dtype, head_dim: int) -> KernelChoice:
        """The kernel that inputs of this kind get, and why."""
        name = str(dtype).removeprefix("torch.")
        return select_kernel(self._options[2], device=device, dtype=name, head_dim=head_dim)

    def _check_length(self, x: Tensor, dim: int, length: int) -> None:
        if x.shape[dim] != length:
            raise ConfigError("dim", dim, f"has length {x.shape[dim]}, the layout has {length}")

    def _check_attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if not q.ndim == k.ndim == v.ndim == 4:
            raise ConfigError("attention", shapes, "must be [batch, tokens, heads, head_dim]")
        if not q.shape[:2] == k.shape[:2] == v.shape[:2] or k.shape[2] != v.shape[2]:
            raise ConfigError("attention", shapes, "must agree in batch, tokens and kv heads")
        if q.shape[1] != self.layout.shard_len:
            rule = f"tokens must be this rank's {self.layout.shard_len} of {self.mask.seq_len}"
            raise ConfigError("attention", shapes, rule)
        if 0 in (*q.shape, *v.shape):
            raise ConfigError("attention", shapes, "must not be empty")
        if q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
            rule = "query heads must be a multiple of kv heads, and q and k equally wide"
            raise ConfigError("attention", shapes, rule)
        if not q.dtype == k.dtype == v.dtype:
            raise ConfigError("attention", f"{q.dtype}, {k.dtype}, {v.dtype}", "must be one type")
