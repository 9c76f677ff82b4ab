"""A training step of this project, and of transformers, to be timed and counted.

Everybody trains the same model on random tokens, alike in every process, with AdamW: in float32 on
the CPU, on CUDA with weights in float32 and products in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.batch import Batch
from cp_megatron.model import ComputeDType, build_model
from cp_megatron.plan import Grid, Mask
from cp_megatron.tensor_parallel import LossRule
from cp_megatron.train.optimizer import make_optimizer
from cp_megatron.train.step import TrainStep
from harness.traffic import Traffic
from tests.allocations import counting_memory, kept_bytes


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on which grid.

    Attributes:
        model: the model.
        vocab_size: its vocabulary.
        tokens: of a row.
        rows: of a step over all ranks; each goes through the model by itself.
        grid: of all ranks.
        memory: what is kept.
        device: cpu, in float32, or cuda: float32 weights, computed with in bfloat16.
        document: tokens of a document, of which rows are packed; by default a row is one.
    """

    model: ModelConfig
    vocab_size: int
    tokens: int
    rows: int = 1
    grid: Grid = field(default_factory=lambda: Grid(dp=1, cp=1, tp=1))
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    device: Literal["cpu", "cuda"] = "cpu"
    document: int | None = None

    @property
    def mask(self) -> Mask:
        """Of a row."""
        if self.document is None:
            return Mask.causal(self.tokens)
        whole, rest = divmod(self.tokens, self.document)
        return Mask.documents([self.document] * whole + [rest] * (rest > 0))


def model_of(num_layers: int, width: int) -> ModelConfig:
    """SmolLM2's proportions with ``width`` x 64 channels."""
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=64 * width,
        ffn_hidden_size=512 * width // 3,
        num_attention_heads=width,
        num_query_groups=max(1, width // 3),
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        disable_bias_linear=True,
    )


class OurStep:
    """A train_step of this project with its rows; the process group is made where there is none."""

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
        groups = ParallelGroups.create(job.grid, job.device)
        dtype: ComputeDType = "bfloat16" if job.device == "cuda" else "float32"
        model = build_model(
            config, groups, vocab_size=job.vocab_size, dtype=dtype, device=job.device
        )
        self.train_step = TrainStep(
            model=model,
            optimizer=make_optimizer(model.parameters(), OptimizerConfig()),
            groups=groups,
            cp=ContextParallel(groups.cp, job.mask, exchange="p2p"),
            device=torch.device(job.device),
            seed=0,
            clip_grad=1.0,
            sequence_parallel=parallel.sequence_parallel,
            rule=LossRule(chunk_size=job.memory.loss_chunk_size),
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
        """One step; its loss."""
        return self.train_step.run(self.shards, step=0, lr=1e-4).loss

    def traffic(self) -> dict[str, int]:
        """Bytes this rank sends in a step, by kind."""
        with Traffic() as traffic:
            self.run()
        return dict(traffic.sent)

    def kept(self) -> int:
        """Bytes that autograd keeps for backward of one row, every storage once, no weights."""
        model, shard = self.train_step.model, self.shards[0]
        labels = {"labels": shard.labels, "rule": self.train_step.rule}
        found = kept_bytes(model, lambda: model(shard.tokens, cp=shard.cp, **labels)[0])
        model.zero_grad()
        return found


class TheirStep:
    """transformers' model of the same shape with its own gradient checkpointing."""

    def __init__(self, job: Job) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = job.model
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=job.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.num_kv_heads,
                max_position_embeddings=1 << 20,
                tie_word_embeddings=not model.untie_embeddings_and_output_weights,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        self.model.to(job.device)
        self.model.gradient_checkpointing_enable()
        self.model.train()
        self.on_cuda = job.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.rows = random_rows(job)[:, :-1].to(job.device)

    def run(self) -> float:
        """One step; its loss."""
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


def random_rows(job: Job) -> Tensor:
    """int64 [rows, tokens + 1], alike in every process."""
    generator = torch.Generator().manual_seed(job.tokens)
    return torch.randint(0, job.vocab_size, (job.rows, job.tokens + 1), generator=generator)


def peak_of(kind: Callable[[Job], Any], job: Job, steps: int = 2) -> int:
    """The most bytes held at once by a training step that is built and makes some steps."""
    with counting_memory() as count:
        step = kind(job)
        for _ in range(steps):
            step.run()
        del step
    return count.peak


def peak_of_loss(tokens: int, hidden: int, vocab: int) -> tuple[int, int]:
    """(peak of head and loss, forward and backward, bytes of the whole logits in float32)."""
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
