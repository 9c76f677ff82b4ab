"""Masks: which keys a query attends.

Every mask of this project gives query ``q`` one contiguous run of keys, ``first(q) .. last(q)``,
and neither end decreases as ``q`` grows. This makes planning cheap: the pairs of any rectangle are
a sum over rows, and the keys that a chunk of queries needs are one run of positions.

    causal               full                 documents([3, 2])
    q\\k 0 1 2 3 4       q\\k 0 1 2 3 4       q\\k 0 1 2 3 4
     0   x . . . .        0   x x x x x        0   x . . . .
     1   x x . . .        1   x x x x x        1   x x . . .
     2   x x x . .        2   x x x x x        2   x x x . .
     3   x x x x .        3   x x x x x        3   . . . x .
     4   x x x x x        4   x x x x x        4   . . . x x
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

IntArray = npt.NDArray[np.int64]
Window = tuple[int, int]
MaskKind = Literal["causal", "full", "documents"]


@dataclass(frozen=True)
class Mask:
    """One mask for every row of a batch, made with ``causal``, ``full`` or ``documents``.

    Attributes:
        lengths: the lengths of the documents, in order; a single length if the row is not packed.
        is_causal: whether a query attends no later key.
        window: ``(left, right)``, both >= -1, where -1 is unlimited: query q attends key k of its
            document iff ``q - left <= k <= q + right``. Causal masks have ``right == 0``.
        kind: the name of the constructor, for display.
    """

    lengths: tuple[int, ...]
    is_causal: bool
    window: Window
    kind: MaskKind

    @classmethod
    def causal(cls, seq_len: int, window: Window | None = None) -> Mask:
        """One sequence; a query attends itself and all earlier positions."""
        return cls._make([seq_len], True, window, "causal")

    @classmethod
    def full(cls, seq_len: int, window: Window | None = None) -> Mask:
        """One sequence; every query attends every key."""
        return cls._make([seq_len], False, window, "full")

    @classmethod
    def documents(
        cls, lengths: Sequence[int], causal: bool = True, window: Window | None = None
    ) -> Mask:
        """A packed row; attention never crosses document borders."""
        return cls._make(lengths, causal, window, "documents")

    @classmethod
    def _make(
        cls, lengths: Sequence[int], causal: bool, window: Window | None, kind: MaskKind
    ) -> Mask:
        array = np.asarray(lengths)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu" or array.min() < 1:
            rule = "must be positive integers, one or more"
            raise ConfigError("mask lengths", list(lengths), rule)
        return cls(tuple(array.tolist()), causal, cls._bounds(window, causal), kind)

    def within(self, window: Window | None) -> Mask:
        """Returns the same documents with another window."""
        return replace(self, window=self._bounds(window, self.is_causal))

    @staticmethod
    def _bounds(window: Window | None, causal: bool) -> Window:
        try:
            left, right = (-1, -1) if window is None else map(operator.index, window)
        except (TypeError, ValueError):
            rule = "must be two integers, -1 for unlimited"
            raise ConfigError("window", window, rule, "(left, right)") from None
        if left < -1 or right < -1:
            rule = "must be >= 0, or -1 for unlimited"
            raise ConfigError("window", window, rule, "(left, right)")
        return left, 0 if causal else right

    @cached_property
    def seq_len(self) -> int:
        """The number of positions in the row."""
        return sum(self.lengths)

    @property
    def has_window(self) -> bool:
        """Whether the window itself, not the causal mask, excludes pairs of a long document."""
        left, right = self.window
        return left >= 0 or (right >= 0 and not self.is_causal)

    @cached_property
    def starts(self) -> IntArray:
        """int64 [documents + 1]: the start of each document, and the end of the last one."""
        starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        starts.setflags(write=False)
        return starts

    def document_positions(self) -> IntArray:
        """int64 [seq_len]: the distance of each position from the start of its document."""
        starts, lengths = self.starts[:-1], np.asarray(self.lengths)
        return np.arange(self.seq_len, dtype=np.int64) - np.repeat(starts, lengths)

    def key_range(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """Returns, for queries ``q``, the first attended key and the end of the run, both int64."""
        starts = self.starts
        document = np.searchsorted(starts, q, side="right") - 1
        first, end = starts[document], starts[document + 1]
        left, right = self.window
        if left >= 0:
            first = np.maximum(first, q - left)
        if right >= 0:
            end = np.minimum(end, q + right + 1)
        return first, end

    def pairs(self) -> int:
        """The number of attended pairs."""
        first, end = self.key_range(np.arange(self.seq_len, dtype=np.int64))
        return int((end - first).sum())

    def dense(self) -> npt.NDArray[np.bool_]:
        """bool [seq_len, seq_len], row = query: the mask written out from its definition.

        It shares no code with the methods above, so that tests can compare them with it.
        """
        position = np.arange(self.seq_len)
        q, k = position[:, None], position[None, :]
        document = np.repeat(np.arange(len(self.lengths)), self.lengths)
        allowed = document[:, None] == document[None, :]
        left, right = self.window
        if self.is_causal:
            allowed &= k <= q
        if left >= 0:
            allowed &= k >= q - left
        if right >= 0:
            allowed &= k <= q + right
        return np.asarray(allowed, dtype=np.bool_)
