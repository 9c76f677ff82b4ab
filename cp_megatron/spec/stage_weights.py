"""What the parts of a model cost, by which layers are divided among the stages of a pipeline."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from cp_megatron.plan import Mask
from cp_megatron.plan.mask import Window
from cp_megatron.spec.model_spec import ModelSpec


class StageWeights(NamedTuple):
    """FLOPs of one row, forward and backward; ``Stages.split`` takes them.

    Attributes:
        layers: of each layer.
        first: of what comes before the layers.
        last: of what follows them.
    """

    layers: tuple[float, ...]
    first: float
    last: float


def stage_weights(spec: ModelSpec, mask: Mask) -> StageWeights:
    """Weighs the parts of a model on rows with this mask.

    Layers attend the pairs of the mask within their own windows. Tables that are looked up, norms
    and activation functions cost nothing here, as in ``training_flops``.

    Args:
        spec: the model.
        mask: of a typical row.
    """
    tokens = mask.seq_len

    @cache
    def pairs(window: Window | None) -> int:
        return mask.within(window).pairs()

    return StageWeights(
        layers=tuple(
            layer.training_flops(num_tokens=tokens, num_pairs=pairs(layer.mixer.window))
            for layer in spec.layers
        ),
        first=spec.embedding.training_flops(num_tokens=tokens, num_pairs=0),
        last=spec.head.training_flops(num_tokens=tokens, num_pairs=0),
    )
