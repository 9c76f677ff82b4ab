"""Tests attention under ``torch.autocast`` on two ranks: its types, values and gradients.

A rotary embedding in float32 gives queries and keys in float32 beside values in bfloat16.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.context_parallel import api as engine
from cp_megatron.errors import ConfigError
from cp_megatron.model import huggingface
from cp_megatron.plan import Mask
from tests.model.test_huggingface import ODD, SIZES, make_rows, relative, summed
from tests.ranks import run_ranks

BFLOAT16 = 2.0**-8  # relative rounding
LENGTHS = (5, 27)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """q and k float32, v bfloat16, [1, 32, 2, 8]."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, sum(LENGTHS), 2, 8, generator=generator) for _ in range(3))
    return q, k, v.bfloat16()


def pytorchs_own() -> list[Tensor]:
    """out and the gradients of q, k and v, by scaled_dot_product_attention under autocast."""
    given = [x.requires_grad_() for x in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        pieces = zip(*(x.split(LENGTHS, 1) for x in given), strict=True)
        outs = [
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in piece), is_causal=True)
            for piece in pieces
        ]
    out = torch.cat([x.transpose(1, 2) for x in outs], 1)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), given)]


def ours(rank: int, world_size: int) -> list[Tensor]:
    given = [x.requires_grad_() for x in inputs()]
    cp = ContextParallel(dist.group.WORLD, Mask.documents(LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        out = cp.attention(*(cp.shard(x, 1) for x in given))
    gradients = torch.autograd.grad(out.float().square().sum(), given)
    return [cp.gather(out.detach(), 1), *(summed(x, dist.group.WORLD) for x in gradients)]


def test_values_gradients_and_types_are_those_of_pytorchs_attention() -> None:
    expected = pytorchs_own()
    for found in run_ranks(ours, 2):
        for x, reference in zip(found, expected, strict=True):
            assert x.dtype == reference.dtype
            assert relative(x.float(), reference.float()) < 2 * BFLOAT16


@pytest.mark.parametrize("enabled", [False, True])
def test_unequal_types_are_refused_without_autocast(enabled: bool) -> None:
    cp = ContextParallel(None, Mask.causal(32))
    doubles = (*(x.double() for x in inputs()[:2]), inputs()[2])  # autocast leaves float64
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        pytest.raises(ConfigError, match=r"q torch\.\w+, k .*must be one type \(works: torch"),
    ):
        cp.attention(*(doubles if enabled else inputs()))


def test_float64_stays_float64_under_autocast() -> None:
    cp = ContextParallel(None, Mask.causal(32))
    q, k, v = (x.double() for x in inputs())
    expected = cp.attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cp.attention(q, k, v), expected)


def llama(rank: int, world_size: int) -> dict[str, Any]:
    """A Llama in float32 under autocast: two ranks, and one rank with sdpa."""
    library = importlib.import_module("transformers")
    huggingface.register()
    models = []
    for attention in ("sdpa", "cp_megatron"):
        torch.manual_seed(3)
        config = library.LlamaConfig(**SIZES, attn_implementation=attention)
        models.append(library.LlamaForCausalLM(config).train())
    whole, sharded = models
    huggingface.check(sharded)  # now, so that its own calls of the engine are not counted below
    rows = make_rows((ODD,))
    batch = huggingface.shard_batch(dist.group.WORLD, **rows)
    counted = (rows["labels"][:, 1:] >= 0).sum()
    types = set()
    planned = engine.planned_attention

    def watched(
        plan: Any, kernel: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any
    ) -> Any:
        types.add((q.dtype, k.dtype, v.dtype))
        return planned(plan, kernel, q, k, v, *others, **options)

    engine.planned_attention = watched
    try:
        with torch.autocast("cpu", torch.bfloat16):
            expected = whole(**rows, num_items_in_batch=counted, use_cache=False).loss
            loss = sharded(**batch).loss
    finally:
        engine.planned_attention = planned
    expected.backward()
    loss.backward()
    errors = [
        relative(summed(x.grad, dist.group.WORLD), y.grad)
        for x, y in zip(sharded.parameters(), whole.parameters(), strict=True)
    ]
    gap = abs(float(summed(loss, dist.group.WORLD) - expected.detach()) / float(expected))
    return {"types": types, "loss": gap, "gradients": max(errors)}


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_under_autocast_is_the_one_of_one_rank() -> None:
    for found in run_ranks(llama, 2):
        assert found["types"] == {(torch.bfloat16,) * 3}
        assert found["loss"] < BFLOAT16
        assert found["gradients"] < 8 * BFLOAT16
