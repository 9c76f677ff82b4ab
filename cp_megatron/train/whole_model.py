"""Numbers over all parameters or gradients of a model, each counted once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
def squared_norms(
    tensors: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """This rank's shares of the squared L2 norms of sharded tensors, [n] in their own type.

    Summed over all ranks, they are the squared norms. For the arguments see ``global_norm``.
    """
    shares = [_counted(x, group) for x in tensors]
    held = [share for share in shares if share is not None and share.numel()]
    if not held:
        dtype = tensors[0].dtype if tensors else torch.float64  # that of ranks which count some
        return torch.zeros(len(tensors), dtype=dtype, device=device)
    norms = iter(torch._foreach_norm(held))
    nothing = held[0].new_zeros(())
    found = [nothing if x is None or not x.numel() else next(norms) for x in shares]
    return torch.stack(found).to(device).square()


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


def _counted_here(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> Iterator[Tensor]:
    """The local parts of the tensors that no rank before this one holds as well."""
    shares = (_counted(tensor, group) for tensor in tensors)
    return (share for share in shares if share is not None)


@torch.no_grad()
def _counted(tensor: Tensor, group: dist.ProcessGroup) -> Tensor | None:
    """The local part of a tensor; None if a rank before this one holds it as well."""
    # Weights that FSDP has gathered do not say which ranks hold them.
    assert isinstance(tensor, DTensor), "sharded"
    assert tensor.device_mesh.size() == group.size(), "sharded over all ranks"
    assert not any(placement.is_partial() for placement in tensor.placements)
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "every rank is in the mesh"
    copies = [axis for axis, p in enumerate(tensor.placements) if p.is_replicate()]
    return None if any(place[axis] for axis in copies) else tensor.to_local().detach()
