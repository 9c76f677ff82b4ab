"""The attention implementations that are timed: PyTorch's op, this project's engine, other rings.

Shapes: B = batch (1), H = heads, S = sequence length, D = head dim. Each implementation gets q, k,
v and the gradient of out as float32 [B, S, H, D], the same in every process, and takes its part
before the clock starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.plan import Mask, SequenceLayout

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
NAMES = ("out", "dq", "dk", "dv")

Pass = Callable[[], tuple[Tensor, ...]]
"""One forward and backward pass: this process's out, dq, dk, dv, each [B, own tokens, H, D]."""


class Contestant(NamedTuple):
    """A pass to run, and the positions of the row that this process holds."""

    run: Pass
    positions: Tensor


def inputs(tokens: int, heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of out, [B, S, H, D] float32."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, tokens, heads, head_dim, generator=generator) for _ in range(4)]


def heads_first(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D], contiguous, the layout of the flash op."""
    return rearrange(x, "b s h d -> b h s d").contiguous()


def heads_last(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H, D]."""
    return rearrange(x, "b h s d -> b s h d")


def one_process(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Contestant:
    """The flash op on each document separately, without autograd around it."""
    parts = [x.split(list(lengths), dim=1) for x in tensors]
    documents = [[heads_first(x) for x in document] for document in zip(*parts, strict=True)]

    def run() -> tuple[Tensor, ...]:
        found = []
        for q, k, v, dout in documents:
            out, lse = FORWARD(q, k, v, 0.0, True)
            found.append((out, *BACKWARD(dout, q, k, v, out, lse, 0.0, True)))
        if len(found) == 1:
            return tuple(heads_last(x) for x in found[0])
        return tuple(heads_last(torch.cat(x, dim=2)) for x in zip(*found, strict=True))

    return Contestant(run, torch.arange(sum(lengths)))


def engine(
    group: dist.ProcessGroup | None, tensors: Sequence[Tensor], mask: Mask, **options: Any
) -> Contestant:
    """This project's engine, called through autograd as a model calls it."""
    cp = ContextParallel(group, mask, **options)
    q, k, v, dout = [cp.shard(x, 1).contiguous() for x in tensors]
    qkv = (q, k, v)
    for x in qkv:
        x.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        out = cp.attention(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, qkv, dout))

    return Contestant(run, cp.positions)


def torch_ring(rotate: str, tensors: Sequence[Tensor]) -> Contestant:
    """PyTorch's private ring templates around the same flash op, called without autograd.

    With load balancing, they give each rank the same two chunks as zigzag.
    """
    from torch.distributed.tensor.experimental import _context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    ring = _context_parallel._attention
    group = dist.group.WORLD
    assert group is not None
    positions = _positions(tensors, "zigzag")
    q, k, v, dout = [heads_first(x[:, positions]) for x in tensors]
    same: dict[str, Any] = {"query": q, "key": k, "value": v, "is_causal": True, "dropout_p": 0.0}

    def run() -> tuple[Tensor, ...]:
        set_rotate_method(rotate)
        out, lse, *_ = ring._templated_ring_attention(group, 2, FORWARD, **same)
        dq, dk, dv, *_ = ring._templated_ring_attention_backward(
            group, 2, BACKWARD, dout, "grad_out", out=out, logsumexp=lse, **same
        )
        return tuple(heads_last(x) for x in (out, dq, dk, dv))

    return Contestant(run, positions)


def peers(tensors: Sequence[Tensor]) -> dict[str, Contestant]:
    """The installed packages whose causal context parallelism runs on the CPU, through autograd."""
    found = {}
    group = dist.group.WORLD
    if importlib.util.find_spec("ringmaster"):
        from ringmaster.ring.distflash import distflash_attention
        from ringmaster.ring.p2p_attn import ring_p2p_attention
        from ringmaster.ring.zigzag import zigzag_ring_attention

        row = torch.tensor([0, tensors[0].shape[1]], dtype=torch.int32)
        found["ringmaster_p2p"] = _peer(
            tensors,
            "contiguous",
            lambda q, k, v: ring_p2p_attention(q, k, v, group=group, causal=True, scaling=None),
        )
        found["ringmaster_distflash"] = _peer(
            tensors,
            "contiguous",
            lambda q, k, v: distflash_attention(q, k, v, group=group, scaling=None),
        )
        found["ringmaster_zigzag"] = _peer(
            tensors,
            "zigzag",
            lambda q, k, v: zigzag_ring_attention(
                q, k, v, group=group, scaling=None, cu_seqlens=row
            ),
        )
    if importlib.util.find_spec("para_attn"):
        from para_attn.para_attn_interface import ulysses_attn_func

        found["para_attn_ulysses"] = _peer(
            tensors,
            "contiguous",
            lambda q, k, v: heads_last(ulysses_attn_func(q, k, v, is_causal=True)),
        )
    return found


def _peer(
    tensors: Sequence[Tensor], layout: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Contestant:
    """A contestant whose ``attend`` maps [B, H, S / ranks, D] to [B, S / ranks, H, D]."""
    positions = _positions(tensors, layout)
    q, k, v = qkv = tuple(heads_first(x[:, positions]) for x in tensors[:3])
    dout = tensors[3][:, positions].contiguous()
    for x in qkv:
        x.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        out = attend(q, k, v)
        grads = torch.autograd.grad(out, qkv, dout)
        return (out.detach(), *(heads_last(x) for x in grads))

    return Contestant(run, positions)


def _positions(tensors: Sequence[Tensor], layout: str) -> Tensor:
    mask = Mask.causal(tensors[0].shape[1])
    held = SequenceLayout.make(mask, dist.get_world_size(), layout).positions(dist.get_rank())
    return torch.from_numpy(held)


def saved_bytes(run: Pass) -> int:
    """Bytes of the storages that autograd keeps from forward to backward, each counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def errors(
    found: tuple[Tensor, ...], exact: tuple[Tensor, ...], positions: Tensor
) -> dict[str, float]:
    """||x - ref|| / max(||ref on this rank||, ||ref|| / sqrt(ranks)), for each tensor."""
    share = (positions.numel() / exact[0].shape[1]) ** 0.5
    result = {}
    for name, x, whole in zip(NAMES, found, exact, strict=True):
        here = whole[:, positions]
        scale = max(here.norm().item(), whole.norm().item() * share)
        result[name] = (x.double() - here).norm().item() / scale
    return result
