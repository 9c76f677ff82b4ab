"""The tokens of one rank in blocks of equal length, as a kernel of a linear recurrence takes them.

Every piece (``states.py``) is cut into blocks; the last block of a piece is padded. A block may
hold several documents, so three masks say which tokens a token reads, which tokens read the state
that enters the block, and which tokens are in the state that leaves it. Documents of 3, 2 and 4
tokens on one rank, blocks of 4:

    tokens      0 0 0 1 | 1 2 2 2 | 2 . . .      the token's document; . is padding
    enters      . . . . | x . . . | x . . .      its document began before the block
    leaves      . . . x | . x x x | x . . .      its document is that of the block's last token
    carries        no   |    no   |   yes        the state that enters is in the one that leaves
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.states import Piece

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StateBlocks:
    """The blocks of a rank's pieces, one piece after the other. n blocks of C tokens.

    Attributes:
        place: int64 [tokens]: where each token of the shard lies among the n * C places.
        reads: bool [n, C, C]: whether token i reads token j: one document, j not after i.
        enters, leaves: bool [n, C], as above; False for padding.
        carries: bool [n], as above.
        first, last: int64 [pieces]: the first and the last block of each piece.
        forward: blocks whose entering states depend on that of the block before, in the order in
            which they can be computed; those of one array at once. The first blocks of pieces are
            not among them.
        backward: the same for the gradients of leaving states and the block after.
        piece: int64 [n]: the piece of each block.
        entry: the blocks that read the state that enters their piece, in order.
    """

    place: IntArray
    reads: BoolArray
    enters: BoolArray
    leaves: BoolArray
    carries: BoolArray
    first: IntArray
    last: IntArray
    forward: tuple[IntArray, ...]
    backward: tuple[IntArray, ...]
    piece: IntArray
    entry: IntArray

    @classmethod
    def of(cls, mask: Mask, pieces: Sequence[Piece], length: int) -> StateBlocks:
        """Cuts the pieces of one rank into blocks of ``length`` tokens."""
        lengths = np.asarray([piece.stop - piece.start for piece in pieces], dtype=np.int64)
        counts = -(-lengths // length)
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        positions = np.full((int(counts.sum()), length), -1, dtype=np.int64)
        place = np.empty(int(lengths.sum()), dtype=np.int64)
        for piece, block, size in zip(pieces, first.tolist(), lengths.tolist()):
            begin = block * length
            place[piece.offset : piece.offset + size] = np.arange(begin, begin + size)
            positions.reshape(-1)[begin : begin + size] = np.arange(piece.start, piece.stop)
        real = positions >= 0
        document = np.searchsorted(mask.starts, positions, side="right") - 1  # -1 for padding
        began = np.where(real, mask.starts[document], mask.seq_len)
        enters = real & (began < positions[:, :1])
        ends = np.take_along_axis(document, real.sum(1, keepdims=True) - 1, axis=1)
        leaves = real & (document == ends)
        carries = (enters & leaves).any(1)
        order = np.tri(length, dtype=np.bool_)
        reads = real[:, :, None] & (document[:, :, None] == document[:, None, :]) & order
        last = first + counts - 1
        levels = _levels(carries.tolist(), first.tolist())
        # In reverse, the block after takes the part of the block before.
        mirrored = _levels(carries[::-1].tolist(), (len(carries) - 1 - last)[::-1].tolist())
        backward = tuple(len(carries) - 1 - blocks for blocks in mirrored)
        piece_of = np.repeat(np.arange(len(pieces), dtype=np.int64), counts)
        # The document that a piece begins with, if it began before.
        begun = np.where([piece.enters for piece in pieces], document[first, 0], -2)
        entry = np.flatnonzero(document[:, 0] == begun[piece_of])
        return cls(
            *(place, reads, enters, leaves, carries, first, last, levels, backward),
            *(piece_of, entry),
        )


def _levels(carries: list[bool], first: list[int]) -> tuple[IntArray, ...]:
    """Groups blocks by the number of blocks before them in their piece whose states theirs depends
    on. The first blocks of pieces are in no group."""
    starts, found = set(first), list[list[int]]()
    level = 0
    for block in range(len(carries)):
        if block in starts:
            level = 0
            continue
        level = level + 1 if carries[block - 1] else 1
        while len(found) < level:
            found.append([])
        found[level - 1].append(block)
    return tuple(np.asarray(blocks, dtype=np.int64) for blocks in found)
