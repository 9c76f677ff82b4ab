"""One training step: the loss and gradients of a global batch, clipping, and the update.

Shapes: b = rows of a micro batch, S = tokens of a row, N = context parallel ranks.

On every grid, the loss is the sum of the token losses of the whole global batch, divided by the
number of its tokens that have a label. Both are summed over dp x cp, and so are the gradients,
which are never averaged. A rank whose tokens are all masked adds 0. The terms that balance experts
depend on no label: their sum is divided by the number of all tokens that are not padding.

``step`` is the number of a training step, counted from 1: step N is being made until it is applied,
and afterwards N steps are finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.host_copies import HostCopy, pinned
from cp_megatron.comm.host_numbers import gather_numbers
from cp_megatron.comm.rng import hash_text
from cp_megatron.comm.row_digest import digest_rows
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.batch import IGNORED, Batch
from cp_megatron.faults.checks import ParameterSums
from cp_megatron.faults.inject import Faults
from cp_megatron.memory.measure import MemoryMeter
from cp_megatron.model.row_counts import TokenRows
from cp_megatron.model.transformer import ExpertReport, Transformer
from cp_megatron.pipeline import StageLinks
from cp_megatron.tensor_parallel import LossRule
from cp_megatron.train.announcement import Announcement, announce
from cp_megatron.train.expert_load import ExpertLoads, flat, move_biases
from cp_megatron.train.microbatch_passes import MicrobatchPasses
from cp_megatron.train.optimizer import local_values, update
from cp_megatron.train.row_agreement import check_same_rows, fold
from cp_megatron.train.shard import Shard
from cp_megatron.train.whole_model import count_zeros, global_norm, squared_norm

Accept = Callable[[Tensor, Tensor], Tensor]
"""(loss, gradient norm) -> whether the model is updated; [] and bool [], on the device."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a step."""

    loss: float  # mean loss per token over the whole global batch, in nats, before the update
    grad_norm: float  # global norm of the gradient before clipping
    num_pairs: float  # as in ``Shard``, but over the whole global batch
    accepted: bool = True  # the model was updated; otherwise the step was skipped
    num_zeros: int | None = None  # numbers of the clipped gradient that are 0, if they are counted
    experts: ExpertLoads | None = None  # the work of experts, if the model has some


