"""Reads pickles of torch without executing anything in them. This module does not import torch.

A pickle is a program: it names functions and calls them. Here a name is looked up in a list of what
torch itself writes for tensors and their descriptions, and an inert record takes its place. No
module is imported and no function of torch is called. A pickle with another name is refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

from cp_megatron.checkpoint.manifest import ELEMENT_BYTES

TORCH_BYTES: Mapping[str, int] = {**ELEMENT_BYTES, "complex64": 8, "complex128": 16}
"""The dtypes that are read, and the bytes of an element."""
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS: Mapping[str, tuple[str, ...]] = {
    "torch": ("device",),
    "torch._utils": ("_rebuild_parameter", "_rebuild_tensor_v2"),
    "torch.serialization": ("_get_layout",),
    "_codecs": ("encode",),
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "Path"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    _METADATA: (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}
_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_TORCH: Mapping[str, Any] = {"Size": tuple, **{name: name for name in TORCH_BYTES}, **_STORAGES}


class MalformedError(Exception):
    """Says what is wrong with a file of torch, as a clause, and what works instead."""

    def __init__(self, rule: str, works: str = "an undamaged checkpoint") -> None:
        super().__init__(rule)
        self.works = works


class Record:
    """What a pickle would have made by calling ``name`` with ``args`` and setting ``state``."""

    name = ""
    state: Any = None
    args: tuple[Any, ...]

    def __new__(cls, *args: Any) -> Record:
        """Makes it as both a call and the protocol of pickle do."""
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(stream: IO[bytes], find_storage: Callable[[Any], Any] | None = None) -> Any:
    """Reads one pickle from a stream.

    Objects of torch are ``Record``; dtypes and types of storages are the names of dtypes; sizes are
    tuples.

    Args:
        stream: is left at the end of the pickle.
        find_storage: returns the object for a persistent id, by which torch refers to a storage.

    Raises:
        MalformedError: the pickle is damaged or names something that is not in the list.
    """
    try:
        return _InertUnpickler(stream, find_storage).load()
    except (MalformedError, OSError, MemoryError):
        raise
    except Exception as error:  # the bytes may be anything, and so may the errors
        raise MalformedError(f"is truncated or damaged ({type(error).__name__})") from None


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], find_storage: Callable[[Any], Any] | None) -> None:
        super().__init__(stream, encoding="utf-8")
        self._find_storage = find_storage

    def find_class(self, module: str, name: str) -> Any:
        """Returns the object that takes the place of a name; imports nothing."""
        if module == "torch" and name in _TORCH:
            return _TORCH[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if name in _RECORDS.get(module, ()):
            # A class of its own for each occurrence: a pickle can only change what it has made.
            return type("Record", (Record,), {"name": name})
        shown = f"{module}.{name}"[:80]
        rule = f"holds {shown!r}, which is no part of a tensor; nothing of it was executed"
        works = "a file of the weights alone, as torch.save(model.state_dict(), FILE) writes them"
        raise MalformedError(rule, works)

    def persistent_load(self, pid: Any) -> Any:
        """Returns the object that takes the place of a storage."""
        if self._find_storage is None:
            raise MalformedError("refers to a storage that is not in it")
        return self._find_storage(pid)
