"""Latent attention (DeepSeek-V2, arXiv:2405.04434) against a dense formula: both ways to exchange.

The default run takes every mask with every exchange once; the slow one takes the whole product.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel, KeptAttention
from cp_megatron.plan import Mask, buffer_sizes
from tests.context_parallel.test_attention import MASKS
from tests.context_parallel.test_exchanges import options_of
from tests.oracles import relative_error
from tests.ranks import run_ranks


class Sizes(NamedTuple):
    """H query heads of widths P + R and E, and latents of widths L and R."""

    heads: int
    plain: int
    rotary: int
    value: int
    latent: int


SIZES = {
    "even": Sizes(heads=8, plain=8, rotary=4, value=8, latent=16),
    "odd": Sizes(heads=3, plain=5, rotary=3, value=12, latent=7),
    "one head": Sizes(heads=1, plain=6, rotary=2, value=4, latent=5),
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6}  # expanding sums once more than attention
WAYS = ("latent", "expanded")
SENDS_LATENTS = ("p2p", "direct", "all_gather")


def latent_inputs(seq_len: int, x: Sizes) -> dict[str, Tensor]:
    """float64 inputs of the whole row in batches of 2, and dout; the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "q": (2, seq_len, x.heads, x.plain + x.rotary),
        "latent": (2, seq_len, x.latent),
        "rotary_key": (2, seq_len, x.rotary),
        "weight": (x.heads * (x.plain + x.value), x.latent),
        "dout": (2, seq_len, x.heads, x.value),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def dense_latent(inputs: dict[str, Tensor], mask: Mask, x: Sizes) -> dict[str, Tensor]:
    """out and the gradients of q, latent, rotary_key and weight, by the formula, head by head."""
    names = ("q", "latent", "rotary_key", "weight")
    q, latent, rotary_key, weight = leaves = [inputs[n].clone().requires_grad_() for n in names]
    allowed, rows = torch.from_numpy(mask.dense()), x.plain + x.value
    outs = []
    for h in range(x.heads):
        own = weight[h * rows : (h + 1) * rows]
        scores = q[:, :, h, : x.plain] @ (latent @ own[: x.plain].T).transpose(1, 2)
        scores = scores + q[:, :, h, x.plain :] @ rotary_key.transpose(1, 2)
        scores = scores / (x.plain + x.rotary) ** 0.5
        probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outs.append(probabilities @ (latent @ own[x.plain :].T))
    out = torch.stack(outs, dim=2)
    grads = torch.autograd.grad(out, leaves, inputs["dout"])
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


class Case(NamedTuple):
    mask: Mask
    sizes: Sizes
    dtype: torch.dtype
    way: str
    options: dict[str, Any]
    recomputed: bool = False


def results_of(cp: ContextParallel, inputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """out and gradients of this rank, with the weight's summed over the group."""
    names = ("q", "latent", "rotary_key", "weight")
    parts = {n: x if n == "weight" else cp.shard(x, 1) for n, x in inputs.items()}
    leaves = [parts[name].clone().requires_grad_() for name in names]
    kept = KeptAttention() if case.recomputed else None
    out = cp.latent_attention(*leaves, kept=kept, exchange_latent=case.way)
    if case.recomputed:
        first, out = out, cp.latent_attention(*leaves, kept=kept, exchange_latent=case.way)
        assert torch.equal(first, out)
    grads = torch.autograd.grad(out, leaves, parts["dout"])
    assert {x.dtype for x in (out, *grads)} == {case.dtype}
    found = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
    if cp.group is not None:
        found["weight"] = found["weight"].double()
        dist.all_reduce(found["weight"], group=cp.group)
    return found


def errors(rank: int, world_size: int, case: Case) -> dict[str, float]:
    """The relative errors of one rank."""
    inputs = latent_inputs(case.mask.seq_len, case.sizes)
    inputs = {name: x.to(case.dtype) for name, x in inputs.items()}
    exact = {name: x.double() for name, x in inputs.items()}
    reference = dense_latent(exact, case.mask, case.sizes)
    cp = ContextParallel(dist.group.WORLD, case.mask, **case.options)
    return compare(results_of(cp, inputs, case), reference, cp, case.sizes)


def compare(
    found: dict[str, Tensor], reference: dict[str, Tensor], cp: ContextParallel, x: Sizes
) -> dict[str, float]:
    weight, exact = found["weight"].double(), reference["weight"]
    return {
        name: float((weight - exact).norm() / exact.norm())
        if name == "weight"
        else relative_error(found[name], reference[name], cp.positions, x.heads)
        for name in reference
    }


def many_errors(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, float]]:
    """Latents are expanded for two heads at once at most."""
    with mock.patch.object(buffer_sizes, "MOST_EXPANDED", 1 << 14):
        return [errors(rank, world_size, case) for case in cases]


def check(cases: list[Case], world_size: int, timeout: float = 60) -> None:
    for results in run_ranks(many_errors, world_size, cases, timeout=timeout):
        for case, result in zip(cases, results, strict=True):
            assert max(result.values()) < BOUNDS[case.dtype], (case, result)


def cases_of(world_size: int, *, whole: bool) -> list[Case]:
    """Every mask with sizes, layouts and ways in turn, or the product of all of them."""
    found = []
    kinds = list(product(SIZES.values(), ("zigzag", "balanced", "contiguous"), BOUNDS))
    exchanges = [(name, way) for way in WAYS for name in SENDS_LATENTS]
    exchanges += [(name, "auto") for name in ("a2a", "auto")]
    for number, (mask, (exchange, way)) in enumerate(product(MASKS.values(), exchanges)):
        for index in range(len(kinds)) if whole else [number * 5 % len(kinds)]:
            sizes, layout, dtype = kinds[index]
            if exchange == "a2a" and sizes.heads % world_size:
                sizes = sizes._replace(heads=world_size)
            options = {"layout": layout, "kernel": "cpu", **options_of(exchange, world_size)}
            found.append(Case(mask, sizes, dtype, way, options, bool((number + index) % 2)))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_equals_the_dense_formula(world_size: int) -> None:
    check(cases_of(world_size, whole=False), world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_equals_the_dense_formula_whole_product(world_size: int) -> None:
    check(cases_of(world_size, whole=True), world_size, timeout=1500)
