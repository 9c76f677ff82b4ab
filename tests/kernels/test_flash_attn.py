"""The flash-attn adapter against doubles of the package, alone and inside the ring."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cp_megatron.context_parallel import ContextParallel, api
from cp_megatron.kernels.load import load_kernel
from cp_megatron.plan import Mask
from cp_megatron.plan.tiles import CAUSAL, FULL, Band
from tests.kernels import double
from tests.kernels.cases import SCALE, TILES, Attention, allowed, error, oracle
from tests.oracles import attention_inputs, dense_gradients, relative_error
from tests.ranks import run_ranks

BF16 = torch.bfloat16
INTERFACES = pytest.mark.parametrize("interface", [double, double.pair_window_interface()])


def worst(interface: Any, band: Band, a: Attention) -> float:
    """Largest error over out, lse and gradients, operands in bfloat16."""
    with double.installed() as FlashAttnKernel:
        kernel = FlashAttnKernel(interface)
        q, k, v, dout = (x.to(BF16) for x in (a.q, a.k, a.v, a.dout))
        assert kernel.compute_dtype(BF16) == BF16
        out, lse = kernel.forward(q, k, v, band, SCALE)
        assert (out.dtype, lse.dtype) == (BF16, torch.float32)
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert error(lse, a.lse) < 1e-6
        grads = kernel.backward(dout, q, k, v, out, lse, band, SCALE)
    return max(error(x, y) for x, y in zip((out, *grads), (a.out, a.dq, a.dk, a.dv)))


@INTERFACES
@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile(interface: Any, tile: str) -> None:
    band, rows, columns = TILES[tile]
    for heads in ((4, 4, 8, 8), (6, 2, 16, 16), (4, 1, 8, 8), (4, 2, 16, 8), (2, 2, 8, 16)):
        a = oracle(allowed(band, rows, columns), heads, dtype=BF16)
        assert worst(interface, band, a) < 1e-2


@INTERFACES
def test_the_lse_backward_gets_may_be_a_view_and_merged(interface: Any) -> None:
    """Inside the ring lse is cut from the shard's and says more than this tile's keys."""
    mask = torch.cat([torch.ones(5, 3, dtype=torch.bool), allowed(CAUSAL, 5, 5)], dim=1)
    a = oracle(mask, (4, 2, 8, 8), dtype=BF16)
    shard_lse = torch.full((2, 6, 9), torch.nan)
    shard_lse[:, 1:5, 2:7] = a.lse
    q, k, v, dout, out = (x.to(BF16) for x in (a.q, a.k, a.v, a.dout, a.out))
    with double.installed() as FlashAttnKernel:
        kernel = FlashAttnKernel(interface)
        view = shard_lse[:, 1:5, 2:7]
        grads = [
            kernel.backward(dout, q, k[:, part], v[:, part], out, view, band, SCALE)
            for band, part in ((FULL, slice(0, 3)), (CAUSAL, slice(3, 8)))
        ]
    assert error(grads[0][0] + grads[1][0], a.dq) < 1e-2
    assert error(torch.cat([g[1] for g in grads], dim=1), a.dk) < 1e-2
    assert error(torch.cat([g[2] for g in grads], dim=1), a.dv) < 1e-2


BAD: dict[str, tuple[Any, str]] = {
    "type": (lambda q, k, v: (q.float(), k, v), "only fp16 and bf16"),
    "types": (lambda q, k, v: (q, k.half(), v), "one type"),
    "layout": (lambda q, k, v: (q.transpose(1, 2), k, v), "query heads|expected"),
    "strides": (lambda q, k, v: (q.mT.contiguous().mT, k, v), "last dim"),
    "head dim": (lambda q, k, v: (q[..., :4], k[..., :4], v[..., :4]), "multiple of 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_double_refuses_what_the_extension_refuses(case: str) -> None:
    a = oracle(allowed(FULL, 5, 7), (4, 2, 8, 8), dtype=BF16)
    change, rule = BAD[case]
    q, k, v = change(*(x.to(BF16) for x in (a.q, a.k, a.v)))
    with (
        double.installed() as FlashAttnKernel,
        pytest.raises(double.RefusedByExtension, match=rule),
    ):
        FlashAttnKernel(double).forward(q, k, v, FULL, SCALE)


def test_nothing_of_the_double_stays() -> None:
    before = sys.modules.get("flash_attn"), sys.modules.get(double.ADAPTER)
    with double.installed():
        # Uncached: the session must not keep a kernel made of the double.
        loaded: Any = load_kernel.__wrapped__("flash_attn")
        assert loaded._forward is double._flash_attn_forward
    assert (sys.modules.get("flash_attn"), sys.modules.get(double.ADAPTER)) == before


def ring_errors(rank: int, world_size: int, mask: Mask, old: bool) -> dict[str, float]:
    """One rank's errors in bfloat16 with the double as the kernel."""
    inputs = [x.to(BF16).double() for x in attention_inputs(3, 2, mask.seq_len, 6, 2, 16, 16)]
    reference = dense_gradients(inputs, mask)
    interface: Any = double.pair_window_interface() if old else double
    original = vars(api)["load_kernel"]
    with double.installed() as FlashAttnKernel:
        kernel = FlashAttnKernel(interface)
        vars(api)["load_kernel"] = lambda name: kernel
        try:
            cp = ContextParallel(dist.group.WORLD, mask)
            q, k, v, dout = (cp.shard(x, 1).to(BF16) for x in inputs)
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            out = cp.attention(q, k, v)
            out.backward(dout)
        finally:
            vars(api)["load_kernel"] = original
    found: dict[str, Any] = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: relative_error(x, reference[name], cp.positions) for name, x in found.items()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        Mask.causal(48),
        Mask.documents([1, 7, 21, 2, 5, 11, 1]),
        Mask.documents([1, 30, 17], window=(6, 0)),
        Mask.full(48, window=(9, 3)),
    ],
    ids=["causal", "documents", "window", "both sides"],
)
def test_the_ring_runs_on_it(mask: Mask, old: bool) -> None:
    for result in run_ranks(ring_errors, 2, mask, old):
        assert max(result.values()) < 1e-2, result


def test_the_doubles_window_is_the_packages() -> None:
    """Examples of the package's own documentation: causal aligns at the bottom right corner."""
    flash = double.flash_mask
    assert flash(2, 5, True, -1, -1).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    tall = [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert flash(5, 2, True, -1, -1).int().tolist() == tall
    assert flash(3, 3, False, 1, 0).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_an_interface_is_told_apart_by_its_signature() -> None:
    with double.installed() as FlashAttnKernel:
        old: SimpleNamespace = double.pair_window_interface()
        q = torch.zeros(1, 4, 1, 8)
        assert FlashAttnKernel(old)._mask(FULL, q, q) == {
            "causal": False,
            "window_size": (-1, -1),
        }
        new = {
            "causal": False,
            "window_size_left": -1,
            "window_size_right": -1,
        }
        assert FlashAttnKernel(double)._mask(FULL, q, q) == new
