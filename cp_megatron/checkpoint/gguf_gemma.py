"""The settings that a GGUF file of Gemma leaves out and llama.cpp derives from the architecture.

Which layers have the window, and how the scores of the largest models are scaled, is written only
in llama.cpp's source (src/llama-model.cpp). The softcaps and the rotary base of layers with a
window are metadata of some files; for others, the source has defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from cp_megatron.checkpoint.gguf import shortest_float


class _Gemma(NamedTuple):
    """What llama.cpp's source says about an architecture.

    Attributes:
        period: the layers whose number, counted from 1, this divides have no window.
        largest: the number of layers of the largest model, whose scores are divided by the root of
            hidden size / number of heads instead of the root of the width of a head.
        softcaps: the bounds of the scores and of the logits in files that do not contain them.
        local_base: the rotary base of layers with the window in files that do not contain it; None
            if it is that of the other layers.
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
    """Makes the entries of config.json that only Gemma has.

    Args:
        architecture: one of ``GEMMAS``.
        model: the metadata of the architecture, without its prefix.
        head_dim: width of a head.
        rope: the rotary settings of layers without a window, as ``rope_parameters`` has them.

    Raises:
        KeyError: the metadata lacks a size or the width of the window.
        ValueError: a rotary base is not above 0 and below 1e30.
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
        base = shortest_float(model.get("rope.freq_base_swa", gemma.local_base))
        local = {"rope_type": "default", "rope_theta": base}
        kinds = {"full_attention": dict(rope), "sliding_attention": local}
        keys |= {"rope_local_base_freq": base, "rope_parameters": kinds}
    return keys
