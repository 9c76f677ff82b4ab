"""Brings whole matrices, of which every rank holds a part, to one rank each, and sends parts back.

    rank 0: a0 b0 c0 d0                  a0          -> a (f(a))              f(a)0 f(b)0 ..
    rank 1: a1 b1 c1 d1    -- collect --> b, whole    ...       -- distribute --> f(a)1 ..

Each way is one all-to-all, in which a rank sends or receives what it holds, and the matrices that
it owns; an all-gather would bring every matrix to every rank, to be computed with many times. A
matrix of a stack, such as an expert's, stays among the ranks that hold parts of it.

Shapes: E = matrices of a stack, m, n = rows and columns of a whole matrix. A rank holds a box of
it, or nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
class SharedMatrix:
    """A matrix that ranks share: a tensor, or one matrix of a stack.

    Attributes:
        tensor: the whole tensor, [m, n] or [E, m, n].
        shape: m and n.
        boxes: what ranks hold of the matrix, by rank; the others hold nothing.
        place: its number in what this rank holds of the tensor; None: this rank holds nothing.
        turn: how many matrices of the tensor before it are held by the same ranks.
    """

    tensor: Tensor
    shape: tuple[int, int]
    boxes: Mapping[int, Box]
    place: int | None
    turn: int

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        return math.prod(self.shape)

    @property
    def candidates(self) -> frozenset[int] | None:
        """The ranks one of which computes with it; None: any.

        Stacks are shared by ranks as tokens are, so that their ranks have equal work.
        """
        return None if self.tensor.ndim == 2 else frozenset(self.boxes)

    def part(self, held: Tensor) -> Tensor:
        """This rank's part, a view.

        Args:
            held: what this rank holds of the tensor, or of another one that is shared alike.
        """
        assert self.place is not None, "this rank holds a part"
        return held if held.ndim == 2 else held[self.place]

    def senders(self) -> frozenset[int]:
        """The ranks that send their boxes; those with a copy of another rank's do not."""
        first = dict[tuple[int, ...], int]()
        for rank, box in sorted(self.boxes.items()):
            first.setdefault(
                tuple(bound for part in box for bound in (part.start, part.stop)), rank
            )
        found = frozenset(first.values())
        assert sum(_numel(self.boxes[rank]) for rank in found) == self.numel, "boxes overlap"
        return found


def shared_matrices(tensors: Sequence[Tensor], group: ProcessGroup | None) -> list[SharedMatrix]:
    """All matrices of some tensors, in their order.

    Args:
        tensors: DTensors over all ranks of the group, or plain tensors of one rank, [m, n] or
            stacks [E, m, n].
        group: the ranks; None is one rank.
    """
    members = None if group is None else dist.get_process_group_ranks(group)
    this = 0 if group is None else group.rank()
    return [matrix for tensor in tensors for matrix in _matrices(tensor, members, this)]


