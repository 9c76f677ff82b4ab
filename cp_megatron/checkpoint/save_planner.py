"""Assigns boxes of tensors to the ranks that write them, with torch.distributed.checkpoint.

    first save    every rank sends its boxes; the first rank assigns them; every rank gets its part
    later saves   every rank reports that its tensors are unchanged; the cached plan is used

A cached plan is valid while no rank's tensors change in name, shape, dtype or placement. Training
waits while a plan is made, which takes longer than the copy, and longer on more ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from cp_megatron.checkpoint.manifest import ChunkEntry, TensorEntry
from cp_megatron.checkpoint.object_collectives import (
    Group,
    all_gather_objects,
    attempt,
    on_first_rank,
    raise_first,
    rank_in,
)
from cp_megatron.checkpoint.shard_writer import DTYPE_NAMES


@dataclass(frozen=True, kw_only=True)
class CachedPlan:
    """The boxes that this rank writes, as long as the tensors keep their signature.

    ``tensors`` describes every tensor on the first rank, and is empty on the other ranks.
    """

    signature: tuple[object, ...]
    items: Sequence[WriteItem]
    tensors: Mapping[str, TensorEntry]

    @property
    def begun(self) -> set[str]:
        """Names of the tensors whose first box this rank writes: each tensor is one rank's."""
        indices = (item.index for item in self.items)
        return {index.fqn for index in indices if not any(index.offset or ())}

    def boxes(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors to write by their keys; they share memory with the state's."""
        planner = _planner()
        planner.set_up_planner(dict(state))
        data = {_key(item): cast(Tensor, planner.resolve_data(item)) for item in self.items}
        return {key: tensor.detach() for key, tensor in data.items()}


def plan_save(
    state: Mapping[str, Tensor],
    *,
    group: Group,
    cached: CachedPlan | None,
    begin: Callable[[], None],
) -> CachedPlan:
    """Plans this rank's part of a checkpoint. Every rank calls this.

    Args:
        state: tensors by name; DTensors are written in parts.
        group: the ranks that save.
        cached: the plan of this rank's last save; it is returned if it is still valid.
        begin: an action of the first rank, done before any rank returns.

    Raises:
        Exception: the first exception of any rank, on every rank.
    """
    signature = _signature(state, group)
    valid = cached is not None and cached.signature == signature
    if not all(all_gather_objects(valid, group)) or cached is None:
        cached = _new_plan(state, signature, group)
    on_first_rank(begin, group)
    return cached


def _signature(state: Mapping[str, Tensor], group: Group) -> tuple[object, ...]:
    tensors = [
        (name, x.dtype, x.shape, (x.device_mesh, x.placements) if isinstance(x, DTensor) else ())
        for name, x in state.items()
    ]
    return group, *tensors


def _new_plan(
    state: Mapping[str, Tensor], signature: tuple[object, ...], group: Group
) -> CachedPlan:
    planner, tensors = _planner(), dict[str, TensorEntry]()

    def local() -> SavePlan:
        planner.set_up_planner(dict(state), is_coordinator=rank_in(group) == 0)
        return SavePlan(storable(planner.create_local_plan().items))

    def merge() -> list[SavePlan]:
        assigned, metadata = planner.create_global_plan([plan for plan, _ in answers])
        tensors.update(_tensor_entries(metadata, assigned))
        return assigned

    answers = all_gather_objects(attempt(local), group)
    raise_first([error for _, error in answers])
    items = on_first_rank(merge, group)[rank_in(group)].items
    return CachedPlan(signature=signature, items=items, tensors=tensors)


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def storable(items: Sequence[WriteItem]) -> list[WriteItem]:
    """Returns the items without empty boxes, from ranks that hold no part of a tensor.

    An empty box can have the same offsets as another rank's box, which the planner would take for
    its duplicate.

    Raises:
        TypeError: an item is not a tensor, or has a dtype that a checkpoint cannot hold.
    """
    kept = []
    for item in items:
        name, data = item.index.fqn, item.tensor_data
        if data is None:
            raise TypeError(f"{name} is not a tensor, and a checkpoint stores no pickles")
        if data.properties.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: a checkpoint cannot hold {data.properties.dtype}")
        if data.chunk.sizes.numel():
            kept.append(item)
    return kept


def _tensor_entries(metadata: Metadata, plans: Sequence[SavePlan]) -> dict[str, TensorEntry]:
    places = {
        (item.index.fqn, item.index.offset): {"file": shard_file(rank), "key": _key(item)}
        for rank, plan in enumerate(plans)
        for item in plan.items
    }
    entries = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = tuple(
            ChunkEntry(offsets=tuple(x.offsets), sizes=tuple(x.sizes), **places[name, x.offsets])
            for x in tensor.chunks
        )
        dtype, shape = DTYPE_NAMES[tensor.properties.dtype], tuple(tensor.size)
        entries[name] = TensorEntry(dtype=dtype, shape=shape, chunks=chunks)
    return entries


def shard_file(rank: int) -> str:
    """Returns the name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def _key(item: WriteItem) -> str:
    """Returns a box's key; a whole tensor keeps its name, so that other programs can read it."""
    name, data = item.index.fqn, item.tensor_data
    assert data is not None
    whole = data.chunk.sizes == data.size
    return name if whole else f"{name}@{','.join(map(str, data.chunk.offsets))}"
