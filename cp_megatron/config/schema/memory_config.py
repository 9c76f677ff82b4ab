"""Settings that trade time for memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cp_megatron.config.schema.ranges import Size

Recompute = Literal["none", "selective", "full"]

CPU_CHUNK, CPU_LOGITS, MOST_CPU_LOGITS = 512, 4 << 20, 64 << 20
"""On the CPU products of 512 rows are as fast as larger ones, and the passes over logits are
fastest while these are in its cache; 256 MiB of float32 are the most."""
CUDA_LOGITS = 512 << 20
"""On a GPU each chunk reads and writes the gradient of the head's weight, so chunks are large: of
128K ids, 1 GiB of bfloat16 holds the logits of 4K tokens."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Which tensors are kept for backward, where, and how many tokens are computed at once."""

    recompute_granularity: Recompute = "none"
    """full keeps one tensor per layer and computes the rest again in backward; selective also keeps
    the results of attention, which is then neither computed nor exchanged again."""
    recompute_keeps_attention: bool = False
    """Full recomputation also keeps each attention's result and log-sum-exp, which are then neither
    computed nor exchanged again."""
    recompute_num_layers: Size | None = None
    """The number of layers to recompute, counted from the first; by default all."""
    mlp_tile_size: Size | None = None
    """Tokens that go through a layer's MLP at once; by default all."""
    loss_chunk_size: Size | None = None
    """Tokens whose logits exist at once; by default as many as have 512M logits on a GPU, and
    elsewhere 512, but as many as have at least 4M and at most 64M logits."""
    cpu_offloading: bool = False
    """Move what full recomputation keeps per layer to the host, and back for backward; with
    --device cpu, to a temporary file."""
    optimizer_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state on the host, and update them there."""
    memory_report: bool = False
    """After the first step, report the predicted and measured memory of each rank by kind."""


def tokens_with_logits(chunk_size: int | None, width: int, *, on_cuda: bool) -> int:
    """The number of tokens whose logits, of ``width`` columns, exist at once."""
    on_cpu = max(CPU_LOGITS // width, min(CPU_CHUNK, MOST_CPU_LOGITS // width))
    return chunk_size or max(1, CUDA_LOGITS // width if on_cuda else on_cpu)