class MatrixOwners:
    """Some matrices, each with the rank that computes with all of it.

    The owners are a function of the shapes and the boxes: the ranks' work, m n min(m, n) a matrix,
    is balanced. The parts that a rank holds are passed as one flat tensor, [elements]: box after
    box in the order of ``held``, each row by row.

    Args:
        matrices: those of ``shared_matrices``, or some of them, the same ones on every rank.
        group: the ranks; None is one rank.

    Attributes:
        held: those of which this rank holds a part, sorted by owner.
    """

    def __init__(self, matrices: Sequence[SharedMatrix], group: ProcessGroup | None) -> None:
        self._group = group = None if group is None or group.size() == 1 else group
        self._rank = rank = 0 if group is None else group.rank()
        self._ranks = range(1 if group is None else group.size())
        owners = _assign(matrices, len(self._ranks))
        order = sorted(range(len(matrices)), key=lambda number: owners[number])
        self.held = [matrices[number] for number in order if matrices[number].place is not None]
        self._own = [matrices[number] for number in order if owners[number] == rank]
        senders = {number: matrices[number].senders() for number in order}
        self._senders = [senders[number] for number in order if owners[number] == rank]
        self._sends = [
            rank in senders[number] for number in order if matrices[number].place is not None
        ]
        self._sent_to, self._held_of = Counter[int](), Counter[int]()
        for number in order:
            if rank in matrices[number].boxes:
                size = _numel(matrices[number].boxes[rank])
                self._held_of[owners[number]] += size
                self._sent_to[owners[number]] += size if rank in senders[number] else 0

    def collect(self, flat: Tensor) -> list[Tensor]:
        """The whole matrices that this rank owns, [m, n], from the parts of all ranks.

        Every rank calls it.
        """
        parts = flat.split([_numel(matrix.boxes[self._rank]) for matrix in self.held])
        if self._group is None:
            return [part.view(x.shape) for part, x in zip(parts, self.held, strict=True)]
        sent = [part for part, sends in zip(parts, self._sends, strict=True) if sends]
        counts = Counter[int]()
        for matrix, senders in zip(self._own, self._senders, strict=True):
            counts.update({rank: _numel(matrix.boxes[rank]) for rank in senders})
        received = self._exchange(
            flat if all(self._sends) else torch.cat([flat[:0], *sent]),
            to=self._sent_to,
            of=counts,
        )
        wholes = [flat.new_empty(matrix.shape) for matrix in self._own]
        start = 0
        for rank in self._ranks:
            for whole, matrix, senders in zip(wholes, self._own, self._senders, strict=True):
                if rank in senders:
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
            return torch.cat([like[:0], *(whole.flatten() for whole in wholes)])
        parts, counts = list[Tensor](), Counter[int]()
        for rank in self._ranks:
            for whole, matrix in zip(wholes, self._own, strict=True):
                if rank in matrix.boxes:
                    parts.append(whole[matrix.boxes[rank]].flatten())
                    counts[rank] += parts[-1].numel()
        return self._exchange(torch.cat([like[:0], *parts]), to=counts, of=self._held_of)

    def _exchange(self, sent: Tensor, *, to: Mapping[int, int], of: Mapping[int, int]) -> Tensor:
        sizes = [of.get(rank, 0) for rank in self._ranks], [to.get(rank, 0) for rank in self._ranks]
        received = sent.new_empty(sum(sizes[0]))
        dist.all_to_all_single(received, sent, *sizes, group=self._group)
        return received


def _assign(matrices: Sequence[SharedMatrix], ranks: int) -> list[int]:
    """The owner of each matrix: the longest work first, to the rank that has the least."""
    work, owners = [0] * ranks, [0] * len(matrices)
    costs = [matrix.numel * min(matrix.shape) for matrix in matrices]
    for number in sorted(range(len(matrices)), key=lambda number: -costs[number]):
        candidates = matrices[number].candidates
        among = range(ranks) if candidates is None else sorted(candidates)
        owners[number] = owner = min(among, key=work.__getitem__)
        work[owner] += costs[number]
    return owners


def _matrices(tensor: Tensor, members: Sequence[int] | None, this: int) -> Iterator[SharedMatrix]:
    """The matrices of a tensor; the rank ``this`` is a place in the group, as in ``boxes``."""
    *stack, rows, columns = tensor.shape
    boxes: list[dict[int, Box]] = [{} for _ in range(math.prod(stack))]
    places = dict[int, int]()
    for rank, offset, sizes in _places(tensor, members):
        if not math.prod(sizes):
            continue
        row, column = (slice(o, o + s) for o, s in zip(offset[-2:], sizes[-2:], strict=True))
        first, number = (offset[0], sizes[0]) if stack else (0, 1)
        for place in range(number):
            boxes[first + place][rank] = (row, column)
            if rank == this:
                places[first + place] = place
    turns = Counter[frozenset[int]]()
    for number, held in enumerate(boxes):
        holders = frozenset(held)
        yield SharedMatrix(
            tensor=tensor,
            shape=(rows, columns),
            boxes=held,
            place=places.get(number),
            turn=turns[holders],
        )
        turns[holders] += 1


def _places(
    tensor: Tensor, members: Sequence[int] | None
) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
    """The rank among the group's members (None: it has one), the offset and the sizes of what it
    holds."""
    if not isinstance(tensor, DTensor):
        yield 0, (0,) * tensor.ndim, tensor.shape
        return
    mesh = tensor.device_mesh
    for coordinate in product(*map(range, mesh.shape)):
        # The public function answers only for this rank.
        sizes, offset = _compute_local_shape_and_global_offset(
            tensor.shape, mesh.shape, list(coordinate), tensor.placements
        )
        place = 0 if members is None else members.index(int(mesh.mesh[coordinate]))
        yield place, offset, sizes


def _numel(box: Box) -> int:
    return math.prod(part.stop - part.start for part in box)
