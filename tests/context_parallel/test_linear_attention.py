"""Linear recurrences and short convolutions on any number of ranks equal a loop over tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.context_parallel import ContextParallel, KeptAttention, Received, short_convolution
from cp_megatron.context_parallel.short_convolution import HaloExchange
from cp_megatron.errors import ConfigError
from cp_megatron.kernels import linear_blocks
from cp_megatron.plan import Grid, Mask, SequenceLayout, linear_tiles
from cp_megatron.plan.linear_tiles import temporary_bytes
from cp_megatron.plan.states import StatePlan, StateSize, Transition
from tests.allocations import counting_memory
from tests.context_parallel.recurrences import KINDS, convolved, inputs_of, token_by_token
from tests.oracles import relative_error
from tests.ranks import run_ranks

TOKENS = 96
MASKS = {
    "one": (TOKENS,),
    "long and short": (50, 3, 1, 1, 17, 24),
    "short": (1,) * 9 + (6,) * 14 + (3,),
    "two": (TOKENS - 1, 1),
}
TRANSITIONS: dict[str, Transition] = {
    "gated delta net": "matrix",
    "kda": "matrix",
    "gla": "vector",
    "ssd": "scalar",
}
LAYOUTS = ("zigzag", "contiguous", "balanced", "cards")


class Case(NamedTuple):
    kind: str
    lengths: tuple[int, ...]
    layout: str
    heads: tuple[int, int] = (2, 4)
    dims: tuple[int, int] = (6, 5)
    batch: int = 1
    block: int = 8
    recomputed: bool = False
    dtype: torch.dtype = torch.float64


def context(case: Case, group: dist.ProcessGroup | None) -> ContextParallel:
    mask = Mask.documents(case.lengths)
    size = 1 if group is None else group.size()
    layout: str | SequenceLayout = case.layout
    if layout == "cards":  # tokens are dealt one by one
        dealt = (tuple((i, i + 1) for i in range(r, mask.seq_len, size)) for r in range(size))
        layout = SequenceLayout(tuple(dealt), "contiguous")
    return ContextParallel(group, mask, layout)


def errors(rank: int, world_size: int, cases: Sequence[Case]) -> list[dict[str, float]]:
    """The largest relative errors of out and of every gradient, by name, for each case."""
    group = dist.group.WORLD if world_size > 1 else None
    return [of_case(case, group) for case in cases]


def of_case(
    case: Case,
    group: dist.ProcessGroup | None,
    of_heads: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, float]:
    """Errors of the heads that ``of_heads`` takes from a tensor; the oracle computes all heads."""
    cp = context(case, group)
    names = ("q", "k", "v", "g", "beta")
    whole = inputs_of(case.kind, case.batch, TOKENS, heads=case.heads, dims=case.dims)
    whole = [x if x is None else x.to(case.dtype).double() for x in whole]
    dout = torch.randn(whole[2].shape, generator=torch.Generator().manual_seed(2)).double()
    oracle = [None if x is None else x.clone().requires_grad_() for x in whole]
    expected = token_by_token(*oracle, case.lengths)
    expected.backward(dout)
    own = [
        None if x is None else of_heads(cp.shard(x, 1)).to(case.dtype).requires_grad_()
        for x in whole
    ]
    with mock.patch.object(linear_blocks, "BLOCK", case.block):
        for kept in (KeptAttention(), Received()) if case.recomputed else (None,):
            out = cp.linear_attention(*own, kept=kept)
            if kept is not None:
                with mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError):
                    again = cp.linear_attention(*own, kept=kept)
                assert torch.equal(out, again)
                out = again
        out.backward(of_heads(cp.shard(dout, 1)).to(case.dtype))
    found = {"out": relative_error(out.double(), of_heads(expected.detach()), cp.positions)}
    for name, x, y in zip(names, own, oracle):
        if x is not None:
            found[name] = relative_error(x.grad.double(), of_heads(y.grad), cp.positions)
    return found


def cases_of(kind: str) -> list[Case]:
    """Every mask on every layout, with batches, blocks, heads and recomputation in turn."""
    found = []
    for number, (lengths, layout) in enumerate(
        (lengths, layout) for lengths in MASKS.values() for layout in LAYOUTS
    ):
        changes: dict[str, Any] = {}
        if number % 3 == 1:
            changes = {"batch": 2, "block": 5}
        elif number % 3 == 2:
            changes = {"heads": (3, 3), "recomputed": True, "block": 64}
        found.append(Case(kind, lengths, layout, **changes))
    return found


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        pytest.param(kind, size, marks=() if is_default else pytest.mark.slow)
        for kind in KINDS
        for size in (1, 2, 3, 4, 6, 8)
        for is_default in [size == 3 or (kind == KINDS[0] and size == 1)]
    ],
)
def test_equals_a_loop_over_tokens(kind: str, world_size: int) -> None:
    cases = [x for x in cases_of(kind) if x.layout != "zigzag" or TOKENS % (2 * world_size) == 0]
    for result in run_ranks(errors, world_size, cases, timeout=240):
        for case, found in zip(cases, result, strict=True):
            assert max(found.values()) < 1e-12, (case, found)


def tiled(rank: int, world_size: int, case: Case) -> list[dict[str, float]]:
    """Heads one by one, and then as many as share a key head."""
    group, found = dist.group.WORLD if world_size > 1 else None, []
    for width in (1, case.heads[1] // case.heads[0]):
        of_head = linear_tiles.temporary_bytes(
            *case.dims, tokens_in_blocks(case, world_size), 8, case.block, per_channel=False
        )
        with mock.patch.object(linear_tiles, "TILE_BYTES", width * of_head):
            found.append(of_case(case, group))
    return found


def tokens_in_blocks(case: Case, world_size: int) -> int:
    held = TOKENS // (2 * world_size)
    return case.batch * 2 * -(-held // case.block) * case.block


@pytest.mark.parametrize("world_size", [1, 2])
def test_heads_may_be_computed_in_tiles(world_size: int) -> None:
    case = Case(KINDS[0], MASKS["one"], "zigzag", heads=(2, 6), batch=2)
    for result in run_ranks(tiled, world_size, case):
        for found in result:
            assert max(found.values()) < 1e-12, found


def test_temporary_memory_is_bounded() -> None:
    """The most that forward and backward hold, beside the output and the gradients."""
    shape, dim = (1, 1024, 8), 64
    q, k, v = (torch.randn(*shape, dim) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v, -torch.rand(shape), torch.rand(shape))]
    cp = ContextParallel(None, Mask.causal(1024))
    out = cp.linear_attention(*inputs)
    dout, gradients = torch.ones_like(out), sum(x.nbytes for x in inputs)
    for num_heads in (1, 4):
        tokens, widths = shape[1], (dim, dim)
        most = num_heads * temporary_bytes(
            *widths, tokens, 4, linear_blocks.BLOCK, per_channel=False
        )
        with mock.patch.object(linear_tiles, "TILE_BYTES", most), counting_memory() as count:
            out = cp.linear_attention(*inputs)
        assert count.peak < out.nbytes + most
        with mock.patch.object(linear_tiles, "TILE_BYTES", most), counting_memory() as count:
            torch.autograd.grad(out, inputs, dout)
        assert gradients + most / 2 < count.peak < gradients + most


def received(rank: int, world_size: int, case: Case, tokens: int) -> list[int]:
    """Bytes that arrive from other ranks in forward and in backward, and what the plan says."""
    case = case._replace(lengths=tuple(n * tokens // TOKENS for n in case.lengths))
    cp = context(case, dist.group.WORLD)
    whole = inputs_of(case.kind, case.batch, tokens, heads=case.heads, dims=case.dims)
    own = [None if x is None else cp.shard(x, 1).float().requires_grad_() for x in whole]
    counted: list[int] = []
    send = dist.all_to_all_single

    def counting(result: Tensor, sent: Tensor, sizes: list[int], *rest: Any, **options: Any) -> Any:
        counted.append((sum(sizes) - sizes[rank]) * result.element_size())
        return send(result, sent, sizes, *rest, **options)

    with mock.patch.object(dist, "all_to_all_single", counting):
        out = cp.linear_attention(*own)
        forward = sum(counted)
        out.sum().backward()
    assert len(counted) == 4
    size = StateSize.of(*case.dims, TRANSITIONS[case.kind])
    plan = StatePlan.of(cp.mask, cp.layout, case.heads[1])
    expected = [plan.bytes_received(rank, size, backward=backward) for backward in (False, True)]
    return [forward, sum(counted) - forward, *(case.batch * x for x in expected)]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_plan_and_do_not_grow_with_the_tokens(kind: str) -> None:
    for layout in ("zigzag", "contiguous"):
        case = Case(kind, MASKS["one"], layout, batch=2)
        short = run_ranks(received, 3, case, TOKENS)
        for forward, backward, *planned in short:
            assert [forward, backward] == planned
        assert run_ranks(received, 3, case, 2 * TOKENS) == short
        assert sum(map(sum, short)) > 0


class Messages(TorchDispatchMode):
    """Counts what reaches a process group, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def messages(rank: int, world_size: int) -> list[dict[str, int]]:
    """What a convolution and a recurrence send, forward and backward."""
    mask = Mask.documents((70, 26))
    cp = ContextParallel(dist.group.WORLD, mask, "zigzag", check_ranks="never")
    whole = inputs_of(KINDS[0], 1, TOKENS, heads=(2, 4), dims=(6, 5))
    q, k, v, g, beta = (cp.shard(x, 1).requires_grad_() for x in whole if x is not None)
    weight = torch.randn(20, WIDTH, dtype=torch.float64, requires_grad=True)
    found = []
    post = short_convolution.post
    with mock.patch.object(short_convolution, "post", side_effect=post) as halos:
        with Messages() as forward:
            mixed = cp.short_conv(v.flatten(2), weight).unflatten(2, (4, 5))
            out = cp.linear_attention(q, k, mixed, g, beta)
        found.append({**forward.names, "halos": halos.call_count})
        with Messages() as backward:
            out.sum().backward()
        found.append({**backward.names, "halos": halos.call_count - 1})
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_three_messages_wait_for_each_other_each_way(world_size: int) -> None:
    """The halo, states to the ranks that chain them, and back."""
    for result in run_ranks(messages, world_size):
        for counts in result:
            assert counts.pop("halos") == 1
            assert counts.pop("alltoall_base_") == 2
            assert set(counts) <= {"send", "recv_"}


