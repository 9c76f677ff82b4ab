"""One training step: loss and gradients of a global batch, clipping, the update.

Shapes: b rows of a micro batch, S tokens of a row, N context parallel ranks.

The loss is the sum of the token losses of the whole global batch over the number of its tokens
that have one, whatever the grid: both are summed over dp x cp, and so are the gradients, which are
never averaged. A rank whose tokens are all masked adds 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.rng import dropout_seed, seed_dropout
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch import IGNORED, Batch
from cp_megatron.model.transformer import Transformer
from cp_megatron.tensor_parallel.loss import vocab_parallel_cross_entropy


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step found.

    Attributes:
        loss: mean loss per token over the whole global batch, in nats, before the update.
        grad_norm: global norm of the gradient before clipping.
    """

    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model and what moves it.

    Attributes:
        model: the sharded model.
        optimizer: over its parameters.
        groups: this rank's groups.
        cp: context parallelism for rows without document masks; others are derived from it.
        device: where the model lives.
        seed: of the run, for dropout.
        clip_grad: largest global gradient norm; 0 does not clip.
        sequence_parallel: the residual stream is split over tp, so dropout differs there too.
    """

    model: Transformer
    optimizer: Optimizer
    groups: ParallelGroups
    cp: ContextParallel
    device: torch.device
    seed: int
    clip_grad: float
    sequence_parallel: bool

    def step(self, batches: Sequence[Batch], *, step: int, lr: float) -> StepResult:
        """Trains on this rank's micro batches of one global batch.

        Args:
            batches: whole rows; each rank keeps its shard of them.
            step: steps finished before this one.
            lr: the learning rate.
        """
        self.model.train()
        shards = [self._shard(batch) for batch in batches]
        num_tokens = self._sum(sum(count_valid(labels) for _, _, labels in shards))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, (cp, tokens, labels) in enumerate(shards):
            self._seed_dropout(step, number)
            losses = self._token_losses(cp, tokens, labels)
            (losses.sum() / max(num_tokens, 1)).backward()
            total += losses.detach().sum(dtype=torch.float64)
        grad_norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss=self._sum(total) / max(num_tokens, 1), grad_norm=grad_norm)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss per token, in nats, over all ranks' batches; nothing is trained."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for batch in batches:
            cp, tokens, labels = self._shard(batch)
            total += self._token_losses(cp, tokens, labels).sum(dtype=torch.float64)
            count += count_valid(labels)
        return self._sum(total) / max(self._sum(count), 1)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter value that this rank holds is a finite number."""
        found = torch.ones((), dtype=torch.bool, device=self.device)
        for parameter in self.model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            found &= local.isfinite().all()
        return bool(found.item())

    def _shard(self, batch: Batch) -> tuple[ContextParallel, Tensor, Tensor]:
        """This rank's tokens and labels: [b, S] -> [b, S / N]."""
        cp = self.cp if batch.mask == self.cp.mask else self.cp.with_mask(batch.mask)
        tokens, labels = (cp.shard(x, 1).to(self.device) for x in (batch.tokens, batch.labels))
        return cp, tokens, labels

    def _token_losses(self, cp: ContextParallel, tokens: Tensor, labels: Tensor) -> Tensor:
        """[b, S / N] losses of this rank's tokens, 0 where there is no label."""
        return vocab_parallel_cross_entropy(self.model(tokens, cp=cp), labels, self.groups.tp)

    def _sum(self, value: float | Tensor) -> float:
        """The sum over all ranks that hold different tokens."""
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.groups.dp_cp)
        return total.item()

    def _clip(self) -> float:
        """Scales the gradients down to ``clip_grad`` and returns their true global norm."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = get_total_norm(grads)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.clip_grad > 0:
            clip_grads_with_norm_(parameters, self.clip_grad, norm)
        return norm.item()

    def _seed_dropout(self, step: int, microbatch: int) -> None:
        place = self.groups.coordinates
        seed = dropout_seed(
            seed=self.seed,
            step=step,
            microbatch=microbatch,
            dp=place.dp,
            cp=place.cp,
            tp=place.tp if self.sequence_parallel else None,
        )
        seed_dropout(seed, self.device)


def count_valid(labels: Tensor) -> int:
    """Tokens that have a loss."""
    return int((labels != IGNORED).sum())
