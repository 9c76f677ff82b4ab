"""Sinks, softcaps and the gradient of the lse against dense formulas, under every exchange.

By default each exchange runs some of the cases on each number of ranks; the slow tests run all.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel, KeptAttention
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.dropout import Dropout, keep_mask
from cp_megatron.plan import Mask
from tests.context_parallel.test_attention import MASKS
from tests.context_parallel.test_exchanges import DIMS, EXCHANGES, LAYOUTS, SIZES, options_of
from tests.kernels.rounding import RoundingKernel
from tests.oracles import attention_inputs, dense_results, relative_error, relative_gap
from tests.ranks import run_ranks

F64 = torch.float64
HEADS = ((24, 24), (24, 6), (24, 1), (24, 8))
CAP = 1.5  # scores are about 1, so that it changes them


class Case(NamedTuple):
    mask: Mask
    options: dict[str, Any]
    heads: tuple[int, int] = (24, 6)
    dims: tuple[int, int] = (8, 8)
    sinks: bool = True
    softcap: float | None = None
    lse: bool = True


def extra_inputs(seed: int, batch: int, seq_len: int, heads: int) -> tuple[Tensor, Tensor]:
    """float64: sinks [H] of the size of a row's lse, and dlse [B, H, S]."""
    generator = torch.Generator().manual_seed(seed)
    sinks = 2 + 2 * torch.randn(heads, generator=generator, dtype=F64)
    return sinks, torch.randn(batch, heads, seq_len, generator=generator, dtype=F64)


def results(case: Case, whole: list[Tensor], sinks: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    """The dense results and gradients in float64; the lse is [B, S, H]."""
    q, k, v, s = (x.clone().requires_grad_() for x in (*whole[:3], sinks))
    out, lse = dense_results(
        q, k, v, case.mask, sinks=s if case.sinks else None, softcap=case.softcap
    )
    objective = (out * whole[3]).sum() + (lse * dlse).sum() * case.lse
    objective.backward()
    grads = {f"d{name}": x.grad for name, x in zip("qkvs", (q, k, v, s)) if x.grad is not None}
    return {"out": out.detach(), "lse": lse.detach().transpose(1, 2), **grads}


def errors(rank: int, world_size: int, case: Case) -> dict[str, float]:
    """This rank's relative error of each tensor; that of the sinks' gradient after the sum."""
    whole = attention_inputs(7, 2, case.mask.seq_len, *case.heads, *case.dims)
    all_sinks, dlse = extra_inputs(8, 2, case.mask.seq_len, case.heads[0])
    expected = results(case, whole, all_sinks, dlse)
    cp = ContextParallel(dist.group.WORLD, case.mask, **case.options)
    q, k, v, dout = (cp.shard(x, 1) for x in whole)
    sinks = all_sinks.clone().requires_grad_() if case.sinks else None
    leaves = [x.requires_grad_() for x in (q, k, v)] + ([] if sinks is None else [sinks])
    attended: Any = cp.attention(q, k, v, sinks=sinks, softcap=case.softcap, return_lse=case.lse)
    if not case.lse:
        attended = (attended,)
    upstream = (dout, cp.shard(dlse, 2))[: len(attended)]
    grads = torch.autograd.grad(attended, leaves, upstream)
    found = {"out": attended[0], **{f"d{n}": x for n, x in zip("qkvs", grads)}}
    if case.lse:
        found["lse"] = attended[1].transpose(1, 2)
    assert all(x.dtype == F64 for x in found.values())
    if "ds" in found:
        dist.all_reduce(found["ds"])
    group = case.heads[0] // case.heads[1]
    terms = {"dk": group, "dv": group}
    return {
        name: relative_error(x.detach(), expected[name], cp.positions, terms.get(name, 1))
        if name != "ds"
        else relative_gap(x, expected["ds"])
        for name, x in found.items()
    }


def many_errors(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, float]]:
    return [errors(rank, world_size, case) for case in cases]


def check(cases: list[Case], world_size: int, timeout: float = 60) -> None:
    for found in run_ranks(many_errors, world_size, cases, timeout=timeout):
        for case, result in zip(cases, found, strict=True):
            names = ["out", "dq", "dk", "dv", *["ds"] * case.sinks, *["lse"] * case.lse]
            assert sorted(result) == sorted(names)
            assert max(result.values()) < 1e-12, (case, result)


