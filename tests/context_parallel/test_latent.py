"""Latent attention (DeepSeek-V2, arXiv:2405.04434) equals a dense formula, whatever is exchanged.

The default run tries each exchange with some of the masks. The slow tests try it with all masks,
and then every mask, exchange, size, layout and type with each other.

Shapes: B = batch, S = tokens of the row, H = heads, and P, R, E and L as in ``Sizes``.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm import nonblocking
from cp_megatron.context_parallel import ContextParallel, KeptAttention
from cp_megatron.context_parallel.latent_expansion import LatentExpansion
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.plan import Mask, Schedule, SequenceLayout, buffer_sizes
from cp_megatron.plan.buffer_sizes import AttentionSizes, BufferSizes
from tests.context_parallel.test_attention import MASKS
from tests.context_parallel.test_exchanges import options_of
from tests.kernels.rounding import RoundingKernel
from tests.oracles import relative_error, relative_gap
from tests.ranks import run_ranks


class Sizes(NamedTuple):
    """The number of query heads H, and the widths P, R, E and L.

    Queries and keys are P + R wide, values E; latents are L wide, rotary keys R.
    """

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
    """Returns float64 inputs of two whole rows, and dout; they are the same on every rank."""
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
    """Computes out, and the gradients of the four inputs, by the formula, head by head."""
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
    """Returns this rank's out and gradients; that of the weight is summed over the group."""
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
    """Returns the relative errors of one rank."""
    inputs = latent_inputs(case.mask.seq_len, case.sizes)
    inputs = {name: x.to(case.dtype) for name, x in inputs.items()}
    exact = {name: x.double() for name, x in inputs.items()}
    reference = dense_latent(exact, case.mask, case.sizes)
    cp = ContextParallel(dist.group.WORLD, case.mask, **case.options)
    return compare(results_of(cp, inputs, case), reference, cp, case.sizes)


def compare(
    found: dict[str, Tensor], reference: dict[str, Tensor], cp: ContextParallel, x: Sizes
) -> dict[str, float]:
    """Relative errors of this rank's tensors; that of the weight's gradient after the sum."""
    return {
        name: relative_gap(found[name], exact)
        if name == "weight"
        else relative_error(found[name], exact, cp.positions, x.heads)
        for name, exact in reference.items()
    }


def many_errors(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, float]]:
    """Returns the errors of each case. At most two heads are expanded at once."""
    with mock.patch.object(buffer_sizes, "MOST_EXPANDED", 1 << 14):
        return [errors(rank, world_size, case) for case in cases]


def check(cases: list[Case], world_size: int, timeout: float = 60) -> None:
    for results in run_ranks(many_errors, world_size, cases, timeout=timeout):
        for case, result in zip(cases, results, strict=True):
            assert max(result.values()) < BOUNDS[case.dtype], (case, result)


