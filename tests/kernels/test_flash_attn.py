"""The flash-attn kernels against doubles of the packages, alone and in the ring."""

from __future__ import annotations

import sys
from functools import cache, wraps
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.flash_attn import FlashAttention
from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.plan import Mask
from cp_megatron.plan.tiling import CAUSAL, FULL, Band
from tests.context_parallel.test_sinks import Case, extra_inputs, results
from tests.kernels import double, double_many, double_newer
from tests.kernels.cases import SCALE, TILES, Attention, allowed, error, oracle
from tests.oracles import attention_inputs, relative_error, relative_gap
from tests.ranks import run_ranks

BF16 = torch.bfloat16
NAMES = ["2", "2 old", "3", "3 beta", "4"]


def kernel_of(name: str, *, deterministic: bool = False, softcap: float | None = None) -> Kernel:
    interfaces: dict[str, Any] = {
        "2": double_many.generation_two(),
        "2 old": double.pair_window_interface(),
        "3": double_newer.hopper_interface(),
        "3 beta": double_newer.beta_interface(),
        "4": double_newer.cute_interface(),
    }
    generation = f"flash_attn_{name[0]}"
    options: dict[str, Any] = {"deterministic": deterministic, "softcap": softcap}
    return FlashAttention(generation, interfaces[name], **options)


@cache
def oracle_of(tile: str, heads: tuple[int, int, int, int]) -> Attention:
    return oracle(allowed(*TILES[tile]), heads, dtype=BF16)


GENERATIONS = pytest.mark.parametrize("name", NAMES)


def worst(kernel: Kernel, band: Band, a: Attention) -> float:
    """The largest error of out, gradients and (1e4 times) lse, with operands in bfloat16."""
    q, k, v, dout = (x.to(BF16) for x in (a.q, a.k, a.v, a.dout))
    assert kernel.compute_dtype(BF16) == BF16
    out, lse = kernel.forward(q, k, v, band, SCALE)
    assert (out.dtype, lse.dtype) == (BF16, torch.float32)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    lse_error = error(lse, a.lse)
    grads = kernel.backward(BackwardInputs(dout, q, k, v, out, lse), band, SCALE)
    found = zip((out, *grads), (a.out, a.dq, a.dk, a.dv))
    return max(1e4 * lse_error, *(error(x, y) for x, y in found))


@GENERATIONS
@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile(name: str, tile: str) -> None:
    """Heads of every grouping, and widths that differ or are no multiples of 8."""
    for heads in ((4, 2, 16, 8), (2, 2, 5, 12)):
        assert worst(kernel_of(name), TILES[tile][0], oracle_of(tile, heads)) < 1e-2


@GENERATIONS
@pytest.mark.parametrize("tile", ["full tall", "causal", "left only", "both sides"])
def test_softcap(name: str, tile: str) -> None:
    a = oracle(allowed(*TILES[tile]), (4, 2, 16, 8), dtype=BF16, softcap=0.7)
    assert worst(kernel_of(name, softcap=0.7), TILES[tile][0], a) < 1e-2
    assert worst(kernel_of(name, softcap=0.8), TILES[tile][0], a) > 1e-2


def test_a_package_without_an_exact_softcap_is_refused() -> None:
    """Before April 2026, generation 4 took the argument, and its backward ignored it."""
    older = double_newer.cute_interface()
    del older.utils.create_softcap_scoremod_bwd
    FlashAttention("flash_attn_4", older)
    with pytest.raises(ConfigError, match="too old: it has no exact softcap"):
        FlashAttention("flash_attn_4", older, softcap=30.0)
    oldest = double_newer.beta_interface()
    oldest._flash_attn_forward = lambda q, k, v, softmax_scale, causal: None
    with pytest.raises(ConfigError, match="too old: it has no exact softcap"):
        FlashAttention("flash_attn_3", oldest, softcap=30.0)


@GENERATIONS
def test_the_lse_of_backward_may_be_a_view_and_merged(name: str) -> None:
    """In the ring, lse is cut from the shard's and covers more than this tile's keys."""
    mask = torch.cat([torch.ones(5, 3, dtype=torch.bool), allowed(CAUSAL, 5, 5)], dim=1)
    a = oracle(mask, (4, 2, 8, 8), dtype=BF16)
    shard_lse = torch.full((2, 6, 9), torch.nan)
    shard_lse[:, 1:5, 2:7] = a.lse
    q, k, v, dout, out = (x.to(BF16) for x in (a.q, a.k, a.v, a.dout, a.out))
    view = shard_lse[:, 1:5, 2:7]
    kernel = kernel_of(name)
    grads = [
        kernel.backward(BackwardInputs(dout, q, k[:, part], v[:, part], out, view), band, SCALE)
        for band, part in ((FULL, slice(0, 3)), (CAUSAL, slice(3, 8)))
    ]
    assert error(grads[0][0] + grads[1][0], a.dq) < 1e-2
    assert error(torch.cat([g[1] for g in grads], dim=1), a.dk) < 1e-2
    assert error(torch.cat([g[2] for g in grads], dim=1), a.dv) < 1e-2


