"""Reads the boxes of a checkpoint that torch.distributed.checkpoint plans for this rank.

Its byte items are pickles and are refused here as they are in ``save.py``.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from cp_megatron.checkpoint.manifest import ChunkEntry, Manifest, damaged
from cp_megatron.checkpoint.shard import DTYPES


class ShardReader(StorageReader):
    """Reads only the boxes this rank needs, straight into the tensors that are loaded.

    Args:
        folder: the checkpoint.
        manifest: of this folder, its files verified.

    Methods raise ConfigError when a shard does not hold what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest
        self._chunks = {
            (name, chunk.offsets): chunk
            for name, tensor in manifest.tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is for one checkpoint, named when it is made."""
        assert checkpoint_id is None

    def read_metadata(self, *args: Any) -> Metadata:
        """The manifest as the planner reads it."""
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
                for name, tensor in self._manifest.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Refuses byte items."""
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                raise TypeError(f"{item.dest_index.fqn} is not a tensor; no pickle is loaded")
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the planned boxes, one shard after the other."""
        by_file: dict[str, list[tuple[ReadItem, ChunkEntry]]] = defaultdict(list)
        for item in plan.items:
            offset = item.storage_index.offset
            assert offset is not None
            chunk = self._chunks[item.storage_index.fqn, tuple(offset)]
            by_file[chunk.file].append((item, chunk))
        for file, wanted in by_file.items():
            self._read_file(file, wanted, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(
        self, file: str, wanted: Sequence[tuple[ReadItem, ChunkEntry]], planner: LoadPlanner
    ) -> None:
        try:
            with safe_open(self.folder / file, framework="pt", device="cpu") as shard:
                for item, chunk in wanted:
                    self._check_stored(shard, item.storage_index.fqn, chunk)
                    source = _box(shard, item, chunk)
                    self._check_dtype(source, item.storage_index.fqn, file)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(source)
                    planner.commit_tensor(item, target)
        except (SafetensorError, OSError) as error:
            raise damaged(self.folder, f"{file} can not be read ({error})") from None

    def _check_stored(self, shard: Any, name: str, chunk: ChunkEntry) -> None:
        stored = shard.get_slice(chunk.key)
        if tuple(stored.get_shape()) != chunk.sizes:
            raise damaged(self.folder, f"{chunk.file} holds {name} in another shape")

    def _check_dtype(self, source: Tensor, name: str, file: str) -> None:
        # copy_ would convert it without a word.
        if source.dtype != DTYPES[self._manifest.tensors[name].dtype]:
            raise damaged(self.folder, f"{file} holds {name} in another dtype")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """This storage is chosen by hand, never by the form of a name."""
        return False


def _box(shard: Any, item: ReadItem, chunk: ChunkEntry) -> Tensor:
    if tuple(item.lengths) == chunk.sizes:
        whole: Tensor = shard.get_tensor(chunk.key)
        return whole
    spans = zip(item.storage_offsets, item.lengths)
    part: Tensor = shard.get_slice(chunk.key)[
        tuple(slice(start, start + length) for start, length in spans)
    ]
    return part
