"""What mixtures of experts keep beside what the spec of a layer counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cp_megatron.spec import ActivationSizes, ExpertMixtureSpec, ModelSpec


def report_bytes(spec: ModelSpec, layers: Sequence[int], sizes: ActivationSizes) -> int:
    """Bytes of what a pass through ``layers`` reports of its experts: how many tokens each expert
    of the model got, and two terms of the loss. 0 if the model has no experts."""
    mixtures = _mixtures(spec, range(len(spec.layers)))
    if not mixtures:
        return 0
    own = _mixtures(spec, layers)
    term = own[0].score_element(sizes) if own else 4
    return 8 * len(mixtures) * mixtures[0].routing.num_experts + 2 * term


def row_number_bytes(spec: ModelSpec, recomputed: Iterable[int], sizes: ActivationSizes) -> int:
    """Bytes of the numbers of the tokens' rows, which the recomputed layers of a pass share."""
    copied = sizes.splits_sequence and sizes.batch > 1 and _mixtures(spec, recomputed)
    return 8 * sizes.stream_tokens if copied else 0


def row_bytes(spec: ModelSpec, sizes: ActivationSizes) -> tuple[int, int]:
    """Bytes that a layer keeps of the rows of a rank's experts: if all ranks get equally many, and
    at worst, if as many tokens as can choose experts of one rank; 0 and 0 without experts."""
    for mixture in _mixtures(spec, range(len(spec.layers))):
        balanced, topk = mixture.row_bytes(sizes), mixture.routing.topk
        most = min(topk, mixture.routing.num_experts // sizes.ep)
        return balanced, balanced * sizes.ep * most // topk
    return 0, 0


def _mixtures(spec: ModelSpec, layers: Iterable[int]) -> list[ExpertMixtureSpec]:
    found = (spec.layers[number].mlp for number in layers)
    return [mlp for mlp in found if isinstance(mlp, ExpertMixtureSpec)]
