"""Compiles what lies between attention, products and messages, with torch.compile.

    residual stream --> [norm] --> enter, products --> [norms of heads, rotation] --> attention
                    --> product --> leave --> [+, norm] --> enter, products --> [activation]
                    --> product --> leave --> +

Each bracket is one graph. Attention, the products that share a message with their input, FSDP's and
``LocalUnit``'s hooks, recomputation and tiles are outside of them and do not change, and neither do
the names of parameters. Layers of one shape share their code. Inside a graph the forms of
``kernels/`` with a backward of their own give way to plain operations, which the compiler fuses and
differentiates.

The compiler sees plain tensors: where FSDP has gathered a weight as a DTensor, its local part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cp_megatron.errors import ConfigError
from cp_megatron.model.latent_attention import LatentAttention
from cp_megatron.model.layer import TransformerLayer
from cp_megatron.model.mlp import MLP
from cp_megatron.model.norm import Norm
from cp_megatron.model.self_attention import SelfAttention
from cp_megatron.model.transformer import Transformer
from cp_megatron.tensor_parallel import LocalWeights

_MOST_FORMS = 64
WORKS = "g++, or the compiler that CXX names, on cpu; Triton on cuda; or without --compile"


def compile_parts(model: Transformer, backend: str = "inductor") -> None:
    """Compiles the parts of all layers at their first call, for each shape that they are given.

    Shapes are never symbolic: otherwise the code for one shape, and so the rounding of its results,
    would depend on the shapes that came before.
    """
    # A layer has a form for each number of rows and for training or not; torch's limit is 8.
    torch._dynamo.config.recompile_limit = _MOST_FORMS
    for layer in model.layers.values():
        assert isinstance(layer, TransformerLayer)
        for norm in layer.children():
            if isinstance(norm, Norm):
                _compile(norm, "forward", backend)
        if isinstance(layer.mixer, SelfAttention | LatentAttention):
            _compile(layer.mixer, "arrange", backend)
        dense = layer.mlp if isinstance(layer.mlp, MLP) else layer.mlp.shared
        if dense is not None:
            _compile(dense, "activated", backend)


def _compile(owner: nn.Module, name: str, backend: str) -> None:
    """Puts a compiled form in the place of a method of the module."""
    run = torch.compile(getattr(owner, name), dynamic=False, backend=backend)
    weights = LocalWeights(owner)

    def compiled(*args: Any) -> Any:
        with weights.replaced(weights.tensors()):
            return run(*args)

    setattr(owner, name, compiled)


def check_compiler(device: torch.device) -> None:
    """Compiles a small function for the device, without the cache of earlier programs.

    Raises:
        ConfigError: torch.compile does not work here.
    """
    options: dict[str, Any] = {"fx_graph_cache": False}
    try:
        torch.compile(_trial, dynamic=False, options=options)(torch.ones(8, device=device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        rule = f"torch.compile fails on {device.type}: {reason}"
        raise ConfigError("--compile", True, rule, WORKS) from None


def _trial(x: Tensor) -> Tensor:
    return x.exp() * x