def on_a_grid(rank: int, world_size: int, case: Case) -> dict[str, float]:
    """TP 2 x CP 2: every tensor parallel rank has half of the heads."""
    groups = ParallelGroups.create(Grid(dp=1, cp=2, tp=2), "cpu")
    tp = groups.coordinates.tp

    def half(x: Tensor) -> Tensor:
        size = x.shape[2] // 2
        return x[:, :, tp * size : (tp + 1) * size]

    return of_case(case, groups.cp, half)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_heads_shared_by_tensor_parallel_ranks(kind: str) -> None:
    for found in run_ranks(on_a_grid, 4, Case(kind, MASKS["long and short"], "zigzag", batch=2)):
        assert max(found.values()) < 1e-12, found


def low_precision(rank: int, world_size: int, case: Case) -> dict[str, float]:
    return of_case(case, dist.group.WORLD if world_size > 1 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_round_no_more_than_one(dtype: torch.dtype) -> None:
    """States travel in float32, so only inputs and outputs are rounded to bfloat16."""
    case = Case("gated delta net", MASKS["one"], "zigzag", dtype=dtype)
    (alone,) = run_ranks(low_precision, 1, case)
    for found in run_ranks(low_precision, 4, case):
        for name, error in found.items():
            assert error < 2 * alone[name] + (0 if dtype == torch.bfloat16 else 2e-7), name


WIDTH = 4


def convolution_errors(rank: int, world_size: int, batch: int) -> list[dict[str, float]]:
    """Of every mask and layout."""
    group, found = dist.group.WORLD if world_size > 1 else None, []
    generator = torch.Generator().manual_seed(4)
    x, dout = torch.randn(2, batch, TOKENS, 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(3, WIDTH, generator=generator).double(), torch.randn(3).double()
    for lengths in MASKS.values():
        for layout in LAYOUTS:
            cp = context(Case("ssd", lengths, layout), group)
            oracle = [y.clone().requires_grad_() for y in (x, weight, bias)]
            expected = convolved(*oracle, lengths)
            expected.backward(dout)
            own = [cp.shard(x, 1), weight.clone(), bias.clone()]
            own = [y.requires_grad_() for y in own]
            kept = Received()
            first = cp.short_conv(*own, kept=kept)
            with mock.patch.object(HaloExchange, "fetch", side_effect=AssertionError):
                out = cp.short_conv(*own, kept=kept)
            assert torch.equal(first, out)
            out.backward(cp.shard(dout, 1))
            shares = [y.grad.clone() for y in own[1:]]
            if group is not None:
                for share in shares:
                    dist.all_reduce(share)
            places = cp.positions
            found.append(
                {
                    "out": relative_error(out.detach(), expected.detach(), places),
                    "x": relative_error(own[0].grad, oracle[0].grad, places),
                    "weight": float((shares[0] - oracle[1].grad).norm()),
                    "bias": float((shares[1] - oracle[2].grad).norm()),
                }
            )
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_convolution_reads_its_document_on_other_ranks(world_size: int) -> None:
    """Documents may be shorter than the kernel, and a token's predecessors on three ranks."""
    for result in run_ranks(convolution_errors, world_size, 2):
        for found in result:
            assert max(found.values()) < 1e-12, found


def test_autocast_casts_all_inputs_alike() -> None:
    cp = ContextParallel(None, Mask.causal(8))
    shapes = (1, 8, 3), (3, WIDTH), (3,)
    with torch.autocast("cpu", torch.bfloat16):
        assert cp.short_conv(*map(torch.randn, shapes)).dtype == torch.bfloat16
        q, g = torch.randn(1, 8, 2, 4), -torch.rand(1, 8, 2)
        assert cp.linear_attention(q, q, q, g, g.exp()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"q": (1, 9, 2, 6)}, "linear_attention"),
        ({"k": (1, 8, 1, 6)}, "linear_attention"),
        ({"v": (1, 8, 3, 5)}, "linear_attention"),
        ({"g": (1, 8, 4, 5)}, "linear_attention"),
        ({"beta": (1, 8, 2)}, "linear_attention"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], start: str) -> None:
    shapes = {"q": (1, 8, 2, 6), "k": (1, 8, 2, 6), "v": (1, 8, 4, 5), "g": (1, 8, 4)}
    shapes |= {"beta": (1, 8, 4), **change}
    cp = ContextParallel(None, Mask.causal(8))
    with pytest.raises(ConfigError, match=start):
        cp.linear_attention(*(torch.randn(shape) for shape in shapes.values()))


def test_masks_without_a_state_are_refused() -> None:
    x, weight = torch.randn(1, 8, 3), torch.randn(3, WIDTH)
    for mask in (Mask.full(8), Mask.causal(8, (3, 0))):
        cp = ContextParallel(None, mask)
        with pytest.raises(ConfigError, match="state"):
            cp.short_conv(x, weight)
