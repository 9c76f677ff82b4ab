"""Settings of the grid of ranks and of the attention that runs on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.config.schema.ranges import AxisSize, Range

Exchange = Literal["auto", "p2p", "all_gather", "a2a", "a2a+p2p"]
Route = Literal["auto", "ring", "direct"]
LatentExchange = Literal["auto", "latent", "expanded"]
FsdpReshard = Literal["auto", "always", "never"]
LayoutKind = Literal["auto", "contiguous", "zigzag", "balanced"]
KernelName = Literal[
    "auto",
    "reference",
    "cpu",
    "cuda",
    "cudnn",
    "flash_attn",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is split over ranks; data parallelism uses the ranks that are left."""

    tensor_parallel_size: AxisSize = 1
    """Ranks that share every weight matrix."""
    context_parallel_size: AxisSize = 1
    """Ranks that share every sequence."""
    pipeline_parallel_size: AxisSize = 1
    """Stages of a pipeline, each of which has a part of the layers and of the ranks. Micro batches
    pass through the stages one behind the other (1F1B)."""
    num_virtual_stages_per_pipeline_rank: Annotated[int, Range(1)] | None = None
    """Virtual stages of each stage: runs of layers that are dealt to the stages in turn
    (interleaved 1F1B). Stages wait less, send more messages, and keep more activations. By default
    1."""
    pipeline_model_parallel_layout: str | None = None
    """Which layers each stage has, in Megatron-LM's spelling: E is the embedding, t a layer, L the
    loss, | ends a virtual stage, and x*3 or (xy)*3 repeats, as in E(t|)*3tL. By default layers are
    shared so that stages compute equally long."""
    fsdp_reshard: FsdpReshard = "auto"
    """always frees a layer's gathered weights after each of its passes and reduces gradients after
    each micro batch. never does both once, at the end of a step, which takes fewer messages and
    more memory. auto is never with pipeline stages, and for a model of up to 134 million parameters
    without --optimizer-cpu-offload; otherwise always."""
    data_parallel_replicate_size: AxisSize | Literal["auto"] = "auto"
    """Copies of the model. Weights, gradients and optimizer state are sharded over the ranks of one
    copy (data parallel x context parallel / copies), so that whole weights are gathered from fewer
    and nearer ranks; gradients are then summed over the copies. It must divide the data parallel
    size. auto makes a copy on each node if the ranks and the memory of a node suffice for it."""
    expert_model_parallel_size: AxisSize = 1
    """Ranks that share the experts of a layer, each of which holds whole ones; tokens are sent to
    the ranks of their experts. These are neighbours among all ranks of a copy of the model, or of
    its pipeline stage, so the size must divide their number, and --num-experts. Experts are sharded
    over the other ranks."""
    sequence_parallel: bool = False
    """Also split the residual stream along the sequence over the tensor parallel ranks."""
    cp_comm_type: Exchange = "auto"
    """How keys and values reach the queries: p2p sends each rank the keys it needs (see
    --cp-route), all_gather gathers them at once, a2a exchanges heads for tokens, and a2a+p2p does
    so among neighbours and sends between groups of them; auto chooses the exchange that ranks
    wait for least, given what computing hides, and says why."""
    hierarchical_context_parallel_sizes: tuple[int, int] | None = None
    """Two sizes A P for a2a+p2p or auto. A neighbours exchange heads, and P groups of neighbours
    send keys to each other; A x P must be the context parallel size."""
    cp_route: Route = "auto"
    """p2p and a2a+p2p get keys from the neighbour (ring) or from their owner (direct); auto chooses
    the route that moves the fewest keys."""
    cp_message_parts: Annotated[int, Range(1)] | None = None
    """p2p and a2a+p2p send each message in so many parts, each with some of the key/value heads, so
    that the first parts are computed while the others are under way. By default it is one part,
    or up to four where computing would not hide messages (see --cp-network-rate)."""
    cp_network_rate: Annotated[float, Range(0, open_low=True)] = 50.0
    """GB/s that a rank receives from other ranks, for the choice of --cp-comm-type auto and of
    --cp-message-parts. It is not measured. For float32 give half of it."""
    cp_attention_rate: Annotated[float, Range(0, open_low=True)] = 400.0
    """TFLOP/s at which a rank computes attention, for the same choices."""
    cp_latent_exchange: LatentExchange = "auto"
    """Under --multi-latent-attention, p2p and all_gather send latents, which their readers expand
    (latent), or keys and values (expanded); auto sends whichever takes fewer bytes."""
    cp_layout: LayoutKind = "auto"
    """Which rank holds which part of a row: zigzag balances causal attention, balanced balances
    packed documents; auto chooses between the two."""
    cp_check_ranks: bool = True
    """Before the first attention with a new mask, compare mask and shapes between the ranks (one
    small message), so that a mistake ends the run instead of hanging it."""
    kernel: KernelName = "auto"
    """The attention kernel of one device; auto chooses by device and dtype and says why.
    Recurrences choose a kernel of their own, unless this is reference."""
    kernel_benchmark: bool = False
    """Before the first step, time every attention kernel that fits on the run's first rows, and
    take the fastest instead of what auto chooses by a table; the start table shows the times."""
    distributed_timeout_minutes: Annotated[float, Range(0.01, 525_600)] = 10.0
    """Minutes after which a waiting collective ends the run."""
