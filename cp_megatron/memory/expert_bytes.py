"""What mixtures of experts keep beside what the spec of a layer counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cp_megatron.spec import ActivationSizes, ExpertMixtureSpec, ModelSpec


def shared_bytes(spec: ModelSpec, levels: Iterable[str], sizes: ActivationSizes) -> tuple[int, int]:
    """Bytes that layers with experts share: those of the report, and of the tokens' rows.

    Args:
        spec: the model.
        levels: what is recomputed of each layer.
        sizes: the sizes of activations.
    """
    mixtures = _mixtures(spec)
    if not mixtures:
        return 0, 0
    first = next(iter(mixtures.values()))
    # How many tokens each expert got, and two terms of the loss.
    report = 8 * len(mixtures) * first.routing.num_experts + 2 * first.score_element(sizes)
    again = any(level != "none" for i, level in enumerate(levels) if i in mixtures)
    copied = again and sizes.splits_sequence and sizes.batch > 1
    return report, 8 * sizes.stream_tokens if copied else 0


def row_bytes(spec: ModelSpec, sizes: ActivationSizes) -> tuple[int, int]:
    """Bytes that a layer keeps of the rows of a rank's experts: if all ranks get equally many, and
    at worst, if as many tokens as can choose experts of one rank; 0 and 0 without experts."""
    for mixture in _mixtures(spec).values():
        balanced, topk = mixture.row_bytes(sizes), mixture.routing.topk
        most = min(topk, mixture.routing.num_experts // sizes.ep)
        return balanced, balanced * sizes.ep * most // topk
    return 0, 0


def _mixtures(spec: ModelSpec) -> Mapping[int, ExpertMixtureSpec]:
    layers = enumerate(layer.mlp for layer in spec.layers)
    return {i: mlp for i, mlp in layers if isinstance(mlp, ExpertMixtureSpec)}
