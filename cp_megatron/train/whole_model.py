"""Numbers over all parameters or gradients of a model, each counted once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def global_norm(tensors: Iterable[Tensor], group: dist.ProcessGroup, device: torch.device) -> float:
    """The L2 norm of sharded tensors taken together, computed in float64.

    Every rank calls it and gets the same number.

    Args:
        tensors: this rank's shards, in the same order on every rank.
        group: all ranks.
        device: where messages of the group are sent from.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for values in _counted_here(tensors, group):
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
        total += norm.to(device).square()
    dist.all_reduce(total, group=group)
    return total.sqrt().item()


@torch.no_grad()
def sum_of_squares(
    tensors: Iterable[Tensor], group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """This rank's share of the squared L2 norm of sharded tensors taken together, float64 [].

    The shares of all ranks add up to it. Each tensor's norm is computed in its own type. For the
    arguments see ``global_norm``.
    """
    counted = [x for x in _counted_here(tensors, group) if x.numel()]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(counted)).double()
    return norms.square().sum().to(device)


def count_zeros(
    tensors: Iterable[Tensor], group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """How many numbers of sharded tensors are exactly 0, int64 [], on the device.

    For the arguments see ``global_norm``; the host does not wait for the answer.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for values in _counted_here(tensors, group):
        total += values.numel() - values.count_nonzero().to(device)
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def _counted_here(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> Iterator[Tensor]:
    """The local parts of the tensors that no rank before this one holds as well."""
    for tensor in tensors:
        # Weights that FSDP has gathered do not say which ranks hold them.
        assert isinstance(tensor, DTensor), "sharded"
        assert tensor.device_mesh.size() == group.size(), "sharded over all ranks"
        assert not any(placement.is_partial() for placement in tensor.placements)
        place = tensor.device_mesh.get_coordinate()
        assert place is not None, "every rank is in the mesh"
        copies = [axis for axis, p in enumerate(tensor.placements) if p.is_replicate()]
        if not any(place[axis] for axis in copies):
            yield tensor.to_local().detach()
