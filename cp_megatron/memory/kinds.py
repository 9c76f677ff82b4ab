"""The kinds of memory that are predicted, measured and reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
GATHERED, WHOLE = "gathered weights", "whole gradients"
ACTIVATIONS, HOST = "activations", "on the host"
LOGITS, EXCHANGE = "logits", "exchange buffers"
AFTER_FORWARD, PEAK = "held after forward", "peak of the step"

EMBEDDING, INPUTS = "embedding", "layer inputs"
BETWEEN = "between stages"
RECOMPUTED = "for recomputation"
ATTENTION_NORM, ATTENTION = "attention norm", "attention"
MLP_NORM, MLP = "MLP norm", "MLP"
FINAL_NORM, LOSS, OTHER = "final norm", "loss", "other"
MODULES = (
    *(EMBEDDING, INPUTS, ATTENTION_NORM, ATTENTION),
    *(MLP_NORM, MLP, BETWEEN, FINAL_NORM, LOSS, OTHER),
)
IN_LAYER: Mapping[str, str] = MappingProxyType(
    {"inputs": INPUTS, "attention_norm": ATTENTION_NORM}
    | {"attention": ATTENTION, "recurrence": ATTENTION}
    | {"attention_post_norm": ATTENTION_NORM, "mlp_post_norm": MLP_NORM}
    | {"mlp_norm": MLP_NORM, "mlp": MLP}
)
"""The kinds of what the modules of a layer keep, by their names."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one kind on one rank.

    Attributes:
        kind: ``parameters``, ``gradients`` and ``optimizer`` are permanent; ``gathered weights``
            are whole or rounded weights beside the parameters, and ``activations`` are kept for the
            backward passes to come, both at the end of the forward pass after which the most passes
            are in flight for the first time; ``whole gradients`` wait for the last backward pass,
            which reduces them over ranks, when it begins; ``logits`` and ``exchange buffers`` are
            the most at any time.
        detail: for activations the module, over all layers; ``on the host`` if parameters and
            what belongs to them are kept there.
        num_bytes: the number of bytes.
    """

    kind: str
    detail: str = ""
    num_bytes: int
