"""Rotations against the plain formula and autograd in float64, eager and by Triton."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import rotary as seam
from cp_megatron.kernels.rotary import Rotate, rotate_eager
from cp_megatron.kernels.rotated_channels import RotatedChannels
from cp_megatron.model.rope import Rotation
from tests.kernels.interpreted import DEVICE, LOW, ROUNDING, triton_file


@pytest.fixture(params=["eager", "triton"])
def rotate(request: pytest.FixtureRequest) -> Rotate:
    if request.param == "eager":
        return rotate_eager
    kernel: Rotate = triton_file("rotary_triton").rotate_triton
    return kernel


def plain(
    x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, channels: RotatedChannels
) -> Tensor:
    """Each pair by itself, in float64."""
    x, num_pairs = x.double(), cos.shape[1]
    out = x.clone()
    for pair in range(num_pairs):
        step = (2 * pair, 2 * pair + 1) if channels.interleaved else (pair, pair + num_pairs)
        a, b = (channels.start + channel for channel in step)
        c, s = (table.double()[:, pair, None] for table in (cos, sin))  # [s, 1]
        out[..., a] = x[..., a] * c - x[..., b] * s
        out[..., b] = x[..., b] * c + x[..., a] * s
    return out if factor is None else out * factor.double()[:, None, None]


def drawn(
    shape: tuple[int, ...], num_pairs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a view with strides of its own; cos and sin, not of unit length; and factors."""
    generator = torch.Generator().manual_seed(shape[1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    batch, length, heads, width = shape
    x = draw(batch, length + 1, heads + 2, width + 1).to(DEVICE, dtype)[:, 1:, 1:-1, 1:]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = (draw(length, num_pairs).to(DEVICE, exact) for _ in range(2))
    return x, cos, sin, draw(length).to(DEVICE, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_pairs", "start"),
    [((2, 5, 3, 8), 4, 0), ((1, 37, 2, 80), 20, 0), ((1, 7, 4, 24), 4, 16), ((1, 3, 1, 7), 2, 2)],
)
def test_equals_the_formula(
    shape: tuple[int, ...],
    num_pairs: int,
    start: int,
    scaled: bool,
    interleaved: bool,
    rotate: Rotate,
) -> None:
    channels = RotatedChannels(start=start, interleaved=interleaved)
    x, cos, sin, factor = drawn(shape, num_pairs, torch.float64)
    given = (cos, sin, factor if scaled else None)
    found = rotate(x, *given, channels)
    torch.testing.assert_close(found, plain(x, *given, channels), rtol=1e-13, atol=1e-14)
    back = RotatedChannels(start=start, interleaved=interleaved, inverse=True)
    expected = plain(x, cos, -sin, given[2], channels)
    torch.testing.assert_close(rotate(x, *given, back), expected, rtol=1e-13, atol=1e-14)
    # A gradient may have any strides.
    turned = x.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(rotate(turned, *given, channels), found)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 8])
def test_half_precision_is_rounded_once(interleaved: bool, start: int, rotate: Rotate) -> None:
    channels = RotatedChannels(start=start, interleaved=interleaved)
    x, cos, sin, factor = drawn((1, 33, 2, 24), 8, LOW)
    found = rotate(x, cos, sin, factor, channels)
    assert found.dtype == LOW
    expected = plain(x, cos, sin, factor, channels)
    least = torch.finfo(LOW).smallest_normal
    rounding = {"rtol": 1.01 * ROUNDING, "atol": least + 1e-6 * expected.abs().max().item()}
    torch.testing.assert_close(found.double(), expected, **rounding)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 3])
def test_the_gradient_is_that_of_the_formula_and_keeps_no_activation(
    interleaved: bool, start: int
) -> None:
    x, cos, sin, factor = drawn((2, 5, 3, 11), 4, torch.float64)
    rotation = Rotation(cos=cos, sin=sin, interleaved=interleaved, query_factor=factor)
    channels = RotatedChannels(start=start, interleaved=interleaved)
    leaves = [x.detach().clone().requires_grad_() for _ in range(2)]
    out, expected = rotation.queries(leaves[0], start), plain(leaves[1], cos, sin, factor, channels)
    kept = [tensor.data_ptr() for tensor in out.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert kept == [cos.data_ptr(), sin.data_ptr(), factor.data_ptr()]
    direction = torch.randn(expected.shape, dtype=torch.float64).to(DEVICE)
    grads = [torch.autograd.grad(y, leaf, direction)[0] for y, leaf in zip((out, expected), leaves)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_a_gpu_without_triton_rotates_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert seam._kernel.__wrapped__("cuda") is rotate_eager


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_compiles_as_one_graph(interleaved: bool) -> None:
    x, cos, sin, _ = drawn((1, 5, 3, 8), 4, torch.float64)
    rotation = Rotation(cos=cos, sin=sin, interleaved=interleaved, query_factor=None)
    compiled = torch.compile(rotation.keys, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().clone().requires_grad_() for _ in range(2)]
    outs = compiled(leaves[0]), rotation.keys(leaves[1])
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in zip(outs, leaves, strict=True)]
    torch.testing.assert_close(*grads)
