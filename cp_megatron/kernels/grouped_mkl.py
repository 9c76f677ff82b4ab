"""The products of all experts in one call of oneMKL, for float32 and float64 on a CPU.

PyTorch's packages for x86-64 contain oneMKL and export ``cblas_sgemm_batch`` and
``cblas_dgemm_batch``, which take matrices of different sizes. Each thread then multiplies whole
experts, where in a loop over experts all threads share every small product and wait for one another
after it. Where the library does not export them, nothing is taken.

The results differ from those of a loop by rounding: a loop may multiply a single row in another
way.

Shapes: n rows sorted by expert, E experts, i inputs, o outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # of the enumerations of CBLAS


class _Matrices(NamedTuple):
    """A matrix for each expert that has rows.

    Attributes:
        addresses: where they begin.
        leading: numbers from a line to the next one.
        order: whether the lines in memory are rows, or columns of a transposed matrix.
    """

    addresses: NDArray[np.uint64]
    leading: int
    order: int = _AS_IT_IS


def takes(x: Tensor, *matrices: Tensor) -> bool:
    """Whether ``write_products`` or ``write_outer`` computes a product of these tensors."""
    if not x.is_cpu or x.dtype not in _routines():
        return False
    return all(1 in matrix.stride()[-2:] for matrix in matrices)


def write_products(
    y: Tensor, x: Tensor, matrices: Tensor, counts: Sequence[int], *, adds: bool
) -> None:
    """Multiplies each expert's rows by its matrix.

    Args:
        y: [n, o], contiguous, which is overwritten.
        x: [n, i], contiguous.
        matrices: [E, i, o], of which one of the last two dims has stride 1.
        counts: rows of each expert.
        adds: add the products to ``y`` instead.
    """
    busy, rows = _busy(counts)
    inputs, outputs = matrices.shape[1:]
    _, down, across = matrices.stride()
    lines = (down, _AS_IT_IS, outputs) if across == 1 else (across, _TRANSPOSED, inputs)
    each = _Matrices(_each(matrices, busy), max(lines[0], lines[2]), lines[1])
    operands = (_rows(x, rows), each, _rows(y, rows))
    _multiply(x.dtype, operands, (rows, outputs, inputs), adds=adds)


def write_outer(dweight: Tensor, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    """Multiplies the transposed rows of each expert: dy^T x.

    Args:
        dweight: [E, o, i], contiguous. Experts without rows are not written.
        dy: [n, o], contiguous.
        x: [n, i], contiguous.
        counts: rows of each expert.
    """
    busy, rows = _busy(counts)
    left = _rows(dy, rows)._replace(order=_TRANSPOSED)
    out = _Matrices(_each(dweight, busy), dweight.shape[2])
    operands = (left, _rows(x, rows), out)
    _multiply(x.dtype, operands, (*dweight.shape[1:], rows), adds=False)


def _busy(counts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The experts that have rows, and how many."""
    rows = np.array(counts, dtype=np.int32)
    (busy,) = rows.nonzero()
    return busy, rows[busy]


def _rows(x: Tensor, rows: NDArray[np.int32]) -> _Matrices:
    wide, width = rows.astype(np.int64), x.shape[1]
    return _Matrices(_addresses(x, (wide.cumsum() - wide) * width), width)


def _each(matrices: Tensor, busy: NDArray[np.int64]) -> NDArray[np.uint64]:
    return _addresses(matrices, busy * matrices.stride(0))


def _addresses(x: Tensor, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    return (x.data_ptr() + places * x.element_size()).astype(np.uint64)


def _multiply(
    dtype: torch.dtype,
    operands: tuple[_Matrices, _Matrices, _Matrices],
    sizes: tuple[int | NDArray[np.int32], ...],
    *,
    adds: bool,
) -> None:
    """Multiplies the first operand by the second one, into the third one, or adds to it.

    Args:
        dtype: of all numbers.
        operands: [m, k], [k, n] and [m, n] for each expert that has rows.
        sizes: m, n and k, which are the same for all experts or not.
    """
    count = len(operands[0].addresses)
    if not count:
        return

    def per_group(value: int | NDArray[np.int32]) -> NDArray[np.int32]:
        return np.full(count, value, np.int32)

    left, right, out = operands
    ones = np.ones(count, np.float64 if dtype == torch.float64 else np.float32)
    arrays = [
        *(per_group(x.order) for x in (left, right)),
        *(per_group(size) for size in sizes),
        ones,
        *(left.addresses, per_group(left.leading), right.addresses, per_group(right.leading)),
        ones if adds else np.zeros_like(ones),
        *(out.addresses, per_group(out.leading)),
    ]
    groups = per_group(1)  # of one product each
    pointers = [array.ctypes.data for array in (*arrays, groups)]
    with torch.profiler.record_function("grouped product"):
        _routines()[dtype](_ROW_MAJOR, *pointers[:-1], count, pointers[-1])


@cache
def _routines() -> Mapping[torch.dtype, Callable[..., None]]:
    """The routines of oneMKL by the type of their numbers; none where they are not exported."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not path.exists():
        return {}
    library = ctypes.CDLL(str(path))
    found = {}
    for dtype, name in ((torch.float32, "s"), (torch.float64, "d")):
        routine = getattr(library, f"cblas_{name}gemm_batch", None)
        if routine is None:
            return {}
        address, number = ctypes.c_void_p, ctypes.c_int
        routine.argtypes = [number, *[address] * 13, number, address]
        routine.restype = None
        found[dtype] = routine
    return found
