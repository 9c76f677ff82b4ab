"""The cuDNN kernel without a GPU: its arguments by the ops' schemas, its results by a double."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cp_megatron.errors import ConfigError
from cp_megatron.kernels import cudnn
from cp_megatron.kernels.cudnn import CudnnKernel
from cp_megatron.kernels.interface import BackwardInputs
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.plan.tiling import CAUSAL, FULL, Band
from tests.kernels import double
from tests.kernels.cases import TILES, allowed, error, oracle, worst_error
from tests.kernels.test_tiles import strided

BF16 = torch.bfloat16
# The tiles that the op takes: full ones, and causal squares.
TAKEN = [
    name
    for name, (band, rows, columns) in TILES.items()
    if band.is_full or (band.is_causal and rows == columns)
]


def forward_double(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten._scaled_dot_product_cudnn_attention: [B, heads, length, dim]; lse [B, H, Q, 1]."""
    check_operands(q, k, v)
    assert compute_log_sumexp
    assert dropout_p == 0
    assert scale is not None
    # The op's causal mask starts at the upper left corner.
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    wide = (x.transpose(1, 2).double() for x in (q, k, v))
    out, lse = double.attend(*wide, scale, mask)
    seed = torch.zeros((), dtype=torch.int64)
    out = out.to(q.dtype).transpose(1, 2)
    return out, lse.float().unsqueeze(-1), None, None, q.shape[2], k.shape[2], seed, seed, None


def backward_double(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: None,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten._scaled_dot_product_cudnn_attention_backward."""
    check_operands(q, k, v)
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    assert scale is not None
    # A plan is cached by the strides of q, k and v alone, so these must always have one layout.
    assert logsumexp.shape == (*q.shape[:3], 1)
    assert logsumexp.is_contiguous()
    assert grad_out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).is_contiguous()
    mask = torch.ones(max_q, max_k, dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    rows = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
    dq, dk, dv, _ = double.gradients(*rows, logsumexp.squeeze(-1), scale, mask)
    return tuple(x.to(q.dtype).transpose(1, 2) for x in (dq, dk, dv))  # type: ignore[return-value]


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """PyTorch's ``check_cudnn_tensor_shapes``, which the op itself does not call."""
    for x in (q, k, v):
        assert x.dtype == BF16
        assert x.shape[3] % 8 == 0
        assert x.stride(3) == 1
    assert k.shape[2] > 1, "no single key"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> CudnnKernel:
    monkeypatch.setattr(cudnn, "_forward", forward_double)
    monkeypatch.setattr(cudnn, "_backward", backward_double)
    return CudnnKernel()


@pytest.mark.parametrize("tile", TAKEN)
def test_tiles(tile: str, kernel: CudnnKernel) -> None:
    for heads in ((4, 2, 16, 8), (2, 2, 5, 12)):
        a = oracle(allowed(*TILES[tile]), heads, dtype=BF16)
        assert worst_error(kernel, TILES[tile][0], a, BF16) < 1e-2


def test_operands_may_be_views(kernel: CudnnKernel) -> None:
    a = oracle(allowed(CAUSAL, 6, 6), (4, 2, 8, 16), dtype=BF16)
    q, k, v, dout, out = (strided(x.to(BF16)) for x in (a.q, a.k, a.v, a.dout, a.out))
    lse = strided(a.lse.float().transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    assert error(kernel.forward(q, k, v, CAUSAL, 0.37)[0], a.out) < 1e-2
    grads = kernel.backward(BackwardInputs(dout, q, k, v, out, lse), CAUSAL, 0.37)
    assert max(error(x, y) for x, y in zip(grads, (a.dq, a.dk, a.dv))) < 1e-2


@pytest.mark.parametrize(
    ("band", "rows", "columns"), [(Band(2, 0), 6, 6), (Band(right=1), 6, 4), (CAUSAL, 4, 3)]
)
def test_windows_are_refused(band: Band, rows: int, columns: int, kernel: CudnnKernel) -> None:
    q, k = torch.zeros(1, rows, 2, 8, dtype=BF16), torch.zeros(1, columns, 2, 8, dtype=BF16)
    with pytest.raises(AssertionError, match="no sliding windows"):
        kernel.forward(q, k, k, band, 1.0)
    with pytest.raises(AssertionError, match="no sliding windows"):
        kernel.backward(BackwardInputs(q, q, k, k, q, torch.zeros(1, 2, rows)), band, 1.0)


def test_shared_plans_are_refused(kernel: CudnnKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's switch for shared plans lays the lse out as [B, Q, H, 1]."""

    def ragged(*args: Any, **kwargs: Any) -> Any:
        out, lse, *rest = forward_double(*args, **kwargs)
        return out, lse.transpose(1, 2).contiguous().transpose(1, 2), *rest

    monkeypatch.setattr(cudnn, "_forward", ragged)
    q = torch.zeros(1, 4, 2, 8, dtype=BF16)
    with pytest.raises(ConfigError, match="AVOID_RECOMPILE"):
        kernel.forward(q, q, q, FULL, 1.0)


def test_it_is_loaded_by_its_name() -> None:
    assert isinstance(load_kernel("cudnn"), CudnnKernel)


@pytest.mark.parametrize(
    ("name", "of"), [("_forward", forward_double), ("_backward", backward_double)]
)
def test_the_doubles_take_what_the_ops_take(name: str, of: Any) -> None:
    """Apart from names (q for query), the doubles' parameters are those of the schemas."""
    short = {"query": "q", "key": "k", "value": "v"}
    schema = getattr(cudnn, name).default._schema.arguments
    wanted = [short.get(a.name, a.name) for a in schema]
    assert list(of.__annotations__)[:-1] == wanted


@pytest.mark.parametrize(("device", "dims"), [("cuda", (16, 8)), ("meta", (5, 12))])
def test_the_ops_accept_the_arguments(device: str, dims: tuple[int, int]) -> None:
    """By the ops' own shape functions on fake CUDA tensors, or meta tensors if they are sliced."""
    dim, v_dim = dims
    with FakeTensorMode():
        q = torch.empty(2, 6, 4, dim, device=device, dtype=BF16)
        k = torch.empty(2, 7, 2, dim, device=device, dtype=BF16)
        v = torch.empty(2, 7, 2, v_dim, device=device, dtype=BF16)
        fake = CudnnKernel()
        out, lse = fake.forward(q, k, v, FULL, 0.3)
        assert (out.shape, out.dtype, lse.shape) == ((2, 6, 4, v_dim), BF16, (2, 4, 6))
        grads = fake.backward(BackwardInputs(out, q, k, v, out, lse), FULL, 0.3)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]
