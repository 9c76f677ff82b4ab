"""Layer checkpoints on the host: what full recomputation keeps waits where memory is cheap.

    forward   layer 0 | layer 1 | layer 2            backward   layer 2 | layer 1 | layer 0
    copies        x0 ->|   x1 ->|  x2 ->                    <- x1 |  <- x0 |

On CUDA the copies run on a stream of their own into pinned memory: out while the next layer is
computed, back one layer ahead of the backward pass that reads it. On the CPU the same tensors are
copied to files that are mapped into memory and unlinked at once, so that they end with the process;
their pages leave the process as soon as they are written, and the kernel may write them to disk.
There a copy runs beside nothing, so each comes back when it is read and not before.

Pieces of host memory are used again by later steps: as many exist as are kept at once.
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
    """Keeps the tensors of recomputed layers on the host.

    Attributes:
        held_bytes: on the host now, for backward.
        host_bytes: all host memory that this object has, in use or free.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[_Piece]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._latest: weakref.ref[_Kept] | None = None
        self.held_bytes = 0
        self.host_bytes = 0

    def hooks(self) -> saved_tensors_hooks:
        """A context in which what autograd saves is kept on the host."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, x: Tensor) -> _Kept | Tensor:
        if not x.numel():
            return x
        kept = _Kept(self, x, before=self._latest)
        self._latest = weakref.ref(kept)
        return kept

    @contextmanager
    def side(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """Copies inside run beside the computation, after what it was asked so far."""
        if device.type != "cuda":
            yield None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield self._stream

    def take(self, x: Tensor) -> _Piece:
        """Host memory for ``x``."""
        num_bytes = x.numel() * x.element_size()
        free = self._free.get(num_bytes)
        if free:
            piece = free.pop()
        else:
            piece = PinnedPiece(num_bytes) if x.is_cuda else _FilePiece(num_bytes)
            self.host_bytes += num_bytes
        self.held_bytes += num_bytes
        return piece

    def give_back(self, piece: _Piece) -> None:
        """Nobody reads it any more."""
        self.held_bytes -= piece.num_bytes
        self._free.setdefault(piece.num_bytes, []).append(piece)


class _Piece:
    """A piece of host memory."""

    memory: Tensor
    """uint8 [num_bytes]"""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def written(self) -> None:
        """Called after a tensor was copied here."""


class PinnedPiece(_Piece):
    """Page-locked, which copies need to run beside the computation.

    Not by torch's allocator: that rounds up to a power of two, and these are most of the host. In
    pages of its own, for a page is locked once.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.memory = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(self.memory.data_ptr(), num_bytes, 0))
        weakref.finalize(self, _unpin, self.memory).atexit = False


class _FilePiece(_Piece):
    """A mapped file without a name."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        with tempfile.TemporaryFile() as file:
            file.truncate(num_bytes)
            self._map = mmap.mmap(file.fileno(), num_bytes)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def written(self) -> None:
        """Takes the pages out of this process; what is in them stays in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Kept:
    """One tensor on the host; autograd owns it, and its memory is free when autograd lets go."""

    def __init__(self, store: LayerOffload, x: Tensor, before: weakref.ref[_Kept] | None) -> None:
        self._store, self._before = store, before
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._piece = store.take(x)
        self._fetched: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        with store.side(x.device) as stream:
            self._host().copy_(x, non_blocking=True)
            if stream is not None:
                x.record_stream(stream)  # its memory is not reused before it is copied
        self._piece.written()
        weakref.finalize(self, store.give_back, self._piece).atexit = False

    def _host(self) -> Tensor:
        return self._piece.memory.view(self._dtype).view(self._shape)

    def fetch(self) -> None:
        """Starts the copy back, unless it is under way."""
        if self._fetched is not None:
            return
        with self._store.side(self._device) as stream:
            self._fetched = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._fetched.copy_(self._host(), non_blocking=True)
            if stream is not None:
                self._ready = stream.record_event()
        self._piece.written()

    def take(self) -> Tensor:
        """The tensor on its device; on CUDA the one kept before it, read next, is on its way."""
        self.fetch()
        assert self._fetched is not None
        found, self._fetched = self._fetched, None
        if self._ready is not None:
            before = self._before() if self._before else None
            if before is not None:
                before.fetch()
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._ready)
            found.record_stream(stream)
        return found


def _unpin(memory: Tensor) -> None:
    """Lets pages go; by then nobody copies them any more."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _unpack(kept: _Kept | Tensor) -> Tensor:
    return kept.take() if isinstance(kept, _Kept) else kept
