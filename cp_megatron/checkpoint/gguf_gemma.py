"""What a GGUF file of Gemma does not say, because llama.cpp derives it from the architecture.

Which layers have the window, their rotary base, and the scale of the scores of the largest models
are in llama.cpp's source (src/llama-model.cpp), not in the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class _Gemma(NamedTuple):
    """What llama.cpp knows of an architecture.

    Attributes:
        period: layers are counted from 1; those that this divides have no window.
        largest: number of layers of the model whose scores are scaled by the hidden size per head
            instead of the width of a head.
        softcaps: of the scores and of the logits, if the file does not say them.
        local_base: rotary base of layers with the window; None if it is that of the others.
    """

    period: int
    largest: int
    softcaps: tuple[float | None, float | None]
    local_base: float | None


_GEMMAS: Mapping[str, _Gemma] = MappingProxyType(
    {
        "gemma2": _Gemma(2, 46, (50.0, 30.0), None),
        "gemma3": _Gemma(6, 62, (None, None), 10000.0),
    }
)
GEMMAS = frozenset(_GEMMAS)
"""The architectures of GGUF that this module knows."""


def gemma_keys(
    architecture: str, model: Mapping[str, Any], *, head_dim: int, rope: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of config.json that only Gemma has.

    Args:
        architecture: one of ``GEMMAS``.
        model: the metadata of the architecture, without its prefix.
        head_dim: width of a head.
        rope: the rotary settings of layers without a window, as ``rope_parameters`` has them.
    """
    gemma, layers = _GEMMAS[architecture], model["block_count"]
    hidden, heads = model["embedding_length"], model["attention.head_count"]
    scores, logits = gemma.softcaps
    keys = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == gemma.largest else head_dim,
        "attn_logit_softcapping": model.get("attn_logit_softcapping", scores),
        "final_logit_softcapping": model.get("final_logit_softcapping", logits),
        "sliding_window": model["attention.sliding_window"],
        "layer_types": [
            "sliding_attention" if layer % gemma.period else "full_attention"
            for layer in range(1, layers + 1)
        ],
    }
    if gemma.local_base is not None:
        local = {"rope_type": "default", "rope_theta": gemma.local_base}
        kinds = {"full_attention": dict(rope), "sliding_attention": local}
        keys |= {"rope_local_base_freq": gemma.local_base, "rope_parameters": kinds}
    return keys
