"""A model of GPT-2's shape as Hugging Face's config.json. No torch."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.errors import ConfigError


def has_gpt2_shape(model: ModelConfig) -> bool:
    """Whether GPT-2 is the architecture to compare a model with, and not Llama."""
    return (
        model.normalization == "LayerNorm"
        and model.position_embedding_type == "learned_absolute"
        and not model.swiglu
    )


def check_gpt2(model: ModelConfig) -> None:
    """Refuses what GPT-2 has no place for.

    Raises:
        ConfigError: with the flag.
    """
    heads, groups, hidden = model.num_attention_heads, model.num_kv_heads, model.hidden_size
    wrong: list[tuple[str, object, str, str]] = []
    if groups != heads:
        wrong.append(("--num-query-groups", groups, "every head has its own keys", str(heads)))
    if model.head_dim * heads != hidden:
        rule = "the heads share the hidden size"
        wrong.append(("--kv-channels", model.head_dim, rule, str(hidden // heads)))
    if model.disable_bias_linear:
        rule = "all linear layers have biases"
        wrong.append(("--disable-bias-linear", True, rule, "linear layers with biases"))
    if model.qk_layernorm:
        wrong.append(("--qk-layernorm", True, "heads have no norms", "no --qk-layernorm"))
    if model.window_size is not None and model.window_size[0] >= 0:
        left, right = model.window_size
        rule = "every token attends all before it"
        wrong.append(("--window-size", f"{left} {right}", rule, "no --window-size"))
    for flag, value, rule, works in wrong:
        rule = f"has no architecture of Hugging Face: in GPT-2 {rule}"
        raise ConfigError(flag, value, rule, works)


def gpt2_entries(model: ModelConfig, positions: int) -> dict[str, Any]:
    """What config.json holds of such a model alone.

    Args:
        model: that ``check_gpt2`` has passed.
        positions: rows of the table of learned positions.
    """
    return {
        "n_positions": positions,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "activation_function": "gelu_new",  # the tanh form
        "layer_norm_epsilon": model.norm_epsilon,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }
