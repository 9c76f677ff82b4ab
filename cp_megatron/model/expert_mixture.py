"""A mixture of experts: what a layer has in place of a dense MLP.

    rows of the residual stream [n, h]
       |-> router -> K experts of every token, and their weights
       |-> dispatch -> rows sorted by expert -> experts, weighted -> back to their tokens ----+
       |-> shared MLP, possibly times a gate per token ---------------------------------------+--> +

Tokens leave this rank in ``Dispatch`` alone. What balances the load is a term of the loss, which is
returned; the counts of whole rows that it needs are sent while the experts compute.

Shapes: b batch, r rows of the residual stream on this rank, n = b * r tokens, h hidden, f width of
an expert, E experts, K chosen experts of a token, m rows that this rank's experts compute, R rows
of the micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cp_megatron.expert_parallel import Dispatch, ExpertParallel, count_rows
from cp_megatron.kernels.gated import GatedFunction, activate, gated, weighted
from cp_megatron.kernels.grouped import grouped_products
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.model.balance import expert_counts, imbalance, squared_logsumexp
from cp_megatron.model.layer_memory import KeptRouting, LayerMemory, Routing
from cp_megatron.model.mlp import MLP
from cp_megatron.model.routing import RouterChoice, route
from cp_megatron.model.row_counts import RowCounts, TokenRows
from cp_megatron.spec import ExpertMixtureSpec, RouterSpec, RoutingSpec
from cp_megatron.tensor_parallel import SpecifiedModule, TensorParallel, products


class Mixed(NamedTuple):
    """What a mixture of experts computes, or a layer that has one.

    Attributes:
        stream: [b, r, h].
        terms: [2], this rank's summands of what the imbalance and the z-loss add to the loss that
            is trained, at least in the type of sums; None if the tokens' rows are not given.
        counts: int64 [E], how many of this rank's tokens chose each expert; None likewise.
    """

    stream: Tensor
    terms: Tensor | None
    counts: Tensor | None


class Router(SpecifiedModule):
    """Scores of all experts for every token."""

    expert_bias: Tensor

    def __init__(self, spec: RouterSpec, routing: RoutingSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.corrects, self.dtype = spec.corrects, routing.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[n, h] -> logits [n, E] in the type that ``--moe-router-dtype`` says, at least the type
        of sums unless that is ``model``."""
        dtype = x.dtype
        if self.dtype != "model":
            dtype = torch.float64 if self.dtype == "fp64" else accumulation_dtype(x.dtype)
        logits: Tensor = _Logits.apply(x, self.local("weight"), dtype)
        bias = self.local_bias()
        return logits if bias is None else logits + bias.to(dtype)

    @property
    def correction(self) -> Tensor | None:
        """[E], what is added to the scores for the choice alone."""
        return self.expert_bias if self.corrects else None


class _Logits(torch.autograd.Function):
    """``F.linear`` in another type; backward converts its operands again, and keeps no copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (grad,), dtype = grads, grads[0].dtype
        dx, dweight = grad @ weight.to(dtype), grad.T @ x.to(dtype)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class Experts(SpecifiedModule):
    """The experts of this rank."""

    def __init__(self, spec: ExpertMixtureSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec.experts, tp)
        self.gated, self.bias = spec.experts.gated, spec.experts.bias
        self.function = GatedFunction(spec.activation, spec.clamp, spec.offset)

    def forward(self, x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
        """Computes rows that are sorted by expert, times their weights.

        Args:
            x: [m, h].
            weights: [m]. They are multiplied before the last product, unless it has a bias.
            counts: the rows of each expert.

        Returns:
            [m, h].
        """
        early = None if self.bias else weights
        if self.gated:
            gate, up = self._products(x, counts, "gate", "up")
            wide = gated(gate, up, self.function, early)
        else:
            (up,) = self._products(x, counts, "up")
            wide = activate(up, self.function.activation)
            wide = wide if early is None else weighted(wide, early)
        (out,) = self._products(wide, counts, "down")
        return weighted(out, weights) if early is None else out

    def _products(self, x: Tensor, counts: Sequence[int], *names: str) -> tuple[Tensor, ...]:
        biases = [self.local(f"{name}_bias") for name in names] if self.bias else None
        return grouped_products(x, [self.local(name) for name in names], counts, biases)


class SharedGate(SpecifiedModule):
    """The factor of what the shared MLP computes of a token."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, r, h] -> [b, r, 1]."""
        return F.linear(x, self.local("weight")).sigmoid()


