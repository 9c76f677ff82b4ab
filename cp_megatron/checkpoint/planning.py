"""Which rank writes which box of which tensor, as torch.distributed.checkpoint plans it.

    first save   every rank: its boxes -> the first rank: who writes what -> every rank: its part
    next saves   every rank: as before -> the first rank: go on

A plan holds for as long as the tensors are alike on all ranks. To make one takes longer than the
copy that the training waits for, and the longer the more ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from cp_megatron.checkpoint.agreement import (
    Group,
    attempt,
    from_first,
    gathered,
    raise_first,
    rank_in,
)
from cp_megatron.checkpoint.manifest import ChunkEntry, TensorEntry
from cp_megatron.checkpoint.shard import DTYPE_NAMES


@dataclass(frozen=True, kw_only=True)
class Part:
    """What this rank writes.

    Attributes:
        likeness: of the tensors that it was planned for.
        plan: the boxes.
        tensors: on the first rank, where every tensor lies; elsewhere empty.
    """

    likeness: tuple[object, ...]
    plan: SavePlan
    tensors: Mapping[str, TensorEntry]

    def boxes(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to write, by their keys; they share memory with the state's."""
        planner = _planner()
        planner.set_up_planner(dict(state))
        found: dict[str, Tensor] = {}
        for item in self.plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor), item.index.fqn
            found[_key(item)] = data.detach()
        return found


def plan_part(
    state: Mapping[str, Tensor],
    *,
    group: Group,
    last: Part | None,
    begin: Callable[[], object],
) -> Part:
    """This rank's part of a checkpoint. Called on every rank.

    Args:
        state: tensors by name; DTensors are written in parts.
        group: the ranks that save.
        last: this rank's part of the last checkpoint, which is returned if it still holds.
        begin: done on the first rank before any rank returns.

    Raises:
        Exception: the first that a rank met, on every rank alike.
    """
    likeness, failure = attempt(lambda: _likeness(state, group))
    answers = gathered((last is not None and last.likeness == likeness, failure), group)
    raise_first([error for _, error in answers])
    assert likeness is not None
    if last is None or not all(same for same, _ in answers):
        last = _new_part(state, likeness, group)
    failure = None if rank_in(group) else attempt(begin)[1]
    raise_first([from_first(failure, group)])
    return last


def _likeness(state: Mapping[str, Tensor], group: Group) -> tuple[object, ...]:
    """Equal where the same plan holds."""
    found: list[object] = [group]
    for name, x in state.items():
        split = (x.device_mesh, x.placements) if isinstance(x, DTensor) else ()
        found.append((name, x.dtype, x.shape, split))
    return tuple(found)


def _new_part(state: Mapping[str, Tensor], likeness: tuple[object, ...], group: Group) -> Part:
    planner = _planner()

    def local() -> SavePlan:
        planner.set_up_planner(dict(state), is_coordinator=rank_in(group) == 0)
        return SavePlan(storable(planner.create_local_plan().items))

    plan, failure = attempt(local)
    answers = gathered((plan, failure), group)
    raise_first([error for _, error in answers])
    merged: list[SavePlan] | None = None
    tensors: dict[str, TensorEntry] = {}
    if rank_in(group) == 0:
        found, failure = attempt(lambda: _merge(planner, [plan for plan, _ in answers]))
        merged, tensors = found or (None, {})
    merged, failure = from_first((merged, failure), group)
    raise_first([failure])
    assert merged is not None
    return Part(likeness=likeness, plan=merged[rank_in(group)], tensors=tensors)


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _merge(
    planner: DefaultSavePlanner, plans: list[SavePlan]
) -> tuple[list[SavePlan], dict[str, TensorEntry]]:
    merged, metadata = planner.create_global_plan(plans)
    return merged, _tensor_entries(metadata, merged)


def storable(items: Sequence[WriteItem]) -> list[WriteItem]:
    """The items without the empty shards of ranks that hold none of a tensor.

    An empty shard may begin where another rank's begins and would pass for its duplicate.
    """
    for item in items:
        if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
            raise TypeError(f"{item.index.fqn} is not a tensor; a checkpoint holds no pickles")
        if item.tensor_data.properties.dtype not in DTYPE_NAMES:
            dtype = item.tensor_data.properties.dtype
            raise TypeError(f"{item.index.fqn}: a checkpoint can not hold {dtype}")
    return [item for item in items if _sizes(item).numel() > 0]


def _tensor_entries(metadata: Metadata, plans: Sequence[SavePlan]) -> dict[str, TensorEntry]:
    places = {
        (item.index.fqn, item.index.offset): (shard_file(rank), _key(item))
        for rank, plan in enumerate(plans)
        for item in plan.items
    }
    entries = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            file, key = places[name, chunk.offsets]
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            chunks.append(ChunkEntry(offsets=offsets, sizes=sizes, file=file, key=key))
        dtype = DTYPE_NAMES[tensor.properties.dtype]
        shape = tuple(tensor.size)
        entries[name] = TensorEntry(dtype=dtype, shape=shape, chunks=tuple(chunks))
    return entries


def shard_file(rank: int) -> str:
    """The name of what a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def _sizes(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes


def _key(item: WriteItem) -> str:
    """A whole tensor is stored under its own name, so that other programs can read it."""
    assert item.tensor_data is not None
    if _sizes(item) == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"
