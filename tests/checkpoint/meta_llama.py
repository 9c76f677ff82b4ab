"""A small llama as Meta and torchtitan write it: their names, neighbouring channels rotated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HEADS, KV_HEADS, HIDDEN, FFN, LAYERS, VOCAB, THETA = 4, 2, 32, 48, 2, 300, 500.0
HEAD = HIDDEN // HEADS
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
"""config.json of this model, which neither Meta nor torchtitan writes."""


def weights(*, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights by their names."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)).to(dtype)

    state = {"tok_embeddings.weight": normal(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        state |= {
            f"{at}attention.wq.weight": normal(HEADS * HEAD, HIDDEN),
            f"{at}attention.wk.weight": normal(KV_HEADS * HEAD, HIDDEN),
            f"{at}attention.wv.weight": normal(KV_HEADS * HEAD, HIDDEN),
            f"{at}attention.wo.weight": normal(HIDDEN, HEADS * HEAD),
            f"{at}feed_forward.w1.weight": normal(FFN, HIDDEN),
            f"{at}feed_forward.w2.weight": normal(HIDDEN, FFN),
            f"{at}feed_forward.w3.weight": normal(FFN, HIDDEN),
            f"{at}attention_norm.weight": normal(HIDDEN),
            f"{at}ffn_norm.weight": normal(HIDDEN),
        }
    return {**state, "norm.weight": normal(HIDDEN), "output.weight": normal(VOCAB, HIDDEN)}


def logits(state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """float64 [tokens, vocab] of one row, by Meta's formulas."""
    state = {name: value.double() for name, value in state.items()}
    length = len(tokens)
    frequencies = THETA ** -(torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * state[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        y = norm(x, f"{at}attention_norm")
        q, k, v = (
            (y @ state[f"{at}attention.w{part}.weight"].T).view(length, -1, HEAD) for part in "qkv"
        )
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (rotated(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotated(q), k) * HEAD**-0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + y @ state[f"{at}attention.wo.weight"].T
        y = norm(x, f"{at}ffn_norm")
        gate, up = (y @ state[f"{at}feed_forward.w{n}.weight"].T for n in (1, 3))
        x = x + (torch.nn.functional.silu(gate) * up) @ state[f"{at}feed_forward.w2.weight"].T
    return norm(x, "norm") @ state["output.weight"].T