@GENERATIONS
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_gets_the_deterministic_argument(
    name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel: Any = kernel_of(name, deterministic=deterministic)
    seen: list[Any] = []
    original = kernel._backward_op

    @wraps(original)
    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return original(*args, **kwargs)

    kernel._backward_op = spy
    worst(kernel, FULL, oracle(allowed(FULL, 4, 4), (2, 2, 8, 8), dtype=BF16))
    assert [kwargs["deterministic"] for kwargs in seen] == [deterministic]


def test_flash_attention_4_without_windows_is_refused() -> None:
    interface = double_newer.cute_interface()
    interface._flash_attn_bwd = lambda q, k, v, out, dout, lse, softmax_scale, causal: None
    with pytest.raises(ConfigError, match="too old: its backward has no windows"):
        FlashAttention("flash_attn_4", interface)


BAD: dict[str, tuple[Any, str]] = {
    "type": (lambda q, k, v: (q.float(), k, v), "only fp16 and bf16"),
    "types": (lambda q, k, v: (q, k.half(), v), "one type"),
    "layout": (lambda q, k, v: (q.transpose(1, 2), k, v), "query heads|expected"),
    "strides": (lambda q, k, v: (q.mT.contiguous().mT, k, v), "last dim"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_double_refuses_what_the_extension_refuses(case: str) -> None:
    a = oracle(allowed(FULL, 5, 7), (4, 2, 8, 8), dtype=BF16)
    change, rule = BAD[case]
    q, k, v = change(*(x.to(BF16) for x in (a.q, a.k, a.v)))
    with pytest.raises(double.RefusedByExtension, match=rule):
        kernel_of("2").forward(q, k, v, FULL, SCALE)


MODULES = [
    ("flash_attn_2", "flash_attn.flash_attn_interface", double),
    ("flash_attn_3", "flash_attn_interface", double_newer.hopper_interface()),
    ("flash_attn_4", "flash_attn.cute.interface", double_newer.cute_interface()),
]


@pytest.mark.parametrize(("name", "module", "interface"), MODULES, ids=lambda x: str(x)[:12])
def test_each_generation_is_imported_from_its_module(
    name: str, module: str, interface: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = module.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, module, interface)
    # Bypass the cache: the session must not keep a kernel made of the double.
    loaded: Any = load_kernel.__wrapped__(name, deterministic=True, softcap=30.0)
    assert loaded.name == name
    assert loaded._deterministic
    assert loaded._constants["softcap"] == 30.0


def ring_errors(
    rank: int, world_size: int, mask: Mask, name: str, softcap: float | None
) -> dict[str, float]:
    """One rank's errors in bfloat16 with the double as its kernel, sinks and a gradient of the lse.

    The sinks' gradient is summed over the ranks.
    """
    whole = attention_inputs(3, 2, mask.seq_len, 6, 2, 16, 16)
    inputs = [x.to(BF16).double() for x in whole]
    sinks, dlse = extra_inputs(4, 2, mask.seq_len, 6)
    sinks, dlse = sinks.float().double(), dlse.float().double()
    reference = results(Case(mask, {}, softcap=softcap), inputs, sinks, dlse)
    cp = ContextParallel(dist.group.WORLD, mask)
    cp.kernels.load = lambda *_, **__: kernel_of(name, softcap=softcap)  # type: ignore[method-assign]
    q, k, v, dout = (cp.shard(x, 1).to(BF16) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks.float())]
    attended = cp.attention(*leaves[:3], sinks=leaves[3], softcap=softcap, return_lse=True)
    grads = torch.autograd.grad(attended, leaves, (dout, cp.shard(dlse, 2).float()))
    dist.all_reduce(grads[3])
    found = {"out": attended[0].detach(), **dict(zip(("dq", "dk", "dv"), grads))}
    errors = {name: relative_error(x, reference[name], cp.positions) for name, x in found.items()}
    return {**errors, "ds": relative_gap(grads[3], reference["ds"])}


@pytest.mark.parametrize(
    ("mask", "name", "softcap"),
    [
        (Mask.causal(48), "2", 1.5),
        (Mask.documents([1, 7, 21, 2, 5, 11, 1]), "2 old", None),
        (Mask.documents([1, 30, 17], window=(6, 0)), "3", 1.5),
        (Mask.full(48, window=(9, 3)), "4", 1.5),
    ],
    ids=["causal", "documents", "window", "both sides"],
)
def test_the_ring_runs_on_it(mask: Mask, name: str, softcap: float | None) -> None:
    for result in run_ranks(ring_errors, 2, mask, name, softcap):
        assert max(result.values()) < 1e-2, result


def test_the_doubles_window_is_the_packages() -> None:
    """Examples of the package's documentation: causal aligns at the bottom right corner."""
    flash = double.flash_mask
    assert flash(2, 5, True, -1, -1).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    tall = [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert flash(5, 2, True, -1, -1).int().tolist() == tall
    assert flash(3, 3, False, 1, 0).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
