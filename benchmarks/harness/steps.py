"""A training step of this project and one of transformers, to be timed and counted.

Both train the same model with AdamW on random tokens, which are the same in every process. On the
CPU they compute in float32; on CUDA weights are float32 and products bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.tensor import DTensor

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.batch import Batch
from cp_megatron.model import ComputeDType, build_model
from cp_megatron.model.compiled_parts import compile_parts
from cp_megatron.pipeline import StageLinks
from cp_megatron.plan import Grid, Mask
from cp_megatron.plan.stages import Stages
from cp_megatron.spec import ModelSpec, keeps_whole_weights, stage_weights
from cp_megatron.tensor_parallel import LossRule
from cp_megatron.train.optimizer import make_optimizer
from cp_megatron.train.step import StepResult, TrainStep
from harness.traffic import Traffic
from tests.allocations import counting_memory, kept_bytes


@dataclass(frozen=True, kw_only=True)
class Job:
    """The model to train, and the grid to train it on.

    Attributes:
        model: the shape of the model.
        vocab_size: the size of its vocabulary.
        tokens: tokens per row.
        rows: rows per step over all ranks; each passes through the model separately.
        grid: the grid of all ranks.
        memory: what is kept for backward, and where.
        device: cpu computes in float32, cuda in bfloat16 with float32 weights.
        document: tokens per document in packed rows; by default a row is one document.
        kernel: the attention kernel of our step.
        compiled: compile the parts of our layers, as ``--compile`` does.
    """

    model: ModelConfig
    vocab_size: int
    tokens: int
    rows: int = 1
    grid: Grid = field(default_factory=lambda: Grid(dp=1, cp=1, tp=1))
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    device: Literal["cpu", "cuda"] = "cpu"
    document: int | None = None
    kernel: str = "auto"
    compiled: bool = False

    @property
    def mask(self) -> Mask:
        """The mask of a row."""
        if self.document is None:
            return Mask.causal(self.tokens)
        whole, rest = divmod(self.tokens, self.document)
        return Mask.documents([self.document] * whole + [rest] * (rest > 0))


def llama_shape(
    *, num_layers: int, hidden: int, ffn: int, heads: int, kv_heads: int
) -> ModelConfig:
    """A model in the style of Llama: the preset llama-1b with other sizes."""
    return replace(
        PRESETS["llama-1b"].model,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
    )


def model_of(num_layers: int, width: int) -> ModelConfig:
    """A model with SmolLM2's proportions and ``width`` heads of 64 channels."""
    return llama_shape(
        num_layers=num_layers,
        hidden=64 * width,
        ffn=512 * width // 3,
        heads=width,
        kv_heads=max(1, width // 3),
    )


def stages_of(job: Job) -> Stages:
    """The layers of each pipeline stage, by their cost."""
    spec = ModelSpec.of(job.model, vocab_size=job.vocab_size, seq_length=job.tokens)
    layers, first, last = stage_weights(spec, job.mask)
    return Stages.split(layers, first=first, last=last, num_stages=job.grid.pp)


class OurStep:
    """A training step of this project with its rows; makes a process group if there is none."""

    def __init__(self, job: Job) -> None:
        if not dist.is_initialized():
            backend = {"cpu": "gloo", "cuda": "nccl"}[job.device]
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        self.job, parallel = job, ParallelConfig(sequence_parallel=job.grid.tp > 1)
        config = Config(
            model=job.model,
            parallel=parallel,
            data=DataConfig(seq_length=job.tokens),
            memory=job.memory,
        )
        has_experts = bool(job.model.expert_layers)
        groups = ParallelGroups.create(job.grid, job.device, has_experts=has_experts)
        dtype: ComputeDType = "bfloat16" if job.device == "cuda" else "float32"
        # On a GPU, drawing a billion numbers on the CPU, as a run does, would take a minute.
        draws = job.device == "cuda"
        model = build_model(
            config,
            groups,
            vocab_size=job.vocab_size,
            dtype=dtype,
            device=job.device,
            initialize=not draws,
            chunks=stages_of(job).of(groups.coordinates.pp),
        )
        if draws:
            draw(model)
        if job.compiled:
            compile_parts(model)
        self.train_step = TrainStep(
            model=model,
            optimizer=make_optimizer(model.parameters(), OptimizerConfig()),
            groups=groups,
            cp=ContextParallel(
                groups.cp, job.mask, exchange="p2p", kernel=job.kernel, check_ranks="once"
            ),
            device=torch.device(job.device),
            seed=0,
            clip_grad=1.0,
            rule=LossRule(chunk_size=job.memory.loss_chunk_size),
            reduces_once=keeps_whole_weights(config, job.grid, model.spec),
            stream_dtype=getattr(torch, dtype),
            links=StageLinks(groups.channels),
        )
        own = job.rows // job.grid.dp
        rows = random_rows(job)[groups.coordinates.dp * own :][:own]
        self.shards = [
            self.train_step.prepare(
                Batch(
                    tokens=row[None, :-1],
                    labels=row[None, 1:],
                    mask=job.mask,
                    first_row=0,
                    row_length=0,
                )
            )
            for row in rows
        ]

    def run(self) -> float:
        """Makes one step and returns its loss."""
        return self.launch().loss

    def launch(self) -> StepResult:
        """Makes one step without reading its results."""
        return self.train_step.run(self.shards, step=0, lr=1e-4)

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank sends in a step, by kind of message."""
        with Traffic() as traffic:
            self.run()
        return dict(traffic.sent)

    def kept(self) -> int:
        """Bytes that autograd keeps for backward of one row: each storage once, no weights. A stage
        of a pipeline keeps as much for each row in flight."""
        model, shard, passes = self.train_step.model, self.shards[0], self.train_step.passes
        x = None
        if not model.chunks[0].has_embedding:
            x = passes.empty_stream(shard).zero_().requires_grad_()
        num_bytes = kept_bytes(model, lambda: passes.forward(shard, x)[0].sum())
        model.zero_grad()
        return num_bytes


def their_model(job: Job, experts: str | None) -> Any:
    """transformers' Llama, or its Qwen3-MoE if the model has experts, with random weights.

    Args:
        job: the shape.
        experts: how a mixture of experts is computed, by transformers' name; None if there is none.
    """
    import transformers

    model = job.model
    shape: dict[str, Any] = {
        "vocab_size": job.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    if experts is None:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    config = transformers.Qwen3MoeConfig(
        **shape,
        head_dim=model.head_dim,
        num_experts=model.num_experts,
        num_experts_per_tok=model.moe_router_topk,
        moe_intermediate_size=model.expert_size,
        norm_topk_prob=True,
        experts_implementation=experts,
    )
    return transformers.Qwen3MoeForCausalLM(config)


class TheirStep:
    """A step of transformers' model of the same shape, with its own gradient checkpointing or none.

    Attention is PyTorch's scaled_dot_product_attention; AdamW is fused, and gradients are clipped.
    """

    def __init__(self, job: Job, *, checkpointing: bool = True, experts: str | None = None) -> None:
        with torch.device(job.device):
            self.model = their_model(job, experts)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.on_cuda = job.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.rows = random_rows(job)[:, :-1].to(job.device)

    def run(self) -> float:
        """Makes one step and returns its loss."""
        total = 0.0
        for row in self.rows:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.on_cuda):
                loss = self.model(input_ids=row[None], labels=row[None]).loss / len(self.rows)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Draws matrices at random and sets vectors, which are the weights of norms, to 1."""
    for parameter in model.parameters():
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held.normal_(std=0.02) if parameter.ndim > 1 else held.fill_(1.0)


def random_rows(job: Job) -> Tensor:
    """Tokens, int64 [rows, tokens + 1], the same in every process."""
    generator = torch.Generator().manual_seed(job.tokens)
    return torch.randint(0, job.vocab_size, (job.rows, job.tokens + 1), generator=generator)


def peak_of(kind: Callable[[Job], Any], job: Job, steps: int = 2) -> int:
    """The most bytes held at once while a trainer is built and makes ``steps`` steps."""
    with counting_memory() as count:
        step = kind(job)
        for _ in range(steps):
            step.run()
        del step
    return count.peak


def peak_of_loss(tokens: int, hidden: int, vocab: int) -> tuple[int, int]:
    """(peak bytes of output layer and loss, forward and backward; float32 bytes of all logits)."""
    from cp_megatron.tensor_parallel import TensorParallel, vocab_parallel_fused_loss

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, hidden, generator=generator).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (1, tokens), generator=generator)
    with counting_memory() as count:
        total, _ = vocab_parallel_fused_loss(
            x, weight, labels, vocab_size=vocab, tp=TensorParallel(), rule=LossRule()
        )
        total.backward()
    return count.peak, 4 * tokens * vocab
