"""Counts the bytes of live tensors, on any device, by the place that allocated them.

A dispatch mode sees every operation of torch. Newly allocated memory counts until it is released;
a weak reference detects this. The count is exact for tensors, but does not see what an operation
allocates and releases inside.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Place = Callable[[Any, Tensor], str]
"""The operation that was called and a tensor that it returned -> the place of its memory."""


@dataclass(frozen=True)
class Allocation:
    """A piece of memory, its place, and the storage for as long as it is alive."""

    num_bytes: int
    place: str
    storage: weakref.ref[torch.UntypedStorage]


class LiveBytes(TorchDispatchMode):
    """Counts what operations of this thread and of its backward allocate inside the context.

    Args:
        place: returns the place of a new piece of memory.

    Attributes:
        alive: the live memory that counts, by the address of its storage.
        peak: the most bytes alive at any time.
        peaks: the same for each place.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place
        self.alive: dict[int, Allocation] = {}
        self._others: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._now: Counter[str] = Counter()
        self._patches = ExitStack()
        self.peak = 0
        self.peaks: Counter[str] = Counter()

    def __enter__(self) -> Self:
        # No operation empties or fills a storage, so this is patched, as torch's MemTracker does.
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self.alive:
                self._add(storage, self._release(storage._cdata))
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]
        self._patches.callback(setattr, torch.UntypedStorage, "resize_", resize)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._record_existing(func, tensor)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive and storage._cdata not in self._others:
                self._add(storage, self._place(func, tensor))
        return out

    def adopt(self, tensor: Tensor, place: str) -> None:
        """Counts existing memory, from now on, for ``place``."""
        storage = tensor.untyped_storage()
        self._release(storage._cdata)
        self._others.pop(storage._cdata, None)
        self._add(storage, place)

    def close(self) -> None:
        """Drops everything but the peaks."""
        self.alive.clear()
        self._others.clear()

    def _record_existing(self, func: Any, tensor: Tensor) -> None:
        """Records that memory which an operation is given was not allocated by it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive and key not in self._others:
            self._others[key] = weakref.ref(storage, lambda _: self._others.pop(key, None))
        elif func.namespace == "fsdp" and key in self.alive:
            # FSDP allocates its messages by ordinary operations before it packs them.
            self.adopt(tensor, self._place(func, tensor))

    def _add(self, storage: torch.UntypedStorage, place: str) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._release(key))
        self.alive[key] = Allocation(num_bytes, place, reference)
        self._now[place] += num_bytes
        self.peaks[place] = max(self.peaks[place], self._now[place])
        self.peak = max(self.peak, self._now.total())

    def _release(self, key: int) -> str:
        """Stops counting a piece of memory; returns its place."""
        allocation = self.alive.pop(key, None)
        if allocation is None:
            return ""
        self._now[allocation.place] -= allocation.num_bytes
        return allocation.place


def _tensors(tree: object) -> Iterator[Tensor]:
    """The plain tensors among the arguments or results of an operation."""
    return (x for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) for x in plain(leaf))


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or the plain tensors that it wraps (the local part of a DTensor)."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        yield from _tensors([getattr(tensor, name) for name in names])
    elif tensor.layout == torch.strided and not tensor.is_meta:
        yield tensor
