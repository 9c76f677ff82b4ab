"""Which experts compute a token, and with which weights.

    logits [n, E] -> scores -> the best groups of experts -> the K best experts of them -> weights

| scores | the K experts have the best | their weights |
| --- | --- | --- |
| ``softmax`` | logits | the softmax over their K logits (Mixtral, gpt-oss, Qwen3-MoE) |
| ``softmax``, ``pre_softmax`` | probabilities | their probabilities (OLMoE, DeepSeek-V2) |
| ``sigmoid`` | scores + expert biases | their scores, divided by their sum (DeepSeek-V3) |

A softmax over the chosen logits is the softmax over all, divided by the sum of those chosen. Expert
biases change the choice alone (Wang et al. 2024, arXiv:2408.15664). Groups restrict it to the
experts of ``group_topk`` groups; a group is as good as the sum of its ``group_num_scores`` best
scores (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2).

Shapes: n tokens, E experts, K chosen experts of a token, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.spec import RoutingSpec

_TINY = 1e-20
"""Is added to a sum of sigmoid scores before it divides, as DeepSeek-V3 does."""


class RouterChoice(NamedTuple):
    """What a router decides; float32, or float64 if the logits are or the spec asks for it.

    Attributes:
        experts: int64 [n, K], the numbers of the chosen experts.
        weights: [n, K], by which their results are multiplied; NaN for a token whose logits or
            whose biases are not all finite.
        probabilities: [n, E], the scores of all experts, without biases and groups, divided by
            their sum; what a balance loss reads. None if nothing reads them.
    """

    experts: Tensor
    weights: Tensor
    probabilities: Tensor | None


def route(
    logits: Tensor,
    spec: RoutingSpec,
    expert_bias: Tensor | None = None,
    *,
    experts: Tensor | None = None,
    measured: bool = True,
) -> RouterChoice:
    """Chooses K experts for every token; weights and probabilities can be differentiated.

    The best of scores that are not finite are arbitrary, and a sigmoid makes finite scores of
    infinite logits. Therefore the weights of such a token become NaN. They make the loss NaN, which
    the step notices, and the host does not have to wait for the device here.

    Args:
        logits: [n, E].
        spec: how experts are chosen.
        expert_bias: [E], added to the scores for the choice alone.
        experts: int64 [n, K], a choice made before, which is used instead of a new one.
        measured: a balance loss reads the probabilities.
    """
    dtype = torch.float64 if spec.dtype == "fp64" else accumulation_dtype(logits.dtype)
    logits = logits.to(dtype)
    probabilities, scores = _probabilities_and_scores(logits, spec, measured=measured)
    if experts is None:
        experts = _choose(scores.detach(), spec, expert_bias)
    chosen = scores.gather(1, experts)
    if spec.score_function == "sigmoid":
        weights = chosen / (chosen.sum(1, keepdim=True) + _TINY) if spec.normalizes else chosen
    else:
        weights = chosen if spec.pre_softmax else chosen.softmax(1)
    if spec.scaling != 1.0:
        weights = weights * spec.scaling
    return RouterChoice(experts, weights + _zero_if_finite(logits, expert_bias), probabilities)


def _probabilities_and_scores(
    logits: Tensor, spec: RoutingSpec, *, measured: bool
) -> tuple[Tensor | None, Tensor]:
    """[n, E] -> twice [n, E]; the second ones rank the experts and make the weights."""
    if spec.score_function == "sigmoid":
        scores = logits.sigmoid()
        return scores / (scores.sum(1, keepdim=True) + _TINY) if measured else None, scores
    probabilities = logits.softmax(1) if measured or spec.pre_softmax else None
    return probabilities, logits if probabilities is None or not spec.pre_softmax else probabilities


def _choose(scores: Tensor, spec: RoutingSpec, expert_bias: Tensor | None) -> Tensor:
    """[n, E] -> int64 [n, K], the best first."""
    if expert_bias is not None:
        scores = scores + expert_bias
    if spec.num_groups > 1:
        groups = rearrange(scores, "n (g e) -> n g e", g=spec.num_groups)
        best = groups.topk(spec.group_num_scores, dim=2).values.sum(2)  # [n, G]
        used = best.topk(spec.group_topk, dim=1).indices
        unused = torch.ones_like(best, dtype=torch.bool).scatter_(1, used, False)
        scores = groups.masked_fill(unused[:, :, None], -torch.inf).flatten(1)
    return scores.topk(spec.topk, dim=1).indices


def _zero_if_finite(logits: Tensor, expert_bias: Tensor | None) -> Tensor:
    """[n, 1]: 0 for a token whose numbers are all finite, otherwise NaN."""
    numbers = logits.detach()
    if expert_bias is not None:
        numbers = numbers + expert_bias
    return (numbers * 0).sum(1, keepdim=True)
