"""Reads boxes of the tensors in a file of ``torch.save``, with the interface of ``safe_open``.

A file is mapped, so that only the pages of a box are read. Where a tensor lies is known from
``torch_file``, which executes nothing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cp_megatron.checkpoint.inert_pickle import TORCH_BYTES
from cp_megatron.checkpoint.torch_file import TorchTensor, read_torch_file


class TorchFileReader:
    """The tensors of what ``torch.save`` wrote, by name.

    Args:
        tensors: where they lie in ``data``.
        data: uint8 [bytes], which stays as it is.
    """

    def __init__(self, tensors: Mapping[str, TorchTensor], data: Any) -> None:
        self.tensors, self._bytes = tensors, data

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads where the tensors of a file lie, and maps it.

        Raises:
            MalformedError: the file is damaged, or holds anything but tensors and plain values.
            OSError: the file cannot be read.
        """
        with path.open("rb") as stream:
            tensors = read_torch_file(stream)
        # Private pages: torch warns about memory that it must not write to.
        return cls(tensors, np.memmap(path, dtype="u1", mode="c"))

    @classmethod
    def of_bytes(cls, data: bytes) -> Self:
        """Finds the tensors in the bytes of a file; raises ``MalformedError`` as ``open`` does."""
        return cls(read_torch_file(io.BytesIO(data)), np.frombuffer(bytearray(data), dtype="u1"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._bytes = None

    def get_slice(self, key: str) -> TorchSlice:
        """Returns the tensor ``key`` before it is read."""
        return TorchSlice(self.tensors[key], self._bytes)

    def get_tensor(self, key: str) -> Tensor:
        """Reads a whole tensor."""
        return self.get_slice(key)[()]


class TorchSlice:
    """A tensor of which any box can be read: ``slice[1:3, :]``."""

    def __init__(self, tensor: TorchTensor, data: Any) -> None:
        self._tensor, self._data = tensor, data

    def get_shape(self) -> list[int]:
        """Returns the shape of the whole tensor."""
        return list(self._tensor.shape)

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        tensor, dtype = self._tensor, getattr(torch, self._tensor.dtype)
        if not tensor.extent:
            return torch.empty(tensor.shape, dtype=dtype)[box]
        size = TORCH_BYTES[tensor.dtype]
        data = self._data[tensor.start : tensor.start + tensor.extent * size]
        if tensor.start % size:  # The format before torch 1.6 does not align storages.
            data = data.copy()
        flat = torch.from_numpy(np.asarray(data)).view(dtype)
        return flat.as_strided(tensor.shape, tensor.strides)[box].clone()
