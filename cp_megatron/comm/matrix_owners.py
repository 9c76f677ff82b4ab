"""Brings whole matrices, of which every rank holds a part, to one rank each, and sends parts back.

    rank 0: a0 b0 c0 d0                  a0          -> a (f(a))              f(a)0 f(b)0 ..
    rank 1: a1 b1 c1 d1    -- collect --> b, whole    ...       -- distribute --> f(a)1 ..

Each way is one all-to-all, in which a rank sends or receives what it holds, and the matrices that
it owns; an all-gather would bring every matrix to every rank, to be computed with many times.

Shapes: m, n = rows and columns of a whole matrix. A rank holds a box of it, which may be empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

Box = tuple[slice, slice]


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """A matrix that ranks share.

    Attributes:
        shape: m and n.
        owner: the rank that gets all of it.
        boxes: what each rank holds.
        senders: the ranks that send their boxes to the owner; those that hold a copy of another
            rank's box do not.
    """

    shape: tuple[int, int]
    owner: int
    boxes: tuple[Box, ...]
    senders: frozenset[int]


class MatrixOwners:
    """Some matrices, each with the rank that computes with all of it.

    The owners are a function of the shapes: the ranks' work, m n min(m, n) a matrix, is balanced.
    The parts that a rank holds are passed as one flat tensor, [elements]: box after box in
    ``order``, each row by row.

    Args:
        matrices: DTensors over all ranks of the group, [m, n], or plain tensors of one rank.
        group: the ranks; None is one rank.

    Attributes:
        order: the numbers of the matrices, sorted by owner.
    """

    def __init__(self, matrices: Sequence[Tensor], group: ProcessGroup | None) -> None:
        self._group = group = None if group is None or group.size() == 1 else group
        self._rank = 0 if group is None else group.rank()
        members = None if group is None else dist.get_process_group_ranks(group)
        self._ranks = range(len(members or [0]))
        owners = _assign([_shape(matrix) for matrix in matrices], len(self._ranks))
        self.order = sorted(range(len(matrices)), key=lambda number: owners[number])
        self._matrices = [_shared(matrices[i], owners[i], members) for i in self.order]
        self._own = [matrix for matrix in self._matrices if matrix.owner == self._rank]

    def collect(self, flat: Tensor) -> list[Tensor]:
        """The whole matrices that this rank owns, [m, n], from the parts of all ranks.

        Every rank calls it.
        """
        sizes = [_numel(matrix.boxes[self._rank]) for matrix in self._matrices]
        if self._group is None:
            found = zip(flat.split(sizes), self._matrices, strict=True)
            return [part.view(matrix.shape) for part, matrix in found]
        parts = zip(flat.split(sizes), self._matrices, strict=True)
        sent = [part for part, matrix in parts if self._rank in matrix.senders]
        received = self._exchange(
            flat if len(sent) == len(sizes) else torch.cat([flat[:0], *sent]),
            to=[self._sent_by(self._rank, owner) for owner in self._ranks],
            of=[self._sent_by(rank, self._rank) for rank in self._ranks],
        )
        wholes = [flat.new_empty(matrix.shape) for matrix in self._own]
        start = 0
        for rank in self._ranks:
            for whole, matrix in zip(wholes, self._own, strict=True):
                if rank in matrix.senders:
                    place = whole[matrix.boxes[rank]]
                    place.copy_(received[start : start + place.numel()].view_as(place))
                    start += place.numel()
        return wholes

    def distribute(self, wholes: Sequence[Tensor], like: Tensor) -> Tensor:
        """This rank's parts, flat, of what the owners computed. Every rank calls it.

        Args:
            wholes: for each matrix that this rank owns, a result of its shape.
            like: what ``collect`` got; the results have its dtype.
        """
        if self._group is None:
            return torch.cat([whole.flatten() for whole in wholes])
        found = list(zip(wholes, self._own, strict=True))
        parts = [whole[x.boxes[rank]].flatten() for rank in self._ranks for whole, x in found]
        return self._exchange(
            torch.cat([like[:0], *parts]),
            to=[sum(_numel(x.boxes[rank]) for x in self._own) for rank in self._ranks],
            of=[self._held_of(owner) for owner in self._ranks],
        )

    def _exchange(self, sent: Tensor, *, to: list[int], of: list[int]) -> Tensor:
        received = sent.new_empty(sum(of))
        dist.all_to_all_single(received, sent, of, to, group=self._group)
        return received

    def _sent_by(self, rank: int, owner: int) -> int:
        owned = (x for x in self._matrices if x.owner == owner and rank in x.senders)
        return sum(_numel(matrix.boxes[rank]) for matrix in owned)

    def _held_of(self, owner: int) -> int:
        owned = (matrix for matrix in self._matrices if matrix.owner == owner)
        return sum(_numel(matrix.boxes[self._rank]) for matrix in owned)


def _shape(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def _assign(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """The owner of each matrix: the longest work first, to the rank that has the least."""
    work, owners = [0] * ranks, [0] * len(shapes)
    costs = [m * n * min(m, n) for m, n in shapes]
    for number in sorted(range(len(shapes)), key=lambda number: -costs[number]):
        owners[number] = work.index(min(work))
        work[owners[number]] += costs[number]
    return owners


def _shared(matrix: Tensor, owner: int, members: Sequence[int] | None) -> _Shared:
    boxes = [(slice(0), slice(0))] * len(members or [0])
    first = dict[tuple[int, ...], int]()
    for rank, offset, sizes in _places(matrix, members):
        rows, columns = (slice(o, o + s) for o, s in zip(offset, sizes, strict=True))
        boxes[rank] = (rows, columns)
        if math.prod(sizes):
            key = *offset, *sizes
            first[key] = min(rank, first.get(key, rank))
    assert sum(rows * columns for *_, rows, columns in first) == matrix.numel(), "boxes overlap"
    return _Shared(
        shape=_shape(matrix),
        owner=owner,
        boxes=tuple(boxes),
        senders=frozenset(first.values()),
    )


def _places(
    matrix: Tensor, members: Sequence[int] | None
) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
    """The rank among the group's members (None: it has one), the offset and the sizes of each
    box."""
    if not isinstance(matrix, DTensor):
        yield 0, (0, 0), matrix.shape
        return
    mesh = matrix.device_mesh
    for coordinate in product(*map(range, mesh.shape)):
        # The public function answers only for this rank.
        sizes, offset = _compute_local_shape_and_global_offset(
            matrix.shape, mesh.shape, list(coordinate), matrix.placements
        )
        place = 0 if members is None else members.index(int(mesh.mesh[coordinate]))
        yield place, offset, sizes


def _numel(box: Box) -> int:
    return math.prod(part.stop - (part.start or 0) for part in box)
