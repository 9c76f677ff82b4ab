"""Tensor parallelism as values: how a parameter lies over the tp axis, how activations cross it.

Parameters are DTensors over the tp axis; activations are plain local tensors. A module is built
with *global* shapes and says of each parameter how it is placed; whoever materialises the model
(model/parallelize.py) keeps the local part. A module built with global shapes and ordinary
parameters works as it is on one rank.

Shapes: b batch, s sequence of one context parallel rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from cp_megatron.comm.collectives import (
    all_gather_dim,
    copy_to_group,
    reduce_from_group,
    reduce_scatter_dim,
)

Init = Literal["normal", "scaled_normal", "ones", "zeros"]
"""scaled_normal: the standard deviation is divided by sqrt(2 x layers), for what adds to the
residual stream (Radford et al. 2019)."""


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """How one parameter lies over the tp axis and how it starts."""

    placement: Shard | Replicate
    init: Init
    rows: int | None = None
    """Rows that are drawn; those after them (the vocabulary's padding) are zero. None: all."""
    partial: bool = False
    """Each tp rank's gradient is a summand of the true one: the parameter is replicated but used on
    activations (or for heads) that differ over tp."""


class SpecifiedModule(nn.Module):
    """A module with parameters of its own: ``specs`` has an entry for each."""

    specs: dict[str, ParameterSpec]

    def local(self, name: str) -> Tensor:
        """The part of an own parameter that this tp rank computes with; see ``local_weight``."""
        # Not get_parameter: torch.func puts plain tensors in the place of parameters.
        return local_weight(getattr(self, name), partial=self.specs[name].partial)

    def locals(self) -> dict[str, Tensor]:
        """All own parameters so, by name."""
        return {name: self.local(name) for name, _ in self.named_parameters(recurse=False)}


def named_specs(module: nn.Module) -> Iterator[tuple[str, SpecifiedModule, str, ParameterSpec]]:
    """(fully qualified name, owner, name in the owner, spec) of every parameter, in order."""
    for path, owner in module.named_modules():
        for name, _ in owner.named_parameters(recurse=False):
            assert isinstance(owner, SpecifiedModule), f"{path}.{name} has no spec"
            yield f"{path}.{name}" if path else name, owner, name, owner.specs[name]


def place(
    value: Tensor, spec: ParameterSpec, tp_mesh: DeviceMesh, device: torch.device | str
) -> DTensor:
    """A global tensor, the same on every rank -> the DTensor over tp; no message.

    This rank's part gets memory of its own on ``device``, so the global tensor can be freed.
    """
    local = value
    if isinstance(spec.placement, Shard):
        dim, size = spec.placement.dim, tp_mesh.size()
        assert value.shape[dim] % size == 0, f"{tuple(value.shape)} over {size} ranks"
        local = value.chunk(size, dim)[tp_mesh.get_local_rank()]
    local = local.to(device, copy=True).contiguous()
    return DTensor.from_local(local, tp_mesh, [spec.placement], run_check=False)


def local_weight(parameter: Tensor, *, partial: bool = False) -> Tensor:
    """The part of a parameter that this tp rank computes with, as a plain tensor.

    Args:
        parameter: a DTensor over the tp axis alone (inside a forward of a sharded module), or a
            plain tensor, which is returned as it is.
        partial: as in ``ParameterSpec``. DTensor then all-reduces the gradient; otherwise it is
            placed as the parameter is.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    assert parameter.device_mesh.ndim == 1, "a weight is read inside its module's forward"
    return parameter.to_local(grad_placements=[Partial() if partial else parameter.placements[0]])


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """The tp group of a model and how activations cross it.

    Without sequence parallelism the residual stream [b, s, h] is replicated over tp; with it each
    rank holds [b, s/tp, h] (Korthikanti et al. 2022, arXiv:2205.05198).
    """

    group: ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        """Number of tp ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return 0 if self.group is None else self.group.rank()

    @property
    def splits_sequence(self) -> bool:
        """Whether the residual stream differs over the tp ranks."""
        return self.sequence_parallel and self.size > 1

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream -> the input [b, s, h] of column parallel layers; one message for all."""
        if self.sequence_parallel:
            return all_gather_dim(x, 1, self.group)
        return copy_to_group(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """The ranks' summands [b, s, h] -> their sum as a residual stream."""
        if self.sequence_parallel:
            return reduce_scatter_dim(x, 1, self.group)
        return reduce_from_group(x, self.group)

    def rows(self, num_tokens: int, batch: int) -> int:
        """Rows of the residual stream that hold about ``num_tokens`` in all batches, entered."""
        return max(1, num_tokens // (batch * (self.size if self.splits_sequence else 1)))

    def own_rows(self, x: Tensor) -> Tensor:
        """This rank's part of something of length s along dim 0 that meets the residual stream."""
        return x.chunk(self.size)[self.rank] if self.splits_sequence else x
