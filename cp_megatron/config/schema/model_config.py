"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.config.schema.dense_config import DenseModelConfig
from cp_megatron.config.schema.ranges import LossFactor, Positive, Range, Size

ScoreFunction = Literal["softmax", "sigmoid"]
RouterType = Literal["fp32", "fp64", "model"]
BalanceType = Literal["seq_aux_loss", "aux_loss", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DenseModelConfig):
    """The transformer."""

    num_experts: Size | None = None
    """Number of experts of a layer. A token is computed by a few of them, which a router chooses;
    by default the MLPs are dense."""
    moe_layer_freq: Size | None = None
    """Give every n-th layer experts, beginning with the first, and the others dense MLPs; by
    default, or with 1, all layers have experts."""
    moe_layers: tuple[int, ...] | None = None
    """The layers, numbered from 0, that have experts, instead of --moe-layer-freq."""
    moe_ffn_hidden_size: Size | None = None
    """Width of an expert; by default that of a dense MLP."""
    moe_router_topk: Size = 2
    """Number of experts that compute a token."""
    moe_router_score_function: ScoreFunction = "softmax"
    """The function that makes scores of the router's logits."""
    moe_router_pre_softmax: bool = False
    """Take the softmax over all experts, and leave the weights of the chosen ones as they are. By
    default the softmax is taken over the chosen ones, so that their weights sum to 1."""
    moe_router_norm_topk_prob: bool = True
    """Divide the sigmoid scores of the chosen experts by their sum. This has no effect on softmax
    scores."""
    moe_router_topk_scaling_factor: Positive | None = None
    """Multiply the weights of the chosen experts by this; by default by 1."""
    moe_router_num_groups: Size | None = None
    """Divide the experts into this many groups, of which a token uses only the best
    --moe-router-group-topk (DeepSeek-V3, arXiv:2412.19437)."""
    moe_router_group_topk: Size | None = None
    """Number of groups of experts that a token uses; needs --moe-router-num-groups."""
    moe_router_group_num_scores: Size | None = None
    """A group is as good as the sum of this many of its best scores; by default --moe-router-topk
    divided by --moe-router-group-topk, as in Megatron-LM."""
    moe_router_add_bias: bool = False
    """Add a learned bias to the router's logits."""
    moe_router_enable_expert_bias: bool = False
    """Choose experts by their scores plus a bias per expert, which every step moves by
    --moe-router-bias-update-rate towards experts that got fewer tokens than the mean
    (arXiv:2408.15664). It needs no loss."""
    moe_router_bias_update_rate: Annotated[float, Range(0, 1)] = 1e-3
    """How much a step changes the biases of --moe-router-enable-expert-bias."""
    moe_router_dtype: RouterType = "fp32"
    """The type of the router's products and scores; model is that of the activations."""
    moe_router_load_balancing_type: BalanceType = "seq_aux_loss"
    """What --moe-aux-loss-coeff multiplies: the imbalance of each row (seq_aux_loss), which no grid
    and no micro batch size changes, or of each micro batch (aux_loss)."""
    moe_aux_loss_coeff: LossFactor = 0.0
    """Add this times the imbalance of the experts to the loss that is trained."""
    moe_z_loss_coeff: LossFactor = 0.0
    """Add this times the squared log-sum-exp of the router's logits to the loss that is trained
    (arXiv:2202.08906)."""
    moe_shared_expert_intermediate_size: Size | None = None
    """Width of an MLP that computes every token beside the chosen experts; by default there is
    none."""
    moe_shared_expert_gate: bool = False
    """Multiply what the shared expert computes of a token by the sigmoid of a projection of it."""
    quick_geglu: bool = False
    """Use a gated x sigmoid(1.702 x) in the MLP instead of GELU."""
    activation_func_clamp_value: Positive | None = None
    """Before the activation of a gated MLP, bound the gate from above and the other factor from
    both sides by this."""
    glu_linear_offset: Annotated[float, Range(-1e6, 1e6)] = 0.0
    """Add this to the factor of a gated MLP that has no activation."""

    @property
    def is_gated(self) -> bool:
        """Whether MLPs have a gate."""
        return self.swiglu or self.geglu or self.quick_geglu

    @property
    def expert_size(self) -> int:
        """Width of an expert, with the default filled in."""
        return self.moe_ffn_hidden_size or self.ffn_size

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, has experts."""
        if self.num_experts is None:
            return False
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return layer % (self.moe_layer_freq or 1) == 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers that have experts, numbered from 0."""
        layers = range(0 if self.num_experts is None else self.num_layers)
        return tuple(filter(self.has_experts, layers))

    @property
    def group_num_scores(self) -> int:
        """How many of its scores rank a group of experts, with the default filled in."""
        default = max(1, self.moe_router_topk // (self.moe_router_group_topk or 1))
        return self.moe_router_group_num_scores or default