def cases_of(world_size: int, *, whole: bool) -> list[Case]:
    """Every mask with each exchange; sizes, layouts and types in turn, or all if ``whole``."""
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


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_equals_the_dense_formula(world_size: int) -> None:
    """Every third case runs, others on each number of ranks. Each mask and exchange occurs."""
    check(cases_of(world_size, whole=False)[world_size % 3 :: 3], world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_equals_the_dense_formula_on_more_ranks(world_size: int) -> None:
    check(cases_of(world_size, whole=False), world_size, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_equals_the_dense_formula_whole_product(world_size: int) -> None:
    check(cases_of(world_size, whole=True), world_size, timeout=1500)


def windows(rank: int, world_size: int, mask: Mask, case: Case) -> tuple[dict[str, float], bool]:
    """Returns the errors of a layer with another window, and whether it sends latents."""
    cp = ContextParallel(dist.group.WORLD, mask, **case.options).within(case.mask.window)
    assert cp.mask == case.mask
    inputs = latent_inputs(mask.seq_len, case.sizes)
    reference = dense_latent(inputs, case.mask, case.sizes)
    found = compare(results_of(cp, inputs, case), reference, cp, case.sizes)
    x = case.sizes
    heads = x.heads, x.heads, x.plain + x.rotary, x.value
    return found, cp.schedule(*heads, (x.latent, x.rotary)).latent is not None


def test_layers_with_windows_do_what_their_batch_chose() -> None:
    mask = MASKS["causal"]
    case = Case(mask.within((5, 0)), SIZES["even"], torch.float64, "auto", {"kernel": "cpu"})
    for found, sends_latents in run_ranks(windows, 4, mask, case):
        assert sends_latents
        assert max(found.values()) < 1e-12


def dropped(rank: int, world_size: int, options: dict[str, Any], way: str) -> dict[str, float]:
    """Returns the differences of this rank from one rank with the same dropout."""
    case = Case(MASKS["documents"], SIZES["even"], torch.float64, way, options)
    inputs = latent_inputs(case.mask.seq_len, case.sizes)
    dropout = Dropout(probability=0.3, seed=11, batch0=5, head0=8)

    def run(cp: ContextParallel, way: str) -> dict[str, Tensor]:
        given = cp.latent_attention
        with mock.patch.object(cp, "latent_attention", partial(given, dropout=dropout)):
            return results_of(cp, inputs, case._replace(way=way))

    sharded = ContextParallel(dist.group.WORLD, case.mask, **options)
    whole = run(ContextParallel(None, case.mask), "expanded")
    return compare(run(sharded, way), whole, sharded, case.sizes)


@pytest.mark.parametrize("way", WAYS)
def test_dropout_drops_the_same_pairs(way: str) -> None:
    for exchange in ("p2p", "all_gather"):
        with_dropout = {"layout": "zigzag", **options_of(exchange, 4)}
        for found in run_ranks(dropped, 4, with_dropout, way):
            assert max(found.values()) < 1e-12


def test_a_frozen_weight_gets_no_gradient_and_costs_none() -> None:
    x, cp = SIZES["odd"], ContextParallel(None, MASKS["window"], exchange_latent="latent")
    q, latent, rotary_key, weight, dout = latent_inputs(48, x).values()
    leaves = [y.requires_grad_() for y in (q, latent, rotary_key)]
    expected = dense_latent(latent_inputs(48, x), MASKS["window"], x)
    with mock.patch.object(LatentExpansion, "_add_to_weight") as added:
        grads = torch.autograd.grad(cp.latent_attention(*leaves, weight), leaves, dout)
    added.assert_not_called()
    for grad, name in zip(grads, ("q", "latent", "rotary_key"), strict=True):
        torch.testing.assert_close(grad, expected[name])


BF16 = Sizes(heads=8, plain=32, rotary=16, value=32, latent=64)


def bfloat16_errors(
    rank: int, world_size: int, rounding: bool
) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns, for each exchange of latents, this rank's errors and those of one rank."""
    mask = Mask.causal(512)
    inputs = {name: x.bfloat16() for name, x in latent_inputs(mask.seq_len, BF16).items()}
    exact = dense_latent({name: x.double() for name, x in inputs.items()}, mask, BF16)

    def run(cp: ContextParallel, way: str) -> dict[str, Tensor]:
        if rounding:
            cp.kernels.load = lambda *_, **__: RoundingKernel()  # type: ignore[method-assign]
        return results_of(cp, inputs, Case(mask, BF16, torch.bfloat16, way, {}))

    alone = run(ContextParallel(None, mask), "expanded")
    found = {}
    for exchange in SENDS_LATENTS:
        cp = ContextParallel(dist.group.WORLD, mask, **options_of(exchange, world_size))
        own = {n: x if n == "weight" else cp.shard(x, 1) for n, x in alone.items()}
        errors = [compare(x, exact, cp, BF16) for x in (run(cp, "latent"), own)]
        found[exchange] = {name: (errors[0][name], errors[1][name]) for name in exact}
    return found


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("world_size", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_bfloat16_is_as_exact_as_one_rank(world_size: int, rounding: bool) -> None:
    for results in run_ranks(bfloat16_errors, world_size, rounding):
        for exchange, tensors in results.items():
            for name, (error, alone) in tensors.items():
                assert 0 < error < 1.1 * alone, (exchange, name, error, alone)


def bytes_on_the_wire(
    rank: int, world_size: int, mask: Mask, x: Sizes, options: dict[str, Any]
) -> tuple[int, int, int]:
    """Returns the bytes that this rank receives: in forward, by the schedule, and in backward."""
    received = [0]
    send_receive, gather = dist.batch_isend_irecv, nonblocking.start_host_gather

    def counting(operations: list[dist.P2POp]) -> Any:
        received[0] += sum(op.tensor.nbytes for op in operations if op.op is dist.irecv)
        return send_receive(operations)

    def gathering(result: Tensor, given: Tensor, group: dist.ProcessGroup) -> Any:
        received[0] += result.nbytes - given.nbytes
        return gather(result, given, group)

    cp = ContextParallel(dist.group.WORLD, mask, check_ranks=False, **options)
    inputs = latent_inputs(mask.seq_len, x)
    leaves = [
        (y if name == "weight" else cp.shard(y, 1)).float().requires_grad_()
        for name, y in inputs.items()
    ]
    with (
        mock.patch.object(dist, "batch_isend_irecv", counting),
        mock.patch.object(nonblocking, "start_host_gather", gathering),
    ):
        out = cp.latent_attention(*leaves[:4], exchange_latent="latent")
        forward, received[0] = received[0], 0
        torch.autograd.grad(out, leaves[:4], leaves[4].detach())
    heads = x.heads, x.heads, x.plain + x.rotary, x.value
    schedule = cp.schedule(*heads, (x.latent, x.rotary), "latent")
    batch = inputs["q"].shape[0]
    return forward, batch * schedule.bytes_received(rank, heads[2], 4, x.value), received[0]


@pytest.mark.parametrize("exchange", SENDS_LATENTS)
@pytest.mark.parametrize("mask", ["causal", "documents", "window"])
def test_bytes_on_the_wire_are_those_of_the_schedule(exchange: str, mask: str) -> None:
    options, x = {"layout": "zigzag", **options_of(exchange, 4)}, SIZES["even"]
    results = run_ranks(bytes_on_the_wire, 4, MASKS[mask], x, options)
    assert all(forward == expected for forward, expected, _ in results)
    keys = sum(forward for forward, _, _ in results)
    assert keys > 0
    if exchange == "direct":  # keys again, and a gradient in float32 for each of them
        assert sum(backward for _, _, backward in results) == 2 * keys


def kept_bytes(
    rank: int, world_size: int, masks: list[Mask], x: Sizes, options: dict[str, Any]
) -> tuple[list[int], set[tuple[int, ...]]]:
    """Returns the bytes of the buffers after each mask, and the shapes that backward keeps."""
    cp = ContextParallel(dist.group.WORLD, masks[0], kernel="cpu", **options)
    found, kept = [], set()
    with mock.patch.object(buffer_sizes, "MOST_EXPANDED", 1 << 14):
        for mask in masks:
            layer, inputs = cp.with_mask(mask), latent_inputs(mask.seq_len, x)
            parts = {n: y if n == "weight" else layer.shard(y, 1) for n, y in inputs.items()}
            dout = parts.pop("dout")
            leaves = [y.clone().requires_grad_() for y in parts.values()]
            out = layer.latent_attention(*leaves, exchange_latent="latent")
            kept |= {tuple(y.shape) for y in out.grad_fn.saved_tensors}  # type: ignore[union-attr]
            torch.autograd.grad(out, leaves, dout)
            found.append(cp.buffers.held_bytes)
    return found, kept


@pytest.mark.parametrize("exchange", SENDS_LATENTS)
def test_memory_is_what_the_plan_predicts_and_no_head_is_kept(exchange: str) -> None:
    x, size = SIZES["even"], 4
    masks = [Mask.documents([3 * n, 96 - 3 * n]) for n in range(1, 16, 3)] + [Mask.causal(96)]
    options = options_of(exchange, size)
    dims = {"head_dim": x.plain + x.rotary, "v_head_dim": x.value}
    latents = {"latent": (x.latent, x.rotary), "exchange_latent": "latent"}
    rows = AttentionSizes(batch=2, num_tokens=24, kv_heads=8, **dims, element=8, exact=8)
    for rank, (held, kept) in enumerate(run_ranks(kept_bytes, size, masks, x, options)):
        sizes = BufferSizes()
        with mock.patch.object(buffer_sizes, "MOST_EXPANDED", 1 << 14):
            for mask, found in zip(masks, held, strict=True):
                layout = SequenceLayout.make(mask, size, "auto")
                how = {"num_heads": 8, "route": "auto", **options, **dims, **latents}
                schedule = Schedule.build(mask, layout, **how)
                for backward in (False, True):
                    sizes.add(schedule, rank, rows, backward=backward)
                assert sizes.num_bytes == found > 0
        # q, latent, rotary key, out, lse, weight; k would have the shape of q, v that of out.
        assert kept == {
            (2, 24, 8, 12),
            (2, 24, 16),
            (2, 24, 4),
            (2, 24, 8, 8),
            (2, 8, 24),
            (128, 16),
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": (1, 8, 5)}, "latent and the columns of weight must be equally wide"),
        ({"q": (1, 7, 2, 6)}, "must agree in batch and tokens"),
        ({"q": (1, 8, 2, 2)}, "queries must be wider than rotary_key"),
        ({"weight": (9, 4)}, "weight must have equally many rows for each head, more than 4"),
        ({"weight": (8, 4)}, "weight must have equally many rows for each head, more than 4"),
        ({"rotary_key": (1, 8, 1, 2)}, "latent and rotary_key [batch, tokens, width]"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"q": (1, 8, 2, 6), "latent": (1, 8, 4), "rotary_key": (1, 8, 2), "weight": (14, 4)}
    cp = ContextParallel(None, Mask.causal(8))
    cp.latent_attention(*map(torch.zeros, shapes.values()))
    with pytest.raises(ConfigError, match=re.escape(message)):
        cp.latent_attention(*map(torch.zeros, (shapes | change).values()))


def refused(rank: int, world_size: int, way: str) -> str:
    """Rank 1 brings a weight that does not fit the latent; no rank may hang."""
    x = SIZES["even"]
    inputs = latent_inputs(48, x)
    cp = ContextParallel(dist.group.WORLD, MASKS["causal"])
    q, latent, rotary_key = (cp.shard(inputs[name], 1) for name in ("q", "latent", "rotary_key"))
    weight = inputs["weight"][:, 1:].contiguous() if rank else inputs["weight"]
    with pytest.raises(ConfigError) as error:
        cp.latent_attention(q, latent, rotary_key, weight, exchange_latent=way)
    return str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_learn_of_a_mistake(way: str) -> None:
    first, second = run_ranks(refused, 2, way)
    assert "is refused by rank 1 of the group" in first
    assert "equally wide" in second


def differing(rank: int, world_size: int) -> str:
    """The ranks ask for different ways to exchange; no rank may hang."""
    x, cp = SIZES["even"], ContextParallel(dist.group.WORLD, MASKS["causal"])
    inputs = latent_inputs(48, x)
    q, latent, rotary_key = (cp.shard(inputs[name], 1) for name in ("q", "latent", "rotary_key"))
    with pytest.raises(ConfigError) as error:
        cp.latent_attention(q, latent, rotary_key, inputs["weight"], exchange_latent=WAYS[rank])
    return str(error.value)


def test_ranks_that_send_different_things_are_refused() -> None:
    assert all("differs from what rank" in message for message in run_ranks(differing, 2))


def test_latents_cannot_be_exchanged_as_heads() -> None:
    cp = ContextParallel(None, Mask.causal(8))
    for options, name in (({"exchange": "a2a"}, "latent"), ({}, "latents")):
        with pytest.raises(ConfigError, match="--cp-latent-exchange"):
            ContextParallel(None, Mask.causal(8), exchange_latent=name, **options)
    shapes = [(1, 8, 2, 6), (1, 8, 4), (1, 8, 2), (14, 4)]
    with pytest.raises(ConfigError, match="is not a way to exchange latents"):
        cp.latent_attention(*map(torch.zeros, shapes), exchange_latent="never")
