"""Writes the tensors of a Hugging Face folder, one after another, in one file or in shards.

The header of a file follows from the shapes alone, so the memory of one tensor is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_megatron.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE
from cp_megatron.checkpoint.manifest import ELEMENT_BYTES
from cp_megatron.checkpoint.shard_writer import file_header, sync
from cp_megatron.families.family import HFTensor

MAX_SHARD_BYTES = 5 * 2**30


def write_weights(
    folder: Path,
    tensors: Sequence[HFTensor],
    read: Callable[[HFTensor], Tensor],
    *,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes one file, or several and their index.

    Args:
        folder: exists and has no weights.
        tensors: of the folder, in order.
        read: returns a tensor, contiguous and of the type ``dtype_of``.
        dtype: of the weights.
        max_shard_bytes: largest size of the tensors in a file, unless it holds only one.
    """
    shards = _shards(tensors, dtype, max_shard_bytes)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE_FILE if len(shards) == 1 else name
        index |= {tensor.key: name for tensor in shard}
        with (folder / name).open("wb") as stream:
            shapes = {tensor.key: (dtype_of(tensor, dtype), tensor.shape) for tensor in shard}
            stream.write(file_header(shapes, alignment=8, __metadata__={"format": "pt"}))
            for tensor in shard:
                stream.write(read(tensor).view(-1).view(torch.uint8).numpy().data)
        sync(folder / name)
    if len(shards) > 1:
        total = {"total_size": sum(_size(tensor, dtype) for tensor in tensors)}
        write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": index})


def dtype_of(tensor: HFTensor, dtype: str) -> str:
    """The type of a tensor in a folder whose weights have the type ``dtype``."""
    return "float32" if tensor.is_exact and ELEMENT_BYTES[dtype] < 4 else dtype


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, and waits until it is on the disk."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(path)


def _size(tensor: HFTensor, dtype: str) -> int:
    return math.prod(tensor.shape) * ELEMENT_BYTES[dtype_of(tensor, dtype)]


def _shards(tensors: Sequence[HFTensor], dtype: str, max_bytes: int) -> list[list[HFTensor]]:
    """The tensors in order, in as few files as possible."""
    shards: list[list[HFTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(_size(x, dtype) for x in (*shards[-1], tensor)) > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards
