"""Keeps in host memory what recomputed layers keep until backward: inputs, and results if asked.

    forward   layer 0 | layer 1 | layer 2            backward   layer 2 | layer 1 | layer 0
    copies        x0 ->|   x1 ->|  x2 ->                    <- x1 |  <- x0 |

On CUDA the copies run on their own stream, to and from pinned memory: out while the next layer is
computed, and back one layer ahead of the backward pass that reads the tensor. On the CPU the
tensors are copied to files that are mapped into memory and unlinked at once, so that they vanish
with the process; their pages leave the process as soon as they are written, and the kernel may
write them to disk. A copy on the CPU overlaps with nothing, so a tensor comes back when it is read.

Later steps reuse the host buffers; there are as many as are in use at the same time.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class LayerOffload:
    """Keeps tensors of recomputed layers on the host.

    Args:
        per_layer: tensors of a layer, which come back together.

    Attributes:
        held_bytes: bytes that are kept for backward now.
        host_bytes: bytes of all host buffers, in use or free.
    """

    def __init__(self, per_layer: int = 1) -> None:
        self._free: dict[int, list[_HostBuffer]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._latest: weakref.ref[_Offloaded] | None = None
        self.per_layer = per_layer
        self.held_bytes = 0
        self.host_bytes = 0

    def hooks(self) -> saved_tensors_hooks:
        """A context in which the tensors that autograd saves are kept on the host."""
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, x: Tensor) -> _Offloaded | Tensor:
        """Starts the copy of a tensor to the host; returns what ``unpack`` takes."""
        if not x.numel():
            return x
        offloaded = _Offloaded(self, x, before=self._latest)
        self._latest = weakref.ref(offloaded)
        return offloaded

    @staticmethod
    def unpack(saved: _Offloaded | Tensor) -> Tensor:
        """The tensor, on its device."""
        return saved.take() if isinstance(saved, _Offloaded) else saved

    @contextmanager
    def copying(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """A context whose copies run beside the computation, after the work submitted so far."""
        if device.type != "cuda":
            yield None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield self._stream

    def take(self, x: Tensor) -> _HostBuffer:
        num_bytes = x.numel() * x.element_size()
        free = self._free.get(num_bytes)
        if free:
            buffer = free.pop()
        else:
            buffer = PinnedBuffer(num_bytes) if x.is_cuda else _FileBuffer(num_bytes)
            self.host_bytes += num_bytes
        self.held_bytes += num_bytes
        return buffer

    def give_back(self, buffer: _HostBuffer) -> None:
        """Frees a buffer for the next tensor of its size."""
        self.held_bytes -= buffer.num_bytes
        self._free.setdefault(buffer.num_bytes, []).append(buffer)


class _HostBuffer:
    """``memory``, uint8 [num_bytes], has pages of its own, of a file or of none."""

    def __init__(self, num_bytes: int, file: int = -1) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(file, num_bytes)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def written(self) -> None:
        """Called after a tensor was copied here."""


class PinnedBuffer(_HostBuffer):
    """Page-locked host memory, which copies need to run beside the computation.

    It does not come from torch's allocator, which rounds up to a power of two: these buffers are
    most of the host's memory. It has pages of its own, because a page can be locked only once.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(self.memory.data_ptr(), num_bytes, 0))
        weakref.finalize(self, _unpin, self.memory).atexit = False


class _FileBuffer(_HostBuffer):
    """A mapped file without a name."""

    def __init__(self, num_bytes: int) -> None:
        with tempfile.TemporaryFile() as file:
            file.truncate(num_bytes)
            super().__init__(num_bytes, file.fileno())

    def written(self) -> None:
        """Removes the pages from this process; their contents stay in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Offloaded:
    """One tensor on the host. Autograd owns it; its buffer is free when autograd drops it."""

    def __init__(
        self, store: LayerOffload, x: Tensor, before: weakref.ref[_Offloaded] | None
    ) -> None:
        self._store, self._before = store, before
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._buffer = store.take(x)
        self._fetched: Tensor | None = None
        self._was_taken = False
        self._ready: torch.cuda.Event | None = None
        with store.copying(x.device) as stream:
            self._on_host().copy_(x, non_blocking=True)
            if stream is not None:
                x.record_stream(stream)  # its memory is not reused before it is copied
        self._buffer.written()
        weakref.finalize(self, store.give_back, self._buffer).atexit = False

    def _on_host(self) -> Tensor:
        return self._buffer.memory.view(self._dtype).view(self._shape)

    def fetch(self) -> None:
        """Starts the copy back to the device, unless it has been started."""
        if self._fetched is not None:
            return
        with self._store.copying(self._device) as stream:
            self._fetched = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._fetched.copy_(self._on_host(), non_blocking=True)
            if stream is not None:
                self._ready = stream.record_event()
        self._buffer.written()

    def take(self) -> Tensor:
        """The tensor; on CUDA also starts fetching those that backward reads next."""
        self.fetch()
        assert self._fetched is not None
        x, self._fetched, self._was_taken = self._fetched, None, True
        if self._ready is not None:
            earlier: _Offloaded | None = self
            for _ in range(self._store.per_layer):
                earlier = earlier._before() if earlier and earlier._before else None
                if earlier is not None and not earlier._was_taken:
                    earlier.fetch()
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._ready)
            x.record_stream(stream)
        return x


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()  # a copy may still be reading it
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
