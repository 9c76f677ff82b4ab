"""One training step: the loss and gradients of a global batch, clipping, and the update.

Shapes: b = rows of a micro batch, S = tokens of a row, N = context parallel ranks.

On every grid, the loss is the sum of the token losses of the whole global batch, divided by the
number of its tokens that have a label. Both are summed over dp x cp, and so are the gradients,
which are never averaged. A rank whose tokens are all masked adds 0.

``step`` is the number of a training step, counted from 1: step N is being made until it is applied,
and afterwards N steps are finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.rng import dropout_seed, seed_dropout
from cp_megatron.comm.row_digest import digest_rows
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.batch import IGNORED, Batch
from cp_megatron.faults.checks import ParameterSums
from cp_megatron.faults.inject import Faults
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.model.transformer import Transformer
from cp_megatron.spec import local_heads
from cp_megatron.tensor_parallel import LossRule
from cp_megatron.train import row_agreement
from cp_megatron.train.whole_model import count_zeros, global_norm


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a step."""

    loss: float  # mean loss per token over the whole global batch, in nats, before the update
    grad_norm: float  # global norm of the gradient before clipping
    num_pairs: float  # as in ``Shard``, but over the whole global batch
    accepted: bool = True  # the model was updated; otherwise the step was skipped
    num_zeros: int | None = None  # numbers of the clipped gradient that are 0, if they are counted
    waited: float = field(default=0.0, compare=False)  # seconds of waiting at the first message


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's part of a micro batch, on the CPU, with its attention planned.

    Attributes:
        num_pairs: attended pairs of a query and a key of the whole rows, divided by the number of
            ranks that share them; the mean of the layers that attend.
    """

    cp: ContextParallel  # under the micro batch's mask
    tokens: Tensor  # int64 [b, S / N]
    labels: Tensor  # int64 [b, S / N]
    first_row: int  # the number of the first row in the run
    row_length: int  # the length of the rows that are concatenated into one; 0 if none are
    num_valid: int  # tokens of this rank that have a label
    num_pairs: float
    digest: int  # of the whole rows, the same on all ranks that share them


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A model and its optimizer."""

    model: Transformer
    optimizer: Optimizer
    groups: ParallelGroups
    cp: ContextParallel  # for rows without document masks; that of other rows is derived from it
    device: torch.device
    seed: int  # the run's seed, for dropout; attention dropout is the same on every grid
    clip_grad: float  # the largest global gradient norm; 0 disables clipping
    sequence_parallel: bool  # the residual stream is split over tp, and so dropout differs over tp
    rule: LossRule = field(default_factory=LossRule)
    sums: ParameterSums | None = None  # only an update may change the sums; None disables them
    counts_zeros: bool = False  # count the numbers of the gradient that are 0

    def prepare(self, batch: Batch) -> Shard:
        """This rank's part of whole rows, [b, S] -> [b, S / N], with its attention planned.

        This sends no message and changes nothing, so another thread may call it during ``run``.
        """
        cp = self.cp if batch.mask == self.cp.mask else self.cp.with_mask(batch.mask)
        pairs = self.model.prepare(cp)
        _ = cp.document_positions  # computed here once; ``cp`` keeps them
        labels = cp.shard(batch.labels, 1)
        return Shard(
            cp=cp,
            tokens=cp.shard(batch.tokens, 1),
            labels=labels,
            first_row=batch.first_row,
            row_length=batch.row_length,
            num_valid=int((labels != IGNORED).sum()),
            num_pairs=pairs * batch.tokens.shape[0] / cp.cp_size,
            digest=int(digest_rows({"tokens": batch.tokens, "labels": batch.labels})),
        )

    def run(
        self,
        shards: Sequence[Shard],
        *,
        step: int,
        lr: float,
        accept: Callable[[float, float], bool] | None = None,
        faults: Faults | None = None,
    ) -> StepResult:
        """Trains on this rank's micro batches of one global batch.

        Args:
            shards: the micro batches, from ``prepare``.
            step: the number of this step, from 1.
            lr: the learning rate.
            accept: decides whether the model is updated. It is called once, with the loss and the
                gradient norm, which are the same on every rank. None always updates.
            faults: the faults injected on this rank.
        """
        faults = faults or Faults()
        faults.before_step(step)
        self.model.train()
        arrived = time.perf_counter()
        num_tokens, num_pairs = self._sum(
            [shard.digest for shard in shards],
            *(sum(shard.num_valid for shard in shards), sum(shard.num_pairs for shard in shards)),
        )
        waited = time.perf_counter() - arrived
        total = self._backward(shards, num_tokens, step, faults)
        with traced("gradient norm"):
            norm = self._norm()
            grad_norm = norm.item()
        loss = self._loss(total, num_tokens)
        accepted = accept is None or accept(loss, grad_norm)
        num_zeros = self._update(lr, norm) if accepted else None
        self.optimizer.zero_grad()
        if faults.has("flip", step):
            held = map(local_values, self.model.parameters())
            next(x for x in held if x.numel()).view(-1)[:1].view(torch.uint8)[0] ^= 32
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            num_pairs=num_pairs,
            accepted=accepted,
            num_zeros=num_zeros,
            waited=waited,
        )

    def _backward(
        self, shards: Sequence[Shard], num_tokens: float, step: int, faults: Faults
    ) -> Tensor:
        """Adds the gradients of the micro batches; returns the sum of this rank's losses, []."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for microbatch, shard in enumerate(shards):
            self._seed_dropout(step, microbatch)
            objective, losses = self._losses(shard)
            if faults.mine:
                faults.before_backward(step)
                factor = faults.factor(step)
                objective, losses = objective * factor, losses * factor
                if faults.has("raise", step):
                    objective.register_hook(faults.raises)
            with traced("backward"):
                (objective / max(num_tokens, 1)).backward()
            total += losses.sum(dtype=torch.float64)
        return total

    @torch.no_grad()
    def evaluate(self, shards: Iterable[Shard]) -> float:
        """Mean loss per token, in nats, over the batches of all ranks, without training."""
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        digests = []
        for shard in shards:
            total += self._losses(shard)[1].sum(dtype=torch.float64)
            count += shard.num_valid
            digests.append(shard.digest)
        loss, num_tokens = self._sum(digests, total, count)
        return loss / max(num_tokens, 1)

    def params_norm(self) -> float:
        """The L2 norm of all parameters of the model, the same on every rank."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation, the root still holds whole weights
        return global_norm(self.model.parameters(), self.groups.world, self.device)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter value that this rank holds is a finite number."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for parameter in self.model.parameters():
            finite &= local_values(parameter).isfinite().all()
        return bool(finite.item())

    def _losses(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """The objective, [], and the losses of this rank's tokens, [b, S / N]; 0 without label."""
        tokens, labels = (x.to(self.device) for x in (shard.tokens, shard.labels))
        dropout = self._attention_dropout(shard) if self.model.training else None
        with traced("forward"):
            objective, losses = self.model(
                tokens, cp=shard.cp, attention_dropout=dropout, labels=labels, rule=self.rule
            )
        return objective, losses

    def _sum(self, digests: Sequence[int], *values: float | Tensor) -> list[float]:
        """The sums over all ranks that hold different tokens, in one message.

        Tensor parallel ranks share their tokens and have the same values, so only the first of them
        contributes. The same message compares the digests of rows between ranks that share them.

        Raises:
            ConfigError: ranks that share rows have different ones.
        """
        shared = row_agreement.share(digests, self.groups)
        totals = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float64, device=self.device)
                for value in (shared, *values)
            ]
        )
        if self.groups.coordinates.tp:
            totals[1:].zero_()
        dist.all_reduce(totals, group=self.groups.world)
        difference, *sums = totals.tolist()
        if difference:
            row_agreement.refuse_other_rows(digests, self.groups, self.device)
        return sums

    def _loss(self, total: Tensor, num_tokens: float) -> float:
        """The mean loss of the tokens of all ranks; NaN if the loss of any rank is not finite."""
        share = total if self.groups.coordinates.tp == 0 else torch.zeros_like(total)
        totals = torch.stack([share, (~total.isfinite()).double()])
        dist.all_reduce(totals, group=self.groups.world)
        loss, num_broken = totals.tolist()
        return math.nan if num_broken else loss / max(num_tokens, 1)

    def _norm(self) -> Tensor:
        """The global norm of the gradients, [], the same on every rank."""
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _update(self, lr: float, norm: Tensor) -> int | None:
        """Clips the gradients to ``clip_grad`` and updates the parameters.

        Returns the number of zeros in the gradients, as Megatron-LM counts them: after the
        clipping. None if they are not counted.
        """
        if self.clip_grad > 0:
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            clip_grads_with_norm_(parameters, self.clip_grad, norm)
        num_zeros = None
        if self.counts_zeros:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            num_zeros = count_zeros(gradients, self.groups.world, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.sums is not None:
            self.sums.compare()
        with traced("optimizer"):
            self.optimizer.step()
        if self.sums is not None:
            self.sums.take()
        return num_zeros

    def _attention_dropout(self, shard: Shard) -> Dropout | None:
        model, place, tp = self.model.config, self.groups.coordinates, self.groups.grid.tp
        if not model.attention_dropout:
            return None
        return Dropout(
            model.attention_dropout,
            seed=self.seed,
            batch0=shard.first_row,
            row_length=shard.row_length,
            head0=place.tp * local_heads(model, tp).heads,
        )

    def _seed_dropout(self, step: int, microbatch: int) -> None:
        place = self.groups.coordinates
        tp, step = place.tp if self.sequence_parallel else None, step - 1  # counted from 0
        seed = dropout_seed(
            seed=self.seed, step=step, microbatch=microbatch, dp=place.dp, cp=place.cp, tp=tp
        )
        seed_dropout(seed, self.device)


def local_values(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