@dataclass(frozen=True, kw_only=True)
class LaunchedStep:
    """A step whose numbers the device may still compute."""

    announcement: Announcement
    numbers: HostCopy
    """Loss, gradient norm, whether the model is updated, zeros (-1: not counted); and, if there are
    experts, the terms of the loss and how many tokens each expert computed."""
    num_experts: int | None = None
    expert_ranks: int = 1

    def result(self) -> StepResult:
        """Waits for the numbers."""
        loss, grad_norm, accepted, num_zeros, *more = self.numbers.read()
        experts = None
        if self.num_experts is not None:
            experts = ExpertLoads.of(more, self.num_experts, self.expert_ranks)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            num_pairs=self.announcement.num_pairs,
            accepted=bool(accepted),
            num_zeros=int(num_zeros) if accepted and num_zeros >= 0 else None,
            experts=experts,
        )


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A model and its optimizer."""

    model: Transformer
    optimizer: Optimizer
    groups: ParallelGroups
    cp: ContextParallel  # for rows without document masks; that of other rows is derived from it
    device: torch.device
    seed: int  # the run's seed, for dropout
    clip_grad: float  # the largest global gradient norm; 0 disables clipping
    rule: LossRule = field(default_factory=LossRule)
    reduces_once: bool = False  # gradients, over ranks: at the end of a step, not per micro batch
    stream_dtype: torch.dtype | None = None  # of the residual stream; None: that of the parameters
    links: StageLinks = field(default_factory=StageLinks)  # between the stages of a pipeline
    sums: ParameterSums | None = None  # only an update may change the sums; None disables them
    counts_zeros: bool = False  # count the numbers of the gradient that are 0
    control: dist.ProcessGroup | None = None  # all ranks, for CPU tensors; None is groups.world

    @cached_property
    def passes(self) -> MicrobatchPasses:
        """The passes of micro batches."""
        return MicrobatchPasses(
            model=self.model,
            groups=self.groups,
            links=self.links,
            device=self.device,
            seed=self.seed,
            rule=self.rule,
            reduces_once=self.reduces_once,
            stream_dtype=self.stream_dtype or next(self.model.parameters()).dtype,
        )

    def memory_meter(self, num_microbatches: int) -> MemoryMeter:
        """Measures the memory of a step with so many micro batches on this rank."""
        return MemoryMeter(
            self.model,
            self.optimizer,
            self.cp,
            self.device,
            in_flight=self.passes.plan(num_microbatches).in_flight(self.groups.coordinates.pp),
            links=self.links,
        )

    def prepare(self, batch: Batch, *, announced: bool = True) -> Shard:
        """This rank's part of whole rows, [b, S] -> [b, S / N], with its attention planned.

        This sends no message and changes nothing, so another thread may call it during ``run``.

        Args:
            batch: the whole rows.
            announced: ``announce`` compares the rows and their mask between the ranks before they
                are used, so that attention need not compare the mask once more.
        """
        same = batch.mask == self.cp.mask
        cp = self.cp if same else self.cp.with_mask(batch.mask, compared=announced)
        pairs = self.model.prepare(cp)
        labels = cp.shard(batch.labels, 1)
        digest = int(digest_rows({"tokens": batch.tokens, "labels": batch.labels}))
        return Shard(
            cp=cp,
            tokens=pinned(cp.shard(batch.tokens, 1), self.device),
            labels=pinned(labels, self.device),
            first_row=batch.first_row,
            row_length=batch.row_length,
            num_valid=int((labels != IGNORED).sum()),
            num_pairs=pairs * batch.tokens.shape[0] / cp.cp_size,
            digest=hash_text(f"{digest} {batch.mask}"),
            rows=self._rows(batch, cp),
        )

    def _rows(self, batch: Batch, cp: ContextParallel) -> TokenRows | None:
        """The rows that experts are balanced over."""
        if not self._has_experts:
            return None
        lines, length = batch.tokens.shape
        shape = lines, length - batch.padding
        rows = TokenRows.of(cp.positions, *shape, row_length=batch.row_length, tails=batch.tails)
        return replace(rows, numbers=pinned(rows.numbers, self.device))

    def announce(
        self, shards: Sequence[Shard], *, step: int, wish: int = 0, faults: Faults | None = None
    ) -> Announcement:
        """The first message of a step; ``announce`` in ``announcement.py`` explains the rest.

        Args:
            shards: the micro batches, from ``prepare``.
            step: the number of this step, from 1.
            wish: this rank's wish to stop.
            faults: the faults injected on this rank.
        """
        (faults or Faults()).before_step(step)
        return announce(
            [shard.digest for shard in shards],
            sum(shard.num_valid for shard in shards),
            sum(shard.rows.num_counted for shard in shards if shard.rows),
            sum(shard.num_pairs for shard in shards),
            self.groups,
            self._control,
            wish=wish,
        )

    def launch(
        self,
        shards: Sequence[Shard],
        announcement: Announcement,
        *,
        step: int,
        lr: float,
        accept: Accept | None = None,
        faults: Faults | None = None,
    ) -> LaunchedStep:
        """Trains on this rank's micro batches of one global batch, without waiting for the device.

        Args:
            shards: the micro batches, from ``prepare``.
            announcement: of this step.
            step: the number of this step, from 1.
            lr: the learning rate.
            accept: decides whether the model is updated. It is called once, with the loss and the
                gradient norm, which are the same on every rank. None always updates.
            faults: the faults injected on this rank.
        """
        faults = faults or Faults()
        self.model.train()
        total, report = self.passes.train(shards, announcement, step, faults)
        self._sum_tied_gradients()
        with traced("gradient norm"):
            loss, norm, report = self._loss_and_norm(total, report, announcement)
        accepted = None if accept is None else accept(loss, norm)
        num_zeros = self._update(lr, norm, accepted, report)
        self.optimizer.zero_grad()
        if faults.has("flip", step):
            held = map(local_values, self.model.parameters())
            next(x for x in held if x.numel()).view(-1)[:1].view(torch.uint8)[0] ^= 32
        updated = torch.ones_like(loss) if accepted is None else accepted.double()
        zeros = -torch.ones_like(loss) if num_zeros is None else num_zeros.double()
        numbers = torch.stack([loss, norm.double(), updated, zeros])
        return LaunchedStep(
            announcement=announcement,
            numbers=HostCopy(torch.cat([numbers, *flat(report)])),
            num_experts=self.model.config.num_experts if self._has_experts else None,
            expert_ranks=self.groups.grid.ep,
        )

    def run(
        self,
        shards: Sequence[Shard],
        *,
        step: int,
        lr: float,
        accept: Accept | None = None,
        faults: Faults | None = None,
    ) -> StepResult:
        """Announces and launches a step, and waits for its result."""
        announcement = self.announce(shards, step=step, faults=faults)
        launched = self.launch(shards, announcement, step=step, lr=lr, accept=accept, faults=faults)
        return launched.result()

    @torch.no_grad()
    def evaluate(self, shards: Iterable[Shard]) -> float:
        """Mean loss per token, in nats, over the batches of all ranks, without training."""
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        digests, rest = list[int](), iter(shards)
        # A few at a time fill a pipeline; one rank needs no more than one.
        number = 4 * self.groups.grid.pp if self.groups.grid.pp > 1 else 1
        while some := list(islice(rest, number)):
            for found in self.passes.losses(some):
                total += found.sum(dtype=torch.float64)
            count += sum(shard.num_valid for shard in some) if self._counts_tokens else 0
            digests += [shard.digest for shard in some]
        self._reshard()  # the root, and what lasts for a step, is still whole
        counted = (total.item() if self.groups.coordinates.tp == 0 else 0.0, count)
        folded, losses, counts = zip(*gather_numbers((fold(digests), *counted), self._control))
        check_same_rows(folded, self.groups.grid)
        return sum(losses) / max(sum(counts), 1)

    def params_norm(self) -> float:
        """The L2 norm of all parameters of the model, the same on every rank."""
        self._reshard()
        return global_norm(self._own(self.model.parameters()), self.groups, self.device)

    def _reshard(self) -> None:
        """Lets FSDP free whole weights, as after the last backward pass of a step."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _own(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those that no earlier stage has as well."""
        model = self.model
        assert model.embedding is not None or not model.copies_embedding
        copied = model.embedding.weight if model.embedding and model.copies_embedding else None
        return [parameter for parameter in parameters if parameter is not copied]

    def _sum_tied_gradients(self) -> None:
        """Adds the gradients of a weight that embedding and head share from different stages."""
        ends, embedding = self.groups.ends, self.model.embedding
        if ends is not None and embedding is not None and self.model.spec.head.tied:
            assert embedding.weight.grad is not None
            dist.all_reduce(local_values(embedding.weight.grad), group=ends)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter value that this rank holds is a finite number."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for parameter in self.model.parameters():
            finite &= local_values(parameter).isfinite().all()
        return bool(finite.item())

    def _loss_and_norm(
        self, total: Tensor, report: ExpertReport | None, announcement: Announcement
    ) -> tuple[Tensor, Tensor, ExpertReport | None]:
        """The mean loss of the tokens of all ranks, and the global norm of the gradients; [], [].

        The loss is NaN if that of any rank is not finite. What experts did is summed over ranks,
        and its terms divided by the number of counted tokens. All of it takes one message: the
        counts are exact in float64.
        """
        share = total if self.groups.coordinates.tp == 0 else torch.zeros_like(total)
        squares = squared_norm(self._gradients(), self.groups, self.device)
        numbers = torch.stack([share, (~total.isfinite()).double()])
        parts = [numbers, *flat(report), squares.view(1)]
        totals = torch.cat(parts)
        if self.groups.grid.world_size > 1:
            dist.all_reduce(totals, group=self.groups.world)
        (loss, num_broken), *found, squared = totals.split([len(part) for part in parts])
        norm = squared.squeeze(0).sqrt()
        if report is not None:
            terms, counts = found
            terms = terms / max(announcement.num_counted, 1)
            report = ExpertReport(terms, counts.long().view_as(report.counts))
        loss = loss / max(announcement.num_tokens, 1)
        return loss.masked_fill(num_broken > 0, math.nan), norm, report

    def _gradients(self) -> list[Tensor]:
        parameters = self._own(self.model.parameters())
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def _update(
        self, lr: float, norm: Tensor, accepted: Tensor | None, report: ExpertReport | None
    ) -> Tensor | None:
        """Clips the gradients to ``clip_grad`` and updates the parameters, if it is accepted, and
        with them the biases of experts.

        Returns the number of zeros in the gradients, int64 [], before the clipping, which
        makes no others. None if they are not counted.
        """
        factor = num_zeros = None
        if self.clip_grad > 0:  # as in torch.nn.utils.clip_grad_norm_
            factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1)
        if self.counts_zeros:
            num_zeros = count_zeros(self._gradients(), self.groups, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.sums is not None:
            self.sums.compare()
        with traced("optimizer"):
            skip = None if accepted is None else ~accepted
            update(self.optimizer, skip=skip, factor=factor)
            if report is not None:
                move_biases(self.model, report.counts, skip)
        if self.sums is not None:
            self.sums.take()
        return num_zeros

    @property
    def _counts_tokens(self) -> bool:
        """Whether this rank counts its tokens, which other ranks and stages have as well."""
        place = self.groups.coordinates
        return place.tp == 0 and place.pp == 0

    @property
    def _has_experts(self) -> bool:
        return bool(self.model.config.expert_layers)

    @property
    def _control(self) -> dist.ProcessGroup:
        return self.groups.world if self.control is None else self.control