def all_cases(exchange: str, world_size: int) -> list[Case]:
    """Every mask, layout and combination of features; heads and widths are drawn at random."""
    draw = random.Random(len(exchange))
    return [
        Case(mask, {"layout": layout, **options_of(exchange, world_size)},
             draw.choice(HEADS), draw.choice(DIMS), *features)
        for mask, layout in product(MASKS.values(), LAYOUTS)
        for features in product((False, True), (None, CAP), (False, True))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "world_size",
    [1, 2, pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)],
)
def test_equals_the_dense_formula(world_size: int) -> None:
    """Each exchange runs some of its cases, other ones on each number of ranks."""
    exchanges = [x for x in EXCHANGES if world_size > 1 or x != "a2a+p2p"]
    every = 47 if world_size < 8 else 191  # shares no factor with the number of features
    cases = [
        case
        for number, exchange in enumerate(exchanges)
        for case in all_cases(exchange, world_size)[(number * 7 + world_size) % every :: every]
    ]
    assert {case.sinks for case in cases} == {False, True}
    check(cases, world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_equals_the_dense_formula_whole_product(exchange: str, world_size: int) -> None:
    check(all_cases(exchange, world_size), world_size, timeout=1500)


def gaps_with_sinks(rank: int, world_size: int, size: float) -> dict[str, float]:
    """The largest relative error of a head, by tensor, with sinks ``size``, -``size``, -inf, 0."""
    mask = Mask.documents([5, 27])
    whole = attention_inputs(3, 1, 32, 4, 2, 8, 8)
    sinks = torch.tensor([size, -size, -torch.inf, 0.0], dtype=F64)
    case = Case(mask, {}, (4, 2), lse=False)
    expected = results(case, whole, sinks, torch.zeros(1, 4, 32, dtype=F64))
    cp = ContextParallel(dist.group.WORLD, mask)
    leaves = [cp.shard(x, 1).requires_grad_() for x in whole[:3]] + [sinks.requires_grad_()]
    out, lse = cp.attention(*leaves[:3], sinks=leaves[3], return_lse=True)
    grads = torch.autograd.grad(out, leaves, cp.shard(whole[3], 1))
    plain = cp.attention(*leaves[:3])
    dist.all_reduce(grads[3])
    gaps = {
        name: max(
            float((x[:, :, head] - y[:, cp.positions, head]).norm())
            / max(float(y[:, cp.positions, head].norm()), 1e-30)
            for head in range(x.shape[2])
        )
        for name, x, y in (
            ("out", out, expected["out"]),
            ("lse", lse.transpose(1, 2), expected["lse"]),
            ("dq", grads[0], expected["dq"]),
        )
    }
    gaps["ds"] = float((grads[3] - expected["ds"]).norm())
    assert torch.equal(out[:, :, 2], plain[:, :, 2]), "-inf is no sink"
    assert all(bool(x.isfinite().all()) for x in (out, lse, *grads))
    return gaps


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_sinks_of_any_size(size: float) -> None:
    """A sink far above every score leaves an output that is tiny, but as exact as any other."""
    for found in run_ranks(gaps_with_sinks, 2, size):
        assert max(found.values()) < 1e-11, found


def recomputed(rank: int, world_size: int, options: dict[str, Any]) -> list[float]:
    """Differences between attention and its recomputation with kept results."""
    mask = Mask.documents([5, 27])
    whole = attention_inputs(3, 2, 32, 8, 4, 8, 8)
    all_sinks, all_dlse = extra_inputs(4, 2, 32, 8)
    cp = ContextParallel(dist.group.WORLD, mask, **options)
    leaves = [cp.shard(x, 1).requires_grad_() for x in whole[:3]] + [all_sinks.requires_grad_()]
    upstream = cp.shard(whole[3], 1), cp.shard(all_dlse, 2)

    def attend(*inputs: Tensor, kept: KeptAttention | None = None) -> Any:
        q, k, v, s = inputs
        return cp.attention(q, k, v, sinks=s, softcap=CAP, return_lse=True, kept=kept)

    first = attend(*leaves)
    expected = [*first, *torch.autograd.grad(first, leaves, upstream)]
    again = torch.utils.checkpoint.checkpoint(
        attend, *leaves, kept=KeptAttention(), use_reentrant=False
    )
    found = [*again, *torch.autograd.grad(again, leaves, upstream)]
    return [float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize("exchange", ["p2p", "a2a+p2p"])
def test_recomputation_with_sinks_softcap_and_lse(exchange: str) -> None:
    for found in run_ranks(recomputed, 4, options_of(exchange, 4)):
        assert found == [0.0] * 6


def partly(rank: int, world_size: int, options: dict[str, Any]) -> list[float]:
    """Errors of the gradients if rank 0 uses only the lse, and the other rank only out."""
    mask = Mask.causal(32)
    whole = attention_inputs(3, 1, 32, 8, 4, 8, 8)
    sinks, dlse = extra_inputs(4, 1, 32, 8)
    cp = ContextParallel(dist.group.WORLD, mask, **options)
    first = torch.zeros(32, dtype=torch.bool)
    first[torch.from_numpy(cp.layout.positions(0))] = True
    whole[3] *= ~first[:, None, None]
    expected = results(Case(mask, {}), whole, sinks, dlse * first)
    leaves = [cp.shard(x, 1).requires_grad_() for x in whole[:3]] + [sinks.requires_grad_()]
    out, lse = cp.attention(*leaves[:3], sinks=leaves[3], return_lse=True)
    if rank == 0:
        grads = torch.autograd.grad(lse, leaves, cp.shard(dlse, 2))
    else:
        grads = torch.autograd.grad(out, leaves, cp.shard(whole[3], 1))
    dist.all_reduce(grads[3])
    gaps = [relative_error(x, expected[n], cp.positions) for n, x in zip(("dq", "dk", "dv"), grads)]
    return [*gaps, float((grads[3] - expected["ds"]).norm())]


@pytest.mark.parametrize("exchange", ["p2p", "all_gather", "a2a"])
def test_a_gradient_may_reach_one_result_on_one_rank_and_the_other_elsewhere(exchange: str) -> None:
    for found in run_ranks(partly, 2, {"exchange": exchange}):
        assert max(found) < 1e-12


class NoGradient(torch.autograd.Function):
    """Passes tensors on; its backward leaves their gradients undefined."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(grads)


def undefined(rank: int, world_size: int, return_lse: bool) -> list[float]:
    """The largest gradients of q, k and v if autograd passes no gradient to attention."""
    cp = ContextParallel(dist.group.WORLD, Mask.causal(8), exchange="a2a")
    leaves = [cp.shard(x, 1).requires_grad_() for x in attention_inputs(3, 1, 8, 4, 2, 4, 4)[:3]]
    found: Any = cp.attention(*leaves, return_lse=return_lse)
    passed = NoGradient.apply(*(found if return_lse else (found,)))
    sum(x.sum() for x in passed).backward()
    return [float(x.grad.abs().max()) for x in leaves if x.grad is not None]


@pytest.mark.parametrize("return_lse", [False, True])
def test_an_undefined_gradient_is_zero(return_lse: bool) -> None:
    assert run_ranks(undefined, 2, return_lse) == [[0.0] * 3] * 2


def test_dropout_drops_what_is_left_beside_the_sink_and_not_the_lse() -> None:
    """By the plain formula: softmax with the sink, drop the column, drop weights, rescale."""
    dropout = Dropout(probability=0.4, seed=3)
    mask = Mask.causal(12)
    whole = attention_inputs(5, 1, 12, 2, 2, 4, 4)
    sinks, dlse = extra_inputs(6, 1, 12, 2)
    leaves = [x.requires_grad_() for x in (*whole[:3], sinks)]
    q, k, v, s = leaves
    scores = CAP * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 / CAP)
    scores = scores.masked_fill(~torch.from_numpy(mask.dense()), -torch.inf)
    scores = torch.cat([scores, s[:, None, None].expand(1, 2, 12, 1)], dim=-1)
    places = torch.arange(12)
    weights = scores.softmax(-1)[..., :12] * keep_mask(dropout, places, places, 1, 2) / 0.6
    expected = torch.einsum("bhqk,bkhe->bqhe", weights, v), scores.logsumexp(-1)
    cp = ContextParallel(None, mask)
    found = cp.attention(q, k, v, sinks=s, softcap=CAP, dropout=dropout, return_lse=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    grads = (torch.autograd.grad(x, leaves, (whole[3], dlse)) for x in (found, expected))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def test_without_a_gradient_the_lse_costs_no_kernel_call() -> None:
    cp = ContextParallel(None, Mask.causal(8))
    kernel = RoundingKernel()
    calls = []
    original = kernel.backward
    kernel.backward = lambda *args: calls.append(args) or original(*args)  # type: ignore
    cp.kernels.load = lambda *_, **__: kernel  # type: ignore[method-assign]
    q, k, v, dout = (x.float().requires_grad_() for x in attention_inputs(1, 1, 8, 2, 2, 4, 4))
    for uses_lse in (False, True):
        calls.clear()
        out, lse = cp.attention(q, k, v, return_lse=True)
        loss = (out * dout).sum()
        (loss + lse.sum() if uses_lse else loss).backward()
        assert len(calls) == 1 + uses_lse


def bfloat16_errors(
    rank: int, world_size: int, exchange: str, softcap: float | None
) -> dict[str, tuple[float, float]]:
    """For each tensor, this rank's error in bfloat16, and one rank's on the same positions."""
    mask = Mask.causal(256, window=(63, 0))
    whole = [x.bfloat16() for x in attention_inputs(7, 2, mask.seq_len, 8, 2, 32, 32)]
    sinks, dlse = extra_inputs(8, 2, mask.seq_len, 8)
    case = Case(mask, {}, (8, 2), (32, 32), softcap=softcap)
    reference = results(case, [x.double() for x in whole], sinks, dlse)

    def run(cp: ContextParallel) -> list[Tensor]:
        leaves = [cp.shard(x, 1).requires_grad_() for x in whole[:3]]
        leaves.append(sinks.float().requires_grad_())  # ranks' shares would be rounded one by one
        attended: Any = cp.attention(*leaves[:3], sinks=leaves[3], softcap=softcap, return_lse=True)
        assert attended[1].dtype == torch.float32
        upstream = cp.shard(whole[3], 1), cp.shard(dlse, 2).float()
        grads = torch.autograd.grad(attended, leaves, upstream)
        assert [x.dtype for x in grads] == [x.dtype for x in leaves]
        return [attended[0], attended[1].transpose(1, 2), *grads]

    sharded = ContextParallel(dist.group.WORLD, mask, **options_of(exchange, world_size))
    found, alone = run(sharded), run(ContextParallel(None, mask))
    shares = found.pop().float()
    dist.all_reduce(shares)
    gap = [float((x.double() - reference["ds"]).norm()) for x in (shares, alone.pop())]
    return {"ds": (gap[0], gap[1])} | {
        name: tuple(
            relative_error(x.detach(), reference[name], sharded.positions)
            for x in (mine, sharded.shard(theirs, 1))
        )
        for name, mine, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, alone, strict=True)
    }  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("exchange", "softcap"), [("p2p", None), ("p2p", CAP), ("all_gather", None), ("a2a", CAP)]
)
def test_bfloat16_is_as_exact_as_one_rank(exchange: str, softcap: float | None) -> None:
    for found in run_ranks(bfloat16_errors, 2, exchange, softcap):
        for name, (error, alone) in found.items():
            assert error < 1.1 * alone, (name, error, alone)


def test_autocast_casts_the_inputs_and_not_the_sinks() -> None:
    cp = ContextParallel(None, Mask.causal(16))
    q, k, v = (x.float() for x in attention_inputs(1, 1, 16, 2, 2, 8, 8)[:3])
    sinks = torch.tensor([0.3, 1.7], requires_grad=True)
    expected = cp.attention(*(x.bfloat16() for x in (q, k, v)), sinks=sinks)
    with torch.autocast("cpu", torch.bfloat16):
        out = cp.attention(q, k, v, sinks=sinks)
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), sinks)[0].dtype == torch.float32


def differing(rank: int, world_size: int, options: list[dict[str, Any]]) -> str:
    cp = ContextParallel(dist.group.WORLD, Mask.causal(16))
    q = torch.zeros(1, 8, 2, 4)
    try:
        cp.attention(q, q, q, **options[rank])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "options",
    [
        [{"sinks": torch.zeros(2)}, {}],
        [{"softcap": 2.0}, {"softcap": 3.0}],
        [{"return_lse": True}, {}],
    ],
    ids=["sinks", "softcap", "lse"],
)
def test_ranks_that_differ_are_refused(options: list[dict[str, Any]]) -> None:
    assert all("differs from what rank" in found for found in run_ranks(differing, 2, options))


def test_sinks_that_do_not_fit_one_rank_stop_all() -> None:
    options = [{"sinks": torch.zeros(3)}, {"sinks": torch.zeros(2)}]
    zero, one = run_ranks(differing, 2, options)
    assert "must be one real number for each of 2 heads" in zero
    assert "is refused by rank 0" in one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, "must be one real number for each"),
        ({"sinks": torch.zeros(2, device="meta")}, "must be on cpu, as q is"),
        ({"softcap": 0.0}, "softcap 0.0: must be positive"),
        ({"softcap": -1.0}, "must be positive"),
    ],
)
def test_options_that_no_kernel_takes_are_refused(options: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ConfigError, match=message):
        ContextParallel(None, Mask.causal(8)).attention(x, x, x, **options)


def test_a_kernel_without_softcap_is_refused_by_name() -> None:
    x = torch.zeros(1, 8, 2, 4)
    cp = ContextParallel(None, Mask.causal(8), kernel="cpu")
    with pytest.raises(ConfigError, match=r"no softcap .*works: --kernel auto or .*reference"):
        cp.attention(x, x, x, softcap=2.0)
    choice = ContextParallel(None, Mask.causal(8)).kernels.choice(x.device, x.dtype, 4, softcap=2.0)
    assert choice.name == "reference"
    assert "not cpu: has no softcap of the scores" in choice.reason
