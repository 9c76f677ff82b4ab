"""Counts where a program would wait for a GPU, on a machine without one.

The tensors of the CPU are told apart: *host* tensors are made from Python's or numpy's numbers
without a device, and from other host tensors alone; all others stand for those on a GPU. The host
waits where it reads one of these, and where a host tensor is copied to the device by a blocking
copy. Only the thread that entered the context is observed.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
READING = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select),
    *(aten._unique2, aten.unique_dim, aten.bincount, aten.repeat_interleave),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class Waits(TorchDispatchMode):
    """Collects in ``found`` the places that wait, as ``operation at file:line``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._host = WeakIdKeyDictionary()
        self._thread = threading.get_ident()
        self._allowed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_host = all(x in self._host for x in inputs)
        kind = func.overloadpacket
        masked = kind in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
        if inputs and not on_host and (kind in READING or masked):
            self.note(str(kind))
        results = func(*args, **kwargs)
        if on_host and (inputs or kwargs.get("device") is None):
            self.adopt(results)
        return results

    def adopt(self, results: Any) -> Any:
        """Remembers host tensors."""
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self._host[x] = True
        return results

    def note(self, what: str) -> None:
        """Notes that the host waits here."""
        if self._allowed or threading.get_ident() != self._thread:
            return
        frames = traceback.extract_stack()
        ours = [frame for frame in frames if "cp_megatron" in frame.filename] or frames[:-2]
        self.found.append(f"{what} at {ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}")

    def reading(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        """Notes a method of a tensor that returns numbers to Python."""

        def patched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x not in self._host:
                self.note(name)
            return read(x, *args, **kwargs)

        return patched

    def moving(self, move: Callable[..., Any]) -> Callable[..., Any]:
        """Notes blocking copies to the device."""

        def patched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = move(x, *args, **kwargs)
            device = kwargs.get("device") or any(isinstance(y, torch.device) for y in args)
            if device and x in self._host:
                if not kwargs.get("non_blocking"):
                    self.note("to")
                result = result.detach()
                del self._host[result]
            return result

        return patched

    def making(self, name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        """Notes tensors that are made of Python's numbers on the device."""

        def patched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return make(*args, **kwargs)
            if kwargs.get("device") is None:
                return self.adopt(make(*args, **kwargs))
            self.note(name)
            return make(*args, **kwargs)

        return patched

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Notes nothing."""
        self._allowed += 1
        try:
            yield
        finally:
            self._allowed -= 1


@contextmanager
def waits() -> Iterator[Waits]:
    """Observes what runs inside."""
    mode = Waits()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, mode.reading(name, getattr(Tensor, name)))
        patch.setattr(Tensor, "to", mode.moving(Tensor.to))
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, mode.making(name, getattr(torch, name)))
        with mode:
            yield mode
