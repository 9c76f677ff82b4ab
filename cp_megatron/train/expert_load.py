"""How a step's tokens were spread over experts, and the biases of experts that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from cp_megatron.model.balance import moved_biases
from cp_megatron.model.expert_mixture import ExpertMixture
from cp_megatron.model.layer import TransformerLayer
from cp_megatron.model.transformer import ExpertReport, Transformer


@dataclass(frozen=True, kw_only=True)
class ExpertLoads:
    """The experts' work in one step, over all ranks and micro batches.

    Attributes:
        aux_loss, z_loss: what the imbalance and the squared log-sum-exp of the router's logits
            added to the loss that was trained: sums divided by the number of counted tokens.
        counts: how many tokens each expert computed, by layer that has experts.
        num_ranks: ranks that share the experts.
    """

    aux_loss: float
    z_loss: float
    counts: tuple[tuple[int, ...], ...]
    num_ranks: int

    @classmethod
    def of(cls, numbers: Sequence[float], num_experts: int, num_ranks: int) -> ExpertLoads:
        """Takes the numbers of a step apart: the two terms, then the counts of each layer."""
        aux, z, *counts = numbers
        starts = range(0, len(counts), num_experts)
        layers = (counts[start : start + num_experts] for start in starts)
        by_layer = tuple(tuple(map(int, layer)) for layer in layers)
        return cls(aux_loss=aux, z_loss=z, counts=by_layer, num_ranks=num_ranks)

    @property
    def expert_load(self) -> float:
        """Tokens of the busiest expert of a layer over their mean; the mean of the layers."""
        return fmean(_busiest(layer) for layer in self.counts)

    @property
    def rank_load(self) -> float:
        """Tokens of the busiest rank over the mean of ranks, as the mean of the layers.

        Ranks that hold the same experts are taken as one.
        """
        per_rank = len(self.counts[0]) // self.num_ranks
        starts = range(0, len(self.counts[0]), per_rank)
        ranks = ([sum(layer[s : s + per_rank]) for s in starts] for layer in self.counts)
        return fmean(map(_busiest, ranks))

    def metrics(self) -> dict[str, Any]:
        """The numbers of a logged step, by name."""
        return {
            "moe_aux_loss": self.aux_loss,
            "moe_z_loss": self.z_loss,
            "moe_expert_load": self.expert_load,
            "moe_rank_load": self.rank_load if self.num_ranks > 1 else None,
            "moe_counts": self.counts,
        }


def summed(reports: Sequence[ExpertReport]) -> ExpertReport | None:
    """The sum of the reports of all micro batches, terms in float64; None if there is none."""
    if not reports:
        return None
    terms, counts = zip(*reports, strict=True)
    return ExpertReport(torch.stack(terms).double().sum(0), torch.stack(counts).sum(0))


def flat(report: ExpertReport | None) -> list[Tensor]:
    """Terms and counts as two vectors of float64, in which both are exact."""
    return [] if report is None else [part.double().flatten() for part in report]


def _busiest(counts: Sequence[int]) -> float:
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0


@torch.no_grad()
def move_biases(model: Transformer, counts: Tensor, skip: Tensor | None) -> None:
    """Moves the biases of experts after a step; the host does not wait for the device.

    Args:
        model: a transformer with experts.
        counts: int64 [layers with experts, E], those of all ranks.
        skip: bool [], whether everything stays as it is; None always moves.
    """
    for number, layer in enumerate(model.config.expert_layers):
        if str(layer) not in model.layers:
            continue  # on another pipeline stage
        mixture = cast(TransformerLayer, model.layers[str(layer)]).mlp
        assert isinstance(mixture, ExpertMixture)
        if (rate := mixture.spec.balance.bias_rate) is not None:
            bias = mixture.router.expert_bias
            moved = moved_biases(bias, counts[number], rate)
            bias.copy_(moved if skip is None else torch.where(skip, bias, moved))
