"""Every exchange gives the dense oracle's numbers: masks, layouts, heads, group sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.context_parallel.test_attention import HEADS, MASKS, errors
from tests.ranks import run_ranks

EXCHANGES: dict[str, dict[str, Any]] = {
    "all_gather": {"exchange": "all_gather"},
    "a2a": {"exchange": "a2a"},
    "a2a+p2p": {"exchange": "a2a+p2p", "hierarchical_sizes": (2, 2)},
    "auto": {"exchange": "auto"},
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_equals_dense_attention(exchange: str, mask: str, layout: str) -> None:
    for heads in ((4, 4), (12, 3), (4, 1)):
        options = {"layout": layout, "kernel": "cpu", **EXCHANGES[exchange]}
        args = (MASKS[mask], heads, (8, 8), torch.float64, options)
        for result in run_ranks(errors, 4, *args):
            assert max(result.values()) < 1e-12, (heads, result)
