"""The small products of all experts in one call of oneMKL, for float32 and float64 on a CPU.

PyTorch's packages for Linux on x86-64 contain oneMKL and export ``cblas_sgemm_batch`` and
``cblas_dgemm_batch``, which take matrices of different sizes. Each thread then multiplies whole
experts, where in a loop over experts all threads share every small product and wait for one another
after it. Large products are left to such a loop: one expert may have most of the rows, and a single
thread would compute them. Which these are depends on the expert alone, and on no grid. Where the
library does not export the routines, nothing is taken.

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
from torch import Tensor, nn

_LARGE = 2**24
"""Multiplications above which threads share a product instead of taking one each."""
_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # of the enumerations of CBLAS


class _Matrices(NamedTuple):
    """A matrix for each expert that has rows.

    Attributes:
        addresses: where they begin.
        leading: numbers from a line to the next one.
        order: whether the lines in memory are rows of the matrix or its columns.
    """

    addresses: NDArray[np.uint64]
    leading: int
    order: int = _AS_IT_IS


def takes(*tensors: Tensor) -> bool:
    """Whether ``write_products`` or ``write_outer`` computes a product of these tensors."""
    dtype = tensors[0].dtype
    return dtype in _routines() and all(x.dtype == dtype and _has_lines(x) for x in tensors)


def _has_lines(x: Tensor) -> bool:
    """Whether a tensor has memory here, in which its matrices are rows or columns apart."""
    if type(x) not in (Tensor, nn.Parameter) or not x.is_cpu or not x.numel():
        return False
    (rows, columns), (down, across) = x.shape[-2:], x.stride()[-2:]
    in_rows = across == 1 and (rows == 1 or down >= columns)
    return in_rows or (down == 1 and (columns == 1 or across >= rows))


def write_products(
    y: Tensor, x: Tensor, matrices: Tensor, counts: Sequence[int], *, adds: bool
) -> set[int]:
    """Multiplies each expert's rows by its matrix, if they are few, and returns these experts.

    Args:
        y: [n, o], contiguous, which is overwritten.
        x: [n, i], contiguous.
        matrices: [E, i, o], of which one of the last two dims has stride 1.
        counts: rows of each expert.
        adds: add the products to ``y`` instead.
    """
    inputs, outputs = matrices.shape[1:]
    assert (x.shape[1], y.shape) == (inputs, (len(x), outputs)), (x.shape, matrices.shape, y.shape)
    few = _few(counts, inputs * outputs)
    _, down, across = matrices.stride()
    lines = (down, _AS_IT_IS, outputs) if across == 1 else (across, _TRANSPOSED, inputs)
    each = _Matrices(_each(matrices, few), max(lines[0], lines[2]), lines[1])
    operands = (_rows(x, few), each, _rows(y, few))
    _multiply(x.dtype, operands, (few.rows, outputs, inputs), adds=adds)
    return set(few.experts.tolist())


def write_outer(dweight: Tensor, dy: Tensor, x: Tensor, counts: Sequence[int]) -> set[int]:
    """Multiplies the transposed rows of each expert, dy^T x, if they are few, and returns these.

    Args:
        dweight: [E, o, i], contiguous.
        dy: [n, o], contiguous.
        x: [n, i], contiguous.
        counts: rows of each expert.
    """
    outputs, inputs = dweight.shape[1:]
    few = _few(counts, inputs * outputs)
    left = _rows(dy, few)._replace(order=_TRANSPOSED)
    operands = (left, _rows(x, few), _Matrices(_each(dweight, few), inputs))
    _multiply(x.dtype, operands, (outputs, inputs, few.rows), adds=False)
    return set(few.experts.tolist())


class _Few(NamedTuple):
    """The experts that have rows, and not too many.

    Attributes:
        experts: their numbers.
        begins: where their rows begin.
        rows: how many these are.
    """

    experts: NDArray[np.int64]
    begins: NDArray[np.int64]
    rows: NDArray[np.int32]


def _few(counts: Sequence[int], numbers: int) -> _Few:
    """``numbers`` are those of an expert's matrix."""
    rows = np.array(counts, dtype=np.int64)
    (experts,) = ((rows > 0) & (rows * numbers <= _LARGE)).nonzero()
    return _Few(experts, (rows.cumsum() - rows)[experts], rows[experts].astype(np.int32))


def _rows(x: Tensor, few: _Few) -> _Matrices:
    return _Matrices(_addresses(x, few.begins * x.shape[1]), x.shape[1])


def _each(matrices: Tensor, few: _Few) -> NDArray[np.uint64]:
    return _addresses(matrices, few.experts * matrices.stride(0))


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
        sizes: m, n and k, each a number for all experts, or one for each expert that has rows.
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
