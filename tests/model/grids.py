"""One training step of a tiny model on any grid, whose results are returned as whole tensors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import Config, DataConfig, MemoryConfig, ModelConfig, ParallelConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.model import Transformer, build_model
from cp_megatron.model.initialize import initial_value
from cp_megatron.plan import Grid, Mask
from cp_megatron.tensor_parallel import LossRule, named_specs
from tests.tensor_parallel.test_linear import gathered_cross_entropy

VOCAB = 257
SEQ = 32
ROWS = 2

GPT = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    normalization="RMSNorm",
    swiglu=True,
    position_embedding_type="rope",
    disable_bias_linear=True,
    untie_embeddings_and_output_weights=True,
)
# Tied where Llama is not and the other way round, and biases on heads that tp ranks share.
MIXED = replace(LLAMA, normalization="LayerNorm", disable_bias_linear=False, num_query_groups=1)
# Biases and norms of heads that tp ranks share.
HEADS = replace(LLAMA, add_qkv_bias=True, qk_layernorm=True, num_query_groups=1)
# The styles of BLOCKS have what no other style has, and weights so large that every part matters.
LOUD = replace(LLAMA, init_method_std=0.3, embedding_multiplier=2.0, residual_multiplier=0.7)
SINKS = replace(
    LOUD,
    softmax_type="learnable",
    attn_logit_softcapping=3.0,
    softmax_scale=0.4,
    v_head_dim=6,
    rotary_percent=0.5,
    rotary_interleaved=True,
    window_size=(9, 0),
    window_layers=(1,),
    window_rotary_base=100.0,
    add_attention_output_bias=True,
    norm_placement="both",
)
LATENT = replace(
    LOUD,
    multi_latent_attention=True,
    num_query_groups=None,
    q_lora_rank=10,
    kv_lora_rank=12,
    qk_head_dim=6,
    qk_pos_emb_head_dim=4,
    v_head_dim=5,
    qk_layernorm=True,
    add_qkv_bias=True,
    apply_layernorm_1p=True,
    swiglu=False,
    geglu=True,
    logit_multiplier=0.5,
    final_logit_softcapping=2.0,
)
PARALLEL = replace(
    LOUD,
    softmax_type="off-by-one",
    normalization="LayerNorm",
    norm_bias="residual",
    parallel_residual=True,
    qk_layernorm=True,
    qk_norm_scope="each_head",
    num_query_groups=1,
    query_temperature_beta=0.5,
    original_max_position_embeddings=8,
)
POST = replace(
    LOUD, norm_placement="post", qk_layernorm=True, qk_norm_scope="all_heads", no_rope_layers=(1,)
)
# Fewer key heads than some grids have tp ranks, a gate, and a window beside recurrences.
RECURRENT = replace(
    LOUD,
    num_layers=3,
    linear_attention_layers=(0, 2),
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=6,
    linear_value_head_dim=5,
    linear_conv_kernel_dim=3,
    attention_output_gate=True,
    qk_layernorm=True,
    apply_layernorm_1p=True,
    rotary_percent=0.25,
    window_size=(11, 0),
)
BLOCKS = {
    "sinks": SINKS,
    "latent": LATENT,
    "parallel": PARALLEL,
    "post": POST,
    "recurrent": RECURRENT,
}
STYLES = {
    "gpt": GPT,
    "llama": LLAMA,
    "gpt-untied": replace(GPT, untie_embeddings_and_output_weights=True),
    "llama-tied": replace(LLAMA, untie_embeddings_and_output_weights=False),
    "mixed": MIXED,
    "heads": HEADS,
    **BLOCKS,
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """The results of one step: whole logits [rows, S, padded vocabulary], gradients by name."""

    logits: Tensor
    loss: float
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run_config(
    model: ModelConfig,
    *,
    sequence_parallel: bool = False,
    memory: MemoryConfig | None = None,
) -> Config:
    """A run of the tiny model, whose weights are gathered for each pass as those of a large one."""
    return Config(
        model=model,
        parallel=ParallelConfig(sequence_parallel=sequence_parallel, fsdp_reshard="always"),
        data=DataConfig(seq_length=SEQ),
        memory=memory or MemoryConfig(),
    )


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels [rows, S]; a part of the labels, unevenly spread, does not count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, : SEQ // 2] = -100
    return tokens[:, :-1], labels


def plain_step(config: Config) -> Step:
    """The oracle: one process, ordinary parameters, no group, no DTensor, torch's own loss."""
    model = Transformer(
        config.model, seq_length=SEQ, vocab_size=VOCAB, tp=None, sequence_parallel=False
    ).double()
    with torch.no_grad():
        for owner, name, spec in named_specs(model):
            value = initial_value(spec, config=config.model, seed=config.train.seed)
            owner.get_parameter(name).copy_(value)
    tokens, labels = batch()
    cp = ContextParallel(None, Mask.causal(SEQ), kernel="reference")
    logits = model(tokens, cp=cp)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return Step(
        logits=logits.detach(),
        loss=loss.item(),
        parameters={name: p.detach() for name, p in model.named_parameters()},
        gradients={name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


def grid_step(rank: int, world_size: int, config: Config, grid: Grid) -> Step | None:
    """The same step on a grid of ranks; warnings are errors. Rank 0 returns whole tensors."""
    with no_warnings():
        groups = ParallelGroups.create(grid, "cpu")
        model = build_model(config, groups, vocab_size=VOCAB, dtype="float64", device="cpu")
        parameters = dict(model.named_parameters())
        cp = ContextParallel(groups.cp, Mask.causal(SEQ))
        tokens, labels = (x.chunk(grid.dp)[groups.coordinates.dp] for x in batch())
        valid = int((batch()[1] >= 0).sum())
        logits = model(cp.shard(tokens, 1), cp=cp)
        losses = gathered_cross_entropy(logits, cp.shard(labels, 1), groups.tp)
        loss = losses.sum() / valid
        loss.backward()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total, group=groups.dp_cp)
    whole = cp.gather(all_gather_dim(logits.detach(), -1, groups.tp), 1)
    step = Step(
        logits=all_gather_dim(whole, 0, groups["dp"]),
        loss=total.item(),
        parameters={name: full(p) for name, p in parameters.items()},
        gradients={name: full(p.grad) for name, p in parameters.items() if p.grad is not None},
    )
    return step if rank == 0 else None


def loss_step(
    rank: int, world_size: int, config: Config, grid: Grid, device: str = "cpu"
) -> Step | None:
    """``grid_step`` with the loss in chunks and without logits, as in training."""
    with no_warnings():
        groups = ParallelGroups.create(grid, device)
        model = build_model(config, groups, vocab_size=VOCAB, dtype="float64", device=device)
        cp = ContextParallel(groups.cp, Mask.causal(SEQ))
        own = (x.chunk(grid.dp)[groups.coordinates.dp] for x in batch())
        tokens, labels = (x.to(device) for x in own)
        valid = int((batch()[1] >= 0).sum())
        rule = LossRule(chunk_size=config.memory.loss_chunk_size)
        trained, losses = model(cp.shard(tokens, 1), cp=cp, labels=cp.shard(labels, 1), rule=rule)
        (trained / valid).backward()
        total = losses.sum() / valid
        torch.distributed.all_reduce(total, group=groups.dp_cp)
    parameters = dict(model.named_parameters())
    step = Step(
        logits=torch.empty(0),
        loss=total.item(),
        parameters={},
        gradients={name: full(p.grad) for name, p in parameters.items() if p.grad is not None},
    )
    return step if rank == 0 else None


def full(x: Tensor) -> Tensor:
    """The whole of a DTensor."""
    assert isinstance(x, DTensor)
    return x.detach().full_tensor()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Turns Python warnings and torch's logged ones into errors."""
    logger = logging.getLogger("torch")
    handler = _Refuse(level=logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)


class _Refuse(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(f"torch warned: {record.getMessage()}")


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 error over all tensors, and the name of that tensor.

    A tensor that is zero but for rounding (the key bias: softmax does not see it) is measured
    against all tensors together. A NaN counts as infinite, because ``max`` may pass over it.
    """
    assert actual.keys() == expected.keys()
    total = sum(x.norm().item() ** 2 for x in expected.values()) ** 0.5
    gaps = []
    for name, x in expected.items():
        norm = x.norm().item()
        gap = (actual[name] - x).norm().nan_to_num(nan=torch.inf).item()
        gaps.append((gap / (norm if norm > 1e-12 * total else total), name))
    return max(gaps)


def error(actual: Tensor, expected: Tensor) -> float:
    """The relative L2 error."""
    return ((actual - expected).norm() / expected.norm()).item()
