"""Counting the bytes of tensors that are alive, on any device, and saying where they were made.

Every operation of torch passes by here; what it returns in memory that was not there before counts
until that memory is released, which a weak reference tells. So the count is exact for tensors and
blind for what an operation allocates and releases inside.
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
"""The operation that was called and a tensor it returned -> what the tensor's memory counts as."""


@dataclass(frozen=True)
class Allocation:
    """Memory that was allocated: how much, what it counts as, and itself while it is there."""

    num_bytes: int
    place: str
    storage: weakref.ref[torch.UntypedStorage]


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, what operations of this thread and its backward allocate.

    Args:
        place: says what each new piece of memory counts as.

    Attributes:
        peak: the most bytes alive at one time.
        peaks: the same of each place.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place
        self._mine: dict[int, Allocation] = {}
        self._others: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._now: Counter[str] = Counter()
        self._total = 0
        self._patches = ExitStack()
        self.peak = 0
        self.peaks: Counter[str] = Counter()

    def __enter__(self) -> Self:
        # Storages are emptied and filled by no operation; torch's own MemTracker looks so too.
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            if storage._cdata in self._mine:
                self._add(storage, self._release(storage._cdata))
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]
        self._patches.callback(setattr, torch.UntypedStorage, "resize_", resize)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation; what it returns and was not given is new."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(func, tensor)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._mine and storage._cdata not in self._others:
                self._add(storage, self._place(func, tensor))
        return out

    def adopt(self, tensor: Tensor, place: str) -> None:
        """Counts this memory, whoever allocated it and when, and as ``place`` from now on."""
        storage = tensor.untyped_storage()
        self._release(storage._cdata)
        self._others.pop(storage._cdata, None)
        self._add(storage, place)

    def place_of(self, storage: torch.UntypedStorage) -> str | None:
        """What memory counts as; None where it does not count."""
        found = self._mine.get(storage._cdata)
        return None if found is None else found.place

    def alive(self) -> dict[int, Allocation]:
        """What counts and is still there, by the address of its storage."""
        return dict(self._mine)

    def close(self) -> None:
        """Forgets everything but the peaks."""
        self._mine.clear()
        self._others.clear()

    def _meet(self, func: Any, tensor: Tensor) -> None:
        """Memory that an operation is given was not allocated by it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._mine and key not in self._others:
            self._others[key] = weakref.ref(storage, lambda _: self._others.pop(key, None))
        elif func.namespace == "fsdp" and key in self._mine:
            # FSDP allocates its messages by ordinary operations before it packs them.
            self.adopt(tensor, self._place(func, tensor))

    def _add(self, storage: torch.UntypedStorage, place: str) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._release(key))
        self._mine[key] = Allocation(num_bytes, place, reference)
        self._now[place] += num_bytes
        self._total += num_bytes
        self.peaks[place] = max(self.peaks[place], self._now[place])
        self.peak = max(self.peak, self._total)

    def _release(self, key: int) -> str:
        """The memory counts no more; as what it did."""
        found = self._mine.pop(key, None)
        if found is None:
            return ""
        self._now[found.place] -= found.num_bytes
        self._total -= found.num_bytes
        return found.place


def _tensors(tree: object) -> Iterator[Tensor]:
    """The plain tensors in what an operation takes or returns."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield from plain(leaf)


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that it wraps (a DTensor its local part)."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = (getattr(tensor, name) for name in names)
        for part in inner:
            if isinstance(part, Tensor):  # a DTensor names its mesh too
                yield from plain(part)
    elif tensor.layout == torch.strided and not tensor.is_meta:
        yield tensor
