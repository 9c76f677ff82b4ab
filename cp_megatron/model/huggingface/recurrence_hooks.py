"""Recurrent layers and short convolutions of transformers' own models, sharded over ranks.

Layers of transformers 5.15 or newer call functions of their modeling file by name, with all
keywords of the model's call, and so with the batch's plan. ``hook_layers`` puts functions in their
place that give a call with a plan to the engine, and any other call to transformers' own function.

    function of the modeling file        layers that call it                     of the engine
    causal_conv1d_fn                     all below; LFM2                         short_conv
    torch_chunk_gated_delta_rule         Qwen3-Next, Qwen3.5, OLMo-hybrid        linear_attention
    chunk_kimi_delta_attention           Kimi Linear                             linear_attention
    mamba2_chunk_scan                    Mamba-2, Bamba, Falcon-H1, Zamba2, ...  linear_attention
    mamba2_split_conv1d_scan_combined    the same, if mamba_ssm is installed     none: never fused

Other recurrences (Mamba-1, RWKV, ...) are refused by the type of their layers, or by the probe.

Shapes: B batch, S tokens of this rank, c channels, W width of a convolution, G key heads, H heads,
D key dim, E value dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.model.huggingface.attention_interface import refuse_unsupported
from cp_megatron.model.huggingface.batch_plan import BatchPlan
from cp_megatron.model.transformers_library import import_transformers

_HOOKED = "_cp_megatron_hooked"  # an attribute of functions that are hooked
_EPSILON = 1e-6  # of transformers' l2norm

_DOCUMENTS = "documents given by position_ids"
_NO_CACHE = "use_cache=False, one call per batch"
_UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(("seq_idx", "cu_seqlens", "cu_seq_lens_q"), _DOCUMENTS),
    **dict.fromkeys(("initial_state", "initial_states"), _NO_CACHE),
    **dict.fromkeys(("output_final_state", "return_final_states"), _NO_CACHE),
    "z": "a model that multiplies by its gate after the recurrence",
}
# Types of layers that attend, or treat each token alone.
_OTHER_TYPES: Sequence[str] = ("full_attention", "sliding_attention", "moe", "mlp")
_CONVOLUTION_TYPES: Sequence[str] = ("conv", "hybrid", "hybrid_sliding")
_WORKS = (
    "full or sliding attention; in transformers 5.15 or newer, gated DeltaNet, KDA and Mamba-2, as "
    "in Qwen3.5, Kimi Linear and Bamba"
)
_RECURRENT_TYPES: Sequence[str] = ("linear_attention", "mamba", "hybrid", "hybrid_sliding")


def hook_layers(model: nn.Module) -> frozenset[str]:
    """Hooks the functions that the model's layers call, in this process, unless they are hooked.

    Returns:
        The names of the functions that the model's layers may call.
    """
    kinds = {base for kind in set(map(type, model.modules())) for base in kind.__mro__}
    found: set[str] = set()
    for name in {kind.__module__ for kind in kinds}:
        module = sys.modules.get(name)
        present = _HOOKS.keys() & vars(module).keys() if module else set()
        for function in present:
            _hook(module, function)
        found |= present
    return frozenset(found)


def refuse_other_mixers(config: Any, hooked: frozenset[str]) -> None:
    """Refuses layers, by their type in the config, that mix tokens outside of what is hooked."""
    layers = set(getattr(config, "layer_types", None) or ())
    if not layers and any(name.startswith("mamba_") for name in vars(config)):
        layers = {"mamba"}  # transformers 5.0 names no layer types in its hybrid models
    known = set(_OTHER_TYPES)
    known.update(_CONVOLUTION_TYPES if "causal_conv1d_fn" in hooked else ())
    known.update(_RECURRENT_TYPES if hooked & _RECURRENCES.keys() else ())
    if not layers <= known:
        wrong = ", ".join(sorted(layers - known))
        rule = "layers of this type would see the tokens of one rank only"
        raise ConfigError("layer_types", wrong, rule, _WORKS)


def _hook(module: ModuleType | None, name: str) -> None:
    own = vars(module)[name]
    if hasattr(own, _HOOKED):
        return
    sharded = torch.compiler.disable(_HOOKS[name])

    @wraps(own)
    def hooked(*args: Any, context_parallel: BatchPlan | None = None, **kwargs: Any) -> Any:
        if context_parallel is None:
            return own(*args, **kwargs)
        refuse_unsupported(_UNSUPPORTED, kwargs)
        return sharded(context_parallel, *args, **kwargs)

    setattr(hooked, _HOOKED, True)
    setattr(module, name, hooked)


def _convolution(
    plan: BatchPlan,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """Convolves [B, c, S] with [c, W], as ``causal_conv1d_fn`` does."""
    # [B, c, S] -> [B, S, c]
    x = hidden_states.transpose(1, 2).to(weight.dtype)
    out = plan.within(None).short_conv(x, weight, bias, plan.received()).transpose(1, 2)
    if activation is not None:
        out = import_transformers("model", "").activations.ACT2FN[activation](out)
    return out.to(hidden_states.dtype)


def _delta_rule(
    plan: BatchPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Gated DeltaNet, and KDA if g is [B, S, H, D]; q and k [B, S, G, D], v [B, S, H, E]."""
    exact = accumulation_dtype(query.dtype)
    q, k, v, g, beta = (x.to(exact) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON) for x in (q, k))
    out = plan.within(None).linear_attention(q, k, v, g, beta, kept=plan.received())
    return out.to(query.dtype), None


def _mamba2_scan(
    plan: BatchPlan,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 (transformers passes it by this name)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> Tensor:
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): q = C, k = B, v = dt x, g = dt A, plus D x.

    hidden_states is [B, S, H, E], dt [B, S, H], A and D [H], B and C [B, S, G, D].
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    exact = accumulation_dtype(hidden_states.dtype)
    dt = dt.clamp(*dt_limit).to(exact)
    q, k, x = (y.to(exact) for y in (C, B, hidden_states))
    cp, g = plan.within(None), A.to(exact) * dt
    out = cp.linear_attention(q, k, x * dt[..., None], g, scale=1.0, kept=plan.received())
    return out if D is None else out + D[..., None] * x


def _not_fused(plan: BatchPlan, *args: Any, **kwargs: Any) -> None:
    """Returns None, and the layer then calls its convolution and its scan one after the other."""


_RECURRENCES: Mapping[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2_scan,
}
_HOOKS: Mapping[str, Callable[..., Any]] = {
    **_RECURRENCES,
    "causal_conv1d_fn": _convolution,
    "mamba2_split_conv1d_scan_combined": _not_fused,
}