class ExpertMixture(nn.Module):
    """Adds up what a few experts compute of a token, and what a shared MLP computes of all."""

    def __init__(
        self, spec: ExpertMixtureSpec, *, memory: LayerMemory, parallel: ExpertParallel
    ) -> None:
        super().__init__()
        tp = memory.tp
        self.spec, self.memory, self.parallel = spec, memory, parallel
        self.router = Router(spec.router, spec.routing, tp=tp)
        self.experts = Experts(spec, tp=tp)
        self.shared = None if spec.shared is None else MLP(spec.shared, tp=tp)
        gate = spec.shared_gate
        self.shared_gate = None if gate is None else SharedGate(gate, tp)

    def forward(self, x: Tensor, rows: TokenRows | None, kept: KeptRouting | None) -> Mixed:
        """[b, r, h] -> what is added to the residual stream, and to the loss.

        Args:
            x: this rank's rows of the residual stream, normalized.
            rows: which rows of the micro batch the tokens belong to; None: nothing is added to the
                loss and nothing is counted.
            kept: belongs to ``LayerMemory``.
        """
        tokens = x.flatten(0, 1)  # [b, r, h] -> [n, h]
        logits = self.router(tokens)
        choice, routing, counts = self._route(logits, rows, kept)
        dispatch = routing.dispatch
        shared = self._shared(x)  # all that keeps tensors comes before the results are returned
        sent, weights = dispatch.send(tokens, choice.weights)
        computed = self.experts(sent, weights, dispatch.splits.counts)
        terms = None if routing.rows is None else self._terms(logits, choice, routing.rows)
        mixed = dispatch.back(computed).view_as(x)
        if kept is not None:
            dispatch.shrink()
        return Mixed(mixed if shared is None else mixed + shared, terms, counts)

    def _route(
        self, logits: Tensor, rows: TokenRows | None, kept: KeptRouting | None
    ) -> tuple[RouterChoice, Routing, Tensor | None]:
        """The choice, which a second run of the layer takes from the first one, and how often each
        expert was chosen, which only the first run says."""
        spec, first = self.spec.routing, None if kept is None else kept.first
        measured = rows is not None and self.spec.balance.measures
        if first is not None:
            known = first.dispatch.experts
            return route(logits, spec, experts=known, measured=measured), first, None
        choice = route(logits, spec, self.router.correction, measured=measured)
        counts, in_rows = None, None
        if rows is not None:
            counts, in_rows = self._count(choice.experts, rows)
        splits = count_rows(choice.experts, spec.num_experts, self.parallel.group)
        routing = Routing(Dispatch(choice.experts, splits, self.parallel.group), in_rows)
        if kept is not None:
            kept.first = routing
        return choice, routing, counts

    def _count(self, experts: Tensor, rows: TokenRows) -> tuple[Tensor, RowCounts]:
        """How often each expert was chosen by this rank's tokens, [E], and in whole rows."""
        balance = self.spec.balance
        if balance.kind == "aux_loss":
            rows = rows.joined()
        counts = expert_counts(experts, rows.numbers, rows.num_rows, self.spec.routing.num_experts)
        read = counts if balance.measures else None
        return counts.sum(0), RowCounts(rows.numbers, read, self.parallel.row_group)

    def _terms(self, logits: Tensor, choice: RouterChoice, rows: RowCounts) -> Tensor:
        balance, dtype = self.spec.balance, accumulation_dtype(logits.dtype)
        aux = z = logits.new_zeros((), dtype=dtype)
        if balance.measures:
            topk = self.spec.routing.topk
            assert choice.probabilities is not None, "they are measured"
            unequal = imbalance(choice.probabilities, rows.numbers, rows.whole(), topk)
            aux = balance.coefficient * unequal
        if balance.z_coefficient:
            z = balance.z_coefficient * squared_logsumexp(logits.to(dtype), rows.numbers)
        return torch.stack([aux, z])

    def _shared(self, x: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        tp = self.memory.tp
        added = self.shared(*products(self.memory.entered(x), *self.shared.inputs))
        added = tp.leave(added, self.shared.down.local_bias())
        return added if self.shared_gate is None else added * self.shared_gate(x)
