"""Which rank holds which chunk of the sequence.

    contiguous, 4 ranks          zigzag, 4 ranks: 8 chunks, rank r holds r and 7 - r
    |0 0|1 1|2 2|3 3|            |0|1|2|3|3|2|1|0|

Under a causal mask, late queries attend more keys than early ones. Contiguous gives the last rank
almost twice the mean number of pairs. Zigzag gives each rank an early and a late chunk, so that
every rank has exactly 1/N of the pairs (Zhu, ring-flash-attention, 2024; Megatron-LM's
``get_batch_on_this_cp_rank``). Neither is balanced if documents are masked: ``balanced`` deals
slices of documents by their pairs, see ``balance/balanced.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cp_megatron.errors import ConfigError
from cp_megatron.plan.balance.area import Chunks, contiguous_chunks, zigzag_chunks
from cp_megatron.plan.balance.balanced import deal
from cp_megatron.plan.mask import IntArray, Mask

KINDS = ("contiguous", "zigzag", "balanced")


def auto_layout(mask: Mask) -> str:
    """Resolves ``auto``.

    Balanced for a row of several documents, zigzag for one sequence in which no query attends a
    later key, otherwise contiguous.
    """
    if len(mask.lengths) > 1:
        return "balanced"
    return "zigzag" if mask.is_causal or mask.window[1] == 0 else "contiguous"


def sequence_divisor(kind: str, cp_size: int) -> int:
    """The number that must divide the sequence length."""
    return 2 * cp_size if kind == "zigzag" and cp_size > 1 else cp_size


@dataclass(frozen=True)
class SequenceLayout:
    """The chunks of each rank. Every rank holds the same number of tokens.

    Attributes:
        chunks: for each rank its chunks ``(start, stop)``, ascending, which is the local order.
        kind: ``contiguous``, ``zigzag`` or ``balanced``.
    """

    chunks: Chunks
    kind: str

    @classmethod
    def make(cls, mask: Mask, cp_size: int, kind: str = "auto") -> SequenceLayout:
        """Deals the positions of ``mask`` to ``cp_size`` ranks.

        Raises:
            ConfigError: the kind is unknown, or the sequence length is not divisible.
        """
        if kind == "auto":
            kind = auto_layout(mask)
        if kind not in KINDS:
            raise ConfigError("--cp-layout", kind, "is not a layout", ", ".join(("auto", *KINDS)))
        if cp_size < 1:
            raise ConfigError("--context-parallel-size", cp_size, "must be at least 1")
        divisor = sequence_divisor(kind, cp_size)
        if mask.seq_len % divisor:
            below = mask.seq_len // divisor * divisor
            near = [str(length) for length in (below, below + divisor) if length]
            rule = f"the {kind} layout on {cp_size} context parallel ranks needs a multiple of"
            raise ConfigError("--seq-length", mask.seq_len, f"{rule} {divisor}", ", ".join(near))
        if kind == "contiguous" or cp_size == 1:
            return cls(contiguous_chunks(mask.seq_len, cp_size), kind)
        is_zigzag = kind == "zigzag"
        return cls(zigzag_chunks(mask.seq_len, cp_size) if is_zigzag else deal(mask, cp_size), kind)

    def check(self, seq_len: int) -> None:
        """Checks that the ranks hold each of ``seq_len`` positions once, ascending, equally many.

        Raises:
            ConfigError: they do not.
        """
        held = [np.asarray(chunks, dtype=np.int64).reshape(-1, 2) for chunks in self.chunks]
        ordered = all((x[:, 0] < x[:, 1]).all() and (x[1:, 0] >= x[:-1, 1]).all() for x in held)
        sizes = {int((x[:, 1] - x[:, 0]).sum()) for x in held}
        every = np.concatenate(held)
        every = every[np.argsort(every[:, 0])]
        edges = [0, *every[:, 1].tolist()]
        whole = every[:, 0].tolist() == edges[:-1] and edges[-1] == seq_len
        if not (ordered and whole and len(sizes) == 1):
            value = ", ".join(map(str, self.chunks[:2])) + (", ..." if self.cp_size > 2 else "")
            rule = f"must hold each of {seq_len} positions once, ascending, equally many per rank"
            raise ConfigError("layout", value, rule)

    @property
    def cp_size(self) -> int:
        """The number of ranks."""
        return len(self.chunks)

    @property
    def shard_len(self) -> int:
        """The number of tokens that each rank holds."""
        return sum(stop - start for start, stop in self.chunks[0])

    def positions(self, rank: int) -> IntArray:
        """int64 [seq_len / cp_size]: the positions that ``rank`` holds, in local order."""
        return np.concatenate(
            [np.arange(start, stop, dtype=np.int64) for start, stop in self.chunks[rank]]
        )
