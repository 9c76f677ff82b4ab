"""The forward and backward passes of a step's micro batches, on one pipeline stage or all layers.

Shapes: b = rows of a micro batch, S = tokens of a row, N = context parallel ranks, h = hidden. The
residual stream is [b, S / N, h]; with sequence parallelism [b, S / N / tp, h].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.host_copies import to_device
from cp_megatron.comm.trace import traced
from cp_megatron.faults.inject import Faults
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.model.row_counts import TokenRows
from cp_megatron.model.transformer import ExpertReport, Transformer
from cp_megatron.pipeline import Outputs, Passes, StageLinks, run_stage
from cp_megatron.plan.pipeline import Action, PipelinePlan
from cp_megatron.spec import local_heads
from cp_megatron.tensor_parallel import LossRule
from cp_megatron.train.announcement import Announcement
from cp_megatron.train.expert_load import summed
from cp_megatron.train.shard import Shard


@dataclass(frozen=True, kw_only=True)
class MicrobatchPasses:
    """What all passes have in common.

    Attributes:
        seed, rule: as in ``TrainStep``.
        reduces_once: gradients are reduced over ranks after the last backward pass of a step, not
            after each.
        stream_dtype: of the residual stream.
    """

    model: Transformer
    groups: ParallelGroups
    links: StageLinks
    device: torch.device
    seed: int
    rule: LossRule
    reduces_once: bool
    stream_dtype: torch.dtype

    def train(
        self, shards: Sequence[Shard], announcement: Announcement, step: int, faults: Faults
    ) -> tuple[Tensor, ExpertReport | None]:
        """Adds the gradients of the micro batches.

        Returns:
            The sum of the losses of this rank's tokens, float64 [], 0 on stages without the head;
            and the sum of what this rank's experts did, if the model has some.
        """
        passes = _TrainingPasses(self, shards, announcement, step, faults)
        self._run(len(shards), passes, has_backward=True)
        return passes.total, summed(passes.reports)

    @torch.no_grad()
    def losses(self, shards: Sequence[Shard]) -> list[Tensor]:
        """The losses of this rank's tokens, [b, S / N] for each micro batch; none on stages without
        the head."""
        passes = _LossPasses(self, shards)
        self._run(len(shards), passes, has_backward=False)
        return passes.found

    def plan(self, num_microbatches: int, *, has_backward: bool = True) -> PipelinePlan:
        """The order of the passes of all stages."""
        num_stages, num_chunks = self.groups.grid.pp, len(self.model.chunks)
        return PipelinePlan(num_stages, num_microbatches, num_chunks, has_backward)

    def _run(self, num_microbatches: int, passes: Passes, *, has_backward: bool) -> None:
        plan = self.plan(num_microbatches, has_backward=has_backward)
        run_stage(plan, self.groups.coordinates.pp, self.links, passes)

    def forward(
        self, shard: Shard, x: Tensor | None, *, chunk: int = 0, rows: TokenRows | None = None
    ) -> tuple[Any, ...]:
        """A forward pass through a chunk.

        Args:
            shard: the micro batch.
            x: the residual stream; None in the chunk with the embedding.
            chunk: the number of the chunk.
            rows: the rows of the tokens, to learn what the experts did.

        Returns:
            What ``Transformer.forward`` returns, as a tuple.
        """
        labels = None
        if self.model.chunks[chunk].has_head:
            labels = to_device(shard.labels, self.device)
        if rows is not None:
            rows = replace(rows, numbers=to_device(rows.numbers, self.device))
        attention, hidden = self._dropouts(shard) if self.model.training else (None, None)
        with traced("forward"):
            found = self.model(
                to_device(shard.tokens, self.device) if x is None else x,
                cp=shard.cp,
                attention_dropout=attention,
                hidden_dropout=hidden,
                labels=labels,
                rule=self.rule,
                rows=rows,
                chunk=chunk,
            )
        results = found if isinstance(found, tuple) else (found,)
        is_last = self.model.chunks[chunk].has_head
        assert is_last or results[0].dtype == self.stream_dtype, "what the next stage receives"
        return results

    def empty_stream(self, shard: Shard) -> Tensor:
        """Memory for the residual stream of a micro batch."""
        lines, length = shard.tokens.shape
        if self.model.tp.splits_sequence:
            length //= self.groups.grid.tp
        shape = lines, length, self.model.config.hidden_size
        return torch.empty(shape, dtype=self.stream_dtype, device=self.device)

    def _dropouts(self, shard: Shard) -> tuple[Dropout | None, Dropout | None]:
        """The dropout of attention weights and that of the residual stream."""
        model, place, tp = self.model.config, self.groups.coordinates, self.groups.grid.tp
        head0 = place.tp * local_heads(model, tp).heads
        rows = {"batch0": shard.first_row, "row_length": shard.row_length}
        attention, hidden = (
            Dropout(probability, seed=self.seed, head0=head0, **rows) if probability else None
            for probability in (model.attention_dropout, model.hidden_dropout)
        )
        return attention, hidden


class _Microbatches:
    """The micro batches of several passes."""

    def __init__(self, common: MicrobatchPasses, shards: Sequence[Shard]) -> None:
        self.common, self.shards = common, shards

    def empty_stream(self, microbatch: int) -> Tensor:
        return self.common.empty_stream(self.shards[microbatch])


class _LossPasses(_Microbatches):
    """Forward passes for the losses alone.

    Attributes:
        found: the losses of each micro batch.
    """

    def __init__(self, common: MicrobatchPasses, shards: Sequence[Shard]) -> None:
        super().__init__(common, shards)
        self.found: list[Tensor] = []

    def forward(self, action: Action, x: Tensor | None) -> Outputs:
        result, *losses = self.common.forward(self.shards[action.microbatch], x, chunk=action.chunk)
        self.found += losses
        return Outputs(None if losses else result, None)

    def backward(self, action: Action, outputs: Outputs, gradient: Tensor | None) -> None:
        raise AssertionError("a plan without backward passes")


class _TrainingPasses(_Microbatches):
    """Forward and backward passes of a step.

    Attributes:
        total: the sum of the losses so far, float64 [].
        reports: what the experts did in each forward pass.
    """

    def __init__(
        self,
        common: MicrobatchPasses,
        shards: Sequence[Shard],
        announcement: Announcement,
        step: int,
        faults: Faults,
    ) -> None:
        super().__init__(common, shards)
        self.told, self.step, self.faults = announcement, step, faults
        self.total = torch.zeros((), dtype=torch.float64, device=common.device)
        self.reports: list[ExpertReport] = []
        self._num_left = len(shards) * len(common.model.chunks)
        if common.reduces_once:
            self._reduce(self._num_left == 1)

    def forward(self, action: Action, x: Tensor | None) -> Outputs:
        common, shard = self.common, self.shards[action.microbatch]
        result, *more = common.forward(shard, x, chunk=action.chunk, rows=shard.rows)
        has_head = common.model.chunks[action.chunk].has_head
        objective, stream = (None, result) if not has_head else (result, None)
        if objective is not None:
            objective = objective / max(self.told.num_tokens, 1)
            losses = more.pop(0)
            if self.faults.mine:
                factor = self.faults.factor(self.step)
                objective, losses = objective * factor, losses * factor
            self.total += losses.detach().sum(dtype=torch.float64)
        for terms, counts in more:
            added = terms.sum() / max(self.told.num_counted, 1)
            if terms.requires_grad or objective is not None:
                objective = added if objective is None else objective + added
            self.reports.append(ExpertReport(terms.detach(), counts))
        return Outputs(stream, objective)

    def backward(self, action: Action, outputs: Outputs, gradient: Tensor | None) -> None:
        self._num_left -= 1
        if self.common.reduces_once and self._num_left == 0:
            self._reduce(True)
        roots = [root for root in outputs if root is not None]
        if self.faults.mine:
            self.faults.before_backward(self.step)
            if gradient is not None and self.common.model.head is None:
                gradient = gradient * self.faults.factor(self.step)
            if self.faults.has("raise", self.step):
                roots[-1].register_hook(self.faults.raises)
        gradients = [gradient if root is outputs.stream else None for root in roots]
        with traced("backward"):
            torch.autograd.backward(roots, gradients)

    def _reduce(self, reduces: bool) -> None:
        """Whether the next backward pass reduces gradients over ranks and frees whole weights."""
        for module in self.common.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(reduces, recurse=False)
                module.set_is_last_backward(reduces)
                module.set_reshard_after_backward(reduces, recurse=False)
