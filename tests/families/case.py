"""A tiny model of a Hugging Face family, and entries of config.json that many of them have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB = 300  # is padded, and holds the 257 ids of the byte tokenizer
FULL, SLIDING, LINEAR_ATTENTION = "full_attention", "sliding_attention", "linear_attention"
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LATENT_WIDTHS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
}
RECURRENCE = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
}
RMS = {"rms_norm_eps": 0.03}
LAYER_NORM = {"layer_norm_eps": 0.03}
BOTH_BIASES = {"attention_bias": True, "mlp_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, **more, "rope_type": kind}}


def longrope(pairs: int, original: int, **more: Any) -> dict[str, Any]:
    """Factors that differ by pair. The longest document, of 26 tokens, decides which are used."""
    return rope(
        "longrope",
        factor=4.0,
        original_max_position_embeddings=original,
        short_factor=[1 + 0.5 * pair for pair in range(pairs)],
        long_factor=[2.5 + 1.5 * pair for pair in range(pairs)],
        **more,
    )


def yarn(**more: Any) -> dict[str, Any]:
    """A boundary of the ramp, a whole number, moves if either beta is a third less."""
    values = {"rope_theta": 20.0, "factor": 4.0, "original_max_position_embeddings": 16}
    values |= {"beta_fast": 1.6, "beta_slow": 0.08}
    return rope("yarn", **{**values, **more})


LINEAR = rope("linear", factor=2.5)
DYNAMIC = rope("dynamic", factor=3.0) | {"max_position_embeddings": 16}
LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model of transformers.

    Attributes:
        name: the prefix of its classes in transformers, for example ``Llama``.
        options: arguments of its config class, beside those of ``sizes``.
        sizes: what the models of all cases have in common, by the keys of the family.
        model_class: the model's class if it is not ``<name>ForCausalLM``.
        one_plus: norms store their factor minus 1.
        inert: keys of config.json, and ends of names of tensors, that change no logits or that
            cannot change alone, because they fix a size.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    model_class: str = ""
    one_plus: bool = False
    inert: tuple[str, ...] = ()
