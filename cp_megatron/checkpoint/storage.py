"""The storage under torch.distributed.checkpoint: safetensors shards, one per writing rank.

torch.distributed.checkpoint plans who writes which box of which tensor, and which boxes a rank
reads; here the boxes meet files. Its byte items are pickles and are refused in both directions.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cp_megatron.checkpoint.manifest import (
    ELEMENT_BYTES,
    MANIFEST,
    TEMPORARY,
    ChunkEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    damaged,
    file_sha256,
)
from cp_megatron.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, name) for name in ELEMENT_BYTES}
)
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in DTYPES.items()}
)

Describe = Callable[[Mapping[str, FileEntry], Mapping[str, TensorEntry]], Manifest]


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Where an item went; what the coordinator needs to know for the manifest."""

    file: str
    key: str
    entry: FileEntry


class ShardWriter(StorageWriter):
    """Writes a checkpoint to ``step-N.tmp`` and gives it its name when all of it is on the disk.

    Args:
        folder: the checkpoint's final name; must not exist.
        rank: of this process in the saving group; names its shard.
        describe: makes the manifest of the files and tensors written. Called on the coordinator.

    Methods raise ConfigError when ``folder`` exists, TypeError for what is not a tensor of a
    dtype a checkpoint may hold, and OSError as the file system does.
    """

    def __init__(self, folder: Path, *, rank: int, describe: Describe) -> None:
        self.folder = folder
        self.temporary = folder.with_name(folder.name + TEMPORARY)
        self.rank = rank
        self._describe = describe

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is for one checkpoint, named when it is made."""
        assert checkpoint_id is None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The coordinator makes an empty ``step-N.tmp`` before any rank writes."""
        if not is_coordinator:
            return
        if os.path.lexists(self.folder):
            rule = f"{self.folder.name} exists already, and nothing is overwritten"
            raise ConfigError("--save", self.folder.parent, rule, "another folder")
        discard(self.temporary)
        self.temporary.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuses byte items, and drops the empty shards of ranks that hold none of a tensor."""
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is not a tensor; a checkpoint holds no pickles")
            if item.tensor_data.properties.dtype not in DTYPE_NAMES:
                dtype = item.tensor_data.properties.dtype
                raise TypeError(f"{item.index.fqn}: a checkpoint can not hold {dtype}")
        # An empty shard may begin where another rank's begins and would pass for its duplicate.
        kept = [item for item in plan.items if _chunk(item).sizes.numel() > 0]
        return SavePlan(kept, plan.storage_data, plan.planner_data, plan.usable)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to add."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's shard (none when it has no item) and waits for the disk."""
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, planner) if plan.items else [])
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor), item.index.fqn
            tensors[_key(item)] = data.detach().cpu().contiguous()
        name = f"rank-{self.rank:05d}.safetensors"
        path = self.temporary / name
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise OSError(None, str(error)) from None
        sync(path)
        entry = FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
        return [
            WriteResult(
                index=item.index,
                size_in_bytes=tensors[_key(item)].nbytes,
                storage_data=_Written(file=name, key=_key(item), entry=entry),
            )
            for item in plan.items
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when every rank has written: the manifest, then the name."""
        flat = [result for of_rank in results for result in of_rank]
        files = {result.storage_data.file: result.storage_data.entry for result in flat}
        manifest = self._describe(files, _tensor_entries(metadata, flat))
        path = self.temporary / MANIFEST
        path.write_text(manifest.to_json(), encoding="utf-8")
        sync(path)
        sync(self.temporary)
        self.temporary.rename(self.folder)
        sync(self.folder.parent)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """This storage is chosen by hand, never by the form of a name."""
        return False


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


def discard(folder: Path) -> None:
    """Removes what a save that did not finish left behind; a link is removed, not followed."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Returns when the file's contents, or the folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _key(item: WriteItem) -> str:
    """A whole tensor is stored under its own name, so that other programs can read it."""
    assert item.tensor_data is not None
    if _chunk(item).sizes == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, _chunk(item).offsets))}"


def _box(shard: Any, item: ReadItem, chunk: ChunkEntry) -> Tensor:
    if tuple(item.lengths) == chunk.sizes:
        whole: Tensor = shard.get_tensor(chunk.key)
        return whole
    spans = zip(item.storage_offsets, item.lengths)
    part: Tensor = shard.get_slice(chunk.key)[
        tuple(slice(start, start + length) for start, length in spans)
    ]
    return part


def _tensor_entries(metadata: Metadata, results: Sequence[WriteResult]) -> dict[str, TensorEntry]:
    written = {(result.index.fqn, result.index.offset): result.storage_data for result in results}
    entries = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            place: _Written = written[name, chunk.offsets]
            chunks.append(
                ChunkEntry(
                    offsets=tuple(chunk.offsets),
                    sizes=tuple(chunk.sizes),
                    file=place.file,
                    key=place.key,
                )
            )
        entries[name] = TensorEntry(
            dtype=DTYPE_NAMES[tensor.properties.dtype],
            shape=tuple(tensor.size),
            chunks=tuple(chunks),
        )
    return entries
