"""Numbers over all parameters or gradients of a model, each counted once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cp_megatron.comm.groups import ParallelGroups


def global_norm(tensors: Iterable[Tensor], groups: ParallelGroups, device: torch.device) -> float:
    """The L2 norm of sharded tensors taken together, computed in float64.

    Every rank calls it and gets the same number.

    Args:
        tensors: this rank's shards, in the same order on every rank of its pipeline stage.
        groups: this rank's groups.
        device: where messages are sent from.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for values in _counted_here(tensors, groups):
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
        total += norm.to(device).square()
    dist.all_reduce(total, group=groups.world)
    return total.sqrt().item()


@torch.no_grad()
def squared_norm(tensors: Iterable[Tensor], groups: ParallelGroups, device: torch.device) -> Tensor:
    """This rank's share of the squared L2 norm of sharded tensors taken together, float64 [].

    Summed over all ranks, it is the squared norm. For the arguments see ``global_norm``.
    """
    held = [share for share in _counted_here(tensors, groups) if share.numel()]
    if not held:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(held)).to(device).double().square().sum()


def count_zeros(tensors: Iterable[Tensor], groups: ParallelGroups, device: torch.device) -> Tensor:
    """How many numbers of sharded tensors are exactly 0, int64 [], on the device.

    For the arguments see ``global_norm``; the host does not wait for the answer.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for values in _counted_here(tensors, groups):
        total += values.numel() - values.count_nonzero().to(device)
    dist.all_reduce(total, group=groups.world)
    return total


def _counted_here(tensors: Iterable[Tensor], groups: ParallelGroups) -> Iterator[Tensor]:
    """The local parts of the tensors that no rank before this one holds as well."""
    shares = (_counted(tensor, groups.stage) for tensor in tensors)
    return (share for share in shares if share is not None)


@torch.no_grad()
def _counted(tensor: Tensor, stage: dist.ProcessGroup) -> Tensor | None:
    """The local part of a tensor; None if a rank before this one holds it as well."""
    # Weights that FSDP has gathered do not say which ranks hold them.
    assert isinstance(tensor, DTensor), "sharded"
    assert tensor.device_mesh.size() == stage.size(), "sharded over all ranks of the stage"
    assert not any(placement.is_partial() for placement in tensor.placements)
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "every rank is in the mesh"
    copies = [axis for axis, p in enumerate(tensor.placements) if p.is_replicate()]
    return None if any(place[axis] for axis in copies) else tensor.to_local().detach()
