"""Checks that ranks which share rows made the same: context and tensor parallel ones, and stages.

Each rank makes its rows from its own copy of the data. At the start of a run, ranks compare
fingerprints of the data; a copy that differs elsewhere, or goes bad later, shows only in its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from cp_megatron.comm.rng import hash_text
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid


def fold(digests: Sequence[int]) -> int:
    """One number for the digests of several micro batches; float64 holds it exactly."""
    return hash_text(str(list(digests))) % 2**52


def check_same_rows(folded: Sequence[float], grid: Grid) -> None:
    """Names the ranks whose rows differ.

    Args:
        folded: for each rank, the result of ``fold``.

    Raises:
        ConfigError: ranks that share rows have different ones.
    """
    firsts: dict[int, int] = {}  # the first rank of each group
    texts = []
    for rank, digest in enumerate(folded):
        first = firsts.setdefault(grid.coordinates(rank).dp, rank)
        if digest != folded[first]:
            texts.append(f"rank {rank} other rows than rank {first}")
    if texts:
        rule = f"gives the ranks that share rows different ones: {', '.join(texts[:8])}"
        raise ConfigError("--data-path", "", rule, "the same files on every node")
