"""Reads the boxes of tensors that torch.distributed.checkpoint plans for this rank.

Byte items of torch.distributed.checkpoint are pickles. They are refused, as in ``save_planner``.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from cp_megatron.checkpoint.manifest import ChunkEntry, TensorEntry, damaged
from cp_megatron.checkpoint.object_collectives import Group
from cp_megatron.checkpoint.shard_writer import DTYPES
from cp_megatron.errors import ConfigError


def read_shards(state: dict[str, Tensor], reader: ShardReader, *, flag: str, group: Group) -> None:
    """Reads a checkpoint's tensors into ``state`` in place. Every rank calls this.

    Args:
        state: tensors by their names in the manifest; DTensors are read in parts.
        reader: the reader of the checkpoint.
        flag: the flag that named the folder, for errors.
        group: the ranks that load.

    Raises:
        ConfigError: a shard cannot be read or does not hold what the manifest says; on every rank.
        RuntimeError: a rank failed for another reason; on every rank, with its traceback.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
            state_dict_loader.load(
                state,
                storage_reader=reader,
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=group,
            )
    except CheckpointException as failed:  # which is not an ``Exception``
        rank, (error, _) = min(failed.failures.items(), key=lambda failure: failure[0])
        # A KeyboardInterrupt of a rank is passed on unchanged.
        if isinstance(error, ConfigError) or not isinstance(error, Exception):
            raise error from None
        if isinstance(error, OSError):
            rule = f"rank {rank}: {error.strerror or error}"
            raise ConfigError(flag, reader.folder, rule, "a folder that can be read") from None
        raise RuntimeError(f"checkpoint {reader.folder} failed\n{failed}") from None


class ShardReader(StorageReader):
    """Reads only the boxes that this rank needs, directly into the tensors to load.

    Methods raise DamagedError when a shard does not hold what the manifest says of ``tensors``.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
        self.folder = folder
        self._tensors = tensors
        self._chunks = {
            (name, chunk.offsets): chunk
            for name, tensor in tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a reader belongs to one checkpoint."""
        assert checkpoint_id is None

    def read_metadata(self, *args: Any) -> Metadata:
        """Returns the manifest in the planner's form."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=DTYPES[tensor.dtype]),
                    size=torch.Size(tensor.shape),
                    chunks=[
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in tensor.chunks
                    ],
                )
                for name, tensor in self._tensors.items()
            }
        )

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Refuses byte items."""
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                name = item.dest_index.fqn
                raise TypeError(f"{name} is not a tensor, and a checkpoint stores no pickles")
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the planned boxes, one shard after another."""
        by_file: dict[str, list[tuple[ReadItem, ChunkEntry]]] = defaultdict(list)
        for item in plan.items:
            chunk = self._chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            by_file[chunk.file].append((item, chunk))
        for file, wanted in by_file.items():
            try:
                with self._open(file) as shard:
                    for item, chunk in wanted:
                        source = self._read_box(shard, item, chunk)
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(source)
                        planner.commit_tensor(item, target)
            except (SafetensorError, OSError) as error:
                raise damaged(self.folder, f"{file} cannot be read ({error})") from None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _open(self, file: str) -> AbstractContextManager[Any]:
        return cast(Any, safe_open(self.folder / file, framework="pt", device="cpu"))

    def _read_box(self, shard: Any, item: ReadItem, chunk: ChunkEntry) -> Tensor:
        name, stored = item.storage_index.fqn, shard.get_slice(chunk.key)
        if tuple(stored.get_shape()) != chunk.sizes:
            raise damaged(self.folder, f"{chunk.file} holds {name} in another shape")
        if tuple(item.lengths) == chunk.sizes:
            box: Tensor = shard.get_tensor(chunk.key)
        else:
            spans = zip(item.storage_offsets, item.lengths)
            box = stored[tuple(slice(start, start + length) for start, length in spans)]
        # Without this check, copy_ would convert another dtype silently.
        if box.dtype != DTYPES[self._tensors[name].dtype]:
            raise damaged(self.folder, f"{chunk.file} holds {name} in another dtype")
        return box

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns False: this storage is never chosen by the form of a name."""
        return False
