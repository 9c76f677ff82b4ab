"""Mixtures of experts: the router, the experts that it chooses from, and an MLP beside them.

A router chooses K of E experts for every token (Shazeer et al. 2017, arXiv:1701.06538)::

    residual stream --> router [E, h] --> K experts and their weights
                    \\-> experts: gate, up [E, f, h], down [E, h, f] --> weighted sum --+
                    \\-> shared: an MLP, possibly times a gate per token ----------------+--> stream

Experts know nothing of tp: their weights are split over ep alone, and tokens over all ranks.

Shapes: E experts, K chosen experts of a token, h hidden, f width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from cp_megatron.config import ModelConfig
from cp_megatron.spec.dense_mlp import MLPSpec, activation_of
from cp_megatron.spec.parameter import BlockSpec, ParameterSpec
from cp_megatron.spec.pieces import LinearSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """How a router chooses experts, without its parameters.

    Attributes:
        num_experts, topk: E and K.
        score_function: ``softmax`` or ``sigmoid``.
        pre_softmax: the softmax is over all experts, not over the chosen ones.
        normalizes: sigmoid scores of the chosen experts are divided by their sum.
        scaling: the factor of the weights.
        num_groups, group_topk: the experts are in groups, of which the best are used; 1 and 1 if
            there are no groups.
        group_num_scores: how many of its best scores, summed, rank a group.
        dtype: the type of products and scores, as in ``ModelConfig.moe_router_dtype``.
    """

    num_experts: int
    topk: int
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    pre_softmax: bool = False
    normalizes: bool = True
    scaling: float = 1.0
    num_groups: int = 1
    group_topk: int = 1
    group_num_scores: int = 1
    dtype: Literal["fp32", "fp64", "model"] = "fp32"

    @classmethod
    def of(cls, model: ModelConfig) -> RoutingSpec:
        """The routing of every layer that has experts."""
        assert model.num_experts is not None
        return cls(
            num_experts=model.num_experts,
            topk=model.moe_router_topk,
            score_function=model.moe_router_score_function,
            pre_softmax=model.moe_router_pre_softmax,
            normalizes=model.moe_router_norm_topk_prob,
            scaling=model.moe_router_topk_scaling_factor or 1.0,
            num_groups=model.moe_router_num_groups or 1,
            group_topk=model.moe_router_group_topk or 1,
            group_num_scores=model.group_num_scores,
            dtype=model.moe_router_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """How a layer keeps its experts equally busy.

    Attributes:
        kind: what the imbalance is measured over: ``seq_aux_loss`` a row, ``aux_loss`` a micro
            batch, ``none`` nothing.
        coefficient: the factor of the imbalance in the loss that is trained.
        z_coefficient: the factor of the squared log-sum-exp of the router's logits there.
        bias_rate: how much a step moves the biases of experts; None: there are none.
    """

    kind: str
    coefficient: float
    z_coefficient: float
    bias_rate: float | None

    @property
    def measures(self) -> bool:
        """Whether the imbalance is a part of the loss."""
        return self.kind != "none" and self.coefficient > 0

    @classmethod
    def of(cls, model: ModelConfig) -> BalanceSpec:
        """The balance of every layer that has experts."""
        adapts = model.moe_router_enable_expert_bias
        return cls(
            kind=model.moe_router_load_balancing_type,
            coefficient=model.moe_aux_loss_coeff,
            z_coefficient=model.moe_z_loss_coeff,
            bias_rate=model.moe_router_bias_update_rate if adapts else None,
        )


@dataclass(frozen=True, kw_only=True)
class RouterSpec(BlockSpec):
    """The router: a product with every token, and possibly a buffer that corrects the choice.

    Attributes:
        hidden, num_experts: h and E.
        bias: whether the logits have a learned bias.
        corrects: whether a bias per expert, which is no parameter, is added for the choice alone.
    """

    hidden: int
    num_experts: int
    bias: bool
    corrects: bool

    def own_parameters(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec(name="weight", shape=(self.num_experts, self.hidden), init="normal")
        if self.bias:
            yield ParameterSpec(name="bias", shape=(self.num_experts,), init="zeros")

    def own_buffers(self) -> Iterator[ParameterSpec]:
        if self.corrects:
            yield ParameterSpec(name="expert_bias", shape=(self.num_experts,), init="zeros")

    def matmul_parameters(self) -> int:
        return self.num_experts * self.hidden


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec(BlockSpec):
    """E MLPs of one shape, stacked: down(act(gate(x)) * up(x)), or without a gate down(act(up(x))).

    Attributes:
        hidden, width, num_experts: h, f and E.
        gated: whether there is a gate.
        bias: whether all products have biases.
        topk: how many experts compute a token.
    """

    hidden: int
    width: int
    num_experts: int
    gated: bool
    bias: bool
    topk: int

    def own_parameters(self) -> Iterator[ParameterSpec]:
        spec = partial(ParameterSpec, split={"ep": 0}, stacked=True)
        wide = (self.num_experts, self.width, self.hidden)
        narrow = (self.num_experts, self.hidden, self.width)
        for name in ("gate", "up") if self.gated else ("up",):
            yield spec(name=name, shape=wide, init="normal")
        yield spec(name="down", shape=narrow, init="scaled_normal")
        if not self.bias:
            return
        for name in ("gate", "up") if self.gated else ("up",):
            yield spec(name=f"{name}_bias", shape=wide[:2], init="zeros")
        yield spec(name="down_bias", shape=narrow[:2], init="zeros")

    def matmul_parameters(self) -> int:
        """Those of the experts that compute a token."""
        return self.topk * (3 if self.gated else 2) * self.width * self.hidden


@dataclass(frozen=True, kw_only=True)
class ExpertMixtureSpec(BlockSpec):
    """What a layer has in place of a dense MLP.

    Attributes:
        router, experts: see there.
        shared: an MLP that computes every token; None: there is none.
        shared_gate: [h] -> [1], whose sigmoid multiplies what ``shared`` computes.
        routing, balance: how experts are chosen, and kept equally busy.
        activation, clamp, offset: as in ``MLPSpec``.
    """

    router: RouterSpec
    experts: ExpertsSpec
    shared: MLPSpec | None
    shared_gate: LinearSpec | None
    routing: RoutingSpec
    balance: BalanceSpec
    activation: Literal["gelu", "silu", "quick_gelu"]
    clamp: float | None = None
    offset: float = 0.0

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.experts.hidden

    def kept_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes that backward needs if all experts get equally many tokens."""
        tokens, stream = sizes.stream_tokens, sizes.stream_bytes(self.hidden)
        order = 3 * 8 * self.routing.topk  # the choice, the order by expert and its inverse
        kept = stream + tokens * (self._score_bytes(sizes) + order) + self.row_bytes(sizes)
        if self.shared is not None:
            kept += self.shared.kept_bytes(sizes) - stream  # it reads the same stream
        if self.shared_gate is not None:
            kept += stream + tokens * sizes.element
        return kept

    def row_bytes(self, sizes: ActivationSizes) -> int:
        """Those of them that belong to the rows of this rank's experts.

        At worst, all tokens of the ``sizes.ep`` ranks choose the experts of one of them, which then
        keeps ``sizes.ep`` times as much.
        """
        early = not self.experts.bias  # before the last product, a row is multiplied by its weight
        wide = (3 if self.experts.gated or early else 2) * self.experts.width
        narrow = (1 if early else 2) * self.hidden
        row = (narrow + wide) * sizes.element + self.score_element(sizes)
        row += 2 * 8 if sizes.ep > 1 else 0  # the order of what arrived and its inverse
        return sizes.stream_tokens * self.routing.topk * row

    def choice_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the choice and of the counts that recomputation reuses."""
        rows = 1 if self.balance.kind == "aux_loss" else sizes.rows
        counts = 8 * (rows * self.routing.num_experts + 1) if self.balance.measures else 0
        return 4 * sizes.stream_tokens * self.routing.topk + counts

    def score_element(self, sizes: ActivationSizes) -> int:
        """Bytes of a score."""
        return 8 if self.routing.dtype == "fp64" else sizes.exact

    def _score_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of a token's scores and weights, and of what the terms of the loss keep of them."""
        experts, topk, balance = self.routing.num_experts, self.routing.topk, self.balance
        exact, measured = self.score_element(sizes), balance.measures
        numbers = logits = 0
        if self.routing.score_function == "sigmoid":
            numbers += experts + (topk + 1 if self.routing.normalizes else 0) + measured
        elif self.routing.pre_softmax:
            numbers += experts
        else:
            logits = experts  # of which the chosen ones are read
            numbers += topk + (experts if measured else 0)
        numbers += experts if measured else 0
        logits = max(logits, experts if balance.z_coefficient else 0)
        z = exact + 1 if balance.z_coefficient else 0
        return (numbers + logits) * exact + z

    @classmethod
    def of(cls, model: ModelConfig) -> ExpertMixtureSpec:
        """The mixture of every layer that has experts."""
        assert model.num_experts is not None
        hidden, shared = model.hidden_size, model.moe_shared_expert_intermediate_size
        gate = None
        if shared is not None and model.moe_shared_expert_gate:
            gate = LinearSpec(inputs=hidden, outputs=1, bias=False, split="none")
        return cls(
            router=RouterSpec(
                hidden=hidden,
                num_experts=model.num_experts,
                bias=model.moe_router_add_bias,
                corrects=model.moe_router_enable_expert_bias,
            ),
            experts=ExpertsSpec(
                hidden=hidden,
                width=model.expert_size,
                num_experts=model.num_experts,
                gated=model.is_gated,
                bias=model.has_mlp_bias,
                topk=model.moe_router_topk,
            ),
            shared=None if shared is None else MLPSpec.of(model, width=shared),
            shared_gate=gate,
            routing=RoutingSpec.of(model),
            balance=BalanceSpec.of(model),
            activation=activation_of(model),
            clamp=model.activation_func_clamp_value,
            offset=model.glu_linear_offset,
        )
