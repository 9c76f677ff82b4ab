"""How much a layer of a 1B model moves in memory per token, beside products and attention.

The layer runs on meta tensors as it does on a GPU: with the CUDA attention kernel, and with each
Triton kernel counted as reading its arguments and writing its results once.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cp_megatron.config import ModelConfig
from cp_megatron.context_parallel import ContextParallel, attention_function
from cp_megatron.kernels import gated, rms_norm, rotary
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.gated import GatedKernels
from cp_megatron.kernels.rms_norm import NormKernels
from cp_megatron.model.layer import TransformerLayer
from cp_megatron.model.layer_memory import LayerMemory
from cp_megatron.model.rope import Rotation
from cp_megatron.plan import Mask
from cp_megatron.spec import LayerSpec
from cp_megatron.tensor_parallel import TensorParallel
from tests.model.layer_bytes import Traffic

TOKENS, HIDDEN = 4096, 2048
MODEL = ModelConfig(
    hidden_size=HIDDEN,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    normalization="RMSNorm",
    swiglu=True,
    disable_bias_linear=True,
)
KIB_PER_TOKEN = 1024 * TOKENS
ENGINE = "attention"
"""The part of what surrounds the attention kernel in ``cp.attention``."""


def sums_of_programs(*args: object) -> int:
    """Bytes of what the programs of a norm's backward write and add up; 16 tokens each."""
    return 2 * 4 * HIDDEN * TOKENS // 16


def count_as_on_a_gpu(traffic: Traffic, patch: pytest.MonkeyPatch) -> None:
    """Every kernel that is fused on a GPU is one operation."""
    fused = traffic.fused
    pair = GatedKernels(fused(gated.forward_eager), fused(gated.backward_eager))
    patch.setattr(gated, "gated_kernels", lambda device: pair)
    backward = fused(rms_norm.backward_eager, launches=2, scratch=sums_of_programs)
    norm = NormKernels(fused(rms_norm.forward_eager), backward)
    patch.setattr(rms_norm, "rms_norm_kernels", lambda device, width: norm)
    rotated = fused(rotary.rotate_eager)
    patch.setattr(rotary, "_kernel", lambda device: rotated)


def attention_engine(traffic: Traffic, patch: pytest.MonkeyPatch) -> ContextParallel:
    """Attention on one rank, whose own operations are a part of the traffic."""
    cp = ContextParallel(None, Mask.causal(TOKENS))
    patch.setattr(cp.kernels, "load", lambda *args, **options: CudaKernel())
    patch.setattr(cp, "attention", traffic.in_part(ENGINE, cp.attention))
    function = attention_function._Attention
    backward = traffic.in_part(ENGINE, function.backward)
    patch.setattr(function, "backward", staticmethod(backward))
    patch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # unknown on meta
    return cp


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> tuple[Traffic, Traffic]:
    """The traffic of a layer's forward and of its backward."""
    forward, backward = Traffic(), Traffic()
    tp = TensorParallel()
    memory = LayerMemory(
        tp=tp, granularity="none", keeps_attention=False, tile_size=None, offload=None
    )
    with torch.device("meta"):
        layer = TransformerLayer(LayerSpec.of(MODEL, layer=0), memory=memory).bfloat16()
        x, grad = (torch.empty(1, TOKENS, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
        angles = torch.empty(TOKENS, 32, dtype=torch.float32)
    rotation = Rotation(cos=angles, sin=angles, interleaved=False, query_factor=None)
    leaves = [x.requires_grad_(), *layer.parameters()]
    with monkeypatch.context() as patch, forward:
        count_as_on_a_gpu(forward, patch)
        out = layer(x, rotation, attention_engine(forward, patch), None)
    with monkeypatch.context() as patch, backward:
        count_as_on_a_gpu(backward, patch)
        attention_engine(backward, patch)
        torch.autograd.grad(out, leaves, grad)
    return forward, backward


def test_a_layer_moves_little_beside_products_and_attention(
    passes: tuple[Traffic, Traffic],
) -> None:
    """In KiB per token.

    Forward reads the stream and writes its norm, 8; reads and writes queries and keys to rotate
    them, 10, and reads the angles; reads the stream and what attention adds and writes their sum
    and its norm, 16; reads gate and up and writes their product, 48; and adds the MLP's result, 12.
    Backward has 80 for the gated unit, 16 and 12 for the norms, 10 for the rotations and 12 for
    the sum of the stream's two gradients, and 2 for sums over the tokens.
    """
    forward, backward = (x.total() / KIB_PER_TOKEN for x in passes)
    assert forward == pytest.approx(94.5, abs=0.1)
    assert backward == pytest.approx(132.5, abs=0.1)
    assert [sum(x.launches[n] for n in x.num_bytes if "/" not in n) for x in passes] == [6, 8]


def test_attention_moves_nothing_around_its_kernel(passes: tuple[Traffic, Traffic]) -> None:
    """On one rank a row is one tile, whose result is neither copied nor converted."""
    assert [x.total(ENGINE) for x in passes] == [0, 0]


def test_traffic_counts_what_is_read_and_written() -> None:
    a, b = torch.zeros(4, 8), torch.zeros(1, 8).expand(4, 8)
    with Traffic() as traffic:
        a.add_(b)  # reads a and 8 numbers, writes a
        a.copy_(a.T.reshape(4, 8))  # the reshape reads and writes, and so does the copy
        torch.add(a, 1, out=a.view(4, 8))
        a @ a.T
        torch.empty_like(a)
    numbers = {"add_": 32 + 8 + 32, "clone": 64, "copy_": 64, "add": 64}
    assert traffic.num_bytes == {name: 4 * count for name, count in numbers.items()}
    assert traffic.total() == 4 * sum(numbers.values())
    assert traffic.launches.total() == 4


def test_a_fused_function_is_one_operation() -> None:
    def double_root(x: torch.Tensor) -> torch.Tensor:
        return x.sqrt() * 2

    x, traffic = torch.zeros(8), Traffic()
    with traffic:
        traffic.in_part("p", traffic.fused(double_root, launches=3))(x)
    assert traffic.num_bytes == {"p/test_layer_bytes.double_root": 4 * 16}
    assert (traffic.total("p"), traffic.total(), traffic.launches.total()) == (64, 0, 3)
